"""onnxruntime on an `onnx_ir.Model`: the reference that every rewrite and every artifact is checked against.

Weights that lie on disk are handed over as memory maps, not copied. Models whose weights exceed `WHOLE_LIMIT` are run
a segment at a time, so that checking a model never needs more memory than its largest segment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..passes import io
from ..passes.errors import InputError, ModelError, first_line
from ..passes.graph import Names
from .ort import EXACT_BYTES, WITHOUT_QDQ, run_session

if TYPE_CHECKING:
    import onnxruntime

WHOLE_LIMIT = 128 << 20  # bytes of weights up to which one session holds the model
SEGMENT_LIMIT = 64 << 20
BYTE_PRODUCTS = frozenset({"ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm",
                           "QLinearConv", "QLinearMatMul"})  # fmt: skip

ORT_TYPES = {
    "tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16,
    "tensor(int8)": np.int8, "tensor(int16)": np.int16, "tensor(int32)": np.int32, "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8, "tensor(uint16)": np.uint16, "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64, "tensor(bool)": np.bool_,
}  # fmt: skip


class NoKernel(ModelError):
    """onnxruntime has no implementation of an operator for the types that a model, perhaps a valid one, gives it."""


def ort_session(
    model: ir.Model, *, threads: int = 0, optimized: bool = False
) -> onnxruntime.InferenceSession:
    """An onnxruntime CPU session over `model`. Raises ModelError when onnxruntime refuses it, NoKernel when it
    is not able to run it.

    threads: intra-op threads, 0 for all. optimized: with onnxruntime's own graph optimizations; off for checks.
    """
    import onnxruntime as ort

    quantized = optimized and any(node.op_type == "DequantizeLinear" for node in model.graph)
    of_bytes = not optimized and any(node.op_type in BYTE_PRODUCTS for node in model.graph.all_nodes())
    if of_bytes:
        model = with_own_bytes(model)
    on_disk = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if io.external_source(value.const_value) is not None and _numpy_has(value.const_value)
    }
    proto = io._proto_without(model, {name: t for name, t in on_disk.items() if t is not None})
    values = [ort.OrtValue.ortvalue_from_numpy(mapped(tensor)) for tensor in on_disk.values() if tensor is not None]

    def session(exact_bytes: bool) -> onnxruntime.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        if not optimized:  # a session for a run or two: packing weights costs more than it gives, and a second copy
            options.add_session_config_entry("session.disable_prepacking", "1")
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
        if quantized:
            # No products of bytes, which some machines saturate; EXACT_BYTES fails at weights with a scale a channel.
            options.add_session_config_entry(WITHOUT_QDQ, "1")
        elif exact_bytes:
            options.add_session_config_entry(EXACT_BYTES, "1")
        if of_bytes:
            options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED  # the first at which it can be exact
            options.add_session_config_entry(WITHOUT_QDQ, "1")  # floats between QDQ nodes stay floats
        if values:
            options.add_external_initializers(list(on_disk), values)
        return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])

    unknown = ort.capi.onnxruntime_pybind11_state.NotImplemented
    try:
        try:
            return session(True)
        except unknown:
            # EXACT_BYTES makes uint8 of weights, for which there are no kernels beside data of int8.
            return session(False)
    except unknown as error:
        raise NoKernel(f"onnxruntime cannot run the model: {_without_code(error)}") from error
    except Exception as error:  # onnxruntime raises a family of its own for every kind of refusal
        raise ModelError(f"onnxruntime cannot load the model: {first_line(error)}") from error


def _without_code(error: Exception) -> str:
    """The reason in an error of onnxruntime, without the code in front that its class says."""
    return first_line(error).rpartition("NOT_IMPLEMENTED : ")[2]


def with_own_bytes(model: ir.Model) -> ir.Model:
    """The model; where several nodes read one weight of signed bytes, a copy in which each reads a weight of its own.

    To multiply bytes exactly onnxruntime replaces a node's weight by one of unsigned bytes, which it can do once.
    """
    if not any(_readers(value) for value in model.graph.initializers.values()):
        return model
    copy = model.clone()
    names = Names(copy)
    for value in list(copy.graph.initializers.values()):
        for node in _readers(value):
            own = ir.Value(
                name=names.fresh(f"{value.name}_of_its_own"), type=value.type, shape=value.shape,
                const_value=value.const_value,
            )  # fmt: skip
            copy.graph.register_initializer(own)
            for index, read in enumerate(node.inputs):
                if read is value:
                    node.replace_input_with(index, own)
    return copy


def _readers(value: ir.Value) -> list[ir.Node]:
    """The nodes beside the first that read a constant of signed bytes in the graph that it belongs to."""
    if value.dtype != ir.DataType.INT8 or value.is_graph_input() or value.const_value is None:
        return []
    return list(dict.fromkeys(node for node, _ in value.uses() if node.graph is value.graph))[1:]


def _numpy_has(tensor: ir.TensorProtocol | None) -> bool:
    """Whether the element type is one of NumPy's own, which onnxruntime takes as arrays."""
    return tensor is not None and tensor.dtype.numpy().isbuiltin == 1


