"""Softplus attention: the operators on their edges, and what the pass refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.attention.sites import block_of
from graphwright.passes.attention.softplus_attention import SoftplusAttention
from graphwright.passes.base import PassContext, Weights
from graphwright.passes.errors import PassError, UsageError, WeightsError
from graphwright.passes.ops import REWEIGHTED_SOFTPLUS_ATTENTION, SOFTPLUS_ATTENTION, CustomOp
from graphwright.passes.pipeline import Pipeline
from graphwright.passes.quality import cosine_drop, held_out, rows_that_count
from graphwright.passes.registry import parse_pass
from graphwright.passes.weights import load_weights, save_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from .operators import attention_inputs, on_onnxruntime

LOWEST = float(np.finfo(np.float32).min)
BOTH = pytest.mark.parametrize("operator", [SOFTPLUS_ATTENTION, REWEIGHTED_SOFTPLUS_ATTENTION], ids=lambda o: o.name)


def body(operator: CustomOp, arrays: list[np.ndarray], attributes: dict[str, Any]) -> np.ndarray:
    return on_onnxruntime(operator, *arrays, **attributes)


def options(operator: CustomOp, **more: int) -> dict[str, int]:
    return {"causal": 0, **({"power": 3} if operator is REWEIGHTED_SOFTPLUS_ATTENTION else {}), **more}


@BOTH
def test_hidden_keys_are_as_if_they_were_not_there(operator: CustomOp) -> None:
    q, k, v, _ = attention_inputs(2, 2, 5, 9, 8)
    for low in (LOWEST, -np.inf, -1e5):
        mask = np.where(np.arange(9) < 6, 0, low).astype(np.float32)[None, None, None]
        found = body(operator, [q, k, v, mask], options(operator))
        expected = operator.reference(q, k[:, :, :6], v[:, :, :6], np.zeros((1, 1, 1, 1)), **options(operator))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@BOTH
def test_special_rows(operator: CustomOp) -> None:
    """No key seen: 0. All keys alike: their mean. A query of zeros: the mean. NaN stays NaN, in its own row only."""
    q, k, v, mask = attention_inputs(1, 1, 4, 7, 8)
    none = body(operator, [q, k, v, np.full((1, 1, 1, 7), LOWEST, np.float32)], options(operator))
    assert not none.any()
    alike = np.broadcast_to(k[:, :, :1], k.shape).copy()
    mean = np.broadcast_to(v.mean(2, keepdims=True), (1, 1, 4, 8))
    np.testing.assert_allclose(body(operator, [q, alike, v, mask], options(operator)), mean, atol=1e-6)
    np.testing.assert_allclose(body(operator, [q * 0, k, v, mask], options(operator)), mean, atol=1e-6)
    q[0, 0, 1, 3] = np.nan
    found = body(operator, [q, k, v, mask], options(operator))[0, 0]
    assert np.isnan(found[1]).all() and np.isfinite(found[[0, 2, 3]]).all()


@BOTH
def test_scores_far_below_zero_do_not_make_nan(operator: CustomOp) -> None:
    """log(1 + exp(s)) is 0 below -16.6, and 0 / 0 is no row."""
    d, n = 256, 4096
    q = np.ones((1, 1, 1, d), np.float32)
    v = np.random.default_rng(0).standard_normal((1, 1, n, 8)).astype(np.float32)
    arrays = [q, -np.ones((1, 1, n, d), np.float32), v, np.zeros((1, 1, 1, 1), np.float32)]
    found = body(operator, arrays, options(operator))
    np.testing.assert_allclose(found[0, 0, 0], v[0, 0].mean(0), atol=1e-5)


def test_a_large_power_does_not_overflow() -> None:
    q, k, v, mask = attention_inputs(1, 1, 1, 2000, 8)
    k[0, 0, 5] = q[0, 0, 0]
    found = body(REWEIGHTED_SOFTPLUS_ATTENTION, [q, k, v, mask], {"causal": 0, "power": 64})
    np.testing.assert_allclose(found[0, 0, 0], v[0, 0, 5], atol=1e-2)


@BOTH
def test_float16_is_computed_in_float32(operator: CustomOp) -> None:
    arrays = [x.astype(np.float16) for x in attention_inputs(1, 2, 5, 5, 8)]
    found = body(operator, arrays, options(operator, causal=1))
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, operator.reference(*arrays, **options(operator, causal=1)), atol=4e-3)


def test_the_weights_of_lssar_are_those_of_the_formula() -> None:
    """By hand: the first three rows keep all keys, later ones those above the mean."""
    q, k, _, mask = (x.astype(np.float64) for x in attention_inputs(1, 1, 6, 6, 4))
    weights = REWEIGHTED_SOFTPLUS_ATTENTION.reference(q, k, np.eye(6)[None, None], mask, causal=1, power=2)[0, 0]
    for i in range(6):
        cosine = k[0, 0, : i + 1] @ q[0, 0, i] / np.linalg.norm(k[0, 0, : i + 1], axis=-1) / np.linalg.norm(q[0, 0, i])
        a = np.log1p(np.exp(np.log(4) * np.log(i + 1) * cosine))
        a = np.maximum(a / a.sum() * (i + 1) - (i > 2), 0) ** 2
        np.testing.assert_allclose(weights[i, : i + 1], a / a.sum(), rtol=1e-9)
        assert not weights[i, i + 1 :].any()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 20), st.integers(2, 9), st.integers(0, 2),
    st.sampled_from([1, 3, 15]), st.integers(0, 1 << 16),
)  # fmt: skip
def test_bodies_equal_their_oracles(
    h: int, rows: int, columns: int, d: int, causal: int, power: int, seed: int
) -> None:  # fmt: skip
    arrays = attention_inputs(2, h, rows, columns, d, seed)
    random = np.random.default_rng(seed)
    arrays[3] = np.where(random.random((2, 1, 1, columns)) < 0.3, LOWEST, random.standard_normal()).astype(np.float32)
    for operator, attributes in (
        (SOFTPLUS_ATTENTION, {"causal": causal}),
        (REWEIGHTED_SOFTPLUS_ATTENTION, {"causal": causal, "power": power}),
    ):
        expected = operator.reference(*arrays, **attributes)
        # The power multiplies relative errors, and those near the mean are of a difference.
        np.testing.assert_allclose(body(operator, arrays, attributes), expected, atol=2e-5 * power + 1e-5)


# --- the pass


def parse(text: str, opset: int = 23) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["": {opset}]> {text}')
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


SELF = "g (float[1,2,3,4] q) => (float[1,2,3,4] y) { y = Attention (q, q, q) }"


@pytest.mark.parametrize(
    "text, reason",
    [
        ("g (double[1,2,3,4] q) => (double[1,2,3,4] y) { y = Attention (q, q, q) }", "double input"),
        (SELF.replace("Attention", "Attention <softcap = 2.0>"), "it caps its scores"),
        ("g (float[1,H,3,4] q) => (float[1,H,3,4] y) { y = Attention (q, q, q) }", "heads is not known"),
        ("g (float[1,2,3,D] q, float[1,1,3,D] k) => (float[1,2,3,D] y) { y = Attention (q, k, k) }",
         "the size of a head is not known, so grouped keys cannot be repeated"),
    ],
)  # fmt: skip
def test_leaves_alone_with_a_reason(text: str, reason: str) -> None:
    model = parse(text)
    report = parse_pass("softplus-attention:recover=none").run(model, PassContext())
    assert not report.changes and reason in report.skips[0].reason and not model.functions


@pytest.mark.parametrize(
    "options, message",
    [
        ("power=0", "power is 0, must be from 1 to 64"),
        ("layers=some", "layers is 'some', must be all, auto, or numbers"),
        ("keep=2", "keep is how many layers layers=auto leaves"),
        ("layers=auto:recover=none", "layers=auto is decided by what was learned"),
        ("rate=2", "rate is 2.0, must be between 0 and 1"),
        ("steps=-1", "steps is -1, must be at least 0"),
        ("variant=lssr", "'lssr' is not a choice"),
    ],
)
def test_options_that_make_no_sense(options: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_pass(f"softplus-attention:{options}")


def test_the_spec_is_read_back() -> None:
    for text in ("softplus-attention", "softplus-attention:weights=w.npz:variant=lssa:layers=0+2"):
        assert str(parse_pass(text)) == text


def test_a_model_without_attention_is_not_trained() -> None:
    def never(*_: Any) -> Weights:
        raise AssertionError("nothing is to be learned")

    model = parse("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    ctx = PassContext(calibration={"x": [np.zeros(2, np.float32)] * 2}, trainer=never)
    _, (report,) = Pipeline((SoftplusAttention(),)).run(model, ctx)
    assert not report.changes and report.spec == "softplus-attention"


def test_weights_of_something_else_are_refused(tmp_path: Any) -> None:
    file = tmp_path / "w.npz"
    step = parse_pass(f"softplus-attention:weights={file}")

    def refused(message: str, kind: type[Exception] = PassError) -> None:
        with pytest.raises(kind, match=message):
            step.run(parse(SELF), PassContext())

    refused("no such file; expected learned weights", WeightsError)
    file.write_bytes(b"nothing of the kind")
    refused(r"holds no learned weights \(it holds something else than arrays\)", WeightsError)
    np.savez(file, x=np.zeros(2))
    refused("holds no learned weights", WeightsError)
    record = step.record  # type: ignore[attr-defined]  # a learned pass
    for weights, message in (
        (Weights({}, ("y",), "softplus-attention:variant=lssa"), "learned for softplus-attention:variant=lssa, not"),
        (Weights({}, ("z",), record), "another model or preset: it has no attention 'z'"),
        (Weights({"w": np.zeros(2)}, ("y",), record), "this one has no weight 'w'"),
    ):
        save_weights(weights, file)
        refused(message)


def test_weights_survive_the_file(tmp_path: Any) -> None:
    import ml_dtypes

    arrays = {"a.b/c": np.arange(6, dtype=np.float32).reshape(2, 3), "h": np.ones(3, ml_dtypes.bfloat16)}
    save_weights(Weights(arrays, ("s",), "r", {"drop": 0.5}), tmp_path / "w.npz")
    found = load_weights(tmp_path / "w.npz")
    assert (found.sites, found.record, found.stats) == (("s",), "r", {"drop": 0.5})
    for name, array in arrays.items():
        assert found.arrays[name].dtype == array.dtype and np.array_equal(found.arrays[name], array)


def test_a_block_reaches_from_projections_to_projection() -> None:
    """Weights that something else uses do not belong to it."""
    proto = onnx.parser.parse_model("""<ir_version: 11, opset_import: ["": 23]>
    g (float[1,3,8] x, float[1,5,8] z) => (float[1,3,8] y, float[1,3,8] other)
    {
        a = MatMul (x, wq) q = Add (a, bq) k = MatMul (z, wk) v = Gelu (z)
        t = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v)
        o = MatMul (t, wo) p = Add (o, bo) y = Add (p, x) other = MatMul (x, wk)
    }""")
    for name, shape in {"wq": (8, 8), "wk": (8, 8), "wo": (8, 8), "bq": (8,), "bo": (8,)}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    (node,) = [n for n in model.graph if n.op_type == "Attention"]
    block = block_of(node)
    assert (block.site, block.inputs, block.output) == ("t", ("x", "z", "v"), "p")
    assert set(block.weights) == {"wq", "bq", "wo", "bo"}


# --- what is measured


def test_a_tenth_is_held_out() -> None:
    assert held_out(9) == [] and held_out(10) == [9] and held_out(35) == [9, 19, 29]


def test_drop_of_rows() -> None:
    a, b = np.array([[1.0, 0], [0, 2], [0, 0]]), np.array([[2.0, 0], [3, 0], [0, 0]])
    assert cosine_drop(a, a) == pytest.approx(0)
    assert cosine_drop(a, b) == pytest.approx(1 / 3)
    assert cosine_drop(a, b, np.array([True, False, True])) == pytest.approx(0)
    assert cosine_drop(a, b, np.zeros(3, bool)) == 0
    mask = np.array([[1, 1, 0]])
    assert rows_that_count({"attention_mask": mask}, (1, 3, 4)) is not None
    assert rows_that_count({"attention_mask": mask}, (1, 4)) is None and rows_that_count({}, (1, 3, 4)) is None
