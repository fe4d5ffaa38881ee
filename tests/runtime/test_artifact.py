"""The folder on disk: weights once, hashes for all, and nothing half written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphwright.passes.errors import ArtifactError, OutputError
from graphwright.runtime.artifact import ALIGNMENT, Artifact, WeightStore, Workplace, exchange, write_manifest
from graphwright.runtime.session import Session
from graphwright.runtime.target import Target

TEXT = "a (float[N,300] x) => (float[N,300] y) { t = Mul(x, w)  y = Add(t, w) }"
W = np.linspace(0, 1, 300, dtype=np.float32)


@pytest.fixture
def folder(optimized: Callable[..., Any], tmp_path: Path) -> Path:
    """A copy of an artifact, to be changed."""
    pytest.importorskip("tvm")
    return Path(shutil.copytree(optimized(TEXT, w=W).artifact.root, tmp_path / "artifact"))


# --- weights ----------------------------------------------------------------------------------------------------


def test_equal_bytes_are_stored_once_and_every_tensor_is_aligned(tmp_path: Path) -> None:
    store = WeightStore(tmp_path / "w.bin")
    blocks = [b"a" * 100, b"b" * 7, b"a" * 100, b"", b"c" * 1000, b"b" * 7]
    offsets = [store.add([block[:3], block[3:]], len(block)) for block in blocks]
    data = (tmp_path / "w.bin").read_bytes()
    for block, offset in zip(blocks, offsets, strict=True):
        assert offset % ALIGNMENT == 0 and data[offset : offset + len(block)] == block
    assert offsets[0] == offsets[2] and offsets[1] == offsets[5]
    assert len(data) == offsets[4] + 1000


def test_weights_are_in_one_file_for_code_and_model(folder: Path) -> None:
    """300 numbers are small enough for both: here a weight of both is there once."""
    artifact = Artifact.load(folder)
    (region,) = artifact.manifest.regions
    assert region.file.endswith(".so") and len(region.parameters) == 1
    assert artifact.manifest.files["weights.bin"].nbytes == 1200
    assert artifact.nbytes == sum(p.stat().st_size for p in folder.iterdir() if p.name != "manifest.json")


def test_large_weights_of_the_model_are_references(optimized: Callable[..., Any]) -> None:
    pytest.importorskip("tvm")
    weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    artifact = optimized("a (float[2,64] x) => (float[2,64] y) { y = MatMul(x, w) }", w=weights).artifact
    assert (artifact.root / "model.onnx").stat().st_size < 1000
    from graphwright.passes import io

    loaded = io.load(artifact.root / "model.onnx")
    np.testing.assert_array_equal(loaded.graph.initializers["w"].const_value.numpy(), weights)
    assert artifact.manifest.files["weights.bin"].nbytes <= 2 * weights.nbytes + ALIGNMENT  # a kernel may pack its own


# --- loading ----------------------------------------------------------------------------------------------------


FORK = """
import os, sys
from pathlib import Path
from graphwright.runtime.artifact import file_hash
paths = [Path(name) for name in sys.argv[1:]]
first = file_hash(paths[0])
child = os.fork()
if not child:
    os._exit(0 if file_hash(paths[1]) == first else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_checks_files(tmp_path: Path) -> None:
    """Large ones, which several threads read: a forked process has none of them."""
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.write_bytes(bytes(8 << 20))
    subprocess.run([sys.executable, "-c", FORK, *map(str, paths)], timeout=60, check=True)


def test_what_is_written_is_what_is_read(folder: Path) -> None:
    artifact = Artifact.load(folder)
    before = artifact.manifest
    write_manifest(before, folder)
    assert Artifact.load(folder).manifest == before
    assert artifact.target == Target.from_json(before.target) and artifact.native_nodes == (2, 2)
    assert [(i.name, i.dtype, i.shape) for i in before.inputs] == [("x", "float", ["N", 300])]
    assert before.verdict is not None and before.verdict["ok"]
    assert {"graphwright", "apache-tvm", "onnx"} <= set(before.versions)


def edit(folder: Path, change: Callable[[dict[str, Any]], None], *, sign: bool = False) -> None:
    """Change the manifest as text; `sign`: with a digest that fits, as an attacker would."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    if sign:
        from graphwright.runtime.artifact import Manifest

        write_manifest(Manifest.model_validate(data), folder)


def test_any_change_of_the_manifest_is_noticed(folder: Path) -> None:
    edit(folder, lambda data: data["regions"][0].update(inputs=["z"]))
    with pytest.raises(ArtifactError, match=r"manifest.json: was altered since it was written \(digest differs\)"):
        Artifact.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(unknown=1), "damaged"),
        (lambda data: data.pop("target"), "damaged"),
        (lambda data: data["target"].pop("isa"), "damaged"),
        (lambda data: data.update(schema_version=1), "schema version 1; expected 2"),
        (lambda data: data["inputs"][0].update(shape="x"), "damaged"),
    ],
)
def test_a_manifest_that_is_none(folder: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    edit(folder, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        Artifact.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/file"])
def test_files_outside_the_folder_are_not_read(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_text("x")
    edit(folder, lambda data: data["files"].update({name: {"blake3": "0", "nbytes": 1}}), sign=True)
    with pytest.raises(ArtifactError, match="outside the artifact's folder"):
        Artifact.load(folder)


def test_code_without_a_hash_is_not_loaded(folder: Path) -> None:
    def smuggle(data: dict[str, Any]) -> None:
        data["regions"][0]["file"] = "other.so"

    (folder / "other.so").write_bytes(b"code")
    edit(folder, smuggle, sign=True)
    with pytest.raises(ArtifactError, match=r"the manifest has no hash for 'other.so'"):
        Artifact.load(folder)


def test_parameters_outside_the_weights(folder: Path) -> None:
    """A manifest may be signed by anybody: its numbers must not reach beyond the file."""
    edit(folder, lambda data: data["regions"][0]["parameters"][0].update(offset=1 << 40), sign=True)
    with pytest.raises(ArtifactError, match="parameter p0 does not lie in the weights; compile the model again"):
        Session(folder)


def test_a_library_that_is_none(folder: Path) -> None:
    artifact = Artifact.load(folder)
    (folder / artifact.manifest.regions[0].file).write_bytes(b"no library")
    with pytest.raises(ArtifactError, match=r"cannot be loaded .*; compile the model again"):
        Session(folder, verify=False)


# --- the folder that takes the place of another -----------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_all_is_done(tmp_path: Path) -> None:
    with Workplace(tmp_path / "out", overwrite=False) as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["file"]


def test_nothing_stays_of_what_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Workplace(tmp_path / "deep" / "out", overwrite=False) as folder:
        (folder / "file").write_text("x")
        raise KeyboardInterrupt
    assert names(tmp_path / "deep") == []


def test_the_old_folder_stays_until_the_new_one_is_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text("old")
    with pytest.raises(ValueError), Workplace(out, overwrite=True):
        raise ValueError
    assert (out / "manifest.json").read_text() == "old" and names(tmp_path) == ["out"]
    with Workplace(out, overwrite=True) as folder:
        (folder / "manifest.json").write_text("new")
        assert (out / "manifest.json").read_text() == "old"
    assert (out / "manifest.json").read_text() == "new" and names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling link"])
def test_what_is_no_artifact_is_not_replaced(tmp_path: Path, kind: str) -> None:
    out, precious = tmp_path / "out", tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    if kind == "file":
        out.write_text("x")
    elif kind == "folder":
        shutil.copytree(precious, out)
    else:
        out.symlink_to(precious if kind == "link" else tmp_path / "nothing")
    before = names(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(OutputError), Workplace(out, overwrite):
            pytest.fail("must not get here")
    assert names(tmp_path) == before and names(precious) == ["file"]


def test_what_came_into_being_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """Two runs with the same output: the second to finish must not destroy what the first wrote."""
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="cannot be written"), Workplace(out, overwrite=False) as folder:
        (folder / "file").write_text("second")
        out.mkdir()
        (out / "file").write_text("first")
    assert (out / "file").read_text() == "first" and names(tmp_path) == ["out"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with Workplace(tmp_path / "out", overwrite=True) as folder:
        (folder / "file").write_text("x")
    assert names(tmp_path / "out") == ["file"]


def old_artifact(out: Path) -> Path:
    out.mkdir()
    (out / "manifest.json").write_text("old")
    return out


def test_two_folders_swap_names_in_one_step(tmp_path: Path) -> None:
    a, b = old_artifact(tmp_path / "a"), tmp_path / "b"
    b.mkdir()
    if not exchange(a, b):
        pytest.skip("this file system cannot")
    assert names(a) == [] and names(b) == ["manifest.json"]
    with pytest.raises(OSError):
        exchange(a, tmp_path / "nothing")


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphwright.runtime.artifact.exchange", lambda a, b: False)


@pytest.mark.usefixtures("no_exchange")
def test_replacing_in_two_steps(tmp_path: Path) -> None:
    out = old_artifact(tmp_path / "out")
    with Workplace(out, overwrite=True) as folder:
        (folder / "manifest.json").write_text("new")
    assert (out / "manifest.json").read_text() == "new" and names(tmp_path) == ["out"]


@pytest.mark.usefixtures("no_exchange")
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_failure_between_the_two_steps_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    out = old_artifact(tmp_path / "out")
    failing(monkeypatch, lambda source, target: str(source).endswith(".part"), error)
    with pytest.raises((OutputError, KeyboardInterrupt)), Workplace(out, overwrite=True) as folder:
        (folder / "manifest.json").write_text("new")
    assert (out / "manifest.json").read_text() == "old" and names(tmp_path) == ["out"]


@pytest.mark.usefixtures("no_exchange")
def test_an_old_one_that_cannot_be_put_back_is_named_and_comes_back_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = old_artifact(tmp_path / "out")
    with monkeypatch.context() as patch:
        failing(patch, lambda source, target: target == out, OSError(5, "Input/output error"))
        with pytest.raises(OutputError, match=r"is now .*\.out\..*\.old"), Workplace(out, True) as folder:
            (folder / "manifest.json").write_text("new")
    assert not out.exists()
    with pytest.raises(ArtifactError, match=r"set aside by an interrupted replacement; rename .*\.old to "):
        Artifact.load(out)
    with pytest.raises(OutputError, match="already exists"), Workplace(out, overwrite=False):
        pytest.fail("must not get here")
    assert "put back after an interrupted replacement" in caplog.text
    assert (out / "manifest.json").read_text() == "old" and names(tmp_path) == ["out"]


def failing(patch: pytest.MonkeyPatch, when: Callable[[Any, Any], bool], error: BaseException) -> None:
    """Let os.rename fail where `when(source, target)` says."""
    rename = os.rename

    def wrong(source: Any, target: Any) -> None:
        if when(source, target):
            raise error
        rename(source, target)

    patch.setattr("graphwright.runtime.artifact.os.rename", wrong)
