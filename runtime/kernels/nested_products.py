"""`graphwright.NestedMatMul` as a template."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax, tirx
from tvm.tirx.script import builder as T

from ...passes.ops.nested_mat_mul import NARROW, NESTED_MAT_MUL
from ..elements import expression, product, size_of
from ..importing.block_weights import before_blocks
from ..importing.site import ByBody, constant_of, dtype_of
from ..lowering import lowers
from ..target import Target
from ..templates import Body, anchor, template
from .block_products import FEW, BlockWeight, block_matmul, panel_tile, product_spec
from .gemm_blocks import BlockSpec, Weights, pack, pack_words
from .gemm_spec import GemmSpec, choose_tile
from .nested_blocks import NestedFewRows, NestedManyRows
from .products import row_store, rows_of
from .vectors import Vectors

BITS = 4  # of each part
MIDDLE = 1 << (BITS - 1)


@template("nested-product")
def nested_product(parameters: dict[str, Any], body: Body) -> None:
    """A (..., M, K) by a matrix of blocks in two parts. parameters: the fields of BlockSpec, the vectors of a panel,
    how many steps of the second part are one of the first, and the place of the width among those of all layers, which
    are the last input; None where it is the wide one."""
    spec, panel, choice = BlockSpec(**parameters["spec"]), parameters["panel"], parameters["choice"]
    a, words, rest, scales, *others = body.inputs
    zeros = others.pop(0) if spec.zeros else None
    both = Weights(spec, words, scales, zeros), Weights(spec, rest, scales, None, 1 / parameters["ratio"])
    wide = None
    if choice is not None:
        wide = T.Bind(others.pop(0)[tirx.const(choice, body.index)] != tirx.const(NARROW, "int64"))
    rows, finish = rows_of(body), row_store(body)
    v, target = body.vectors, body.target
    if spec.rows is not None and spec.rows <= FEW:
        common = (v, spec, panel, a, both[0], finish, target.cores, body.index)
        NestedFewRows(*common, rest=both[1], wide=wide).emit()
        return
    sizes = GemmSpec(spec.rows, spec.inner, spec.columns)
    tile = panel_tile(spec.rows, spec.columns, panel, target.isa)
    fields = (v, sizes, tile, rows, spec.inner, 1, a, None, finish, target.cores, target.caches, body.index)
    NestedManyRows(*both, wide, *fields).emit()


@lowers(NESTED_MAT_MUL.identifier, kinds=("llvm",))
def lower(bb: relax.BlockBuilder, inputs: list[Any], attrs: dict[str, Any], target: Target) -> Any:
    """A product that reads what its width asks for. Raises ByBody for other types than float32 and for weights that
    are not constant."""
    a, widths, *weights = inputs
    codes, scale, zero, rest = (constant_of(weight) for weight in weights)
    if codes is None or scale is None or zero is None or rest is None:
        raise ByBody("its weights are not constant")
    if dtype_of(a) != "float32" or scale.dtype != np.float32 or not isinstance(a.ty.shape, relax.ShapeExpr):
        raise ByBody("it is not of float32 and of known rank")
    block, choice = int(attrs["block"]), int(attrs["choice"])
    inner, columns = codes.shape
    dims = [size_of(d) for d in a.ty.shape.values]
    if len(dims) < 2 or 0 in (*dims, columns) or block % (32 // BITS):
        raise ByBody("it has no kernel for such sizes")
    plain = bool((zero == MIDDLE).all())
    weight = BlockWeight(codes, scale, None if plain else zero, block, BITS)
    known = constant_of(widths)
    quantized = before_blocks(bb, a)
    if known is not None and known[choice] == NARROW:
        narrow = block_matmul(bb, a, weight, target, quantized)
        if narrow is None:
            raise ByBody("it has no kernel for such sizes")
        return narrow
    rows = product(dims[:-1])
    spec, a = product_spec(rows if isinstance(rows, int) else None, a, weight, target, quantized)
    lanes = Vectors(target.isa).lanes
    panel = choose_tile(None, columns, target.isa, lanes).vectors
    packed = pack(codes, scale.astype(spec.scales), weight.zeros, spec, panel * lanes)
    raised = (rest.astype(np.int8) + MIDDLE).astype(np.uint8)
    second = pack_words(raised, spec, panel * lanes)
    given = [a, relax.const(packed.words), relax.const(second), relax.const(packed.scales)]
    if packed.zeros is not None:
        given.append(relax.const(packed.zeros))
    if known is None:
        given.append(widths)
    parameters = {
        "spec": vars(spec), "panel": panel, "ratio": float(attrs["ratio"]), "choice": choice if known is None else None
    }  # fmt: skip
    out = relax.TensorType([expression(d) for d in (*dims[:-1], columns)], "float32")
    flops = 2 * inner * columns * (rows if isinstance(rows, int) else 1)
    return anchor(bb, "nested-product", parameters, given, out, flops)
