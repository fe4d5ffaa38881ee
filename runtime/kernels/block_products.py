"""Products with weights in blocks, as a template; and what quantizes their other operand as they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import relax, tirx
from tvm.tirx.script import builder as T

from ...passes.ops.block_quantize import BLOCK_QUANTIZE
from ..elements import expression, product, size_of
from ..importing.site import ByBody
from ..lowering import lowers
from ..target import InstructionSet, Target
from ..templates import Body, anchor, template
from .block_steps import steps_of_block
from .gemm_blocks import BlockSpec, FewRows, ManyRows, Weights, integer_form, pack
from .gemm_spec import GemmSpec, GemmTile, choose_tile, tiles
from .products import row_store, rows_of
from .rows import count_of, each_row, flat_kernel, number_of, sweep
from .vectors import Vectors

FEW = 4  # rows up to which codes are unpacked in registers
SYMBOL = "block_quantize"
QUANTIZED = "graphwright.block_quantize"  # attribute of that function: elements of a block


@dataclass(frozen=True)
class BlockWeight:
    """A constant matrix (K, N) as codes: (code - zero) * scale, a scale and zero point for `block` rows of a column.

    codes: uint8 (K, N), below 2^bits. scales: float32 (blocks, N). zeros: uint8 in its shape, None where all are
    2^(bits - 1).
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    block: int
    bits: int


def panel_tile(rows: int | None, columns: int, panel: int, isa: InstructionSet) -> GemmTile:
    """The best tile that is as wide as a panel of so many vectors."""
    return next(t for t in tiles(rows, columns, isa, Vectors(isa).lanes) if t.vectors == panel)


@template("block-product")
def block_product(parameters: dict[str, Any], body: Body) -> None:
    """A (..., M, K) by a matrix of blocks. parameters: the fields of BlockSpec, and the vectors of a panel."""
    spec, panel = BlockSpec(**parameters["spec"]), parameters["panel"]
    a, words, scales, *zeros = body.inputs
    weights = Weights(spec, words, scales, zeros[0] if zeros else None)
    rows, finish = rows_of(body), row_store(body)
    v, target = body.vectors, body.target
    if spec.rows is not None and spec.rows <= FEW:
        FewRows(v, spec, panel, a, weights, finish, target.cores, body.index).emit()
        return
    product_spec = GemmSpec(spec.rows, spec.inner, spec.columns)
    tile = panel_tile(spec.rows, spec.columns, panel, target.isa)
    fields = (v, product_spec, tile, rows, spec.inner, 1, a, None, finish, target.cores, target.caches, body.index)
    ManyRows(weights, *fields).emit()


def block_matmul(
    bb: relax.BlockBuilder, a: Any, weight: BlockWeight, target: Target, quantized: Any | None = None
) -> Any | None:
    """a (..., K) times the weight; None where it has no kernel. quantized: what `a` was before BlockQuantize, with the
    size of the blocks, where that is so."""
    inner, columns = weight.codes.shape
    dims = [size_of(d) for d in a.ty.shape.values]
    if str(a.ty.dtype.dtype) != "float32" or len(dims) < 2 or 0 in (*dims, columns):
        return None
    rows = product(dims[:-1])
    known = rows if isinstance(rows, int) else None
    spec, a = product_spec(known, a, weight, target, quantized)
    lanes = Vectors(target.isa).lanes
    panel = choose_tile(None, columns, target.isa, lanes).vectors
    packed = pack(weight.codes, weight.scales.astype(spec.scales), weight.zeros, spec, panel * lanes)
    inputs = [a, relax.const(packed.words), relax.const(packed.scales)]
    if packed.zeros is not None:
        inputs.append(relax.const(packed.zeros))
    out = relax.TensorType([expression(d) for d in (*dims[:-1], columns)], "float32")
    flops = 2 * inner * columns * (known or 1)
    return anchor(bb, "block-product", {"spec": vars(spec), "panel": panel}, inputs, out, flops)


def product_spec(
    rows: int | None, a: Any, weight: BlockWeight, target: Target, quantized: Any | None
) -> tuple[BlockSpec, Any]:
    """How a product is computed, and the left side that it reads: where blocks of both sides are the same, and there
    are few rows, that before BlockQuantize, since the product quantizes by itself."""
    inner, columns = weight.codes.shape
    integer = False
    if quantized is not None and rows is not None and rows <= FEW and weight.bits <= 4 and integer_form(target.isa):
        x, block = quantized
        integer = block == weight.block
        a = x if integer else a
    spec = BlockSpec(rows, inner, columns, weight.block, weight.bits, weight.zeros is not None, integer=integer)
    half = weight.scales.astype(np.float16)
    if (half.astype(np.float32) == weight.scales).all() and target.isa.half:
        spec = replace(spec, scales="float16")
    return spec, a


@lowers(BLOCK_QUANTIZE.identifier, kinds=("llvm",))
def lower(bb: relax.BlockBuilder, inputs: list[Any], attrs: dict[str, Any], target: Target) -> Any:
    """Every block of the last axis rounded to 255 steps. Raises ByBody for another type than float32."""
    (x,) = inputs
    if x.ty.dtype.dtype != "float32" or not isinstance(x.ty.shape, relax.ShapeExpr):
        raise ByBody("it is not a tensor of float32 of known rank")
    dims = list(x.ty.shape.values)
    block = int(attrs["block"])
    sizes = [int(d) if isinstance(d, tirx.IntImm) else f"n{i}" for i, d in enumerate(dims)]
    if not isinstance(sizes[-1], int) or sizes[-1] % block:
        raise ByBody("its last axis is not known to be whole blocks")
    kernel = bb.add_func(_quantize(sizes, block, target).with_attr(QUANTIZED, block), SYMBOL)
    return relax.call_tir(kernel, [x], relax.TensorType(dims, "float32"))


def _quantize(sizes: Sequence[int | str], block: int, target: Target) -> tirx.PrimFunc:
    def write(v: Vectors, flat: dict[str, Any], size: Any, index: str) -> None:
        blocks = [*sizes[:-1], sizes[-1] // block]  # type: ignore[operator]
        count = number_of(blocks, size)

        def one(row: Any) -> None:
            start, length = T.Bind(row * tirx.const(block, index)), tirx.const(block, index)

            def keep(at: Any, numbers: Any, left: Any) -> None:
                v.store(flat["y"], at, T.Bind(T.Cast(v.dtype, numbers)), left)

            scale = T.Bind(v.splat(steps_of_block(v, flat["x"], start, length, index, keep)))
            sweep(v, block, 1, start, index, lambda at, part: widen(at[0], part, scale))

        def widen(at: Any, part: int | Any, scale: Any) -> None:
            count = count_of(part, index)
            v.store(flat["y"], at, T.Bind(v.load(flat["y"], at, count) * scale), count)

        each_row(count, count * block, target.cores, index, one)

    tensors = {"x": (sizes, "float32"), "y": (sizes, "float32")}
    return flat_kernel(SYMBOL, tensors, target.isa, write)
