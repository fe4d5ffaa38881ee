"""What the importer reads from ONNX's protocol buffers: constants, attributes, types, function bodies."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.reference
import tvm
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto
from tvm import relax

from ..state import IN_PLACE
from .site import CONTENT_LIMIT, PACKED, Declared, Refuse, Value, dtype_of, np_dtype, onnx_dtype, shape_of

STANDARD = ("", "ai.onnx")
FOLD_LIMIT = 1024  # elements of a constant that the import computes with
INFERENCE_LIMIT = 1 << 20  # bytes of one initializer that shape inference may look at
NOT_FOLDED = frozenset({"If", "Constant", "ConstantOfShape", "Expand", "Tile", "Dropout", "DequantizeLinear"})
# Operators whose first output has the shape of their first input.
KEEPS_SHAPE = frozenset({
    "Abs", "Cast", "CastLike", "Ceil", "Clip", "Erf", "Exp", "Floor", "Identity", "Log", "LogSoftmax", "Neg", "Not",
    "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Softmax", "Sqrt", "Tanh",
})  # fmt: skip


def folded(
    node: NodeProto, attrs: list[AttributeProto], inputs: Sequence[Value | None], opset: int
) -> list[Value] | None:
    """The node's outputs where all its inputs are small constants, by ONNX's reference implementation.

    The main graph is folded before it comes here; this is for what becomes constant inside function bodies and from
    shapes.
    """
    given = {f"x{i}": value for i, value in enumerate(inputs) if value is not None}
    if not given or node.op_type in NOT_FOLDED or not all(is_constant(v.expr) for v in given.values()):
        return None
    arrays = {name: np.asarray(value.expr.value.numpy()) for name, value in given.items()}
    if sum(a.size for a in arrays.values()) > FOLD_LIMIT:
        return None
    outputs = [f"y{i}" if name else "" for i, name in enumerate(node.output)]
    plain = onnx.helper.make_node(
        node.op_type, [f"x{i}" if value is not None else "" for i, value in enumerate(inputs)], outputs
    )
    plain.attribute.extend(attrs)
    try:
        types = [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in arrays.items()
        ]
        wanted = [onnx.ValueInfoProto(name=name) for name in outputs if name]
        graph = onnx.helper.make_graph([plain], "fold", types, wanted)
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
        session = onnx.reference.ReferenceEvaluator(model)
        with np.errstate(all="ignore"):
            results = iter(session.run(None, arrays))
        values = []
        for name in outputs:
            array = np.asarray(next(results)) if name else np.zeros(0, np.float32)
            if array.size > FOLD_LIMIT:
                return None
            np_dtype(str(array.dtype))
            values.append(constant_value(relax.const(array, str(array.dtype))))
    except Exception:  # the reference raises errors of many classes; the converters go on
        return None
    return values


def standard_body(
    node: NodeProto, attrs: Mapping[str, AttributeProto], inputs: Sequence[Value | None], opset: int
) -> onnx.FunctionProto | None:
    """The body by which the standard defines an operator, or None."""
    try:
        schema: Any = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return None
    if schema.has_function:
        body = schema.function_body
    elif schema.has_context_dependent_function:
        types = []
        for value in inputs:
            proto = onnx.TypeProto()
            if value is not None:
                dtype = onnx.helper.np_dtype_to_tensor_dtype(np_dtype(dtype_of(value.expr)))
                dims = [d if isinstance(d, int) else None for d in shape_of(value.expr)]
                proto = onnx.helper.make_tensor_type_proto(dtype, dims)
            types.append(proto.SerializeToString())
        plain = NodeProto()
        plain.CopyFrom(node)
        del plain.attribute[:]
        plain.attribute.extend(attrs.values())
        try:
            body = onnx.FunctionProto()
            body.ParseFromString(schema.get_context_dependent_function(plain.SerializeToString(), types))
        except Exception:  # the schema has no body for these inputs
            return None
    else:
        return None
    copy = onnx.FunctionProto()
    copy.CopyFrom(body)
    known = {entry.domain for entry in copy.opset_import}
    if not known & set(STANDARD):
        copy.opset_import.extend([onnx.helper.make_opsetid("", opset)])
    return copy


def array_of(tensor: onnx.TensorProto) -> np.ndarray:
    onnx_dtype(tensor.data_type)
    return onnx.numpy_helper.to_array(tensor).reshape(tuple(tensor.dims))


def constant(array: np.ndarray) -> Value:
    """A constant tensor; one of less than 8 bits an element is unpacked."""
    kept = PACKED.get(str(array.dtype))
    if kept is not None:
        return dataclasses.replace(constant_value(relax.const(array.astype(kept), kept)), packed=str(array.dtype))
    return constant_value(relax.const(array, str(array.dtype)))


def constant_value(expr: tvm.ir.Expr) -> Value:
    """A constant with its content, when that is small and made of integers."""
    shape = [int(d) for d in expr.ty.shape.values]
    if len(shape) > 1 or int(np.prod(shape)) > CONTENT_LIMIT:
        return Value(expr)
    array = expr.value.numpy()
    if array.dtype.kind not in "iub":
        return Value(expr)
    return Value(expr, tuple(int(v) for v in array.reshape(-1)))


def is_constant(expr: tvm.ir.Expr) -> bool:
    return isinstance(expr, tvm.ir.GenericConst)


def identifier(name: str) -> str:
    """A name that TVM's printer and parser accept."""
    word = re.sub(r"\W", "_", name)
    return word if word and not word[0].isdigit() else f"v_{word}"


