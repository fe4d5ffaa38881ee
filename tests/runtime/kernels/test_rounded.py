"""Products and convolutions of bfloat16 pairs against float64, at the edges of tiles and steps."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from graphwright.runtime.target import Target
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytestmark = [pytest.mark.tvm, pytest.mark.torch]

from graphwright.runtime.kernels.conv import choose_tile, conv, pack_weights, supported  # noqa: E402
from graphwright.runtime.kernels.dots import BITS  # noqa: E402
from graphwright.runtime.kernels.vectors import Vectors  # noqa: E402

from .test_conv import DEPTHWISE, DIRECT, reference, same, spec_of, unblock  # noqa: E402

TOLERANCE = 1e-5  # of the output's scale
TARGET = Target.named("cpu-avx512-bf16")
runs = pytest.mark.skipif(not TARGET.runs_here, reason="this processor has no products of bfloat16")
UNWRITTEN = 12345.0


def rounded(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return x.astype(ml_dtypes.bfloat16)


@functools.cache
def product(rows: int | None, inner: int, columns: int, threads: int = 1) -> Any:
    """A kernel (x, y), x having the bits, and the weights in it. rows: None where they are known at run time."""
    from graphwright.runtime.codegen import machine_code
    from graphwright.runtime.kernels import gemm_steps
    from graphwright.runtime.kernels.gemm_spec import GemmSpec
    from graphwright.runtime.kernels.products import chosen_tile
    from tvm import IRModule, tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    v, spec = Vectors(TARGET.isa), GemmSpec(rows, inner, columns, weights="bfloat16", data=BITS)
    tile = chosen_tile(spec, TARGET)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("g")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "global_symbol": "g"})
        m, size = tirx.Var("m", "int64"), tirx.Var("size", "int64")
        shapes = [((m, inner), BITS), ((size,), BITS), ((m, columns), "float32")]
        x, w, y = (T.match_buffer(T.arg(f"x{i}", T.handle()), *each) for i, each in enumerate(shapes))
        with T.sblock("root"):
            T.reads()
            T.writes()
            a = T.decl_buffer((m * inner,), BITS, data=x.data)
            flat = T.decl_buffer((m * columns,), "float32", data=y.data)
            with v.prelude():

                def store(value: Any, row: Any, column: Any, there: int | None) -> None:
                    at = row * tirx.const(columns, "int64") + column
                    v.store(flat, at, value, None if there is None else tirx.const(there, "int64"))

                gemm_steps.emit(
                    v, spec, tile, m if rows is None else rows, a, w, None, store, threads, TARGET.caches
                )  # fmt: skip
    return machine_code(IRModule({"g": builder.get()}), TARGET), tile


def multiplied(x: np.ndarray, w: np.ndarray, dynamic: bool = False, threads: int = 1) -> np.ndarray:
    import tvm
    from graphwright.runtime.kernels.gemm_spec import pack

    library, tile = product(None if dynamic else len(x), *w.shape, threads)
    packed = pack(rounded(w).view(np.uint16), tile, Vectors(TARGET.isa).lanes, 2)
    # One row more than there is: what a kernel writes behind its end is seen.
    out = tvm.runtime.tensor(np.full((len(x) + 1) * w.shape[1], UNWRITTEN, np.float32))
    given = [tvm.runtime.tensor(np.ascontiguousarray(rounded(x)).view(np.uint16)), tvm.runtime.tensor(packed)]
    library["g"](*given, out._create_view((len(x), w.shape[1])))
    result = out.numpy()
    assert (result[x.shape[0] * w.shape[1] :] == UNWRITTEN).all(), "written behind the end"
    return result[: x.shape[0] * w.shape[1]].reshape(len(x), -1)


def check(rows: int, inner: int, columns: int, dynamic: bool = False, threads: int = 1, seed: int = 0) -> None:
    draw = np.random.default_rng(seed)
    x, w = draw.standard_normal((rows, inner), np.float32), draw.standard_normal((inner, columns), np.float32)
    expected = rounded(x).astype(np.float64) @ rounded(w).astype(np.float64)
    error = np.abs(multiplied(x, w, dynamic, threads) - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE


EDGES = [
    (1, 1, 1), (1, 2, 16), (1, 63, 64), (1, 64, 65), (2, 65, 15), (5, 7, 33), (6, 128, 64), (7, 128, 80), (12, 33, 17),
    (13, 96, 48), (31, 255, 100), (96, 384, 128),
]  # fmt: skip


@runs
@pytest.mark.parametrize("dynamic", [False, True], ids=["", "dynamic"])
@pytest.mark.parametrize("sizes", EDGES, ids=str)
def test_products(sizes: tuple[int, int, int], dynamic: bool) -> None:
    check(*sizes, dynamic)


@runs
@pytest.mark.parametrize("sizes", [(64, 2048, 256), (300, 1024, 512), (1, 4096, 512)], ids=str)
def test_large_products_on_two_threads(sizes: tuple[int, int, int]) -> None:
    """Parts of the depth, streams of weights."""
    check(*sizes, threads=2)


@runs
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 140), st.integers(1, 140), st.integers(0, 1000))
def test_products_of_any_size(rows: int, inner: int, columns: int, seed: int) -> None:
    check(rows, inner, columns, dynamic=True, seed=seed)


@runs
@pytest.mark.parametrize("inner", [63, 64])
def test_what_is_no_number_is_seen_in_its_row_alone(inner: int) -> None:
    draw = np.random.default_rng(0)
    x, w = draw.standard_normal((4, inner), np.float32), draw.standard_normal((inner, 20), np.float32)
    x[1, inner - 1], x[2, 0], x[3, 5] = np.nan, np.inf, 1e-40
    got = multiplied(x, w)
    clean = np.where(np.isfinite(x) & (np.abs(x) > 1e-38), x, 0)
    expected = rounded(clean).astype(np.float64) @ rounded(w).astype(np.float64)
    assert np.isnan(got[1]).all() and (got[2] == np.copysign(np.inf, w[0])).all()
    np.testing.assert_allclose(got[[0, 3]], expected[[0, 3]], atol=1e-4)


def convolved(spec: Any, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, threads: int) -> np.ndarray:
    import tvm
    from graphwright.runtime.codegen import machine_code

    tile, lanes = choose_tile(spec, TARGET.isa, TARGET.caches), Vectors(TARGET.isa).lanes
    function = conv(spec, TARGET.isa, threads, tile, "conv", TARGET.caches)
    compiled = machine_code(tvm.IRModule({"conv": function}), TARGET)["conv"]
    stored = x
    if spec.blocked_input:
        # Lanes beyond the channels hold numbers that must not matter.
        padded = np.full((len(x), spec.in_blocks(lanes) * lanes, *spec.in_size), 77, x.dtype)
        padded[:, : spec.in_channels] = x
        stored = padded.reshape(len(x), -1, lanes, *spec.in_size).transpose(0, 1, 3, 4, 2)
    y = np.full((len(x), spec.out_blocks(lanes), *spec.out_size, lanes), UNWRITTEN, np.float32)
    given = [
        np.ascontiguousarray(stored).reshape(len(x), -1).view(np.uint16),
        pack_weights(weight.view(np.uint16), spec, TARGET.isa, tile),
        np.pad(bias, (0, -len(bias) % lanes)), y.reshape(len(x), -1),
    ]  # fmt: skip
    arguments = [tvm.runtime.tensor(a) for a in given]
    compiled(*arguments)
    return unblock(arguments[3].numpy().reshape(y.shape), spec.out_channels)


CONVOLUTIONS = {
    **DIRECT, "odd channels": spec_of((17, 33), (9, 11), (3, 3), pads=same(3)),
    "rows that threads share": spec_of((64, 64), (40, 40), (3, 3), pads=same(3)),
}  # fmt: skip


@runs
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    spec = dataclasses.replace(CONVOLUTIONS[name], data=BITS)
    if spec.groups > 1 and supported(spec, TARGET.isa) is not None:
        pytest.skip("its groups have no pairs")
    draw = np.random.default_rng(0)
    x = rounded(draw.standard_normal((spec.batch or 1, spec.in_channels, *spec.in_size), np.float32))
    shape = (spec.out_channels, spec.in_channels // spec.groups, *spec.kernel)
    weight, bias = rounded(draw.standard_normal(shape, np.float32)), draw.standard_normal(shape[0], np.float32)
    expected = reference(spec, x, weight, bias)
    got = convolved(spec, x, weight, bias, 2)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_depthwise_ones_have_no_pairs() -> None:
    for spec in DEPTHWISE.values():
        assert supported(dataclasses.replace(spec, data=BITS), TARGET.isa) is not None


def test_instructions() -> None:
    """Pairs are multiplied in whole registers, and sums stay in them."""
    library, _ = product(48, 256, 96)
    text = re.sub(r"\n\.Ltmp\d+:", "", library.mod.inspect_source("s"))
    dots = [[*re.finditer(r"vdpbf16ps\s.*%zmm", block)] for block in re.split(r"\n\.L\w+:", text)]
    steps = max(dots, key=len)
    assert len(steps) >= 80  # four steps of a tile
    loop = steps[0].string[steps[0].start() : steps[-1].end()]
    assert not re.findall(r"vmov\w*\s+%zmm\d+, -?\d*\(%r[sb]p\)", loop), loop
