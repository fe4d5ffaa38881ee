"""The passes of softmax over one row or a block of it, as pieces that kernels are put together from.

A number is kept as (m, n) = m·2^n in the two-pass form; see `two_pass_softmax`. Names: x, y the flat tensors;
`start` a flat offset; `count` elements from there on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tvm import tirx
from tvm.tirx.script import builder as T

from .narrow_floats import NARROW
from .vectors import LINE, LOWEST, NEGATIVE_INFINITY, Buffer, Exponential, Expr, Vectors

# Rows of up to so many vectors stay in registers. Longer ones would be no faster in the cache and up to twice as slow
# out of it, where all stores of a row at once wait for memory.
REGISTER_VECTORS = 8
# What a float32 lane of the two-pass form adds up before its block ends: a sum of 2^26 elements in 64 lanes is off by
# 8e-4, one in blocks of this size by 2e-7.
LANE_TERMS = 1 << 8
# How much greater an element may be than the one whose power of two a block is summed with.
HEADROOM = 20.0
# Elements ahead of what the two-pass form reads: the processor's own prefetching stops at the end of each page.
AHEAD = 1 << 8
EMPTY = -16777216.0  # the n of an empty sum

# Called with the offsets of whole vectors and None, or with one offset and how many elements there are.
Body = Callable[[list[Expr], Expr | None], None]
# Memory that the exponentials go to instead of Y, and the flat offset of its first element.
Scratch = tuple[Buffer, Expr]


@dataclass(frozen=True)
class Source:
    """What softmax is of: X·scale or X·factor, under a mask. The factor comes behind X, the mask behind both.

    mask: its type, a float to add or bool to choose, None for no mask. axes: for each axis of X whether the mask has it
    or is broadcast; it has the last one. factor, factor_axes: the same of the factor, which does not have the last one.
    """

    scale: float = 1.0
    mask: str | None = None
    axes: tuple[bool, ...] = ()
    factor: str | None = None
    factor_axes: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if self.factor is not None and self.scale != 1:
            raise ValueError(f"a factor of run time goes with no scale, got {self.scale}")


def merged(axes: Sequence[bool], dims: Sequence[int | Expr]) -> list[tuple[int | Expr, bool]]:
    """The axes in front of the last, with the sizes of X, from the last to the first: neighbours of a kind as one."""
    found: list[tuple[int | Expr, bool]] = []
    for size, own in reversed(list(zip(dims[:-1], axes[:-1], strict=True))):
        if found and found[-1][1] == own:
            found[-1] = (found[-1][0] * size, own)
        elif not isinstance(size, int) or size != 1:
            found.append((size, own))
    return found


def _row_offset(row: Expr, axes: Sequence[tuple[int | Expr, bool]], stride: int | Expr) -> Expr | None:
    """Where what belongs to a row of X begins in a tensor that has some of these `axes`; None where it has none.

    stride: its elements of a row.
    """
    begin = None
    for place, (size, own) in enumerate(axes):
        last = place == len(axes) - 1
        if own:
            here = (row if last else tirx.floormod(row, size)) * stride
            begin, stride = here if begin is None else begin + here, stride * size
        if not last:
            row = T.Bind(tirx.floordiv(row, size))
    return begin


@dataclass
class Mask:
    """What is added to X or, of booleans, what chooses from it, broadcast to its shape, of which it has the last axis.

    axes: the others from the last to the first, sizes and whether the mask has them; neighbours of a kind are one.
    """

    buffer: Buffer
    axes: Sequence[tuple[int | Expr, bool]]
    length: int | Expr
    shift: Expr = 0  # from an offset in X to the mask's

    def at_row(self, row: Expr, start: Expr) -> None:
        """The mask's row of a row of X."""
        begin = _row_offset(row, self.axes, self.length)
        self.shift = T.Bind(-start if begin is None else begin - start)

    def applied(self, v: Vectors, x: Expr, scale: Expr, offset: Expr, part: Expr | None) -> Expr:
        """x·scale under the mask."""
        if self.buffer.dtype == "bool":
            return v.placed(v.select(x * scale, self.buffer, offset + self.shift, part))
        return v.placed(v.fma(x, scale, v.load(self.buffer, offset + self.shift, part)))


