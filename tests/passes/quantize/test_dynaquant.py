"""The pass as a whole: numbers against a NumPy fake quantization, onnxruntime with and without its optimizations,
replay, budget, refusals."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from graphwright.passes.base import PassContext, PassReport
from graphwright.passes.errors import PassError, UsageError, WeightsError
from graphwright.passes.pipeline import Pipeline
from graphwright.passes.quantize.narrow_sums import lanes
from graphwright.passes.quantize.plan import Plan
from graphwright.runtime import driver
from graphwright.runtime.evaluator import evaluate
from onnx import numpy_helper, parser
from onnxruntime import GraphOptimizationLevel as Level

CNN = """<ir_version: 10, opset_import: ["" : 20]> g (float[B, 3, 6, 6] x) => (float[B, 5] y)
{
    c = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) r = Relu (c)
    d = Conv <pads = [1, 1, 1, 1], group = 4> (r, w2, b2) e = Clip (d, zero, six)
    p = Conv (e, w3) s = Add (p, r)
    m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (s)
    a = GlobalAveragePool (m) f = Flatten (a) y = Gemm <transB = 1> (f, w4, b4)
}"""
MLP = """<ir_version: 10, opset_import: ["" : 20]> g (float[B, S, 8] x) => (float[B, S, 8] y)
{
    n = LayerNormalization (x, gamma, beta) q = MatMul (n, wq) v = MatMul (n, wv)
    t = Mul (q, v) o = MatMul (t, wo) p = Add (o, bo) h = Relu (p)
    z = MatMul (h, wz) y = Add (z, x)
}"""
Arrays = dict[str, np.ndarray]


def random_arrays(shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(np.float32) * 0.5 for name, shape in shapes.items()}


def model_of(text: str, arrays: Arrays) -> onnx.ModelProto:
    proto = parser.parse_model(text)
    proto.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in arrays.items())
    return onnx.shape_inference.infer_shapes(proto)


def cnn() -> tuple[onnx.ModelProto, Arrays]:
    shapes = {"w1": (4, 3, 3, 3), "b1": (4,), "w2": (4, 1, 3, 3), "b2": (4,), "w3": (4, 4, 1, 1), "w4": (5, 4),
              "b4": (5,)}  # fmt: skip
    arrays = {**random_arrays(shapes), "zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    arrays["w2"][1], arrays["b2"][1] = arrays["w2"][1] / 20, arrays["b2"][1] / 20  # a channel of small numbers
    return model_of(CNN, arrays), arrays


def mlp() -> tuple[onnx.ModelProto, Arrays]:
    shapes = {"gamma": (8,), "beta": (8,), "wq": (8, 8), "wv": (8, 8), "wo": (8, 8), "bo": (8,), "wz": (8, 8)}
    arrays = random_arrays(shapes)
    arrays["gamma"] = arrays["gamma"] + np.array([1, 1, 60, 1, 1, 30, 1, 1], np.float32)  # channels that stand out
    return model_of(MLP, arrays), arrays


def samples(shape: tuple[int, ...], count: int = 20) -> dict[str, list[np.ndarray]]:
    random = np.random.default_rng(1)
    return {"x": [random.standard_normal(shape).astype(np.float32) for _ in range(count)]}


def quantized(
    proto: onnx.ModelProto, options: str, calibration: Mapping[str, list[np.ndarray]] | None, folder: Path,
    max_drop: float | None = None,
) -> tuple[ir.Model, PassReport]:  # fmt: skip
    ctx = PassContext(
        calibration=calibration, evaluator=partial(evaluate, threads=1), output=folder / "m.onnx", overwrite=True,
        max_drop=max_drop,
    )  # fmt: skip
    pipeline = Pipeline.parse(f"dynaquant:least=1{options}")
    model, reports = pipeline.run(ir.from_proto(proto), ctx)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model, reports[-1]


def run(model: ir.Model | onnx.ModelProto, feeds: Arrays, level: Level = Level.ORT_DISABLE_ALL) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 4
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def plan_of(report: PassReport, folder: Path) -> Plan:
    path = folder / "m.onnx.dynaquant.npz"
    assert f"plan={path}" in report.spec
    return Plan.load(path, report.spec.replace(f":plan={path}", ""))


def fake(x: np.ndarray, plan: Plan, name: str) -> np.ndarray:
    """What codes of a value stand for, in float64."""
    point = plan.values[name]
    codes = np.clip(np.rint(x / point.scale) + point.zero, 0, 2**point.bits - 1)
    return (codes - point.zero) * point.scale


def convolved(x: np.ndarray, w: np.ndarray, pad: int, groups: int = 1) -> np.ndarray:
    """A convolution of stride 1 in float64: x (n, c, h, w), w (o, c / groups, k, k)."""
    x = np.pad(x.astype(np.float64), [(0, 0), (0, 0), (pad, pad), (pad, pad)])
    k, o, i = w.shape[2], w.shape[0], w.shape[1]
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), (2, 3))
    parts = [
        np.einsum("nchwij,ocij->nohw", windows[:, g * i : (g + 1) * i], w[g * o // groups : (g + 1) * o // groups])
        for g in range(groups)
    ]
    return np.concatenate(parts, 1)


@pytest.mark.parametrize("activations", [4, 6, 8, 16])
def test_a_network_of_convolutions_is_its_fake_quantization(activations: int, tmp_path: Path) -> None:
    proto, arrays = cnn()
    model, report = quantized(proto, f":activations={activations}:correct=false", samples((2, 3, 6, 6)), tmp_path)
    plan = plan_of(report, tmp_path)
    shapes = {"c": "w1", "d": "w2", "p": "w3", "y": "w4"}
    weights = {w: plan.layers[site].codes.values.reshape(arrays[w].shape) for site, w in shapes.items()}

    def bias(site: str, data: str) -> np.ndarray:
        scale = plan.values[data].scale * plan.layers[site].codes.scale[:, 0].astype(np.float64)
        b = arrays["b" + shapes[site][1:]]
        return (np.rint(b / scale) * scale if activations <= 8 else b).reshape(-1, 1, 1)

    x = samples((3, 3, 6, 6), 1)["x"][0]
    r = np.maximum(convolved(fake(x, plan, "x"), weights["w1"], 1) + bias("c", "x"), 0)
    d = convolved(fake(r, plan, "r"), weights["w2"], 1, 4) + bias("d", "r")
    p = convolved(fake(np.clip(d, 0, 6), plan, "e"), weights["w3"], 0)
    s = fake(fake(p, plan, "p") + fake(r, plan, "r"), plan, "s")
    m = s.reshape(3, 4, 3, 2, 3, 2).max((3, 5))
    f = fake(m.mean((2, 3)), plan, "a")
    expected = f @ weights["w4"].T + bias("y", "f").reshape(-1)
    found = run(model, {"x": x})
    # A rounding may fall to the other side where float32 and float64 differ: a step here and there, not more.
    step = max(plan.values[name].scale for name in ("a", "s", "e"))
    assert np.abs(found - expected).max() < 2 * step
    assert np.median(np.abs(found - expected)) < 1e-5
    # Codes that only move have one scale; averages have their own.
    points = plan.values
    assert points["s"] == points["m"] and points["a"] == points["f"] and points["a"] != points["m"]


@pytest.mark.parametrize("options", [
    "", ":smooth=0.5", ":weights=6", ":weights=4", ":weights=4:symmetric=false", ":activations=16",
    ":activations=none:weights=4:group=4", ":method=entropy", ":method=percentile:equalise=true", ":mixed=6",
])  # fmt: skip
@pytest.mark.parametrize("which", [cnn, mlp])
def test_the_result_runs_with_and_without_optimizations_and_replays(
    which: object, options: str, tmp_path: Path
) -> None:
    proto, _ = which()  # type: ignore[operator]
    shape = (2, 3, 6, 6) if which is cnn else (2, 5, 8)
    model, report = quantized(proto, options, samples(shape), tmp_path)
    x = samples(shape, 1)["x"][0]
    expected, found = run(proto, {"x": x}), run(model, {"x": x})
    rough = any(word in options for word in ("weights=4", "mixed", "entropy"))
    limit = 0.35 if rough else 0.1
    assert np.abs(found - expected).max() < limit * np.abs(expected).max()
    optimized = run(model, {"x": x}, Level.ORT_ENABLE_ALL)  # adds in 16 bits on some machines
    assert np.abs(optimized - expected).max() < 2 * limit * np.abs(expected).max()
    again, reports = Pipeline.parse(report.spec).run(ir.from_proto(proto), PassContext())
    assert ir.to_proto(again).SerializeToString(True) == ir.to_proto(model).SerializeToString(True)
    assert [c.detail for c in reports[-1].changes] == [c.detail for c in report.changes]


def test_a_second_run_gives_the_same_bytes(tmp_path: Path) -> None:
    results = []
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        model, _ = quantized(mlp()[0], ":mixed=5", samples((2, 5, 8)), tmp_path / part)
        results.append(ir.to_proto(model).SerializeToString(True))
    assert results[0] == results[1]


def test_smoothing_goes_into_the_normalization_and_helps(tmp_path: Path) -> None:
    proto, _ = mlp()
    data = samples((2, 5, 8))
    x = samples((2, 5, 8), 1)["x"][0]
    errors = {}
    for smooth in ("none", "auto"):
        model, report = quantized(proto, f":smooth={smooth}", data, tmp_path)
        errors[smooth] = float(np.square(run(model, {"x": x}) - run(proto, {"x": x})).sum())
        edits = [change.value for change in report.changes if change.rule == "smooth"]
        assert ("n" in edits) == (smooth == "auto")
        assert not any(node.op_type == "Mul" and node.outputs[0].name.startswith("n_") for node in model.graph)
    assert errors["auto"] < 0.7 * errors["none"]


def test_what_another_node_reads_is_smoothed_by_a_product(tmp_path: Path) -> None:
    proto, _ = mlp()
    proto.graph.output.append(onnx.helper.make_tensor_value_info("n", 1, ["B", "S", 8]))
    model, _ = quantized(proto, ":smooth=0.5", samples((2, 5, 8)), tmp_path)
    n = next(value for value in model.graph.outputs if value.name == "n")
    assert [node.op_type for node, _ in n.uses()] == ["Mul"]
    x = samples((2, 5, 8), 1)["x"][0]
    assert np.abs(run(model, {"x": x}) - run(proto, {"x": x})).max() < 0.1 * np.abs(run(proto, {"x": x})).max()


def test_equalised_layers_are_the_same_function_and_a_cut_channel_stays(tmp_path: Path) -> None:
    proto, _ = cnn()
    model, report = quantized(proto, ":equalise=true:activations=16:correct=false", samples((2, 3, 6, 6)), tmp_path)
    edits = plan_of(report, tmp_path).edits
    assert [edit.sites for edit in edits] == [("d", "p")]  # r is read twice
    assert edits[0].factors[1] < 0.5 and edits[0].factors.max() == 1
    x = samples((2, 3, 6, 6), 1)["x"][0]
    scale = np.abs(run(proto, {"x": x})).max()
    assert np.abs(run(model, {"x": x}) - run(proto, {"x": x})).max() < 0.02 * scale


def test_a_corrected_bias_keeps_the_mean_of_the_result(tmp_path: Path) -> None:
    proto, _ = mlp()
    data = {"x": [x + 1 for x in samples((2, 5, 8))["x"]]}  # numbers with a mean
    errors = {}
    for correct in ("true", "false"):
        options = f":weights=4:group=0:activations=16:correct={correct}:smooth=none:together=false:keep=q+v+z"
        model, _ = quantized(proto, options, data, tmp_path)
        pairs = [(run(model, {"x": x}), run(proto, {"x": x})) for x in data["x"]]
        errors[correct] = float(np.abs(np.mean([a - b for a, b in pairs], axis=(0, 1, 2))).max())
    assert errors["true"] < 0.7 * errors["false"]


def test_with_a_budget_the_worst_layers_return_to_float(tmp_path: Path) -> None:
    proto, _ = mlp()
    data = samples((2, 5, 8), 40)
    kept = []
    for budget in (1.0, 2e-4, 0.0):
        _, report = quantized(proto, ":weights=4:group=0", data, tmp_path, budget)
        kept.append(len([skip for skip in report.skips if "by itself it costs" in skip.reason]))
    assert kept[0] == 0 < kept[1] <= kept[2] == 4


@pytest.mark.parametrize(("options", "meeting"), [("", 2), (":narrow_sums=4", 4), (":narrow_sums=0", None)])
def test_sums_of_two_weights_are_narrow_unless_others_are_asked_for(
    options: str, meeting: int | None, tmp_path: Path
) -> None:
    model, _ = mlp()
    _, report = quantized(model, options, samples((2, 3, 8)), tmp_path)
    plan = plan_of(report, tmp_path)
    assert len(plan.layers) == 4
    fits = [lanes(8, meeting=meeting or 2).fits(layer.codes.codes) for layer in plan.layers.values()]
    assert all(fits) == (meeting is not None)


def test_mixed_widths_meet_their_mean(tmp_path: Path) -> None:
    _, report = quantized(mlp()[0], ":mixed=5:group=0", samples((2, 5, 8)), tmp_path)
    widths = {change.detail.partition("-")[0] for change in report.changes if change.rule == "layer"}
    assert report.stats["mean_bits"] <= 5 and widths <= {"4", "6", "8"} and len(widths) > 1


def test_a_weight_that_two_layers_share_or_that_is_turned_over(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[B, 8] x) => (float[B, 8] y)
    { t = Transpose <perm = [1, 0]> (w) a = MatMul (x, t) b = Relu (a) c = MatMul (b, t) y = MatMul (c, w) }"""
    proto = model_of(text, random_arrays({"w": (8, 8)}))
    model, _ = quantized(proto, "", samples((4, 8)), tmp_path)
    x = samples((4, 8), 1)["x"][0]
    assert np.abs(run(model, {"x": x}) - run(proto, {"x": x})).max() < 0.1 * np.abs(run(proto, {"x": x})).max()
    assert not any(node.op_type == "Transpose" for node in model.graph) and "w" not in model.graph.initializers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("weights=5", "weights is 5, must be 4, 6 or 8"),
        ("activations=5", "activations is 5, must be 4, 6, 8, 16 or none"),
        ("group=-1", "group is -1, must be at least 0"),
        ("group=32", "group is for 4 bits, or for weights alone"),
        ("samples=0", "samples is 0, must be at least 1"),
        ("mixed=9", "mixed is 9, must be between 4 and 8"),
        ("layers=a", "layers is 'a', must be all, or numbers"),
        ("smooth=2", "smooth is '2', must be auto, none, or a number between 0 and 1"),
        ("smooth=some", "smooth is 'some', must be auto, none, or a number"),
    ],
)
def test_options_that_make_no_sense(options: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Pipeline.parse(f"dynaquant:{options}")


def test_inputs_and_weights_that_it_refuses(tmp_path: Path) -> None:
    proto, _ = mlp()
    good = samples((2, 5, 8), 3)
    with pytest.raises(PassError, match=r"dynaquant needs real inputs .* give --calibration, plan=FILE.npz .* activat"):
        quantized(proto, "", None, tmp_path)
    with pytest.raises(PassError, match="calibration holds z; expected x"):
        quantized(proto, "", {"z": good["x"]}, tmp_path)
    with pytest.raises(PassError, match="calibration holds no sample"):
        quantized(proto, "", {"x": []}, tmp_path)
    with pytest.raises(PassError, match="'n' holds NaN or infinity on calibration sample 1"):
        quantized(proto, "", {"x": [good["x"][0], good["x"][1] * np.float32(np.nan)]}, tmp_path)
    with pytest.raises(PassError, match="keep names 'nothing', which is not the output of a convolution or product"):
        quantized(proto, ":keep=nothing", good, tmp_path)
    for options in (":outputs=nothing", ":outputs=y+nothing"):
        with pytest.raises(PassError, match="outputs=nothing is not an output of floats; expected some of "):
            quantized(proto, options, good, tmp_path)
    with pytest.raises(PassError, match=r"layers names number 99; the model has \d+ layers, from 0 on"):
        quantized(proto, ":layers=0+99", good, tmp_path)
    with pytest.raises(PassError, match="--max-drop is measured on real inputs"):
        quantized(proto, ":activations=none", None, tmp_path, 0.1)
    broken = onnx.ModelProto.FromString(proto.SerializeToString())
    weight = next(tensor for tensor in broken.graph.initializer if tensor.name == "wo")
    array = numpy_helper.to_array(weight).copy()
    array[0, 0] = np.nan
    weight.CopyFrom(numpy_helper.from_array(array, "wo"))
    with pytest.raises(PassError, match="the weight of 'o' holds NaN or infinity; expected finite weights"):
        quantized(broken, ":activations=none", None, tmp_path)


def test_a_plan_of_another_model_or_other_options_is_refused(tmp_path: Path) -> None:
    _, report = quantized(mlp()[0], "", samples((2, 5, 8)), tmp_path)
    with pytest.raises(PassError, match="the plan is for another model or preset"):
        Pipeline.parse(report.spec).run(ir.from_proto(cnn()[0]), PassContext())
    path = tmp_path / "m.onnx.dynaquant.npz"
    with pytest.raises(WeightsError, match="is of dynaquant:least=1, not of dynaquant:weights=4:least=1"):
        Pipeline.parse(f"dynaquant:plan={path}:weights=4:least=1").run(ir.from_proto(mlp()[0]), PassContext())


def test_the_road_records_what_replays(tmp_path: Path) -> None:
    onnx.save(cnn()[0], tmp_path / "m.onnx")
    done = driver.optimize(tmp_path / "m.onnx", "dynaquant:least=1", calibration=samples((2, 3, 6, 6)))
    assert done.quality is not None and done.quality.drop < 0.01 and done.quality.held_out and done.verdict is not None
    again = driver.optimize(tmp_path / "m.onnx", str(done.pipeline).rpartition(",")[2], out=tmp_path / "again.onnx")
    assert done.path is not None and again.path is not None
    assert done.path.read_bytes() == again.path.read_bytes()


def test_data_that_one_scale_does_not_suit_stay_in_float(tmp_path: Path) -> None:
    """A row of numbers a thousand times as large, as transformers have at the first token."""
    proto, _ = mlp()
    data = samples((2, 5, 8))
    node = next(node for node in proto.graph.node if node.op_type == "LayerNormalization")
    node.CopyFrom(onnx.helper.make_node("Identity", ["x"], ["n"]))
    for x in data["x"]:
        x[:, 0] *= 1000
    _, report = quantized(proto, ":method=minmax:smooth=none", data, tmp_path)
    reasons = {skip.value: skip.reason for skip in report.skips}
    assert set(reasons) >= {"q", "v"} and "8-bit data with one scale lose" in reasons["q"]
    _, report = quantized(proto, ":method=minmax:smooth=none:activations=16", data, tmp_path)
    assert not {"q", "v"} & {skip.value for skip in report.skips}
