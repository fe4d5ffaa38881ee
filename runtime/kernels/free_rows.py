"""Rows of images whose sizes are known only at run time, cut into tiles whose taps are known where kernels are written.

The first tile's taps may lie left of the image, the last one, which ends where the row does, may have taps right of it,
and those between have all inside. Neighbours may share pixels, which are then computed twice. Rows too short for two
tiles of a width are cut into narrower ones, the shortest pixel by pixel, with the taps that are inside found when it
runs. Where nothing is padded, tiles of the inner kind are all there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tvm import tirx
from tvm.tirx.script import builder as T

from .conv_spec import ConvSpec, Sizes
from .vectors import Expr, Vectors


@dataclass(frozen=True)
class Span:
    """A tile of `width` neighbouring output pixels of a row.

    left: whether it begins the row, so that taps may lie left of the image. beyond: by how many columns the last tap
    of its last pixel lies behind the image; 0 where none does. inside: the first kernel column that reads inside the
    image and how many do, for a tile of one pixel, of which that is known only at run time.
    """

    width: int
    left: bool = False
    beyond: int = 0
    inside: tuple[Expr, Expr] | None = None

    def pixels(self, spec: ConvSpec, tap: int) -> tuple[int, int]:
        """The range of pixels whose kernel column `tap` is inside."""
        stride, dilation, low, high = spec.strides[1], spec.dilations[1], 0, self.width
        if self.left:
            low = -(-(spec.pads[1] - tap * dilation) // stride)
        if self.beyond:
            high = self.width + ((spec.kernel[1] - 1 - tap) * dilation - self.beyond) // stride
        low = min(self.width, max(0, low))
        return low, min(self.width, max(low, high))


class RowCutter:
    """Cuts rows of outputs into spans, of the first of some widths that a row has room for.

    index: integer type of offsets. whole: widths of rows that are one tile each.
    """

    def __init__(
        self, v: Vectors, index: str, spec: ConvSpec, sizes: Sizes, widths: Sequence[int], whole: Sequence[int] = ()
    ) -> None:
        self.v, self.index, self.spec, self.sizes = v, index, spec, sizes
        (stride, pad), reach = (spec.strides[1], spec.pads[1]), (spec.kernel[1] - 1) * spec.dilations[1]
        self.after = (spec.out_size[1] - 1) * stride + reach + 1 - spec.in_size[1] - pad
        self.padded = pad > 0 or self.after > 0
        self.first = max(0, -(-pad // stride))  # pixels that may have taps left of the image
        last = -(-max(0, self.after) // stride)
        self.whole = whole
        self.widths = [w for w in dict.fromkeys(widths) if w > 1 and w >= max(self.first, last)]
        last_pixel = (sizes.columns - self.const(1)) * self.const(stride)
        self.beyond = v.opaque(last_pixel + self.const(reach + 1 - pad) - sizes.width)

    def const(self, value: int) -> Expr:
        return tirx.const(value, self.index)

    def tiles(self) -> Iterator[tuple[Expr, Span]]:
        """(first column, span) of each tile, inside the loops over them."""
        yield from self._rows(self.whole)

    def _rows(self, whole: Sequence[int]) -> Iterator[tuple[Expr, Span]]:
        if not whole:
            yield from self._several(self.widths)
            return
        with T.If(self.sizes.columns == self.const(whole[0])):
            with T.Then():
                yield from self._last(Span(whole[0], left=self.padded), self.const(0))
            with T.Else():
                yield from self._rows(whole[1:])

    def _several(self, widths: Sequence[int]) -> Iterator[tuple[Expr, Span]]:
        width, *narrower = [*widths, 0]
        if not width:
            yield from self._single()
            return
        room = self.sizes.columns - self.const(width * (2 if self.padded else 1))
        fits = room >= self.const(0)
        if self.padded and self.first > 1:
            fits = tirx.any(room == self.const(0), room >= self.const(self.first))
        if narrower[0]:
            fits = tirx.all(fits, self._computed(width) <= self._computed(narrower[0]))
        with T.If(fits):
            with T.Then():
                yield from self._cut(width)
            with T.Else():
                yield from self._several(narrower[:-1])

    def _computed(self, width: int) -> Expr:
        """Pixels of all tiles of a width, those that are computed twice counted twice."""
        return tirx.truncdiv(self.sizes.columns + self.const(width - 1), self.const(width)) * self.const(width)

    def _cut(self, width: int) -> Iterator[tuple[Expr, Span]]:
        const, opaque = self.const, self.v.opaque
        columns, begin = self.sizes.columns, width if self.padded else 0
        if self.padded:
            yield const(0), Span(width, left=True)
        # From `begin` to `end` all taps are inside; the last tile there ends at `end`.
        end = columns - const(begin)
        count = opaque(tirx.truncdiv(end - const(begin) + const(width - 1), const(width)))
        with T.serial(count) as turn:
            at = T.Bind(const(begin) + turn * const(width))
            yield opaque(T.min(at, end - const(width))), Span(width)
        if self.padded:
            yield from self._last(Span(width), opaque(columns - const(width)))

    def _last(self, span: Span, column: Expr) -> Iterator[tuple[Expr, Span]]:
        """The last tile of a row, in as many forms as there are numbers of columns that it may lie behind the image."""
        least, most = self.after - self.spec.strides[1] + 1, max(0, self.after)
        for beyond in range(max(0, least), most + 1):
            tile = replace(span, beyond=beyond)
            if max(0, least) == most:
                yield column, tile
            else:
                reached = self.beyond <= self.const(0) if beyond == 0 else self.beyond == self.const(beyond)
                with T.If(reached), T.Then():
                    yield column, tile

    def _single(self) -> Iterator[tuple[Expr, Span]]:
        spec = self.spec
        with T.serial(self.sizes.columns) as column:
            if not self.padded:
                yield column, Span(1)
                return
            start = T.Bind(column * self.const(spec.strides[1]) - self.const(spec.pads[1]))
            yield column, Span(1, inside=taps_inside(self.v, spec, start, self.sizes.width, 1))


def taps_inside(v: Vectors, spec: ConvSpec, start: Expr, size: Expr, axis: int) -> tuple[Expr, Expr]:
    """The first tap inside an image of that size, and how many are. start: where the first tap lies."""
    dilation, taps = spec.dilations[axis], spec.kernel[axis]

    def const(value: int) -> Expr:
        return tirx.const(value, str(start.ty.dtype))

    def below(room: Expr) -> Expr:
        """Taps that lie less than `room` behind the first."""
        count = T.max(const(0), room)
        if dilation > 1:
            count = tirx.truncdiv(count + const(dilation - 1), const(dilation))
        return v.opaque(T.min(const(taps), count))

    first = below(const(0) - start)
    return first, v.opaque(T.max(const(0), below(size - start) - first))
