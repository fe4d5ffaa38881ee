"""The codec's benchmark: the table of its figures and the plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from graphwright.tools import bench_codec

RATES = (0.25, 0.5, 0.8, 1.2)


def figures(setting: str, quality: int, factor: float) -> dict[str, Any]:
    rate, dB = factor * RATES[quality - 1], 26.0 + 2 * quality
    photos = [{"photo": name, "rate": rate, "dB": dB} for name in ("chelsea", "coffee", "rocket")]
    bits = 32.0 if setting == "float" else 8.0
    about = {"setting": setting, "quality": quality, "bits": bits, "bytes": 1000, "rate": rate, "dB": dB}
    return {**about, "photos": photos}


def test_figures_that_are_there_become_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for setting, factor in (("float", 1.0), ("8 bits", 1.1)):
        for quality in range(1, 5):
            path = tmp_path / f"{setting.replace(' ', '-')}-{quality}.json"
            path.write_text(json.dumps(figures(setting, quality, factor)))
    plot = tmp_path / "plot.svg"
    arguments = ["--folder", str(tmp_path), "--only", "float", "--only", "8 bits", "--plot", str(plot)]
    assert bench_codec.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| 8 bits | 8.00 | +10.0% | +10.0% | +10.0% | +10.0% |" in lines
    drawn = ElementTree.parse(plot).getroot()
    kinds = [element.tag.rpartition("}")[2] for element in drawn]
    assert kinds.count("polyline") == 2 and kinds.count("circle") == 8


def test_a_setting_without_its_float_figures_is_left_out() -> None:
    rows = [figures("8 bits", quality, 1.0) for quality in range(1, 5)]
    assert bench_codec.table(rows) == []


def test_choosing_for_each_photo_keeps_the_mean_of_bits() -> None:
    """One photo of three loses nothing with 4 bits, so another may have 8 where all had 6."""
    rows = [{**figures(f"{bits} bits", 2, 1.0), "bits": float(bits)} for bits in (4, 6, 8)]
    for row, rates in zip(rows, ((1.0, 2.0, 2.0), (1.0, 1.5, 1.5), (1.0, 1.0, 1.0)), strict=True):
        row["photos"] = [{"photo": str(i), "rate": rate, "dB": 200.0} for i, rate in enumerate(rates)]
    found = bench_codec.per_photo(rows, (1.0, 1.0, 1.0, 1.0))
    assert found == [["4 bits", "4.00", "+0.00%"], ["6 bits", "6.00", "-12.50%"], ["8 bits", "8.00", "+0.00%"]]
