"""onnxscript rewrite rules with ears: every rewrite becomes a Change, every refusal a Skip with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import MatchingTracer, MatchStatus, pattern

from .base import PassReport

REFUSALS = (MatchStatus.CONDITION_FAILED, MatchStatus.REPLACEMENT_FAILED)


class _Refusals(MatchingTracer):
    """Keeps the first refusal of one attempt; the stock tracer keeps only the best matches of a whole run."""

    def __init__(self) -> None:
        super().__init__()
        self.reason: str | None = None

    def log(self, rule: Any, container: Any, node: Any, match_result: Any, status: MatchStatus) -> None:
        if status in REFUSALS and self.reason is None:
            self.reason = match_result.reason or "the replacement could not be built"


class _Listening:
    """A rewrite rule that writes what it does into a report."""

    def __init__(self, rule: pattern.RewriteRule, report: PassReport) -> None:
        self._rule, self._report = rule, report

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rule, name)

    def try_rewrite(self, model: ir.Model, graph: Any, node: ir.Node, **options: Any) -> Any:
        site = node.outputs[0].name if node.outputs else node.name
        tracer = _Refusals()
        replacement = self._rule.try_rewrite(model, graph, node, **{**options, "tracer": tracer})
        name = self._rule.name or type(self._rule).__name__
        if replacement is not None:
            self._report.changed(name, site, f"{len(replacement.match.nodes)} nodes -> {len(replacement.new_nodes)}")
        elif tracer.reason is not None:
            self._report.skipped(name, site, tracer.reason)
        return replacement


def apply_rules(rules: Sequence[pattern.RewriteRule], model: ir.Model, report: PassReport) -> None:
    """Apply `rules` in order of preference at every node, subgraphs and functions included."""
    listening: list[Any] = [_Listening(rule, report) for rule in rules]
    pattern.RewriteRuleSet(listening).apply_to_model(model)
