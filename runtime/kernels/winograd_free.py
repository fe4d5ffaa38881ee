"""Winograd's F(2x2, 3x3), as in `winograd`, on images whose height and width are known only at run time.

Tiles are counted row by row through the image, and a task takes a run of them, whatever rows they are in: as many as
half of the second cache has room for, which is known, so that buffers and loops are the same for every size. Where each
tile lies, and whether all its pixels are inside the image, is noted first. A tile at the border is copied, with zeros
for what lies outside.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from tvm import tirx
from tvm.tirx.script import builder as T

from ...passes.base import Caches
from . import winograd
from .conv_direct import widest
from .conv_free import AHEAD, LEAST, SHARES, shares
from .conv_spec import ConvTile, Emission, Sizes
from .dots import Accumulators
from .vectors import Buffer, Expr
from .winograd import POSITIONS

SIDE = 4  # pixels of a tile along a row or a column
PIXELS = range(SIDE)


class FreeWinograd(winograd.WinogradEmitter):
    """tiles: of a run, at most. each: panels of a task, of `panel_blocks` beside each other. high, wide: rows and
    columns of tiles in the image."""

    def __init__(self, emission: Emission, sizes: Sizes, tile: ConvTile, caches: Caches) -> None:
        self.e, self.spec, self.lanes, self.sizes = emission, emission.spec, emission.lanes, sizes
        e, const, opaque = emission, emission.const, emission.vectors.opaque
        self.vectors = winograd.vectors_of(self.spec, e.vectors.isa, tile)
        self.in_blocks, self.out_blocks = self.spec.in_blocks(self.lanes), self.spec.out_blocks(self.lanes)
        self.panels = -(-self.out_blocks // self.vectors)
        width = widest(e.vectors.isa, self.vectors)
        self.widths = list(dict.fromkeys((width, (width + 1) // 2)))
        self.tiles = max(1, caches.l2 // 2 // (4 * POSITIONS * self.in_blocks * self.lanes) // width) * width
        self.turns = min(AHEAD, self.tiles // width)
        self.set_strides()
        weights = 4 * POSITIONS * self.spec.in_channels * self.out_blocks * self.lanes / caches.l2
        blocks = max(1, min(self.panels, e.threads * (0 if weights < 1 / 2 else 1 if weights < 4 else SHARES)))
        self.each = -(-self.panels // blocks)  # panels of a task
        self.panel_blocks = -(-self.panels // self.each)
        two = const(2)
        self.wide = opaque(tirx.truncdiv(sizes.columns + const(1), two))
        self.high = opaque(tirx.truncdiv(sizes.rows + const(1), two))

    def emit(self) -> None:
        e, const, opaque = self.e, self.e.const, self.e.vectors.opaque
        batch, total = e.batch(), T.Bind(self.high * self.wide)
        each, parts = self.runs(total, (batch if isinstance(batch, int) else 1) * self.panel_blocks)
        with e.tasks(batch, T.Bind(parts * const(self.panel_blocks))) as task:
            rest, panel_block = e.divide(task, self.panel_blocks)
            begin = T.Bind(opaque(tirx.truncmod(rest, parts)) * each)
            n = opaque(tirx.truncdiv(rest, parts))
            count = opaque(T.min(each, total - begin))
            pieces = T.alloc_buffer((POSITIONS * self.piece,), "float32", scope="global")
            products = T.alloc_buffer((POSITIONS * self.product,), "float32", scope="global")
            rows, columns = (T.alloc_buffer((self.tiles,), e.index, scope="global") for _ in range(2))
            with T.serial(count) as t:
                T.buffer_store(rows, tirx.truncdiv(begin + t, self.wide), [t])
                T.buffer_store(columns, tirx.truncmod(begin + t, self.wide), [t])
            self.transform(n, rows, columns, count, pieces)
            first = T.Bind(panel_block * const(self.each))
            panels: int | Expr = self.each
            if self.panels % self.each:
                panels = T.Bind(T.min(const(self.each), const(self.panels) - first))
            with e.serial(panels) as i:
                panel = T.Bind(first + i)
                self.multiply(panel, pieces, products, self.tiles_of_run(count))
                self.results(n, panel, rows, columns, count, products)

    def runs(self, total: Expr, tasks: int) -> tuple[Expr, Expr]:
        """(tiles of one run, runs) of an image of `total`. tasks: that there are beside."""
        const, opaque, width = self.e.const, self.e.vectors.opaque, self.widths[0]
        work = POSITIONS * self.spec.in_channels * self.each * self.vectors * self.lanes
        least = max(width, LEAST // work)
        few = T.max(const(1), T.min(const(shares(self.e.threads, tasks)), tirx.truncdiv(total, const(least))))
        count = opaque(T.max(few, tirx.truncdiv(total + const(self.tiles - 1), const(self.tiles))))
        share = tirx.truncdiv(total + count - const(1), count)
        # Whole register tiles, of which a run may then take more than its share.
        each = opaque(T.max(const(1), tirx.truncdiv(share + const(width - 1), const(width))) * const(width))
        return each, opaque(tirx.truncdiv(total + each - const(1), each))

    def transform(self, n: Expr, rows: Buffer, columns: Buffer, count: Expr, pieces: Buffer) -> None:
        """BᵀdB of every tile of a run."""
        e, spec, const, v = self.e, self.spec, self.e.const, self.e.vectors
        height, width = self.sizes.height, self.sizes.width
        pixels = T.Bind(height * width * const(self.lanes))
        with e.serial(self.in_blocks) as block:
            plane = T.Bind((n * const(self.in_blocks) + block) * pixels)
            with T.serial(count) as t:
                top = T.Bind(rows[t] * const(2) - const(spec.pads[0]))
                left = T.Bind(columns[t] * const(2) - const(spec.pads[1]))
                into = T.Bind((block * const(self.tiles) + t) * const(self.lanes))

                def at(i: int, j: int, plane: Expr = plane, top: Expr = top, left: Expr = left) -> Expr:
                    return plane + ((top + const(i)) * width + left + const(j)) * const(self.lanes)

                inside = tirx.all(
                    top >= const(0), left >= const(0), top + const(SIDE) <= height, left + const(SIDE) <= width
                )
                with T.If(inside):
                    with T.Then():
                        d = [[T.Bind(v.load(e.x, at(i, j))) for j in PIXELS] for i in PIXELS]
                        self.store_pieces(d, into, pieces)
                    with T.Else():
                        held = Accumulators(e.dot, SIDE, SIDE)
                        for i, j in itertools.product(PIXELS, PIXELS):
                            held.set(i, j, v.splat(0.0))
                            h, w = top + const(i), left + const(j)
                            there = tirx.all(h >= const(0), h < height, w >= const(0), w < width)
                            with T.If(there), T.Then():
                                held.set(i, j, v.load(e.x, at(i, j)))
                        self.store_pieces([[T.Bind(held.get(i, j)) for j in PIXELS] for i in PIXELS], into, pieces)

    def store_pieces(self, d: list[list[Expr]], into: Expr, pieces: Buffer) -> None:
        for position, value in enumerate(winograd.input_transform(d)):
            self.e.vectors.store(pieces, into + self.e.const(position * self.piece), value)

    def tiles_of_run(self, count: Expr) -> Iterator[tuple[Expr, int, Expr]]:
        """The register tiles of so many tiles, for `multiply`."""
        yield from self._tiles(count, self.widths)

    def _tiles(self, count: Expr, widths: list[int]) -> Iterator[tuple[Expr, int, Expr]]:
        """As many as possible of the first width, the last of which ends where the run does; or of the next one, where
        that computes fewer tiles twice."""
        const, opaque = self.e.const, self.e.vectors.opaque
        if not widths:
            with T.serial(count) as t:
                yield t, 1, t
            return
        width, *narrower = widths

        def turns(width: int) -> Expr:
            return tirx.truncdiv(count + const(width - 1), const(width))

        fits = count >= const(width)
        if narrower:
            fits = tirx.all(fits, turns(width) * const(width) <= turns(narrower[0]) * const(narrower[0]))
        with T.If(fits):
            with T.Then(), T.serial(opaque(turns(width))) as turn:
                yield opaque(T.min(turn * const(width), count - const(width))), width, turn
            with T.Else():
                yield from self._tiles(count, narrower)

    def results(
        self, n: Expr, panel: Expr, rows: Buffer, columns: Buffer, count: Expr, products: Buffer
    ) -> None:
        """AᵀmA of every tile of a run; the last row and column of the image may be one pixel of two."""
        e, const, v = self.e, self.e.const, self.e.vectors
        block = T.Bind(panel * const(self.vectors))
        with T.serial(count) as t:
            row, column = T.Bind(rows[t] * const(2)), T.Bind(columns[t] * const(2))

            def tile(each: int, t: Expr = t, row: Expr = row, column: Expr = column) -> None:
                at = T.Bind((t * const(self.vectors) + const(each)) * const(self.lanes))
                m = [
                    [v.load(products, at + const((SIDE * i + j) * self.product)) for j in range(SIDE)]
                    for i in range(SIDE)
                ]
                values = winograd.output_transform(m)
                for i, j in itertools.product(range(2), range(2)):
                    inside = [
                        place + const(1) < size
                        for place, size, more in ((row, self.sizes.rows, i), (column, self.sizes.columns, j))
                        if more
                    ]
                    place = (n, block + const(each), row + const(i), column + const(j))
                    if not inside:
                        e.finish(values[i][j], place)
                        continue
                    with T.If(tirx.all(*inside) if len(inside) > 1 else inside[0]), T.Then():
                        e.finish(values[i][j], place)

            for each in range(self.vectors):
                if self.panels * self.vectors == self.out_blocks or each == 0:
                    tile(each)
                else:
                    with T.If(block + const(each) < const(self.out_blocks)), T.Then():
                        tile(each)


def emit(emission: Emission, tile: ConvTile, caches: Caches) -> None:
    assert emission.sizes is not None
    FreeWinograd(emission, emission.sizes, tile, caches).emit()
