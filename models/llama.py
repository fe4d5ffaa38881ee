"""The Llama family of decoders (RMSNorm, rotary positions, grouped heads, SwiGLU), read from GGUF: SmolLM2.

Sources: Touvron et al., "LLaMA", arXiv 2302.13971; Su et al., "RoFormer", arXiv 2104.09864.
Importing this file imports torch; `registry` does so only when the model is exported.
Legend: batch b, sequence s, width d, heads h, key-value heads g, head width e.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Sizes:
    """The defaults are SmolLM2-135M."""

    vocabulary: int = 49152
    width: int = 576
    layers: int = 30
    heads: int = 9
    key_value_heads: int = 3
    hidden: int = 1536
    rotary_base: float = 100_000.0
    epsilon: float = 1e-5


class RMSNorm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * self.weight


def rotary_tables(length: int, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each (s, e): angle p / base^(2i/e) at position p; the halves of e share the angles."""
    frequencies = base ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + e/2]) by its angle; x (b, h, s, e)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.groups = sizes.heads // sizes.key_value_heads
        self.head_width = sizes.width // sizes.heads
        self.query = nn.Linear(sizes.width, sizes.width, bias=False)
        self.key = nn.Linear(sizes.width, sizes.key_value_heads * self.head_width, bias=False)
        self.value = nn.Linear(sizes.width, sizes.key_value_heads * self.head_width, bias=False)
        self.output = nn.Linear(sizes.width, sizes.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        def split(t: Tensor) -> Tensor:  # (b, s, h·e) -> (b, h, s, e)
            return t.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

        query = rotate(split(self.query(x)), cos, sin)
        key = rotate(split(self.key(x)), cos, sin).repeat_interleave(self.groups, dim=1)
        value = split(self.value(x)).repeat_interleave(self.groups, dim=1)
        scores = query @ key.transpose(-1, -2) * self.head_width**-0.5 + mask
        mixed = scores.softmax(-1) @ value
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        y = self.hidden_norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """input_ids, int64 (b, s) -> logits, float32 (b, s, vocabulary), for one fixed length s.

    The output projection is the embedding itself, so the 113 MB table is stored once.
    """

    def __init__(self, length: int, sizes: Sizes = Sizes()) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = RMSNorm(sizes.width, sizes.epsilon)
        cos, sin = rotary_tables(length, sizes.width // sizes.heads, sizes.rotary_base)
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin, self.mask)
        return self.norm(x) @ self.embedding.weight.T


def load_gguf(path: Path, length: int) -> Llama:
    """The model of a GGUF file of architecture llama with a tied embedding, dequantised to float32."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)
    sizes = _sizes(reader)
    state = {}
    for tensor in reader.tensors:
        array = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith("attn_q.weight"):
            array = halves_from_pairs(array, sizes.heads)
        elif tensor.name.endswith("attn_k.weight"):
            array = halves_from_pairs(array, sizes.key_value_heads)
        state[_renamed(tensor.name)] = torch.from_numpy(array.copy())
    model = Llama(length, sizes).eval()
    model.load_state_dict(state)
    return model


def halves_from_pairs(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a query or key weight from GGUF's order to ours.

    GGUF stores the two members of a rotated pair next to each other (2i, 2i + 1); `rotate` wants them half a
    head apart (i, i + e/2).
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _sizes(reader: Any) -> Sizes:
    def value(key: str) -> Any:
        return reader.get_field(f"llama.{key}").contents()

    return Sizes(
        vocabulary=value("vocab_size"),
        width=value("embedding_length"),
        layers=value("block_count"),
        heads=value("attention.head_count"),
        key_value_heads=value("attention.head_count_kv"),
        hidden=value("feed_forward_length"),
        rotary_base=value("rope.freq_base"),
        epsilon=value("attention.layer_norm_rms_epsilon"),
    )


def _renamed(name: str) -> str:
    table = (
        ("token_embd.", "embedding."),
        ("output_norm.", "norm."),
        ("blk.", "layers."),
        ("attn_norm.", "attention_norm."),
        ("attn_output.", "attention.output."),
        ("attn_q.", "attention.query."),
        ("attn_k.", "attention.key."),
        ("attn_v.", "attention.value."),
        ("ffn_norm.", "hidden_norm."),
        ("ffn_gate.", "gate."),
        ("ffn_up.", "up."),
        ("ffn_down.", "down."),
    )
    for theirs, ours in table:
        name = name.replace(theirs, ours)
    return name
