"""Convolution of tensors with blocked channels: the choice among the templates, and a kernel that adds a bias.

direct: any size, dense or with groups that fill whole vectors (`conv_direct`).
depthwise: one input channel for each output channel, or groups that lie in a vector (`conv_depthwise`).
winograd: 3x3 of stride 1 with fewer multiplications (`winograd`).
All have forms for images whose sizes are known only at run time (`conv_free`, `winograd_free`).

float32, 8-bit numbers with sums in int32 (`dots`), which the first two take, and bfloat16, which the first does.
Weights of 16 bits are widened in registers by the direct form, and when they are packed by the others. Layouts are in
`conv_spec`. `emit` writes the loops and hands each finished vector to the caller, who stores it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ...passes.base import Caches
from ..target import InstructionSet
from . import conv_depthwise, conv_direct, conv_free, winograd, winograd_free
from .conv_spec import ConvSpec, ConvTile, Emission, Finish, Sizes
from .dots import BITS, INTEGERS, LONGEST, Dot, dot_of
from .vectors import Buffer, Expr, Vectors

SYMBOL = "conv"
WINOGRAD_GAIN = 1.15  # estimated, from which on the Winograd form is taken
OPAQUE = 8  # Relax's operator pattern of a function that nothing is fused into
TEMPLATES = {"direct": conv_direct, "depthwise": conv_depthwise, "winograd": winograd}
FREE = {"direct": conv_free, "depthwise": conv_free, "winograd": winograd_free}  # loops for sizes of the run


def supported(spec: ConvSpec, isa: InstructionSet) -> str | None:
    """None, or why no template takes this convolution."""
    lanes = Vectors(isa).lanes
    sizes = (*spec.in_size, *spec.out_size, *spec.kernel, *spec.strides, *spec.dilations)
    if min(sizes) < 1 or min(spec.in_channels, spec.out_channels, spec.groups) < 1:
        return f"a size below one in {spec}"
    depth = spec.taps * spec.in_channels // spec.groups
    if spec.data in INTEGERS and depth > LONGEST:
        return f"sums of {depth} products of 8-bit numbers may exceed int32"
    if spec.data == BITS and spec.in_vectors(lanes):
        return f"groups of {spec.each} input channels have no pairs of bfloat16"
    if spec.free and not conv_free.supported(spec, lanes):
        return "sizes that are known only at run time"
    if spec.groups == 1:
        return None
    if spec.in_channels % spec.groups or spec.out_channels % spec.groups:
        return f"{spec.groups} groups do not divide {spec.in_channels} and {spec.out_channels} channels"
    if not spec.blocked_input:
        return f"{spec.groups} groups of a plain input"
    if spec.in_vectors(lanes):
        return None
    each = (spec.each, spec.out_channels // spec.groups)
    if each[0] % lanes or each[1] % lanes:
        return f"groups of {each[0]} to {each[1]} channels do not fill vectors of {lanes}"
    return None


def choose_algorithm(spec: ConvSpec, isa: InstructionSet, caches: Caches) -> tuple[str, str]:
    """(algorithm, why), the reason usable in a report."""
    if spec.in_vectors(Vectors(isa).lanes):
        return "depthwise", f"groups of {spec.each} input channels lie in a vector"
    if spec.data != "float32":
        return "direct", "8-bit numbers" if spec.data in INTEGERS else "bfloat16"
    if refusal := winograd.refusal(spec):
        return "direct", refusal
    one = replace(spec, batch=1, free=False)
    direct = conv_direct.tiling(one, isa).cycles + _memory(9, spec)
    fewer = winograd.plan(one, isa, caches, 1).cycles + _memory(winograd.POSITIONS, spec)
    gain = direct / fewer
    if gain < WINOGRAD_GAIN:
        return "direct", f"Winograd's form would take an estimated {1 / gain:.2f} of the time"
    return "winograd", f"estimated {gain:.2f} times as fast as the direct form"


def choose_tile(spec: ConvSpec, isa: InstructionSet, caches: Caches) -> ConvTile:
    """The algorithm that should be the fastest; the rest is left to its rules."""
    return ConvTile(choose_algorithm(spec, isa, caches)[0])


def _memory(taps: int, spec: ConvSpec) -> float:
    """Cycles until the weights have come from memory, half of them hidden behind arithmetic."""
    return 4 * taps * spec.in_channels * spec.out_channels / 12


def pack_weights(weight: np.ndarray, spec: ConvSpec, isa: InstructionSet, tile: ConvTile) -> np.ndarray:
    """(O, I / groups, kernel height, kernel width) weights as the kernel of that tile reads them, on one axis."""
    expected = (spec.out_channels, spec.in_channels // spec.groups, *spec.kernel)
    if weight.shape != expected:
        raise ValueError(f"weights of shape {weight.shape}, expected {expected}")
    return TEMPLATES[tile.algorithm].pack(weight, spec, isa, tile)


def reads(spec: ConvSpec, tile: ConvTile) -> str:
    """The type that the kernel of that tile widens its weights of float32 from: their own, or float32 itself."""
    return spec.stored if tile.algorithm == "direct" else "float32"


def dot_for(vectors: Vectors, spec: ConvSpec, tile: ConvTile) -> Dot:
    """What the kernel of that tile reads its weights with."""
    return dot_of(vectors, spec.data, reads(spec, tile), spec.joined)


def emit(
    vectors: Vectors,
    spec: ConvSpec,
    tile: ConvTile,
    x: Buffer,
    w: Buffer,
    finish: Finish,
    threads: int,
    index: str,
    caches: Caches | None = None,
    first: Buffer | None = None,
    sizes: Sizes | None = None,
) -> None:
    """Emit the convolution of flat buffers `x` and `w` into the IR builder that is open.

    w: from `pack_weights` with the same tile. first: what sums start at, of 8-bit numbers `first_sums`. index: integer
    type of offsets, wide enough for all of them. threads: what the kernel may count on. sizes: of a free spec's images.
    """
    dot = dot_for(vectors, spec, tile)
    emission = Emission(vectors, spec, x, w, finish, threads, index, dot, first, sizes)
    templates = FREE if spec.free else TEMPLATES
    templates[tile.algorithm].emit(emission, tile, caches or Caches())


def conv(
    spec: ConvSpec,
    isa: InstructionSet,
    threads: int = 1,
    tile: ConvTile | None = None,
    name: str | None = None,
    caches: Caches | None = None,
) -> tirx.PrimFunc:
    """A kernel (x, w, bias, y) -> None: y = convolution + bias, blocked.

    x (N, an image's elements), w from `pack_weights`, bias (ceil(O/L)·L,), y (N, ceil(O/L)·H·W·L). All are float32, w
    uint16 where it has 16 bits; of 8-bit x, w is int8, bias from `first_sums` and int32, y int32.
    """
    if reason := supported(spec, isa):
        raise ValueError(reason)
    vectors, caches = Vectors(isa), caches or Caches()
    tile = tile or choose_tile(spec, isa, caches)
    lanes, (height, width) = vectors.lanes, spec.out_size
    blocks = spec.out_blocks(lanes)
    shape = (spec.out_channels, spec.in_channels // spec.groups, *spec.kernel)
    dot = dot_for(vectors, spec, tile)
    packed = pack_weights(np.zeros(shape, dot.dtype), spec, isa, tile)
    count = packed.size
    sizes = (spec.image(lanes), blocks * height * width * lanes)
    small = spec.batch is not None and max(count, spec.batch * max(sizes)) < 1 << 30
    index = "int32" if small else "int64"
    with IRBuilder() as builder, T.prim_func(is_private=name is None, s_tir=True):
        T.func_name(name or SYMBOL)
        T.func_attr({"tirx.noalias": True, "op_pattern": OPAQUE, "tirx.is_scheduled": True})
        n = tirx.Var("n", index) if spec.batch is None else tirx.const(spec.batch, index)
        shapes = [(n, sizes[0]), (count,), (blocks * lanes,), (n, sizes[1])]
        x, w, bias, y = (
            T.match_buffer(T.arg(label, T.handle()), size, dtype)
            for label, size, dtype in zip(
                ("x", "w", "bias", "y"), shapes, (spec.data, str(packed.dtype), dot.sums, dot.sums), strict=True
            )
        )
        x = T.decl_buffer((n * tirx.const(sizes[0], index),), spec.data, data=x.data)
        y = T.decl_buffer((n * tirx.const(sizes[1], index),), dot.sums, data=y.data)
        whole = spec.data in INTEGERS

        def finish(value: Expr, place: Sequence[Expr]) -> None:
            image, block, row, column = place
            at = ((image * blocks + block) * height + row) * width + column
            vectors.store(y, at * lanes, value if whole else value + bias[vectors.at(block * lanes)])

        with T.sblock("root"), vectors.prelude():
            emit(vectors, spec, tile, x, w, finish, threads, index, caches, bias if whole else None)
    return builder.get()


__all__ = [
    "ConvSpec", "ConvTile", "Finish", "Sizes", "choose_algorithm", "choose_tile", "conv", "emit", "pack_weights",
    "supported",
]  # fmt: skip
