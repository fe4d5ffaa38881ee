"""Running what TVM has compiled: weights and inputs where they are, results without copies, threads of one pool."""

from __future__ import annotations

import bisect
import functools
import math
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..passes.errors import ArtifactError, InputError, first_line
from .artifact import WEIGHTS, Artifact, Parameter, RegionSpec
from .ort import default_threads
from .pool import Pool, loading
from .state import State
from .tvm_import import import_tvm

if TYPE_CHECKING:
    import tvm

ALIGNMENT = 64  # bytes; what TVM's vector code expects of a tensor's address
SMALL = 64  # bytes; constants up to this size are in the library
SPIN_COUNT = "300"  # how often a thread of TVM's pool looks for work before it sleeps: about 0.3 ms
POOLED_SIZES = 8  # sets of input shapes after which the pool is emptied

_libraries: weakref.WeakValueDictionary[tuple[int, int], _Library] = weakref.WeakValueDictionary()
_maps: weakref.WeakValueDictionary[tuple[int, ...], np.ndarray] = weakref.WeakValueDictionary()


@functools.cache
def numpy_type(dtype: str) -> np.dtype[Any]:
    """The NumPy type of an ONNX or TVM element type's name."""
    import ml_dtypes

    known = {"float": "float32", "double": "float64", "bool": "bool", "string": "object"}
    name = known.get(dtype, dtype)
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


class Refused(InputError):
    """A check of the compiled code failed: the inputs have sizes that it does not take."""


def load_tvm() -> Any:
    """The tvm module, with a thread pool that sleeps soon after a kernel and may run on any processor.

    A worker that still spins is handed its next kernel in less than half the time that waking it takes. TVM's default
    spins for 0.1 s, which takes the processor from others. What the user's environment sets stays. Bound
    threads wait for their processor while another is idle: a kernel of 0.1 ms was seen to take 8 ms beside other
    programs.
    """
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", SPIN_COUNT)
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    # TVM takes every second processor for a hyperthread and makes its pool half as large as the machine.
    os.environ.setdefault("TVM_NUM_THREADS", str(max(os.cpu_count() or 1, default_threads())))
    return import_tvm()


def use_threads(count: int) -> None:
    """Let TVM's kernels use `count` threads in calls from this Python thread, which has a pool of its own."""
    wanted = min(count, pool_size())
    configure, used = _pool_functions()
    if used() != wanted:
        configure(1, wanted)


@functools.cache
def _pool_functions() -> tuple[Any, Any]:
    tvm = load_tvm()
    return tvm.get_global_func("runtime.config_threadpool"), tvm.get_global_func("runtime.NumThreads")


@functools.cache
def pool_size() -> int:
    """The most threads that TVM can use in this process."""
    load_tvm()
    return max(1, int(os.environ["TVM_NUM_THREADS"]))


def mapped_weights(path: Path, parameters: Sequence[Parameter]) -> list[np.ndarray]:
    """Constant tensors as views of one copy-on-write memory map, which artifacts that share the file share too."""
    if not parameters:
        return []
    status = path.stat()
    key = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
    whole = _maps.get(key)
    if whole is None:
        whole = _maps[key] = np.memmap(path, np.uint8, "c") if status.st_size else np.empty(0, np.uint8)
    for p in parameters:
        if p.nbytes != math.prod(p.shape) * numpy_type(p.dtype).itemsize or not 0 <= p.offset <= len(whole) - p.nbytes:
            raise ArtifactError(f"{path}: parameter {p.name} does not lie in the weights; compile the model again")
    return [whole[p.offset : p.offset + p.nbytes].view(numpy_type(p.dtype)).reshape(p.shape) for p in parameters]


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Zeros whose memory TVM takes as it is. A large array takes memory page by page, when it is written."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.zeros(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


