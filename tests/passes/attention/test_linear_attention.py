"""Linear attention: the operator on its edges, and what the pass refuses."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from graphwright.passes.base import PassContext, Weights
from graphwright.passes.errors import PassError
from graphwright.passes.ops import LINEAR_ATTENTION
from graphwright.passes.registry import parse_pass
from graphwright.passes.weights import save_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.inliner import inline_local_functions

from .operators import attention_inputs, model_of, on_onnxruntime

LOWEST = float(np.finfo(np.float32).min)
body = functools.partial(on_onnxruntime, LINEAR_ATTENTION)


def test_hidden_keys_are_as_if_they_were_not_there() -> None:
    q, k, v, _ = attention_inputs(2, 2, 5, 9, 8)
    for low in (LOWEST, -np.inf, -1e4):
        mask = np.where(np.arange(9) < 6, 0, low).astype(np.float32)[None, None, None]
        expected = LINEAR_ATTENTION.reference(q, k[:, :, :6], v[:, :, :6], np.zeros((1, 1, 1, 1)))
        np.testing.assert_allclose(body(q, k, v, mask), expected, rtol=1e-4, atol=1e-5)


def test_a_mask_of_numbers_weighs_keys() -> None:
    q, k, v, _ = attention_inputs(1, 2, 3, 4, 8)
    mask = np.log(np.array([1, 2, 3, 0.5], np.float32))[None, None, None]
    twice = [0, 1, 1, 2, 2, 2]
    without = LINEAR_ATTENTION.reference(q, k[:, :, twice], v[:, :, twice], np.zeros((1, 1, 1, 1)))
    np.testing.assert_allclose(
        body(q, k, v, np.where(mask < 0, LOWEST, mask).astype(np.float32)), without, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(body(q, k, v, mask), LINEAR_ATTENTION.reference(q, k, v, mask), rtol=1e-4, atol=1e-5)


def test_special_rows() -> None:
    """No key seen: 0. All keys alike: their mean. NaN stays NaN, in its own row only."""
    q, k, v, mask = attention_inputs(1, 1, 4, 7, 8)
    for low in (LOWEST, -np.inf):
        assert not body(q, k, v, np.full((1, 1, 1, 7), low, np.float32)).any()
    alike = np.broadcast_to(k[:, :, :1], k.shape).copy()
    mean = np.broadcast_to(v.mean(2, keepdims=True), (1, 1, 4, 8))
    np.testing.assert_allclose(body(q, alike, v, mask), mean, atol=1e-6)
    q[0, 0, 1, 3] = np.nan
    found = body(q, k, v, mask)[0, 0]
    assert np.isnan(found[1]).all() and np.isfinite(found[[0, 2, 3]]).all()


@pytest.mark.parametrize("scale", [0.0, 1e-3, 90.0, 1e4])
def test_no_size_overflows(scale: float) -> None:
    """e^90 is no float32; the shares of rows far apart are 0 or 1, and a row of zeros is the mean."""
    q, k, v, mask = attention_inputs(1, 2, 6, 33, 8)
    q, k = q * np.float32(scale), k * np.float32(scale)
    expected = LINEAR_ATTENTION.reference(q, k, v, mask)
    # A sum of two numbers rounds by 2^-24 of it, and the exponential makes a relative error of that.
    limit = max(1e-5, scale * 2**-20)
    np.testing.assert_allclose(body(q, k, v, mask), expected, atol=limit)


def test_float16_is_computed_in_float32() -> None:
    arrays = [x.astype(np.float16) for x in attention_inputs(1, 2, 5, 5, 8)]
    found = body(*arrays)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, LINEAR_ATTENTION.reference(*arrays), atol=4e-3)


def test_the_weights_are_those_of_the_formula() -> None:
    """By hand: sums of 2 cosh."""
    q, k, _, mask = (x.astype(np.float64) for x in attention_inputs(1, 1, 3, 5, 4))
    weights = LINEAR_ATTENTION.reference(q, k, np.eye(5)[None, None], mask)[0, 0]
    for i in range(3):
        a = (2 * np.cosh(q[0, 0, i] + k[0, 0])).sum(-1)
        np.testing.assert_allclose(weights[i], a / a.sum(), rtol=1e-12)


def test_nothing_is_as_large_as_queries_times_keys() -> None:
    """In any tensor of the body, by shape inference."""
    b, h, n, m, d = 2, 3, 251, 241, 4
    arrays = [*attention_inputs(b, h, n, m, d)[:3], np.zeros((1, 1, 1, m), np.float32)]
    model = model_of(LINEAR_ATTENTION, arrays, {})
    proto = onnx.shape_inference.infer_shapes(inline_local_functions(ir.to_proto(model)))
    sizes = {
        v.name: np.prod([x.dim_value for x in v.type.tensor_type.shape.dim]) for v in proto.graph.value_info
    }  # fmt: skip
    assert len(sizes) > 15 and max(sizes.values()) <= b * h * 2 * d * max(n, m)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 20), st.integers(1, 9), st.integers(0, 1 << 16))
def test_the_body_equals_its_oracle(h: int, rows: int, columns: int, d: int, seed: int) -> None:
    q, k, v, _ = attention_inputs(2, h, rows, columns, d, seed)
    random = np.random.default_rng(seed)
    mask = np.where(random.random((2, 1, 1, columns)) < 0.3, LOWEST, random.standard_normal()).astype(np.float32)
    expected = LINEAR_ATTENTION.reference(q, k, v, mask)
    np.testing.assert_allclose(body(q, k, v, mask), expected, rtol=1e-4, atol=1e-5)


# --- the pass


def parse(text: str) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["": 23]> {text}')
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


SELF = "g (float[1,2,3,4] q) => (float[1,2,3,4] y) { y = Attention (q, q, q) }"


@pytest.mark.parametrize(
    "text, reason",
    [
        (SELF.replace("float", "double"), "double input, linear attention is computed in float32"),
        (SELF.replace("Attention", "Attention <scale = -1.0>"), "its scale is -1.0, expected a number above 0"),
        (SELF.replace("Attention", "Attention <is_causal = 1>"), "it is causal"),
        (SELF.replace(",4]", ",D]"), "the size of a head is not known, so neither is the scale"),
        ("g (float[1,2,3,4] q, float[3,3] m) => (float[1,2,3,4] y) { y = Attention (q, q, q, m) }",
         "its mask m may hide other keys from other queries"),
        ("g (float[1,2,3,4] q, bool[1,1,1,3] m, int64[4] s) => (float[1,2,3,4] y) "
         "{ a = Expand (m, s) n = Not (a) y = Attention (q, q, q, n) }", "its mask n"),
    ],
)  # fmt: skip
def test_leaves_alone_with_a_reason(text: str, reason: str) -> None:
    model = parse(text)
    report = parse_pass("linear-attention:recover=none").run(model, PassContext())
    assert not report.changes and reason in report.skips[0].reason and not model.functions


def test_a_function_gains_the_domain() -> None:
    proto = onnx.parser.parse_model("""<ir_version: 11, opset_import: ["": 23, "mine": 1]>
    g (float[1,2,3,4] q) => (float[1,2,3,4] y) { y = mine.F (q) }
    <domain: "mine", opset_import: ["": 23]> F (q) => (y) { y = Attention (q, q, q) }""")
    model = ir.from_proto(proto)
    (function,) = model.functions.values()
    function.inputs[0].dtype, function.inputs[0].shape = ir.DataType.FLOAT, ir.Shape((1, 2, 3, 4))
    report = parse_pass("linear-attention:recover=none").run(model, PassContext())
    assert len(report.changes) == 1
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    q = np.random.default_rng(0).standard_normal((1, 2, 3, 4)).astype(np.float32)
    found = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, {"q": q})[0]
    half = q * np.float32(0.5**0.5)
    np.testing.assert_allclose(found, LINEAR_ATTENTION.reference(half, half, q, np.zeros((1, 1, 1, 1))), atol=1e-6)


def test_without_a_trainer_or_weights_it_refuses() -> None:
    with pytest.raises(PassError, match=r"use the command optimize, weights=FILE\.npz or recover=none"):
        parse_pass("linear-attention").run(parse(SELF), PassContext())


def test_weights_of_softplus_attention_are_refused(tmp_path: Path) -> None:
    save_weights(Weights({}, ("y",), "softplus-attention:variant=lssa"), tmp_path / "w.npz")
    with pytest.raises(PassError, match="learned for softplus-attention:variant=lssa, not"):
        parse_pass(f"linear-attention:weights={tmp_path / 'w.npz'}").run(parse(SELF), PassContext())


@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.tvm
def test_compiled_it_is_the_same(rows: int, tmp_path: Path) -> None:
    import graphwright

    text = "g (float[1,2,N,8] q, float[1,2,33,8] k) => (float[1,2,N,8] y) { y = Attention (q, k, k) }"
    onnx.save(ir.to_proto(parse(text.replace("N", str(rows)))), tmp_path / "m.onnx")
    out = tmp_path / "out"
    graphwright.optimize(tmp_path / "m.onnx", passes="linear-attention:recover=none", target="cpu", out=out)
    q, k, _, mask = attention_inputs(1, 2, rows, 33, 8)
    root = np.float32(8**-0.25)
    expected = LINEAR_ATTENTION.reference(q * root, k * root, k, mask)
    np.testing.assert_allclose(graphwright.load(out).run(None, {"q": q, "k": k})[0], expected, atol=2e-6)
