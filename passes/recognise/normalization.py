"""Reading what layer and RMS normalization have in common: d / sqrt(mean(d²) + epsilon), times scale, plus bias."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .. import graph
from .matching import (
    Found,
    Refused,
    Writer,
    climb,
    made_by,
    only_user,
    operands,
    reduced_axes,
    same,
    scalar,
    shape_of,
    user,
)

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Norm:
    """A normalization of `x` over its last axes. `dims` are their sizes; scale and bias are None where left out."""

    x: ir.Value
    axes: int
    dims: tuple[int, ...]
    epsilon: float
    centred: bool
    last: ir.Node
    scale: ir.Value | None
    bias: ir.Value | None

    def found(self, rule: str, op_type: str) -> Found:
        inputs = tuple(value for value in (self.x, self.scale, self.bias) if value is not None)
        return Found(rule, self.last, inputs, lambda writer: self._write(writer, op_type))

    def _write(self, writer: Writer, op_type: str) -> ir.Value:
        output = self.last.outputs[0]
        if self.scale is None:
            dtype = self.x.dtype or ir.DataType.FLOAT
            scale = writer.constant(np.ones(self.dims, dtype.numpy()), "scale", dtype)
        else:
            scale = writer.reshape(self.scale, self.dims)
        bias = None if self.bias is None else writer.reshape(self.bias, self.dims)
        epsilon = float(np.float32(self.epsilon))
        return writer.op(
            op_type, self.x, scale, bias, axis=-self.axes, epsilon=epsilon, dtype=output.dtype, shape=output.shape
        )


def squared(node: ir.Node) -> ir.Value | None:
    """d, when `node` is the mean of d² over some axes."""
    if not graph.is_op(node, "ReduceMean") or graph.has_references(node):
        return None
    square = made_by(node.inputs[0], "Pow", "Mul")
    if square is None or len(square.inputs) != 2:
        return None
    d, other = square.inputs
    if square.op_type == "Pow":
        return d if scalar(other, d) == 2.0 else None
    return d if same(d, other) else None


def is_centred(d: ir.Value) -> bool:
    """Whether `d` is a value less a mean of it."""
    difference = made_by(d, "Sub")
    reduction = None if difference is None else made_by(difference.inputs[1], "ReduceMean")
    return reduction is not None and difference is not None and same(reduction.inputs[0], difference.inputs[0])


def read(node: ir.Node, d: ir.Value) -> Norm:
    """The normalization whose mean square, of `d`, is `node`. Raises Refused."""
    dims = graph.rank(d) or graph.rank(node.outputs[0])
    axes = reduced_axes(node, dims)
    if axes is None:
        raise Refused("the axes of the mean square are not known; run infer-shapes and fold-constants first")
    if not graph.attribute(node, "keepdims", 1):
        raise Refused("the mean square does not keep its axes (keepdims = 0)")
    if axes != tuple(range(-len(axes), 0)):
        raise Refused(f"axes {list(axes)} are not the last axes")
    x, mean = _centred(d, axes, dims)
    norm, epsilon, scale = _divided(node, d, x, mean)
    return _scaled(x, axes, epsilon, mean is not None, norm, scale)


def _centred(d: ir.Value, axes: tuple[int, ...], dims: int | None) -> tuple[ir.Value, ir.Value | None]:
    """x and its mean when `d` is x less its mean, which must be over the same axes; else `d` itself and None."""
    difference = made_by(d, "Sub")
    if difference is None or not is_centred(d):
        return d, None
    x, mean = difference.inputs
    reduction = made_by(mean, "ReduceMean")
    assert reduction is not None and x is not None
    if reduced_axes(reduction, dims) != axes or not graph.attribute(reduction, "keepdims", 1):
        raise Refused("mean and mean square are over different axes")
    return x, mean


def _divided(
    mean_square: ir.Node, d: ir.Value, x: ir.Value, mean: ir.Value | None
) -> tuple[ir.Node, float, tuple[ir.Value, ir.Value | None] | None]:
    """The node that computes d / sqrt(mean square + epsilon), epsilon, and (scale, bias) when it holds them too."""
    value, epsilon = mean_square.outputs[0], 0.0
    for step in climb(value):
        if step.scale == 1.0 and step.factor is None:
            value, epsilon = step.last.outputs[0], step.offset
    root = only_user(value)
    power = scalar(root.inputs[1], value) if graph.is_op(root, "Pow") else 0.5
    if not graph.is_op(root, "Sqrt", "Pow") or power not in (0.5, -0.5):
        raise Refused(f"the mean square is followed by {root.op_type}, not by Sqrt")
    inverse = graph.is_op(root, "Pow") and power == -0.5
    following = user(root.outputs[0])
    if not inverse and following is not None and _inverts(following, root.outputs[0]):
        inverse, root, following = True, following, user(following.outputs[0])
    if epsilon < 0:
        raise Refused(f"epsilon {epsilon:g} is negative")
    r = root.outputs[0]
    following = following or only_user(r)
    if not inverse:
        if graph.is_op(following, "Div") and same(following.inputs[1], r) and _is_difference(following.inputs[0], d):
            return following, epsilon, None
        raise Refused("the root is not what the input is divided by")
    if not graph.is_op(following, "Mul"):
        raise Refused("the input is not multiplied by the reciprocal of the root")
    other = next((b for a, b in operands(following) if same(a, r)), None)
    if _is_difference(other, d):
        return following, epsilon, None
    return _scaled_first(following, other, d, x, mean, epsilon)


def _inverts(node: ir.Node, value: ir.Value) -> bool:
    """Whether `node` is 1 / value."""
    if graph.is_op(node, "Reciprocal"):
        return True
    return graph.is_op(node, "Div") and same(node.inputs[1], value) and scalar(node.inputs[0], value) == 1.0


def _is_difference(value: ir.Value | None, d: ir.Value) -> bool:
    """Whether `value` is d, or the same Sub of the same two values once more."""
    if same(value, d):
        return True
    a, b = made_by(value, "Sub"), made_by(d, "Sub")
    return a is not None and b is not None and all(same(x, y) for x, y in zip(a.inputs, b.inputs, strict=True))


def _scaled_first(
    product: ir.Node, scale: ir.Value | None, d: ir.Value, x: ir.Value, mean: ir.Value | None, epsilon: float
) -> tuple[ir.Node, float, tuple[ir.Value, ir.Value | None]]:
    """The spelling of Keras: s = scale / root; then d·s, or x·s + (bias - mean·s)."""
    s = product.outputs[0]
    users = list(dict.fromkeys(node for node, _ in s.uses()))
    if scale is None or s.is_graph_output():
        raise Refused("the input is not multiplied by the reciprocal of the root")
    if len(users) == 1 and graph.is_op(users[0], "Mul"):
        for a, b in operands(users[0]):
            if same(a, s) and _is_difference(b, d):
                return users[0], epsilon, (scale, None)
    if len(users) == 2 and mean is not None and all(graph.is_op(node, "Mul") for node in users):
        for first, second in (users, users[::-1]):
            if not any(same(a, s) and same(b, x) for a, b in operands(first)):
                continue
            if not any(same(a, s) and same(b, mean) for a, b in operands(second)):
                continue
            shift, total = user(second.outputs[0]), user(first.outputs[0])
            if total is None or not graph.is_op(shift, "Sub") or shift is None:
                continue
            if (
                same(shift.inputs[1], second.outputs[0])
                and graph.is_op(total, "Add")
                and total is user(shift.outputs[0])
            ):
                return total, epsilon, (scale, shift.inputs[0])
            if total is shift and same(total.inputs[0], first.outputs[0]):
                return total, epsilon, (scale, None)
    raise Refused("the input is not multiplied by the reciprocal of the root")


def _scaled(
    x: ir.Value,
    axes: tuple[int, ...],
    epsilon: float,
    centred: bool,
    norm: ir.Node,
    held: tuple[ir.Value, ir.Value | None] | None,
) -> Norm:
    """The normalization with the scale and the bias that follow it."""
    x, norm = _without_casts(x, norm) if held is None else (x, norm)
    if x.dtype is not None and x.dtype not in (ir.DataType.FLOAT, *HALVES):
        raise Refused(f"{x.dtype.name.lower()} input, the operator computes in float32")
    sizes = _sizes(x, len(axes))
    if held is not None:
        held_scale, bias = held
        dims = _fitted(held_scale, x, len(axes), sizes)
        if dims is None or (bias is not None and _fitted(bias, x, len(axes), dims) is None):
            raise Refused("scale or bias does not have the shape of the normalized axes")
        return Norm(x, len(axes), dims, epsilon, centred, norm, held_scale, bias)
    last = norm
    parameters: list[ir.Value | None] = []
    for op_type in ("Mul", "Add") if centred else ("Mul",):
        following = user(last.outputs[0])
        vector, dims = None, None
        if graph.is_op(following, op_type):
            vector = next((b for a, b in operands(following) if same(a, last.outputs[0])), None)
            dims = _fitted(vector, x, len(axes), sizes)
        if dims is None or following is None or following.graph is not norm.graph:
            parameters.append(None)
            continue
        parameters.append(vector)
        last, sizes = following, dims
    if sizes is None:
        raise Refused("the sizes of the normalized axes are not known, and no scale tells them; run infer-shapes first")
    scale, bias = (*parameters, None)[:2]
    if scale is not None and x.dtype is not None and scale.dtype not in (None, x.dtype):
        raise Refused("scale and input are of different types")
    return Norm(x, len(axes), sizes, epsilon, centred, last, scale, bias)


def _without_casts(x: ir.Value, norm: ir.Node) -> tuple[ir.Value, ir.Node]:
    """x in half precision, when it is cast to float32 for the normalization and its result cast back."""
    up, down = made_by(x, "Cast"), user(norm.outputs[0])
    if up is None or not graph.is_op(down, "Cast") or down is None or up.inputs[0] is None:
        return x, norm
    narrow = up.inputs[0].dtype
    if narrow in HALVES and x.dtype == ir.DataType.FLOAT and graph.attribute(down, "to") == narrow:
        return up.inputs[0], down
    return x, norm


def _sizes(x: ir.Value, count: int) -> tuple[int, ...] | None:
    """The sizes of the last `count` axes of x."""
    if x.shape is None or len(x.shape) < count:
        return None
    sizes = tuple(x.shape[len(x.shape) - count :])
    return sizes if all(isinstance(size, int) for size in sizes) else None  # type: ignore[return-value]


def _fitted(
    vector: ir.Value | None, x: ir.Value, count: int, sizes: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    """The sizes of the normalized axes of x when `vector` has one number for each element of them, and no more axes
    than x has.

    An axis of x whose size is not known is taken to have the size of a scale of more than one number. Where it is 1 in
    a run, the run ends with an error: to normalize one number is no use.
    """
    shape = shape_of(vector)
    if vector is None or shape is None or len(shape) > max(count, graph.rank(x) or 0):
        return None
    while len(shape) > count and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != count or math.prod(shape) == 0:
        return None
    return shape if shape == sizes or (sizes is None and all(size > 1 for size in shape)) else None
