"""Constant weights in blocks behind a DequantizeLinear: products read the codes as they lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx

from .quantized import dequantization
from .site import Site, const, constant_of, dtype_of, made_by

WIDTHS = (4, 8)  # bits of codes, the first that holds them is taken


def block_product(site: Site, a: tvm.ir.Expr, b: tvm.ir.Expr) -> tvm.ir.Expr | None:
    """a · b as a kernel where b (K, N) is dequantized from constant codes with a scale for each block of rows of a
    column, or for each column. None for other matrices, and where no kernel takes it."""
    if not site.target.is_cpu or dtype_of(b) != "float32":
        return None
    weight = block_weight(site.bb, b)
    if weight is None:
        return None
    from ..kernels.block_products import block_matmul

    return block_matmul(site.bb, a, weight, site.target, before_blocks(site.bb, a))


def before_blocks(bb: relax.BlockBuilder, a: tvm.ir.Expr) -> tuple[tvm.ir.Expr, int] | None:
    """What a tensor was before BlockQuantize, and the size of its blocks; None where it comes from another operator."""
    from ..kernels.block_products import QUANTIZED

    made = made_by(bb, a, "relax.call_tir")
    if made is None:
        return None
    block = (bb.get()[made.args[0]].attrs or {}).get(QUANTIZED)
    return None if block is None else (made.args[1].fields[0], int(block))


def block_weight(bb: relax.BlockBuilder, expr: tvm.ir.Expr) -> Any | None:
    """The `BlockWeight` that a matrix (K, N) is, transposed or not; None where it is none."""
    from ..kernels.block_products import BlockWeight

    transposed = False
    while (turned := made_by(bb, expr, "relax.permute_dims")) is not None:
        axes = turned.attrs.axes
        transposed ^= axes is None or [int(axis) for axis in axes] == [1, 0]
        expr = turned.args[0]
    made = made_by(bb, expr, "relax.call_tir")
    found = None if made is None else dequantization(bb, made)
    x = None if found is None else constant_of(found.value)
    if found is None or found.axis is None or x is None or x.ndim != 2 or x.dtype not in (np.int8, np.uint8):
        return None
    axis, block, scale, zero = found.axis, found.block, found.scale, found.zero_point
    if not zero.shape:
        zero = np.broadcast_to(zero, scale.shape)
    if transposed:
        x, axis = x.T, 1 - axis
    if bool(block) != (axis == 0):
        return None
    if not block:
        scale, zero = scale.reshape(1, -1), zero.reshape(1, -1)
    elif transposed:
        scale, zero = scale.T, zero.T
    least, most = (int(x.min()), int(x.max())) if x.size else (0, 0)
    signed = x.dtype == np.int8
    bits = next(b for b in WIDTHS if (-1 << (b - 1) if signed else 0) <= least and most < 1 << (b - signed))
    middle = 1 << (bits - 1) if signed else 0
    zeros = zero + middle
    per_word = 32 // bits
    block = block or -(-x.shape[0] // per_word) * per_word
    if block % per_word or zeros.min(initial=0) < 0 or zeros.max(initial=0) >= 1 << bits:
        return None
    codes = (x.astype(np.int32) + middle).astype(np.uint8)
    plain = (zeros == 1 << (bits - 1)).all()
    return BlockWeight(codes, scale.astype(np.float32), None if plain else zeros.astype(np.uint8), block, bits)


def gathered(site: Site, index: tvm.ir.Expr) -> tvm.ir.Expr | None:
    """Rows of a constant table that is dequantized, each from its own codes; None for other tables.

    Codes of 4 bits lie two in a byte.
    """
    made = made_by(site.bb, site.x(), "relax.call_tir")
    found = None if made is None else dequantization(site.bb, made)
    codes = None if found is None else constant_of(found.value)
    if found is None or codes is None or codes.ndim != 2 or codes.dtype not in (np.int8, np.uint8):
        return None
    height, width = codes.shape
    signed = codes.dtype == np.int8
    least, most = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    two = width % 2 == 0 and (-8 if signed else 0) <= least and most <= (7 if signed else 15)
    middle = 8 if signed and two else 0
    if two:
        raised = (codes.astype(np.int32) + middle).astype(np.uint8)
        codes = raised[:, 0::2] | raised[:, 1::2] << 4
    axis, block = found.axis, found.block
    zeros = np.broadcast_to(found.zero_point, found.scale.shape)

    def compute(table: te.Tensor, scale: te.Tensor, zero: te.Tensor, where: te.Tensor) -> te.Tensor:
        rank = len(where.shape)

        def element(*i: tirx.Var) -> tirx.Expr:
            at = where(*i[:rank]).astype("int64")
            at = tirx.Select(at < 0, at + height, at)
            at = tirx.max(tirx.min(at, tirx.const(height - 1, "int64")), tirx.const(0, "int64"))
            column = i[-1]
            if two:
                byte = table(at, tirx.floordiv(column, 2)).astype("int32")
                code = tirx.bitwise_and(byte >> (tirx.floormod(column, 2) * 4).astype("int32"), tirx.const(15, "int32"))
            else:
                code = table(at, column).astype("int32")
            place = [at, column]
            if axis is not None and block:
                place[axis] = tirx.floordiv(place[axis], block)
            parameters = [] if axis is None else place if block else [place[axis]]
            start = zero(*parameters) + middle
            return (code - start).astype("float32") * scale(*parameters)

        return te.compute((*where.shape, tirx.const(width, "int64")), element, name="gather_dequantize")

    given = [const(codes, str(codes.dtype)), const(found.scale, "float32"), const(zeros, "int32"), index]
    return site.te(compute, *given, name="gather_dequantize")
