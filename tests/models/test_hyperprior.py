"""The image codec: its networks are the model's functions, training goes on where it ended, and it codes photos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from graphwright.models import codecs, datasets, registry
from graphwright.passes.errors import UsageError

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")


@pytest.mark.parametrize("quality", [0, codecs.QUALITIES - 1])
def test_gains_fold_into_the_convolutions(quality: int) -> None:
    """Sums of numbers up to 255 in another order: 1e-5 of the output's scale leaves room."""
    from graphwright.models import hyperprior

    model = hyperprior.load()
    image = torch.rand((1, 3, 64, 128), generator=torch.Generator().manual_seed(1)) * 255
    with torch.inference_mode():
        y = model.latents(image, quality)
        symbols = y.round()
        z = model.hyper_latents(symbols, quality)
        expected = {
            "analysis": (image, y), "hyper-analysis": (symbols, z),
            "hyper-synthesis": (z.round(), model.places(z.round(), quality)),
            "synthesis": (symbols, model.image(symbols, quality)),
        }  # fmt: skip
        for part, (given, wanted) in expected.items():
            found = hyperprior.Part(model, part, quality)(given)
            error = float((found - wanted).abs().max() / wanted.abs().max())
            print(f"{part}: {error:.1e} of the scale, limit 1e-5")
            assert error < 1e-5


def test_training_begins_as_the_best_linear_transform() -> None:
    """What latents and synthesis lose of blocks is what their principal components leave out."""
    from graphwright.models.hyperprior import Hyperprior, Sizes

    blocks = torch.rand((900, 3, 16, 16), generator=torch.Generator().manual_seed(2)).cumsum(2).cumsum(3)
    model = Hyperprior(Sizes(latents=20, hyper=4))
    model.start_from(blocks)
    flat = blocks.double().flatten(1)
    values = torch.linalg.svdvals(flat - flat.mean(0))
    expected = values[20:].square().sum() / flat.numel()
    image = blocks[:16].reshape(4, 4, 3, 16, 16).permute(2, 0, 3, 1, 4).reshape(1, 3, 64, 64)
    with torch.inference_mode():
        found = model.image(model.latents(image, 1), 1)
    inside = slice(2, -2)
    error = (found - image)[..., inside, inside].square().mean()
    assert 0.5 * expected < error < 2 * expected


def test_training_goes_on_from_its_checkpoint(
    fetched: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphwright.models import hyperprior_training as training
    from graphwright.models.hyperprior import Sizes

    fetched("photos")
    fetched("two-photos")
    plan = training.Plan(Sizes((8, 8, 8), 16, 4), side=64, steps=4, batch=1, blocks=400)
    whole = training.train(plan, tmp_path / "whole").state_dict()
    monkeypatch.setattr(training, "SAVED_EVERY", 0.0)

    class Interrupted(Exception):
        pass

    def stop(message: str) -> None:
        if message.startswith("3/4"):
            raise Interrupted

    monkeypatch.setattr(training, "SAID_EVERY", 0.0)
    with pytest.raises(Interrupted):
        training.train(plan, tmp_path / "part", stop)
    again = training.train(plan, tmp_path / "part").state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_prior_is_a_distribution() -> None:
    from graphwright.models import hyperprior

    prior = hyperprior.prior(hyperprior.load(), 2)
    assert prior.shape == (codecs.HYPER, 2 * hyperprior.LARGEST_SYMBOL + 1)
    np.testing.assert_allclose(prior.sum(1), 1, atol=1e-12)
    assert (prior >= 0).all()


def test_qualities_are_one_to_four() -> None:
    for quality in (0, 5):
        with pytest.raises(UsageError, match=f"quality is {quality}, expected 1"):
            registry.torch_module("hyperprior-analysis", quality=quality)


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize("part", codecs.RESULTS)
def test_exports_equal_torch_at_any_size(part: str, exported: Callable[..., Path]) -> None:
    from .test_models import assert_equals_torch

    name = f"hyperprior-{part}"
    path, module = exported(name), registry.torch_module(name)
    entry = registry.describe(name)
    for batch, factor in ((1, 1), (2, 2)):
        sizes = {word: batch if word == "batch" else size * factor for word, size in entry.sizes.items()}
        assert_equals_torch(path, module, registry.sample_inputs(name, 1, sizes))


@pytest.mark.assets
def test_better_qualities_take_more_bits_and_lose_less(fetched: Callable[[str], None]) -> None:
    """On a photo that was held out; the figures are those of training's own estimate."""
    from graphwright.models import hyperprior, hyperprior_training

    fetched("photos")
    photo = datasets.photo("chelsea")[:256, :448].transpose(2, 0, 1)[None].astype(np.float32)
    model, points = hyperprior.load(), []
    with torch.inference_mode():
        for quality in range(codecs.QUALITIES):
            noise = torch.Generator().manual_seed(0)
            rate, error = hyperprior_training.losses(model, torch.from_numpy(photo), quality, noise)
            points.append((float(rate), 10 * np.log10(255**2 / float(error))))
    print(points)
    assert points == sorted(points)
    assert points[0][0] < 0.4 and points[0][1] > 28 and points[-1][0] < 1.3 and points[-1][1] > 34
