"""MobileNetV3-Small: inverted residuals with squeeze-and-excite and hard activations.

Source: Howard et al., "Searching for MobileNetV3", arXiv 1905.02244, table 2.
Importing this file imports torch; `registry` does so only when the model is exported.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .seeding import seed_convolutions


@dataclass(frozen=True)
class Bneck:
    """One row of the paper's table: kernel, hidden and output channels, squeeze-and-excite, h-swish or ReLU, stride."""

    kernel: int
    hidden: int
    channels: int
    excite: bool
    swish: bool
    stride: int


@dataclass(frozen=True)
class Sizes:
    stem: int = 16
    blocks: tuple[Bneck, ...] = (
        Bneck(3, 16, 16, True, False, 2),
        Bneck(3, 72, 24, False, False, 2),
        Bneck(3, 88, 24, False, False, 1),
        Bneck(5, 96, 40, True, True, 2),
        Bneck(5, 240, 40, True, True, 1),
        Bneck(5, 240, 40, True, True, 1),
        Bneck(5, 120, 48, True, True, 1),
        Bneck(5, 144, 48, True, True, 1),
        Bneck(5, 288, 96, True, True, 2),
        Bneck(5, 576, 96, True, True, 1),
        Bneck(5, 576, 96, True, True, 1),
    )
    features: int = 576
    head: int = 1024
    classes: int = 1000


def convolution(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, act: nn.Module | None = None
) -> nn.Sequential:
    """Conv, BatchNorm[, activation]."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3),
    ]
    return nn.Sequential(*layers, *([act] if act is not None else []))


class SqueezeExcite(nn.Module):
    """Each channel times a number between 0 and 1 that two small layers find from the means of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = max(8, (channels // 4 + 4) // 8 * 8)  # a quarter, in steps of 8
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)
        return x * nn.functional.hardsigmoid(self.excite(nn.functional.relu(self.squeeze(means))))


class Block(nn.Module):
    """1x1 expand, depthwise[, squeeze-and-excite], 1x1 project; the input is added where the shapes agree."""

    def __init__(self, inputs: int, row: Bneck) -> None:
        super().__init__()
        act = nn.Hardswish() if row.swish else nn.ReLU()
        self.residual = row.stride == 1 and inputs == row.channels
        self.expand = convolution(inputs, row.hidden, act=act) if row.hidden != inputs else nn.Identity()
        self.depthwise = convolution(row.hidden, row.hidden, row.kernel, row.stride, groups=row.hidden, act=act)
        self.excite = SqueezeExcite(row.hidden) if row.excite else nn.Identity()
        self.project = convolution(row.hidden, row.channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.excite(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


class MobileNetV3(nn.Module):
    """image, float32 (batch, 3, height, width) -> logits (batch, classes)."""

    def __init__(self, sizes: Sizes = Sizes()) -> None:
        super().__init__()
        self.stem = convolution(3, sizes.stem, 3, 2, act=nn.Hardswish())
        self.blocks = nn.Sequential()
        channels = sizes.stem
        for row in sizes.blocks:
            self.blocks.append(Block(channels, row))
            channels = row.channels
        self.features = convolution(channels, sizes.features, act=nn.Hardswish())
        self.head = nn.Linear(sizes.features, sizes.head)
        self.classifier = nn.Linear(sizes.head, sizes.classes)

    def forward(self, image: Tensor) -> Tensor:
        means = self.features(self.blocks(self.stem(image))).mean((2, 3))
        return self.classifier(nn.functional.hardswish(self.head(means)))


def seeded(seed: int, sizes: Sizes = Sizes()) -> MobileNetV3:
    """Random weights with measured batch statistics."""
    return seed_convolutions(MobileNetV3(sizes), seed)
