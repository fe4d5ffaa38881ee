"""A learned pass from the command line: training, budget, replay, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import Result
from onnx import parser

Cli = Callable[..., Result]

TEXT = """<ir_version: 11, opset_import: ["" : 23]> g (float[B, S, 8] x) => (float[B, S, 8] y)
{
    q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv)
    a = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v) y = MatMul (a, wo)
}"""
SHORT = "softplus-attention:block_steps=6:steps=4:batch=8"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and inputs for it."""
    random = np.random.default_rng(0)
    proto = parser.parse_model(TEXT)
    for name in ("wq", "wk", "wv", "wo"):
        array = (random.standard_normal((8, 8)) * 0.4).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(onnx.shape_inference.infer_shapes(proto), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=random.standard_normal((40, 1, 6, 8)).astype(np.float32))
    return tmp_path / "m.onnx", tmp_path / "x.npz"


@pytest.mark.torch
@pytest.mark.tvm
def test_an_artifact_learns_and_its_recorded_pipeline_gives_the_same_model(
    cli: Cli, files: tuple[Path, Path], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    model, inputs = files
    out, again = tmp_path / "out", tmp_path / "again"
    done = cli("optimize", model, "--passes", SHORT, "--calibration", inputs, "--target", "cpu", "-o", out)
    assert "quality: 1 - cosine of y" in done.stdout and "on 4 held-out samples (no budget" in done.stdout
    pipeline = json.loads((out / "manifest.json").read_text())["pipeline"]
    assert f"softplus-attention:weights={out}.softplus-attention.npz:" in pipeline
    last = pipeline.rpartition(",")[2]
    repeated = cli("optimize", model, "--passes", last, "--target", "cpu", "-o", again, "--json")
    assert json.loads(repeated.stdout)["quality"] is None  # no inputs to measure it on
    assert (again / "model.onnx").read_bytes() == (out / "model.onnx").read_bytes()
    assert (again / "weights.bin").read_bytes() == (out / "weights.bin").read_bytes()


@pytest.mark.torch
def test_a_budget_that_is_not_met_leaves_the_weights_and_no_model(
    cli: Cli, files: tuple[Path, Path], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    model, inputs = files
    out = tmp_path / "o.onnx"
    common = ("optimize", model, "--calibration", inputs, "--max-drop", "1e-9", "-o", out)
    result = cli(*common, "--passes", SHORT, expect=4)
    assert "drops by" in result.stderr and not out.exists()
    assert (tmp_path / "o.onnx.softplus-attention.npz").is_file()
    assert "exists" in cli(*common, "--passes", SHORT, expect=1).stderr


def test_without_inputs_it_refuses_in_one_line(cli: Cli, files: tuple[Path, Path]) -> None:
    result = cli("optimize", files[0], "--passes", "softplus-attention", expect=1)
    assert result.stderr.count("\n") == 1
    assert "pass softplus-attention needs inputs to learn from" in result.stderr
    assert "give --calibration, weights=FILE.npz of an earlier run, or recover=none" in result.stderr


def test_a_dry_run_and_explain_learn_nothing(cli: Cli, files: tuple[Path, Path]) -> None:
    model, _ = files
    assert "fired" in cli("optimize", model, "--passes", "softplus-attention", "--dry-run").stdout
    assert "fires at 1 site" in cli("explain", model, "--pass", "softplus-attention:variant=lssa").stdout
    assert [path.name for path in sorted(model.parent.iterdir())] == ["m.onnx", "x.npz"]


def test_where_torch_is_missing_the_extra_is_named(
    cli: Cli, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("fit", "torch_graph", "torch_layers", "torch_operators"):
        monkeypatch.delitem(sys.modules, f"graphwright.models.{name}", raising=False)
    import graphwright.models

    monkeypatch.delattr(graphwright.models, "fit", raising=False)
    model, inputs = files
    result = cli("optimize", model, "--passes", SHORT, "--calibration", inputs, expect=1)
    assert "training needs torch, which is not installed: run `pip install 'graphwright[models]'`" in result.stderr
