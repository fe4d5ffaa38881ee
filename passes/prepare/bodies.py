"""Put the body of a function in the place of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from .. import graph


class _Copier:
    """Copies nodes of a function body for one call: values by `values`, parameters by `attributes`."""

    def __init__(
        self,
        values: dict[ir.Value, ir.Value | None],
        attributes: Mapping[str, ir.Attr],
        names: graph.Names,
        prefix: str,
        metadata: Mapping[str, str],
    ) -> None:
        self._values, self._attributes, self._names = values, attributes, names
        self._prefix, self._metadata = prefix, metadata

    def node(self, node: ir.Node) -> ir.Node:
        inputs = [None if value is None else self._values.get(value, value) for value in node.inputs]
        attributes = [new for a in node.attributes.values() if (new := self._attribute(a)) is not None]
        outputs = [self._value(value) for value in node.outputs]
        metadata = {**self._metadata, **node.metadata_props}
        return ir.Node(
            node.domain,
            node.op_type,
            inputs,
            attributes,
            overload=node.overload,
            outputs=outputs,
            version=node.version,
            name=f"{self._prefix}_{node.name}" if node.name else "",
            doc_string=node.doc_string,
            metadata_props=metadata,
        )

    def _value(self, value: ir.Value) -> ir.Value:
        """A new value without shape: a body's shapes differ from call to call."""
        name = self._names.fresh(f"{self._prefix}_{value.name}") if value.name else ""
        new = ir.Value(name=name, metadata_props=dict(value.metadata_props))
        self._values[value] = new
        return new

    def _attribute(self, attribute: ir.Attr) -> ir.Attr | None:
        """The attribute with parameters filled in; None when it is a parameter that the call leaves out."""
        if attribute.is_ref():
            given = self._attributes.get(attribute.ref_attr_name or "")
            if given is None:
                return None
            if given.is_ref():
                return ir.RefAttr(attribute.name, given.ref_attr_name or "", given.type)
            return ir.Attr(attribute.name, given.type, given.value)
        if attribute.type == ir.AttributeType.GRAPH:
            return ir.AttrGraph(attribute.name, self._graph(attribute.as_graph()))
        if attribute.type == ir.AttributeType.GRAPHS:
            return ir.AttrGraphs(attribute.name, [self._graph(body) for body in attribute.as_graphs()])
        return attribute

    def _graph(self, body: ir.Graph) -> ir.Graph:
        inputs = [self._value(value) for value in body.inputs]
        for old, new in zip(body.inputs, inputs, strict=True):
            new.type, new.shape = old.type, old.shape
        initializers = []
        for value in body.initializers.values():
            new = self._values.get(value) or self._value(value)
            new.const_value, new.type, new.shape = value.const_value, value.type, value.shape
            initializers.append(new)
        nodes = [self.node(node) for node in body]
        outputs = []
        for value in body.outputs:
            mapped = self._values.get(value, value)
            assert mapped is not None, "an output of a body cannot be a left-out input"
            outputs.append(mapped)
        return ir.Graph(inputs, outputs, nodes=nodes, initializers=initializers, name=body.name)


def inline_call(
    call: ir.Node, function: ir.Function, names: graph.Names, outputs: Sequence[ir.Value] | None = None
) -> list[ir.Node]:
    """Replace `call` by the nodes of `function` and return them. Outputs keep their names and types.

    Values of the body become `<first output of the call>_<name>`. Opset imports are the caller's business.
    outputs: the values that the function's outputs stand for, where they are not those of the call in order.
    """
    owner = call.graph
    assert owner is not None
    given: list[ir.Value | None] = [*call.inputs, *[None] * (len(function.inputs) - len(call.inputs))]
    values: dict[ir.Value, ir.Value | None] = dict(zip(function.inputs, given, strict=True))
    defaults = {a.name: a for a in function.attributes.values() if a.value is not None}
    copier = _Copier(values, {**defaults, **call.attributes}, names, graph.site(call), call.metadata_props)
    nodes = [copier.node(node) for node in function]
    owner.insert_before(call, nodes)
    made = {value for node in nodes for value in node.outputs}
    for old, inner in zip(outputs or call.outputs, function.outputs, strict=False):
        new = values[inner]
        if new is None or not old.name:
            continue
        graph.replace_value(old, new, keep_name=new in made)
        made.discard(new)
    graph.remove_node(call)
    return nodes
