"""Templates of poolings over blocks of channels.

Greatest elements are of float32, int8 or uint8. Means are of float32, or of 8-bit integers less a zero point: sums of
steps, which float32 holds exactly up to 2^24.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from ..elements import expression, fixed, product
from ..templates import Body, template
from .conv_spec import NOMINAL, ConvSpec, Sizes
from .free_rows import RowCutter, taps_inside
from .vectors import Buffer, Expr, Vectors

NAMES = ("pool", "global-pool", "upsample")  # of the templates in this file


def _least(dtype: str) -> float | int:
    """What no element of a type is below."""
    return float("-inf") if dtype == "float32" else int(np.iinfo(dtype).min)


def _taken(v: Vectors, x: Buffer, offset: Expr, parameters: dict[str, Any]) -> Expr:
    """The vector at `offset`; steps from the zero point where a mean is taken of integers."""
    value = v.load(x, offset)
    if parameters["kind"] == "max" or str(x.dtype) == "float32":
        return value
    whole = T.Cast(f"int32x{v.lanes}", value) - T.broadcast(T.int32(parameters["zero"]), v.lanes)
    return T.Bind(T.Cast(v.dtype, whole))


@template("pool", per_item=True)
def pool(parameters: dict[str, Any], body: Body) -> None:
    """Greatest or mean of windows, in blocks. parameters: kind ("max" or "mean"), kernel, strides, dilations, pads
    (above, left), after (below, right), include (padding counts in a mean), zero (the zero point of integers in a
    mean).

    The greatest of nothing but NaN is NaN, as in onnxruntime. Beside finite numbers NaN does not count; its kernels
    differ there, by where in the window it is, and ONNX does not say. A window that is all padding has -inf.
    """
    if not all(isinstance(size, int) for size in (*body.shapes[0], *body.out_shape)):
        _free_pool(parameters, body)
        return
    v, index = body.vectors, body.index
    (x,) = body.inputs
    batch, blocks, height, width, lanes = fixed(body.shapes[0])
    out_height, out_width = fixed(body.out_shape[2:4])
    kind, (kh, kw), (sh, sw) = parameters["kind"], parameters["kernel"], parameters["strides"]
    (dh, dw), (top, left) = parameters["dilations"], parameters["pads"]
    largest = kind == "max"
    kept = str(x.dtype) if largest else "float32"
    first = _least(kept) if largest else 0.0

    def const(value: int) -> Expr:
        return tirx.const(value, index)

    work = batch * blocks * out_height * out_width * kh * kw * lanes
    rows = batch * blocks * out_height
    wide = body.target.cores > 1 and work >= 1 << 16
    tile = next(t for t in (8, 7, 6, 5, 4, 3, 2, 1) if out_width % t == 0)
    padded_rows = top > 0 or (out_height - 1) * sh + (kh - 1) * dh - top >= height
    edges = [
        t for t in range(out_width // tile)
        if t * tile * sw - left < 0 or ((t + 1) * tile - 1) * sw + (kw - 1) * dw - left >= width
    ]  # fmt: skip
    with (T.parallel if wide else T.serial)(const(rows)) as row:
        at = T.Bind(tirx.floormod(row, const(out_height)))
        plane = T.Bind(tirx.floordiv(row, const(out_height)))
        block = T.Bind(tirx.floormod(plane, const(blocks)))
        item = T.Bind(tirx.floordiv(plane, const(blocks)))
        start = T.Bind(at * const(sh) - const(top))
        base = T.Bind(plane * const(height * width * lanes))

        def inside(t: int, where: int | None) -> list[int]:
            """The taps in a row of the t-th output's window that are no padding."""
            if where is None:
                return list(range(kw))
            return [j for j in range(kw) if 0 <= (where + t) * sw + j * dw - left < width]

        def window(column: Expr, where: int | None) -> None:
            """One tile of outputs from `column` on. where: the column where it is known and taps may be outside."""
            cells = v.registers(tile, first, kept)
            ends = v.registers(tile if largest else 1, first, kept)  # the last taps

            def taps(i: int | Expr) -> None:
                offset = T.Bind(base + (start + i * const(dh)) * const(width * lanes))
                for j in range(kw):
                    for t in range(tile):
                        if j not in inside(t, where):
                            continue
                        column_at = (column + const(t)) * const(sw) + const(j * dw - left)
                        value = _taken(v, x, offset + column_at * const(lanes), parameters)
                        here = v.at(const(t * lanes))
                        old = cells[here]
                        T.buffer_store(cells, T.max(value, old) if largest else old + value, [here])
                        if largest and j == inside(t, where)[-1]:
                            T.buffer_store(ends, value, [here])

            if padded_rows:
                with T.serial(const(kh)) as i:
                    at_row = T.Bind(start + i * const(dh))
                    with T.If(tirx.all(at_row >= const(0), at_row < const(height))), T.Then():
                        taps(i)
            else:
                for i in range(kh):
                    taps(const(i))
            count_rows: Expr = tirx.const(float(kh), "float32")
            if kind == "mean" and padded_rows and not parameters["include"]:
                count_rows = T.Bind(_inside_rows(start, kh, dh, height, index))
            for t in range(tile):
                here = v.at(const(t * lanes))
                value = cells[here]
                if largest:
                    value = _unless_nan(v, value, ends[here]) if kept == "float32" else value
                else:
                    columns = kw if parameters["include"] else len(inside(t, where))
                    value = value / v.splat(T.Bind(count_rows * tirx.const(float(columns), "float32")))
                body.store(value, [item, block, at, column + const(t), const(0)], None)

        tiles = out_width // tile
        if edges:
            inner = [t for t in range(tiles) if t not in edges]
            for t in edges:
                window(const(t * tile), t * tile)
            if inner:
                with T.serial(const(len(inner))) as t:
                    window(T.Bind((t + const(inner[0])) * const(tile)), None)
        else:
            with T.serial(const(tiles)) as t:
                window(T.Bind(t * const(tile)), None)


