"""`tune`: on real measurements, going on where an earlier run ended, and what it must not do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphwright.passes.errors import CompileError, OutputError, TargetError, UsageError
from graphwright.runtime import tuner
from graphwright.runtime.artifact import Artifact
from graphwright.runtime.driver import optimize
from graphwright.runtime.target import Target
from graphwright.runtime.tuning import Database, Measured, Tunable, Tuning, kernel_name
from graphwright.runtime.worker import Compiler
from onnx import numpy_helper, parser

pytest.importorskip("tvm")
pytestmark = pytest.mark.tvm

TEXT = """<ir_version: 10, opset_import: ["" : 20]>
g (float[1,16,6,6] x) => (float[1,40] y)
{
  a = Conv<pads = [1, 1, 1, 1]>(x, w)
  b = ConvTranspose<strides = [2, 2], kernel_shape = [3, 3]>(a, t)
  c = GlobalAveragePool(b)
  d = Flatten(c)
  y = MatMul(d, m)
}"""
SHAPES = {"w": (48, 16, 3, 3), "t": (48, 16, 3, 3), "m": (16, 40)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    model = parser.parse_model(TEXT)
    draw = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        model.graph.initializer.append(numpy_helper.from_array(draw.standard_normal(shape, np.float32), name))
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's measurements are kept; the linker's cache stays where it is."""
    monkeypatch.setattr(tuner, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "tuning"


def answers(monkeypatch: pytest.MonkeyPatch, answer: Callable[[Tunable], Measured]) -> list[str]:
    """`answer` instead of the compiler's measurements; the names of the kernels that were asked for."""
    asked: list[str] = []

    def measure(self: Compiler, kernel: Tunable, *rest: Any) -> Measured:
        asked.append(kernel.name)
        return answer(kernel)

    monkeypatch.setattr(Compiler, "measure", measure)
    return asked


def test_kernels_are_measured_once_and_the_artifact_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    first = optimize(model, target="cpu", out=model.with_name("a"), tune=1, progress=said.append)
    assert first.tuned and first.tuned.measured == first.tuned.known == first.tuned.kernels >= 4
    assert 0 < first.tuned.tuned_ms <= first.tuned.rule_ms
    assert any("0 of" in line and "left" in line and line.startswith("tune -") for line in said)
    assert first.verdict and first.verdict.ok
    assert Artifact.load(model.with_name("a")).manifest.tuning == first.tuned.to_json()
    monkeypatch.setattr(Compiler, "measure", None)  # not even asked for
    again = optimize(model, target="cpu", out=model.with_name("b"), tune=1)
    assert again.tuned == dataclasses.replace(first.tuned, measured=0)
    stored = optimize(model, target="cpu", out=model.with_name("c"), tune=0)
    assert stored.tuned == again.tuned


def test_without_tune_nothing_is_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Database, "read", None)
    result = optimize(model, target="cpu", out=model.with_name("a"))
    assert result.tuned is None
    manifest = json.loads((model.with_name("a") / "manifest.json").read_text())
    assert manifest["tuning"] is None and "tuning" not in manifest["target"]


def test_zero_minutes_use_what_is_stored_and_measure_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compiler, "measure", None)
    result = optimize(model, target="cpu", out=model.with_name("a"), tune=0)
    assert result.tuned and (result.tuned.known, result.tuned.faster) == (0, 0) and result.tuned.kernels >= 4


def test_a_cache_that_cannot_be_used_is_named_before_anything_is_compiled(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tuner, "cache_dir", lambda: tmp_path / "file")
    said: list[str] = []
    with pytest.raises(OutputError, match="set GRAPHWRIGHT_CACHE to a folder that can"):
        optimize(model, target="cpu", out=model.with_name("a"), tune=1, progress=said.append)
    assert said == [] and not model.with_name("a").exists()


def other_tile(kernel: Tunable) -> dict[str, Any]:
    """One that no rule gives."""
    if kernel.template == "gemm":
        return {"rows": 3, "vectors": 1, "depth": None}
    return {"algorithm": "direct", "vectors": 1, "width": 2, "columns": None, "rows": None, "panels": None}