def mapped(tensor: ir.TensorProtocol) -> np.ndarray:
    """A tensor's values; from disk as a read-only memory map of just its own bytes."""
    source = io.external_source(tensor)
    if source is None or tensor.dtype.bitwidth < 8 or not tensor.nbytes:
        return np.ascontiguousarray(tensor.numpy())
    path, offset, nbytes = source
    raw = np.memmap(path, np.uint8, "r", offset, (nbytes,))
    return raw.view(tensor.dtype.numpy()).reshape(tensor.shape.numpy())


class Reference:
    """`run(feeds) -> {output name: array}` of a model on onnxruntime, its own graph optimizations off unless asked for:
    they may change numbers, and a session with them takes longer to make."""

    def __init__(self, model: ir.Model, *, threads: int = 0, optimized: bool = False) -> None:
        self.model = model
        self.threads = threads
        self.optimized = optimized
        self.output_names = [value.name or "" for value in model.graph.outputs]
        whole = io.weights_nbytes(model) <= WHOLE_LIMIT
        self._session = ort_session(model, threads=threads, optimized=optimized) if whole else None

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Raises InputError when onnxruntime refuses the feeds or fails on them."""
        try:
            if self._session is not None:
                known = {i.name for i in self._session.get_inputs()}
                present = {k: v for k, v in feeds.items() if k in known}
                outputs = run_session(self._session, self.output_names, present)
                return dict(zip(self.output_names, outputs, strict=True))
            return self._run_segments(feeds)
        except ModelError:
            raise
        except Exception as error:
            raise InputError(f"onnxruntime cannot run the model on these inputs: {first_line(error)}") from error

    def _run_segments(self, feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
        from .partition import cut

        values: dict[str, Any] = dict(feeds)
        parts = cut(self.model, segments(self.model))
        last = {value.name or "": index for index, part in enumerate(parts) for value in part.graph.inputs}
        last.update(dict.fromkeys(self.output_names, len(parts)))
        for index, part in enumerate(parts):
            for value in part.graph.inputs:
                if value.type is None:  # a model need not say what flows inside it; what flows says it
                    value.type = _type_of(values[value.name or ""])
            names = [value.name or "" for value in part.graph.outputs]
            if not names:  # nobody reads what it makes
                continue
            session = ort_session(part, threads=self.threads, optimized=self.optimized)
            inputs = {i.name: values[i.name] for i in session.get_inputs()}
            values.update(zip(names, run_session(session, names, inputs), strict=True))
            values = {name: value for name, value in values.items() if last.get(name, -1) > index}
        for value in self.model.graph.outputs:
            if value.is_initializer() and value.const_value is not None:
                values[value.name or ""] = value.const_value.numpy()
        return {name: values[name] for name in self.output_names}


def _type_of(value: Any) -> ir.TensorType | ir.SequenceType:
    if isinstance(value, list):
        return ir.SequenceType(_type_of(value[0]) if value else ir.TensorType(ir.DataType.FLOAT))
    if value.dtype.kind in "OUS":
        return ir.TensorType(ir.DataType.STRING)
    return ir.TensorType(ir.DataType.from_numpy(value.dtype))


def segments(model: ir.Model, limit: int = SEGMENT_LIMIT) -> list[Sequence[ir.Node]]:
    """The model's nodes in order, in runs whose weights stay under `limit` bytes."""
    from ..passes.graph import subgraphs

    runs: list[list[ir.Node]] = [[]]
    held: set[str] = set()
    size = 0
    for node in model.graph:
        inner = [n for g in subgraphs(node) for n in g.all_nodes()]
        reads = {v.name or "": v for n in (node, *inner) for v in n.inputs if v is not None and v.is_initializer()}
        new = {name: v for name, v in reads.items() if name not in held and v.const_value is not None}
        added = sum(v.const_value.nbytes for v in new.values() if v.const_value is not None)
        if runs[-1] and size + added > limit:
            runs.append([])
            held, size, new = set(), 0, reads
            added = sum(v.const_value.nbytes for v in reads.values() if v.const_value is not None)
        runs[-1].append(node)
        held.update(new)
        size += added
    return [run for run in runs if run]


def default_threads() -> int:
    """Threads used when none are asked for: the processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
