"""Training `hyperprior` on crops of photos: rate plus distortion at every quality in turn.

What a step learns from follows from the seed and the step alone, so an interrupted run goes on from its checkpoint and
ends with the same weights. Importing this file imports torch.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .codecs import DISTORTIONS, HELD_OUT, SHRINKS, STRIDE, photos
from .fit import schedule
from .hyperprior import LARGEST_SYMBOL, PEAK, SCALES, SMALLEST_SCALE, STEP, Hyperprior, Sizes
from .training_state import TrainingState

LEAST = 2.0**-30  # likelihood of a symbol that the rate counts
LARGEST_NORM = 1.0  # of all gradients together
SAVED_EVERY, SAID_EVERY = 20.0, 2.0  # seconds



@dataclass(frozen=True)
class Plan:
    """One training: `batch` crops of `side` x `side` pixels a step. rate: the largest learning rate."""

    sizes: Sizes = field(default_factory=Sizes)
    side: int = 128
    steps: int = 3000
    batch: int = 3
    rate: float = 6e-4
    blocks: int = 20000  # whose principal components training starts from
    seed: int = 0


def crops(plan: Plan, images: list[NDArray[np.uint8]], step: int) -> Tensor:
    """What a step learns from: (batch, 3, side, side), 0 to 255, turned and mirrored at random."""
    random = np.random.default_rng((plan.seed, step))
    found = []
    for _ in range(plan.batch):
        image = images[random.integers(len(images))]
        top, left = (int(random.integers(size - plan.side + 1)) for size in image.shape[:2])
        crop = np.rot90(image[top : top + plan.side, left : left + plan.side], int(random.integers(4)))
        found.append(crop[:, ::-1] if random.integers(2) else crop)
    return torch.from_numpy(np.stack(found).transpose(0, 3, 1, 2).astype(np.float32))


def blocks(plan: Plan, images: list[NDArray[np.uint8]]) -> Tensor:
    """(blocks, 3, 16, 16), 0 to 255, from anywhere in the images."""
    random = np.random.default_rng(plan.seed)
    found = []
    for number in range(plan.blocks):
        image = images[number % len(images)]
        top, left = (int(random.integers(size - STRIDE + 1)) for size in image.shape[:2])
        found.append(image[top : top + STRIDE, left : left + STRIDE])
    return torch.from_numpy(np.stack(found).transpose(0, 3, 1, 2).astype(np.float32))


def rounded(x: Tensor) -> Tensor:
    """Whole numbers within the alphabet, with the gradient of x."""
    return x + (x.round().clamp(-LARGEST_SYMBOL, LARGEST_SYMBOL) - x).detach()


def losses(model: Hyperprior, image: Tensor, quality: int, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """(bits a pixel, mean squared error of bytes).

    The rate is that of latents with uniform noise, the distortion that of rounded ones (Minnen and Singh,
    arXiv 2007.08739).
    """

    def noisy(x: Tensor) -> Tensor:
        return x + torch.rand(x.shape, generator=noise) - 0.5

    def bits(above: Tensor, below: Tensor) -> Tensor:
        return -(above - below).clamp_min(LEAST).log2().sum()

    y = model.latents(image, quality)
    z = model.hyper_latents(rounded(y), quality)
    places = model.places(rounded(z), quality).clamp(0, SCALES - 1)
    scale = SMALLEST_SCALE * (STEP * places).exp()
    about, hyper = noisy(y), noisy(z)
    # Symmetric, so that likelihoods are differences of small numbers.
    spread = -about.abs()
    rate = bits(torch.special.ndtr((spread + 0.5) / scale), torch.special.ndtr((spread - 0.5) / scale))
    rate = rate + bits(model.cumulative(hyper + 0.5, quality), model.cumulative(hyper - 0.5, quality))
    error = (model.image(rounded(y), quality) - image).square().mean()
    return rate / (image.numel() / image.shape[1]), error


def train(plan: Plan, checkpoint: Path, say: Callable[[str], None] = lambda message: None) -> Hyperprior:
    """The trained codec. `checkpoint` is read if it is of the same plan, and written as it goes."""
    torch.manual_seed(plan.seed)
    model = Hyperprior(plan.sizes)
    images = photos()
    model.start_from(blocks(plan, images))
    optimizer = torch.optim.Adam(model.parameters(), lr=plan.rate)
    state = TrainingState(checkpoint, _fingerprint(plan), model, optimizer)
    first, spent = state.restore()
    now = saved = time.perf_counter()
    begun, said = now - spent, 0.0
    recent = {quality: "" for quality in range(len(DISTORTIONS))}
    model.train()
    for step in range(first, plan.steps):
        if step > first and now - saved >= SAVED_EVERY:
            saved = now
            state.save(step, now - begun)
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * schedule(step, plan.steps)
        quality = step % len(DISTORTIONS)
        noise = torch.Generator().manual_seed(plan.seed * plan.steps + step)
        optimizer.zero_grad(set_to_none=True)
        rate, error = losses(model, crops(plan, images, step), quality, noise)
        # The better qualities have the larger losses; a step of each counts alike.
        ((rate + DISTORTIONS[quality] * error) / DISTORTIONS[quality] ** 0.5).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
        optimizer.step()
        recent[quality] = f"{rate.item():.2f}/{10 * np.log10(PEAK**2 / error.item()):.1f}"
        if (now := time.perf_counter()) - said >= SAID_EVERY:
            said = now
            left = (now - begun - spent) / (step + 1 - first) * (plan.steps - step - 1)
            say(f"{step + 1}/{plan.steps}, bits a pixel/dB {', '.join(recent.values())}, {left / 60:.0f} min left")
    if first < plan.steps:
        state.save(plan.steps, time.perf_counter() - begun)
    return model.eval()


def seconds_spent(checkpoint: Path) -> float:
    """Wall time of the training that the checkpoint is of."""
    return float(torch.load(checkpoint, weights_only=True)["seconds"])


def _fingerprint(plan: Plan) -> str:
    """What the weights follow from: a checkpoint of anything else is of no use."""
    return hashlib.sha256(repr((plan, DISTORTIONS, HELD_OUT, SHRINKS)).encode()).hexdigest()
