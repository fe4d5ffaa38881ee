"""Integer operators written out in float operators that a compiler has.

Sums of products of 8-bit numbers are whole numbers, which float32 holds exactly up to 2^24, so the result is the
integer operator's own except where sums are larger; there it is rounded to 24 bits.
"""

from __future__ import annotations

from typing import Any

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
    x, w = _centred(body, node, 0, 2), _centred(body, node, 1, 3, spatial + 1)
    body.op("Cast", body.op("Conv", x, w, **_convolution(node)), out="output0", to=int(ir.DataType.INT32))
    return body


def _scale(body: Body, node: ir.Node, index: int) -> str:
    """A scale as float32."""
    value = graph.input_of(node, index)
    name = f"input{index}"
    return name if value is not None and value.dtype == FLOAT else body.op("Cast", name, to=int(FLOAT))


def _requantize(body: Body, total: str, scales: tuple[str, str, str], zero: str) -> None:
    """total * (a * b / y), rounded to even, plus the zero point, saturated: what integer kernels do."""
    factor = body.op("Div", body.op("Mul", scales[0], scales[1]), scales[2])
    body.op("QuantizeLinear", body.op("Mul", total, factor), body.constant(1, FLOAT), zero, out="output0")


def qlinear_conv(node: ir.Node, opset: int, max_steps: int) -> Body:
    _check(node, opset)
    spatial, body = _spatial(node, 3), Body(opset)
    x, w = _centred(body, node, 0, 2), _centred(body, node, 3, 5, spatial + 1)
    bias = body.op("Cast", "input8", to=int(FLOAT)) if graph.input_of(node, 8) is not None else None
    total = body.op("Conv", x, w, bias, **_convolution(node))
    w_scale = _scale(body, node, 4)
    if graph.rank(graph.input_of(node, 4)) == 1:
        w_scale = body.op("Unsqueeze", w_scale, body.constant(list(range(1, spatial + 1))))
    _requantize(body, total, (_scale(body, node, 1), w_scale, _scale(body, node, 6)), "input7")
    return body


def qlinear_matmul(node: ir.Node, opset: int, max_steps: int) -> Body:
    """a (M, K) and b (K, N); scale and zero point of a: one, or one a row; of b: one, or one a column."""
    _check(node, opset)
    for index in (1, 2):
        rows = graph.input_of(node, index)
        if rows is None or rows.shape is None or (len(rows.shape) == 1 and rows.shape[0] != 1):
            raise Refusal("its first input has a scale per row, or one of unknown shape")
    body = Body(opset)
    total = body.op("MatMul", _centred(body, node, 0, 2), _centred(body, node, 3, 5))
    a, b, y = (_scale(body, node, index) for index in (1, 4, 6))
    _requantize(body, total, (a, b, y), "input7")
    return body