def test_tiles_reach_the_weights_and_the_kernels(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = optimize(model, target="cpu", out=model.with_name("plain"))
    asked = answers(monkeypatch, lambda kernel: Measured(other_tile(kernel), 2.0, 1.0, 2.0, 1.5, 1))
    tuned = optimize(model, target="cpu", out=model.with_name("tuned"), tune=1)
    assert tuned.tuned and tuned.tuned.faster == len(asked) == tuned.tuned.kernels
    assert tuned.tuned.rule_ms == 2 * tuned.tuned.tuned_ms
    assert tuned.verdict and tuned.verdict.ok
    assert tuned.artifact and plain.artifact and tuned.artifact.native_nodes == plain.artifact.native_nodes
    assert {name: tuned.artifact.target.tuning.find(**json.loads(name)) for name in asked} == {
        name: other_tile(Tunable(calls=1, cycles=1.0, **json.loads(name))) for name in asked
    }
    libraries = [[r.file for r in a.manifest.regions] for a in (plain.artifact, tuned.artifact)]
    assert libraries[0] != libraries[1]


def test_the_longest_kernels_come_first_and_what_was_found_survives(
    model: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    def answer(kernel: Tunable) -> Measured:
        if len(asked) == 3:
            raise KeyboardInterrupt
        if len(asked) == 2:
            raise CompileError("the compiler crashed (SIGSEGV)")
        return Measured(None, 2.0, 2.0)

    asked = answers(monkeypatch, answer)
    with pytest.raises(KeyboardInterrupt):
        optimize(model, target="cpu", out=model.with_name("a"), tune=1)
    assert not model.with_name("a").exists()
    assert json.loads(asked[0])["template"] == "conv"
    (file,) = folder.iterdir()
    assert len(Database(file).read()) == 1
    before = list(asked)
    asked = answers(monkeypatch, lambda kernel: Measured(None, 2.0, 2.0))
    result = optimize(model, target="cpu", out=model.with_name("a"), tune=1)
    assert asked[:2] == before[1:] and before[0] not in asked  # the one that crashed too
    assert result.tuned and result.tuned.known == result.tuned.kernels


def test_a_kernel_that_was_not_measured_in_full_is_measured_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers(monkeypatch, lambda kernel: Measured(None, 2.0, 2.0, complete=False))
    optimize(model, target="cpu", out=model.with_name("a"), tune=0.4)
    count = len(asked)
    optimize(model, target="cpu", out=model.with_name("b"), tune=1)
    assert asked[count:] == asked[:count]
    optimize(model, target="cpu", out=model.with_name("c"), tune=1)  # they had as long as any kernel gets
    assert len(asked) == 2 * count


def test_measurements_of_other_templates_threads_and_targets_do_not_count(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answers(monkeypatch, lambda kernel: Measured(None, 2.0, 2.0))
    optimize(model, target="cpu", out=model.with_name("a"), tune=1)
    count = len(asked)
    optimize(model, target="cpu", out=model.with_name("b"), tune=1, threads=1)
    other = dataclasses.replace(Target.named("cpu"), cores=Target.named("cpu").cores + 1)
    optimize(model, target=other, out=model.with_name("c"), tune=1)
    monkeypatch.setattr(tuner, "_templates", lambda: "another version")
    optimize(model, target="cpu", out=model.with_name("d"), tune=1)
    assert len(asked) >= (4 if Target.named("cpu").cores > 1 else 3) * count


def test_a_damaged_file_costs_its_lines_only(model: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    asked = answers(monkeypatch, lambda kernel: Measured(None, 2.0, 2.0))
    optimize(model, target="cpu", out=model.with_name("a"), tune=1)
    (file,) = folder.iterdir()
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([lines[0], b"{" + lines[1], *lines[2:]]))
    count = len(asked)
    result = optimize(model, target="cpu", out=model.with_name("b"), tune=1)
    assert asked[count:] == [asked[1]]
    assert result.tuned and result.tuned.known == count


def test_what_cannot_be_tuned_is_refused_before_anything_is_done(model: Path) -> None:
    foreign = "arm64" if Target.named("cpu").machine != "aarch64" else "cpu-avx2"
    with pytest.raises(TargetError, match=f"target {foreign} does not run on this machine"):
        optimize(model, target=foreign, out=model.with_name("a"), tune=1)
    with pytest.raises(TargetError, match="target cuda does not run"):
        optimize(model, target="cuda", out=model.with_name("a"), tune=0)
    with pytest.raises(UsageError, match="name a --target"):
        optimize(model, tune=1)
    for minutes in (-1.0, float("nan")):
        with pytest.raises(UsageError, match="expected minutes"):
            optimize(model, target="cpu", tune=minutes)
    assert not model.with_name("a").exists()


def test_the_bar_and_the_sum() -> None:
    assert tuner.bar(0, 0, 0, 61.9) == "tune -------------------- 0 of 0 kernels, 0 faster, 1:01 left"
    assert tuner.bar(3, 4, 1, float("inf")) == "tune ###############----- 3 of 4 kernels, 1 faster"
    kernels = [Tunable("gemm", {"rows": n}, n, 1.0) for n in (1, 2, 3)]
    tile = {"rows": 4, "vectors": 2}
    known = {kernels[1].name: Measured(tile, 100.0, 50.0, 2.0, 1.5), kernels[2].name: Measured(None, 10.0, 10.0)}
    found = tuner.summary(kernels, known, 1)
    assert (found.kernels, found.known, found.measured, found.faster) == (3, 2, 1, 1)
    assert found.rule_ms == pytest.approx(0.23) and found.tuned_ms == pytest.approx(0.13)
    assert found.tuning == Tuning.from_json({kernel_name("gemm", {"rows": 2}): tile})
