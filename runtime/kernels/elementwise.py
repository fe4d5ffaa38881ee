"""Chains of elementwise operators as one kernel: explicit vectors along the last axis, outer axes over threads."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.tirx.script import builder as T

from ..elements import Size, Tree, collapsed, expression, leaves, product
from .emitter import TreeEmitter, narrowed
from .vector_functions import GROUP
from .vectors import Buffer, Expr, Vectors

# Elements below which a second thread costs more than it gives, for work of one load and one operation an element.
PARALLEL = 1 << 16
USUAL = 1 << 8  # what a size that is known at run time is taken for when threads are given out


def emit_elementwise(
    v: Vectors, tree: Tree, extents: Sequence[Size], buffers: Sequence[Buffer], y: Buffer, threads: int, index: str
) -> None:
    """Y = tree over all axes. buffers, y: flat. Emits into the IR builder that is open."""
    tree, extents, _ = collapsed(tree, extents)
    if 0 in extents:
        return
    weight = max(1, len(leaves(tree)))
    for extent in extents:
        weight *= extent if isinstance(extent, int) else USUAL
    wide = threads > 1 and weight >= PARALLEL
    *outer, inner = extents or (1,)
    chain = _Chain(TreeEmitter(v, buffers, index), tree, y, inner, index)
    if not outer:
        chain.along([], tirx.const(0, index), threads if wide else 1)
        return
    count = product(outer)
    quotient, remainder = v.divisions(isinstance(count, int))
    with (T.parallel if wide and count != 1 else T.serial)(expression(count, index)) as step:
        place = []
        for position, extent in enumerate(outer):
            later = product(outer[position + 1 :])
            value = step if later == 1 else quotient(step, expression(later, index))
            place.append(value if position == 0 else remainder(value, expression(extent, index)))
        chain.along(place, step * expression(inner, index), 1)


class _Chain:
    """The last axis of a tree, in turns of GROUP vectors, then what is left."""

    def __init__(self, emitter: TreeEmitter, tree: Tree, y: Buffer, inner: Size, index: str) -> None:
        self.emitter, self.tree, self.y, self.inner, self.index = emitter, tree, y, inner, index

    def const(self, value: int) -> Expr:
        return tirx.const(value, self.index)

    def along(self, place: Sequence[Expr], start: Expr, threads: int) -> None:
        """One row, whose elements lie at `start` in Y. place: values of the outer axes."""
        lanes = self.emitter.vectors.lanes
        step = GROUP * lanes
        if isinstance(self.inner, int):
            turns, rest = divmod(self.inner, step)
            self._turns(place, start, turns, threads)
            for j in range(rest // lanes):
                self._vector(place, start, self.const(turns * step + j * lanes), None)
            if rest % lanes:
                self._vector(place, start, self.const(self.inner - rest % lanes), rest % lanes)
            return
        inner = expression(self.inner, self.index)
        whole = T.Bind(tirx.floordiv(inner, self.const(step)))
        self._turns(place, start, whole, threads)
        done = T.Bind(whole * self.const(step))
        vectors = T.Bind(tirx.floordiv(inner - done, self.const(lanes)))
        with T.serial(vectors) as j:
            self._vector(place, start, T.Bind(done + j * self.const(lanes)), None)
        last = T.Bind(done + vectors * self.const(lanes))
        with T.If(last < inner), T.Then():
            self._vector(place, start, last, T.Bind(inner - last))

    def _turns(self, place: Sequence[Expr], start: Expr, turns: int | Expr, threads: int) -> None:
        if isinstance(turns, int) and turns == 0:
            return
        lanes, count = self.emitter.vectors.lanes, self.const(turns) if isinstance(turns, int) else turns

        narrow = narrowed(self.tree)

        def turn(number: Expr) -> None:
            at = T.Bind(number * self.const(GROUP * lanes))
            if narrow is None:
                for j in range(GROUP):
                    self._vector(place, start, at + self.const(j * lanes), None)
                return
            values = [self.emitter.vector(narrow, [*place, at + self.const(j * lanes)]) for j in range(GROUP)]
            self.emitter.vectors.store_narrow(self.y, start + at, values)

        if threads == 1:
            with T.serial(count) as number:
                turn(number)
            return
        # A turn for each thread of the pool would be too few to balance, one for each step too many.
        parts = self.const(4 * threads)
        with T.parallel(parts) as part:
            first = T.Bind(tirx.floordiv(part * count, parts))
            last = T.Bind(tirx.floordiv((part + self.const(1)) * count, parts))
            with T.serial(last - first) as number:
                turn(first + number)

    def _vector(self, place: Sequence[Expr], start: Expr, at: Expr, count: int | Expr | None) -> None:
        v = self.emitter.vectors
        value = self.emitter.vector(self.tree, [*place, at], count)
        v.store(self.y, start + at, value, self.const(count) if isinstance(count, int) else count)
