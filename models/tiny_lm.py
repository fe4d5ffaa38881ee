"""A small decoder over bytes for experiments with attention: rotary positions, RMSNorm, SwiGLU, softmax or LSSAR.

It is `llama` without grouped keys, for any length, and with a choice of attention. Softplus attention is written out
in small operators, which torch can train and `recognise-softplus-attention` finds in the export.

Sources: Touvron et al., "LLaMA", arXiv 2302.13971; Su et al., "RoFormer", arXiv 2104.09864; Gao and Spratling,
"Softplus Attention with Re-weighting", arXiv 2501.13428.
Importing this file imports torch.
Legend: batch b, sequence s, width d, heads h, head width e.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from graphwright.passes.ops.softplus_attention import FEW, SHORTEST, SMALLEST
from torch import Tensor, nn

from .llama import RMSNorm, rotary_tables, rotate

SOFTMAX, LSSAR = "softmax", "lssar"
ATTENTIONS = (SOFTMAX, LSSAR)


@dataclass(frozen=True)
class Sizes:
    """positions: the longest sequence. power: of the re-weighting of LSSAR."""

    attention: str = SOFTMAX
    vocabulary: int = 256
    positions: int = 2048
    width: int = 192
    layers: int = 4
    heads: int = 3
    hidden: int = 512
    rotary_base: float = 10_000.0
    epsilon: float = 1e-5
    power: int = 15


def softmax_weights(query: Tensor, key: Tensor, seen: Tensor) -> Tensor:
    """(b, h, s, s), from query and key (b, h, s, e) and the keys that each row sees, bool (s, s)."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return torch.where(seen, scores, torch.finfo(torch.float32).min).softmax(-1)


def lssar_weights(query: Tensor, key: Tensor, seen: Tensor, power: int) -> Tensor:
    """(b, h, s, s), from query and key (b, h, s, e) and the keys that each row sees, bool (s, s).

    Rows are divided by their maximum before the power, which cancels in the sum, also in its gradient.
    """
    mask = seen.float()
    count = mask.sum(-1, keepdim=True)
    offset = (count > FEW).float()
    cosine = unit(query) @ unit(key).transpose(-1, -2)
    a = nn.functional.softplus(cosine * (math.log(query.shape[-1]) * count.log())) * mask
    kept = (a / a.sum(-1, keepdim=True) * count - offset).relu()
    w = (kept / kept.amax(-1, keepdim=True).detach().clamp(min=SMALLEST)) ** power
    return w / w.sum(-1, keepdim=True).clamp(min=SMALLEST)


def unit(x: Tensor) -> Tensor:
    """x with rows of length 1."""
    return nn.functional.normalize(x, dim=-1, eps=SHORTEST)


class Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.attention_norm = RMSNorm(sizes.width, sizes.epsilon)
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width, bias=False)
        self.output = nn.Linear(sizes.width, sizes.width, bias=False)
        self.hidden_norm = RMSNorm(sizes.width, sizes.epsilon)
        self.gate = nn.Linear(sizes.width, sizes.hidden, bias=False)
        self.up = nn.Linear(sizes.width, sizes.hidden, bias=False)
        self.down = nn.Linear(sizes.hidden, sizes.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, seen)
        y = self.hidden_norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Tensor) -> Tensor:
        def split(t: Tensor) -> Tensor:  # (b, s, d) -> (b, h, s, e)
            return t.unflatten(-1, (self.sizes.heads, -1)).transpose(1, 2)

        query, key, value = map(split, self.qkv(x).chunk(3, dim=-1))
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if self.sizes.attention == LSSAR:
            weights = lssar_weights(query, key, seen, self.sizes.power)
        else:
            weights = softmax_weights(query, key, seen)
        return self.output((weights @ value).transpose(1, 2).flatten(-2))


class TinyLM(nn.Module):
    """input_ids, int64 (b, s) -> logits, float32 (b, s, vocabulary); the output projection is the embedding itself."""

    def __init__(self, sizes: Sizes = Sizes()) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = RMSNorm(sizes.width, sizes.epsilon)
        cos, sin = rotary_tables(sizes.positions, sizes.width // sizes.heads, sizes.rotary_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        places = torch.arange(length)
        seen = places <= places[:, None]
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length], seen)
        return self.norm(x) @ self.embedding.weight.T


def seeded(seed: int, sizes: Sizes = Sizes()) -> TinyLM:
    """Weights to start from: std 0.02, less for what is added to the residual, as in GPT-2."""
    generator = torch.Generator().manual_seed(seed)
    model = TinyLM(sizes)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 0.02 * ((2 * sizes.layers) ** -0.5 if name.endswith(("output.weight", "down.weight")) else 1)
            nn.init.normal_(parameter, std=std, generator=generator)
    return model
