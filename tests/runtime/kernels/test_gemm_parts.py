"""Products whose depth is cut into parts, with caches so small that small products are: against float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from graphwright.passes.base import Caches
from graphwright.runtime.target import Target
from hypothesis import given, settings
from hypothesis import strategies as st

tvm = pytest.importorskip("tvm")
pytestmark = pytest.mark.tvm

from graphwright.runtime import phases  # noqa: E402
from graphwright.runtime.kernels import gemm_spec, products  # noqa: E402
from tvm import relax  # noqa: E402

# Of the largest output, for sums of up to 300 products.
TOLERANCE = 1e-5
X86 = ["cpu-avx512", "cpu-avx2", "cpu-baseline"]


def target_of(name: str, threads: int = 1) -> Target:
    target = Target.named(name)
    if not target.runs_here:
        pytest.skip(f"this processor cannot run {name}")
    return dataclasses.replace(target, cores=threads, caches=Caches(1 << 10, 4 << 10, 1 << 20))


def product(a: np.ndarray, b: np.ndarray, c: np.ndarray, target: Target) -> np.ndarray:
    """|a · b + c|."""
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(a.shape, "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            y = products.matmul(bb, x, relax.const(b), target, {})
            y = bb.emit_output(relax.op.abs(bb.emit(relax.op.add(y, relax.const(c)))))
        bb.emit_func_output(y)
    executable, constants = phases.compile_module(bb.get(), target)
    return relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(a), tuple(constants)).numpy()


def check(rows: int, columns: int, inner: int, target: Target) -> None:
    draw = np.random.default_rng(0)
    a, b, c = (draw.standard_normal(s, np.float32) for s in ((rows, inner), (inner, columns), (columns,)))
    whole = a.astype(np.float64) @ b
    got = product(a, b, c, target)
    error = np.abs(got - np.abs(whole + c)).max() / np.abs(whole).max()
    assert error <= TOLERANCE, f"{error:.1e} of the output's scale"


@pytest.mark.parametrize("inner", [63, 64, 65, 100, 257])
@pytest.mark.parametrize("name", X86)
def test_parts_of_the_depth(name: str, inner: int) -> None:
    check(121, 40, inner, target_of(name))


@pytest.mark.parametrize("rows", [95, 96, 97, 101])
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 47])
def test_edges_of_tiles(rows: int, columns: int) -> None:
    check(rows, columns, 90, target_of("cpu"))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_rows_and_panels(threads: int) -> None:
    check(400, 100, 150, target_of("cpu", threads))
    check(2000, 9, 130, target_of("cpu", threads))


@settings(max_examples=12, deadline=None)
@given(st.integers(60, 300), st.integers(1, 70), st.integers(40, 300), st.sampled_from(X86))
def test_any_product(rows, columns, inner, name) -> None:
    check(rows, columns, inner, target_of(name))


def test_a_number_that_is_none_stays_in_its_row() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.standard_normal((121, 100), np.float32), np.ones((100, 20), np.float32)
    a[7, 90], a[9, 3] = np.nan, np.inf
    got = product(a, b, np.zeros(20, np.float32), target_of("cpu"))
    assert np.isnan(got[7]).all() and np.isposinf(got[9]).all()
    assert np.isfinite(np.delete(got, [7, 9], axis=0)).all()


def test_only_large_products_are_cut() -> None:
    target = Target.named("cpu-avx2")

    def depth(rows: int, inner: int) -> int | None:
        tile = gemm_spec.choose_tile(rows, 64, target.isa, 8)
        return gemm_spec.part_of_depth(rows, inner, tile, Caches(32 << 10, 512 << 10, 32 << 20), 8)

    assert depth(1024, 1024) is None and depth(64, 4096) is None
    assert depth(2048, 2048) == 256, "16 columns of a part in half of the first cache"
