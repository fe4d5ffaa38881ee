"""`graphwright.SoftplusAttention` (LSSA) and `graphwright.ReweightedSoftplusAttention` (LSSAR).

For each head, with q̂ and k̂ the rows of Q and K scaled to length 1, d the head size and N_i the keys that row i sees:

    LSSA    A_ij = softplus(log d · log N_i · q̂_i·k̂_j + b_ij) where i sees j, else 0;   A_i / sum_j A_ij
    LSSAR   W_ij = max(A_ij · N_i - O_i, 0)^p,   O_i = 1, or 0 where N_i <= 3;           W_i / sum_j W_ij

and Y = A V or W V. The mean of A_ij · N_i over the keys is 1, so only keys above the average stay.
A row is divided by its maximum before the power, which cancels and cannot overflow; a row whose keys are all equal
becomes their mean.

Inputs: Q (batch, heads, queries, d), K (batch, heads, keys, d), V (batch, heads, keys, e), and a mask of float numbers
that broadcasts to (batch, heads, queries, keys): at or below `HIDDEN` the key is not seen, all else is added as b.
causal: 0 sees all keys, 1 keys j <= i, 2 keys j <= i + keys - queries. A row that sees no key is 0.

Source: Gao and Spratling, "Softplus Attention with Re-weighting", arXiv 2501.13428.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .base import DOMAIN, Case, CustomOp

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

LSSA, LSSAR, VERSION = "SoftplusAttention", "ReweightedSoftplusAttention", 1
HIDDEN = -1e4  # a mask at or below this hides a key
FEW = 3  # rows that see at most so many keys keep them all
NO, START, END = 0, 1, 2  # values of `causal`
SMALLEST = 1.1754944e-38  # the smallest normal float32
SHORTEST = 1e-12  # a row of Q or K that is shorter is not made longer

_WEIGHTS = """
    last = Constant <value = int64[1] {-1}> ()
    first = Constant <value = int64[1] {0}> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    nothing = Constant <value_float = 0.0> ()
    once = Constant <value_float = 1.0> ()
    smallest = Constant <value_float = 1.1754944e-38> ()
    shortest = Constant <value_float = 1e-12> ()
    hidden = Constant <value_float = -10000.0> ()
    q = Cast <to = 1> (Q)
    k = Cast <to = 1> (K)
    v = Cast <to = 1> (V)
    q_norm = ReduceL2 <keepdims = 1> (q, last)
    k_norm = ReduceL2 <keepdims = 1> (k, last)
    q_size = Max (q_norm, shortest)
    k_size = Max (k_norm, shortest)
    q_hat = Div (q, q_size)
    k_hat = Div (k, k_size)
    k_across = Transpose <perm = [0, 1, 3, 2]> (k_hat)
    cosine = MatMul (q_hat, k_across)
    rows = Shape <start = 2, end = 3> (Q)
    columns = Shape <start = 2, end = 3> (K)
    row_count = Squeeze (rows, first)
    column_count = Squeeze (columns, first)
    i = Range (zero, row_count, one)
    j = Range (zero, column_count, one)
    i_down = Unsqueeze (i, last)
    ahead = Sub (j, i_down)
    later = Sub (columns, rows)
    limits = Concat <axis = 0> (columns, first, later)
    kind = Constant <value_int: int = @causal> ()
    limit = Gather (limits, kind)
    past = LessOrEqual (ahead, limit)
    numbers = Cast <to = 1> (mask)
    shown = Greater (numbers, hidden)
    seen = And (past, shown)
    bias = Where (shown, numbers, nothing)
    ones = Cast <to = 1> (seen)
    count = ReduceSum <keepdims = 1> (ones, last)
    some = Max (count, once)
    log_n = Log (some)
    size = Shape <start = 3, end = 4> (Q)
    d = Cast <to = 1> (size)
    log_d = Log (d)
    scale = Mul (log_n, log_d)
    scaled = Mul (cosine, scale)
    scores = Add (scaled, bias)
    soft = Softplus (scores)
    a = Where (seen, soft, nothing)
    a_sum = ReduceSum <keepdims = 1> (a, last)
    a_total = Max (a_sum, smallest)
    shares = Div (a, a_total)
"""
_PLAIN = """
    product = MatMul (shares, v)
    Y = CastLike (product, Q)
"""
_REWEIGHTED = """
    few = Constant <value_float = 3.0> ()
    relative = Mul (shares, some)
    keeps_all = LessOrEqual (count, few)
    offset = Where (keeps_all, nothing, once)
    above = Sub (relative, offset)
    kept = Max (above, nothing)
    top = ReduceMax <keepdims = 1> (kept, last)
    level = LessOrEqual (top, nothing)
    top_total = Max (top, smallest)
    ratio = Div (kept, top_total)
    base = Where (level, ones, ratio)
    exponent = Constant <value_int: int = @power> ()
    exponent_float = Cast <to = 1> (exponent)
    w = Pow (base, exponent_float)
    w_sum = ReduceSum <keepdims = 1> (w, last)
    w_total = Max (w_sum, smallest)
    w_shares = Div (w, w_total)
    product = MatMul (w_shares, v)
    Y = CastLike (product, Q)
