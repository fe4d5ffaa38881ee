"""Sums, means, greatest and least elements of float32 tensors over neighbouring axes, places of greatest elements, and
rows that are picked from a table.

A tensor counts as (outer, length, inner), of which `length` is reduced. Where `inner` is one element, a row is folded
by several accumulators; else vectors of `inner` are added up, a few at a time. Sums begin anew every LANE_TERMS terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script import builder as T

from ..target import InstructionSet
from .rows import (
    LANE_TERMS,
    Shape,
    Size,
    count_of,
    each_row,
    flat_kernel,
    folded,
    number_of,
    row_total,
    sweep,
)
from .vectors import NEGATIVE_INFINITY, Buffer, Expr, Vectors

TOGETHER = 4  # vectors of the inner axes that are reduced at a time, and of a row in one turn
NOTHING = {"max": NEGATIVE_INFINITY, "min": math.inf}  # the extreme element of no elements
EXACT = 1 << 24  # whole numbers up to here are exact in float32


def reduction(
    kind: str,
    outer: Shape,
    length: Shape,
    behind: tuple[int, ...],
    isa: InstructionSet,
    threads: int = 1,
    name: str | None = None,
) -> tirx.PrimFunc:
    """A kernel (X, Y) -> None: X (*outer, *length, *behind) reduced to Y (*outer, 1 for each of length, *behind).

    kind: sum, mean, max or min. A NaN gives NaN, as in NumPy; the greatest of nothing is -infinity, the least infinity,
    the mean NaN. name: of the exported symbol; None for a function that only its own module calls.
    """
    inner = math.prod(behind)
    tensors: dict[str, tuple[Shape, str]] = {
        "x": ((*outer, *length, *behind), "float32"),
        "y": ((*outer, *(1 for _ in length), *behind), "float32"),
    }

    def write(v: Vectors, buffers: dict[str, Buffer], size: Callable[[Size], int | Expr], index: str) -> None:
        count, terms = number_of(outer, size), number_of(length, size)
        if inner == 0:
            return
        if inner == 1:
            each_row(count, count * terms, threads, index, lambda r: _row(v, buffers, kind, terms, r, index))
            return
        blocks = -(-inner // (TOGETHER * v.lanes))

        def task(n: Expr) -> None:
            row = T.Bind(T.floordiv(n, tirx.const(blocks, index)))
            block = T.Bind(T.floormod(n, tirx.const(blocks, index)))
            _columns(v, buffers, kind, terms, inner, row, block, index)

        each_row(count * blocks, count * terms * inner, threads, index, task)

    return flat_kernel(name or f"reduce_{kind}", tensors, isa, write, name is not None, [*outer, *length, inner])


def _share(terms: int | Expr) -> Expr:
    """What a sum is multiplied with to be a mean."""
    number = T.float32(terms) if isinstance(terms, int) else T.Cast("float32", terms)
    return T.Bind(T.float32(1) / number) if not isinstance(terms, int) or terms else T.float32(math.nan)


def _extreme(v: Vectors, kind: str, most: Expr, x: Expr) -> Expr:
    """The greater or less, or NaN: max and min give their second operand where one of them is NaN."""
    return v.choose("ne", x, x, x, T.Bind(T.max(x, most) if kind == "max" else T.min(x, most)))


def _row(v: Vectors, buffers: dict[str, Buffer], kind: str, terms: int | Expr, row: Expr, index: str) -> None:
    x, y = buffers["x"], buffers["y"]
    start = T.Bind(row * terms)

    def load(at: Expr, part: int | Expr | None, fill: float) -> Expr:
        return v.load(x, at, count_of(part, index), fill)

    if kind in NOTHING:
        nothing, sign = NOTHING[kind], 1.0 if kind == "max" else -1.0
        lanes = T.Bind(folded(
            v, terms, TOGETHER, start, index, nothing,
            lambda most, at, part: _extreme(v, kind, most, load(at, part, nothing)),
            lambda a, b: _extreme(v, kind, a, b),
        ))  # fmt: skip
        unordered = v.greatest(v.choose("ne", lanes, lanes, v.splat(1.0), v.splat(0.0)))
        extreme = T.float32(sign) * v.greatest(T.Bind(lanes * v.splat(sign)))
        result = T.Select(unordered > T.float32(0), T.float32(math.nan), extreme)
    else:
        result = row_total(v, terms, start, index, lambda total, at, part: total + load(at, part, 0.0))
        result = result * _share(terms) if kind == "mean" else result
    T.buffer_store(y, result, [row])


def _columns(
    v: Vectors, buffers: dict[str, Buffer], kind: str, terms: int | Expr, inner: int, row: Expr, block: Expr, index: str
) -> None:
    """Up to TOGETHER vectors of the inner axes."""
    width = TOGETHER * v.lanes
    whole, rest = divmod(inner, width)

    def emit(count: int) -> None:
        column = T.Bind(block * tirx.const(width, index))
        _folded_columns(v, buffers, kind, terms, inner, row, column, count, index)

    if not whole or not rest:
        emit(rest or width)
        return
    with T.If(block < tirx.const(whole, index)):
        with T.Then():
            emit(width)
        with T.Else():
            emit(rest)


def _folded_columns(
    v: Vectors, buffers: dict[str, Buffer], kind: str, terms: int | Expr, inner: int, row: Expr, column: Expr,
    count: int, index: str,
) -> None:  # fmt: skip
    x, y, lanes = buffers["x"], buffers["y"], v.lanes
    parts = [(j, None if (j + 1) * lanes <= count else count - j * lanes) for j in range(-(-count // lanes))]
    sums = v.registers(len(parts), NOTHING.get(kind, 0.0))
    start = T.Bind(row * terms * tirx.const(inner, index) + column)

    def each(term: Expr, into: Buffer) -> None:
        at = T.Bind(start + term * tirx.const(inner, index))
        for j, part in parts:
            here, value = v.at(j * lanes), v.load(x, at + j * lanes, count_of(part, index))
            joined = _extreme(v, kind, into[here], value) if kind in NOTHING else into[here] + value
            T.buffer_store(into, joined, [here])

    number = tirx.const(terms, index) if isinstance(terms, int) else terms
    if kind in NOTHING or (isinstance(terms, int) and terms <= LANE_TERMS):
        with T.serial(number) as term:
            each(term, sums)
    else:
        step = tirx.const(LANE_TERMS, index)
        with T.serial(T.floordiv(number + tirx.const(LANE_TERMS - 1, index), step)) as turn:
            first = T.Bind(turn * step)
            some = v.registers(len(parts), 0.0)
            with T.serial(T.Bind(T.min(step, number - first))) as term:
                each(first + term, some)
            for j, _ in parts:
                here = v.at(j * lanes)
                T.buffer_store(sums, sums[here] + some[here], [here])
    factor = v.splat(_share(terms)) if kind == "mean" else None
    for j, part in parts:
        value = sums[v.at(j * lanes)]
        value = value if factor is None else value * factor
        v.store(y, row * tirx.const(inner, index) + column + j * lanes, T.Bind(value), count_of(part, index))


def place_of_greatest(
    rows: Shape, length: int, isa: InstructionSet, threads: int = 1, least: bool = False, name: str | None = None
) -> tirx.PrimFunc:
    """A kernel (X, Y) -> None: the first place of the greatest element of each row of X (*rows, length), as int64.

    least: of the least element instead. length: from 1 to EXACT. NaN is passed over. name: of the exported symbol; None
    for a function that only its own module calls.
    """
    tensors: dict[str, tuple[Shape, str]] = {"x": ((*rows, length), "float32"), "y": (rows, "int64")}

    def write(v: Vectors, buffers: dict[str, Buffer], size: Callable[[Size], int | Expr], index: str) -> None:
        x, y, lanes = buffers["x"], buffers["y"], v.lanes
        count = number_of(rows, size)

        def emit(row: Expr) -> None:
            start = T.Bind(row * tirx.const(length, index))
            tops = v.registers(TOGETHER, NEGATIVE_INFINITY)
            places = v.registers(TOGETHER, 0.0)
            numbers = T.Bind(T.Cast(v.dtype, T.ramp(tirx.const(0, "int32"), 1, lanes)))
            for j in range(TOGETHER):
                T.buffer_store(places, numbers + v.splat(float(j * lanes)), [v.at(j * lanes)])

            def body(offsets: list[Expr], part: int | Expr | None) -> None:
                for j, offset in enumerate(offsets):
                    here = v.at(j * lanes)
                    value = v.load(x, offset, count_of(part, index), math.inf if least else NEGATIVE_INFINITY)
                    value = T.Bind(v.splat(0.0) - value) if least else value
                    number = T.Bind(numbers + v.splat(T.Cast("float32", offset - start)))
                    top = T.Bind(tops[here])
                    T.buffer_store(places, v.choose("gt", value, top, number, places[here]), [here])
                    T.buffer_store(tops, v.choose("gt", value, top, value, top), [here])

            sweep(v, length, TOGETHER, start, index, body)
            all_ = range(TOGETHER)
            most = v.splat(0.0) + v.splat(NEGATIVE_INFINITY)
            for j in all_:
                most = T.Bind(T.max(most, tops[v.at(j * lanes)]))
            top = T.Bind(v.splat(v.greatest(most)))
            first = v.splat(float(-EXACT))
            for j in all_:
                here = v.at(j * lanes)
                place = T.Bind(v.splat(0.0) - places[here])
                first = T.Bind(T.max(first, v.choose("eq", tops[here], top, place, v.splat(float(-EXACT)))))
            T.buffer_store(y, T.Cast("int64", T.float32(0) - v.greatest(first)), [row])

        each_row(count, count * length, threads, index, emit)

    return flat_kernel(name or "place_of_greatest", tensors, isa, write, name is not None, [*rows, length])


def gather_rows(
    table: Size, row: int, chosen: Shape, numbers: str, isa: InstructionSet, threads: int = 1, name: str | None = None,
    dtype: str = "float32",
) -> tirx.PrimFunc:  # fmt: skip
    """A kernel (X, places, Y) -> None: rows of X (table, row) at places, a tensor of the shape `chosen` and the integer
    type `numbers`. Negative places count from the end; those out of range are brought to the nearest row. name: of the
    exported symbol; None for a function that only its own module calls. dtype: of X and Y, float32, int8 or uint8."""
    tensors: dict[str, tuple[Shape, str]] = {
        "x": ((table, row), dtype),
        "places": (chosen, numbers),
        "y": ((*chosen, row), dtype),
    }

    def write(v: Vectors, buffers: dict[str, Buffer], size: Callable[[Size], int | Expr], index: str) -> None:
        x, places, y = buffers["x"], buffers["places"], buffers["y"]
        count, height = number_of(chosen, size), size(table)
        height = tirx.const(height, "int64") if isinstance(height, int) else T.Cast("int64", height)
        zero = tirx.const(0, "int64")

        def emit(n: Expr) -> None:
            at = T.Bind(T.Cast("int64", places[n]))
            at = T.Bind(at + T.Select(at < zero, height, zero))
            at = T.Bind(T.Cast(index, T.max(T.min(at, height - tirx.const(1, "int64")), zero)) * tirx.const(row, index))
            start = T.Bind(n * tirx.const(row, index))

            def copy(offsets: list[Expr], part: int | Expr | None) -> None:
                for offset in offsets:
                    value = v.load(x, at + (offset - start), count_of(part, index))
                    v.store(y, offset, value, count_of(part, index))

            sweep(v, row, TOGETHER, start, index, copy)

        if row and table != 0:
            each_row(count, count * row, threads, index, emit)

    return flat_kernel(name or "gather_rows", tensors, isa, write, name is not None, 0)