class _Staging:
    """A TVM tensor over aligned memory of our own, which an input that is not aligned is copied into."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.array = aligned(shape, dtype)
        self.tensor = load_tvm().runtime.from_dlpack(self.array)


class _Machine:
    """A virtual machine, which runs one call at a time, and the staging memory of its inputs."""

    def __init__(self, library: Any, device: Any, count: int) -> None:
        tvm = load_tvm()
        self.vm = tvm.runtime.vm.VirtualMachine(library, device)
        self.main = self.vm["main"]
        self._staging: list[_Staging | None] = [None] * count

    def staged(self, index: int, array: np.ndarray) -> Any:
        staging = self._staging[index]
        if staging is None or staging.array.shape != array.shape:
            staging = self._staging[index] = _Staging(array.shape, array.dtype)
        np.copyto(staging.array, array)
        return staging.tensor


@dataclass(frozen=True, eq=False)
class _Library:
    """The kernels of a region, loaded once for all sessions: loading them again would have TVM take back from the pool
    what other threads are running. use_threads: sets the threads of calls from a Python thread."""

    module: Any
    use_threads: Callable[[int], None]

    @classmethod
    def of(cls, artifact: Artifact, path: Path) -> _Library:
        import tvm

        about = path.stat()
        with loading:
            found = _libraries.get((about.st_dev, about.st_ino))
            if found is None:
                module = tvm.runtime.load_module(str(path.absolute()))
                found = _libraries[about.st_dev, about.st_ino] = cls(module, _pool_of(artifact, path))
        return found


def _pool_of(artifact: Artifact, library: Path) -> Callable[[int], None]:
    """Join a loaded library to the artifact's pool, or leave it to TVM's; returns what sets a thread's threads."""
    name = artifact.manifest.pool
    if not name:
        return use_threads
    pool = Pool.of(artifact.root / name, artifact.manifest.files[name].blake3)
    return pool.use if pool.adopt(library) else use_threads


