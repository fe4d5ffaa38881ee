"""Kernels of custom operators: which Relax expression stands for which operator on which kind of target.

    @lowers(("graphwright", "TwoPassSoftmax"), kinds=("llvm",))
    def two_pass_softmax(bb, inputs, attrs, target):
        return ...

An operator without a lowering for a target is imported through its ONNX function body instead.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import tvm
    from tvm import relax

    from .target import Target

Lowering: TypeAlias = "Callable[[relax.BlockBuilder, list[tvm.ir.Expr], dict[str, Any], Target], tvm.ir.Expr]"

# (domain, operator) -> the module that registers its lowerings, imported when it is first asked for.
MODULES: dict[tuple[str, str], str] = {
    ("graphwright", "TwoPassSoftmax"): "graphwright.runtime.kernels.two_pass_softmax",
    **{
        ("graphwright", name): "graphwright.runtime.kernels.masked_softmax"
        for name in (
            "ScaledSoftmax", "MaskedSoftmax", "SelectedSoftmax", "TemperedSoftmax", "TemperedMaskedSoftmax",
            "TemperedSelectedSoftmax",
        )
    },
    ("graphwright", "BlockQuantize"): "graphwright.runtime.kernels.block_products",
    ("graphwright", "NestedMatMul"): "graphwright.runtime.kernels.nested_products",
    ("graphwright", "SoftplusAttention"): "graphwright.runtime.kernels.softplus_attention",
    ("graphwright", "ReweightedSoftplusAttention"): "graphwright.runtime.kernels.softplus_attention",
}

_lowerings: dict[tuple[str, str, str], Lowering] = {}


def lowers(op: tuple[str, str], kinds: Sequence[str]) -> Callable[[Lowering], Lowering]:
    """Register a lowering of `op`, a pair (domain, name), for target kinds such as "llvm" or "cuda".

    The function gets the block builder, the inputs (None where an optional one is left out), the attributes as
    Python values and the target; it returns the output, or a Relax tuple of the outputs. It raises ByBody for a form
    that the operator's body is for.
    """

    def register(function: Lowering) -> Lowering:
        for kind in kinds:
            _lowerings[(*op, kind)] = function
        return function

    return register


def lowering_for(domain: str, op_type: str, kind: str) -> Lowering | None:
    """The lowering of an operator on a kind of target; None when its function body is to be used."""
    module = MODULES.get((domain, op_type))
    if module is not None:
        importlib.import_module(module)
    return _lowerings.get((domain, op_type, kind))
