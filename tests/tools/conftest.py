"""Small models on disk, and the commands called as a user calls them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from graphwright.tools.cli import main
from onnx import numpy_helper, parser

TEXT = """<ir_version: 10, opset_import: ["" : 20]>
mlp (float[N,8] x) => (float[N,4] y)
{
  h = MatMul(x, w)
  r = Relu(h)
  i = Identity(r)
  y = Softmax<axis=-1>(i)
}"""


def mlp() -> onnx.ModelProto:
    """A small classifier with a dynamic batch: MatMul, Relu, Identity, Softmax."""
    model = parser.parse_model(TEXT)
    weights = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    return model


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`cli("optimize", "m.onnx", ...)` with stdout and stderr apart; a defect of ours is raised."""
    # A command that only runs artifacts leaves TVM's compiler out, which later tests of this process need.
    monkeypatch.setattr("graphwright.runtime.tvm_import.runtime_alone", lambda: None)

    def run(*arguments: object, expect: int = 0) -> Result:
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == expect, f"exit {result.exit_code}, not {expect}\n{result.output}"
        return result

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The small classifier as model.onnx in an otherwise empty folder."""
    path = tmp_path / "model.onnx"
    onnx.save(mlp(), path)
    return path


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write("agraph (float[2] x) => ...")` puts a model in ONNX text on disk."""

    def save(text: str, name: str = "model.onnx", header: str = '<ir_version: 10, opset_import: ["" : 20]>') -> Path:
        path = tmp_path / name
        onnx.save(parser.parse_model(f"{header}\n{text}"), path)
        return path

    return save


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Inputs for the small classifier."""
    path = tmp_path / "in.npz"
    np.savez(path, x=np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8))
    return path


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small classifier compiled for this machine, once. Do not change it: take `artifact`."""
    pytest.importorskip("tvm")
    from graphwright.runtime.driver import optimize

    folder = tmp_path_factory.mktemp("built")
    onnx.save(mlp(), folder / "model.onnx")
    optimize(folder / "model.onnx", target="cpu", out=folder / "artifact")
    return folder / "artifact"


@pytest.fixture
def artifact(built: Path, tmp_path: Path) -> Path:
    """A copy of the compiled classifier."""
    return Path(shutil.copytree(built, tmp_path / "artifact"))
