"""Interpolation of images: a place of the result is a weighted sum of places, of some rows times some columns.

Images are in blocks of channels, except where a block would be mostly empty: there rows are mixed by vectors and the
columns one by one. Names: i tap of rows, j tap of columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import relax, tirx
from tvm.tirx.script import builder as T

from ..elements import fixed
from ..templates import Body, anchor, template
from .vectors import Expr

PARALLEL = 1 << 15  # elements of the result below which a second thread costs more than it gives


def interpolated(
    bb: relax.BlockBuilder, x: Any, tables: Sequence[tuple[np.ndarray, np.ndarray]], out: Any, lanes: int
) -> Any:
    """x with other rows and columns. tables: for rows and for columns, of each in the result the places that it is made
    of (int32) and their weights, both (size, taps). out: the Relax type of the result. lanes: of a vector."""
    taps = [places.shape[1] for places, _ in tables]
    places = math.prod(int(d) for d in out.shape.values if isinstance(d, (int, tirx.IntImm)))
    constants = [relax.const(array) for table in tables for array in table]
    name = "interpolate" if int(out.shape.values[1]) >= lanes else "interpolate-plain"
    return anchor(bb, name, {"taps": taps}, [x, *constants], out, 2 * taps[1] * (taps[0] + 1) * places)


@template("interpolate", per_item=True)
def interpolate(parameters: dict[str, Any], body: Body) -> None:
    """parameters: taps (rows, columns), how many a place is made of. Inputs: the image; for each row of the result its
    rows (int32) and their weights; the same for columns."""
    v, index = body.vectors, body.index
    taps_of_rows, taps = parameters["taps"]
    x, rows, row_weights, columns, column_weights = body.inputs
    batch, blocks, height, width, lanes = fixed(body.shapes[0])
    out_height, out_width = fixed(body.out_shape[2:4])

    def const(value: int) -> Expr:
        return tirx.const(value, index)

    def number(table: Any, at: Expr) -> Expr:
        return T.Cast(index, table[at])

    wide = body.target.cores > 1 and batch * blocks * out_height * out_width * lanes >= PARALLEL
    with (T.parallel if wide else T.serial)(const(batch * blocks * out_height)) as line:
        plane, row = T.Bind(tirx.floordiv(line, const(out_height))), T.Bind(tirx.floormod(line, const(out_height)))
        item, block = T.Bind(tirx.floordiv(plane, const(blocks))), T.Bind(tirx.floormod(plane, const(blocks)))
        starts, weights = [], []
        for i in range(taps_of_rows):
            tap = row * const(taps_of_rows) + const(i)
            starts.append(T.Bind((plane * const(height) + number(rows, tap)) * const(width * lanes)))
            weights.append(T.Bind(v.splat(row_weights[tap])))
        with T.serial(const(out_width)) as column:
            total: Expr | None = None
            for j in range(taps):
                tap = column * const(taps) + const(j)
                at = T.Bind(number(columns, tap) * const(lanes))
                value: Expr | None = None
                for start, weight in zip(starts, weights, strict=True):
                    here = v.load(x, start + at)
                    value = T.Bind(here * weight if value is None else v.fma(here, weight, value))
                factor = v.splat(column_weights[tap])
                assert value is not None
                total = T.Bind(value * factor if total is None else v.fma(value, factor, total))
            assert total is not None
            body.store(total, [item, block, row, column, const(0)], None)


@template("interpolate-plain", per_item=True)
def interpolate_plain(parameters: dict[str, Any], body: Body) -> None:
    """The same for an image as it is."""
    v, index = body.vectors, body.index
    lanes = v.lanes
    taps_of_rows, taps = parameters["taps"]
    x, rows, row_weights, columns, column_weights = body.inputs
    batch, channels, height, width = fixed(body.shapes[0])
    out_height, out_width = fixed(body.out_shape[2:4])

    def const(value: int) -> Expr:
        return tirx.const(value, index)

    def along(size: int, write: Callable[[Expr, int | None], None]) -> None:
        """`write(first, how many)` of every vector of a row."""
        if size // lanes:
            with T.serial(const(size // lanes)) as n:
                write(T.Bind(n * const(lanes)), None)
        if size % lanes:
            write(const(size // lanes * lanes), size % lanes)

    wide = body.target.cores > 1 and batch * channels * out_height * out_width >= PARALLEL
    with (T.parallel if wide else T.serial)(const(batch * channels * out_height)) as line:
        plane, row = T.Bind(tirx.floordiv(line, const(out_height))), T.Bind(tirx.floormod(line, const(out_height)))
        item, channel = T.Bind(tirx.floordiv(plane, const(channels))), T.Bind(tirx.floormod(plane, const(channels)))
        mixed, result = (T.alloc_buffer((size,), "float32", scope="global") for size in (width, out_width))
        starts, weights = [], []
        for i in range(taps_of_rows):
            tap = row * const(taps_of_rows) + const(i)
            starts.append(T.Bind((plane * const(height) + T.Cast(index, rows[tap])) * const(width)))
            weights.append(T.Bind(v.splat(row_weights[tap])))

        def mix(first: Expr, count: int | None) -> None:
            there = None if count is None else const(count)
            total: Expr | None = None
            for start, weight in zip(starts, weights, strict=True):
                here = v.load(x, start + first, there)
                total = T.Bind(here * weight if total is None else v.fma(here, weight, total))
            v.store(mixed, first, total, there)

        along(width, mix)
        with T.serial(const(out_width)) as column:
            total: Expr | None = None
            for j in range(taps):
                tap = column * const(taps) + const(j)
                term = mixed[T.Cast(index, columns[tap])] * column_weights[tap]
                total = term if total is None else total + term
            T.buffer_store(result, total, [column])

        def give(first: Expr, count: int | None) -> None:
            value = T.Bind(v.load(result, first, None if count is None else const(count)))
            body.store(value, [item, channel, row, first], count)

        along(out_width, give)
