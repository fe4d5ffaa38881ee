"""A small U-Net: four levels down and up again, with the features of the way down beside those of the way up.

Source: Ronneberger et al., "U-Net", arXiv 1505.04597, with padded convolutions and batch norm. The lower half of the
way up doubles the image with transposed convolutions as they do, the upper half by bilinear interpolation.
Importing this file imports torch; `registry` does so only when the model is exported.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from .seeding import seed_convolutions


@dataclass(frozen=True)
class Sizes:
    """widths: channels of each level, from the top. transposed: how many steps up, the lowest first, are transposed
    convolutions.
    """

    widths: tuple[int, ...] = (16, 32, 64, 128, 256)
    transposed: int = 2
    classes: int = 21


def double_convolution(inputs: int, outputs: int) -> nn.Sequential:
    """Twice: 3x3 Conv, BatchNorm, ReLU."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class Up(nn.Module):
    """Double the image, halve the channels, put the skipped features beside them, and convolve twice."""

    def __init__(self, inputs: int, outputs: int, transposed: bool) -> None:
        super().__init__()
        if transposed:
            self.enlarge: nn.Module = nn.ConvTranspose2d(inputs, outputs, 2, 2)
        else:
            larger = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
            self.enlarge = nn.Sequential(nn.Conv2d(inputs, outputs, 1), larger)
        self.merge = double_convolution(2 * outputs, outputs)

    def forward(self, x: Tensor, skipped: Tensor) -> Tensor:
        return self.merge(torch.cat([skipped, self.enlarge(x)], dim=1))


class UNet(nn.Module):
    """image, float32 (batch, 3, height, width), multiples of 16 -> logits (batch, classes, height, width)."""

    def __init__(self, sizes: Sizes = Sizes()) -> None:
        super().__init__()
        widths = sizes.widths
        self.stem = double_convolution(3, widths[0])
        self.pool = nn.MaxPool2d(2)
        self.down = nn.ModuleList(double_convolution(a, b) for a, b in pairwise(widths))
        steps = list(pairwise(reversed(widths)))
        self.up = nn.ModuleList(Up(*step, transposed=i < sizes.transposed) for i, step in enumerate(steps))
        self.classifier = nn.Conv2d(widths[0], sizes.classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        features = [self.stem(image)]
        for level in self.down:
            features.append(level(self.pool(features[-1])))
        x = features.pop()
        for level in self.up:
            x = level(x, features.pop())
        return self.classifier(x)


def seeded(seed: int, sizes: Sizes = Sizes()) -> UNet:
    """Random weights with measured batch statistics."""
    return seed_convolutions(UNet(sizes), seed, image=64)
