"""A model on disk, ready to run: an artifact folder or an ONNX file behind the same few methods."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.passes.errors import InputError, ModelError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

BACKENDS = ("tvm", "onnxruntime")


@dataclass(frozen=True)
class Opened:
    """A runnable model.

    name: as typed. file: the artifact folder or ONNX file that runs. backend: tvm or onnxruntime. session: `run`,
    `get_inputs` and `get_outputs` of onnxruntime. graph: its ONNX graph, the rewritten one of an artifact.
    """

    name: str
    file: Path
    backend: str
    session: Any
    graph: ir.Model

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Output name -> value. Raises InputError for feeds that do not fit."""
        from graphwright.passes.errors import GraphwrightError, first_line

        names = [value.name for value in self.session.get_outputs()]
        try:
            return dict(zip(names, self.session.run(None, dict(feeds)), strict=True))
        except GraphwrightError:
            raise
        except Exception as error:  # onnxruntime raises a family of its own
            raise InputError(f"{self.name}: refused these inputs: {first_line(error)}") from error


@contextlib.contextmanager
def opened(
    path: str, backend: str | None = None, *, threads: int | None = None, optimized: bool = True
) -> Iterator[Opened]:
    """The model at `path` for the time of the block.

    backend: tvm or onnxruntime; by default tvm for an artifact and onnxruntime for an ONNX file. An ONNX file for
    tvm is compiled for this host into a temporary folder; an artifact for onnxruntime runs its rewritten model.
    optimized: onnxruntime's own graph optimizations; off to check numbers.
    Raises ModelError, ArtifactError and their like in one line.
    """
    from graphwright.passes import io
    from graphwright.runtime.artifact import MODEL, Artifact

    where = Path(path)
    with contextlib.ExitStack() as stack:
        if where.is_dir():
            artifact = Artifact.load(where)
            graph = io.load(where / MODEL)
            if (backend or "tvm") == "tvm":
                yield Opened(path, where, "tvm", _session(artifact, threads), graph)
            else:
                file = where / MODEL
                yield Opened(path, file, "onnxruntime", _onnxruntime(file, graph, threads, optimized), graph)
            return
        graph = io.load(where)
        if (backend or "onnxruntime") == "onnxruntime":
            yield Opened(path, where, "onnxruntime", _onnxruntime(where, graph, threads, optimized), graph)
            return
        from graphwright.runtime.driver import optimize

        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="graphwright-"))
        result = optimize(where, target="cpu", out=Path(folder) / "artifact", threads=threads)
        assert result.artifact is not None  # a target was named
        yield Opened(path, result.artifact.root, "tvm", _session(result.artifact, threads), result.model)


def load_session(path: Path, backend: str, threads: int | None) -> Any:
    """A session on an artifact folder (tvm) or an ONNX file (onnxruntime), importing only what that takes."""
    return _session(path, threads) if backend == "tvm" else ort_session(path, threads)


def _session(artifact: Any, threads: int | None) -> Any:
    from graphwright.runtime.session import Session

    return Session(artifact, threads=threads)


def _onnxruntime(path: Path, graph: ir.Model, threads: int | None, optimized: bool) -> Any:
    """A user's session, or one for checks: without graph optimizations, and exact where it multiplies bytes."""
    if optimized:
        return ort_session(path, threads)
    from graphwright.runtime import reference
    from graphwright.runtime.ort import default_threads

    try:
        return reference.ort_session(graph, threads=threads or default_threads())
    except ModelError as error:
        raise type(error)(f"{path}: {error}") from error


def ort_session(path: Path, threads: int | None) -> Any:
    """An onnxruntime session on the file, as any user would make one. Raises ModelError when it is refused."""
    import onnxruntime as ort
    from graphwright.passes.errors import first_line
    from graphwright.runtime.ort import default_threads

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or default_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # Without it the threads go on spinning after a run and take the processors from what is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a family of its own
        raise ModelError(f"{path}: onnxruntime cannot load it: {first_line(error)}") from error


def choose_feeds(
    reference: Opened, candidate: Opened, file: str | None, seed: int = 0, sets: int = 2
) -> tuple[list[dict[str, np.ndarray]], str]:
    """Inputs that both models take, and where they come from: the file, or made up from the narrower graph.

    Symbolic dimensions get two sizes. Raises InputError when the file does not fit or none can be made up.
    """
    import numpy as np
    from graphwright.runtime.feeds import check_names, load_feeds, made_up, required_inputs

    if file is not None:
        feeds = load_feeds(file, reference.graph)
        for model in (candidate,):
            check_names(feeds, model.graph, f"{file} for {model.name}")
        return [feeds], file

    def open_dims(model: Opened) -> int:
        shapes = [value.shape for value in required_inputs(model.graph)]
        return sum(not isinstance(dim, int) for shape in shapes for dim in shape or ())

    narrow, wide = sorted((candidate, reference), key=open_dims)
    names = {value.name or "": np.empty(0) for value in required_inputs(narrow.graph)}
    check_names(names, wide.graph, f"inputs of {narrow.name} for {wide.name}")
    # The wider graph says whether an input is valid; what the narrower one makes of it is to be found out.
    found = made_up(narrow.graph, wide.run, seed=seed, sets=sets)
    return [feeds for feeds, _ in found], f"random, seed {seed}"
