"""The benchmark of quantized models: its table, and the parts that need no large model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphwright.tools import bench_dynaquant
from graphwright.tools.bench_dynaquant import Case, Setting, crops, line, main
from onnx import numpy_helper, parser

TEXT = '<ir_version: 10, opset_import: ["" : 20]> g (float[B, 32] x) => (float[B, 16] y) { y = MatMul (x, w) }'
X = np.random.default_rng(0).standard_normal((12, 1, 32)).astype(np.float32)


def export(path: Path) -> None:
    proto = parser.parse_model(TEXT)
    weight = np.random.default_rng(1).standard_normal((32, 16)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    onnx.save(onnx.shape_inference.infer_shapes(proto), path)


def largest(old: Any, new: Any) -> tuple[float, float]:
    first, second = (session.run(None, {"x": X[0]})[0] for session in (old, new))
    return 1.0, 1 - float(np.abs(first - second).max() / np.abs(first).max())


def test_every_setting_is_a_row_and_what_is_not_met_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (
        Setting("dynaquant", "0.9", lambda old, new: new >= 0.9),
        Setting("dynaquant:weights=4:activations=none", "equal", lambda old, new: new == old, calibrated=False),
    )
    case = Case("small", "largest error", export, lambda: {"x": list(X)}, largest, settings)
    monkeypatch.setattr(bench_dynaquant, "cases", lambda: [case])
    arguments = ["--folder", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    assert main(arguments) == 1
    printed = capsys.readouterr().out.splitlines()[2:]
    assert "holds" in printed[0] and "NOT MET" in printed[1]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["holds"] for row in rows] == [True, False] and rows[0]["seconds"] > 0
    assert main([*arguments, "--passes", "dynaquant"]) == 0  # judged again, not made again
    again = capsys.readouterr().out.splitlines()[2]
    assert again.split("|")[5] == printed[0].split("|")[5] and again.rstrip(" |").endswith("-")
    assert main([*arguments, "--only", "another"]) == 0


def test_a_row_names_sizes_and_time() -> None:
    row = {"model": "m", "passes": "dynaquant", "measure": "points", "float": 1.0, "quantized": 0.98765,
           "asked": "97 %", "holds": True, "seconds": 61.4, "megabytes": [10.0, 2.5]}  # fmt: skip
    assert line(row) == ["m", "dynaquant", "points", "1.0000", "0.9877", "97 %", "holds", "10.0 -> 2.5", "61"]


@pytest.mark.assets
def test_crops_follow_from_their_seed(fetched: Callable[[str], None]) -> None:
    fetched("photos")
    first, again, other = (crops(["chelsea", "coffee"], 3, seed) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True)) and (first[0] != other[0]).any()
    assert {one.shape for one in first} == {(1, 3, 224, 224)}
