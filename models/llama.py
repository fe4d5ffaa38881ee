"""The Llama family of decoders (RMSNorm, rotary positions, grouped heads, SwiGLU).

Sources: Touvron et al., "LLaMA", arXiv 2302.13971; Su et al., "RoFormer", arXiv 2104.09864.
Importing this file imports torch; `registry` does so only when the model is exported.
Legend: batch b, sequence s, width d, heads h, key-value heads g, head width e.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.onnx.ops import rotary_embedding

from .decoding import Attend

Turn = Callable[[Tensor], Tensor]  # rotary positions into (b, h, s, e)


@dataclass(frozen=True)
class Sizes:
    """The defaults are SmolLM2-135M.

    own_head_width: None for width / heads. tied: the output projection is the embedding. biases: of query, key, value.
    rotary_factors: what the frequency of each pair of numbers is divided by, e/2 of them; none for 1.
    """

    vocabulary: int = 49152
    width: int = 576
    layers: int = 30
    heads: int = 9
    key_value_heads: int = 3
    hidden: int = 1536
    own_head_width: int | None = None
    rotary_base: float = 100_000.0
    rotary_factors: tuple[float, ...] = ()
    epsilon: float = 1e-5
    tied: bool = True
    biases: bool = False

    @property
    def head_width(self) -> int:
        return self.own_head_width or self.width // self.heads

    def rotary_tables(self, length: int) -> tuple[Tensor, Tensor]:
        return rotary_tables(length, self.head_width, self.rotary_base, self.rotary_factors)


class RMSNorm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * self.weight


def rotary_tables(
    length: int, head_width: int, base: float, factors: Sequence[float] = ()
) -> tuple[Tensor, Tensor]:
    """cos and sin, each (s, e): angle p / base^(2i/e) / factors[i] at position p; the halves of e share the angles."""
    frequencies = rotary_frequencies(head_width, base)
    if factors:
        frequencies = frequencies / torch.tensor(factors, dtype=torch.float64)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotary_frequencies(head_width: int, base: float) -> Tensor:
    """float64 (e/2): radians a position."""
    return base ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)


def llama3_factors(
    head_width: int, base: float, factor: float, low: float, high: float, positions: float
) -> tuple[float, ...]:
    """What Llama 3.1 divides the frequencies by: `factor` where fewer than `low` turns fit the `positions` that the
    model was first trained on, 1 where more than `high` do, and between them what mixes both frequencies linearly.

    Source: Grattafiori et al., "The Llama 3 Herd of Models", arXiv 2407.21783, and Meta's implementation.
    """
    turns = positions * rotary_frequencies(head_width, base) / (2 * torch.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return tuple((1 / (share + (1 - share) / factor)).tolist())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + e/2]) by its angle; x (b, h, s, e)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """query (b, h, s, e), key and value (b, g, s, e), mask (s, s) that is added to the scores: (b, h, s, e)."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + mask
    return scores.softmax(-1) @ value


class Attention(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head_width = sizes.head_width
        wide, narrow = sizes.heads * sizes.head_width, sizes.key_value_heads * sizes.head_width
        self.query = nn.Linear(sizes.width, wide, bias=sizes.biases)
        self.key = nn.Linear(sizes.width, narrow, bias=sizes.biases)
        self.value = nn.Linear(sizes.width, narrow, bias=sizes.biases)
        self.output = nn.Linear(wide, sizes.width, bias=False)

    def forward(self, x: Tensor, turn: Turn, attend: Attend) -> Tensor:
        def split(t: Tensor) -> Tensor:  # (b, s, h·e) -> (b, h, s, e)
            return t.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

        mixed = attend(turn(split(self.query(x))), turn(split(self.key(x))), split(self.value(x)))
        return self.output(mixed.transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(sizes.width, sizes.epsilon)
        self.attention = Attention(sizes)
        self.hidden_norm = RMSNorm(sizes.width, sizes.epsilon)
        self.gate = nn.Linear(sizes.width, sizes.hidden, bias=False)
        self.up = nn.Linear(sizes.width, sizes.hidden, bias=False)
        self.down = nn.Linear(sizes.hidden, sizes.width, bias=False)

    def forward(self, x: Tensor, turn: Turn, attend: Attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turn, attend)
        y = self.hidden_norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """The weights, and one walk through the layers, which is told how to turn and how to attend.

    A tied output projection is the embedding itself, so the 113 MB table of SmolLM2 is stored once.
    """

    def __init__(self, sizes: Sizes = Sizes()) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = RMSNorm(sizes.width, sizes.epsilon)
        if not sizes.tied:
            self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def walk(self, input_ids: Tensor, turn: Turn, attends: Sequence[Attend]) -> Tensor:
        """The hidden state behind the last layer, (b, s, d)."""
        x = self.embedding(input_ids)
        for layer, attend in zip(self.layers, attends, strict=True):
            x = layer(x, turn, attend)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        x = self.norm(hidden)
        return x @ self.embedding.weight.T if self.sizes.tied else self.head(x)

    def reserve(self, capacity: int) -> None:
        """Tables for positions below `capacity`, (c, e/2): what `continued` turns by."""
        tables = self.sizes.rotary_tables(capacity)
        for name, table in zip(("cos_rows", "sin_rows"), tables, strict=True):
            self.register_buffer(name, table[:, : self.sizes.head_width // 2].clone(), persistent=False)

    def continued(self, input_ids: Tensor, places: Tensor, attends: Sequence[Attend]) -> Tensor:
        """`walk` for tokens at the positions `places` (b, s), behind what a cache holds."""

        def turn(x: Tensor) -> Tensor:
            return rotary_embedding(x, self.cos_rows, self.sin_rows, places)

        return self.walk(input_ids, turn, attends)


class Llama(Decoder):
    """input_ids, int64 (b, s) -> logits, float32 (b, s, vocabulary), for one fixed length s and without a cache."""

    def __init__(self, length: int, sizes: Sizes = Sizes()) -> None:
        super().__init__(sizes)
        cos, sin = sizes.rotary_tables(length)
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        def turn(x: Tensor) -> Tensor:
            return rotate(x, self.cos, self.sin)

        attend = partial(grouped_attention, mask=self.mask)
        return self.logits(self.walk(input_ids, turn, [attend] * self.sizes.layers))
