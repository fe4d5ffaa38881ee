"""Weights whose products with bytes int16 holds: which ones meet, and codes that are held."""

from __future__ import annotations

import numpy as np
import pytest
from graphwright.passes.quantize.narrow_sums import MOST, Lanes, lanes
from graphwright.passes.quantize.rounding import round_together
from graphwright.passes.quantize.scales import fit_weights, weight_grid
from hypothesis import given
from hypothesis import strategies as st

MEET = {2: ([0, 1], [2, 3], [4, 5], [6, 7]), 4: ([0, 1, 4, 5], [2, 3, 6, 7])}  # of every eight channels


def sums(codes: np.ndarray, channels: int, taps: int, meeting: int = 4) -> np.ndarray:
    """Of positive codes and of negative ones, of every lane, by the definition."""
    shaped = codes.astype(int).reshape(-1, channels, taps)
    padded = np.pad(shaped, ((0, 0), (0, -channels % 8), (0, 0))).reshape(len(shaped), -1, 8, taps)
    lane = np.stack([padded[:, :, list(places)] for places in MEET[meeting]])
    return np.stack([np.maximum(lane, 0).sum(3), np.maximum(-lane, 0).sum(3)])


SHAPES = st.tuples(st.integers(1, 19), st.integers(1, 9))


@given(SHAPES, st.integers(0, 2**32 - 1), st.sampled_from(["int8", "int32", "float32"]), st.sampled_from([2, 4]))
def test_held_codes_fit_and_no_others_change(shape: tuple[int, int], seed: int, dtype: str, meeting: int) -> None:
    channels, taps = shape
    codes = np.random.default_rng(seed).integers(-127, 128, (3, channels * taps)).astype(dtype)
    found = lanes(channels, taps, meeting)
    held = found.held(codes)
    assert held.dtype == codes.dtype
    assert sums(held, channels, taps, meeting).max() <= MOST
    assert found.fits(held)
    assert (np.abs(held) <= np.abs(codes)).all()
    assert (np.sign(held) * np.sign(codes) >= 0).all()
    fits = sums(codes, channels, taps, meeting).max() <= MOST
    assert found.fits(codes) == fits
    if fits:
        np.testing.assert_array_equal(held, codes)


def test_what_is_too_much_is_taken_in_equal_shares() -> None:
    codes = np.array([[100, 50, -9, 3, 20, -100, 0, 0]], np.int8)
    # Channels 0, 1 and 4 share 170 - 128 = 42; 14 for each of them.
    np.testing.assert_array_equal(lanes(8).held(codes), [[86, 36, -9, 3, 6, -100, 0, 0]])


def test_kernels_take_such_weights_one_or_two_steps_at_a_time() -> None:
    dots = pytest.importorskip("graphwright.runtime.kernels.dots")
    from graphwright.runtime.target import Target

    isa = Target.named("cpu-avx2").isa
    draw = np.random.default_rng(0)
    codes = draw.integers(-127, 128, (40, 21 * 9)).astype(np.int8)
    assert dots.joined_steps(codes.reshape(40, 21, 3, 3), 1, isa) == 0
    for meeting, steps in ((2, 1), (4, 2)):
        held = lanes(21, 9, meeting).held(codes)
        assert dots.joined_steps(held.reshape(40, 21, 3, 3), 1, isa) == steps


@pytest.mark.parametrize("together", [False, True])
def test_scales_grow_where_sums_are_held(together: bool) -> None:
    draw = np.random.default_rng(1)
    weights = draw.normal(size=(8, 24)).astype(np.float32)
    rows = np.maximum(draw.normal(size=(200, 24)), 0).astype(np.float32)
    held: Lanes | None
    errors = []
    for held in (None, lanes(24)):
        codes = fit_weights(weights, weight_grid(8), lanes=held)
        if together:
            codes = round_together(weights, codes, weight_grid(8), (rows.T @ rows)[None], held)
        assert (sums(codes.codes, 24, 1).max() <= MOST) == (held is not None)
        errors.append(float(np.square(rows @ (weights - codes.values).T).mean()))
    signal = float(np.square(rows @ weights.T).mean())
    # A bit and a half: what general weights of normal numbers lose.
    assert errors[0] < errors[1] < 8 * errors[0]
    assert errors[1] < 1e-3 * signal


def test_lanes_in_another_order() -> None:
    draw = np.random.default_rng(2)
    codes = draw.integers(-127, 128, (2, 27)).astype(np.int8)
    order = draw.permutation(27)
    found = lanes(9, 3)
    np.testing.assert_array_equal(found.reordered(order).held(codes[:, order]), found.held(codes)[:, order])
