"""nested-widths: what is stored, that each choice computes what it says, and that a plan repeats it all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.base import PassContext, PassReport, Weights, WidthJob
from graphwright.passes.errors import PassError, UsageError, WeightsError
from graphwright.passes.pipeline import Pipeline
from graphwright.passes.quantize.nested import RATIO, nest

onnxruntime = pytest.importorskip("onnxruntime")

SHAPES = {"wa": (64, 48), "wb": (64, 40), "wc": (88, 72), "wd": (72, 50)}
OPTIONS = "least=1024:lead=2:group=16"


def model(rows: str = "1") -> ir.Model:
    """Four products, the first two of which read the same, and a Gemm with a bias."""
    text = f"""<ir_version: 10, opset_import: ["": 21]>
    g (float[{rows}, 64] x) => (float[{rows}, 50] y) {{
        a = MatMul (x, wa)  b = MatMul (x, wb)  c = Concat <axis = 1> (a, b)  d = Tanh (c)
        e = MatMul (d, wc)  f = Relu (e)  y = Gemm <transB = 1> (f, wd, bias)
    }}"""
    proto = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    arrays = {name: random.standard_normal(shape) * 0.1 for name, shape in SHAPES.items()}
    arrays["wd"] = np.ascontiguousarray(arrays["wd"].T)
    arrays["bias"] = random.standard_normal(50)
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def learned(job: WidthJob, ctx: PassContext) -> Weights:
    """In the place of the trainer: the second group is wide; the selector makes the last wide where its first feature
    is positive, and never the second."""
    first, second = np.zeros((88, 3), np.float32), np.zeros((3, 6), np.float32)
    first[0, 0] = second[0, 5] = 1
    bias = np.array([0, 0, 1, 0, 0, 0], np.float32)
    arrays = {"first": first, "first_bias": np.zeros(3, np.float32), "second": second, "second_bias": bias}
    assert job.groups == (("a", "b"), ("e",), ("y",)) and job.led == 1 and job.features == "d"
    return Weights(arrays, ("1",), job.record, {"loss_static": 2.0, "loss_dynamic": 1.0, "bits_dynamic": 6.0})


def context(tmp_path: Path, **more: object) -> PassContext:
    from graphwright.runtime.evaluator import evaluate

    random = np.random.default_rng(1)
    x = [random.standard_normal((1, 64)).astype(np.float32) for _ in range(40)]
    given = {"calibration": {"x": x}, "trainer": learned, "evaluator": evaluate, "output": tmp_path / "m.onnx", **more}
    return PassContext(**given)  # type: ignore[arg-type]


def converted(spec: str, ctx: PassContext, rows: str = "1") -> tuple[ir.Model, PassReport]:
    made, (report,) = Pipeline.parse(spec).run(model(rows), ctx)
    onnx.checker.check_model(ir.to_proto(made))
    return made, report


def outputs(m: ir.Model, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(ir.to_proto(m).SerializeToString(), options).run(None, {"x": x})[0]


def parts() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The parts of every weight without inputs, (inputs, channels)."""
    weights = model().graph.initializers
    found = {}
    for name in SHAPES:
        array = weights[name].const_value.numpy()  # type: ignore[union-attr]
        found[name] = nest(np.ascontiguousarray(array if name == "wd" else array.T), 16, None, None).parts
    return found


def expected(x: np.ndarray, wide: str) -> np.ndarray:
    """What the model gives where these of wa, wb, wc, wd read both parts."""
    w = {name: first + (name in wide.split()) * rest for name, (first, rest) in parts().items()}
    d = np.tanh(np.concatenate([x @ w["wa"], x @ w["wb"]], 1))
    bias = model().graph.initializers["bias"].const_value.numpy()  # type: ignore[union-attr]
    return np.maximum(d @ w["wc"], 0) @ w["wd"] + bias


@pytest.mark.parametrize("choose, wide", [("narrow", ""), ("wide", "wa wb wc wd")])
def test_without_inputs_weights_have_one_width(choose: str, wide: str) -> None:
    made, report = converted(f"nested-widths:choose={choose}:{OPTIONS}", PassContext())
    x = np.random.default_rng(2).standard_normal((1, 64)).astype(np.float32)
    np.testing.assert_allclose(outputs(made, x), expected(x, wide), atol=1e-5)
    assert [node.op_type == "NestedMatMul" for node in made.graph].count(True) == (4 if wide else 0)
    assert report.stats["mean_bits"] == (8 if wide else 4)


def test_the_second_part_holds_what_the_first_leaves() -> None:
    random = np.random.default_rng(0)
    matrix = random.standard_normal((30, 70)).astype(np.float32)
    rows = random.standard_normal((400, 70)).astype(np.float32)
    for gram in (None, (rows.T @ rows)[None]):
        made = nest(matrix, 32, None, gram)
        first, rest = (part.T for part in made.parts)
        errors = [np.square(rows @ (matrix - w).T).mean() for w in (first, first + rest)]
        assert errors[1] < errors[0] / 30, errors
        half = made.codes.scale.repeat(32, 1)[:, :70] / RATIO / 2
        # Nothing is cut off but where a weight lies outside the first part's range or was rounded far away.
        assert (np.abs(matrix - first - rest) <= half * 1.01).mean() > (0.97 if gram is None else 0.5)


