"""`optimize` and `compile`: what they write, print and record."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import Result
from graphwright.passes import io
from graphwright.passes.base import Change, Contract, PassReport, Skip
from graphwright.runtime.compare import compare
from graphwright.tools.optimize import spread
from graphwright.tools.summary import Census, group_reasons, tuning_line, verdict_line

Cli = Callable[..., Result]
SIMPLIFY = ("--preset", "none", "--passes", "simplify")


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_the_result_lies_beside_the_model_and_the_model_is_untouched(cli: Cli, model: Path) -> None:
    before = model.read_bytes()
    result = cli("optimize", model, *SIMPLIFY)
    assert model.read_bytes() == before
    assert operators(model.with_name("model.opt.onnx")) == ["MatMul", "Relu", "Softmax"]
    assert re.search(r"^simplify +1 +0 +4 -> 3 ", result.stdout, re.M)
    assert re.search(r"^nodes +4 +3$", result.stdout, re.M)
    assert "equal: relative error 0.0e+00 (limit 1e-05)" in result.stdout
    assert result.stdout.endswith(f"written: {model.with_name('model.opt.onnx')}\n")
    assert result.stderr == ""


def test_json_tells_everything(cli: Cli, model: Path) -> None:
    out = model.with_name("out.onnx")
    data = json.loads(cli("optimize", model, *SIMPLIFY, "-o", out, "--format", "json").stdout)
    assert data["pipeline"] == "simplify" and data["output"] == str(out) and data["target"] is None
    assert data["nodes"] == {"before": 4, "after": 3}
    assert data["operators"]["before"]["Identity"] == 1 and "Identity" not in data["operators"]["after"]
    assert data["file_bytes"] == {"before": model.stat().st_size, "after": out.stat().st_size}
    assert data["weights_bytes"] == {"before": 128, "after": 128}
    (step,) = data["passes"]
    assert step["changes"][0][1] == "i" and (step["nodes_before"], step["nodes_after"]) == (4, 3)
    assert data["verdict"]["ok"] and data["verdict"]["sets"] == 2 and data["unverified"] == ""


def test_a_dry_run_says_what_would_change_and_writes_nothing(cli: Cli, model: Path) -> None:
    result = cli("optimize", model, *SIMPLIFY, "--dry-run")
    assert re.search(r"^i +fired +", result.stdout, re.M)
    assert "NOT VERIFIED: dry run" in result.stdout
    assert [path.name for path in model.parent.iterdir()] == ["model.onnx"]


def test_verification_that_is_left_out_is_said_plainly(cli: Cli, model: Path) -> None:
    assert "NOT VERIFIED: --no-verify" in cli("optimize", model, *SIMPLIFY, "--no-verify").stdout


def test_a_model_of_random_numbers_is_not_verified_and_says_why(cli: Cli, write: Callable[..., Path]) -> None:
    path = write("agraph (float[2] x) => (float[2] y) { r = RandomNormalLike(x)  y = Add(x, r) }")
    assert "NOT VERIFIED: RandomNormalLike gives other numbers every run" in cli("optimize", path, *SIMPLIFY).stdout


def test_pins_reach_the_model(cli: Cli, model: Path) -> None:
    cli("optimize", model, "--preset", "none", "--pin", "x=3x8")
    (value,) = onnx.load(model.with_name("model.opt.onnx")).graph.input
    assert [d.dim_value for d in value.type.tensor_type.shape.dim] == [3, 8]


def test_every_step_can_be_saved(cli: Cli, model: Path) -> None:
    cli("optimize", model, "--preset", "none", "--passes", "dead-code,simplify", "--dump", model.with_name("steps"))
    assert [path.name for path in model.with_name("steps").iterdir()] == ["02-simplify.onnx"]


def test_reports_hold_what_was_done(cli: Cli, model: Path) -> None:
    page, data = model.with_name("r.html"), model.with_name("r.json")
    cli("optimize", model, *SIMPLIFY, "--report", page)
    cli("optimize", model, *SIMPLIFY, "--report", data, "--overwrite")
    text = page.read_text()
    assert "<title>model.onnx: graphwright</title>" in text and "equal: relative error" in text
    assert not re.search(r"(src|href)=|https?://", text)  # it loads nothing
    assert json.loads(data.read_text())["nodes"] == {"before": 4, "after": 3}


def test_a_report_escapes_names(cli: Cli, write: Callable[..., Path]) -> None:
    path = write("agraph (float[2] x) => (float[2] y) { i = Identity(x)  y = Relu(i) }")
    proto = onnx.load(path)
    proto.graph.node[0].output[0] = proto.graph.node[1].input[0] = "<script>"
    onnx.save(proto, path)
    cli("optimize", path, *SIMPLIFY, "--report", path.with_name("r.html"))
    text = path.with_name("r.html").read_text()
    assert "&lt;script&gt;" in text and "<script>" not in text


def test_calibration_is_what_the_result_is_checked_with(cli: Cli, model: Path, inputs: Path) -> None:
    data = json.loads(cli("optimize", model, *SIMPLIFY, "--calibration", inputs, "--json").stdout)
    assert data["verdict"]["inputs"] == "calibration" and data["verdict"]["shapes"] == ["x[2, 8]"]


def test_verbose_says_what_happens_on_stderr(cli: Cli, model: Path) -> None:
    result = cli("optimize", model, *SIMPLIFY, "-v")
    steps = ["load", "reference", "simplify", "verify", "save"]
    assert [line.split()[-1] for line in result.stderr.splitlines()] == steps
    assert re.search(r"^i +fired", result.stdout, re.M)


def test_the_installed_command_works_in_a_process_of_its_own(model: Path) -> None:
    code = "import sys; from graphwright.tools.cli import optimize; optimize()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), *SIMPLIFY], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert model.with_name("model.opt.onnx").exists()


def test_a_pass_that_changes_the_numbers_is_named_and_leaves_nothing(
    cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken pass, entered as a third party would: exit 3."""
    from graphwright.passes import registry
    from graphwright.passes.prepare import dead_code

    def run(self: object, graph: ir.Model, ctx: object) -> PassReport:
        graph.graph.initializers["w"].const_value = ir.tensor(np.zeros((8, 4), np.float32), name="w")
        return PassReport("dead-code", Contract.EXACT, [Change("break", "w")])

    monkeypatch.setattr(dead_code.DeadCode, "run", run)
    assert "dead-code" in registry.PASSES
    result = cli("optimize", model, "--preset", "none", "--passes", "simplify,dead-code", expect=3)
    assert re.search(r"^error: pass dead-code: output 'y' differs: relative error .*; limit 1e-05$", result.stderr)
    assert [path.name for path in model.parent.iterdir()] == ["model.onnx"]