"""


def _function(name: str, attributes: str, body: str, opset: int) -> ir.Function:
    import onnx_ir as ir
    from onnx import parser

    text = f'<domain: "{DOMAIN}", opset_import: ["": {opset}]>\n{name} <{attributes}> (Q, K, V, mask) => (Y) {{{body}}}'
    return ir.serde.deserialize_function(parser.parse_function(text))


def _shares(q: np.ndarray, k: np.ndarray, mask: np.ndarray, causal: int) -> tuple[np.ndarray, np.ndarray]:
    """(the weights of LSSA, which keys each row sees), float64 and bool (batch, heads, queries, keys)."""
    import numpy as np

    q, k, mask = (x.astype(np.float64) for x in (q, k, mask))
    d, rows, columns = q.shape[-1], q.shape[2], k.shape[2]
    limit = {NO: columns, START: 0, END: columns - rows}[causal]
    past = np.arange(columns)[None, :] - np.arange(rows)[:, None] <= limit
    seen = np.broadcast_to(past & (mask > HIDDEN), (*q.shape[:2], rows, columns))
    n = np.maximum(seen.sum(-1, keepdims=True), 1)
    q_hat, k_hat = (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), SHORTEST) for x in (q, k))
    s = np.log(d) * np.log(n) * (q_hat @ k_hat.swapaxes(-1, -2)) + np.where(mask > HIDDEN, mask, 0)
    a = np.where(seen, np.maximum(s, 0) + np.log1p(np.exp(-np.abs(s))), 0)
    return a / np.maximum(a.sum(-1, keepdims=True), SMALLEST), seen


def lssa(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, causal: int = NO) -> np.ndarray:
    """The oracle of SoftplusAttention, float64."""
    return _shares(q, k, mask, causal)[0] @ v.astype("float64")


def lssar(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, causal: int = NO, power: int = 3
) -> np.ndarray:
    """The oracle of ReweightedSoftplusAttention, float64."""
    import numpy as np

    a, seen = _shares(q, k, mask, causal)
    count = seen.sum(-1, keepdims=True)
    kept = np.maximum(a * np.maximum(count, 1) - np.where(count <= FEW, 0, 1), 0)
    top = kept.max(-1, keepdims=True, initial=0)
    w = np.where(top <= 0, seen, kept / np.maximum(top, SMALLEST)) ** power
    return w / np.maximum(w.sum(-1, keepdims=True), SMALLEST) @ v.astype(np.float64)


def _cases(attributes: Mapping[str, Any]) -> tuple[Case, ...]:
    def case(b: int, h: int, rows: int, columns: int, d: int, e: int, note: str, **more: Any) -> Case:
        shapes = ((b, h, rows, d), (b, h, columns, d), (b, h, columns, e), (1, 1, 1, columns))
        return Case(shapes, {**attributes, "causal": NO, **more}, note)

    return (
        case(1, 1, 1, 1, 4, 4, "one key"),
        case(1, 2, 3, 3, 8, 8, "few keys, which are all kept"),
        case(1, 2, 5, 15, 8, 4, "one below a vector of 16, other queries than keys, values of another size"),
        case(2, 3, 16, 16, 16, 16, "one vector of 16, causal", causal=START),
        case(1, 2, 17, 17, 32, 32, "one above a vector of 16, causal", causal=START),
        case(1, 2, 3, 20, 8, 8, "three new keys behind seventeen", causal=END),
        case(1, 1, 20, 3, 8, 8, "more queries than keys: the first see none", causal=END),
        case(0, 2, 3, 3, 8, 8, "no batch"),
        case(1, 1, 0, 3, 8, 8, "no queries"),
    )


SOFTPLUS_ATTENTION = CustomOp(
    name=LSSA,
    version=VERSION,
    body=lambda opset: _function(LSSA, "causal", _WEIGHTS + _PLAIN, opset),
    reference=lssa,
    cases=_cases({}),
    opset=18,
)
REWEIGHTED_SOFTPLUS_ATTENTION = CustomOp(
    name=LSSAR,
    version=VERSION,
    body=lambda opset: _function(LSSAR, "causal, power", _WEIGHTS + _REWEIGHTED, opset),
    reference=lssar,
    cases=(
        *_cases({"power": 3}),
        *(Case(c.shapes, {**c.attributes, "power": 15}, f"{c.note}; power 15") for c in _cases({})[2:5]),
    ),
    opset=18,
)
