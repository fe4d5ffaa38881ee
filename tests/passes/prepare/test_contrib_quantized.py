"""Quantized operators of onnxruntime written as the standard's give its numbers, but for a step where halves round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.base import PassContext
from graphwright.passes.graph import constant_tensor
from graphwright.passes.pipeline import Pipeline
from graphwright.passes.prepare import contrib_quantized
from graphwright.runtime.reference import Reference
from onnx import helper, numpy_helper

pytest.importorskip("onnxruntime")

S, T, U = (np.array(v, np.float32) for v in (0.05, 0.08, 0.11))
Y, Z = np.array(120, np.uint8), np.array(100, np.uint8)
BLOCK = 16


def draw(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    random = np.random.default_rng(sum(shape))
    if dtype == np.float32:
        return random.standard_normal(shape).astype(dtype)
    info = np.iinfo(dtype)
    return random.integers(info.min, int(info.max) + 1, shape).astype(dtype)


def signed(*shape: int) -> np.ndarray:
    return draw(*shape, dtype=np.int8)


def floats(*shape: int) -> np.ndarray:
    return draw(*shape, dtype=np.float32)


def run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return list(Reference(model, threads=1).run(feeds).values())


def both(op: str, inputs: Sequence[Any], domain: str, **attributes: Any) -> tuple[np.ndarray, np.ndarray, ir.Model]:
    """The operator's result and that of what stands for it. The first tensor is an input, the others constants."""
    names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
    first = next(i for i, x in enumerate(inputs) if x is not None and np.ndim(x) > 1)
    node = helper.make_node(op, names, ["y"], domain=domain, **attributes)
    given = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), ["n", *x.shape[1:]])
        for n, x in zip(names, inputs, strict=True) if n == f"x{first}"
    ]  # fmt: skip
    weights = [numpy_helper.from_array(x, n) for n, x in zip(names, inputs, strict=True) if n not in ("", f"x{first}")]
    out = onnx.ValueInfoProto(name="y")
    graph = helper.make_graph([node], "g", given, [out], weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=9))
    feeds = {f"x{first}": inputs[first]}
    expected = run(model, feeds)[0]
    steps = "infer-shapes,standardise-contrib" if domain else "infer-shapes,decompose"
    changed, _ = Pipeline.parse(steps).run(model, PassContext())
    assert {n.domain for n in changed.graph} == {""}
    return expected, run(changed, feeds)[0], changed


