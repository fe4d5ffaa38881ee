"""The operators with weights that are quantized, and their weights as matrices of (output channels, inputs)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .. import graph

OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
MOST_INPUTS = (2**31 - 1) // (255 * 127)  # products of a byte and a weight whose sum int32 holds for certain


class NotQuantized(Exception):
    """The first condition that an operator does not meet."""


@dataclass(frozen=True)
class Layer:
    """An operator of the main graph whose weight is constant.

    site: its output's name. axis: of the output channels in the weight. data_axis: of the input channels in the data;
    -1 the last. transposed: the weight comes through a Transpose of the constant.
    """

    node: ir.Node
    site: str
    tensor: ir.TensorProtocol
    axis: int
    data_axis: int
    transposed: bool = False

    @property
    def data(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def bias(self) -> ir.Value | None:
        return graph.input_of(self.node, 2)

    @property
    def is_product(self) -> bool:
        """Whether every input channel has one weight an output channel, so that blocks along the inputs exist."""
        return self.node.op_type in ("Gemm", "MatMul")

    @property
    def groups(self) -> int:
        return 1 if self.is_product else int(graph.attribute(self.node, "group", 1))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight as the operator reads it."""
        dims = tuple(int(dim) for dim in self.tensor.shape.numpy())
        return dims[::-1] if self.transposed else dims

    @property
    def channels(self) -> int:
        return self.shape[self.axis]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def weight(self) -> np.ndarray:
        """The weight as the operator reads it, float32."""
        array = self.tensor.numpy()
        return np.ascontiguousarray(array.T if self.transposed else array)

    def matrix(self, weight: np.ndarray) -> np.ndarray:
        """(output channels, inputs) of a weight in the operator's shape."""
        return np.ascontiguousarray(np.moveaxis(weight, self.axis, 0).reshape(self.channels, -1))

    def unmatrix(self, matrix: np.ndarray) -> np.ndarray:
        """The inverse of `matrix`."""
        moved = (self.channels, *(d for i, d in enumerate(self.shape) if i != self.axis))
        return np.ascontiguousarray(np.moveaxis(matrix.reshape(moved), 0, self.axis))

    def per_input(self, channels: np.ndarray) -> np.ndarray:
        """What is known of the data's channels, for each element of `matrix`: (1 or output channels, inputs)."""
        groups = self.groups
        inputs = self.size // self.channels
        parts = channels.reshape(groups, -1)
        rows = np.repeat(parts, inputs // parts.shape[1], 1)
        return rows if groups == 1 else np.repeat(rows, self.channels // groups, 0)


def find_layers(model: ir.Model) -> tuple[list[Layer], list[tuple[ir.Node, str]]]:
    """Every layer of the main graph in its order, and the operators that are none with the reason."""
    layers, others = [], []
    for scope in graph.scopes(model):
        for node in scope.graph:
            if not graph.is_op(node, *OPERATORS):
                continue
            try:
                if scope.parent is not None or scope.function is not None:
                    raise NotQuantized("inside a body; only the main graph is quantized")
                layers.append(_layer(node))
            except NotQuantized as error:
                others.append((node, str(error)))
    return layers, others


def _layer(node: ir.Node) -> Layer:
    if graph.has_references(node):
        raise NotQuantized("an attribute is a parameter of the function")
    data, weight = node.inputs[0], node.inputs[1]
    if data is None or weight is None:
        raise NotQuantized("an input is missing")
    tensor, transposed = _constant(weight)
    if tensor is None:
        constant = graph.constant_tensor(data) is not None
        raise NotQuantized("its weight stands on the left" if constant else "both its inputs change from run to run")
    if graph.constant_tensor(data) is not None:
        raise NotQuantized("both its inputs are constant; run fold-constants first")
    if tensor.dtype != ir.DataType.FLOAT:
        raise NotQuantized(f"its weight is {tensor.dtype.name.lower()}, not float32")
    axis, data_axis = _axes(node, len(tensor.shape.numpy()))
    return Layer(node, graph.site(node), tensor, axis, data_axis, transposed)


def _constant(value: ir.Value) -> tuple[ir.TensorProtocol | None, bool]:
    """The tensor that a weight is, and whether through a Transpose of its two axes."""
    tensor = graph.constant_tensor(value)
    node = value.producer()
    if tensor is not None or node is None or not graph.is_op(node, "Transpose"):
        return tensor, False
    inner = graph.constant_tensor(node.inputs[0])
    if inner is None or len(inner.shape.numpy()) != 2 or list(graph.attribute(node, "perm", (1, 0))) != [1, 0]:
        return None, False
    return inner, True


def _axes(node: ir.Node, rank: int) -> tuple[int, int]:
    """Axis of the output channels in the weight, and of the input channels in the data."""
    if node.op_type == "MatMul":
        if rank != 2:
            raise NotQuantized(f"its weight has {rank} axes, expected 2")
        return 1, -1
    if node.op_type == "Gemm":
        if graph.attribute(node, "transA", 0):
            raise NotQuantized("it reads its data transposed")
        if graph.attribute(node, "alpha", 1.0) != 1 or graph.attribute(node, "beta", 1.0) != 1:
            raise NotQuantized("it scales its sums; expected alpha and beta of 1")
        return (0 if graph.attribute(node, "transB", 0) else 1), -1
    if rank < 3:
        raise NotQuantized(f"its weight has {rank} axes, expected at least 3")
    if node.op_type == "ConvTranspose":
        if graph.attribute(node, "group", 1) != 1:
            raise NotQuantized("a transposed convolution in groups, whose channels no axis of the weight counts")
        return 1, 1
    return 0, 1
