from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphwright.passes.errors import AssetError, InputError, TargetError, UsageError
from graphwright.runtime import device, native_code, runner
from graphwright.runtime.device import Device, RunnerStep

from .conftest import DTYPES, Dense, Transposes

# A dot product of 16 float32 terms around 1: a few roundings of a sum below 16.
TOLERANCE = 1e-5

Make = Callable[[Any, str, Path], Any]


@pytest.fixture(scope="module")
def artifact(dense: Dense, make_artifact: Make, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_artifact(dense, "cpu", tmp_path_factory.mktemp("local") / "a folder with spaces")


def test_local_computes_what_numpy_does(artifact: Any, dense: Dense) -> None:
    session = Device.open("local").push(artifact)
    results = session.run(None, dense.feeds)
    for result, expected in zip(results, dense.expected, strict=True):
        np.testing.assert_allclose(result, expected, rtol=0, atol=TOLERANCE)
    assert [result.dtype for result in results] == [np.float32, np.float32]


def test_an_artifact_is_also_taken_by_its_folder(artifact: Any, dense: Dense) -> None:
    results = Device.open("local").push(artifact.root, threads=2).run(["d"], dense.feeds)
    np.testing.assert_allclose(results[0], dense.expected[1], rtol=0, atol=TOLERANCE)


def test_every_element_type_passes_through(
    transposes: Transposes, make_artifact: Make, tmp_path: Path
) -> None:
    session = Device.open("local").push(make_artifact(transposes, "cpu", tmp_path / "a"))
    results = session.run(None, transposes.feeds)
    assert len(results) == 2 * (len(DTYPES) + 2)
    for result, expected in zip(results, transposes.expected, strict=True):
        assert result.dtype == expected.dtype
        np.testing.assert_array_equal(result, expected)


def test_times_are_given_for_each_run(artifact: Any, dense: Dense) -> None:
    seconds = Device.open("local").push(artifact).measure(dense.feeds, warmup=1, repeat=4)
    assert len(seconds) == 4 and all(0 < s < 10 for s in seconds)


def test_feeds_are_checked_before_they_are_sent(artifact: Any, dense: Dense) -> None:
    session = Device.open("local").push(artifact)
    with pytest.raises(InputError, match="'x'"):
        session.run(None, {"y": dense.feeds["y"]})
    with pytest.raises(InputError, match="float64"):
        session.run(None, {**dense.feeds, "x": dense.feeds["x"].astype(np.float64)})


def test_unknown_devices_are_named_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown device 'locale'; did you mean local\?"):
        Device.open("locale")
    with pytest.raises(UsageError, match=r"unknown device 'qemu:sparc'; known: qemu:aarch64"):
        Device.open("qemu:sparc")


def test_an_artifact_for_another_processor_is_refused(
    dense: Dense, make_artifact: Make, tmp_path: Path
) -> None:
    made = make_artifact(dense, "riscv64", tmp_path / "a")
    with pytest.raises(TargetError, match=r"built for riscv64 .*compile with --target cpu"):
        Device.open("local").push(made)
    with pytest.raises(TargetError, match="nothing here runs code for riscv64"):
        device.emulated_step(made, made.manifest.regions[0], 1)


def test_an_artifact_for_a_better_processor_is_refused(
    artifact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(artifact.target), "runs_here", False)
    with pytest.raises(TargetError, match="this processor lacks what cpu needs"):
        Device.open("local").push(artifact)


def test_a_library_that_cannot_be_loaded_is_one_line(
    dense: Dense, make_artifact: Make, tmp_path: Path
) -> None:
    made = make_artifact(dense, "cpu", tmp_path / "a")
    session = Device.open("local").push(made)
    (made.root / "region0.so").write_bytes(b"no library")
    with pytest.raises(TargetError, match=r"region0\.so on local: ffi\.ModuleLoadFromFile: ") as error:
        session.run(None, dense.feeds)
    assert "\n" not in str(error.value)


def test_weights_that_are_too_short_are_found(dense: Dense, make_artifact: Make, tmp_path: Path) -> None:
    made = make_artifact(dense, "cpu", tmp_path / "a")
    session = Device.open("local").push(made)
    with open(made.root / "weights.bin", "r+b") as file:
        file.truncate(100)
    with pytest.raises(TargetError, match="parameter 0 lies outside the weights file"):
        session.run(None, dense.feeds)


def test_inputs_that_the_code_refuses(make_artifact: Make, tmp_path: Path) -> None:
    from tvm.script import ir as I
    from tvm.script import relax as R

    @I.ir_module
    class Module:
        @R.function
        def main(x: R.Tensor(("n", 2), "float32"), p: R.Tuple()):
            with R.dataflow():
                y = R.match_cast(x, R.Tensor((1, 2), "float32"))
                z = R.add(y, y)
                R.output(z)
            return z

    wide = np.zeros((3, 2), np.float32)
    made = make_artifact(Dense(Module, {}, {"x": wide}, [wide], ("z",)), "cpu", tmp_path / "a")
    with pytest.raises(InputError, match=r"the compiled model refused these inputs: main: .*3"):
        Device.open("local").push(made).run(None, {"x": wide})


def test_a_device_that_does_not_answer_is_given_up(artifact: Any, dense: Dense) -> None:
    session = Device.open("local").push(artifact, timeout=0.3)
    step = session._steps[0]
    assert isinstance(step, RunnerStep)
    with pytest.raises(TargetError, match=r"no answer in 0\.3 s"):
        step.timed(dense.feeds, warmup=0, repeat=10**9)


def test_the_runner_refuses_a_broken_plan(tmp_path: Path) -> None:
    local = Device.open("local")
    (tmp_path / "plan.txt").write_text("library model.so\ninput float32 2 3\n")
    command, environment = local.command(local.runner, local.runtime.folders)
    plan = str(tmp_path / "plan.txt")
    done = subprocess.run([*command, plan], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr == "the plan is cut short\n"


def test_qemu_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    reason = device.qemu_available(fetch=False)
    assert reason is not None and "found no qemu-aarch64-static" in reason and "tools/setup_qemu.sh" in reason
    program = tmp_path / "qemu-aarch64-static"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setitem(device.SYSROOTS, "aarch64", tmp_path)
    reason = device.qemu_available(fetch=False)
    assert reason is not None and "found no libc.so.6" in reason


def test_a_runtime_that_cannot_be_fetched_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    foreign = "aarch64" if platform.machine() != "aarch64" else "x86_64"
    with pytest.raises(AssetError, match=f"TVM's runtime for {foreign} cannot be fetched by pip: ERROR: "):
        runner.runtime_libraries(foreign)
    assert not list((tmp_path / "runtime").iterdir())


def test_the_runner_is_built_without_a_system_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = runner.runtime_libraries(platform.machine())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(native_code, "cache_dir", lambda: tmp_path)  # zig's own cache stays warm
    program = runner.build_runner(runtime)
    assert program.parent == tmp_path / "runner" and program.stat().st_mode & 0o111
    assert runner.build_runner(runtime) == program
