"""Softmax and LogSoftmax, in float32, over an axis that is not the last.

A tensor counts as (outer, length, inner), of which `length` is the axis. The lanes of a vector are neighbouring
positions of `inner`, each with a maximum or a pair (m, n) of its own; nothing is transposed. A tile is `width` columns
of all `length` rows:

registers: up to REGISTER_VECTORS rows: a vector is read from each of them, computed and written at once.
scratch: the tile is copied into scratch memory that stays in the cache, whatever the distance of its rows is in X.
    There it takes the three passes; the last one writes Y. 1 read and 1 write of memory per element.
interleaved: of many rows of fewer columns than a vector has lanes, see `softmax_interleaved`.
pairs: of longer columns X is read twice, see `two_pass_softmax`. 2 reads and 1 write.

Source of the pairs: Dukhan and Ablavatski, "The Two-Pass Softmax Algorithm", arXiv 2001.04438.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script import builder as T

from ...passes.base import Caches
from ...passes.ops.two_pass_softmax import NARROWEST, Form, longest_column
from ..target import InstructionSet
from . import functions
from .narrow_floats import NARROW
from .rows import LANE_TERMS, Shape, Size, each_row, flat_kernel, number_of, tree
from .softmax_interleaved import SHORT, interleaved
from .softmax_passes import EMPTY, REGISTER_VECTORS, SoftmaxEmitter
from .vectors import LINE, LOWEST, Buffer, Expr, Vectors

# Columns of a tile at most, 1 KiB of every row: out of the cache long runs are read faster than short ones.
WIDEST = 1 << 8
TOGETHER = 4  # vectors of a tile whose sums are in registers at a time
PAIRS = 2  # the same where X is read again
MOVED = 2  # vectors of a row that are copied at a time
PAIR_ROWS = 1 << 6  # rows that are added up in registers before their sum goes into that of the column
# An element below FLOOR counts as FLOOR, so that its n is still exact: |n| < 2^22.
FLOOR = -2.9e6
# A column whose greatest n is outside (-LIMIT, LIMIT), where n is not exact, is computed by three plain passes.
LIMIT = 4.0e6
WEIGHT = 4  # work of an element against that of a sum: an exponential


def softmax_columns(
    outer: Shape, length: Size, inner: Shape, isa: InstructionSet, caches: Caches, threads: int = 1,
    form: Form = Form.AUTO, log: bool = False, name: str | None = None, types: tuple[str, str] = ("float32", "float32"),
) -> tirx.PrimFunc:  # fmt: skip
    """A kernel (X, Y) -> None over X and Y (*outer, length, *inner): softmax over `length`.

    threads: how many the kernel may count on. form: AUTO chooses by length and cache sizes, at run time where the
    length is dynamic. log: the logarithm instead, which has no form on pairs. name: of the exported symbol; None for a
    function that only its own module calls. types: of X and Y, float32, float16 or bfloat16.
    """
    shape = (*outer, length, *inner)
    y_size = 2 if types[1] in NARROW else 4

    def write(v: Vectors, buffers: dict[str, Buffer], size: Callable[[Size], int | Expr], index: str) -> None:
        if 0 in shape:
            return
        count, rows, columns = number_of(outer, size), size(length), number_of(inner, size)
        large = isa.streaming and _product(count, rows, columns) * y_size > caches.last_level
        kernel = _Columns(SoftmaxEmitter(v, buffers["x"], buffers["y"], index), rows, columns, log, large)
        width = kernel.width(caches, threads if isinstance(count, int) and count < threads else 1, large is True)
        blocks = kernel.ceil(columns, width)

        def each(body: Callable[[Expr, Expr], None]) -> None:
            def task(number: Expr) -> None:
                row = T.Bind(T.truncdiv(number, kernel.const(blocks)))
                column = T.Bind((number - row * kernel.const(blocks)) * kernel.const(width))
                first = T.Bind(row * rows * columns + column)
                if not isinstance(columns, int):
                    body(first, T.Bind(T.min(kernel.const(width), columns - column)))
                    return
                rest = columns % width
                whole = rest == 0 or (columns > width and column < kernel.const(columns - rest))
                _when(whole, lambda: body(first, width), lambda: body(first, rest))

            each_row(_product(count, blocks), _product(count, rows, columns) * WEIGHT, threads, index, task)

        def tiles() -> None:
            limit = 0 if form is Form.TWO_PASS and not log else longest_column(caches)
            _when(
                rows <= limit,
                lambda: each(lambda first, some: kernel.scratch(first, some, width)),
                lambda: each(kernel.plain if log or form is Form.THREE_PASS else kernel.pairs),
            )

        if isinstance(rows, int) and rows <= REGISTER_VECTORS and form is not Form.TWO_PASS:
            _when(
                large,
                lambda: each(lambda first, some: kernel.scratch(first, some, width)),
                lambda: each(kernel.registers),
            )
        elif isinstance(columns, int) and columns < v.lanes and form is Form.AUTO:

            def slices() -> None:
                def task(number: Expr) -> None:
                    interleaved(kernel.emitter, T.Bind(number * (rows * columns)), rows, columns, log)

                each_row(count, _product(count, rows, columns) * WEIGHT, threads, index, task)

            _when(rows >= SHORT * v.lanes, slices, tiles)
        else:
            tiles()

    known = [d for d in shape if isinstance(d, int)]
    flops = 20 * math.prod(known) if len(known) == len(shape) else None
    symbol = "log_softmax_columns" if log else "softmax_columns"
    tensors: dict[str, tuple[Shape, str]] = {"x": (shape, types[0]), "y": (shape, types[1])}
    return flat_kernel(name or symbol, tensors, isa, write, name is not None, flops)


def _product(*sizes: int | Expr) -> int | Expr:
    return math.prod(sizes[1:], start=sizes[0])


def _when(condition: Expr | bool, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """`if` of the kernel, or of its construction where the condition is known."""
    if isinstance(condition, bool):
        (then if condition else otherwise)()
        return
    with T.If(condition):
        with T.Then():
            then()
        with T.Else():
            otherwise()


@dataclass
class _Columns:
    """The forms of one tile. first: flat offset of its first element; count: its columns."""

    emitter: SoftmaxEmitter
    rows: int | Expr
    columns: int | Expr
    log: bool
    large: bool | Expr  # whether Y is written past the caches

    def const(self, value: int | Expr) -> Expr:
        return self.emitter.const(value) if isinstance(value, int) else value

    def ceil(self, count: int | Expr, step: int) -> int | Expr:
        """How often `step` goes into a count, the rest included."""
        if isinstance(count, int):
            return -(-count // step)
        return T.Bind(T.truncdiv(count + self.const(step - 1), self.const(step)))

    def width(self, caches: Caches, parts: int, large: bool) -> int:
        """Columns of a tile: a whole number of NARROWEST. In the cache scratch memory, the tile that is asked for
        meanwhile and Y share the innermost one; out of it long runs matter more. No more than a share of the columns
        where they are all that can be shared; few where the number of rows is not known."""
        lanes = self.emitter.vectors.lanes
        room, widest = (caches.l1 * 3 // 4 // 4, WIDEST) if large else (caches.l1 // 4 // 4, WIDEST // 2)
        if isinstance(self.columns, int):
            share = -(-self.columns // parts)
            step = LINE if share > LINE else lanes
            widest = min(widest, -(-share // step) * step)
        if isinstance(self.rows, int):
            return min(widest, max(NARROWEST, room // self.rows // NARROWEST * NARROWEST))
        return min(widest, NARROWEST)

    def _fill(self, buffer: Buffer, at: list[Expr], value: float) -> None:
        for here in at:
            self.emitter.vectors.store(buffer, here, self.emitter.vectors.splat(value))

    # -- registers -------------------------------------------------------------------------------------------

    def registers(self, first: Expr, count: int | Expr) -> None:
        """Columns of a few rows, a vector of them at a time."""
        assert isinstance(self.rows, int)
        v, e = self.emitter.vectors, self.emitter
        rows = range(self.rows)

        def body(offsets: list[Expr], part: Expr | None) -> None:
            for offset in offsets:
                values = [v.load(e.x, offset + r * self.columns, part) for r in rows]
                top = v.placed(T.max(v.splat(LOWEST), tree(T.max, [*values])))
                if self.log:
                    results = [T.Bind(value - top) for value in values]
                    shift = functions.log(v, v.placed(tree(_add, [v.exp(value) for value in results])))
                    results = [value - shift for value in results]
                else:
                    exps = [v.exp(value - top, low=False) for value in values]
                    factor = T.Bind(v.splat(1.0) / tree(_add, [*exps]))
                    results = [value * factor for value in exps]
                for r, value in zip(rows, results, strict=True):
                    v.store(e.y, offset + r * self.columns, value, part)

        e.sweep(count, 1, body, first)

    # -- scratch ---------------------------------------------------------------------------------------------

    def scratch(self, first: Expr, count: int | Expr, width: int) -> None:
        """A tile by way of scratch memory, at most `width` columns of it."""
        e, v = self.emitter, self.emitter.vectors
        # Rows whose distance is a power of two would share the cache's sets.
        step = self.const(width + LINE)
        copy = T.alloc_buffer((self.const(self.rows) * step,), "float32", scope="global")
        tops = T.alloc_buffer((self.const(width),), "float32", scope="global")
        shifts = T.alloc_buffer((self.const(width),), "float32", scope="global")
        each_vector(e, count, TOGETHER, lambda at: self._fill(tops, at, LOWEST))
        with T.serial(self.const(self.rows)) as r:
            source, to = T.Bind(first + r * self.columns), T.Bind(r * step)

            def take(offsets: list[Expr], part: Expr | None) -> None:
                for offset in offsets:
                    here = T.Bind(offset - source)
                    value = v.load(e.x, offset, part)
                    v.store(copy, to + here, value)
                    v.store(tops, here, T.max(v.load(tops, here), value))

            e.sweep(count, MOVED, take, source)
        each_vector(e, count, TOGETHER, lambda at: self._totals(at, copy, step, tops, shifts, T.Bind(first + width)))

        def result(offset: Expr, here: Expr, r: Expr, part: Expr | None) -> Expr:
            value, shift = v.load(copy, r * step + here), v.load(shifts, here)
            return (value - v.load(tops, here)) - shift if self.log else value * shift

        self._output(first, count, result)

    def _totals(self, at: list[Expr], copy: Buffer, step: Expr, tops: Buffer, shifts: Buffer, behind: Expr) -> None:
        """Exponentials of a few vectors' columns, in place, and what they are multiplied with in the end. The logarithm
        leaves the copy as it is."""
        e, v = self.emitter, self.emitter.vectors
        top = [v.load(tops, here) for here in at]
        sums = v.registers(len(at), 0.0)

        def each(r: Expr, into: Buffer) -> None:
            start = T.Bind(r * step)
            # The tile to the right is read next.
            for j in range(0, len(at), max(1, LINE // v.lanes)):
                v.prefetch(e.x, behind + r * self.columns + at[j])
            values = [v.load(copy, start + here) for here in at]
            for j, here in enumerate(at):
                term = v.exp(values[j] - top[j], low=self.log)
                if not self.log:
                    v.store(copy, start + here, term)
                T.buffer_store(into, into[v.at(j * v.lanes)] + term, [v.at(j * v.lanes)])

        self._in_blocks(LANE_TERMS, len(at), sums, each)
        for j, here in enumerate(at):
            total = T.Bind(sums[v.at(j * v.lanes)])
            v.store(shifts, here, functions.log(v, total) if self.log else v.splat(1.0) / total)

    def _in_blocks(self, block: int, vectors: int, sums: Buffer, each: Callable[[Expr, Buffer], None]) -> None:
        """`each(r, sums)` for all rows; the sums of more than `block` rows are those of blocks."""
        v = self.emitter.vectors
        if isinstance(self.rows, int) and self.rows <= block:
            with T.serial(self.const(self.rows)) as r:
                each(r, sums)
            return
        with T.serial(self.const(self.ceil(self.rows, block))) as b:
            begin = T.Bind(b * block)
            some = v.registers(vectors, 0.0)
            with T.serial(T.Bind(T.min(self.const(block), self.rows - begin))) as r:
                each(begin + r, some)
            for j in range(vectors):
                here = v.at(j * v.lanes)
                T.buffer_store(sums, sums[here] + some[here], [here])

    # -- longer columns --------------------------------------------------------------------------------------

    def pairs(self, first: Expr, count: int | Expr) -> None:
        """A tile in two passes over X; in three where a column of it is not of the usual numbers."""
        e, v = self.emitter, self.emitter.vectors
        ms = T.alloc_buffer((self.const(WIDEST),), "float32", scope="global")
        ns = T.alloc_buffer((self.const(WIDEST),), "float32", scope="global")
        odd = v.registers(1, 0.0)

        def clear(at: list[Expr]) -> None:
            self._fill(ms, at, 0.0)
            self._fill(ns, at, EMPTY)

        each_vector(e, count, TOGETHER, clear)
        with T.serial(self.const(self.ceil(self.rows, PAIR_ROWS))) as b:
            begin = T.Bind(b * PAIR_ROWS)
            some = T.Bind(T.min(self.const(PAIR_ROWS), self.rows - begin))

            def add(offsets: list[Expr], part: Expr | None) -> None:
                m_sum, n_sum = v.registers(PAIRS, 0.0), v.registers(PAIRS, EMPTY)
                with T.serial(some) as r:
                    for j, offset in enumerate(offsets):
                        m, n = self._pair(offset + (begin + r) * self.columns, part)
                        _merge(v, m_sum, n_sum, v.at(j * v.lanes), m, n)
                for j, offset in enumerate(offsets):
                    here = v.at(T.Bind(offset - first))
                    _merge(v, ms, ns, here, m_sum[v.at(j * v.lanes)], n_sum[v.at(j * v.lanes)])

            e.sweep(count, PAIRS, add, first)

        def finish(at: list[Expr]) -> None:
            for here in at:
                total, n = v.load(ms, here), v.load(ns, here)
                for comparison, value, bound in (
                    ("gt", total, 0.0), ("lt", total, 3e38), ("lt", n, LIMIT), ("gt", n, -LIMIT),
                ):  # fmt: skip
                    usual = v.choose(comparison, value, v.splat(bound), odd[v.at(0)], v.splat(1.0))
                    T.buffer_store(odd, usual, [v.at(0)])
                v.store(ms, here, v.splat(1.0) / total)

        each_vector(e, count, TOGETHER, finish)

        def result(offset: Expr, here: Expr, r: Expr, part: Expr | None) -> Expr:
            m, n = self._pair(offset, part)
            return v.times_power(m * v.load(ms, here), n - v.load(ns, here))

        _when(
            v.greatest(odd[v.at(0)]) > T.float32(0),
            lambda: self.plain(first, count),
            lambda: self._output(first, count, result),
        )

    def _pair(self, offset: Expr, part: Expr | None) -> tuple[Expr, Expr]:
        v = self.emitter.vectors
        # The constant first: a NaN passes.
        n, t = v.split(T.Bind(T.max(v.splat(FLOOR), v.load(self.emitter.x, offset, part))))
        return T.Bind(v.polynomial(t)), n

    def plain(self, first: Expr, count: int | Expr) -> None:
        """A tile in three passes over X."""
        e, v = self.emitter, self.emitter.vectors
        tops = T.alloc_buffer((self.const(WIDEST),), "float32", scope="global")
        shifts = T.alloc_buffer((self.const(WIDEST),), "float32", scope="global")

        def prepare(offsets: list[Expr], part: Expr | None) -> None:
            most, sums = v.registers(len(offsets), LOWEST), v.registers(len(offsets), 0.0)
            places = [v.at(j * v.lanes) for j in range(len(offsets))]
            with T.serial(self.const(self.rows)) as r:
                for offset, place in zip(offsets, places, strict=True):
                    value = v.load(e.x, offset + r * self.columns, part)
                    T.buffer_store(most, T.max(most[place], value), [place])

            def each(r: Expr, into: Buffer) -> None:
                for offset, place in zip(offsets, places, strict=True):
                    value = v.load(e.x, offset + r * self.columns, part)
                    T.buffer_store(into, into[place] + v.exp(value - most[place]), [place])

            self._in_blocks(LANE_TERMS, len(offsets), sums, each)
            for offset, place in zip(offsets, places, strict=True):
                here, total = T.Bind(offset - first), T.Bind(sums[place])
                v.store(tops, here, most[place])
                v.store(shifts, here, functions.log(v, total) if self.log else v.splat(1.0) / total)

        e.sweep(count, PAIRS, prepare, first)

        def result(offset: Expr, here: Expr, r: Expr, part: Expr | None) -> Expr:
            value = T.Bind(v.load(e.x, offset, part) - v.load(tops, here))
            return value - v.load(shifts, here) if self.log else v.exp(value) * v.load(shifts, here)

        self._output(first, count, result)

    def _output(self, first: Expr, count: int | Expr, result: Callable[[Expr, Expr, Expr, Expr | None], Expr]) -> None:
        """The rows of a tile of Y. result(flat offset, column of the tile, row, elements): a vector of it."""
        e, v = self.emitter, self.emitter.vectors

        def write(stream: bool) -> None:
            with T.serial(self.const(self.rows)) as r:
                start = T.Bind(first + r * self.columns)

                def give(offsets: list[Expr], part: Expr | None) -> None:
                    for offset in offsets:
                        value = T.Bind(result(offset, T.Bind(offset - start), r, part))
                        v.store(e.y, offset, value, part, stream)

                (e.aligned_sweep if stream else e.sweep)(count, MOVED, give, start)
            if stream:
                v.fence()

        _when(self.large, lambda: write(True), lambda: write(False))


def _add(a: Expr, b: Expr) -> Expr:
    return a + b


def _merge(v: Vectors, ms: Buffer, ns: Buffer, here: Expr, m: Expr, n: Expr) -> None:
    """Add a pair to the sum at `here`. A NaN in n loses; it stays in m."""
    greatest = T.Bind(T.max(n, ns[here]))
    T.buffer_store(ms, v.times_power(ms[here], ns[here] - greatest) + v.times_power(m, n - greatest), [here])
    T.buffer_store(ns, greatest, [here])


def each_vector(e: SoftmaxEmitter, count: int | Expr, group: int, body: Callable[[list[Expr]], object]) -> None:
    """`body(offsets)` over the vectors of a tile's columns from 0 on, the last one whole whatever is in its last lanes:
    `group` at a time, then single ones."""
    v = e.vectors
    lanes, index = v.lanes, e.const
    whole = -(-count // lanes) * lanes if isinstance(count, int) else T.Bind(
        T.bitwise_and(count + index(lanes - 1), index(-lanes))
    )  # fmt: skip
    step = group * lanes
    done: int | Expr = 0
    if not isinstance(whole, int):
        done = T.Bind(T.bitwise_and(whole, index(-step)))
        turns = T.shift_right(done, index(step.bit_length() - 1))
    else:
        done, turns = whole // step * step, index(whole // step)
    with T.serial(turns) as turn:
        at = T.Bind(turn * index(step))
        body([at + j for j in range(0, step, lanes)])
    if isinstance(whole, int) and isinstance(done, int):
        if whole > done:
            body([index(at) for at in range(done, whole, lanes)])
        return
    with T.serial(T.shift_right(whole - done, index(lanes.bit_length() - 1))) as turn:
        body([T.Bind(done + turn * index(lanes))])
