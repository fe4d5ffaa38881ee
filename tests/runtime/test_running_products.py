"""Products with data that is quantized when the model runs, as quantize_dynamic writes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.tvm


def draw(*shape: int, low: int = -128, high: int = 128, dtype: Any = np.int8) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(low, high, shape).astype(dtype)


@pytest.mark.parametrize("columns", [1, 8, 19])
@pytest.mark.parametrize("signed", [False, True])
def test_sums_are_exact(columns: int, signed: bool, compile_model: Callable[..., Any]) -> None:
    """Zero points that are constant, computed and left out; weights less theirs."""
    kind = "int8" if signed else "uint8"
    text = f"""g ({kind}[n, 3, 40] x, {kind} p) => (int32[n, 3, {columns}] a, int32[n, 3, {columns}] b,
        int32[n, 3, {columns}] c) {{
      a = MatMulInteger (x, w, p, zero)  b = MatMulInteger (x, w, q)  c = MatMulInteger (x, v, p, zeros) }}"""
    w, v = draw(40, columns, low=-100, high=100), draw(40, columns, low=100, high=200, dtype=np.uint8)
    zeros, q = draw(columns, low=130, high=160, dtype=np.uint8), np.array(9, kind)
    zero = np.array(5, np.int8)
    model = compile_model(text, w=w, v=v, zero=zero, zeros=zeros, q=q)
    assert model.kernels("gemm") and not model.kernels("matmul")
    x = draw(2, 3, 40, low=-128 if signed else 0, high=128 if signed else 256, dtype=kind)
    for point in (0, 77):
        found = model.run({"x": x, "p": np.array(point, kind)})
        wide = x.astype(np.int64)
        expected = [(wide - point) @ (w.astype(np.int64) - 5), (wide - 9) @ w.astype(np.int64),
                    (wide - point) @ (v.astype(np.int64) - zeros)]  # fmt: skip
        for got, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("scales", [(), (19,)])
def test_a_product_between_a_dynamic_quantization_and_floats(
    scales: tuple[int, ...], compile_model: Callable[..., Any]
) -> None:
    text = """g (float[n, 40] x) => (float[n, 19] y) {
      q, s, z = DynamicQuantizeLinear (x)  a = DequantizeLinear (q, s, z)
      b = DequantizeLinear <axis = 1> (w, t)  m = MatMul (a, b)  y = Add (m, bias) }"""
    w, bias = draw(40, 19), np.linspace(-1, 1, 19, dtype=np.float32)
    t = np.random.default_rng(0).uniform(0.01, 0.02, scales).astype(np.float32)
    model = compile_model(text, w=w, t=t, bias=bias)
    assert model.kernels("gemm") and [str(c.dtype) for c in model.constants].count("int8") == 1
    x = np.random.default_rng(1).standard_normal((5, 40)).astype(np.float32)
    low, high = np.minimum(x.min(), 0), np.maximum(x.max(), 0)
    s = (high - low) / np.float32(255)
    z = np.clip(np.rint(-low / s), 0, 255)
    q = np.clip(np.rint(x / s) + z, 0, 255) - z
    expected = (q.astype(np.float64) @ w.astype(np.float64)) * (np.float64(s) * t.astype(np.float64)) + bias
    np.testing.assert_allclose(model.run({"x": x})[0], expected, rtol=1e-5, atol=1e-4)
