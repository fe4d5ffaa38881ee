"""Products of 8-bit numbers against NumPy in int64: exact, at the edges of tiles and steps, with the extremes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from graphwright.passes.base import Caches
from graphwright.runtime.target import Target
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.tvm

X86 = ["cpu-avx512-vnni", "cpu-avx512", "cpu-avx2", "cpu-baseline"]
UNWRITTEN = 12345


@dataclass(frozen=True)
class Product:
    """One product. dynamic: rows are known to the kernel at run time only. joined: steps of bytes that B lets int16
    take up together where the machine multiplies bytes so; 0: B has all bytes."""

    m: int
    k: int
    n: int
    data: str = "uint8"
    zero: int = 0
    dynamic: bool = False
    joined: int = 0


def spec_for(p: Product, target: Target) -> Any:
    from graphwright.runtime.kernels.gemm_spec import GemmSpec

    joined = p.joined if multiplies_bytes(target) else 0
    return GemmSpec(None if p.dynamic else p.m, p.k, p.n, data=p.data, zero=p.zero, joined=joined)


def multiplies_bytes(target: Target) -> bool:
    return target.isa.dot_int8 == "pairs" and target.isa.vector_bits >= 256


def function(product: Product, target: Target, name: str, threads: int = 1) -> Any:
    """A kernel (a, b, first, y) over flat buffers."""
    from graphwright.runtime.kernels import gemm_steps
    from graphwright.runtime.kernels.products import chosen_tile
    from graphwright.runtime.kernels.vectors import Vectors
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    p, v = product, Vectors(target.isa)
    spec = spec_for(p, target)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "global_symbol": name})
        sizes = [tirx.Var(f"n{i}", "int64") for i in range(3)]
        m = tirx.Var("m", "int64")
        shapes = [*((size,) for size in sizes), (m, p.n)]
        types = (p.data, "int8", "int32", "int32")
        a, b, first, y = (
            T.match_buffer(T.arg(f"x{i}", T.handle()), s, t) for i, (s, t) in enumerate(zip(shapes, types, strict=True))
        )
        with T.sblock("root"):
            T.reads()
            T.writes()
            flat = T.decl_buffer((m * p.n,), "int32", data=y.data)
            with v.prelude():

                def store(value: Any, row: Any, column: Any, there: int | None) -> None:
                    at = row * tirx.const(p.n, "int64") + column
                    if there is None:
                        T.buffer_store(flat, value, [v.at(at)])
                    else:
                        v.store(flat, at, T.reinterpret(value, dtype=v.dtype), tirx.const(there, "int64"))

                tile, rows = chosen_tile(spec, target), m if p.dynamic else p.m
                gemm_steps.emit(v, spec, tile, rows, a, b, first, store, threads, target.caches)
    return builder.get()


Kernel = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def kernels(products: Sequence[Product], target: Target, threads: int = 1) -> list[Kernel]:
    """All of them in one library. Each takes A, B and a bias, and gives (A - zero) · B + bias."""
    import tvm
    from graphwright.runtime.codegen import machine_code
    from graphwright.runtime.kernels.dots import IntegerDot, first_sums, joined_steps
    from graphwright.runtime.kernels.gemm_spec import pack
    from graphwright.runtime.kernels.products import chosen_tile
    from graphwright.runtime.kernels.vectors import Vectors

    module = tvm.IRModule({f"g{i}": function(p, target, f"g{i}", threads) for i, p in enumerate(products)})
    library, v = machine_code(module, target), Vectors(target.isa)

    def kernel(number: int, p: Product) -> Kernel:
        def run(a: np.ndarray, b: np.ndarray, bias: np.ndarray) -> np.ndarray:
            spec = spec_for(p, target)
            assert spec.joined <= joined_steps(b, 0, target.isa) or not spec.joined
            packed = pack(b, chosen_tile(spec, target), v.lanes, IntegerDot(v, p.data, spec.joined).group)
            sums = b.astype(np.int64).sum(axis=0)
            first = first_sums(sums, bias, p.data, p.zero, target.isa, v.lanes, spec.joined)
            # One row more than there is: what a kernel writes behind its end is seen.
            out = tvm.runtime.tensor(np.full((len(a) + 1) * p.n, UNWRITTEN, np.int32))
            given = (tvm.runtime.tensor(x) for x in (a.reshape(-1), packed, first))
            library[f"g{number}"](*given, out._create_view((len(a), p.n)))
            result = out.numpy()
            assert (result[len(a) * p.n :] == UNWRITTEN).all(), "written behind the end"
            return result[: len(a) * p.n].reshape(len(a), p.n)

        return run

    return [kernel(i, p) for i, p in enumerate(products)]


def check(product: Product, kernel: Kernel, rows: int | None = None, seed: int = 0) -> None:
    """Random numbers, in which the extremes are frequent, and nothing but extremes."""
    draw, info, p = np.random.default_rng(seed), np.iinfo(product.data), product
    rows = p.m if rows is None else rows
    bias = draw.integers(-1000, 1000, p.n)
    a = draw.integers(info.min, info.max + 1, (rows, p.k)).astype(p.data)
    b = draw.integers(-128, 128, (p.k, p.n)).astype(np.int8)
    a[draw.random(a.shape) < 0.1], b[draw.random(b.shape) < 0.1] = info.max, -128
    extremes = [(a, b)]
    extremes += [(np.full_like(a, x), np.full_like(b, w)) for x in (info.min, info.max) for w in (-128, 127)]
    for x, w in extremes:
        w = held(w, p.joined)
        expected = (x.astype(np.int64) - p.zero) @ w.astype(np.int64) + bias
        np.testing.assert_array_equal(kernel(x, w, bias), expected, err_msg=str(product))


def held(weights: np.ndarray, joined: int, depth: int = 0) -> np.ndarray:
    """Weights whose products with `joined` steps of bytes just fit into int16: shares of 128, or one weight of it."""
    if not joined:
        return weights
    moved = np.moveaxis(weights, depth, -1).astype(np.int64)
    length = moved.shape[-1]
    padded = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, -length % 8)])
    parts = padded.reshape(*padded.shape[:-1], -1, 2, 2, 2)
    alone = np.zeros(parts.shape, bool)
    alone[..., -1, :, -1] = parts[..., :1, :, :1].reshape(parts[..., 0, :, 0].shape) % 3 == 0
    one = alone.any(axis=(-3, -1), keepdims=True)
    share = np.clip(parts, -64 // joined, 64 // joined)
    result = np.where(one, np.where(alone, parts, 0), share).reshape(padded.shape)[..., :length]
    return np.ascontiguousarray(np.moveaxis(result, -1, depth).astype(np.int8))


def edges(target: Target, rows: int) -> list[int]:
    """Columns around a vector and around the panels of the tile that is taken for as many rows."""
    from graphwright.runtime.kernels.gemm_spec import GemmSpec
    from graphwright.runtime.kernels.products import chosen_tile
    from graphwright.runtime.kernels.vectors import Vectors

    lanes = Vectors(target.isa).lanes
    specs = [GemmSpec(rows, 64, 1000, data="uint8", joined=2 * bytes_) for bytes_ in {False, multiplies_bytes(target)}]
    widths = [chosen_tile(spec, target).vectors * lanes for spec in specs]
    return sorted({1, 2, *(w + d for w in (lanes, *widths, 2 * widths[0]) for d in (-1, 0, 1))})


SLOW = [pytest.param(part, marks=pytest.mark.slow) for part in range(1, 12)]


@pytest.mark.parametrize("part", [0, *SLOW])
@pytest.mark.parametrize("name", X86)
def test_tile_edges(name: str, part: int, runnable: Callable[[str], Target]) -> None:
    """Counts of rows up to 16 with columns around the edges that belong to them, K around whole steps.

    Of all pairs each part takes every twelfth.
    """
    target = runnable(name)
    depths, zeros = (1, 3, 4, 5, 7, 8, 9, 13), (0, 255, 128, 3)
    pairs = [(m, n) for m in range(1, 17) for n in edges(target, m)]
    cases = [
        Product(m, depths[i % 8], n, "uint8", zeros[i % 4], joined=i // 12 % 3)
        for i, (m, n) in enumerate(pairs) if i % 12 == part
    ]  # fmt: skip
    for case, kernel in zip(cases, kernels(cases, target), strict=True):
        check(case, kernel)


@pytest.mark.parametrize("name", X86)
def test_signed_data(name: str, runnable: Callable[[str], Target]) -> None:
    target = runnable(name)
    cases = [Product(m, k, n, "int8", zero) for m, k, n, zero in [(7, 33, 20, -128), (1, 64, 40, 127), (12, 5, 9, 0)]]
    cases += [dataclasses.replace(case, joined=2) for case in cases]
    for case, kernel in zip(cases, kernels(cases, target), strict=True):
        check(case, kernel)


@pytest.mark.parametrize("name", X86)
def test_rows_known_at_run_time(name: str, runnable: Callable[[str], Target]) -> None:
    target = runnable(name)
    products = [Product(0, 37, 41, zero=7, dynamic=True, joined=joined) for joined in (0, 2)]
    for product, kernel in zip(products, kernels(products, target, threads=2), strict=True):
        for rows in (1, 2, 5, 6, 7, 13, 64):
            check(product, kernel, rows)


@pytest.mark.parametrize("name", X86)
def test_a_depth_in_parts_and_streams(name: str, runnable: Callable[[str], Target]) -> None:
    """Sums wait in memory between parts of the depth; a row reads weights from several places in turn."""
    target = dataclasses.replace(runnable(name), caches=Caches(4 << 10, 64 << 10, 1 << 20))
    cases = [Product(96, 2050, 48, zero=128), Product(1, 2050, 70, zero=128), Product(2, 1030, 200, "int8", -3)]
    cases += [dataclasses.replace(case, joined=joined) for case in cases for joined in (1, 2)]
    for case, kernel in zip(cases, kernels(cases, target, threads=2), strict=True):
        check(case, kernel)


@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 30), st.integers(1, 70), st.integers(1, 70), st.sampled_from(["uint8", "int8"]), st.data(),
    st.sampled_from(["cpu-avx2", "cpu-baseline"]), st.booleans(), st.integers(0, 2),
)  # fmt: skip
def test_any_product(runnable: Callable[[str], Target], m, k, n, data, draw, name, dynamic, joined) -> None:
    info = np.iinfo(data)
    zero = draw.draw(st.integers(info.min, info.max))
    product = Product(m, k, n, data, zero, dynamic, joined)
    (kernel,) = kernels([product], runnable(name), threads=2)
    check(product, kernel, seed=m + k + n)


@given(st.integers(1, 20), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_joined_steps_never_leave_int16(inner: int, columns: int, seed: int) -> None:
    """What is allowed is what the worst bytes allow: a lane's positive weights with 255, or its negative ones."""
    from graphwright.runtime.kernels.dots import joined_steps

    draw = np.random.default_rng(seed)
    most = draw.choice([20, 40, 64, 90, 127])
    weights = draw.integers(-most, most + 1, (inner, columns)).astype(np.int8)
    padded = np.pad(weights.astype(int), ((0, -inner % 8), (0, 0)))
    sides = [np.where(s * padded > 0, padded, 0) * 255 for s in (1, -1)]
    fits = 0
    for steps in (1, 2):
        lanes = [s.reshape(-1, steps, 2, 2, columns).sum(axis=(1, 3)) for s in sides]
        if all((lane >= -(1 << 15)).all() and (lane < 1 << 15).all() for lane in lanes):
            fits = steps
        else:
            break
    assert joined_steps(weights, 0, Target.named("cpu-avx2").isa) == fits
    assert joined_steps(weights, 0, Target.named("cpu-avx512-vnni").isa) == 0


