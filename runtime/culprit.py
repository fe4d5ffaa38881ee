"""Which node of a model TVM and onnxruntime differ in: found by halves, the verdict on the artifact being the judge."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path

import onnx_ir as ir

from ..passes.errors import GraphwrightError, InputError, VerificationError
from ..passes.graph import site
from .artifact import Artifact
from .build import build
from .compare import Verdict
from .device import NoAnswer, RunFailed
from .session import Session
from .target import Target
from .verify import Trial

BUDGET = 600.0  # seconds that all searches of a model may take

log = logging.getLogger("graphwright")


def judged(artifact: Artifact, tried: Trial, threads: int | None = None) -> Verdict | VerificationError:
    """The verdict on an artifact; the error that says how its results differ from what is expected when they do, or
    that its code fails.

    Raises TargetError when it cannot run on this machine, VerificationError when it does not come to an end.
    """
    session = Session(artifact, threads=threads, verify=False, rescue=False)
    names = [value.name for value in session.get_outputs()]
    what = f"artifact for {artifact.target.name}"
    try:
        verdict = tried.judge(lambda one: dict(zip(names, session.run(None, one), strict=True)))
        verdict.check(what)
    except NoAnswer as error:  # a search would wait as long at every step
        raise VerificationError(f"{what}: {_inside(error, artifact)}, or --no-verify") from error
    except (InputError, RunFailed) as error:  # the original took these inputs
        return VerificationError(f"{what}: {_inside(error, artifact)}")
    except VerificationError as error:
        return error
    return verdict


def _inside(error: GraphwrightError, artifact: Artifact) -> str:
    """What an error says, with the files of the artifact named as they are inside it."""
    return str(error).replace(f"{artifact.root}{os.sep}", "")


def find_wrong(
    model: ir.Model,
    target: Target,
    tried: Trial,
    *,
    known: Collection[str] = (),
    threads: int | None = None,
    progress: Callable[[str], None] = lambda message: None,
    end: float | None = None,
) -> list[ir.Node]:
    """The node of a model that makes the difference between what onnxruntime gives and what the compiled code does.

    The first k nodes are compiled and the others left to onnxruntime; of all k between none, where nothing differs, and
    all, where something does, the halves lead to one where a single node more makes the difference. That takes as many
    compilations as the number of nodes has binary digits. known: sites of nodes that stay with onnxruntime throughout.
    end: of `time.monotonic()`, by default BUDGET seconds from now. When it has come, or a trial cannot be built, the
    nodes that are left, of which one makes the difference; [] where those are all.
    """
    nodes = [node for node in model.graph if site(node) not in known]
    end = time.monotonic() + BUDGET if end is None else end
    right, wrong = 0, len(nodes)
    while wrong - right > 1:
        if time.monotonic() > end:
            log.warning("the search for the node that makes the difference takes too long")
            break
        middle = (right + wrong) // 2
        progress(f"look for the node that makes the difference: {wrong - right} left")
        trusted = {site(node) for node in nodes[:middle]}
        try:
            if _is_wrong(model, target, tried, trusted, threads):
                wrong = middle
            else:
                right = middle
        except GraphwrightError as error:
            log.info("the search for the node that makes the difference ends: %s", error)
            break
    left = nodes[right:wrong]
    return left if len(left) < max(2, len(nodes)) else []


def _is_wrong(model: ir.Model, target: Target, tried: Trial, trusted: Collection[str], threads: int | None) -> bool:
    with tempfile.TemporaryDirectory(prefix="graphwright-") as folder:
        artifact = build(
            model, target, Path(folder) / "trial", distrust=lambda node: "" if site(node) in trusted else "a trial"
        )
        return isinstance(judged(artifact, tried, threads), VerificationError)
