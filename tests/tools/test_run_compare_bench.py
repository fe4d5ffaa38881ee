"""`run`, `compare` and `bench` on ONNX files and artifacts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import Result
from graphwright.passes.errors import InputError, OutputError
from graphwright.tools.memory import peak_of
from graphwright.tools.opened import opened
from graphwright.tools.run import save_outputs, statistics
from onnx import numpy_helper, parser

Cli = Callable[..., Result]
LIMIT = 1e-4  # of the output's scale, as `compare` has it


def expected(model: Path, inputs: Path) -> np.ndarray:
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return session.run(None, dict(np.load(inputs)))[0]


@pytest.fixture
def changed(model: Path) -> Path:
    """The classifier with one weight changed a little."""
    proto = onnx.load(model)
    weights = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    weights[0, 0] += 0.1
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights, "w"))
    onnx.save(proto, model.with_name("changed.onnx"))
    return model.with_name("changed.onnx")


# --- run --------------------------------------------------------------------------------------------------------


def test_run_prints_what_the_outputs_look_like(cli: Cli, model: Path, inputs: Path) -> None:
    y = expected(model, inputs)
    result = cli("run", model, "--input", inputs)
    header, row = result.stdout.splitlines()
    assert header.split() == ["output", "shape", "type", "min", "max", "mean"]
    assert row.split() == [
        "y",
        "2",
        "x",
        "4",
        "float32",
        f"{y.min():.6g}",
        f"{y.max():.6g}",
        f"{y.mean(dtype=float):.6g}",
    ]
    (data,) = json.loads(cli("run", model, "--input", inputs, "--json").stdout)["outputs"]
    assert data["shape"] == [2, 4] and data["max"] == float(y.max())


@pytest.mark.tvm
@pytest.mark.parametrize("backend", [None, "tvm", "onnxruntime"])
def test_run_saves_the_outputs(
    cli: Cli, model: Path, artifact: Path, inputs: Path, backend: str | None, tmp_path: Path
) -> None:
    """The artifact gives the model's numbers with either runtime."""
    out = tmp_path / "out.npz"
    options = ["--backend", backend] if backend else []
    assert cli("run", artifact, "--input", inputs, "--output", out, "--threads", 1, *options).stdout == ""
    np.testing.assert_allclose(np.load(out)["y"], expected(model, inputs), rtol=0, atol=LIMIT)


def test_run_refuses_an_output_that_exists(cli: Cli, model: Path, inputs: Path) -> None:
    out = model.with_name("out.npz")
    out.write_text("precious")
    assert "already exists" in cli("run", model, "-i", inputs, "-o", out, expect=1).stderr
    cli("run", model, "-i", inputs, "-o", out, "--overwrite")
    assert np.load(out)["y"].shape == (2, 4)


def test_run_writes_npz_only(cli: Cli, model: Path, inputs: Path) -> None:
    assert "expected a name that ends in .npz" in cli("run", model, "-i", inputs, "-o", "out.csv", expect=1).stderr


def test_outputs_of_any_name_and_type_are_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`file` and `allow_pickle` are names of numpy.savez's own parameters; strings and bfloat16 are no NumPy types."""
    import ml_dtypes

    values = {
        "file": np.arange(3),
        "allow_pickle": np.array(["a", "bc"], object),
        "narrow": np.array([1.5, -2.0], ml_dtypes.bfloat16),
    }
    save_outputs(values, tmp_path / "o.npz", overwrite=False)
    with np.load(tmp_path / "o.npz", allow_pickle=False) as saved:
        assert saved["file"].tolist() == [0, 1, 2]
        assert saved["allow_pickle"].tolist() == ["a", "bc"]
        assert saved["narrow"].dtype == np.float32 and saved["narrow"].tolist() == [1.5, -2.0]
    assert "'narrow' is written as float32" in caplog.text


def test_a_sequence_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"output 's' is a list, not an array"):
        save_outputs({"s": [np.zeros(1)]}, tmp_path / "o.npz", overwrite=False)
    assert not list(tmp_path.iterdir())


def test_statistics_are_of_finite_numbers() -> None:
    row = statistics("y", np.array([1.0, np.inf, 3.0, np.nan], np.float16))
    assert (row["min"], row["max"], row["mean"], row["dtype"]) == (1.0, 3.0, 2.0, "float16")
    assert statistics("y", np.array(["a"], object))["min"] is None
    assert statistics("y", np.zeros((0,), np.float32))["mean"] is None
    assert statistics("y", [np.zeros(1)])["shape"] is None


# --- compare ----------------------------------------------------------------------------------------------------


