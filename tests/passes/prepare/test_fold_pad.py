"""fold-pad on random windows: onnxruntime gives the same with the Pad and without."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from graphwright.passes.pipeline import Pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))
PADS = st.tuples(*[st.integers(0, 3)] * 4)


def model_of(
    kind: str, added: tuple[int, ...], own: tuple[int, ...], kernel: tuple[int, int], strides: tuple[int, int],
    dilations: tuple[int, int], fill: float, ceil: int, counted: int,
) -> onnx.ModelProto:  # fmt: skip
    attributes = {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "pads": own}
    if kind != "Conv":
        attributes["ceil_mode"] = (ceil,)
    if kind == "AveragePool":
        attributes["count_include_pad"] = (counted,)
    plain = {name: value[0] if len(value) == 1 else list(value) for name, value in attributes.items()}
    weights = np.random.default_rng(0).integers(-3, 4, (3, 2, *kernel)).astype(np.float32)
    pads = np.array([0, 0, *added[:2], 0, 0, *added[2:]])
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Pad", ["r", "pads", "fill"], ["a"]),
        helper.make_node(kind, ["a", "w"] if kind == "Conv" else ["a"], ["y"], **plain),
    ]
    arrays = {"pads": pads, "fill": np.float32(fill), "w": weights}
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2, "H", "W"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )  # fmt: skip
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0]


def folded(model: onnx.ModelProto) -> tuple[onnx.ModelProto, bool]:
    converted = ir.serde.deserialize_model(model)
    converted, reports = Pipeline.parse("fold-pad,dead-code").run(converted)
    return ir.serde.serialize_model(converted), bool(reports[0].changes)


@given(
    kind=st.sampled_from(["Conv", "MaxPool", "AveragePool"]), added=PADS, own=PADS, kernel=PAIR, strides=PAIR,
    dilations=PAIR, fill=st.sampled_from([0.0, -0.0, -np.inf, 1.0]), ceil=st.sampled_from([0, 0, 1]),
    counted=st.sampled_from([0, 1]), height=st.integers(7, 9), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_windows_give_the_same(
    kind: str, added: tuple[int, ...], own: tuple[int, ...], kernel: tuple[int, int], strides: tuple[int, int],
    dilations: tuple[int, int], fill: float, ceil: int, counted: int, height: int, seed: int,
) -> None:  # fmt: skip
    if kind != "Conv":
        own = tuple(min(n, size - 1) for n, size in zip(own, (*kernel, *kernel), strict=True))
    model = model_of(kind, added, own, kernel, strides, dilations, fill, ceil, counted)
    found, changed = folded(model)
    assert changed == (len(found.graph.node) == 2)
    x = np.random.default_rng(seed).integers(-9, 10, (2, 2, height, 8)).astype(np.float32)
    np.testing.assert_array_equal(run(found, x), run(model, x))
    if fill == 0 and kind == "Conv":
        assert changed


@pytest.mark.parametrize(
    ("bounds", "takes"), [({"min": 0.0, "max": 6.0}, True), ({"min": -1.0, "max": 6.0}, False), ({}, False)]
)
@pytest.mark.parametrize("opset", [9, 21])
def test_zeros_are_no_maximum_where_a_clip_keeps_numbers_up(bounds: dict, takes: bool, opset: int) -> None:
    names = ["x", *bounds] if opset > 10 else ["x"]
    pads = [0, 0, 1, 1, 0, 0, 1, 1]
    clip = helper.make_node("Clip", names, ["c"], **({} if opset > 10 else bounds))
    pad = helper.make_node("Pad", ["c", "p"], ["a"]) if opset > 10 else helper.make_node("Pad", ["c"], ["a"], pads=pads)
    pool = helper.make_node("MaxPool", ["a"], ["y"], kernel_shape=[3, 3])
    arrays = {"p": np.array(pads), **{name: np.float32(number) for name, number in bounds.items()}}
    graph = helper.make_graph(
        [clip, pad, pool], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 4, 4])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()] if opset > 10 else [],
    )  # fmt: skip
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", opset)])
    found, changed = folded(model)
    assert changed == takes
    x = np.linspace(-8, 8, 16, dtype=np.float32).reshape(1, 1, 4, 4)
    np.testing.assert_array_equal(run(found, x), run(model, x))


def test_the_presets_compile_and_default_fold_pads() -> None:
    model = model_of("Conv", (0, 0, 1, 1), (0, 0, 0, 0), (3, 3), (2, 2), (1, 1), 0.0, 0, 0)
    for preset in ("default", "compile"):
        from graphwright.passes.registry import PRESETS

        converted, _ = Pipeline.parse(PRESETS[preset]).run(ir.serde.deserialize_model(model))
        assert [node.op_type for node in converted.graph if node.op_type != "Constant"] == ["Relu", "Conv"]
