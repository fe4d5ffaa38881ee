"""Sessions of onnxruntime as parts of an artifact, and how all sessions of it are run."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..passes.errors import ArtifactError, InputError, first_line
from .artifact import Artifact, RegionSpec
from .state import State

if TYPE_CHECKING:
    import onnxruntime

# Without it onnxruntime adds products of unsigned and signed bytes in 16 bits on x86-64 without VNNI, and saturates.
EXACT_BYTES = "session.x64quantprecision"
WITHOUT_QDQ = "session.disable_quant_qdq"  # no fusion of floating-point nodes with the quantizing ones around them


def default_threads() -> int:
    """Threads used when none are asked for: the processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1



class OrtStep:
    def __init__(self, artifact: Artifact, region: RegionSpec, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.add_session_config_entry(EXACT_BYTES, "1")
        # With EXACT_BYTES a Gemm that was fused fails or is wrong where its weights have a scale a channel, and so do
        # two fused products that share a weight.
        options.add_session_config_entry(WITHOUT_QDQ, "1")
        # Threads that go on spinning after a run take the processors from TVM's regions.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        path = artifact.root / region.file
        try:
            self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a family of its own
            raise ArtifactError(f"{path}: onnxruntime cannot load it ({first_line(error)})") from error
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.optional = [i.name for i in self.session.get_overridable_initializers()]
        self.outputs = region.outputs

    def __call__(self, values: Mapping[str, Any], state: State | None = None) -> dict[str, Any]:
        names = [*self.inputs, *(name for name in self.optional if name in values)]
        try:
            results = run_session(self.session, self.outputs, {name: values[name] for name in names})
        except Exception as error:
            raise InputError(f"the model refused these inputs: {first_line(error)}") from error
        return dict(zip(self.outputs, results, strict=True))


def run_session(
    session: onnxruntime.InferenceSession, names: Sequence[str], feeds: Mapping[str, Any]
) -> list[Any]:
    """`session.run`, with element types that NumPy does not have (bfloat16, float8) as those of ml_dtypes."""
    foreign = {o.name for o in session.get_outputs() if _foreign(o.type)} & set(names)
    if not foreign and not any(_foreign(i.type) for i in session.get_inputs()):
        return session.run(names, feeds)
    import onnx_ir as ir
    import onnxruntime as ort

    values = {}
    for name, array in feeds.items():
        if isinstance(array, np.ndarray) and array.dtype.isbuiltin != 1:
            kind = int(ir.DataType.from_numpy(array.dtype))
            bits = np.ascontiguousarray(array).view(f"u{array.itemsize}").reshape(array.shape)
            values[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, kind)
        else:
            values[name] = ort.OrtValue.ortvalue_from_numpy(array)
    results = session.run_with_ort_values(list(names), values)
    return [_array(value) if n in foreign else value.numpy() for n, value in zip(names, results, strict=True)]


def _foreign(kind: str) -> bool:
    """Whether an onnxruntime type is a tensor of elements that NumPy does not have."""
    return kind.startswith(("tensor(bfloat16", "tensor(float8"))


def _array(value: onnxruntime.OrtValue) -> np.ndarray:
    """The tensor of a type of ml_dtypes, copied."""
    import onnx_ir as ir

    dtype = ir.DataType[value.data_type().removeprefix("tensor(").removesuffix(")").upper()].numpy()
    shape = value.shape()
    size = math.prod(shape) * dtype.itemsize
    raw = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.frombuffer(bytearray(raw), dtype).reshape(shape)
