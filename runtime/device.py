"""Where a finished artifact is run: this machine, or another processor emulated by qemu.

    Device.open("local")           this machine
    Device.open("qemu:aarch64")    64-bit ARM under qemu's user mode: right numbers, meaningless times

A device runs each compiled library in a process of its own, by the native runner (runner.py), so a crash
there is a RunFailed here. `Session` runs artifacts inside this process; a `DeviceSession` has the same
interface.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import shutil
import signal
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..passes.errors import GraphwrightError, InputError, TargetError, UsageError, did_you_mean
from .artifact import Artifact, RegionSpec
from .partition import TVM
from .runner import RuntimeLibraries, build_runner, read_results, runtime_libraries, write_plan
from .session import Session, Step
from .state import State

log = logging.getLogger("graphwright")

TIMEOUT = 3600.0  # seconds for one run of one library
RAISED = 2  # the runner's exit status when the compiled function itself raised an error
QEMU_SETUP = "run tools/setup_qemu.sh as root"

# Processors that PyPI has TVM's runtime for, and Debian's folder of their C library.
SYSROOTS = {"aarch64": Path("/usr/aarch64-linux-gnu")}


class RunFailed(TargetError):
    """A compiled library was started on a device and did not come to an end."""


class NoAnswer(RunFailed):
    """It was still running when its time was over."""


class Device(ABC):
    """A place that artifacts are pushed to and run on.

    uri: what names it. machine: its processor, in uname's words.
    """

    uri: str
    machine: str

    @staticmethod
    def open(uri: str) -> Device:
        """The device a URI names. Raises UsageError (unknown) or TargetError (what it needs is not
        installed).
        """
        kind, _, rest = uri.partition(":")
        if uri == "local":
            return LocalDevice()
        if kind == "qemu":
            return QemuDevice(rest)
        raise UsageError(f"unknown device {uri!r}; {did_you_mean(uri, ['local', 'qemu:aarch64'])}")

    def push(
        self, artifact: str | os.PathLike[str] | Artifact, *, threads: int = 1, timeout: float = TIMEOUT
    ) -> DeviceSession:
        """Make an artifact ready to run here.

        threads: of TVM's pool. timeout: seconds for one run of one library.
        Raises ArtifactError (damaged) or TargetError (for another processor).
        """
        if not isinstance(artifact, Artifact):
            artifact = Artifact.load(artifact)
        self.accept(artifact)
        return DeviceSession(artifact, self, threads, timeout)

    def accept(self, artifact: Artifact) -> None:
        """Raises TargetError when the artifact is for another processor."""
        target = artifact.target
        if not target.is_cpu or target.machine != self.machine:
            fitting = "cpu" if self.machine == platform.machine() else {"aarch64": "arm64"}.get(self.machine)
            raise TargetError(
                f"{artifact.root}: built for {target.name} ({target.machine}), but {self.uri} is "
                f"{self.machine}; compile with --target {fitting}"
            )

    @abstractmethod
    def command(self, program: Path, libraries: Sequence[Path]) -> tuple[list[str], dict[str, str]]:
        """Arguments and environment that start `program` with these folders as its library path."""

    @cached_property
    def runtime(self) -> RuntimeLibraries:
        """TVM's runtime for this device's processor, fetched when it is not the host's."""
        return runtime_libraries(self.machine)

    @cached_property
    def runner(self) -> Path:
        """The runner program for this device's processor, compiled when it is not in the cache."""
        return build_runner(self.runtime)


class LocalDevice(Device):
    """This machine's own processor, in a process of its own."""

    uri = "local"

    def __init__(self) -> None:
        self.machine = platform.machine()

    def accept(self, artifact: Artifact) -> None:
        super().accept(artifact)
        target = artifact.target
        if not target.runs_here:
            raise TargetError(
                f"{artifact.root}: this processor lacks what {target.name} needs; compile with --target cpu"
            )

    def command(self, program: Path, libraries: Sequence[Path]) -> tuple[list[str], dict[str, str]]:
        return [str(program)], {**os.environ, "LD_LIBRARY_PATH": _search_path(libraries)}


class QemuDevice(Device):
    """Another processor, emulated. Raises TargetError when qemu or the cross C library is missing."""

    def __init__(self, machine: str) -> None:
        if machine not in SYSROOTS:
            known = ", ".join(f"qemu:{name}" for name in SYSROOTS)
            raise UsageError(f"unknown device 'qemu:{machine}'; known: {known}")
        if reason := _missing(machine):
            raise TargetError(reason)
        self.machine = machine
        self.uri = f"qemu:{machine}"

    def command(self, program: Path, libraries: Sequence[Path]) -> tuple[list[str], dict[str, str]]:
        emulator = _emulator(self.machine)
        assert emulator is not None
        path = f"LD_LIBRARY_PATH={_search_path(libraries)}"
        options = ["-cpu", "max", "-L", str(SYSROOTS[self.machine]), "-E", path]
        return [emulator, *options, str(program)], dict(os.environ)


def qemu_available(machine: str = "aarch64", *, fetch: bool = True) -> str | None:
    """Why artifacts for `machine` cannot be run under qemu here; None when they can.

    fetch: also fetch TVM's runtime for it and compile the runner, unless they are cached.
    """
    try:
        device = QemuDevice(machine)
        if fetch:
            _ = device.runner
    except GraphwrightError as error:
        return str(error)
    return None


