"""The protocol of the benchmark against llama.cpp, with a model in its place that foresees nothing."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphwright.tools import bench_llama_cpp
from graphwright.tools.bench_llama_cpp import Peer, line, main, measure, perplexities

VOCABULARY = 97
STAND_IN = f"""
import numpy as np


class Llama:
    def __init__(self, path, n_ctx, logits_all=False, **options):
        assert path.endswith(".gguf") and options["n_threads"] == 1
        self.n_tokens, self.scores = 0, np.full((n_ctx, {VOCABULARY}), np.nan, np.float32)
        self.logits_all = logits_all

    def eval(self, ids):
        if self.logits_all:
            self.scores[self.n_tokens : self.n_tokens + len(ids)] = 0
        self.n_tokens += len(ids)
"""


class Even:
    """Ours, in which every token is as likely."""

    def extend(self, ids: Any, position: int, wanted: Any) -> tuple[np.ndarray, None, None]:
        return np.zeros((len(wanted), VOCABULARY), np.float32), None, None


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose python finds a package llama_cpp that stands in for the real one."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "llama_cpp.py").write_text(STAND_IN)
    packages = Path(np.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{packages}")
    return tmp_path


def test_both_sides_read_the_same_tokens_in_turn(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_llama_cpp, "POSITIONS", (16, 1024))
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 200).tolist()
    with Peer(environment, environment / "m.gguf", 256, 1) as peer:
        rows = measure(Even(), peer, ids, seconds=0.0, settle=0.0)  # type: ignore[arg-type]
        quality = perplexities(Even(), peer, ids)  # type: ignore[arg-type]
    assert [row["call"] for row in rows] == ["128 tokens of prompt", "token at 16"]
    assert [len(line(row)) for row in rows] == [len(bench_llama_cpp.HEADER)] * 2
    for value in quality.values():
        assert math.isclose(value, VOCABULARY, rel_tol=1e-6)


def test_a_peer_that_ends_is_named(environment: Path) -> None:
    with pytest.raises(SystemExit, match=r"llama\.cpp ended with 1; run its script by itself"):
        Peer(environment, environment / "m.onnx", 256, 1)


def test_nothing_is_built_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(tmp_path / "m.gguf"), "--peer", str(tmp_path)])
    assert "has no llama.cpp; --build makes it, --peer names another environment" in capsys.readouterr().err
