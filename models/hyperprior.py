"""A learned image codec with a scale hyperprior, in the four networks that encoder and decoder run.

Source: Ballé et al., "Variational image compression with a scale hyperprior", arXiv 1802.01436, with what integers are
good at: ReLU in the place of GDN, and convolutions with a rearrangement of pixels (Shi et al., arXiv 1609.05158) in the
place of transposed ones. One set of weights serves every quality: each has a gain for every channel of the latents
(Cui et al., "Asymmetric Gained Deep Image Compression", arXiv 2003.02012), which an export folds into the convolutions
beside them. `python -m graphwright.tools.train_hyperprior` makes the weights, which are in the folder `hyperprior`.
Importing this file imports torch.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .codecs import HYPER, LATENTS, QUALITIES, STRIDE

WEIGHTS = Path(__file__).parent / "hyperprior" / "model.safetensors"
LARGEST_SYMBOL = 127  # of y and z, which are whole numbers from minus this on
SCALES = 64  # of y, spaced evenly by their logarithms
SMALLEST_SCALE, LARGEST_SCALE = 0.11, 64.0
STEP = float(np.log(LARGEST_SCALE / SMALLEST_SCALE) / (SCALES - 1))
PEAK = 255.0  # of an image


@dataclass(frozen=True)
class Sizes:
    """channels: of the layers beside the linear transform, from the image on. latents: of y. hyper: of z. mixture:
    logistic distributions that make up the prior of a channel of z."""

    channels: tuple[int, int, int] = (16, 24, 32)
    latents: int = LATENTS
    hyper: int = HYPER
    mixture: int = 3


def scales() -> NDArray[np.float64]:
    """Standard deviations (SCALES,) that the hyper-synthesis chooses from."""
    return SMALLEST_SCALE * np.exp(STEP * np.arange(SCALES))


def down(inputs: int, outputs: int, kernel: int = 5) -> nn.Conv2d:
    """(h, w) -> (h / 2, w / 2)."""
    return nn.Conv2d(inputs, outputs, kernel, 2, kernel // 2)


def up(inputs: int, outputs: int) -> nn.Sequential:
    """(h, w) -> (2 h, 2 w). ReLU comes first, so that what is rearranged can be whole numbers."""
    return nn.Sequential(nn.Conv2d(inputs, 4 * outputs, 3, 1, 1), nn.ReLU(), nn.PixelShuffle(2))


class Analysis(nn.Module):
    """Image (n, 3, h, w) -> (n, latents, h / 16, w / 16): a linear transform of blocks of 16 x 16 pixels and of what
    four convolutions see around them."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        a, b, c = sizes.channels
        self.around = nn.Sequential(
            down(3, a), nn.ReLU(), down(a, b), nn.ReLU(), down(b, c), nn.ReLU(), down(c, c), nn.ReLU()
        )
        self.blocks = nn.PixelUnshuffle(STRIDE)
        self.last = nn.Conv2d(3 * STRIDE**2 + c, sizes.latents, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.last(torch.cat([self.blocks(image), self.around(image)], 1))


class Synthesis(nn.Module):
    """(n, latents, h / 16, w / 16) -> image (n, 3, h, w): the same the other way."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        a, b, c = sizes.channels
        self.around = nn.Sequential(up(sizes.latents, c), up(c, b), up(b, a))
        # Four pixels of three colours become channels of half the size, which the last convolution takes apart.
        self.blocks = nn.Sequential(nn.Conv2d(sizes.latents, 3 * STRIDE**2, 1), nn.PixelShuffle(STRIDE // 2))
        self.last = nn.Sequential(nn.Conv2d(3 * 4 + a, 3 * 4, 3, 1, 1), nn.PixelShuffle(2))

    def forward(self, y: Tensor) -> Tensor:
        return self.last(torch.cat([self.blocks(y), self.around(y)], 1))


class Hyperprior(nn.Module):
    """The networks between whole numbers: images of 0 to 255, symbols y and z, places in the table of scales.

    Heights and widths of images are multiples of HYPER_STRIDE.
    """

    def __init__(self, sizes: Sizes = Sizes()) -> None:
        super().__init__()
        y, z = sizes.latents, sizes.hyper
        self.analysis = Analysis(sizes)
        self.synthesis = Synthesis(sizes)
        self.hyper_analysis = nn.Sequential(
            nn.Conv2d(y, z, 3, 1, 1), nn.ReLU(), down(z, z, 3), nn.ReLU(), down(z, z, 3)
        )
        self.hyper_synthesis = nn.Sequential(up(z, z), up(z, z), nn.Conv2d(z, y, 3, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                assert module.bias is not None
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        # Logarithms, so that training cannot make them 0: of y on the way in and out, and of z.
        start = torch.linspace(0.7, 2.4, QUALITIES)[:, None].repeat(1, y)
        start[:, 0] -= 0.7  # the mean of a block, which the symbols would not reach else
        self.gains = nn.Parameter(start)
        self.inverse_gains = nn.Parameter(-start)
        self.hyper_gains = nn.Parameter(torch.full((QUALITIES, z), 1.0))
        self.prior = nn.Parameter(torch.stack([  # weights, means and widths of logistic distributions
            torch.zeros(QUALITIES, z, sizes.mixture),
            torch.linspace(-2, 2, sizes.mixture).expand(QUALITIES, z, -1),
            torch.full((QUALITIES, z, sizes.mixture), 0.5),
        ]))  # fmt: skip

    def start_from(self, blocks: Tensor) -> None:
        """Begin as the transform by principal components of blocks (n, 3, 16, 16), 0 to 255."""
        flat = blocks.double().flatten(1) / PEAK
        mean = flat.mean(0)
        variances, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
        count = self.gains.shape[1]
        main = vectors.flip(1)[:, :count]
        # Of a pixel: colour, row and column of its pair, row and column in the pair.
        paired = torch.arange(flat.shape[1]).reshape(3, STRIDE // 2, 2, STRIDE // 2, 2).permute(0, 2, 4, 1, 3).flatten()
        blocks_in, blocks_out, last = self.analysis.last, self.synthesis.blocks[0], self.synthesis.last[0]
        with torch.no_grad():
            blocks_in.weight.zero_()
            blocks_in.weight[:, : flat.shape[1], 0, 0] = main.T.float()
            blocks_in.bias.copy_(-(main.T @ mean).float())
            blocks_out.weight[:, :, 0, 0] = main[paired].float()
            blocks_out.bias.copy_(mean[paired].float())
            last.weight.zero_()
            last.weight[range(3 * 4), range(3 * 4), 1, 1] = 1
            self.hyper_synthesis[2].weight *= 0.1
            self.hyper_synthesis[2].bias.copy_(variances.flip(0)[:count].clamp_min(1e-9).log().float() / 2)

    def latents(self, image: Tensor, quality: int) -> Tensor:
        """Image (n, 3, h, w) -> y before it is rounded, (n, latents, h / 16, w / 16)."""
        return self.analysis(image / PEAK) * self.gains[quality].exp()[:, None, None]

    def hyper_latents(self, y: Tensor, quality: int) -> Tensor:
        """Rounded y -> z before it is rounded, (n, hyper, h / 64, w / 64)."""
        z = self.hyper_analysis(y.abs() * self.inverse_gains[quality].exp()[:, None, None])
        return z * self.hyper_gains[quality].exp()[:, None, None]

    def places(self, z: Tensor, quality: int) -> Tensor:
        """Rounded z -> places in the table of scales before they are rounded, in y's shape."""
        found = self.hyper_synthesis(z * (-self.hyper_gains[quality]).exp()[:, None, None])
        return (found + self.gains[quality][:, None, None] - float(np.log(SMALLEST_SCALE))) / STEP

    def image(self, y: Tensor, quality: int) -> Tensor:
        """Rounded y -> image (n, 3, h, w), not rounded and not held between 0 and 255."""
        return self.synthesis(y * self.inverse_gains[quality].exp()[:, None, None]) * PEAK

    def cumulative(self, z: Tensor, quality: int) -> Tensor:
        """How likely numbers (n, hyper, ...) are not to be exceeded by the prior of z, of each channel."""
        weights, means, widths = self.prior[:, quality]
        shape = (1, -1, *[1] * (z.dim() - 2))
        parts = zip(weights.softmax(-1).T, means.T, widths.exp().T, strict=True)
        return sum(
            w.reshape(shape) * torch.sigmoid((z - m.reshape(shape)) / s.reshape(shape)) for w, m, s in parts
        )


class Part(nn.Module):
    """One network at one quality, its gains folded into the convolutions at its ends."""

    def __init__(self, model: Hyperprior, part: str, quality: int) -> None:
        super().__init__()
        self.takes_sizes = part == "hyper-analysis"
        self.layers = copy.deepcopy(getattr(model, part.replace("-", "_")))
        layers: Any = self.layers
        gain, inverse = model.gains[quality], model.inverse_gains[quality]
        hyper = model.hyper_gains[quality]
        with torch.no_grad():
            if part == "analysis":
                # In numbers of 0 to 255 throughout: ReLU lets a factor through.
                for module in layers.around:
                    if isinstance(module, nn.Conv2d):
                        _scale(module, bias=PEAK)
                _scale(layers.last, outputs=gain.exp() / PEAK, bias=PEAK)
            elif part == "hyper-analysis":
                _scale(layers[0], inputs=inverse.exp())
                _scale(layers[-1], outputs=hyper.exp())
            elif part == "hyper-synthesis":
                _scale(layers[0][0], inputs=(-hyper).exp())
                _scale(layers[-1], outputs=torch.tensor(1 / STEP))
                layers[-1].bias += (gain - float(np.log(SMALLEST_SCALE))) / STEP
            else:
                for first in (layers.around[0][0], layers.blocks[0]):
                    _scale(first, inputs=inverse.exp(), outputs=torch.tensor(PEAK))
                for later in (layers.around[1][0], layers.around[2][0], layers.last[0]):
                    _scale(later, bias=PEAK)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.abs() if self.takes_sizes else x)


