"""A small convolutional classifier of handwritten digits, trained here on four of five digits of MNIST-5k.

Importing this file imports torch.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

from . import datasets

EPOCHS, BATCH, RATE = 20, 50, 4e-3
APART = 5  # every so many digits one is held out


def images(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(n, 28, 28) from 0 to 255 -> (n, 1, 28, 28) from 0 to 1."""
    return (pixels[:, None] / np.float32(255)).astype(np.float32)


def split() -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Images and labels to learn from, and those held out."""
    pixels, labels = datasets.mnist()
    apart = np.arange(len(labels)) % APART == APART - 1
    return images(pixels[~apart]), labels[~apart], images(pixels[apart]), labels[apart]


def network() -> nn.Sequential:
    """Three convolutions with batch normalization, two of which halve the image; (n, 1, 28, 28) -> (n, 10)."""

    def block(channels: int, result: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels, result, 3, stride, 1, bias=False)
        return [convolution, nn.BatchNorm2d(result), nn.ReLU()]

    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*block(1, 16, 2), *block(16, 32, 2), *block(32, 64, 1), *pooled)


def train(seed: int = 0) -> nn.Sequential:
    """The trained network, in evaluation mode; a minute on one processor. Raises AssetError without the digits."""
    learned, labels, _, _ = split()
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    steps = EPOCHS * len(labels) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    order = np.concatenate([np.random.default_rng(seed + epoch).permutation(len(labels)) for epoch in range(EPOCHS)])
    for step in range(steps):
        chosen = order[step * BATCH : (step + 1) * BATCH]
        loss = cross_entropy(model(torch.from_numpy(learned[chosen])), torch.from_numpy(labels[chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()