@pytest.mark.tvm
def test_compile_makes_an_artifact_and_says_where_it_runs(cli: Cli, model: Path) -> None:
    result = cli("compile", model, "--pin", "x=2x8")
    out = model.with_name("model.cpu")
    assert (out / "manifest.json").is_file()
    assert "TVM runs 3 of 3 nodes" in result.stdout
    assert re.search(r"^equal: relative error .* \(limit 1e-04\)", result.stdout, re.M)
    assert result.stdout.endswith(f"written: {out}\n")


@pytest.mark.tvm
def test_what_onnxruntime_runs_is_listed_with_its_reason(cli: Cli, write: Callable[..., Path]) -> None:
    path = write("agraph (string[2] s, float[2] x) => (string[2] t, float[2] y) { t = Identity(s)  y = Neg(x) }")
    data = json.loads(cli("compile", path, "--json").stdout)
    assert (data["native"]["tvm"], data["native"]["all"]) == (1, 2)
    (group,) = data["native"]["fallback"]
    assert (group["operator"], group["count"], group["sites"]) == ("Identity", 1, ["t"])
    assert "string" in group["reason"]


def test_reasons_are_grouped_by_operator_and_reason() -> None:
    reasons = {"a": "no", "b": "no", "c": "other", "d": "no"}
    groups = group_reasons(reasons, {"a": "If", "b": "If", "c": "If", "d": "Loop"})
    assert [(g["operator"], g["reason"], g["sites"]) for g in groups] == [
        ("If", "no", ["a", "b"]),
        ("If", "other", ["c"]),
        ("Loop", "no", ["d"]),
    ]


@pytest.mark.parametrize(("limit", "words"), [(1e-4, "(limit 1e-04)"), (float("inf"), "(no limit: measured only)")])
def test_the_verdict_names_its_limit(limit: float, words: str) -> None:
    one = {"y": np.array([1.0, 2.0], np.float32)}
    verdict = compare(lambda feeds: one, lambda feeds: one, [{}], limit, "made up").to_json()
    json.dumps(verdict, allow_nan=False)
    assert words in verdict_line(verdict, "")


def test_an_artifact_that_could_not_be_run_is_never_called_verified() -> None:
    one = {"y": np.array([1.0], np.float32)}
    verdict = compare(lambda feeds: one, lambda feeds: one, [{}], 1e-5, "made up").to_json()
    first, second = verdict_line(verdict, "the artifact cannot run here: no such device").splitlines()
    assert first.startswith("model equal: ")
    assert second == "ARTIFACT NOT VERIFIED: the artifact cannot run here: no such device"