@dataclass
class Factor:
    """What X is multiplied with, one number for each of its rows or for several. axes: as of a `Mask`."""

    buffer: Buffer
    axes: Sequence[tuple[int | Expr, bool]]
    value: Expr = None  # of the row, in every lane

    def at_row(self, v: Vectors, row: Expr, first: Expr) -> None:
        """The number of a row of X. first: offset 0."""
        begin = _row_offset(row, self.axes, 1)
        one = v.load(self.buffer, first if begin is None else T.Bind(begin), 1)
        self.value = T.Bind(v.splat(v.total(one)))


@dataclass
class SoftmaxEmitter:
    """Emits softmax over the rows of flat buffers into the IR builder that is open. x and y may be float16 or bfloat16;
    what is computed is float32."""

    vectors: Vectors
    x: Buffer
    y: Buffer
    index: str = "int64"  # type of offsets
    x_scale: float = 1.0  # never 0
    mask: Mask | None = None
    factor: Factor | None = None

    @property
    def narrow(self) -> bool:
        """Whether Y has no room for exponentials that are still to be scaled."""
        return self.y.dtype in NARROW

    def read(self, offset: Expr, part: Expr | None = None) -> Expr:
        """The vector at `offset` that softmax is of; -inf in the lanes behind `part`."""
        v = self.vectors
        if self.factor is not None:
            x, factor = v.load(self.x, offset, part), self.factor.value
            x = v.product(x, factor) if self.mask is None else self.mask.applied(v, x, factor, offset, part)
            return v.placed(x if part is None else v.ended(x, part))
        x = v.load(self.x, offset, part, math.copysign(math.inf, -self.x_scale))
        scale = v.splat(self.x_scale)
        if self.mask is None:
            return x if self.x_scale == 1 else v.product(x, scale)
        return self.mask.applied(v, x, scale, offset, part)

    def at_row(self, row: Expr, start: Expr) -> None:
        """From here on offsets are of the row of that number, whose first element is at `start`."""
        if self.mask is not None:
            self.mask.at_row(row, start)
        if self.factor is not None:
            self.factor.at_row(self.vectors, row, self.const(0))

    def sweep(self, count: int | Expr, group: int, body: Body, start: Expr = 0) -> None:
        """`body(offsets, part)` over `count` elements from `start`: `group` vectors at a time, then single ones,
        then the `part` elements that remain. Few enough vectors are written out without a loop."""
        lanes = self.vectors.lanes
        step = group * lanes

        def offsets(first: Expr, vectors: int) -> list[Expr]:
            return [first + j * lanes for j in range(vectors)]

        if isinstance(count, int):
            groups, rest = divmod(count, step)
            if groups * group <= REGISTER_VECTORS:
                for i in range(groups):
                    body(offsets(start + i * step, group), None)
            else:
                with T.serial(self.const(groups)) as i:
                    body(offsets(start + i * step, group), None)
            done = groups * step
            if rest // lanes:
                body(offsets(start + done, rest // lanes), None)
            if rest % lanes:
                body([start + (count - rest % lanes)], self.const(rest % lanes))
            return
        count = T.Bind(count)
        groups = T.Bind(T.shift_right(count, self.const(step.bit_length() - 1)))
        with T.serial(groups) as i:
            body(offsets(start + i * step, group), None)
        done = T.Bind(groups * step)
        singles = T.Bind(T.shift_right(count - done, self.const(lanes.bit_length() - 1)))
        with T.serial(singles) as i:
            body([start + done + i * lanes], None)
        part = T.Bind(T.bitwise_and(count, self.const(lanes - 1)))
        with T.If(part > self.const(0)), T.Then():
            body([start + (count - part)], part)

    def aligned_sweep(self, count: int | Expr, group: int, body: Body, start: Expr) -> None:
        """A sweep whose whole vectors of Y are aligned: the elements in front of the first come as a part."""
        count = self.const(count) if isinstance(count, int) else count
        head = T.Bind(T.min(T.Cast(self.index, self.vectors.to_aligned(self.y, start)), count))
        with T.If(head > self.const(0)), T.Then():
            body([start], head)
        self.sweep(count - head, group, body, T.Bind(start + head))

    def const(self, value: int) -> Expr:
        return tirx.const(value, self.index)

    # -- one row that fits in registers ----------------------------------------------------------------------

    def register_row(self, start: Expr, length: int) -> None:
        """A row of at most REGISTER_VECTORS vectors, read once and written once."""
        v = self.vectors
        parts = [(j, None) for j in range(length // v.lanes)]
        if length % v.lanes:
            parts.append((length // v.lanes, self.const(length % v.lanes)))
        rows = [self.read(start + j * v.lanes, part) for j, part in parts]
        # Not below the smallest float: -inf minus -inf would make a NaN of a lane that only fills up.
        top = v.greatest(_tree(T.max, [*rows]))
        exps = [v.exp(row - v.splat(top), low=False) for row in rows]
        factor = T.Bind(T.float32(1) / v.total(_tree(lambda a, b: a + b, exps)))
        for (j, part), e in zip(parts, exps, strict=True):
            v.store(self.y, start + j * v.lanes, e * v.splat(factor), part)

    # -- three-pass ------------------------------------------------------------------------------------------

    def maximum(self, start: Expr, count: int | Expr) -> Expr:
        """The greatest of `count` elements, LOWEST if all are -inf."""
        v = self.vectors
        group = 8
        best = v.registers(group, LOWEST)

        def body(offsets: list[Expr], part: Expr | None) -> None:
            for j, offset in enumerate(offsets):
                here = v.at(j * v.lanes)
                T.buffer_store(best, T.max(best[here], self.read(offset, part)), [here])

        self.sweep(count, group, body, start)
        return v.greatest(_tree(T.max, [best[v.at(j * v.lanes)] for j in range(group)]))

    def exponentials(
        self, start: Expr, count: int | Expr, top: Expr, scratch: Scratch | None = None, ahead: int | Expr | None = None
    ) -> Expr:
        """Y, or `scratch`, = exp(X - top) over `count` elements; returns their sum.

        ahead: so many elements further the cache lines that the next maximum reads are asked for meanwhile.
        """
        v = self.vectors
        into, origin = scratch or (self.y, 0)
        group = 4
        sums = v.registers(group, 0.0)

        def body(offsets: list[Expr], part: Expr | None) -> None:
            xs = [self.read(offset, part) for offset in offsets]
            if ahead is not None:
                for offset in offsets[:: max(1, LINE // v.lanes)]:
                    v.prefetch(self.x, offset + ahead)
            for j, (offset, x) in enumerate(zip(offsets, xs, strict=True)):
                here = v.at(j * v.lanes)
                e = v.exp(x - v.splat(top), low=False)
                v.store(into, offset - origin, e, part)
                T.buffer_store(sums, sums[here] + e, [here])

        self.sweep(count, group, body, start)
        return v.total(_tree(lambda a, b: a + b, [sums[v.at(j * v.lanes)] for j in range(group)]))

    def scale(
        self, start: Expr, count: int | Expr, factor: Expr, scratch: Scratch | None = None, stream: bool = False
    ) -> None:
        """Y *= factor over `count` elements; from `scratch`, if given. stream: past the caches."""
        v = self.vectors
        source, origin = scratch or (self.y, 0)

        def body(offsets: list[Expr], part: Expr | None) -> None:
            for offset in offsets:
                value = v.load(source, offset - origin, part) * v.splat(factor)
                v.store(self.y, offset, value, part, stream)

        if stream:
            self.aligned_sweep(count, 8, body, start)
        else:
            self.sweep(count, 8, body, start)

    def reload_row(self, start: Expr, length: int | Expr, scratch: Scratch | None = None) -> None:
        """A row in three passes over all of it; its exponentials wait in Y, or `scratch`."""
        top = self.maximum(start, length)
        total = self.exponentials(start, length, top, scratch, ahead=length)
        self.scale(start, length, T.Bind(T.float32(1) / total), scratch)

    def recompute_row(self, start: Expr, length: int | Expr) -> None:
        """A row in three passes over X, its exponentials computed twice and kept nowhere."""
        v, group = self.vectors, 4
        top = T.Bind(v.splat(self.maximum(start, length)))
        sums = v.registers(group, 0.0)

        def add(offsets: list[Expr], part: Expr | None) -> None:
            for j, offset in enumerate(offsets):
                here = v.at(j * v.lanes)
                T.buffer_store(sums, sums[here] + v.exp(self.read(offset, part) - top, low=False), [here])

        self.sweep(length, group, add, start)
        total = v.total(_tree(lambda a, b: a + b, [sums[v.at(j * v.lanes)] for j in range(group)]))
        factor = T.Bind(v.splat(T.float32(1) / total))

        def write(offsets: list[Expr], part: Expr | None) -> None:
            for offset in offsets:
                v.store(self.y, offset, v.exp(self.read(offset, part) - top, low=False) * factor, part)

        self.sweep(length, group, write, start)

    def merge_tops(self, tops: Buffer, sums: Buffer, blocks: int | Expr) -> Expr:
        """Turn the blocks' sums, each against its own maximum, into factors onto a common one.

        Returns 1 / the sum over the row; `sums[b]` is then exp(top of b - top of the row).
        """
        inner = SoftmaxEmitter(self.vectors, tops, sums, self.index)
        v = self.vectors
        top = inner.maximum(self.const(0), blocks)
        total = v.registers(1, 0.0)

        def body(offsets: list[Expr], part: Expr | None) -> None:
            for offset in offsets:
                factor = v.exp(v.load(tops, offset, part, LOWEST) - v.splat(top))
                here = v.at(0)
                T.buffer_store(total, v.fma(v.load(sums, offset, part), factor, total[here]), [here])
                v.store(sums, offset, factor, part)

        inner.sweep(blocks, 1, body, self.const(0))
        return T.Bind(T.float32(1) / v.total(total[v.at(0)]))

    # -- two-pass --------------------------------------------------------------------------------------------

    @property
    def pair_sums(self) -> int:
        """Accumulators of the two-pass form."""
        return 4 if self.vectors.wide else 2

    @property
    def pair_block(self) -> int:
        """Elements of a two-pass block."""
        return LANE_TERMS * self.pair_sums * self.vectors.lanes

    def ask_ahead(self, offsets: Sequence[Expr]) -> None:
        """Ask for what lies AHEAD of a group of vectors of X."""
        if len(offsets) > 1:
            for offset in offsets[:: max(1, LINE // self.vectors.lanes)]:
                self.vectors.prefetch(self.x, offset + AHEAD)

    def pair_sum(self, start: Expr, count: int | Expr) -> tuple[Expr, Expr]:
        """(m, n) of the sum of e^x over `count` elements, n being that of the greatest.

        They are added up as multiples of one 2^n, that of the greatest element of the first vector. Where others turn
        out to be greater by more than HEADROOM, the sum begins anew with theirs.
        """
        v = self.vectors
        accumulators = self.pair_sums
        state = T.alloc_buffer((2,), "float32", scope="global")  # the element whose n is taken, and the greatest
        some = T.min(self.const(v.lanes), self.const(count) if isinstance(count, int) else count)
        T.buffer_store(state, v.greatest(self.read(start, some)), [0])
        T.buffer_store(state, T.float32(float("inf")), [1])
        sums, tops = v.registers(accumulators, 0.0), v.registers(1, NEGATIVE_INFINITY)

        def add(exponential: Exponential, offsets: list[Expr], part: Expr | None) -> None:
            self.ask_ahead(offsets)
            for w, offset in enumerate(offsets):
                here = v.at(w % accumulators * v.lanes)
                x = exponential.clamp(self.read(offset, part))
                T.buffer_store(tops, T.max(tops[v.at(0)], x), [v.at(0)])
                T.buffer_store(sums, v.fma(*exponential.factors(x), sums[here]), [here])

        with T.serial(self.const(2)) as turn, T.If(state[1] > state[0] + T.float32(HEADROOM)), T.Then():
            T.buffer_store(state, T.Select(turn > self.const(0), state[1], state[0]), [0])
            for w in range(accumulators):
                T.buffer_store(sums, v.splat(0.0), [v.at(w * v.lanes)])
            exponential = v.exponential(self._power(state[0]))
            self.sweep(count, 2 * accumulators, partial(add, exponential), start)
            T.buffer_store(state, v.greatest(tops[v.at(0)]), [1])
        n = self._power(state[1])
        total = _tree(lambda a, b: a + b, [sums[v.at(w * v.lanes)] for w in range(accumulators)])
        return v.total(v.times_power(total, self._power(state[0]) - n)), v.greatest(n)

    def _power(self, x: Expr) -> Expr:
        """In every lane the n of e^x, of an x as far from 0 as `farthest` at most."""
        v = self.vectors
        farthest = v.farthest
        # The constants first: a NaN passes.
        inside = T.min(v.splat(farthest), T.max(v.splat(-farthest), v.splat(x)))
        return v.split(T.Bind(inside))[0]

    def merge_pairs(self, ms: Buffer, ns: Buffer, blocks: int | Expr) -> tuple[Expr, Expr]:
        """(m, n) of the sum of the blocks' pairs: exponents are aligned, which is exact, and mantissas added."""
        v = self.vectors
        n_sum = SoftmaxEmitter(v, ns, ns, self.index).maximum(self.const(0), blocks)
        total = v.registers(1, 0.0)

        def body(offsets: list[Expr], part: Expr | None) -> None:
            for offset in offsets:
                m, n = v.load(ms, offset, part), v.load(ns, offset, part, EMPTY)
                here = v.at(0)
                T.buffer_store(total, total[here] + v.times_power(m, n - v.splat(n_sum)), [here])

        self.sweep(blocks, 1, body, self.const(0))
        return v.total(total[v.at(0)]), n_sum

    def pair_output(self, start: Expr, count: int | Expr, m_sum: Expr, n_sum: Expr, stream: bool) -> None:
        """Y = m/m_sum · 2^(n - n_sum) over `count` elements. 1/m_sum goes into the polynomial's coefficients.

        stream: whole vectors of Y bypass the caches; the elements in front of the first aligned address do not.
        """
        v = self.vectors
        factor = T.Bind(T.float32(1) / m_sum)
        exponential = v.exponential(T.Bind(v.splat(n_sum)), factor)

        def body(offsets: list[Expr], part: Expr | None) -> None:
            self.ask_ahead(offsets)
            for offset in offsets:
                x = exponential.clamp(self.read(offset, part))
                m, power = exponential.factors(x)
                v.store(self.y, offset, m * power, part, stream)

        group = 8 if v.wide else 4
        if stream:
            self.aligned_sweep(count, group, body, start)
        else:
            self.sweep(count, group, body, start)


def _tree(combine: Callable[[Expr, Expr], Expr], values: list[Expr]) -> Expr:
    """`values` combined pairwise, so that the chain of dependent operations is short."""
    while len(values) > 1:
        pairs = [T.Bind(combine(a, b)) for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + ([values[-1]] if len(values) % 2 else [])
    return values[0]