def _scale(layer: nn.Conv2d, inputs: Tensor | None = None, outputs: Tensor | None = None, bias: float = 1) -> None:
    """Factors on the weights of input channels, on the weights and biases of output channels, and on all biases."""
    assert layer.bias is not None
    if inputs is not None:
        layer.weight *= inputs.reshape(1, -1, 1, 1)
    if outputs is not None:
        layer.weight *= outputs.reshape(-1, 1, 1, 1)
        layer.bias *= outputs
    layer.bias *= bias


def load(path: Path = WEIGHTS) -> Hyperprior:
    """The trained codec. Its weights are stored in float16 and computed with in float32."""
    from safetensors.torch import load_file

    model = Hyperprior()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return model.eval()


def save(model: Hyperprior, path: Path) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, path)


def prior(model: Hyperprior, quality: int) -> NDArray[np.float64]:
    """How likely each symbol of z is, (hyper, 2 LARGEST_SYMBOL + 1); the first and the last stand for all beyond."""
    with torch.no_grad():
        edges = torch.arange(-LARGEST_SYMBOL, LARGEST_SYMBOL, dtype=torch.float64) + 0.5
        wide = copy.deepcopy(model).double()
        below = wide.cumulative(edges.expand(1, wide.prior.shape[2], -1), quality)[0].numpy()
    ends = np.pad(below, ((0, 0), (1, 1)), constant_values=((0, 0), (0, 1)))
    return np.diff(ends)
