"""Peak memory of one model in a process of its own.

Run as `python -m graphwright.tools.memory PATH BACKEND THREADS FEEDS.pickle`: loads, runs a few times, and prints the
largest resident set in MB.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

RUNS = 3


def peak_of(path: Path, backend: str, threads: int, feeds: Mapping[str, np.ndarray]) -> float:
    """Peak resident memory in MB of a fresh process that loads the model and runs it on `feeds`.

    Raises InputError when the process fails.
    """
    from graphwright.passes.errors import InputError

    with tempfile.NamedTemporaryFile(prefix="graphwright-", suffix=".pickle") as file:
        pickle.dump(dict(feeds), file)
        file.flush()
        command = [
            sys.executable,
            "-m",
            "graphwright.tools.memory",
            str(path),
            backend,
            str(threads),
            file.name,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise InputError(f"{path}: measuring its memory failed: {lines[-1]}")
    return float(done.stdout.split()[-1])


def main() -> None:
    """The child: see the module's docstring."""
    from graphwright.runtime.measure import peak_rss_mb

    from .opened import load_session

    path, backend, threads, file = sys.argv[1:]
    feeds = pickle.loads(Path(file).read_bytes())  # written by our own parent
    session = load_session(Path(path), backend, int(threads))
    for _ in range(RUNS):
        session.run(None, feeds)
    print(peak_rss_mb())


if __name__ == "__main__":
    main()
