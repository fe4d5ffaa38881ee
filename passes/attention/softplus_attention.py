"""The pass `softplus-attention`: softmax attention -> softplus attention, with or without re-weighting."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from .. import graph
from ..ops.base import CustomOp
from ..ops.softplus_attention import (
    END,
    NO,
    REWEIGHTED_SOFTPLUS_ATTENTION,
    SOFTPLUS_ATTENTION,
    START,
)
from ..recognise.matching import Writer
from .learned import LearnedAttention, call, numbers_mask


class Variant(enum.Enum):
    LSSA = "lssa"
    LSSAR = "lssar"


@dataclass(frozen=True)
class SoftplusAttention(LearnedAttention):
    """Softmax attention becomes softplus attention (LSSA), or that with re-weighting (LSSAR), and learns to be alike.

        Y = Attention (Q, K, V)    ->    Y = graphwright.ReweightedSoftplusAttention <power = 3> (Q, K, V, mask)

        LSSA    A_ij = softplus(log d · log N_i · q̂_i·k̂_j), over the row's sum; q̂, k̂ of length 1, N_i keys seen by i
        LSSAR   relu(A_ij · N_i - 1)^power, over the row's sum

    It is another function: a network that was trained with softmax has to be trained on. From the inputs given by
    --calibration, each replaced attention first learns, with its projections, to give what it gave on the original's
    inputs; then the whole model learns to give the original's outputs. The result is a file of weights beside the
    output, and the pipeline that is recorded names it: `weights=FILE` repeats the result without training.
    Attention that is written out in small operators is recognised first, as by recognise-attention. The operators have
    bodies of standard operators: the file stays plain ONNX.
    Left alone: attention with softcap, with a window, in float64, and one whose products are used elsewhere; while
    learning also those inside bodies of If, Loop, Scan and functions.

    Source: Gao and Spratling, "Softplus Attention with Re-weighting", arXiv 2501.13428.

    Options: variant: lssa or lssar. power: of the re-weighting; the authors take 3 for short and 15 for long contexts.
    layers: all, auto, or their numbers from 0 in the order of the graph, joined by +; auto keeps softmax where, after
    the blocks have learned, the replacement hurts the outputs most. keep: how many layers auto leaves; by default
    a third. recover: none, blocks or full. train: blocks or all. block_steps, steps, batch, rate, loss, outputs: of
    the training.
    """

    name: ClassVar[str] = "softplus-attention"

    variant: Variant = Variant.LSSAR
    power: int = 3
    layers: str = "all"  # all, auto, or numbers joined by +
    keep: int | None = None  # how many layers auto leaves

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.power <= 64:
            raise ValueError(f"power is {self.power}, must be from 1 to 64")

    @property
    def record(self) -> str:
        power = f":power={self.power}" if self.variant is Variant.LSSAR else ""
        return f"{self.name}:variant={self.variant.value}{power}"

    @property
    def operator(self) -> CustomOp:
        return SOFTPLUS_ATTENTION if self.variant is Variant.LSSA else REWEIGHTED_SOFTPLUS_ATTENTION

    @property
    def detail(self) -> str:
        return self.variant.value

    def put(self, writer: Writer, node: ir.Node, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        past = graph.input_of(node, 4) is not None
        causal = (END if past else START) if graph.attribute(node, "is_causal", 0) else NO
        attributes = {"causal": causal}
        if self.variant is Variant.LSSAR:
            attributes["power"] = self.power
        mask = numbers_mask(writer, graph.input_of(node, 3))
        return call(writer, node, self.operator, (q, k, v, mask), attributes)
