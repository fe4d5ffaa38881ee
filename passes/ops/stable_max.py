"""`graphwright.StableMax`: shares of a row that need no exponential.

    s(x) = x + 1 where x >= 0, else 1 / (1 - x);   p_i = s(x_i) / sum_j s(x_j)

s grows with x, so that p is in the order of x as softmax is; it grows with x and not with e^x, so p is far flatter.
Every operation rounds, and rounding keeps an order or makes equal: p_i <= p_j where x_i <= x_j, and equal where the two
are less than about 2^-22 (1 + |x|) apart. s(-inf) is 0; a row whose sum overflows, as beside an infinite x, is 0 where
x is finite and NaN where it is infinite, and one of nothing but -inf is NaN.

Source: Prieto et al., "Grokking at the Edge of Numerical Stability", arXiv 2501.04697.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import DOMAIN, Case, CustomOp

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

NAME, VERSION = "StableMax", 1
OPSET = 15  # the first that has CastLike

# below: x where it is negative, so that 1 - below is never 0, in a gradient neither.
_BODY = """
    first = Constant <value = int64[1] {0}> ()
    zero = Constant <value_float = 0.0> ()
    one = Constant <value_float = 1.0> ()
    along = Constant <value_int: int = @axis> ()
    axes = Unsqueeze (along, first)
    numbers = Cast <to = 1> (x)
    above = Add (numbers, one)
    below = Min (numbers, zero)
    distance = Sub (one, below)
    inverse = Div (one, distance)
    positive = GreaterOrEqual (numbers, zero)
    s = Where (positive, above, inverse)
    total = ReduceSum <keepdims = 1> (s, axes)
    shares = Div (s, total)
    y = CastLike (shares, x)
"""


def _function(opset: int) -> ir.Function:
    import onnx_ir as ir
    from onnx import parser

    text = f'<domain: "{DOMAIN}", opset_import: ["": {opset}]>\n{NAME} <axis> (x) => (y) {{{_BODY}}}'
    return ir.serde.deserialize_function(parser.parse_function(text))


def stable_max(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """The oracle, float64."""
    import numpy as np

    x = x.astype(np.float64)
    with np.errstate(invalid="ignore"):
        s = np.where(x >= 0, x + 1, 1 / (1 - np.minimum(x, 0)))
        return s / s.sum(axis=axis, keepdims=True)


STABLE_MAX = CustomOp(
    name=NAME,
    version=VERSION,
    body=_function,
    reference=stable_max,
    cases=(
        Case(((1, 1),), {"axis": -1}, "one element"),
        Case(((3, 15),), {"axis": -1}, "one below a vector of 16"),
        Case(((2, 3, 16),), {"axis": 2}, "one vector of 16, the axis from the front"),
        Case(((2, 17, 3),), {"axis": 1}, "one above a vector of 16, not the last axis"),
        Case(((0, 8),), {"axis": -1}, "no rows"),
        Case(((2, 4097),), {"axis": -1}, "a wide head"),
    ),
    opset=OPSET,
)
