"""Transposed convolution of float32 tensors with blocked channels, without a multiplication by zero.

Output pixels that are a stride apart read the same taps: those of one phase are an ordinary convolution of stride 1
with every stride-th tap of the kernel, turned round, and its results lie a stride apart in the output. Neighbouring
phases that read the same input pixels, as all do where the kernel is as large as the stride, are one convolution to as
many times the channels.

narrow: where such a convolution has fewer results for a pixel than the blocks of its channels would hold, a vector
holds several phases, and the output is plain.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from ...passes.base import Caches
from ..target import InstructionSet
from . import conv
from .conv_direct import UNROLL, widest
from .conv_spec import ConvSpec, ConvTile, Emission, Finish, Sizes, axis, split_evenly
from .dots import Accumulators, Dot
from .vectors import Buffer, Expr, Vectors

# store(vector of outputs along a row, (n, c, h, w) of the first, how many exist or None for all)
Store = Callable[[Expr, Sequence[Expr], "int | Expr | None"], None]


@dataclass(frozen=True)
class TransposedSpec:
    """A transposed convolution. 1-D ones have H = 1. pads: output rows above and columns to the left that are dropped;
    those below and to the right follow from out_size. free: the sizes stand for others, known only at run time, of
    which as many outputs are dropped or added."""

    batch: int
    in_channels: int
    out_channels: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int] = (0, 0)
    groups: int = 1
    blocked_input: bool = True
    free: bool = False

    @property
    def multiply_adds(self) -> int:
        """Of all images, those at the border included."""
        each = self.out_channels * self.in_channels // self.groups * math.prod(self.kernel)
        return self.batch * each * math.prod(self.in_size)


@dataclass(frozen=True)
class Line:
    """Along one axis the outputs first + phase + i · stride, i < count, for neighbouring phases.

    taps: for each phase the kernel's places in the order of the inputs that they read, which are i + offset and every
    dilation-th after it.
    """

    first: int
    count: int
    offset: int
    dilation: int
    taps: tuple[tuple[int, ...], ...]

    @property
    def phases(self) -> int:
        return len(self.taps)


@dataclass(frozen=True)
class Part:
    """The phases of some rows and columns. spec: the convolution that they are; None where they read nothing."""

    rows: Line
    columns: Line
    spec: ConvSpec | None

    @property
    def phases(self) -> int:
        return self.rows.phases * self.columns.phases


def lines(spec: TransposedSpec, at: int) -> list[Line]:
    """All outputs along axis `at` of the image. Phases stay apart where groups keep them from being one convolution."""
    size, kernel, stride = spec.out_size[at], spec.kernel[at], spec.strides[at]
    dilation, pad = spec.dilations[at], spec.pads[at]
    apart = stride // math.gcd(stride, dilation)  # taps of a phase
    found: list[Line] = []
    for phase in range(min(stride, size)):
        taps = tuple(k for k in reversed(range(kernel)) if (phase + pad - k * dilation) % stride == 0)
        offset = (phase + pad - taps[0] * dilation) // stride if taps else 0
        step = apart * dilation // stride if len(taps) > 1 else 1
        one = Line(phase, -(-(size - phase) // stride), offset, step, (taps,))
        last = found[-1] if found and spec.groups == 1 else None
        if last is not None and (last.count, last.offset, last.dilation, len(last.taps[0])) == (
            one.count, one.offset, one.dilation, len(taps)
        ):  # fmt: skip
            found[-1] = Line(last.first, last.count, last.offset, last.dilation, (*last.taps, taps))
        else:
            found.append(one)
    return found


def parts(spec: TransposedSpec, isa: InstructionSet) -> list[Part]:
    """The convolutions whose outputs together are those of `spec`."""
    found = []
    for rows, columns in itertools.product(lines(spec, 0), lines(spec, 1)):
        kernel = (len(rows.taps[0]), len(columns.taps[0]))
        phases = rows.phases * columns.phases
        channels = spec.out_channels if phases == 1 else phases * _whole(spec.out_channels, Vectors(isa).lanes)
        inner = ConvSpec(
            spec.batch, spec.in_channels, channels, spec.in_size, (rows.count, columns.count), kernel, (1, 1),
            (rows.dilation, columns.dilation), (-rows.offset, -columns.offset), spec.groups, spec.blocked_input,
            free=spec.free,
        )  # fmt: skip
        found.append(Part(rows, columns, inner if min(kernel) > 0 else None))
    return found


def convolutions(spec: TransposedSpec, isa: InstructionSet) -> list[ConvSpec]:
    """Those that have tiles of their own; none for the narrow form."""
    if narrow(spec, isa):
        return []
    return [part.spec for part in parts(spec, isa) if part.spec is not None]


def _whole(channels: int, lanes: int) -> int:
    return -(-channels // lanes) * lanes


def supported(spec: TransposedSpec, isa: InstructionSet) -> str | None:
    """None, or why this is not computed."""
    if min(*spec.in_size, *spec.out_size, *spec.kernel, spec.in_channels, spec.out_channels, spec.batch) < 1:
        return f"a size below one in {spec}"
    reasons = (conv.supported(part.spec, isa) for part in parts(spec, isa) if part.spec is not None)
    return next((reason for reason in reasons if reason is not None), None)


def narrow(spec: TransposedSpec, isa: InstructionSet) -> bool:
    """Whether a vector holds several phases of few channels. A row's neighbouring outputs must be whole parts of it."""
    lanes, (part, *others) = Vectors(isa).lanes, parts(spec, isa)
    return (
        not others
        and part.spec is not None
        and spec.blocked_input
        and spec.groups == 1
        and part.phases > 1
        and part.phases == math.prod(spec.strides)
        and part.spec.kernel == (1, 1)
        and part.spec.pads == (0, 0)
        and part.spec.in_size == part.spec.out_size
        and lanes % spec.strides[1] == 0
        and 2 * spec.out_channels <= lanes
    )


