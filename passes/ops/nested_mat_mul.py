"""`graphwright.NestedMatMul`: x times a constant matrix that is stored once and read at one of two widths.

    coarse = scale · (codes - zero)              4 bits of a weight
    fine   = scale / ratio · rest                4 bits more: what the codes leave of it
    y = x · coarse            where widths[choice] is 0
    y = x · (coarse + fine)   else

codes, rest: 4-bit numbers (K, N). scale: (K / block, N); zero: 4-bit numbers in its shape. widths: int64 (layers,), the
widths of all layers, of which this one's is at `choice`. With a ratio of 16 both together are a code of 8 bits and
`codes` its leading half; with 8 neighbouring codes reach over each other by half, so that `codes` need not be the
nearest one and may be rounded together with others of its row.
Source: nested widths as in arXiv 2508.09176.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import DOMAIN, Case, CustomOp

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

NAME, VERSION = "NestedMatMul", 1
OPSET = 21  # the first with 4-bit numbers in blocks
NARROW, WIDE = 0, 1  # what an element of `widths` is
BITS = {NARROW: 4, WIDE: 8}  # that are read of a weight

_BODY = """
    coarse = DequantizeLinear <axis = 0, block_size: int = @block> (codes, scale, zero)
    ratio = Constant <value_float: float = @ratio> ()
    step = Div (scale, ratio)
    choice = Constant <value_int: int = @choice> ()
    width = Gather (widths, choice)
    wide = Cast <to = 9> (width)
    weight = If (wide) <
        then_branch = both () => (sum) {
            fine = DequantizeLinear <axis = 0, block_size: int = @block> (rest, step)
            sum = Add (coarse, fine)
        },
        else_branch = leading () => (same) { same = Identity (coarse) }
    >
    y = MatMul (x, weight)
"""


def _function(opset: int) -> ir.Function:
    import onnx_ir as ir
    from onnx import parser

    text = (
        f'<domain: "{DOMAIN}", opset_import: ["": {opset}]>\n'
        f"{NAME} <block, ratio, choice> (x, widths, codes, scale, zero, rest) => (y) {{{_BODY}}}"
    )
    return ir.serde.deserialize_function(parser.parse_function(text))


def nested_mat_mul(
    x: np.ndarray, widths: np.ndarray, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, rest: np.ndarray, *,
    block: int, ratio: float, choice: int,
) -> np.ndarray:  # fmt: skip
    """The oracle, in float64."""
    import numpy as np

    scale, zero = (np.repeat(a.astype(np.float64), block, 0)[: len(codes)] for a in (scale, zero))
    weight = scale * (codes.astype(np.float64) - zero)
    if widths[choice] != NARROW:
        weight = weight + scale / ratio * rest.astype(np.float64)
    return x.astype(np.float64) @ weight


def _case(
    rows: tuple[int, ...], inner: int, columns: int, block: int, choice: int, note: str, ratio: float = 8
) -> Case:  # fmt: skip
    blocks = (-(-inner // block), columns)
    matrix = (inner, columns)
    kinds = {1: "int64", 2: "uint4", 4: "uint4", 5: "int4"}
    shapes = ((*rows, inner), (2,), matrix, blocks, blocks, matrix)
    return Case(shapes, {"block": block, "ratio": float(ratio), "choice": choice}, note, kinds=kinds)


NESTED_MAT_MUL = CustomOp(
    name=NAME,
    version=VERSION,
    body=_function,
    reference=nested_mat_mul,
    cases=(
        _case((1,), 32, 16, 32, 0, "one row, one block, the wide layer"),
        _case((1,), 64, 17, 32, 1, "one column above a vector, the narrow layer"),
        _case((2, 3), 64, 33, 16, 0, "several rows in two axes", ratio=16),
        _case((5,), 48, 1, 16, 0, "one column"),
        _case((0,), 32, 8, 32, 0, "no rows"),
    ),
    opset=OPSET,
)
