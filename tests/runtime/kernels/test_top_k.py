"""The top-k kernel against NumPy: boundaries of blocks, ties, infinities, NaN, one element, rows over threads."""

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


@functools.cache
def kernel(target: Target, rows: Any, length: int, count: int, threads: int, least: bool) -> Callable[..., Any]:
    import tvm
    from graphwright.runtime.codegen import machine_code
    from graphwright.runtime.kernels.top_k import top_k

    function = top_k(rows, length, count, target.isa, threads, least, "top_k")
    return machine_code(tvm.IRModule({"top_k": function}), target)["top_k"]


def check(target: Target, x: np.ndarray, count: int, threads: int = 1, least: bool = False, known: bool = True) -> None:
    import tvm

    made = kernel(target, (x.shape[0],) if known else ("n",), x.shape[1], count, threads, least)
    # What is left of these values was not written.
    values = tvm.runtime.tensor(np.full((x.shape[0], count), 12345.0, np.float32))
    places = tvm.runtime.tensor(np.full((x.shape[0], count), -1, np.int64))
    made(tvm.runtime.tensor(x), values, places)
    keys = np.where(np.isnan(x), np.inf, x)
    order = np.argsort(keys if least else -keys, 1, kind="stable")[:, :count]
    np.testing.assert_array_equal(places.numpy(), order)
    np.testing.assert_array_equal(values.numpy(), np.take_along_axis(x, order, 1))


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("length, count", [(1, 1), (7, 7), (63, 5), (64, 64), (65, 3), (129, 100), (1000, 256)])
@pytest.mark.parametrize("least", [False, True])
def test_lengths(length: int, count: int, least: bool) -> None:
    check(Target.named("cpu"), numbers(length, 3, length), count, least=least)


@pytest.mark.parametrize("name", ["cpu-avx512", "cpu-avx2", "cpu-baseline"])
def test_instruction_sets(name: str, runnable: Callable[[str], Target]) -> None:
    check(runnable(name), numbers(0, 2, 333), 20)


@pytest.mark.parametrize("least", [False, True])
def test_ties_and_special_numbers(least: bool) -> None:
    target, x = Target.named("cpu"), np.zeros((6, 150), np.float32)
    x[1, 100:] = -np.inf
    x[2] = -np.inf
    x[3, [5, 70, 149]], x[3, [6, 71]] = np.nan, np.inf
    x[4] = np.arange(150)
    x[5] = -np.arange(150)
    check(target, x, 10, least=least)


def test_rows_over_threads_none_and_a_number_known_at_run_time() -> None:
    target = Target.named("cpu")
    check(target, numbers(1, 400, 300), 9, threads=2)
    check(target, numbers(1, 400, 300), 9, threads=2, known=False)
    check(target, numbers(1, 0, 300), 9, known=False)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(40, 3), (130, 130), (200, 17)]), st.booleans(), st.integers(1, 5), st.integers(0, 999))
def test_any_numbers(sizes: tuple[int, int], least: bool, few: int, seed: int) -> None:
    """Few different numbers, so that most of them are equal."""
    x = np.random.default_rng(seed).integers(0, few, (4, sizes[0])).astype(np.float32)
    check(Target.named("cpu"), x, sizes[1], least=least)


@pytest.mark.parametrize("count", [0, 257, 11])
def test_counts_without_a_kernel(count: int) -> None:
    from graphwright.runtime.kernels.top_k import top_k

    with pytest.raises(ValueError, match="expected 1 to"):
        top_k((1,), 10 if count == 11 else 1000, count, Target.named("cpu").isa)
