"""Random weights for convolutional networks that compute like trained ones.

Importing this file imports torch.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Net = TypeVar("Net", bound=nn.Module)


def seed_convolutions(model: Net, seed: int, image: int = 128) -> Net:
    """Draws every weight, and measures the batch statistics on four `image` x `image` pictures of noise.

    Most activations lie where ReLU6 is linear. With a bias of 0 they do not, and rounding errors grow tenfold on
    their way through the 52 layers of MobileNetV2, which no trained network does.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            transposed = isinstance(module, nn.ConvTranspose2d)  # ours have kernel = stride: one tap an output
            fan_in = module.in_channels if transposed else module.weight[0].numel()
            nn.init.normal_(module.weight, std=(2 / fan_in) ** 0.5, generator=generator)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, mean=1.0, std=0.2, generator=generator)
            module.momentum = 1.0  # the statistics of the last batch, not an average with the initial ones
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
            nn.init.normal_(module.bias, std=0.1, generator=generator)
    with torch.no_grad():
        model.train()(torch.randn((4, 3, image, image), generator=generator))
    return model.eval()
