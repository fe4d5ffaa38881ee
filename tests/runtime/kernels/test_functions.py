"""Functions of vectors against float64, over floats of every exponent and sign."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from graphwright.runtime.target import Target

pytestmark = pytest.mark.tvm

X86 = ["cpu", "cpu-avx512", "cpu-avx2", "cpu-baseline"]
SMALLEST = np.float32(2.0**-126)  # normal


def every(step: int) -> np.ndarray:
    """Every `step`-th pattern of 32 bits as a float: both signs, subnormals, infinities, NaN; and the corners."""
    bits = np.arange(0, 1 << 32, step, dtype=np.uint64).astype(np.uint32)
    corners = np.float32([0, np.inf, np.nan, 1, 88, 88.72283, 88.72284, 89, 104, 105, 1e-45, SMALLEST, 3.4028235e38])
    edges = np.float32([9.9, 9.900001, 3.95, 3.9500003, 0.5, 1.5, 2.5, 2**23, 2**22 + 0.5, 2**31])
    return np.concatenate([bits.view(np.float32), corners, -corners, edges, -edges])


def erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


# Name -> NumPy's function of float64, and the largest error in ulp that functions.py states; 0 for exact ones.
REFERENCES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "exp": (np.exp, 2.5), "sigmoid": (sigmoid, 3.5), "tanh": (np.tanh, 6), "erf": (erf, 6), "log": (np.log, 2),
    "sqrt": (np.sqrt, 0.5), "rsqrt": (lambda x: 1 / np.sqrt(x), 1.5), "fabs": (np.abs, 0), "abs": (np.abs, 0),
    "floor": (np.floor, 0), "ceil": (np.ceil, 0), "trunc": (np.trunc, 0), "nearbyint": (np.rint, 0),
}  # fmt: skip
# A machine that cannot scale by powers of two in one step gives 0 where the result is subnormal, or not much else.
FLUSHED = {"exp", "sigmoid"}


@functools.cache
def library(name: str) -> Any:
    """One kernel (x, y) for each function, over n whole vectors; `power` is the exponential of softmax."""
    import tvm
    from graphwright.runtime.codegen import machine_code
    from graphwright.runtime.kernels.functions import FUNCTIONS
    from graphwright.runtime.kernels.vectors import Vectors
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    target = Target.named(name)
    v = Vectors(target.isa)
    functions = {**FUNCTIONS, "power": Vectors.exp}

    def kernel(function: str) -> Any:
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name(function)
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "global_symbol": f"f_{function}"})
            n = tirx.Var("n", "int64")
            x, y = (T.match_buffer(T.arg(f"x{i}", T.handle()), (n,), "float32") for i in range(2))
            with T.sblock("root"):
                T.reads()
                T.writes()
                with v.prelude(), T.serial(tirx.floordiv(n, tirx.const(v.lanes, "int64"))) as i:
                    at = T.Bind(i * tirx.const(v.lanes, "int64"))
                    v.store(y, at, functions[function](v, v.load(x, at)))
        return builder.get()

    return machine_code(tvm.IRModule({f"f_{function}": kernel(function) for function in functions}), target)


def computed(name: str, function: str, x: np.ndarray) -> np.ndarray:
    import tvm

    padded = np.concatenate([x, np.zeros(-len(x) % 16, np.float32)])
    y = tvm.runtime.tensor(np.full(len(padded), 12345, np.float32))
    library(name)[f"f_{function}"](tvm.runtime.tensor(padded), y)
    return y.numpy()[: len(x)]


def ulps(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Distances in units of the last place that float32 has at the expected value."""
    size = np.maximum(np.abs(expected), 2.0**-126)
    unit = 2.0 ** (np.floor(np.log2(size)) - 23)
    return np.abs(got.astype(np.float64) - expected) / unit


