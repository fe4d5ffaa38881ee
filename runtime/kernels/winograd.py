"""Convolution 3x3 of stride 1 as Winograd's F(2x2, 3x3): 16 multiplications for 4 outputs instead of 36.

    for each task (n, rows of tiles, panels)            over threads
      every 4x4 piece d of the input becomes BᵀdB       -> pieces[position][input block][tile][lane]
      for panel of 1..4 output channel vectors
        for each of the 16 positions: products[position] = pieces[position] · w[panel][position]
        every 4x4 piece m of the products becomes the 2x2 outputs AᵀmA, which are finished

A task's pieces stay in half of the second cache. Tasks that share rows and differ in panels each transform the rows
again, which is little work beside the products. Weights become GgGᵀ in float64 when they are packed, as
[panel][position][input channel][vector][lane].
Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from tvm.tirx.script import builder as T

from ...passes.base import Caches
from ..target import InstructionSet
from .conv_direct import UNROLL, step_cycles, widest
from .conv_spec import ConvSpec, ConvTile, Emission, axis, split_evenly
from .dots import Accumulators
from .vectors import Buffer, Expr, Vectors

BY_RULE = ConvTile("winograd")
POSITIONS = 16
# G of F(2, 3): the transform of three weights to four.
WEIGHTS = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
# Cycles that the transforms of a tile take for one vector of channels.
INPUT_CYCLES, OUTPUT_CYCLES = 40, 50

Value = Expr


def refusal(spec: ConvSpec) -> str | None:
    """Why F(2x2, 3x3) does not compute this convolution; None where it does."""
    if spec.kernel != (3, 3) or spec.strides != (1, 1) or spec.dilations != (1, 1):
        return "not a 3x3 kernel of stride 1 without dilation"
    if spec.groups != 1:
        return f"{spec.groups} groups"
    return None if spec.blocked_input else "a plain input"


def vectors_of(spec: ConvSpec, isa: InstructionSet, tile: ConvTile) -> int:
    """Output vectors of a panel: by rule the number that leaves the fewest empty in the last one, the larger the
    better."""
    if tile.vectors is not None:
        return tile.vectors
    blocks = spec.out_blocks(Vectors(isa).lanes)
    return min((3, 2, 1) if isa.registers < 32 else (2, 3, 1, 4), key=lambda v: -(-blocks // v) * v)


def pack(weight: np.ndarray, spec: ConvSpec, isa: InstructionSet, tile: ConvTile) -> np.ndarray:
    """OIHW weights transformed and packed, one axis."""
    lanes, vectors = Vectors(isa).lanes, vectors_of(spec, isa, tile)
    blocks = spec.out_blocks(lanes)
    transformed = np.einsum("pi,ocij,qj->pqco", WEIGHTS, weight.astype(np.float64), WEIGHTS)
    transformed = transformed.reshape(POSITIONS, spec.in_channels, spec.out_channels)
    padded = axis(axis(transformed, 1, spec.in_blocks(lanes) * lanes), 2, -(-blocks // vectors) * vectors * lanes)
    panels = padded.reshape(POSITIONS, padded.shape[1], -1, vectors * lanes).transpose(2, 0, 1, 3)
    return np.ascontiguousarray(panels, dtype=np.float32).reshape(-1)


@dataclass(frozen=True)
class Plan:
    """rows: of tiles in a task; widths: its tiles as register tiles take them; panels: of a task. cycles: of the
    busiest thread by a plain model."""

    rows: int
    row_blocks: int
    widths: tuple[int, ...]
    panels: int
    panel_blocks: int
    cycles: float


@functools.cache
def plan(spec: ConvSpec, isa: InstructionSet, caches: Caches, threads: int, tile: ConvTile = BY_RULE) -> Plan:
    """The one with the fewest cycles of those that a tile leaves open."""
    return plans(spec, isa, caches, threads, tile)[0]


def plans(
    spec: ConvSpec, isa: InstructionSet, caches: Caches, threads: int, tile: ConvTile = BY_RULE
) -> list[Plan]:
    """Those that a tile leaves open, that with the fewest cycles first."""
    lanes, vectors = Vectors(isa).lanes, vectors_of(spec, isa, tile)
    high, wide = -(-spec.out_size[0] // 2), -(-spec.out_size[1] // 2)
    in_blocks, panels = spec.in_blocks(lanes), -(-spec.out_blocks(lanes) // vectors)
    found: list[Plan] = []
    for row_blocks, panel_blocks in itertools.product(range(1, high + 1), range(1, min(panels, 2 * threads) + 1)):
        rows, each = -(-high // row_blocks), -(-panels // panel_blocks)
        if -(-high // rows) != row_blocks or -(-panels // each) != panel_blocks:
            continue
        if tile.rows not in (None, rows) or tile.panels not in (None, each):
            continue
        tiles = rows * wide
        if tiles * POSITIONS * in_blocks * lanes * 4 > caches.l2 / 2 and rows > 1:
            continue
        widths = split_evenly(tiles, -(-tiles // (tile.width or widest(isa, vectors))))
        product = sum(spec.in_channels * step_cycles(w, vectors) + 2 * w * vectors + 20 for w in widths)
        # Weights come from the second cache or further away, at 16 bytes a cycle.
        product = max(product, spec.in_channels * vectors * lanes * 4 / 16)
        panel = POSITIONS * product + tiles * vectors * OUTPUT_CYCLES
        task = tiles * in_blocks * INPUT_CYCLES + each * panel
        cycles = -(-(spec.batch or 1) * row_blocks * panel_blocks // threads) * task
        found.append(Plan(rows, row_blocks, tuple(widths), each, panel_blocks, cycles))
    return sorted(found, key=lambda each: each.cycles)


class WinogradEmitter:
    """Emits one convolution into the IR builder that is open."""

    def __init__(self, emission: Emission, tile: ConvTile, caches: Caches) -> None:
        self.e, self.spec, self.lanes = emission, emission.spec, emission.lanes
        isa = emission.vectors.isa
        self.vectors = vectors_of(self.spec, isa, tile)
        self.plan = plan(self.spec, isa, caches, emission.threads, tile)
        self.in_blocks, self.out_blocks = self.spec.in_blocks(self.lanes), self.spec.out_blocks(self.lanes)
        self.panels = -(-self.out_blocks // self.vectors)
        self.high, self.wide = (-(-size // 2) for size in self.spec.out_size)
        self.tiles, self.turns = self.plan.rows * self.wide, len(self.plan.widths)
        self.set_strides()

    def set_strides(self) -> None:
        """Elements from one position to the next; the odd vector keeps positions out of each other's cache sets."""
        self.piece = (self.in_blocks * self.tiles + 1) * self.lanes
        self.product = (self.tiles * self.vectors + 1) * self.lanes

    def emit(self) -> None:
        e, p = self.e, self.plan
        batch = e.batch()
        with e.tasks(batch, p.row_blocks * p.panel_blocks) as task:
            rest, panel_block = e.divide(task, p.panel_blocks)
            n, row_block = e.divide(rest, p.row_blocks)
            first_row = T.Bind(row_block * e.const(p.rows))
            rows: int | Expr = p.rows
            if self.high % p.rows:
                rows = T.Bind(T.min(e.const(p.rows), e.const(self.high) - first_row))
            pieces = T.alloc_buffer((POSITIONS * self.piece,), "float32", scope="global")
            products = T.alloc_buffer((POSITIONS * self.product,), "float32", scope="global")
            self.transform_input(T.Bind(n * e.const(self.spec.image(self.lanes))), first_row, rows, pieces)
            count: int | Expr = p.panels
            first = T.Bind(panel_block * e.const(p.panels))
            if self.panels % p.panels:
                count = T.Bind(T.min(e.const(p.panels), e.const(self.panels) - first))
            with e.serial(count) as i:
                panel = T.Bind(first + i)
                self.multiply(panel, pieces, products, self.register_tiles())
                self.transform_output(n, panel, first_row, rows, products)

    # -- input -----------------------------------------------------------------------------------------------

    def transform_input(self, image: Expr, first_row: Expr, rows: int | Expr, pieces: Buffer) -> None:
        e, spec = self.e, self.spec
        height, pad = spec.in_size[0], spec.pads[0]
        inside = [y for y in range(self.high) if 2 * y >= pad and 2 * y - pad + 3 < height]
        with e.serial(self.in_blocks) as block, e.serial(rows) as i:
            y = T.Bind(first_row + i)
            plane = T.Bind(image + block * e.const(height * spec.in_size[1] * self.lanes))
            into = T.Bind((block * e.const(self.tiles) + i * e.const(self.wide)) * e.const(self.lanes))
            top = T.Bind(y * 2 - e.const(pad))

            def row(guarded: bool) -> None:
                self.input_row(plane, top, into, pieces, guarded)

            if len(inside) == self.high:
                row(False)
            elif not inside:
                row(True)
            else:
                within = T.bitwise_and(y >= e.const(inside[0]), y <= e.const(inside[-1]))
                with T.If(within):
                    with T.Then():
                        row(False)
                    with T.Else():
                        row(True)

    def input_row(self, plane: Expr, top: Expr, into: Expr, pieces: Buffer, guarded: bool) -> None:
        """One row of tiles; guarded: its input rows may be outside."""
        e, spec = self.e, self.spec
        height, width = spec.in_size

        def columns(x: int) -> tuple[int, ...]:
            return tuple(j for j in range(4) if 0 <= 2 * x - spec.pads[1] + j < width)

        x = 0
        for inside, group in itertools.groupby(range(self.wide), key=columns):
            count = len(list(group))
            with e.serial(count) as t:
                tile = T.Bind(t + e.const(x))
                left = T.Bind(tile * 2 - e.const(spec.pads[1]))
                zero = e.vectors.splat(0.0)
                d: list[list[Value]] = []
                for i in range(4):
                    at = T.Bind(plane + ((top + i) * e.const(width) + left) * e.const(self.lanes))
                    here = [e.vectors.at(at + j * self.lanes) for j in range(4)]
                    if not guarded:
                        d.append([T.Bind(e.x[here[j]]) if j in inside else zero for j in range(4)])
                        continue
                    held = Accumulators(e.dot, 1, 4)
                    for j in range(4):
                        held.set(0, j, zero)
                    h = top + i
                    with T.If(T.bitwise_and(h >= e.const(0), h < e.const(height))), T.Then():
                        for j in inside:
                            held.set(0, j, e.x[here[j]])
                    d.append([T.Bind(held.get(0, j)) for j in range(4)])
                for position, value in enumerate(input_transform(d)):
                    place = into + tile * e.const(self.lanes) + e.const(position * self.piece)
                    e.vectors.store(pieces, place, value)
            x += count

    # -- products --------------------------------------------------------------------------------------------

    def multiply(
        self, panel: Expr, pieces: Buffer, products: Buffer, register_tiles: Iterable[tuple[Expr, int, Expr]]
    ) -> None:
        """products[position][tile][vector] = pieces[position] · w[panel][position] at all positions.

        register_tiles: (first, count) of the tiles that are multiplied together, and their number, inside the loop over
        them.
        """
        e, vectors, lanes = self.e, self.vectors, self.lanes
        step = vectors * lanes  # weights of one input channel
        depth = self.in_blocks * lanes
        with T.serial(e.const(POSITIONS)) as position:
            piece = T.Bind(position * e.const(self.piece))
            product = T.Bind(position * e.const(self.product))
            weights = T.Bind((panel * e.const(POSITIONS) + position) * e.const(depth * step))
            for first, width, turn in register_tiles:
                ahead = e.vectors.ahead(
                    e.w, weights, depth * step, UNROLL * step, turn, self.turns, e.const
                )
                acc = Accumulators(e.dot, width, vectors)
                for j, v in itertools.product(range(width), range(vectors)):
                    acc.set(j, v, e.vectors.splat(0.0))
                with e.serial(-(-self.spec.in_channels // UNROLL)) as q:
                    block, quarter = e.divide(q, lanes // UNROLL)
                    x_at = T.Bind(piece + (block * e.const(self.tiles) + first) * lanes + quarter * UNROLL)
                    w_at = T.Bind(weights + q * e.const(UNROLL * step))
                    if ahead:
                        ahead(w_at)
                    for u in range(UNROLL):
                        row = [T.Bind(e.w[e.vectors.at(w_at + u * step + v * lanes)]) for v in range(vectors)]
                        for j in range(width):
                            value = T.Bind(e.vectors.splat(pieces[x_at + j * lanes + u]))
                            for v in range(vectors):
                                acc.add(j, v, value, row[v])
                into = T.Bind(product + first * step)
                for j, v in itertools.product(range(width), range(vectors)):
                    e.vectors.store(products, into + j * step + v * lanes, acc.get(j, v))

    def register_tiles(self) -> Iterator[tuple[Expr, int, Expr]]:
        """Those of a task, for `multiply`."""
        start = number = 0
        for width, group in itertools.groupby(self.plan.widths):
            count = len(list(group))
            with self.e.serial(count) as t:
                first = T.Bind(t * self.e.const(width) + self.e.const(start))
                yield first, width, t + self.e.const(number)
            start += count * width
            number += count

    # -- output ----------------------------------------------------------------------------------------------

    def transform_output(self, n: Expr, panel: Expr, first_row: Expr, rows: int | Expr, products: Buffer) -> None:
        e = self.e
        block = T.Bind(panel * e.const(self.vectors))
        odd_width = self.spec.out_size[1] % 2
        with e.serial(rows) as i:
            y = T.Bind(first_row + i)
            for v in range(self.vectors):

                def tile(x: Expr, outputs: int, v: int = v, i: Expr = i, y: Expr = y) -> None:
                    at = T.Bind((i * e.const(self.wide) + x) * e.const(self.vectors * self.lanes) + v * self.lanes)
                    m = [
                        [e.vectors.load(products, at + e.const((4 * i + j) * self.product)) for j in range(4)]
                        for i in range(4)
                    ]
                    first, second = _columnwise(_transform_output, m)
                    self.finish_row(n, block + v, y * 2, x, first, outputs)
                    if self.spec.out_size[0] % 2 == 0:
                        self.finish_row(n, block + v, y * 2 + 1, x, second, outputs)
                        return
                    with T.If(y < e.const(self.high - 1)), T.Then():
                        self.finish_row(n, block + v, y * 2 + 1, x, second, outputs)

                def whole(v: int = v) -> None:
                    if self.wide > odd_width:
                        with e.serial(self.wide - odd_width) as x:
                            tile(x, 2)
                    if odd_width:
                        tile(e.const(self.wide - 1), 1)

                if self.panels * self.vectors == self.out_blocks or v == 0:
                    whole()
                else:
                    with T.If(block + v < e.const(self.out_blocks)), T.Then():
                        whole()

    def finish_row(self, n: Expr, block: Expr, row: Expr, x: Expr, m: list[Value], outputs: int) -> None:
        values = _transform_output(m)[:outputs]
        for b, value in enumerate(values):
            self.e.finish(value, (n, block, row, x * 2 + b))


def input_transform(d: list[list[Value]]) -> list[Value]:
    """The 16 pieces of a tile BᵀdB."""
    return [value for row in _columnwise(_transform_input, d) for value in _transform_input(row)]


def output_transform(m: list[list[Value]]) -> list[list[Value]]:
    """The 2x2 outputs AᵀmA."""
    return [_transform_output(row) for row in _columnwise(_transform_output, m)]


def _columnwise(transform: Callable[[list[Value]], list[Value]], rows: list[list[Value]]) -> list[list[Value]]:
    """`transform` of every column."""
    columns = [transform([row[j] for row in rows]) for j in range(len(rows[0]))]
    return [list(row) for row in zip(*columns, strict=True)]


def _transform_input(d: list[Value]) -> list[Value]:
    """Bᵀ of F(2, 3)."""
    return [T.Bind(value) for value in (d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3])]


def _transform_output(m: list[Value]) -> list[Value]:
    """Aᵀ of F(2, 3)."""
    return [T.Bind(m[0] + m[1] + m[2]), T.Bind(m[1] - m[2] - m[3])]


def emit(emission: Emission, tile: ConvTile, caches: Caches) -> None:
    WinogradEmitter(emission, tile, caches).emit()
