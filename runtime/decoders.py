"""What runs the graphs of a generator and keeps its cache: onnxruntime, or the compiled artifacts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..passes.errors import ModelError, first_line
from .generator_folder import DECODE, PREFILL, GeneratorFolder
from .ort import default_threads
from .session import Session
from .state import State

if TYPE_CHECKING:
    import onnxruntime

RESULTS = ("logits", "top_logits", "top_tokens")

Logits = tuple[np.ndarray, np.ndarray, np.ndarray]  # (n, V), (n, K) in falling order, tokens (n, K)


class Decoder(Protocol):
    """A model with its cache."""

    def load(self) -> None:
        """Do now what the first call would do: load code and weights."""

    def reset(self) -> None:
        """Forget the cache."""

    def extend(self, ids: Sequence[int], position: int, wanted: Sequence[int]) -> Logits:
        """Put tokens into the cache behind the first `position` of it, and give the logits behind those of `wanted`,
        indices into `ids`. What the cache held from `position` on is gone."""


def decoder(folder: GeneratorFolder, backend: str, threads: int | None) -> Decoder:
    """backend: tvm, for a compiled folder, or onnxruntime."""
    kind = CompiledDecoder if backend == "tvm" else OnnxruntimeDecoder
    return kind(folder, threads)


def _call(folder: GeneratorFolder, ids: Sequence[int], position: int) -> tuple[str, Sequence[int]]:
    """The part that takes a call, and the tokens that it is given. Fewer than decode takes are filled up where the
    cache has rows for that: what is written behind the call's own tokens is never read."""
    about = folder.about
    if len(ids) <= about.decode_tokens <= about.capacity - position:
        return DECODE, [*ids, *[ids[-1]] * (about.decode_tokens - len(ids))]
    return PREFILL, ids


def _feeds(part: str, ids: Sequence[int], position: int, wanted: Sequence[int]) -> dict[str, np.ndarray]:
    feeds = {"input_ids": np.array([ids], np.int64), "position": np.array([position], np.int64)}
    if part == PREFILL:
        feeds["wanted"] = np.array(wanted, np.int64)
    return feeds


def _rows(part: str, results: Sequence[np.ndarray], wanted: Sequence[int]) -> Logits:
    """Without the batch; of a decode call, which gives all rows, those that are wanted."""
    logits, top_logits, top_tokens = (array[0] if part == PREFILL else array[0][list(wanted)] for array in results)
    return logits, top_logits, top_tokens


class OnnxruntimeDecoder:
    """The ONNX files on onnxruntime. The cache is bound as input and as output, so that new rows are written into it
    and nothing of it is copied."""

    def __init__(self, folder: GeneratorFolder, threads: int | None = None) -> None:
        self.folder, self.threads = folder, threads or default_threads()

    def load(self) -> None:
        for part in (PREFILL, DECODE):
            self._bound(part)

    def reset(self) -> None:
        pass  # rows from `position` on are never read

    def extend(self, ids: Sequence[int], position: int, wanted: Sequence[int]) -> Logits:
        import onnxruntime as ort

        part, ids = _call(self.folder, ids, position)
        session, binding = self._bound(part)
        for name, array in _feeds(part, ids, position, wanted).items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name in RESULTS:  # again, since their sizes are those of this call
            binding.bind_output(name)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises a family of its own
            raise ModelError(f"{self.folder.model(part)}: onnxruntime cannot run it: {first_line(error)}") from error
        results = binding.get_outputs()[: len(RESULTS)]
        return _rows(part, [value.numpy() for value in results], wanted)

    def cache(self) -> dict[str, np.ndarray]:
        """A copy of the cache, (1, k, c, e) each."""
        return {name: value.numpy() for name, value in self._cache.items()}

    @functools.cached_property
    def _cache(self) -> dict[str, onnxruntime.OrtValue]:
        import onnxruntime as ort

        about = self.folder.about
        zeros = np.zeros(about.cache_shape, np.float32)
        return {name: ort.OrtValue.ortvalue_from_numpy(zeros.copy()) for name in about.cache_names}

    @functools.cache  # noqa: B019 -- as long-lived as the decoder
    def _bound(self, part: str) -> tuple[Any, Any]:
        """A part's session, and its binding to the cache with RESULTS as first outputs."""
        session = _ort_session(self.folder.model(part), self.threads)
        binding = session.io_binding()
        for name in RESULTS:
            binding.bind_output(name)
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)
        return session, binding


def _ort_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """Raises ModelError when onnxruntime refuses the file."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a family of its own
        raise ModelError(f"{path}: onnxruntime cannot load it: {first_line(error)}") from error


class CompiledDecoder:
    """The artifacts of a compiled folder. Both write the cache where it lies."""

    def __init__(self, folder: GeneratorFolder, threads: int | None = None) -> None:
        self.folder, self.threads = folder, threads

    def load(self) -> None:
        for part in (PREFILL, DECODE):
            self._session(part)

    def reset(self) -> None:
        pass  # rows from `position` on are never read

    def extend(self, ids: Sequence[int], position: int, wanted: Sequence[int]) -> Logits:
        part, ids = _call(self.folder, ids, position)
        results = self._session(part).run(RESULTS, _feeds(part, ids, position, wanted), state=self._cache)
        return _rows(part, results, wanted)

    @functools.cached_property
    def _cache(self) -> State:
        return self._session(DECODE).new_state()

    @functools.cache  # noqa: B019 -- as long-lived as the decoder
    def _session(self, part: str) -> Session:
        return Session(self.folder.root / part, threads=self.threads)
