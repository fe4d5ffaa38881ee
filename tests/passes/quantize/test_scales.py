"""Scales and codes against oracles in float64 and against onnxruntime's QuantizeLinear."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from graphwright.passes.quantize.scales import (
    affine,
    data_grid,
    decibels,
    dequantize,
    fit_weights,
    quantize,
    signal_to_noise,
    weight_grid,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper

FLOATS = st.floats(-1000, 1000, width=32)


def ort_quantized(x: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """What QuantizeLinear makes of x."""
    kind = helper.np_dtype_to_tensor_dtype(zero.dtype)
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape)),
              helper.make_tensor_value_info("y", kind, list(x.shape))]  # fmt: skip
    held = [onnx.numpy_helper.from_array(a, name) for name, a in (("s", scale), ("z", zero))]
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])], "g", values[:1], values[1:], held
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )[0]


@pytest.mark.parametrize("bits", [8, 16])
@given(x=arrays(np.float32, st.integers(1, 40), elements=FLOATS), data=st.data())
@settings(max_examples=20, deadline=None)
def test_codes_are_those_of_quantize_linear(bits: int, x: np.ndarray, data: st.DataObject) -> None:
    grid = data_grid(bits)
    low, high = sorted((data.draw(FLOATS), data.draw(FLOATS)))
    scale, zero = affine(low, high, grid)
    dtype = np.uint8 if bits == 8 else np.uint16
    expected = ort_quantized(x, np.float32(scale), zero.astype(dtype).reshape(()))
    np.testing.assert_array_equal(quantize(x, scale, zero, grid), expected)


@pytest.mark.parametrize("bits", [8, 16])
@given(low=FLOATS, high=FLOATS)
@settings(max_examples=50, deadline=None)
def test_a_range_is_covered_to_half_a_step_and_zero_is_exact(bits: int, low: float, high: float) -> None:
    grid = data_grid(bits)
    low, high = min(low, high), max(low, high)
    scale, zero = affine(low, high, grid)
    ends = np.array([low, high, 0.0], np.float32)
    found = dequantize(quantize(ends, scale, zero, grid), scale, zero)
    assert found[2] == 0
    # Half a step of rounding, half a step by which the whole zero point moves the range, and float32.
    np.testing.assert_allclose(found, ends, rtol=1e-5, atol=float(scale) * 1.0001)


@pytest.mark.parametrize("ends", [(0.0, 0.0), (-1e-40, 1e-40), (-0.0, 0.0)])
def test_a_range_of_nothing_has_a_scale_that_can_be_divided_by(ends: tuple[float, float]) -> None:
    scale, zero = affine(*ends, data_grid(8))
    assert scale == 1 and zero == 0
    assert not quantize(np.zeros(3, np.float32), scale, zero, data_grid(8)).any()


def test_halves_round_to_even_and_far_numbers_saturate() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, 3e38, -3e38, np.inf, -np.inf], np.float32)
    np.testing.assert_array_equal(quantize(x, 1.0, 3, data_grid(8)), [3, 5, 5, 3, 255, 0, 255, 0])


@pytest.mark.parametrize(("bits", "low", "high"), [(8, -127, 127), (6, -31, 31), (4, -8, 7)])
def test_grids_of_weights(bits: int, low: int, high: int) -> None:
    assert (weight_grid(bits).low, weight_grid(bits).high) == (low, high)
    assert (weight_grid(bits, False).low, weight_grid(bits, False).high) == (0, 2**bits - 1)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("block", [0, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_searched_scale_is_never_worse_than_the_largest_weights(bits: int, block: int, symmetric: bool) -> None:
    random = np.random.default_rng(bits)
    weights = random.standard_t(3, (7, 21)).astype(np.float32)  # a block that is not full, and outliers
    importance = random.uniform(0.1, 2, (1, 21))
    grid = weight_grid(bits, symmetric)
    errors = []
    for search in (False, True):
        codes = fit_weights(weights, grid, block, importance, search)
        assert codes.codes.shape == weights.shape and codes.scale.shape == (7, 3 if block else 1)
        assert codes.codes.min() >= grid.low and codes.codes.max() <= grid.high
        errors.append((importance * (weights - codes.values).astype(np.float64) ** 2).sum())
    assert errors[1] <= errors[0]


@pytest.mark.parametrize("block", [0, 4])
def test_codes_and_values_by_an_oracle_in_float64(block: int) -> None:
    weights = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    codes = fit_weights(weights, weight_grid(8), block, search=False)
    size = block or 8
    for row in range(3):
        for at in range(0, 8, size):
            part = weights[row, at : at + size].astype(np.float64)
            scale = np.abs(part).max() / 127
            np.testing.assert_array_equal(codes.codes[row, at : at + size], np.rint(part / scale))
            np.testing.assert_allclose(codes.values[row, at : at + size], np.rint(part / scale) * scale, rtol=1e-5)


def test_rows_are_fitted_in_pieces_like_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphwright.passes.quantize import scales

    random = np.random.default_rng(0)
    weights, importance = random.standard_normal((9, 6)).astype(np.float32), random.uniform(0, 1, (9, 6))
    importance /= importance.mean(1, keepdims=True)
    whole = fit_weights(weights, weight_grid(4), 0, importance)
    monkeypatch.setattr(scales, "PIECE", 12)
    pieces = fit_weights(weights, weight_grid(4), 0, importance)
    np.testing.assert_allclose(pieces.values, whole.values, rtol=1e-6)


def test_a_smallest_scale_is_kept() -> None:
    weights = np.array([[1e-12, -1e-12], [1.0, -0.5]], np.float32)
    codes = fit_weights(weights, weight_grid(8), least=np.array([0.1, 0.0]))
    assert codes.scale[0, 0] == np.float32(0.1) and not codes.codes[0].any()
    assert codes.codes[1, 0] in (126, 127)


def test_weights_of_zero_are_zero_and_a_single_one_is_exact() -> None:
    assert not fit_weights(np.zeros((2, 3), np.float32), weight_grid(4)).values.any()
    np.testing.assert_allclose(fit_weights(np.full((1, 1), -3.7, np.float32), weight_grid(8)).values, -3.7, rtol=1e-6)


def test_decibels() -> None:
    x = np.array([3.0, 4.0])
    assert signal_to_noise(x, x) == np.inf and decibels(0, 1) == -np.inf
    assert signal_to_noise(x, x + 0.5) == pytest.approx(10 * np.log10(25 / 0.5))
