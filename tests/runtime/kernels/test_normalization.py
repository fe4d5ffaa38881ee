"""Normalization kernels against NumPy in float64: row lengths on the boundaries, special rows, threads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from graphwright.runtime.target import Target
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.tvm

# Of the output's scale, which is that of the weights.
TOLERANCE = 1e-5
X86 = ["cpu-avx512", "cpu-avx2", "cpu-baseline"]
EPSILON = 1e-5
# Vectors have 4, 8 or 16 lanes; groups of 4 vectors; sweeps of up to 16 vectors are written out; sums are in blocks of
# 2^14 elements in 64 lanes.
LENGTHS = sorted({1, 2, 100, 197} | {n + d for n in (4, 16, 64, 256, 1 << 14) for d in (-1, 0, 1)})

Kernel = Callable[..., np.ndarray]


@functools.cache
def kernel(
    target: Target, rows: tuple[int | str, ...], row: tuple[int, ...], centred: bool, bias: bool, threads: int = 1
) -> Kernel:
    import tvm
    from graphwright.runtime.codegen import machine_code
    from graphwright.runtime.kernels.normalization import normalization

    function = normalization(rows, row, EPSILON, target.isa, threads, centred, bias, "normalization")
    compiled = machine_code(tvm.IRModule({"normalization": function}), target)["normalization"]

    def run(*inputs: np.ndarray) -> np.ndarray:
        # What is left of this value was not written.
        y = tvm.runtime.tensor(np.full_like(inputs[0], 12345.0))
        compiled(*(tvm.runtime.tensor(i) for i in inputs), y)
        return y.numpy()

    return run


def reference(x: np.ndarray, row: tuple[int, ...], centred: bool, scale: Any, bias: Any = 0.0) -> np.ndarray:
    axes = tuple(range(x.ndim - len(row), x.ndim))
    wide = x.astype(np.float64)
    if centred:
        wide = wide - wide.mean(axes, keepdims=True)
    return wide / np.sqrt((wide * wide).mean(axes, keepdims=True) + EPSILON) * scale + bias


def check(
    target: Target, x: np.ndarray, row: tuple[int, ...], centred: bool, bias: bool, rows: Any = None, threads: int = 1
) -> None:
    random = np.random.default_rng(1)
    weights = [random.standard_normal(row).astype(np.float32) for _ in range(1 + bias)]
    run = kernel(target, ("n",) if rows is None else rows, row, centred, bias, threads)
    expected = reference(x, row, centred, *weights)
    scale = np.nanmax(np.abs(expected), initial=1.0)
    y = run(x, *(w.reshape(-1) for w in weights))
    np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCE * scale)


def draw(*shape: int, offset: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(shape) + offset).astype(np.float32)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", X86)
def test_row_lengths(runnable: Callable[[str], Target], name: str, length: int) -> None:
    for centred, bias in ((True, True), (False, False)):
        check(runnable(name), draw(3, length, offset=0.5), (length,), centred, bias)


@pytest.mark.parametrize("centred, bias", [(True, False), (False, True)])
def test_with_and_without_bias(centred: bool, bias: bool) -> None:
    check(Target.named("cpu"), draw(5, 33), (33,), centred, bias)


@pytest.mark.parametrize("rows", [(5,), (2, 3), ("b", "s"), ("b", 3), ()])
def test_shapes_of_rows(rows: tuple[int | str, ...]) -> None:
    sizes = tuple(2 + i if isinstance(d, str) else d for i, d in enumerate(rows))
    check(Target.named("cpu"), draw(*sizes, 20), (20,), True, True, rows=rows)


def test_rows_of_several_axes() -> None:
    check(Target.named("cpu"), draw(4, 3, 7), (3, 7), True, True)


@pytest.mark.parametrize("count", [0, 1, 2, 700])
def test_threads(count: int) -> None:
    x = draw(count, 192)
    check(Target.named("cpu"), x, (192,), True, True, threads=2)
    if count:
        check(Target.named("cpu"), x, (192,), True, True, rows=(count,), threads=2)


def test_no_elements() -> None:
    run, nothing = kernel(Target.named("cpu"), ("n",), (0,), False, False), np.zeros(0, np.float32)
    assert run(draw(3, 0), nothing).shape == (3, 0)


@pytest.mark.parametrize("length", [33, 384, 5000])
@pytest.mark.parametrize("name", X86)
def test_a_mean_that_is_large_against_the_deviation(
    runnable: Callable[[str], Target], name: str, length: int
) -> None:
    """The mean of squares minus the square of the mean would have no digit left, and the mean alone is rounded to the
    spacing of the numbers, 2e-4. The deviations are those of the given float32 numbers."""
    x = draw(2, length, offset=3000.0)
    run = kernel(runnable(name), ("n",), (length,), True, False)
    expected = reference(x, (length,), True, 1.0)
    y = run(x, np.ones(length, np.float32))
    np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", X86)
def test_special_rows_stay_in_their_row(runnable: Callable[[str], Target], name: str, special: float) -> None:
    x = draw(3, 35)
    x[1, 34] = special
    y = kernel(runnable(name), ("n",), (35,), True, False)(x, np.ones(35, np.float32))
    assert np.isnan(y[1]).all() and np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("name", X86)
def test_numbers_whose_squares_are_infinite_give_the_bias(
    runnable: Callable[[str], Target], name: str, centred: bool
) -> None:
    """As in arithmetic of float32, where d / sqrt(inf) is 0."""
    scale, bias = draw(35), draw(35, offset=1.0)
    y = kernel(runnable(name), ("n",), (35,), centred, True)(draw(3, 35) * np.float32(1e30), scale, bias)
    assert (y == bias).all()


def test_equal_elements_give_the_bias() -> None:
    x = np.full((2, 50), 7.25, np.float32)
    scale, bias = draw(50), draw(50, offset=1.0)
    y = kernel(Target.named("cpu"), ("n",), (50,), True, True)(x, scale, bias)
    np.testing.assert_allclose(y, np.broadcast_to(bias, y.shape), atol=TOLERANCE)


@settings(max_examples=40, deadline=None)
@given(
    data=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9 * 35).map(np.float32),
    factor=st.floats(0.25, 4.0),
)
def test_scaling_the_weights_scales_the_result(data: np.ndarray, factor: float) -> None:
    x = np.resize(data, (len(data) // 35 + 1, 35))
    run = kernel(Target.named("cpu"), ("n",), (35,), True, False)
    ones = np.ones(35, np.float32)
    y, scaled = run(x, ones), run(x, ones * np.float32(factor))
    assert np.abs(y).max() <= np.sqrt(35) * 1.001
    np.testing.assert_allclose(scaled, y * np.float32(factor), rtol=1e-6, atol=1e-6)
