"""The benchmark of models in 8 bits: its verdict, and what becomes of a model that fails."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from graphwright.passes.errors import GraphwrightError
from graphwright.tools import bench_int8


def row(name: str, ratios: Sequence[float]) -> dict[str, Any]:
    def spread(median: float) -> dict[str, float]:
        return {"median": median, "low": median, "high": median}

    return {
        "model": name, "threads": 2, "quantized by onnxruntime": "all", "compile_seconds": 7.0, "turns": 3,
        "ms": {key: spread(2.0) for key in (bench_int8.OURS, *bench_int8.OTHERS)},
        "ratio": {key: spread(ratio) for key, ratio in zip(bench_int8.OTHERS, ratios, strict=True)},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("second", "code"),
    [((2.5, 1.25, 1.0), 0), ((2.5, 1.25, 0.99), 4), ((2.4, 1.3, 2.0), 4), ((4.0, 1.0, 2.0), 4)],
)  # fmt: skip
def test_means_are_judged_and_float32_of_every_model(
    second: Sequence[float], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    rows = {"a": row("a", (2.5, 1.25, 1.5)), "b": row("b", second)}
    asked: list[tuple[str, str]] = []

    def ask(name: str, arguments: Sequence[str], tool: str) -> list[dict[str, Any]]:
        asked.append((name, tool))
        return [rows[name]]

    monkeypatch.setattr(bench_int8.suite, "ask", ask)
    monkeypatch.setattr(bench_int8.suite, "machine", lambda: {})
    file = tmp_path / "rows.json"
    assert bench_int8.main(["--models", "a,b", "--json", str(file)]) == code
    assert asked == [("a", "bench_int8"), ("b", "bench_int8")]
    assert json.loads(file.read_text())["rows"] == list(rows.values())
    out = capsys.readouterr().out
    assert "| a | 2.00 | 2.00 | 2.00 | 2.00 | 2.50 [2.50, 2.50] | 1.25 [1.25, 1.25] | 1.50 [1.50, 1.50] |" in out
    assert "of graphwright: geometric mean" in out


def test_the_row_of_asked_quality_is_quantized_as_it_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphwright.runtime import driver
    from graphwright.tools import bench_dynaquant, bench_suite

    made: list[tuple[str, Any]] = []
    monkeypatch.setattr(driver, "optimize", lambda _, passes, calibration, **__: made.append((passes, calibration)))
    monkeypatch.setattr(bench_dynaquant, "photo_calibration", lambda: "photos")
    monkeypatch.setattr(bench_int8, "calibration", lambda name: name)
    model = bench_suite.Prepared("efficientnet-lite0", tmp_path / "float.onnx", {}, {}, {})
    plan = bench_int8.Plan(2, "dynaquant:weights=6", tmp_path, bench_suite.QUICK, lambda _: None)
    names = [bench_int8.quantized(model, row, plan).name for row in (bench_int8.JUDGED, model.name)]
    assert names == ["int8-efficientnet-lite0-97", "int8-efficientnet-lite0"]
    assert made == [(bench_dynaquant.SAME_CLASSES, "photos"), ("dynaquant:weights=6", "efficientnet-lite0")]
    settings = next(case.settings for case in bench_dynaquant.cases() if case.name == "efficientnet-lite0")
    assert (settings[1].passes, settings[1].asked) == (bench_dynaquant.SAME_CLASSES, "97 %")


def test_a_model_that_fails_is_a_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def ask(name: str, arguments: Sequence[str], tool: str) -> list[dict[str, Any]]:
        raise GraphwrightError("no such model")

    monkeypatch.setattr(bench_int8.suite, "ask", ask)
    assert bench_int8.main(["--models", "a"]) == 4
    assert "| a | failed: no such model |" in capsys.readouterr().out
