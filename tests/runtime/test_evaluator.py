"""Values inside a model, sample by sample."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphwright.passes.errors import InputError, PassError
from graphwright.runtime import evaluator, reference
from graphwright.runtime.evaluator import evaluate
from onnx import parser

TEXT = """<ir_version: 10, opset_import: ["" : 20]> g (float[B, 3] x) => (float[B, 3] z)
<float[3] w = {1, 2, 3}> { y = Mul (x, w) u = Relu (y) z = Exp (u) }"""


@pytest.fixture
def model() -> ir.Model:
    return ir.from_proto(parser.parse_model(TEXT))


@pytest.fixture
def feeds() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [{"x": random.standard_normal((batch, 3)).astype(np.float32)} for batch in (1, 4)]


@pytest.mark.parametrize("limit", [1, 1 << 20])
def test_every_value_of_every_sample_comes_once_whatever_the_groups(
    model: ir.Model, feeds: list[dict[str, np.ndarray]], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator, "GROUP_BYTES", limit)
    found = {(number, name): array for number, name, array in evaluate(model, ["u", "x", "z", "y", "y"], feeds)}
    assert sorted(found) == [(i, name) for i in (0, 1) for name in "uxyz"]
    for i, one in enumerate(feeds):
        y = one["x"] * np.array([1, 2, 3], np.float32)
        expected = {"x": one["x"], "y": y, "u": np.maximum(y, 0), "z": np.exp(np.maximum(y, 0))}
        for name, array in expected.items():
            np.testing.assert_allclose(found[i, name], array, rtol=1e-6)


def test_a_large_model_runs_a_segment_at_a_time(
    model: ir.Model, feeds: list[dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "WHOLE_LIMIT", 0)
    monkeypatch.setattr(reference, "SEGMENT_LIMIT", 1)
    assert sorted((number, name) for number, name, _ in evaluate(model, ["y", "u"], feeds)) == [
        (0, "u"), (0, "y"), (1, "u"), (1, "y"),
    ]  # fmt: skip


def test_the_model_stays_as_it_is(model: ir.Model, feeds: list[dict[str, np.ndarray]]) -> None:
    list(evaluate(model, ["y"], feeds))
    assert [value.name for value in model.graph.outputs] == ["z"] and len(model.graph) == 3


def test_what_it_refuses(model: ir.Model, feeds: list[dict[str, np.ndarray]]) -> None:
    assert not list(evaluate(model, ["nothing"], []))
    with pytest.raises(PassError, match="the model has no value 'nothing'"):
        list(evaluate(model, ["nothing"], feeds))
    with pytest.raises(InputError, match="onnxruntime cannot run the model on these inputs"):
        list(evaluate(model, ["y"], [{"x": np.zeros((1, 5), np.float32)}]))


def test_codes_are_computed_as_they_stand(feeds: list[dict[str, np.ndarray]]) -> None:
    """onnxruntime's optimizations would make products of bytes of it, which saturate on some machines."""
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[B, 3] x) => (float[B, 2] z)
    <float s = {0.01}, uint8 o = {128}, int8[3,2] w = {127, 127, 127, 127, -127, 127}, float[2] t = {0.5, 0.25}>
    { c = QuantizeLinear (x, s, o) d = DequantizeLinear (c, s, o) v = DequantizeLinear <axis = 1> (w, t)
      z = MatMul (d, v) }"""
    model = ir.from_proto(parser.parse_model(text))
    weights = np.array([[127, 127], [127, 127], [-127, 127]]) * np.array([0.5, 0.25])
    for number, _, found in evaluate(model, ["z"], feeds):
        codes = np.clip(np.rint(feeds[number]["x"] / np.float32(0.01)) + 128, 0, 255)
        np.testing.assert_allclose(found, (codes - 128) * 0.01 @ weights, rtol=1e-4, atol=1e-4)
