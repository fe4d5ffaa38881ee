"""Softmax along an axis behind which there are fewer elements than a vector has lanes, without idle lanes.

Of C columns, rows of C elements lie end to end. `lanes` rows are C whole vectors, and lane l of vector j is always of
column (j·lanes + l) mod C. So each of C vectors of maxima and sums keeps lanes of several columns; those of a column
are brought together once, at the end of a pass over all rows.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script import builder as T

from . import functions
from .rows import LANE_TERMS
from .softmax_passes import SoftmaxEmitter
from .vectors import LOWEST, NEGATIVE_INFINITY, Buffer, Expr

# Vectors of rows below which bringing lanes together costs more than the idle ones.
SHORT = 8

# Called with the number of a vector, its offset and how many elements it has, None for all.
Body = Callable[[int, Expr, Expr | None], None]


def interleaved(e: SoftmaxEmitter, first: Expr, rows: int | Expr, columns: int, log: bool) -> None:
    """Y of the `rows` x `columns` elements from the flat offset `first` on, in three passes.

    The exponentials wait in Y, or are computed again where Y is narrow.
    """
    kernel = _Interleaved(e, first, rows, columns)
    v = e.vectors
    again = log or e.narrow
    tops = kernel.gathered(LOWEST, T.max, lambda j, offset, part: v.load(e.x, offset, part, NEGATIVE_INFINITY))

    def term(j: int, offset: Expr, part: Expr | None) -> Expr:
        value = v.exp(v.load(e.x, offset, part, NEGATIVE_INFINITY) - tops[j], low=log)
        if not again:
            v.store(e.y, offset, value, part)
        return value

    totals = kernel.gathered(0.0, lambda a, b: a + b, term)
    shifts = [T.Bind(functions.log(v, total) if log else v.splat(1.0) / total) for total in totals]

    def output(j: int, offset: Expr, part: Expr | None) -> None:
        if not again:
            value = v.load(e.y, offset, part) * shifts[j]
        else:
            difference = T.Bind(v.load(e.x, offset, part) - tops[j])
            value = difference - shifts[j] if log else v.exp(difference, low=False) * shifts[j]
        v.store(e.y, offset, T.Bind(value), part)

    kernel.turns(kernel.whole, e.const(0), output)
    kernel.rest(output)


class _Interleaved:
    """Passes over rows that lie end to end."""

    def __init__(self, e: SoftmaxEmitter, first: Expr, rows: int | Expr, columns: int) -> None:
        self.e, self.first, self.columns = e, first, columns
        lanes = e.vectors.lanes
        self.step = lanes * columns
        if isinstance(rows, int):
            self.whole: int | Expr = rows // lanes
            self.left: int | Expr = rows % lanes * columns
        else:
            self.whole = T.Bind(T.shift_right(rows, e.const(lanes.bit_length() - 1)))
            self.left = T.Bind(T.bitwise_and(rows, e.const(lanes - 1)) * columns)

    def turns(self, count: int | Expr, begin: Expr, body: Body) -> None:
        """`body` over `count` times `lanes` rows, from turn `begin` on."""
        e, lanes = self.e, self.e.vectors.lanes
        with T.serial(e.const(count) if isinstance(count, int) else count) as turn:
            at = T.Bind(self.first + (begin + turn) * self.step)
            for j in range(self.columns):
                body(j, at + j * lanes, None)

    def rest(self, body: Body) -> None:
        """`body` over the last rows, fewer than `lanes`."""
        e, lanes = self.e, self.e.vectors.lanes
        at = T.Bind(self.first + self.whole * self.step)
        for j in range(self.columns):
            if not isinstance(self.left, int):
                part = T.Bind(T.max(e.const(0), T.min(e.const(lanes), self.left - j * lanes)))
                body(j, at + j * lanes, part)
            elif self.left > j * lanes:
                body(j, at + j * lanes, e.const(min(lanes, self.left - j * lanes)))

    def gathered(self, start: float, combine: Callable[[Expr, Expr], Expr], value: Callable[..., Expr]) -> list[Expr]:
        """What `combine` makes of the values of a column, in each of its lanes: a vector for each of `columns`.

        No lane combines more than LANE_TERMS before its result goes into that of all.
        """
        e, v = self.e, self.e.vectors
        results, blocks = v.registers(self.columns, start), self.whole

        def into(some: Buffer) -> Body:
            def body(j: int, offset: Expr, part: Expr | None) -> None:
                here = v.at(j * v.lanes)
                T.buffer_store(some, combine(some[here], value(j, offset, part)), [here])

            return body

        if isinstance(blocks, int):
            blocks = e.const(-(-blocks // LANE_TERMS))
        else:
            blocks = T.shift_right(blocks + e.const(LANE_TERMS - 1), e.const(LANE_TERMS.bit_length() - 1))
        with T.serial(blocks) as b:
            some, begin = v.registers(self.columns, start), T.Bind(b * e.const(LANE_TERMS))
            whole = e.const(self.whole) if isinstance(self.whole, int) else self.whole
            self.turns(T.Bind(T.min(e.const(LANE_TERMS), whole - begin)), begin, into(some))
            for j in range(self.columns):
                here = v.at(j * v.lanes)
                T.buffer_store(results, combine(results[here], some[here]), [here])
        self.rest(into(results))
        return self._together(results, combine)

    def _together(self, results: Buffer, combine: Callable[[Expr, Expr], Expr]) -> list[Expr]:
        """The lanes of each column combined, and spread to all of its lanes again."""
        e, v, columns = self.e, self.e.vectors, self.columns
        # Memory of its own: what is addressed by a variable cannot stay in registers.
        flat = T.alloc_buffer((e.const(self.step),), "float32", scope="global")
        one = T.alloc_buffer((e.const(columns),), "float32", scope="global")
        for j in range(columns):
            v.store(flat, e.const(j * v.lanes), results[v.at(j * v.lanes)])
        with T.serial(e.const(columns)) as c:
            T.buffer_store(one, flat[c], [c])
            with T.serial(e.const(v.lanes - 1)) as r:
                T.buffer_store(one, combine(one[c], flat[(r + 1) * columns + c]), [c])
        with T.serial(e.const(v.lanes)) as r, T.serial(e.const(columns)) as c:
            T.buffer_store(flat, one[c], [r * columns + c])
        return [v.load(flat, e.const(j * v.lanes)) for j in range(columns)]
