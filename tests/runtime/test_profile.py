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


def built(text: str, folder: Path) -> Session:
    from graphwright.runtime.build import build

    model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}')
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
