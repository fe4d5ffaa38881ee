"""What is allowed of models that quantize: one step where a number lies between two, and what follows from it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphwright.passes.base import PassContext
from graphwright.runtime.verify import Trial, trial
from graphwright.runtime.wavering import LEAST, LEAST_ROUNDED, least
from onnx import parser

HALVES = np.arange(8, dtype=np.float32) * 32 + 0.5  # between two steps of 1


def tried(body: str, x: np.ndarray, out: str = "uint8") -> Trial:
    text = f'<ir_version: 10, opset_import: ["" : 21]> g (float[8] x) => ({out}[8] y) <float s = {{1.0}}> {{ {body} }}'
    model = ir.from_proto(parser.parse_model(text))
    return trial(model, PassContext(calibration={"x": [x]}), model.clone)


@pytest.mark.parametrize("body, more", [("y = QuantizeLinear (x, s)", True), ("y = Cast <to = 2> (x)", False)])
def test_a_step_is_allowed_of_a_model_that_least(body: str, more: bool) -> None:
    """Where a number lies between two steps, another order of a sum decides for the other one."""
    t = tried(body, HALVES)
    expected = t.expected[0]["y"]
    assert t.judge(lambda one: {"y": expected - (expected == expected.max())}).ok == more
    assert not t.judge(lambda one: {"y": expected - 100 * (expected == expected.max())}).ok


AMPLIFIED = """
    q = QuantizeLinear (x, s)
    d = DequantizeLinear (q, s)
    r = Sub (x, d)
    y = Mul (r, s)
"""


def test_a_model_may_differ_as_far_as_rounding_takes_it() -> None:
    """The remainder of a number between two steps is as far below as above."""
    t = tried(AMPLIFIED, HALVES, "float")
    expected = t.expected[0]["y"]
    assert t.judge(lambda one: {"y": -expected}).ok
    assert not t.judge(lambda one: {"y": -8 * expected}).ok


def test_one_that_rounding_moves_nowhere_may_not() -> None:
    t = tried(AMPLIFIED, HALVES + np.float32(0.25), "float")
    expected = t.expected[0]["y"]
    assert not t.judge(lambda one: {"y": -expected}).ok


@pytest.mark.parametrize("fixed", [False, True])
def test_a_width_that_is_computed_is_a_step(fixed: bool) -> None:
    widths = ir.val("widths", ir.DataType.INT64, [1])
    if fixed:
        widths.const_value = ir.tensor(np.ones(1, np.int64))
    x = ir.val("x", ir.DataType.FLOAT, [1, 32])
    node = ir.node("NestedMatMul", [x, widths], domain="graphwright")
    graph = ir.Graph([x, widths], node.outputs, nodes=[node], opset_imports={"": 21, "graphwright": 1})
    assert least(ir.Model(graph, ir_version=10)) == (None if fixed else LEAST)


@pytest.mark.parametrize("to, allowed", [(16, LEAST_ROUNDED), (10, None), (11, None)])
def test_what_is_rounded_to_bfloat16_is_a_small_step(to: int, allowed: float | None) -> None:
    text = f'<ir_version: 10, opset_import: ["" : 21]> g (float[8] x) => (y) {{ y = Cast <to = {to}> (x) }}'
    assert least(ir.from_proto(parser.parse_model(text))) == allowed


def test_types_that_a_file_does_not_tell_are_inferred() -> None:
    """The sum of two numbers between two steps of bfloat16, less what it is rounded to."""
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[8] x) => (float[8] y) {
        s = Add (x, x)
        b = Cast <to = 16> (s)
        r = Cast <to = 1> (b)
        y = Sub (s, r)
    }"""
    model = ir.from_proto(parser.parse_model(text))
    halves = (1 + np.arange(8, dtype=np.float32) * 2.0**-7 + 2.0**-8) / 2
    t = trial(model, PassContext(calibration={"x": [halves]}), model.clone)
    assert t.wavering is not None and t.wavering.limit(t.feeds, t.expected) > 1


def test_what_a_branch_rounds_is_moved_too() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[8] x) => (float[8] y) {
        c = Constant <value = bool {1}> ()
        y = If (c) <
            then_branch = t () => (float[8] p) {
                b = Cast <to = 16> (x)
                r = Cast <to = 1> (b)
                p = Sub (x, r)
            },
            else_branch = e () => (float[8] q) { q = Relu (x) }
        >
    }"""
    model = ir.from_proto(parser.parse_model(text))
    halves = 1 + np.arange(8, dtype=np.float32) * 2.0**-7 + 2.0**-8
    t = trial(model, PassContext(calibration={"x": [halves]}), model.clone)
    assert t.wavering is not None and t.wavering.limit(t.feeds, t.expected) > 1
