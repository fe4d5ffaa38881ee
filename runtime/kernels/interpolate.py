"""Interpolation of images: a place of the result is a weighted sum of places, of some rows times some columns.

Images are in blocks of channels, except where a block would be mostly empty: there rows are mixed by vectors and the
columns one by one. Where all sizes are known, places and weights are constants; else a run begins with them. Names: i
tap of rows, j tap of columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import relax, tirx
from tvm.tirx.script import builder as T

from ..elements import Size, expression
from ..templates import Body, anchor, template
from . import resampling
from .conv_spec import NOMINAL
from .resampling import TAPS, Rule
from .vectors import Buffer, Expr

PARALLEL = 1 << 15  # elements of the result below which a second thread costs more than it gives


def interpolated(
    bb: relax.BlockBuilder, x: Any, tables: Sequence[tuple[np.ndarray, np.ndarray]], out: Any, lanes: int
) -> Any:
    """x with other rows and columns. tables: for rows and for columns, of each in the result the places that it is made
    of (int32) and their weights, both (size, taps). out: the Relax type of the result. lanes: of a vector."""
    taps = [places.shape[1] for places, _ in tables]
    constants = [relax.const(array) for table in tables for array in table]
    return _anchor(bb, [x, *constants], {"taps": taps}, out, lanes)


def interpolated_by(
    bb: relax.BlockBuilder, x: Any, rule: Rule, scales: Sequence[float | None], out: Any, lanes: int
) -> Any:
    """x with rows and columns of which some numbers are known only at run time. scales: of both; None for the quotient
    of the sizes."""
    taps = [TAPS[rule.mode]] * 2
    return _anchor(bb, [x], {"taps": taps, "rule": vars(rule), "scales": list(scales)}, out, lanes)


def _anchor(bb: relax.BlockBuilder, inputs: list[Any], parameters: dict[str, Any], out: Any, lanes: int) -> Any:
    taps = parameters["taps"]
    places = math.prod(int(d) for d in out.shape.values if isinstance(d, (int, tirx.IntImm)))
    name = "interpolate" if int(out.shape.values[1]) >= lanes else "interpolate-plain"
    return anchor(bb, name, parameters, inputs, out, 2 * taps[1] * (taps[0] + 1) * places)


Tables = Sequence[Buffer]  # places of rows and their weights, places of columns and theirs


def _tables(parameters: dict[str, Any], body: Body) -> Tables:
    if "rule" not in parameters:
        return body.inputs[1:]
    rule, index = Rule(**parameters["rule"]), body.index
    found: list[Buffer] = []
    for axis, scale in zip((2, 3), parameters["scales"], strict=True):
        size, room = (expression(sizes[axis], index) for sizes in (body.shapes[0], body.out_shape))
        size, out = body.vectors.opaque(size), body.vectors.opaque(room)
        ratio = out.astype("float32") / size.astype("float32") if scale is None else resampling.number(scale)
        taps = parameters["taps"][axis - 2]
        shape = (room * tirx.const(taps, index),)
        places, factors = (T.alloc_buffer(shape, dtype, scope="global") for dtype in ("int32", "float32"))
        with T.serial(out) as at:
            line = body.vectors.opaque(at)  # of its range TVM would make a range of floats, on which it fails
            x = T.Bind(resampling.coordinate(rule, line, size, out, ratio))
            for tap, (place, factor) in enumerate(resampling.weights(rule, x, size.astype("int64"))):
                here = at * tirx.const(taps, index) + tirx.const(tap, index)
                T.buffer_store(places, place.astype("int32"), [here])
                T.buffer_store(factors, factor, [here])
        found += [places, factors]
    return found


def _lines(body: Body) -> tuple[list[Expr], bool, Callable[[Expr, Expr], Expr], Callable[[Expr, Expr], Expr]]:
    """Batch, channels or blocks, rows and columns of image and result; whether the result's rows go over threads;
    quotient and remainder."""
    sizes: list[Size] = [*body.shapes[0][:4], *body.out_shape[2:4]]
    known = all(isinstance(size, int) for size in sizes)
    count = math.prod(size if isinstance(size, int) else NOMINAL for size in (*sizes[:2], *sizes[4:]))
    count *= math.prod(size for size in body.out_shape[4:] if isinstance(size, int))
    quotient, remainder = body.vectors.divisions(known)
    exact = [expression(size, body.index) for size in sizes]
    return exact, body.target.cores > 1 and count >= PARALLEL, quotient, remainder


@template("interpolate", per_item=True)
def interpolate(parameters: dict[str, Any], body: Body) -> None:
    """parameters: taps (rows, columns), how many a place is made of. Inputs: the image; for each row of the result its
    rows (int32) and their weights; the same for columns. Without these: rule and scales that they follow from."""
    v, index = body.vectors, body.index
    taps_of_rows, taps = parameters["taps"]
    x = body.inputs[0]
    (batch, blocks, height, width, out_height, out_width), wide, quotient, remainder = _lines(body)
    rows, row_weights, columns, column_weights = _tables(parameters, body)

    def const(value: int) -> Expr:
        return tirx.const(value, index)

    def number(table: Any, at: Expr) -> Expr:
        return T.Cast(index, table[at])

    with (T.parallel if wide else T.serial)(batch * blocks * out_height) as line:
        plane, row = quotient(line, out_height), remainder(line, out_height)
        item, block = quotient(plane, blocks), remainder(plane, blocks)
        starts, weights = [], []
        for i in range(taps_of_rows):
            tap = row * const(taps_of_rows) + const(i)
            starts.append(T.Bind((plane * height + number(rows, tap)) * width * const(v.lanes)))
            weights.append(T.Bind(v.splat(row_weights[tap])))
        with T.serial(out_width) as column:
            total: Expr | None = None
            for j in range(taps):
                tap = column * const(taps) + const(j)
                at = T.Bind(number(columns, tap) * const(v.lanes))
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
    x = body.inputs[0]
    (batch, channels, height, width, out_height, out_width), wide, quotient, remainder = _lines(body)
    rows, row_weights, columns, column_weights = _tables(parameters, body)

    def const(value: int) -> Expr:
        return tirx.const(value, index)

    def along(size: Expr, write: Callable[[Expr, Expr | None], None]) -> None:
        """`write(first, how many)` of every vector of a row."""
        whole, rest = quotient(size, const(lanes)), remainder(size, const(lanes))
        with T.serial(whole) as n:
            write(T.Bind(n * const(lanes)), None)
        with T.If(rest > const(0)), T.Then():
            write(T.Bind(whole * const(lanes)), rest)

    with (T.parallel if wide else T.serial)(batch * channels * out_height) as line:
        plane, row = quotient(line, out_height), remainder(line, out_height)
        item, channel = quotient(plane, channels), remainder(plane, channels)
        mixed, result = (T.alloc_buffer((size,), "float32", scope="global") for size in (width, out_width))
        starts, weights = [], []
        for i in range(taps_of_rows):
            tap = row * const(taps_of_rows) + const(i)
            starts.append(T.Bind((plane * height + T.Cast(index, rows[tap])) * width))
            weights.append(T.Bind(v.splat(row_weights[tap])))

        def mix(first: Expr, count: Expr | None) -> None:
            total: Expr | None = None
            for start, weight in zip(starts, weights, strict=True):
                here = v.load(x, start + first, count)
                total = T.Bind(here * weight if total is None else v.fma(here, weight, total))
            v.store(mixed, first, total, count)

        along(width, mix)
        with T.serial(out_width) as column:
            total: Expr | None = None
            for j in range(taps):
                tap = column * const(taps) + const(j)
                term = mixed[T.Cast(index, columns[tap])] * column_weights[tap]
                total = term if total is None else total + term
            T.buffer_store(result, total, [column])

        def give(first: Expr, count: Expr | None) -> None:
            value = T.Bind(v.load(result, first, count))
            body.store(value, [item, channel, row, first], count)

        along(out_width, give)
