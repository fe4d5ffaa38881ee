"""float16 and bfloat16 as they are read and written by kernels, against ml_dtypes: every number, every rounding."""

from __future__ import annotations

import functools
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from graphwright.runtime.target import Target

pytestmark = pytest.mark.tvm

X86 = ["cpu-avx512", "cpu-avx2", "cpu-baseline"]
NUMPY = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


@functools.cache
def copy(target: Target, source: str, result: str) -> Callable[[np.ndarray], np.ndarray]:
    """What copies a vector of any length from one type to another."""
    import tvm
    from graphwright.runtime.codegen import machine_code
    from graphwright.runtime.kernels.rows import count_of, flat_kernel, sweep

    def write(v, buffers, size, index) -> None:
        def body(offsets, part) -> None:
            for offset in offsets:
                value = v.load(buffers["x"], offset, count_of(part, index))
                v.store(buffers["y"], offset, value, count_of(part, index))

        sweep(v, size("n"), 2, 0, index, body)

    tensors = {"x": (("n",), source), "y": (("n",), result)}
    module = tvm.IRModule({"copy": flat_kernel("copy", tensors, target.isa, write, exported=True)})
    compiled = machine_code(module, target)["copy"]

    def run(x: np.ndarray) -> np.ndarray:
        y = tvm.runtime.tensor(np.zeros(len(x) + 1, NUMPY[result]))
        compiled(tvm.runtime.tensor(x), tvm.runtime.from_dlpack(y)._create_view((len(x),), result))
        assert not y.numpy()[len(x) :].any()
        return y.numpy()[: len(x)]

    return run


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", X86)
def test_every_number_is_widened_exactly(runnable: Callable[[str], Target], name: str, kind: str) -> None:
    x = np.arange(1 << 16, dtype=np.uint16).view(NUMPY[kind])
    run = copy(runnable(name), kind, "float32")
    np.testing.assert_array_equal(run(x), x.astype(np.float32))
    for length in (0, 1, 3, 4, 7, 8, 15, 16, 17, 33):
        np.testing.assert_array_equal(run(x[15000 : 15000 + length]), x[15000 : 15000 + length].astype(np.float32))


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", X86)
def test_numbers_are_rounded_to_nearest_even(runnable: Callable[[str], Target], name: str, kind: str) -> None:
    """Each number of the type, the middles between neighbours, and what is next to a middle."""
    exact = np.arange(1 << 16, dtype=np.uint16).view(NUMPY[kind]).astype(np.float32)
    exact = exact[np.isfinite(exact)]
    following = np.nextafter(exact, np.float32(np.inf))
    positive = np.sort(exact[exact >= 0]).astype(np.float64)
    middles = ((positive[:-1] + positive[1:]) / 2).astype(np.float32)
    limits = np.float32([np.finfo(np.float32).max, np.inf, np.nan, 1e-45, 65519.996, 65520, 3.3961775e38, 3.39e38])
    beside = [np.nextafter(middles, np.float32(side)) for side in (0, np.inf)]
    x = np.concatenate([exact, following, middles, *beside, limits])
    x = np.concatenate([x, -x])
    with np.errstate(over="ignore"):
        expected = x.astype(NUMPY[kind])
    run = copy(runnable(name), "float32", kind)
    got = run(x)
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), np.isnan(x))
    usual = ~np.isnan(x)
    np.testing.assert_array_equal(got.view(np.uint16)[usual], expected.view(np.uint16)[usual])
    for length in (0, 1, 3, 4, 7, 8, 15, 16, 17, 33):
        np.testing.assert_array_equal(run(x[:length]), expected[:length])
