"""How long loading an artifact takes, in fresh processes: 100 MB of weights, every file checked against its hash.

    python -m graphwright.tools.bench_load
    python -m graphwright.tools.bench_load --megabytes 500 --processes 9

`load` is `graphwright.load` where `import tvm` has happened; `again` is a second load in the same process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WIDTH = 1024
CHILD = """
WIDTH = 1024
import json, sys, time
times, start = {}, time.perf_counter()
def lap(name):
    global start
    now = time.perf_counter()
    times[name], start = (now - start) * 1e3, time.perf_counter()
from graphwright.runtime.tvm_step import load_tvm
load_tvm()
lap("import")
import graphwright
session = graphwright.load(sys.argv[1])
lap("load")
graphwright.load(sys.argv[1])
lap("again")
from graphwright.runtime.session import Session
Session(sys.argv[1], verify=False)
lap("without hashes")
import numpy
session.run(None, {"v0": numpy.ones((1, WIDTH), numpy.float32)})
lap("first run")
print(json.dumps(times))
"""
PARTS = ("import", "load", "again", "without hashes", "first run")


def chain(megabytes: int, path: Path) -> int:
    """A chain of matrix products whose weights take so much. Returns their bytes."""
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    count = max(1, megabytes * 10**6 // (4 * WIDTH * WIDTH))
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array((rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32), f"w{i}")
        for i in range(count)
    ]
    nodes = [helper.make_node("MatMul", [f"v{i}", f"w{i}"], [f"v{i + 1}"]) for i in range(count)]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, WIDTH]) for name in ("v0", f"v{count}")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return count * 4 * WIDTH * WIDTH


def measure(artifact: Path, processes: int) -> dict[str, Any]:
    """Milliseconds of each part: median, 10th and 90th percentile over fresh processes."""
    from ..runtime.measure import Spread

    times: dict[str, list[float]] = {part: [] for part in PARTS}
    for _ in range(processes):
        done = subprocess.run([sys.executable, "-c", CHILD, str(artifact)], check=True, capture_output=True, text=True)
        for part, value in json.loads(done.stdout.splitlines()[-1]).items():
            times[part].append(value)
    return {part: Spread.of(values).to_json() for part, values in times.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=100, help="of weights (100)")
    parser.add_argument("--processes", type=int, default=5, help="fresh ones that load it (5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args(arguments)
    from ..runtime.driver import optimize

    with tempfile.TemporaryDirectory() as name:
        nbytes = chain(options.megabytes, Path(name) / "chain.onnx")
        artifact = Path(name) / "chain"
        optimize(Path(name) / "chain.onnx", target="cpu", out=artifact, verify=False)
        found = measure(artifact, options.processes)
    print(f"{nbytes / 1e6:.0f} MB of weights, {options.processes} processes; ms")
    for part, spread in found.items():
        print(f"{part:>15} {spread['median']:9.1f} [{spread['low']:.1f}, {spread['high']:.1f}]")
    if options.json:
        options.json.write_text(json.dumps({"bytes": nbytes, "ms": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
