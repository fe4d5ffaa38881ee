"""The demo's table and its errors."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from graphwright.models import assets, registry
from graphwright.passes.errors import AssetError
from graphwright.tools import demo


def arguments(monkeypatch: pytest.MonkeyPatch, *given: object) -> None:
    monkeypatch.setattr(sys, "argv", ["demo", *map(str, given)])


@pytest.mark.tvm
@pytest.mark.assets
def test_the_demo_ends_with_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the smallest of the real models."""
    entry = registry.describe("silero-vad")
    missing = [name for name in entry.needs_assets + entry.sample_assets if not assets.has(name)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: graphwright models fetch silero-vad")
    monkeypatch.setattr(demo, "RUNS", 3)
    arguments(monkeypatch, "silero-vad", "--folder", tmp_path, "--threads", 1)
    assert demo.main() == 0
    header, row = capsys.readouterr().out.strip().splitlines()
    assert re.split(r"  +", header) == ["model", "passes fired", *demo.NUMBERS]
    name, fired, size, reference, candidate, error = re.split(r"  +", row)
    assert name == "silero-vad" and "pin-shapes" in fired and size.endswith("MB")
    assert float(reference) > 0 and float(candidate) > 0 and float(error) < 1e-4
    assert (tmp_path / "silero-vad.cpu" / "manifest.json").is_file()


def test_a_model_that_cannot_be_fetched_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(name: str) -> list[Path]:
        raise AssetError(f"cannot download {name}: no network; check the network and try again")

    monkeypatch.setattr(registry, "fetch", fetch)
    arguments(monkeypatch, "minilm", "--folder", tmp_path)
    assert demo.main() == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == ["error: cannot download minilm: no network; check the network and try again"]
