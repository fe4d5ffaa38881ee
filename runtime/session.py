"""Running an artifact: a drop-in for `onnxruntime.InferenceSession`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..passes.errors import ArtifactError, InputError, TargetError, did_you_mean
from ..passes.io import first_line
from .artifact import WEIGHTS, Artifact, Parameter, RegionSpec, TensorSpec
from .partition import TVM
from .reference import default_threads
from .target import host_flags

if TYPE_CHECKING:
    import tvm

ALIGNMENT = 64  # bytes; what TVM's vector code expects of a tensor's address


@dataclass(frozen=True)
class NodeArg:
    """An input or output of a model, as onnxruntime describes it: `type` is like "tensor(float)"."""

    name: str
    type: str
    shape: list[int | str | None]


def node_arg(spec: TensorSpec) -> NodeArg:
    kind = spec.dtype if "(" in spec.dtype else f"tensor({spec.dtype})"
    return NodeArg(spec.name, kind, list(spec.shape or []))


def numpy_type(dtype: str) -> np.dtype[Any]:
    """The NumPy type of an ONNX or TVM element type's name."""
    import ml_dtypes

    known = {"float": "float32", "double": "float64", "bool": "bool", "string": "object"}
    name = known.get(dtype, dtype)
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


class Step(Protocol):
    """One region, ready to run: values by name in, values by name out."""

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]: ...


