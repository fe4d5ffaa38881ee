"""What the convolution kernels agree on: the description of a convolution, who finishes an output, and loops.

A blocked tensor (N, C, H, W) is stored (N, ceil(C/L), H, W, L) with L = `Vectors.lanes`: a pixel's L neighbouring
channels are one vector. Lanes beyond C hold anything that is finite where the image is;
packed weights are zero there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .dots import Dot
from .vectors import Buffer, Expr, Vectors

# finish(vector of L outputs, (n, c_block, h, w)): the caller's epilogue and store.
Finish = Callable[[Expr, Sequence[Expr]], None]

NOMINAL = 56  # rows and columns of the output that stands for those of images whose sizes are not known

# Multiply-adds below which a parallel launch (up to 9 us) costs more than a second thread saves, by vector lanes.
PARALLEL_VECTORS = 1 << 15


@dataclass(frozen=True)
class ConvSpec:
    """A convolution. 1-D convolutions have H = 1.

    batch: None where it is known at run time. in_size, out_size: (H, W). pads: rows above and columns to the left;
    those below and to the right follow from out_size, and a negative pad drops input. blocked_input: False where x is
    plain (N, C, H, W), as for the first convolution of a model. data: type of x; for uint8 and int8, of which `zero`
    stands for 0, weights are int8 and results int32; uint16: the bits of bfloat16, which weights are too. joined:
    `dots.joined_steps` of the weights of a dense one. stored: type that constant weights of float32 are given in; who
    reads them in no other type than float32 widens them first. free: the sizes stand for others,
    known only at run time; what they say of the padding on the right and below holds for those too, up to a stride.
    """

    batch: int | None
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
    data: str = "float32"
    zero: int = 0
    joined: int = 0
    stored: str = "float32"
    free: bool = False

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def seen(self) -> ConvSpec:
        """What the loops see. Of narrow numbers they read a copy, which has the padding in it and leaves out rows and
        columns between the places of a kernel of one."""
        if self.data == "float32":
            return self
        rows, columns = (self._seen(axis) for axis in (0, 1))
        return replace(self, in_size=(rows[0], columns[0]), strides=(rows[1], columns[1]), pads=(0, 0))

    def _seen(self, axis: int) -> tuple[int, int]:
        """(size, stride) of an axis of the copy."""
        stride = 1 if self.kernel[axis] == 1 else self.strides[axis]
        return (self.out_size[axis] - 1) * stride + (self.kernel[axis] - 1) * self.dilations[axis] + 1, stride

    @property
    def each(self) -> int:
        """Input channels of a group."""
        return self.in_channels // self.groups

    def in_vectors(self, lanes: int) -> bool:
        """Whether groups, of as many outputs as inputs or a multiple, are smaller than a vector and their inputs lie in
        one: those of depthwise ones do. Of narrow numbers no others."""
        if self.groups == 1 or self.out_channels % self.in_channels:
            return False
        if self.data != "float32":
            return self.each == 1 and self.out_channels == self.in_channels
        return self.each == 1 or (self.each < lanes and lanes % self.each == 0)

    @property
    def multiply_adds(self) -> int:
        """Of one image, padded taps included."""
        channels = self.out_channels * self.in_channels // self.groups
        return channels * self.taps * math.prod(self.out_size)

    def in_blocks(self, lanes: int) -> int:
        return -(-self.in_channels // lanes)

    def out_blocks(self, lanes: int) -> int:
        return -(-self.out_channels // lanes)

    def image(self, lanes: int) -> int:
        """Elements of one input image as it is stored."""
        channels = self.in_blocks(lanes) * lanes if self.blocked_input else self.in_channels
        return channels * math.prod(self.in_size)


@dataclass(frozen=True)
class ConvTile:
    """How a convolution is computed: the algorithm, and what else is not left to its rule (None).

    vectors, width: output vectors and most output pixels of a tile. columns: pixels of what tiles cut as one row, where
    pixels may lie in any rows. rows, panels: of one task.
    """

    algorithm: str
    vectors: int | None = None
    width: int | None = None
    columns: int | None = None
    rows: int | None = None
    panels: int | None = None


@dataclass(frozen=True)
class Sizes:
    """Rows and columns of the input and of the output, where they are known only at run time. room: columns of the
    output, at least one, as the shapes of arguments say them: TVM allocates buffers before anything else is computed,
    and an image may have rows and no columns. one_row: whether the result's pixel (0, i) may stand for pixel i of the
    image."""

    height: Expr
    width: Expr
    rows: Expr
    columns: Expr
    room: Expr
    one_row: bool = False

    @classmethod
    def of(cls, v: Vectors, sizes: Sequence[Expr], one_row: bool = False) -> Sizes:
        """sizes: rows and columns of the input and of the output as the shapes of arguments say them."""
        height, width, rows, columns = map(v.opaque, sizes)
        return cls(height, width, rows, columns, T.max(tirx.const(1, str(sizes[3].ty.dtype)), sizes[3]), one_row)


@dataclass(frozen=True)
class Emission:
    """What every part of an emitted convolution needs. first: what sums start at, for each output channel; None: 0.
    sizes: of images that the spec does not know."""

    vectors: Vectors
    spec: ConvSpec
    x: Buffer
    w: Buffer
    finish: Finish
    threads: int
    index: str
    dot: Dot
    first: Buffer | None = None
    sizes: Sizes | None = None

    @property
    def lanes(self) -> int:
        return self.vectors.lanes

    def const(self, value: int) -> Expr:
        return tirx.const(value, self.index)

    def whole(self, value: int | Expr) -> Expr:
        """A number as an expression; expressions are as they are."""
        return self.const(value) if isinstance(value, int) else value

    def batch(self) -> int | Expr:
        if self.spec.batch is not None:
            return self.spec.batch
        flat = self.x.shape[0]
        return T.Bind(T.Cast(self.index, flat) // self.const(self.spec.image(self.lanes)))

    def first_sums(self, block: Expr) -> Expr:
        """What the sums of a block of output channels start at."""
        if self.first is None:
            return self.dot.zeros()
        return T.Bind(self.first[self.vectors.at(block * self.lanes)])

    def serial(self, extent: int | Expr) -> AbstractContextManager[Expr]:
        """A loop; none where there is one turn."""
        if isinstance(extent, int):
            return nullcontext(self.const(0)) if extent == 1 else T.serial(self.const(extent))
        return T.serial(extent)

    def divide(self, value: Expr, by: int) -> tuple[Expr, Expr]:
        """Quotient and remainder."""
        if by == 1:
            return value, self.const(0)
        return T.Bind(value // self.const(by)), T.Bind(value % self.const(by))

    def tasks(self, batch: int | Expr, each: int | Expr) -> AbstractContextManager[Expr]:
        """The loop over `each` independent tasks an image, over threads where that is worth a launch."""
        known = batch if isinstance(batch, int) else 1
        worth = known * self.spec.multiply_adds >= PARALLEL_VECTORS * self.lanes
        one = isinstance(batch, int) and isinstance(each, int) and batch * each == 1
        if self.threads > 1 and worth and not one:
            return T.parallel(self.whole(batch) * self.whole(each))
        return self.serial(batch * each)


def taps_inside(first: int, count: int, stride: int, offset: int, size: int) -> tuple[int, int]:
    """The range of outputs o in [0, count) with 0 <= (first + o)·stride + offset < size; as (low, high)."""
    inside = [o for o in range(count) if 0 <= (first + o) * stride + offset < size]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def split_evenly(total: int, parts: int) -> list[int]:
    """`total` as `parts` whole numbers that differ by at most one, larger ones first."""
    low, more = divmod(total, parts)
    return [low + 1] * more + [low] * (parts - more)


def axis(weight: Any, dimension: int, size: int) -> Any:
    """`weight` with zeros behind `dimension` up to `size`."""
    import numpy as np

    widths = [(0, 0)] * weight.ndim
    widths[dimension] = (0, size - weight.shape[dimension])
    return np.pad(weight, widths)
