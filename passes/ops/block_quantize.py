"""`graphwright.BlockQuantize`: x as it is after a quantization to 8 bits whose scales follow x.

Of each `block` elements along the last axis, scale = max |x| / 127 and y = scale · round(x / scale), halves to even.
The last axis is whole blocks. A block with an infinite element or a NaN is NaN.

It stands in front of products with weights of a few bits, which then multiply whole numbers: y / scale by the codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import DOMAIN, Case, CustomOp

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

NAME, VERSION = "BlockQuantize", 1
OPSET = 18  # the first whose ReduceMax takes its axes as an input
STEPS = 127
SMALLEST = 1e-30  # a block whose elements are all below counts as one with this as its greatest

_BODY = f"""
    first = Constant <value = int64[1] {{{{0}}}}> ()
    last = Constant <value = int64[1] {{{{-1}}}}> ()
    smallest = Constant <value_float = {SMALLEST}> ()
    steps = Constant <value_float = {STEPS}.0> ()
    size = Constant <value_int: int = @block> ()
    shape = Shape (x)
    before = Shape <end = -1> (x)
    length = Shape <start = -1> (x)
    width = Unsqueeze (size, first)
    count = Div (length, width)
    parts = Concat <axis = 0> (before, count, width)
    numbers = Cast <to = 1> (x)
    blocks = Reshape <allowzero = 1> (numbers, parts)
    sizes = Abs (blocks)
    greatest = ReduceMax <keepdims = 1> (sizes, last)
    raised = Max (greatest, smallest)
    scale = Div (raised, steps)
    quotients = Div (blocks, scale)
    whole = Round (quotients)
    rounded = Mul (whole, scale)
    flat = Reshape <allowzero = 1> (rounded, shape)
    y = CastLike (flat, x)
""".replace("{{", "{").replace("}}", "}")


def _function(opset: int) -> ir.Function:
    import onnx_ir as ir
    from onnx import parser

    text = f'<domain: "{DOMAIN}", opset_import: ["": {opset}]>\n{NAME} <block> (x) => (y) {{{_BODY}}}'
    return ir.serde.deserialize_function(parser.parse_function(text))


def block_quantize(x: np.ndarray, block: int) -> np.ndarray:
    """The oracle; scales and quotients are those of float32, which decide how halves are rounded."""
    import numpy as np

    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1 if x.size else x.shape[-1] // block, block)
    with np.errstate(invalid="ignore"):
        scale = np.maximum(np.abs(blocks).max(-1, keepdims=True), np.float32(SMALLEST)) / np.float32(STEPS)
        return (np.rint(blocks / scale).astype(np.float64) * scale).reshape(x.shape)


BLOCK_QUANTIZE = CustomOp(
    name=NAME,
    version=VERSION,
    body=_function,
    reference=block_quantize,
    cases=(
        Case(((1, 8),), {"block": 8}, "one block"),
        Case(((3, 64),), {"block": 32}, "two blocks"),
        Case(((2, 3, 60),), {"block": 20}, "a block that is no whole number of vectors"),
        Case(((5, 1),), {"block": 1}, "blocks of one element"),
        Case(((0, 64),), {"block": 32}, "no rows"),
        Case(((2, 4096),), {"block": 128}, "a wide row"),
    ),
    opset=OPSET,
)
