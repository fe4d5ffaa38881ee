"""`graphwright.LinearAttention`: attention whose cost grows with the keys and not with queries times keys.

Every key and query has 2 d features, of the row x itself and of -x, with b_j what the mask adds to key j:

    A_ij = sum over f of exp(q_if + k_jf + b_j) = e^b_j · sum over d elements of 2 cosh(q_i + k_j);   A_i / sum_j A_ij

and Y = A V. As A is a product of features of queries with features of keys, Y = E_q (E_k' V) / (E_q E_k' 1), and the
(2 d, e) matrix E_k' V is all that a query sees of the keys. With m_f the greatest k_jf + b_j of all keys, E_k has
exp(k_jf + b_j - m_f) and E_q exp(q_if + m_f - max over f), which is the same quotient; no element exceeds 1 and no
sum is below 1, so nothing overflows and no row is 0 / 0.

Inputs: Q (batch, heads, queries, d), K (batch, heads, keys, d), V (batch, heads, keys, e), and a mask of float numbers
that broadcasts to (batch, heads, 1, keys): at or below `HIDDEN` the key is not seen, everything else is added as b. The
scale of the scores is in Q and K already. A row that sees no key is 0.

Sources: Katharopoulos et al., "Transformers are RNNs", arXiv 2006.16236 (attention as a product of features); Zhang et
al., "The Hedgehog & the Porcupine", arXiv 2402.04347 (these features).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import DOMAIN, Case, CustomOp

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

NAME, VERSION = "LinearAttention", 1
HIDDEN = -1e4  # a mask at or below this hides a key

# absent: what a hidden key's features have instead of numbers; nobody: a maximum that only hidden keys are below.
_BODY = """
    last = Constant <value = int64[1] {-1}> ()
    nothing = Constant <value_float = 0.0> ()
    hidden = Constant <value_float = -10000.0> ()
    absent = Constant <value_float = -1e38> ()
    nobody = Constant <value_float = -1e37> ()
    smallest = Constant <value_float = 1.1754944e-38> ()
    q = Cast <to = 1> (Q)
    k = Cast <to = 1> (K)
    v = Cast <to = 1> (V)
    numbers = Cast <to = 1> (mask)
    shown = Greater (numbers, hidden)
    bias = Where (shown, numbers, nothing)
    k_across = Transpose <perm = [0, 1, 3, 2]> (k)
    k_negative = Neg (k_across)
    k_both = Concat <axis = 2> (k_across, k_negative)
    k_biased = Add (k_both, bias)
    k_seen = Where (shown, k_biased, absent)
    k_greatest = ReduceMax <keepdims = 1> (k_seen, last)
    k_top = Max (k_greatest, nobody)
    k_below = Sub (k_seen, k_top)
    k_features = Exp (k_below)
    k_sum = ReduceSum <keepdims = 1> (k_features, last)
    k_values = MatMul (k_features, v)
    q_negative = Neg (q)
    q_both = Concat <axis = -1> (q, q_negative)
    k_top_across = Transpose <perm = [0, 1, 3, 2]> (k_top)
    q_shifted = Add (q_both, k_top_across)
    q_top = ReduceMax <keepdims = 1> (q_shifted, last)
    q_below = Sub (q_shifted, q_top)
    q_features = Exp (q_below)
    product = MatMul (q_features, k_values)
    total = MatMul (q_features, k_sum)
    total_or_more = Max (total, smallest)
    quotient = Div (product, total_or_more)
    Y = CastLike (quotient, Q)
"""


def _function(opset: int) -> ir.Function:
    import onnx_ir as ir
    from onnx import parser

    text = f'<domain: "{DOMAIN}", opset_import: ["": {opset}]>\n{NAME} (Q, K, V, mask) => (Y) {{{_BODY}}}'
    return ir.serde.deserialize_function(parser.parse_function(text))


def linear_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The oracle, float64: A as a matrix of queries and keys."""
    import numpy as np

    q, k, v, mask = (x.astype(np.float64) for x in (q, k, v, mask))
    seen = np.broadcast_to(mask > HIDDEN, (*q.shape[:2], 1, k.shape[2]))
    s = q[:, :, :, None] + k[:, :, None]  # (batch, heads, queries, keys, d)
    log_a = np.logaddexp(s, -s)
    top = log_a.max(-1, initial=0, keepdims=True)
    log_a = (np.log(np.exp(log_a - top).sum(-1, keepdims=True)) + top)[..., 0] + np.where(mask > HIDDEN, mask, 0)
    highest = np.where(seen, log_a, -np.inf).max(-1, keepdims=True, initial=-1e300)
    a = np.where(seen, np.exp(np.where(seen, log_a - highest, 0)), 0)
    total = a.sum(-1, keepdims=True)
    return a @ v / np.where(total == 0, 1, total)


def _case(b: int, h: int, rows: int, columns: int, d: int, e: int, note: str) -> Case:
    return Case(((b, h, rows, d), (b, h, columns, d), (b, h, columns, e), (1, 1, 1, columns)), note=note)


LINEAR_ATTENTION = CustomOp(
    name=NAME,
    version=VERSION,
    body=_function,
    reference=linear_attention,
    cases=(
        _case(1, 1, 1, 1, 4, 4, "one key"),
        _case(1, 2, 1, 9, 1, 1, "heads of one element"),
        _case(1, 2, 5, 15, 8, 4, "one below a vector of 16, other queries than keys, values of another size"),
        _case(2, 3, 16, 16, 16, 16, "one vector of 16"),
        _case(1, 2, 17, 17, 32, 32, "one above a vector of 16"),
        _case(0, 2, 3, 3, 8, 8, "no batch"),
        _case(1, 1, 0, 3, 8, 8, "no queries"),
    ),
    opset=18,
)
