"""Checking a pipeline: the model after the passes against the model before them, on onnxruntime."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..passes.base import Contract, Pass, PassContext, PassReport
from ..passes.graph import all_nodes
from ..passes.pipeline import Pipeline
from .compare import Verdict, compare
from .feeds import Feeds, check_names, made_up
from .reference import Reference

log = logging.getLogger("graphwright")

RANDOM_OPS = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial",
                        "Bernoulli"})  # fmt: skip


def random_node(model: ir.Model) -> ir.Node | None:
    """A node whose result is another one every run, so that nothing can be compared; None: the model is a function."""
    return next((node for node in all_nodes(model) if node.domain == "" and node.op_type in RANDOM_OPS), None)


def choose_feeds(
    model: ir.Model, reference: Reference, calibration: Mapping[str, Sequence[np.ndarray]] | None, seed: int
) -> tuple[list[Feeds], str]:
    """Inputs to check `model` with and a word on where they come from.

    model: the rewritten one, whose shapes may be pinned. reference: the original, which must accept them.
    """
    if calibration:
        count = min(2, min(len(values) for values in calibration.values()))
        feeds = [{name: values[i] for name, values in calibration.items()} for i in range(count)]
        for one in feeds:
            check_names(one, model, "calibration")
        return feeds, "calibration"
    return made_up(model, reference.run, seed=seed), f"random, seed {seed}"


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
    """Observer: checks each pass that changed something against the model before it, and names the one that fails.

    Raises VerificationError.
    """

    feeds: Sequence[Feeds]
    max_drop: float | None = None
    threads: int = 0

    def before(self, step: Pass, model: ir.Model) -> None:
        self._before = model.clone()

    def after(self, step: Pass, model: ir.Model, report: PassReport) -> None:
        limit = step.contract.limit or self.max_drop
        if report.changes and limit is not None:
            old, new = Reference(self._before, threads=self.threads), Reference(model, threads=self.threads)
            compare(old.run, new.run, self.feeds, limit).check(f"pass {step}")


def verify(
    original: ir.Model, model: ir.Model, pipeline: Pipeline, reports: Sequence[PassReport], ctx: PassContext,
    reference: Reference, feeds: Sequence[Feeds], where: str, threads: int = 0,
) -> Verdict:  # fmt: skip
    """Compare the pipeline's result with the original. When they differ, run it again pass by pass to name the culprit.

    Raises VerificationError.
    """
    limit = limit_of(pipeline, reports, ctx.max_drop)
    result = Reference(model, threads=threads)
    verdict = compare(reference.run, result.run, feeds, float("inf") if limit is None else limit, where)
    if not verdict.ok:
        log.info("the result differs from the original; looking for the pass")
        pipeline.run(original, ctx, [Verifier(feeds, ctx.max_drop, threads)])
        verdict.check(f"passes {pipeline}")
    return verdict