def _free_pool(parameters: dict[str, Any], body: Body) -> None:
    """The same for images whose sizes are known only at run time."""
    v, index = body.vectors, body.index
    (x,) = body.inputs
    batch, blocks, lanes = fixed((*body.shapes[0][:2], body.shapes[0][-1]))
    kernel, strides, dilations, pads, after = (
        tuple(parameters[name]) for name in ("kernel", "strides", "dilations", "pads", "after")
    )
    largest, include = parameters["kind"] == "max", parameters["include"]
    kept = str(x.dtype) if largest else "float32"
    start_value = _least(kept) if largest else 0.0
    nominal = [
        ((NOMINAL - 1) * s + (k - 1) * d + 1 - first - last)
        for k, s, d, first, last in zip(kernel, strides, dilations, pads, after, strict=True)
    ]
    spec = ConvSpec(
        1, 1, 1, (nominal[0], nominal[1]), (NOMINAL, NOMINAL), kernel, strides, dilations, pads
    )  # fmt: skip
    places = [expression(size, index) for size in (*body.shapes[0][2:4], *body.out_shape[2:4])]
    sizes = Sizes.of(v, places)
    cutter = RowCutter(v, index, spec, sizes, (8, 4))
    quotient, remainder = v.divisions(False)

    def const(value: int) -> Expr:
        return tirx.const(value, index)

    with (T.parallel if body.target.cores > 1 else T.serial)(const(batch * blocks) * sizes.rows) as row:
        plane, at = quotient(row, sizes.rows), remainder(row, sizes.rows)
        item, block = quotient(plane, const(blocks)), remainder(plane, const(blocks))
        top = T.Bind(at * const(strides[0]) - const(pads[0]))
        base = T.Bind(plane * sizes.height * sizes.width * const(lanes))
        first, count = taps_inside(v, spec, top, sizes.height, 0)
        for column, span in cutter.tiles():
            cells = v.registers(span.width, start_value, kept)
            ends = v.registers(span.width if largest else 1, start_value, kept)  # the last taps

            def take(offset: Expr, t: int, tap: Expr, cells: Buffer = cells, ends: Buffer = ends) -> None:
                here = v.at(const(t * lanes))
                value = _taken(v, x, offset + tap * const(lanes), parameters)
                T.buffer_store(cells, T.max(value, cells[here]) if largest else cells[here] + value, [here])
                if largest:
                    T.buffer_store(ends, value, [here])

            left = T.Bind(column * const(strides[1]) - const(pads[1]))
            with T.serial(count) as k:
                line = T.Bind(top + (first + k) * const(dilations[0]))
                offset = T.Bind(base + (line * sizes.width + left) * const(lanes))
                if span.inside is not None:
                    with T.serial(span.inside[1]) as tap:
                        take(offset, 0, (span.inside[0] + tap) * const(dilations[1]))
                else:
                    for tap in range(kernel[1]):
                        for t in range(*span.pixels(spec, tap)):
                            take(offset, t, const(t * strides[1] + tap * dilations[1]))
            high = const(kernel[0]) if include else count
            for t in range(span.width):
                here = v.at(const(t * lanes))
                value = cells[here]
                if largest:
                    value = _unless_nan(v, value, ends[here]) if kept == "float32" else value
                else:
                    inside = [tap for tap in range(kernel[1]) if t in range(*span.pixels(spec, tap))]
                    wide: Expr = const(kernel[1] if include else len(inside))
                    if span.inside is not None and not include:
                        wide = span.inside[1]
                    value = value / v.splat(T.Bind(T.Cast("float32", high * wide)))
                body.store(value, [item, block, at, column + const(t), const(0)], None)


