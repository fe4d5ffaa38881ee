"""The pass `recognise-softmax`: exponentials over their sum -> Softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from .. import graph
from ..base import Contract
from .matching import Found, Recogniser, Refused, made_by, only_user, operands, reduced_axes, same

WITHOUT_MAXIMUM = "it takes no maximum: equal where the sum of its exponentials is finite and not lost to 0"


@dataclass(frozen=True)
class RecogniseSoftmax(Recogniser):
    """Exponentials divided by their sum become Softmax (opset 13).

        m = ReduceMax <axes = [-1]> (X)
        d = Sub (X, m)
        e = Exp (d)                                ->    Y = Softmax <axis = -1> (X)
        s = ReduceSum (e, last)
        Y = Div (e, s)

    Also along any one axis, as Mul by the reciprocal, and without the maximum. Without it the two are equal where the
    sum of the exponentials neither overflows nor is lost: in float32 while the greatest x of a row is from -87 to 88
    less the logarithm of the row's length; the report says so. Beyond, the chain gives NaN, or 0 beside an infinite x,
    and Softmax the right numbers, or NaN beside an infinite x. A model of an older opset is brought to 13.
    Left alone: sums over several axes or that do not keep their axis, and chains whose exponentials or sum are used
    elsewhere or are outputs.
    """

    name: ClassVar[str] = "recognise-softmax"
    contract: ClassVar[Contract] = Contract.ROUNDING
    opset: ClassVar[int] = 13

    def rule(self, node: ir.Node) -> str:
        return "softmax"

    def find(self, node: ir.Node, scope: graph.Scope) -> Found | None:
        exp = made_by(node.inputs[0], "Exp") if graph.is_op(node, "ReduceSum") and node.inputs else None
        e = node.inputs[0] if exp is not None else None
        if exp is None or e is None or graph.has_references(node):
            return None
        last = _quotient(node, e)
        if last is None:
            return None
        dims = graph.rank(e) or graph.rank(exp.inputs[0]) or graph.rank(last.outputs[0])
        axes = reduced_axes(node, dims)
        if axes is None or len(axes) != 1:
            raise Refused("the sum is not over one known axis; run infer-shapes and fold-constants first")
        if not graph.attribute(node, "keepdims", 1):
            raise Refused("the sum does not keep its axis (keepdims = 0)")
        x = _without_maximum(exp.inputs[0], axes, dims)
        if x is None:
            return None
        output = last.outputs[0]
        return Found(
            "softmax",
            last,
            (x,),
            lambda writer: writer.op("Softmax", x, axis=axes[0], dtype=output.dtype, shape=output.shape),
            condition=WITHOUT_MAXIMUM if x is exp.inputs[0] else "",
        )


def _quotient(total: ir.Node, e: ir.Value) -> ir.Node | None:
    """What divides the exponentials by their sum."""
    last = only_user(total.outputs[0]) if len(total.outputs[0].uses()) == 1 else None
    if graph.is_op(last, "Div") and last is not None:
        return last if same(last.inputs[0], e) and same(last.inputs[1], total.outputs[0]) else None
    if not graph.is_op(last, "Reciprocal") or last is None:
        return None
    product = only_user(last.outputs[0])
    inverse = last.outputs[0]
    if graph.is_op(product, "Mul") and any(same(a, e) and same(b, inverse) for a, b in operands(product)):
        return product
    return None


def _without_maximum(value: ir.Value | None, axes: tuple[int, ...], dims: int | None) -> ir.Value | None:
    """x, when the value is x less its maximum over the axes; else the value."""
    difference = made_by(value, "Sub")
    maximum = made_by(difference.inputs[1], "ReduceMax") if difference is not None else None
    if difference is None or maximum is None or not same(maximum.inputs[0], difference.inputs[0]):
        return value
    if reduced_axes(maximum, dims) != axes or not graph.attribute(maximum, "keepdims", 1):
        return value
    return difference.inputs[0]
