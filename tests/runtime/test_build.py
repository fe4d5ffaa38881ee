"""From a model to an artifact: what falls back and why, and what stays when it is interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.errors import CompileError, VerificationError
from graphwright.runtime.artifact import Artifact
from graphwright.runtime.build import ask_types, build, fix_outputs
from graphwright.runtime.driver import optimize
from graphwright.runtime.reference import Reference
from graphwright.runtime.session import Session
from graphwright.runtime.target import Target
from onnx import numpy_helper, parser

pytestmark = pytest.mark.tvm
Optimize = Callable[..., Any]
HEADER = '<ir_version: 10, opset_import: ["" : 20]>'
CONTRIB = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>'
X = np.linspace(-1, 2, 4, dtype=np.float32)


def read(text: str, **weights: np.ndarray) -> ir.Model:
    proto = parser.parse_model(text if text.startswith("<") else f"{HEADER}\n{text}")
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    return ir.from_proto(proto)


def test_outputs_are_results_of_nodes() -> None:
    model = read("g (float[4] x) => (float[4] w, float[4] x, float[4] y, float[4] w) { y = Relu(x)  z = Neg(x) }", w=X)
    fix_outputs(model)
    assert [v.name for v in model.graph.outputs] == ["w", "x", "y", "w"]
    assert [n.op_type for n in model.graph] == ["Relu", "Identity"]  # and the unused Neg is gone
    (weight,) = model.graph.initializers.values()
    assert weight.name == "w_constant" and not weight.is_graph_output()


def test_names_that_are_taken_are_left_alone() -> None:
    model = read("g (float[4] w_constant) => (float[4] w, float[4] y) { y = Relu(w_constant) }", w=X)
    fix_outputs(model)
    assert list(model.graph.initializers) == ["w_constant_1"] and [v.name for v in model.graph.outputs] == ["w", "y"]


def test_types_behind_operators_of_other_domains_are_asked_for() -> None:
    model = read(f"{CONTRIB} g (float[N,4] x) => (float[N,4] y)"
                 " { t = com.microsoft.FastGelu(x)  u = Relu(t)  y = Neg(u) }")  # fmt: skip
    t = model.graph[0].outputs[0]
    assert t.type is None
    ask_types(model)
    assert t.dtype == ir.DataType.FLOAT and t.shape is not None and t.shape[1] == 4
    assert [v.name for v in model.graph.outputs] == ["y"]


def test_operators_of_onnxruntime_run_beside_compiled_ones(optimized: Optimize) -> None:
    """Trilu of onnxruntime's own domain, which no pass replaces."""
    text = f"""{CONTRIB} g (float[2,2] x) => (float[2,2] y) {{ t = com.microsoft.Trilu(x)  u = Relu(t)
        s = Cast<to=8>(u)  v = Cast<to=1>(s)  w = com.microsoft.Trilu(v)  y = Add(w, t) }}"""
    built = optimized(parser.parse_model(text))
    assert [r for r, _ in built.runtimes] == ["onnxruntime", "tvm", "onnxruntime", "tvm"]
    x = X.reshape(2, 2)
    (y,) = Session(built.artifact).run(None, {"x": x})
    t = np.triu(x)
    np.testing.assert_allclose(y, np.triu(np.maximum(t, 0)) + t, rtol=1e-5, atol=1e-6)  # text of nine digits


def test_reasons_are_in_the_manifest(optimized: Optimize) -> None:
    built = optimized("a (float[4] x) => (float[4] y, string[4] s) { y = Relu(x)  s = Cast<to=8>(y) }")
    (fallback,) = [r for r in built.artifact.manifest.regions if r.runtime == "onnxruntime"]
    assert fallback.reasons == {"s": "'s' holds strings"}
    assert built.artifact.native_nodes == (1, 2)
    onnx.checker.check_model(onnx.load(built.artifact.root / fallback.file))


