"""all-MiniLM-L6-v2: a 6-layer BERT encoder whose mean-pooled output is a sentence vector.

Importing this file imports torch; `registry` does so only when the model is exported.
Legend: batch b, sequence s, width d, heads h.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    vocabulary: int = 30522
    positions: int = 512
    width: int = 384
    layers: int = 6
    heads: int = 12
    hidden: int = 1536


class Attention(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.query = nn.Linear(sizes.width, sizes.width)
        self.key = nn.Linear(sizes.width, sizes.width)
        self.value = nn.Linear(sizes.width, sizes.width)
        self.output = nn.Linear(sizes.width, sizes.width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # x (b, s, d), bias (b, 1, 1, s)
        def split(t: Tensor) -> Tensor:  # (b, s, d) -> (b, h, s, d/h)
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias
        mixed = scores.softmax(-1) @ value
        return self.output(mixed.transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    """Attention, then a two-layer GELU network, each followed by add and norm (post-norm, as in BERT)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attention = Attention(sizes)
        self.attention_norm = nn.LayerNorm(sizes.width, eps=1e-12)
        self.expand = nn.Linear(sizes.width, sizes.hidden)
        self.contract = nn.Linear(sizes.hidden, sizes.width)
        self.output_norm = nn.LayerNorm(sizes.width, eps=1e-12)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.attention_norm(x + self.attention(x, bias))
        return self.output_norm(x + self.contract(nn.functional.gelu(self.expand(x))))


class MiniLM(nn.Module):
    """(input_ids, attention_mask), int64 (b, s) -> last_hidden_state (b, s, d), sentence_embedding (b, d).

    The sentence embedding is the mean of the unmasked token vectors, scaled to length 1. Token types are 0.
    """

    def __init__(self, sizes: Sizes = Sizes()) -> None:
        super().__init__()
        self.words = nn.Embedding(sizes.vocabulary, sizes.width)
        self.positions = nn.Embedding(sizes.positions, sizes.width)
        self.types = nn.Embedding(2, sizes.width)
        self.norm = nn.LayerNorm(sizes.width, eps=1e-12)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        length = input_ids.shape[1]
        x = self.words(input_ids) + self.positions.weight[:length] + self.types.weight[0]
        x = self.norm(x)
        mask = attention_mask.to(x.dtype)
        bias = (1 - mask[:, None, None, :]) * torch.finfo(x.dtype).min
        for layer in self.layers:
            x = layer(x, bias)
        weight = mask[:, :, None]
        mean = (x * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return x, mean / mean.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def load(weights: Path, sizes: Sizes = Sizes()) -> MiniLM:
    """The model with the weights of a Hugging Face BERT checkpoint (`model.safetensors`)."""
    from safetensors.torch import load_file

    model = MiniLM(sizes).eval()
    model.load_state_dict(_renamed(load_file(weights)))
    return model


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face BERT parameter names -> ours; what the sentence vector does not use is left out."""
    table = (
        ("embeddings.word_embeddings.", "words."),
        ("embeddings.position_embeddings.", "positions."),
        ("embeddings.token_type_embeddings.", "types."),
        ("embeddings.LayerNorm.", "norm."),
        ("encoder.layer.", "layers."),
        ("attention.self.", "attention."),
        ("attention.output.dense.", "attention.output."),
        ("attention.output.LayerNorm.", "attention_norm."),
        ("intermediate.dense.", "expand."),
        ("output.dense.", "contract."),
        ("output.LayerNorm.", "output_norm."),
    )
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("pooler.") or name.endswith("position_ids"):
            continue
        for theirs, ours in table:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed
