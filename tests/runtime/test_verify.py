"""A wrong pass is found and named, whatever it does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.base import Change, Contract, Pass, PassContext, PassReport
from graphwright.passes.errors import BudgetError, InputError, ModelError, VerificationError
from graphwright.passes.pipeline import Pipeline
from graphwright.runtime.driver import Result, optimize
from graphwright.runtime.verify import limit_of, random_node
from onnx import numpy_helper, parser

HEADER = '<ir_version: 10, opset_import: ["" : 20]>'
TEXT = "g (float[N,8] x) => (float[N,4] y) { h = MatMul(x, w)  i = Identity(h)  y = Softmax<axis = -1>(i) }"


@dataclass(frozen=True)
class Honest(Pass):
    """Removes nothing and says so."""

    name = "honest"
    contract = Contract.EXACT

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        report = self.report()
        report.changed("honest", "y")
        return report


@dataclass(frozen=True)
class Scales(Pass):
    """Multiplies the weights by 1 + `by`, in a copy."""

    by: float = 0.1
    silent: bool = False
    name = "scales"
    contract = Contract.EXACT

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        value = model.graph.initializers["w"]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1 + self.by), name="w")
        report = self.report()
        if not self.silent:
            report.changed("scales", "w")
        return report


@dataclass(frozen=True)
class Rounds(Scales):
    name = "rounds"
    contract = Contract.ROUNDING


@dataclass(frozen=True)
class Loses(Scales):
    name = "loses"
    contract = Contract.LOSSY


@dataclass(frozen=True)
class Breaks(Honest):
    """Leaves an operator that no runtime has."""

    name = "breaks"

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        model.graph[0].op_type = "NoSuchOperator"
        return super().run(model, ctx)


@dataclass(frozen=True)
class Reorders(Honest):
    """Turns the inputs of concatenations round."""

    name = "reorders"

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        for node in model.graph:
            if node.op_type == "Concat":
                for index, value in enumerate(reversed(list(node.inputs))):
                    node.replace_input_with(index, value)
        return super().run(model, ctx)


@dataclass(frozen=True)
class Renames(Honest):
    """Gives an output, or an input, another name."""

    what: str = "outputs"
    name = "renames"

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        getattr(model.graph, self.what)[0].name = "other"
        return super().run(model, ctx)


@dataclass(frozen=True)
class WritesIntoSharedMemory(Honest):
    """Changes the numbers of a tensor in place, which the original may hold too."""

    name = "writes"

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        value = model.graph.initializers["w"]
        assert value.const_value is not None
        value.const_value.numpy()[...] *= 2
        return super().run(model, ctx)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    proto = parser.parse_model(f"{HEADER}\n{TEXT}")
    weights = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    onnx.save(proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def run(model: Path, *passes: Pass, **options: object) -> Result:
    return optimize(model, Pipeline(passes), preset="none", out=model.with_name("out.onnx"), **options)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Scales(), r"^pass scales: output 'y' differs: relative error .*; limit 1e-05$"),
        (Scales(silent=True), r"^pass scales:silent=true: output 'y' differs"),
        (Rounds(by=0.01), r"^pass rounds:by=0.01: output 'y' differs: .*; limit 1e-04$"),
        (Breaks(), r"^pass breaks: its result cannot be run: onnxruntime cannot load the model: .*NoSuchOperator"),
        (Renames(), r"^pass renames: output 'y' differs: is missing"),
        (Renames(what="inputs"), r"^pass renames:what=inputs: its result cannot be run: "),
    ],
)
@pytest.mark.parametrize("before", [(), (Honest(),)])
def test_a_wrong_pass_is_named(model: Path, wrong: Pass, message: str, before: tuple[Pass, ...]) -> None:
    with pytest.raises(VerificationError, match=message) as caught:
        run(model, *before, wrong, Honest())
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    assert [path.name for path in model.parent.iterdir()] == ["model.onnx"]


def test_a_pass_that_writes_into_the_originals_memory_is_noticed(model: Path) -> None:
    original = ir.load(model)
    value = original.graph.initializers["w"]
    value.const_value = ir.tensor(np.ones((8, 4), np.float32) * np.arange(4, dtype=np.float32), name="w")
    with pytest.raises(VerificationError, match="output 'y' differs"):
        optimize(original, Pipeline((WritesIntoSharedMemory(),)), preset="none")


def test_a_right_pass_passes(model: Path) -> None:
    result = run(model, Honest())
    assert result.verdict is not None and result.verdict.ok and result.verdict.sets == 2 and not result.unverified
    assert result.verdict.shapes == ("x[1, 8]", "x[2, 8]")
    assert run(model, Rounds(by=1e-6), overwrite=True).verdict.ok  # type: ignore[union-attr]  # verified


def test_without_verification_anything_goes(model: Path) -> None:
    result = run(model, Scales(), verify=False)
    assert result.verdict is None and result.unverified == "--no-verify"
    assert result.path is not None and result.path.exists()


def test_lossy_passes_are_measured_and_judged_by_their_budget(model: Path) -> None:
    result = run(model, Loses(by=0.1))
    assert result.verdict is not None and result.verdict.ok and 1e-3 < result.verdict.relative < 0.1
    assert run(model, Loses(by=0.1), max_drop=0.1, overwrite=True).verdict.ok  # type: ignore[union-attr]  # verified
    with pytest.raises(VerificationError, match=r"pass loses: output 'y' differs: .*; limit 1e-03"):
        run(model, Loses(by=0.1), max_drop=0.001, overwrite=True)


def report(step: Pass, changed: bool) -> PassReport:
    return PassReport(str(step), step.contract, [Change("r", "y")] if changed else [])


@pytest.mark.parametrize(
    ("passes", "changed", "drop", "limit"),
    [
        ((), (), None, 1e-5),
        ((Honest(),), (True,), None, 1e-5),
        ((Honest(), Rounds()), (True, True), None, 1e-4),
        ((Honest(), Rounds()), (True, False), None, 1e-5),
        ((Rounds(), Loses()), (True, True), None, None),
        ((Rounds(), Loses()), (True, True), 0.01, 0.01),
        ((Rounds(), Loses()), (True, False), 0.01, 1e-4),
        ((Rounds(), Loses()), (True, True), 1e-6, 1e-4),
    ],
)
def test_the_limit_is_that_of_the_weakest_pass_that_did_something(
    passes: tuple[Pass, ...], changed: tuple[bool, ...], drop: float | None, limit: float | None
) -> None:
    reports = [report(step, did) for step, did in zip(passes, changed, strict=True)]
    assert limit_of(Pipeline(passes), reports, drop) == limit


def test_weights_that_leave_nothing_but_nan_are_refused(model: Path) -> None:
    """NaN equals NaN: a comparison would find such a model equal to any other that is broken."""
    proto = onnx.load(model)
    weights = np.ones((8, 4), np.float32)
    weights[3, 1] = np.nan
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights, "w"))
    onnx.save(proto, model)
    with pytest.raises(ModelError, match=r"\.onnx: weight 'w' holds 1 NaN of 32 numbers and output 'y' is nothing but"):
        run(model, Honest())
    assert not model.with_name("out.onnx").exists()
    assert optimize(model, Pipeline((Honest(),)), preset="none", verify=False, dry_run=True).verdict is None


def test_weights_that_leave_numbers_beside_nan_can_be_verified(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "g (float[N,8] x) => (float[N,4] y) { y = MatMul(x, w) }"
    proto = parser.parse_model(f"{HEADER}\n{text}")
    weights = np.ones((8, 4), np.float32)
    weights[3, 1] = np.nan
    proto.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    onnx.save(proto, tmp_path / "m.onnx")
    result = run(tmp_path / "m.onnx", Honest())
    assert result.verdict is not None and result.verdict.ok
    assert "weight 'w' holds 1 NaN of 32 numbers and output 'y' holds NaN" in caplog.text


def test_outputs_without_numbers_are_not_called_equal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "g (float[N,8] x) => (float[N,8] y) { s = Abs(x)  m = Neg(s)  z = Sub(m, one)  y = Log(z) }"
    proto = parser.parse_model(f"{HEADER}\n{text}")
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(1), "one"))
    onnx.save(proto, tmp_path / "m.onnx")
    result = run(tmp_path / "m.onnx", Honest())
    assert result.verdict is None and result.unverified.startswith("output 'y' is nothing but NaN (random")
    assert "not verified: output 'y'" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "g (float[4] x) => (float[4] y) { r = RandomNormalLike(x)  y = Add(x, r) }",
        "g (float[4] x, bool c) => (float[4] y) { y = If (c) <"
        "then_branch = t () => (float[4] a) { a = RandomUniformLike(x) }, else_branch = e () => (float[4] b)"
        " { b = Neg(x) }> }",
        "g (float[64] x) => (float[64] y) <float r = {0.5}, bool training = {1}> { y = Dropout(x, r, training) }",
        "g (float[64] x, bool training) => (float[64] y) <float r = {0.5}> { y = Dropout(x, r, training) }",
    ],
)
def test_random_numbers_are_found_wherever_they_are(text: str, tmp_path: Path) -> None:
    proto = parser.parse_model(f"{HEADER}\n{text}")
    assert random_node(ir.from_proto(proto)) is not None
    onnx.save(proto, tmp_path / "m.onnx")
    result = run(tmp_path / "m.onnx", Honest())
    assert result.verdict is None and result.unverified.endswith("gives other numbers every run")


@pytest.mark.parametrize(
    "text",
    [
        "g (float[64] x) => (float[64] y) { y = Dropout(x) }",
        "g (float[64] x) => (float[64] y) <float r = {0.5}, bool training = {0}> { y = Dropout(x, r, training) }",
        "g (float[64] x, bool training) => (float[64] y) <float r = {0.0}> { y = Dropout(x, r, training) }",
    ],
)
def test_a_dropout_that_drops_nothing_is_no_random_number(text: str) -> None:
    assert random_node(ir.from_proto(parser.parse_model(f"{HEADER}\n{text}"))) is None


def test_whole_number_outputs_are_exact(tmp_path: Path) -> None:
    """The index of the largest of equal numbers changes when one grows by a rounding error."""
    text = "g (float[16,8] x) => (int64[16,1] y) { h = MatMul(x, w)  y = ArgMax<axis = 1>(h) }"
    proto = parser.parse_model(f"{HEADER}\n{text}")
    columns = np.random.default_rng(1).standard_normal((8, 1)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(np.tile(columns, (1, 4)), "w"))
    onnx.save(proto, tmp_path / "m.onnx")

    @dataclass(frozen=True)
    class Grows(Honest):
        name = "grows"

        def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
            value = model.graph.initializers["w"]
            array = np.array(value.const_value.numpy())  # type: ignore[union-attr]  # an initializer
            array[:, 3] *= np.float32(1.00001)
            value.const_value = ir.tensor(array, name="w")
            return super().run(model, ctx)

    with pytest.raises(VerificationError, match="pass grows: output 'y' differs: relative error"):
        run(tmp_path / "m.onnx", Grows())


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ({"z": [np.ones((2, 8), np.float32)]}, "calibration: the model has no input 'z'"),
        ({"x": [np.ones((2, 9), np.float32)]}, "onnxruntime cannot run the model on these inputs"),
    ],
)
def test_calibration_that_does_not_fit(
    model: Path, calibration: dict[str, list[np.ndarray]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(model, Honest(), calibration=calibration)


def test_a_model_that_onnxruntime_refuses_is_not_blamed_on_a_pass(tmp_path: Path) -> None:
    """Types that do not go together: valid protobuf, no valid model."""
    proto = parser.parse_model(f"{HEADER}\ng (float[4] x, int64[4] i) => (float[4] y) {{ y = Add(x, i) }}")
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="onnxruntime cannot load the model"):
        run(tmp_path / "m.onnx", Honest())


# --- learned passes


ATTENTION = """<ir_version: 11, opset_import: ["" : 23]>
g (float[B, 2, 5, 8] x) => (float[B, 2, 5, 8] y, float[B, 2, 5, 8] z) { y = Attention (x, x, x) z = Relu (x) }"""


def replaced(target: str | None = None, **options: Any) -> Result:
    """Softmax attention made softplus attention, without learning."""
    random = np.random.default_rng(0)
    samples = {"x": [random.standard_normal((1, 2, 5, 8)).astype(np.float32) for _ in range(20)]}
    model = ir.from_proto(parser.parse_model(ATTENTION))
    spec = f"softplus-attention:recover=none{options.pop('more', '')}"
    return optimize(model, spec, calibration=samples, target=target, **options)


def test_the_quality_of_a_learned_model_is_measured_on_held_out_samples() -> None:
    result = replaced()
    assert result.quality is not None and result.verdict is not None and result.verdict.ok
    assert (result.quality.samples, result.quality.held_out, result.quality.budget) == (2, True, None)
    assert 0.001 < result.quality.drops["y"] < 0.9 and result.quality.drops["z"] == pytest.approx(0)
    assert result.quality.drop == result.quality.drops["y"]


def test_a_budget_of_quality() -> None:
    assert replaced(max_drop=0.9).quality.budget == 0.9  # type: ignore[union-attr]  # measured
    with pytest.raises(BudgetError, match=r"output 'y' drops by .* on 2 samples, and --max-drop allows") as error:
        replaced(max_drop=0.0001)
    assert error.value.exit_code == 4


def test_only_named_outputs_are_judged() -> None:
    assert list(replaced(more=":outputs=z", max_drop=0.0001).quality.drops) == ["z"]  # type: ignore[union-attr]


@pytest.mark.tvm
def test_an_artifact_is_compared_with_the_rewritten_model(tmp_path: Path) -> None:
    result = replaced("cpu", out=tmp_path / "out")
    assert result.verdict is not None and result.verdict.ok and result.verdict.relative < 1e-4
    assert "against the rewritten model" in result.verdict.inputs
    assert result.artifact is not None and result.artifact.native_nodes == (2, 2)


def test_numbers_that_are_rounding_errors_refuse_no_model(tmp_path: Path) -> None:
    """Distances of points from themselves, which another order of the sum makes others."""
    text = """g (float[9,32] x) => (float[9,9] y) {
      squared = Mul(x, x)  norms = ReduceSum(squared, axes)  ones = Div(norms, norms)  twice = Mul(x, w)
      left = Concat<axis=-1>(twice, norms, ones)  right = Concat<axis=-1>(x, ones, norms)
      turned = Transpose<perm=[1,0]>(right)  squares = MatMul(left, turned)
      positive = Max(squares, least)  y = Sqrt(positive) }"""
    proto = parser.parse_model(f"{HEADER} {text}")
    constants = {"axes": np.array([-1]), "w": np.array(-2, np.float32), "least": np.array(0, np.float32)}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    onnx.save(proto, tmp_path / "model.onnx")

    verdict = run(tmp_path / "model.onnx", Reorders()).verdict
    assert verdict is not None and verdict.ok and verdict.relative > 1e-5
    with pytest.raises(VerificationError, match=r"pass scales:by=0\.01: output 'y' differs"):
        optimize(tmp_path / "model.onnx", Pipeline((Scales(by=0.01),)), preset="none", out=tmp_path / "other.onnx")
