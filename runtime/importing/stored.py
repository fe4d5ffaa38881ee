"""Constant weights that a model stores in 16 bits and widens by a Cast: kernels read them as they lie."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tvm
from tvm import tirx

from .site import NARROW_FLOATS, Site, const, constant_of, dtype_of, made_by


def stored_weight(site: Site, index: int, transposed: bool = False) -> tvm.ir.Expr | None:
    """The float16 or bfloat16 constant that input `index`, a float32 matrix or the weight of a convolution, was widened
    from, in the order of the input's axes or (transposed, of a matrix) the other one. None where it is no such thing,
    and where no kernel would take it.
    """
    expr = site.x(index)
    axes = expr.ty.ndim
    if not site.target.is_cpu or dtype_of(expr) != "float32" or axes not in (2, 3, 4):
        return None
    moves = ("relax.permute_dims",) if axes == 2 else ()
    while dtype_of(expr) == "float32" and (made := made_by(site.bb, expr, "relax.astype", *moves)) is not None:
        expr = made.args[0]
        order = getattr(made.attrs, "axes", None) if made.op.name == "relax.permute_dims" else (0, 1)
        transposed ^= order is None or [int(axis) for axis in order] == [1, 0]
    array = constant_of(expr)
    if array is None or dtype_of(expr) not in NARROW_FLOATS:
        return None
    return const(np.ascontiguousarray(array.T), dtype_of(expr)) if transposed else expr


def stored_bits(weight: tvm.ir.Expr) -> tuple[tvm.ir.Expr, Callable[[tirx.Expr], tirx.Expr]]:
    """A weight of `stored_weight` as a session reads it from its file without a copy, which NumPy's lack of bfloat16
    asks for otherwise, and what makes float32 of an element."""
    if dtype_of(weight) == "float16":
        return weight, lambda element: element.astype("float32")
    array = constant_of(weight)
    assert array is not None  # it is a constant
    bits = const(array.view(np.uint16), "uint16")
    return bits, lambda element: tirx.reinterpret("float32", element.astype("uint32") << tirx.const(16, "uint32"))
