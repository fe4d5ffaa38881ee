"""What a user can do wrong: each ends in one clear line, the right exit code, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import Result
from onnx import TensorProto, helper, numpy_helper

Cli = Callable[..., Result]
Write = Callable[..., Path]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refused(cli: Cli, message: str, *arguments: object, folder: Path, code: int = 1) -> None:
    """The command fails with one line that matches, prints no result, and leaves the folder as it was."""
    before = files(folder)
    result = cli(*arguments, expect=code)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    assert re.search(message, result.stderr), result.stderr
    assert files(folder) == before


def with_external(path: Path, location: str) -> Path:
    """A model of one MatMul whose 8 x 4 weights are said to lie at `location`."""
    weights = TensorProto(name="w", dims=[8, 4], data_type=TensorProto.FLOAT)
    weights.data_location = TensorProto.EXTERNAL
    weights.external_data.add(key="location", value=location)
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", size]) for n, size in (("x", 8), ("y", 4)))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weights])
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString())
    return path


# --- the model file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["optimize"], ["doctor"], ["models", "info"], ["explain", "--pass", "simplify"]])
def test_a_file_that_is_not_there(cli: Cli, model: Path, command: list[str]) -> None:
    missing = model.with_name("modle.onnx")
    refused(cli, r"modle.onnx: no such file; did you mean model.onnx\?", *command, missing, folder=model.parent)


def test_a_folder_instead_of_a_file(cli: Cli, tmp_path: Path) -> None:
    refused(cli, "is a folder; expected an ONNX file", "optimize", tmp_path, folder=tmp_path)


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.99])
def test_a_truncated_file(cli: Cli, model: Path, keep: float) -> None:
    data = model.read_bytes()
    model.write_bytes(data[: int(len(data) * keep)])
    refused(cli, r"model.onnx: .*(cut short|truncated|damaged|ends at byte)", "optimize", model, folder=model.parent)


@pytest.mark.parametrize("content", [b"this is no model\n" * 40, b"\x89PNG\r\n\x1a\n" + bytes(300), b"{}", b""])
def test_a_file_that_is_no_protobuf(cli: Cli, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    refused(cli, r"model.onnx: .*(ONNX|empty)", "optimize", path, folder=tmp_path)


def test_a_cyclic_graph(cli: Cli, tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "b")]
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:])), path)
    refused(cli, r"the graph has a cycle through node 'a' \(Add\)", "optimize", path, folder=tmp_path)


def test_duplicate_value_names(cli: Cli, tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["y"])]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:])), path)
    refused(cli, "the value name 'y' is defined twice; rename one of them", "optimize", path, folder=tmp_path)


def test_duplicate_inputs_and_initializers(cli: Cli, model: Path) -> None:
    original = onnx.load(model)
    proto = onnx.load(model)
    proto.graph.input.append(proto.graph.input[0])
    onnx.save(proto, model)
    refused(cli, "two inputs share the name 'x'; rename one", "optimize", model, folder=model.parent)
    proto = original
    proto.graph.initializer.append(proto.graph.initializer[0])
    onnx.save(proto, model)
    refused(cli, "two initializers share the name 'w'; rename one", "optimize", model, folder=model.parent)


def test_an_unknown_operator_domain(cli: Cli, write: Write) -> None:
    header = '<ir_version: 10, opset_import: ["" : 20, "com.acme" : 1]>'
    path = write("agraph (float[2] x) => (float[2] y) { y = com.acme.Thing(x) }", header=header)
    message = "com.acme::Thing, an operator domain nobody here knows; add its function body"
    refused(cli, message, "optimize", path, folder=path.parent)


def test_an_unknown_operator(cli: Cli, tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Softmx", ["x"], ["y"])], "g", values[:1], values[1:])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    refused(cli, r"has no operator 'Softmx'; did you mean Softmax", "optimize", path, folder=tmp_path)


def test_a_value_that_nothing_defines(cli: Cli, tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "ghost"], ["y"])], "g", values[:1], values[1:])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph), path)
    refused(cli, "reads 'ghost', which nothing defines", "optimize", path, folder=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a () => () { c = Constant <value_int = 1> () }", "the graph has no outputs; expected at least one"),
        (
            "a (float[1099511627776,N,1099511627776] x) => (float[A,B,C] y) { y = Relu (x) }",
            r"'x' has an impossible shape \[1099511627776, 'N', 1099511627776\]; expected at most 2\^48 elements",
        ),
        (
            "a (float[2,5] x, float[4,4] w) => (float[2,4] y) { y = MatMul (x, w) }",
            r"onnxruntime cannot load the model: Node \(\) Op \(MatMul\) .*Incompatible dimensions",
        ),
    ],
)
def test_a_graph_that_cannot_run(cli: Cli, write: Write, text: str, message: str) -> None:
    path = write(text)
    refused(cli, f"^error: {path}: {message}", "optimize", path, folder=path.parent)


def test_an_input_without_an_element_type(cli: Cli, model: Path) -> None:
    proto = onnx.load(model)
    proto.graph.input[0].type.tensor_type.ClearField("elem_type")
    onnx.save(proto, model)
    refused(cli, "input 'x' has no element type; expected one", "optimize", model, folder=model.parent)


def test_a_version_of_the_format_that_nobody_knows(cli: Cli, write: Write) -> None:
    path = write("a (float[2] x) => (float[2] y) { y = Relu (x) }", header='<ir_version: 99, opset_import: ["" : 20]>')
    message = r"model.onnx: IR version 99 is not known; expected at most \d+"
    refused(cli, message, "optimize", path, folder=path.parent)


# --- external data ----------------------------------------------------------------------------------------------


def test_external_data_that_is_missing(cli: Cli, tmp_path: Path) -> None:
    path = with_external(tmp_path / "model.onnx", "weights.bin")
    refused(cli, "external data 'weights.bin' is missing; put it beside", "optimize", path, folder=tmp_path)


def test_external_data_that_is_short(cli: Cli, tmp_path: Path) -> None:
    path = with_external(tmp_path / "model.onnx", "weights.bin")
    (tmp_path / "weights.bin").write_bytes(bytes(100))
    refused(cli, r"needs 128 bytes; found 128 at offset 0 of .*, which has 100", "optimize", path, folder=tmp_path)


@pytest.mark.parametrize("kind", ["relative", "absolute", "link"])
def test_external_data_outside_the_folder(cli: Cli, tmp_path: Path, kind: str) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(128))
    folder = tmp_path / "model"
    folder.mkdir()
    location = {"relative": "../secret.bin", "absolute": str(secret), "link": "link.bin"}[kind]
    if kind == "link":
        (folder / "link.bin").symlink_to(secret)
    path = with_external(folder / "model.onnx", location)
    message = f"points to {re.escape(repr(location))}, outside the model's folder; move the data beside the model"
    refused(cli, message, "optimize", path, folder=tmp_path)


# --- pins -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pin", "message"),
    [
        ("z=2x8", "no input is called 'z'"),
        ("x=2x8x1", "has 3 dimensions, the input has 2"),
        ("x=2x9", "dimension 1 is 8 in the model, not 9"),
    ],
)
def test_a_wrong_pin(cli: Cli, model: Path, pin: str, message: str) -> None:
    refused(cli, message, "optimize", model, "--pin", pin, folder=model.parent)


def test_a_pin_that_is_no_shape(cli: Cli, model: Path) -> None:
    message = "'a' in '2xa' is not a size; write sizes as in 1x3x224x224"
    refused(cli, message, "optimize", model, "--pin", "x=2xa", folder=model.parent, code=2)


# --- outputs ----------------------------------------------------------------------------------------------------


def test_an_output_that_exists(cli: Cli, model: Path) -> None:
    out = model.with_name("model.opt.onnx")
    out.write_text("precious")
    refused(cli, "already exists; give --overwrite", "optimize", model, "--preset", "none", folder=model.parent)
    assert out.read_text() == "precious"
    cli("optimize", model, "--preset", "none", "--overwrite")
    onnx.checker.check_model(onnx.load(out))


def test_an_artifact_folder_that_exists(cli: Cli, model: Path) -> None:
    out = model.with_name("model.arm64")
    out.mkdir()
    (out / "precious").write_text("precious")
    arguments = ("compile", model, "--target", "arm64")
    refused(cli, "already exists; give --overwrite", *arguments, folder=model.parent)
    message = "is not an artifact folder and will not be replaced; choose another output"
    refused(cli, message, *arguments, "--overwrite", "--no-verify", folder=model.parent)


@pytest.mark.parametrize("name", ["model.onnx", "link.onnx"])
def test_the_model_is_never_replaced_by_its_result(cli: Cli, model: Path, name: str) -> None:
    data = model.read_bytes()
    model.with_name("link.onnx").symlink_to(model)
    message = "is read by this run and will not be replaced; choose another output"
    refused(cli, message, "optimize", model, "-o", model.with_name(name), "--overwrite", folder=model.parent)
    assert model.read_bytes() == data


def test_the_weights_are_never_replaced_by_the_result(cli: Cli, tmp_path: Path) -> None:
    """A result above 1 GiB would be written with its weights in `out.onnx.data`, which this model reads."""
    path = with_external(tmp_path / "model.onnx", "out.onnx.data")
    (tmp_path / "out.onnx.data").write_bytes(np.ones(32, np.float32).tobytes())
    message = "out.onnx.data: is read by this run and will not be replaced"
    refused(cli, message, "optimize", path, "-o", tmp_path / "out.onnx", "--overwrite", folder=tmp_path)


@pytest.mark.parametrize("target", [None, "arm64"])
def test_an_output_that_cannot_be_written(cli: Cli, model: Path, target: str | None) -> None:
    """Below a file there can be no folder, for root neither."""
    out = model / "sub" / "out"
    arguments = ["optimize", model, "--preset", "none", "--no-verify", "-o", out]
    arguments += ["--target", target] if target else []
    refused(cli, r"cannot be written \(.*\); choose another output", *arguments, folder=model.parent)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(cli: Cli, model: Path) -> None:
    model.parent.chmod(0o555)
    try:
        refused(cli, "cannot be written", "optimize", model, "--preset", "none", folder=model.parent)
    finally:
        model.parent.chmod(0o755)


def test_a_report_of_an_unknown_kind(cli: Cli, model: Path) -> None:
    message = r"unknown kind '.txt'; expected .html or .json"
    refused(cli, message, "optimize", model, "--report", "r.txt", folder=model.parent, code=2)


def test_a_report_that_exists(cli: Cli, model: Path) -> None:
    report = model.with_name("r.json")
    report.write_text("{}")
    refused(cli, "r.json: already exists", "optimize", model, "--report", report, folder=model.parent)


@pytest.mark.parametrize("option", ["--dump", "--report"])
@pytest.mark.parametrize("place", ["model.onnx", "model.onnx/sub", "/proc/sub"])
def test_a_by_product_that_cannot_be_written(cli: Cli, model: Path, option: str, place: str) -> None:
    """Found before any work is done: the model is not written either."""
    path = model.parent / place / ("r.html" if option == "--report" else "")
    message = rf"{place}: cannot be written \(.*\); choose another output"
    refused(cli, message, "optimize", model, "--preset", "none", option, path, folder=model.parent)


def test_no_model_at_all(cli: Cli, tmp_path: Path) -> None:
    refused(cli, "no model; write optimize MODEL.onnx", "optimize", folder=tmp_path, code=2)


# --- what is not installed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "package"), [("ray", "ray"), ("dask", "distributed")])
def test_a_backend_that_is_not_installed(
    cli: Cli, model: Path, backend: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    message = f"--backend {backend}: .*not installed; pip install {package}, or use local"
    refused(cli, message, "optimize", model, "--backend", backend, folder=model.parent, code=2)


# --- artifacts --------------------------------------------------------------------------------------------------


@pytest.mark.tvm
@pytest.mark.parametrize("kind", ["library", "weights", "model", "manifest"])
def test_a_tampered_artifact(cli: Cli, artifact: Path, inputs: Path, kind: str) -> None:
    """One bit is enough, wherever it is."""
    patterns = {"library": "region*.so", "weights": "weights.bin", "model": "model.onnx", "manifest": "manifest.json"}
    (path,) = artifact.glob(patterns[kind])
    if kind == "manifest":
        data = json.loads(path.read_text())
        data["regions"][0]["inputs"] = ["z"]
        path.write_text(json.dumps(data))
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    for command in (["run", artifact, "--input", inputs], ["compare", artifact, artifact], ["bench", artifact]):
        refused(cli, rf"{path.name}: was altered since", *command, folder=artifact.parent)


@pytest.mark.tvm
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", "{", "manifest.json: cannot be read .*; compile the model again"),
        ("manifest.json", '{"schema_version": 99}', "schema version 99; expected 2, compile the model again"),
        ("manifest.json", '{"schema_version": 2}', "manifest.json: damaged"),
        ("manifest.json", None, "no manifest.json in it; expected an artifact folder"),
        ("weights.bin", None, "weights.bin: is missing"),
        ("weights.bin", "short", "weights.bin: was altered since"),
    ],
)
def test_a_damaged_artifact(
    cli: Cli, artifact: Path, inputs: Path, name: str, content: str | None, message: str
) -> None:
    if content is None:
        (artifact / name).unlink()
    else:
        (artifact / name).write_text(content)
    refused(cli, message, "run", artifact, "--input", inputs, folder=artifact.parent)


# --- inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((2, 9), np.float32)}, r"in.npz: input 'x' has shape \[2, 9\]; expected \["),
        ({"x": np.zeros((2, 8), np.float64)}, "refused these inputs"),
        ({"q": np.zeros((2, 8), np.float32)}, "has no input 'q'"),
        ({}, "input 'x' is missing"),
    ],
)
def test_inputs_that_do_not_fit(cli: Cli, model: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    file = model.with_name("in.npz")
    np.savez(file, **arrays)
    refused(cli, message, "run", model, "--input", file, folder=model.parent)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "in.npz: no such file"), (b"text", "in.npz: cannot be read as .npz")]
)
def test_inputs_that_are_no_npz(cli: Cli, model: Path, content: bytes | None, message: str) -> None:
    file = model.with_name("in.npz")
    if content is not None:
        file.write_bytes(content)
    refused(cli, message, "run", model, "--input", file, folder=model.parent)


@pytest.mark.parametrize("limit", ["nan", "-1"])
def test_a_limit_that_is_none(cli: Cli, model: Path, limit: str) -> None:
    refused(cli, "is not in the range x>=0", "compare", model, model, "--limit", limit, folder=model.parent, code=2)


def test_an_npz_of_one_array(cli: Cli, model: Path) -> None:
    np.save(model.with_name("in.npy"), np.zeros(3))
    refused(cli, "holds one array", "run", model, "--input", model.with_name("in.npy"), folder=model.parent)


def test_a_tensor_whose_bytes_do_not_fit(cli: Cli, model: Path) -> None:
    proto = onnx.load(model)
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((8, 4), np.float32), "w"))
    proto.graph.initializer[0].dims[0] = 80
    onnx.save(proto, model)
    refused(
        cli, r"tensor 'w' of shape \[80, 4\] holds 128 bytes; expected 1280", "optimize", model, folder=model.parent
    )
