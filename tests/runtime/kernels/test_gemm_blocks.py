"""Products with weights of a few bits against NumPy in float64: few rows and many, blocks, tails, bytes of A."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from graphwright.passes.ops.block_quantize import block_quantize
from graphwright.runtime.target import Target
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.tvm

X86 = ["cpu", "cpu-avx512", "cpu-avx2", "cpu-baseline"]
TOLERANCE = 2e-6  # of the output's scale

Kernel = Callable[[np.ndarray, np.ndarray, np.ndarray, "np.ndarray | None"], np.ndarray]


def spec(rows: int | None, inner: int, columns: int, block: int = 32, **fields: Any) -> Any:
    from graphwright.runtime.kernels.gemm_blocks import BlockSpec

    return BlockSpec(rows, inner, columns, block, **fields)


def function(s: Any, target: Target, name: str, threads: int) -> Any:
    """A kernel (a, words, scales, [zeros,] y) over flat buffers; rows are y's where the spec leaves them open."""
    from graphwright.runtime.kernels.block_products import FEW, panel_tile
    from graphwright.runtime.kernels.gemm_blocks import FewRows, ManyRows, Weights
    from graphwright.runtime.kernels.gemm_spec import GemmSpec, choose_tile
    from graphwright.runtime.kernels.vectors import Vectors
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    v = Vectors(target.isa)
    panel = choose_tile(None, s.columns, target.isa, v.lanes).vectors
    kinds = ["float32", "int32", s.scales, *(["uint8"] if s.zeros else [])]
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "global_symbol": name})
        flat = [
            T.match_buffer(T.arg(f"x{i}", T.handle()), (tirx.Var(f"n{i}", "int64"),), kind)
            for i, kind in enumerate(kinds)
        ]
        m = tirx.Var("m", "int64")
        out = T.match_buffer(T.arg("y", T.handle()), (m, s.columns), "float32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            y = T.decl_buffer((m * s.columns,), "float32", data=out.data)
            with v.prelude():

                def store(value: Any, row: Any, column: Any, there: int | None) -> None:
                    count = None if there is None else tirx.const(there, "int64")
                    v.store(y, row * tirx.const(s.columns, "int64") + column, value, count)

                a, words, scales, *zeros = flat
                weights = Weights(s, words, scales, zeros[0] if zeros else None)
                if s.rows is not None and s.rows <= FEW:
                    FewRows(v, s, panel, a, weights, store, threads).emit()
                else:
                    tile = panel_tile(s.rows, s.columns, panel, target.isa)
                    product = GemmSpec(s.rows, s.inner, s.columns)
                    rows = m if s.rows is None else s.rows
                    fields = (v, product, tile, rows, s.inner, 1, a, None, store, threads, target.caches)
                    ManyRows(weights, *fields).emit()
    return builder.get()


def kernels(specs: Sequence[Any], target: Target, threads: int = 1) -> list[Kernel]:
    """All of them in one library. Each takes A (M, K), codes (K, N), scales and zeros (blocks, N)."""
    import tvm
    from graphwright.runtime.codegen import machine_code
    from graphwright.runtime.kernels.gemm_blocks import pack
    from graphwright.runtime.kernels.gemm_spec import choose_tile
    from graphwright.runtime.kernels.vectors import Vectors

    module = tvm.IRModule({f"g{i}": function(s, target, f"g{i}", threads) for i, s in enumerate(specs)})
    library = machine_code(module, target)
    lanes = Vectors(target.isa).lanes

    def run(i: int, s: Any, a: np.ndarray, codes: np.ndarray, scales: np.ndarray, zeros: Any) -> np.ndarray:
        width = choose_tile(None, s.columns, target.isa, lanes).vectors * lanes
        packed = pack(codes, scales.astype(s.scales), zeros, s, width)
        given = [a.reshape(-1), packed.words, packed.scales, *([] if packed.zeros is None else [packed.zeros])]
        y = tvm.runtime.tensor(np.full((len(a), s.columns), 12345, np.float32))
        library[f"g{i}"](*(tvm.runtime.tensor(np.ascontiguousarray(x)) for x in given), y)
        return y.numpy()

    return [lambda a, c, sc, z, i=i, s=s: run(i, s, a, c, sc, z) for i, s in enumerate(specs)]  # type: ignore[misc]


def check(s: Any, kernel: Kernel, rows: int, seed: int = 0, a: np.ndarray | None = None) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 1 << s.bits, (s.inner, s.columns)).astype(np.uint8)
    scales = (random.standard_normal((s.blocks, s.columns)) * 0.1).astype(np.float16).astype(np.float32)
    zeros = random.integers(0, 1 << s.bits, (s.blocks, s.columns)).astype(np.uint8) if s.zeros else None
    a = random.standard_normal((rows, s.inner)).astype(np.float32) if a is None else a
    middle = np.full(scales.shape, 1 << (s.bits - 1)) if zeros is None else zeros.astype(np.float64)
    steps, factors = (np.repeat(x.astype(np.float64), s.block, 0)[: s.inner] for x in (middle, scales))
    given = quantized(a, s.block) if s.integer else a.astype(np.float64)
    expected = given @ ((codes - steps) * factors)
    limit = TOLERANCE * (np.abs(given) @ np.abs((codes - steps) * factors)).max(initial=1e-30)
    assert np.abs(kernel(a, codes, scales, zeros) - expected).max(initial=0) <= limit, s


