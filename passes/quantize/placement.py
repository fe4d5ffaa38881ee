"""Which values are kept in codes between operators, and which of them share a scale.

A value is quantized because an operator reads it that computes in whole numbers. From there it goes backwards: what
only moves numbers (pooling by maxima, reshapes, concatenations ...) is done on codes, so its input has the scale of
its output; what averages, and sums of two images, read codes with a scale of their own. No Q and DQ stand between an
operator and the elementwise functions behind it, so an activation is applied to the exact result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx_ir as ir

from .. import graph
from .layers import Layer

MOVES = frozenset({
    "Concat", "DepthToSpace", "Flatten", "Identity", "MaxPool", "Pad", "Reshape", "Resize", "Slice", "SpaceToDepth",
    "Split", "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip
AVERAGES = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean", "Resize"})
SUMS = frozenset({"Add", "Mul"})
# Elementwise functions of one value: they are computed in registers, behind the operator that makes the value.
UNARY = frozenset({
    "Abs", "Celu", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Neg", "PRelu",
    "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu",
})  # fmt: skip
BINARY = frozenset({"Add", "Sub", "Mul", "Div", "Max", "Min"})
LONGEST = 4  # nodes of f in x * f(x), as of a swish that is written out
IMAGE = 3  # axes, from which on a tensor is one of images or signals: batch, channels, places


@dataclass
class Placement:
    """values: what is quantized -> the value that stands for all that share its scale. readers: nodes that read codes;
    others read a quantized value as it was."""

    values: dict[ir.Value, ir.Value] = field(default_factory=dict)
    readers: set[ir.Node] = field(default_factory=set)


def place(model: ir.Model, layers: Iterable[Layer], *, alone: bool = False) -> Placement:
    """Where Q and DQ stand when these layers compute in whole numbers.

    alone: in front of the layers only, to measure what a layer does by itself.
    """
    layers = list(layers)
    found = Placement(readers={layer.node for layer in layers})
    convolutions = {layer.node for layer in layers if not layer.is_product}
    waiting = [layer.data for layer in reversed(layers)]
    pairs: list[tuple[ir.Value, ir.Value]] = []
    while waiting:
        value = waiting.pop()
        if value in found.values:
            continue
        found.values[value] = value
        node = value.producer()
        if alone or node is None or node.graph is not model.graph or graph.has_references(node):
            continue
        inputs = _moved(node)
        if inputs:
            pairs += [(value, other) for other in inputs]
        elif _averages(node):
            inputs = _floats(node.inputs[:1])
        else:
            source = _source(value)
            node, inputs = source, _summed(source, convolutions)
        if inputs and node is not None:
            found.readers.add(node)
            waiting += inputs
    _unite(found, pairs)
    return found


def _unite(found: Placement, pairs: Iterable[tuple[ir.Value, ir.Value]]) -> None:
    """Let every value of a chain of pairs stand for the same one."""

    def root(value: ir.Value) -> ir.Value:
        while found.values[value] is not value:
            found.values[value] = found.values[found.values[value]]
            value = found.values[value]
        return value

    for a, b in pairs:
        found.values[root(a)] = root(b)
    for value in found.values:
        found.values[value] = root(value)


def _floats(values: Iterable[ir.Value | None]) -> list[ir.Value]:
    """The values, or none where one of them is constant or not known to be float32."""
    known = [value for value in values if value is not None]
    usable = all(v.dtype == ir.DataType.FLOAT and graph.constant_tensor(v) is None for v in known)
    return known if usable else []


def _moved(node: ir.Node) -> list[ir.Value]:
    """The data of an operator that only moves numbers; empty for any other."""
    if not graph.is_op(node, *MOVES):
        return []
    if node.op_type == "Resize" and graph.attribute(node, "mode", "nearest") != "nearest":
        return []
    if node.op_type == "Pad":
        fill = graph.input_of(node, 2)
        number = graph.constant_value(fill) if fill is not None else None
        if graph.attribute(node, "mode", "constant") == "constant" and fill is not None and (number is None or number):
            return []
    if node.op_type == "MaxPool" and len(node.outputs) > 1 and graph.is_used(node.outputs[1]):
        return []
    return _floats(node.inputs if node.op_type == "Concat" else node.inputs[:1])


def _averages(node: ir.Node) -> bool:
    """Whether an operator takes averages over the places of an image."""
    if not graph.is_op(node, *AVERAGES) or (graph.rank(node.inputs[0]) or 0) < IMAGE:
        return False
    if node.op_type == "Resize":
        return graph.attribute(node, "mode", "nearest") == "linear"
    if node.op_type != "ReduceMean":
        return True
    axes = graph.attribute(node, "axes") or graph.constant_ints(graph.input_of(node, 1))
    rank = graph.rank(node.inputs[0])
    return bool(axes) and rank is not None and all(axis % rank >= 2 for axis in axes or ())


def comes_from_image(value: ir.Value) -> bool:
    """Whether the numbers of a value are moved there from a convolution or an average over an image: they are in codes,
    and a product in between would make them float."""
    node = value.producer()
    while node is not None and (inputs := _moved(node)):
        node = inputs[0].producer()
    return node is not None and (_averages(node) or graph.is_op(node, "Conv", "ConvTranspose"))


def _source(value: ir.Value) -> ir.Node | None:
    """The node whose result becomes `value` by elementwise functions of that one result."""
    node = value.producer()
    while node is not None and node.domain == "":
        operand = _operand(node)
        if operand is None or len(node.outputs) != 1:
            return node
        node = operand.producer()
    return node


def _operand(node: ir.Node) -> ir.Value | None:
    """The one changing value that an elementwise node is a function of; None for any other node."""
    simple = _simple_operand(node)
    if simple is not None or not graph.is_op(node, "Mul") or None in node.inputs:
        return simple
    a, b = node.inputs
    for x, inner in ((a, b), (b, a)):  # x * f(x)
        for _ in range(LONGEST):
            producer = None if inner is None else inner.producer()
            inner = None if producer is None else _simple_operand(producer)
            if inner is x:
                return x
    return None


def _simple_operand(node: ir.Node) -> ir.Value | None:
    """The same, for functions of one value and operators with a constant."""
    if graph.is_op(node, *UNARY):
        return node.inputs[0]
    if not graph.is_op(node, *BINARY) or len(node.inputs) != 2 or None in node.inputs:
        return None
    a, b = node.inputs
    if graph.is_constant(a) == graph.is_constant(b):
        return None
    return b if graph.is_constant(a) else a


def _summed(node: ir.Node | None, convolutions: set[ir.Node]) -> list[ir.Value]:
    """The two images that a node adds or multiplies, one of which a quantized convolution gives; else empty."""
    if node is None or not graph.is_op(node, *SUMS) or (graph.rank(node.outputs[0]) or 0) < IMAGE:
        return []
    inputs = _floats(node.inputs)
    if len(inputs) != 2 or not any(_source(value) in convolutions for value in inputs):
        return []
    return inputs
