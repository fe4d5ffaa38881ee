"""Checking a pipeline: the model after the passes against the model before them, on onnxruntime."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from ..passes.base import Contract, Pass, PassContext, PassReport
from ..passes.errors import InputError, ModelError, VerificationError
from ..passes.graph import all_nodes
from ..passes.pipeline import Pipeline
from .compare import Runner, Verdict, approximate_outputs, compare, judge
from .feeds import Feeds, check_names, made_up
from .reference import Reference

UNUSABLE = (ModelError, InputError)  # what onnxruntime's refusal of a model or of inputs becomes

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

    def judge(self, candidate: Runner, limit: float | None = None) -> Verdict:
        """limit: relative error allowed; None: by the output's type."""
        return judge(self.feeds, self.expected, candidate, limit, self.source, self.approximate)


def trial(model: ir.Model, ctx: PassContext, threads: int = 0) -> Trial:
    """Run the original on calibration inputs, or on made-up ones of two sizes for every dimension not pinned."""
    reference = Reference(model, threads=threads)
    if ctx.calibration:
        count = min(2, min(len(values) for values in ctx.calibration.values()))
        feeds = [{name: values[i] for name, values in ctx.calibration.items()} for i in range(count)]
        for one in feeds:
            check_names(one, model, "calibration")
        return Trial(feeds, [reference.run(one) for one in feeds], "calibration", approximate_outputs(model))
    found = made_up(model, reference.run, pins=ctx.pins, seed=ctx.seed)
    source = f"random, seed {ctx.seed}"
    return Trial([one for one, _ in found], [outputs for _, outputs in found], source, approximate_outputs(model))


def limit_of(pipeline: Pipeline, reports: Sequence[PassReport], max_drop: float | None) -> float | None:
    """The largest error that the contracts of the passes that changed something allow.

    None where a lossy or learned pass worked without a budget: its error is measured and reported, not judged.
    """
    limit = Contract.EXACT.limit
    for step, report in zip(pipeline, reports, strict=True):
        if not report.changes:
            continue
        allowed = step.contract.limit
        if allowed is None:
            if max_drop is None:
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
        if limit is None:
            return
        old = Reference(self._before, threads=self.threads)
        try:
            new = Reference(model, threads=self.threads)
            verdict = compare(old.run, new.run, self.feeds, limit, approximate=approximate_outputs(model))
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
