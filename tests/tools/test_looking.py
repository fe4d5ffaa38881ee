"""The commands that only look: passes, explain, doctor, targets, models."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
from click.testing import Result
from graphwright.passes import registry
from graphwright.passes.base import Contract
from graphwright.passes.errors import PassError, UsageError
from graphwright.runtime.target import target_names
from graphwright.tools.models import parse_options
from graphwright.tools.passes import documentation, option_words
from onnx import numpy_helper

Cli = Callable[..., Result]


# --- passes -----------------------------------------------------------------------------------------------------


def test_every_pass_is_listed_with_what_it_does(cli: Cli) -> None:
    rows = json.loads(cli("passes", "--json").stdout)
    assert [row["name"] for row in rows] == registry.pass_names()
    for row in rows:
        assert row["contract"] in {contract.value for contract in Contract}
        assert row["summary"].endswith(".") or row["summary"]
    assert re.search(r"^simplify +exact +\S", cli("passes").stdout, re.M)


@pytest.mark.parametrize("name", registry.PASSES)
def test_every_pass_shows_its_help_and_a_sentence_for_each_option(cli: Cli, name: str) -> None:
    data = json.loads(cli("passes", name, "--json").stdout)
    assert data["help"] in cli("passes", name).stdout
    for option in data["options"]:
        assert option["help"], f"option {option['name']} of {name} has no comment at its field"
        assert option["default"] is not None


def test_options_come_with_type_and_default(cli: Cli) -> None:
    text = cli("passes", "fold-constants").stdout
    assert re.search(r"^max_bytes +int +\d+ +\S", text, re.M)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Do something.

    Options: written: what the docstring
    says of it. plain: a word.
    """

    name: ClassVar[str] = "sample"

    size: int = 3  # how large
    written: int = 0
    silent: int = 0


def test_the_comment_at_a_field_is_its_sentence() -> None:
    words = option_words(Sample)
    assert words["size"] == "how large"
    assert words["written"] == "what the docstring says of it"
    assert words["silent"] == ""
    assert "name" not in words


def test_a_pass_without_help_is_an_error() -> None:
    with pytest.raises(PassError, match=r"has no docstring; it is the pass's help text"):
        documentation(dataclasses.make_dataclass("Nameless", []))


# --- explain ----------------------------------------------------------------------------------------------------


def test_explain_shows_where_a_pass_fires(cli: Cli, model: Path) -> None:
    text = cli("explain", model, "--pass", "simplify", "--preset", "none").stdout
    assert text.startswith("simplify after nothing\n")
    assert re.search(r"^i +fired", text, re.M) and "fires at 1 site, not at 0" in text


def test_explain_shows_the_first_condition_that_failed(cli: Cli, write: Callable[..., Path]) -> None:
    path = write("agraph (double[2,3] x) => (double[2,3] y) { y = Softmax<axis=0>(x) }")
    data = json.loads(cli("explain", path, "--pass", "two-pass-softmax", "--json").stdout)
    assert data["changes"] == []
    ((_, site, reason),) = data["skips"]
    assert site == "y" and "float64 input" in reason


def test_explain_runs_what_comes_before_in_the_preset(cli: Cli, model: Path) -> None:
    steps = registry.preset("default").split(",")
    data = json.loads(cli("explain", model, "--pass", "simplify", "--json").stdout)
    assert data["after"] == ",".join(steps[: steps.index("simplify")])


def test_explain_says_when_there_is_nothing_to_look_at(cli: Cli, model: Path) -> None:
    text = cli("explain", model, "--pass", "pin-shapes", "--preset", "none").stdout
    assert "no site: the model holds nothing that this pass looks for" in text


# --- doctor -----------------------------------------------------------------------------------------------------


def findings(cli: Cli, *arguments: object, expect: int = 0) -> dict[tuple[str, str], dict[str, object]]:
    data = json.loads(cli("doctor", *arguments, "--json", expect=expect).stdout)
    return {(f["kind"], f["subject"]): f for f in data["findings"]}


@pytest.mark.tvm
def test_doctor_names_the_pass_that_cures(cli: Cli, model: Path) -> None:
    found = findings(cli, model, "--pin", "x=2x8")
    assert found["opset", "below 21"]["cure"] == "convert-opset"
    assert found["dynamic axes", "input x"]["cure"] == "pin-shapes"
    assert found["types", "values without a known type"]["cure"] == "infer-shapes"
    assert all(finding["cured"] for finding in found.values())


@pytest.mark.tvm
def test_doctor_tells_what_stays(cli: Cli, write: Callable[..., Path]) -> None:
    """A dynamic axis, strings, an If, random numbers, NaN and infinite weights: each with what to do."""
    path = write(
        "agraph (float[N] x, string[2] s, bool c) => (float[N] y, string[2] t) <float[3] w = {1.0, 2.0, 3.0}> {"
        "  t = Identity(s)  r = RandomNormalLike(x)  m = ReduceSum<keepdims=0>(w)"
        "  p = Mul(r, m)  y = If(c) <then_branch = a () => (float[N] u) { u = Relu(p) },"
        "  else_branch = b () => (float[N] v) { v = Neg(p) }> }"
    )
    proto = onnx.load(path)
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array([1, np.nan, np.inf], np.float32), "w"))
    onnx.save(proto, path)
    found = findings(cli, path)
    assert found["dynamic axes", "input x"]["cure"] == "stays dynamic; --pin x=N, a number for each N, fixes it"
    assert found["input type", "input s"]["detail"] == "is string, not a float"
    assert found["control flow", "If"]["detail"] == "1 node"
    assert found["random", "RandomNormalLike"]["cure"] == "the result cannot be verified"
    assert found["weights", "w"]["detail"] == "1 NaN and 1 infinite of 3 numbers"
    strings = found["operator", "Identity"]
    assert strings["blocks"] and not strings["cured"] and "strings" in str(strings["detail"])
    assert strings["cure"] == "onnxruntime runs it inside the artifact"


