"""Checking a pipeline: the model after the passes against the model before them, on onnxruntime."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from ..passes.base import Contract, LearnedPass, Pass, PassContext, PassReport
from ..passes.errors import BudgetError, InputError, ModelError, VerificationError
from ..passes.graph import all_graphs, all_nodes, constant_value, input_of
from ..passes.io import special_numbers
from ..passes.pipeline import Pipeline
from ..passes.quality import Drops, caches, counts, held_out, judged
from ..passes.quantize.dynaquant import DynaQuant
from .compare import (
    Moved,
    Runner,
    Verdict,
    approximate_outputs,
    compare,
    judge,
    moved_by_rounding,
    ranked_outputs,
)
from .feeds import Feeds, check_names, made_up
from .reference import Reference
from .wavering import Wavering, least

UNUSABLE = (ModelError, InputError)  # what onnxruntime's refusal of a model or of inputs becomes

log = logging.getLogger("graphwright")

RANDOM_OPS = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial",
                        "Bernoulli"})  # fmt: skip


def random_node(model: ir.Model) -> ir.Node | None:
    """A node whose result is another one every run, so that nothing can be compared; None: the model is a function."""
    return next((node for node in all_nodes(model) if _draws(node)), None)


def why_random(node: ir.Node) -> str:
    """What a message says of a `random_node`."""
    trains = " is in training mode (export the model in evaluation mode) and" if node.op_type == "Dropout" else ""
    return f"{node.op_type}{trains} gives other numbers every run"


def _draws(node: ir.Node) -> bool:
    """A Dropout does where it trains, as in a model that was exported in training mode, or where the caller decides."""
    if node.domain != "" or node.op_type != "Dropout":
        return node.domain == "" and node.op_type in RANDOM_OPS
    mode, ratio = input_of(node, 2), constant_value(input_of(node, 1))
    if mode is None or (ratio is not None and not ratio.any()):
        return False
    training = constant_value(mode)
    return mode.is_graph_input() if training is None else bool(training.any())


@dataclass(frozen=True)
class Trial:
    """Inputs and what the original model makes of them: everything that is checked is checked against this.

    original: gives a runner of that model again. It is asked for when something differs, to see whether the model's
    numbers are rounding errors themselves.
    """

    feeds: Sequence[Feeds]
    expected: Sequence[Mapping[str, Any]]
    source: str
    original: Callable[[], Runner]
    approximate: frozenset[str] = frozenset()
    ranked: Mapping[str, str] = field(default_factory=dict)
    wavering: Wavering | None = None  # of a model that quantizes

    def judge(self, candidate: Runner, limit: float | None = None) -> Verdict:
        """limit: relative error allowed; None: by the output's type. More is allowed of a model that quantizes."""
        if self.wavering is not None:
            limit = max(limit or 0.0, self.wavering.least)

        def verdict(limit: float | None, moved: Sequence[Mapping[str, Moved]] | None = None) -> Verdict:
            known = (limit, self.source, self.approximate, self.ranked, moved)
            return judge(self.feeds, self.expected, candidate, *known)

        found = verdict(limit)
        if found.ok:
            return found
        found = verdict(limit, self.moved)
        if found.ok or limit is None or self.wavering is None:
            return found
        wide = self.wavering.limit(self.feeds, self.expected)
        return verdict(wide, self.moved) if wide > limit else found

    @functools.cached_property
    def moved(self) -> Sequence[Mapping[str, Moved]]:
        return moved_by_rounding(self.original(), self.feeds)


