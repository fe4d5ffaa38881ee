"""The thread pool that compiled kernels run on: native/pool.cc, a file of the artifact that its processor loads.

TVM's own pool divides a kernel among threads and waits for each of them; one that other programs keep from running
holds up all, and its threads wait by yielding, which gives their time slices away.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
import threading
from importlib import metadata, util
from pathlib import Path
from typing import Any

from ..passes.errors import ArtifactError
from .artifact import file_hash
from .link import LIBRARY, linker, zig_triple
from .native_code import compiled
from .target import Target

_pools: dict[str, Pool] = {}
loading = threading.RLock()  # who loads a library; a process that is forked meanwhile would find it held for ever
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=loading.acquire, after_in_parent=loading.release, after_in_child=loading.release)


def place_pool(target: Target, folder: Path) -> str:
    """Put the pool for a target's processor into an artifact's folder; returns the file's name. Raises CompileError."""
    library = _library(target)
    name = f"pool-{library.name.rpartition('-')[2]}.so"
    shutil.copy(library, folder / name)
    return name


def on_pool(executable: Any, target: Target) -> Any:
    """What `tvm.compile` returned, loaded in this process as an artifact is, its kernels on the same pool. Raises
    CompileError.
    """
    import tvm

    with tempfile.TemporaryDirectory(prefix="graphwright-") as folder:
        library = Path(folder) / LIBRARY
        executable.export_library(str(library), fcompile=linker(target))
        module = tvm.runtime.load_module(str(library))
        Pool.here(target).adopt(library)
    return module


def _library(target: Target) -> Path:
    spec = util.find_spec("tvm_ffi")
    assert spec is not None and spec.origin is not None
    include = Path(spec.origin).with_name("include")
    arguments = ["-shared", "-fPIC", f"-I{include}", "-lpthread", "-ldl"]
    versions = [metadata.version("apache-tvm-ffi")]
    return compiled("pool", ["pool.cc"], zig_triple(target), arguments, versions)


class Pool:
    """A pool in this process; there is one for all artifacts that bring the same. Raises ArtifactError."""

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(os.fspath(path.absolute()))
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be loaded ({error}); compile the model again") from error
        self._library.graphwright_pool_use.argtypes = [ctypes.c_int]
        self._library.graphwright_pool_use.restype = None
        self._library.graphwright_pool_adopt.argtypes = [ctypes.c_char_p]

    @classmethod
    def of(cls, path: Path, digest: str) -> Pool:
        """The pool of an artifact. digest: the file's hash."""
        with loading:
            if digest not in _pools:
                _pools[digest] = cls(path)
            return _pools[digest]

    @classmethod
    def here(cls, target: Target) -> Pool:
        """The pool of artifacts of a target that runs on this machine. Raises CompileError."""
        library = _library(target)
        return cls.of(library, file_hash(library))

    def use(self, threads: int) -> None:
        """Let launches from this Python thread use so many threads, itself included."""
        self._library.graphwright_pool_use(threads)

    def adopt(self, library: Path) -> bool:
        """Let the kernels of a library that TVM has loaded run here. False where their tasks wait for each other."""
        return self._library.graphwright_pool_adopt(os.fsencode(library.absolute())) == 0
