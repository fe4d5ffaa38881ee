"""Run mypy over the package under its import name.

The folders are mapped to graphwright.* by setuptools, which a type checker does not follow; a temporary tree of
symbolic links shows it the package as it is imported.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("passes", "runtime", "models", "tools")


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        package = Path(name) / "graphwright"
        package.mkdir()
        for file in (ROOT / "graphwright").iterdir():
            if file.is_file():
                (package / file.name).symlink_to(file)
        for room in ROOMS:
            (package / room).symlink_to(ROOT / room)
        config = ROOT / "pyproject.toml"
        cache = ROOT / ".mypy_cache"
        command = [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", str(cache), "graphwright"]
        return subprocess.run(command, cwd=name, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
