"""What passes over attention share: where an Attention is, and the part of the graph that learns with it."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from .. import graph
from ..base import Block

PRODUCTS = ("MatMul", "Gemm", "Conv")
# Operators that pass on what the first input holds: a projection is looked for behind them.
PASSES_ON = frozenset(
    {"Cast", "Dropout", "Expand", "Flatten", "Identity", "Reshape", "RotaryEmbedding", "Slice", "Split", "Squeeze",
     "Transpose", "Unsqueeze"}
)  # fmt: skip
MEETS_CONSTANTS = frozenset({"Add", "Sub", "Mul", "Div", "LayerNormalization", "RMSNormalization"})
DEEPEST = 32  # nodes between an attention and its projections


def attentions(model: ir.Model) -> Iterator[tuple[ir.Node, graph.Scope]]:
    """Every Attention of the standard, in order, subgraphs and functions included."""
    for scope in list(graph.scopes(model)):
        for node in list(scope.graph):
            if graph.is_op(node, "Attention"):
                yield node, scope


def block_of(node: ir.Node) -> Block:
    """The attention with the projections around it, as far as they are found.

    Its weights are those that nothing else uses. It begins at what the projections read and ends behind the output
    projection and its bias.
    """
    starts: dict[str, None] = {}
    weights: dict[str, None] = {}
    for value in node.inputs[:3]:
        if value is not None:
            _climb(value, starts, weights)
    output = _descend(node.outputs[0], weights)
    return Block(graph.site(node), tuple(starts), output.name or "", tuple(weights))


def trainable(value: ir.Value | None, among: int = 1) -> bool:
    """Whether the value is a weight, of float type and more than one element, that `among` nodes alone use."""
    if value is None or not value.is_initializer() or value.is_graph_input() or value.is_graph_output():
        return False
    tensor = value.const_value
    if tensor is None or tensor.size < 2 or not tensor.dtype.is_floating_point():
        return False
    return len({user for user, _ in value.uses()}) <= among


def _climb(value: ir.Value, starts: dict[str, None], weights: dict[str, None]) -> None:
    """From an input of the attention back to what its projection reads."""
    for _ in range(DEEPEST):
        node = value.producer()
        if node is None or node.domain != "":
            break
        constants = [given for given in node.inputs if graph.is_constant(given)]
        if graph.is_op(node, *PRODUCTS):
            if len(constants) == 0:
                break
            weights.update((c.name or "", None) for c in constants if c is not None and trainable(c))
            moving = [given for given in node.inputs if given is not None and not graph.is_constant(given)]
            if len(moving) != 1:
                break
            starts[moving[0].name or ""] = None
            return
        if graph.is_op(node, *MEETS_CONSTANTS):
            moving = [given for given in node.inputs if given is not None and not graph.is_constant(given)]
            if len(moving) != 1:
                break
            weights.update((c.name or "", None) for c in constants if c is not None and trainable(c))
            value = moving[0]
            continue
        first = node.inputs[0] if node.inputs else None
        if node.op_type not in PASSES_ON or first is None:
            break
        value = first
    starts[value.name or ""] = None


def _descend(value: ir.Value, weights: dict[str, None]) -> ir.Value:
    """From the attention's result to that of its output projection; the result itself when none is found."""
    result, found = value, False
    for _ in range(DEEPEST):
        users = {node for node, _ in value.uses()}
        if len(users) != 1 or value.is_graph_output():
            break
        (node,) = users
        others = [given for given in node.inputs if given is not None and given is not value]
        if found and not graph.is_op(node, "Add"):
            break
        if graph.is_op(node, *PRODUCTS, "Add") and others and all(map(graph.is_constant, others)):
            weights.update((other.name or "", None) for other in others if trainable(other))
            value = node.outputs[0]
            result = value
            if graph.is_op(node, "Add") and found:
                break
            found = True
            continue
        if node.op_type not in PASSES_ON or node.inputs[0] is not value:
            break
        value = node.outputs[0]
    return result


def all_weights(model: ir.Model) -> tuple[str, ...]:
    """The weights of products, sums and normalizations in the main graph, in the order of its nodes."""
    found: dict[str, None] = {}
    for node in model.graph:
        if graph.is_op(node, *PRODUCTS, *MEETS_CONSTANTS):
            found.update((v.name or "", None) for v in node.inputs if v is not None and trainable(v))
    return tuple(found)
