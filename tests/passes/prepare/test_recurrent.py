"""Unrolled LSTM, GRU and RNN against onnxruntime's kernels, over random options."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.base import PassContext
from graphwright.passes.prepare.decompose import Decompose
from graphwright.passes.prepare.infer_shapes import InferShapes
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
PER_DIRECTION = {"LSTM": 3, "GRU": 2, "RNN": 1}
SMOOTH = ["Tanh", "Sigmoid", "Relu", "Affine", "LeakyRelu", "ScaledTanh", "HardSigmoid", "Elu", "Softsign",
          "Softplus"]  # fmt: skip

# Sums of at most 12 products of numbers below 1 over 5 steps in float32: rounding stays well under this.
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Recurrence:
    kind: str
    steps: int
    batch: int
    inputs: int
    hidden: int
    direction: str
    bias: bool
    initial: bool
    peepholes: bool
    lengths: bool
    clip: float | None
    linear_before_reset: bool
    coupled: bool
    activations: tuple[str, ...] | None
    outputs: tuple[bool, ...]
    seed: int

    @property
    def directions(self) -> int:
        return 2 if self.direction == "bidirectional" else 1


@st.composite
def recurrences(draw: st.DrawFn) -> Recurrence:
    kind = draw(st.sampled_from(["LSTM", "GRU", "RNN"]))
    direction = draw(st.sampled_from(["forward", "reverse", "bidirectional"]))
    count = PER_DIRECTION[kind] * (2 if direction == "bidirectional" else 1)
    activations = st.lists(st.sampled_from(SMOOTH), min_size=count, max_size=count).map(tuple)
    return Recurrence(
        kind=kind,
        steps=draw(st.integers(1, 5)),
        batch=draw(st.integers(1, 3)),
        inputs=draw(st.integers(1, 4)),
        hidden=draw(st.integers(1, 4)),
        direction=direction,
        bias=draw(st.booleans()),
        initial=draw(st.booleans()),
        peepholes=draw(st.booleans()),
        lengths=draw(st.booleans()),
        clip=draw(st.sampled_from([None, 0.3])),
        linear_before_reset=draw(st.booleans()),
        coupled=draw(st.booleans()),
        activations=draw(st.none() | activations),
        outputs=draw(st.sampled_from([(True, True, True), (True, False, False), (False, True, True)])),
        seed=draw(st.integers(0, 1000)),
    )


def model_and_feeds(r: Recurrence) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    random = np.random.default_rng(r.seed)
    gates, directions = GATES[r.kind], r.directions

    def numbers(*shape: int) -> np.ndarray:
        return random.uniform(-1, 1, shape).astype(np.float32)

    lstm = r.kind == "LSTM"
    weights = {
        "W": numbers(directions, gates * r.hidden, r.inputs),
        "R": numbers(directions, gates * r.hidden, r.hidden),
    }
    if r.bias:
        weights["B"] = numbers(directions, 2 * gates * r.hidden)
    if r.lengths:
        weights["lengths"] = random.integers(1, r.steps + 1, r.batch).astype(np.int32)
    feeds = {"X": numbers(r.steps, r.batch, r.inputs)}
    if r.initial:
        feeds["h"] = numbers(directions, r.batch, r.hidden)
        if lstm:
            feeds["c"] = numbers(directions, r.batch, r.hidden)
    if r.peepholes and lstm:
        weights["P"] = numbers(directions, 3 * r.hidden)
    order = ["X", "W", "R", "B", "lengths", "h", *(["c", "P"] if lstm else [])]
    names = [name if name in weights or name in feeds else "" for name in order]
    attributes: dict[str, object] = {"hidden_size": r.hidden, "direction": r.direction}
    if r.clip is not None:
        attributes["clip"] = r.clip
    if r.kind == "GRU":
        attributes["linear_before_reset"] = int(r.linear_before_reset)
    if lstm:
        attributes["input_forget"] = int(r.coupled)
    if r.activations is not None:
        attributes["activations"] = list(r.activations)
        attributes["activation_alpha"] = [
            0.5 for a in r.activations if a not in ("Tanh", "Sigmoid", "Relu", "Softsign", "Softplus")
        ]
        attributes["activation_beta"] = [0.25 for a in r.activations if a in ("Affine", "ScaledTanh", "HardSigmoid")]
    wanted = r.outputs[: 3 if lstm else 2]
    results = [name if w else "" for name, w in zip(["Y", "Y_h", "Y_c"], wanted, strict=False)]
    node = helper.make_node(r.kind, names, results, **{k: v for k, v in attributes.items() if v != []})
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v.shape) for k, v in feeds.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in results if name],
        [onnx.numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), feeds


def run(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, feeds)


def decomposed(proto: onnx.ModelProto) -> onnx.ModelProto:
    model = ir.from_proto(proto)
    InferShapes().run(model, PassContext())
    report = Decompose().run(model, PassContext())
    assert not report.skips
    return ir.to_proto(model)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(recurrences())
def test_unrolled_recurrences_give_the_numbers_of_the_operators(r: Recurrence) -> None:
    proto, feeds = model_and_feeds(r)
    written = decomposed(proto)
    assert not {"LSTM", "GRU", "RNN"} & {node.op_type for node in written.graph.node}
    onnx.checker.check_model(written)
    for expected, got in zip(run(proto, feeds), run(written, feeds), strict=True):
        np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_batch_first_is_the_transposed_computation(kind: str) -> None:
    """onnxruntime has no kernel for layout=1, so the reference is layout=0 with axes exchanged outside."""
    r = Recurrence(kind, 3, 2, 3, 4, "bidirectional", True, True, True, False, None, True, False, None,
                   (True, True, True), 0)  # fmt: skip
    proto, feeds = model_and_feeds(r)
    expected = run(proto, feeds)
    node = proto.graph.node[0]
    node.attribute.append(helper.make_attribute("layout", 1))
    swapped = {name: np.ascontiguousarray(array.swapaxes(0, 1)) for name, array in feeds.items()}
    for info in proto.graph.input:
        info.CopyFrom(helper.make_tensor_value_info(info.name, TensorProto.FLOAT, swapped[info.name].shape))
    y, *states = run(decomposed(proto), swapped)
    np.testing.assert_allclose(y.transpose(1, 2, 0, 3), expected[0], rtol=TOLERANCE, atol=TOLERANCE)
    for got, state in zip(states, expected[1:], strict=True):
        np.testing.assert_allclose(got.swapaxes(0, 1), state, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("dims", "options", "reason"),
    [
        (["T", 1, 2], "", "the number of steps, dimension 0 of X, is not fixed; pin it"),
        ([300, 1, 2], "", "300 steps are outside 1 to 256; decompose:max_steps=300 allows them"),
    ],
)
def test_a_recurrence_that_cannot_be_unrolled_says_why(dims: list, options: str, reason: str) -> None:
    proto, _ = model_and_feeds(
        Recurrence("GRU", 1, 1, 2, 2, "forward", False, False, False, False, None, False, False, None, (True, True), 0)
    )
    proto.graph.input[0].CopyFrom(helper.make_tensor_value_info("X", TensorProto.FLOAT, dims))
    model = ir.from_proto(proto)
    report = Decompose().run(model, PassContext())
    assert [skip.reason for skip in report.skips] == [f"GRU: {reason}"]
    assert [node.op_type for node in model.graph] == ["GRU"]