def test_a_target_without_fallback_names_the_nodes(tmp_path: Path) -> None:
    onnx.save(parser.parse_model(f"{HEADER} a (float[4] x) => (string[4] s) {{ y = Relu(x)  s = Cast<to=8>(y) }}"),
              tmp_path / "m.onnx")  # fmt: skip
    with pytest.raises(CompileError, match=r"target cuda cannot take 1 of the nodes: s \(Cast\): 's' holds strings"):
        optimize(tmp_path / "m.onnx", target="cuda", out=tmp_path / "out", verify=False)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_the_model_given_is_left_alone(tmp_path: Path) -> None:
    from graphwright.runtime.build import build
    from graphwright.runtime.target import Target

    model = read("g (float[4] x) => (float[4] w, float[4] y) { y = Relu(x) }", w=X)
    before = ir.to_proto(model).SerializeToString()
    artifact = build(model, Target.named("cpu"), tmp_path / "out")
    assert ir.to_proto(model).SerializeToString() == before
    assert Artifact.load(tmp_path / "out").manifest == artifact.manifest


def test_a_wrong_artifact_leaves_nothing(tmp_path: Path) -> None:
    from graphwright.runtime.build import build
    from graphwright.runtime.target import Target

    def check(artifact: Artifact) -> None:
        assert (artifact.root / "manifest.json").exists()
        raise VerificationError("wrong")

    model = read("g (float[4] x) => (float[4] y) { y = Relu(x) }")
    with pytest.raises(VerificationError):
        build(model, Target.named("cpu"), tmp_path / "out", check=check)
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_is_rebuilt_while_an_older_session_lives(optimized: Optimize, tmp_path: Path) -> None:
    """A process keeps one library a path: without names of their own both sessions would run the old code."""
    first = optimized("a (float[N,300] x) => (float[N,300] y) { t = Mul(x, w)  y = Add(t, w) }",
                      w=np.ones(300, np.float32))  # fmt: skip
    second = optimized("a (float[N,300] x) => (float[N,300] y) { t = Sub(x, w)  y = Exp(t) }",
                       w=np.full(300, 3, np.float32))  # fmt: skip
    x = np.ones((2, 300), np.float32)
    place = tmp_path / "artifact"
    shutil.copytree(first.artifact.root, place)
    old = Session(place)
    np.testing.assert_array_equal(old.run(None, {"x": x})[0], 2)
    shutil.rmtree(place)
    shutil.copytree(second.artifact.root, place)
    new = Session(place)
    np.testing.assert_allclose(new.run(None, {"x": x})[0], np.exp(-2.0), rtol=1e-6)
    np.testing.assert_array_equal(old.run(None, {"x": x})[0], 2)


def test_the_same_model_gives_the_same_files(tmp_path: Path) -> None:
    onnx.save(parser.parse_model(f"{HEADER} a (float[4] x) => (float[4] y) {{ y = Relu(x) }}"), tmp_path / "m.onnx")
    hashes = []
    for name in ("a", "b"):
        result = optimize(tmp_path / "m.onnx", target="cpu", out=tmp_path / name)
        assert result.artifact is not None
        hashes.append(result.artifact.manifest.files)
    assert hashes[0] == hashes[1]


# --- interrupted ------------------------------------------------------------------------------------------------

INTERRUPTED = """
import os, signal, sys
from graphwright.runtime.driver import optimize

def progress(stage):
    if stage.startswith({stage!r}):
        os.kill(os.getpid(), {number})

optimize({model!r}, target={target!r}, out={out!r}, progress=progress, overwrite={overwrite})
"""


