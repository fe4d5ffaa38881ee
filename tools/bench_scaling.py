"""How the time and memory of `optimize` (no compilation) grow with the graph and with its weights.

    python -m graphwright.tools.bench_scaling                 1,000 to 100,000 nodes, and 2 GB of external weights
    python -m graphwright.tools.bench_scaling --quick         1,000 to 10,000 nodes

Every figure is of a fresh process running `optimize MODEL -o OUT`: the preset, verification and saving included.
Memory is its largest resident set less that of an interpreter that has imported the same packages.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NODES = (1_000, 3_000, 10_000, 30_000, 100_000)
MB = 1 << 20

CHILD = """
import re, sys, time
import numpy, onnx, onnx_ir, onnxruntime, onnxscript
from onnxscript import optimizer, rewriter
import graphwright.runtime.driver as driver
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before, start = peak(), time.perf_counter()
result = driver.optimize(sys.argv[1], out=sys.argv[2], overwrite=True, verify=sys.argv[3] == "verify", threads=1)
print(__import__("json").dumps({"seconds": time.perf_counter() - start, "peak_mb": peak(), "extra_mb": peak() - before,
      "nodes": len(result.model.graph), "changes": sum(len(r.changes) for r in result.reports)}))
"""


def residual_chain(nodes: int, width: int, path: Path) -> int:
    """A graph of `nodes` nodes with everything the preset looks for: constants to fold, repeats, no-ops. Each block
    of ten nodes has a weight of its own. Returns the weights' bytes.
    """
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    made: list[onnx.NodeProto] = []
    weights = [
        numpy_helper.from_array(np.array([0.5], np.float32), "half"),
        numpy_helper.from_array(np.array([2.0], np.float32), "two"),
    ]
    value = "x"

    def node(op: str, inputs: list[str], name: str) -> str:
        made.append(helper.make_node(op, inputs, [name]))
        return name

    for block in range(nodes // 10):
        weight = f"w{block}"
        weights.append(numpy_helper.from_array(rng.standard_normal((width, width)).astype(np.float32), weight))
        product = node("MatMul", [value, weight], f"p{block}")
        folded = node("Mul", ["half", "two"], f"c{block}")
        scaled = node("Mul", [product, folded], f"s{block}")
        same = node("Identity", [scaled], f"i{block}")
        left = node("Tanh", [same], f"l{block}")
        right = node("Tanh", [scaled], f"r{block}")
        total = node("Add", [left, right], f"t{block}")
        halved = node("Mul", [total, "half"], f"h{block}")
        positive = node("Relu", [halved], f"q{block}")
        value = node("Add", [positive, value], f"v{block}")
    graph = helper.make_graph(
        made, "chain",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, width])],
        [helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, [1, width])],
        weights,
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return (nodes // 10) * width * width * 4


def external_weights(gigabytes: float, path: Path) -> int:
    """A chain of matrix products whose weights lie in one external file; written without holding them."""
    import numpy as np
    import onnx
    from onnx import helper

    width = 4096
    nbytes = width * width * 4
    count = max(1, int(gigabytes * (1 << 30) // nbytes))
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    with open(path.with_name(path.name + ".data"), "wb") as file:
        for index in range(count):
            tensor = onnx.TensorProto(name=f"w{index}", data_type=onnx.TensorProto.FLOAT, dims=[width, width])
            tensor.data_location = onnx.TensorProto.EXTERNAL
            entries = (("location", path.name + ".data"), ("offset", str(file.tell())), ("length", str(nbytes)))
            for key, value in entries:
                tensor.external_data.add(key=key, value=value)
            weights.append(tensor)
            file.write((rng.standard_normal((width, width)) / 64).astype(np.float32).tobytes())
            nodes.append(helper.make_node("MatMul", [f"v{index}", f"w{index}"], [f"v{index + 1}"]))
    graph = helper.make_graph(
        nodes, "external",
        [helper.make_tensor_value_info("v0", onnx.TensorProto.FLOAT, [1, width])],
        [helper.make_tensor_value_info(f"v{count}", onnx.TensorProto.FLOAT, [1, width])],
        weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return count * nbytes


def measure(path: Path, verify: bool) -> dict[str, float]:
    """One `optimize` in a fresh process."""
    out = path.with_name("out.onnx")
    mode = "verify" if verify else "no-verify"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(out), mode], check=True, capture_output=True, text=True
    )
    for file in path.parent.glob("out.onnx*"):
        file.unlink()
    return {**json.loads(done.stdout.splitlines()[-1]), "wall": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 10,000 nodes, no large weights")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="external weights of the memory test")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    figures: dict[str, list[dict[str, float]]] = {"nodes": [], "weights": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"{'nodes':>8} {'weights MB':>11} {'optimize s':>11} {'process s':>10} {'us a node':>10} {'extra MB':>9}")
        for nodes in [n for n in NODES if n <= 10_000] if options.quick else NODES:
            path = folder / "chain.onnx"
            weights = residual_chain(nodes, 64 if nodes > 10_000 else 256, path)
            for verify in (False, True):
                found = measure(path, verify) | {"weights_mb": weights / MB, "model_nodes": nodes, "verify": verify}
                figures["nodes"].append(found)
                print(
                    f"{nodes:>8} {weights / MB:>11.0f} {found['seconds']:>11.2f} {found['wall']:>10.2f} "
                    f"{found['seconds'] / nodes * 1e6:>10.0f} {found['extra_mb']:>9.0f}"
                    + ("  with verification" if verify else "")
                )
        if not options.quick:
            path = folder / "external.onnx"
            weights = external_weights(options.gigabytes, path)
            for verify in (False, True):
                found = measure(path, verify) | {"weights_mb": weights / MB, "verify": verify}
                figures["weights"].append(found)
                print(
                    f"external weights {weights / MB:.0f} MB: {found['seconds']:.1f} s, largest resident set "
                    f"{found['peak_mb']:.0f} MB" + (", with verification" if verify else "")
                )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
