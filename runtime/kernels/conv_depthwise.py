"""Depthwise convolution: a vector holds the channels of one pixel, so every multiply-add is of whole vectors.

    for each task (n, channel block, rows)              over threads
      for row, for tile of output pixels in it
        for kernel row, for channel i of a group, for input pixel under the tile
          tile[pixel] += x[i] · w[kernel row][i][kernel column]   for each pixel it is a tap of

Groups of several channels that lie in a vector are computed so as well, and groups of several times as many outputs:
x[i] holds in every lane channel i of the lane's group, a shuffle of the pixel's vector; no lane meets another group's
numbers. One vector of inputs belongs to as many vectors of outputs as there are outputs for an input.

A row whose taps are all inside the image in height has its kernel rows written out, with the weights in registers where
they fit; rows at the border run a loop over those inside. Tiles at the left and right border have code of their own.
Weights are packed [channel block][kernel row][i][kernel column][lane]. 8-bit numbers are depthwise ones, and taken
in groups of kernel rows from a copy, or in float32, which is exact here (`dot_for`); what stands for 0 in the padding
is then added tap by tap.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from ...passes.base import Caches
from ..target import InstructionSet
from .conv_spec import ConvSpec, ConvTile, Emission, axis, split_evenly, taps_inside
from .conv_steps import Source, copied_columns, rows_in_groups
from .dots import INTEGERS, Accumulators, Dot, ExactDot, IntegerDot, dot_of, grouped
from .vectors import Expr, Vectors

WRITTEN_OUT = 9  # taps up to which kernel rows are written out
FAR = 7  # most pixels of a tile of an image that is in no near cache: wider ones wait longer for it
WIDE = 56  # pixels of a row from which on copies of 8-bit numbers pay
COPY = 96 << 10  # bytes of a copy of the input of 8-bit numbers, about: in the second cache of any processor


def dot_for(vectors: Vectors, spec: ConvSpec) -> Dot:
    """What takes the elements of x. On Zen 3 float32 took 0.8 to 1.0 of the time of pairs where it is chosen here, and
    1.0 to 1.2 elsewhere: with more taps to a copied element, and in wide images, whose copies have few borders."""
    fours = vectors.isa.dot_int8 in ("quads", "signed-quads")
    few = spec.taps <= WRITTEN_OUT and (spec.strides != (1, 1) or spec.out_size[1] < WIDE)
    if spec.data in INTEGERS and not fours and few:
        return ExactDot(vectors)
    return dot_of(vectors, spec.data)


def pack(weight: np.ndarray, spec: ConvSpec, isa: InstructionSet, tile: ConvTile) -> np.ndarray:
    """(O, I / groups, kernel height, kernel width) weights as the kernel reads them, one axis."""
    dot = dot_for(Vectors(isa), spec)
    lanes, height = dot.vectors.lanes, spec.kernel[0]
    rows = weight.transpose(0, 2, 1, 3).reshape(spec.out_channels, height, -1)
    padded = axis(rows, 0, spec.out_blocks(lanes) * lanes)
    blocked = grouped(padded, 1, dot.group).reshape(-1, lanes, dot.steps(height) * rows.shape[2], dot.group)
    return np.ascontiguousarray(blocked.transpose(0, 2, 1, 3), dtype=dot.dtype).reshape(-1)


def widest(isa: InstructionSet, spec: ConvSpec, caches: Caches, spare: int = 0) -> int:
    """Pixels of the largest tile; beside it live the weights of a kernel row and channel, or of all, and `spare`
    products."""
    beside_all = spec.taps * spec.each <= WRITTEN_OUT and isa.registers >= 32
    weights = spec.taps * spec.each if beside_all else spec.kernel[1]
    far = spec.data == "float32" and 4 * spec.image(Vectors(isa).lanes) > caches.l2
    return max(4, min(FAR if far and beside_all else 14, isa.registers - weights - 2 - spare))


class DepthwiseEmitter:
    """Emits one depthwise convolution into the IR builder that is open."""

    def __init__(self, emission: Emission, tile: ConvTile, caches: Caches) -> None:
        self.e, self.dot, self.lanes = emission, dot_for(emission.vectors, emission.spec), emission.lanes
        self.spec = rows_in_groups(emission.spec, self.dot.group) if self.copies else emission.spec
        self.steps = self.spec.each * self.spec.kernel[1]  # weights of a kernel row
        self.multiple, self.part = self.spec.out_channels // self.spec.in_channels, 0
        self.in_height: int | Expr = self.spec.in_size[0]
        self.in_width: int | Expr = self.spec.in_size[1]
        columns = self.spec.out_size[1]
        most = tile.width or widest(emission.vectors.isa, self.spec, caches, self.dot.spare)
        widths = split_evenly(columns, -(-columns // most))
        starts = itertools.accumulate(widths, initial=0)
        self.tiles: list[tuple[int, int, int]] = []  # (start, width, count) of equal neighbours
        for start, width in zip(starts, widths, strict=False):
            if self.tiles and self.tiles[-1][1] == width and self.inner(start, width):
                first, _, count = self.tiles[-1]
                if self.inner(first, width):
                    self.tiles[-1] = (first, width, count + 1)
                    continue
            self.tiles.append((start, width, 1))
        # Output rows [low, high) whose taps are all inside the image in height.
        size = self.spec.out_size[0]
        ranges = [
            taps_inside(0, size, self.spec.strides[0], kh * self.spec.dilations[0] - self.spec.pads[0],
                        self.spec.in_size[0])
            for kh in range(self.spec.kernel[0])
        ]  # fmt: skip
        self.low = max(low for low, _ in ranges)
        self.high = max(self.low, min(high for _, high in ranges))

    @property
    def copies(self) -> bool:
        return isinstance(self.dot, IntegerDot)

    def columns(self, start: int, width: int, kw: int) -> tuple[int, int]:
        """The tile's pixels whose tap `kw` is inside."""
        spec = self.spec
        return taps_inside(start, width, spec.strides[1], kw * spec.dilations[1] - spec.pads[1], spec.in_size[1])

    def inner(self, start: int, width: int) -> bool:
        return all(self.columns(start, width, kw) == (0, width) for kw in range(self.spec.kernel[1]))

    def emit(self) -> None:
        e, spec = self.e, self.spec
        blocks, height = spec.in_blocks(self.lanes), spec.out_size[0]
        batch = e.batch()
        row_blocks = self.row_blocks(blocks * (spec.batch or 1))
        each = -(-height // row_blocks)
        row_blocks = -(-height // each)
        with e.tasks(batch, blocks * row_blocks) as task:
            plane = task if row_blocks == 1 else T.Bind(task // e.const(row_blocks))
            first: Expr = e.const(0)
            rows: int | Expr = each
            if row_blocks > 1:
                first = T.Bind(task % e.const(row_blocks) * e.const(each))
                rows = T.Bind(T.min(e.const(each), e.const(height) - first)) if height % each else each
            n = T.Bind(plane // e.const(blocks)) if spec.batch != 1 else e.const(0)
            block = T.Bind(plane % e.const(blocks)) if spec.batch != 1 else plane
            image = T.Bind(plane * e.const(math.prod(e.spec.in_size) * self.lanes))
            if self.multiple == 1:
                self.block(n, block, image, first, rows, each)
                return
            for part in range(self.multiple):
                self.part = part
                out = T.Bind(block * e.const(self.multiple) + e.const(part))
                if spec.out_blocks(self.lanes) == blocks * self.multiple:
                    self.block(n, out, image, first, rows, each)
                else:  # the last vector of inputs is not full
                    with T.If(out < e.const(spec.out_blocks(self.lanes))), T.Then():
                        self.block(n, out, image, first, rows, each)

    def block(self, n: Expr, block: Expr, image: Expr, first: Expr, rows: int | Expr, most: int) -> None:
        """Rows of one vector of outputs, the one number `part` of those that read their inputs; at most `most`."""
        e, steps = self.e, self.spec.taps * self.spec.each
        weights = T.Bind(block * e.const(steps * self.dot.width))
        held = self.weights(weights, steps) if steps <= WRITTEN_OUT else None
        for source, start, count in self.sources(image, first, rows, most):
            with e.serial(count) as i:
                self.row(n, block, source, weights, held, T.Bind(start + i))

    def sources(
        self, image: Expr, first: Expr, rows: int | Expr, most: int
    ) -> Iterator[tuple[Source, Expr, int | Expr]]:
        """(input, first row, rows) of each part of a task's rows, inside the loop over them."""
        e, spec = self.e, self.spec
        if not isinstance(self.dot, IntegerDot):
            yield Source(e.x, image, e.const(0), math.prod(spec.in_size), spec.in_size[1], self.lanes, 1), first, rows
            return
        held = max(1, COPY // (4 * self.lanes * spec.in_size[1]))  # rows of the copy
        part = min(most, max(1, (held - (spec.kernel[0] - 1) * spec.dilations[0] - 1) // spec.strides[0] + 1))
        part = -(-most // -(-most // part))
        parts = -(-most // part)
        with e.serial(parts) as number:
            start = T.Bind(first + number * e.const(part))
            count: int | Expr = part
            if not isinstance(rows, int) or most % part:
                left = (e.const(rows) if isinstance(rows, int) else rows) - number * e.const(part)
                count = T.Bind(T.max(e.const(0), T.min(e.const(part), left)))
            yield copied_columns(e, self.dot, spec, image, start, count, part), start, count

    def row_blocks(self, planes: int) -> int:
        """Into how many parts the rows are cut so that threads have even shares."""
        threads = self.e.threads
        if threads == 1 or planes % threads == 0 or planes >= 8 * threads:
            return 1
        return min(self.spec.out_size[0], threads)

    def weights(self, at: Expr, count: int) -> list[Expr]:
        return [self.dot.weights(self.e.w, at + k * self.dot.width) for k in range(count)]

    def row(self, n: Expr, block: Expr, source: Source, weights: Expr, held: list[Expr] | None, row: Expr) -> None:
        """One output row."""
        whole = self.low == 0 and self.high == self.spec.out_size[0]
        if held is None or self.low == self.high:
            self.border_row(n, block, source, weights, row)
        elif whole:
            self.inner_row(n, block, source, held, row)
        else:
            e = self.e
            inside = T.bitwise_and(row >= e.const(self.low), row < e.const(self.high))
            with T.If(inside):
                with T.Then():
                    self.inner_row(n, block, source, held, row)
                with T.Else():
                    self.border_row(n, block, source, weights, row)

    def row_tiles(self) -> Iterator[tuple[Expr, int, int]]:
        """(first column, its value in the first such tile, width) of each tile of a row, inside the loop over tiles."""
        e = self.e
        for start, width, count in self.tiles:
            with e.serial(count) as t:
                yield T.Bind(e.const(start) + t * e.const(width)), start, width

    def inner_row(self, n: Expr, block: Expr, source: Source, held: list[Expr], row: Expr) -> None:
        e, spec = self.e, self.spec
        top = T.Bind((row - source.row) * e.const(spec.strides[0]) - e.const(spec.pads[0]))
        for column, start, width in self.row_tiles():
            acc = self.tile(width, block)
            at = self.pixel(source, top, column)
            for kh in range(spec.kernel[0]):
                line = at + kh * spec.dilations[0] * self.in_width * self.lanes
                self.kernel_row(acc, start, width, source, line, held[kh * self.steps : (kh + 1) * self.steps])
            self.finish(acc, width, n, block, row, column)

    def border_row(self, n: Expr, block: Expr, source: Source, weights: Expr, row: Expr) -> None:
        e, spec = self.e, self.spec
        top = T.Bind((row - source.row) * e.const(spec.strides[0]) - e.const(spec.pads[0]))

        def below(limit: int | Expr) -> Expr:
            """Kernel rows that read an input row below `limit`."""
            rows = T.max(e.const(0), e.whole(limit) - top)
            rows = (rows + e.const(spec.dilations[0] - 1)) // e.const(spec.dilations[0])
            return T.Bind(T.min(e.const(spec.kernel[0]), rows))

        low = below(0)
        count = T.Bind(below(self.in_height) - low)
        for column, start, width in self.row_tiles():
            acc = self.tile(width, block)
            with T.serial(count) as k:
                kh = T.Bind(low + k)
                at = self.pixel(source, T.Bind(top + kh * e.const(spec.dilations[0])), column)
                self.kernel_row(acc, start, width, source, at, self.row_weights(weights, kh))
            if self.pads_count:
                with T.serial(T.Bind(e.const(spec.kernel[0]) - count)) as k:
                    kh = T.Bind(T.Select(k < low, k, k + count))
                    self.pad(acc, self.row_weights(weights, kh), itertools.product(range(width), range(self.steps)))
            self.finish(acc, width, n, block, row, column)

    def row_weights(self, weights: Expr, kh: Expr) -> list[Expr]:
        return self.weights(T.Bind(weights + kh * self.e.const(self.steps * self.dot.width)), self.steps)

    @property
    def pads_count(self) -> bool:
        """Whether taps in the padding add something to a sum."""
        return isinstance(self.dot, ExactDot) and self.spec.zero != 0

    def pad(self, acc: Accumulators, row: list[Expr], taps: Iterable[tuple[int, int]]) -> None:
        """Add the products of a kernel row with what stands for 0, for (pixel, kernel column) of each of `taps`."""
        zero = self.e.vectors.splat(float(self.spec.zero))
        for j, kw in taps:
            acc.add(0, j, zero, row[kw])

    def pixel(self, source: Source, h: Expr, column: Expr) -> Expr:
        """Offset of the leftmost tap of the output pixel in `column`, in input row `h`."""
        e, spec = self.e, self.spec
        w = column * e.const(spec.strides[1]) - e.const(spec.pads[1])
        return T.Bind(source.first + (h * e.whole(self.in_width) + w) * e.const(self.lanes))

    def tile(self, width: int, block: Expr) -> Accumulators:
        acc = Accumulators(self.dot, 1, width)
        first = self.dot.zeros() if isinstance(self.dot, ExactDot) else self.e.first_sums(block)
        for j in range(width):
            acc.set(0, j, first)
        return acc

    def kernel_row(
        self, acc: Accumulators, start: int, width: int, source: Source, at: Expr, row: list[Expr]
    ) -> None:
        """Add the products of one kernel row: each input pixel is read once for a channel of its group."""
        spec, each = self.spec, self.spec.each
        outputs = each * self.multiple  # of a group
        uses: dict[int, list[tuple[int, int]]] = {}  # input column -> (output pixel, kernel column)
        for kw in range(spec.kernel[1]):
            for j in range(*self.columns(start, width, kw)):
                uses.setdefault(j * spec.strides[1] + kw * spec.dilations[1], []).append((j, kw))
        if self.pads_count:
            inside = {use for column in uses.values() for use in column}
            self.pad(acc, row, sorted({*itertools.product(range(width), range(self.steps))} - inside))
        for i, column in itertools.product(range(each), sorted(uses)):
            value = self.dot.each(source.buffer, at + column * self.lanes)
            if outputs > 1:
                lanes = range(self.part * self.lanes, (self.part + 1) * self.lanes)
                order = [tirx.const(lane // outputs * each + i, "int32") for lane in lanes]
                value = T.Bind(tirx.Shuffle([value], order))
            for j, kw in uses[column]:
                acc.add(0, j, value, row[i * spec.kernel[1] + kw])

    def finish(self, acc: Accumulators, width: int, n: Expr, block: Expr, row: Expr, column: Expr) -> None:
        first = self.e.first_sums(block)
        for j in range(width):
            sums = acc.get(0, j)
            if isinstance(self.dot, ExactDot):
                sums = T.Bind(self.dot.whole(sums) + first)
            self.e.finish(sums, (n, block, row, column + j))


def emit(emission: Emission, tile: ConvTile, caches: Caches) -> None:
    DepthwiseEmitter(emission, tile, caches).emit()