@pytest.mark.tvm
def test_compare_accepts_equal_models_on_either_side(cli: Cli, model: Path, artifact: Path) -> None:
    """A dynamic batch is tried with two sizes."""
    for a, b in ((model, artifact), (artifact, model), (artifact, artifact)):
        result = cli("compare", a, b)
        assert "x[1, 8]; x[2, 8] (random, seed 0)" in result.stdout
        assert len(re.findall(r"^y .* equal$", result.stdout, re.M)) == 2


def test_compare_ends_with_3_when_numbers_differ(cli: Cli, model: Path, changed: Path, inputs: Path) -> None:
    file = model.with_name("c.json")
    result = cli("compare", model, changed, "--input", inputs, "--json", file, expect=3)
    assert re.search(r"^y .* differs$", result.stdout, re.M)
    assert re.search(r"error: .*: output 'y' differs: relative error \d.*; limit 1e-04\n$", result.stderr)
    data = json.loads(file.read_text())
    assert (data["reference"], data["candidate"], data["ok"]) == (str(model), str(changed), False)
    assert data["outputs"][0]["shape"] == [2, 4] and data["max_abs_error"] > 0
    cli("compare", model, changed, "--input", inputs, "--limit", 0.5)


def test_compare_ends_with_3_when_shapes_differ(cli: Cli, write: Callable[..., Path]) -> None:
    a = write("agraph (float[2,3] x) => (float[2,3] y) { y = Relu(x) }", "a.onnx")
    b = write("agraph (float[2,3] x) => (float[3,2] y) { r = Relu(x)  y = Transpose(r) }", "b.onnx")
    assert "shape [3, 2] instead of [2, 3]" in cli("compare", a, b, expect=3).stderr


def test_compare_prints_json_on_request(cli: Cli, model: Path) -> None:
    for options in (["--json", "-"], ["--format", "json"]):
        data = json.loads(cli("compare", model, model, *options).stdout)
        assert data["ok"] and data["sets"] == 2 and {o["name"] for o in data["outputs"]} == {"y"}


def test_compare_refuses_random_models(cli: Cli, write: Callable[..., Path]) -> None:
    path = write("agraph (float[2] x) => (float[2] y) { r = RandomNormalLike(x)  y = Add(x, r) }")
    assert "RandomNormalLike gives other numbers every run" in cli("compare", path, path, expect=1).stderr


def test_compare_takes_feeds_from_the_narrower_model(cli: Cli, model: Path) -> None:
    pinned = model.with_name("pinned.onnx")
    cli("optimize", model, "--preset", "none", "--pin", "x=5x8", "-o", pinned)
    for a, b in ((model, pinned), (pinned, model)):
        assert "inputs: x[5, 8] (random, seed 0)" in cli("compare", a, b).stdout


# --- bench ------------------------------------------------------------------------------------------------------

KEYS = ["threads", "runs", "candidate_ms", "reference_ms", "ratio", "max_abs_error", "peak_rss_mb"]


def check_bench(data: dict[str, object], runs: int, threads: int) -> None:
    assert list(data) == ["threads", "runs", "candidate_ms", "reference_ms", "ratio", "max_abs_error", "peak_rss_mb"]
    assert (data["runs"], data["threads"]) == (runs, threads)
    for key in ("candidate_ms", "reference_ms", "ratio"):
        spread = data[key]
        assert isinstance(spread, dict) and list(spread) == ["median", "low", "high"]
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    assert isinstance(data["max_abs_error"], float) and data["max_abs_error"] < LIMIT
    peaks = data["peak_rss_mb"]
    assert isinstance(peaks, dict) and set(peaks) == {"candidate", "reference"} and min(peaks.values()) > 10


def test_bench_times_two_onnx_files(cli: Cli, model: Path) -> None:
    out = model.with_name("bench.json")
    result = cli("bench", model, "--against", model, "--runs", 5, "--threads", 1, "--json", out)
    check_bench(json.loads(out.read_text()), 5, 1)
    assert "5 runs, 1 threads, largest absolute difference 0.0e+00" in result.stdout
    assert re.search(r"^ratio( +\d+\.\d\d){3}$", result.stdout, re.M)


@pytest.mark.tvm
def test_bench_times_an_artifact_against_onnxruntime(cli: Cli, artifact: Path, inputs: Path) -> None:
    result = cli("bench", artifact, "--runs", 3, "--threads", 1, "--input", inputs, "--format", "json")
    check_bench(json.loads(result.stdout), 3, 1)