def trial(
    model: ir.Model, ctx: PassContext, original: Callable[[], ir.Model], threads: int = 0,
    checks: Mapping[str, Sequence[np.ndarray]] | None = None,
) -> Trial:  # fmt: skip
    """Run the original on `checks`, on calibration inputs, or on made-up ones of two sizes for every free dimension.

    original: gives the model again, however it was rewritten meanwhile. checks: input name -> arrays, one a sample.
    """
    def again() -> Runner:
        return Reference(original(), threads=threads).run

    reference = Reference(model, threads=threads)
    if given := checks or ctx.calibration:
        source = "calibration" if given is ctx.calibration else "given inputs"
        count = min(2, min(len(values) for values in given.values()))
        feeds = [{name: values[i] for name, values in given.items()} for i in range(count)]
        for one in feeds:
            check_names(one, model, source)
        expected = [reference.run(one) for one in feeds]
        return Trial(feeds, expected, source, again, *_traits(model, threads))
    found = made_up(model, reference.run, pins=ctx.pins, seed=ctx.seed)
    source = f"random, seed {ctx.seed}"
    feeds, expected = [one for one, _ in found], [outputs for _, outputs in found]
    return Trial(feeds, expected, source, again, *_traits(model, threads))


def why_untold(trial: Trial, model: ir.Model) -> str:
    """Why a trial can tell nothing of a model: all numbers of an output are NaN, which equal those of any other broken
    model. Empty where it can. Raises ModelError where it is the model's own weights that hold NaN; of an output that
    has numbers beside NaN it warns then."""
    found = {name: [one[name] for one in trial.expected if _floats(one[name])] for name in trial.expected[0]}
    broken = {name: results for name, results in found.items() if any(np.isnan(one).any() for one in results)}
    empty = [name for name, results in broken.items() if all(np.isnan(one).all() for one in results)]
    if not broken:
        return ""
    name = (empty or list(broken))[0]
    weight = _weight_with_nan(model)
    if weight and empty:
        raise ModelError(
            f"{weight} and output {name!r} is nothing but NaN; expected finite weights: export the model again "
            "(graphwright doctor lists all that are not finite; --no-verify takes it as it is)"
        )
    if weight:
        log.warning("%s and output %r holds NaN; was the export meant so?", weight, name)
    return f"output {name!r} is nothing but NaN ({trial.source}); --calibration gives other inputs" if empty else ""


def _floats(result: Any) -> bool:
    return isinstance(result, np.ndarray) and result.dtype.kind in "fV"  # V: bfloat16


def _weight_with_nan(model: ir.Model) -> str:
    for each in all_graphs(model):
        for name, value in each.initializers.items():
            tensor = value.const_value
            if tensor is not None and tensor.dtype.is_floating_point() and (nans := special_numbers(tensor)[0]):
                return f"weight {name!r} holds {nans} NaN of {tensor.size} numbers"
    return ""


def _traits(model: ir.Model, threads: int) -> tuple[frozenset[str], dict[str, str], Wavering | None]:
    """What a comparison with the model's outputs has to know."""
    allowed = least(model)
    wavering = None if allowed is None else Wavering(model, allowed, threads)
    return approximate_outputs(model), ranked_outputs(model), wavering


def limit_of(pipeline: Pipeline, reports: Sequence[PassReport], max_drop: float | None) -> float | None:
    """The largest error that the contracts of the passes that changed something allow.

    None where a lossy pass worked without a budget, and where a learned one did: the budget of a learned pass is one
    of quality, which `measure_quality` judges.
    """
    limit = Contract.EXACT.limit
    for step, report in zip(pipeline, reports, strict=True):
        if not report.changes:
            continue
        allowed = step.contract.limit
        if allowed is None:
            if max_drop is None or step.contract is Contract.LEARNED:
                return None
            allowed = max_drop
        limit = max(limit or 0.0, allowed)
    return limit


@dataclass
class Verifier:
    """Observer: checks each pass against the model before it, and names the one that fails. One that reports no
    change is checked too, as exact: it may have made one without a word.

    Raises VerificationError.
    """

    feeds: Sequence[Feeds]
    max_drop: float | None = None
    threads: int = 0

    def before(self, step: Pass, model: ir.Model) -> None:
        self._before = model.clone()

    def after(self, step: Pass, model: ir.Model, report: PassReport) -> None:
        limit = (step.contract.limit or self.max_drop) if report.changes else Contract.EXACT.limit
        if limit is None or (report.changes and step.contract is Contract.LEARNED):
            return
        limit = max(limit, least(self._before) or 0.0)
        old = Reference(self._before, threads=self.threads)
        try:
            new = Reference(model, threads=self.threads)
            verdict = compare(
                old.run, new.run, self.feeds, limit, approximate=approximate_outputs(model),
                ranked=ranked_outputs(model),
            )  # fmt: skip
        except UNUSABLE as error:
            raise VerificationError(f"pass {step}: its result cannot be run: {error}") from error
        verdict.check(f"pass {step}")


