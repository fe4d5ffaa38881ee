"""Bodies of standard operators for the quantized operators that only onnxruntime has.

Each is the operator in floating point between DequantizeLinear and QuantizeLinear, the form in which the compiler finds
integers: one road for models of every format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from .. import graph
from .body_builder import Body
from .contrib_call import Call
from .evaluate import Refusal

FLOAT = ir.DataType.FLOAT
SIGNED = {4: ir.DataType.INT4, 8: ir.DataType.INT8}  # bits of a weight -> its type less the middle of its range
UNSIGNED = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}


def _numbers(call: Call, value: int, scale: int, zero: int, axis: int | None = None) -> str:
    """An input as float32, by the inputs that its scale and zero point are. axis: the one that several belong to."""
    axes: dict[str, Any] = {} if axis is None or _single(call, scale) else {"axis": axis}
    return call.op("DequantizeLinear", call.given(value), call.given(scale), call.x(zero), **axes)


def _single(call: Call, index: int) -> bool:
    """Whether an input is one number."""
    dims = call.dims(index)
    if dims is None:
        raise Refusal(f"the shape of input {index} is not known; run infer-shapes first")
    return all(d == 1 for d in dims)


def _quantize(call: Call, value: str, scale: int, zero: int) -> Body:
    call.op("QuantizeLinear", value, call.given(scale), call.x(zero), out="output0")
    return call.body


def _pair(op: str) -> Callable[[Call], Body]:
    """An operator of two tensors."""

    def write(call: Call) -> Body:
        return _quantize(call, call.op(op, _numbers(call, 0, 1, 2), _numbers(call, 3, 4, 5)), 6, 7)

    return write


def _sigmoid(call: Call) -> Body:
    return _quantize(call, call.op("Sigmoid", _numbers(call, 0, 1, 2)), 3, 4)


def _leaky_relu(call: Call) -> Body:
    return _quantize(call, call.op("LeakyRelu", _numbers(call, 0, 1, 2), alpha=call.attr("alpha", 0.01)), 3, 4)


def _softmax(call: Call) -> Body:
    rank, axis = call.rank(0), call.attr("axis", -1)
    if rank is None or (call.attr("opset", 13) < 13 and axis not in (-1, rank - 1)):
        raise Refusal(f"its axis {axis} stands for all behind it, or its rank is not known")
    return _quantize(call, call.op("Softmax", _numbers(call, 0, 1, 2), axis=axis), 3, 4)


def _concat(call: Call) -> Body:
    """Inputs: scale and zero point of the result, then a tensor with its own for each part."""
    parts = [_numbers(call, i, i + 1, i + 2) for i in range(2, len(call.node.inputs), 3)]
    return _quantize(call, call.op("Concat", *parts, axis=call.attr("axis", 1)), 0, 1)


def _where(call: Call) -> Body:
    y = call.op("Where", call.given(0), _numbers(call, 1, 2, 3), _numbers(call, 4, 5, 6))
    return _quantize(call, y, 7, 8)


def _in_front(call: Call, x: str, write: Callable[[str], str]) -> str:
    """`write` of an image whose channels are axis 1, as they are unless channels_last says that they are the last."""
    if not call.attr("channels_last", 0):
        return write(x)
    rank = call.rank(0)
    if rank is None:
        raise Refusal("the rank of its input is not known; run infer-shapes first")
    first = call.op("Transpose", x, perm=[0, rank - 1, *range(1, rank - 1)])
    return call.op("Transpose", write(first), perm=[0, *range(2, rank), 1])


def _given(call: Call, *names: str) -> dict[str, Any]:
    return {name: call.attr(name) for name in names if name in call.node.attributes}


def _average_pool(call: Call) -> Body:
    window = _given(call, "auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")
    x = _numbers(call, 0, 1, 2)
    return _quantize(call, _in_front(call, x, lambda image: call.op("AveragePool", image, **window)), 3, 4)


def _global_average_pool(call: Call) -> Body:
    x = _numbers(call, 0, 1, 2)
    return _quantize(call, _in_front(call, x, lambda image: call.op("GlobalAveragePool", image)), 3, 4)


def _conv(call: Call) -> Body:
    """The standard's operator with images whose channels may be the last axis."""
    window = _given(call, "auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
    weight = _numbers(call, 3, 4, 5, axis=0)
    bias = _sum_scaled(call, 8, 1, 4) if call.has(8) else None
    x = _numbers(call, 0, 1, 2)
    return _quantize(call, _in_front(call, x, lambda image: call.op("Conv", image, weight, bias, **window)), 6, 7)


def _sum_scaled(call: Call, index: int, a: int, b: int) -> str:
    """An int32 input whose scale is the product of two others."""
    scale = call.op("Mul", call.given(a), call.given(b))
    axes: dict[str, Any] = {} if _single(call, b) else {"axis": -1}
    if not axes:
        scale = call.op("Reshape", scale, call.constant(np.zeros(0, np.int64)))
    return call.op("DequantizeLinear", call.given(index), scale, **axes)


def _gemm(call: Call) -> Body:
    if call.attr("alpha", 1.0) != 1.0:
        raise Refusal(f"alpha is {call.attr('alpha')}")
    turned = call.attr("transB", 0)
    a, b = _numbers(call, 0, 1, 2), _numbers(call, 3, 4, 5, axis=0 if turned else 1)
    bias = _sum_scaled(call, 6, 1, 4) if call.has(6) else None
    out = None if call.has(7) else "output0"
    y = call.op("Gemm", a, b, bias, out=out, **_given(call, "transA", "transB"))
    return _quantize(call, y, 7, 8) if call.has(7) else call.body


def _matmul_to_float(call: Call) -> Body:
    """A, B, their scales, their zero points, a bias."""
    return _product(call, _numbers(call, 0, 2, 4), _numbers(call, 1, 3, 5, axis=-1), 6)


def _dynamic_matmul(call: Call) -> Body:
    """A in float32, quantized by its own range; B, its scale and zero point, a bias."""
    whole, scale, zero = call.body.ops("DynamicQuantizeLinear", call.given(0), outputs=3)
    a = call.op("DequantizeLinear", whole, scale, zero)
    return _product(call, a, _numbers(call, 1, 2, 3, axis=-1), 4)


def _product(call: Call, a: str, b: str, bias: int) -> Body:
    y = call.op("MatMul", a, b, out=None if call.has(bias) else "output0")
    if call.has(bias):
        call.op("Add", y, call.x(bias), out="output0")
    return call.body


def _matmul_of_bits(call: Call) -> Body:
    """A (..., K) times the transpose of a weight (N, K) in blocks of `block_size` along K.

    The weight becomes a constant (K, N) of 4 or 8 bits, signed where its zero points are the middle of the range.
    """
    bits, block = call.attr("bits", 4), call.attr("block_size")
    columns, depth = call.attr("N"), call.attr("K")
    if bits not in SIGNED:
        raise Refusal(f"its weight has {bits} bits; 4 and 8 are known")
    call.refuse_inputs([4], "its rows are reordered by group")
    packed, scales = (graph.constant_value(graph.input_of(call.node, i)) for i in (1, 2))
    if packed is None or scales is None:
        raise Refusal("its weight or its scales are no constants")
    blocks = -(-depth // block)
    weight = _unpacked(packed.reshape(columns, -1), bits)[:, :depth].T
    scale = call.constant(scales.reshape(columns, blocks).T, call.dtype(2) or FLOAT)
    points = graph.constant_value(graph.input_of(call.node, 3)) if call.has(3) else None
    if call.has(3) and (points is None or points.dtype != np.uint8):
        raise Refusal("its zero points are no constant whole numbers")
    zero = None
    if points is None:
        whole = call.constant(weight.astype(np.int16) - (1 << (bits - 1)), SIGNED[bits])
    else:
        whole = call.constant(weight, UNSIGNED[bits])
        zero = call.constant(_unpacked(points.reshape(columns, -1), bits)[:, :blocks].T, UNSIGNED[bits])
    return _product(call, call.given(0), call.op("DequantizeLinear", whole, scale, zero, axis=0, block_size=block), 5)


def _unpacked(array: np.ndarray, bits: int) -> np.ndarray:
    """Rows of bytes as rows of numbers, the low bits first."""
    if bits == 8:
        return array
    return np.stack([array & 15, array >> 4], axis=-1).reshape(len(array), -1)


def _quantize_linear(call: Call) -> Body:
    axes = _given(call, "axis") if not _single(call, 1) else {}
    call.op("QuantizeLinear", call.given(0), call.given(1), call.x(2), out="output0", **axes)
    return call.body


def _dequantize_linear(call: Call) -> Body:
    axes = _given(call, "axis") if not _single(call, 1) else {}
    call.op("DequantizeLinear", call.given(0), call.given(1), call.x(2), out="output0", **axes)
    return call.body


BODIES: dict[str, Callable[[Call], Body]] = {
    "DequantizeLinear": _dequantize_linear,
    "DynamicQuantizeMatMul": _dynamic_matmul,
    "MatMulIntegerToFloat": _matmul_to_float,
    "MatMulNBits": _matmul_of_bits,
    "QGemm": _gemm,
    "QLinearAdd": _pair("Add"),
    "QLinearAveragePool": _average_pool,
    "QLinearConcat": _concat,
    "QLinearConv": _conv,
    "QLinearGlobalAveragePool": _global_average_pool,
    "QLinearLeakyRelu": _leaky_relu,
    "QLinearMul": _pair("Mul"),
    "QLinearSigmoid": _sigmoid,
    "QLinearSoftmax": _softmax,
    "QLinearWhere": _where,
    "QuantizeLinear": _quantize_linear,
}
