"""gpt-moby: a small GPT-2 over bytes, trained here on Moby-Dick. Its weights are in the folder `gpt_moby` beside it.

`python -m graphwright.tools.train_gpt_moby` makes them anew. Importing this file imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from . import datasets, gpt, huggingface, tokens
from .tiny_lm_training import Corpus, Plan, in_torch, loss_at, train

FOLDER = Path(__file__).parent / "gpt_moby"
SIZES = gpt.Sizes(vocabulary=256, positions=512, width=128, layers=4, heads=4)
PLAN = Plan(SIZES, length=SIZES.positions, steps=1400, batch=2, rate=1e-3, seed=0)
STRETCHES, STRETCH = 16, 2048  # what is held out, in bytes


def corpus() -> Corpus:
    return Corpus.of(datasets.moby_dick().encode(), STRETCHES, STRETCH + 1)


def make(folder: Path, checkpoint: Path, say: Callable[[str], None], plan: Plan = PLAN) -> float:
    """Train, or go on from the checkpoint, and write the folder. Returns nats a byte on the held-out text."""
    text = corpus()
    model = train(plan, text, checkpoint, say, gpt.untrained)
    huggingface.save_gpt2(model, folder)
    tokens.single_bytes().save(str(folder / huggingface.TOKENIZER))
    return held_out_loss(folder, text)


def held_out_loss(folder: Path, text: Corpus) -> float:
    """Nats a byte of the weights as they are stored, in windows as long as the model has positions."""
    model = huggingface.load(folder).decoder
    return loss_at(in_torch(model), text.held_out, SIZES.positions, tail=1)[0]