@pytest.mark.tvm
def test_doctor_cures_operators(cli: Cli, write: Callable[..., Path]) -> None:
    """There is no kernel for an LSTM with clip; a function of the model becomes its nodes."""
    header = '<ir_version: 10, opset_import: ["" : 20, "local" : 1]>'
    body = '<domain: "local", opset_import: ["" : 20]> Twice (a) => (b) { b = Add(a, a) }'
    path = write(
        "agraph (float[3,1,4] x) => (float[3,1,1,2] y) "
        "<float[1,8,4] w = {" + ", ".join(["0.1"] * 32) + "}, float[1,8,2] r = {" + ", ".join(["0.2"] * 16) + "}>"
        "{ d = local.Twice(x)  y = LSTM<hidden_size=2, clip=3.0>(d, w, r) }" + body,
        header=header,
    )
    found = findings(cli, path)
    assert found["function", "local::Twice"]["cure"] == "inline-functions"
    assert found["operator", "LSTM"]["cure"] == "decompose"
    assert all(finding["cured"] for finding in found.values())


@pytest.mark.tvm
def test_doctor_fails_where_nothing_helps(cli: Cli, write: Callable[..., Path]) -> None:
    path = write("agraph (string[2] s) => (string[2] t) { t = Identity(s) }")
    result = cli("doctor", path, "--target", "cuda", expect=1)
    assert "in the way" in result.stdout
    assert re.search(r"^error: .*target cuda cannot take Identity: .*; choose a CPU target$", result.stderr)


@pytest.mark.tvm
def test_doctor_writes_the_cured_model(cli: Cli, model: Path) -> None:
    out = model.with_name("cured.onnx")
    result = cli("doctor", model, "--fix", "-o", out, "--pin", "x=2x8")
    assert "equal: relative error" in result.stdout and f"written: {out}" in result.stdout
    cured = onnx.load(out)
    assert cured.opset_import[0].version == 21
    assert [node.op_type for node in cured.graph.node] == ["MatMul", "Relu", "Softmax"]


def test_doctor_says_where_fix_writes(cli: Cli, model: Path) -> None:
    assert "--fix writes a model; say where with -o" in cli("doctor", model, "--fix", expect=2).stderr
    assert "-o is where --fix writes; give --fix too" in cli("doctor", model, "-o", "x.onnx", expect=2).stderr


def test_external_data_is_mentioned(model: Path) -> None:
    from graphwright.passes import io
    from graphwright.tools.doctor import _weight_findings

    proto = onnx.load(model)
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((8, 4), np.float32), "w"))
    path = model.with_name("external.onnx")
    onnx.save(proto, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    (finding,) = _weight_findings(io.load(path), path)
    assert (finding.kind, finding.subject, finding.detail) == ("external data", "w.bin", "128 B")


# --- targets and models -----------------------------------------------------------------------------------------


def test_targets_are_listed(cli: Cli) -> None:
    rows = json.loads(cli("targets", "--json").stdout)
    assert [row["name"] for row in rows] == target_names()
    assert rows[0]["runs_here"] is True
    assert re.search(r"^arm64 +llvm", cli("targets").stdout, re.M)


def test_a_target_is_shown_in_full(cli: Cli) -> None:
    text = cli("targets", "arm64").stdout
    assert re.search(r"^mcpu +cortex-a76$", text, re.M)
    assert json.loads(cli("targets", "arm64", "--json").stdout)["caches"]["l1"] == 65536
    assert "did you mean arm64" in cli("targets", "arm46", expect=2).stderr


def test_models_are_listed(cli: Cli) -> None:
    from graphwright.models import registry as models
    from graphwright.models.generators import NAMED

    rows = json.loads(cli("models", "list", "--json").stdout)
    assert [row["name"] for row in rows] == [*models.names(), *(n for n in NAMED if n not in models.names())]
    assert cli("models").stdout == cli("models", "list").stdout


def test_info_describes_a_file(cli: Cli, model: Path) -> None:
    data = json.loads(cli("models", "info", model, "--json").stdout)
    assert data["inputs"] == [{"name": "x", "type": "float", "shape": ["N", 8]}]
    assert data["operators"] == {"MatMul": 1, "Relu": 1, "Identity": 1, "Softmax": 1}
    assert (data["opsets"], data["weights_bytes"], data["file_bytes"]) == ({"ai.onnx": 20}, 128, model.stat().st_size)
    assert "4 nodes, " in cli("models", "info", model).stdout


def test_unknown_models_get_a_hint(cli: Cli) -> None:
    assert "did you mean minilm" in cli("models", "export", "minilm2", "-o", "m.onnx", expect=2).stderr
    assert "did you mean minilm" in cli("models", "fetch", "minilmm", expect=1).stderr


def test_export_options_are_read() -> None:
    options = parse_options(("length=64", "rate=0.5", "fast=true", "kind=a-b", "no-name=none"))
    assert options == {"length": 64, "rate": 0.5, "fast": True, "kind": "a-b", "no_name": None}
    with pytest.raises(UsageError, match=r"--set 'length': expected KEY=VALUE"):
        parse_options(("length",))
