"""The pass `recognise-hard-swish`: x · clip(x + 3, 0, 6) / 6 -> HardSwish, without the x HardSigmoid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import onnx_ir as ir

from .. import graph
from ..base import Contract
from .matching import (
    Found,
    Recogniser,
    Refused,
    Step,
    climb,
    close,
    linear_sources,
    made_by,
    operands,
    polynomial,
    scalar,
)


@dataclass(frozen=True)
class RecogniseHardSwish(Recogniser):
    """Hard swish and hard sigmoid written out become HardSwish and HardSigmoid.

        a = Add (X, 3)
        b = Clip (a, 0, 6)                         ->    Y = HardSwish (X)
        c = Mul (X, b)
        Y = Div (c, 6)

        a = Add (X, 3)
        b = Clip (a, 0, 6)                         ->    Y = HardSigmoid <alpha = 0.1666667, beta = 0.5> (X)
        Y = Div (b, 6)

        s = HardSigmoid <alpha = 0.1666667, beta = 0.5> (X)
        Y = Mul (X, s)                             ->    Y = HardSwish (X)

    The order of factors does not matter, nor whether the clip is a Clip, Min of Max or Max of Min. A model older than
    opset 14 is brought to it.
    Left alone: other bounds and slopes, a hard sigmoid that gates another value, and sites one of whose inner values
    is used elsewhere or is an output.

    Source: Howard et al., "Searching for MobileNetV3", arXiv 1905.02244.
    """

    name: ClassVar[str] = "recognise-hard-swish"
    contract: ClassVar[Contract] = Contract.ROUNDING
    opset: ClassVar[int] = 14

    def rule(self, node: ir.Node) -> str:
        return "hard-swish"

    def find(self, node: ir.Node, scope: graph.Scope) -> Found | None:
        line = _line(node, scope)
        if line is None:
            return None
        swish, sigmoid, refused = None, None, None
        for step in climb(node.outputs[0]):
            if step.factor is not None:
                swish = swish or _swish(line, step)
                refused = refused or f"it multiplies {step.factor.name}, which is not its own input, or not by 1/6"
            elif sigmoid is None and graph.is_op(node, "Clip", "Min", "Max"):
                sigmoid = _sigmoid(line, step)
        found = swish or sigmoid
        if found is None and refused is not None and close(line.high, 6.0, None):
            raise Refused(refused)
        return found


class Line(NamedTuple):
    """min(max(`inner`·slope + offset, 0), `high`): a HardSigmoid has slope, offset and the bound 1."""

    inner: ir.Value
    slope: float
    offset: float
    high: float


def _line(node: ir.Node, scope: graph.Scope) -> Line | None:
    if graph.has_references(node):
        return None
    if graph.is_op(node, "HardSigmoid") and node.inputs[0] is not None:
        slope, offset = graph.attribute(node, "alpha", 0.2), graph.attribute(node, "beta", 0.5)
        return Line(node.inputs[0], slope, offset, 1.0)
    clamped = _clamped(node, scope)
    if clamped is None or clamped[1] != 0.0 or not clamped[2] > 0.0:
        return None
    return Line(clamped[0], 1.0, 0.0, clamped[2])


def _clamped(node: ir.Node, scope: graph.Scope) -> tuple[ir.Value, float, float] | None:
    """(x, low, high) of a Clip, Min(Max(x, low), high) or Max(Min(x, high), low)."""
    if graph.is_op(node, "Clip"):
        x = node.inputs[0]
        if scope.opset < 11:
            low, high = graph.attribute(node, "min"), graph.attribute(node, "max")
        else:
            low, high = (scalar(graph.input_of(node, i)) for i in (1, 2))
        return None if x is None or low is None or high is None else (x, low, high)
    if not graph.is_op(node, "Min", "Max"):
        return None
    for inner, outer_bound in operands(node):
        other = made_by(inner, "Max" if node.op_type == "Min" else "Min", "Relu")
        bound = scalar(outer_bound, inner)
        if other is None or bound is None:
            continue
        if other.op_type == "Relu" and other.inputs[0] is not None and node.op_type == "Min":
            return other.inputs[0], 0.0, bound
        for x, inner_bound in operands(other):
            second = scalar(inner_bound, x)
            if second is not None and scalar(x) is None:
                return (x, second, bound) if node.op_type == "Min" else (x, bound, second)
    return None


def _swish(line: Line, step: Step) -> Found | None:
    assert step.factor is not None
    for x in linear_sources(step.factor):
        inner, factor = polynomial(line.inner, x), polynomial(step.factor, x)
        if inner is None or factor is None or not set(inner) <= {0, 1} or step.offset:
            continue
        slope, offset = line.slope * inner.get(1, 0.0), line.slope * inner.get(0, 0.0) + line.offset
        times = step.scale * factor.get(1, 0.0) * line.high
        numbers = (times, 1.0), (slope / line.high, 1 / 6), (offset / line.high, 0.5)
        if all(close(a, b, x.dtype) for a, b in numbers):
            return _found("hard-swish", "HardSwish", x, step.last)
    return None


def _sigmoid(line: Line, step: Step) -> Found | None:
    """Of a clip whose input is a line with an offset, and which is divided by its bound."""
    if step.offset or not close(step.scale * line.high, 1.0, line.inner.dtype):
        return None
    for x in _sources(line.inner):
        inner = polynomial(line.inner, x)
        if inner is not None and set(inner) == {0, 1} and inner[0] and inner[1]:
            alpha, beta = inner[1] / line.high, inner[0] / line.high
            return _found("hard-sigmoid", "HardSigmoid", x, step.last, alpha=alpha, beta=beta)
    return None


def _sources(value: ir.Value) -> list[ir.Value]:
    """What an Add or Sub of a number reads, and what that is a multiple of."""
    node = made_by(value, "Add", "Sub")
    return (
        []
        if node is None
        else [x for given in node.inputs if scalar(given) is None for x in linear_sources(given)][::-1]
    )


def _found(rule: str, op_type: str, x: ir.Value, last: ir.Node, **attributes: float) -> Found:
    output = last.outputs[0]
    return Found(
        rule, last, (x,), lambda writer: writer.op(op_type, x, dtype=output.dtype, shape=output.shape, **attributes)
    )
