"""Products of integers with int32 accumulation, and those whose result is quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx

from .quantized import quantized
from .shapes import reshaped
from .site import Dim, Refuse, Result, Site, Unfixed, const, constant_of, converts, int64, shape_of


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


def _by_kernel(site: Site) -> tvm.ir.Expr | None:
    """MatMulInteger with a constant matrix on the right and one zero point on the left; None for other forms."""
    from .integer_products import product_less, whole_weight

    array = site.array(1)
    bytes_ = site.dtype(0) in ("uint8", "int8") and constant_of(site.x(0)) is None
    if not site.target.is_cpu or not bytes_ or array is None or array.ndim != 2 or site.rank(0) < 2:
        return None
    if site.has(2) and any(d != 1 for d in site.shape(2)):
        return None
    zero = site.array(3) if site.has(3) else np.zeros((), np.int32)
    weight = None if zero is None else whole_weight(array, zero)
    if weight is None:
        return None
    start = site.emit(relax.op.reshape(site.x(2), [])) if site.has(2) and site.array(2) is None else None
    if site.has(2) and (known := site.array(2)) is not None:
        start = const(known.reshape(()), site.dtype(2))
    return product_less(site, site.x(0), start, weight)


@converts("MatMulInteger")
def matmul_integer(site: Site) -> Result:
    if (sums := _by_kernel(site)) is not None:
        return sums
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


def require_room(
    site: Site, sizes: Sequence[Dim], kernel: Sequence[int], dilations: Sequence[int], before: Sequence[Any],
    after: Sequence[Any],
) -> None:  # fmt: skip
    """Make a run fail whose image, padding included, is smaller than the kernel; onnxruntime says then what that means.
    Empty images have results without elements where padding makes up for the kernel."""
    for size, k, dilation, first, last in zip(sizes, kernel, dilations, before, after, strict=True):
        missing = dilation * (k - 1) - first - last
        if not isinstance(size, int) and missing > 0:
            site.require_dims([tirx.min(size - (missing + 1), int64(0))], [0])


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