def test_a_plan_serves_every_choice_without_inputs(tmp_path: Path) -> None:
    _, report = converted(f"nested-widths:{OPTIONS}", context(tmp_path))
    assert report.stats["choose"] == "dynamic" and report.stats["mean_bits"] == 6
    plan = f"plan={tmp_path / 'm.onnx.nested-widths.npz'}"
    assert plan in report.spec
    again, repeated = converted(report.spec, PassContext())
    assert repeated.stats == report.stats
    details = {change.value: change.detail for change in report.changes}
    assert details["a"] == "8 bits" and details["y"] == "4 or 8 bits, by the selector"
    static, report = converted(f"nested-widths:choose=static:{plan}:{OPTIONS}", PassContext())
    assert [node.op_type for node in static.graph].count("NestedMatMul") == 1
    details = {change.value: change.detail for change in report.changes}
    assert details == {"a": "4 bits", "b": "4 bits", "e": "8 bits", "y": "4 bits"}
    x = np.random.default_rng(2).standard_normal((1, 64)).astype(np.float32)
    for sign in (1, -1):
        # The selector's feature is tanh of the first column of x · wa: the sign of x decides.
        one = sign * x * np.sign((x @ parts()["wa"][0])[0, 0])
        close = [np.abs(outputs(again, one) - outputs(m, one)).max() for m in _fixed(plan)]
        assert close[sign < 0] < 1e-5 < close[sign > 0], close


def test_a_selector_that_gains_next_to_nothing_is_left_out(tmp_path: Path) -> None:
    def barely(job: WidthJob, ctx: PassContext) -> Weights:
        found = learned(job, ctx)
        return replace(found, stats={**found.stats, "loss_dynamic": 1.95})

    _, report = converted(f"nested-widths:{OPTIONS}", context(tmp_path, trainer=barely))
    assert report.stats["choose"] == "static"
    plan = f"plan={tmp_path / 'm.onnx.nested-widths.npz'}"
    _, report = converted(f"nested-widths:choose=dynamic:{plan}:{OPTIONS}", PassContext())
    assert report.stats["choose"] == "dynamic"


def _fixed(plan: str) -> list[ir.Model]:
    """The model with the last product wide and narrow, the others as the selector has them."""
    from graphwright.passes.quantize.nested import NestedPlan
    from graphwright.passes.quantize.write_nested import write_nested
    from graphwright.passes.registry import parse_pass

    record = parse_pass(f"nested-widths:{OPTIONS}").record  # type: ignore[attr-defined]  # of NestedWidths
    found = NestedPlan.load(Path(plan.removeprefix("plan=")), record)
    made = []
    for wide in ((0, 2), (0,)):
        copy = model()
        write_nested(copy, replace(found, selector=None), wide, False)
        made.append(copy)
    return made


def test_products_of_other_names_are_known_by_their_weights(tmp_path: Path) -> None:
    made, report = converted(f"nested-widths:choose=dynamic:{OPTIONS}", context(tmp_path))
    other = model()
    for node in other.graph:
        node.outputs[0].name = f"{node.outputs[0].name}_2"
    again, _ = Pipeline.parse(report.spec).run(other, PassContext())
    x = np.random.default_rng(3).standard_normal((1, 64)).astype(np.float32)
    np.testing.assert_array_equal(outputs(again, x), outputs(made, x))


def test_a_selector_chooses_for_one_row(tmp_path: Path) -> None:
    made, report = converted(f"nested-widths:choose=dynamic:{OPTIONS}", context(tmp_path), rows="N")
    assert [skip.reason for skip in report.skips] == [
        "'d' has an unknown number of rows, and a selector chooses for one; all products are wide"
    ]
    assert "ArgMax" not in [node.op_type for node in made.graph] and report.stats["mean_bits"] == 8


def test_block_activations_round_its_data(tmp_path: Path) -> None:
    spec = f"nested-widths:choose=wide:{OPTIONS},block-activations"
    made, (_, report) = Pipeline.parse(spec).run(model(), PassContext())
    assert [change.value for change in report.changes] == ["a", "b"]  # 88 and 72 inputs are no whole number of blocks
    assert len(report.skips) == 2
    assert outputs(made, np.ones((1, 64), np.float32)).shape == (1, 50)


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="nested-widths needs real inputs to choose widths by: give --calibration"):
        Pipeline.parse("nested-widths").check_needs(PassContext())
    with pytest.raises(UsageError, match="mean is 3, must be between 4 and 8"):
        Pipeline.parse("nested-widths:mean=3")
    with pytest.raises(UsageError, match="group is 12, must be a multiple of 8"):
        Pipeline.parse("nested-widths:group=12")
    _, report = converted(f"nested-widths:choose=narrow:{OPTIONS}", context(tmp_path))
    plan = tmp_path / "m.onnx.nested-widths.npz"
    with pytest.raises(PassError, match="was made without a choice of widths; make one with choose=static"):
        converted(f"nested-widths:choose=static:plan={plan}:{OPTIONS}", PassContext())
    with pytest.raises(PassError, match="was made without a selector"):
        converted(f"nested-widths:choose=dynamic:plan={plan}:{OPTIONS}", PassContext())
    with pytest.raises(WeightsError, match="is of nested-widths:group=16"):
        converted(f"nested-widths:choose=narrow:plan={plan}:least=1024", PassContext())
    other = model()
    other.graph.node(0).outputs[0].name = "z"
    old = other.graph.initializers["wa"].const_value
    other.graph.initializers["wa"].const_value = ir.tensor(old.numpy() * 2, name="wa")  # type: ignore[union-attr]
    with pytest.raises(PassError, match="the plan is for another model or preset: this one has no such product 'a'"):
        Pipeline.parse(report.spec).run(other, PassContext())
