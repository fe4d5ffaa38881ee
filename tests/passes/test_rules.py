"""Rewrite rules with reports: what fired, where, and why not elsewhere."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.base import Contract, PassReport
from graphwright.passes.rules import apply_rules
from onnx import parser
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase


class DoubleNeg(RewriteRuleClassBase):
    """-(-x) -> x, for values whose names do not start with k."""

    def pattern(self, op, x):
        return op.Neg(op.Neg(x, _outputs=["inner"]))

    def check(self, context, x, inner, **_):
        result = MatchResult()
        if inner.name and inner.name.startswith("k"):
            return result.fail(f"{inner.name!r} is kept", inner)
        return result

    def rewrite(self, op, x, inner):
        return op.Identity(x)


TEXT = """<ir_version: 10, opset_import: ["" : 20]>
g (float[2] x, bool c) => (float[2] y, float[2] z, float[2] w, float[2] q) {
  a = Neg(x)  y = Neg(a)
  k = Neg(y)  z = Neg(k)
  w = If (c) <then_branch = th () => (float[2] t) { b = Neg(x)  t = Neg(b) },
              else_branch = el () => (float[2] e) { e = Relu(x) }>
  q = Neg(x)
}"""


@pytest.fixture
def report() -> PassReport:
    return PassReport("test", Contract.EXACT)


def test_changes_and_reasons(report: PassReport) -> None:
    model = ir.from_proto(parser.parse_model(TEXT))
    apply_rules([DoubleNeg.rule()], model, report)
    assert {change.value: change.detail for change in report.changes} == {"y": "2 nodes -> 1", "t": "2 nodes -> 1"}
    assert [(skip.value, skip.reason) for skip in report.skips] == [("z", "'k' is kept")]
    assert {change.rule for change in report.changes} == {"DoubleNeg"}
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_what_does_not_match_is_not_worth_a_word(report: PassReport) -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[2] x) => (float[2] y) { a = Relu(x)  y = Neg(a) }'
    apply_rules([DoubleNeg.rule()], ir.from_proto(parser.parse_model(text)), report)
    assert not report.changes and not report.skips
