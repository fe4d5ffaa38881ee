"""The whole road on real models through the command line: optimize --target, then compare with the original."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from graphwright.models import registry
from graphwright.runtime.device import qemu_available
from graphwright.runtime.spared import BETWEEN, UNKNOWN
from graphwright.tools import cli

pytestmark = [pytest.mark.tvm, pytest.mark.torch, pytest.mark.assets]

PINNED = ("magika", "ocr-cls", "silero-vad", "efficientnet-lite0", "minilm")
DYNAMIC = ("magika", "minilm", "silero-vad")
SLOW_PINNED = ("mobilenet-v2", "vit-tiny", "ocr-det", "smollm2")
SLOW_DYNAMIC = ("ocr-cls", "ocr-det", "efficientnet-lite0", "mobilenet-v2", "vit-tiny")
IMAGES_OF_ANY_SIZE = ("ocr-cls", "ocr-det", "silero-vad")  # or signals
ARM64 = ("mobilenet-v2", "efficientnet-lite0", "minilm")


def cases(fast: tuple[str, ...], slow: tuple[str, ...]) -> list[object]:
    return [*fast, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


def run(command: str, *arguments: str) -> str:
    result = CliRunner().invoke(cli.main, [command, *arguments], catch_exceptions=False)
    assert result.exit_code == 0, f"{command} {' '.join(arguments)}\n{result.stderr}"
    return result.stdout


def pins(name: str) -> list[str]:
    return [part for key, shape in registry.pins(name).items()
            if shape for part in ("--pin", f"{key}={'x'.join(map(str, shape))}")]  # fmt: skip


def optimized(path: Path, out: Path, target: str, *options: str) -> dict[str, Any]:
    run("optimize", str(path), "--passes", "two-pass-softmax", "--target", target, "-o", str(out), *options)
    return json.loads((out / "manifest.json").read_text())


@pytest.mark.parametrize("name", cases(PINNED, SLOW_PINNED))
def test_pinned(name: str, exported: Callable[..., Path], tmp_path: Path) -> None:
    path = exported(name)
    manifest = optimized(path, tmp_path / "out", "cpu", *pins(name))
    assert [region["runtime"] for region in manifest["regions"]] == ["tvm"]
    assert "equal" in run("compare", str(path), str(tmp_path / "out"))


@pytest.mark.parametrize("name", cases(DYNAMIC, SLOW_DYNAMIC))
def test_dynamic_axes_stay_dynamic(name: str, exported: Callable[..., Path], tmp_path: Path) -> None:
    path = exported(name)
    manifest = optimized(path, tmp_path / "out", "cpu")
    shapes = [value["shape"] for value in manifest["inputs"]]
    assert any(not isinstance(size, int) for shape in shapes for size in shape)
    left = [reason for region in manifest["regions"] for reason in region["reasons"].values()]
    if name in IMAGES_OF_ANY_SIZE:
        assert UNKNOWN in left and set(left) <= {UNKNOWN, BETWEEN}
    else:
        assert [region["runtime"] for region in manifest["regions"]] == ["tvm"] and not left
    assert "equal" in run("compare", str(path), str(tmp_path / "out"))


@pytest.mark.qemu
@pytest.mark.parametrize("name", ARM64)
def test_arm64_under_qemu(name: str, exported: Callable[..., Path], tmp_path: Path) -> None:
    if reason := qemu_available():
        pytest.skip(reason)
    path = exported(name)
    manifest = optimized(path, tmp_path / "out", "arm64", *pins(name))
    assert [region["runtime"] for region in manifest["regions"]] == ["tvm"]  # the host ran none of it
    assert "equal" in run("compare", str(path), str(tmp_path / "out"))


@pytest.mark.parametrize("name", cases(("magika", "ocr-cls"), ("ocr-det", "silero-vad")))
def test_doctor_says_what_cures_it(name: str, exported: Callable[..., Path], tmp_path: Path) -> None:
    text = run("doctor", str(exported(name)), "--target", "cpu", *pins(name))
    assert "pin-shapes" in text or "fold-constants" in text or "nothing" in text