def test_a_census_counts_only_what_changed(model: Path) -> None:
    from graphwright.passes.pipeline import Pipeline

    census = Census()
    Pipeline.parse("simplify,dead-code").run(io.load(model), observers=[census])
    assert census.operators == {"MatMul": 1, "Relu": 1, "Identity": 1, "Softmax": 1}
    assert census.nodes == [3, 3] and census.weights == 128


def test_jobs_reach_joblib() -> None:
    import joblib

    with spread(2, "local"):
        assert joblib.Parallel()(joblib.delayed(abs)(n) for n in (-1, -2)) == [1, 2]
        assert joblib.effective_n_jobs(None) == 2


def test_skips_are_shown_with_their_reason(capsys: pytest.CaptureFixture[str]) -> None:
    from graphwright.tools.summary import print_sites

    report = PassReport("p", Contract.EXACT, [Change("r", "a", "done")], [Skip("r", "b", "axis 0 is not the last")])
    print_sites(report.to_json())
    assert capsys.readouterr().out.splitlines()[1:] == [
        "a     fired  r     done",
        "b     no     r     axis 0 is not the last",
    ]


@pytest.mark.tvm
def test_tune_measures_says_what_it_gained_and_goes_on(
    cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphwright.runtime import tuner
    from graphwright.runtime.worker import Compiler

    monkeypatch.setattr(tuner, "cache_dir", lambda: tmp_path / "cache")
    common: tuple[object, ...] = ("compile", model, "--pin", "x=2x8", "--overwrite", "-o", tmp_path / "a")
    common = (*common, "--report", tmp_path / "report.html")
    first = cli(*common, "--tune", "0.05", "-v")
    assert re.search(r"tune -{20} 0 of 1 kernels, 0 faster, 0:0\d left", first.stderr)
    line = r"^tuned: [01] of 1 kernel get another tile; those measured take \S+ instead of \S+ ms alone \(.* as fast\)$"
    assert re.search(line, first.stdout, re.M)
    assert re.search(r"<p>tuned: [01] of 1 kernel get", (tmp_path / "report.html").read_text())
    monkeypatch.setattr(Compiler, "measure", None)
    again = json.loads(cli(*common, "--tune", "0.05", "--format", "json").stdout)["tuning"]
    assert (again["kernels"], again["known"], again["measured"]) == (1, 1, 0)
    assert 0 < again["tuned_ms"] <= again["rule_ms"]
    assert json.loads(cli(*common, "--format", "json").stdout)["tuning"] is None


@pytest.mark.tvm
def test_interrupted_tuning_ends_as_everything_else_does(
    cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphwright.runtime import tuner
    from graphwright.runtime.worker import Compiler

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuner, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(Compiler, "measure", interrupted)
    result = cli("compile", model, "--pin", "x=2x8", "-o", tmp_path / "a", "--tune", "1", expect=130)
    assert result.stderr.endswith("error: interrupted\n") and not (tmp_path / "a").exists()


def test_tune_is_refused_in_one_line_where_nothing_can_be_measured(cli: Cli, model: Path) -> None:
    result = cli("optimize", model, "--target", "cuda", "--tune", "1", expect=1)
    assert result.stderr == "error: --tune: target cuda does not run on this machine; leave --tune out for it\n"
    result = cli("optimize", model, "--tune", "1", expect=2)
    assert result.stderr == "error: --tune measures compiled kernels; name a --target\n"
    assert "x>=0" in cli("optimize", model, "--target", "cuda", "--tune", "-1", expect=2).stderr


def test_the_line_about_tuning_says_what_is_left() -> None:
    found = {"kernels": 5, "known": 3, "measured": 1, "faster": 2, "rule_ms": 3.0, "tuned_ms": 2.0}
    assert tuning_line(found) == (
        "tuned: 2 of 5 kernels get another tile; those measured take 2 instead of 3 ms alone (1.50 times as fast); "
        "2 kernels not measured yet"
    )
    assert "none was measured" in tuning_line({**found, "known": 0, "faster": 0, "rule_ms": 0.0, "tuned_ms": 0.0})
    assert "fix sizes with --pin" in tuning_line({**found, "kernels": 0})


def test_what_a_pass_has_measured_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    from graphwright.tools.summary import print_measured

    rows = [
        {"layer": "conv", "bits": 8, "ms": 0.25, "decision": "codes"},
        {"layer": "fc", "bits": 8, "ms": None, "decision": "codes; no kernel is known to be its own"},
    ]
    print_measured({"rows": rows})
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == ["layer", "bits", "ms", "decision"]
    assert lines[1] == ["conv", "8", "0.25", "codes"] and lines[2][:4] == ["fc", "8", "-", "codes;"]
    print_measured({"spec": "simplify"})
    assert not capsys.readouterr().out
