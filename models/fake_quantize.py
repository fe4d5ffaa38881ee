"""Quantization in torch as what trains it sees it: codes going forward, a gradient going back through the rounding.

The gradient is DynaQuant's distance-aware modulator: the rounding of x, whose fraction is f, counts as
g(f) = tanh(beta (f - 1/2)) / (2 tanh(beta / 2)) + 1/2, so that numbers near the border between two codes learn more
than those that lie on one. Its mean over a step is 1; beta = 0 is the straight-through estimator.
`FAKE` is the table that `torch_graph` computes the operators of `passes/quantize/learn.py` with.
Importing this file imports torch.

Source: Bao et al., "DynaQuant: Dynamic Mixed-Precision Quantization for Learned Image Compression", arXiv 2511.07903.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from graphwright.passes.quantize.learn import MOST_CHANGE
from torch import Tensor

from .torch_operators import Node, Operator


def modulator(x: Tensor, beta: float) -> Tensor:
    """g'(f) for every number, f being its fraction."""
    if beta == 0:
        return torch.ones_like(x)
    return beta / 2 / math.tanh(beta / 2) / torch.cosh(beta * (x - torch.floor(x) - 0.5)) ** 2


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.beta = beta
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return (gradient * modulator(x, ctx.beta) if ctx.beta else gradient), None


def rounded(x: Tensor, beta: float) -> Tensor:
    """Whole numbers, halves to the even one."""
    return _Round.apply(x, beta)


def fake_quantized(steps: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, beta: float) -> Tensor:
    """scale (clip(round(steps) + zero) - zero). steps: what is quantized, over its scale. zero: whole numbers."""
    return scale * (torch.clamp(rounded(steps, beta) + zero, low, high) - zero)


class _Data(torch.autograd.Function):
    """`fake_quantized` of x / scale with one scale and zero point, in a few runs over the data."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, beta: float) -> Tensor:
        ctx.save_for_backward(x, scale, zero)
        ctx.low, ctx.high, ctx.beta = low, high, beta
        return torch.div(x, scale).round_().clamp_(low - zero.item(), high - zero.item()).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, scale, zero = ctx.saved_tensors
        low, high = ctx.low - zero.item(), ctx.high - zero.item()
        steps = x / scale
        codes = torch.round(steps)
        inside = (codes >= low) & (codes <= high)
        passed = gradient * inside
        if ctx.beta:
            passed *= modulator(steps, ctx.beta)
        whole = torch.dot(gradient.reshape(-1), codes.clamp_(low, high).reshape(-1))
        of_scale = whole - torch.dot(passed.reshape(-1), steps.reshape(-1))
        of_zero = -scale * (gradient.sum() - (gradient * inside).sum())
        return passed, of_scale.reshape(scale.shape), of_zero.reshape(zero.shape), None, None, None


FAKE: dict[str, Operator] = {}


def _scale(start: Tensor, change: Tensor | None, unit: float) -> Tensor:
    """A scale that is learned as a factor; change: its logarithm in `unit`."""
    return start if change is None else start * torch.exp(torch.clamp(change * unit, -MOST_CHANGE, MOST_CHANGE))


def _zero(start: Tensor, change: Tensor | None, unit: float, low: int, high: int, beta: float) -> Tensor:
    return start if change is None else rounded(torch.clamp(start + change * unit, low, high), beta)


def _fake_data(
    n: Node, x: Tensor, scale: Tensor, zero: Tensor, scale_change: Tensor | None = None,
    zero_change: Tensor | None = None,
) -> Tensor:  # fmt: skip
    low, high, beta = n.get("low"), n.get("high"), n.get("beta")
    scale = _scale(scale, scale_change, n.get("scale_unit"))
    zero = _zero(zero, zero_change, n.get("zero_unit"), low, high, beta)
    return _Data.apply(x.contiguous(), scale, zero, low, high, beta)


def _fake_weight(
    n: Node, steps: Tensor, scale: Tensor, zero: Tensor, scale_change: Tensor | None = None,
    zero_change: Tensor | None = None, rounding: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """steps: (channels, inputs), weights over their first scale; scale, zero: (channels, blocks)."""
    low, high, beta = n.get("low"), n.get("high"), n.get("beta")
    channels, inputs = steps.shape
    scale = _scale(scale, scale_change, n.get("scale_unit"))
    zero = _zero(zero, zero_change, n.get("zero_unit"), low, high, beta)
    if scale.shape[1] > 1:
        scale, zero = (x.repeat_interleave(n.get("block"), 1)[:, :inputs] for x in (scale, zero))
    matrix = fake_quantized(steps if rounding is None else steps + rounding, scale, zero, low, high, beta)
    shape, axis = n.get("shape"), n.get("axis")
    moved = [channels, *(d for i, d in enumerate(shape) if i != axis)]
    return matrix.reshape(moved).movedim(0, axis)


FAKE.update(FakeData=_fake_data, FakeWeight=_fake_weight)
