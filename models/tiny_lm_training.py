"""Training `tiny_lm` on bytes of text, and its loss on held-out text at several lengths.

AdamW with a warm-up and a cosine schedule, as in `fit`. What a step learns from follows from the seed and the step
alone, so a run that was interrupted goes on from its checkpoint and ends with the same weights.
Importing this file imports torch.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from graphwright.passes.errors import InputError
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .fit import schedule
from .progress import bar
from .tiny_lm import seeded
from .training_state import TrainingState

LARGEST_NORM = 1.0  # of all gradients together
BETAS = (0.9, 0.95)
DECAY = 0.1  # of matrices
CHECKPOINT_EVERY = 50  # steps
SAVED_EVERY = 20.0  # seconds after which a checkpoint is written earlier, where steps take long
SAID_EVERY = 2.0  # seconds between two lines of progress


@dataclass(frozen=True)
class Plan:
    """One training: `batch` windows of `length` bytes a step. rate: the largest learning rate."""

    sizes: Any  # of tiny_lm or of gpt, with their repr as what a checkpoint is of
    length: int = 128
    steps: int = 1200
    batch: int = 8
    rate: float = 2e-3
    seed: int = 0

    def loss(self, model: nn.Module, text: NDArray[np.uint8], step: int) -> Tensor:
        """Mean loss in nats a byte of the windows of a step."""
        windows = windows_of(text, self.length, self.batch, np.random.default_rng((self.seed, step)))
        return mean_loss(model(windows[:, :-1]), windows[:, 1:])


@dataclass(frozen=True)
class Corpus:
    """learned: bytes of text; held_out: (stretches, bytes of one) that are not in it."""

    learned: NDArray[np.uint8]
    held_out: NDArray[np.uint8]

    @classmethod
    def of(cls, text: bytes, stretches: int, size: int) -> Corpus:
        """Hold out `stretches` of `size` bytes, evenly spaced. Raises InputError when they are most of the text."""
        whole = np.frombuffer(text, np.uint8)
        part = len(whole) // max(1, stretches)
        if 2 * size > part:
            raise InputError(f"{len(whole)} bytes of text; holding out {stretches} x {size} needs at least twice that")
        starts = np.arange(stretches) * part + (part - size) // 2
        places = starts[:, None] + np.arange(size)
        return cls(np.delete(whole, places.ravel()), whole[places])


def train(
    plan: Plan, corpus: Corpus, checkpoint: Path, say: Callable[[str], None] = lambda message: None,
    build: Callable[[int, Any], nn.Module] = seeded,
) -> nn.Module:  # fmt: skip
    """The trained model, which starts as `build(seed, sizes)`.

    `checkpoint` is read if it is of the same plan and text, and written as it goes.
    """
    model = build(plan.seed, plan.sizes)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=plan.rate, betas=BETAS, fused=True,
    )  # fmt: skip
    state = TrainingState(checkpoint, _fingerprint(plan, corpus), model, optimizer)
    first, spent = state.restore()
    now = saved = time.perf_counter()
    begun, said, recent = now - spent, 0.0, float("nan")
    model.train()
    for step in range(first, plan.steps):
        if step > first and (step % CHECKPOINT_EVERY == 0 or now - saved >= SAVED_EVERY):
            saved = now
            state.save(step, time.perf_counter() - begun)
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * schedule(step, plan.steps)
        optimizer.zero_grad(set_to_none=True)
        loss = plan.loss(model, corpus.learned, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
        optimizer.step()
        recent = loss.item() if recent != recent else 0.98 * recent + 0.02 * loss.item()
        if (now := time.perf_counter()) - said >= SAID_EVERY:
            said = now
            left = (now - begun - spent) / (step + 1 - first) * (plan.steps - step - 1)
            say(f"{bar(step + 1, plan.steps)} {step + 1}/{plan.steps}, loss {recent:.3f}, {left / 60:.0f} min left")
    if first < plan.steps:
        state.save(plan.steps, time.perf_counter() - begun)
    return model.eval()


def use_threads(count: int) -> None:
    """How many torch computes with. Sums of more threads are others in their last digits."""
    torch.set_num_threads(count)


def seconds_spent(checkpoint: Path) -> float:
    """Wall time of the training that the checkpoint is of."""
    return float(torch.load(checkpoint, weights_only=True)["seconds"])


def loss_at(logits: Callable[[NDArray[np.int64]], NDArray[np.float32]], held_out: NDArray[np.uint8], length: int,
            tail: int, most: int = 4096) -> tuple[float, float]:  # fmt: skip
    """Mean loss in nats a byte of all predictions in windows of `length`, and of the last `tail` of each.

    logits: ids (b, length) -> (b, length, vocabulary). Every length predicts the same bytes of the stretches (n,
    bytes + 1), whose number of bytes `length` divides. most: bytes of a batch, unless one window has more.
    """
    text = held_out.astype(np.int64)
    given, wanted = (x.reshape(-1, length) for x in (text[:, :-1], text[:, 1:]))
    each = []
    size = max(1, most // length)
    for at in range(0, len(given), size):
        found = logits(np.ascontiguousarray(given[at : at + size])).astype(np.float64)
        top = found.max(-1, keepdims=True)
        total = np.log(np.exp(found - top).sum(-1)) + top[..., 0]
        right = np.take_along_axis(found, wanted[at : at + size, :, None], -1)[..., 0]
        each.append(total - right)
    losses = np.concatenate(each)
    return float(losses.mean()), float(losses[:, -tail:].mean())


def windows_of(text: NDArray[np.uint8], length: int, count: int, rng: np.random.Generator) -> Tensor:
    """Stretches of the text, int64 (count, length + 1)."""
    starts = rng.integers(0, len(text) - length, count)
    return torch.from_numpy(text[starts[:, None] + np.arange(length + 1)].astype(np.int64))


def mean_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Nats a byte: logits (b, s, vocabulary), wanted int64 (b, s)."""
    return cross_entropy(logits.flatten(0, 1), wanted.flatten())


def in_torch(model: nn.Module) -> Callable[[NDArray[np.int64]], NDArray[np.float32]]:
    """The model as `loss_at` takes it."""

    def logits(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return model(torch.from_numpy(ids)).numpy()

    return logits


def _fingerprint(plan: Plan, corpus: Corpus) -> str:
    """What the weights follow from: a checkpoint of anything else is of no use."""
    return hashlib.sha256(repr(plan).encode() + corpus.learned.tobytes()).hexdigest()
