"""Weights in 16 bits: rounding, what is left alone, and files."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes import io
from graphwright.passes.base import PassContext, PassReport
from graphwright.passes.errors import UsageError
from graphwright.passes.pipeline import Pipeline
from graphwright.runtime import driver
from graphwright.runtime.reference import Reference
from graphwright.runtime.wavering import LEAST_ROUNDED, least
from hypothesis import given
from hypothesis import strategies as st

HEAD = '<ir_version: 10, opset_import: ["" : 21]> '
PRODUCT = "g (float[N,64] x) => (float[N,64] y) { y = MatMul (x, w) }"
TYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def parse(text: str, head: str = HEAD, **weights: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(head + text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    return ir.from_proto(proto)


def stored(model: ir.Model, options: str = "") -> tuple[ir.Model, PassReport]:
    after, (report,) = Pipeline.parse(f"bf16{options}").run(model)
    return after, report


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def widened(model: ir.Model, name: str) -> np.ndarray:
    """The narrow constant that a Cast makes `name` of, in float32."""
    (cast,) = [node for node in model.graph if node.op_type == "Cast" and node.outputs[0].name == name]
    source = cast.inputs[0]
    assert source is not None and source.const_value is not None
    return source.const_value.numpy().astype(np.float32)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=16, max_size=16))
def test_every_number_goes_to_the_nearest_half_to_even(given_bits: list[int]) -> None:
    """The formula on bits; NaN stays NaN, infinities stay, and what would become one keeps the constant as it is."""
    bits = np.array(given_bits, np.uint32).reshape(4, 4)
    w = bits.view(np.float32)
    after, report = stored(parse("g (float[N,4] x) => (float[N,4] y) { y = MatMul (x, w) }", w=w), ":least=0")
    wide = bits.astype(np.uint64)
    expected = ((wide + 0x7FFF + (wide >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    if np.isinf(expected[np.isfinite(w)]).any():
        assert not report.changes and "more than bfloat16 holds" in report.skips[0].reason
        return
    found = widened(after, "w")
    assert np.array_equal(np.isnan(found), np.isnan(w))
    np.testing.assert_array_equal(found[~np.isnan(w)], expected[~np.isnan(w)])


@pytest.mark.parametrize("kind", TYPES)
def test_the_result_is_that_of_the_rounded_weight(kind: str) -> None:
    w, x = draw(64, 64), draw(5, 64)
    after, report = stored(parse(PRODUCT, w=w), f":type={kind}")
    rounded = w.astype(TYPES[kind]).astype(np.float32)
    np.testing.assert_allclose(Reference(after).run({"x": x})["y"], x @ rounded, atol=1e-4)
    expected = np.sqrt(np.square((rounded - w).astype(np.float64)).sum() / np.square(w.astype(np.float64)).sum())
    assert report.stats == {"bytes": 2 * w.size, "error": pytest.approx(expected)}


def test_a_second_run_changes_nothing() -> None:
    after, first = stored(parse(PRODUCT, w=draw(64, 64)))
    again, second = stored(after)
    assert len(first.changes) == 1 and not second.changes
    assert ir.to_proto(again) == ir.to_proto(after)


@pytest.mark.parametrize("most, stays", [(65504.0, False), (65519.0, False), (65520.0, True), (1e30, True)])
def test_numbers_beyond_float16(most: float, stays: bool) -> None:
    """65520 is the first number that is nearer to infinity's place."""
    w = np.full((64, 64), most, np.float32)
    _, report = stored(parse(PRODUCT, w=w), ":type=float16")
    assert bool(report.skips) == stays
    if stays:
        assert report.skips[0].reason == f"it has {most:.3g}, more than float16 holds; type=bfloat16 does"
        assert report.stats == {"bytes": 0, "error": 0.0}


def test_infinity_itself_is_held() -> None:
    w = draw(64, 64)
    w[0, 0], w[0, 1], w[0, 2] = np.inf, -np.inf, np.nan
    after, report = stored(parse(PRODUCT, w=w), ":type=float16")
    np.testing.assert_array_equal(widened(after, "w")[0, :3], w[0, :3])
    assert 0 < report.stats["error"] < 1e-3


