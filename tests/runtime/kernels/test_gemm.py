"""Matrix products against NumPy in float64: the edges of every tile, batches, shared and packed operands."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from graphwright.passes.base import Caches
from graphwright.runtime.target import Target
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.tvm

X86 = ["cpu", "cpu-avx512", "cpu-avx2", "cpu-baseline"]
UNWRITTEN = 12345.0


@dataclass(frozen=True)
class Product:
    """One product. dynamic: rows are known at run time only. weights: type that a packed B is stored in."""

    m: int
    k: int
    n: int
    packed: bool = True
    batch: int = 1
    shared_a: bool = False
    shared_b: bool = False
    dynamic: bool = False
    weights: str = "float32"


def function(product: Product, target: Target, name: str, threads: int) -> Any:
    """A kernel (a, b, y) over flat buffers."""
    from graphwright.runtime.kernels.gemm import GemmEmitter
    from graphwright.runtime.kernels.gemm_spec import GemmSpec, choose_tile, packed_tile
    from graphwright.runtime.kernels.vectors import Vectors
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    p, v = product, Vectors(target.isa)
    rows = None if p.dynamic else p.m
    spec = GemmSpec(rows, p.k, p.n, p.packed, p.batch, p.shared_a, p.shared_b, p.weights)
    tile = (packed_tile if p.packed else choose_tile)(rows, p.n, target.isa, v.lanes)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "global_symbol": name})
        sizes = [tirx.Var(f"n{i}", "int64") for i in range(3)]
        m = tirx.Var("m", "int64")
        shapes = [(sizes[0],), (sizes[1],), (m, p.batch * p.n)]
        types = ("float32", "float32" if p.weights == "float32" else "uint16", "float32")
        a, b, y = (
            T.match_buffer(T.arg(f"x{i}", T.handle()), shape, dtype)
            for i, (shape, dtype) in enumerate(zip(shapes, types, strict=True))
        )
        with T.sblock("root"):
            T.reads()
            T.writes()
            flat = T.decl_buffer((m * p.batch * p.n,), "float32", data=y.data)
            with v.prelude():

                def store(value: Any, row: Any, column: Any, there: int | None) -> None:
                    count = None if there is None else tirx.const(there, "int64")
                    v.store(flat, row * tirx.const(p.n, "int64") + column, value, count)

                size = m if p.dynamic else p.m
                GemmEmitter(v, spec, tile, size, p.k, p.batch, a, b, store, threads, target.caches).emit()
    return builder.get()


Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


def kernels(products: Sequence[Product], target: Target, threads: int = 1) -> list[Kernel]:
    """All of them in one library. Each takes A (batch, M, K) and B (batch, K, N), 1 for a batch where it is shared."""
    import tvm
    from graphwright.runtime.codegen import machine_code
    from graphwright.runtime.kernels.gemm_spec import pack, packed_tile
    from graphwright.runtime.kernels.vectors import Vectors

    module = tvm.IRModule({f"g{i}": function(p, target, f"g{i}", threads) for i, p in enumerate(products)})
    library = machine_code(module, target)
    lanes = Vectors(target.isa).lanes

    def run(number: int, product: Product, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        p, m = product, a.shape[-2]
        if p.packed:
            tile = packed_tile(None if p.dynamic else p.m, p.n, target.isa, lanes)
            b = pack(b.reshape(p.k, p.n).astype(dtype_named(p.weights)), tile, lanes)
        # One row more than there is: what a kernel writes behind its end is seen.
        y = np.full((p.batch * m + 1) * p.n, UNWRITTEN, np.float32)
        out = tvm.runtime.tensor(y)
        shape = (m, p.batch * p.n)
        view = out._create_view(shape) if 0 not in shape else tvm.runtime.tensor(np.zeros(shape, np.float32))
        library[f"g{number}"](tvm.runtime.tensor(a.reshape(-1)), tvm.runtime.tensor(b.reshape(-1)), view)
        result = out.numpy()
        assert (result[p.batch * m * p.n :] == UNWRITTEN).all(), "written behind the end"
        return result[: p.batch * m * p.n].reshape(p.batch, m, p.n)

    return [functools.partial(run, i, p) for i, p in enumerate(products)]


def dtype_named(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def operands(product: Product, rows: int | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    p, random = product, np.random.default_rng(seed)
    a = random.standard_normal((1 if p.shared_a else p.batch, p.m if rows is None else rows, p.k))
    b = random.standard_normal((1 if p.packed or p.shared_b else p.batch, p.k, p.n))
    # What a narrow type holds.
    return a.astype(np.float32), b.astype(dtype_named(p.weights)).astype(np.float32)


def check(product: Product, kernel: Kernel, rows: int | None = None) -> None:
    """A sum of K products is off by at most K + 1 roundings of the sum of their magnitudes."""
    a, b = operands(product, rows)
    wide = a.astype(np.float64), b.astype(np.float64)
    limit = (product.k + 2) * 2.0**-24 * (np.abs(wide[0]) @ np.abs(wide[1]))
    got = kernel(a, b)
    wrong = ~(np.abs(got - wide[0] @ wide[1]) <= limit)
    assert not wrong.any(), f"{product}, {rows} rows: {wrong.sum()} elements, first at {np.argwhere(wrong)[0]}"


def edges(target: Target, rows: int) -> list[int]:
    """Columns around a vector and around the panels of the tile that is taken for as many rows."""
    from graphwright.runtime.kernels.gemm_spec import choose_tile
    from graphwright.runtime.kernels.vectors import Vectors

    lanes = Vectors(target.isa).lanes
    width = choose_tile(rows, 1000, target.isa, lanes).vectors * lanes
    return sorted({1, 2, *(w + d for w in (lanes, width, 2 * width) for d in (-1, 0, 1))})


SLOW = [pytest.param(part, marks=pytest.mark.slow) for part in range(1, 12)]


@pytest.mark.parametrize("part", [0, *SLOW])
@pytest.mark.parametrize("name", X86)
def test_tile_edges(name: str, part: int, runnable: Callable[[str], Target]) -> None:
    """Counts of rows up to 16 with columns around the edges that belong to them, K around the unrolled steps.

    Of all pairs each part takes every twelfth.
    """
    target = runnable(name)
    depths = (1, 3, 4, 5, 7, 8, 9, 13)
    pairs = [(m, n) for m in range(1, 17) for n in edges(target, m)]
    cases = [Product(m, depths[i % 8], n, packed=i // 12 % 2 == 0) for i, (m, n) in enumerate(pairs) if i % 12 == part]
    # In place only whole vectors of B are asked for by products.matmul; the emitter itself takes any.
    for case, kernel in zip(cases, kernels(cases, target), strict=True):
        check(case, kernel)


def test_rows_that_are_known_at_run_time_are_shared_evenly() -> None:
    """Around one and two chunks of tiles, on two threads."""
    from graphwright.runtime.kernels.gemm import CHUNK
    from graphwright.runtime.kernels.gemm_spec import packed_tile
    from graphwright.runtime.kernels.vectors import Vectors

    target, case = Target.named("cpu"), Product(0, 40, 50, dynamic=True)
    height = packed_tile(None, case.n, target.isa, Vectors(target.isa).lanes).rows
    (kernel,) = kernels([case], target, 2)
    for rows in (CHUNK * height + n for n in (-1, 0, 1, height, CHUNK * height - 1, CHUNK * height + 1)):
        check(case, kernel, rows)


@pytest.mark.parametrize("name", X86)
def test_dynamic_rows(name: str, runnable: Callable[[str], Target]) -> None:
    target = runnable(name)
    packed = target.isa.name == "sse2"
    cases = [Product(0, 5, 20, packed, dynamic=True)]
    for case, kernel in zip(cases, kernels(cases, target), strict=True):
        for rows in (0, *range(1, 34), 100, 257):
            check(case, kernel, rows)


@pytest.mark.parametrize("name", X86)
def test_batches(name: str, runnable: Callable[[str], Target]) -> None:
    target = runnable(name)
    cases = [
        Product(5, 6, 17, False, batch=3), Product(7, 1, 40, False, batch=3, shared_a=True),
        Product(1, 9, 33, False, batch=4, shared_b=True),
        Product(4, 3, 8, False, batch=2, shared_a=True, shared_b=True),
    ]  # fmt: skip
    cases += [Product(0, 3, 8, False, batch=3, dynamic=True)] if name == "cpu" else []
    for case, kernel in zip(cases, kernels(cases, target), strict=True):
        for rows in (1, 6, 11) if case.dynamic else (None,):
            check(case, kernel, rows)


def test_threads() -> None:
    """Enough work for several: chunks of rows, of panels, and of a batch."""
    target = Target.named("cpu")
    cases = [
        Product(300, 64, 24), Product(7, 128, 300), Product(97, 40, 97, False), Product(9, 64, 40, False, batch=13),
        Product(1, 512, 515), Product(0, 64, 40, dynamic=True),
    ]  # fmt: skip
    for case, kernel in zip(cases, kernels(cases, target, 3), strict=True):
        check(case, kernel, 203 if case.dynamic else None)


def test_threads_share_panels_or_chunks_of_rows() -> None:
    """Panels that three threads divide evenly and others, the last one narrower or not; one chunk of rows and several,
    of different sizes."""
    target = Target.named("cpu")
    target = dataclasses.replace(target, caches=dataclasses.replace(Caches(), l1=1024, l2=1 << 15))
    cases = [Product(m, 96, n) for m in (4, 50, 197) for n in (96, 144, 288, 300, 576 - 11)]
    for case, kernel in zip(cases, kernels(cases, target, 3), strict=True):
        check(case, kernel)


@pytest.mark.parametrize("name", X86)
def test_streams_of_weights_beyond_the_cache(name: str, runnable: Callable[[str], Target]) -> None:
    """Few rows, B larger than the second cache: depths that no number of streams divides, and that are read in one."""
    small = dataclasses.replace(Caches(), l1=1024, l2=2048)
    target = dataclasses.replace(runnable(name), caches=small)
    cases = [Product(m, k, 35) for m in (1, 2, 3, 8) for k in (15, 63, 64, 65, 97)] + [Product(1, 3072, 33)]
    for case, kernel in zip(cases, kernels(cases, target), strict=True):
        check(case, kernel)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_weights_beyond_the_cache_are_asked_for_ahead(weights: str) -> None:
    """Where a processor's own fetching ends with every page: few rows, fixed or of the run, the last panel narrower."""
    target = Target.named("cpu")
    isa, caches = dataclasses.replace(target.isa, ahead=8 << 10), dataclasses.replace(target.caches, l2=1 << 18)
    target = dataclasses.replace(target, isa=isa, caches=caches)
    cases = [Product(m, 1031, 250, weights=weights) for m in (2, 3, 8, 13)] + [Product(0, 1031, 250, dynamic=True)]
    texts = [str(function(case, target, "g", 1)) for case in (cases[1], dataclasses.replace(cases[1], k=40))]
    assert ["gw_prefetch" in text for text in texts] == [True, False]
    for case, kernel in zip(cases, kernels(cases, target), strict=True):
        for rows in (1, 5, 31) if case.dynamic else (None,):
            check(case, kernel, rows)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("unroll", [1, 2, 4])
