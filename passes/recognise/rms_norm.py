"""The pass `recognise-rms-norm`: mean square, root and quotient -> RMSNormalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from .. import graph
from ..base import Contract
from . import normalization
from .matching import Found, Recogniser


@dataclass(frozen=True)
class RecogniseRmsNorm(Recogniser):
    """Normalization by the root of the mean square becomes RMSNormalization (opset 23).

        q = Pow (X, 2)
        v = ReduceMean <axes = [-1]> (q)
        e = Add (v, epsilon)
        r = Sqrt (e)                               ->    Y = RMSNormalization <axis = -1, epsilon> (X, scale)
        i = Reciprocal (r)
        n = Mul (X, i)
        Y = Mul (n, scale)

    Also with Mul (X, X), with Div by the root, 1 / r or Pow -0.5, over several last axes, with the scale multiplied
    into the reciprocal first, without scale (ones are written), and between casts of half precision to float32 and
    back. A model of an older opset is brought to 23.
    Left alone: other axes, float64 (the operator computes in float32), what is less its mean before (that is layer
    normalization), and sites one of whose inner values is used elsewhere or is an output.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.
    """

    name: ClassVar[str] = "recognise-rms-norm"
    contract: ClassVar[Contract] = Contract.ROUNDING
    opset: ClassVar[int] = 23

    def rule(self, node: ir.Node) -> str:
        return "rms-norm"

    def find(self, node: ir.Node, scope: graph.Scope) -> Found | None:
        d = normalization.squared(node)
        if d is None or normalization.is_centred(d):
            return None
        return normalization.read(node, d).found("rms-norm", "RMSNormalization")
