"""`bf16` on real models: files and artifacts, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

pytestmark = [pytest.mark.tvm, pytest.mark.torch, pytest.mark.assets, pytest.mark.slow]



def test_minilm(exported: Callable[..., Path], cli: Callable[..., Result], tmp_path: Path) -> None:
    """Half as large in a file, and equal when it is compiled; the ranking of sentences stays."""
    from graphwright.tools.bench_dynaquant import session_of
    from graphwright.tools.recover_minilm import pair_cosines, sentences, spearman

    source, out = exported("minilm"), tmp_path / "m.onnx"
    cli("optimize", source, "--passes", "bf16", "-o", out)
    assert out.stat().st_size < 0.51 * source.stat().st_size
    lines = sentences(400, 0)
    old, new = (pair_cosines(session_of(path, 2), lines) for path in (source, out))
    assert spearman(old, new) > 0.9995
    done = cli("optimize", out, "--target", "cpu", "-o", tmp_path / "a")
    assert "equal" in done.stdout
    (region,) = json.loads((tmp_path / "a" / "manifest.json").read_text())["regions"]
    assert region["runtime"] == "tvm"
    # Packed weights lie beside those of the rewritten model, both in 16 bits.
    assert (tmp_path / "a" / "weights.bin").stat().st_size < 0.8 * source.stat().st_size