class Session:
    """An artifact, loaded. `run`, `get_inputs` and `get_outputs` are those of onnxruntime.

    threads: how many a run uses, onnxruntime's regions included; None for all processors this process may use.
    Raises ArtifactError when the folder is damaged or altered, TargetError when this machine cannot run it.
    """

    def __init__(
        self, artifact: str | os.PathLike[str] | Artifact, *, threads: int | None = None, verify: bool = True
    ) -> None:
        if not isinstance(artifact, Artifact):
            artifact = Artifact.load(artifact, verify=verify)
        if threads is not None and threads < 1:
            raise InputError(f"threads is {threads}; expected at least 1")
        self.artifact = artifact
        self.threads = threads or default_threads()
        self._inputs = {spec.name: spec for spec in artifact.manifest.inputs}
        self._outputs = [spec.name for spec in artifact.manifest.outputs]
        self._steps = _steps(artifact, self.threads)

    def get_inputs(self) -> list[NodeArg]:
        return [node_arg(spec) for spec in self.artifact.manifest.inputs]

    def get_outputs(self) -> list[NodeArg]:
        return [node_arg(spec) for spec in self.artifact.manifest.outputs]

    def get_providers(self) -> list[str]:
        """The runtimes that take part, in onnxruntime's manner of naming them."""
        used = {region.runtime for region in self.artifact.manifest.regions}
        return [name for key, name in (("tvm", "TVMExecutionProvider"), ("onnxruntime", "CPUExecutionProvider"))
                if key in used]  # fmt: skip

    def run(
        self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any], run_options: Any = None
    ) -> list[Any]:
        """The named outputs (all for None or []), in that order, as NumPy arrays.

        input_feed: input name -> array of the declared type and shape; aligned contiguous arrays are not copied.
        run_options is accepted for compatibility and has no effect. Raises InputError when feeds do not fit.
        """
        names = list(output_names or self._outputs)
        for name in names:
            if name not in self._outputs:
                raise InputError(f"unknown output {name!r}; {did_you_mean(name, self._outputs)}")
        values: dict[str, Any] = self._check(input_feed)
        for step in self._steps:
            values.update(step(values))
        return [values[name] for name in names]

    def _check(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        for name in feeds:
            if name not in self._inputs:
                raise InputError(f"unknown input {name!r}; {did_you_mean(name, self._inputs)}")
        missing = [name for name in self._inputs if name not in feeds]
        if missing:
            raise InputError(f"input {missing[0]!r} is missing; expected {', '.join(self._inputs)}")
        symbols: dict[str, tuple[int, str]] = {}
        return {name: _fit(feeds[name], spec, symbols) for name, spec in self._inputs.items()}


def _fit(value: Any, spec: TensorSpec, symbols: dict[str, tuple[int, str]]) -> Any:
    """The feed as an array of the declared type. `symbols`: dimension name -> (size, input that set it)."""
    if spec.dtype not in ("string",) and "(" in spec.dtype:
        return value  # a sequence or optional: onnxruntime's to check
    expected = numpy_type(spec.dtype)
    array = np.asarray(value)
    if array.dtype != expected and not (expected.kind == "O" and array.dtype.kind in "US"):
        raise InputError(f"input {spec.name!r} has type {array.dtype}; expected {expected}")
    if spec.shape is None:
        return array
    if array.ndim != len(spec.shape):
        raise InputError(f"input {spec.name!r} has shape {list(array.shape)}; expected rank {len(spec.shape)}"
                         f" {spec.shape}")  # fmt: skip
    for size, dim in zip(array.shape, spec.shape, strict=True):
        if isinstance(dim, int) and size != dim:
            raise InputError(f"input {spec.name!r} has shape {list(array.shape)}; expected {spec.shape}")
        if isinstance(dim, str):
            known, source = symbols.setdefault(dim, (size, spec.name))
            if known != size:
                raise InputError(
                    f"dimension {dim!r} is {size} in input {spec.name!r} and {known} in input {source!r}; "
                    "expected one size"
                )
    return array


def _steps(artifact: Artifact, threads: int) -> list[Step]:
    target = artifact.target
    if target.runs_here:
        return [
            _TvmStep(artifact, region, threads) if region.runtime == TVM else _OrtStep(artifact, region, threads)
            for region in artifact.manifest.regions
        ]
    if target.is_cpu and target.machine == _this_machine():
        missing = f"{target.isa.name} is not among this processor's {len(host_flags())} features"
        raise TargetError(f"{artifact.root}: built for {target.name}, which this machine cannot run ({missing})")
    if target.is_cpu:
        from .device import emulated_step

        return [emulated_step(artifact, region, threads) for region in artifact.manifest.regions]
    if target.kind == "cuda":
        import tvm

        if tvm.cuda(0).exist:
            return [_TvmStep(artifact, region, threads, tvm.cuda(0)) for region in artifact.manifest.regions]
    raise TargetError(f"{artifact.root}: built for {target.name}; this machine has no such device to run it on")


def _this_machine() -> str:
    import platform

    return platform.machine()


def load_tvm() -> Any:
    """The tvm module, with a thread pool that sleeps between kernels and may run on any processor.

    Spinning workers take the processor from the thread that prepares the next kernel: measured on two cores, a
    chain of two-thread matrix products runs three times slower with TVM's default. Bound threads wait for their
    processor while another is idle: a kernel of 0.1 ms was seen to take 8 ms beside other programs.
    """
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    import tvm

    return tvm


def mapped_weights(path: Path, parameters: Sequence[Parameter]) -> list[np.ndarray]:
    """Constant tensors as views of one copy-on-write memory map."""
    if not parameters:
        return []
    whole = np.memmap(path, np.uint8, "c")
    return [
        whole[p.offset : p.offset + p.nbytes].view(numpy_type(p.dtype)).reshape(p.shape) for p in parameters
    ]


class _TvmStep:
    def __init__(self, artifact: Artifact, region: RegionSpec, threads: int, device: Any = None) -> None:
        tvm = load_tvm()
        self.region, self.threads = region, threads
        self.device = device or tvm.cpu()
        self.on_cpu = device is None
        path = artifact.root / region.file
        try:
            library = tvm.runtime.load_module(str(path.absolute()))
            self.machine = tvm.relax.VirtualMachine(library, self.device)
            self.main = self.machine["main"]
        except Exception as error:  # the loader raises what the dynamic linker says
            raise ArtifactError(f"{path}: cannot be loaded ({first_line(error)}); compile the model again") from error
        self._arrays = mapped_weights(artifact.root / WEIGHTS, region.parameters)
        self.weights = tuple(self._tensor(array) for array in self._arrays)
        self._configure = tvm.get_global_func("runtime.config_threadpool")
        self._count = tvm.get_global_func("runtime.NumThreads")

    def _tensor(self, value: Any) -> tvm.runtime.Tensor:
        tvm = load_tvm()
        array = np.ascontiguousarray(value)
        if array.shape != np.shape(value):  # ascontiguousarray gives a scalar one dimension
            array = array.reshape(np.shape(value))
        plain = array.dtype.isbuiltin == 1
        if self.on_cpu and plain and array.size and array.flags.writeable and array.ctypes.data % ALIGNMENT == 0:
            return tvm.runtime.from_dlpack(array)
        tensor = tvm.runtime.empty(array.shape, str(array.dtype), self.device)
        return tensor.copyfrom(array)

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        if self._count() != self.threads:
            self._configure(1, self.threads)
        inputs = [self._tensor(values[name]) for name in self.region.inputs]
        try:
            result = self.main(*inputs, self.weights)
        except Exception as error:  # a run-time check of the compiled code: shapes that the model cannot take
            raise InputError(f"the compiled model refused these inputs: {first_line(error)}") from error
        results = [result] if len(self.region.outputs) == 1 and hasattr(result, "numpy") else list(result)
        return dict(zip(self.region.outputs, self._arrays_of(results, inputs), strict=True))

    def _arrays_of(self, results: Sequence[Any], inputs: Sequence[Any]) -> list[np.ndarray]:
        taken = {_address(t) for t in (*inputs, *self.weights)}
        arrays = []
        for tensor in results:
            address = _address(tensor)
            own = self.on_cpu and address not in taken
            try:
                arrays.append(np.from_dlpack(tensor) if own else tensor.numpy())
            except (BufferError, RuntimeError, TypeError):  # types that DLPack or NumPy do not share
                arrays.append(tensor.numpy())
            taken.add(address)
        return arrays


def _address(tensor: Any) -> int:
    return int(tensor.data_ptr())


class _OrtStep:
    def __init__(self, artifact: Artifact, region: RegionSpec, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # Threads that go on spinning after a run take the processors from TVM's regions.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        path = artifact.root / region.file
        try:
            self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a family of its own
            raise ArtifactError(f"{path}: onnxruntime cannot load it ({first_line(error)})") from error
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.outputs = region.outputs

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        try:
            results = self.session.run(self.outputs, {name: values[name] for name in self.inputs})
        except Exception as error:
            raise InputError(f"the model refused these inputs: {first_line(error)}") from error
        return dict(zip(self.outputs, results, strict=True))
