"""QuantizeLinear of int32 sums, or of two dequantized tensors' sum: multiplications by ratios of scales, one rounding.

    QuantizeLinear(clamp(float32(sums) * s) / t, z)  ->  saturate(nearest(float32(sums) * (s / t)) + z)
    QuantizeLinear(clamp((a - x) * s + (b - y) * r) / t, z)
        ->  saturate(nearest(float32(a - x) * (s / t) + float32(b - y) * (r / t)) + z)

as onnxruntime's quantized operators have it. Clamps by numbers (Relu, Clip) become bounds of the whole numbers. Against
the two roundings of the operators one by one, a result that lies within 2e-7 of itself from a tie may be a step off.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx

from .site import Site, const, constant_of, dtype_of, made_by, np_dtype, same, shape_of

OperandOf = Callable[[relax.BlockBuilder, tvm.ir.Expr], Any]  # `quantized.integer_operand`
CLAMP = "graphwright.clamp"  # attribute of a function of one tensor: the least and the greatest number it gives
LARGEST = 0.5  # ratio of scales: beyond, a product could leave int32
FARTHEST = 2.0**20  # the same, of 8-bit numbers


def clamp(least: float | None, most: float | None) -> dict[str, str]:
    """The attribute of a function that holds its input between two numbers; None: none."""
    return {CLAMP: json.dumps([least, most])}


def requantized(site: Site, dtype: str, operand_of: OperandOf) -> tvm.ir.Expr | None:
    """A QuantizeLinear to `dtype`, 8 bits, of scaled int32 sums, or of the sum of two tensors that `operand_of` finds
    to be dequantized; None for others."""
    scale, zero = site.array(1), site.array(2) if site.has(2) else np.zeros(())
    if not site.target.is_cpu or dtype not in ("int8", "uint8") or scale is None or zero is None:
        return None
    if scale.size != 1 or zero.size != 1 or str(scale.dtype) != "float32":
        return None
    step, start = float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0])
    if not 0 < step < math.inf:
        return None
    x, low, high = _unclamped(site)
    info = np.iinfo(np_dtype(dtype))
    if not low <= high or dtype_of(x) != "float32":
        return None
    # Saturation and clamps are bounds of the same whole number.
    least, most = (min(max(_whole(bound / step) + start, info.min), info.max) for bound in (low, high))

    def whole(number: tirx.Expr) -> tirx.Expr:
        nearest = tirx.nearbyint(number).astype("int32")
        if start:
            nearest = nearest + tirx.const(start, "int32")
        return tirx.min(tirx.max(nearest, tirx.const(least, "int32")), tirx.const(most, "int32")).astype(dtype)

    of_sums = _of_sums(site, x, step, whole)
    return _of_two(site, x, step, whole, operand_of) if of_sums is None else of_sums


Whole = Callable[[tirx.Expr], tirx.Expr]  # a float32 in steps -> the 8-bit number


def _of_sums(site: Site, x: tvm.ir.Expr, step: float, whole: Whole) -> tvm.ir.Expr | None:
    """Of scaled int32 sums."""
    product = made_by(site.bb, x, "relax.multiply")
    if product is None:
        return None
    factor, cast = constant_of(product.args[1]), made_by(site.bb, product.args[0], "relax.astype")
    if factor is None or cast is None or dtype_of(cast.args[0]) != "int32":
        return None
    ratio = factor.astype(np.float64) / step
    if not (np.isfinite(ratio).all() and (np.abs(ratio) <= LARGEST).all()):
        return None

    def compute(data: te.Tensor, *ratios: te.Tensor) -> te.Tensor:
        def element(*i: tirx.Var) -> tirx.Expr:
            each: Any = ratios[0](*_own(i, ratios[0])) if ratios else tirx.const(float(np.float32(ratio)), "float32")
            return whole(data(*i).astype("float32") * each)

        return te.compute(data.shape, element, name="requantize")

    given = [] if ratio.ndim == 0 else [const(ratio.astype(np.float32), "float32")]
    return site.te(compute, cast.args[0], *given, name="requantize")


def _of_two(
    site: Site, x: tvm.ir.Expr, step: float, whole: Whole, operand_of: OperandOf
) -> tvm.ir.Expr | None:
    """Of the sum of two tensors of one shape, each dequantized from 8 bits by one scale."""
    added = made_by(site.bb, x, "relax.add")
    if added is None:
        return None
    found = [operand_of(site.bb, argument) for argument in added.args]
    operands = [o for o in found if o is not None and o.axis is None and o.dtype in ("int8", "uint8")]
    shapes = [shape_of(o.value) for o in operands]
    if len(operands) < 2 or len(shapes[0]) != len(shapes[1]) or not all(map(same, *shapes)):
        return None
    ratios = [float(np.float32(float(o.scale) / step)) for o in operands]
    if not all(0 < ratio <= FARTHEST for ratio in ratios):
        return None

    def compute(*tensors: te.Tensor) -> te.Tensor:
        def element(*i: tirx.Var) -> tirx.Expr:
            parts = [
                (tensor(*i).astype("int32") - tirx.const(int(o.zero_point), "int32")).astype("float32")
                * tirx.const(ratio, "float32")
                for tensor, o, ratio in zip(tensors, operands, ratios, strict=True)
            ]
            return whole(parts[0] + parts[1])

        return te.compute(tensors[0].shape, element, name="requantize_sum")

    return site.te(compute, *(o.value for o in operands), name="requantize_sum")


def _own(index: tuple[tirx.Var, ...], tensor: te.Tensor) -> list[Any]:
    """The place in a tensor that is broadcast to the axes of `index`."""
    last = index[len(index) - len(tensor.shape) :]
    return [0 if int(d) == 1 else i for i, d in zip(last, tensor.shape, strict=True)]


def _whole(steps: float) -> int:
    """Half to even; what is far outside of 8 bits stays so."""
    return round(min(max(steps, -1e6), 1e6))


def _unclamped(site: Site) -> tuple[tvm.ir.Expr, float, float]:
    """(what input 0 was before clamps by numbers, least, greatest)."""
    x, low, high = site.x(0), -math.inf, math.inf
    while (made := made_by(site.bb, x, "relax.call_tir")) is not None:
        text = (site.bb.get()[made.args[0]].attrs or {}).get(CLAMP)
        if text is None:
            break
        least, most = json.loads(str(text))
        low, high = max(low, -math.inf if least is None else least), min(high, math.inf if most is None else most)
        x = made.args[1].fields[0]
    return x, low, high
