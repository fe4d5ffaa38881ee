"""Sampling against distributions written out in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from graphwright.passes.errors import ModelError, UsageError
from graphwright.runtime.sampling import Sampler, Sampling, candidates
from hypothesis import given, settings
from hypothesis import strategies as st

WIDTH = 8  # candidates that the model gives


def largest(logits: np.ndarray, width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """What a TopK node gives: falling order, of equal ones the lower index first."""
    order = np.argsort(-logits, kind="stable")[:width]
    return logits[order], order.astype(np.int64)


def oracle(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probability of every token, one step of the definition after the other."""
    wide = [float(x) / temperature for x in logits]
    order = sorted(range(len(wide)), key=lambda i: (-wide[i], i))
    if top_k:
        order = order[:top_k]
    top = wide[order[0]]
    weights = [math.exp(wide[i] - top) for i in order]
    shares = [w / math.fsum(weights) for w in weights]
    kept: list[int] = []
    for position, token in enumerate(order):
        kept.append(token)
        if math.fsum(shares[: position + 1]) >= top_p:
            break
    if top_p == 1:
        kept = order
    result = np.zeros(len(wide))
    for position, token in enumerate(kept):
        result[token] = shares[position]
    return result / result.sum()


def distribution(sampling: Sampling, logits: np.ndarray) -> np.ndarray:
    tokens, probabilities = candidates(sampling, logits, *largest(logits))
    result = np.zeros(len(logits))
    result[tokens] = probabilities
    return result


sizes = st.integers(1, 40)
floats = st.floats(-30, 30, width=32)


@settings(deadline=None)
@given(
    logits=sizes.flatmap(lambda n: st.lists(floats, min_size=n, max_size=n)),
    temperature=st.floats(0.05, 5),
    top_k=st.one_of(st.just(0), st.integers(1, 50)),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1)),
)
def test_every_token_has_its_probability(logits: list[float], temperature: float, top_k: int, top_p: float) -> None:
    """Whether the model's own candidates suffice or all logits are needed."""
    array = np.array(logits, np.float32)
    found = distribution(Sampling(temperature, top_k, top_p), array)
    expected = oracle(array, temperature, top_k, top_p)
    assert found.sum() == pytest.approx(1)
    if not np.allclose(found, expected, rtol=1e-9, atol=1e-12):
        # A sum that meets p to the last bit may take one token more or less.
        wide = oracle(array, temperature, top_k, min(1.0, top_p * (1 + 1e-12)))
        narrow = oracle(array, temperature, top_k, top_p * (1 - 1e-12))
        assert any(np.allclose(found, other, rtol=1e-9, atol=1e-12) for other in (wide, narrow))


@pytest.mark.parametrize("top_k", [WIDTH - 1, WIDTH, WIDTH + 1, 39, 40, 41])
def test_how_many_candidates_the_model_gives_does_not_matter(top_k: int) -> None:
    logits = np.random.default_rng(top_k).standard_normal(40).astype(np.float32)
    np.testing.assert_allclose(distribution(Sampling(0.7, top_k), logits), oracle(logits, 0.7, top_k, 1), rtol=1e-12)


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.8, 12), Sampling(1.2, 0, 0.9), Sampling(1.0, 5, 0.7)])
def test_draws_are_distributed_so(sampling: Sampling) -> None:
    """20,000 draws: no frequency is five standard deviations off."""
    logits = np.random.default_rng(3).normal(0, 2, 30).astype(np.float32)
    sampler, count = Sampler(sampling), 20_000
    drawn = np.bincount([sampler.choose(logits, *largest(logits)) for _ in range(count)], minlength=30)
    expected = oracle(logits, sampling.temperature, sampling.top_k, sampling.top_p)
    assert not drawn[expected == 0].any()
    spread = np.sqrt(count * expected * (1 - expected)) + 1e-9
    assert (np.abs(drawn - count * expected) <= 5 * spread + 1).all()


@pytest.mark.parametrize("sampling", [Sampling(1.0, seed=5), Sampling(0.5, 4, seed=5), Sampling(1.0, 0, 0.5, seed=5)])
def test_a_seed_gives_the_same_tokens(sampling: Sampling) -> None:
    logits = np.random.default_rng(1).standard_normal((50, 64)).astype(np.float32)

    def run(chosen: Sampling) -> list[int]:
        sampler = Sampler(chosen)
        return [sampler.choose(row, *largest(row)) for row in logits]

    assert run(sampling) == run(sampling) != run(replace(sampling, seed=6))


def test_temperature_zero_takes_the_first_candidate_and_draws_nothing() -> None:
    logits = np.array([0, 3, 3, 1], np.float32)
    assert Sampler(Sampling()).choose(logits, *largest(logits)) == 1


def test_a_temperature_near_zero_is_greedy() -> None:
    logits = np.array([-200, 5, 4.5, -np.inf], np.float32)
    sampler = Sampler(Sampling(1e-300))
    assert {sampler.choose(logits, *largest(logits)) for _ in range(20)} == {1}


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = np.array([-np.inf, 0, -np.inf, 0, -np.inf], np.float32)
    for sampling in (Sampling(1.0), Sampling(1.0, 4), Sampling(1.0, 0, 0.999)):
        sampler = Sampler(sampling)
        assert {sampler.choose(logits, *largest(logits)) for _ in range(200)} == {1, 3}


def test_one_token_is_always_drawn() -> None:
    logits = np.array([-7], np.float32)
    for sampling in (Sampling(), Sampling(2.0), Sampling(1.0, 1, 0.1)):
        assert Sampler(sampling).choose(logits, *largest(logits)) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_distribution_are_refused(bad: float) -> None:
    logits = np.full(4, bad, np.float32)
    with pytest.raises(ModelError, match=r"largest logit is .*; expected a finite number"):
        Sampler(Sampling(1.0)).choose(logits, *largest(logits))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; expected a number of at least 0"),
        ({"temperature": math.nan}, "temperature is nan; expected"),
        ({"temperature": math.inf}, "temperature is inf; expected"),
        ({"top_k": -1}, "top-k is -1; expected at least 0"),
        ({"top_p": 0.0}, "top-p is 0.0; expected more than 0 and at most 1"),
        ({"top_p": 1.5}, "top-p is 1.5; expected"),
        ({"top_p": math.nan}, "top-p is nan; expected"),
        ({"seed": -3}, "seed is -3; expected at least 0"),
    ],
)
def test_a_value_out_of_range_is_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**options)  # type: ignore[arg-type]  # a mapping of options
