"""Anchors of products and convolutions of 8-bit numbers, whose results are sums in int32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import relax, tirx

from ..blocked import blocked_shape
from ..elements import expression, size_of
from ..elements import product as product_of
from ..target import Target
from ..templates import anchor
from . import conv as kernels
from .conv_spec import ConvSpec
from .convolutions import Pack, chosen_tile, dims_of, one_column, tuples, turned
from .dots import LONGEST, IntegerDot, first_sums, joined_steps
from .gemm_spec import GemmSpec, pack
from .products import chosen_tile as product_tile
from .vectors import Vectors

PLAN = "conv-steps"  # the template's name in an anchor whose layout is still to be decided


@dataclass(frozen=True)
class Window:
    """How a convolution moves over its input, by spatial axis. pads: those before it."""

    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    groups: int


def product(
    bb: relax.BlockBuilder, x: Any, weight: np.ndarray, bias: np.ndarray, zero: int, target: Target
) -> Any | None:
    """The sums of (x - zero) * weight + bias, int32 (..., M, N); None where they have no template.

    x: uint8 or int8 (..., M, K). weight: int8 (K, N). bias: (N,).
    """
    inner, columns = weight.shape
    if not isinstance(x.ty.shape, relax.ShapeExpr) or inner > LONGEST:
        return None
    dims = [size_of(d) for d in x.ty.shape.values]
    if 0 in (*dims, columns) or dims[-1] != inner:
        return None
    rows, v = product_of(dims[:-1]), Vectors(target.isa)
    data = str(x.ty.dtype.dtype)
    joined = joined_steps(weight, 0, target.isa)
    spec = GemmSpec(rows if isinstance(rows, int) else None, inner, columns, data=data, zero=zero, joined=joined)
    tile = product_tile(spec, target)
    packed = pack(weight, tile, v.lanes, IntegerDot(v, data, joined).group)
    first = first_sums(weight.sum(axis=0, dtype=np.int64), bias, data, zero, target.isa, v.lanes, joined)
    out = relax.TensorType([expression(d) for d in (*dims[:-1], columns)], "int32")
    flops = 2 * inner * columns * math.prod(d for d in dims[:-1] if isinstance(d, int))
    inputs = [x, relax.const(packed, "int8"), relax.const(first, "int32")]
    return anchor(bb, "gemm", {"spec": vars(spec), "tile": vars(tile)}, inputs, out, flops)


def convolution(
    bb: relax.BlockBuilder, x: Any, weight: np.ndarray, bias: np.ndarray, window: Window, places: Sequence[Any],
    zero: int, target: Target,
) -> Any | None:  # fmt: skip
    """The sums of a convolution of x - zero, plus bias, int32 (N, O, places); None where it has no template.

    x: uint8 or int8 (N, C, ...) over one or two spatial axes. weight: int8 (O, C / groups, ...). bias: (O,). `planned`
    decides later how images lie.
    """
    seen = described(x, weight, window, places, zero)
    if seen is None:
        return None
    spec, weight, swapped = seen
    if not spec.in_vectors(Vectors(target.isa).lanes):
        spec = replace(spec, joined=joined_steps(weight, 1, target.isa))
    if kernels.supported(spec, target.isa) is not None:
        return None
    sums = weight.sum(axis=(1, 2, 3), dtype=np.int64)
    first = first_sums(sums, bias, spec.data, zero, target.isa, Vectors(target.isa).lanes, spec.joined)
    inputs = [x, relax.const(np.ascontiguousarray(weight), "int8"), relax.const(first, "int32")]
    return unplanned(bb, spec, swapped, inputs, places, "int32")


def described(
    x: Any, weight: np.ndarray, window: Window, places: Sequence[Any], zero: int = 0
) -> tuple[ConvSpec, np.ndarray, bool] | None:
    """A convolution of data in another type than float32, its weights over two axes, and whether rows are columns in
    both; None where it is none over one or two axes of known sizes."""
    dims, rank = dims_of(x.ty), len(window.strides)
    if dims is None or rank not in (1, 2) or not all(isinstance(d, int) and d > 0 for d in (*dims[1:], *places)):
        return None
    if 0 in dims:
        return None
    if rank == 1:
        weight = weight[:, :, None, :]

    def pair(values: Sequence[int], fill: int) -> tuple[int, int]:
        return (fill, values[0]) if rank == 1 else (values[0], values[1])

    fields = {
        "batch": dims[0] if isinstance(dims[0], int) else 1, "in_channels": dims[1], "out_channels": len(weight),
        "in_size": pair(dims[2:], 1), "out_size": pair(places, 1), "kernel": weight.shape[2:],
        "strides": pair(window.strides, 1), "dilations": pair(window.dilations, 1), "pads": pair(window.pads, 0),
        "groups": window.groups, "blocked_input": dims[1] > 4 or window.groups > 1, "data": str(x.ty.dtype.dtype),
        "zero": zero,
    }  # fmt: skip
    if rank == 2 and one_column(fields):
        # Kernels work along rows. Columns of one place lie in memory as a row does.
        return ConvSpec(**turned(fields)), weight.swapaxes(2, 3), True
    return ConvSpec(**fields), weight, False


def unplanned(
    bb: relax.BlockBuilder, spec: ConvSpec, swapped: bool, inputs: Sequence[Any], places: Sequence[Any], sums: str
) -> Any:
    """A convolution as `planned` takes it. inputs: x, weights, what sums start at, if anything. sums: their type."""
    sizes = [inputs[0].ty.shape.values[0], spec.out_channels, *places]
    out = relax.TensorType([tirx.const(d, "int64") if isinstance(d, int) else d for d in sizes], sums)
    flops = 2 * spec.multiply_adds * (spec.batch or 1)
    return anchor(bb, PLAN, {"spec": vars(spec), "swapped": swapped}, inputs, out, flops)


def planned(
    bb: relax.BlockBuilder, parameters: dict[str, Any], arguments: Sequence[Any], kind: Any, blocked: Any | None,
    into_blocks: Pack, target: Target, packed: dict[Any, Any],
) -> Any:  # fmt: skip
    """An anchor of `unplanned` as a template over blocks of channels, in blocks. blocked: the input in blocks, if it
    is; kind: of the plain result."""
    x, weight, *first = arguments
    fields = tuples(parameters["spec"])
    spec = ConvSpec(**{**fields, "blocked_input": fields["blocked_input"] or blocked is not None})
    tile = chosen_tile(spec, target)
    key = (weight, spec, tile)
    if key not in packed:
        array = kernels.pack_weights(weight.value.numpy(), spec, target.isa, tile)
        packed[key] = relax.const(array, str(array.dtype))
    source = into_blocks(x) if spec.blocked_input else x
    dims = dims_of(kind)
    assert dims is not None, "the sizes of an image are known"
    out = relax.TensorType(blocked_shape(dims, Vectors(target.isa).lanes), kind.dtype)
    flops = 2 * spec.multiply_adds * (spec.batch or 1)
    given = {"spec": vars(spec), "tile": vars(tile), "swapped": parameters["swapped"]}
    return anchor(bb, "conv", given, [source, packed[key], *first], out, flops)

