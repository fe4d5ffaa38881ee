"""The pass `nested-widths`: weights of products stored once, of which 4 or 8 bits are read."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from .. import graph, io, spec
from ..base import Contract, Pass, PassContext, PassReport, WidthJob
from ..errors import PassError
from ..ops.nested_mat_mul import OPSET
from ..prepare.convert_opset import ConvertOpset
from ..weights import load_weights
from .calibrate import Feeds, Seen, observe
from .decide import samples
from .layers import Layer, find_layers
from .nested import ARRAYS, BITS, Nested, NestedPlan, Selector, fingerprint, nest
from .plan import Plan
from .rounding import MOST_INPUTS, products
from .write_nested import write_nested

RULE = "product"
# Of the loss of the choice made once, what a selector must stay below: it costs time of its own in every run.
WORTH = 0.95


class Choose(enum.Enum):
    """How widths are chosen. AUTO: DYNAMIC where it loses a twentieth less on held-out inputs than STATIC, else STATIC.
    """

    AUTO = "auto"
    NARROW = "narrow"  # 4 bits everywhere
    WIDE = "wide"  # 8 bits everywhere
    STATIC = "static"  # once for each product
    DYNAMIC = "dynamic"  # by a selector, for each input


@dataclass(frozen=True)
class NestedWidths(Pass):
    """Products with constant weights store 8 bits once, as 4 leading ones and 4 more, and read what they need.

        Y = MatMul (X, W)    ->    Y = graphwright.NestedMatMul <choice = 3> (X, widths, codes, scale, zero, rest)

    The leading 4 bits are a quantization of their own, in blocks along the inputs, rounded together on real inputs; the
    others hold what they leave. A product is wide, and reads both, or narrow; switching costs no memory. NestedMatMul
    has a body of standard operators with an If, so the file runs anywhere; compiled, one kernel does both, and a narrow
    product reads half the bytes.
    Widths are chosen once (choose=static: the products with the most worth for their size are wide, so that `mean`
    bits of a weight are read on the average) or for every input (choose=dynamic: a selector, relu and two products,
    looks at what the first of the products behind the first `lead` reads; those in front are always wide). A selector
    works where the data is one row, as in a decoder that writes token by token; elsewhere everything is wide.
    Choosing needs calibration inputs, of which a tenth is held out, and torch. The result is a file beside the output,
    which the recorded pipeline names: `plan=FILE` repeats it without inputs and torch, and for all values of choose.
    Run block-activations behind it: few rows are then multiplied in whole numbers.
    Left alone: what is not a product, products inside bodies of If, Loop, Scan and functions, and with few weights.

    Sources: docs/methods/dynaquant.md; Bao et al., "DynaQuant", arXiv 2511.07903 (the selector); arXiv 2508.09176
    (nested codes).

    Options: codes: the plan of a run of dynaquant:weights=4:activations=none on the same model, whose codes are the
    leading bits; the others are then rounded one by one. choose: auto, narrow, wide, static or dynamic. mean: bits of a
    weight that static and dynamic read. group: inputs that share a scale. lead: products in front of the selector; 7
    are the first block of a Llama. hidden: numbers between the selector's two layers. steps: of learning with the whole
    model, each with one sample, after the selector has learned from the worth of every product for every row. rate: of
    these steps. least: weights with which a product is worth it. samples: most calibration samples that weights are
    rounded on.
    """

    name: ClassVar[str] = "nested-widths"
    contract: ClassVar[Contract] = Contract.LEARNED

    plan: str | None = None  # a file that an earlier run has written; nothing is chosen
    codes: str | None = None  # a plan of dynaquant:weights=4:activations=none, which holds the leading bits
    choose: Choose = Choose.AUTO  # auto, narrow, wide, static or dynamic
    mean: float = 6.0  # bits of a weight that are read on the average
    group: int = 32  # inputs that share a scale
    lead: int = 7  # products in front of the selector, always wide
    hidden: int = 32  # numbers between the selector's layers
    steps: int = 60  # of learning with the whole model
    rate: float = 1e-3  # of these steps
    least: int = 4096  # weights; a product with fewer stays as it is
    samples: int = 32  # most samples that weights are rounded on

    def __post_init__(self) -> None:
        if not BITS <= self.mean <= 2 * BITS:
            raise ValueError(f"mean is {self.mean:g}, must be between {BITS} and {2 * BITS}")
        if self.group < 8 or self.group % 8:
            raise ValueError(f"group is {self.group}, must be a multiple of 8")
        for name, least in (("lead", 0), ("hidden", 1), ("steps", 0), ("samples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least {least}")
        if not 0 < self.rate < 1:
            raise ValueError(f"rate is {self.rate}, must be between 0 and 1")

    def needs(self) -> frozenset[str]:
        return frozenset() if self.plan or not self._chosen else frozenset({"widths"})

    @property
    def _chosen(self) -> bool:
        """Whether widths are chosen by what they are worth."""
        return self.choose not in (Choose.NARROW, Choose.WIDE)

    @property
    def record(self) -> str:
        """The options that a plan depends on."""
        return str(replace(self, plan=None, codes=None, choose=Choose.AUTO))

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        report = self.report()
        if any(scope.opset < OPSET for scope in graph.scopes(model)):
            conversion = ConvertOpset(OPSET).run(model, ctx)
            report.skips += conversion.skips
            if conversion.skips:
                return report
        if self.plan:
            return self._convert(model, NestedPlan.load(Path(self.plan), self.record), report)
        layers, others = find_layers(model)
        kept = {graph.site(node): reason for node, reason in others}
        chosen = []
        for layer in layers:
            if (reason := self._reason(layer)) is None:
                chosen.append(layer)
            else:
                kept[layer.site] = reason
        if ctx.dry_run or not chosen:
            for site, reason in kept.items():
                report.skipped(RULE, site, reason)
            for layer in chosen:
                report.changed(RULE, layer.site, "4 or 8 bits; which is known after a run")
            return report
        if not ctx.calibration:
            return self._convert(model, replace(self._decide(model, chosen, [], ctx), kept=kept), report)
        path = ctx.output.with_name(f"{ctx.output.name}.{self.name}.npz")
        if spec.SEPARATOR in str(path) or "," in str(path):
            raise PassError(f"{path}: a path with {spec.SEPARATOR!r} or ',' cannot be recorded; choose another output")
        io.check_output(path, ctx.overwrite)
        io.check_folder(path.parent)
        prints = {layer.site: fingerprint(layer) for layer in chosen}
        made = self._decide(model, chosen, samples(ctx.calibration, self.samples), ctx)
        plan = replace(made, kept=kept, prints=prints)
        plan.save(path, self.record)
        report.spec = str(replace(self, plan=str(path), codes=None))
        return self._convert(model, plan, report)

    def _reason(self, layer: Layer) -> str | None:
        if not layer.is_product:
            return f"it is a {layer.node.op_type}, not a product"
        if layer.size < self.least:
            return f"it has {layer.size} weights, too few to matter"
        if not np.isfinite(layer.weight()).all():
            return "its weight holds NaN or infinity"
        return None

    def _decide(
        self, model: ir.Model, layers: Sequence[Layer], feeds: Sequence[Feeds], ctx: PassContext
    ) -> NestedPlan:
        if (feeds and ctx.evaluator is None) or (self._chosen and ctx.trainer is None):
            raise PassError("nothing here can run and train the model; use the command optimize, or plan=FILE.npz")
        nested = self._nested(model, layers, feeds, ctx)
        by_data: dict[ir.Value, list[str]] = {}
        for layer in layers:
            by_data.setdefault(layer.data, []).append(layer.site)
        groups = tuple(map(tuple, by_data.values()))
        led, before = 0, 0
        while before < self.lead and led < len(groups) - 1:
            before += len(groups[led])
            led += 1
        if not self._chosen:
            return NestedPlan(nested, groups, led=led)
        assert ctx.trainer is not None
        features = list(by_data)[led].name or ""
        learn = self.choose in (Choose.AUTO, Choose.DYNAMIC)
        job = WidthJob(
            model, {site: found.parts for site, found in nested.items()}, groups, led, features, self.mean,
            (BITS, 2 * BITS), self.record, learn, self.hidden, self.steps, self.rate,
        )  # fmt: skip
        found = ctx.trainer(job, ctx)
        selector = Selector(groups[led][0], *(found.arrays[name] for name in ARRAYS)) if learn else None
        return NestedPlan(nested, groups, tuple(map(int, found.sites)), led, selector, stats=found.stats)

    def _nested(
        self, model: ir.Model, layers: Sequence[Layer], feeds: Sequence[Feeds], ctx: PassContext
    ) -> dict[str, Nested]:
        """The two parts of every product, rounded on these samples."""
        if self.codes:
            return self._completed(layers, Path(self.codes))
        grams: dict[str, np.ndarray] = {}
        first = {layer.data.name or "": layer for layer in layers}

        def take(name: str, array: np.ndarray) -> None:
            layer = first[name]
            if layer.size // layer.channels <= MOST_INPUTS:
                found = products(layer, array)
                grams[name] = grams[name] + found if name in grams else found

        seen: dict[str, Seen] = {}
        if feeds:
            ctx.progress("nested-widths: inputs of products")
            assert ctx.evaluator is not None
            seen = observe(model, dict.fromkeys(first, -1), feeds, ctx.evaluator, take)
        made = {}
        for number, layer in enumerate(layers):
            ctx.progress(f"nested-widths: weights {number + 1} of {len(layers)}")
            name = layer.data.name or ""
            channels = seen[name].channels if name in seen else None
            importance = None if channels is None else layer.per_input(channels.mean_square)
            made[layer.site] = nest(layer.matrix(layer.weight()), self.group, importance, grams.get(name))
        return made

    def _completed(self, layers: Sequence[Layer], path: Path) -> dict[str, Nested]:
        """The two parts, the first of which another pass has made. Raises PassError where that is of another kind."""
        known = Plan.load(path, load_weights(path).record).layers
        made = {}
        for layer in layers:
            found = known.get(layer.site)
            shape = (layer.channels, layer.size // layer.channels)
            if found is None or found.codes.codes.shape != shape:
                raise PassError(f"{path}: holds no codes of {layer.site!r}; expected the plan of the same model")
            if found.bits != BITS or found.codes.block != self.group or found.codes.codes.dtype != np.uint8:
                raise PassError(
                    f"{path}: the codes of {layer.site!r} have {found.bits} bits in blocks of {found.codes.block}; "
                    f"expected {BITS} bits with zero points in blocks of {self.group}"
                )
            made[layer.site] = nest(layer.matrix(layer.weight()), self.group, None, None, found.codes)
        return made

    def _convert(self, model: ir.Model, plan: NestedPlan, report: PassReport) -> PassReport:
        before = io.weights_nbytes(model)
        choose = self.choose
        if choose is Choose.AUTO:
            losses = [float(plan.stats.get(f"loss_{name}", np.inf)) for name in ("dynamic", "static")]
            choose = Choose.DYNAMIC if plan.selector is not None and losses[0] < WORTH * losses[1] else Choose.STATIC
        if choose is Choose.DYNAMIC and plan.selector is None:
            raise PassError(f"{self.plan}: was made without a selector; make one with choose=dynamic or choose=auto")
        if choose is Choose.STATIC and plan.wide is None:
            raise PassError(f"{self.plan}: was made without a choice of widths; make one with choose=static")
        everything = tuple(range(len(plan.groups)))
        wide = {Choose.NARROW: (), Choose.STATIC: plan.wide or ()}.get(choose, everything)
        selected, refusal = write_nested(model, plan, wide, choose is Choose.DYNAMIC)
        if refusal:
            report.skipped("selector", plan.selector.features if plan.selector else "", refusal)
        for number, group in enumerate(plan.groups):
            width = "4 or 8 bits, by the selector" if number in selected else f"{8 if number in wide else 4} bits"
            for site in group:
                report.changed(RULE, site, width)
        for site, reason in plan.kept.items():
            report.skipped(RULE, site, reason)
        report.stats.update(plan.stats)
        report.stats["choose"] = choose.value
        bits = plan.stats.get("bits_dynamic", self.mean) if selected else plan.bits(wide)
        report.stats.update({"mean_bits": bits, "weights_before": before, "weights_after": io.weights_nbytes(model)})
        return report
