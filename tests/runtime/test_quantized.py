"""QuantizeLinear, DequantizeLinear and the operand behind them: ONNX's rounding to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from graphwright.runtime.target import Target
from hypothesis import given, settings
from hypothesis import strategies as st

tvm = pytest.importorskip("tvm")
pytestmark = pytest.mark.tvm

TARGET = Target.named("cpu")
LIMITS = {"uint8": (0, 255), "int8": (-128, 127), "uint16": (0, 65535), "int16": (-32768, 32767)}


def run(text: str, feeds: Sequence[np.ndarray], **weights: np.ndarray) -> list[np.ndarray]:
    """A model's outputs through TVM, its inputs in order. Weights are typed by their arrays."""
    from graphwright.runtime import phases
    from graphwright.runtime.importer import import_model
    from tvm import relax

    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {text}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    executable, constants = phases.compile_module(import_model(model, TARGET), TARGET)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    result = machine["main"](*map(tvm.runtime.tensor, feeds), tvm.runtime.convert(list(constants)))
    results = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
    return [tensor.numpy() for tensor in results]


def spread(array: np.ndarray, shape: Sequence[int], axis: int | None, block: int = 0) -> np.ndarray:
    """A scale or zero point in the shape of what it belongs to."""
    if axis is None:
        return np.broadcast_to(array, shape)
    if block:
        return np.take(np.repeat(array, block, axis), range(shape[axis]), axis)
    return np.broadcast_to(array.reshape([-1 if a == axis else 1 for a in range(len(shape))]), shape)


def quantized(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, low: int, high: int) -> np.ndarray:
    """The oracle, in integers from the rounded quotient on. The quotient is float32's, as ONNX has it."""
    with np.errstate(invalid="ignore", over="ignore"):
        steps = np.rint((x / scale).astype(np.float32).astype(np.float64)) + zero.astype(np.float64)
    return np.where(np.isnan(steps), low, np.clip(steps, low, high)).astype(np.int64)


@pytest.mark.parametrize("dtype", LIMITS)
def test_rounds_half_to_even_and_saturates(dtype: str) -> None:
    """Ties, both ends, infinities and NaN; the zero point is added to what is already rounded."""
    low, high = LIMITS[dtype]
    zero = np.array(low + 131, dtype)
    ties = (np.arange(-300, 300) + 0.5) * 0.25
    ends = np.array([low, high, low - 0.5, high + 0.5], np.float64) * 0.25
    rest = [np.inf, -np.inf, np.nan, 3e38, -3e38, 0.0, -0.0, 1e-40]
    x = np.concatenate([ties, ends, ends - float(zero) * 0.25, rest]).astype(np.float32)
    for scale in (0.25, 0.1, 3e-5):
        weights = {"s": np.array(scale, np.float32), "z": zero}
        (y,) = run(f"g (float[{x.size}] x) => ({dtype}[{x.size}] y) {{ y = QuantizeLinear (x, s, z) }}", [x], **weights)
        assert y.dtype == dtype
        np.testing.assert_array_equal(y, quantized(x, weights["s"], zero, low, high))


