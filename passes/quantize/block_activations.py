"""The pass `block-activations`: what meets weights in blocks of a few bits is rounded to whole numbers too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from .. import graph
from ..base import Contract, Pass, PassContext, PassReport
from ..ops import BLOCK_QUANTIZE, NESTED_MAT_MUL

RULE = "data"
LEAST, MOST = 8, 1024  # elements of a block: fewer cost more than they save, and one scale does not suit more
NARROW = (ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT2, ir.DataType.UINT2)


@dataclass(frozen=True)
class BlockActivations(Pass):
    """Data of products with 4-bit weights in blocks becomes whole numbers, block by block, while the model runs.

        W = DequantizeLinear <block_size = 32> (codes, scales)    ->    X8 = graphwright.BlockQuantize <block = 32> (X)
        Y = MatMul (X, W)                                               Y = MatMul (X8, W)

    BlockQuantize rounds each block of X to 255 steps, by a scale that follows X, so nothing is calibrated. Its body is
    standard ONNX. Compiled kernels multiply the codes of a few rows by these whole numbers, in integers. Run it behind
    dynaquant:weights=4:activations=none or nested-widths, or on a file that comes with such weights.
    Left alone: weights of 8 bits, blocks of fewer than 8 or more than 1024, data of another type than float32, products
    inside bodies of If, Loop, Scan and functions.

    Source: as in llama.cpp, whose products of 4-bit weights round data to Q8_0 blocks.
    """

    name: ClassVar[str] = "block-activations"
    contract: ClassVar[Contract] = Contract.LOSSY

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        report = self.report()
        made: dict[tuple[ir.Value, int], ir.Value] = {}
        names = graph.Names(model)
        for node in list(model.graph):
            block = _block(node)
            if block is None:
                continue
            x = node.inputs[0]
            assert x is not None
            if (reason := _refusal(node, x, block)) is not None:
                report.skipped(RULE, graph.site(node), reason)
                continue
            source = x.producer()
            if source is not None and (source.domain, source.op_type) == BLOCK_QUANTIZE.identifier:
                report.skipped(RULE, graph.site(node), "its data is rounded already")
                continue
            if (x, block) not in made:
                BLOCK_QUANTIZE.add_to(model)
                quantize = ir.Node(
                    BLOCK_QUANTIZE.domain, BLOCK_QUANTIZE.name, [x], [ir.AttrInt64("block", block)],
                    name=names.fresh(f"{x.name}_blocks"),
                )  # fmt: skip
                (y,) = quantize.outputs
                y.name, y.type, y.shape = names.fresh(f"{x.name}_rounded"), x.type, x.shape
                model.graph.insert_before(node, quantize)
                made[x, block] = y
            node.replace_input_with(0, made[x, block])
            report.changed(RULE, graph.site(node), f"blocks of {block}")
        return report


def _block(node: ir.Node) -> int | None:
    """The size of the blocks of a product's weight along its depth; None for other nodes."""
    if (node.domain, node.op_type) == NESTED_MAT_MUL.identifier:
        return int(graph.attribute(node, "block", 0)) or None
    if not graph.is_op(node, "MatMul", "Gemm") or node.inputs[0] is None:
        return None
    weight, transposed = graph.input_of(node, 1), bool(graph.attribute(node, "transB", 0))
    made = None if weight is None else weight.producer()
    while graph.is_op(made, "Transpose"):
        assert made is not None
        transposed = not transposed
        source = graph.input_of(made, 0)
        made = None if source is None else source.producer()
    if made is None or not graph.is_op(made, "DequantizeLinear"):
        return None
    codes, block = graph.input_of(made, 0), graph.attribute(made, "block_size", 0)
    if codes is None or codes.dtype not in NARROW or codes.const_value is None or codes.shape is None:
        return None
    axis = graph.attribute(made, "axis", 1) % len(codes.shape)
    return int(block) if block and len(codes.shape) == 2 and axis == int(transposed) else None


def _refusal(node: ir.Node, x: ir.Value, block: int) -> str | None:
    if x.dtype != ir.DataType.FLOAT:
        return "the type of its data is not known to be float32; run infer-shapes first"
    if graph.attribute(node, "transA", 0):
        return "its data is transposed"
    if not LEAST <= block <= MOST:
        return f"blocks of {block} elements; expected {LEAST} to {MOST}"
    inner = None if x.shape is None or not len(x.shape) else x.shape[-1]
    if not isinstance(inner, int):
        return "the depth of its data is not known; run infer-shapes first"
    return f"{inner} is not a whole number of blocks of {block}" if inner % block else None
