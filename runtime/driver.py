"""`optimize`: the whole road from an ONNX file to a verified result."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import onnx_ir as ir

from ..passes import io, registry
from ..passes.base import Caches, Contract, PassContext, PassReport, TrainingJob, Weights, WidthJob
from ..passes.errors import ModelError, TargetError, VerificationError
from ..passes.graph import site
from ..passes.pipeline import Observer, Pipeline
from . import verify as verification
from .compare import Verdict
from .evaluator import evaluate
from .feeds import Unfed
from .reference import NoKernel
from .stopwatch import Stopwatch
from .target import Target
from .tuner import Tuned, check_tunable, find_tiles

if TYPE_CHECKING:
    from .artifact import Artifact

MOST_BLAMED = 3  # searches for a node that TVM and onnxruntime differ in, before onnxruntime gets the whole model

log = logging.getLogger("graphwright")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Result:
    """What `optimize` made.

    model: the rewritten graph. path: the ONNX file or artifact folder written, None for a dry run or a model that
    was not to be saved. verdict: the last comparison with the original, or of an artifact whose passes change the
    numbers, with the rewritten model; None when `unverified` says why there is none. quality: of a model with learned
    passes, on the calibration inputs. tuned: what is known about the tiles of its kernels; None where nobody asked.
    """

    model: ir.Model
    reports: tuple[PassReport, ...]
    pipeline: Pipeline
    artifact: Artifact | None = None
    path: Path | None = None
    verdict: Verdict | None = None
    unverified: str = ""
    quality: verification.Quality | None = None
    tuned: Tuned | None = None


def default_output(model: str | os.PathLike[str], target: str | None) -> Path:
    """model.onnx -> model.opt.onnx, or the folder model.TARGET."""
    path = Path(model)
    if not path.name:
        raise ModelError(f"{path}: is a folder; expected an ONNX file")
    return path.with_name(f"{path.stem}.{target.replace('_', '-') if target else 'opt.onnx'}")


def plan(passes: str | Pipeline, preset: str | None, target: Target | None, pins: Mapping[str, object]) -> Pipeline:
    """The pipeline that will run: the preset (by default what the output needs), then the named passes."""
    base = registry.preset(preset or ("compile" if target else "default"))
    named = passes if isinstance(passes, Pipeline) else Pipeline.parse(passes)
    pipeline = Pipeline.parse(base) + named
    if pins and not any(step.name == "pin-shapes" for step in pipeline):
        pipeline = Pipeline.parse("pin-shapes") + pipeline
    return pipeline


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Python's cycle collector walks every node of every graph again and again: a third of the time on 10,000 nodes."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _naming_the_file(function: F) -> F:
    """Errors of a model that was read from a file begin with the file's name."""

    @functools.wraps(function)
    def named(model: str | os.PathLike[str] | ir.Model, *args: Any, **options: Any) -> Any:
        try:
            return function(model, *args, **options)
        except ModelError as error:
            if isinstance(model, ir.Model) or str(error).startswith(f"{Path(model)}: "):
                raise
            raise ModelError(f"{Path(model)}: {error}") from error

    return named  # type: ignore[return-value]  # takes and gives the same