def _unless_nan(v: Vectors, greatest: Expr, tap: Expr) -> Expr:
    """The greatest of a window's numbers; NaN where it has none. greatest: -inf there, as NaN is passed over. tap: any
    of the window's."""
    return T.Bind(T.Select(greatest == v.splat(float("-inf")), tap, greatest))


def _inside_rows(start: Expr, taps: int, step: int, height: int, index: str) -> Expr:
    total: Expr = tirx.const(0.0, "float32")
    for i in range(taps):
        at = start + tirx.const(i * step, index)
        inside = tirx.all(at >= tirx.const(0, index), at < tirx.const(height, index))
        total = total + T.Select(inside, tirx.const(1.0, "float32"), tirx.const(0.0, "float32"))
    return total


@template("global-pool", per_item=True)
def global_pool(parameters: dict[str, Any], body: Body) -> None:
    """Greatest or mean over all places of each channel, in blocks. parameters: kind ("max" or "mean"), zero (the
    zero point of integers in a mean). NaN is treated as by `pool`."""
    v, index = body.vectors, body.index
    (x,) = body.inputs
    batch, blocks, *place, lanes = body.shapes[0]
    batch, blocks, lanes = fixed((batch, blocks, lanes))
    places = product(place)
    largest = parameters["kind"] == "max"
    kept = str(x.dtype) if largest else "float32"

    def const(value: int) -> Expr:
        return tirx.const(value, index)

    def both(a: Expr, b: Expr) -> Expr:
        return T.max(b, a) if largest else a + b

    size = expression(places, index) if isinstance(places, int) else v.opaque(expression(places, index))
    likely = places if isinstance(places, int) else NOMINAL * NOMINAL
    wide = body.target.cores > 1 and batch * blocks * lanes * likely >= 1 << 17
    with (T.parallel if wide else T.serial)(const(batch * blocks)) as plane:
        sums = v.registers(4, _least(kept) if largest else 0.0, kept)
        end = v.registers(1, _least(kept), kept) if largest else None  # the last place
        base = T.Bind(plane * size * const(lanes))

        def add(at: Expr, which: int) -> None:
            here, value = v.at(const(which * lanes)), _taken(v, x, base + at * const(lanes), parameters)
            T.buffer_store(sums, both(sums[here], value), [here])
            if end is not None:
                T.buffer_store(end, value, [v.at(const(0))])

        fours = T.Bind(tirx.truncdiv(size, const(4)))
        with T.serial(fours) as i:
            for j in range(4):
                add(T.Bind(i * const(4) + const(j)), j)
        with T.serial(size - fours * const(4)) as i:
            add(T.Bind(fours * const(4) + i), 0)
        total = both(
            both(sums[v.at(const(0))], sums[v.at(const(lanes))]),
            both(sums[v.at(const(2 * lanes))], sums[v.at(const(3 * lanes))]),
        )
        if end is not None and kept == "float32":
            total = _unless_nan(v, total, end[v.at(const(0))])
        elif not largest:
            count = tirx.const(float(places), "float32") if isinstance(places, int) else T.Cast("float32", size)
            total = total * v.splat(tirx.const(1.0, "float32") / count)
        zeros = [const(0)] * (len(place) + 1)
        item, block = tirx.floordiv(plane, const(blocks)), tirx.floormod(plane, const(blocks))
        body.store(T.Bind(total), [item, block, *zeros], None)


@template("upsample", per_item=True)
def upsample(parameters: dict[str, Any], body: Body) -> None:
    """Each place repeated (rows, columns) times, in blocks."""
    v, index = body.vectors, body.index
    (x,) = body.inputs
    rows, columns = parameters["factors"]
    batch, blocks, height, width, lanes = body.shapes[0]
    every, size = product((batch, blocks, height)), product(body.shapes[0])
    known = isinstance(every, int)
    quotient, remainder = v.divisions(known)

    def const(value: int) -> Expr:
        return tirx.const(value, index)

    wide = body.target.cores > 1 and (not isinstance(size, int) or size >= 1 << 15)
    across = expression(width, index)
    with (T.parallel if wide else T.serial)(expression(every, index)) as row:
        plane, at = (f(row, expression(height, index)) for f in (quotient, remainder))
        item, block = (f(plane, expression(blocks, index)) for f in (quotient, remainder))
        with T.serial(const(rows)) as i, T.serial(across) as column:
            value = v.load(x, (row * across + column) * expression(lanes, index))
            for j in range(columns):
                place = [at * const(rows) + i, column * const(columns) + const(j)]
                body.store(value, [item, block, *place, const(0)], None)
