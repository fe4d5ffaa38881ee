"""gpt-moby: a small GPT-2 over bytes, trained here on Moby-Dick. Its weights are in the folder `gpt_moby` beside it.

`python -m graphwright.tools.train_gpt_moby` makes them anew. Importing this file imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import datasets, gpt, huggingface, tokens
from .tiny_lm_training import Corpus, Plan, in_torch, loss_at, mean_loss, seconds_spent, train, windows_of

FOLDER = Path(__file__).parent / "gpt_moby"
SIZES = gpt.Sizes(vocabulary=256, positions=512, width=128, layers=4, heads=4)
@dataclass(frozen=True)
class Scattered(Plan):
    """Each step has windows of one of `lengths`, as many as fill `length` bytes, at one position out of all.

    In short windows attention is found sooner, and every position is learned in them as often as any other.
    """

    lengths: tuple[int, ...] = (64, 128, 256, 512)

    def loss(self, model: Any, text: NDArray[np.uint8], step: int) -> Tensor:
        rng = np.random.default_rng((self.seed, step))
        length = int(rng.choice(self.lengths))
        places = rng.integers(0, self.sizes.positions - length + 1) + torch.arange(length)
        windows = windows_of(text, length, self.batch * self.length // length, rng)
        attends = [partial(scaled_dot_product_attention, is_causal=True)] * self.sizes.layers
        return mean_loss(model.logits(model.continued(windows[:, :-1], places[None], attends)), windows[:, 1:])


PLAN = Scattered(SIZES, length=SIZES.positions, steps=2500, batch=1, rate=3e-3)
STRETCHES, STRETCH = 16, 2048  # what is held out, in bytes


def corpus() -> Corpus:
    return Corpus.of(datasets.moby_dick().encode(), STRETCHES, STRETCH + 1)


def make(folder: Path, say: Callable[[str], None], plan: Plan = PLAN) -> tuple[float, float]:
    """Train, or go on from the checkpoint beside the folder, and write it. Returns (nats a byte held out, seconds)."""
    text, checkpoint = corpus(), folder.with_name(f"{folder.name}.checkpoint")
    model = train(plan, text, checkpoint, say, gpt.untrained)
    huggingface.save_gpt2(model, folder)
    tokens.single_bytes().save(str(folder / huggingface.TOKENIZER))
    return held_out_loss(folder, text), seconds_spent(checkpoint)


def held_out_loss(folder: Path, text: Corpus) -> float:
    """Nats a byte of the weights as they are stored, in windows as long as the model has positions."""
    model = huggingface.load(folder).decoder
    return loss_at(in_torch(model), text.held_out, SIZES.positions, tail=1)[0]
