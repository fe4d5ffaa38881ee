"""Products and convolutions of data and weights that were rounded to bfloat16, on processors that multiply its pairs.

    Cast <to = FLOAT> (Cast <to = BFLOAT16> (x)) * Cast <to = FLOAT> (w)

x becomes the bits of its nearest bfloat16, once for all that read it. The products are exact in float32, as they are of
the numbers that the graph names; only those below the normal ones are taken for 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax, te

from ..kernels import rounded as kernels
from ..kernels.integers import Window
from ..rounding import rounded_bits, widened_bits
from .integer_products import out_size
from .site import Dim, Site, Value, constant_of, dtype_of, shape_of
from .stored import stored_weight

ROUNDED = "bfloat16"
WHOLE = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
ROUNDS = ("float32", "float64", "float16", "bool", *WHOLE)


def rounded(site: Site, target: str) -> Value | None:
    """A Cast to bfloat16, or back to float32, by way of the bits, which are remembered; None for others. TVM takes a
    cast there and back for none: what it casts there has been rounded before."""
    value, source = site.value(0), site.dtype()
    if constant_of(value.expr) is not None:
        return None
    if target == ROUNDED and source in ROUNDS and isinstance(value.expr.ty.shape, relax.ShapeExpr):
        bits = site.te(_rounded, site.cast(value.expr, "float32"), name="round")
        return Value(relax.op.astype(site.te(_widened, bits, name="widen"), target), bits=bits)
    if (source, target) == (ROUNDED, "float32") and value.bits is not None:
        return Value(site.te(_widened, value.bits, name="widen"), bits=value.bits)
    return None


def _rounded(x: te.Tensor) -> te.Tensor:
    return te.compute(x.shape, lambda *i: rounded_bits(x(*i)), name="round")


def _widened(bits: te.Tensor) -> te.Tensor:
    return te.compute(bits.shape, lambda *i: widened_bits(bits(*i)), name="widen")


def _weight(site: Site, transposed: bool = False) -> np.ndarray | None:
    """The bits of input 1, where it is a constant of bfloat16 that was widened, and input 0 has been rounded."""
    stored = None if site.value(0).bits is None else stored_weight(site, 1, transposed)
    array = None if stored is None or dtype_of(stored) != ROUNDED else constant_of(stored)
    return None if array is None else array.view(np.uint16)


def matmul(site: Site, transposed: bool = False) -> tvm.ir.Expr | None:
    """Inputs 0 and 1 multiplied, in float32; None where that has no kernel. transposed: the second one is (N, K)."""
    weight = _weight(site, transposed)
    if weight is None or weight.ndim != 2:
        return None
    return kernels.product(site.bb, site.value(0).bits, weight, site.target)


def conv(
    site: Site, kernel: list[int], strides: list[int], dilations: list[int], before: Sequence[Any], after: Sequence[Any]
) -> tvm.ir.Expr | None:
    """A convolution without its bias, in float32; None where that has no kernel."""
    weight = _weight(site)
    if weight is None:
        return None
    bits = site.value(0).bits
    sizes = zip(shape_of(bits)[2:], kernel, strides, dilations, before, after, strict=True)
    places: list[Dim] = [out_size(*size) for size in sizes]
    window = Window(tuple(strides), tuple(dilations), tuple(map(int, before)), int(site.attr("group", 1)))
    return kernels.convolution(site.bb, bits, weight, window, places, site.target)