@pytest.mark.parametrize("shape, axis, block", [((3, 5, 7), 1, 0), ((2, 19), -1, 0), ((6, 10), 1, 4), ((7, 6), 0, 3)])
def test_scales_of_an_axis_and_of_blocks(shape: tuple[int, ...], axis: int, block: int) -> None:
    random = np.random.default_rng(3)
    axis %= len(shape)
    dims = [-(-d // block) if a == axis else d for a, d in enumerate(shape)] if block else [shape[axis]]
    scale = random.uniform(0.01, 0.1, dims).astype(np.float32)
    zero = random.integers(100, 140, dims).astype(np.uint8)
    x = random.uniform(-9, 9, shape).astype(np.float32)
    size = ",".join(map(str, shape))
    q, y = run(
        f"""g (float[{size}] x) => (uint8[{size}] q, float[{size}] y) {{
            q = QuantizeLinear <axis = {axis}, block_size = {block}> (x, s, z)
            y = DequantizeLinear <axis = {axis}, block_size = {block}> (q, s, z) }}""", [x], s=scale, z=zero,
    )  # fmt: skip
    wide = [spread(a, shape, axis, block) for a in (scale, zero)]
    expected = quantized(x, wide[0], wide[1], 0, 255)
    np.testing.assert_array_equal(q, expected)
    np.testing.assert_array_equal(y, (expected - wide[1].astype(np.int64)).astype(np.float32) * wide[0])


@pytest.mark.parametrize("dtype", ["int4", "uint4"])
def test_constants_of_four_bits_are_unpacked(dtype: str) -> None:
    low, high = (-8, 8) if dtype == "int4" else (0, 16)
    random = np.random.default_rng(5)
    w = random.integers(low, high, (8, 3)).astype(getattr(ml_dtypes, dtype))
    scale = random.uniform(0.01, 0.1, (2, 3)).astype(np.float32)
    x = random.standard_normal((4, 8)).astype(np.float32)
    (y,) = run(
        """g (float[4, 8] x) => (float[4, 3] y) {
            d = DequantizeLinear <axis = 0, block_size = 4> (w, s)  y = MatMul (x, d) }""", [x], w=w, s=scale,
    )  # fmt: skip
    expected = x.astype(np.float64) @ (w.astype(np.float64) * np.repeat(scale, 4, 0))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_quantizes_to_four_bits() -> None:
    x = np.array([-9.0, -1.5, -0.5, 0.5, 1.5, 9.0, np.nan], np.float32)
    (y,) = run(
        """g (float[7] x) => (float[7] y) {
            q = QuantizeLinear (x, s, z)  y = DequantizeLinear (q, s, z) }""",
        [x], s=np.array(1, np.float32), z=np.array(0, ml_dtypes.int4),
    )  # fmt: skip
    np.testing.assert_array_equal(y, [-8, -2, 0, 0, 2, 7, -8])


@pytest.mark.parametrize("values", [[0, 0, 0], [-3, 0.2, 5], [1, 2, 3], [-3, -2, -1], [0.5] * 3])
def test_dynamic_quantization_takes_in_zero(values: list[float]) -> None:
    x = np.array(values, np.float32)
    y, scale, point = run(
        "g (float[3] x) => (uint8[3] y, float s, uint8 z) { y, s, z = DynamicQuantizeLinear (x) }", [x]
    )
    low, high = min(0, x.min()), max(0, x.max())
    if low == high:
        assert not y.any() and not point and scale > 0
        return
    assert scale == (np.float32(high) - np.float32(low)) / np.float32(255)
    assert point == np.clip(np.rint(-low / scale), 0, 255)
    np.testing.assert_array_equal(y, quantized(x, scale, point, 0, 255))


def test_dynamic_quantization_of_nan_gives_no_number() -> None:
    """Wherever it is: the definition takes the least and the greatest of all elements."""
    for place in range(5):
        x = np.arange(5, dtype=np.float32)
        x[place] = np.nan
        y, scale = run(
            """g (float[5] x) => (float[5] d, float s) {
                y, s, z = DynamicQuantizeLinear (x)  d = DequantizeLinear (y, s, z) }""", [x]
        )  # fmt: skip
        assert np.isnan(scale) and np.isnan(y).all()


def operand(text: str, **weights: np.ndarray) -> Any:
    """The operand behind the input of the model's last node."""
    from graphwright.runtime import importer
    from graphwright.runtime.importing import quantized as module
    from graphwright.runtime.importing.site import CONVERTERS, Site

    found = []

    def relu(site: Site) -> Any:
        found.append(module.integer_operand(site.bb, site.x()))
        return site.x()

    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {text}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONVERTERS, "Relu", relu)
        importer.import_model(model, TARGET)
    return found[0]


def test_an_operand_is_found_behind_transposes_and_reshapes() -> None:
    scale, zero = np.array([0.5, 0.25, 0.125], np.float32), np.array([1, 2, 3], np.uint8)
    found = operand(
        """g (uint8[2, 3, 4] x) => (float[4, 2, 3, 1] y) {
            d = DequantizeLinear <axis = 1> (x, s, z)  t = Transpose <perm = [2, 0, 1]> (d)
            r = Reshape (t, shape)  y = Relu (r) }""",
        s=scale, z=zero, shape=np.array([4, 2, 3, 1]),
    )  # fmt: skip
    assert found.axis == 2 and found.dtype == "uint8"
    assert [int(d) for d in found.value.ty.shape.values] == [4, 2, 3, 1]
    np.testing.assert_array_equal(found.scale, scale)
    np.testing.assert_array_equal(found.zero_point, zero)


def test_a_constant_operand_stays_a_constant() -> None:
    w = np.arange(6, dtype=np.int8).reshape(2, 3)
    found = operand(
        "g () => (float[3, 2] y) { d = DequantizeLinear (w, s)  t = Transpose (d)  y = Relu (t) }",
        w=w, s=np.array(0.5, np.float32),
    )  # fmt: skip
    assert found.axis is None and found.scale == 0.5 and found.zero_point == 0
    np.testing.assert_array_equal(found.value.value.numpy(), w.T)


@pytest.mark.parametrize(
    "body", ["r = Reshape (d, shape)", "n = Neg (d)  r = Reshape (n, shape)"], ids=["the axis is cut", "computed"]
)
def test_no_operand(body: str) -> None:
    found = operand(
        f"g (int8[4, 6] x) => (float[2, 12] y) {{ d = DequantizeLinear <axis = 0> (x, s)  {body}  y = Relu (r) }}",
        s=np.ones(4, np.float32), shape=np.array([2, 12]),
    )  # fmt: skip
    assert found is None


RESIDUAL = """g (uint8[n, SIZE] a, uint8[n, SIZE] b) => (uint8[n, SIZE] y) {
    p = DequantizeLinear (a, s, z)  q = DequantizeLinear (b, t, u)  r = Add (p, q)  e = Relu (r)
    y = QuantizeLinear (e, v, w) }"""
X86 = ["cpu", "cpu-avx512", "cpu-avx2", "cpu-baseline"]


@pytest.mark.parametrize("name", X86)
@pytest.mark.parametrize("size", [1, 7, 8, 31, 64, 131])
def test_a_residual_sum_is_rounded_once_and_alike_everywhere(
    name: str, size: int, runnable: Callable[..., Any], compile_model: Callable[..., Any]
) -> None:
    """Products with ratios of scales are rounded before they are added, on every instruction set; what the operators
    one by one give is a step off at ties at most."""
    runnable(name)
    random = np.random.default_rng(size)
    scales = {k: np.array(random.uniform(0.01, 0.2), np.float32) for k in "stv"}
    points = {k: np.array(random.integers(0, 256), np.uint8) for k in "zuw"}
    model = compile_model(RESIDUAL.replace("SIZE", str(size)), name, **scales, **points)
    assert len(model.kernels("quantize")) == 1
    a, b = (random.integers(0, 256, (9, size)).astype(np.uint8) for _ in range(2))
    wide = [(x - points[z].astype(np.int32)).astype(np.float32) for x, z in ((a, "z"), (b, "u"))]
    ratios = [np.float32(np.float64(scales[s]) / np.float64(scales["v"])) for s in "st"]
    steps = np.rint(wide[0] * ratios[0] + wide[1] * ratios[1]).astype(np.int64)
    (y,) = model.run({"a": a, "b": b})
    np.testing.assert_array_equal(y, np.clip(np.maximum(steps, 0) + points["w"], 0, 255))
    total = np.maximum(wide[0] * scales["s"] + wide[1] * scales["t"], 0)
    off = np.abs(y.astype(int) - quantized(total, scales["v"], points["w"], 0, 255))
    assert off.max() <= 1
    assert (off > 0).mean() <= 0.01


@settings(max_examples=60, deadline=None)
@given(st.floats(2.0**-20, 2.0**10, width=32), st.integers(0, 255))
def test_the_quotient_without_a_division_rounds_like_the_quotient(scale: float, zero: int) -> None:
    """What `by_reciprocal` promises at ties holds between them: the same in NumPy, where each step is rounded alike."""
    from graphwright.runtime.kernels.quantization import by_reciprocal

    low, high, s = -zero, 255 - zero, np.float32(scale)
    if not by_reciprocal(float(s), low, high):
        return
    x = np.random.default_rng(zero).uniform(float(s) * low, float(s) * high, 4096).astype(np.float32)
    r = np.float32(1) / s
    q = x * r
    rest = (x.astype(np.float64) - q.astype(np.float64) * np.float64(s)).astype(np.float32)
    better = (q.astype(np.longdouble) + rest.astype(np.longdouble) * np.longdouble(r)).astype(np.float32)
    np.testing.assert_array_equal(np.rint(better), np.rint(x / s))