def site_of(node: NodeProto) -> str:
    return next((name for name in node.output if name), node.name)


def in_place(node: NodeProto) -> bool:
    """Whether the node is marked as one that may write where its first input lies."""
    return any(prop.key == IN_PLACE for prop in node.metadata_props)


def unknown() -> Declared:
    return Declared()


def declared_type(info: onnx.ValueInfoProto) -> Declared:
    if not info.type.HasField("tensor_type"):
        return Declared()
    tensor = info.type.tensor_type
    dtype = None
    with contextlib.suppress(Refuse):
        dtype = onnx_dtype(tensor.elem_type)
    shape = None
    if tensor.HasField("shape"):
        shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim)
    return Declared(dtype, shape)


def graph_types(graph: GraphProto, outer: Mapping[str, Declared] | None = None) -> dict[str, Declared]:
    types = dict(outer or {})
    types.update((info.name, declared_type(info)) for info in (*graph.value_info, *graph.output))
    return types


def declared_types(model: ModelProto) -> dict[str, Declared]:
    """Types of all values of the main graph: those the model declares, completed by ONNX's inference."""
    types = graph_types(model.graph)
    missing = [n for node in model.graph.node for n in node.output if n and n not in types]
    if not missing and not any(d.shape is None for d in types.values()):
        return types
    small = ModelProto()
    small.CopyFrom(without_weights(model))
    try:
        inferred = onnx.shape_inference.infer_shapes(small, strict_mode=False, data_prop=True)
    except Exception:  # inference is a help, not a condition; it raises errors of many classes
        return types
    for name, declared in graph_types(inferred.graph).items():
        old = types.get(name)
        if old is None or old.dtype is None or old.shape is None:
            types[name] = declared
    spread_backwards(model.graph, types)
    return types


def spread_backwards(graph: GraphProto, types: dict[str, Declared]) -> None:
    """Shapes of inputs that inference left open, from the outputs of operators that keep the shape."""
    for node in reversed(graph.node):
        if node.domain in STANDARD and node.op_type in KEEPS_SHAPE and node.output[0] in types:
            known, name = types[node.output[0]], node.input[0]
            old = types.get(name) or unknown()
            if known.shape is not None and old.shape is None:
                types[name] = dataclasses.replace(old, shape=known.shape)


def without_weights(model: ModelProto) -> ModelProto:
    """A copy of the model in which large initializers are inputs, so that inference does not copy them."""
    light = ModelProto(ir_version=max(model.ir_version, 4))
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    graph, own = light.graph, model.graph
    graph.name = own.name
    graph.node.extend(own.node)
    graph.input.extend(own.input)
    graph.output.extend(own.output)
    graph.value_info.extend(own.value_info)
    known = {info.name for info in own.input}
    for tensor in own.initializer:
        if tensor.ByteSize() <= INFERENCE_LIMIT:
            graph.initializer.append(tensor)
        elif tensor.name not in known:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return light


def bound_attributes(
    attributes: Iterable[AttributeProto], given: Mapping[str, AttributeProto]
) -> Iterator[AttributeProto]:
    """Attributes with references to the enclosing function's attributes replaced by their values."""
    for attribute in attributes:
        if not attribute.ref_attr_name:
            yield attribute
        elif attribute.ref_attr_name in given:
            copy = AttributeProto()
            copy.CopyFrom(given[attribute.ref_attr_name])
            copy.name = attribute.name
            yield copy


def python_values(attributes: Iterable[AttributeProto]) -> dict[str, Any]:
    """Attributes as Python values: text decoded, tensors as arrays, graphs as they are."""
    values: dict[str, Any] = {}
    for attribute in attributes:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        elif isinstance(value, onnx.TensorProto):
            value = array_of(value)
        elif attribute.type == AttributeProto.STRINGS:
            value = [v.decode("utf-8", "replace") for v in value]
        values[attribute.name] = value
    return values


def captures(graph: GraphProto) -> list[str]:
    """Names that a branch reads from outside, those of nested branches included, in order of first use."""
    own = {t.name for t in graph.initializer} | {i.name for i in graph.input}
    own.update(name for node in graph.node for name in node.output)
    names: dict[str, None] = {}
    for node in graph.node:
        names.update(dict.fromkeys(name for name in node.input if name and name not in own))
        for attribute in node.attribute:
            for nested in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                names.update(dict.fromkeys(name for name in captures(nested) if name not in own))
    names.update(dict.fromkeys(output.name for output in graph.output if output.name not in own))
    return list(names)
