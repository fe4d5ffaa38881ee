"""Work out the shapes and types of values."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from .. import graph
from ..base import Contract, Pass, PassContext, PassReport
from ..errors import ModelError
from ..io import has_map
from .equal_dims import MADE, name_equal_dims
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

    Nothing but annotations changes. Bodies of If, Loop and Scan are annotated too; function bodies are not, since
    their shapes differ from call to call. What follows from the inputs, numbers and their symbols, replaces what the
    model declares for a value, outputs included; where nothing follows, the declaration counts, for the nodes that
    read the value too. A size that onnx can only give a name of its own gets the name or number of the size that it
    equals, where that follows from a Reshape, Range, Slice, Tile, Resize, window of stride 1 or broadcast. A Reshape to
    another number of elements, which can never run, is an error. Weights are not read. Computed shapes are not followed
    in models that compute with vectors of millions of numbers, which would be taken for shapes.
    """

    name: ClassVar[str] = "infer-shapes"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        import onnx.shape_inference

        report = self.report()
        proto = light_proto(model)
        _forget_shapes(proto.graph)
        values = [value for body, _ in _pairs(model.graph, proto.graph) for node in body for value in node.outputs]
        before = [(value.type, value.shape) for value in values]
        try:
            inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=False)
            entries = _vector_entries(inferred.graph, model.graph.opset_imports.get("", 1))
            follows = entries <= MOST_ENTRIES
            if follows:
                inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=False, data_prop=True)
            else:
                reason = f"computed shapes are not followed: vectors of {entries} numbers would count as shapes"
                report.skipped("infer", model.graph.name, reason)
            _check_reshapes(model, inferred.graph)
            if _Merge(model, inferred, names=False).kept:
                inferred = onnx.shape_inference.infer_shapes(light_proto(model), strict_mode=False, data_prop=follows)
            name_equal_dims(inferred)
            _Merge(model, inferred, names=True)
        except (onnx.shape_inference.InferenceError, RuntimeError) as error:
            report.skipped("infer", model.graph.name, " ".join(str(error).split())[:200])
        for value, (kind, shape) in zip(values, before, strict=True):
            if value.type is not kind or value.shape is not shape:
                report.changed("infer", value.name, f"{shape} -> {value.shape}")
        return report


def _check_reshapes(model: ir.Model, inferred: onnx.GraphProto) -> None:
    """Raises ModelError for a Reshape, outside of bodies, from one fixed number of elements to another."""
    found = {
        info.name: info.type.tensor_type.shape
        for info in (*inferred.value_info, *inferred.input)
        if info.type.tensor_type.HasField("shape")
    }
    for node in model.graph:
        if not graph.is_op(node, "Reshape") or node.inputs[0] is None:
            continue
        target = graph.constant_ints(graph.input_of(node, 1))
        shape = found.get(node.inputs[0].name or "")
        if target is None or shape is None or not all(dim.HasField("dim_value") for dim in shape.dim):
            continue
        before = [dim.dim_value for dim in shape.dim]
        copies = not graph.attribute(node, "allowzero", 0)
        after = [before[i] if size == 0 and copies and i < len(before) else size for i, size in enumerate(target)]
        elements, fixed = math.prod(before), math.prod(size for size in after if size != -1)
        if elements != fixed if -1 not in after else fixed and elements % fixed:
            raise ModelError(
                f"node {graph.site(node)!r} reshapes {before} to {list(target)}, which has another number of elements; "
                "the model can never run, export it again"
            )


def _forget_shapes(body: onnx.GraphProto) -> None:
    """Remove the shapes that are declared for results of nodes: onnx believes them."""
    computed = {name for node in body.node for name in node.output}
    for info in (*body.value_info, *body.output):
        if info.name in computed and info.type.WhichOneof("value") == "tensor_type":
            info.type.tensor_type.ClearField("shape")
    for node in body.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                _forget_shapes(inner)


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


class _Merge:
    """Take over what was inferred; the names that inference gives to dimensions it does not know only with `names`.

    kept: whether something was declared that inference did not find.
    """

    def __init__(self, model: ir.Model, inferred: onnx.ModelProto, *, names: bool) -> None:
        self.kept = False
        self._names = names
        self._symbols = {
            dim.value for value in model.graph.inputs for dim in value.shape or () if isinstance(dim, ir.SymbolicDim)
        }
        for body, result in _pairs(model.graph, inferred.graph):
            found = {info.name: info.type for info in (*result.value_info, *result.output)}
            for node in body:
                for value in node.outputs:
                    self._annotate(value, found.get(value.name or ""))

    def _annotate(self, value: ir.Value, proto: onnx.TypeProto | None) -> None:
        if proto is None or proto.WhichOneof("value") is None:
            self.kept |= value.shape is not None
            return
        if has_map(proto):  # onnx_ir has no word for it; onnxruntime infers it again
            return
        if value.type is None:
            value.type = ir.serde.deserialize_type_proto_for_type(proto)
        if proto.WhichOneof("value") != "tensor_type" or not proto.tensor_type.HasField("shape"):
            self.kept |= value.shape is not None
            return
        inferred = proto.tensor_type.shape.dim
        declared = value.shape
        if declared is None or len(declared) != len(inferred):
            declared = ir.Shape([None] * len(inferred))
        dims = [self._dimension(old, dim) for old, dim in zip(declared, inferred, strict=True)]
        if value.shape is None or dims != list(value.shape):
            value.shape = ir.Shape(dims)

    def _dimension(
        self, declared: int | ir.SymbolicDim, inferred: onnx.TensorShapeProto.Dimension
    ) -> int | ir.SymbolicDim:
        """The inferred number, else a symbol of the inputs, else what is declared, else a name."""
        if inferred.HasField("dim_value"):
            return inferred.dim_value
        own = None if isinstance(declared, int) or MADE.fullmatch(declared.value or "") else declared.value
        known = isinstance(declared, int) or own is not None
        if inferred.dim_param in self._symbols:
            replaced = isinstance(declared, int) or own is None or own in self._symbols
            return ir.SymbolicDim(inferred.dim_param) if replaced else declared
        self.kept |= known and own != inferred.dim_param
        return declared if known or not self._names else ir.SymbolicDim(inferred.dim_param or None)