def test_streams_meet_in_no_line(rows: int, unroll: int) -> None:
    """Whatever the depth, streams hold nearly all of it and keep apart."""
    from graphwright.runtime.kernels.gemm_spec import PAGE, streams_of_depth

    for inner in (64, 576, 1024, 1536, 3072, 4096, 5120, 6144, 8960, 16384):
        streams, length = streams_of_depth(rows, inner, unroll)
        assert length % unroll == 0 and length // unroll % 2 == 1
        assert inner - 2 * streams * unroll < streams * length <= inner
        assert inner < PAGE or min(length % PAGE, -length % PAGE) >= PAGE // 32


@pytest.mark.parametrize("name", X86)
@pytest.mark.parametrize("packed", [True, False])
def test_rows_and_columns_keep_what_is_not_finite(name: str, packed: bool, runnable: Callable[[str], Target]) -> None:
    """A NaN or infinity of A is in its row of the result only, one of B in its column; 0 · inf is NaN."""
    target = runnable(name)
    product = Product(7, 5, 37, packed)
    (kernel,) = kernels([product], target)
    for value in (np.nan, np.inf, -np.inf):
        a, b = operands(product)
        a[0, 3, 2], b[0, 4, 36], b[0, 1, 8] = value, value, value
        a[0, 5, 4] = 0
        with np.errstate(invalid="ignore"):
            expected = a.astype(np.float64) @ b.astype(np.float64)
        np.testing.assert_allclose(kernel(a, b), expected, rtol=1e-5, atol=1e-5)


