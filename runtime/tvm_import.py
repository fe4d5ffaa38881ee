"""`import tvm` without torch: TVM imports it wherever it is installed, for tensors that graphwright never hands over.

Measured: 1.9 s and 386 MB with torch, 0.6 s and 189 MB without. A process that only runs artifacts needs no compiler
either: `runtime_alone` saves another 100 MB.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from typing import Any


class _Hides(MetaPathFinder):
    """Says that a package is not installed, to the thread that made it."""

    def __init__(self, name: str) -> None:
        self.name, self.thread = name, threading.get_ident()

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == self.name and threading.get_ident() == self.thread:
            raise ModuleNotFoundError(f"{fullname} is not needed here", name=fullname)


@contextlib.contextmanager
def hidden(name: str) -> Iterator[None]:
    """Imports of a package that is not imported yet fail in this thread, as if it were not installed."""
    finder = _Hides(name)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


_alone = False
RUNTIME_LIB = "TVM_USE_RUNTIME_LIB"  # what TVM asks the environment for while it is imported


def runtime_alone() -> None:
    """From now on this process runs artifacts only: TVM, unless it is imported already, comes without its compiler.
    Child processes that compile are not concerned."""
    global _alone
    _alone = True


def import_tvm() -> Any:
    """The tvm module. torch may be imported before and after, but this does not do it."""
    with hidden("torch"), _asked_for_runtime(_alone):
        import tvm
        import tvm.runtime.vm
    return tvm


@contextlib.contextmanager
def _asked_for_runtime(alone: bool) -> Iterator[None]:
    if not alone or "tvm" in sys.modules:
        yield
        return
    before = os.environ.get(RUNTIME_LIB)
    os.environ[RUNTIME_LIB] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[RUNTIME_LIB]
        else:
            os.environ[RUNTIME_LIB] = before
