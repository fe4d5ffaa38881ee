"""Histograms that add up, and the ranges that are read from them."""

from __future__ import annotations

import numpy as np
import pytest
from graphwright.passes.quantize.ranges import SIDE, Histogram, Method, NotFinite
from graphwright.passes.quantize.scales import affine, data_grid, dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

FLOATS = st.floats(-1000, 1000, width=32, allow_subnormal=False)  # what underflows in a wide histogram counts as 0
PARTS = st.lists(arrays(np.float32, st.integers(0, 30), elements=FLOATS), min_size=1, max_size=4)


def histogram(*parts: np.ndarray) -> Histogram:
    found = Histogram()
    for part in parts:
        found.add(part)
    return found


def loss(x: np.ndarray, low: float, high: float) -> float:
    grid = data_grid(8)
    scale, zero = affine(low, high, grid)
    return float(((dequantize(quantize(x, scale, zero, grid), scale, zero) - x.astype(np.float64)) ** 2).sum())


@given(parts=PARTS)
@settings(max_examples=60, deadline=None)
def test_parts_in_any_order_and_merged_are_the_whole(parts: list[np.ndarray]) -> None:
    whole = histogram(np.concatenate(parts))
    merged = Histogram()
    for part in reversed(parts):
        merged.merge(histogram(part))
    for other in (histogram(*parts), histogram(*parts[::-1]), merged):
        np.testing.assert_array_equal(other.counts, whole.counts)
        np.testing.assert_array_equal(other.exponent, whole.exponent)
        assert other.low == whole.low and other.high == whole.high and other.count == whole.count


@given(x=arrays(np.float32, st.integers(1, 50), elements=FLOATS))
@settings(max_examples=60, deadline=None)
def test_bins_hold_the_numbers_between_their_edges(x: np.ndarray) -> None:
    found = histogram(x)
    width = 2.0 ** found.exponent[0] / SIDE
    expected = np.bincount(np.floor(x.astype(np.float64) / width).astype(int) + SIDE, minlength=2 * SIDE)
    np.testing.assert_array_equal(found.counts[0], expected)
    assert found.largest[0] == np.abs(x).max()
    np.testing.assert_allclose(found.mean, x.mean(dtype=np.float64), atol=1e-9)
    np.testing.assert_allclose(found.mean_square, (x.astype(np.float64) ** 2).mean(), rtol=1e-6)


def test_channels_have_ranges_of_their_own() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 50)).astype(np.float32) * np.array([[[1], [100], [0]]])
    found = Histogram(3)
    found.add(x, axis=1)
    assert found.count == 100
    for channel in range(3):
        one = histogram(x[:, channel])
        for method in Method:
            low, high = found.range(method, data_grid(8))
            assert (low[channel], high[channel]) == tuple(end[0] for end in one.range(method, data_grid(8)))


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("shape", ["normal", "one-sided", "outlier", "negative", "constant"])
def test_a_range_lies_within_what_was_seen(method: Method, shape: str) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal(20000).astype(np.float32)
    x = {"normal": x, "one-sided": np.maximum(x, 0), "outlier": np.append(x, np.float32(500)),
         "negative": -np.abs(x) - 1, "constant": np.full(5, 2.5, np.float32)}[shape]  # fmt: skip
    low, high = (float(end[0]) for end in histogram(x).range(method, data_grid(8)))
    assert min(x.min(), 0) <= low <= high <= max(x.max(), 0)
    if method is Method.MINMAX:
        assert (low, high) == (x.min(), x.max())
    if method is Method.MSE:
        assert loss(x, low, high) <= 1.01 * loss(x, float(x.min()), float(x.max()))
    if shape == "outlier" and method is Method.PERCENTILE:
        assert high < 10


def test_least_error_is_near_what_trying_both_ends_on_the_numbers_themselves_finds() -> None:
    x = np.random.default_rng(1).laplace(0.5, 1, 5000).astype(np.float32) ** 3
    low, high = (float(end[0]) for end in histogram(x).range(Method.MSE, data_grid(8)))
    parts = 2.0 ** (-np.arange(0, 41, 2) / 8)
    best = min(loss(x, float(x.min()) * a, float(x.max()) * b) for a in parts for b in parts)
    assert loss(x, low, high) < 1.02 * best


def test_entropy_cuts_a_long_tail() -> None:
    x = np.random.default_rng(2).standard_normal(100000).astype(np.float32)
    x[:10] = 100
    low, high = (float(end[0]) for end in histogram(x).range(Method.ENTROPY, data_grid(8)))
    assert 2 < high < 20 and -high <= low < -2


def test_nothing_seen_is_a_range_of_nothing() -> None:
    for method in Method:
        assert [float(end[0]) for end in Histogram().range(method, data_grid(8))] == [0, 0]
    assert histogram(np.zeros(0, np.float32)).count == 0 and not Histogram().largest


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_numbers_without_a_range_are_refused(number: float) -> None:
    with pytest.raises(NotFinite, match="holds NaN or infinity"):
        histogram(np.array([1, number, 2], np.float32))
