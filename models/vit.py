"""ViT-tiny and ViT-small: pre-norm vision transformers, 224 x 224 in patches of 16.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929; tiny and small sizes of
Touvron et al., "DeiT", arXiv 2012.12877, table 1.
Importing this file imports torch; `registry` does so only when the model is exported.
Legend: batch b, sequence s = patches + 1, width d, heads h.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    image: int = 224
    patch: int = 16
    width: int = 192
    layers: int = 12
    heads: int = 3
    classes: int = 1000


TINY = Sizes()
SMALL = Sizes(width=384, heads=6)


class Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        self.heads = sizes.heads
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.hidden_norm = nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.contract(nn.functional.gelu(self.expand(self.hidden_norm(x))))

    def attention(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (b, s, 3, h, d/h)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (b, h, s, d/h)
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        mixed = scores.softmax(-1) @ value
        return self.output(mixed.transpose(1, 2).flatten(-2))


class ViT(nn.Module):
    """image, float32 (b, 3, 224, 224) -> logits (b, classes), read from the class token."""

    def __init__(self, sizes: Sizes = Sizes()) -> None:
        super().__init__()
        patches = (sizes.image // sizes.patch) ** 2
        self.patches = nn.Conv2d(3, sizes.width, sizes.patch, sizes.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, sizes.width))
        self.positions = nn.Parameter(torch.zeros(1, patches + 1, sizes.width))
        self.layers = nn.Sequential(*(Layer(sizes) for _ in range(sizes.layers)))
        self.norm = nn.LayerNorm(sizes.width, eps=1e-6)
        self.classifier = nn.Linear(sizes.width, sizes.classes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        token = self.class_token.expand(x.shape[0], -1, -1)
        x = torch.cat([token, x], dim=1) + self.positions
        return self.classifier(self.norm(self.layers(x))[:, 0])


def seeded(seed: int, sizes: Sizes = Sizes()) -> ViT:
    """Random weights with std fan_in^-1/2, so that attention is neither flat nor one-hot."""
    generator = torch.Generator().manual_seed(seed)
    model = ViT(sizes).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        elif parameter.dim() >= 2 and name not in ("class_token", "positions"):
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model
