"""block-activations: which data is rounded, that it is rounded once, and what the outputs are then."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.base import PassContext, PassReport
from graphwright.passes.ops.block_quantize import block_quantize
from graphwright.passes.pipeline import Pipeline
from onnx import TensorProto, helper, numpy_helper

onnxruntime = pytest.importorskip("onnxruntime")


def weight(name: str, shape: tuple[int, int], axis: int, block: int, kind: int = TensorProto.INT4) -> list[Any]:
    """[codes, scales, node] of a matrix that is dequantized. block 0: one scale for each index of the other axis."""
    random = np.random.default_rng(len(name))
    codes = helper.make_tensor(f"{name}_codes", kind, shape, random.integers(-8, 8, shape).reshape(-1).tolist())
    sizes = [n // block if a == axis else n for a, n in enumerate(shape)] if block else [shape[1 - axis]]
    scales = numpy_helper.from_array((random.random(sizes) + 0.5).astype(np.float32), f"{name}_scales")
    options = {"axis": axis, "block_size": block} if block else {"axis": 1 - axis}
    return [codes, scales, helper.make_node("DequantizeLinear", [codes.name, scales.name], [name], **options)]


def model(weights: list[list[Any]], nodes: list[Any], x: list[Any]) -> ir.Model:
    given = [tensor for made in weights for tensor in made[:2]]
    outputs = [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, ["n", "m"]) for node in nodes]
    graph = helper.make_graph(
        [*(made[2] for made in weights), *nodes], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)], outputs, given,
    )  # fmt: skip
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def run(m: ir.Model) -> PassReport:
    _, (report,) = Pipeline.parse("block-activations").run(m, PassContext(), in_place=True)
    return report


def outputs(m: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    proto = ir.to_proto(m)
    onnx.checker.check_model(proto)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, {"x": x})


@pytest.mark.parametrize("rows", [1, 5])
def test_outputs_are_those_of_rounded_data(rows: int) -> None:
    m = model(
        [weight("w", (64, 6), 0, 32), weight("vv", (5, 64), 1, 16), weight("uuu", (64, 4), 0, 32)],
        [
            helper.make_node("MatMul", ["x", "w"], ["a"]),
            helper.make_node("Gemm", ["x", "vv"], ["b"], transB=1),
            helper.make_node("MatMul", ["x", "uuu"], ["c"]),
        ],
        ["n", 64],
    )
    x = np.random.default_rng(0).standard_normal((rows, 64)).astype(np.float32)
    rounded = {block: block_quantize(x, block).astype(np.float32) for block in (16, 32)}
    expected = [outputs(m, rounded[block])[i] for i, block in enumerate((32, 16, 32))]
    assert len(run(m).changes) == 3
    assert sum(node.op_type == "BlockQuantize" for node in m.graph) == 2  # one for each size of blocks
    for found, wanted in zip(outputs(m, x), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_a_second_run_changes_nothing_that_is_rounded() -> None:
    m = model([weight("w", (64, 6), 0, 32)], [helper.make_node("MatMul", ["x", "w"], ["a"])], ["n", 64])
    assert run(m).changes and not run(m).changes
    assert sum(node.op_type == "BlockQuantize" for node in m.graph) == 1


@pytest.mark.parametrize("made, x, reason", [
    (weight("w", (64, 6), 0, 4), ["n", 64], "blocks of 4 elements"),
    (weight("w", (64, 6), 0, 32), ["n", "k"], "depth of its data is not known"),
    (weight("w", (64, 6), 0, 32, TensorProto.INT8), ["n", 64], None),
    (weight("w", (64, 6), 0, 0), ["n", 64], None),
    (weight("w", (64, 6), 1, 3), ["n", 64], None),
])  # fmt: skip
def test_what_is_left_alone(made: list[Any], x: list[Any], reason: str | None) -> None:
    """Other weights are no sites; the products that are say why."""
    report = run(model([made], [helper.make_node("MatMul", ["x", "w"], ["a"])], x))
    assert not report.changes
    assert [reason in skip.reason for skip in report.skips] == [True] if reason else not report.skips