class TvmStep:
    """A region that TVM has compiled, ready to run."""

    def __init__(self, artifact: Artifact, region: RegionSpec, threads: int, device: Any = None) -> None:
        tvm = load_tvm()
        import tvm_ffi

        self._from_dlpack, self._empty = tvm_ffi.from_dlpack, tvm.runtime.empty
        self.region, self.threads = region, threads
        self.device = device or tvm.cpu()
        self.on_cpu = device is None
        path = artifact.root / region.file
        try:
            self._library = _Library.of(artifact, path)
            # A call takes a machine out of the list and puts it back: as many as there are calls at the same time.
            self._idle = [self._machine()]
        except ArtifactError:
            raise
        except Exception as error:  # the loader raises what the dynamic linker says
            raise ArtifactError(f"{path}: cannot be loaded ({first_line(error)}); compile the model again") from error
        self._arrays = mapped_weights(artifact.root / WEIGHTS, region.parameters)
        owned = map(self._own, self._arrays)
        weights = [self._copy(array) if own is None else own for own, array in zip(owned, self._arrays, strict=True)]
        self._weights = tvm_ffi.Array(weights)  # `tvm.runtime.convert` takes 0.2 s to find out what it was given
        self._constant = sorted(map(_span, weights, self._arrays))
        self._sizes: set[tuple[Any, ...]] = set()
        self._overwritten = set(region.in_place.values())
        self._clear = tvm.get_global_func("vm.builtin.memory_manager.clear")
        self._clear()  # what sessions that are gone have left in the pool

    def _machine(self) -> _Machine:
        return _Machine(self._library.module, self.device, len(self.region.inputs))

    def _own(self, array: np.ndarray) -> tvm.runtime.Tensor | None:
        """A tensor over the array's own memory, where TVM can use that."""
        flags = array.flags
        # DLPack has no word for memory that may not be written.
        if not (self.on_cpu and array.dtype.isbuiltin == 1 and array.size and flags.c_contiguous and flags.writeable):
            return None
        tensor = self._from_dlpack(array)
        return tensor if tensor.data_ptr() % ALIGNMENT == 0 else None

    def _copy(self, array: np.ndarray) -> tvm.runtime.Tensor:
        return self._empty(array.shape, str(array.dtype), self.device).copyfrom(array)

    def _input(self, machine: _Machine, index: int, array: np.ndarray, state: State | None) -> tvm.runtime.Tensor:
        name = self.region.inputs[index]
        if name in self._overwritten:
            return self._overwritable(array, name, state)
        tensor = self._own(array)
        if tensor is not None:
            return tensor
        if self.on_cpu and array.size and array.dtype.isbuiltin == 1:
            return machine.staged(index, array)
        return self._copy(array)

    def _overwritable(self, array: np.ndarray, name: str, state: State | None) -> tvm.runtime.Tensor:
        """An input that the code overwrites: the state's own memory, else a copy of what was given."""
        if state is None or name not in state.arrays:
            return self._copy(array)
        if name not in state.tensors:
            own = self._own(array)
            if own is None:
                raise InputError(f"the state's array {name!r} is not aligned; take a state from Session.new_state")
            state.tensors[name] = own
        return state.tensors[name]

    def __call__(self, values: Mapping[str, Any], state: State | None = None) -> dict[str, Any]:
        self._library.use_threads(self.threads)
        try:
            machine = self._idle.pop()
        except IndexError:
            machine = self._machine()
        arrays = [np.asarray(values[name]) for name in self.region.inputs]
        inputs = [self._input(machine, index, array, state) for index, array in enumerate(arrays)]
        self._bound_pool(tuple([array.shape for array in arrays]))
        try:
            result = machine.main(*inputs, self._weights)
        except Exception as error:  # a run-time check of the compiled code: shapes that the model cannot take
            raise Refused(f"the compiled model refused these inputs: {first_line(error)}") from error
        results = [result] if len(self.region.outputs) == 1 and hasattr(result, "numpy") else list(result)
        outputs = self._outputs(results, inputs, arrays, values, state)
        self._idle.append(machine)  # not after an error, which leaves its frames behind
        return outputs

    def _outputs(
        self, results: Sequence[Any], inputs: Sequence[Any], arrays: Sequence[np.ndarray], values: Mapping[str, Any],
        state: State | None,
    ) -> dict[str, Any]:  # fmt: skip
        """The results by name; what lies in the state is the state's array."""
        named = dict(zip(self.region.outputs, results, strict=True))
        kept = {}
        if state is not None:
            for made, name in self.region.in_place.items():
                if name in state.arrays:
                    kept[made] = values[name]
                    del named[made]
        given = zip(self.region.inputs, inputs, arrays, strict=True)
        taken = [_span(tensor, array) for name, tensor, array in given if name not in self._overwritten]
        return {**kept, **dict(zip(named, self._arrays_of(list(named.values()), taken), strict=True))}

    def _bound_pool(self, sizes: tuple[tuple[int, ...], ...]) -> None:
        """TVM's pool keeps every buffer by its size: with other sizes every run it would grow without end.

        sizes: the shapes of the inputs.
        """
        if sizes not in self._sizes:
            if len(self._sizes) == POOLED_SIZES:
                self._clear()
                self._sizes.clear()
            self._sizes.add(sizes)

    def _arrays_of(self, results: Sequence[Any], taken: list[tuple[int, int]]) -> list[np.ndarray]:
        """The results as arrays that share memory with nothing: not with inputs, weights or each other.

        taken: where the inputs lie; the results are added.
        """
        arrays = []
        for tensor in results:
            try:
                array = np.from_dlpack(tensor)
            except (BufferError, RuntimeError, TypeError):  # memory or types that DLPack or NumPy do not share
                arrays.append(tensor.numpy())
                continue
            address = tensor.data_ptr()
            # Up to SMALL bytes it may be a constant of the library's own.
            if array.nbytes <= SMALL or any(a <= address < b for a, b in taken) or self._is_weight(address):
                array = array.copy()
            else:
                taken.append((address, address + array.nbytes))
            arrays.append(array)
        return arrays

    def _is_weight(self, address: int) -> bool:
        at = bisect.bisect_right(self._constant, (address, 1 << 64)) - 1
        return at >= 0 and address < self._constant[at][1]


def _span(tensor: Any, array: np.ndarray) -> tuple[int, int]:
    """First address of a tensor's memory, and the one behind it. array: of the same type and shape."""
    start = tensor.data_ptr()
    return start, start + array.nbytes
