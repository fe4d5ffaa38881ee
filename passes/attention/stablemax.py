"""The pass `stablemax`: heads that end in a softmax end in StableMax, or in nothing where only indices are read."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from .. import graph
from ..base import Contract, Pass, PassContext, PassReport
from ..ops.stable_max import OPSET, STABLE_MAX
from .softmax_top_k import ONE_AXIS, choosing_refusal, is_softmax

# Operators that only move what they read: behind them a head is still a head.
MOVES = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
COMPUTED = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class Scope(enum.Enum):
    HEADS = "heads"  # softmax whose result leaves the graph or is chosen from
    ALL = "all"  # every softmax, those of attention too


class Values(enum.Enum):
    """What becomes of softmax whose values are read, which StableMax changes."""

    REFUSE = "refuse"  # it stays
    NONE = "none"  # it is replaced, and nothing is recovered


@dataclass(frozen=True)
class Stablemax(Pass):
    """Softmax becomes StableMax, which needs no exponential; where only indices are read, both go.

        s = Softmax (x)      ->    i = ArgMax (x)
        i = ArgMax (s)

        y = Softmax (x)      ->    y = graphwright.StableMax <axis = -1> (x)         with recover=none

        StableMax: s(x) = x + 1 where x >= 0, else 1 / (1 - x); y = s(x) over the sum of s

    Softmax and StableMax both grow with x. Where only the indices of ArgMax and TopK are read, these read x, and
    neither is computed: the indices are those of either in exact arithmetic. In float32 both make near elements equal
    (softmax those whose exponentials round alike or are lost to 0, StableMax those less than about 2^-22 (1 + |x|)
    apart), and of equal ones the first is taken; read from x only equal elements are equal.
    Where values are read, StableMax is another function, far flatter than softmax: probabilities lose their meaning
    unless the model was trained with it, as its authors do. So these sites are refused, with who reads them, unless
    recover=none asks for the change. The operator has a body of standard operators: the file stays plain ONNX.
    Left alone: LogSoftmax; for indices also what softmax-top-k leaves alone, another axis among it; float64; before
    opset 13, where a softmax is over several axes, and for values before 15, which the body needs.

    Source: Prieto et al., "Grokking at the Edge of Numerical Stability", arXiv 2501.04697.

    Options: scope: heads, which leave the graph or are chosen from, or all. recover: refuse, or none to replace also
    where values are read.
    """

    name: ClassVar[str] = "stablemax"
    contract: ClassVar[Contract] = Contract.ROUNDING

    scope: Scope = Scope.HEADS
    recover: Values = Values.REFUSE

    def __post_init__(self) -> None:
        if self.recover is Values.NONE:  # then it promises less than the class
            object.__setattr__(self, "contract", Contract.LEARNED)

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        report = self.report()
        for scope in list(graph.scopes(model)):
            if scope.function is not None and scope.function.domain == STABLE_MAX.domain:
                continue
            for node in [node for node in scope.graph if is_softmax(node)]:
                self._visit(node, scope, report)
        if any(change.rule == "values" for change in report.changes):
            STABLE_MAX.add_to(model)
        return report

    def _visit(self, node: ir.Node, scope: graph.Scope, report: PassReport) -> None:
        y = node.outputs[0]
        if not graph.is_used(y):
            return
        readers = list(dict.fromkeys(user for user, _ in y.uses()))
        values = _values_readers(y)
        if not values:
            self._for_indices(node, readers, scope, report)
            return
        reason = _refusal(node, scope)
        if reason is None and self.scope is Scope.HEADS and not _is_head(y):
            reason = f"it is no head: {values[0]} computes with it; scope=all takes it too"
        if reason is None and self.recover is Values.REFUSE:
            reason = f"its values are read by {values[0]}, and StableMax gives others; recover=none replaces it anyway"
        if reason is not None:
            report.skipped("values", graph.site(node), reason)
            return
        axis = graph.attribute(node, "axis", -1)
        node.domain, node.op_type, node.version = STABLE_MAX.domain, STABLE_MAX.name, None
        node.attributes.clear()
        node.attributes.add(ir.AttrInt64("axis", axis))
        if scope.function is not None:
            scope.function.opset_imports[STABLE_MAX.domain] = STABLE_MAX.version
        report.changed("values", graph.site(node), "StableMax, another function")

    def _for_indices(self, node: ir.Node, readers: list[ir.Node], scope: graph.Scope, report: PassReport) -> None:
        """Let the readers, which take indices alone, read what the softmax reads."""
        x = node.inputs[0]
        reasons = [choosing_refusal(reader, node, scope) for reader in readers]
        for reader, reason in zip(readers, reasons, strict=True):
            if any(reasons) or x is None:
                first = next((r for r in reasons if r), "it has no input")
                report.skipped("indices", graph.site(reader), reason or f"another reader of the softmax stays: {first}")
        if any(reasons) or x is None:
            return
        for reader in readers:
            reader.replace_input_with(0, x)
            report.changed("indices", graph.site(reader), f"reads {x.name}")
        graph.remove_node(node)


def _values_readers(y: ir.Value) -> list[str]:
    """What reads more of the softmax than the order of its elements, in words."""
    found = ["an output of the graph"] if y.is_graph_output() else []
    for user, index in y.uses():
        site = graph.site(user)
        if graph.is_op(user, "TopK") and index == 0 and not graph.is_used(user.outputs[0]):
            continue
        if graph.is_op(user, "ArgMax"):
            continue
        found.append(f"{user.op_type} at {site}")
    return found


def _is_head(y: ir.Value) -> bool:
    """Whether all that is made of the value leaves the graph or is chosen from."""
    waiting = [y]
    while waiting:
        value = waiting.pop()
        for user, _ in value.uses():
            if graph.is_op(user, "ArgMax", "TopK"):
                continue
            if user.domain != "" or user.op_type not in MOVES:
                return False
            waiting.append(user.outputs[0])
    return True


def _refusal(node: ir.Node, scope: graph.Scope) -> str | None:
    """Why a softmax cannot be StableMax; None when it can."""
    if graph.has_references(node):
        return "an attribute is a parameter of the function; run inline-functions first"
    if scope.opset < ONE_AXIS:
        return f"opset {scope.opset}: a softmax is over one axis from {ONE_AXIS} on; run convert-opset first"
    if scope.opset < OPSET:
        return f"opset {scope.opset}: the operator's body needs {OPSET}; run convert-opset first"
    x = node.inputs[0]
    if x is None or x.dtype not in COMPUTED:
        known = "unknown type" if x is None or x.dtype is None else x.dtype.name.lower()
        return f"{known} input, StableMax is computed in float32; run infer-shapes first where the type is unknown"
    return None
