"""The benchmark of products and convolutions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from graphwright.tools import bench_kernels
from graphwright.tools.bench_kernels import Case

SMALL = [
    Case("product", (20, 24, 16)), Case("direct", (16, 24, 6, 7), 3), Case("winograd", (16, 16, 8, 8), 3),
    Case("depthwise", (24, 24, 9, 9), 5, 2), Case("transposed", (16, 1, 5, 6), 2, 2),
    Case("transposed", (16, 24, 5, 6), 2, 2),
]  # fmt: skip


@pytest.mark.tvm
def test_every_kind_of_kernel_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And computes what onnxruntime does."""
    monkeypatch.setattr(bench_kernels, "CASES", SMALL)
    file = tmp_path / "kernels.json"
    assert bench_kernels.main(["--seconds", "0.01", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["results"]
    assert [row["case"] for row in rows] == [str(case) for case in SMALL]
    assert all(row["error"] < 1e-5 and row["ratio"]["median"] > 0 for row in rows)
    assert all(rate["median"] > 0 for row in rows for rate in row["gflops"].values())
    assert "winograd 3x3, 16->16, 8x8" in capsys.readouterr().out


def test_operations_are_those_of_the_operator() -> None:
    assert Case("product", (2, 3, 5)).flops == 60
    assert Case("direct", (4, 8, 6, 6), 3, 2).flops == 2 * 4 * 8 * 9 * 3 * 3
    assert Case("depthwise", (8, 8, 6, 6), 3).flops == 2 * 8 * 9 * 36
    assert Case("transposed", (4, 8, 5, 6), 2, 2).flops == 2 * 4 * 8 * 4 * 30