# Target -> the instruction that makes the sums.
INSTRUCTIONS = {
    "cpu-avx2": r"vpmaddwd\s.*%ymm", "cpu-avx512": r"vpmaddwd\s.*%zmm", "cpu-avx512-vnni": r"vpdpbusd\s.*%zmm",
    "bytes": r"vpmaddubsw\s.*%ymm", "cpu-baseline": r"pmaddwd\s.*%xmm",
    "arm64": r"sdot\s+v\d+\.4s, v\d+\.16b, v\d+\.16b",
}  # fmt: skip


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions(name: str) -> None:
    """The tile's dot products are those of the instruction set, and sums stay in registers."""
    import tvm
    from graphwright.runtime.codegen import machine_code

    target = Target.named("cpu-avx2" if name == "bytes" else name)
    module = tvm.IRModule({"g": function(Product(48, 256, 96, joined=2 * (name == "bytes")), target, "g")})
    text = re.sub(r"\n\.Ltmp\d+:", "", machine_code(module, target).mod.inspect_source("s"))
    dots = [[*re.finditer(INSTRUCTIONS[name], block)] for block in re.split(r"\n\.L\w+:", text)]
    steps = max(dots, key=len)
    assert len(steps) >= (36 if name == "bytes" else 48)  # four steps of a tile
    loop = steps[0].string[: steps[-1].end()]
    # SSE2 overwrites an operand with every sum, which 16 registers are too few for.
    spills = re.findall(r"v?mov\w*\s+%[xyz]mm\d+, -?\d*\(%r[sb]p\)|str\s+q\d+, \[sp", loop)
    assert name == "cpu-baseline" or not spills, loop


@pytest.mark.parametrize("name", ["armv7", "riscv64"])
def test_other_machines_compile(name: str) -> None:
    import tvm
    from graphwright.runtime.codegen import machine_code

    target = Target.named(name)
    assert machine_code(tvm.IRModule({"g": function(Product(7, 33, 20), target, "g")}), target)
