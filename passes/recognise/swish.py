"""The pass `recognise-swish`: x · sigmoid(a x) -> Swish."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from .. import graph
from ..base import Contract
from .matching import (
    Found,
    Recogniser,
    Refused,
    climb,
    close,
    linear_sources,
    only_user,
    polynomial,
    same,
    scalar,
)

LAST = 24  # from opset 25 on onnxruntime 1.32 can use neither a kernel nor the body of Swish


@dataclass(frozen=True)
class RecogniseSwish(Recogniser):
    """A value times its own sigmoid (SiLU, Swish) becomes Swish (opset 24).

        s = Sigmoid (X)                            ->    Y = Swish (X)
        Y = Mul (X, s)

        a = Mul (X, 1.702)
        s = Sigmoid (a)                            ->    Y = Swish <alpha = 1.702> (X)
        Y = Mul (s, X)

    Also X / (1 + exp(-X)). A model of an older opset is brought to 24. onnxruntime 1.32 has no kernel for Swish: at
    opset 24 it runs the standard's body, which is the two operators that were there, and above 24 it refuses it.
    Left alone: a sigmoid that gates another value, models above opset 24, and sites one of whose inner values is
    used elsewhere or is an output.

    Source: Ramachandran, Zoph and Le, "Searching for Activation Functions", arXiv 1710.05941.
    """

    name: ClassVar[str] = "recognise-swish"
    contract: ClassVar[Contract] = Contract.ROUNDING
    opset: ClassVar[int] = 24

    def rule(self, node: ir.Node) -> str:
        return "swish"

    def find(self, node: ir.Node, scope: graph.Scope) -> Found | None:
        if graph.is_op(node, "Sigmoid"):
            found = _gated(node)
        elif graph.is_op(node, "Exp"):
            found = _quotient(node)
        else:
            return None
        if found is not None and scope.opset > LAST:
            raise Refused(f"opset {scope.opset} is above {LAST}, where onnxruntime has no kernel for Swish")
        return found


def _gated(node: ir.Node) -> Found | None:
    inner = node.inputs[0]
    if inner is None:
        return None
    for step in climb(node.outputs[0]):
        if step.factor is None:
            continue
        for x in linear_sources(step.factor):
            slope, factor = polynomial(inner, x), polynomial(step.factor, x)
            if slope is None or factor is None or set(slope) != {1} or step.offset:
                continue
            if close(step.scale * factor.get(1, 0.0), 1.0, x.dtype):
                return _found(x, slope[1], step.last)
        raise Refused(f"it multiplies {step.factor.name}, which is not its own input")
    if any(graph.is_op(user, "Mul") and inner in user.inputs for user, _ in node.outputs[0].uses()):
        only_user(node.outputs[0])  # says why not
    return None


def _quotient(node: ir.Node) -> Found | None:
    """x / (1 + exp(-a·x))"""
    inner = node.inputs[0]
    for step in climb(node.outputs[0]):
        if step.factor is not None or step.scale != 1.0 or step.offset != 1.0:
            continue
        total = step.last.outputs[0]
        following = only_user(total)
        if not graph.is_op(following, "Div") or not same(following.inputs[1], total):
            return None
        x = following.inputs[0]
        if x is None or scalar(x) is not None:
            return None
        slope = polynomial(inner, x)
        if slope is None or set(slope) != {1}:
            return None
        return _found(x, -slope[1], following)
    return None


def _found(x: ir.Value, alpha: float, last: ir.Node) -> Found:
    output = last.outputs[0]
    attributes = {} if close(alpha, 1.0, x.dtype) else {"alpha": alpha}
    return Found(
        "swish", last, (x,), lambda writer: writer.op("Swish", x, dtype=output.dtype, shape=output.shape, **attributes)
    )
