"""How gpt-moby is trained: what it starts from, and what a step learns from."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
from graphwright.models import gpt, gpt_moby, tiny_lm_training  # noqa: E402 -- needs torch

pytestmark = pytest.mark.torch
SIZES = gpt.Sizes(vocabulary=256, positions=32, width=32, layers=1, heads=2)
TEXT = np.frombuffer(b"Call me Ishmael. Some years ago - never mind how long precisely - " * 20, np.uint8)


def test_heads_of_the_first_layer_begin_with_the_tokens_before() -> None:
    """Head h gives the token h + 1 before most of its attention, wherever it is."""
    sizes = gpt_moby.SIZES
    model = gpt.untrained(0, sizes)
    layer = model.layers[0]
    ids = torch.randint(0, 256, (1, sizes.positions), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        x = layer.attention_norm(model.words(ids) + model.positions.weight)
        query, key, _ = (t.unflatten(-1, (sizes.heads, -1)).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
        weights = (query @ key.transpose(-1, -2) * sizes.head_width**-0.5 + model.mask).softmax(-1)[0]
    for head in range(sizes.heads):
        share = weights[head].diagonal(-1 - head)
        print(f"head {head}: {share.mean():.2f} of the attention at distance {head + 1}, at least {share.min():.2f}")
        assert share.mean() > 0.8


def test_a_step_learns_from_windows_at_any_position() -> None:
    """In windows as long as the model has positions, the loss is the model's own; each step draws its own windows."""
    model = gpt.seeded(0, SIZES)
    plan = gpt_moby.Scattered(SIZES, length=32, batch=2, lengths=(32,))
    rng = np.random.default_rng((plan.seed, 5))
    rng.choice(plan.lengths)
    rng.integers(0, 1)  # where windows could begin
    windows = tiny_lm_training.windows_of(TEXT, 32, 2, rng)
    expected = tiny_lm_training.mean_loss(model(windows[:, :-1]), windows[:, 1:])
    torch.testing.assert_close(plan.loss(model, TEXT, 5), expected)
    shorter = dataclasses.replace(plan, lengths=(4, 8, 16))
    losses = [shorter.loss(model, TEXT, step).item() for step in range(6)]
    assert losses == [shorter.loss(model, TEXT, step).item() for step in range(6)] and len(set(losses)) == 6
