"""The custom domain: operators that the standard has no word for, each with a body of standard operators.

One file per operator; `OPERATORS` is the table of all of them. The body makes every operator run everywhere;
kernels are attached from outside, in `graphwright.runtime.kernels`.
"""

from __future__ import annotations

from .base import DOMAIN, CustomOp
from .block_quantize import BLOCK_QUANTIZE
from .linear_attention import LINEAR_ATTENTION
from .masked_softmax import (
    MASKED_SOFTMAX,
    SCALED_SOFTMAX,
    SELECTED_SOFTMAX,
    TEMPERED_MASKED_SOFTMAX,
    TEMPERED_SELECTED_SOFTMAX,
    TEMPERED_SOFTMAX,
)
from .nested_mat_mul import NESTED_MAT_MUL
from .softplus_attention import REWEIGHTED_SOFTPLUS_ATTENTION, SOFTPLUS_ATTENTION
from .stable_max import STABLE_MAX
from .two_pass_softmax import TWO_PASS_SOFTMAX

OPERATORS: dict[tuple[str, str], CustomOp] = {
    op.identifier: op
    for op in (
        TWO_PASS_SOFTMAX, SCALED_SOFTMAX, MASKED_SOFTMAX, SELECTED_SOFTMAX, TEMPERED_SOFTMAX,
        TEMPERED_MASKED_SOFTMAX, TEMPERED_SELECTED_SOFTMAX, SOFTPLUS_ATTENTION,
        REWEIGHTED_SOFTPLUS_ATTENTION, LINEAR_ATTENTION, STABLE_MAX, BLOCK_QUANTIZE, NESTED_MAT_MUL,
    )
}  # fmt: skip

__all__ = [
    "BLOCK_QUANTIZE", "DOMAIN", "LINEAR_ATTENTION", "MASKED_SOFTMAX", "NESTED_MAT_MUL", "OPERATORS",
    "REWEIGHTED_SOFTPLUS_ATTENTION", "SCALED_SOFTMAX", "SELECTED_SOFTMAX", "SOFTPLUS_ATTENTION", "STABLE_MAX",
    "TEMPERED_MASKED_SOFTMAX", "TEMPERED_SELECTED_SOFTMAX", "TEMPERED_SOFTMAX", "TWO_PASS_SOFTMAX", "CustomOp",
]  # fmt: skip
