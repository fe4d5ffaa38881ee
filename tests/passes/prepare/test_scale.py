"""What text cannot show: time, memory, and files that are not read."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.base import PassContext
from graphwright.passes.pipeline import Pipeline
from graphwright.passes.prepare.dedupe_initializers import DedupeInitializers
from graphwright.passes.prepare.protobuf import light_proto
from graphwright.passes.registry import PRESETS
from onnx import TensorProto, helper

PREPARE = [
    "pin-shapes", "infer-shapes", "fold-constants", "dead-code", "common-subexpressions", "simplify",
    "lift-constants", "dedupe-initializers", "inline-functions", "convert-opset", "decompose", "cancel-transposes",
    "standardise-contrib", "fold-pad",
]  # fmt: skip


def long_model(blocks: int) -> ir.Model:
    """Ten nodes a block, with something to do for every pass."""
    nodes, value = [], "x"
    for i in range(blocks):
        nodes += [
            helper.make_node("Add", [value, f"w{i % 50}"], [f"a{i}"]),
            helper.make_node("Relu", [f"a{i}"], [f"b{i}"]),
            helper.make_node("Identity", [f"b{i}"], [f"c{i}"]),
            helper.make_node("Shape", [f"c{i}"], [f"s{i}"]),
            helper.make_node("Reshape", [f"c{i}", f"s{i}"], [f"r{i}"]),
            helper.make_node("Transpose", [f"r{i}"], [f"t{i}"], perm=[1, 0]),
            helper.make_node("Transpose", [f"t{i}"], [f"u{i}"], perm=[1, 0]),
            helper.make_node("Constant", [], [f"k{i}"], value_float=float(i % 7) + 1),
            helper.make_node("Mul", [f"u{i}", f"k{i}"], [f"m{i}"]),
            helper.make_node("Sigmoid", [f"m{i}"], [f"n{i}"]),
        ]
        value = f"n{i}"
    weights = [onnx.numpy_helper.from_array(np.full(4, i, np.float32), f"w{i}") for i in range(50)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in ("x", value)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))


def seconds(step: str, model: ir.Model) -> float:
    """Processor time of the best of three runs."""
    best = float("inf")
    for _ in range(3):
        copy = model.clone()
        start = time.process_time()
        for one in Pipeline.parse(step):
            one.run(copy, PassContext())
        best = min(best, time.process_time() - start)
    return best


@pytest.mark.parametrize("step", PREPARE)
def test_time_grows_linearly(step: str) -> None:
    """Eight times the nodes take about eight times the time; a quadratic pass would take 64 times."""
    small, large = seconds(step, long_model(50)), seconds(step, long_model(400))
    assert large < 24 * max(small, 1e-3)


@pytest.mark.parametrize(
    "node",
    [
        "big = ConstantOfShape (n)",
        "big = Expand (one, n)",
        "big = Tile (one_long, n)",
        "big = Range (zero, limit, step)",
        "big = OneHot (one_long, limit, pair)",
        "big = Pad (one_long, pads)",
    ],
)
def test_a_large_result_is_never_made(node: str) -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[1] X) => (float[1] Y) <int64[1] n = {{125000000}}, float one = {{1}}, int64[1] one_long = {{1}},
     int64 zero = {{0}}, int64 limit = {{125000000}}, int64 step = {{1}}, int64[2] pair = {{0, 1}},
     int64[2] pads = {{0, 125000000}}>
    {{ {node} i = Cast <to = 1> (big) s = ReduceSum <keepdims = 0> (i) Y = Add (X, s) }}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    tracemalloc.start()
    start = time.process_time()
    after, reports = Pipeline.parse("infer-shapes,fold-constants").run(model)
    taken = time.process_time() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6
    assert taken < 5, "onnx's own inference keeps a message for each number of a vector, unless it is held back"
    (skip,) = reports[1].skips
    assert skip.value == "big" and "max_bytes" in skip.reason
    assert len(after.graph) == 4


def test_a_product_of_large_weights_is_not_computed() -> None:
    weights = [ir.val(name, const_value=ir.tensor(np.zeros((1500, 1500), np.float32))) for name in "ab"]
    node = ir.Node("", "MatMul", weights, name="")
    end = ir.Node("", "ReduceMax", node.outputs, [ir.AttrInt64("keepdims", 0)], name="")
    end.outputs[0].name = "y"
    node.outputs[0].name = "ab"
    body = ir.Graph([], end.outputs, nodes=[node, end], initializers=weights, opset_imports={"": 21}, name="g")
    _, (report,) = Pipeline.parse("fold-constants").run(ir.Model(body, ir_version=10))
    assert [(s.value, s.reason.split(" with")[0]) for s in report.skips] == [("ab", "MatMul: MatMul")]


def external(path: Path, name: str, elements: int, offset: int) -> ir.Value:
    tensor = ir.ExternalTensor(
        path.name, offset, 4 * elements, ir.DataType.FLOAT, shape=ir.Shape([elements]), name=name, base_dir=path.parent
    )
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([elements]), const_value=tensor)


def with_weights(path: Path, count: int, elements: int) -> ir.Model:
    """x + w0 + w1 ...; all weights in one file, in order."""
    weights = [external(path, f"w{i}", elements, 4 * elements * i) for i in range(count)]
    value = ir.val("x", ir.DataType.FLOAT, [elements])
    nodes, current = [], value
    for i, weight in enumerate(weights):
        node = ir.Node("", "Add", [current, weight], name="")
        current = node.outputs[0]
        current.name = f"sum{i}"
        nodes.append(node)
    body = ir.Graph([value], [current], nodes=nodes, initializers=weights, opset_imports={"": 17}, name="g")
    current.type, current.shape = value.type, value.shape
    return ir.Model(body, ir_version=9)


def test_passes_work_on_weights_that_are_not_there(tmp_path: Path) -> None:
    """All but comparing weights goes by their shapes, so the file may even be missing."""
    model = with_weights(tmp_path / "missing", 3, 1 << 20)
    steps = ",".join(step for step in PRESETS["compile"].split(",") if step != "dedupe-initializers")
    after, _ = Pipeline.parse(steps).run(model)
    assert len(after.graph) == 3
    assert light_proto(after).ByteSize() < 4000


def test_equal_weights_in_a_file_are_found_in_pieces(tmp_path: Path) -> None:
    """Equal in all samples but different in one byte is different."""
    path, elements = tmp_path / "weights", 1 << 20
    random = np.random.default_rng(0).standard_normal(elements).astype(np.float32)
    nearly = random.copy()
    nearly.view(np.uint8)[12345] ^= 1
    path.write_bytes(random.tobytes() + nearly.tobytes() + random.tobytes())
    model = with_weights(path, 3, elements)
    tracemalloc.start()
    report = DedupeInitializers().run(model, PassContext())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [(c.value, c.detail) for c in report.changes] == [("w2", "same as w0")]
    assert report.stats["bytes"] == 4 * elements
    assert peak < 3e6


SCRIPT = """
import resource, sys
from pathlib import Path
import importlib.util
spec = importlib.util.spec_from_file_location("scale", sys.argv[1])
scale = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scale)
model = scale.with_weights(Path(sys.argv[2]), 8, 1 << 26)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
after, reports = scale.Pipeline.parse(scale.PRESETS["compile"]).run(model)
assert [c.value for r in reports for c in r.changes if c.rule == "dedupe"] == ["w6", "w7"], reports
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_two_gigabytes_of_weights_pass_in_little_memory(tmp_path: Path) -> None:
    """2 GB in a sparse file: six weights differ at their first number, three are equal."""
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.truncate(8 << 28)
        for index in range(6):
            file.seek(index << 28)
            file.write(np.float32(index).tobytes())
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, __file__, str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200, "megabytes more than before the passes"
