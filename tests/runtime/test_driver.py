"""`optimize` on models at the edge of what can be checked or compiled."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphwright.passes.errors import InputError, ModelError, VerificationError
from graphwright.runtime import device, tvm_step, worker
from onnx import TensorProto, helper, numpy_helper, parser

import graphwright

HEADER = '<ir_version: 10, opset_import: ["" : 20]>'


def write(path: Path, text: str, **weights: np.ndarray) -> Path:
    model = parser.parse_model(f"{HEADER}\ng {text}")
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    onnx.save(model, path)
    return path


@pytest.mark.tvm
def test_what_the_compiler_gets_wrong_runs_on_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.onnx", "(float[N,4] x) => (float[N,4] y) { y = Tanh(x) }")
    right = tvm_step.TvmStep.__call__

    def wrong(self: Any, values: Mapping[str, Any], state: Any = None) -> dict[str, Any]:
        return {name: array + 1 for name, array in right(self, values, state).items()}

    monkeypatch.setattr(tvm_step.TvmStep, "__call__", wrong)
    result = graphwright.optimize(path, target="cpu", out=tmp_path / "out")
    assert result.verdict is not None and result.verdict.ok
    (region,) = result.artifact.manifest.regions
    assert region.runtime == "onnxruntime" and "TVM and onnxruntime differ: artifact" in region.reasons["y"]


class InProcess(worker.Compiler):
    """A compiler in this process, which a test can make mistakes in."""

    def _ask(self, request: tuple[Any, ...], timeout: float) -> Any:
        name, *arguments = request
        return worker.REQUESTS[name](*arguments)


def mistaken(monkeypatch: pytest.MonkeyPatch, *ops: str) -> None:
    """Let the compiler add 1/8 to the results of these operators."""
    from graphwright.runtime import importer
    from tvm import relax

    monkeypatch.setattr(worker.Compiler, "shared", lambda: InProcess())
    right = importer._Importer.convert

    def wrong(self: Any, node: onnx.NodeProto, inputs: Any, scope: Any) -> Any:
        results = right(self, node, inputs, scope)
        if node.op_type not in ops:
            return results
        first = getattr(results[0], "expr", results[0])
        return [relax.op.add(self.bb.emit(first), relax.const(0.125, "float32"))]

    monkeypatch.setattr(importer._Importer, "convert", wrong)


CHAIN = """(float[4,8] x) => (float[4,8] y) {
    a = Relu (x)
    b = Sigmoid (x)
    c = Mul (a, b)
    d = Tanh (c)
    e = Add (d, x)
    f = Neg (e)
    y = Exp (f)
}"""


@pytest.mark.tvm
def test_only_the_node_that_is_compiled_wrongly_runs_on_onnxruntime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mistaken(monkeypatch, "Tanh")
    result = graphwright.optimize(write(tmp_path / "m.onnx", CHAIN), target="cpu", out=tmp_path / "out")
    assert result.verdict is not None and result.verdict.ok
    reasons = {at: reason for region in result.artifact.manifest.regions for at, reason in region.reasons.items()}
    assert list(reasons) == ["d"] and "TVM and onnxruntime differ: " in reasons["d"]
    assert result.artifact.native_nodes == (6, 7)
    assert "d (Tanh) makes the difference; onnxruntime runs it" in caplog.text


@pytest.mark.tvm
def test_two_nodes_that_are_compiled_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mistaken(monkeypatch, "Tanh", "Sigmoid")
    result = graphwright.optimize(write(tmp_path / "m.onnx", CHAIN), target="cpu", out=tmp_path / "out")
    assert result.verdict is not None and result.verdict.ok
    assert result.artifact.native_nodes == (5, 7)


@pytest.mark.tvm
def test_when_too_many_are_wrong_onnxruntime_runs_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mistaken(monkeypatch, "Tanh", "Sigmoid")
    monkeypatch.setattr("graphwright.runtime.driver.MOST_BLAMED", 1)
    result = graphwright.optimize(write(tmp_path / "m.onnx", CHAIN), target="cpu", out=tmp_path / "out")
    assert result.verdict is not None and result.verdict.ok
    assert result.artifact.native_nodes == (0, 7)


def clock(monkeypatch: pytest.MonkeyPatch, trials: int) -> None:
    """Let the time for searches be over after so many trials."""
    from graphwright.runtime import culprit

    asked = []

    class Clock:
        @staticmethod
        def monotonic() -> float:
            asked.append(1)
            return 0.0 if len(asked) <= trials else 1e9

    monkeypatch.setattr(culprit, "time", Clock)
    monkeypatch.setattr("graphwright.runtime.driver.time", type("Start", (), {"monotonic": lambda: 0.0}))


@pytest.mark.tvm
@pytest.mark.parametrize(("trials", "left"), [(0, 7), (1, 4), (2, 2)])
def test_when_the_time_is_over_onnxruntime_runs_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trials: int, left: int
) -> None:
    """Of seven nodes the fourth is wrong: each trial halves those that may be."""
    mistaken(monkeypatch, "Tanh")
    clock(monkeypatch, trials)
    result = graphwright.optimize(write(tmp_path / "m.onnx", CHAIN), target="cpu", out=tmp_path / "out")
    assert result.verdict is not None and result.verdict.ok
    assert result.artifact.native_nodes == (7 - left, 7)
    said = {
        7: "onnxruntime runs the whole model instead",
        4: "one of the 4 nodes from d (Tanh) to y (Exp) makes the difference; onnxruntime runs all of them",
        2: "one of the 2 nodes from d (Tanh) to e (Add) makes the difference; onnxruntime runs all of them",
    }
    assert said[left] in caplog.text


@pytest.mark.tvm
def test_the_time_is_that_of_all_searches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three trials find the first of two wrong nodes; nothing is left for the second."""
    mistaken(monkeypatch, "Tanh", "Sigmoid")
    clock(monkeypatch, 3)
    result = graphwright.optimize(write(tmp_path / "m.onnx", CHAIN), target="cpu", out=tmp_path / "out")
    assert result.verdict is not None and result.verdict.ok
    assert result.artifact.native_nodes == (0, 7)


