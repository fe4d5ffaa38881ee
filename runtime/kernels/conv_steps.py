"""What convolutions of 8-bit numbers and bfloat16 read: the part of the image of a task, copied as steps of `dots`.

The copy holds whole steps as int32: channels of a pixel in groups for dense convolutions, neighbouring taps of a column
in groups for depthwise ones. It has the padding in it, as numbers that stand for 0, and is small enough for a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from tvm import tirx
from tvm.tirx.script import builder as T

from .conv_spec import ConvSpec, Emission
from .dots import SteppedDot
from .vectors import Buffer, Expr

WRITTEN_OUT = 4  # vectors of a copy in one turn of its loop, at most


@dataclass(frozen=True)
class Source:
    """Where loops read x: step `q` of input block `b` in row `h`, column `w` is element

        first + ((b · plane + h · width + w) · pixel + q · step

    of the buffer, rows being counted from output row `row`'s on. plane: pixels of a block.
    """

    buffer: Buffer
    first: Expr
    row: Expr
    plane: int | Expr
    width: int | Expr
    pixel: int
    step: int | Expr


@dataclass(frozen=True)
class _Copy:
    """A copy in progress. e.spec: the convolution as it is; `seen` reads the copy."""

    e: Emission
    dot: SteppedDot
    target: Buffer

    def zeros(self, at: Expr, count: int | Expr) -> None:
        """`count` steps that stand for 0, from `at` on."""
        zero, lanes, const = self.dot.constant(self.e.spec.zero), self.e.lanes, self.e.const

        def fill(offset: Expr, lanes: int) -> None:
            value = T.int32(zero)
            self.store(offset, T.broadcast(value, lanes) if lanes > 1 else value, lanes)

        runs(count, lanes, lambda done, width: fill(T.Bind(at + done), width), const)

    def store(self, at: Expr, value: Expr, count: int) -> None:
        T.buffer_store(self.target, value, [T.ramp(at, 1, count) if count > 1 else at])

    def row(self, line: Expr, h: Expr, columns: int, pixel: int, body: Callable[[Expr, Expr, int], None]) -> None:
        """A row of `columns` pixels from `line` on, of which each takes `pixel` steps; of input row `h`, or zeros.

        body(first pixel of the copy, its column in the image, how many).
        """
        spec, const = self.e.spec, self.e.const
        height, width = spec.in_size
        step, pad = spec.strides[1] if spec.kernel[1] == 1 else 1, spec.pads[1]
        low = min(columns, max(0, -(-pad // step)))
        high = max(low, min(columns, -(-(width + pad) // step)))

        def inside() -> None:
            if low:
                self.zeros(line, low * pixel)
            if high > low:
                body(T.Bind(line + const(low * pixel)), const(low * step - pad), high - low)
            if columns > high:
                self.zeros(T.Bind(line + const(high * pixel)), (columns - high) * pixel)

        last = (spec.out_size[0] - 1) * spec.strides[0] + (spec.kernel[0] - 1) * spec.dilations[0] - spec.pads[0]
        if spec.pads[0] <= 0 and last < height:
            inside()
            return
        with T.If(tirx.all(h >= const(0), h < const(height))):
            with T.Then():
                inside()
            with T.Else():
                self.zeros(line, columns * pixel)


def runs(
    count: int | Expr, lanes: int, body: Callable[[Expr, int], None], const: Callable[[int], Expr]
) -> None:
    """`body(offset, width)` over `count` elements, `lanes` at a time and what is left one by one."""
    whole: int | Expr = count // lanes if isinstance(count, int) else T.Bind(count // const(lanes))
    if not isinstance(whole, int):
        with T.serial(whole) as turn:
            body(T.Bind(turn * const(lanes)), lanes)
    elif whole:
        written_out = max(u for u in range(1, WRITTEN_OUT + 1) if whole % u == 0)
        with T.serial(const(whole // written_out)) as turn:
            first = T.Bind(turn * const(lanes * written_out))
            for u in range(written_out):
                body(first + const(u * lanes), lanes)
    done = const(whole * lanes) if isinstance(whole, int) else T.Bind(whole * const(lanes))
    left = count - whole * lanes if isinstance(count, int) and isinstance(whole, int) else T.Bind(count - done)
    if not isinstance(left, int) or left:
        with T.serial(left if not isinstance(left, int) else const(left)) as turn:
            body(T.Bind(done + turn), 1)


def copied(
    e: Emission, dot: SteppedDot, image: Expr, blocks: int, first_row: Expr, rows: int | Expr, most: int,
    columns: int | None,
) -> Source:  # fmt: skip
    """The input of output rows [first_row, first_row + rows) for a dense convolution; `most` >= rows.

    blocks: of input channels. columns: of a row where pixels of the image are cut into rows of any length.
    """
    spec, seen, const = e.spec, e.spec.seen, e.const
    if columns is not None:
        in_most, width = most, columns
    else:
        in_most = (most - 1) * seen.strides[0] + (seen.kernel[0] - 1) * seen.dilations[0] + 1
        width = seen.in_size[1]
    plane = in_most * width
    area = spec.in_size[0] * spec.in_size[1]
    each = spec.in_channels // spec.groups
    steps = dot.steps(e.lanes if spec.blocked_input else each)
    target = T.alloc_buffer((blocks * plane * steps,), "int32", scope="global")
    copy = _Copy(e, dot, target)
    in_rows: int | Expr = in_most
    if not isinstance(rows, int):
        in_rows = rows if columns is not None else T.Bind(
            (rows - const(1)) * const(seen.strides[0]) + const(in_most - (most - 1) * seen.strides[0])
        )
    pixels = dot.group if spec.blocked_input else e.lanes  # of a vector of steps

    if spec.blocked_input:

        def move(at: Expr, x_at: Expr, count: int | Expr, apart: int) -> None:
            """`count` pixels from x_at on, every `apart`-th."""
            runs(
                count, pixels if apart == 1 else 1,
                lambda done, n: copy.store(
                    T.Bind(at + done * const(steps)),
                    dot.packed(e.x, T.Bind(x_at + done * const(apart * e.lanes)), n * steps), n * steps,
                ),
                const,
            )  # fmt: skip

        with e.serial(blocks) as block:
            x_block = T.Bind(image + block * const(area * e.lanes))
            start = T.Bind(block * const(plane * steps))
            if columns is not None:
                count: int | Expr = rows * columns if isinstance(rows, int) else T.Bind(rows * const(columns))
                move(start, T.Bind(x_block + first_row * const(columns * e.lanes)), count, 1)
            else:
                _rows(copy, start, first_row, in_rows, width, steps, x_block, e.lanes, move)
        return Source(target, const(0), first_row, plane, width, steps, 1)

    def gather(at: Expr, x_at: Expr, count: int | Expr, apart: int, step: int) -> None:
        channels = range(step * dot.group, (step + 1) * dot.group)

        def some(done: Expr, n: int) -> None:
            places = [
                T.Bind(x_at + const(c * area) + done * const(apart)) if c < each else None for c in channels
            ]
            copy.store(T.Bind(at + done), dot.gathered(e.x, places, n), n)

        runs(count, pixels if apart == 1 else 1, some, const)

    for step in range(steps):
        start = const(step * plane)

        def take(at: Expr, x_at: Expr, count: int | Expr, apart: int, step: int = step) -> None:
            gather(at, x_at, count, apart, step)

        if columns is not None:
            count = rows * columns if isinstance(rows, int) else T.Bind(rows * const(columns))
            take(start, T.Bind(image + first_row * const(columns)), count, 1)
        else:
            _rows(copy, start, first_row, in_rows, width, 1, image, 1, take)
    return Source(target, const(0), first_row, plane, width, 1, plane)


def _rows(
    copy: _Copy, start: Expr, first_row: Expr, rows: int | Expr, width: int, pixel: int, x_first: Expr, x_pixel: int,
    move: Callable[[Expr, Expr, int | Expr, int], None],
) -> None:  # fmt: skip
    """Rows of a plane of the copy, of the input rows that output row `first_row` and those behind it read."""
    spec, const = copy.e.spec, copy.e.const
    apart = tuple(s if k == 1 else 1 for s, k in zip(spec.strides, spec.kernel, strict=True))
    seen = spec.seen
    with copy.e.serial(rows) as r:
        h = T.Bind((first_row * const(seen.strides[0]) + r) * const(apart[0]) - const(spec.pads[0]))
        line = T.Bind(start + r * const(width * pixel))

        def body(at: Expr, column: Expr, count: int) -> None:
            x_at = T.Bind(x_first + (h * const(spec.in_size[1]) + column) * const(x_pixel))
            move(at, x_at, count, apart[1])

        copy.row(line, h, width, pixel, body)


def rows_in_groups(spec: ConvSpec, group: int) -> ConvSpec:
    """A depthwise convolution as its loops see it: `group` kernel rows are one, and nothing is padded."""
    kernel = (-(-spec.kernel[0] // group), spec.kernel[1])
    dilation = spec.dilations[0] * group
    # Rows that no output row begins with, and no group of its kernel rows, are left out of the copy.
    apart = math.gcd(spec.strides[0], dilation) if kernel[0] > 1 else spec.strides[0]
    strides = (spec.strides[0] // apart, spec.strides[1])
    dilations = (dilation // apart if kernel[0] > 1 else 1, spec.dilations[1])
    rows, columns = (
        (out - 1) * stride + (k - 1) * dilation + 1
        for out, stride, k, dilation in zip(spec.out_size, strides, kernel, dilations, strict=True)
    )
    return replace(
        spec, in_size=(rows, columns), kernel=kernel, strides=strides, dilations=dilations, pads=(0, 0)
    )  # fmt: skip


def copied_columns(
    e: Emission, dot: SteppedDot, seen: ConvSpec, plane: Expr, first_row: Expr, rows: int | Expr, most: int
) -> Source:
    """The input of output rows [first_row, first_row + rows) for a depthwise convolution; `most` >= rows.

    A step of row h holds rows h, h + dilation, ... of the image. plane: offset of the block of channels.
    """
    spec, const, lanes = e.spec, e.const, e.lanes
    apart = spec.strides[0] // seen.strides[0]
    height, width = spec.in_size
    reach = (seen.kernel[0] - 1) * seen.dilations[0] + 1
    in_most, columns = (most - 1) * seen.strides[0] + reach, seen.in_size[1]
    target = T.alloc_buffer((in_most * columns * lanes,), "int32", scope="global")
    copy = _Copy(e, dot, target)
    low = min(columns, max(0, spec.pads[1]))
    high = max(low, min(columns, width + spec.pads[1]))
    in_rows: int | Expr = in_most
    if not isinstance(rows, int):
        in_rows = T.Bind((rows - const(1)) * const(seen.strides[0]) + const(reach))
    zero = T.int32(spec.zero + dot.shift)
    with e.serial(in_rows) as r:
        h = T.Bind((first_row * const(seen.strides[0]) + r) * const(apart) - const(spec.pads[0]))
        line = T.Bind(r * const(columns * lanes))
        taps = [T.Bind(h + const(i * spec.dilations[0])) for i in range(dot.group)]
        if low:
            copy.zeros(line, low * lanes)
        if columns > high:
            copy.zeros(T.Bind(line + const(high * lanes)), (columns - high) * lanes)
        if high == low:
            return Source(target, const(0), first_row, in_most * columns, columns, lanes, 1)
        at, skipped = T.Bind(line + const(low * lanes)), const((low - spec.pads[1]) * lanes)
        count = (high - low) * lanes

        def some(done: Expr, n: int, inside: list[Expr] | None = None) -> None:
            places = [T.Bind(plane + row * const(width * lanes) + skipped + done) for row in taps]
            copy.store(T.Bind(at + done), dot.gathered(e.x, places, n, inside, zero), n)

        whole = tirx.all(*[T.bitwise_and(row >= const(0), row < const(height)) for row in (taps[0], taps[-1])])
        with T.If(whole):
            with T.Then():
                runs(count, lanes, some, const)
            with T.Else():
                inside = [tirx.all(row >= const(0), row < const(height)) for row in taps]
                held = [T.Bind(T.Select(i, row, const(0))) for i, row in zip(inside, taps, strict=True)]
                masks = [T.Bind(T.Select(i, T.int32(-1), T.int32(0))) for i in inside]
                taps[:] = held
                runs(count, lanes, lambda done, n: some(done, n, masks), const)
    return Source(target, const(0), first_row, in_most * columns, columns, lanes, 1)
