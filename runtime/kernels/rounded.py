"""Anchors of products and convolutions of bfloat16, whose results are float32: `vdpbf16ps` adds up pairs.

Data and weights come as the bits of bfloat16, uint16, of which two lie in an int32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax

from ..elements import expression, size_of
from ..elements import product as product_of
from ..target import Target
from ..templates import anchor
from . import conv as kernels
from .dots import BITS, RoundedDot
from .gemm_spec import GemmSpec, pack
from .integers import Window, described, unplanned
from .products import chosen_tile
from .vectors import Vectors


def product(bb: relax.BlockBuilder, x: Any, weight: np.ndarray, target: Target) -> Any | None:
    """x * weight, float32 (..., M, N); None where that has no template. x: bits (..., M, K). weight: bits (K, N)."""
    inner, columns = weight.shape
    if not target.isa.dot_bf16 or not isinstance(x.ty.shape, relax.ShapeExpr):
        return None
    dims = [size_of(d) for d in x.ty.shape.values]
    if len(dims) < 2 or 0 in (*dims, columns) or dims[-1] != inner:
        return None
    rows, v = product_of(dims[:-1]), Vectors(target.isa)
    spec = GemmSpec(rows if isinstance(rows, int) else None, inner, columns, weights="bfloat16", data=BITS)
    tile = chosen_tile(spec, target)
    packed = pack(weight, tile, v.lanes, RoundedDot(v).group)
    out = relax.TensorType([expression(d) for d in (*dims[:-1], columns)], "float32")
    flops = 2 * inner * columns * math.prod(d for d in dims[:-1] if isinstance(d, int))
    return anchor(bb, "gemm", {"spec": vars(spec), "tile": vars(tile)}, [x, relax.const(packed, BITS)], out, flops)


def convolution(
    bb: relax.BlockBuilder, x: Any, weight: np.ndarray, window: Window, places: Sequence[Any], target: Target
) -> Any | None:
    """A convolution without bias, float32 (N, O, places); None where it has no template, as depthwise ones.

    x: bits (N, C, ...) over one or two spatial axes. weight: bits (O, C / groups, ...).
    """
    seen = described(x, weight, window, places) if target.isa.dot_bf16 else None
    if seen is None:
        return None
    spec, weight, swapped = seen
    if kernels.supported(spec, target.isa) is not None:
        return None
    inputs = [x, relax.const(np.ascontiguousarray(weight), BITS)]
    return unplanned(bb, spec, swapped, inputs, places, "float32")
