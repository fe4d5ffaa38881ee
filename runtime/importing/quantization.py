"""Quantized operators: Q and DQ in every granularity, and the integer products with int32 accumulation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx

from .reductions import reduced
from .shapes import reshaped
from .site import (
    Dim,
    Refuse,
    Result,
    Site,
    Unfixed,
    converts,
    int64,
    normal_axis,
    np_dtype,
    onnx_dtype,
    shape_of,
)

PLAIN = ("int8", "uint8", "int16", "uint16", "int32")


def _granularity(site: Site, scale: tvm.ir.Expr, rank: int) -> tuple[int | None, int]:
    """(axis, block): axis None for one scale of the tensor, block 0 for one scale for each index of the axis."""
    if not shape_of(scale) or (len(shape_of(scale)) == 1 and shape_of(scale)[0] == 1 and rank != 1):
        return None, 0
    axis = normal_axis(int(site.attr("axis", 1)), rank) if rank > 1 or "axis" in site.attrs else 0
    if rank == 1:
        axis = 0
    return axis, int(site.attr("block_size", 0))


def _parameter(tensor: te.Tensor, index: Sequence[Any], axis: int | None, block: int) -> tirx.Expr:
    """The scale or zero point that belongs to an element."""
    if axis is None:
        return tensor(*([0] * len(tensor.shape)))
    if block:
        return tensor(*(tirx.floordiv(v, block) if a == axis else v for a, v in enumerate(index)))
    return tensor(index[axis])


def _saturated(value: tirx.Expr, dtype: str) -> tirx.Expr:
    """Round half to even, clip and convert."""
    info = np.iinfo(np_dtype(dtype))
    low, high = tirx.const(float(info.min), value.ty.dtype), tirx.const(float(info.max), value.ty.dtype)
    return tirx.max(tirx.min(value, high), low).astype(dtype)


def quantized(
    site: Site, x: tvm.ir.Expr, scale: tvm.ir.Expr, zero: tvm.ir.Expr | None, dtype: str, axis: int | None, block: int
) -> tvm.ir.Expr:
    """saturate(round(x / scale) + zero point)."""
    wide = "float64" if dtype == "int32" else "float32"

    def compute(data: te.Tensor, factor: te.Tensor, *point: te.Tensor) -> te.Tensor:
        def element(*i: tirx.Var) -> tirx.Expr:
            steps = data(*i).astype(wide) / _parameter(factor, i, axis, block).astype(wide)
            whole = tirx.nearbyint(steps)
            if point:
                whole = whole + _parameter(point[0], i, axis, block).astype(wide)
            return _saturated(whole, dtype)

        return te.compute(data.shape, element, name="quantize")

    return site.te(compute, x, scale, *([] if zero is None else [zero]), name="quantize")


def dequantized(
    site: Site, x: tvm.ir.Expr, scale: tvm.ir.Expr, zero: tvm.ir.Expr | None, dtype: str, axis: int | None, block: int
) -> tvm.ir.Expr:
    """(x - zero point) * scale, the difference taken in int32."""

    def compute(data: te.Tensor, factor: te.Tensor, *point: te.Tensor) -> te.Tensor:
        def element(*i: tirx.Var) -> tirx.Expr:
            value = data(*i).astype("int32")
            if point:
                value = value - _parameter(point[0], i, axis, block).astype("int32")
            return (value.astype("float32") * _parameter(factor, i, axis, block).astype("float32")).astype(dtype)

        return te.compute(data.shape, element, name="dequantize")

    return site.te(compute, x, scale, *([] if zero is None else [zero]), name="dequantize")


@converts("QuantizeLinear")
def quantize_linear(site: Site) -> Result:
    given = int(site.attr("output_dtype", 0))
    dtype = site.dtype(2) if site.has(2) else onnx_dtype(given) if given else "uint8"
    if dtype not in PLAIN:
        raise Refuse(f"quantization to {dtype} is not compiled")
    if site.attr("precision", 0) not in (0, 1):
        raise Refuse("its precision is not float32")
    axis, block = _granularity(site, site.x(1), site.rank())
    return quantized(site, site.x(0), site.x(1), site.x(2) if site.has(2) else None, dtype, axis, block)


@converts("DequantizeLinear")
def dequantize_linear(site: Site) -> Result:
    if site.dtype() not in PLAIN:
        raise Refuse(f"dequantization of {site.dtype()} is not compiled")
    given = int(site.attr("output_dtype", 0))
    dtype = onnx_dtype(given) if given else site.dtype(1)
    axis, block = _granularity(site, site.x(1), site.rank())
    return dequantized(site, site.x(0), site.x(1), site.x(2) if site.has(2) else None, dtype, axis, block)


@converts("DynamicQuantizeLinear")
def dynamic_quantize_linear(site: Site) -> Result:
    x, none = site.x(), site.like(0)
    axes = list(range(site.rank()))
    high = site.emit(relax.op.maximum(reshaped(site, reduced(site, x, axes, "max"), []), none))
    low = site.emit(relax.op.minimum(reshaped(site, reduced(site, x, axes, "min"), []), none))
    span = site.emit(relax.op.subtract(high, low))
    # A tensor of zeros has no range; any scale gives its zeros back.
    flat = relax.op.equal(span, none)
    scale = site.emit(relax.op.where(flat, site.like(1), relax.op.divide(span, site.like(255))))
    start = relax.op.round(relax.op.divide(relax.op.negative(low), scale))
    point = site.cast(site.emit(relax.op.clip(site.emit(start), 0, 255)), "uint8")
    return [quantized(site, x, scale, point, "uint8", None, 0), scale, point]


# Integer products.


def _centred(site: Site, index: int, point: int, axis: int | None) -> tvm.ir.Expr:
    """An integer input as int32 with its zero point taken off. axis: along which the zero point runs, if it does."""
    x = site.cast(site.x(index), "int32")
    if not site.has(point):
        return x
    zero = site.cast(site.x(point), "int32")
    dims = shape_of(zero)
    rank = len(shape_of(x))
    if len(dims) == 1 and dims[0] != 1 and axis is not None:
        where: list[Dim] = [1] * rank
        where[axis] = dims[0]
        zero = reshaped(site, zero, where)
    elif len(dims) <= 1:
        zero = reshaped(site, zero, [])
    return site.emit(relax.op.subtract(x, zero))


@converts("MatMulInteger")
def matmul_integer(site: Site) -> Result:
    a = _centred(site, 0, 2, site.rank(0) - 2 if site.rank(0) > 1 else None)
    b = _centred(site, 1, 3, site.rank(1) - 1)
    return relax.op.matmul(a, b, out_dtype="int32")


@converts("QLinearMatMul")
def qlinear_matmul(site: Site) -> Result:
    inner = Site("MatMulInteger", site.bb, site.target, site.opset, [site.inputs[i] for i in (0, 3, 2, 5)], {})
    product = site.emit(matmul_integer(inner))
    a_scale, b_scale = site.cast(site.x(1), "float32"), site.cast(site.x(4), "float32")
    for scale in (a_scale, b_scale):
        if len(shape_of(scale)) == 1 and shape_of(scale)[0] != 1:
            raise Refuse("scales for each row or column are not compiled")
    both = relax.op.multiply(reshaped(site, a_scale, []), reshaped(site, b_scale, []))
    ratio = relax.op.divide(site.cast(site.x(6), "float32"), site.emit(both))
    zero = site.x(7) if site.has(7) else None
    return quantized(site, product, reshaped(site, site.emit(ratio), []), zero, site.dtype(7), None, 0)


@converts("ConvInteger")
def conv_integer(site: Site) -> Result:
    return _integer_conv(site, _centred(site, 0, 2, None), _centred(site, 1, 3, 0), None)


@converts("QLinearConv")
def qlinear_conv(site: Site) -> Result:
    moved = Site("ConvInteger", site.bb, site.target, site.opset, [site.inputs[i] for i in (0, 3, 2, 5)], site.attrs)
    bias = site.x(8) if site.has(8) else None
    y = site.emit(_integer_conv(site, _centred(moved, 0, 2, None), _centred(moved, 1, 3, 0), bias))
    weight = site.x(4)
    per_channel = len(shape_of(weight)) == 1 and shape_of(weight)[0] != 1
    if not per_channel:
        weight = reshaped(site, weight, [])
    both = relax.op.multiply(reshaped(site, site.x(1), []), weight)
    ratio = site.emit(relax.op.divide(reshaped(site, site.x(6), []), both))
    zero = site.x(7)
    if per_channel:
        channels = shape_of(ratio)[0]
        zero = site.emit(relax.op.broadcast_to(reshaped(site, zero, []), relax.ShapeExpr([int64(channels)])))
        return quantized(site, y, ratio, zero, site.dtype(7), 1, 0)
    return quantized(site, y, ratio, zero, site.dtype(7), None, 0)


def _integer_conv(site: Site, x: tvm.ir.Expr, weight: tvm.ir.Expr, bias: tvm.ir.Expr | None) -> tvm.ir.Expr:
    """A convolution of int32 tensors of any rank. Zero padding is right: zero points are already taken off."""
    dims, kernel = shape_of(x), shape_of(weight)
    rank = len(dims) - 2
    strides = [int(s) for s in site.attr("strides", [1] * rank)]
    dilations = [int(d) for d in site.attr("dilations", [1] * rank)]
    groups = int(site.attr("group", 1))
    before, after = conv_pads(site, dims[2:], [int(k) for k in kernel[2:]], strides, dilations)
    channels, per_group = kernel[0], kernel[1]
    out = [dims[0], channels]
    for axis in range(rank):
        reach = dilations[axis] * (int(kernel[2 + axis]) - 1) + 1
        size = dims[2 + axis]
        room = size + before[axis] + after[axis] - reach
        out.append(room // strides[axis] + 1 if isinstance(room, int) else tirx.floordiv(room, strides[axis]) + 1)
    share = int(channels) // groups

    def compute(data: te.Tensor, filters: te.Tensor) -> te.Tensor:
        c = te.reduce_axis((0, int64(per_group)), name="c")
        window = [te.reduce_axis((0, int64(kernel[2 + a])), name=f"k{a}") for a in range(rank)]

        def element(n: Any, o: Any, *at: Any) -> tirx.Expr:
            where = [v * strides[a] + window[a] * dilations[a] - before[a] for a, v in enumerate(at)]
            inside = tirx.all(*(tirx.all(w >= 0, w < int64(dims[2 + a])) for a, w in enumerate(where)))
            channel = tirx.floordiv(o, share) * int64(per_group) + c
            value = tirx.if_then_else(inside, data(n, channel, *where), tirx.const(0, "int32"))
            return te.sum(value * filters(o, c, *window), axis=[c, *window])

        return te.compute(tuple(int64(d) for d in out), lambda *i: element(*i), name="conv_integer")

    y = site.te(compute, x, weight, name="conv_integer")
    if bias is None:
        return y
    return site.emit(relax.op.add(y, reshaped(site, bias, [1, channels] + [1] * rank)))


def conv_pads(
    site: Site, sizes: Sequence[Dim], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[list[Any], list[Any]]:
    """Padding before and after each spatial axis, from `pads` or `auto_pad`."""
    rank = len(kernel)
    auto = site.attr("auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        pads = [int(p) for p in site.attr("pads", [0] * (2 * rank))]
        return pads[:rank], pads[rank:]
    if auto == "VALID":
        return [0] * rank, [0] * rank
    before, after = [], []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        if stride == 1:
            total = dilation * (k - 1)
        elif isinstance(size, int):
            out = -(-size // stride)
            total = max(0, (out - 1) * stride + dilation * (k - 1) + 1 - size)
        else:
            raise Unfixed("automatic padding of a dynamic axis")
        less = total // 2
        before.append(less if auto == "SAME_UPPER" else total - less)
        after.append(total - before[-1])
    return before, after
