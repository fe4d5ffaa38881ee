"""`import tvm` without torch: TVM imports it wherever it is installed, for tensors that graphwright never hands over.

Measured: 1.9 s and 386 MB with torch, 0.6 s and 189 MB without.
"""

from __future__ import annotations

import contextlib
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


def import_tvm() -> Any:
    """The tvm module. torch may be imported before and after, but this does not do it."""
    with hidden("torch"):
        import tvm
    return tvm
