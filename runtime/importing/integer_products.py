"""Products and convolutions of dequantized tensors, computed in the integers behind them.

    DequantizeLinear(x) * DequantizeLinear(w) + bias  =  scale(x) scale(w) * int32 sum of (x - zero) * w  + bias

The sum is exact; one conversion to float32 and one multiplication follow, and whatever stands behind is elementwise
code as before. It is what the operator in float32 gives, but for the rounding of its sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from ..kernels import integers
from .quantization import conv_pads
from .quantized import IntegerOperand, integer_operand, running_operand
from .site import Dim, Site, const, constant_of, dtype_of, shape_of


@dataclass(frozen=True)
class _Operands:
    """x: the data, of one scale. weight: int8, less its zero points. scale: of the sums, float32, one for each output
    channel or one for all."""

    x: IntegerOperand
    weight: np.ndarray
    scale: np.ndarray


def _operands(site: Site, data: int, weight: int, channels: int) -> _Operands | None:
    """Inputs number `data` and `weight`; None where they are not what kernels take. channels: axis of the weight."""
    if not site.target.is_cpu:
        return None
    x = integer_operand(site.bb, site.x(data))
    if x is None or x.dtype not in ("uint8", "int8") or x.scale.shape or constant_of(x.value) is not None:
        return None
    w = _weight(site, weight, channels)
    if w is None:
        return None
    whole, w_scale = w
    scale = x.scale.astype(np.float64) * w_scale.astype(np.float64)
    return _Operands(x, whole, scale.astype(np.float32))


def _weight(site: Site, index: int, channels: int) -> tuple[np.ndarray, np.ndarray] | None:
    """A constant of 8 bits less its zero points, int8, and its scales; None where that is none."""
    w = integer_operand(site.bb, site.x(index))
    array = None if w is None else constant_of(w.value)
    if w is None or array is None or w.axis not in (None, channels) or w.dtype not in ("uint8", "int8"):
        return None
    whole = whole_weight(array, w.zero_point.reshape([-1 if a == w.axis else 1 for a in range(array.ndim)]))
    return None if whole is None else (whole, w.scale)


def whole_weight(array: np.ndarray, zero: np.ndarray) -> np.ndarray | None:
    """An array less its zero points as int8; None where it does not fit."""
    whole = array.astype(np.int32) - zero.astype(np.int32)
    return None if whole.size == 0 or whole.min() < -128 or whole.max() > 127 else whole.astype(np.int8)


def product_less(site: Site, x: tvm.ir.Expr, zero: tvm.ir.Expr | None, weight: np.ndarray) -> tvm.ir.Expr | None:
    """The sums of (x - zero) * weight, int32, with a zero point that is known when the model runs; None where that has
    no kernel. zero: a scalar, None for 0. weight: int8 (K, N)."""
    columns = weight.shape[1]
    known = None if zero is None else constant_of(zero)
    point = 0 if known is None else int(known.reshape(()))
    sums = integers.product(site.bb, x, weight, np.zeros(columns, np.int64), point, site.target)
    if sums is None or zero is None or known is not None:
        return sums
    start = site.cast(relax.op.reshape(zero, []), "int32")
    less = site.emit(relax.op.multiply(start, const(weight.sum(axis=0, dtype=np.int64), "int32")))
    return site.emit(relax.op.subtract(sums, less))


def _running_product(site: Site, transposed: bool) -> tvm.ir.Expr | None:
    """A product with data that was quantized when the model runs."""
    if not site.target.is_cpu or site.rank(0) < 2:
        return None
    x, w = running_operand(site.bb, site.x(0)), _weight(site, 1, 0 if transposed else site.rank(1) - 1)
    if x is None or w is None or w[0].ndim != 2 or dtype_of(x.value) not in ("uint8", "int8"):
        return None
    weight = np.ascontiguousarray(w[0].T) if transposed else w[0]
    sums = product_less(site, x.value, x.zero_point, weight)
    if sums is None:
        return None
    scale = site.emit(relax.op.multiply(site.emit(relax.op.reshape(x.scale, [])), const(w[1], "float32")))
    return site.emit(relax.op.multiply(site.cast(sums, "float32"), scale))


def _integer_bias(site: Site, index: int, operands: _Operands, count: int) -> np.ndarray | None:
    """A bias as a part of the sums: of zeros where there is none; None where it is no whole number of their scale."""
    if not site.has(index):
        return np.zeros(count, np.int64)
    bias = integer_operand(site.bb, site.x(index))
    array = None if bias is None else constant_of(bias.value)
    if bias is None or array is None or array.shape != (count,):
        return None
    if not np.allclose(bias.scale, operands.scale, rtol=1e-6, atol=0):
        return None
    return array.astype(np.int64) - bias.zero_point


def _scaled(site: Site, sums: tvm.ir.Expr, operands: _Operands, dims: list[int]) -> tvm.ir.Expr:
    """The sums in float32. dims: what the scale of each channel is reshaped to."""
    scale = operands.scale if operands.scale.ndim == 0 else operands.scale.reshape(dims)
    return site.emit(relax.op.multiply(site.cast(sums, "float32"), const(scale, "float32")))


def conv(site: Site, kernel: list[int], strides: list[int], dilations: list[int]) -> tvm.ir.Expr | None:
    """Conv with its bias, in float32; None where it has no kernel."""
    operands = _operands(site, 0, 1, 0)
    if operands is None:
        return None
    rank, channels = len(kernel), operands.weight.shape[0]
    bias = _integer_bias(site, 2, operands, channels)
    before, _ = pads = conv_pads(site, site.shape()[2:], kernel, strides, dilations)
    sizes = zip(shape_of(operands.x.value)[2:], kernel, strides, dilations, *pads, strict=True)
    sums = integers.convolution(
        site.bb, operands.x.value, operands.weight, np.zeros(channels, np.int64) if bias is None else bias,
        integers.Window(tuple(strides), tuple(dilations), tuple(map(int, before)), int(site.attr("group", 1))),
        [out_size(*size) for size in sizes], int(operands.x.zero_point), site.target,
    )  # fmt: skip
    if sums is None:
        return None
    y = _scaled(site, sums, operands, [1, channels, *[1] * rank])
    if bias is not None:
        return y
    array = site.array(2)
    shaped = [1, channels, *[1] * rank]
    added = relax.op.reshape(site.x(2), shaped) if array is None else const(array.reshape(shaped), "float32")
    return site.emit(relax.op.add(y, site.emit(added)))


def out_size(size: Dim, kernel: int, stride: int, dilation: int, before: int, after: int) -> Dim:
    """Of a convolution, on one axis."""
    room = size + before + after - dilation * (kernel - 1) - 1
    return room // stride + 1


def matmul(site: Site, transposed: bool = False, bias: int | None = None) -> tuple[tvm.ir.Expr, bool] | None:
    """Inputs 0 and 1 multiplied, in float32, and whether input `bias` is in it; None where that has no kernel.

    transposed: the second one is (N, K). Of constant matrices on the right.
    """
    operands = _operands(site, 0, 1, 0 if transposed else site.rank(1) - 1)
    if operands is None and (y := _running_product(site, transposed)) is not None:
        return y, False
    if operands is None or operands.weight.ndim != 2 or site.rank(0) < 2:
        return None
    weight = np.ascontiguousarray(operands.weight.T) if transposed else operands.weight
    columns = weight.shape[1]
    added = None if bias is None else _integer_bias(site, bias, operands, columns)
    sums = integers.product(
        site.bb, operands.x.value, weight, np.zeros(columns, np.int64) if added is None else added,
        int(operands.x.zero_point), site.target,
    )  # fmt: skip
    return None if sums is None else (_scaled(site, sums, operands, [columns]), added is not None)
