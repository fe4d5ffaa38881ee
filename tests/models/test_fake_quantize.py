"""The gradient through a rounding against its formula, in float64, and fake quantization against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from graphwright.passes.quantize.scales import data_grid, dequantize, quantize

torch = pytest.importorskip("torch")
from graphwright.models.fake_quantize import _Data, fake_quantized, modulator, rounded  # noqa: E402 -- needs torch

pytestmark = pytest.mark.torch


def bump(f: float, beta: float) -> float:
    """g of the paper: the share of a step that a number with fraction f has gone."""
    return 0.5 * math.tanh(beta * (f - 0.5)) / math.tanh(beta / 2) + 0.5


@pytest.mark.parametrize("beta", [0.01, 1.0, 4.0])
def test_the_gradient_is_the_slope_of_the_formula(beta: float) -> None:
    x = torch.tensor([-2.75, -0.3, 0.0, 0.1, 0.5, 0.999, 7.25], dtype=torch.float64, requires_grad=True)
    rounded(x, beta).sum().backward()
    fractions = (x - torch.floor(x)).tolist()
    step = 1e-6
    slopes = [(bump(f + step, beta) - bump(f - step, beta)) / (2 * step) for f in fractions]
    assert x.grad is not None and x.grad.tolist() == pytest.approx(slopes, rel=1e-6)


@pytest.mark.parametrize("beta", [0.0, 1e-3, 1.0, 6.0])
def test_its_mean_over_a_step_is_1(beta: float) -> None:
    places = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    assert float(modulator(places, beta).mean()) == pytest.approx(1, rel=1e-6)


def test_without_a_modulator_it_is_the_straight_through_estimator() -> None:
    x = torch.linspace(-3, 3, 41, dtype=torch.float64, requires_grad=True)
    y = rounded(x, 0.0)
    y.sum().backward()
    assert x.grad is not None and (x.grad == 1).all()
    assert (y == torch.round(x)).all()
    limit = modulator(x.detach(), 1e-4)
    assert float((limit - 1).abs().max()) < 1e-8


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_data_have_the_gradients_of_the_plain_formula(beta: float) -> None:
    """One scale and zero point; numbers inside, at the ends and beyond."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(200, dtype=torch.float64, generator=random) * 3
    found = []
    for function in (
        lambda x, scale, zero: fake_quantized(x / scale, scale, zero, 0, 15, beta),
        lambda x, scale, zero: _Data.apply(x, scale, zero, 0, 15, beta),
    ):
        given = [x.clone(), torch.tensor(0.37, dtype=torch.float64), torch.tensor(6.0, dtype=torch.float64)]
        for one in given:
            one.requires_grad_()
        y = function(*given)
        (y * torch.arange(200)).sum().backward()
        found.append([y.detach(), *(one.grad for one in given)])
    for plain, ours in zip(*found, strict=True):
        assert torch.allclose(plain, ours, rtol=1e-12, atol=1e-12)


def test_the_way_forward_is_the_arithmetic_of_the_pass() -> None:
    x = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32) * 3
    for bits, scale, zero in ((8, 0.017, 100), (4, 0.3, 7), (4, 0.3, 0)):
        codes = quantize(x, np.float32(scale), zero, data_grid(bits))
        wanted = dequantize(codes, np.float32(scale), zero)
        given = (torch.from_numpy(x), torch.tensor(scale), torch.tensor(float(zero)), 0, 2**bits - 1, 1.0)
        assert np.array_equal(_Data.apply(*given).numpy(), wanted)
