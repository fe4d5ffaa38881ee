"""Checking a pipeline: the model after the passes against the model before them, on onnxruntime."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from ..passes.base import Contract, LearnedPass, Pass, PassContext, PassReport
from ..passes.errors import BudgetError, InputError, ModelError, VerificationError
from ..passes.graph import all_nodes
from ..passes.pipeline import Pipeline
from ..passes.quality import cosine_drop, held_out, rows_that_count
from .compare import (
    QUANTIZED_LIMIT,
    Runner,
    Verdict,
    approximate_outputs,
    compare,
    judge,
    quantizes,
    ranked_outputs,
)
from .feeds import Feeds, check_names, made_up
from .reference import Reference

UNUSABLE = (ModelError, InputError)  # what onnxruntime's refusal of a model or of inputs becomes

MOST_JUDGED = 256  # samples that the quality of a learned model is measured on

log = logging.getLogger("graphwright")

RANDOM_OPS = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial",
                        "Bernoulli"})  # fmt: skip


def random_node(model: ir.Model) -> ir.Node | None:
    """A node whose result is another one every run, so that nothing can be compared; None: the model is a function."""
    return next((node for node in all_nodes(model) if node.domain == "" and node.op_type in RANDOM_OPS), None)


@dataclass(frozen=True)
class Trial:
    """Inputs and what the original model makes of them: everything that is checked is checked against this."""

    feeds: Sequence[Feeds]
    expected: Sequence[Mapping[str, Any]]
    source: str
    approximate: frozenset[str] = frozenset()
    ranked: Mapping[str, str] = field(default_factory=dict)
    quantized: bool = False

    def judge(self, candidate: Runner, limit: float | None = None) -> Verdict:
        """limit: relative error allowed; None: by the output's type. More is allowed of a quantized model."""
        if self.quantized:
            limit = max(limit or 0.0, QUANTIZED_LIMIT)
        return judge(self.feeds, self.expected, candidate, limit, self.source, self.approximate, self.ranked)


def trial(model: ir.Model, ctx: PassContext, threads: int = 0) -> Trial:
    """Run the original on calibration inputs, or on made-up ones of two sizes for every dimension not pinned."""
    reference = Reference(model, threads=threads)
    if ctx.calibration:
        count = min(2, min(len(values) for values in ctx.calibration.values()))
        feeds = [{name: values[i] for name, values in ctx.calibration.items()} for i in range(count)]
        for one in feeds:
            check_names(one, model, "calibration")
        expected = [reference.run(one) for one in feeds]
        return Trial(feeds, expected, "calibration", *_traits(model))
    found = made_up(model, reference.run, pins=ctx.pins, seed=ctx.seed)
    source = f"random, seed {ctx.seed}"
    feeds, expected = [one for one, _ in found], [outputs for _, outputs in found]
    return Trial(feeds, expected, source, *_traits(model))


def _traits(model: ir.Model) -> tuple[frozenset[str], dict[str, str], bool]:
    """What a comparison with the model's outputs has to know."""
    return approximate_outputs(model), ranked_outputs(model), quantizes(model)


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
        if quantizes(self._before):
            limit = max(limit, QUANTIZED_LIMIT)
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
    approximate, ranked, quantized = _traits(model)
    return replace(
        tried, expected=[reference.run(one) for one in tried.feeds], approximate=approximate, ranked=ranked,
        quantized=quantized, source=f"{tried.source}; against the rewritten model",
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

    None without calibration inputs. Only the outputs that the learned passes name count, by default all of floats.
    """
    if not ctx.calibration:
        return None
    count = min(len(values) for values in ctx.calibration.values())
    apart = held_out(count)
    indices = (apart or list(range(count)))[:MOST_JUDGED]
    named = {name for step in pipeline if isinstance(step, LearnedPass) for name in step.outputs}
    old, new = Reference(original, threads=threads), Reference(model, threads=threads)
    sums: dict[str, float] = {}
    for i in indices:
        feeds = {name: values[i] for name, values in ctx.calibration.items()}
        expected, found = old.run(feeds), new.run(feeds)
        for name, value in expected.items():
            wide = isinstance(value, np.ndarray) and (value.dtype.kind == "f" or value.dtype.name == "bfloat16")
            if wide and value.ndim and (not named or name in named):
                drop = cosine_drop(value, found[name], rows_that_count(feeds, value.shape))
                sums[name] = sums.get(name, 0.0) + drop
    drops = {name: total / len(indices) for name, total in sums.items()}
    return Quality(drops, len(indices), bool(apart), ctx.max_drop)
