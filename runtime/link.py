"""Objects of TVM -> one shared library, with PyPI's ziglang as the only tool; device sources beside it.

A link takes about 20 ms. Three things keep it there: zig is called as a program, not through another Python;
glibc is linked as zig's own stubs, made once per architecture in the user's cache; and zig's compiler runtime
(15 s to build, once per architecture) is only asked for by the rare library that calls into it, for 64-bit
division on armv7 say.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..passes.errors import CompileError
from . import elf
from .target import Target

if TYPE_CHECKING:
    import tvm

GLIBC = "2.28"  # the oldest that TVM's own runtime libraries accept
LIBRARY = "model.so"

# Kind of device module -> (the format `inspect_source` takes, the file its source is kept in).
SOURCES = {"cuda": ("", "kernels.cu"), "opencl": ("cl", "kernels.cl"), "webgpu": ("wgsl", "kernels.wgsl")}

# Left undefined on purpose: TVM's runtime has them. The last is in 32-bit ARM's unwind tables, never called.
_PROVIDED = ("TVM", "__TVM", "__tvm", "__aeabi_unwind_cpp_pr")


def cache_dir() -> Path:
    """Where what is slow to make or fetch is kept: $GRAPHWRIGHT_CACHE, else the user's cache folder."""
    if own := os.environ.get("GRAPHWRIGHT_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache").absolute() / "graphwright"


def zig_program() -> Path:
    """The zig executable of the ziglang package. Raises CompileError when it is not installed."""
    try:
        import ziglang
    except ImportError as error:
        raise CompileError("no linker: found no Python package ziglang; run `pip install ziglang`") from error
    program = Path(ziglang.__path__[0]) / ("zig.exe" if os.name == "nt" else "zig")
    if not program.is_file():
        raise CompileError(f"no linker: {program} is missing; run `pip install --force-reinstall ziglang`")
    return program


def zig_triple(target: Target) -> str:
    """zig's `-target` for a target, with the glibc version it may count on."""
    if not target.zig:
        raise CompileError(f"target {target.name}: no linker triple; set `zig` in the table of targets")
    return f"{target.zig}.{GLIBC}" if "-gnu" in target.zig else target.zig


def zig(command: Sequence[str], *, what: str) -> None:
    """Run zig with its shared cache in `cache_dir()` (it locks that) and its scratch files in a folder of
    this run.

    what: the thing being made, for the message. Raises CompileError with zig's own first error line.
    """
    program = zig_program()
    cache = cache_dir() / "zig"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompileError(
            f"{cache}: cannot be written ({error.strerror}); set GRAPHWRIGHT_CACHE to a folder that can"
        ) from error
    with tempfile.TemporaryDirectory(prefix="graphwright-zig-") as scratch:
        environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": scratch}
        try:
            done = subprocess.run(
                [str(program), *command], capture_output=True, text=True, errors="replace", env=environment,
                stdin=subprocess.DEVNULL, check=False,
            )  # fmt: skip
        except OSError as error:
            reason = f"{program} cannot be run ({error.strerror}); reinstall ziglang"
            raise CompileError(f"{what}: {reason}") from error
    if done.returncode != 0:
        raise CompileError(f"{what}: zig failed: {_reason(done.stderr, done.returncode)}")


def _reason(output: str, status: int) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if not lines:
        return f"exit status {status}" if status >= 0 else f"ended by signal {-status}"
    return next((line for line in lines if "error" in line.lower()), lines[-1])


def link(objects: Sequence[str | os.PathLike[str]], target: Target, path: str | os.PathLike[str]) -> Path:
    """Link object files into the shared library `path`: stripped, the same bytes for the same objects.

    Raises CompileError when zig is missing or fails, or when the code calls what no library there has.
    """
    path = Path(path)
    command = [
        "build-lib", "-dynamic", "-target", zig_triple(target), "-lc", "-lm", "-fstrip", "--build-id=none",
        "-fno-ubsan-rt", f"-fsoname={path.name}", f"-femit-bin={path}", *(os.fspath(o) for o in objects),
    ]  # fmt: skip
    zig([*command, "-fno-compiler-rt"], what=str(path))
    if _missing(path):
        zig([*command, "-fcompiler-rt"], what=str(path))
        if missing := _missing(path):
            path.unlink()
            names = ", ".join(sorted(missing)[:3])
            raise CompileError(f"{path}: the code calls {names}, which no library of {target.name} has")
    return path


def _missing(path: Path) -> list[str]:
    return [name for name in elf.read(path).undefined if not name.startswith(_PROVIDED)]


def linker(target: Target) -> Callable[..., None]:
    """`link` for `target` as the `fcompile` of TVM's `export_library`."""

    def fcompile(output: str, objects: list[str], **_: Any) -> None:
        link(objects, target, output)

    fcompile.object_format = "o"  # type: ignore[attr-defined]  # read by export_library
    return fcompile


def export(executable: tvm.runtime.Executable, target: Target, folder: Path) -> list[Path]:
    """Write what `tvm.compile` returned: the host library first, then the source of every device module.

    The library holds the device code too; the sources (`kernels.cu`, `kernels.cl`, `kernels.wgsl`) are
    there to be read, and for runtimes that take source. Raises CompileError.
    """
    library = folder / LIBRARY
    executable.export_library(str(library), fcompile=linker(target))
    files = [library]
    for module in device_modules(executable.mod):
        form, name = SOURCES[module.kind]
        path = folder / name
        if path in files:
            raise CompileError(f"{path}: two device modules of kind {module.kind}; expected one")
        path.write_text(module.inspect_source(form))
        files.append(path)
    return files


def device_modules(module: Any) -> Iterator[Any]:
    """The modules among `module` and its imports that hold device code."""
    if module.kind in SOURCES:
        yield module
    for imported in module.imports:
        yield from device_modules(imported)