def test_many_numbers_are_counted_in_pieces() -> None:
    """More than a piece, on disk; the last number of all is too large."""
    w = draw(1100, 1000)
    w[-1, -1] = 1e6
    text = "g (float[N,1100] x) => (float[N,1000] y) { y = MatMul (x, w) }"
    _, report = stored(parse(text, w=w), ":type=float16")
    assert [skip.reason for skip in report.skips] == ["it has 1e+06, more than float16 holds; type=bfloat16 does"]


def test_weights_stay_on_disk_until_they_are_written(tmp_path: Path) -> None:
    w = draw(256, 256)
    io.save(parse("g (float[N,256] x) => (float[N,256] y) { y = MatMul (x, w) }", w=w), tmp_path / "m.onnx")
    after, _ = stored(io.load(tmp_path / "m.onnx"))
    (value,) = after.graph.initializers.values()
    assert isinstance(value.const_value, ir.LazyTensor)
    io.save(after, tmp_path / "n.onnx")
    assert (tmp_path / "n.onnx").stat().st_size < w.nbytes / 2 + 1000
    found = widened(io.load(tmp_path / "n.onnx"), "w")
    np.testing.assert_array_equal(found, w.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_external_data(tmp_path: Path) -> None:
    w = draw(64, 64)
    proto = ir.to_proto(parse(PRODUCT, w=w))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    after, _ = stored(io.load(tmp_path / "m.onnx"))
    np.testing.assert_array_equal(widened(after, "w"), w.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize(
    "nodes, reason",
    [
        ("y = MatMul (x, w) z = Identity (w)", "Identity at z reads it too, or in another place than a weight's"),
        ("y = MatMul (x, w) v = Transpose (w) z = Add (v, v)", "Add at z reads it too"),
        ("y = MatMul (x, w) z = Transpose (w)", "Transpose at z reads it too"),
        ("y = MatMul (x, w) z = MatMul (w, x)", "MatMul at z reads it too"),
        ("y = Gemm (x, x, w) z = Gather (w, i)", "Gemm at y reads it too"),
    ],
)
def test_what_something_else_reads_too_is_left_alone(nodes: str, reason: str) -> None:
    text = f"g (float[64,64] x, int64[2] i) => (float y, float z) {{ {nodes} }}"
    _, report = stored(parse(text, w=draw(64, 64)))
    assert not report.changes and report.skips[0].reason.startswith(reason)


@pytest.mark.parametrize(
    "nodes",
    [
        "w = DequantizeLinear (q, s) y = MatMul (x, w)",
        "w = Cast <to = 1> (q) y = MatMul (x, w)",
        "y = MatMul (x, x)",
    ],
)
def test_what_is_no_float32_constant_is_left_alone(nodes: str) -> None:
    weights = {"q": np.ones((64, 64), np.int8), "s": np.float32(0.5)} if "(q" in nodes else {}
    _, report = stored(parse(f"g (float[64,64] x) => (float y) {{ {nodes} }}", **weights))
    assert not report.changes and not report.skips


def test_an_output_is_left_alone() -> None:
    model = parse("g (float[N,64] x) => (float[N,64] y, float[64,64] w) { y = MatMul (x, w) }", w=draw(64, 64))
    _, report = stored(model)
    assert [skip.reason for skip in report.skips] == ["it is an output of its graph"]


def test_an_old_opset_has_no_cast_of_bfloat16() -> None:
    head = '<ir_version: 7, opset_import: ["" : 12]> '
    _, report = stored(parse(PRODUCT, head, w=draw(64, 64)))
    reason = "opset 12 has no Cast of bfloat16; run convert-opset first, or take type=float16"
    assert [skip.reason for skip in report.skips] == [reason]
    after, report = stored(parse(PRODUCT, head, w=draw(64, 64)), ":type=float16")
    assert len(report.changes) == 1 and Reference(after).run({"x": draw(1, 64)})["y"].shape == (1, 64)


@pytest.mark.parametrize(
    "options, message", [(":type=float8", "float8"), (":least=-1", "least is -1, must be at least 0")]
)
def test_options_that_are_none(options: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        Pipeline.parse(f"bf16{options}")


def test_a_budget_is_checked() -> None:
    """The contract is a lossy one: --max-drop is its limit, relative to the output's scale."""
    from graphwright.passes.errors import VerificationError

    model = parse(PRODUCT, w=draw(64, 64))
    assert driver.optimize(model, "bf16", max_drop=0.05).verdict is not None
    with pytest.raises(VerificationError, match="bf16"):
        driver.optimize(model, "bf16", max_drop=1e-6)


ATTENTION = """g (float[N,64] x) => (float[N,64] y) {
    q = MatMul (x, w)
    k = MatMul (x, v)
    s = Add (q, k)
    y = Add (s, x)
}"""


def rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def test_data_are_rounded_once_for_all_products() -> None:
    """What is no product reads them as they were."""
    w, v, x = draw(64, 64), draw(64, 64) + 1, draw(5, 64)
    after, report = stored(parse(ATTENTION, w=w, v=v), ":data=bfloat16")
    casts = [node for node in after.graph if node.op_type == "Cast"]
    assert len(casts) == 4 and report.spec == "bf16:data=bfloat16"
    assert [change.rule for change in report.changes] == ["store", "store", "round", "round"]
    expected = rounded(x) @ rounded(w) + rounded(x) @ rounded(v) + x
    np.testing.assert_allclose(Reference(after).run({"x": x})["y"], expected, atol=1e-3)
    again, second = stored(after, ":data=bfloat16")
    assert not second.changes and ir.to_proto(again) == ir.to_proto(after)


@pytest.mark.parametrize("pairs", [False, True])
def test_auto_rounds_for_processors_that_multiply_pairs(pairs: bool) -> None:
    model = parse(PRODUCT, w=draw(64, 64))
    _, (report,) = Pipeline.parse("bf16").run(model, PassContext(target="cpu", dot_bf16=pairs))
    assert report.spec == f"bf16:data={'bfloat16' if pairs else 'float32'}"
    assert sum(change.rule == "round" for change in report.changes) == pairs
    _, (report,) = Pipeline.parse("bf16:type=float16").run(model, PassContext(target="cpu", dot_bf16=pairs))
    assert report.spec == "bf16:type=float16:data=float32"


@pytest.mark.parametrize(
    "line, shape, reason",
    [
        ("y = Conv <group = 32> (x, w)", (4096, 4, 1, 1), "its groups have fewer than 16 channels"),
        ("y = Conv <group = 2> (x, w)", (128, 64, 1, 1), None),
        ("y = Conv (x, w)", (64, 128, 1, 1), None),
        ("x2 = Flatten (x) y = Gemm <transA = 1> (x2, w)", (1, 4096), "it reads its data transposed"),
        ("x2 = Flatten (x) y = Gemm <transB = 1> (x2, w)", (64, 128), None),
        ("x2 = Flatten (x) v = Transpose <perm = [1, 0]> (w) y = MatMul (x2, v)", (64, 128), None),
    ],
)
def test_what_reads_rounded_data(line: str, shape: tuple[int, ...], reason: str | None) -> None:
    model = parse(f"g (float[1,128,1,1] x) => (float y) {{ {line} }}", w=draw(*shape))
    _, report = stored(model, ":data=bfloat16")
    assert [skip.reason for skip in report.skips] == ([] if reason is None else [reason])
    assert sum(change.rule == "round" for change in report.changes) == (reason is None)


def test_rounded_data_need_weights_of_bfloat16() -> None:
    with pytest.raises(UsageError, match="data=bfloat16 needs type=bfloat16"):
        Pipeline.parse("bf16:type=float16:data=bfloat16")


def test_rounding_of_data_is_allowed_by_verification() -> None:
    """Two sums that differ in their last digits may round to neighbours."""
    after, _ = stored(parse(PRODUCT, w=draw(64, 64)), ":data=bfloat16")
    assert least(after) == LEAST_ROUNDED
    assert least(parse(PRODUCT, w=draw(64, 64))) is None


@pytest.mark.parametrize(
    "text, shape, reason",
    [
        ("g (float[64] x) => (float[64] y) { y = MatMul (x, w) }", (64, 64), "its data is a vector"),
        (
            "g (float[1,64,h,8] x) => (float y) { y = Conv (x, w) }", (64, 64, 1, 1),
            "the size of its image is known only at run time",
        ),
        ("g (float[b,64,8,8] x) => (float y) { y = Conv (x, w) }", (64, 64, 1, 1), None),
    ],
)  # fmt: skip
def test_data_stay_where_no_kernel_multiplies_pairs(text: str, shape: tuple[int, ...], reason: str | None) -> None:
    _, report = stored(parse(text, w=draw(*shape)), ":data=bfloat16")
    assert [skip.reason for skip in report.skips] == ([] if reason is None else [reason])
