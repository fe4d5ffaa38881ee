"""Reductions, places of greatest elements and gathered rows against NumPy: boundaries of vectors and blocks, NaN."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from graphwright.runtime.target import Target
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.tvm

X86 = ["cpu-avx512", "cpu-avx2", "cpu-baseline"]
# Vectors have 4, 8 or 16 lanes, turns are of 4; sums begin anew every 256 terms of a lane.
LENGTHS = sorted({1, 2, 100, 5000} | {n + d for n in (4, 16, 32, 64, 256, 1 << 13) for d in (-1, 0, 1)})
FUNCTIONS: dict[str, Callable[..., Any]] = {"sum": np.sum, "mean": np.mean, "max": np.max, "min": np.min}
INF = np.float32(np.inf)


@functools.cache
def built(target: Target, maker: str, *arguments: Any, **more: Any) -> Callable[..., Any]:
    import tvm
    from graphwright.runtime.codegen import machine_code
    from graphwright.runtime.kernels import reductions

    function = getattr(reductions, maker)(*arguments, target.isa, name="kernel", **more)
    return machine_code(tvm.IRModule({"kernel": function}), target)["kernel"]


def run(kernel: Callable[..., Any], shape: Sequence[int], dtype: Any, *inputs: np.ndarray) -> np.ndarray:
    import tvm

    # What is left of this value was not written.
    y = tvm.runtime.tensor(np.full(shape, 12345, dtype))
    kernel(*(tvm.runtime.tensor(i) for i in inputs), y)
    return y.numpy()


def draw(*shape: int) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(shape) + 0.5).astype(np.float32)


def check(kernel: Callable[..., Any], kind: str, x: np.ndarray) -> None:
    """x: (outer, length, inner). 2e-6 of what the absolute values add up to."""
    expected = FUNCTIONS[kind](x.astype(np.float64), axis=1, keepdims=True)
    scale = 1.0 if kind in ("max", "min") else FUNCTIONS[kind](np.abs(x).astype(np.float64), axis=1).max(initial=1.0)
    np.testing.assert_allclose(run(kernel, expected.shape, np.float32, x), expected, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("name", X86)
def test_rows(runnable: Callable[[str], Target], name: str, kind: str) -> None:
    target = runnable(name)
    for length in LENGTHS:
        check(built(target, "reduction", kind, ("n",), ("k",), (1,)), kind, draw(3, length, 1))
    for length in (1, 35, 300, 8200):
        check(built(target, "reduction", kind, (3,), (length,), ()), kind, draw(3, length))


@pytest.mark.parametrize("inner", [2, 7, 8, 31, 32, 33, 64, 100, 384])
@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("name", X86)
def test_columns(runnable: Callable[[str], Target], name: str, kind: str, inner: int) -> None:
    kernel = built(runnable(name), "reduction", kind, ("n",), ("k",), (inner,))
    for length in (1, 2, 197, 255, 256, 257, 600):
        check(kernel, kind, draw(2, length, inner))
    check(built(runnable(name), "reduction", kind, (2,), (5,), (1, inner)), kind, draw(2, 5, 1, inner))


def test_threads_and_nothing() -> None:
    target = Target.named("cpu")
    for inner in (1, 96):
        for outer, length in (("n", "k"), (40, 100)):
            kernel = built(target, "reduction", "sum", (outer,), (length,), (inner,), threads=2)
            check(kernel, "sum", draw(40, 100, inner))
        kernel = built(target, "reduction", "max", ("n",), ("k",), (inner,))
        assert (run(kernel, (3, 1, inner), np.float32, draw(3, 0, inner)) == -INF).all()
        assert (run(built(target, "reduction", "sum", ("n",), ("k",), (inner,)), (3, 1, inner), np.float32,
                    draw(3, 0, inner)) == 0).all()  # fmt: skip
        least = built(target, "reduction", "min", ("n",), ("k",), (inner,))
        assert (run(least, (3, 1, inner), np.float32, draw(3, 0, inner)) == INF).all()
        assert run(kernel, (0, 1, inner), np.float32, draw(0, 3, inner)).size == 0


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("inner", [1, 20])
@pytest.mark.parametrize("name", X86)
def test_special_elements(runnable: Callable[[str], Target], name: str, inner: int, kind: str) -> None:
    x = draw(45, 41, inner)
    for row in range(41):
        x[row, row, 0] = np.nan
    x[41, 3], x[42] = -INF, -INF
    x[43, 2] = INF
    kernel = built(runnable(name), "reduction", kind, ("n",), ("k",), (inner,))
    expected = FUNCTIONS[kind](x, axis=1, keepdims=True)
    np.testing.assert_allclose(run(kernel, expected.shape, np.float32, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("least", [False, True])
@pytest.mark.parametrize("name", X86)
def test_places_of_greatest_elements(runnable: Callable[[str], Target], name: str, least: bool) -> None:
    pick = np.argmin if least else np.argmax
    for length in (1, 3, 8, 31, 32, 33, 64, 129, 1000):
        kernel = built(runnable(name), "place_of_greatest", ("n",), length, least=least)
        x = np.random.default_rng(length).integers(0, 1 + length // 2, (50, length)).astype(np.float32)
        x[0], x[1, -1] = (INF if least else -INF), (-INF if least else INF)
        np.testing.assert_array_equal(run(kernel, (50,), np.int64, x), pick(x, axis=1))


@pytest.mark.parametrize("row", [1, 3, 8, 33, 64, 384])
@pytest.mark.parametrize("numbers", ["int64", "int32"])
def test_gathered_rows(numbers: str, row: int) -> None:
    table = draw(11, row)
    places = np.array([[0, 10, -1], [-11, 5, 5]], numbers)
    for size, chosen in ((11, ("a", "b")), ("t", (2, 3))):
        kernel = built(Target.named("cpu"), "gather_rows", size, row, chosen, numbers)
        np.testing.assert_array_equal(run(kernel, (2, 3, row), np.float32, table, places), table[places])
    kernel = built(Target.named("cpu"), "gather_rows", 11, row, ("a", "b"), numbers)
    assert run(kernel, (0, 3, row), np.float32, table, places[:0]).size == 0
    far = np.array([[11, 1000000, -12]], numbers)
    np.testing.assert_array_equal(run(kernel, (1, 3, row), np.float32, table, far), table[[[10, 10, 0]]])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=90).map(np.float32))
def test_the_greatest_is_where_its_place_says(data: np.ndarray) -> None:
    target, x = Target.named("cpu"), np.resize(data, (1, 90))
    (place,) = run(built(target, "place_of_greatest", ("n",), 90), (1,), np.int64, x)
    (((most,),),) = run(built(target, "reduction", "max", ("n",), ("k",), (1,)), (1, 1, 1), np.float32, x[..., None])
    assert place == x.argmax() and most == x[0, place]