def quantized(a: np.ndarray, block: int) -> np.ndarray:
    whole = -(-a.shape[1] // block) * block
    return block_quantize(np.pad(a, ((0, 0), (0, whole - a.shape[1]))), block)[:, : a.shape[1]]


@pytest.mark.parametrize("name", X86)
def test_edges_of_panels_words_and_blocks(name: str, runnable: Callable[[str], Target]) -> None:
    specs = [
        *(spec(rows, 64, columns) for rows in (1, 2, 4, 5, 13) for columns in (1, 15, 16, 17, 33, 100)),
        *(spec(rows, inner, 24) for rows in (1, 7) for inner in (1, 7, 8, 9, 31, 33, 63, 65)),
        *(spec(rows, 96, 40, block) for rows in (1, 6) for block in (8, 16, 48, 96, 128)),
        *(spec(rows, 70, 20, 32, bits=bits, zeros=zeros) for rows in (1, 9) for bits in (2, 4, 8) for zeros in (0, 1)),
        *(spec(rows, 64, 24, scales="float16") for rows in (2, 8)),
    ]
    for s, kernel in zip(specs, kernels(specs, runnable(name)), strict=True):
        check(s, kernel, s.rows)


@pytest.mark.parametrize("name", X86[:3])
def test_bytes_of_a(name: str, runnable: Callable[[str], Target]) -> None:
    from graphwright.runtime.kernels.gemm_blocks import integer_form

    isa = runnable(name).isa
    if not integer_form(isa):
        pytest.skip(f"{isa.name} has no such products")
    specs = [
        *(spec(rows, 64, columns, integer=True) for rows in (1, 3, 4) for columns in (1, 16, 17, 100)),
        *(spec(1, inner, 24, integer=True) for inner in (1, 7, 9, 33, 63, 65)),
        *(spec(2, 96, 40, block, integer=True, zeros=zeros) for block in (8, 16, 48, 96, 128) for zeros in (0, 1)),
        spec(1, 96, 20, bits=2, integer=True),
    ]
    for s, kernel in zip(specs, kernels(specs, runnable(name)), strict=True):
        check(s, kernel, s.rows)


@pytest.mark.parametrize("name", X86[2:3])
def test_sums_of_the_largest_codes_and_bytes_are_exact(name: str, runnable: Callable[[str], Target]) -> None:
    s = spec(1, 256, 16, 128, zeros=True, integer=True)
    (kernel,) = kernels([s], runnable(name))
    for sign in (1, -1):
        a = np.full((1, 256), sign, np.float32)
        codes, zeros = np.full((256, 16), 15, np.uint8), np.zeros((2, 16), np.uint8)
        y = kernel(a, codes, np.ones((2, 16), np.float32), zeros)
        np.testing.assert_allclose(y, sign * 256 * 15.0, rtol=1e-6)


@pytest.mark.parametrize("name", X86[2:3])
def test_what_is_no_number_stays_none(name: str, runnable: Callable[[str], Target]) -> None:
    specs = [spec(1, 64, 16, integer=True), spec(1, 64, 16)]
    for kernel in kernels(specs, runnable(name)):
        for value in (np.nan, np.inf):
            a = np.ones((1, 64), np.float32)
            a[0, 40] = value
            codes = np.random.default_rng(0).integers(9, 16, (64, 16)).astype(np.uint8)
            assert not np.isfinite(kernel(a, codes, np.ones((2, 16), np.float32), None)).any()


@pytest.mark.parametrize("name", X86[2:3])
def test_a_block_of_zeros_is_zero(name: str, runnable: Callable[[str], Target]) -> None:
    s = spec(1, 64, 16, integer=True)
    check(s, kernels([s], runnable(name))[0], 1, a=np.zeros((1, 64), np.float32))


@pytest.mark.parametrize("name", ["cpu"])
def test_rows_known_at_run_time_and_two_threads(name: str, runnable: Callable[[str], Target]) -> None:
    open_rows, wide = spec(None, 96, 70), spec(1, 512, 600, integer=True)
    first, second = kernels([open_rows, wide], runnable(name), threads=2)
    for rows in (1, 2, 5, 6, 7, 31):
        check(open_rows, first, rows)
    check(wide, second, 1)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_size(data: Any) -> None:
    rows, inner, columns = (data.draw(st.integers(1, most)) for most in (9, 150, 70))
    bits = data.draw(st.sampled_from([4, 8]))
    block = 32 // bits * data.draw(st.integers(1, 12))
    s = spec(rows, inner, columns, block, bits=bits, zeros=data.draw(st.booleans()))
    target = Target.named("cpu")
    check(s, kernels([s], target)[0], rows, seed=data.draw(st.integers(0, 99)))
