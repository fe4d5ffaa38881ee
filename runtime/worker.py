"""Compilation in a child process: what crashes there is an error here.

The child imports TVM once and then compiles one region a request; a crash or a time-out ends the child, and the next
request starts another. Run as `python -m graphwright.runtime.worker READ_FD WRITE_FD`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ..passes.errors import CompileError
from .tuning import Measured, Tunable
from .work import Work

TIMEOUT = 3600.0  # seconds for one region

_sharing = threading.Lock()


@dataclass(frozen=True)
class Compiled:
    """What the child made in the region's folder. parameters: (name, dtype, shape, offset, nbytes) in `weights`.
    work: of its kernels. in_place: number of an output -> number of the input in whose memory it is made.
    """

    library: str
    weights: str
    parameters: list[tuple[str, str, tuple[int, ...], int, int]]
    sources: list[str]
    work: Work = field(default_factory=Work)
    in_place: dict[int, int] = field(default_factory=dict)


class Crashed(CompileError):
    """The child died; `str` says how."""


class Compiler:
    """A child process that compiles. One per process is enough: `Compiler.shared()`."""

    _shared: Compiler | None = None

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._lock = threading.Lock()  # one request at a time: the answers come in order
        self._owner = os.getpid()

    @classmethod
    def shared(cls) -> Compiler:
        """This process's compiler; a forked process gets its own."""
        with _sharing:
            if cls._shared is None or cls._shared._owner != os.getpid():
                cls._shared = cls()
                atexit.register(cls._shared.close)
            return cls._shared

    def compile(self, model: Path, target: dict[str, Any], folder: Path, timeout: float = TIMEOUT) -> Compiled:
        """Compile the ONNX file `model` into `folder`. Raises CompileError (refused) or Crashed."""
        return self._ask(("compile", str(model), target, str(folder)), timeout)

    def refusals(self, model: Path, target: dict[str, Any], timeout: float = TIMEOUT) -> dict[int, str]:
        """Index of main-graph node -> why TVM cannot take it, by looking at each."""
        return self._ask(("refusals", str(model), target), timeout)

    def tunables(self, model: Path, target: dict[str, Any], timeout: float = TIMEOUT) -> list[Tunable]:
        """The kernels of an ONNX file whose tiles can be chosen."""
        return self._ask(("tunables", str(model), target), timeout)

    def measure(
        self, kernel: Tunable, target: dict[str, Any], threads: int, seconds: float, timeout: float = 600.0
    ) -> Measured:
        """The tiles that a kernel could have, measured within about so many seconds."""
        request = ("measure", kernel.template, kernel.spec, target, threads, seconds)
        return self._ask(request, timeout)

    def probe(self, model: Path, target: dict[str, Any], folder: Path, timeout: float = 120.0) -> str | None:
        """Why a model (of one node) does not compile; None when it does."""
        try:
            self._ask(("compile", str(model), target, str(folder)), timeout)
        except CompileError as error:
            return str(error)
        return None

    def _ask(self, request: tuple[Any, ...], timeout: float) -> Any:
        with self._lock:
            try:
                ok, value = self._exchange(request, timeout)
            except BaseException:  # Ctrl-C too: an answer that comes later must not be taken for the next one
                self.close()
                raise
        if not ok:
            raise CompileError(value)
        return value

    def _exchange(self, request: tuple[Any, ...], timeout: float) -> tuple[bool, Any]:
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._connection is not None and self._process is not None
        try:
            self._connection.send(request)
            if not self._connection.poll(timeout):
                raise Crashed(f"the compiler did not answer within {timeout:.0f} s")
            return self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            code = self._process.wait()
            raise Crashed(f"the compiler crashed ({_cause(code)})") from None

    def _start(self) -> None:
        self.close()
        request_read, request_write = os.pipe()
        reply_read, reply_write = os.pipe()
        command = [sys.executable, "-m", "graphwright.runtime.worker", str(request_read), str(reply_write)]
        self._process = subprocess.Popen(
            command, pass_fds=(request_read, reply_write), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=None if os.environ.get("GRAPHWRIGHT_DEBUG") else subprocess.DEVNULL,
            start_new_session=True,  # its linker ends with it; Ctrl-C reaches only the parent, which decides
        )  # fmt: skip
        os.close(request_read)
        os.close(reply_write)
        self._connection = _Pipe(reply_read, request_write)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None and self._owner == os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None


class _Pipe(Connection):
    """A connection over two one-way pipes."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        super().__init__(read_fd, writable=False)
        self._out = Connection(write_fd, readable=False)

    def send(self, obj: Any) -> None:
        self._out.send(obj)

    def close(self) -> None:
        super().close()
        self._out.close()


def _cause(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"


# --- the child --------------------------------------------------------------------------------------------------


def _compile(path: str, target_json: dict[str, Any], folder: str) -> Compiled:
    from .build import compile_region
    from .target import Target

    return compile_region(Path(path), Target.from_json(target_json), Path(folder))


def _refusals(path: str, target_json: dict[str, Any]) -> dict[int, str]:
    import onnx

    model = onnx.load(path)
    from .importer import refusals
    from .target import Target

    return refusals(model, Target.from_json(target_json))


def _tunables(path: str, target_json: dict[str, Any]) -> list[Tunable]:
    from .target import Target
    from .trials import tunables

    return tunables(Path(path), Target.from_json(target_json))


def _measure(
    template: str, spec: dict[str, Any], target_json: dict[str, Any], threads: int, seconds: float
) -> Measured:
    from .target import Target
    from .trials import measure

    return measure(template, spec, Target.from_json(target_json), threads, seconds)


REQUESTS: dict[str, Callable[..., Any]] = {
    "compile": _compile, "refusals": _refusals, "tunables": _tunables, "measure": _measure
}  # fmt: skip


def _end_with(parent: int) -> None:
    """End this process and its linker when the parent is gone, in the middle of a compilation too."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    from .tvm_import import import_tvm

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    pipe = _Pipe(int(sys.argv[1]), os.dup(int(sys.argv[2])))
    import_tvm()
    while True:
        try:
            name, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            reply = (True, REQUESTS[name](*arguments))
        except Exception as error:  # whatever the compiler raises is the answer to this request
            reply = (False, explain(error))
        pipe.send(reply)


def explain(error: BaseException) -> str:
    """The line of a compiler's error that says what went wrong: the last of TVM's message, without its traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = next((line for line in lines if "rror" in line or "Check failed" in line), lines[0] if lines else "")
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


if __name__ == "__main__":
    main()
