"""The pass `linear-attention`: softmax attention -> attention whose cost grows with the length, not with its square."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from .. import graph
from ..ops.base import CustomOp
from ..ops.linear_attention import LINEAR_ATTENTION
from ..recognise.matching import Refused, Writer
from .learned import LearnedAttention, call, numbers_mask, size_of


@dataclass(frozen=True)
class LinearAttention(LearnedAttention):
    """Softmax attention becomes linear attention with exponential features, and learns to be alike.

        Y = Attention (Q, K, V, mask)    ->    Y = graphwright.LinearAttention (√scale · Q, √scale · K, V, mask)

        A_ij = sum over the elements of 2 cosh(q_i + k_j), over the row's sum; Y = A V

    A is a product of features of the query, e^q and e^-q, with those of the key, so that Y is computed without A: in
    time and memory that grow with the number of keys, where softmax attention takes queries times keys.
    It is another function, which softmax is recovered from as for softplus-attention: from the inputs given by
    --calibration, block by block and then as a whole. The result is a file of weights beside the output, and the
    pipeline that is recorded names it: `weights=FILE` repeats the result without training.
    Attention that is written out in small operators is recognised first, as by recognise-attention. The operator has a
    body of standard operators: the file stays plain ONNX.
    Left alone: causal attention and masks that hide other keys from other queries, for which the keys would have to be
    summed anew for every query; attention with softcap, with a window, in float64, and one whose products are used
    elsewhere; while learning also those inside bodies of If, Loop, Scan and functions.

    Sources: Katharopoulos et al., "Transformers are RNNs", arXiv 2006.16236; Zhang et al., "The Hedgehog & the
    Porcupine: Expressive Linear Attentions with Softmax Mimicry", arXiv 2402.04347 (the features; their learned map is
    here in the projections of Q and K, which learn).

    Options: layers: all, auto, or their numbers from 0 in the order of the graph, joined by +; auto keeps softmax
    where, after the blocks have learned, the replacement hurts the outputs most. keep: how many layers auto leaves; by
    default a third. recover: none, blocks or full. train: blocks or all. block_steps, steps, batch, rate, loss,
    outputs: of the training.
    """

    name: ClassVar[str] = "linear-attention"

    layers: str = "all"  # all, auto, or numbers joined by +
    keep: int | None = None  # how many layers auto leaves

    @property
    def record(self) -> str:
        return self.name

    @property
    def operator(self) -> CustomOp:
        return LINEAR_ATTENTION

    @property
    def detail(self) -> str:
        return "linear"

    def check(self, node: ir.Node) -> None:
        super().check(node)
        if graph.attribute(node, "is_causal", 0):
            raise Refused("it is causal; linear attention here sums the keys once for all queries")
        _key_mask(graph.input_of(node, 3))
        _scale(node)

    def put(self, writer: Writer, node: ir.Node, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        mask = numbers_mask(writer, _key_mask(graph.input_of(node, 3)))
        root = writer.constant(np.array(math.sqrt(_scale(node)), np.float32), "scale", q.dtype)
        q, k = (writer.op("Mul", x, root, dtype=x.dtype, shape=x.shape) for x in (q, k))
        return call(writer, node, self.operator, (q, k, v, mask), {})


def _scale(node: ir.Node) -> float:
    """What the products are multiplied by. Raises Refused where it is not a number above 0."""
    scale, size = graph.attribute(node, "scale"), size_of(node, 0)
    if scale is None and size is None:
        raise Refused("the size of a head is not known, so neither is the scale")
    scale = 1 / math.sqrt(size or 1) if scale is None else scale
    if not 0 < scale < math.inf:
        raise Refused(f"its scale is {scale}, expected a number above 0")
    return float(scale)


def _key_mask(mask: ir.Value | None) -> ir.Value | None:
    """The mask as it is before it is repeated for every query. Raises Refused when queries see different keys."""
    while mask is not None:
        if mask.shape is None:
            raise Refused("the rank of its mask is not known; run infer-shapes first")
        if len(mask.shape) < 2 or mask.shape[-2] == 1:
            return mask
        node = mask.producer()
        if not graph.is_op(node, "Expand") or node is None or graph.has_references(node):
            raise Refused(f"its mask {mask.name} may hide other keys from other queries")
        mask = node.inputs[0]
    return None
