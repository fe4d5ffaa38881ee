"""Templates of matrix products: what Relax's matmul becomes on a CPU."""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm import relax, tirx

from ..elements import Size, expression, product, size_of
from ..target import Target
from ..templates import Body, anchor, template
from . import gemm_steps
from .dots import dot_of
from .gemm import Finish, GemmEmitter
from .gemm_spec import GemmSpec, GemmTile, choose_tile, pack, packed_tile
from .vectors import Expr, Vectors

USUAL = 128  # columns that tiles are chosen for where the number is known at run time only
STORED = ("float32", "float16", "bfloat16")  # types of constant weights


@template("gemm")
def gemm(parameters: dict[str, Any], body: Body) -> None:
    """A (..., M, K) · B (K, N) packed or (..., K, N) in place. parameters: the fields of GemmSpec and of GemmTile. The
    third input is what sums of 8-bit numbers start at."""
    spec, tile = GemmSpec(**parameters["spec"]), GemmTile(**parameters["tile"])
    v = body.vectors
    a, b, *first = body.inputs
    leading = body.out_shape[:-1]
    batch = 1 if spec.packed or spec.shared_b else product(leading[:-1])
    rows = product(leading) if batch == 1 else leading[-1]
    height, inner, count = (_number(size) for size in (rows, body.shapes[0][-1], batch))
    common = (row_store(body), body.target.cores, body.target.caches, body.index)
    if spec.data != "float32":
        gemm_steps.emit(v, spec, tile, height, a, b, first[0] if first else None, *common)
    else:
        columns = expression(body.out_shape[-1], body.index) if spec.columns is None else None
        GemmEmitter(v, spec, tile, height, inner, count, a, b, *common, columns=columns).emit()


def row_store(body: Body) -> Finish:
    """Stores vectors of a product by their row, counted through all axes but the last, and their column."""
    leading = body.out_shape[:-1]
    analyzer = tvm.sym.Analyzer()
    first = next((position for position, extent in enumerate(leading) if extent != 1), 0)
    known = isinstance(product(leading), int)
    quotient, remainder = body.vectors.divisions(known)

    def finish(value: Expr, row: Expr, column: Expr, there: int | Expr | None) -> None:
        axes = []
        for position, extent in enumerate(leading):
            later = product(leading[position + 1 :])
            if extent == 1:
                axes.append(tirx.const(0, body.index))
            elif known:
                at = row if later == 1 else tirx.floordiv(row, expression(later, body.index))
                within = at if position == first else tirx.floormod(at, expression(extent, body.index))
                axes.append(analyzer.simplify(within))
            else:
                at = row if later == 1 else quotient(row, expression(later, body.index))
                axes.append(at if position == first else remainder(at, expression(extent, body.index)))
        body.store(value, [*axes, column], there)

    return finish


def rows_of(body: Body) -> Expr | int:
    """Rows of a product whose right side is one matrix."""
    return _number(product(body.out_shape[:-1]))


def chosen_tile(spec: GemmSpec, target: Target) -> GemmTile:
    """The tuned one; by rule where there is none."""
    tuned = target.tuning.find("gemm", vars(spec))
    if tuned:
        return GemmTile(**tuned)
    rule = packed_tile if spec.packed else choose_tile
    vectors = Vectors(target.isa)
    spare = dot_of(vectors, spec.data, joined=spec.joined).spare
    columns = USUAL if spec.columns is None else spec.columns
    return rule(spec.rows, columns, target.isa, vectors.lanes, spare)


def _number(size: Size) -> Expr | int:
    return size if isinstance(size, int) else size.expr


def matmul(bb: relax.BlockBuilder, a: Any, b: Any, target: Target, packed: dict[Any, Any]) -> Any | None:
    """A product as a template; None where it has none: other types than float32, but for weights of STORED, vectors, or
    a broadcast that is known only at run time. packed: weights that were packed before, so that those of
    several products are held once.
    """
    kinds = (a.ty, b.ty)
    if any(not isinstance(k.shape, relax.ShapeExpr) for k in kinds) or str(kinds[0].dtype.dtype) != "float32":
        return None
    stored = str(kinds[1].dtype.dtype)
    if stored not in (STORED if isinstance(b, tvm.ir.GenericConst) else ("float32",)):
        return None
    left, right = ([size_of(d) for d in k.shape.values] for k in kinds)
    if min(len(left), len(right)) < 2 or 0 in (*left, *right):
        return None
    *before_a, rows, inner = left
    *before_b, _, columns = right
    pairs = list(zip(_padded(before_a, before_b), _padded(before_b, before_a), strict=True))
    if any(x != y and x != 1 and y != 1 for x, y in pairs):
        return None
    batch = [y if x == 1 else x for x, y in pairs]
    if product(before_b) == 1:
        # One matrix on the right: the left one's leading axes are rows.
        height, count = product((*before_a, rows)), product(())
        shared_a, shared_b = False, True
    else:
        height, count = rows, product(batch)
        shared_a, shared_b = product(before_a) == 1, False
        if product(before_b) != count or product(before_a) not in (1, count):
            return None
    weight = b.value.numpy() if isinstance(b, tvm.ir.GenericConst) and shared_b else None
    known = [size if isinstance(size, int) else None for size in (height, inner, count)]
    if weight is None and stored != "float32":
        return None
    wide = columns if isinstance(columns, int) else None
    spec = GemmSpec(known[0], known[1], wide, weight is not None, known[2], shared_a, shared_b, stored)
    lanes = Vectors(target.isa).lanes
    tile = chosen_tile(spec, target)
    if weight is not None:
        key = (b, tile.packed)
        if key not in packed:
            panels = pack(weight.reshape(weight.shape[-2:]), tile, lanes)
            packed[key] = relax.const(panels, str(panels.dtype))
        b = packed[key]
    out = relax.TensorType([expression(d) for d in (*batch, rows, columns)], "float32")
    flops = 2 * (spec.inner or 0) * math.prod(d for d in (*batch, rows, columns) if isinstance(d, int))
    return anchor(bb, "gemm", {"spec": vars(spec), "tile": vars(tile)}, [a, b], out, flops)


def _padded(dims: list[Size], other: list[Size]) -> list[Size]:
    return [1] * (len(other) - len(dims)) + dims
