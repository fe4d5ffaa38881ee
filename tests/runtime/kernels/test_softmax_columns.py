"""Softmax along an axis that is not the last against NumPy in float64: sizes on boundaries, forms, threads, special
columns."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import pytest
from graphwright.passes.ops import TWO_PASS_SOFTMAX
from graphwright.passes.ops.two_pass_softmax import NARROWEST, Form, choose_column_form, longest_column
from graphwright.runtime.target import Target
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.tvm

X86 = ["cpu-avx512", "cpu-avx2", "cpu-baseline"]
# Half the distance of float32 numbers at 20, as of x - max, and what a lane rounds that adds up to 256 terms.
TOLERANCE = 3e-6
LENGTHS = [1, 2, 7, 8, 9, 63, 64, 65, 255, 256, 257, 600]
COLUMNS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300]
INF, LOWEST = np.float32(np.inf), np.finfo(np.float32).min

Kernel = Callable[[np.ndarray], np.ndarray]


@functools.cache
def kernel(
    target: Target, shape: tuple[int | str, ...], form: Form = Form.AUTO, log: bool = False, threads: int = 2
) -> Kernel:
    """Of a shape (outer, length, inner)."""
    import tvm
    from graphwright.runtime.codegen import machine_code
    from graphwright.runtime.kernels.softmax_columns import softmax_columns

    outer, length, inner = shape
    function = softmax_columns((outer,), length, (inner,), target.isa, target.caches, threads, form, log, "softmax")
    compiled = machine_code(tvm.IRModule({"softmax": function}), target)["softmax"]

    def run(x: np.ndarray) -> np.ndarray:
        # What is left of this value was not written.
        y = tvm.runtime.tensor(np.full_like(x, 12345.0))
        compiled(tvm.runtime.tensor(x), y)
        return y.numpy()

    return run


def draw(*shape: int) -> np.ndarray:
    return (np.random.default_rng(sum(shape)).random(shape) * 20 - 10).astype(np.float32)


def reference(x: np.ndarray, log: bool = False) -> np.ndarray:
    if not log:
        return TWO_PASS_SOFTMAX.reference(x, 1)
    wide = x.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        wide = wide - wide.max(axis=1, keepdims=True, initial=-np.inf)
        return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def check(run: Kernel, x: np.ndarray, log: bool = False) -> None:
    np.testing.assert_allclose(run(x), reference(x, log), rtol=TOLERANCE, atol=TOLERANCE if log else 1.2e-38)


def small(target: Target, rows: int = 0) -> Target:
    """The target with caches in which columns of `rows` elements are long, and whatever the last one is exceeded."""
    caches = dataclasses.replace(target.caches, l1=64, l2=max(64, 8 * NARROWEST * rows), l3=0)
    return dataclasses.replace(target, caches=caches)


@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize("name", X86)
def test_free_sizes(runnable: Callable[[str], Target], name: str, form: Form) -> None:
    run = kernel(runnable(name), ("a", "b", "c"), form)
    for length in LENGTHS:
        for columns in COLUMNS:
            check(run, draw(2, length, columns))


@pytest.mark.parametrize("length", [1, 2, 8, 9, 21, 257])
@pytest.mark.parametrize("name", X86)
def test_fixed_sizes(runnable: Callable[[str], Target], name: str, length: int) -> None:
    for columns in (1, 5, 8, 33, 200):
        check(kernel(runnable(name), (2, length, columns)), draw(2, length, columns))


@pytest.mark.parametrize("name", X86)
def test_logarithms(runnable: Callable[[str], Target], name: str) -> None:
    target = runnable(name)
    for length in (1, 8, 9, 257):
        for columns in (1, 7, 40):
            x = draw(2, length, columns)
            # Longer columns than 9 do not fit, and the result is streamed.
            check(kernel(small(target, 9), ("a", "b", "c"), log=True), x, log=True)
            check(kernel(target, x.shape, log=True), x, log=True)


@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize("name", X86)
def test_results_larger_than_the_cache_are_streamed(runnable: Callable[[str], Target], name: str, form: Form) -> None:
    """Rows of odd length start at every alignment; both longer and shorter columns than scratch memory is for."""
    where = small(runnable(name), 40)
    for shape in [(2, 40, 64), (3, 40, 77), (2, 41, 77), (2, 5, 301)]:
        check(kernel(where, shape, form), draw(*shape))
        check(kernel(where, ("a", "b", "c"), form), draw(*shape))
    assert choose_column_form(41, where.caches)[0] is Form.TWO_PASS
    assert longest_column(where.caches) == 40


def test_threads_share_columns() -> None:
    target = Target.named("cpu")
    for shape in [(1, 21, 4096), (1, 300, 100), (64, 17, 33)]:
        x = draw(*shape)
        alone, shared = kernel(target, shape, threads=1)(x), kernel(target, shape, threads=2)(x)
        np.testing.assert_array_equal(alone, shared)
        check(kernel(target, ("a", "b", "c")), x)


def test_nothing_to_do() -> None:
    target = Target.named("cpu")
    for shape in [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)]:
        for declared in (shape, ("a", "b", "c")):
            assert kernel(target, declared)(np.zeros(shape, np.float32)).shape == shape


@pytest.mark.parametrize(
    "case", [c for c in TWO_PASS_SOFTMAX.cases if c.attributes["axis"] != -1], ids=lambda case: case.note
)
def test_cases_of_the_operator(case) -> None:
    (shape,) = case.shapes
    axis = case.attributes["axis"] % len(shape)
    x = draw(int(np.prod(shape[:axis])), shape[axis], int(np.prod(shape[axis + 1 :])))
    check(kernel(Target.named("cpu"), x.shape), x)


def specials(length: int) -> np.ndarray:
    """One column of each kind that goes wrong somewhere, beside usual ones."""
    x = draw(1, length, 15)[0]
    x[0, 0] = -INF
    x[: length // 2, 1] = -INF
    x[:, 2] = -INF
    x[:, 3] = LOWEST
    x[0, 4] = np.nan
    x[-1, 5] = np.nan
    x[length // 2, 6] = INF
    x[:-1, 7] = -1e9
    x[:-1, 8] = LOWEST
    x[:, 9] = 5e6
    x[:, 10] = -5e6
    x[:, 11] *= np.float32(1e30)
    x[1:, 12] = -90
    return x[None]


@pytest.mark.parametrize("length", [2, 8, 9, 70, 300])
@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize("name", X86)
def test_special_columns(runnable: Callable[[str], Target], name: str, form: Form, length: int) -> None:
    """They give what rows of the same elements give; a column says nothing of its neighbours."""
    x = specials(length)
    for where in (runnable(name), small(runnable(name))):
        for declared in (x.shape, ("a", "b", "c")):
            got = kernel(where, declared, form)(x)
            np.testing.assert_allclose(got, reference(x), rtol=TOLERANCE, atol=1.2e-38)
            assert np.isnan(got[0][:, [2, 4, 5, 6]]).all() and not np.isnan(got[0][:, [0, 1, 3, 13, 14]]).any()


@pytest.mark.parametrize("name", X86)
def test_many_rows_of_fewer_columns_than_lanes(runnable: Callable[[str], Target], name: str) -> None:
    """They are read as whole vectors; the last rows, fewer than a vector has lanes, as parts of vectors."""
    target = runnable(name)
    lanes = target.isa.lanes()
    first = 8 * lanes
    for columns in (1, 3, lanes - 1):
        for length in (first, first + 1, 256 * lanes + lanes - 1, 600 * lanes):
            check(kernel(target, (2, length, columns)), draw(2, length, columns))
    for log in (False, True):
        run = kernel(target, ("a", "b", 3), log=log)
        for length in (1, 9, first - 1, first, first + 1, first + lanes - 1, 256 * lanes, 257 * lanes + 2):
            check(run, draw(3, length, 3), log)


@pytest.mark.parametrize("declared", [(1, 300, 3), ("a", "b", 3)])
def test_special_columns_of_few(declared: tuple[int | str, ...]) -> None:
    """No column takes from its neighbours in the same vector, whose order they share with it."""
    x = specials(300)
    run = kernel(Target.named("cpu"), declared)
    for column in range(0, 15, 3):
        part = np.ascontiguousarray(x[:, :, column : column + 3])
        np.testing.assert_allclose(run(part), reference(part), rtol=TOLERANCE, atol=1.2e-38)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 300), st.integers(1, 140), st.floats(0, 80),
    st.sampled_from(list(Form)),
)
def test_columns_are_distributions(
    seed: int, outer: int, length: int, columns: int, spread: float, form: Form
) -> None:
    x = (np.random.default_rng(seed).random((outer, length, columns)) * spread).astype(np.float32)
    got = kernel(Target.named("cpu"), ("a", "b", "c"), form)(x)
    # Rounding of x - max, 80 at most, is 3.8e-6.
    np.testing.assert_allclose(got, reference(x), rtol=5e-6, atol=1e-38)
    np.testing.assert_allclose(got.sum(axis=1, dtype=np.float64), 1.0, rtol=2e-6)


def test_the_logarithm_of_few_rows_compiles_in_seconds() -> None:
    """TVM once wrote the greatest of all rows into every step of the logarithm: half a minute for seven rows."""
    import time

    start = time.process_time()
    run = kernel(Target.named("cpu"), ("a", 7, 174), log=True)
    assert time.process_time() - start < 6
    check(run, draw(2, 7, 174), log=True)
