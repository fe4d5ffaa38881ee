"""Integer operators written out in operators that a compiler has.

QLinearConv and QLinearMatMul become Conv and MatMul between DequantizeLinear and QuantizeLinear, ConvInteger with
constant zero points likewise with a scale of 1: the form in which the compiler computes in integers.

Without it, sums of products of 8-bit numbers are whole numbers in float32, exactly up to 2^24, so the result is the
integer operator's own except where sums are larger; there it is rounded to 24 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from .. import graph
from .body_builder import Body
from .evaluate import Refusal

FLOAT = ir.DataType.FLOAT


def _check(node: ir.Node, opset: int) -> None:
    if opset < 13:
        raise Refusal(f"it is written for opset 13 and later, the model has {opset}; run convert-opset first")


def _centred(body: Body, node: ir.Node, value: int, zero: int, trailing: int = 0) -> str:
    """Input `value` minus its zero point, as float. trailing: axes to put behind a zero point a channel."""
    whole = body.op("Cast", f"input{value}", to=int(FLOAT))
    point = graph.input_of(node, zero)
    if point is None:
        return whole
    constant = graph.constant_value(point)
    if constant is not None and not constant.any():
        return whole
    offset = body.op("Cast", f"input{zero}", to=int(FLOAT))
    known = graph.rank(point)
    if trailing and known == 1 and point.shape is not None and point.shape[0] != 1:
        offset = body.op("Unsqueeze", offset, body.constant(list(range(1, trailing + 1))))
    return body.op("Sub", whole, offset)


def _spatial(node: ir.Node, weights: int) -> int:
    known = graph.rank(graph.input_of(node, weights))
    if known is None:
        raise Refusal("the rank of its weights is not known; run infer-shapes first")
    return known - 2


def _convolution(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def conv_integer(node: ir.Node, opset: int, max_steps: int) -> Body:
    _check(node, opset)
    spatial, body = _spatial(node, 1), Body(opset)
    points = [graph.input_of(node, index) for index in (2, 3)]
    if all(p is None or graph.constant_value(p) is not None for p in points):
        x, w = _steps(body, node, 0, 2, 0), _steps(body, node, 1, 3, 0)
    else:
        x, w = _centred(body, node, 0, 2), _centred(body, node, 1, 3, spatial + 1)
    body.op("Cast", body.op("Conv", x, w, **_convolution(node)), out="output0", to=int(ir.DataType.INT32))
    return body


def _steps(body: Body, node: ir.Node, value: int, zero: int, axis: int) -> str:
    """Input `value` less its zero point, dequantized by a scale of 1."""
    point = graph.input_of(node, zero)
    array = None if point is None else graph.constant_value(point)
    if array is None or array.size == 1:
        name = None if point is None else f"input{zero}"
        if array is not None and array.ndim:
            name = body.op("Reshape", name, body.constant(np.zeros(0, np.int64)))
        return body.op("DequantizeLinear", f"input{value}", body.constant(1, FLOAT), name)
    ones = body.constant(np.ones(array.shape, np.float32), FLOAT)
    return body.op("DequantizeLinear", f"input{value}", ones, f"input{zero}", axis=axis)


def _shape(node: ir.Node, index: int) -> list[Any]:
    value = graph.input_of(node, index)
    if value is None or value.shape is None:
        raise Refusal(f"the shape of input {index} is not known; run infer-shapes first")
    return list(value.shape)


def _numbers(body: Body, node: ir.Node, value: int, axis: int | None) -> str:
    """Input `value` by the scale and zero point behind it. axis: the one that several belong to, None for one only."""
    scale = _shape(node, value + 1)
    names = [f"input{value + i}" for i in range(3)]
    if all(d == 1 for d in scale):
        return body.op("DequantizeLinear", *names)
    if axis is None or len(scale) != 1:
        raise Refusal(f"the scales of input {value} are of shape {[str(d) for d in scale]}")
    if _shape(node, value + 2) != scale:
        points = body.op("Expand", names[2], body.op("Shape", names[1]))
        return body.op("DequantizeLinear", names[0], names[1], points, axis=axis)
    return body.op("DequantizeLinear", *names, axis=axis)


def qlinear_conv(node: ir.Node, opset: int, max_steps: int) -> Body:
    _check(node, opset)
    body = Body(opset)
    x, w, bias = _numbers(body, node, 0, None), _numbers(body, node, 3, 0), None
    if graph.input_of(node, 8) is not None:
        scale = body.op("Mul", "input1", "input4")
        single = all(d == 1 for d in _shape(node, 4))
        if single:
            scale = body.op("Reshape", scale, body.constant(np.zeros(0, np.int64)))
        axes: dict[str, Any] = {} if single else {"axis": 0}
        bias = body.op("DequantizeLinear", "input8", scale, **axes)
    body.op("QuantizeLinear", body.op("Conv", x, w, bias, **_convolution(node)), "input6", "input7", out="output0")
    return body


def qlinear_matmul(node: ir.Node, opset: int, max_steps: int) -> Body:
    """a (M, K) and b (K, N); scale and zero point of a: one, or one a row; of b: one, or one a column."""
    _check(node, opset)
    body = Body(opset)
    a, b = _numbers(body, node, 0, -2), _numbers(body, node, 3, -1)
    body.op("QuantizeLinear", body.op("MatMul", a, b), "input6", "input7", out="output0")
    return body