# --- weights ----------------------------------------------------------------------------------------------------


def pack(
    weight: np.ndarray, spec: TransposedSpec, isa: InstructionSet, tiles: Sequence[ConvTile]
) -> list[np.ndarray]:
    """(I, O / groups, kernel height, kernel width) weights as the kernels of `convolutions` read them.

    tiles: of each.
    """
    expected = (spec.in_channels, spec.out_channels // spec.groups, *spec.kernel)
    if weight.shape != expected:
        raise ValueError(f"weights of shape {weight.shape}, expected {expected}")
    lanes = Vectors(isa).lanes
    grouped = weight.reshape(spec.groups, -1, *expected[1:]).swapaxes(1, 2)
    ordinary = grouped.reshape(spec.out_channels, -1, *spec.kernel)
    if narrow(spec, isa):
        # One axis for outputs, a row's neighbours last; the panels' weights behind each other.
        (part,) = parts(spec, isa)
        taps = ordinary[:, :, [t for (t,) in part.rows.taps]][:, :, :, [t for (t,) in part.columns.taps]]
        flat = axis(taps.transpose(1, 2, 0, 3).reshape(spec.in_channels, -1), 0, _whole(spec.in_channels, UNROLL))
        flat = axis(flat, 1, _whole(flat.shape[1], lanes))
        cuts = np.cumsum([count * lanes for _, count in _panels(spec, lanes)])[:-1]
        panels = np.concatenate([panel.reshape(-1) for panel in np.split(flat, cuts, axis=1)])
        return [np.ascontiguousarray(panels, np.float32)]
    packed, chosen = [], iter(tiles)
    for part in parts(spec, isa):
        if part.spec is None:
            continue
        pieces = [
            ordinary[:, :, rows][:, :, :, columns]
            for rows, columns in itertools.product(map(list, part.rows.taps), map(list, part.columns.taps))
        ]
        if part.phases > 1:
            pieces = [axis(piece, 0, _whole(spec.out_channels, lanes)) for piece in pieces]
        packed.append(conv.pack_weights(np.concatenate(pieces), part.spec, isa, next(chosen)))
    return packed


# --- loops ------------------------------------------------------------------------------------------------------


def emit(
    vectors: Vectors, spec: TransposedSpec, tiles: Sequence[ConvTile], x: Buffer, weights: Sequence[Buffer],
    finish: Finish, threads: int, index: str, caches: Caches, sizes: Sequence[Expr] | None = None,
) -> None:  # fmt: skip
    """Emit into the IR builder that is open; `finish` gets every output once. x: flat; weights: from `pack`, flat.
    sizes: of a free spec, rows and columns of the input and of the output as the shapes of arguments say them."""
    given = iter(zip(tiles, weights, strict=True))
    for part in parts(spec, vectors.isa):
        own = None if sizes is None else _sizes_of(vectors, spec, part, sizes, index)
        if part.spec is None:
            _zeros(vectors, spec, part, finish, index, own)
            continue
        blocks = -(-spec.out_channels // vectors.lanes)
        placed = _placed(spec, part, blocks, finish, index)
        tile, w = next(given)
        conv.emit(vectors, part.spec, tile, x, w, placed, threads, index, caches, sizes=own)


def _sizes_of(vectors: Vectors, spec: TransposedSpec, part: Part, sizes: Sequence[Expr], index: str) -> Sizes:
    """Those of the convolution that a part is. Its results lie a stride apart: they are never one row."""

    def count(size: Expr, line: Line, stride: int) -> Expr:
        behind = size + tirx.const(stride - 1 - line.first, index)
        return tirx.truncdiv(T.max(tirx.const(0, index), behind), tirx.const(stride, index))

    height, width, rows, columns = sizes
    counts = (count(rows, part.rows, spec.strides[0]), count(columns, part.columns, spec.strides[1]))
    return Sizes.of(vectors, (height, width, *counts))


def _placed(spec: TransposedSpec, part: Part, blocks: int, finish: Finish, index: str) -> Finish:
    """`finish` of the whole output for the outputs of a part."""

    def const(value: int) -> Expr:
        return tirx.const(value, index)

    def placed(value: Expr, place: Sequence[Expr]) -> None:
        n, block, row, column = place
        first_row, first_column = const(part.rows.first), const(part.columns.first)
        if part.phases > 1:
            phase = block // const(blocks)
            block = block % const(blocks)
            first_row = first_row + phase // const(part.columns.phases)
            first_column = first_column + phase % const(part.columns.phases)
        row = row * const(spec.strides[0]) + first_row
        finish(value, (n, block, row, column * const(spec.strides[1]) + first_column))

    return placed


def _zeros(
    vectors: Vectors, spec: TransposedSpec, part: Part, finish: Finish, index: str, own: Sizes | None
) -> None:
    """Outputs that no input reaches."""

    def const(value: int) -> Expr:
        return tirx.const(value, index)

    places = (const(part.rows.count), const(part.columns.count)) if own is None else (own.rows, own.columns)
    outer = (const(spec.batch), const(-(-spec.out_channels // vectors.lanes)))
    with T.grid(*outer, *places) as (n, block, row, column):
        for i, j in itertools.product(range(part.rows.phases), range(part.columns.phases)):
            at = (
                row * const(spec.strides[0]) + const(part.rows.first + i),
                column * const(spec.strides[1]) + const(part.columns.first + j),
            )
            finish(vectors.splat(0.0), (n, block, *at))


def _panels(spec: TransposedSpec, lanes: int) -> list[tuple[int, int]]:
    """(first vector, vectors) that a tile of the narrow form has."""
    total = -(-math.prod(spec.strides) * spec.out_channels // lanes)
    return [(first, min(2, total - first)) for first in range(0, total, 2)]


class NarrowEmitter:
    """The narrow form. A row of input pixels becomes `strides[0]` rows of outputs in a buffer that stays in the first
    cache, [row][channel][column]; from there they are stored as vectors along the row."""

    def __init__(
        self, vectors: Vectors, spec: TransposedSpec, x: Buffer, w: Buffer, store: Store, threads: int, index: str,
        sizes: Sequence[Expr] | None,
    ) -> None:  # fmt: skip
        (part,) = parts(spec, vectors.isa)
        assert part.spec is not None
        self.v, self.spec, self.lanes, self.w, self.store = vectors, spec, vectors.lanes, w, store
        self.e = Emission(vectors, part.spec, x, w, lambda value, place: None, threads, index, Dot(vectors))
        const, lanes = self.e.const, self.lanes
        # Of input and output; room: elements of a row in the buffer, as the shapes of arguments say them.
        self.height, self.columns, self.out_columns = spec.in_size[0], spec.in_size[1], spec.out_size[1]
        self.room: int | Expr = _whole(spec.out_size[1], lanes)
        self.width = self.room
        if sizes is not None:
            self.height, self.columns, self.out_columns = (vectors.opaque(sizes[i]) for i in (0, 1, 3))
            self.room = (tirx.truncdiv(sizes[3], const(lanes)) + const(1)) * const(lanes)
            self.width = vectors.opaque(self.room)

    def emit(self) -> None:
        e, spec, const, lanes = self.e, self.spec, self.e.const, self.lanes
        height, columns, width = e.whole(self.height), e.whole(self.columns), e.whole(self.width)
        quotient, remainder = self.v.divisions(not spec.free)
        blocks = -(-spec.in_channels // lanes)
        with e.tasks(spec.batch, self.height) as task:
            n, row = quotient(task, height), remainder(task, height)
            room = const(spec.strides[0] * spec.out_channels) * e.whole(self.room)
            rows = T.alloc_buffer((room,), "float32", scope="global")
            plane = T.Bind(height * columns * const(lanes))
            image = T.Bind(n * const(blocks) * plane + row * columns * const(lanes))
            start = 0
            for first, vectors in _panels(spec, lanes):
                for pixel, count in self.tiles(vectors):
                    self.tile(image, plane, first, vectors, start, pixel, count, rows)
                start += _whole(spec.in_channels, UNROLL) * vectors * lanes
            with e.serial(spec.strides[0]) as i, e.serial(spec.out_channels) as channel:
                line = T.Bind((i * const(spec.out_channels) + channel) * width)
                self.give(rows, line, (n, channel, row * const(spec.strides[0]) + i))

    def give(self, rows: Buffer, line: Expr, place: Sequence[Expr]) -> None:
        """Store the row of outputs that begins at `line` of the buffer."""
        e, lanes, size = self.e, self.e.const(self.lanes), self.e.whole(self.out_columns)
        whole, rest = (T.Bind(f(size, lanes)) for f in (tirx.truncdiv, tirx.truncmod))
        with T.serial(whole) as vector:
            column = T.Bind(vector * lanes)
            self.store(self.v.load(rows, line + column), (*place, column), None)
        if isinstance(self.out_columns, int):
            if self.out_columns % self.lanes:
                column = e.const(self.out_columns // self.lanes * self.lanes)
                self.store(self.v.load(rows, line + column), (*place, column), self.out_columns % self.lanes)
        else:
            with T.If(rest > e.const(0)), T.Then():
                column = T.Bind(whole * lanes)
                self.store(self.v.load(rows, line + column), (*place, column), rest)

    def tiles(self, vectors: int) -> Iterator[tuple[Expr, int]]:
        """(first pixel, pixels) of each tile of a row, inside the loop over them."""
        const, most = self.e.const, widest(self.v.isa, vectors)
        if isinstance(self.columns, int):
            column = 0
            for width, group in itertools.groupby(split_evenly(self.columns, -(-self.columns // most))):
                count = len(list(group))
                with self.e.serial(count) as t:
                    yield T.Bind(const(column) + t * const(width)), width
                column += count * width
            return
        with T.If(self.columns >= const(most)):
            with T.Then(), T.serial(self.v.opaque(tirx.truncdiv(self.columns + const(most - 1), const(most)))) as t:
                yield self.v.opaque(T.min(t * const(most), self.columns - const(most))), most
            with T.Else(), T.serial(self.columns) as t:
                yield t, 1

    def tile(
        self, image: Expr, plane: Expr, first: int, vectors: int, start: int, pixel: Expr, width: int, rows: Buffer
    ) -> None:
        """The vectors [first, first + vectors) of `width` pixels of a row."""
        e, const, lanes = self.e, self.e.const, self.lanes
        acc = Accumulators(e.dot, width, vectors)
        for j, k in itertools.product(range(width), range(vectors)):
            acc.set(j, k, self.v.splat(0.0))
        with T.serial(const(-(-self.spec.in_channels // UNROLL))) as q:
            block, quarter = e.divide(q, lanes // UNROLL)
            x_at = T.Bind(image + block * plane + pixel * const(lanes) + quarter * const(UNROLL))
            w_at = T.Bind(const(start) + q * const(UNROLL * vectors * lanes))
            for u in range(UNROLL):
                row = [self.v.load(self.w, w_at + const((u * vectors + k) * lanes)) for k in range(vectors)]
                for j in range(width):
                    value = T.Bind(self.v.splat(e.x[x_at + const(j * lanes + u)]))
                    for k in range(vectors):
                        acc.add(j, k, value, row[k])
        for j, k in itertools.product(range(width), range(vectors)):
            self.spread(acc.get(j, k), (first + k) * lanes, pixel + const(j), rows)

    def spread(self, value: Expr, first: int, pixel: Expr, rows: Buffer) -> None:
        """Put the results `first` and following of a pixel where they belong in the rows of outputs."""
        value, step, const = T.Bind(value), self.spec.strides[1], self.e.const
        total = math.prod(self.spec.strides) * self.spec.out_channels
        for lane in range(0, min(self.lanes, total - first), step):
            line = (first + lane) // step
            at = const(line) * self.e.whole(self.width) + pixel * const(step)
            part = tirx.Shuffle([value], [tirx.const(lane + j, "int32") for j in range(step)])
            T.buffer_store(rows, part, [T.ramp(at, 1, step) if step > 1 else at])


def emit_narrow(
    vectors: Vectors, spec: TransposedSpec, x: Buffer, w: Buffer, store: Store, threads: int, index: str,
    sizes: Sequence[Expr] | None = None,
) -> None:  # fmt: skip
    """Emit the narrow form into the IR builder that is open; `store` gets vectors along the rows of a plain output.
    sizes: as of `emit`."""
    NarrowEmitter(vectors, spec, x, w, store, threads, index, sizes).emit()
