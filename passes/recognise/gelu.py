"""The pass `recognise-gelu`: x · (1 + erf(x / sqrt 2)) / 2 and its tanh approximation -> Gelu."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from .. import graph
from ..base import Contract
from .matching import (
    Found,
    Polynomial,
    Recogniser,
    Refused,
    Writer,
    climb,
    close,
    is_polynomial,
    linear_sources,
    only_user,
    polynomial,
)

ROOT = math.sqrt(2 / math.pi)
INNER: dict[str, Polynomial] = {"Erf": {1: math.sqrt(0.5)}, "Tanh": {1: ROOT, 3: 0.044715 * ROOT}}


@dataclass(frozen=True)
class RecogniseGelu(Recogniser):
    """GELU written out in small operators becomes Gelu (opset 20), exact or approximated with tanh.

        a = Div (X, 1.4142135)
        b = Erf (a)
        c = Add (b, 1)                             ->    Y = Gelu (X)
        d = Mul (X, c)
        Y = Mul (d, 0.5)

        a = Pow (X, 3)
        b = Mul (a, 0.044715)
        c = Add (X, b)
        d = Mul (c, 0.7978846)                     ->    Y = Gelu <approximate = "tanh"> (X)
        e = Tanh (d)
        f = Add (e, 1)
        g = Mul (X, f)
        Y = Mul (g, 0.5)

    Formulas are compared as polynomials, so the order of factors and terms does not matter, nor where the half is
    or whether a cube is Pow or Mul. A model of an older opset is brought to 20.
    Left alone: other constants (x · sigmoid(1.702 x) is what recognise-swish takes), and sites one of whose inner
    values is used elsewhere or is an output.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv 1606.08415.
    """

    name: ClassVar[str] = "recognise-gelu"
    contract: ClassVar[Contract] = Contract.ROUNDING
    opset: ClassVar[int] = 20

    def rule(self, node: ir.Node) -> str:
        return "gelu" if node.op_type == "Erf" else "gelu-tanh"

    def find(self, node: ir.Node, scope: graph.Scope) -> Found | None:
        if not graph.is_op(node, "Erf", "Tanh"):
            return None
        inner, wanted = node.inputs[0], INNER[node.op_type]
        if inner is None or (node.op_type == "Tanh" and not _is_cubic(inner)):
            return None
        reason = "nothing of the form x · (1 + f(x)) follows"
        end = node.outputs[0]
        for step in climb(end):
            end = step.last.outputs[0]
            if step.factor is None:
                continue
            for x in linear_sources(step.factor):
                factor = polynomial(step.factor, x)
                if factor is None or not is_polynomial(polynomial(inner, x), wanted, x.dtype):
                    continue
                scale, offset = step.scale * factor.get(1, 0.0), step.offset * factor.get(1, 0.0)
                if close(scale, 0.5, x.dtype) and close(offset, 0.5, x.dtype):
                    return self._found(node, step.last, x)
                reason = f"x is multiplied by {offset:g} + {scale:g} · {node.op_type.lower()}, not by halves"
            if reason.startswith("nothing"):
                reason = f"{node.op_type}'s input is not the function of {step.factor.name} that GELU has"
        if reason.startswith("nothing"):
            only_user(end)  # says so if that is why
        raise Refused(reason)

    def _found(self, node: ir.Node, last: ir.Node, x: ir.Value) -> Found:
        output = last.outputs[0]
        attributes = {} if node.op_type == "Erf" else {"approximate": "tanh"}

        def write(writer: Writer) -> ir.Value:
            return writer.op("Gelu", x, dtype=output.dtype, shape=output.shape, **attributes)

        return Found(self.rule(node), last, (x,), write)


def _is_cubic(value: ir.Value) -> bool:
    """Whether the value is a polynomial with a cube, of what an Add in it reads: every other Tanh is no near miss."""
    seen, values = 0, [value]
    while values and seen < 8:
        node = values.pop().producer()
        seen += 1
        if not graph.is_op(node, "Add", "Mul", "Identity") or node is None:
            continue
        for given in node.inputs:
            if given is None:
                continue
            found = polynomial(value, given)
            if found is not None and found.get(3):
                return True
            values.append(given)
    return False
