"""Tables of which Gather takes rows: codes with a scale for each row, and the product that shares them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.base import PassContext, PassReport
from graphwright.passes.pipeline import Pipeline
from graphwright.passes.quantize.plan import Plan, TablePlan, Timed
from graphwright.passes.quantize.scales import Codes, fit_weights, signal_to_noise, weight_grid
from graphwright.runtime.evaluator import evaluate
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from onnx import numpy_helper, parser
from onnxruntime import GraphOptimizationLevel as Level
from onnxruntime import InferenceSession, SessionOptions
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

HEAD = '<ir_version: 10, opset_import: ["" : 20]> '
PLAIN = "g (int64[B, S] i) => (float[B, S, 32] y) { y = Gather (w, i) }"
TIED = """g (int64[B, S] i) => (float[B, S, 200] y)
{ x = Gather (w, i) h = MatMul (x, u) r = Relu (h) t = Transpose <perm = [1, 0]> (w) y = MatMul (r, t) }"""


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model_of(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    proto = parser.parse_model(HEAD + text)
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return onnx.shape_inference.infer_shapes(proto)


def tied(text: str = TIED, **more: np.ndarray) -> onnx.ModelProto:
    return model_of(text, w=draw(200, 32), u=draw(32, 32, seed=1) / 6, **more)


def stored(
    proto: onnx.ModelProto, options: str = ":activations=none", folder: Path | None = None,
    max_drop: float | None = None,
) -> tuple[ir.Model, PassReport]:  # fmt: skip
    """The pass's result. folder: calibrate, and write the plan there."""
    ctx = PassContext()
    if folder is not None:
        random = np.random.default_rng(2)
        feeds = {"i": [random.integers(0, 200, (1, 40)) for _ in range(20)]}
        ctx = PassContext(
            calibration=feeds, evaluator=partial(evaluate, threads=1), output=folder / "m.onnx", overwrite=True,
            max_drop=max_drop,
        )  # fmt: skip
    model, (report,) = Pipeline.parse(f"dynaquant{options}").run(ir.from_proto(proto), ctx)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model, report


def run(model: ir.Model | onnx.ModelProto, index: np.ndarray, level: Level = Level.ORT_DISABLE_ALL) -> np.ndarray:
    options = SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 4
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    session = InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(["y"], {"i": index})[0]


def constants(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value}


def details(report: PassReport) -> dict[str, str]:
    return {change.value: change.detail for change in report.changes if change.rule == "table"}


def skips(report: PassReport) -> dict[str, str]:
    return {skip.value: skip.reason for skip in report.skips}


@pytest.mark.parametrize("width", [15, 16, 17, 32, 33])
def test_rows_are_codes_times_their_scale(width: int) -> None:
    """In float64, at two sizes of each axis, with onnxruntime's optimizations and without."""
    w = draw(300, width) * np.exp(draw(300, 1, seed=1) * 3)  # rows of very different sizes
    proto = model_of(PLAIN.replace("32", str(width)), w=w)
    model, report = stored(proto)
    if width < 16:
        assert "its rows have 15 numbers, too few for a scale each" in skips(report)["w"] and not report.changes
        return
    codes = fit_weights(w, weight_grid(8))
    assert details(report) == {"w": f"8-bit rows with a scale each; table {signal_to_noise(w, codes.values):.1f} dB "
                                    "above its error"}  # fmt: skip
    oracle = codes.codes.astype(np.float64) * codes.scale.astype(np.float64)
    assert np.abs(oracle - w).max(1).max() < np.abs(w).max() / 127
    for shape in ((1, 1), (3, 5), (1, 7), (3, 0)):
        index = np.random.default_rng(3).integers(-300, 300, shape)
        for level in (Level.ORT_DISABLE_ALL, Level.ORT_ENABLE_ALL):
            np.testing.assert_allclose(run(model, index, level), oracle[index], rtol=2e-7)
    assert {a.dtype.name: a.shape for a in constants(model).values()} == {"int8": w.shape, "float32": (300, 1)}


