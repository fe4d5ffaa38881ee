"""The benchmark of loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from graphwright.tools import bench_load


@pytest.mark.tvm
def test_every_part_of_loading_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_load.main(["--megabytes", "5", "--processes", "1", "--json", str(tmp_path / "load.json")]) == 0
    data = json.loads((tmp_path / "load.json").read_text())
    assert data["bytes"] == 4 * bench_load.WIDTH**2
    assert all(data["ms"][part]["median"] > 0 for part in bench_load.PARTS)
    assert "4 MB of weights, 1 processes; ms" in capsys.readouterr().out
