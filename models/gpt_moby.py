"""gpt-moby: a small GPT-2 over bytes, trained here on Moby-Dick. Its weights are in the folder `gpt_moby` beside it.

`python -m graphwright.tools.train_gpt_moby` makes them anew. Importing this file imports torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from . import datasets, gpt, huggingface, tokens
from .tiny_lm_training import Corpus, Plan, in_torch, loss_at, seconds_spent, train

FOLDER = Path(__file__).parent / "gpt_moby"
SIZES = gpt.Sizes(vocabulary=256, positions=512, width=128, layers=4, heads=4)
# Short windows first: among 512 bytes, attention takes thousands of steps to find the one before.
PLANS = (
    Plan(SIZES, length=64, steps=1000, batch=16, rate=2e-3, seed=0),
    Plan(SIZES, length=SIZES.positions, steps=500, batch=2, rate=1e-3, seed=1),
)
STRETCHES, STRETCH = 16, 2048  # what is held out, in bytes


def corpus() -> Corpus:
    return Corpus.of(datasets.moby_dick().encode(), STRETCHES, STRETCH + 1)


def make(folder: Path, say: Callable[[str], None], plans: Sequence[Plan] = PLANS) -> tuple[float, float]:
    """Train, or go on from checkpoints beside the folder, and write it. Returns (nats a byte held out, seconds)."""
    text, model, seconds = corpus(), gpt.untrained(plans[0].seed, plans[0].sizes), 0.0
    key = hashlib.sha256(repr(plans).encode()).hexdigest()[:8]
    for number, plan in enumerate(plans):

        def begun(seed: int, sizes: Any, before: nn.Module = model) -> nn.Module:
            return before

        checkpoint = folder.with_name(f"{folder.name}.{key}.{number}")
        model = train(plan, text, checkpoint, say, begun)
        seconds += seconds_spent(checkpoint)
    huggingface.save_gpt2(model, folder)
    tokens.single_bytes().save(str(folder / huggingface.TOKENIZER))
    return held_out_loss(folder, text), seconds


def held_out_loss(folder: Path, text: Corpus) -> float:
    """Nats a byte of the weights as they are stored, in windows as long as the model has positions."""
    model = huggingface.load(folder).decoder
    return loss_at(in_torch(model), text.held_out, SIZES.positions, tail=1)[0]
