"""Real weights: SmolLM2 through both graphs says what torch says, and gpt-moby has learned its book."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from graphwright.models import datasets, generators
from graphwright.models.checkpoint import Checkpoint

torch = pytest.importorskip("torch")
from graphwright.models import decoding, gpt_moby  # noqa: E402 -- needs torch

from . import decoders  # noqa: E402 -- needs torch

pytestmark = [pytest.mark.torch, pytest.mark.assets]
Fetched = Callable[[str], None]
PROMPTS = (
    "The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at", "1 2 3 4 5", "\n",
    "Call me Ishmael. Some years ago", "Die Katze sitzt auf",
)  # fmt: skip


@pytest.fixture(scope="module")
def smollm2(fetched: Fetched, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, decoders.Exported]:
    fetched("smollm2-gguf")
    checkpoint = generators.open_model("smollm2")
    folder = tmp_path_factory.mktemp("smollm2")
    generators.write(checkpoint, folder, capacity=512)
    assert (folder / generators.WEIGHTS).stat().st_size < 540e6  # both graphs' 135 M parameters, each once
    return checkpoint, decoders.Exported(folder)


def greedy_in_torch(checkpoint: Checkpoint, ids: list[int], count: int) -> list[int]:
    step = decoding.Decode(checkpoint.decoder, 128)
    past, found, place = step.empty(), list(ids), 0
    with torch.inference_mode():
        while len(found) < len(ids) + count:
            _, _, best, *past = step(torch.tensor([found[place:]]), torch.tensor([place]), tuple(past))
            place = len(found)
            found.append(int(best[0, -1, 0]))
    return found[len(ids) :]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smollm2_says_what_torch_says(smollm2: tuple[Checkpoint, decoders.Exported]) -> None:
    checkpoint, generator = smollm2
    for prompt in PROMPTS:
        ids = generator.tokenizer.encode(prompt, add_special_tokens=False).ids
        found = generator.greedy(ids, 64)
        assert found == greedy_in_torch(checkpoint, ids, 64), prompt
        if prompt == PROMPTS[0]:
            assert generator.tokenizer.decode(found).startswith(" Paris")


@pytest.mark.slow
def test_perplexity_of_moby_dick(smollm2: tuple[Checkpoint, decoders.Exported], fetched: Fetched) -> None:
    """From character 30,000, the first 2,048 tokens in windows of 512: 2,044 predictions."""
    fetched("moby-dick")
    _, generator = smollm2
    text = datasets.moby_dick()[30_000:45_000]
    ids = generator.tokenizer.encode(text, add_special_tokens=False).ids[:2048]
    losses = []
    for window in np.reshape(ids, (4, 512)):
        results, _ = generator.call(window.tolist(), 0, generator.empty(), range(511))
        logits = torch.from_numpy(results["logits"][0]).double()
        losses.append(torch.nn.functional.cross_entropy(logits, torch.from_numpy(window[1:]), reduction="none"))
    perplexity = float(torch.cat(losses).mean().exp())
    print(f"perplexity {perplexity:.3f}, limit 32.33 ± 0.02")
    assert perplexity == pytest.approx(32.33, abs=0.02)


def test_gpt_moby_has_learned_its_book(fetched: Fetched, tmp_path: Path) -> None:
    """On text that it was not trained on; equal bytes would have 5.5 nats a byte."""
    fetched("moby-dick")
    loss = gpt_moby.held_out_loss(gpt_moby.FOLDER, gpt_moby.corpus())
    print(f"gpt-moby: {loss:.3f} nats a byte")
    assert loss < 1.92
    checkpoint = generators.open_model("gpt-moby")
    generators.write(checkpoint, tmp_path, weights="float16")
    generator = decoders.Exported(tmp_path)
    ids = generator.tokenizer.encode("Call me Ishmael. Some years ago").ids
    assert ids == list(b"Call me Ishmael. Some years ago")
    assert generator.greedy(ids, 64) == greedy_in_torch(checkpoint, ids, 64)
