"""The benchmark suite: what it measures, what it keeps, and that one model's failure does not end it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphwright.models import registry
from graphwright.passes.errors import AssetError, GraphwrightError
from graphwright.tools import bench_suite, turns
from onnx import parser

from .conftest import mlp


@pytest.fixture
def prepared(tmp_path: Path) -> bench_suite.Prepared:
    """The small classifier as the suite has its models."""
    onnx.save(mlp(), tmp_path / "mlp.onnx")
    feeds = {"x": np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)}
    return bench_suite.Prepared("mlp", tmp_path / "mlp.onnx", feeds, {"x": (2, 8)}, {})


@pytest.mark.tvm
def test_an_artifact_is_compiled_once_for_each_state_of_the_sources(
    prepared: bench_suite.Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphwright.runtime.target import Target

    target = Target.named("cpu")
    first = bench_suite.compiled(prepared, target, tmp_path)
    again = bench_suite.compiled(prepared, target, tmp_path)
    assert first.fresh and not again.fresh
    assert (again.path, again.seconds) == (first.path, first.seconds)
    monkeypatch.setattr(bench_suite, "sources_digest", lambda *rooms: "changed")
    changed = bench_suite.compiled(prepared, target, tmp_path)
    assert changed.fresh and changed.path != first.path
    assert not first.path.exists() and prepared.path.exists()  # one artifact a model is kept, and the model


def test_the_sources_that_decide_are_those_of_the_rooms() -> None:
    assert bench_suite.sources_digest("passes") == bench_suite.sources_digest("passes")
    assert bench_suite.sources_digest("passes") != bench_suite.sources_digest("runtime")


@pytest.mark.tvm
def test_a_row_has_every_figure(
    prepared: bench_suite.Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_suite, "prepare", lambda name, sizes, folder: prepared)
    rows = bench_suite.measure("mlp", bench_suite.Plan((1, 2), bench_suite.QUICK, tmp_path))
    assert [row.threads for row in rows] == [1, 2]
    for row in rows:
        data = json.loads(json.dumps(row.to_json()))
        assert data["relative_error"] <= 1e-6 and data["turns"] == 3 and data["torch_ms"] is None
        assert data["onnxruntime_ms"]["median"] > 0 and data["graphwright_ms"]["median"] > 0
        assert data["shapes"] == {"x": [2, 8]} and data["nodes"][0] == data["nodes"][1]
        assert len(bench_suite.line(data, False)) == len(bench_suite.header(False))


def test_runners_take_turns() -> None:
    """Each turn has a run that is not timed and the timed ones; nobody gets two turns in a row."""
    order: list[str] = []
    runners = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = bench_suite.take_turns(runners, bench_suite.QUICK, 0.0)
    assert [len(found) for found in times.values()] == [3, 3]
    assert "".join(order) == "aabb" + "aabb" * 3


def test_inputs_are_aligned_copies() -> None:
    array = np.arange(10, dtype=np.int64)[1:]
    copy = turns.aligned(array)
    assert copy.ctypes.data % 64 == 0 and copy.flags.c_contiguous and np.array_equal(copy, array)


@pytest.mark.parametrize(("shape", "dims"), [("n, n", (3, 3)), ("n, n", (2, 5)), ("a, b", (2, 5))])
def test_onnxruntime_learns_sizes_unless_one_name_stands_for_two(
    shape: str, dims: tuple[int, int], tmp_path: Path
) -> None:
    text = f'<ir_version: 10, opset_import: ["" : 20]> g (float[{shape}] x) => (float[c, d] y) {{ y = Relu(x) }}'
    onnx.save(parser.parse_model(text), tmp_path / "m.onnx")
    model = bench_suite.Prepared("m", tmp_path / "m.onnx", {"x": np.ones(dims, np.float32)}, {"x": dims}, {})
    session = bench_suite.onnxruntime_session(model, 1, plain=False)
    assert session.run(None, dict(model.feeds))[0].shape == dims
    assert (session.get_inputs()[0].shape == list(dims)) == (shape != "n, n" or dims[0] == dims[1])


ROW = {
    "model": "m", "shapes": {"x": [1, 2]}, "threads": 1, "onnxruntime_ms": {"median": 4.0, "low": 4.0, "high": 4.0},
    "graphwright_ms": {"median": 2.0, "low": 2.0, "high": 2.0}, "ratio": {"median": 2.0, "low": 1.9, "high": 2.1},
    "turns": 3, "relative_error": 1e-6, "load_ms": 5.0, "compile_seconds": 3.0, "activation_bytes": 2048,
    "nodes": [5, 5], "torch_ms": None,
}  # fmt: skip


def test_a_failure_is_a_row_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(name: str, arguments: list[str]) -> list[dict[str, object]]:
        if name == "minilm":
            raise GraphwrightError("no such luck")
        half = {"median": 0.5, "low": 0.5, "high": 0.5}
        return [{**ROW, "model": name}, {**ROW, "model": name, "ratio": half}]

    monkeypatch.setattr(bench_suite, "ask", ask)
    arguments = ["--models", "minilm,magika", "--threads", "1", "--json", str(tmp_path / "out.json")]
    assert bench_suite.main(arguments) == 4
    out = capsys.readouterr().out
    assert "| minilm | failed: no such luck |" in out
    assert "| magika | 1x2 | 1 | 4.00 | 2.00 | 2.00 [1.90, 2.10] | 1.0e-06 | 5 | 2.0 kB | 3 |" in out
    assert "geometric mean of 2 ratios on 1 thread: 1.000" in out
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["failed"] == {"minilm": "no such luck"} and len(data["rows"]) == 2


def test_a_wrong_result_is_marked_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_suite, "ask", lambda name, arguments: [{**ROW, "relative_error": 0.2}])
    assert bench_suite.main(["--models", "magika"]) == 4
    assert "2.0e-01 WRONG" in capsys.readouterr().out
    monkeypatch.setattr(bench_suite, "ask", lambda name, arguments: [ROW])
    assert bench_suite.main(["--models", "magika"]) == 0


def test_an_unknown_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_suite.main(["--models", "minilmm"]) == 2
    assert capsys.readouterr().err == "error: no model 'minilmm': did you mean minilm?\n"


def test_the_process_of_a_model_says_why_it_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(GraphwrightError, match="magika"):
        bench_suite.ask("magika", ["--folder", str(tmp_path / "bench")])


def test_every_model_of_the_suite_is_in_the_table() -> None:
    for name, sizes in bench_suite.SUITE.items():
        assert registry.pins(name, sizes)


@pytest.mark.tvm
@pytest.mark.assets
def test_the_suite_on_its_smallest_model(
    tmp_path: Path, fetched: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        fetched("magika")
    except AssetError as error:
        pytest.skip(str(error))
    arguments = ["--models", "magika", "--threads", "1", "--quick", "--folder", str(tmp_path)]
    assert bench_suite.main(arguments) == 0
    assert "| magika | 1x2048 | 1 |" in capsys.readouterr().out
