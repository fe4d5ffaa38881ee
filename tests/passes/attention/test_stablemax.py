"""StableMax: the operator on its edges, and that indices are those of softmax."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from graphwright.passes.base import Contract, PassContext
from graphwright.passes.errors import UsageError
from graphwright.passes.ops import STABLE_MAX
from graphwright.passes.registry import parse_pass
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from .operators import on_onnxruntime

body = functools.partial(on_onnxruntime, STABLE_MAX, axis=-1)


def test_shares_by_hand() -> None:
    """s is 3, 1, 1/2 and 1/5; at 0 both branches are 1."""
    found = body(np.array([[2, 0, -1, -4]], np.float32))
    np.testing.assert_allclose(found, np.array([[3, 1, 0.5, 0.2]]) / 4.7, rtol=1e-6)


def test_special_values() -> None:
    low, inf, nan = np.finfo(np.float32).min, np.inf, np.nan
    rows = np.array([[0, -inf, 1], [low, low, low], [1e30, 1, -1], [-inf, -inf, -inf], [0, inf, 1], [nan, 0, 1]])
    found = body(rows.astype(np.float32))
    np.testing.assert_allclose(found[:3], [[1 / 3, 0, 2 / 3], [1 / 3, 1 / 3, 1 / 3], [1, 0, 0]], rtol=1e-6, atol=1e-29)
    assert np.isnan(found[3]).all()
    assert np.isnan(found[4, 1]) and not found[4, [0, 2]].any()
    assert np.isnan(found[5]).all()


def test_float16_is_computed_in_float32() -> None:
    """The sum of a row of 10,000 is beyond float16."""
    x = np.random.default_rng(0).uniform(0, 60, (2, 10_000)).astype(np.float16)
    found = body(x)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, STABLE_MAX.reference(x), rtol=1e-3, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(
        np.float32, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=st.floats(-1e6, 1e6, width=32)
    )
)  # fmt: skip
def test_the_body_equals_its_oracle_and_keeps_the_order(x: np.ndarray) -> None:
    found = body(x)
    np.testing.assert_allclose(found, STABLE_MAX.reference(x), rtol=1e-5, atol=1e-30)
    for row, share in zip(x, found, strict=True):
        assert (np.diff(share[np.argsort(row, kind="stable")]) >= 0).all()


# --- the pass


def parse(text: str, opset: int = 21) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> {text}'))


HEAD = """g (float[N,{n}] x) => (int64[N,1] i, int64[N,{k}] t) <int64[1] k = {{{k}}}>
{{ s = {op} (x)  i = ArgMax <axis = -1> (s)  p, t = TopK (s, k) }}"""


def indices(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, {"x": x})


@pytest.mark.parametrize("n", [1, 15, 16, 17, 5000])
def test_indices_are_those_of_softmax_and_of_stablemax(n: int) -> None:
    before = parse(HEAD.format(n=n, k=min(n, 5), op="Softmax"))
    after, asked = before.clone(), before.clone()
    report = parse_pass("stablemax").run(after, PassContext())
    assert [change.rule for change in report.changes] == ["indices"] * 2 and not report.skips
    assert [node.op_type for node in after.graph] == ["ArgMax", "TopK"] and not after.functions
    for node in asked.graph:
        if node.op_type == "Softmax":
            node.domain, node.op_type = STABLE_MAX.identifier
            node.attributes.add(ir.AttrInt64("axis", -1))
    STABLE_MAX.add_to(asked)
    for rows in (1, 3):
        # Multiples of 1/64 in any order, which neither function makes equal.
        x = (np.random.default_rng(rows).permuted(np.tile(np.arange(n), (rows, 1)), axis=1) / 64 - n / 128).astype("f4")
        for found, softmax, stablemax in zip(*(indices(m, x) for m in (after, before, asked)), strict=True):
            np.testing.assert_array_equal(found, softmax)
            np.testing.assert_array_equal(found, stablemax)


def test_where_softmax_is_lost_to_rounding_the_indices_are_those_of_the_numbers() -> None:
    """Below the greatest, e^x is 0 in float32."""
    x = np.array([[1000, 0, 200, 100]], np.float32)
    before = parse(HEAD.format(n=4, k=4, op="Softmax"))
    after = before.clone()
    parse_pass("stablemax").run(after, PassContext())
    np.testing.assert_array_equal(indices(before, x)[1], [[0, 1, 2, 3]])
    np.testing.assert_array_equal(indices(after, x)[1], [[0, 2, 3, 1]])


VALUES = "g (float[N,4] x) => (float[N,4] y) { y = Softmax (x) }"


def test_values_are_replaced_only_when_asked_for() -> None:
    refused = parse_pass("stablemax").run(parse(VALUES), PassContext())
    assert "its values are read by an output of the graph" in refused.skips[0].reason
    assert "recover=none replaces it anyway" in refused.skips[0].reason
    model = parse(VALUES)
    step = parse_pass("stablemax:recover=none")
    assert step.contract is Contract.LEARNED and parse_pass("stablemax").contract is Contract.ROUNDING
    assert str(step) == "stablemax:recover=none"
    assert step.run(model, PassContext()).changes
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    np.testing.assert_allclose(indices(model, x)[0], STABLE_MAX.reference(x), rtol=1e-6)
    with pytest.raises(UsageError, match="'full' is not a choice"):
        parse_pass("stablemax:recover=full")


@pytest.mark.parametrize(
    "text, opset, reason",
    [
        (VALUES.replace("float", "double"), 21, "double input, StableMax is computed in float32"),
        (VALUES, 11, "opset 11: a softmax is over one axis from 13 on; run convert-opset first"),
        (VALUES, 13, "opset 13: the operator's body needs 15; run convert-opset first"),
        (VALUES.replace("y = Softmax (x)", "s = Softmax (x) y = Mul (s, x)"), 21, "it is no head: Mul at y"),
    ],
)
def test_leaves_alone_with_a_reason(text: str, opset: int, reason: str) -> None:
    model = parse(text, opset)
    report = parse_pass("stablemax:recover=none").run(model, PassContext())
    assert not report.changes and reason in report.skips[0].reason and not model.functions
