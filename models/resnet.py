"""ResNet-50: bottleneck blocks of 1x1, 3x3 and 1x1 convolutions with a shortcut around each.

Source: He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, table 1; the stride is in the
3x3 convolution, as in Goyal et al., arXiv 1706.02677, and every framework since.
Importing this file imports torch; `registry` does so only when the model is exported.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .seeding import seed_convolutions


@dataclass(frozen=True)
class Sizes:
    stem: int = 64
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    expansion: int = 4
    classes: int = 1000


def convolution(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, act: bool = True) -> nn.Sequential:
    """Conv, BatchNorm[, ReLU]."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([nn.ReLU()] if act else []))


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.reduce = convolution(inputs, width)
        self.spatial = convolution(width, width, 3, stride)
        self.expand = convolution(width, outputs, act=False)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else convolution(inputs, outputs, 1, stride, act=False)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.shortcut(x) + self.expand(self.spatial(self.reduce(x))))


class ResNet(nn.Module):
    """image, float32 (batch, 3, height, width) -> logits (batch, classes)."""

    def __init__(self, sizes: Sizes = Sizes()) -> None:
        super().__init__()
        self.stem = convolution(3, sizes.stem, 7, 2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.Sequential()
        channels, width = sizes.stem, sizes.stem
        for stage, repeat in enumerate(sizes.blocks):
            outputs = width * sizes.expansion
            for i in range(repeat):
                self.blocks.append(Bottleneck(channels, width, outputs, 2 if stage and i == 0 else 1))
                channels = outputs
            width *= 2
        self.classifier = nn.Linear(channels, sizes.classes)

    def forward(self, image: Tensor) -> Tensor:
        features = self.blocks(self.pool(self.stem(image)))
        return self.classifier(features.mean((2, 3)))


def seeded(seed: int, sizes: Sizes = Sizes()) -> ResNet:
    """Random weights with measured batch statistics."""
    return seed_convolutions(ResNet(sizes), seed)
