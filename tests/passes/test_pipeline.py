"""Pipelines: text, order, contracts, needs, observers; and that the model given is never touched."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.base import Contract, Pass, PassContext, PassReport
from graphwright.passes.errors import GraphwrightError, ModelError, OutputError, PassError, UsageError
from graphwright.passes.pipeline import Dumper, Pipeline, Timer
from onnx import parser

TEXT = """<ir_version: 10, opset_import: ["" : 20]>
g (float[2] x) => (float[2] y) { a = Identity(x)  b = Relu(a)  y = Identity(b) }"""


def model() -> ir.Model:
    return ir.from_proto(parser.parse_model(TEXT))


@dataclass(frozen=True)
class Step(Pass):
    """Renames the first node; does what its options say."""

    mark: str = "seen"
    need: str = ""
    fail: bool = False
    name = "step"
    contract = Contract.ROUNDING

    def needs(self) -> frozenset[str]:
        return frozenset({self.need} if self.need else ())

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        if self.fail:
            raise ModelError("the model is not to my taste")
        node = model.graph[0]
        node.name = f"{node.name or ''}{self.mark}"
        report = self.report()
        report.changed("rename", node.outputs[0].name, self.mark)
        report.skipped("other", None, "no reason")
        report.stats["count"] = 1
        return report


@dataclass(frozen=True)
class Lossy(Step):
    name = "lossy"
    contract = Contract.LOSSY


@dataclass
class Watcher:
    seen: list[str] = field(default_factory=list)

    def before(self, step: Pass, model: ir.Model) -> None:
        self.seen.append(f"before {step} {model.graph[0].name}")

    def after(self, step: Pass, model: ir.Model, report: PassReport) -> None:
        self.seen.append(f"after {step} {model.graph[0].name} {len(report.changes)}")


@pytest.mark.parametrize("text", ["", "simplify", "pin-shapes,simplify,dead-code", "simplify,simplify"])
def test_text_round_trip(text: str) -> None:
    assert str(Pipeline.parse(text)) == text
    assert Pipeline.parse(str(Pipeline.parse(text))) == Pipeline.parse(text)


def test_text_is_read_generously() -> None:
    assert str(Pipeline.parse(" simplify , dead_code,, ")) == "simplify,dead-code"
    with pytest.raises(UsageError):
        Pipeline.parse("simplify;dead-code")


def test_pipelines_are_values() -> None:
    a, b = Pipeline((Step(),)), Pipeline((Lossy(),))
    assert a + b == Pipeline((Step(), Lossy())) and hash(a + b) == hash(Pipeline((Step(), Lossy())))
    assert [step.name for step in a + b] == ["step", "lossy"]


def test_the_weakest_contract_counts() -> None:
    assert Pipeline().contract is Contract.EXACT
    assert Pipeline((Step(),)).contract is Contract.ROUNDING
    assert Pipeline((Lossy(), Step())).contract is Contract.LOSSY


def test_the_model_given_is_never_touched() -> None:
    original = model()
    before = ir.to_proto(original).SerializeToString()
    changed, _ = Pipeline((Step(),)).run(original)
    assert changed.graph[0].name == "seen" and changed is not original
    assert ir.to_proto(original).SerializeToString() == before
    with pytest.raises(ModelError):
        Pipeline((Step(), Step(fail=True))).run(original)
    assert ir.to_proto(original).SerializeToString() == before


def test_in_place_for_who_has_no_other_use() -> None:
    original = model()
    changed, _ = Pipeline((Step(),)).run(original, in_place=True)
    assert changed is original and original.graph[0].name == "seen"


def test_observers_see_every_step_in_order() -> None:
    watcher, timer = Watcher(), Timer()
    _, reports = Pipeline((Step(mark="1"), Step(mark="2"))).run(model(), observers=[watcher, timer])
    assert watcher.seen == [
        "before step:mark=1 ", "after step:mark=1 1 1", "before step:mark=2 1", "after step:mark=2 12 1",
    ]  # fmt: skip
    assert [name for name, _ in timer.seconds] == ["step:mark=1", "step:mark=2"]
    assert [report.seconds for report in reports] == [seconds for _, seconds in timer.seconds]


def test_progress_names_the_passes() -> None:
    told: list[str] = []
    Pipeline((Step(), Lossy())).run(model(), PassContext(progress=told.append))
    assert told == ["step", "lossy"]


def test_steps_that_change_something_are_dumped(tmp_path: Path) -> None:
    pipeline = Pipeline.parse("dead-code,simplify") + Pipeline((Step(),))
    pipeline.run(model(), observers=[Dumper(tmp_path / "steps")])
    assert [path.name for path in sorted((tmp_path / "steps").iterdir())] == ["02-simplify.onnx", "03-step.onnx"]
    assert len(onnx.load(tmp_path / "steps" / "02-simplify.onnx").graph.node) == 1


def test_steps_that_cannot_be_dumped(tmp_path: Path) -> None:
    (tmp_path / "steps").write_text("a file")
    with pytest.raises(OutputError, match=r"01-step.onnx: cannot be written \(.*\); choose another output"):
        Pipeline((Step(),)).run(model(), observers=[Dumper(tmp_path / "steps")])


def test_errors_name_the_pass_and_keep_their_kind() -> None:
    with pytest.raises(ModelError, match=r"^step: the model is not to my taste$") as caught:
        Pipeline((Step(fail=True),)).run(model())
    assert isinstance(caught.value, GraphwrightError)


@pytest.mark.parametrize(
    ("need", "message"),
    [("calibration", "pass step needs real inputs: give --calibration FILE.npz"),
     ("target", "pass step needs a target: give --target NAME")],
)  # fmt: skip
def test_needs_are_checked_before_any_work(need: str, message: str) -> None:
    watcher = Watcher()
    with pytest.raises(PassError, match=message):
        Pipeline((Step(), Step(need=need))).run(model(), observers=[watcher])
    assert watcher.seen == []
    Pipeline((Step(need=need),)).run(model(), PassContext(calibration={}, target="cpu"))


def test_reports_are_json() -> None:
    _, (report,) = Pipeline((Step(mark="m"),)).run(model())
    assert report.to_json() == {
        "spec": "step:mark=m", "contract": "rounding", "changes": [["rename", "a", "m"]],
        "skips": [["other", "", "no reason"]], "stats": {"count": 1}, "seconds": round(report.seconds, 4),
    }  # fmt: skip
