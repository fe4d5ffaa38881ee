"""Direct convolution: a tile of output pixels x channel vectors stays in registers while all taps are added to it.

    for each task (n, group, rows, panels)              over threads
      for panel of 1..4 output channel vectors
        for row, for tile of output pixels in it
          for input block, kernel row, kernel column, input channel
            tile[pixel][vector] += x[pixel's tap, channel] · w[panel, channel][vector]

No padded copy of the input is made: kernel rows outside are left out of the loop over them, and a tile at a border
has code of its own, in which a pixel's taps outside do not occur. A 1x1 convolution of stride 1 has its pixels in one
row, which is cut where tiles fit.

Weights are packed [panel][input block][kernel row][kernel column][input channel][vector][lane]. All channels of a plain
input are one block.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from tvm.tirx.script import builder as T

from ...passes.base import Caches
from ..target import InstructionSet
from .conv_spec import ConvSpec, ConvTile, Emission, axis, split_evenly, taps_inside
from .conv_steps import Source, copied
from .dots import BITS, Accumulators, Dot, IntegerDot, SteppedDot, dot_of, grouped
from .gemm_spec import loads_cost
from .vectors import Expr, Vectors

UNROLL = 4  # input channels of one turn of the innermost loop
BY_RULE = ConvTile("direct")
SHARED = 16  # tiles that read the same weights from which on these are brought into the first cache


@dataclass(frozen=True)
class Taps:
    """Kernel columns [first, first + count) that read inside the image for pixels [low, high) of a tile."""

    first: int | Expr
    count: int | Expr
    low: int
    high: int


@dataclass(frozen=True)
class Tiles:
    """`count` neighbouring tiles of `width` output pixels from column `start`, all with the same taps."""

    start: int
    width: int
    count: int
    taps: tuple[Taps, ...]


@dataclass(frozen=True)
class Tiling:
    """vectors: output vectors of a panel. panels: of one group; the last has `last` vectors. rows x columns: the output
    pixels as tiles see them. cycles: of one image on one thread by a plain model."""

    vectors: int
    panels: int
    last: int
    rows: int
    columns: int
    tiles: tuple[Tiles, ...]
    cycles: float


def flat(spec: ConvSpec) -> bool:
    """Whether an output pixel is the input pixel of the same number."""
    return spec.kernel == spec.strides == (1, 1) and spec.pads == (0, 0) and spec.in_size == spec.out_size


def widest(isa: InstructionSet, vectors: int, spare: int = 0) -> int:
    """Pixels of the largest tile of so many vectors: beside it live the weights, a value of x and `spare` products."""
    others = vectors + 1 + (spare if isa.fma else 1)
    return max(1, min(28, (isa.registers - others) // vectors))


@functools.cache
def tiling(spec: ConvSpec, isa: InstructionSet, tile: ConvTile = BY_RULE) -> Tiling:
    """The one with the fewest cycles of those that a tile leaves open."""
    return tilings(spec, isa, tile)[0]


def tilings(spec: ConvSpec, isa: InstructionSet, tile: ConvTile = BY_RULE) -> list[Tiling]:
    """Tilings that a tile leaves open, that with the fewest cycles first, by a plain model of two multiply-adds and two
    loads a cycle."""
    recut = flat(spec) and not spec.free
    dot, spec = dot_of(Vectors(isa), spec.data, spec.stored, spec.joined), spec.seen
    lanes = dot.vectors.lanes
    blocks = spec.out_blocks(lanes) // spec.groups
    steps = spec.taps * dot.steps(spec.in_channels // spec.groups)
    pixels = math.prod(spec.out_size)
    shapes = [(pixels // w, w) for w in range(1, pixels + 1) if pixels % w == 0] if recut else [spec.out_size]
    found: list[tuple[float, Tiling]] = []
    for vectors, (rows, columns) in itertools.product(range(1, min(4, blocks) + 1), shapes):
        if tile.vectors not in (None, vectors) or tile.columns not in (None, columns):
            continue
        most = tile.width or widest(isa, vectors, dot.spare)
        if recut and columns > widest(isa, vectors, dot.spare) and columns != spec.out_size[1]:
            continue
        panels = -(-blocks // vectors)
        last = blocks - (panels - 1) * vectors
        widths = split_evenly(columns, -(-columns // most))
        cost = 0.0
        for v, count in ((vectors, panels - 1), (last, 1)):
            each = sum(_cycles(width, v, dot, steps) for width in widths)
            cost += count * each * rows
        # A shorter last panel and a second width are code of their own.
        cost *= 1 + 0.01 * (last != vectors) + 0.01 * (len(set(widths)) - 1)
        tiles = tuple(_tiles(spec, widths))
        found.append((cost, Tiling(vectors, panels, last, rows, columns, tiles, cost * spec.groups)))
    return [each for _, each in sorted(found, key=lambda pair: pair[0])]


def step_cycles(width: int, vectors: int, joined: int = 0) -> float:
    """Of one input channel of a tile: two multiply-adds and two loads a cycle; each sum waits four for its last, and
    where nothing but eight sums hides that, any other delay costs time.

    joined: of a step of bytes, by what was measured on Zen 3: a pixel costs a third of a vector beside its products.
    """
    if joined:
        return max(width * (vectors + 0.3) * (1 + 1 / joined) / 2, 4.0)
    return max(width * vectors / 2, (width + vectors) / 2, 4.5) * loads_cost(width, vectors)


def _cycles(width: int, vectors: int, dot: Dot, steps: int) -> float:
    """Of one tile. Weights that do not stay in the first cache come at 32 bytes a cycle."""
    weights = vectors * dot.width * dot.itemsize
    streamed = weights / 32 if steps * weights > 24 << 10 else 0.0
    joined = dot.joined if isinstance(dot, IntegerDot) and dot.kind == "bytes" else 0
    return steps * max(step_cycles(width, vectors, joined), streamed) + 2 * width * vectors + 20


def _tiles(spec: ConvSpec, widths: list[int]) -> Iterator[Tiles]:
    """Tiles of a row from left to right, equal neighbours together."""
    starts = itertools.accumulate(widths, initial=0)
    each = [(start, width, _taps(spec, start, width)) for start, width in zip(starts, widths, strict=False)]
    for (width, taps), group in itertools.groupby(each, key=lambda tile: tile[1:]):
        members = list(group)
        yield Tiles(members[0][0], width, len(members), taps)


def _taps(spec: ConvSpec, start: int, width: int) -> tuple[Taps, ...]:
    if flat(spec):
        return (Taps(0, 1, 0, width),)
    ranges = [
        taps_inside(start, width, spec.strides[1], kw * spec.dilations[1] - spec.pads[1], spec.in_size[1])
        for kw in range(spec.kernel[1])
    ]
    result = []
    for (low, high), group in itertools.groupby(range(len(ranges)), key=lambda kw: ranges[kw]):
        columns = list(group)
        if low < high:
            result.append(Taps(columns[0], len(columns), low, high))
    return tuple(result)


def pack(weight: np.ndarray, spec: ConvSpec, isa: InstructionSet, tile: ConvTile) -> np.ndarray:
    """OIHW weights as the kernel reads them, one axis; of float16 and bfloat16, of which those of BITS come as bits,
    uint16."""
    dot, plan = dot_of(Vectors(isa), spec.data, spec.stored, spec.joined), tiling(spec, isa, tile)
    lanes = dot.vectors.lanes
    out_each, in_each = spec.out_channels // spec.groups, spec.in_channels // spec.groups
    in_padded = -(-in_each // lanes) * lanes if spec.blocked_input else in_each
    out_padded = -(-out_each // lanes) * lanes
    parts = weight.reshape(spec.groups, out_each, in_each, *spec.kernel)
    parts = axis(axis(parts, 1, out_padded), 2, in_padded)
    pieces = []
    for group in parts:
        for panel in range(plan.panels):
            vectors = plan.last if panel == plan.panels - 1 else plan.vectors
            first = panel * plan.vectors * lanes
            part = group[first : first + vectors * lanes]
            depth = lanes if spec.blocked_input else in_each
            part = grouped(part.reshape(vectors * lanes, -1, depth, *spec.kernel), 2, dot.group)
            pieces.append(part.transpose(1, 3, 4, 2, 0, 5).reshape(-1))
    joined = np.concatenate(pieces)
    packed = np.ascontiguousarray(joined, dtype=None if spec.data == BITS else dot.dtype)
    return packed.view(np.uint16) if packed.dtype.itemsize == 2 else packed


@dataclass(frozen=True)
class Split:
    """How a convolution is cut into tasks: blocks of `rows` rows and of `panels` panels, and the input blocks that are
    added up before the next row is taken."""

    rows: int
    row_blocks: int
    panels: int
    panel_blocks: int
    chunk: int


def splits(
    spec: ConvSpec, plan: Tiling, isa: InstructionSet, caches: Caches, threads: int, tile: ConvTile = BY_RULE
) -> list[Split]:
    """Those that a tile leaves open, of rows whose input stays in half of the second cache: first even shares for
    threads with the least traffic."""
    spec, dot = spec.seen, dot_of(Vectors(isa), spec.data, spec.stored, spec.joined)
    lanes = dot.vectors.lanes
    in_each = spec.in_channels // spec.groups
    row_bytes = 4 * dot.steps(in_each) * math.prod(spec.in_size) / plan.rows
    most = max(1, min(plan.rows, int(caches.l2 / 2 / max(1.0, row_bytes))))
    if plan.panels == 1 and spec.data == "float32":
        most = plan.rows
    weights = dot.itemsize * in_each * spec.taps * lanes * plan.vectors  # bytes of a panel
    outer = (spec.batch or 1) * spec.groups
    ideal = outer * plan.rows * plan.panels / threads
    found: list[tuple[tuple[float, float], int, int]] = []
    for rows in range(1, most + 1):
        row_blocks = -(-plan.rows // rows)
        if -(-plan.rows // row_blocks) != rows or tile.rows not in (None, rows):
            continue
        for panel_blocks in range(1, min(plan.panels, 4 * threads) + 1):
            panels = -(-plan.panels // panel_blocks)
            if tile.panels not in (None, panels):
                continue
            share = -(-outer * row_blocks * panel_blocks // threads) * rows * panels
            traffic = row_blocks * plan.panels * weights + panel_blocks * plan.rows * row_bytes
            found.append(((round(share / ideal * 20), traffic), rows, panels))
    ordered = dict.fromkeys((rows, panels) for _, rows, panels in sorted(found, key=lambda each: each[0]))
    return [_split(spec, plan, lanes, caches, weights, rows, panels) for rows, panels in ordered]


def _split(
    spec: ConvSpec, plan: Tiling, lanes: int, caches: Caches, weights: int, rows: int, panels: int
) -> Split:
    """weights: bytes of those of a panel."""
    in_each = spec.in_channels // spec.groups
    blocks = -(-in_each // lanes) if spec.blocked_input else 1
    chunk = blocks
    uses = rows * sum(tiles.count for tiles in plan.tiles)
    held = caches.l1 * 3 / 4 if uses >= SHARED else caches.l2 / 4
    if weights > held and uses > 1:
        chunk = max(1, int(held / (weights / blocks)))
        chunk = -(-blocks // -(-blocks // chunk))
    return Split(rows, -(-plan.rows // rows), panels, -(-plan.panels // panels), chunk)


class DirectEmitter:
    """Emits one direct convolution into the IR builder that is open."""

    def __init__(self, emission: Emission, tile: ConvTile, caches: Caches) -> None:
        self.e, self.spec, self.lanes, self.dot = emission, emission.spec.seen, emission.lanes, emission.dot
        self.plan = tiling(emission.spec, emission.vectors.isa, tile)
        self.split = splits(emission.spec, self.plan, emission.vectors.isa, caches, emission.threads, tile)[0]
        each = self.spec.in_channels // self.spec.groups
        blocked = self.spec.blocked_input
        depth = self.lanes if blocked else each  # channels of an input block
        self.in_blocks = -(-each // depth)
        # Steps over the channels of a group, and of an input block; those of one turn of the innermost loop.
        self.all_steps, self.steps = self.dot.steps(each), self.dot.steps(depth)
        self.unroll = max(u for u in range(1, UNROLL + 1) if self.steps % u == 0)
        # Weights that one output vector reads from one input block.
        self.block_weights = self.spec.taps * self.steps * self.dot.width

    def emit(self) -> None:
        e, s, groups = self.e, self.split, self.spec.groups
        batch = e.batch()
        with e.tasks(batch, groups * s.row_blocks * s.panel_blocks) as task:
            rest, panel_block = e.divide(task, s.panel_blocks)
            rest, row_block = e.divide(rest, s.row_blocks)
            n, group = e.divide(rest, groups)
            image = T.Bind(n * e.const(e.spec.image(self.lanes)))
            if groups > 1:
                image = T.Bind(image + group * e.const(self.in_blocks * self.lanes * math.prod(e.spec.in_size)))
            first_row = T.Bind(row_block * e.const(s.rows))
            rows: int | Expr = s.rows
            if self.plan.rows % s.rows:
                rows = T.Bind(T.min(e.const(s.rows), e.const(self.plan.rows) - first_row))
            source = self.source(image, first_row, rows)
            out_blocks = (self.plan.panels - 1) * self.plan.vectors + self.plan.last
            first_out = T.Bind(group * e.const(out_blocks))
            for panel, vectors in self.panels(panel_block):
                block = T.Bind(first_out + panel * e.const(self.plan.vectors))
                weights = T.Bind(block * e.const(self.in_blocks * self.block_weights))
                self.panel(n, source, weights, block, vectors, first_row, rows)

    def source(self, image: Expr, first_row: Expr, rows: int | Expr) -> Source:
        """Where a task finds its input: in the image, or copied as a step wants it."""
        e, width = self.e, self.plan.columns if flat(self.spec) else self.spec.in_size[1]
        if isinstance(self.dot, SteppedDot):
            every = self.plan.columns if flat(e.spec) else None
            return copied(e, self.dot, image, self.in_blocks, first_row, rows, self.split.rows, every)
        plane = math.prod(self.spec.in_size)
        if self.spec.blocked_input:
            return Source(e.x, image, e.const(0), plane, width, self.lanes, 1)
        return Source(e.x, image, e.const(0), plane, width, 1, plane)

    def panels(self, panel_block: Expr) -> Iterator[tuple[Expr, int]]:
        """(number, vectors) of each panel of a block, inside the loop over them."""
        e, plan, each = self.e, self.plan, self.split.panels
        full = plan.panels - (plan.last != plan.vectors)
        first = T.Bind(panel_block * e.const(each))
        if full:
            count: int | Expr = each if full % each == 0 and full == plan.panels else 0
            if not count:
                count = T.Bind(T.max(e.const(0), T.min(e.const(each), e.const(full) - first)))
            with e.serial(count) as i:
                yield first + i, plan.vectors
        if full < plan.panels:
            if self.split.panel_blocks == 1:
                yield e.const(full), plan.last
            else:
                with T.If(panel_block == e.const(self.split.panel_blocks - 1)), T.Then():
                    yield e.const(full), plan.last

    def panel(
        self, n: Expr, source: Source, weights: Expr, block: Expr, vectors: int, first_row: Expr, rows: int | Expr
    ) -> None:
        """All rows of a task for one panel; in chunks of input blocks where its weights do not stay in a cache."""
        e, chunk, blocks = self.e, self.split.chunk, self.in_blocks

        def finish(row: Expr, column: Expr, vector: int, value: Expr) -> None:
            e.finish(value, (n, block + vector, *self.place(row, column)))

        first_sums = [e.first_sums(block + v) for v in range(vectors)]
        if chunk >= blocks:
            with e.serial(rows) as i:
                row = T.Bind(first_row + i)
                for column, tile, turn in self.row_tiles(i):
                    acc = Accumulators(e.dot, tile.width, vectors)
                    for j, v in itertools.product(range(tile.width), range(vectors)):
                        acc.set(j, v, first_sums[v])
                    self.reduce(acc, tile, vectors, source, weights, row, column, e.const(0), blocks, turn)
                    for j, v in itertools.product(range(tile.width), range(vectors)):
                        finish(row, column + j, v, acc.get(j, v))
            return
        size = self.split.rows * self.plan.columns * vectors * self.lanes
        sums = T.alloc_buffer((size,), self.dot.sums, scope="global")
        each = vectors * self.lanes

        def at(i: Expr, column: Expr, vector: int) -> Expr:
            return (i * e.const(self.plan.columns) + column) * e.const(each) + vector * self.lanes

        with e.serial(rows) as i, T.serial(e.const(self.plan.columns)) as column:
            for v in range(vectors):
                e.vectors.store(sums, at(i, column, v), first_sums[v])
        with T.serial(e.const(-(-blocks // chunk))) as c:
            first = T.Bind(c * e.const(chunk))
            count: int | Expr = chunk
            if blocks % chunk:
                count = T.Bind(T.min(e.const(chunk), e.const(blocks) - first))
            with e.serial(rows) as i:
                row = T.Bind(first_row + i)
                for column, tile, turn in self.row_tiles(i):
                    acc = Accumulators(e.dot, tile.width, vectors)
                    start = T.Bind(at(i, column, 0))
                    for j, v in itertools.product(range(tile.width), range(vectors)):
                        acc.set(j, v, sums[e.vectors.at(start + j * each + v * self.lanes)])
                    self.reduce(acc, tile, vectors, source, weights, row, column, first, count, turn)
                    for j, v in itertools.product(range(tile.width), range(vectors)):
                        e.vectors.store(sums, start + j * each + v * self.lanes, acc.get(j, v))
        with e.serial(rows) as i, T.serial(e.const(self.plan.columns)) as column:
            for v in range(vectors):
                finish(T.Bind(first_row + i), column, v, e.vectors.load(sums, at(i, column, v)))

    def place(self, row: Expr, column: Expr) -> tuple[Expr, Expr]:
        """(h, w) of a pixel."""
        if (self.plan.rows, self.plan.columns) == self.spec.out_size:
            return row, column
        pixel, width = row * self.e.const(self.plan.columns) + column, self.e.const(self.spec.out_size[1])
        return pixel // width, pixel % width

    def row_tiles(self, row: Expr) -> Iterator[tuple[Expr, Tiles, Expr]]:
        """(first column, tile, its number among those of a task) of a row of a task, inside the loop over tiles."""
        e, before = self.e, 0
        for tiles in self.plan.tiles:
            with e.serial(tiles.count) as t:
                turn = row * e.const(sum(each.count for each in self.plan.tiles)) + e.const(before) + t
                yield T.Bind(e.const(tiles.start) + t * e.const(tiles.width)), tiles, turn
            before += tiles.count

    @contextmanager
    def kernel_rows(self, row: Expr) -> Iterator[tuple[Expr, Expr]]:
        """The loop over kernel rows inside the image: (kernel row, input row)."""
        spec, e = self.spec, self.e
        height, (stride, dilation, pad) = spec.in_size[0], (spec.strides[0], spec.dilations[0], spec.pads[0])
        if flat(spec):
            yield e.const(0), row
            return
        firsts = [o * stride - pad for o in range(spec.out_size[0])]
        reach = (spec.kernel[0] - 1) * dilation
        top = T.Bind(row * e.const(stride) - e.const(pad))
        if min(firsts) >= 0 and max(firsts) + reach < height:
            with e.serial(spec.kernel[0]) as kh:
                yield kh, T.Bind(top + kh * e.const(dilation))
            return

        def below(limit: Expr) -> Expr:
            """Kernel rows that read a row below `limit`."""
            rows = T.max(e.const(0), limit - top)
            if dilation > 1:
                rows = (rows + e.const(dilation - 1)) // e.const(dilation)
            return T.min(e.const(spec.kernel[0]), rows)

        low = T.Bind(below(e.const(0)))
        count = T.Bind(below(e.const(height)) - low)
        with T.serial(count) as k:
            kh = T.Bind(low + k)
            yield kh, T.Bind(top + kh * e.const(dilation))

    def reduce(
        self, acc: Accumulators, tile: Tiles, vectors: int, source: Source, weights: Expr, row: Expr, column: Expr,
        first: Expr, count: int | Expr, turn: Expr,
    ) -> None:  # fmt: skip
        """Add the taps of input blocks [first, first + count) to a tile, the one number `turn` that does."""
        e, spec = self.e, self.spec
        if not tile.taps:
            return
        left = T.Bind(column * e.const(spec.strides[1]) - e.const(spec.pads[1]))
        step = vectors * self.dot.width  # weights of a step
        tap = self.steps * step
        begin = T.Bind(weights + first * e.const(self.block_weights * vectors))
        ahead = self.ahead(begin, vectors, step, turn) if spec.blocked_input else None
        with e.serial(count) as i:
            block = T.Bind(first + i)
            x_block = T.Bind(source.first + block * e.whole(source.plane * source.pixel))
            w_block = T.Bind(weights + block * e.const(self.block_weights * vectors))
            with self.kernel_rows(T.Bind(row - source.row)) as (kh, h):
                x_row = T.Bind(x_block + (h * e.whole(source.width) + left) * e.const(source.pixel))
                w_row = T.Bind(w_block + kh * e.const(tap * spec.kernel[1]))
                for taps in tile.taps:
                    with e.serial(taps.count) as k:
                        kw = T.Bind(e.whole(taps.first) + k)
                        x_tap = T.Bind(x_row + kw * e.const(spec.dilations[1] * source.pixel))
                        w_tap = T.Bind(w_row + kw * e.const(tap))
                        with self.channel_steps(block) as q:
                            x_at = T.Bind(x_tap + q * e.whole(self.unroll * source.step))
                            w_at = T.Bind(w_tap + q * e.const(self.unroll * step))
                            if ahead:
                                ahead(w_at)
                            self.turn(acc, taps, vectors, source, x_at, w_at)

    def ahead(self, begin: Expr, vectors: int, step: int, turn: Expr) -> Callable[[Expr], None] | None:
        """What asks for the weights behind those from `begin` on, of which a step reads `step`."""
        total = min(self.split.chunk, self.in_blocks) * self.block_weights * vectors
        turns = self.split.rows * sum(tiles.count for tiles in self.plan.tiles)
        v = self.e.vectors
        return v.ahead(self.e.w, begin, total, self.unroll * step, turn, turns, self.e.const, self.dot.line)

    def channel_steps(self, block: Expr) -> Expr:
        """The loop over a block's channels, `unroll` steps at a time; the last block may have fewer."""
        e, each = self.e, self.steps // self.unroll
        turns = -(-self.all_steps // self.unroll)
        if turns % each == 0:
            return e.serial(each)
        if turns < each:
            return e.serial(turns)
        return T.serial(T.Bind(T.min(e.const(each), e.const(turns) - block * e.const(each))))

    def turn(self, acc: Accumulators, taps: Taps, vectors: int, source: Source, x_at: Expr, w_at: Expr) -> None:
        """`unroll` steps over the channels of one tap."""
        step = vectors * self.dot.width
        if not isinstance(self.dot, IntegerDot) or self.dot.kind != "bytes":
            for u in range(self.unroll):
                self.step(acc, taps, vectors, source, x_at + u * source.step, w_at + u * step)
            return
        each = self.spec.strides[1] * source.pixel
        together = min(self.dot.joined, self.unroll) if source.step == 1 else 1
        for u in range(0, self.unroll, together):
            count = min(together, self.unroll - u)
            for j in range(taps.low, taps.high):
                at = x_at + (u * source.step + j * each)
                acc.add_bytes(j, source.buffer, at, self.e.w, w_at + u * step, step, count, range(vectors))

    def step(self, acc: Accumulators, taps: Taps, vectors: int, source: Source, x_at: Expr, w_at: Expr) -> None:
        """tile[pixel][vector] += x[pixel] · w[vector] for one step over the channels of one tap."""
        e, each = self.e, self.spec.strides[1] * source.pixel
        row = [self.dot.weights(e.w, w_at + v * self.dot.width) for v in range(vectors)]
        for j in range(taps.low, taps.high):
            value = self.dot.same(source.buffer, x_at + j * each)
            for v in range(vectors):
                acc.add(j, v, value, row[v])


def emit(emission: Emission, tile: ConvTile, caches: Caches) -> None:
    DirectEmitter(emission, tile, caches).emit()
