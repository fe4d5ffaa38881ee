"""Templates of matrix products: what Relax's matmul becomes on a CPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from ..target import Target
from ..templates import Body, anchor, template
from .gemm import GemmEmitter, GemmSpec, choose_tile, pack
from .vectors import Expr, Vectors


@template("gemm")
def gemm(parameters: dict[str, Any], body: Body) -> None:
    """A (..., M, K) · B (K, N) packed or (..., K, N) in place. parameters: those of GemmSpec."""
    spec = GemmSpec(**parameters)
    v = body.vectors
    tile = choose_tile(spec.rows, spec.columns, body.target.isa, v.lanes)
    a, b = body.inputs
    leading = [int(d) for d in body.out_shape[:-1]]
    analyzer = tvm.sym.Analyzer()

    def finish(value: Expr, row: Expr, column: Expr, there: int | None) -> None:
        axes = []
        for position, extent in enumerate(leading):
            later = math.prod(leading[position + 1 :])
            at = row if later == 1 else tirx.floordiv(row, tirx.const(later, body.index))
            whole = position == 0 or extent == 1
            axes.append(
                tirx.const(0, body.index) if extent == 1
                else analyzer.simplify(at if whole else tirx.floormod(at, tirx.const(extent, body.index)))
            )  # fmt: skip
        body.store(value, [*axes, column], there)

    assert spec.rows is not None and spec.inner is not None and spec.batch is not None
    GemmEmitter(
        v,
        spec,
        tile,
        spec.rows,
        spec.inner,
        spec.batch,
        a,
        b,
        finish,
        body.target.cores,
        body.target.caches,
        body.index,
    ).emit()


def matmul(bb: relax.BlockBuilder, a: Any, b: Any, target: Target, packed: dict[Any, Any]) -> Any | None:
    """A product as a template; None where it has none: other types than float32, dynamic shapes, vectors.

    packed: weights that were packed before, so that those of several products are held once.
    """
    kinds = (a.ty, b.ty)
    if any(str(k.dtype.dtype) != "float32" or not isinstance(k.shape, relax.ShapeExpr) for k in kinds):
        return None
    if not all(isinstance(d, tirx.IntImm) for k in kinds for d in k.shape.values):
        return None
    left, right = ([int(d) for d in k.shape.values] for k in kinds)
    if min(len(left), len(right)) < 2 or 0 in (*left, *right):
        return None
    *before_a, rows, inner = left
    *before_b, _, columns = right
    lanes = Vectors(target.isa).lanes
    batch = [max(x, y) for x, y in zip(_padded(before_a, before_b), _padded(before_b, before_a), strict=True)]
    out = relax.TensorType([*batch, rows, columns], "float32")
    if math.prod(before_b) == 1:
        # One matrix on the right: the left one's leading axes are rows.
        rows, count, shared_a, shared_b = math.prod(before_a) * rows, 1, False, True
    else:
        count = math.prod(batch)
        shared_a, shared_b = math.prod(before_a) == 1, False
        if math.prod(before_b) != count or math.prod(before_a) not in (1, count):
            return None
    weight = b.value.numpy() if isinstance(b, tvm.ir.GenericConst) and shared_b else None
    spec = GemmSpec(rows, inner, columns, weight is not None, count, shared_a, shared_b)
    if weight is not None:
        tile = choose_tile(rows, columns, target.isa, lanes)
        key = (b, inner, columns, tile.vectors)
        if key not in packed:
            packed[key] = relax.const(pack(np.asarray(weight).reshape(inner, columns), tile, lanes), "float32")
        b = packed[key]
    elif columns < lanes:
        return None
    return anchor(bb, "gemm", vars(spec), [a, b], out, spec.flops)


def _padded(dims: list[int], other: list[int]) -> list[int]:
    return [1] * (len(other) - len(dims)) + dims
