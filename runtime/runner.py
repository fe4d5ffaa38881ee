"""The runner: a small native program that runs one compiled library on any processor, and what it is made of.

`native/runner.cc`, with the thread pool of `native/pool.cc`, needs TVM's runtime libraries and nothing else. It is
compiled by zig on first use and kept in the user's cache, as are the runtime libraries of foreign processors, which
come from the wheels of the very TVM that is installed here. It is told what to do by a plan, a text file, and leaves
its results in a folder.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..passes.errors import ArtifactError, AssetError
from .link import GLIBC, cache_dir
from .native_code import compiled

if TYPE_CHECKING:
    from .artifact import Artifact, RegionSpec

log = logging.getLogger("graphwright")

PACKAGES = ("apache-tvm", "apache-tvm-ffi")
LIBRARIES = ("tvm_runtime", "tvm_runtime_extra", "tvm_ffi")


@dataclass(frozen=True)
class RuntimeLibraries:
    """Folders with TVM's runtime libraries for a processor, the folder of their headers, their versions."""

    machine: str
    folders: tuple[Path, ...]
    include: Path
    versions: tuple[str, ...]


def runtime_libraries(machine: str) -> RuntimeLibraries:
    """TVM's runtime for a processor: the installed one for the host's, else from its wheels, kept in the
    cache.

    Raises AssetError when the wheels cannot be fetched.
    """
    versions = tuple(f"{name}=={metadata.version(name)}" for name in PACKAGES)
    if machine == platform.machine():
        tvm, ffi = (_package_folder(name) for name in ("tvm", "tvm_ffi"))
        return RuntimeLibraries(machine, (tvm / "lib", ffi / "lib"), ffi / "include", versions)
    key = "-".join(version.rpartition("==")[2] for version in versions)
    root = cache_dir() / "runtime" / f"{machine}-{key}"
    if not root.is_dir():
        _fetch_runtime(machine, versions, root)
    return RuntimeLibraries(machine, (root / "lib",), root / "include", versions)


def _package_folder(name: str) -> Path:
    spec = util.find_spec(name)
    if spec is None or spec.origin is None:
        raise AssetError(
            f"the Python package {name} is not installed; run `pip install {' '.join(PACKAGES)}`"
        )
    return Path(spec.origin).parent


def _fetch_runtime(machine: str, versions: Sequence[str], root: Path) -> None:
    """Unpack the runtime libraries and headers from the wheels of `versions` into `root`, all or nothing."""
    log.info("fetching TVM's runtime for %s (100 MB, once)", machine)
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as name:
            work = Path(name)
            _download(machine, versions, work)
            unpacked = work / "root"
            for wheel in sorted(work.glob("*.whl")):
                _unpack(wheel, unpacked)
            absent = [lib for lib in LIBRARIES if not (unpacked / "lib" / f"lib{lib}.so").is_file()]
            if absent:
                raise AssetError(f"the wheels {', '.join(versions)} for {machine} have no lib{absent[0]}.so")
            try:
                os.rename(unpacked, root)
            except OSError:
                if not root.is_dir():  # otherwise another process was first, with the same files
                    raise
    except OSError as error:
        raise AssetError(
            f"{root}: cannot be written ({error.strerror}); set GRAPHWRIGHT_CACHE to a folder that can"
        ) from error


def _download(machine: str, versions: Sequence[str], folder: Path) -> None:
    tag = f"manylinux_{GLIBC.replace('.', '_')}_{machine}"
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--only-binary=:all:", "--platform", tag, "--dest", str(folder), *versions,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [
            f"exit status {done.returncode}"
        ]
        reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1])
        raise AssetError(f"TVM's runtime for {machine} cannot be fetched by pip: {reason}; check the network")


def _unpack(wheel: Path, root: Path) -> None:
    wanted = re.compile(
        rf"(?:tvm|tvm_ffi)/(lib/lib(?:{'|'.join(LIBRARIES)})\.so|include/(?:tvm|dlpack)/.+\.h)"
    )
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            if (match := wanted.fullmatch(entry.filename)) and ".." not in entry.filename:
                path = root / match[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, open(path, "wb") as file:
                    shutil.copyfileobj(source, file)


def build_runner(runtime: RuntimeLibraries) -> Path:
    """The runner for a processor, from the cache or compiled into it. Raises CompileError."""
    arguments = [
        f"-I{runtime.include}", *(f"-L{folder}" for folder in runtime.folders), "-Wl,--no-as-needed",
        *(f"-l{library}" for library in LIBRARIES), "-lpthread", "-ldl",
    ]  # fmt: skip
    triple = f"{runtime.machine}-linux-gnu.{GLIBC}"
    return compiled("runner", ["runner.cc", "pool.cc"], triple, arguments, runtime.versions)


def write_plan(
    artifact: Artifact,
    region: RegionSpec,
    inputs: Sequence[np.ndarray],
    folder: Path,
    *,
    threads: int,
    warmup: int,
    repeat: int,
) -> Path:
    """Write the inputs and the plan of one run (see native/runner.cc) into `folder`, where the results go
    too.
    """
    from .artifact import WEIGHTS

    root = artifact.root.absolute()
    lines = [f"library {root / region.file}", "function main", f"threads {threads}", f"output {folder}"]
    lines += [f"warmup {warmup}", f"repeat {repeat}"]
    if region.parameters:
        lines.append(f"weights {root / WEIGHTS}")
    for tensor in region.parameters:
        lines.append(f"parameter {_layout(tensor.dtype, tensor.shape)} {tensor.offset} {tensor.nbytes}")
    for index, array in enumerate(inputs):
        path = folder / f"input{index}.raw"
        np.ascontiguousarray(array).tofile(path)
        lines.append(f"input {_layout(array.dtype.name, array.shape)} {path}")
    if any("\n" in line for line in lines):
        raise ArtifactError(f"{str(root)!r}: a line break in the path; move the artifact")
    plan = folder / "plan.txt"
    plan.write_text("".join(f"{line}\n" for line in lines))
    return plan


def _layout(dtype: str, shape: Sequence[int]) -> str:
    return " ".join([dtype, str(len(shape)), *map(str, shape)])


def read_results(folder: Path) -> tuple[list[np.ndarray], list[float]]:
    """The tensors a run left in its folder, and the seconds of each timed call."""
    from .tvm_step import numpy_type

    arrays: list[np.ndarray] = []
    seconds: list[float] = []
    for line in (folder / "results.txt").read_text().splitlines():
        key, first, *rest = line.split()
        if key == "seconds":
            seconds.append(float(first))
        else:
            raw = np.fromfile(folder / f"{len(arrays)}.bin", numpy_type(first))
            arrays.append(raw.reshape([int(size) for size in rest[1:]]))
    return arrays, seconds