def verify(
    tried: Trial, model: ir.Model, original: Callable[[], ir.Model], pipeline: Pipeline,
    reports: Sequence[PassReport], ctx: PassContext, threads: int = 0,
) -> Verdict:  # fmt: skip
    """Check the pipeline's result. When it differs, run the pipeline again pass by pass to name the culprit.

    original: gives the model as it was before the passes. Raises VerificationError.
    """
    limit = limit_of(pipeline, reports, ctx.max_drop)
    try:
        verdict = tried.judge(Reference(model, threads=threads).run, math.inf if limit is None else limit)
        if verdict.ok:
            return verdict
        verdict.check(f"passes {pipeline}")
    except (*UNUSABLE, VerificationError) as error:
        log.info("the result differs from the original; looking for the pass")
        pipeline.run(original(), ctx, [Verifier(tried.feeds, ctx.max_drop, threads)])
        if isinstance(error, VerificationError):
            raise
        raise VerificationError(f"passes {pipeline}: the result cannot be run: {error}") from error
    return verdict


def retold(tried: Trial, model: ir.Model, threads: int = 0) -> Trial:
    """The same inputs, with what `model` makes of them: what is compiled from it is judged against that."""
    reference = Reference(model, threads=threads)
    approximate, ranked, wavering = _traits(model, threads)
    return replace(
        tried, expected=[reference.run(one) for one in tried.feeds], original=lambda: reference.run,
        approximate=approximate, ranked=ranked, wavering=wavering,
        source=f"{tried.source}; against the rewritten model",
    )  # fmt: skip


@dataclass(frozen=True)
class Quality:
    """How far a learned model's outputs are from the original's on real inputs.

    drops: output -> 1 - the mean cosine of its rows (last axis), without rows that are padding. samples: how many;
    held_out: whether nothing was learned from them.
    """

    drops: Mapping[str, float]
    samples: int
    held_out: bool
    budget: float | None = None

    @property
    def drop(self) -> float:
        return max(self.drops.values(), default=0.0)

    def check(self) -> None:
        """Raises BudgetError when the drop exceeds its budget."""
        if self.budget is None or self.drop <= self.budget:
            return
        worst = max(self.drops, key=lambda name: self.drops[name])
        raise BudgetError(
            f"output {worst!r} drops by {self.drop:.4g} on {self.samples} samples, and --max-drop allows "
            f"{self.budget:g}; train longer, replace fewer layers, or allow more"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "drop": self.drop, "drops": dict(self.drops), "samples": self.samples, "held_out": self.held_out,
            "budget": self.budget,
        }  # fmt: skip


def measure_quality(
    original: ir.Model, model: ir.Model, pipeline: Pipeline, ctx: PassContext, threads: int = 0
) -> Quality | None:
    """Run both on the calibration inputs that nothing was learned from, or on all when they are few.

    None without calibration inputs. Only the outputs that the learned passes name count, by default all of floats
    but caches.
    """
    if not ctx.calibration:
        return None
    count = min(len(values) for values in ctx.calibration.values())
    indices = judged(count)
    named = {name for step in pipeline if isinstance(step, LearnedPass | DynaQuant) for name in step.outputs}
    left_out = set() if named else caches(original)
    old, new = Reference(original, threads=threads), Reference(model, threads=threads)
    drops = Drops()
    for i in indices:
        feeds = {name: values[i] for name, values in ctx.calibration.items()}
        expected, found = old.run(feeds), new.run(feeds)
        for name, value in expected.items():
            if counts(value) and name not in left_out and (not named or name in named):
                drops.add(name, value, found[name], feeds)
    return Quality(drops.means(), len(indices), bool(held_out(count)), ctx.max_drop)