def interrupted(model: Path, stage: str, number: int, target: str | None, out: Path, overwrite: bool = False) -> int:
    code = INTERRUPTED.format(
        stage=stage, number=int(number), model=str(model), target=target, out=str(out), overwrite=overwrite
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode


@pytest.fixture
def model(tmp_path: Path) -> Path:
    proto = parser.parse_model(f"{HEADER} a (float[N,64] x) => (float[N,64] y) {{ y = MatMul(x, w) }}")
    weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    path = tmp_path / "model" / "m.onnx"
    path.parent.mkdir()
    onnx.save(proto, path)
    return path


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


@pytest.mark.parametrize(("stage", "target"), [("compile", "cpu"), ("compare", "cpu"), ("save", None)])
def test_killed_in_the_middle(model: Path, tmp_path: Path, stage: str, target: str | None) -> None:
    """No output is there, an old one is whole, and what is left over does not disturb the next run."""
    out = tmp_path / "out" / "result"
    out.parent.mkdir()
    assert interrupted(model, stage, signal.SIGKILL, target, out) == -signal.SIGKILL
    assert visible(out.parent) == []
    result = optimize(model, target=target, out=out)
    assert result.verdict is not None and result.verdict.ok and visible(out.parent) == ["result"]
    assert interrupted(model, stage, signal.SIGKILL, target, out, overwrite=True) == -signal.SIGKILL
    if target:
        Artifact.load(out)
    else:
        onnx.checker.check_model(onnx.load(out))


def test_ctrl_c_cleans_up(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "result"
    out.parent.mkdir()
    assert interrupted(model, "compare", signal.SIGINT, "cpu", out) != 0
    assert list(out.parent.iterdir()) == []


def test_a_full_disk_leaves_nothing(model: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE, also of the child that links, ends a write as a full disk does."""
    out = tmp_path / "out" / "result"
    out.parent.mkdir()
    code = f"""
import resource, signal
from graphwright.passes.errors import GraphwrightError
from graphwright.runtime.driver import optimize

def progress(stage):
    if stage == "verify":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))

try:
    optimize({str(model)!r}, target="cpu", out={str(out)!r}, progress=progress)
except GraphwrightError as error:
    print(type(error).__name__, str(error).count(chr(10)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout in ("OutputError 0\n", "CompileError 0\n"), done.stderr
    assert list(out.parent.iterdir()) == []


def test_nothing_is_left_in_the_temporary_folder(model: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    code = f"from graphwright.runtime.driver import optimize; optimize({str(model)!r}, target='cpu', out='o')"
    environment = {**os.environ, "TMPDIR": str(scratch)}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment, cwd=tmp_path)
    end = time.monotonic() + 5
    while visible(scratch) and time.monotonic() < end:  # onnxruntime leaves a hidden file of its own
        time.sleep(0.1)
    assert visible(scratch) == []
    assert json.loads((tmp_path / "o" / "manifest.json").read_text())["source"] == "m.onnx"


def test_what_onnxruntime_would_be_faster_at_and_has_no_kernel_for(tmp_path: Path) -> None:
    w = np.ones((4, 3, 3, 3))
    model = read("g (double[1,3,h,8] x) => (double[1,4,p,6] y) { y = Conv(x, w) }", w=w)
    artifact = build(model, Target.named("cpu"), tmp_path / "a")
    assert artifact.native_nodes == (1, 1)
    (y,) = Session(artifact).run(None, {"x": np.ones((1, 3, 4, 8))})
    np.testing.assert_allclose(y, np.full((1, 4, 2, 6), 27.0))
    with pytest.raises(
        CompileError, match=r"Could not find .* Conv.* and TVM cannot take all of it: y \(Conv\): a test"
    ):
        build(model, Target.named("cpu"), tmp_path / "b", distrust=lambda node: "a test")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "text",
    [
        """g (uint8[2,8] x, uint8 a, uint8 b) => (int32[2,8] y, int32[2,8] z)
        { y = MatMulInteger (x, w, a, zero)  z = MatMulInteger (x, w, b, zero) }""",
        """g (float[2,8] x) => (float[2,8] y) {
        q = QuantizeLinear (x, s, u)  d = DequantizeLinear (q, s, u)  v = DequantizeLinear (w, s, zero)
        m = MatMul (d, v)  n = QuantizeLinear (m, s, u)  e = DequantizeLinear (n, s, u)
        o = MatMul (e, v)  p = QuantizeLinear (o, s, u)  y = DequantizeLinear (p, s, u) }""",
    ],
)  # fmt: skip
def test_a_region_of_onnxruntime_whose_products_of_bytes_share_a_weight(text: str, tmp_path: Path) -> None:
    weights = {"w": np.eye(8, dtype=np.int8) * 127, "zero": np.array(0, np.int8), "s": np.float32(0.01),
               "u": np.array(0, np.uint8)}  # fmt: skip
    model = read(text, **{name: array for name, array in weights.items() if name in text})
    build(model, Target.named("cpu"), tmp_path / "a", distrust=lambda node: "a test")
    session = Session(tmp_path / "a")
    rng = np.random.default_rng(0)
    feeds = {i.name: rng.integers(0, 9, i.shape).astype(i.type[7:-1].replace("float", "float32"))
             for i in session.get_inputs()}  # fmt: skip
    expected = Reference(model).run(feeds)
    for name, array in zip(expected, session.run(None, feeds), strict=True):
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=0.011, err_msg=name)  # one step of s
