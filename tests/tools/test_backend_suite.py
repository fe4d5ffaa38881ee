"""The backend suite's runner, on a sample of the suite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from graphwright.tools import backend_cases, backend_suite

SAMPLE = r"^node/test_(add_bcast|string_concat|reduce_max_negative_axes_keepdims_random|top_k_smallest|if)$"


def test_names_are_unique_and_each_loads() -> None:
    names = backend_cases.names("all")
    assert len(names) == len(set(names)) > 1900
    for name in ("node/test_add", "simple/test_expand_shape_model1", "pytorch-operator/test_operator_add_broadcast"):
        case = backend_cases.load(name)
        inputs, expected = case.data[0]
        assert case.feeds(inputs) and expected and case.difference(expected, expected) == ""
        assert "Mismatch" in case.difference(expected, [value + 1 for value in expected])


@pytest.mark.tvm
def test_a_sample_passes_on_both_roads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "suite.json"
    code = backend_suite.main(["--filter", SAMPLE, "--jobs", "1", "--json", str(file)])
    text = capsys.readouterr().out
    assert code == 0, text
    results = json.loads(file.read_text())
    assert len(results) == 5
    assert {r["compiled"][0] for r in results.values()} == {"passed"}
    assert not results["node/test_string_concat"]["native"] and results["node/test_if"]["native"]
    assert "run by TVM alone             4 of 5: 80.0 %" in text


def test_a_child_that_does_not_answer_costs_one_case() -> None:
    child = backend_suite.Child("cpu")
    outcome = child.ask("node/test_add", 0.05)
    assert outcome["compiled"][0] == backend_suite.HUNG and child.process.poll() is not None


def test_a_child_that_dies_costs_one_case() -> None:
    child = backend_suite.Child("cpu")
    child.process.kill()
    child.process.wait()
    assert child.ask("node/test_add", 30)["compiled"] == [backend_suite.CRASHED, "exit code -9"]


def test_failures_and_shares_are_printed() -> None:
    good = {"reference": ["passed", ""], "rewritten": ["passed", ""], "compiled": ["passed", ""], "native": True}
    bad = {**good, "compiled": ["wrong", "1 of 4 elements"]}
    skipped = {"reference": ["failed", "no kernel"], "rewritten": ["skipped", ""], "compiled": ["skipped", ""]}
    results = {"node/a": good, "node/b": bad, "node/c": skipped}
    assert backend_suite.failures(results) == ["node/b: compiled wrong: 1 of 4 elements"]
    summary = backend_suite.summary(results, "cpu")
    assert "1 passed, 1 wrong, of 2" in summary and "1 of 2: 50.0 %" in summary
    assert not backend_suite.meets_goal(results) and backend_suite.meets_goal({"node/a": good, "node/c": skipped})


@pytest.mark.parametrize("sample", ["0/3", "4/3", "x"])
def test_a_sample_is_k_of_n(sample: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        backend_suite.main(["--sample", sample])
    assert "expected K/N with K from 1 to N" in capsys.readouterr().err
