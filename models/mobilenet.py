"""Inverted-residual image classifiers: MobileNetV2 and EfficientNet-Lite0, which differ in a table.

Sources: Sandler et al., "MobileNetV2", arXiv 1801.04381, table 2; Tan and Le, "EfficientNet",
arXiv 1905.11946, and its Lite variant in tensorflow/tpu: no squeeze-and-excite, ReLU6, fixed stem and head.
Importing this file imports torch; `registry` does so only when a model is exported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .seeding import seed_convolutions


@dataclass(frozen=True)
class Stage:
    """`repeat` blocks; the first has the stride, all have the output channels."""

    expand: int
    channels: int
    repeat: int
    stride: int
    kernel: int = 3


@dataclass(frozen=True)
class Sizes:
    stem: int
    stages: tuple[Stage, ...]
    head: int
    classes: int = 1000
    epsilon: float = 1e-5
    same_padding: bool = False  # TensorFlow's: the odd pixel of padding is at the bottom and right


MOBILENET_V2 = Sizes(
    stem=32,
    stages=(
        Stage(1, 16, 1, 1),
        Stage(6, 24, 2, 2),
        Stage(6, 32, 3, 2),
        Stage(6, 64, 4, 2),
        Stage(6, 96, 3, 1),
        Stage(6, 160, 3, 2),
        Stage(6, 320, 1, 1),
    ),
    head=1280,
)

EFFICIENTNET_LITE0 = Sizes(
    stem=32,
    stages=(
        Stage(1, 16, 1, 1),
        Stage(6, 24, 2, 2),
        Stage(6, 40, 2, 2, kernel=5),
        Stage(6, 80, 3, 2),
        Stage(6, 112, 3, 1, kernel=5),
        Stage(6, 192, 4, 2, kernel=5),
        Stage(6, 320, 1, 1),
    ),
    head=1280,
    epsilon=1e-3,
    same_padding=True,
)


def convolution(
    sizes: Sizes,
    inputs: int,
    outputs: int,
    kernel: int = 1,
    stride: int = 1,
    *,
    groups: int = 1,
    act: bool = True,
) -> nn.Sequential:
    """[Pad,] Conv, BatchNorm[, ReLU6]."""
    layers: list[nn.Module] = []
    padding = (kernel - 1) // 2
    if sizes.same_padding and stride == 2:
        # Even input: kernel - 2 pixels of padding in all, the odd one last.
        before = (kernel - 2) // 2
        layers.append(nn.ZeroPad2d((before, kernel - 2 - before, before, kernel - 2 - before)))
        padding = 0
    layers.append(nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False))
    layers.append(nn.BatchNorm2d(outputs, eps=sizes.epsilon))
    if act:
        layers.append(nn.ReLU6())
    return nn.Sequential(*layers)


class Block(nn.Module):
    """1x1 expand, depthwise, 1x1 project; the input is added where the shapes agree."""

    def __init__(self, sizes: Sizes, inputs: int, outputs: int, expand: int, kernel: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.residual = stride == 1 and inputs == outputs
        self.expand = convolution(sizes, inputs, hidden) if expand != 1 else nn.Identity()
        self.depthwise = convolution(sizes, hidden, hidden, kernel, stride, groups=hidden)
        self.project = convolution(sizes, hidden, outputs, act=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class InvertedResidualNet(nn.Module):
    """image, float32 (batch, 3, 224, 224) -> logits (batch, classes)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.stem = convolution(sizes, 3, sizes.stem, 3, 2)
        self.blocks = nn.Sequential()
        channels = sizes.stem
        for stage in sizes.stages:
            for i in range(stage.repeat):
                stride = stage.stride if i == 0 else 1
                self.blocks.append(Block(sizes, channels, stage.channels, stage.expand, stage.kernel, stride))
                channels = stage.channels
        self.head = convolution(sizes, channels, sizes.head)
        self.classifier = nn.Linear(sizes.head, sizes.classes)

    def forward(self, image: Tensor) -> Tensor:
        features = self.head(self.blocks(self.stem(image)))
        return self.classifier(features.mean((2, 3), keepdim=True).flatten(1))


def seeded(sizes: Sizes, seed: int) -> InvertedResidualNet:
    """Random weights with measured batch statistics."""
    return seed_convolutions(InvertedResidualNet(sizes), seed)


def load_efficientnet_lite0(weights: Path) -> InvertedResidualNet:
    """EfficientNet-Lite0 with the ImageNet weights of an EfficientNet-PyTorch checkpoint (`.pth`).

    Input: (rgb - 127) / 128, 224 x 224.
    """
    model = InvertedResidualNet(EFFICIENTNET_LITE0).eval()
    theirs = torch.load(weights, map_location="cpu", weights_only=True)
    # Both define their layers in the order of execution, so the parameters correspond one to one.
    ours = model.state_dict()
    if [t.shape for t in theirs.values()] != [t.shape for t in ours.values()]:
        raise ValueError("the checkpoint's layers are not EfficientNet-Lite0's")
    model.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    return model
