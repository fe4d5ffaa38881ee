"""Chains of elementwise operators as one kernel: explicit vectors along the last axis, outer axes over threads."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tvm import tirx
from tvm.tirx.script import builder as T

from ..elements import Tree, TreeEmitter, collapsed, leaves
from .vectors import Buffer, Expr, Vectors

# Elements below which a second thread costs more than it gives, for work of one load and one operation an element.
PARALLEL = 1 << 16
GROUP = 4  # vectors of one turn of the inner loop


def emit_elementwise(
    v: Vectors, tree: Tree, extents: Sequence[int], buffers: Sequence[Buffer], y: Buffer, threads: int, index: str
) -> None:
    """Y = tree over all axes. buffers, y: flat. Emits into the IR builder that is open."""
    tree, extents, _ = collapsed(tree, extents)
    emitter = TreeEmitter(v, buffers, index)
    size = math.prod(extents)
    if size == 0:
        return
    *outer, inner = extents or (1,)
    weight = max(1, len(leaves(tree))) * size
    wide = threads > 1 and weight >= PARALLEL
    if not outer:
        _along(emitter, tree, [], inner, y, wide, index, threads)
        return
    count = math.prod(outer)
    with (T.parallel if wide and count > 1 else T.serial)(tirx.const(count, index)) as step:
        place = []
        for position, extent in enumerate(outer):
            later = math.prod(outer[position + 1 :])
            value = step if later == 1 else tirx.floordiv(step, tirx.const(later, index))
            place.append(T.Bind(value if position == 0 else tirx.floormod(value, tirx.const(extent, index))))
        _along(emitter, tree, place, inner, y, False, index, threads, step * tirx.const(inner, index))


def _along(
    emitter: TreeEmitter, tree: Tree, place: Sequence[Expr], inner: int, y: Buffer, wide: bool, index: str,
    threads: int, start: Expr = 0,
) -> None:  # fmt: skip
    """The last axis, in turns of GROUP vectors, then what is left."""
    v = emitter.vectors

    def one(at: Expr, count: int | None) -> None:
        value = emitter.vector(tree, [*place, at], count)
        if count is None or tree.dtype == "float32":
            v.store(y, start + at, value, None if count is None else tirx.const(count, index))

    step = GROUP * v.lanes
    turns, rest = divmod(inner, step)
    if turns:
        if wide:
            # A turn for each thread of the pool would be too few to balance, one for each step too many.
            parts = min(turns, 4 * threads)
            with T.parallel(tirx.const(parts, index)) as part:
                first = T.Bind(tirx.floordiv(part * tirx.const(turns, index), tirx.const(parts, index)))
                last = T.Bind(
                    tirx.floordiv((part + tirx.const(1, index)) * tirx.const(turns, index), tirx.const(parts, index))
                )
                with T.serial(last - first) as turn:
                    at = T.Bind((first + turn) * tirx.const(step, index))
                    for j in range(GROUP):
                        one(at + tirx.const(j * v.lanes, index), None)
        else:
            with T.serial(tirx.const(turns, index)) as turn:
                at = T.Bind(turn * tirx.const(step, index))
                for j in range(GROUP):
                    one(at + tirx.const(j * v.lanes, index), None)
    for j in range(rest // v.lanes):
        one(tirx.const(turns * step + j * v.lanes, index), None)
    if rest % v.lanes:
        one(tirx.const(inner - rest % v.lanes, index), rest % v.lanes)
