"""C++ of our own, compiled by zig on first use and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from ..passes.errors import CompileError
from .link import cache_dir, zig

NATIVE = Path(__file__).with_name("native")


def compiled(
    name: str, sources: Sequence[str], triple: str, arguments: Sequence[str], versions: Sequence[str] = ()
) -> Path:
    """The program or library `name` made of files of the folder `native`, for a processor.

    triple: zig's `-target`. arguments: of the compiler, behind the sources. versions: of what else decides about the
    result, such as the headers in folders that `arguments` names. The file's own name ends in a hash of all of it but
    where folders are. Raises CompileError.
    """
    texts = [path.read_text() for path in sorted(NATIVE.iterdir())]
    flags = [argument for argument in arguments if "/" not in argument]
    ingredients = (*texts, *sources, triple, *flags, *versions, metadata.version("ziglang"))
    key = hashlib.sha256("\0".join(ingredients).encode()).hexdigest()[:16]
    path = cache_dir() / name / f"{triple}-{key}"
    if path.is_file():
        return path
    # No C++ standard library: TVM's libraries bring GNU's, and a second one in the process would mix with it.
    command = [
        "c++", "-target", triple, "-std=c++17", "-O2", "-s", "-Wall", "-Wextra", "-fno-exceptions", "-fno-rtti",
        "-fno-sanitize=all", "-nostdlib++", *(str(NATIVE / source) for source in sources), *arguments,
    ]  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as work:
            zig([*command, "-o", f"{work}/{name}"], what=f"the {name} for {triple}")
            os.replace(f"{work}/{name}", path)
    except OSError as error:
        raise CompileError(
            f"{path}: cannot be written ({error.strerror}); set GRAPHWRIGHT_CACHE to a folder that can"
        ) from error
    return path
