"""The bodies by which the ONNX standard defines some of its operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from .evaluate import Refusal
from .protobuf import type_proto

if TYPE_CHECKING:
    import onnx
    import onnx.defs


def standard_body(node: ir.Node, opset: int) -> ir.Function:
    """The standard's function for `node` in operators of `opset`. Its outputs are the node's named ones.

    Raises Refusal when there is none, or when it would need a type that is not known.
    """
    import onnx.defs

    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError as error:
        raise Refusal(f"opset {opset} has no such operator") from error
    version, proto = _proto(schema, node, opset)
    del proto.opset_import[:]
    proto.opset_import.add(domain="", version=version)
    _keep_named_outputs(proto, node)
    _write_defaults(proto, schema)
    function = ir.serde.deserialize_function(proto)
    if version != opset:
        _update(function, node, opset)
    return function


def _proto(schema: Any, node: ir.Node, opset: int) -> tuple[int, onnx.FunctionProto]:
    """The newest body for `opset` or before, and the opset it is written in."""
    import onnx

    versions = [v for v in schema.all_function_opset_versions if v <= opset]
    if not versions:
        raise Refusal("the standard gives no body for it")
    version = max(versions)
    if version in schema.context_dependent_function_opset_versions:
        types = []
        for value in node.inputs:
            typed = type_proto(value) if value is not None else onnx.TypeProto()
            if typed is None:
                raise Refusal(f"the type of {value and value.name} is not known; run infer-shapes first")
            types.append(typed.SerializeToString())
        proto = ir.to_proto(node)
        try:
            data = schema.get_context_dependent_function_with_opset_version(version, proto.SerializeToString(), types)
        except Exception as error:  # raised in C++ for what the body builder does not cover
            raise Refusal(f"the standard's body cannot be built: {' '.join(str(error).split())[:120]}") from error
    else:
        data = schema.get_function_with_opset_version(version)
    if not data:
        raise Refusal("the standard gives no body for this form of it")
    return version, onnx.FunctionProto.FromString(data)


def _keep_named_outputs(proto: onnx.FunctionProto, node: ir.Node) -> None:
    """Leave out the outputs that the node leaves out, and what only they need."""
    wanted = [name for name, value in zip(proto.output, node.outputs, strict=False) if value.name]
    proto.output[:] = wanted
    needed = set(wanted)
    for inner in reversed(list(proto.node)):
        if needed.intersection(inner.output):
            needed.update(_reads(inner))
        else:
            proto.node.remove(inner)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names that the node or a body in it reads."""
    yield from node.input
    for attribute in node.attribute:
        for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            yield from (value.name for value in body.output)
            for inner in body.node:
                yield from _reads(inner)


def _write_defaults(proto: onnx.FunctionProto, schema: onnx.defs.OpSchema) -> None:
    """Give the body's parameters the operator's default values, which the standard keeps apart from it."""
    for name in list(proto.attribute):
        default = schema.attributes[name].default_value
        if default.name:
            proto.attribute.remove(name)
            proto.attribute_proto.append(default)


def _update(function: ir.Function, node: ir.Node, opset: int) -> None:
    """Bring a body written in an older opset to `opset`. Raises Refusal when it cannot be."""
    from ..base import Contract, PassReport
    from .convert_opset import convert_function

    report = PassReport("", Contract.EXACT)
    convert_function(function, opset, report)
    if report.skips:
        raise Refusal(f"its body: {report.skips[0].reason}")