@_naming_the_file
@_collector_paused()
def optimize(
    model: str | os.PathLike[str] | ir.Model,
    passes: str | Pipeline = "",
    *,
    preset: str | None = None,
    target: str | Target | None = None,
    out: str | os.PathLike[str] | None = None,
    pins: Mapping[str, Sequence[int]] | None = None,
    calibration: Mapping[str, Sequence[np.ndarray]] | None = None,
    checks: Mapping[str, Sequence[np.ndarray]] | None = None,
    learned: Path | None = None,
    seed: int = 0,
    max_drop: float | None = None,
    verify: bool = True,
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    tune: float | None = None,
    observers: Sequence[Observer] = (),
    progress: Callable[[str], None] = lambda message: None,
    trainer: Callable[[TrainingJob | WidthJob, PassContext], Weights] | None = None,
) -> Result:
    """Rewrite a model, compile it when a target is named, and check the result against the original.

    model: path of an ONNX file, or an `onnx_ir.Model` (left untouched). passes: a pipeline string. preset: the passes
    that run before them; by default "compile" with a target and "default" without. out: ONNX file, or artifact
    folder with a target; by default beside the model, and nowhere for an `onnx_ir.Model` without a target. pins:
    input name -> shape. calibration: input name -> arrays, one a sample. checks: the same, inputs that the result is
    checked on in the place of those. learned: what files of learned passes are called after in the place of out.
    max_drop: error budget of lossy passes.
    threads: of the check and of the artifact's own; None for all. trainer: fits learned passes;
    `graphwright.models.fit.train`. tune: minutes in which tiles of kernels are measured
    before the model is compiled with the best ones; what was found in earlier runs is used, and 0 measures nothing.

    Raises a GraphwrightError of graphwright.passes.errors; a VerificationError leaves nothing behind.
    """
    where = None if isinstance(model, ir.Model) else Path(model)
    goal = Target.named(target) if isinstance(target, str) else target
    if tune is not None:
        check_tunable(tune, goal)
    pipeline = plan(passes, preset, goal, pins or {})
    path = Path(out) if out is not None else default_output(where or "model.onnx", goal.name if goal else None)
    writes = not dry_run and (out is not None or where is not None or goal is not None)
    if writes:
        io.check_output(path, overwrite)
    progress("load")
    original = model if isinstance(model, ir.Model) else io.load(model)
    name = where.name if where else original.graph.name or "model"
    ctx = PassContext(
        pins=pins or {}, calibration=calibration, target=goal.name if goal else None, seed=seed, max_drop=max_drop,
        progress=progress, dry_run=dry_run, trainer=trainer, output=learned or path, overwrite=overwrite,
        evaluator=functools.partial(evaluate, threads=threads or 0),
        stopwatch=Stopwatch(goal, threads, progress) if goal is not None and goal.runs_here else None,
        caches=goal.caches if goal else Caches(), dot_bf16=goal is not None and goal.isa.dot_bf16,
    )  # fmt: skip
    pipeline.check_needs(ctx)
    unverified = "" if verify and not dry_run else "--no-verify"
    if (node := verification.random_node(original)) is not None:
        unverified = verification.why_random(node)
    again = (lambda: io.load(where)) if where is not None else (lambda: original)
    tried, verdict = None, None
    if not unverified:
        progress("reference")
        try:
            tried = verification.trial(original, ctx, again, threads or 0, checks)
            unverified = verification.why_untold(tried, original)
        except Unfed as error:
            if pins and error.only_sizes:  # the model may take other shapes, so the pins are to blame
                raise
            unverified = str(error)
        except NoKernel as error:
            unverified = str(error)
        if unverified:
            tried = None
            log.warning("not verified: %s", unverified)
    # A model that was loaded here has no other use: rewriting it in place saves a copy of the graph.
    rewritten, reports = pipeline.run(original, ctx, observers, in_place=where is not None)
    if dry_run:
        return Result(rewritten, tuple(reports), pipeline)
    # What was learned is in a file now, so that running the pipeline again learns nothing.
    pipeline = Pipeline(
        tuple(
            step if report.spec == str(step) else registry.parse_pass(report.spec)
            for step, report in zip(pipeline, reports, strict=True)
        )
    )
    quality = None
    if tried is not None:
        progress("verify")
        verdict = verification.verify(tried, rewritten, again, pipeline, reports, ctx, threads or 0)
        changed = [step for step, report in zip(pipeline, reports, strict=True) if report.changes]
        if any(step.contract is Contract.LEARNED for step in changed):
            progress("quality")
            quality = verification.measure_quality(again(), rewritten, pipeline, ctx, threads or 0)
            if quality is not None:
                quality.check()
        if any(step.contract.limit is None for step in changed) and goal is not None:
            tried = verification.retold(tried, rewritten, threads or 0)
    if goal is None:
        if writes:
            progress("save")
            io.save(rewritten, path, overwrite=overwrite)
        written = path if writes else None
        return Result(rewritten, tuple(reports), pipeline, None, written, verdict, unverified, quality)

    tuned = None
    if tune is not None:
        tuned = find_tiles(rewritten, goal, tune, threads, progress)
        goal = dataclasses.replace(goal, tuning=tuned.tuning)

    from . import culprit
    from .build import build
    from .device import NoAnswer

    defaults = [value.name for value in rewritten.graph.inputs if value.is_initializer()]
    if defaults:
        log.warning(
            "inputs with a default value are compiled in (%s%s); a run that gives one is onnxruntime's",
            ", ".join(map(str, defaults[:3])), f" and {len(defaults) - 3} more" if len(defaults) > 3 else "",
        )  # fmt: skip

    def check(artifact: Artifact) -> dict[str, object] | None:
        nonlocal verdict, unverified
        if tried is None:
            return None
        progress("compare")
        try:
            found = culprit.judged(artifact, tried, threads)
        except TargetError as error:
            unverified = f"the artifact cannot run here: {str(error).removeprefix(str(artifact.root)).lstrip(':/ ')}"
            return None
        if isinstance(found, VerificationError):
            raise found
        verdict = found
        return found.to_json()

    def built(distrust: Callable[[ir.Node], str]) -> Artifact:
        return build(
            rewritten, goal, path, source=name, pipeline=str(pipeline), reports=reports, overwrite=overwrite,
            distrust=distrust, check=check, tuning=tuned.to_json() if tuned else None, progress=progress,
        )  # fmt: skip

    def built_around(error: VerificationError) -> Artifact:
        """The rewritten model passed its own check. What the compiler makes of it is another function."""
        assert tried is not None  # nothing else can have failed
        blamed: dict[str, str] = {}
        end = time.monotonic() + culprit.BUDGET
        for _ in range(MOST_BLAMED):
            log.warning("%s; looking for the node that makes the difference", error)
            nodes = culprit.find_wrong(
                rewritten, goal, tried, known=blamed, threads=threads, progress=progress, end=end
            )
            if not nodes:
                break
            which = f"{site(nodes[0])} ({nodes[0].op_type})"
            if len(nodes) > 1:
                which = f"one of the {len(nodes)} nodes from {which} to {site(nodes[-1])} ({nodes[-1].op_type})"
            runs = "it" if len(nodes) == 1 else "all of them"
            log.warning("%s makes the difference; onnxruntime runs %s", which, runs)
            blamed.update({site(node): f"TVM and onnxruntime differ: {error}" for node in nodes})
            try:
                return built(lambda node: blamed.get(site(node), ""))
            except VerificationError as again:
                error = again
        log.warning("%s; onnxruntime runs the whole model instead", error)
        reason = f"TVM and onnxruntime differ: {error}"
        return built(lambda node: reason)

    try:
        artifact = built(lambda node: "")
    except VerificationError as error:
        if not goal.is_cpu or isinstance(error.__cause__, NoAnswer):
            raise
        artifact = built_around(error)
    return Result(rewritten, tuple(reports), pipeline, artifact, path, verdict, unverified, quality, tuned)
