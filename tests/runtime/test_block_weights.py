"""Products and gathers of weights that are dequantized from a few bits: onnxruntime is the judge, bits stay bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.ops import BLOCK_QUANTIZE
from onnx import TensorProto, helper, numpy_helper

pytestmark = pytest.mark.tvm

RANGES = {"INT4": (-8, 7), "UINT4": (0, 15), "INT8": (-128, 127), "UINT8": (0, 255)}


def weight(name: str, shape: tuple[int, int], kind: str, axis: int, block: int, zeros: bool) -> tuple[list[Any], Any]:
    """(initializers, node) of a dequantized matrix `name`. block 0: one scale for each index of the other axis."""
    random = np.random.default_rng(len(name))
    low, high = RANGES[kind]
    dtype = getattr(TensorProto, kind)
    sizes = [-(-n // block) if a == axis else n for a, n in enumerate(shape)] if block else [shape[1 - axis]]
    scales = (random.random(sizes) + 0.5).astype(np.float16).astype(np.float32)
    made = [
        helper.make_tensor(f"{name}_codes", dtype, shape, random.integers(low, high + 1, shape).reshape(-1).tolist()),
        numpy_helper.from_array(scales, f"{name}_scales"),
    ]
    if zeros:
        points = random.integers(low, high + 1, sizes).reshape(-1).tolist()
        made.append(helper.make_tensor(f"{name}_zeros", dtype, sizes, points))
    options = {"axis": axis, "block_size": block} if block else {"axis": 1 - axis}
    return made, helper.make_node("DequantizeLinear", [tensor.name for tensor in made], [name], **options)


def model(
    nodes: list[Any], initializers: list[Any], x: list[Any], y: list[Any], kind: int = TensorProto.FLOAT
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", kind, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)], initializers,
    )  # fmt: skip
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("graphwright", 1)]
    made = helper.make_model(graph, opset_imports=imports, ir_version=10)
    if any(node.domain == "graphwright" for node in nodes):
        made.functions.append(ir.serde.serialize_function(BLOCK_QUANTIZE.function(21)))
    onnx.checker.check_model(made)
    return made


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kind, block, zeros", [
    ("INT4", 32, False), ("UINT4", 16, True), ("INT8", 32, False), ("UINT8", 0, True), ("INT8", 0, False),
])  # fmt: skip
def test_products_read_the_codes(compile_model: Callable[..., Any], kind: str, block: int, zeros: bool) -> None:
    made, dequantize = weight("w", (96, 70), kind, 0, block, zeros)
    nodes = [dequantize, helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Relu", ["m"], ["y"])]
    compiled = compile_model(model(nodes, made, [3, 96], [3, 70]))
    assert compiled.kernels("block-product") and not compiled.kernels("dequantize")
    compiled.check({"x": draw(3, 96)})


@pytest.mark.parametrize("rows", [1, 40])
def test_a_transposed_table_is_head_and_embedding(compile_model: Callable[..., Any], rows: int) -> None:
    """The codes of a decoder's tied embedding, whose rows are gathered and whose columns are multiplied."""
    made, dequantize = weight("w", (70, 64), "INT4", 1, 32, False)
    nodes = [
        dequantize,
        helper.make_node("Gather", ["w", "x"], ["rows"]),
        helper.make_node("Transpose", ["w"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["rows", "turned"], ["y"]),
    ]
    compiled = compile_model(model(nodes, made, [rows], [rows, 70], TensorProto.INT64))
    assert compiled.kernels("block-product") and not compiled.kernels("dequantize1")
    compiled.check({"x": np.random.default_rng(0).integers(-70, 70, rows)})


@pytest.mark.parametrize("rows", [1, 4, 5])
def test_blocks_of_the_other_side_are_whole_numbers(compile_model: Callable[..., Any], rows: int) -> None:
    """A few rows meet the codes as bytes; of many the quantized numbers are made."""
    made, dequantize = weight("w", (64, 33), "INT4", 0, 32, False)
    quantize = helper.make_node("BlockQuantize", ["x"], ["q"], domain="graphwright", block=32)
    nodes = [dequantize, quantize, helper.make_node("Gemm", ["q", "w"], ["y"])]
    compiled = compile_model(model(nodes, made, [rows, 64], [rows, 33]))
    assert compiled.kernels("block-product")
    compiled.check({"x": draw(rows, 64)})


def test_a_gemm_of_a_transposed_weight_and_rows_known_at_run_time(compile_model: Callable[..., Any]) -> None:
    made, dequantize = weight("w", (33, 64), "INT4", 1, 16, False)
    nodes = [dequantize, helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)]
    compiled = compile_model(model(nodes, made, ["n", 64], ["n", 33]))
    for rows in (1, 7):
        compiled.check({"x": draw(rows, 64)})


@pytest.mark.parametrize("rows", [1, 40])
def test_a_table_of_rows_with_scales_is_head_and_embedding(compile_model: Callable[..., Any], rows: int) -> None:
    """The form that `dynaquant` writes: the rows that are taken are scaled, and no table of floats is stored."""
    codes, scales = np.random.default_rng(1).integers(-127, 128, (70, 64)).astype(np.int8), draw(70) / 100
    made = [numpy_helper.from_array(array, name) for name, array in (("codes", codes), ("scales", scales))]
    made.append(numpy_helper.from_array(scales[:, None].copy(), "factors"))
    nodes = [
        helper.make_node("Gather", ["codes", "x"], ["taken"]),
        helper.make_node("Gather", ["factors", "x"], ["factor"]),
        helper.make_node("Cast", ["taken"], ["steps"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["steps", "factor"], ["rows"]),
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["numbers"], axis=0),
        helper.make_node("Transpose", ["numbers"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["rows", "turned"], ["y"]),
    ]
    compiled = compile_model(model(nodes, made, [rows], [rows, 70], TensorProto.INT64))
    assert compiled.kernels("block-product") and not compiled.kernels("dequantize")
    assert all(array.numpy().nbytes < 4 * codes.size for array in compiled.constants)
    compiled.check({"x": np.random.default_rng(0).integers(-70, 70, rows)})
