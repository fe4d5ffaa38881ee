"""Artifacts that share one weights file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from graphwright.passes.errors import ArtifactError
from graphwright.passes.pipeline import Pipeline
from graphwright.passes.registry import preset
from graphwright.runtime.build import build
from graphwright.runtime.reference import ort_session
from graphwright.runtime.session import Session
from graphwright.runtime.sharing import share_weights
from graphwright.runtime.target import Target
from onnx import helper, numpy_helper

import graphwright


def product(rows: int | str, seed: int = 0) -> ir.Model:
    """x · w + b, the same weights for the same seed; `w` is large enough for the weights file of the model too."""
    draw = np.random.default_rng(seed)
    weights = {"w": draw.standard_normal((300, 500), np.float32), "b": draw.standard_normal(500, np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [rows, d]) for n, d in (("x", 300), ("y", 500))]
    graph = helper.make_graph(
        nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(a, name) for name, a in weights.items()]
    )
    return ir.serde.deserialize_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))


def test_equal_weights_are_held_once(tmp_path: Path) -> None:
    models = {"many": product("m"), "one": product(1), "other": product("m", 1)}
    for name, model in models.items():
        build(model, Target.named("cpu"), tmp_path / name)
    alone = [(tmp_path / name / "weights.bin").stat().st_size for name in models]
    share_weights(tmp_path, list(models))
    files = [tmp_path / name / "weights.bin" for name in models]
    assert len({file.stat().st_ino for file in files}) == 1
    assert files[0].stat().st_size < alone[0] + alone[2] + 4096
    assert {path.name for path in tmp_path.iterdir()} == set(models)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in models:
        shutil.move(tmp_path / name, moved / name)
    sessions = {name: graphwright.load(moved / name) for name in models}  # checks every hash
    x = np.random.default_rng(2).standard_normal((1, 300), np.float32)
    for name, model in models.items():
        expected = ort_session(model).run(None, {"x": x})[0]
        path = str(moved / name / "model.onnx")
        for session in (sessions[name], onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])):
            np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, atol=1e-4)
    many, one, other = (_weights(sessions[name]) for name in models)
    assert np.shares_memory(many, one) and not np.shares_memory(many, other)


def _weights(session: Session) -> np.ndarray:
    return max(session._steps[0]._arrays, key=lambda a: a.nbytes)  # type: ignore[attr-defined]


def test_a_shared_file_that_was_altered_is_found(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build(product(1), Target.named("cpu"), tmp_path / name)
    share_weights(tmp_path, ["a", "b"])
    with open(tmp_path / "a" / "weights.bin", "r+b") as file:
        file.write(b"altered")
    for name in ("a", "b"):
        with pytest.raises(ArtifactError, match="altered"):
            graphwright.load(tmp_path / name)


def test_a_tied_embedding_of_16_bits_is_held_in_rows_once(tmp_path: Path) -> None:
    """What gathers read is the rewritten models' own table; beside it lie the head's panels, for both artifacts."""
    table = np.random.default_rng(0).standard_normal((512, 96)).astype(ml_dtypes.bfloat16)
    for name, rows in (("many", "s"), ("one", "1")):
        text = (
            f'<ir_version: 11, opset_import: ["": 21]> g (int64[1,{rows}] i) => (float[1,{rows},512] y) '
            "{ w = Cast<to=1>(n) x = Gather(w, i) t = Transpose<perm=[1, 0]>(w) y = MatMul(x, t) }"
        )
        model = onnx.parser.parse_model(text)
        model.graph.initializer.append(numpy_helper.from_array(table, "n"))
        rewritten, _ = Pipeline.parse(preset("compile")).run(ir.serde.deserialize_model(model))
        build(rewritten, Target.named("cpu"), tmp_path / name)
    share_weights(tmp_path, ["many", "one"])
    assert (tmp_path / "one" / "weights.bin").stat().st_size < 2 * table.nbytes + 2 * 4096
    for name in ("many", "one"):
        (stored,) = onnx.load(tmp_path / name / "model.onnx", load_external_data=False).graph.initializer
        (region,) = json.loads((tmp_path / name / "manifest.json").read_text())["regions"]
        offset = next(int(entry.value) for entry in stored.external_data if entry.key == "offset")
        assert offset in [parameter["offset"] for parameter in region["parameters"]]
