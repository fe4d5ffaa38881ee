"""Which kernel is which layer's, and how long layers take in a compiled model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.errors import GraphwrightError, PassError
from graphwright.runtime import driver, stopwatch
from graphwright.runtime.stopwatch import Stopwatch, matched, ratio_of
from graphwright.runtime.target import Target
from onnx import numpy_helper, parser

TEXT = """<ir_version: 10, opset_import: ["" : 20]> g (float[N, 8, 40, 40] x) => (float[N, 10] y)
{
    a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) b = Relu (a)
    c = Conv <pads = [1, 1, 1, 1], group = 16> (b, w2) d = Relu (c)
    e = Conv (d, w3) f = Add (e, b)
    p = GlobalAveragePool (f) q = Flatten (p) y = Gemm <transB = 1> (q, w4)
}"""
SHAPES = {"w1": (16, 8, 3, 3), "b1": (16,), "w2": (16, 1, 3, 3), "w3": (16, 16, 1, 1), "w4": (10, 16)}
OPERATIONS = {"a": 2.0 * 1152 * 1600, "c": 2.0 * 144 * 1600, "e": 2.0 * 256 * 1600, "y": 2.0 * 160}


def model() -> onnx.ModelProto:
    random = np.random.default_rng(0)
    proto = parser.parse_model(TEXT)
    proto.graph.initializer.extend(
        numpy_helper.from_array(random.standard_normal(shape).astype(np.float32) * 0.3, name)
        for name, shape in SHAPES.items()
    )
    return onnx.shape_inference.infer_shapes(proto)


def inputs(count: int = 20) -> dict[str, list[np.ndarray]]:
    random = np.random.default_rng(1)
    return {"x": [random.standard_normal((1, 8, 40, 40)).astype(np.float32) for _ in range(count)]}


def test_layers_and_kernels_meet_in_the_longest_common_subsequence() -> None:
    assert matched([2, 5, 2], [None, 2, 7, 5, 2, 9]) == [(0, 1), (1, 3), (2, 4)]
    assert matched([2, 5, 2], [5, 2]) == [(1, 0), (2, 1)]  # the first was compiled in another way
    assert matched([2, 5], [5, 2, 5]) == [(0, 1), (1, 2)]
    assert matched([], [1]) == matched([1], []) == matched([1], [None]) == []


def test_the_interval_of_a_median_is_that_of_order_statistics() -> None:
    found = ratio_of([float(number) for number in range(100, 0, -1)])
    assert (found.median, found.low, found.high) == (50.5, 41.0, 60.0)
    assert ratio_of([1.0]).low == ratio_of([1.0]).high == 1.0
    assert str(found) == "50.50 [41.00, 60.00] times as fast"


@pytest.mark.tvm
def test_every_layer_of_a_compiled_model_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "SECONDS", 0.2)
    watch = Stopwatch(Target.named("cpu"), threads=1)
    compiled = watch.compile(ir.from_proto(model()))
    feeds = {"x": inputs(1)["x"][0]}
    (found,) = watch.layers([compiled], OPERATIONS, feeds)
    assert list(found) == list(OPERATIONS)
    assert all(0 < seconds < 1 for seconds in found.values())
    (others,) = watch.layers([compiled], {"a": OPERATIONS["a"], "z": 12345.0}, feeds)
    assert list(others) == ["a"]
    ratio = watch.ratio(compiled, compiled, feeds)
    assert 0.2 < ratio.low <= ratio.median <= ratio.high < 5


@pytest.mark.tvm
@pytest.mark.slow
def test_a_model_is_measured_and_what_was_decided_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever pays here: every layer has its row, and the plan file gives the same bytes without a clock."""
    monkeypatch.setattr(stopwatch, "SECONDS", 0.5)
    onnx.save(model(), tmp_path / "m.onnx")
    done = driver.optimize(
        tmp_path / "m.onnx", "dynaquant:least=1:measure=true", target="cpu", out=tmp_path / "out",
        calibration=inputs(), threads=1,
    )  # fmt: skip
    rows = {row["layer"]: row for row in done.reports[-1].rows}
    assert set(rows) == set(OPERATIONS)
    assert all(row["ms"] > 0 and row["ms in float"] > 0 and row["dB"] > 10 for row in rows.values())
    assert all(row["decision"].startswith(("codes", "float")) for row in rows.values())
    assert f"plan={tmp_path / 'out.dynaquant.npz'}" in str(done.pipeline)
    again = driver.optimize(
        tmp_path / "m.onnx", str(done.pipeline), preset="none", target="cpu", out=tmp_path / "again", threads=1
    )
    names = [file.name for file in (tmp_path / "out").iterdir() if file.suffix in (".onnx", ".bin", ".so")]
    assert len(names) >= 3
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    assert again.reports[-1].rows == done.reports[-1].rows


@pytest.mark.parametrize("target", [None, "riscv64"])
def test_without_a_target_that_runs_here_there_is_one_line(target: str | None, tmp_path: Path) -> None:
    onnx.save(model(), tmp_path / "m.onnx")
    with pytest.raises(PassError, match="needs a target that this machine runs") as caught:
        driver.optimize(
            tmp_path / "m.onnx", "dynaquant:measure=true", target=target, out=tmp_path / "out", calibration=inputs()
        )
    assert isinstance(caught.value, GraphwrightError) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
