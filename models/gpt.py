"""A small decoder in the manner of GPT-2: learned positions, pre-norm layers, causal attention, tanh GELU.

Sources: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019; its sizes are those of a
nanoGPT to try things on. The vocabulary is the 256 bytes, so that any text is an input.
Importing this file imports torch; `registry` does so only when the model is exported.
Legend: batch b, sequence s, width d, heads h.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    vocabulary: int = 256
    positions: int = 256
    width: int = 384
    layers: int = 6
    heads: int = 6


class Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.attention_norm = nn.LayerNorm(sizes.width)
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width)
        self.output = nn.Linear(sizes.width, sizes.width)
        self.hidden_norm = nn.LayerNorm(sizes.width)
        self.expand = nn.Linear(sizes.width, 4 * sizes.width)
        self.contract = nn.Linear(4 * sizes.width, sizes.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask)
        hidden = nn.functional.gelu(self.expand(self.hidden_norm(x)), approximate="tanh")
        return x + self.contract(hidden)

    def attention(self, x: Tensor, mask: Tensor) -> Tensor:
        def split(t: Tensor) -> Tensor:  # (b, s, d) -> (b, h, s, d/h)
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query, key, value = map(split, self.qkv(x).chunk(3, dim=-1))
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + mask
        return self.output((scores.softmax(-1) @ value).transpose(1, 2).flatten(-2))


class GPT(nn.Module):
    """input_ids, int64 (b, s) -> logits, float32 (b, s, vocabulary); the output projection is the embedding itself."""

    def __init__(self, sizes: Sizes = Sizes()) -> None:
        super().__init__()
        self.words = nn.Embedding(sizes.vocabulary, sizes.width)
        self.positions = nn.Embedding(sizes.positions, sizes.width)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width)
        mask = torch.full((sizes.positions, sizes.positions), torch.finfo(torch.float32).min).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        x = self.words(input_ids) + self.positions.weight[:length]
        for layer in self.layers:
            x = layer(x, self.mask[:length, :length])
        return self.norm(x) @ self.words.weight.T


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
