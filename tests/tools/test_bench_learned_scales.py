"""The ablation table of learned quantization: its rows, that cells are kept, and that learning helps the digits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphwright.tools import bench_learned_scales as bench
from graphwright.tools.bench_learned_scales import PARTS, Case, cases, line, main, measure
from onnx import numpy_helper, parser

pytestmark = pytest.mark.torch
TEXT = '<ir_version: 10, opset_import: ["" : 21]> g (float[B, 32] x) => (float[B, 16] y) { y = MatMul (x, w) }'
X = list(np.random.default_rng(0).standard_normal((40, 1, 32)).astype(np.float32))


def export(path: Path) -> None:
    proto = parser.parse_model(TEXT)
    weight = np.random.default_rng(1).standard_normal((32, 16)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    onnx.save(onnx.shape_inference.infer_shapes(proto), path)


def test_every_width_is_a_row_and_cells_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    case = Case("small", "error", "x", export, lambda: X, lambda: X, lambda old, new: float(np.abs(old - new).max()),
                ":block_steps=4:steps=2")  # fmt: skip
    monkeypatch.setattr(bench, "cases", lambda: [case])
    arguments = ["--folder", str(tmp_path), "--json", str(tmp_path / "cells.json"), "--columns", "plain"]
    arguments += ["--columns", "+ rounding", "--bits", "8", "--bits", "4"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    cells = json.loads((tmp_path / "cells.json").read_text())
    assert [(cell["bits"], cell["column"]) for cell in cells] == [(8, "plain"), (8, "+ rounding"), (4, "plain"),
                                                                 (4, "+ rounding")]  # fmt: skip
    assert "learn=all:block_steps=4:steps=2" in cells[1]["passes"] and "learn" not in cells[0]["passes"]
    assert cells[0]["decibels"] > cells[2]["decibels"] + 10
    monkeypatch.setattr(bench, "outputs", None)
    assert main(arguments) == 0  # from what was kept
    assert capsys.readouterr().out == printed


def test_a_row_has_figures_and_decibels() -> None:
    cell = {"model": "m", "bits": 4, "layers": 7, "float": 0.961, "figure": 0.93456, "decibels": 12.34}
    assert line([cell, {**cell, "figure": 0.95}]) == ["m", "4", "7", "0.961", "0.9346 (12.3 dB)", "0.95 (12.3 dB)"]


def test_columns_add_one_part_each() -> None:
    assert list(PARTS) == ["plain", "scales", "+ offsets", "+ modulator", "+ rounding", "- modulator"]
    assert {case.name for case in cases()} == {"digits", "gpt-moby", "ocr-cls", "efficientnet-lite0"}


@pytest.mark.assets
def test_cuttings_are_of_other_lines_and_the_model_can_tell_them(
    fetched: Callable[[str], None], exported: Callable[..., Path]
) -> None:
    fetched("ocr-cls")
    learned, judged = (bench.cuttings(rows, 60, 1) for rows in (bench.LEARNED_LINES, bench.JUDGED_LINES))
    assert not {row for pair in bench.LEARNED_LINES for row in range(*pair)} & {
        row for pair in bench.JUDGED_LINES for row in range(*pair)
    }
    session = bench.session_of(exported("ocr-cls"), 1)
    for pieces, turned in (learned, judged):
        assert {piece.shape for piece in pieces} == {(1, 3, 48, 192)} and 15 < turned.sum() < 45
        found = np.concatenate([session.run(None, {"x": piece})[0] for piece in pieces])
        assert (found.argmax(1) == turned).mean() > 0.8


@pytest.mark.assets
def test_learning_helps_the_digits_at_4_bits(
    fetched: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that is trained for a moment; judged by digits that nothing was learned from."""
    fetched("mnist-5k")
    pytest.importorskip("torch")
    from graphwright.models import digits_cnn

    monkeypatch.setattr(digits_cnn, "EPOCHS", 2)
    monkeypatch.setattr(bench, "DIGITS", 150)
    digits = next(case for case in cases() if case.name == "digits")
    case = replace(digits, options=":block_steps=40:steps=40:rate=0.005")
    plain, learned = (measure(case, 4, column, tmp_path, 1) for column in ("plain", "+ rounding"))
    assert learned["decibels"] > plain["decibels"] + 2
    assert learned["figure"] > plain["figure"]
