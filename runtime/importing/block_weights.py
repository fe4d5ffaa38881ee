"""Constant weights in blocks behind a DequantizeLinear: products read the codes as they lie."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import tvm
from tvm import relax

from .quantized import DEQUANTIZE
from .site import Site, constant_of, dtype_of, made_by

WIDTHS = (4, 8)  # bits of codes, the first that holds them is taken


def block_product(site: Site, a: tvm.ir.Expr, b: tvm.ir.Expr) -> tvm.ir.Expr | None:
    """a · b as a kernel where b (K, N) is dequantized from constant codes with a scale for each block of rows of a
    column, or for each column. None for other matrices, and where no kernel takes it."""
    if not site.target.is_cpu or dtype_of(b) != "float32":
        return None
    weight = block_weight(site.bb, b)
    if weight is None:
        return None
    from ..kernels.block_products import QUANTIZED, block_matmul

    quantized = None
    made = made_by(site.bb, a, "relax.call_tir")
    if made is not None:
        block = (site.bb.get()[made.args[0]].attrs or {}).get(QUANTIZED)
        quantized = None if block is None else (made.args[1].fields[0], int(block))
    return block_matmul(site.bb, a, weight, site.target, quantized)


def block_weight(bb: relax.BlockBuilder, expr: tvm.ir.Expr) -> Any | None:
    """The `BlockWeight` that a matrix (K, N) is, transposed or not; None where it is none."""
    from ..kernels.block_products import BlockWeight

    transposed = False
    while (turned := made_by(bb, expr, "relax.permute_dims")) is not None:
        axes = turned.attrs.axes
        transposed ^= axes is None or [int(axis) for axis in axes] == [1, 0]
        expr = turned.args[0]
    made = made_by(bb, expr, "relax.call_tir")
    text = None if made is None else (bb.get()[made.args[0]].attrs or {}).get(DEQUANTIZE)
    if made is None or text is None:
        return None
    x, scale, *zero = (constant_of(field) for field in made.args[1].fields)
    if x is None or x.ndim != 2 or scale is None or any(z is None for z in zero) or x.dtype not in (np.int8, np.uint8):
        return None
    known = json.loads(str(text))
    axis, block = known["axis"], known["block"]
    if axis is None:
        return None
    if transposed:
        x, axis = x.T, 1 - axis
        scale, zero = (scale.T, [z.T for z in zero]) if block else (scale, zero)
    if bool(block) != (axis == 0):
        return None
    if not block:
        scale, zero = scale.reshape(1, -1), [z.reshape(1, -1) for z in zero]
    least, most = (int(x.min()), int(x.max())) if x.size else (0, 0)
    signed = x.dtype == np.int8
    bits = next(b for b in WIDTHS if (-1 << (b - 1) if signed else 0) <= least and most < 1 << (b - signed))
    middle = 1 << (bits - 1) if signed else 0
    zeros = np.asarray(zero[0], np.int32) + middle if zero else np.full(scale.shape, middle, np.int32)
    per_word = 32 // bits
    block = block or -(-x.shape[0] // per_word) * per_word
    if block % per_word or zeros.min(initial=0) < 0 or zeros.max(initial=0) >= 1 << bits:
        return None
    codes = (x.astype(np.int32) + middle).astype(np.uint8)
    plain = (zeros == 1 << (bits - 1)).all()
    return BlockWeight(codes, scale.astype(np.float32), None if plain else zeros.astype(np.uint8), block, bits)
