"""`dynaquant` from the command line: one command, its recorded pipeline, its refusals; and real models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import Result
from graphwright.models import registry
from graphwright.passes import io
from graphwright.runtime import driver
from graphwright.runtime.reference import Reference
from onnx import numpy_helper, parser

Cli = Callable[..., Result]

TEXT = """<ir_version: 10, opset_import: ["" : 20]> g (float[B, 32] x) => (float[B, 32] y)
{ a = MatMul (x, w1) h = Relu (a) y = MatMul (h, w2) }"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and inputs for it."""
    random = np.random.default_rng(0)
    proto = parser.parse_model(TEXT)
    for name in ("w1", "w2"):
        array = (random.standard_normal((32, 32)) * 0.2).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.save(onnx.shape_inference.infer_shapes(proto), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=random.standard_normal((40, 1, 32)).astype(np.float32))
    return tmp_path / "m.onnx", tmp_path / "x.npz"


def test_one_command_and_the_pipeline_that_it_records(cli: Cli, files: tuple[Path, Path], tmp_path: Path) -> None:
    model, inputs = files
    out, again = tmp_path / "q.onnx", tmp_path / "again.onnx"
    done = cli("optimize", model, "--passes", "dynaquant", "--calibration", inputs, "-o", out, "-v")
    assert "8-bit weights, 8-bit data; result" in done.stdout and "dB above its error" in done.stdout
    assert "quality: 1 - cosine of y" in done.stdout and "on 4 held-out samples" in done.stdout
    cli("optimize", model, "--passes", f"dynaquant:plan={out}.dynaquant.npz", "-o", again)
    assert again.read_bytes() == out.read_bytes()
    operators = [node.op_type for node in io.load(out).graph]
    assert operators.count("QuantizeLinear") == 2 and operators.count("DequantizeLinear") == 4


def test_with_a_budget_of_nothing_everything_stays_in_float(cli: Cli, files: tuple[Path, Path], tmp_path: Path) -> None:
    model, inputs = files
    out = tmp_path / "q.onnx"
    common = ("optimize", model, "--passes", "dynaquant:weights=4:group=0", "--calibration", inputs, "-o", out)
    done = cli(*common, "--max-drop", "0", "-v")
    assert "by itself it costs" in done.stdout
    assert not any(node.op_type == "QuantizeLinear" for node in io.load(out).graph)


def test_refusals_are_one_line(cli: Cli, files: tuple[Path, Path]) -> None:
    model, inputs = files
    result = cli("optimize", model, "--passes", "dynaquant", expect=1)
    assert result.stderr.count("\n") == 1 and "activations=none for the weights alone" in result.stderr
    result = cli("optimize", model, "--passes", "dynaquant:weights=3", "--calibration", inputs, expect=2)
    assert result.stderr.count("\n") == 1 and "weights is 3, must be 4, 6 or 8" in result.stderr
    np.savez(inputs, z=np.zeros((3, 1, 32), np.float32))
    result = cli("optimize", model, "--passes", "dynaquant", "--calibration", inputs, expect=1)
    assert result.stderr.count("\n") == 1 and "the model has no input 'z'" in result.stderr


def test_a_dry_run_and_explain_measure_nothing(cli: Cli, files: tuple[Path, Path]) -> None:
    model, _ = files
    assert "fired" in cli("optimize", model, "--passes", "dynaquant", "--dry-run").stdout
    assert "fires at 2 site" in cli("explain", model, "--pass", "dynaquant").stdout
    assert [path.name for path in sorted(model.parent.iterdir())] == ["m.onnx", "x.npz"]


@pytest.mark.tvm
def test_a_compiled_table_is_bytes_and_its_rows_are_those_of_the_file(cli: Cli, tmp_path: Path) -> None:
    from graphwright.runtime.artifact import Artifact
    from graphwright.runtime.session import Session

    proto = parser.parse_model("""<ir_version: 10, opset_import: ["" : 20]> g (int64[B, S] i) => (float[B, S, 600] y)
    { x = Gather (w, i) h = Relu (x) t = Transpose <perm = [1, 0]> (w) y = MatMul (h, t) }""")
    w = np.random.default_rng(0).standard_normal((600, 32)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(w, "w"))
    onnx.save(onnx.shape_inference.infer_shapes(proto), tmp_path / "m.onnx")
    passes = ("--passes", "dynaquant:activations=none")
    cli("optimize", tmp_path / "m.onnx", *passes, "-o", tmp_path / "q.onnx")
    cli("optimize", tmp_path / "m.onnx", *passes, "--target", "cpu", "-o", tmp_path / "out")
    manifest = Artifact.load(tmp_path / "out").manifest
    assert [region.runtime for region in manifest.regions] == ["tvm"]
    assert all(parameter.nbytes < 2 * w.size for region in manifest.regions for parameter in region.parameters)
    compiled, stored = Session(tmp_path / "out"), Reference(io.load(tmp_path / "q.onnx"))
    for shape in ((1, 1), (2, 5), (3, 1)):
        index = np.random.default_rng(1).integers(-600, 600, shape)
        expected = stored.run({"i": index})["y"]
        np.testing.assert_allclose(compiled.run(None, {"i": index})[0], expected, atol=1e-5 * np.abs(expected).max())


def measured(path: Path, name: str, passes: str, count: int, tmp_path: Path) -> tuple[driver.Result, ir.Model]:
    feeds = [registry.sample_inputs(name, seed) for seed in range(count)]
    calibration = {key: [one[key] for one in feeds] for key in feeds[0]}
    done = driver.optimize(path, passes, out=tmp_path / "q.onnx", calibration=calibration)
    return done, io.load(tmp_path / "q.onnx")


@pytest.mark.slow
@pytest.mark.torch
def test_mobilenet(exported: Callable[..., Path], tmp_path: Path) -> None:
    done, model = measured(exported("mobilenet-v2"), "mobilenet-v2", "dynaquant", 3, tmp_path)
    assert done.quality is not None and done.quality.drop < 0.01
    report = done.reports[-1]
    assert report.stats["layers"] == 53 and not report.skips
    # Sums of images and the average are on codes: every convolution, sum and average reads DequantizeLinear.
    for node in model.graph:
        if node.op_type in ("Conv", "Add", "ReduceMean", "GlobalAveragePool", "Gemm"):
            source = node.inputs[0].producer()
            assert source is not None and source.op_type in ("DequantizeLinear", "Reshape", "Flatten"), node.name


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.assets
def test_minilm(exported: Callable[..., Path], tmp_path: Path) -> None:
    done, model = measured(exported("minilm"), "minilm", "dynaquant", 4, tmp_path)
    assert done.quality is not None and done.quality.drop < 0.01
    assert done.reports[-1].stats["layers"] == 36 and done.reports[-1].stats["tables"] == 1
    assert io.weights_nbytes(model) < 24e6
    feeds = registry.sample_inputs("minilm", 9)
    assert np.isfinite(Reference(model).run(feeds)["sentence_embedding"]).all()
