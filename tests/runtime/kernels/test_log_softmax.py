"""LogSoftmax and sums of exponentials against NumPy in float64: lengths on boundaries, fixed and free, special rows."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
from graphwright.runtime.target import Target
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.tvm

X86 = ["cpu-avx512", "cpu-avx2", "cpu-baseline"]
# Vectors have 4, 8 or 16 lanes, turns are of 4 of them, sums of 2^13 or 2^14 elements begin anew.
LENGTHS = sorted({1, 2, 100} | {n + d for n in (4, 8, 16, 64, 128, 256, 1 << 13, 1 << 14) for d in (-1, 0, 1)})
INF = np.float32(np.inf)


@functools.cache
def kernel(target: Target, shape: tuple[int | str, ...], threads: int = 1) -> Callable[[np.ndarray], np.ndarray]:
    import tvm
    from graphwright.runtime.codegen import machine_code
    from graphwright.runtime.kernels.log_softmax import log_softmax

    function = log_softmax(shape, target.isa, threads, "log_softmax")
    compiled = machine_code(tvm.IRModule({"log_softmax": function}), target)["log_softmax"]

    def run(x: np.ndarray) -> np.ndarray:
        # What is left of this value was not written.
        y = tvm.runtime.tensor(np.full_like(x, 12345.0))
        compiled(tvm.runtime.tensor(x), y)
        return y.numpy()

    return run


def reference(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        wide = wide - wide.max(axis=-1, keepdims=True, initial=-np.inf)
        return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def check(run: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> None:
    """To 2e-6 of the largest result, which is rounded to 1e-7 of itself several times."""
    expected = reference(x)
    np.testing.assert_allclose(run(x), expected, rtol=2e-6, atol=2e-6)


def draw(*shape: int) -> np.ndarray:
    return (np.random.default_rng(0).random(shape) * 20 - 10).astype(np.float32)


@pytest.mark.parametrize("name", X86)
def test_lengths(runnable: Callable[[str], Target], name: str) -> None:
    target = runnable(name)
    for length in LENGTHS:
        check(kernel(target, ("n", "m")), draw(3, length))
    for length in (1, 35, 256, 300):
        check(kernel(target, (3, length)), draw(3, length))


def test_shapes_and_threads() -> None:
    target = Target.named("cpu")
    check(kernel(target, ("a", 3, "c"), 2), draw(2, 3, 30))
    check(kernel(target, (9,), 2), draw(9))
    check(kernel(target, (700, 100), 2), draw(700, 100))
    check(kernel(target, ("n", "m"), 2), draw(700, 100))
    for shape in ((0, 3), (3, 0)):
        assert kernel(target, ("n", "m"))(draw(*shape)).shape == shape


@pytest.mark.parametrize("name", X86)
def test_special_rows(runnable: Callable[[str], Target], name: str) -> None:
    x = draw(6, 19)
    x[0, 3] = -INF
    x[1, :] = -INF
    x[2, 18] = INF
    x[3, 4] = np.nan
    x[4, :] = 3e38
    check(kernel(runnable(name), ("n", "m")), x)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=70).map(np.float32), st.floats(-20, 20))
def test_a_shift_changes_nothing(data: np.ndarray, shift: float) -> None:
    run, x = kernel(Target.named("cpu"), ("n", "m")), data[None]
    np.testing.assert_allclose(run(x + np.float32(shift)), run(x), rtol=0, atol=1e-5)
    assert abs(np.exp(run(x).astype(np.float64)).sum() - 1) < 1e-5


@functools.cache
def sums(target: Target, rows: tuple[int | str, ...], length: int | str, threads: int = 1) -> Callable[..., np.ndarray]:
    import tvm
    from graphwright.runtime.codegen import machine_code
    from graphwright.runtime.kernels.log_softmax import log_sum_exp

    function = log_sum_exp(rows, length, target.isa, threads, "log_sum_exp")
    compiled = machine_code(tvm.IRModule({"log_sum_exp": function}), target)["log_sum_exp"]

    def run(x: np.ndarray) -> np.ndarray:
        y = tvm.runtime.tensor(np.full(x.shape[:-1], 12345.0, np.float32))
        compiled(tvm.runtime.tensor(x), y)
        return y.numpy()

    return run


def check_sums(run: Callable[..., np.ndarray], x: np.ndarray) -> None:
    wide = x.astype(np.float64)
    top = np.nan_to_num(wide.max(axis=-1, keepdims=True, initial=-np.inf), nan=0, posinf=0, neginf=0)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        expected = (np.log(np.exp(wide - top).sum(axis=-1, keepdims=True)) + top)[..., 0]
    np.testing.assert_allclose(run(x), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", X86)
def test_sums_of_exponentials(runnable: Callable[[str], Target], name: str) -> None:
    target = runnable(name)
    for length in (*LENGTHS, 0):
        check_sums(sums(target, ("n",), "m"), draw(3, length))
    check_sums(sums(target, (3,), 5000), draw(3, 5000))
    # The greatest element of each row in another place, and stretches of nothing but -inf.
    x = draw(3, 5000)
    x[0, 10], x[1, 3000], x[2, 4999] = 50, 50, 50
    x[:, 2048:2900], x[0, 4096:] = -INF, -INF
    check_sums(sums(target, ("n",), "m"), x)
    x[0, 4500], x[1, 2100], x[2, 0] = np.nan, INF, np.nan
    assert np.isnan(sums(target, ("n",), "m")(x)[[0, 2]]).all() and sums(target, ("n",), "m")(x)[1] == INF
    x[1, 4998], x[2, 0] = np.nan, 0  # beside infinity, in front of it or behind
    assert np.isnan(sums(target, ("n",), "m")(x)[:2]).all()
    x = draw(6, 19)
    x[0, 3], x[1, :], x[2, 18], x[3, 4], x[4, :] = -INF, -INF, INF, np.nan, 3e38
    check_sums(sums(target, (6,), 19), x)
    check_sums(sums(target, ("a", 3), 30, 2), draw(200, 3, 30))
