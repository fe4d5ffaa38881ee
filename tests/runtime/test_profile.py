"""The measured limits of this machine, and a run seen kernel by kernel."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.runtime.peaks import Level, Peaks, peaks
from graphwright.runtime.profile import Profile, Row, profile
from graphwright.runtime.session import Session
from graphwright.runtime.target import Target
from onnx import parser

pytestmark = pytest.mark.tvm

LEVELS = (Level("L2", 1000, 200.0, 100.0), Level("L3", 10_000, 50.0, 60.0), Level("memory", 1 << 62, 10.0, 8.0))
PEAKS = Peaks(1, 1000.0, LEVELS)


def test_the_limit_is_the_slower_of_computing_and_moving() -> None:
    assert PEAKS.seconds(5000.0, 100.0) == 5.0
    assert PEAKS.seconds(50.0, 1000.0) == 5.0  # 1000 bytes in the second level's reach: 200 a second
    assert PEAKS.seconds(0.0, 6000.0) == 100.0
    assert PEAKS.seconds(0.0, 100_000.0) == 10_000.0
    assert PEAKS.seconds(None, None) is None
    assert PEAKS.seconds(2000.0, None) == 2.0


def test_this_machine_has_limits() -> None:
    """Loose bounds, which any x86-64 or ARM machine of the last twenty years meets, loaded or not."""
    target = Target.named("cpu")
    found = peaks(target, 1)
    print(json.dumps(found.to_json()))
    assert 1e9 < found.flops < 1e12
    assert [level.name for level in found.levels][-1] == "memory"
    assert all(1e8 < level.read < 1e13 and 1e8 < level.copy < 1e13 for level in found.levels)
    assert peaks(target, 1) is found  # once a process


@pytest.mark.parametrize("what", ["read", "copy"])
def test_the_probes_do_what_they_say(what: str) -> None:
    import tvm
    from graphwright.runtime.codegen import machine_code
    from graphwright.runtime.kernels import probes

    target = Target.named("cpu")
    lanes, threads = max(4, target.isa.lanes()), 2
    size = threads * probes.UNROLLED * lanes * 3
    function = getattr(probes, what)(target.isa, threads, size, 2)
    x = np.arange(size, dtype=np.float32)
    y = tvm.runtime.tensor(np.zeros(size if what == "copy" else threads * lanes, np.float32))
    machine_code(tvm.IRModule({"probe": function}), target)["probe"](tvm.runtime.tensor(x), y)
    if what == "copy":
        np.testing.assert_array_equal(y.numpy(), x + 1)  # the second time
    else:
        assert y.numpy().sum(dtype=float) == 2 * x.sum(dtype=float)


def built(text: str, folder: Path, weights: dict[str, np.ndarray] | None = None, opset: int = 20) -> Session:
    from graphwright.runtime.build import build

    model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in (weights or {}).items())
    build(ir.from_proto(onnx.shape_inference.infer_shapes(model)), Target.named("cpu"), folder)
    return Session(folder, threads=1)


def test_every_kernel_of_a_run_has_its_row(tmp_path: Path) -> None:
    text = """g (float[96,96] x) => (float[96,96] y)
    { a = MatMul(x, x)  b = Exp(a)  c = MatMul(b, a)  y = Softmax(c) }"""
    session = built(text, tmp_path / "a")
    x = {"x": np.random.default_rng(0).standard_normal((96, 96)).astype(np.float32) / 10}
    before = session.run(None, x)[0]
    found = profile(session, x, runs=3)
    products = [row for row in found.rows if "gemm" in row.name]
    assert sum(row.calls for row in products) == 2
    for row in products:
        assert row.seconds > 0 and row.flops is not None and row.flops >= 2 * 96**3 * row.calls
        assert row.limit is not None and row.of_limit is not None
    assert found.kernels > 0 and found.run > 0 and found.limit is not None and found.limit > 0
    assert found.rows == tuple(sorted(found.rows, key=lambda row: -row.seconds))
    assert sum(row.calls for row in found.by_op()) == sum(row.calls for row in found.rows)
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data["kernels"][0]["share"] > 0 and data["activation_bytes"] == session.artifact.activation_bytes
    np.testing.assert_array_equal(session.run(None, x)[0], before)  # nothing watches any more


FREE = {
    "decoder": """g (float[{n},{s},64] x) => (float[{n},{s},64] y)
        <int64[1] last = {{-1}}>
        {{ q = MatMul(x, w)  k = MatMul(q, w)  a = Attention<q_num_heads = 4, kv_num_heads = 4>(q, k, x)
           l = RMSNormalization(a, g)  t = Tanh(l)  m = ReduceMax(t, last)  y = Add(t, m) }}""",
    "image": """g (float[{n},16,12,12] x) => (float[{n},16,6,6] y)
        {{ c = Conv<pads = [1, 1, 1, 1]>(x, w)  y = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(c) }}""",
    "lookup": "g (int64[{n},{s}] x) => (float[{n},{s},64] y) {{ y = Gather(w, x) }}",
}
WEIGHTS = {"decoder": (64, 64), "image": (16, 16, 3, 3), "lookup": (1000, 64)}


@pytest.mark.parametrize("name", FREE)
def test_free_sizes_are_those_of_the_run(tmp_path: Path, name: str) -> None:
    """The same operations and bytes as of a model of these very sizes."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(WEIGHTS[name]).astype(np.float32) / 8
    found = []
    for n, s in (("n", "s"), ("3", "5")):
        session = built(FREE[name].format(n=n, s=s), tmp_path / n, {"w": weight, "g": np.ones(64, np.float32)}, 23)
        shape = [{"n": 3, "s": 5}.get(d, d) for d in session.get_inputs()[0].shape]
        whole = np.zeros(shape, np.int64) if name == "lookup" else rng.standard_normal(shape).astype(np.float32)
        rows = [row for row in profile(session, {"x": whole}, runs=2).rows if row.op != "shape_func"]
        assert all(row.limit is not None and row.of_limit for row in rows)
        # What TVM counts is open where sizes are.
        found.append(sorted((row.op, row.calls, row.flops or None, row.nbytes) for row in rows))
    assert found[0] == found[1] and found[0]


def test_a_region_on_onnxruntime_is_a_row(tmp_path: Path) -> None:
    text = """g (float[8,8] x) => (float[8,8] y, int64[8,8] n)
    { a = MatMul(x, x)  y = Exp(a)  n = Bernoulli<dtype = 7>(a) }"""
    session = built(text, tmp_path / "a")
    if session.artifact.native_nodes[0] == session.artifact.native_nodes[1]:
        pytest.skip("TVM takes every node of it")
    found = profile(session, {"x": np.full((8, 8), 0.05, np.float32)}, runs=3)
    assert any(row.name.endswith("on onnxruntime") and row.of_limit is None for row in found.rows)


def test_work_that_is_not_known_has_no_limit() -> None:
    row = Row("k", "k", 2, 1.0, None, 100.0, None)
    assert row.of_limit is None and row.to_json(2.0)["gflops_per_s"] is None and row.to_json(2.0)["share"] == 0.5
    found = Profile(1, 1, 1.0, (row,), PEAKS, None)
    assert found.limit is None and found.to_json()["limit_ms"] is None


def test_kernels_that_need_fewer_operations_than_are_counted_are_at_their_limit() -> None:
    rows = (Row("a", "conv", 1, 2.0, 1e9, None, 3.0), Row("b", "gemm", 1, 2.0, 1e9, None, 1.0))
    found = Profile(1, 1, 4.0, rows, PEAKS, None)
    assert found.limit == 3.0 and [row.of_limit for row in rows] == [1.5, 0.5]