def emulated_by(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a shell script be the runner of artifacts for other processors."""
    program = tmp_path / "runner"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)

    class Emulator(device.LocalDevice):
        runner = program  # type: ignore[assignment]

    monkeypatch.setattr(device, "_emulated", lambda machine: Emulator())


@pytest.mark.tvm
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'main: Check failed' >&2; exit 2", "the compiled model refused these inputs: main: Check failed"),
        ("kill -SEGV $$", "crashed (SIGSEGV)"),
        ("echo 'no such symbol' >&2; exit 1", "no such symbol"),
    ],
)
def test_code_for_another_processor_that_fails_runs_on_onnxruntime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    emulated_by(script, tmp_path, monkeypatch)
    path = write(tmp_path / "m.onnx", "(float[N,4] x) => (float[N,4] y) { y = Tanh(x) }")
    result = graphwright.optimize(path, target="riscv64", out=tmp_path / "out")
    assert result.verdict is not None and result.verdict.ok
    (region,) = result.artifact.manifest.regions
    assert region.runtime == "onnxruntime" and reason in region.reasons["y"]
    assert ".part" not in region.reasons["y"]


@pytest.mark.tvm
def test_code_for_another_processor_that_hangs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated_by("exec sleep 100", tmp_path, monkeypatch)
    monkeypatch.setattr(device, "TIMEOUT", 0.2)
    path = write(tmp_path / "m.onnx", "(float[N,4] x) => (float[N,4] y) { y = Tanh(x) }")
    with pytest.raises(VerificationError, match=r"artifact for riscv64: region0-\S+ on local: no answer in 0.2 s"):
        graphwright.optimize(path, target="riscv64", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.tvm
def test_an_instruction_that_this_place_lacks_is_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated_by("kill -ILL $$", tmp_path, monkeypatch)
    path = write(tmp_path / "m.onnx", "(float[N,4] x) => (float[N,4] y) { y = Tanh(x) }")
    result = graphwright.optimize(path, target="riscv64", out=tmp_path / "out")
    assert result.artifact.manifest.verdict is None
    assert result.unverified.startswith("the artifact cannot run here: region0-")


@pytest.mark.tvm
def test_an_input_of_unknown_rank(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", "(float[] x) => (float[] y) { y = Softmax(x) }")
    assert graphwright.optimize(path, "two-pass-softmax", target="cpu", out=tmp_path / "out").verdict.ok
    ours = graphwright.load(tmp_path / "out")
    for shape in ((5,), (2, 3), (2, 3, 4)):
        (y,) = ours.run(None, {"x": np.zeros(shape, np.float32)})
        np.testing.assert_allclose(y, np.full(shape, 1 / shape[-1]), rtol=1e-6)


@pytest.mark.tvm
def test_a_mask_as_long_as_past_and_present(tmp_path: Path) -> None:
    """Its length is named as the sum of the others, as exporters of decoders with a cache do."""
    text = """(bool[b,1,1,all] mask, float[b,p,4] past, float[b,t,4] new) => (bool[b,1,t,all] y)
        <int64 zero = {0}, int64 one = {1}, int64[1] row = {1}> {
            keys = Concat<axis = 1>(past, new)  k = Shape<start = 1, end = 2>(keys)  n = Squeeze(k)
            q = Shape<start = 1, end = 2>(past)  m = Squeeze(q)
            key = Range(zero, n, one)  own = Range(m, n, one)  query = Unsqueeze(own, row)
            seen = LessOrEqual(key, query)  y = And(mask, seen) }"""
    path = write(tmp_path / "m.onnx", text)
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            dim.dim_param = dim.dim_param.replace("all", "p + t")
    onnx.save(model, path)
    result = graphwright.optimize(path, target="cpu", out=tmp_path / "out")
    native, nodes = result.artifact.native_nodes
    assert result.verdict is not None and result.verdict.ok and native == nodes


def test_sizes_that_cannot_be_guessed(tmp_path: Path) -> None:
    """A tracer baked 7 x 11 into the graph, the declared axes are dynamic: not verified, and said so."""
    text = "(float[A,B] x) => (float[C,D] y) { y = Reshape(x, s) }"
    path = write(tmp_path / "m.onnx", text, s=np.array([11, 7]))
    result = graphwright.optimize(path, out=tmp_path / "o.onnx")
    assert result.verdict is None and "no inputs were found" in result.unverified
    assert graphwright.optimize(path, out=tmp_path / "p.onnx", pins={"x": (7, 11)}).verdict.ok
    with pytest.raises(InputError, match="no inputs were found"):
        graphwright.optimize(path, out=tmp_path / "q.onnx", pins={"x": (7, 12)})
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.tvm
def test_inputs_that_are_no_tensors(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", "(seq(float[4]) q, float[N] x) => (float[4] y) {"
                 " i = Constant<value_int = 0>()  a = SequenceAt(q, i)  y = Neg(a)  z = Relu(x) }")  # fmt: skip
    result = graphwright.optimize(path, target="cpu", out=tmp_path / "out", pins={"x": (4,)})
    assert result.verdict is None and "input 'q' is no tensor" in result.unverified
    x = np.arange(4, dtype=np.float32)
    (y,) = graphwright.load(tmp_path / "out").run(None, {"q": [x], "x": x})
    np.testing.assert_array_equal(y, -x)


def test_numbers_that_cannot_be_guessed(tmp_path: Path) -> None:
    """Pins are not to blame where an integer input may be."""
    text = "(float[4] x, int64[1] k) => (float[A] y) { j = Add(k, m)  y = Gather(x, j) }"
    path = write(tmp_path / "m.onnx", text, m=np.array([-1000]))
    result = graphwright.optimize(path, out=tmp_path / "o.onnx", pins={"x": (4,)})
    assert result.verdict is None and "no inputs were found" in result.unverified


@pytest.mark.tvm
def test_a_model_that_onnxruntime_has_no_kernel_for(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", "(bool[4] c, uint64[4] a, uint64[4] b) => (uint64[4] y) { y = Where(c, a, b) }")
    reason = r"^onnxruntime cannot run the model: Could not find an implementation for Where\(16\)"
    result = graphwright.optimize(path, out=tmp_path / "o.onnx")
    assert result.verdict is None and re.match(reason, result.unverified)
    result = graphwright.optimize(path, target="cpu", out=tmp_path / "out", pins={"a": (4,)})
    assert result.verdict is None and re.match(reason, result.unverified) and result.artifact.native_nodes == (1, 1)
    c, a, b = np.array([True, False] * 2), np.arange(4, dtype=np.uint64), np.arange(10, 14, dtype=np.uint64)
    np.testing.assert_array_equal(
        graphwright.load(tmp_path / "out").run(None, {"c": c, "a": a, "b": b})[0], [0, 11, 2, 13]
    )


@pytest.mark.tvm
def test_a_sequence_of_maps(tmp_path: Path) -> None:
    """Classifiers from scikit-learn end in ZipMap, whose type onnx_ir has no word for."""
    nodes = [
        helper.make_node("Softmax", ["x"], ["p"]),
        helper.make_node("ZipMap", ["p"], ["z"], domain="ai.onnx.ml", classlabels_int64s=[3, 9]),
    ]
    value = helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    maps = helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.INT64, value))
    graph = helper.make_graph(
        nodes, "classifier", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["n", 2]), helper.make_value_info("z", maps)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "m.onnx")
    assert graphwright.optimize(tmp_path / "m.onnx", out=tmp_path / "o.onnx").verdict.ok
    assert onnx.load(tmp_path / "o.onnx").graph.output[1].type == maps
    assert graphwright.optimize(tmp_path / "m.onnx", target="cpu", out=tmp_path / "out").verdict.ok
    ours = graphwright.load(tmp_path / "out")
    assert [output.type for output in ours.get_outputs()] == ["tensor(float)", "seq(map(int64,tensor(float)))"]
    assert ours.run(["z"], {"x": np.zeros((1, 2), np.float32)}) == [[{3: 0.5, 9: 0.5}]]


def test_functions_that_explode_are_refused(tmp_path: Path) -> None:
    functions = [
        helper.make_function(
            "my", f"f{level}", ["a"], ["b"],
            [helper.make_node(f"f{level + 1}", ["a"], ["c"], domain="my"),
             helper.make_node(f"f{level + 1}", ["c"], ["b"], domain="my")],
            [helper.make_opsetid("my", 1)],
        )
        for level in range(30)
    ]  # fmt: skip
    functions.append(
        helper.make_function("my", "f30", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])],
                             [helper.make_opsetid("", 20)])
    )  # fmt: skip
    kind = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("f0", ["x"], ["y"], domain="my")], "g", kind[:1], kind[1:])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("my", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="has more than 10,000,000 nodes when the functions it calls are written out"):
        graphwright.optimize(tmp_path / "m.onnx", out=tmp_path / "o.onnx")