@pytest.mark.tvm
def test_bench_says_what_onnxruntime_ran(cli: Cli, tmp_path: Path) -> None:
    """A convolution whose padding follows from a free height, and a size that the compiled code refuses in the run."""
    conv = """<ir_version: 8, opset_import: ["": 17]> g (float[1, 8, h, 16] x) => (float[1, 8, p, 8] y)
        { y = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, w) }"""
    fits = """<ir_version: 8, opset_import: ["": 17]>
        g (float[n, 8] x, float[m, 8] z) => (float[k, 8] y) { s = Add (x, z) y = Relu (s) }"""
    found = {}
    for name, text in {"conv": conv, "fits": fits}.items():
        proto = parser.parse_model(text)
        if name == "conv":
            proto.graph.initializer.append(numpy_helper.from_array(np.ones((8, 8, 3, 3), np.float32), "w"))
        onnx.save(proto, tmp_path / f"{name}.onnx")
        cli("optimize", tmp_path / f"{name}.onnx", "--target", "cpu", "-o", tmp_path / name)
        given = {"x": np.ones((1, 8, 4, 16) if name == "conv" else (3, 8), np.float32)}
        given |= {"z": np.ones((1, 8), np.float32)} if name == "fits" else {}
        np.savez(tmp_path / f"{name}.npz", **given)
        arguments = ("bench", tmp_path / name, "--runs", 3, "--threads", 1, "--input", tmp_path / f"{name}.npz")
        found[name] = cli(*arguments).stdout
    assert "onnxruntime ran 1 of 1 nodes: its height, width or length is known only at run time" in found["conv"]
    assert "onnxruntime ran all of it, with these inputs: the compiled model refused these inputs" in found["fits"]


def test_bench_alternates_and_the_ratio_is_reference_over_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that the runners move: 2 ms against 6 ms is a ratio of 3."""
    from graphwright.runtime import measure

    now = 0.0
    order: list[str] = []

    def runner(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            now += seconds
            order.append(name)

        return run

    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now))
    timing = measure.alternate(runner("a", 0.002), runner("b", 0.006), runs=5)
    assert order == ["a", "b"] * (5 + measure.WARMUP)
    assert timing.ratio is not None and timing.ratio.median == pytest.approx(3, rel=1e-9)
    assert timing.candidate.median == pytest.approx(2, rel=1e-9)


def test_bench_refuses_feeds_of_another_model(cli: Cli, model: Path, write: Callable[..., Path]) -> None:
    other = write("agraph (float[2] q) => (float[2] y) { y = Relu(q) }", "other.onnx")
    assert "has no input" in cli("bench", model, "--against", other, expect=1).stderr


def test_memory_is_that_of_the_child_alone(model: Path) -> None:
    """What this process holds does not count: 600 MB here must not appear there."""
    held = np.ones(600 << 20, np.uint8)
    peak = peak_of(model, "onnxruntime", 1, {"x": np.zeros((2, 8), np.float32)})
    assert held[-1] == 1
    assert 20 < peak < 400


def test_memory_of_a_model_that_fails_says_why(model: Path) -> None:
    with pytest.raises(InputError, match=r"measuring its memory failed: .*"):
        peak_of(model, "onnxruntime", 1, {"x": np.zeros((2, 9), np.float32)})


# --- opening ----------------------------------------------------------------------------------------------------


@pytest.mark.tvm
def test_an_onnx_file_on_tvm_is_compiled_for_the_time_of_the_block(model: Path, inputs: Path) -> None:
    with opened(str(model), "tvm", threads=1) as ready:
        folder = ready.file
        assert (folder / "manifest.json").is_file()
        found = ready.run(dict(np.load(inputs)))["y"]
    np.testing.assert_allclose(found, expected(model, inputs), rtol=0, atol=LIMIT)
    assert not folder.exists()


def test_threads_of_onnxruntime_sleep_after_a_run(model: Path) -> None:
    """Spinning threads would slow down whatever is timed next."""
    with opened(str(model)) as ready:
        options = ready.session.get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert options.intra_op_num_threads == len(os.sched_getaffinity(0))


@pytest.mark.tvm
def test_bench_profile_shows_the_kernels_and_the_limits(cli: Cli, artifact: Path, inputs: Path) -> None:
    arguments = ("bench", artifact, "--profile", "--runs", 3, "--threads", 1, "--input", inputs)
    out = cli(*arguments).stdout
    assert out.splitlines()[0].split() == ["kernel", "calls", "ms", "share", "GFLOP/s", "GB/s", "of", "limit"]
    assert re.search(r"^run [\d.]+ ms, kernels [\d.]+ ms", out, re.MULTILINE)
    assert re.search(r"^limits measured on 1 thread: \d+ GFLOP/s, .*memory \d+ GB/s$", out, re.MULTILINE)
    data = json.loads(cli(*arguments, "--format", "json").stdout)
    assert {"threads", "run_ms", "kernels_ms", "limit_ms", "peaks", "kernels", "operators"} <= data.keys()
    assert any("gemm" in kernel["name"] for kernel in data["kernels"])


def test_a_profile_has_no_reference(cli: Cli, model: Path) -> None:
    assert "leave out --against" in cli("bench", model, "--profile", "--against", model, expect=2).stderr
