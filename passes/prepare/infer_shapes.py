"""Work out the shapes and types of values."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from .. import graph
from ..base import Contract, Pass, PassContext, PassReport
from ..io import has_map
from .protobuf import light_proto

if TYPE_CHECKING:
    import onnx


MOST_ENTRIES = 4 << 20  # numbers in vectors followed as shapes: half a gigabyte, half a second


@dataclass(frozen=True)
class InferShapes(Pass):
    """Find the type and shape of every value that onnx's shape inference can find, computed shapes included.

        agraph (float[2,3] X) => (float[N] Y)     ->   agraph (float[2,3] X) => (float[6] Y)
        <int64[1] flat = {-1}>                         <int64[1] flat = {-1}>
        {  Y = Reshape (X, flat)  }                    {  Y = Reshape (X, flat)  }

    Nothing but annotations changes. A dimension that is a number is never replaced by a symbol. Bodies of If,
    Loop and Scan are annotated too; function bodies are not, since their shapes differ from call to call.
    A declared number that contradicts the inferred one is replaced inside the graph and kept, with a note, on
    inputs and outputs. Weights are not read. Computed shapes are not followed in models that compute with
    vectors of millions of numbers, which would be taken for shapes.
    """

    name: ClassVar[str] = "infer-shapes"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        import onnx.shape_inference

        report = self.report()
        proto = light_proto(model)
        try:
            inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=False)
            entries = _vector_entries(inferred.graph, model.graph.opset_imports.get("", 1))
            if entries <= MOST_ENTRIES:
                inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=False, data_prop=True)
            else:
                reason = f"computed shapes are not followed: vectors of {entries} numbers would count as shapes"
                report.skipped("infer", model.graph.name, reason)
        except (onnx.shape_inference.InferenceError, RuntimeError) as error:
            report.skipped("infer", model.graph.name, " ".join(str(error).split())[:200])
            return report
        for body, result in _pairs(model.graph, inferred.graph):
            _merge(body, result, report)
        return report


def _vector_entries(body: onnx.GraphProto, opset: int) -> int:
    """How many entries onnx would follow: it takes every vector that certain operators read for a shape, and
    keeps a message of 140 bytes for each of its numbers."""
    lengths = {
        info.name: info.type.tensor_type.shape.dim[0].dim_value
        for info in (*body.value_info, *body.input, *body.output)
        if len(info.type.tensor_type.shape.dim) == 1
    }
    lengths.update((tensor.name, tensor.dims[0]) for tensor in body.initializer if len(tensor.dims) == 1)
    follows = _following_operators(opset)
    total = 0
    for node in body.node:
        if node.op_type in follows:
            total += sum(lengths.get(name, 0) for name in node.input)
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                total += _vector_entries(inner, opset)
    return total


@functools.cache
def _following_operators(opset: int) -> frozenset[str]:
    """Operators through which onnx follows the values of shapes."""
    import onnx.defs

    schemas = (s for s in onnx.defs.get_all_schemas_with_history() if s.domain == "" and s.since_version <= opset)
    return frozenset(schema.name for schema in schemas if schema.has_data_propagation_function)


def _pairs(body: ir.Graph, result: onnx.GraphProto) -> Iterator[tuple[ir.Graph, onnx.GraphProto]]:
    """The graphs of the model beside what inference made of them, subgraphs included."""
    yield body, result
    for node, proto in zip(body, result.node, strict=True):
        if not node.attributes:
            continue
        inner = [g for a in proto.attribute for g in ([a.g] if a.HasField("g") else a.graphs)]
        for sub, sub_result in zip(graph.subgraphs(node), inner, strict=True):
            yield from _pairs(sub, sub_result)


def _merge(body: ir.Graph, result: onnx.GraphProto, report: PassReport) -> None:
    found = {info.name: info.type for info in (*result.value_info, *result.output)}
    for node in body:
        for value in node.outputs:
            proto = found.get(value.name or "")
            if proto is not None and proto.WhichOneof("value") is not None:
                _annotate(value, proto, report)


def _annotate(value: ir.Value, proto: onnx.TypeProto, report: PassReport) -> None:
    """Take over what `proto` knows and the value does not."""
    if has_map(proto):  # onnx_ir has no word for it; onnxruntime infers it again
        return
    typed = value.type is None
    if typed:
        value.type = ir.serde.deserialize_type_proto_for_type(proto)
    before = value.shape
    if proto.WhichOneof("value") == "tensor_type" and proto.tensor_type.HasField("shape"):
        inferred = proto.tensor_type.shape.dim
        if before is None:
            value.shape = ir.Shape([_dimension(dim) for dim in inferred])
        elif len(before) != len(inferred):
            _contradiction(value, ir.Shape([_dimension(dim) for dim in inferred]), report)
            return
        else:
            _refine(value, before, inferred, report)
    if typed or value.shape is not before:
        report.changed("infer", value.name, f"{before} -> {value.shape}")


def _refine(
    value: ir.Value, before: ir.Shape, inferred: Sequence[onnx.TensorShapeProto.Dimension], report: PassReport
) -> None:
    """Take the inferred number for each dimension, else keep the declared one, else take a name."""
    dims: list[int | ir.SymbolicDim] = list(before)
    news = wrong = False
    for index, (old, dim) in enumerate(zip(before, inferred, strict=True)):
        if dim.HasField("dim_value"):
            if isinstance(old, int):
                if old == dim.dim_value:
                    continue
                wrong = True
        elif isinstance(old, int) or old.value is not None or not dim.dim_param:
            continue
        news = True
        dims[index] = _dimension(dim)
    if wrong:
        _contradiction(value, ir.Shape(dims), report)
    elif news:
        value.shape = ir.Shape(dims)


def _dimension(dim: onnx.TensorShapeProto.Dimension) -> int | ir.SymbolicDim:
    return dim.dim_value if dim.HasField("dim_value") else ir.SymbolicDim(dim.dim_param or None)


def _contradiction(value: ir.Value, shape: ir.Shape, report: PassReport) -> None:
    if value.is_graph_output():
        reason = f"declared {value.shape}, inferred {shape}; the declaration is kept"
        report.skipped("infer", value.name, reason)
        return
    value.shape = shape
