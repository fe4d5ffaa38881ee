"""A small decoder in the manner of GPT-2: learned positions, pre-norm layers, causal attention, tanh GELU.

Sources: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019; its sizes are those of a
nanoGPT to try things on. The vocabulary is the 256 bytes, so that any text is an input.
Importing this file imports torch; `registry` does so only when the model is exported.
Legend: batch b, sequence s, width d, heads h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from graphwright.passes.errors import UsageError
from torch import Tensor, nn

from .decoding import Attend


@dataclass(frozen=True)
class Sizes:
    vocabulary: int = 256
    positions: int = 256
    width: int = 384
    layers: int = 6
    heads: int = 6
    epsilon: float = 1e-5

    @property
    def key_value_heads(self) -> int:
        return self.heads

    @property
    def head_width(self) -> int:
        return self.width // self.heads


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """All (b, h, s, e), and mask (s, s), which is added to the scores."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + mask
    return scores.softmax(-1) @ value


class Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.attention_norm = nn.LayerNorm(sizes.width, sizes.epsilon)
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width)
        self.output = nn.Linear(sizes.width, sizes.width)
        self.hidden_norm = nn.LayerNorm(sizes.width, sizes.epsilon)
        self.expand = nn.Linear(sizes.width, 4 * sizes.width)
        self.contract = nn.Linear(4 * sizes.width, sizes.width)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), attend)
        hidden = nn.functional.gelu(self.expand(self.hidden_norm(x)), approximate="tanh")
        return x + self.contract(hidden)

    def attention(self, x: Tensor, attend: Attend) -> Tensor:
        def split(t: Tensor) -> Tensor:  # (b, s, d) -> (b, h, s, d/h)
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query, key, value = map(split, self.qkv(x).chunk(3, dim=-1))
        return self.output(attend(query, key, value).transpose(1, 2).flatten(-2))


class GPT(nn.Module):
    """input_ids, int64 (b, s) -> logits, float32 (b, s, vocabulary); the output projection is the embedding itself."""

    def __init__(self, sizes: Sizes = Sizes()) -> None:
        super().__init__()
        self.sizes = sizes
        self.words = nn.Embedding(sizes.vocabulary, sizes.width)
        self.positions = nn.Embedding(sizes.positions, sizes.width)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width, sizes.epsilon)
        mask = torch.full((sizes.positions, sizes.positions), torch.finfo(torch.float32).min).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        x = self.words(input_ids) + self.positions.weight[:length]
        attend = partial(masked_attention, mask=self.mask[:length, :length])
        return self.logits(self.walk(x, [attend] * self.sizes.layers))

    def walk(self, x: Tensor, attends: Sequence[Attend]) -> Tensor:
        """From the embedded tokens (b, s, d) to the hidden state behind the last layer."""
        for layer, attend in zip(self.layers, attends, strict=True):
            x = layer(x, attend)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden) @ self.words.weight.T

    def reserve(self, capacity: int) -> None:
        """Raises UsageError when there are no positions for so many tokens."""
        if capacity > self.sizes.positions:
            raise UsageError(
                f"capacity is {capacity}, but the model has learned {self.sizes.positions} positions; give no more"
            )

    def continued(self, input_ids: Tensor, places: Tensor, attends: Sequence[Attend]) -> Tensor:
        """`walk` for tokens at the positions `places` (b, s), behind what a cache holds."""
        return self.walk(self.words(input_ids) + self.positions(places), attends)


def seeded(seed: int, sizes: Sizes = Sizes()) -> GPT:
    """Random weights with std fan_in^-1/2, so that attention is neither flat nor one-hot."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT(sizes).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        elif parameter.dim() == 2:
            std = 0.1 if name.startswith(("words", "positions")) else parameter.shape[1] ** -0.5
            nn.init.normal_(parameter, std=std, generator=generator)
        else:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def untrained(seed: int, sizes: Sizes = Sizes()) -> GPT:
    """Weights to start a training from: std 0.7 fan_in^-1/2, less for what is added to the residual; biases 0.

    From noise, attention to the token before takes thousands of steps to be found. So positions start as sines, of
    which those k tokens before are a linear function (Vaswani et al., 1706.03762), and the heads of the first layer
    attend to the first, second, ... token before (in the spirit of Trockman and Kolter, "Mimetic Initialization of
    Self-Attention Layers", 2305.09828).
    """
    generator = torch.Generator().manual_seed(seed)
    model = GPT(sizes)
    for name, parameter in model.named_parameters():
        if name.startswith("words"):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        elif parameter.dim() == 2:
            residual = name.endswith((".output.weight", "contract.weight"))
            std = 0.7 * parameter.shape[1] ** -0.5 * ((2 * sizes.layers) ** -0.5 if residual else 1)
            nn.init.normal_(parameter, std=std, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    waves = math.pi * (sizes.positions / 2) ** (-torch.arange(0, sizes.width, 2) / sizes.width)  # radians a token
    angles = torch.outer(torch.arange(sizes.positions).float(), waves)
    with torch.no_grad():
        model.positions.weight.copy_(0.07 * torch.cat([angles.sin(), angles.cos()], dim=-1))
        _attend_to_those_before(model, waves)
    return model


def _attend_to_those_before(model: GPT, waves: Tensor) -> None:
    """Let head h of the first layer look h + 1 tokens back: its scores are sums of cos(wave · (distance - h - 1)).

    waves: of the position table, (d/2,), the shortest first, of which a head takes as many as it has room for.
    """
    sizes, sharpness = model.sizes, 3.0
    half, rows = sizes.width // 2, torch.arange(sizes.head_width // 2)
    query, key, _ = model.layers[0].qkv.weight.unflatten(0, (3, sizes.heads, sizes.head_width))
    for head in range(sizes.heads):
        cos, sin = (f((head + 1) * waves[rows]) * sharpness**0.5 for f in (torch.cos, torch.sin))
        key[head, 2 * rows, rows] += sharpness**0.5  # sines
        key[head, 2 * rows + 1, half + rows] += sharpness**0.5  # cosines
        query[head, 2 * rows, rows] += cos  # sines of the angle turned back
        query[head, 2 * rows, half + rows] -= sin
        query[head, 2 * rows + 1, half + rows] += cos
        query[head, 2 * rows + 1, rows] += sin
