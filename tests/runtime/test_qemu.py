"""Artifacts for 64-bit ARM, run under qemu's user mode against TVM's own aarch64 runtime."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphwright.passes.errors import TargetError
from graphwright.runtime import elf
from graphwright.runtime.device import Device, qemu_available
from graphwright.runtime.session import Session
from graphwright.runtime.target import TARGETS

from .conftest import Dense, Transposes

pytestmark = pytest.mark.qemu

# A dot product of 16 float32 terms around 1: a few roundings of a sum below 16.
TOLERANCE = 1e-5

Make = Callable[[Any, str, Path], Any]


@pytest.fixture(scope="module")
def emulated() -> Device:
    if reason := qemu_available():
        pytest.skip(reason)
    return Device.open("qemu:aarch64")


@pytest.fixture(scope="module")
def artifact(dense: Dense, make_artifact: Make, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_artifact(dense, "arm64", tmp_path_factory.mktemp("arm64") / "artifact")


def test_the_runner_is_for_arm(emulated: Device) -> None:
    assert elf.read(emulated.runner).machine == "aarch64"


def test_arm64_computes_what_numpy_does(emulated: Device, artifact: Any, dense: Dense) -> None:
    results = emulated.push(artifact).run(None, dense.feeds)
    for result, expected in zip(results, dense.expected, strict=True):
        np.testing.assert_allclose(result, expected, rtol=0, atol=TOLERANCE)


def test_two_threads_give_the_same(emulated: Device, artifact: Any, dense: Dense) -> None:
    one, two = (emulated.push(artifact, threads=n).run(None, dense.feeds) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_element_type_passes_through(
    emulated: Device, transposes: Transposes, make_artifact: Make, tmp_path: Path
) -> None:
    results = emulated.push(make_artifact(transposes, "arm64", tmp_path / "a")).run(None, transposes.feeds)
    for result, expected in zip(results, transposes.expected, strict=True):
        assert result.dtype == expected.dtype
        np.testing.assert_array_equal(result, expected)


@pytest.mark.skipif(TARGETS["arm64"].runs_here, reason="this processor runs it itself")
def test_a_session_runs_foreign_artifacts_under_qemu(emulated: Device, artifact: Any, dense: Dense) -> None:
    results = Session(artifact).run(None, dense.feeds)
    for result, expected in zip(results, dense.expected, strict=True):
        np.testing.assert_allclose(result, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.skipif(TARGETS["arm64"].runs_here, reason="this processor is the emulated one")
def test_an_artifact_for_this_processor_is_refused(
    emulated: Device, dense: Dense, make_artifact: Make, tmp_path: Path
) -> None:
    with pytest.raises(TargetError, match=r"built for cpu .*compile with --target arm64"):
        emulated.push(make_artifact(dense, "cpu", tmp_path / "a"))


def test_what_the_host_runs_instead_is_said(
    emulated: Device, artifact: Any, dense: Dense, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from graphwright.runtime.artifact import Artifact, file_specs
    from onnx import TensorProto, helper

    shutil.copytree(artifact.root, tmp_path / "a")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Neg", ["d"], ["e"])],
        "tail",
        [value("d", TensorProto.FLOAT, [5, 7])],
        [value("e", TensorProto.FLOAT, [5, 7])],
    )
    onnx_model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    (tmp_path / "a" / "region1.onnx").write_bytes(onnx_model.SerializeToString())
    manifest = artifact.manifest
    tail = manifest.regions[0].model_copy(
        update={"runtime": "onnxruntime", "file": "region1.onnx", "inputs": ["d"], "outputs": ["e"]}
    )
    last = manifest.outputs[1].model_copy(update={"name": "e"})
    changed = manifest.model_copy(
        update={
            "regions": [manifest.regions[0], tail],
            "outputs": [last],
            "files": file_specs(tmp_path / "a"),
        }
    )
    session = emulated.push(Artifact(changed, tmp_path / "a"))
    assert "run by onnxruntime on this host, not on qemu:aarch64" in caplog.text
    np.testing.assert_allclose(session.run(None, dense.feeds)[0], -dense.expected[1], rtol=0, atol=TOLERANCE)
    assert len(session.measure(dense.feeds, warmup=0, repeat=2)) == 2
