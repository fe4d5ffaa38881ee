"""The pass `recognise-layer-norm`: mean, difference, mean square, root and quotient -> LayerNormalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from .. import graph
from ..base import Contract
from . import normalization
from .matching import Found, Recogniser


@dataclass(frozen=True)
class RecogniseLayerNorm(Recogniser):
    """Layer normalization written out in small operators becomes LayerNormalization (opset 17).

        m = ReduceMean <axes = [-1]> (X)
        d = Sub (X, m)
        q = Pow (d, 2)
        v = ReduceMean <axes = [-1]> (q)           ->    Y = LayerNormalization <axis = -1, epsilon> (X, scale, bias)
        e = Add (v, epsilon)
        r = Sqrt (e)
        n = Div (d, r)
        s = Mul (n, scale)
        Y = Add (s, bias)

    Also with Mul (d, d), with the reciprocal of the root (Reciprocal, 1 / r, Pow -0.5), over several last axes, with
    a scale multiplied into the reciprocal first (Keras), without scale (ones are written) or bias, and between casts
    of half precision to float32 and back. A model of an older opset is brought to 17.
    Left alone: other axes, float64 (the operator computes in float32), and sites one of whose inner values is used
    elsewhere or is an output.

    Source: Ba, Kiros and Hinton, "Layer Normalization", arXiv 1607.06450.
    """

    name: ClassVar[str] = "recognise-layer-norm"
    contract: ClassVar[Contract] = Contract.ROUNDING
    opset: ClassVar[int] = 17

    def rule(self, node: ir.Node) -> str:
        return "layer-norm"

    def find(self, node: ir.Node, scope: graph.Scope) -> Found | None:
        d = normalization.squared(node)
        if d is None or not normalization.is_centred(d):
            return None
        return normalization.read(node, d).found("layer-norm", "LayerNormalization")
