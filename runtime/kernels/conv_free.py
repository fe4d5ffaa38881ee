"""Convolutions of images whose height and width are known only at run time.

Dense ones add up tiles of pixels as `conv_direct` does. Depthwise ones are those of `conv_depthwise` on rows that
`free_rows` cuts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script import builder as T

from ...passes.base import Caches
from . import conv_depthwise, conv_direct
from .conv_direct import Split
from .conv_spec import ConvSpec, ConvTile, Emission, Sizes
from .conv_steps import Source
from .dots import Accumulators
from .free_rows import RowCutter, Span, taps_inside
from .vectors import Buffer, Expr

ROWS = 16  # of one task, at most
RUN = 512  # pixels whose sums wait for the next chunk of weights, at most
LEAST = 1 << 17  # multiply-adds of one task, below which a second one costs more than it saves
AHEAD = 8  # tiles among which a panel's next weights are asked for
WHOLE = (14, 7)  # pixels of short rows that many networks end with
SHARES = 2  # tasks for each thread, at least, so that one that is late holds up less


def shares(threads: int, tasks: int) -> int:
    """Into how many parts an image is cut. tasks: that there are beside."""
    return max(1, -(-SHARES * threads // tasks)) if threads > 1 else 1


@dataclass(frozen=True)
class _Table:
    """Of each pixel of a task: elements from the first tap of the first pixel to its own, its row in the task, its
    column."""

    offsets: Buffer
    rows: Buffer
    columns: Buffer


@dataclass(frozen=True)
class _Pixels:
    """Output pixels of a task, and where it reads x.

    n: the image. row, column: the first pixel. count: of them. columns: of the output; None where they are one row.
    table: None where they follow each other in x and in the output.
    first: element of the first tap of the first pixel. plane, width: pixels of an input block and of a row. step:
    elements between two channels.
    """

    n: Expr
    row: Expr
    column: Expr
    count: Expr
    columns: Expr | None
    table: _Table | None
    buffer: Buffer
    first: Expr
    plane: Expr
    width: Expr
    step: Expr


@dataclass(frozen=True)
class _Tile:
    """place: pixels of the tiles before it. offsets: elements from the first tap of the task's first pixel to that of
    each pixel. places: where each lies in the output."""

    width: int
    place: Expr
    offsets: list[Expr]
    places: list[tuple[Expr, Expr]]


class FreeDirect(conv_direct.DirectEmitter):
    """A dense convolution, or one with groups that fill vectors.

    A task copies the rows of the image that it reads, with their padding, unless an output pixel is the input pixel of
    the same number. Then the pixels of its output rows are one row, and a tile is any neighbours in it.
    """

    def __init__(self, emission: Emission, sizes: Sizes, tile: ConvTile, caches: Caches) -> None:
        super().__init__(emission, tile, caches)
        e, spec, plan = emission, self.spec, self.plan
        self.sizes, self.caches, self.flat = sizes, caches, conv_direct.flat(spec)
        widest = conv_direct.widest(e.vectors.isa, plan.vectors)
        self.widths = list(dict.fromkeys((widest, max(1, widest - 1))))
        weights = 4 * self.in_blocks * self.block_weights * plan.vectors  # bytes of a panel
        # The more there are, the fewer tasks read the same ones.
        part = weights * plan.panels / caches.l2
        parts = max(1, min(plan.panels, e.threads * (0 if part < 1 / 16 else 1 if part < 1 / 2 else SHARES)))
        panels = -(-plan.panels // parts)
        chunk = max(1, min(self.in_blocks, int(caches.l1 * 3 / 4 / (weights / self.in_blocks))))
        chunk = -(-self.in_blocks // -(-self.in_blocks // chunk))
        self.split = Split(ROWS, 1, panels, -(-plan.panels // panels), chunk)
        self.plane = T.Bind(sizes.height * sizes.width)
        self.pixel = self.lanes if spec.blocked_input else 1
        self.depth = 1 if spec.blocked_input else spec.in_channels  # planes of an input block
        blocks = spec.in_blocks(self.lanes) * self.lanes if spec.blocked_input else spec.in_channels
        self.image = T.Bind(self.plane * e.const(blocks))
        each = plan.panels * plan.vectors * self.lanes * self.in_blocks * self.depth * self.pixel * spec.taps
        self.least = max(2 * self.widths[0], LEAST * self.split.panel_blocks // each)  # pixels of a part

    def emit(self) -> None:
        e, s, spec = self.e, self.split, self.spec
        batch = e.batch()
        tasks = (batch if isinstance(batch, int) else 1) * spec.groups * s.panel_blocks
        if self.flat and self.sizes.one_row:
            total, (each, parts) = self.plane, self.runs(tasks)
        else:
            total, (each, parts) = self.sizes.rows, self.row_parts(tasks)
        with e.tasks(batch, T.Bind(parts * e.const(spec.groups * s.panel_blocks))) as task:
            rest, panel_block = e.divide(task, s.panel_blocks)
            begin = T.Bind(e.vectors.opaque(tirx.truncmod(rest, parts)) * each)
            n, group = e.divide(e.vectors.opaque(tirx.truncdiv(rest, parts)), spec.groups)
            image = T.Bind(n * self.image + group * self.plane * e.const(self.in_blocks * self.lanes))
            count = e.vectors.opaque(T.min(each, total - begin))
            pixels = self.pixels(n, image, begin, count)
            out_blocks = (self.plan.panels - 1) * self.plan.vectors + self.plan.last
            first_out = T.Bind(group * e.const(out_blocks))
            for panel, vectors in self.panels(panel_block):
                block = T.Bind(first_out + panel * e.const(self.plan.vectors))
                weights = T.Bind(block * e.const(self.in_blocks * self.block_weights))
                self.panel_of(pixels, weights, block, vectors)

    def runs(self, tasks: int) -> tuple[Expr, Expr]:
        """(pixels of one part, parts) of an image's only row: parts whose input stays in half of the second cache, but
        not so short that tiles do not fit."""
        e, const = self.e, self.e.const
        most = max(self.least, self.caches.l2 // 2 // (4 * self.in_blocks * self.depth * self.pixel))
        parts = shares(e.threads, tasks)
        even = T.min(const(parts), T.max(const(1), tirx.truncdiv(self.plane, const(self.least))))
        count = e.vectors.opaque(T.max(even, tirx.truncdiv(self.plane + const(most - 1), const(most))))
        each = e.vectors.opaque(T.max(const(1), tirx.truncdiv(self.plane + count - const(1), count)))
        return each, e.vectors.opaque(tirx.truncdiv(self.plane + each - const(1), each))

    def row_parts(self, tasks: int) -> tuple[Expr, Expr]:
        """(rows of one part, parts): as many rows as half of the second cache has room for."""
        e, const, reach = self.e, self.e.const, self.reach(0)
        columns = e.vectors.opaque(T.max(const(1), self.sizes.columns))  # an image may be empty
        row = self.copied_columns(columns) * const(4 * self.in_blocks * self.depth * self.pixel)
        room = tirx.truncdiv(const(self.caches.l2 // 2), row) - const(reach)
        most = e.vectors.opaque(T.max(const(1), T.min(const(ROWS), tirx.truncdiv(room, const(self.spec.strides[0])))))
        parts = shares(e.threads, tasks)
        few = tirx.truncdiv(const(self.least) + columns - const(1), columns)
        even = tirx.truncdiv(self.sizes.rows + const(parts - 1), const(parts))
        each = e.vectors.opaque(T.max(const(1), T.min(most, T.max(few, even))))
        return each, e.vectors.opaque(tirx.truncdiv(self.sizes.rows + each - const(1), each))

    def reach(self, axis: int) -> int:
        """Rows or columns between the first tap and the last."""
        return (self.spec.kernel[axis] - 1) * self.spec.dilations[axis]

    def copied_columns(self, columns: Expr) -> Expr:
        """Columns of the copy that so many columns of the output read."""
        const = self.e.const
        return (columns - const(1)) * const(self.spec.strides[1]) + const(self.reach(1) + 1)

    def pixels(self, n: Expr, image: Expr, begin: Expr, count: Expr) -> _Pixels:
        """Those of a task: of rows [begin, begin + count), or pixels where the image is one row."""
        e, const, opaque = self.e, self.e.const, self.e.vectors.opaque
        zero, columns = const(0), self.sizes.columns
        step = const(1) if self.spec.blocked_input else self.plane
        if self.flat and self.sizes.one_row:
            first = T.Bind(image + begin * const(self.pixel))
            return _Pixels(n, zero, begin, count, None, None, e.x, first, self.plane, zero, step)
        total = T.Bind(count * columns)
        if self.flat:
            first = T.Bind(image + begin * columns * const(self.pixel))
            table = self.table(count, columns)
            return _Pixels(n, begin, zero, total, columns, table, e.x, first, self.plane, columns, step)
        spec, reach = self.spec, self.reach(0)
        width = opaque(self.copied_columns(columns))
        rows = opaque((count - const(1)) * const(spec.strides[0]) + const(reach + 1))
        most = const((ROWS - 1) * spec.strides[0] + reach + 1) * self.copied_columns(self.sizes.room)
        planes = self.in_blocks * self.depth
        copy = T.alloc_buffer((most * const(planes * self.pixel),), e.x.dtype, scope="global")
        plane = T.Bind(rows * width)
        self.copy(copy, image, begin, rows, width, planes)
        step = const(1) if spec.blocked_input else plane
        return _Pixels(n, begin, zero, total, columns, self.table(count, width), copy, zero, plane, width, step)

    def table(self, rows: Expr, width: Expr) -> _Table:
        """Of the pixels of so many rows. width: of a row that is read."""
        const, sizes, e = self.e.const, self.sizes, self.e
        offsets, row, column = (T.alloc_buffer((const(ROWS) * sizes.room,), e.index, scope="global") for _ in range(3))
        down, right = (const(s * self.pixel) for s in self.spec.strides)
        with T.serial(rows) as i, T.serial(sizes.columns) as j:
            at = T.Bind(i * sizes.columns + j)
            T.buffer_store(offsets, i * width * down + j * right, [at])
            T.buffer_store(row, i, [at])
            T.buffer_store(column, j, [at])
        return _Table(offsets, row, column)

    def copy(self, copy: Buffer, image: Expr, begin: Expr, rows: Expr, width: Expr, planes: int) -> None:
        """The rows that output row `begin` and those behind it read, and zeros outside the image."""
        spec, const, v, pixel = self.spec, self.e.const, self.e.vectors, self.pixel
        pad = const(spec.pads[1])
        low = v.opaque(T.min(width, T.max(const(0), pad)))
        high = v.opaque(T.max(low, T.min(width, self.sizes.width + pad)))

        def fill(at: Expr, count: Expr) -> None:
            """`count` pixels of zeros."""
            with T.serial(count) as i:
                if pixel > 1:
                    v.store(copy, at + i * const(pixel), v.splat(0.0))
                else:
                    T.buffer_store(copy, T.float32(0), [at + i])

        with T.serial(const(planes)) as plane, T.serial(rows) as r:
            h = T.Bind(begin * const(spec.strides[0]) - const(spec.pads[0]) + r)
            to = T.Bind((plane * rows + r) * width * const(pixel))
            with T.If(tirx.all(h >= const(0), h < self.sizes.height)):
                with T.Then():
                    fill(to, low)
                    source = image + (plane * self.plane + h * self.sizes.width + low - pad) * const(pixel)
                    source, there = T.Bind(source), T.Bind(to + low * const(pixel))
                    self._move(copy, there, source, v.opaque((high - low) * const(pixel)))
                    fill(T.Bind(to + high * const(pixel)), width - high)
                with T.Else():
                    fill(to, width)

    def _move(self, copy: Buffer, to: Expr, source: Expr, count: Expr) -> None:
        e, v, const = self.e, self.e.vectors, self.e.const
        whole = v.opaque(tirx.truncdiv(count, const(self.lanes)))
        with T.serial(whole) as i:
            at = T.Bind(i * const(self.lanes))
            v.store(copy, to + at, v.load(e.x, source + at))
        if self.pixel == 1:
            done = T.Bind(whole * const(self.lanes))
            with T.serial(count - done) as i:
                T.buffer_store(copy, e.x[source + done + i], [to + done + i])

    def panel_of(self, pixels: _Pixels, weights: Expr, block: Expr, vectors: int) -> None:
        """All pixels of a task for one panel; in chunks of input blocks where its weights do not stay in a cache."""
        e, v, const = self.e, self.e.vectors, self.e.const
        first_sums = [e.first_sums(block + each) for each in range(vectors)]
        chunk, blocks = self.split.chunk, self.in_blocks
        if chunk >= blocks:
            for tile in self.tiles(pixels, const(0), pixels.count):
                acc = Accumulators(e.dot, tile.width, vectors)
                for j, each in itertools.product(range(tile.width), range(vectors)):
                    acc.set(j, each, first_sums[each])
                self.add(acc, tile, vectors, pixels, weights, const(0), blocks)
                self.finish(tile, pixels, block, [[acc.get(j, k) for k in range(vectors)] for j in range(tile.width)])
            return
        # Every tile has sums of its own: a pixel that two tiles share is added up in both.
        size = vectors * self.lanes
        sums = T.alloc_buffer(((RUN + 2 * self.widths[0]) * size,), self.dot.sums, scope="global")
        with T.serial(v.opaque(tirx.truncdiv(pixels.count + const(RUN - 1), const(RUN)))) as run:
            begin = T.Bind(run * const(RUN))
            count = v.opaque(T.min(const(RUN), pixels.count - begin))
            with T.serial(const(-(-blocks // chunk))) as c:
                first = T.Bind(c * const(chunk))
                depth: int | Expr = chunk
                if blocks % chunk:
                    depth = T.Bind(T.min(const(chunk), const(blocks) - first))
                for tile in self.tiles(pixels, begin, count):
                    acc, start = Accumulators(e.dot, tile.width, vectors), T.Bind(tile.place * const(size))
                    everything = list(itertools.product(range(tile.width), range(vectors)))
                    with T.If(c == const(0)):
                        with T.Then():
                            for j, each in everything:
                                acc.set(j, each, first_sums[each])
                        with T.Else():
                            for j, each in everything:
                                acc.set(j, each, v.load(sums, start + (j * size + each * self.lanes)))
                    self.add(acc, tile, vectors, pixels, weights, first, depth)
                    for j, each in everything:
                        v.store(sums, start + (j * size + each * self.lanes), acc.get(j, each))
            for tile in self.tiles(pixels, begin, count):
                start = T.Bind(tile.place * const(size))
                values = [
                    [T.Bind(v.load(sums, start + (j * size + k * self.lanes))) for k in range(vectors)]
                    for j in range(tile.width)
                ]
                self.finish(tile, pixels, block, values)

    def tiles(self, pixels: _Pixels, begin: Expr, count: Expr) -> Iterator[_Tile]:
        """Those of pixels [begin, begin + count) of a task, inside the loop over them."""
        yield from self._tiles(pixels, begin, count, self.widths)

    def _tiles(self, pixels: _Pixels, begin: Expr, count: Expr, widths: Sequence[int]) -> Iterator[_Tile]:
        const, opaque = self.e.const, self.e.vectors.opaque
        if not widths or widths[0] == 1:
            with T.serial(count) as i:
                yield from self._tile(pixels, 1, T.Bind(begin + i), i)
            return
        width, *narrower = widths

        def tiles_of(width: int) -> Expr:
            return tirx.truncdiv(count + const(width - 1), const(width))

        fits = count >= const(width)
        if narrower and narrower[0] > 1:
            fits = tirx.all(fits, tiles_of(width) * const(width) <= tiles_of(narrower[0]) * const(narrower[0]))
        with T.If(fits):
            with T.Then(), T.serial(opaque(tiles_of(width))) as turn:
                place = T.Bind(turn * const(width))
                yield from self._tile(pixels, width, opaque(begin + T.min(place, count - const(width))), place)
            with T.Else():
                yield from self._tiles(pixels, begin, count, narrower)

    def _tile(self, pixels: _Pixels, width: int, first: Expr, place: Expr) -> Iterator[_Tile]:
        """One tile, in two forms where its pixels may be in one row or in several."""
        const, opaque = self.e.const, self.e.vectors.opaque
        if pixels.table is None:
            start = T.Bind(first * const(self.pixel))
            offsets = [start + const(j * self.pixel) for j in range(width)]
            yield _Tile(width, place, offsets, [(const(0), pixels.column + first + const(j)) for j in range(width)])
            return
        table = pixels.table
        row, column = T.Bind(pixels.row + table.rows[first]), T.Bind(table.columns[first])
        start = T.Bind(pixels.row * pixels.columns + first) if self.sizes.one_row else None

        def straight() -> _Tile:
            begin, right = opaque(table.offsets[first]), self.spec.strides[1] * self.pixel
            places = [(row, column + const(j)) if start is None else (const(0), start + const(j)) for j in range(width)]
            return _Tile(width, place, [begin + const(j * right) for j in range(width)], places)

        if width == 1:
            yield straight()
            return
        with T.If(column + const(width) <= pixels.columns):
            with T.Then():
                yield straight()
            with T.Else():
                offsets, places = [], []
                for j in range(width):
                    at = first + const(j)
                    offsets.append(opaque(table.offsets[at]))
                    here = (T.Bind(pixels.row + table.rows[at]), T.Bind(table.columns[at]))
                    places.append(here if start is None else (const(0), start + const(j)))
                yield _Tile(width, place, offsets, places)

    def finish(self, tile: _Tile, pixels: _Pixels, block: Expr, values: Sequence[Sequence[Expr]]) -> None:
        for j, vectors in enumerate(values):
            for each, value in enumerate(vectors):
                self.e.finish(value, (pixels.n, block + each, *tile.places[j]))

    def add(
        self, acc: Accumulators, tile: _Tile, vectors: int, pixels: _Pixels, weights: Expr, first: Expr,
        count: int | Expr,
    ) -> None:  # fmt: skip
        """Add the taps of input blocks [first, first + count) to a tile."""
        e, spec, const, dot = self.e, self.spec, self.e.const, self.dot
        step = vectors * dot.width  # weights of a step
        tap = self.steps * step
        begin = T.Bind(weights + first * const(self.block_weights * vectors))
        ahead = None
        if spec.blocked_input:
            total = self.split.chunk * self.block_weights * vectors
            turn = T.Bind(tirx.truncdiv(tile.place, const(tile.width)))
            ahead = e.vectors.ahead(e.w, begin, total, self.unroll * step, turn, AHEAD, const, dot.line)
        with e.serial(count) as i:
            block = T.Bind(first + i)
            x_block = T.Bind(pixels.first + block * pixels.plane * const(self.pixel))
            w_block = T.Bind(weights + block * const(self.block_weights * vectors))
            with e.serial(spec.kernel[0]) as kh, e.serial(spec.kernel[1]) as kw:
                down, right = kh * const(spec.dilations[0]) * pixels.width, kw * const(spec.dilations[1])
                x_tap = T.Bind(x_block + (down + right) * const(self.pixel))
                w_tap = T.Bind(w_block + (kh * const(spec.kernel[1]) + kw) * const(tap))
                with self.channel_steps(block) as q:
                    x_at = T.Bind(x_tap + q * const(self.unroll) * pixels.step)
                    w_at = T.Bind(w_tap + q * const(self.unroll * step))
                    if ahead:
                        ahead(w_at)
                    for u in range(self.unroll):
                        row = [dot.weights(e.w, w_at + (u * step + v * dot.width)) for v in range(vectors)]
                        for j in range(tile.width):
                            value = dot.same(pixels.buffer, x_at + const(u) * pixels.step + tile.offsets[j])
                            for v in range(vectors):
                                acc.add(j, v, value, row[v])


class FreeDepthwise(conv_depthwise.DepthwiseEmitter):
    """A convolution of one input channel for each output."""

    def __init__(self, emission: Emission, sizes: Sizes, tile: ConvTile, caches: Caches) -> None:
        self.span = Span(1)
        super().__init__(emission, tile, caches)
        self.sizes, self.in_height, self.in_width = sizes, sizes.height, sizes.width
        widest = conv_depthwise.widest(emission.vectors.isa, self.spec, caches)
        widths, whole = (widest, (widest + 1) // 2), [width for width in WHOLE if width <= widest]
        self.cutter = RowCutter(emission.vectors, emission.index, self.spec, sizes, widths, whole)

    def emit(self) -> None:
        e, spec = self.e, self.spec
        batch, blocks = e.batch(), spec.in_blocks(self.lanes)
        known = batch if isinstance(batch, int) else 1
        count = e.const(shares(e.threads, known * blocks))
        each = e.vectors.opaque(T.max(e.const(1), tirx.truncdiv(self.sizes.rows + count - e.const(1), count)))
        parts = e.vectors.opaque(tirx.truncdiv(self.sizes.rows + each - e.const(1), each))
        plane_size = T.Bind(self.sizes.height * self.sizes.width * e.const(self.lanes))
        with e.tasks(batch, T.Bind(parts * e.const(blocks))) as task:
            first = T.Bind(e.vectors.opaque(tirx.truncmod(task, parts)) * each)
            plane = e.vectors.opaque(tirx.truncdiv(task, parts))
            n, block = e.divide(plane, blocks)
            rows = e.vectors.opaque(T.min(each, self.sizes.rows - first))
            weights = T.Bind(block * e.const(spec.taps * self.dot.width))
            held = self.weights(weights, spec.taps) if spec.taps <= conv_depthwise.WRITTEN_OUT else None
            image = T.Bind(plane * plane_size)
            source = Source(e.x, image, e.const(0), plane_size, self.sizes.width, self.lanes, 1)
            with e.serial(rows) as i:
                self.row(n, block, source, weights, held, T.Bind(first + i))

    def row(self, n: Expr, block: Expr, source: Source, weights: Expr, held: list[Expr] | None, row: Expr) -> None:
        if held is None:
            self.border_row(n, block, source, weights, row)
        else:
            self.inner_row(n, block, source, held, row)

    def inner_row(self, n: Expr, block: Expr, source: Source, held: list[Expr], row: Expr) -> None:
        """The same code for rows at the border: each kernel row is passed over where it lies outside."""
        e, spec = self.e, self.spec
        top = T.Bind(row * e.const(spec.strides[0]) - e.const(spec.pads[0]))
        first, count = taps_inside(e.vectors, spec, top, self.sizes.height, 0)
        end = T.Bind(first + count)
        for column, start, width in self.row_tiles():
            acc = self.tile(width, block)
            at = self.pixel(source, top, column)
            for tap in range(spec.kernel[0]):
                line = at + tap * spec.dilations[0] * self.in_width * self.lanes
                weights = held[tap * self.steps : (tap + 1) * self.steps]
                with T.If(tirx.all(first <= e.const(tap), e.const(tap) < end)), T.Then():
                    self.kernel_row(acc, start, width, source, line, weights)
            self.finish(acc, width, n, block, row, column)

    def row_tiles(self) -> Iterator[tuple[Expr, int, int]]:
        for column, span in self.cutter.tiles():
            self.span = span
            yield column, 0, span.width

    def columns(self, start: int, width: int, kw: int) -> tuple[int, int]:
        return self.span.pixels(self.spec, kw)

    def kernel_row(
        self, acc: Accumulators, start: int, width: int, source: Source, at: Expr, row: list[Expr]
    ) -> None:
        if self.span.inside is None:
            super().kernel_row(acc, start, width, source, at, row)
            return
        first, count = self.span.inside
        for tap, weight in enumerate(row):
            with T.If(tirx.all(first <= self.e.const(tap), self.e.const(tap) < first + count)), T.Then():
                value = self.dot.each(source.buffer, at + tap * self.spec.dilations[1] * self.lanes)
                acc.add(0, 0, value, weight)


def supported(spec: ConvSpec, lanes: int) -> bool:
    """Whether a convolution, that would be supported if its sizes were known, is so when they are not."""
    depthwise = spec.in_channels == spec.out_channels == spec.groups
    return spec.data == "float32" and (depthwise or not spec.in_vectors(lanes))


def emit(emission: Emission, tile: ConvTile, caches: Caches) -> None:
    sizes = emission.sizes
    assert sizes is not None
    if tile.algorithm == "depthwise":
        FreeDepthwise(emission, sizes, tile, caches).emit()
    else:
        FreeDirect(emission, sizes, tile, caches).emit()