def test_a_product_of_nothing() -> None:
    """K = 0 gives zeros, no columns and no rows give nothing."""
    cases = [Product(3, 0, 9, True), Product(2, 4, 0, True), Product(0, 4, 9, True)]
    for case, kernel in zip(cases, kernels(cases, Target.named("cpu")), strict=True):
        a, b = operands(case)
        got = kernel(a, b)
        assert got.shape == (1, case.m, case.n) and not got.any()


@given(st.data())
@settings(max_examples=3, deadline=None)
def test_any_product(data: st.DataObject) -> None:
    """Several a compilation: starting LLVM costs more than a kernel."""
    name = data.draw(st.sampled_from([n for n in X86 if Target.named(n).runs_here]))
    cases = []
    for _ in range(2):
        packed = data.draw(st.booleans())
        batch = 1 if packed else data.draw(st.integers(1, 3))
        m, k, n = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 30)), data.draw(st.integers(1, 70))
        shared = (False, False) if packed else (data.draw(st.booleans()), data.draw(st.booleans()))
        cases.append(Product(m, k, n, packed, batch, *shared, dynamic=data.draw(st.integers(0, 5)) == 5))
    for case, kernel in zip(cases, kernels(cases, Target.named(name), data.draw(st.integers(1, 2))), strict=True):
        check(case, kernel, case.m)


