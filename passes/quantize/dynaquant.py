"""The pass `dynaquant`: float weights and activations -> whole numbers, in standard Q and DQ nodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from .. import graph, io, spec
from ..base import Contract, Loss, Pass, PassContext, PassReport
from ..errors import PassError
from ..prepare.convert_opset import ConvertOpset
from ..quality import outputs_that_count
from .decide import WIDTHS, Options, decide, edited, samples
from .layers import MOST_INPUTS, Layer, find_layers
from .learn import PARTS, Learning
from .narrow_sums import MEETING
from .plan import TABLE_BITS, Plan, Timed
from .ranges import Method
from .tables import Table, find_tables
from .write import write

RULE, TABLE = "layer", "table"
EDGES = ("first", "last")
OPSET, WIDE_OPSET = 13, 21  # the first with scales of channels; with 4 and 16 bits and blocks


@dataclass(frozen=True)
class DynaQuant(Pass):
    """Convolutions and products with constant weights compute in whole numbers, calibrated on real inputs.

        Y = MatMul (X, W)    ->    X8 = QuantizeLinear (X, scale, zero)    Xd = DequantizeLinear (X8, scale, zero)
                                   Wd = DequantizeLinear <axis = 1> (W8, scales)    Y = MatMul (Xd, Wd)

    What is saved is standard ONNX, which any runtime runs: int8 weights with a scale for each output channel, data in
    uint8 with one scale and zero point, biases in int32; 4-bit weights in int4, in blocks along the inputs. Between
    an operator and the elementwise functions behind it stands nothing. Poolings, reshapes and concatenations between
    quantized operators are done on codes, and so are sums of two images.
    The ranges come from --calibration, of which every tenth sample is kept apart to measure quality on. Without it
    activations=none quantizes the weights alone. The result of calibration is a file beside the output, and the
    recorded pipeline names it: `plan=FILE` repeats the result without any inputs.
    With --max-drop the layers that cost most return to float until the outputs drop by no more.
    With flips=0.02 they do until at most 2 % of images are expected to change their first class, as the margins of
    the samples and the errors of the held-out ones tell.
    With measure=true the model is compiled for the target with codes and in float, kernels are timed, and layers that
    are slower in codes return to float where that makes the whole faster; the report has a table of all.
    With learn=all what was chosen so is learned further on the same inputs: block by block, then the whole model, to
    give what the float model gives. The file then holds what was learned.
    Left alone, each with its reason: operators without a constant weight, inside bodies of If, Loop, Scan and
    functions, with few weights, with sums that int32 might not hold, with data of which one scale leaves too little
    of a typical row, and those named by keep; tables that are small, are read by something else too, or hold NaN.

    Sources: docs/methods/dynaquant.md; Nagel et al., "A White Paper on Neural Network Quantization",
    arXiv 2106.08295; Xiao et al., "SmoothQuant", arXiv 2211.10438; Bao et al., "DynaQuant", arXiv 2511.07903.

    Options: weights: 8, 6 or 4 bits. activations: 8, 16 or none; 6 and 4 are bytes that use fewer codes. method:
    minmax, percentile, entropy or mse. group: inputs that share a scale, 0 for all of a channel; by default 32 for
    4-bit products. symmetric: weights without zero points; by default all but those of 4 bits with activations=none.
    smooth: auto, none, or a strength between 0 and 1. equalise: channels between two layers are scaled alike. correct:
    biases make up for the means that rounding to the nearest code shifts. together: weights are rounded so that the
    errors of a row cancel, else each to its nearest code. narrow_sums: 2 or 4 8-bit weights together stay so small
    that int16 holds their products with any bytes; processors with AVX2 and without VNNI compute such layers
    faster, those of 4 most, which cost up to a bit of the weights' accuracy. 0: any weights. mixed: the mean width of
    weights; layers are given 4, 6 or 8 bits by what each costs. layers: all, or their numbers from 0. keep: first,
    last, or outputs of layers and names of tables that stay in float, joined by +. tables: false leaves all of them in
    float. least: weights with which an operator is worth it.
    samples: most calibration samples that ranges come from. outputs: those that quality is measured on. learn: all, or
    some of scales, offsets (zero points and biases) and rounding (of weights), joined by +. modulator: how much more
    numbers near the border between two codes learn; 0 is the straight-through estimator. block_steps, steps, batch,
    rate, loss: of the training.
    measure: needs --target and a machine that runs it; it compiles the model two to six times.
    """

    name: ClassVar[str] = "dynaquant"
    contract: ClassVar[Contract] = Contract.LEARNED

    plan: str | None = None  # a file that an earlier run has written; nothing is calibrated
    weights: int = 8  # bits: 8, 6 (stored as 8) or 4
    activations: int | None = 8  # bits: 8, 16, none, or 6 and 4 (stored as 8)
    method: Method = Method.MSE  # minmax, percentile, entropy or mse
    group: int | None = None  # inputs that share a scale; 0: all of a channel
    symmetric: bool | None = None  # weights without zero points; by default all but those of 4 bits alone
    smooth: str = "auto"  # auto, none, or the strength of SmoothQuant
    equalise: bool = False  # cross-layer equalisation
    correct: bool = True  # bias correction, where weights are rounded each to its nearest code
    together: bool = True  # the weights of a row are rounded together; else each to its nearest code
    narrow_sums: int = 2  # 2 or 4 8-bit weights together stay so small that int16 holds their products with any bytes
    mixed: float | None = None  # mean bits of weights; each layer gets 4, 6 or 8
    layers: str = "all"  # all, or numbers joined by +
    keep: tuple[str, ...] = ()  # first, last, or outputs of layers and names of tables that stay in float, joined by +
    tables: bool = True  # tables of which Gather takes rows become int8
    least: int = 256  # weights; an operator with fewer stays in float
    samples: int = 128  # most calibration samples that ranges come from
    outputs: tuple[str, ...] = ()  # outputs that quality is measured on, joined by +; by default all of floats
    learn: tuple[str, ...] = ()  # scales, offsets and rounding, joined by +, or all
    modulator: float = 1.0  # of the gradient through the rounding; 0: straight through
    block_steps: int = 200  # steps in which blocks learn
    steps: int = 200  # steps in which the whole model learns
    batch: int = 16  # samples of a step
    rate: float = 2e-3  # learning rate of the whole model; blocks take five times that
    loss: Loss = Loss.AUTO  # of the outputs: auto, cosine, kl or mse
    flips: float | None = None  # of images, the part that may be expected to change their class
    measure: bool = False  # layers that are slower in codes on the target return to float

    def __post_init__(self) -> None:
        if self.weights not in WIDTHS:
            raise ValueError(f"weights is {self.weights}, must be 4, 6 or 8")
        if self.activations not in (4, 6, 8, 16, None):
            raise ValueError(f"activations is {self.activations}, must be 4, 6, 8, 16 or none")
        if self.group is not None and self.group < 0:
            raise ValueError(f"group is {self.group}, must be at least 0")
        if self.group and self.weights > 4 and self.activations and self.mixed is None:
            raise ValueError("group is for 4 bits, or for weights alone; products of bytes have a scale a channel")
        if self.flips is not None and not 0 < self.flips < 1:
            raise ValueError(f"flips is {self.flips:g}, must be between 0 and 1")
        if self.narrow_sums not in (0, *MEETING):
            raise ValueError(f"narrow_sums is {self.narrow_sums}, must be 0, 2 or 4")
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}, must be at least 1")
        if self.mixed is not None and not min(WIDTHS) <= self.mixed <= max(WIDTHS):
            raise ValueError(f"mixed is {self.mixed:g}, must be between {min(WIDTHS)} and {max(WIDTHS)}")
        if self.layers != "all" and not all(part.isdecimal() for part in self.layers.split("+")):
            raise ValueError(f"layers is {self.layers!r}, must be all, or numbers joined by + such as 0+2+5")
        unknown = [part for part in self.learn if part not in PARTS]
        if unknown and self.learn != ("all",):
            raise ValueError(f"learn names {unknown[0]!r}; expected {', '.join(PARTS)}, joined by +, or all")
        for name, least in (("modulator", 0), ("block_steps", 0), ("steps", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name):g}, must be at least {least}")
        if not 0 < self.rate < 1:
            raise ValueError(f"rate is {self.rate:g}, must be between 0 and 1")
        if self._strength is not None and not 0 <= self._strength <= 1:
            raise ValueError(f"smooth is {self.smooth!r}, must be auto, none, or a number between 0 and 1")

    @property
    def _strength(self) -> float | None:
        """The strength of smoothing that is asked for; NaN for text that is none."""
        if self.smooth in ("auto", "none"):
            return None
        try:
            return float(self.smooth)
        except ValueError:
            return math.nan

    def needs(self) -> frozenset[str]:
        if self.plan:
            return frozenset()
        if self.measure:
            return frozenset({"times", "samples"})
        if self.flips is not None:
            return frozenset({"ranges"})
        if self.learn:
            return frozenset({"learning"})
        if self.activations is None and self.mixed is None:
            return frozenset()
        return frozenset({"ranges"})

    @property
    def record(self) -> str:
        """The options without the file: a plan of others does not fit."""
        return str(replace(self, plan=None))

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        report = self.report()
        if not self._raise_opset(model, ctx, report):
            return report
        if self.plan:
            return self._convert(model, Plan.load(Path(self.plan), self.record), report)
        outputs_that_count(model, self.outputs)
        layers, others = find_layers(model)
        tables, left = find_tables(model, layers) if self.tables else ([], [])
        kept = self._kept(layers, tables)
        sites = [layer.site for layer in layers if layer.site not in kept]
        for node, reason in others:
            report.skipped(RULE, graph.site(node), reason)
        for name, reason in left:
            report.skipped(TABLE, name, reason)
        names = [table.name for table in tables if table.name not in kept]
        if ctx.dry_run:
            for site in sites:
                report.changed(RULE, site, f"{self.weights}-bit weights; errors are known after a run")
            for name in names:
                report.changed(TABLE, name, f"{TABLE_BITS}-bit rows; errors are known after a run")
            for site, reason in kept.items():
                report.skipped(RULE, site, reason)
            return report
        feeds = samples(_checked(ctx.calibration, model), self.samples) if ctx.calibration else []
        if ctx.max_drop is not None and not feeds:
            raise PassError("--max-drop is measured on real inputs: give --calibration too")
        if feeds and ctx.evaluator is None:
            raise PassError("nothing here can run the model; use the command optimize, plan=FILE.npz or no calibration")
        if self.learn and ctx.trainer is None:
            raise PassError("nothing here can train; use the command optimize, plan=FILE.npz, or leave learn out")
        path = ctx.output.with_name(f"{ctx.output.name}.{self.name}.npz") if feeds and (sites or names) else None
        if path is not None:
            if spec.SEPARATOR in str(path) or "," in str(path):
                raise PassError(
                    f"{path}: a path with {spec.SEPARATOR!r} or ',' cannot be recorded; choose another output"
                )
            io.check_output(path, ctx.overwrite)
            io.check_folder(path.parent)
        plan = decide(model, sites, names, kept, feeds, self._options, ctx)
        if path is not None:
            plan.save(path, self.record)
            report.spec = str(replace(self, plan=str(path)))
        return self._convert(model, plan, report)

    @property
    def _is_symmetric(self) -> bool:
        """Whether weights have no zero points. Products of bytes are computed without them; where weights are only
        stored, they cost an eighth of a bit."""
        alone = self.activations is None and self.weights == 4
        return not alone if self.symmetric is None else self.symmetric

    @property
    def _options(self) -> Options:
        return Options(
            self.weights, self.activations, self.method, self.group, self._is_symmetric, self._strength,
            self.smooth != "none", self.equalise, self.correct, self.together,
            self.mixed, self.outputs, self._learning, self.measure, self.flips, self.narrow_sums,
        )  # fmt: skip

    @property
    def _learning(self) -> Learning | None:
        if not self.learn:
            return None
        parts = PARTS if self.learn == ("all",) else self.learn
        return Learning(parts, self.modulator, self.block_steps, self.steps, self.batch, self.rate, self.loss)

    def _convert(self, model: ir.Model, plan: Plan, report: PassReport) -> PassReport:
        before = io.weights_nbytes(model)
        edited(model, plan.edits)
        write(model, plan)
        for edit in plan.edits:
            report.changed(edit.kind, edit.sites[0], f"with {', '.join(edit.sites[1:])}")
        for site, layer in plan.layers.items():
            report.changed(RULE, site, layer.detail)
        for name, table in plan.tables.items():
            report.changed(TABLE, name, table.detail)
        for site, reason in plan.kept.items():
            report.skipped(RULE, site, reason)
        report.rows += [_row(site, timed) for site, timed in plan.timing.items()]
        if plan.timing:
            rows = [Timed(TABLE_BITS, table.decibels, None, None, "codes") for table in plan.tables.values()]
            report.rows += [_row(name, row) for name, row in zip(plan.tables, rows, strict=True)]
        report.stats.update(plan.stats)
        report.stats.update({"weights_before": before, "weights_after": io.weights_nbytes(model)})
        return report

    def _kept(self, layers: list[Layer], tables: list[Table]) -> dict[str, str]:
        """Layers and tables that stay in float from the start -> why. Raises PassError for a name in keep that is
        none."""
        sites = [layer.site for layer in layers]
        named = {**dict(zip(EDGES, (sites[:1], sites[-1:]), strict=True)), **{site: [site] for site in sites}}
        named.update({table.name: [table.name] for table in tables})
        unknown = [name for name in self.keep if name not in named]
        if unknown:
            what = "not the output of a convolution or product, nor a table"
            raise PassError(f"keep names {unknown[0]!r}, which is {what}")
        kept = {site: "named by keep" for name in self.keep for site in named[name]}
        numbers = None if self.layers == "all" else {int(part) for part in self.layers.split("+")}
        beyond = [number for number in sorted(numbers or ()) if number >= len(layers)]
        if beyond:
            raise PassError(f"layers names number {beyond[0]}; the model has {len(layers)} layers, from 0 on")
        for number, layer in enumerate(layers):
            if layer.site not in kept and (reason := self._reason(number, layer, numbers)) is not None:
                kept[layer.site] = reason
        return kept

    def _reason(self, number: int, layer: Layer, numbers: set[int] | None) -> str | None:
        if numbers is not None and number not in numbers:
            return f"layer {number} is not among layers={self.layers}"
        if layer.size < self.least:
            return f"it has {layer.size} weights, too few to matter"
        if self.activations and layer.data.dtype != ir.DataType.FLOAT:
            return "the type of its data is not known to be float32; run infer-shapes first"
        if self.activations and layer.size // layer.channels > MOST_INPUTS:
            return f"int32 might not hold sums of {layer.size // layer.channels} products"
        return None

    def _raise_opset(self, model: ir.Model, ctx: PassContext, report: PassReport) -> bool:
        """Bring the model to the opset that the nodes need. False: it cannot be, and the report says why."""
        wide = 4 in (self.weights, min(WIDTHS) if self.mixed is not None else 8) or self.activations == 16
        opset = WIDE_OPSET if wide or self.group else OPSET
        if all(scope.opset >= opset for scope in graph.scopes(model)):
            return True
        conversion = ConvertOpset(opset).run(model, ctx)
        report.changes += [change for change in conversion.changes if change.rule == "opset"]
        report.skips += conversion.skips
        return not conversion.skips


def _row(site: str, timed: Timed) -> dict[str, object]:
    """Of the table that people read."""
    return {
        "layer": site, "bits": timed.bits, "dB": _rounded(timed.decibels, 1, 1), "ms": _rounded(timed.coded, 1e3, 3),
        "ms in float": _rounded(timed.plain, 1e3, 3), "decision": timed.decision,
    }  # fmt: skip


def _rounded(number: float | None, unit: float, digits: int) -> float | None:
    return None if number is None or not math.isfinite(number) else round(number * unit, digits)


def _checked(calibration: Mapping[str, object], model: ir.Model) -> Mapping[str, list]:
    """The calibration inputs. Raises PassError when their names are not those of the model's inputs."""
    known = {value.name or "" for value in model.graph.inputs}
    needed = sorted(known - set(model.graph.initializers))
    for name in [*calibration, *needed]:
        if name not in known or name not in calibration:
            raise PassError(f"calibration holds {', '.join(calibration)}; expected {', '.join(needed)}")
    if not all(calibration.values()):
        raise PassError("calibration holds no sample; expected at least one")
    return calibration  # type: ignore[return-value]  # lists of arrays, as PassContext says