IMAGE = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}
CASES: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "add": ("QLinearAdd", [draw(3, 9), S, Y, draw(1, 9), T, Z, U, Y], {}),
    "mul": ("QLinearMul", [draw(3, 9), S, Y, draw(3, 9), T, Z, U, Y], {}),
    "sigmoid": ("QLinearSigmoid", [draw(3, 9), S, Y, np.array(1 / 256, np.float32), np.array(0, np.uint8)], {}),
    "leaky": ("QLinearLeakyRelu", [signed(3, 9), S, np.array(3, np.int8), T, np.array(-5, np.int8)], {"alpha": 0.2}),
    "softmax": ("QLinearSoftmax", [draw(3, 9), S, Y, np.array(1 / 256, np.float32), np.array(0, np.uint8)],
                {"axis": -1, "opset": 13}),
    "concat": ("QLinearConcat", [U, Y, draw(3, 9), S, Z, draw(3, 4), T, Y], {"axis": 1}),
    "pool": ("QLinearAveragePool", [draw(2, 5, 7, 9), S, Y, T, Z], IMAGE),
    "pool, channels last": ("QLinearAveragePool", [draw(2, 7, 9, 5), S, Y, T, Z], {**IMAGE, "channels_last": 1}),
    "global pool": ("QLinearGlobalAveragePool", [draw(2, 5, 7, 9), S, Y, T, Z], {}),
    "global pool, channels last": ("QLinearGlobalAveragePool", [draw(2, 7, 9, 5), S, Y, T, Z], {"channels_last": 1}),
    # onnxruntime adds in 16 bits here, which such weights do not fill.
    "conv, channels last": ("QLinearConv", [draw(2, 6, 7, 4), S, Y, signed(5, 4, 3, 3) // 4, T, np.array(0, np.int8),
                                            U * 9, Z, np.arange(5, dtype=np.int32) * 50],
                            {**IMAGE, "channels_last": 1}),
    "where": ("QLinearWhere", [draw(3, 9) > 99, draw(3, 9), S, Y, draw(3, 9), T, Z, U, Y], {}),
    "gemm": ("QGemm", [draw(3, 8), S, Y, signed(8, 5), np.full(5, 0.02, np.float32), np.zeros(5, np.int8),
                       np.arange(5, dtype=np.int32) * 100, T, Z], {}),
    "gemm to floats": ("QGemm", [draw(3, 8), S, Y, signed(5, 8), T, np.array(0, np.int8)], {"transB": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_operators_are_between_two_quantizations(name: str) -> None:
    op, inputs, attributes = CASES[name]
    expected, found, _ = both(op, inputs, "com.microsoft", **attributes)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if expected.dtype == np.float32:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
        return
    # Halves round by another formula, sigmoid and softmax by tables of their own.
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


B = signed(16, 5)
SCALES = np.random.default_rng(0).uniform(0.01, 0.02, 5).astype(np.float32)


@pytest.mark.parametrize("bias", [None, floats(5)], ids=["plain", "bias"])
def test_products_of_integers_in_floats(bias: np.ndarray | None) -> None:
    inputs = [draw(3, 16), B, S, SCALES, Y, np.zeros(5, np.int8), bias]
    expected, found, _ = both("MatMulIntegerToFloat", inputs, "com.microsoft")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_a_product_quantized_when_it_runs() -> None:
    expected, found, _ = both("DynamicQuantizeMatMul", [floats(3, 16), B, SCALES, None, floats(5)], "com.microsoft")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("depth", [32, 24])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_few_bits_keep_them(bits: int, zero: bool, depth: int) -> None:
    """Blocks along the depth, the last one cut; zero points packed like the weight, or the middle of the range."""
    n, blocks = 6, -(-depth // BLOCK)
    packed = draw(n, blocks, BLOCK * bits // 8)
    scales = np.random.default_rng(1).uniform(0.01, 0.1, (n * blocks,)).astype(np.float32)
    points = draw(n * -(-blocks * bits // 8)) if zero else None
    expected, found, model = both(
        "MatMulNBits", [floats(3, depth), packed, scales, points], "com.microsoft",
        K=depth, N=n, bits=bits, block_size=BLOCK, accuracy_level=0,
    )  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    types = {constant_tensor(n.inputs[0]).dtype for n in model.graph if n.op_type == "DequantizeLinear"}
    assert types == {ir.DataType[f"{'U' if zero else ''}INT{bits}"]}


def test_products_and_convolutions_of_the_standard() -> None:
    zeros = np.zeros(5, np.int8)
    x, bias = draw(2, 4, 6, 7), np.arange(5, dtype=np.int32) * 50
    for weight_scale in (SCALES, T):
        zero = zeros if weight_scale.ndim else np.array(0, np.int8)
        inputs = [x, S, Y, signed(5, 4, 3, 3), weight_scale, zero, U * 9, Z, bias]
        expected, found, _ = both("QLinearConv", inputs, "", **IMAGE)
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
        expected, found, _ = both("QLinearMatMul", [draw(3, 16), S, Y, B, weight_scale, zero, U, Z], "")
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    expected, found, _ = both("ConvInteger", [x, draw(5, 4, 3, 3), Y, Z], "", **IMAGE)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("op", ["QuantizeLinear", "DequantizeLinear"])
def test_sixteen_bits_before_the_standard_had_them(op: str) -> None:
    x = floats(3, 5) if op == "QuantizeLinear" else draw(3, 5, dtype=np.int16)
    expected, found, _ = both(op, [x, S, np.array(-7, np.int16)], "com.microsoft")
    np.testing.assert_array_equal(found, expected)


def test_every_operator_is_tried() -> None:
    elsewhere = {"DequantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits"}
    elsewhere.add("QuantizeLinear")
    assert set(contrib_quantized.BODIES) == {op for op, _, _ in CASES.values()} | elsewhere
