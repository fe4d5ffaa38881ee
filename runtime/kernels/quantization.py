"""Quantization of float32 vectors: exact quotients without a division, and vectors of few bits.

x / s for a number s that is known costs a multiplication and two multiply-adds: with r = 1/s rounded, q = x·r is off by
at most 1.5 ulp, x - q·s is exact in a fused multiply-add, and q + (x - q·s)·r is the quotient but for rounding
(Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990). What is wanted is only
its nearest whole number; `by_reciprocal` looks at all places where that could differ.
"""

from __future__ import annotations

import functools

import numpy as np
from tvm.tirx.script import builder as T

from .vectors import Expr, Vectors

NEAR = 4  # floats on each side of a tie: a quotient of others is more than 2 ulp away from it


@functools.cache
def by_reciprocal(scale: float, low: int, high: int) -> bool:
    """Whether the multiplications give the nearest whole number of x / scale for every x from low·scale to high·scale.

    Away from a tie a few ulp change nothing. Around every tie all floats are tried. False for scales so small or large
    that intermediate results leave the normal numbers.
    """
    s = np.float32(scale)
    if not 2.0**-60 < s < 2.0**60 or high - low > 1 << 16:
        return False
    r = np.float32(1) / s
    ties = ((np.arange(low, high) + 0.5) * np.float64(s)).astype(np.float32)
    x = (ties.view(np.int32)[:, None] + np.arange(-NEAR, NEAR + 1, dtype=np.int32)).view(np.float32)
    q = x * r
    # Products of floats are exact in float64, and so are the small differences.
    rest = (x.astype(np.float64) - q.astype(np.float64) * np.float64(s)).astype(np.float32)
    better = (q.astype(np.longdouble) + rest.astype(np.longdouble) * np.longdouble(r)).astype(np.float32)
    return bool((np.rint(better) == np.rint(x / s)).all())


def quotient(v: Vectors, x: Expr, scale: float, low: int, high: int) -> Expr:
    """x / scale, at least low and at most high, low for NaN; exact only in that its nearest whole number is right."""
    s = np.float32(scale)
    # Clipped before the division: the bounds' own quotients round to low and high. x first, so that NaN becomes low.
    least, most = (v.splat(float(np.float32(bound) * s)) for bound in (low, high))
    x = T.Bind(T.min(T.max(x, least), most))
    if not v.isa.fma or not by_reciprocal(float(s), low, high):
        return T.Bind(x / v.splat(float(s)))
    r = v.splat(float(np.float32(1) / s))
    q = T.Bind(x * r)
    rest = T.Bind(v.fma(q, v.splat(-float(s)), x))
    return T.Bind(v.fma(rest, r, q))
