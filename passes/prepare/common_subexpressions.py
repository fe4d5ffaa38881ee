"""Compute the same thing once."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from .. import graph
from ..base import Contract, Pass, PassContext, PassReport

RANDOM = frozenset({"RandomUniform", "RandomNormal", "RandomUniformLike", "RandomNormalLike", "Multinomial",
                    "Bernoulli"})  # fmt: skip
KNOWN = frozenset({"", "ai.onnx.ml"})
SAME = 1024  # bytes: constants up to this size are compared by content, larger ones by identity


@dataclass(frozen=True)
class CommonSubexpressions(Pass):
    """Keep one of several nodes that have the same operator, inputs and attributes.

        {  a = Exp (X)             ->   {  a = Exp (X)
           b = Exp (X)                     Y = Add (a, a)  }
           Y = Add (a, b)  }

    Equal small constants count as the same input. What a body (If, Loop, Scan) has in common with the graph
    around it is taken from there. Left alone: random operators and functions that hold one, nodes that own
    bodies, operators of unknown domains, and outputs of the graph, of which each must stay.
    """

    name: ClassVar[str] = "common-subexpressions"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        report = self.report()
        pure = _pure_functions(model)
        _merge(model.graph, ChainMap(), pure, report)
        for function in model.functions.values():
            _merge(function.graph, ChainMap(), pure, report)
        return report


def is_random(node: ir.Node) -> bool:
    """Whether two runs of the node may differ."""
    if not graph.is_op(node, *RANDOM, "Dropout"):
        return False
    return node.op_type in RANDOM or graph.input_of(node, 2) is not None


def _pure_functions(model: ir.Model) -> set[ir.OperatorIdentifier]:
    """Functions whose result depends on their inputs alone."""
    doubtful = {
        identifier
        for identifier, function in model.functions.items()
        if any(
            is_random(node) or (node.domain not in KNOWN and node.op_identifier() not in model.functions)
            for node in function.all_nodes()
        )
    }
    while True:
        callers = {
            identifier
            for identifier, function in model.functions.items()
            if identifier not in doubtful and any(n.op_identifier() in doubtful for n in function.all_nodes())
        }
        if not callers:
            return set(model.functions) - doubtful
        doubtful |= callers


def _merge(
    body: ir.Graph,
    seen: ChainMap[Hashable, ir.Node],
    pure: set[ir.OperatorIdentifier],
    report: PassReport,
) -> None:
    for node in body:
        if node.attributes:
            for inner in graph.subgraphs(node):
                _merge(inner, seen.new_child(), pure, report)
        key = _key(node, pure)
        if key is None:
            continue
        first = seen.setdefault(key, node)
        if first is node or not _worth_it(node):
            continue
        report.changed("merge", graph.site(node), f"same {node.op_type} as {graph.site(first)}")
        for old, new in zip(node.outputs, first.outputs, strict=True):
            if graph.is_used(old):
                graph.replace_value(old, new)
        graph.remove_node(node)


def _worth_it(node: ir.Node) -> bool:
    """Whether merging saves work: an output that must stay would leave an Identity in the node's place."""
    if node.op_type not in ("Identity", "Constant"):
        return True
    return not any(value.is_graph_output() for value in node.outputs)


def _key(node: ir.Node, pure: set[ir.OperatorIdentifier]) -> Hashable | None:
    """Equal for nodes that compute the same; None when that cannot be said."""
    identifier = node.op_identifier()
    if (node.domain not in KNOWN and identifier not in pure) or is_random(node):
        return None
    attributes: list[Hashable] = []
    for name in sorted(node.attributes):
        frozen = _frozen(node.attributes[name])
        if frozen is None:
            return None
        attributes.append((name, frozen))
    inputs = tuple(_identity(value) for value in node.inputs)
    present = tuple(bool(value.name) for value in node.outputs)
    return identifier, inputs, tuple(attributes), present


def _identity(value: ir.Value | None) -> Hashable:
    """What stands for an input: the content of a small constant, else the value itself."""
    if value is None:
        return None
    if value.is_initializer() and not value.is_graph_input() and value.const_value is not None:
        return _content(value.const_value) or value
    return value


def _content(tensor: ir.TensorProtocol) -> Hashable | None:
    if tensor.dtype == ir.DataType.STRING or graph.nbytes(tensor) > SAME:
        return None
    return tensor.dtype, tensor.shape.numpy(), tensor.tobytes()


def _frozen(attribute: ir.Attr) -> Hashable | None:
    """The attribute's value as something to compare; None for what cannot be compared cheaply."""
    if attribute.is_ref():
        return "parameter", attribute.ref_attr_name
    value: Any = attribute.value
    if attribute.type == ir.AttributeType.TENSOR:
        return _content(value)
    if attribute.type in (ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING):
        return attribute.type, repr(value)
    if attribute.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS):
        return attribute.type, tuple(map(repr, value))
    return None