def _search_path(folders: Sequence[Path]) -> str:
    return os.pathsep.join(map(str, folders))


def _emulator(machine: str) -> str | None:
    return shutil.which(f"qemu-{machine}-static") or shutil.which(f"qemu-{machine}")


def _missing(machine: str) -> str | None:
    if _emulator(machine) is None:
        return f"qemu:{machine}: found no qemu-{machine}-static on the PATH; {QEMU_SETUP}"
    for name in ("libc.so.6", "libstdc++.so.6"):
        if not (SYSROOTS[machine] / "lib" / name).exists():
            return f"qemu:{machine}: found no {name} in {SYSROOTS[machine] / 'lib'}; {QEMU_SETUP}"
    return None


class RunnerStep:
    """One compiled region of an artifact, run on a device by the native runner."""

    def __init__(
        self, artifact: Artifact, region: RegionSpec, device: Device, threads: int, timeout: float = TIMEOUT
    ) -> None:
        self.artifact, self.region, self.device = artifact, region, device
        self.threads, self.timeout = threads, timeout
        self.program = device.runner

    def __call__(self, values: Mapping[str, Any], state: State | None = None) -> dict[str, Any]:
        return self.timed(values, warmup=0, repeat=1)[0]

    def timed(self, values: Mapping[str, Any], *, warmup: int, repeat: int) -> tuple[dict[str, Any], list[float]]:
        """The region's outputs, and the seconds of each of `repeat` calls after `warmup` others.

        Raises InputError when the code refuses the inputs; RunFailed when it crashes, cannot be loaded or does not
        answer; TargetError when the processor lacks an instruction that it uses.
        """
        with tempfile.TemporaryDirectory(prefix="graphwright-run-") as name:
            folder = Path(name)
            inputs = [np.asarray(values[name]) for name in self.region.inputs]
            plan = write_plan(
                self.artifact, self.region, inputs, folder, threads=self.threads, warmup=warmup, repeat=repeat
            )
            self._run(plan)
            results, seconds = read_results(folder)
        return dict(zip(self.region.outputs, results, strict=True)), seconds

    def _run(self, plan: Path) -> None:
        command, environment = self.device.command(self.program, self.device.runtime.folders)
        what = f"{self.artifact.root / self.region.file} on {self.device.uri}"
        try:
            done = subprocess.run(
                [*command, str(plan)], capture_output=True, text=True, errors="replace", env=environment,
                stdin=subprocess.DEVNULL, timeout=self.timeout, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise NoAnswer(f"{what}: no answer in {self.timeout:g} s; give it a longer timeout") from error
        if done.returncode == 0:
            return
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        if done.returncode == RAISED and lines:  # a run-time check of the compiled code
            raise InputError(f"the compiled model refused these inputs: {lines[-1]}")
        if done.returncode in (-signal.SIGILL, 128 + signal.SIGILL):
            raise TargetError(
                f"{what}: stopped at an instruction the processor does not have; compile for a simpler target"
            )
        if done.returncode < 0:
            raise RunFailed(f"{what}: crashed ({signal.Signals(-done.returncode).name})")
        raise RunFailed(f"{what}: {lines[-1] if lines else f'failed with status {done.returncode}'}")


class DeviceSession(Session):
    """An artifact on a device, with the interface of `Session`.

    Regions that onnxruntime runs are run by onnxruntime on this host, also when the device is another
    processor.
    """

    def __init__(self, artifact: Artifact, device: Device, threads: int = 1, timeout: float = TIMEOUT) -> None:
        # Not super().__init__, which would load the libraries into this process.
        self.artifact, self.device, self.threads = artifact, device, threads
        self._inputs = {spec.name: spec for spec in artifact.manifest.inputs}
        self._outputs = [spec.name for spec in artifact.manifest.outputs]
        regions = artifact.manifest.regions
        self._steps = [_step(artifact, region, device, threads, timeout) for region in regions]

    def measure(self, feeds: Mapping[str, Any], *, warmup: int = 3, repeat: int = 10) -> list[float]:
        """Seconds that the compiled regions take on the device, together, in each of `repeat` runs."""
        values: dict[str, Any] = self._check(feeds)
        total = [0.0] * repeat
        for step in self._steps:
            if isinstance(step, RunnerStep):
                results, seconds = step.timed(values, warmup=warmup, repeat=repeat)
                total = [a + b for a, b in zip(total, seconds, strict=True)]
                values.update(results)
            else:
                values.update(step(values))
        return total


def emulated_step(artifact: Artifact, region: RegionSpec, threads: int) -> Step:
    """A region of an artifact for another processor, run under qemu. Raises TargetError when it cannot be."""
    return _step(artifact, region, _emulated(artifact.target.machine), threads, TIMEOUT)


def _step(artifact: Artifact, region: RegionSpec, device: Device, threads: int, timeout: float) -> Step:
    if region.runtime == TVM:
        return RunnerStep(artifact, region, device, threads, timeout)
    from .ort import OrtStep

    if device.machine != platform.machine():
        what = f"{region.nodes} nodes of {artifact.root / region.file}"
        log.warning("%s are run by onnxruntime on this host, not on %s", what, device.uri)
    return OrtStep(artifact, region, threads)


@functools.cache
def _emulated(machine: str) -> QemuDevice:
    if machine not in SYSROOTS:
        raise TargetError(f"nothing here runs code for {machine}; copy the artifact to such a machine")
    return QemuDevice(machine)
