"""QuantizeLinear of int32 sums: one multiplication by the ratio of the scales, and one rounding.

    QuantizeLinear(clamp(float32(sums) * s) / t, z)  ->  saturate(nearest(float32(sums) * (s / t)) + z)

as onnxruntime's quantized operators have it. Clamps by numbers (Relu, Clip) become bounds of the whole numbers. Against
the two roundings of the operators one by one, a result that lies within 2e-7 of itself from a tie may be a step off.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import tvm
from tvm import te, tirx

from .site import Site, const, constant_of, dtype_of, made_by, np_dtype

CLAMP = "graphwright.clamp"  # attribute of a function of one tensor: the least and the greatest number it gives
LARGEST = 0.5  # ratio of scales: beyond, a product could leave int32


def clamp(least: float | None, most: float | None) -> dict[str, str]:
    """The attribute of a function that holds its input between two numbers; None: none."""
    return {CLAMP: json.dumps([least, most])}


def requantized(site: Site, dtype: str) -> tvm.ir.Expr | None:
    """A QuantizeLinear to `dtype`, 8 bits, of scaled int32 sums; None for others."""
    scale, zero = site.array(1), site.array(2) if site.has(2) else np.zeros(())
    if not site.target.is_cpu or dtype not in ("int8", "uint8") or scale is None or zero is None:
        return None
    if scale.size != 1 or zero.size != 1 or str(scale.dtype) != "float32":
        return None
    step, start = float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0])
    info = np.iinfo(np_dtype(dtype))
    found = _sums(site)
    if found is None or not 0 < step < math.inf:
        return None
    sums, factor, low, high = found
    ratio = factor / step
    if not (np.isfinite(ratio).all() and (np.abs(ratio) <= LARGEST).all()):
        return None
    # Saturation and clamps are bounds of the same whole number.
    least, most = (min(max(_whole(bound / step) + start, info.min), info.max) for bound in (low, high))

    def compute(data: te.Tensor, *ratios: te.Tensor) -> te.Tensor:
        def element(*i: tirx.Var) -> tirx.Expr:
            each: Any = ratios[0](*_own(i, ratios[0])) if ratios else tirx.const(float(np.float32(ratio)), "float32")
            whole = tirx.nearbyint(data(*i).astype("float32") * each).astype("int32")
            if start:
                whole = whole + tirx.const(start, "int32")
            held = tirx.min(tirx.max(whole, tirx.const(least, "int32")), tirx.const(most, "int32"))
            return held.astype(dtype)

        return te.compute(data.shape, element, name="requantize")

    given = [] if ratio.ndim == 0 else [const(ratio.astype(np.float32), "float32")]
    return site.te(compute, sums, *given, name="requantize")


def _own(index: tuple[tirx.Var, ...], tensor: te.Tensor) -> list[Any]:
    """The place in a tensor that is broadcast to the axes of `index`."""
    last = index[len(index) - len(tensor.shape) :]
    return [0 if int(d) == 1 else i for i, d in zip(last, tensor.shape, strict=True)]


def _whole(steps: float) -> int:
    """Half to even; what is far outside of 8 bits stays so."""
    return round(min(max(steps, -1e6), 1e6))


def _sums(site: Site) -> tuple[tvm.ir.Expr, np.ndarray, float, float] | None:
    """(int32 sums, what multiplies them, least, greatest) of input 0, in float64; None where it is none such."""
    x, low, high = site.x(0), -math.inf, math.inf
    while (made := made_by(site.bb, x, "relax.call_tir")) is not None:
        text = (site.bb.get()[made.args[0]].attrs or {}).get(CLAMP)
        if text is None:
            return None
        least, most = json.loads(str(text))
        low, high = max(low, -math.inf if least is None else least), min(high, math.inf if most is None else most)
        x = made.args[1].fields[0]
    product = made_by(site.bb, x, "relax.multiply")
    if product is None or not low <= high:
        return None
    factor, cast = constant_of(product.args[1]), made_by(site.bb, product.args[0], "relax.astype")
    if factor is None or cast is None or dtype_of(x) != "float32" or dtype_of(cast.args[0]) != "int32":
        return None
    return cast.args[0], factor.astype(np.float64), low, high
