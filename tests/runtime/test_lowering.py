"""Kernels of custom operators: what is registered for a target is used, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from graphwright.runtime import lowering
from graphwright.runtime.lowering import lowering_for, lowers
from graphwright.runtime.target import Target

OP = ("test.domain", "Twice")
MODEL = """<ir_version: 9, opset_import: ["": 18, "test.domain": 1]> g (float[3] x) => (float[3] y) {
    y = test.domain.Twice <by = 2.0> (x)
}
<domain: "test.domain", opset_import: ["": 18]> Twice <by> (a) => (b) { b = Add(a, a) }"""


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    before = dict(lowering._lowerings)
    yield
    lowering._lowerings.clear()
    lowering._lowerings.update(before)


def test_a_lowering_belongs_to_its_kinds() -> None:
    @lowers(OP, kinds=("llvm", "cuda"))
    def twice(bb: Any, inputs: Any, attrs: Any, target: Any) -> Any:
        raise NotImplementedError

    assert lowering_for(*OP, "llvm") is twice and lowering_for(*OP, "cuda") is twice
    assert lowering_for(*OP, "webgpu") is None
    assert lowering_for("other.domain", "Twice", "llvm") is None


@pytest.mark.tvm
def test_the_operators_of_this_package_register_when_first_asked_for() -> None:
    pytest.importorskip("tvm")
    for domain, name in lowering.MODULES:
        assert callable(lowering_for(domain, name, "llvm")), f"{domain}::{name}"


@pytest.mark.tvm
def test_the_importer_calls_the_lowering_and_else_follows_the_body() -> None:
    pytest.importorskip("tvm")
    from graphwright.runtime.importer import import_model
    from tvm import relax

    cpu, cuda = Target.named("cpu"), Target.named("cuda")
    seen: list[Any] = []

    @lowers(OP, kinds=("llvm",))
    def twice(bb: relax.BlockBuilder, inputs: list[Any], attrs: dict[str, Any], target: Target) -> Any:
        seen.append((len(inputs), attrs, target))
        return relax.op.multiply(inputs[0], relax.const(np.float32(attrs["by"])))

    model = onnx.parser.parse_model(MODEL)
    assert "R.multiply" in str(import_model(model, cpu))
    assert seen == [(1, {"by": 2.0}, cpu)]
    assert "R.add" in str(import_model(model, cuda)) and len(seen) == 1


@pytest.mark.tvm
def test_a_lowering_that_gives_the_wrong_type_is_refused() -> None:
    pytest.importorskip("tvm")
    from graphwright.runtime.importer import refusals
    from tvm import relax

    @lowers(OP, kinds=("llvm",))
    def twice(bb: relax.BlockBuilder, inputs: list[Any], attrs: dict[str, Any], target: Target) -> Any:
        return relax.op.astype(inputs[0], "float64")

    found = refusals(onnx.parser.parse_model(MODEL), Target.named("cpu"))
    assert found == {0: "the converter gave float64, ONNX promises float32"}