@given(arrays_of.arrays(np.float32, (4, 1024), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
@settings(max_examples=25, deadline=None)
def test_a_row_is_no_further_off_than_rounding_its_range(w: np.ndarray) -> None:
    """The square of an error below 2^-88 is none in float32: such numbers may become 0."""
    model, _ = stored(model_of(PLAIN.replace("32", "1024"), w=w))
    wide, found = w.astype(np.float64), run(model, np.arange(4)[None])[0].astype(np.float64)
    step = np.maximum(np.abs(wide).max(1, keepdims=True) / 127, 2.0**-100)
    plain = np.rint(wide / step) * step
    errors = [np.square(x - wide).sum(1) for x in (found, plain)]
    allowed = np.maximum(step[:, 0] * 1e-3, 2.0**-88)
    assert (errors[0] <= errors[1] * (1 + 1e-4) + 1024 * np.square(allowed)).all()


@pytest.mark.parametrize("integers", ["int32", "int64"])
def test_places_of_every_form(integers: str) -> None:
    """A scalar, one row, a table of more axes, zeros, negative places, and places that do not exist."""
    w = draw(5, 8, 128)
    w[2] = 0
    rows = fit_weights(w.reshape(5, -1), weight_grid(8)).values.reshape(w.shape)
    proto = model_of(f"g ({integers} i) => (float[8, 128] y) {{ y = Gather (w, i) }}", w=w)
    model, _ = stored(proto)
    for place in (0, 2, 4, -1, -5):
        np.testing.assert_array_equal(run(model, np.array(place, integers)), rows[place])
    assert (run(model, np.array(2, integers)) == 0).all()
    for place in (5, -6):
        for which in (proto, model):
            with pytest.raises(InvalidArgument, match="out of data bounds"):
                run(which, np.array(place, integers))
    one = model_of(f"g ({integers}[N] i) => (float[N, 4096] y) {{ y = Gather <axis = -2> (w, i) }}", w=draw(1, 4096))
    model, _ = stored(one)
    found = run(model, np.array([0, -1, 0], integers))
    np.testing.assert_array_equal(found, fit_weights(draw(1, 4096), weight_grid(8)).values[[0, 0, 0]])


def test_several_gathers_read_one_table_and_results_keep_their_names() -> None:
    text = "g (int64[N] i) => (float[N, 32] y, float[N, 32] z) { a = Gather (w, i) y = Relu (a) z = Gather (w, i) }"
    model, report = stored(model_of(text, w=draw(200, 32)))
    assert list(details(report)) == ["w"] and [value.name for value in model.graph.outputs] == ["y", "z"]
    assert sorted(a.dtype.name for a in constants(model).values()) == ["float32", "int8"]
    assert any(value.name == "a" for node in model.graph for value in node.outputs)
    again, second = stored(ir.to_proto(model))
    assert not second.changes and ir.to_proto(again) == ir.to_proto(model)


LEFT = {
    "y = Gather (small, i)": "it has 2048 numbers, too few to matter",
    "x = Gather (w, i) s = ReduceSum <keepdims = 0> (w) y = Add (x, s)": "ReduceSum at 's' reads it too",
    "y = Gather <axis = 1> (w, i)": "'y' takes it apart along another axis than the first",
    "x = Gather (w, i) y = RotaryEmbedding (v, x, x)": "its rows are angles of a rotary embedding",
    "c = Constant <value_ints = [3]> () d = Gather (w, c) x = Gather (w, i) y = Add (x, d)": "Gather at 'd' reads it",
    "x = Gather (w, i) t = Transpose (w) m = Shape (t) y = Identity (x)": "Transpose at 't' reads it too",
    "x = Gather (nan, i) y = Identity (x)": "it holds NaN or infinity",
    "x = Gather (w, i) l = Less (x, x) y = If (b) <then_branch = g1 () => (float[N, 32] p) { p = Gather (w, i) },"
    " else_branch = g2 () => (float[N, 32] q) { q = Identity (x) }>": "Gather at 'p' reads it too",
}


@pytest.mark.parametrize("body", LEFT)
def test_tables_that_stay_in_float(body: str) -> None:
    nan = draw(200, 32)
    nan[7, 3] = np.nan
    proto = model_of(
        f"g (int64[N] i, float[N, 1, 1, 64] v, bool b) => (float y) {{ {body} }}".replace(": 20", ": 23"),
        w=draw(200, 32), small=draw(64, 32), nan=nan,
    )  # fmt: skip
    model, report = stored_unchecked(proto)
    assert not details(report) and LEFT[body] in " ".join(skips(report).values())
    assert ir.to_proto(model).graph.node == ir.to_proto(ir.from_proto(proto)).graph.node


def stored_unchecked(proto: onnx.ModelProto) -> tuple[ir.Model, PassReport]:
    model, (report,) = Pipeline.parse("dynaquant:activations=none").run(ir.from_proto(proto), PassContext())
    return model, report


def test_a_table_that_is_an_output_or_has_another_type_or_is_not_wanted() -> None:
    output = model_of(PLAIN.replace("y)", "y, float[200, 32] w)", 1), w=draw(200, 32))
    assert "it is an output of the model" in skips(stored_unchecked(output)[1])["w"]
    half = model_of(
        "g (int64[N] i) => (float16[N, 32] y) { y = Gather (w, i) }", w=draw(200, 32).astype(np.float16)
    )
    assert not stored(half)[1].changes
    brain = ir.tensor(draw(200, 32).astype(ml_dtypes.bfloat16), dtype=ir.DataType.BFLOAT16, name="w")
    narrow = model_of("g (int64[N] i) => (float[N, 32] y) { c = Cast <to = 1> (w) y = Gather (c, i) }")
    narrow.graph.initializer.append(ir.to_proto(brain))
    assert not stored(narrow)[1].changes
    plain = model_of(PLAIN, w=draw(200, 32))
    assert not stored(plain, ":activations=none:tables=false")[1].changes
    assert skips(stored(plain, ":activations=none:keep=w")[1]) == {"w": "named by keep"}


@pytest.mark.parametrize(
    "text",
    [
        TIED,
        TIED.replace("t = Transpose <perm = [1, 0]> (w) y = MatMul (r, t)",
                     "k = Constant <value_ints = [-1, 32]> () f = Reshape (r, k) e = Gemm <transB = 1> (f, w)"
                     " n = Constant <value_ints = [1, -1, 200]> () y = Reshape (e, n)"),
        TIED.replace("t = Transpose <perm = [1, 0]> (w) y = MatMul (r, t)", "y = MatMul (r, copy)"),
    ],
    ids=["turned", "rows", "copy"],
)  # fmt: skip
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_table_and_a_product_share_their_codes(text: str, calibrated: bool, tmp_path: Path) -> None:
    copy = {"copy": np.ascontiguousarray(draw(200, 32).T)} if "copy" in text else {}
    proto = tied(text, **copy)
    options = ":smooth=none" if calibrated else ":activations=none"
    model, report = stored(proto, options, tmp_path if calibrated else None)
    assert "the codes of " in details(report)["w"]
    large = [a for a in constants(model).values() if a.size >= 200 * 32]
    assert [(a.dtype.name, a.shape) for a in large] == [("int8", (200, 32))]
    for shape in ((1, 5), (1, 9)):
        index = np.random.default_rng(1).integers(0, 200, shape)
        expected = run(proto, index)
        for level in (Level.ORT_DISABLE_ALL, Level.ORT_ENABLE_ALL):
            assert np.abs(run(model, index, level) - expected).max() < 0.06 * np.abs(expected).max()
    again, _ = Pipeline.parse(report.spec).run(ir.from_proto(proto), PassContext())
    assert ir.to_proto(again).SerializeToString(True) == ir.to_proto(model).SerializeToString(True)


@pytest.mark.parametrize("options", [":weights=4", ":weights=6", ":weights=8:group=16"])
def test_codes_that_do_not_suit_a_table_are_not_shared(options: str) -> None:
    model, report = stored(tied(), f":activations=none{options}")
    assert "the codes of" not in details(report)["w"]
    large = [a for a in constants(model).values() if a.size >= 200 * 32]
    assert len(large) == 2 and all(a.dtype != np.float32 for a in large)
    index = np.arange(8)[None]
    assert np.abs(run(model, index) - run(tied(), index)).max() < 0.3 * np.abs(run(tied(), index)).max()


def test_a_table_stays_in_float_where_a_product_reads_it_so() -> None:
    """It would be stored twice."""
    _, report = stored(tied(), ":activations=none:keep=y")
    assert "it is the weight of 'y' too, which stays in float" in skips(report)["w"] and not details(report)


def test_a_matrix_that_is_the_weight_of_a_product_by_columns_has_codes_of_its_own() -> None:
    square = model_of("g (int64[N] i) => (float[N, 64] y) { x = Gather (w, i) y = MatMul (x, w) }", w=draw(64, 64))
    model, report = stored(square)
    assert "the codes of" not in details(report)["w"]
    index = np.array([3, -1])
    assert np.abs(run(model, index) - run(square, index)).max() < 0.03 * np.abs(run(square, index)).max()


def test_the_plan_holds_tables_and_repeats_them(tmp_path: Path) -> None:
    """Own codes, in a model without any layer."""
    proto = model_of(PLAIN, w=draw(200, 32))
    model, report = stored(proto, "", tmp_path)
    assert "plan=" in report.spec and report.stats["tables"] == 1
    again, (second,) = Pipeline.parse(report.spec).run(ir.from_proto(proto), PassContext())
    assert ir.to_proto(again).SerializeToString(True) == ir.to_proto(model).SerializeToString(True)
    assert details(second) == details(report)


def test_the_table_of_what_was_measured_has_a_row_for_a_table(tmp_path: Path) -> None:
    proto = tied()
    _, report = stored(proto, ":smooth=none", tmp_path)
    record, path = "dynaquant:smooth=none", tmp_path / "m.onnx.dynaquant.npz"
    plan = Plan.load(path, record)
    replace(plan, timing={"y": Timed(8, 30.0, 1e-3, 2e-3, "codes")}).save(path, record)
    _, (again,) = Pipeline.parse(report.spec).run(ir.from_proto(proto), PassContext())
    rows = [(row["layer"], row["bits"], row["dB"], row["ms"], row["decision"]) for row in again.rows]
    assert rows == [("y", 8, 30.0, 1.0, "codes"), ("w", 8, round(plan.tables["w"].decibels, 1), None, "codes")]


def test_a_budget_returns_tables_to_float(tmp_path: Path) -> None:
    reasons = {}
    for budget in (1.0, 0.0):
        model, report = stored(tied(), ":smooth=none", tmp_path, budget)
        reasons[budget] = skips(report).get("w", "")
    assert not reasons[1.0] and reasons[0.0] and all(a.dtype == np.float32 for a in constants(model).values())
    _, report = stored(model_of(PLAIN, w=draw(200, 32)), "", tmp_path, 0.0)
    assert "by itself it costs" in skips(report)["w"] and "--max-drop 0 leaves" in skips(report)["w"]


def test_a_plan_without_some_layers_drops_the_tables_that_they_store() -> None:
    codes = Codes(np.zeros((2, 2), np.int8), np.ones((2, 1), np.float32), np.zeros((2, 1), np.int32), 0)
    same, copy = TablePlan(codes, ("y",), "y", 40.0), TablePlan(codes, (), "y", 40.0)
    left = Plan(tables={"same": same, "copy": copy}).without({"y": "it is slow"})
    assert list(left.tables) == ["copy"] and left.tables["copy"].shared is None
    assert left.kept == {"y": "it is slow", "same": "it is the weight of 'y' too, which stays in float"}
