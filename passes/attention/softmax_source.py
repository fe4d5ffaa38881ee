"""What the softmax of a scaled and masked tensor is really of, so that neither product nor sum has to be written."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from .. import graph
from ..ops import (
    MASKED_SOFTMAX,
    SCALED_SOFTMAX,
    SELECTED_SOFTMAX,
    TEMPERED_MASKED_SOFTMAX,
    TEMPERED_SELECTED_SOFTMAX,
    TEMPERED_SOFTMAX,
    CustomOp,
)

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Source:
    """softmax(x · scale), with a mask added or, of booleans, where it is true and else -inf.

    factor: instead of the scale, known at run time, the same for all elements of a row. divided: x / factor instead.
    """

    x: ir.Value
    scale: float = 1.0
    mask: ir.Value | None = None
    factor: ir.Value | None = None
    divided: bool = False

    @property
    def operator(self) -> CustomOp:
        tempered = self.factor is not None
        if self.mask is None:
            return TEMPERED_SOFTMAX if tempered else SCALED_SOFTMAX
        if self.mask.dtype == ir.DataType.BOOL:
            return TEMPERED_SELECTED_SOFTMAX if tempered else SELECTED_SOFTMAX
        return TEMPERED_MASKED_SOFTMAX if tempered else MASKED_SOFTMAX

    def __str__(self) -> str:
        scaled = f"{self.x.name}" if self.scale == 1 else f"{self.x.name} * {self.scale:.6g}"
        if self.factor is not None:
            scaled = f"{self.x.name} {'/' if self.divided else '*'} {self.factor.name}"
        if self.mask is None:
            return scaled
        return f"{scaled} {'where' if self.mask.dtype == ir.DataType.BOOL else '+'} {self.mask.name}"


def source_of(value: ir.Value) -> Source | None:
    """Where `value`, of one of FLOATS, is a scaled or masked tensor that only its softmax reads: what it is made of.

    The scale is a constant, or a factor of run time. The mask is known to broadcast to the tensor and to have its last
    axis.
    """
    whole, inner, mask = value, value, None
    if value.dtype not in FLOATS:
        return None
    if (node := _only_used(value, "Where")) is not None:
        kept, chosen, fill = node.inputs
        hides = _scalar(fill) == -math.inf and _broadcasts(kept, whole)
        if hides and chosen is not None and graph.same_shape(chosen, whole):
            inner, mask = chosen, kept
    elif (node := _only_used(value, "Add")) is not None:
        first, second = node.inputs
        orders = ((first, second), (second, first))
        sides = [(a, b) for a, b in orders if a is not None and graph.same_shape(a, whole) and _broadcasts(b, whole)]
        if sides:  # of two whole tensors the one that is scaled
            scaled = (side for side in sides if _unscaled(side[0], whole)[1] != 1 or _tempered(side[0], whole))
            inner, mask = next(scaled, sides[0])
    x, scale = _unscaled(inner, whole)
    if scale != 1:
        return Source(x, scale, mask)
    tempered = _tempered(inner, whole)
    if tempered is not None:
        return replace(tempered, mask=mask)
    return None if mask is None else Source(x, scale, mask)


def _tempered(value: ir.Value, whole: ir.Value) -> Source | None:
    """`value` as a tensor of the shape of `whole` times or through a number for each row, or one for all.

    The pass multiplies with 1 / divisor. That of a small float may be no number of its type, or badly rounded.
    """
    node = _only_used(value, "Mul", "Div")
    if node is None or (node.op_type == "Div" and whole.dtype != ir.DataType.FLOAT):
        return None
    first, second = node.inputs
    for x, factor in ((first, second),) if node.op_type == "Div" else ((first, second), (second, first)):
        if x is not None and factor is not None and graph.same_shape(x, whole) and _of_rows(factor, whole):
            return Source(x, factor=factor, divided=node.op_type == "Div")
    return None


def _of_rows(factor: ir.Value, whole: ir.Value) -> bool:
    """Whether a value broadcasts to the whole tensor and is the same along its last axis."""
    if factor.shape is None or whole.shape is None or factor.dtype != whole.dtype:
        return False
    dims, sizes = list(whole.shape)[::-1], list(factor.shape)[::-1]
    if len(sizes) > len(dims) or (sizes and sizes[0] != 1):
        return False
    return all(size == 1 or graph.same_dim(size, dim) for size, dim in zip(sizes, dims, strict=False))


def _unscaled(value: ir.Value, whole: ir.Value) -> tuple[ir.Value, float]:
    """`value` as a tensor of the shape of `whole` and a factor."""
    node = _only_used(value, "Mul", "Div")
    if node is None:
        return value, 1.0
    first, second = node.inputs
    for inner, number in ((first, second), (second, first)):
        factor = _scalar(number) or 0.0
        if node.op_type == "Div" and factor:
            factor = 1 / factor if number is second else 0.0
        factor = float(np.float32(factor))
        if inner is not None and factor and math.isfinite(factor) and graph.same_shape(inner, whole):
            return inner, factor
    return value, 1.0


def _only_used(value: ir.Value, *operators: str) -> ir.Node | None:
    """The node of one of these operators that makes the value, in the same graph as its only reader."""
    node = value.producer()
    if node is None or not graph.is_op(node, *operators) or value.is_graph_output() or len(value.uses()) != 1:
        return None
    ((user, _),) = value.uses()
    return node if user.graph is node.graph else None


def _scalar(value: ir.Value | None) -> float | None:
    array = graph.constant_value(value)
    if value is None or array is None or array.size != 1 or value.dtype not in FLOATS:
        return None
    return float(array.reshape(-1)[0])


def _broadcasts(mask: ir.Value | None, whole: ir.Value) -> bool:
    """Whether each axis of the mask is that of the whole tensor or of one element, the last one its own.

    A constant row is no mask but the bias of a product, which the product's kernel adds.
    """
    types = (whole.dtype, ir.DataType.BOOL)
    if mask is None or mask.shape is None or whole.shape is None or mask.dtype not in types:
        return False
    if len(mask.shape) == 1 and mask.dtype in FLOATS and graph.is_constant(mask):
        return False
    dims, sizes = list(whole.shape)[::-1], list(mask.shape)[::-1]
    if not sizes or len(sizes) > len(dims) or not graph.same_dim(sizes[0], dims[0]):
        return False
    return all(size == 1 or graph.same_dim(size, dim) for size, dim in zip(sizes, dims, strict=False))