def worst(name: str, function: str, x: np.ndarray) -> tuple[float, np.float32]:
    """The largest error in ulp and where it is. Asserts that NaN and infinities stand where they should."""
    reference, _ = REFERENCES[function]
    with np.errstate(all="ignore"):
        expected = reference(x.astype(np.float64))
        narrow = expected.astype(np.float32)
        got = computed(name, function, x)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(narrow))
        infinite = np.isinf(narrow)
        np.testing.assert_array_equal(got[infinite], narrow[infinite])
        zero = narrow == 0
        np.testing.assert_array_equal(np.signbit(got[zero & (got == 0)]), np.signbit(narrow[zero & (got == 0)]))
        error = np.where(np.isfinite(narrow), ulps(got, expected), 0)
        if function in FLUSHED and not Target.named(name).isa.scalef:
            assert (got[np.abs(expected) < 2.0**-127] <= SMALLEST).all()
            near = (got == 0) | (np.abs(got - expected) < 2.0**-127)
            error[near & (np.abs(expected) < SMALLEST)] = 0
        at = int(np.nanargmax(error))
    return float(error[at]), x[at]


@pytest.mark.parametrize("step", [5021, pytest.param(1021, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", X86)
def test_largest_errors(name: str, step: int, runnable: Callable[[str], Target]) -> None:
    from graphwright.runtime.kernels.functions import FUNCTIONS

    runnable(name)
    x = every(step)
    assert set(FUNCTIONS) == set(REFERENCES)
    found = {function: worst(name, function, x) for function in FUNCTIONS}
    too_large = {f: e for f, e in found.items() if e[0] > REFERENCES[f][1]}
    assert not too_large, f"ulp and where: {too_large}"


@pytest.mark.parametrize("name", X86)
def test_tanh_and_erf_reach_one_and_do_not_exceed_it(name: str, runnable: Callable[[str], Target]) -> None:
    """A GELU multiplies 1 + erf(x) by x: what is left of it at a huge negative x would be huge itself."""
    runnable(name)
    inside = np.linspace(-10, 10, 400_001).astype(np.float32)
    beyond = np.float32([4.1, 10, 1e3, 1e30, 3e38, np.inf])
    for function in ("tanh", "erf"):
        found = computed(name, function, inside)
        assert found.min() == -1 and found.max() == 1
        far = beyond[1:] if function == "tanh" else beyond
        np.testing.assert_array_equal(
            computed(name, function, np.concatenate([far, -far])), [1.0] * len(far) + [-1.0] * len(far)
        )
        np.testing.assert_array_equal(found, -found[::-1])


@pytest.mark.parametrize("name", X86)
def test_exp_and_sigmoid_at_their_ends(name: str, runnable: Callable[[str], Target]) -> None:
    runnable(name)
    x = np.float32([0, -0.0, -np.inf, np.inf, -1e30, 1e30, 88.72283, 88.7229, -104.1])
    largest = np.float32(np.exp(np.float64(x[6])))
    np.testing.assert_allclose(
        computed(name, "exp", x), [1, 1, 0, np.inf, 0, np.inf, largest, np.inf, 0], rtol=2.5 * 2.0**-23
    )
    # An SiLU multiplies it by x: it has to be 0 where x is hugely negative.
    np.testing.assert_array_equal(computed(name, "sigmoid", x), [0.5, 0.5, 0, 1, 0, 1, 1, 1, 0])


@pytest.mark.parametrize("name", X86)
def test_exponential_of_softmax(name: str, runnable: Callable[[str], Target]) -> None:
    """2 ulp up to 88 (2.5 without fused multiply-add), on both sides of every eighth of a power of two.

    Below the normal numbers 2^-126.
    """
    runnable(name)
    edges = (np.arange(-1008, 1014) + 0.5) * (np.log(2) / 8)
    x = np.concatenate([np.linspace(-120, 88, 1_000_003), edges, np.nextafter(edges.astype(np.float32), 0)])
    x = x.astype(np.float32)
    got, expected = computed(name, "power", x), np.exp(x.astype(np.float64))
    normal = expected >= SMALLEST
    assert ulps(got, expected)[normal].max() <= (2 if Target.named(name).isa.fma else 2.5)
    assert np.abs(got - expected)[~normal].max() <= SMALLEST
    corners = np.float32([0, -0.0, -np.inf, -106, -3e38, np.nan])
    np.testing.assert_array_equal(computed(name, "power", corners), np.float32([1, 1, 0, 0, 0, np.nan]))