def test_rows_that_do_not_fill_a_tile_are_spread() -> None:
    """No tile is nearly empty: heights differ by one at most, and the accumulators fit into registers."""
    from graphwright.runtime.kernels.gemm_spec import choose_tile, pack, panels

    for name in ("cpu-avx512", "cpu-avx2", "cpu-baseline"):
        isa = Target.named(name).isa
        lanes = isa.lanes(32)
        for rows in range(1, 80):
            for columns in (1, lanes, 3 * lanes + 1, 500):
                tile = choose_tile(rows, columns, isa, lanes)
                count = -(-rows // tile.rows)
                assert count * (tile.rows - 1) <= rows or tile.rows == 1
                assert tile.rows * tile.vectors + tile.vectors + 1 <= isa.registers
                b = np.arange(2 * columns, dtype=np.float32).reshape(2, columns)
                cuts = panels(columns, tile, lanes)
                assert sum(c for _, c in cuts) * lanes * 2 == pack(b, tile, lanes).size


@pytest.mark.parametrize("target", ["cpu-avx512", "cpu-avx2", "cpu-baseline", "arm64"])
@pytest.mark.parametrize("columns", [1, 17, 100, 192, 576, 1000, 4096])
def test_one_row_reads_the_panels_of_many(target: str, columns: int) -> None:
    """So that a decoder's models for its prompt and for one token hold their weights once."""
    from graphwright.runtime.kernels.gemm_spec import pack, packed_tile
    from graphwright.runtime.kernels.vectors import Vectors
    from graphwright.runtime.target import Target

    isa = Target.named(target).isa
    lanes = Vectors(isa).lanes
    b = np.random.default_rng(0).standard_normal((3, columns), np.float32)
    few, many = (pack(b, packed_tile(rows, columns, isa, lanes), lanes) for rows in (1, None))
    np.testing.assert_array_equal(few, many)


NARROW = ("float16", "bfloat16")


@pytest.mark.parametrize("weights", NARROW)
@pytest.mark.parametrize("name", X86)
def test_weights_of_16_bits(name: str, weights: str, runnable: Callable[[str], Target]) -> None:
    """One row, a few and a number that is known at run time, with columns around vectors and panels, deep and not."""
    target = runnable(name)
    columns = edges(target, 1)
    cases = [Product((1, 2, 7)[i % 3], (5, 66, 133)[i % 3], n, weights=weights) for i, n in enumerate(columns)]
    cases += [Product(1, 700, 136, weights=weights), Product(13, 37, 70, dynamic=True, weights=weights)]
    for case, kernel in zip(cases, kernels(cases, target), strict=True):
        for m in (0, 1, 2, 23) if case.dynamic else (case.m,):
            check(case, kernel, m)


@pytest.mark.parametrize("weights", NARROW)
@pytest.mark.parametrize("name", X86)
def test_every_number_of_16_bits(name: str, weights: str, runnable: Callable[[str], Target]) -> None:
    """Times 1 in a sum of one term each is itself: zeros, those below the normal ones, infinities and NaN included."""
    target = runnable(name)
    case = Product(1, 1, 1 << 16, weights=weights)
    (kernel,) = kernels([case], target)
    b = np.arange(1 << 16, dtype=np.uint16).view(dtype_named(weights)).astype(np.float32).reshape(1, 1, -1)
    b[np.isnan(b)] = np.nan  # a quiet one, which NumPy converts without a warning
    np.testing.assert_array_equal(kernel(np.ones((1, 1, 1), np.float32), b)[0], b[0])
