"""The pass `softmax-top-k`: the greatest probabilities of a softmax, without the probabilities of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from .. import graph
from ..base import Contract, Pass, PassContext, PassReport
from ..ops.two_pass_softmax import TWO_PASS_SOFTMAX

ONE_AXIS = 13  # from this opset on Softmax is over one axis
CHOOSING = ("ArgMax", "TopK")
AXES_INPUT = 18  # from this opset on ReduceLogSumExp takes its axes as an input


@dataclass(frozen=True)
class SoftmaxTopK(Pass):
    """TopK and ArgMax behind a softmax read its input, and only the chosen probabilities are computed.

        s = Softmax (x)                     v, i = TopK (x, k)
        p, i = TopK (s, k)         ->       l = ReduceLogSumExp <keepdims = 1> (x, axis)
                                            p = Exp (v - l)

        s = Softmax (x)            ->       i = ArgMax (x)
        i = ArgMax (s)

    e^x grows with x, so both choose the same elements. Language models with heads of 100,000 words and more are what
    it is for: no row of that length is written. Elements whose probabilities are equal after rounding, those that are
    all 0 among them, are then in the order of their logits and not of their places.
    Left alone: softmax whose result is used elsewhere too, another axis, the least elements, types other than float32,
    opsets before 13, where a softmax is over several axes.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867.
    """

    name: ClassVar[str] = "softmax-top-k"
    contract: ClassVar[Contract] = Contract.ROUNDING

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        report = self.report()
        names: graph.Names | None = None
        for scope in graph.scopes(model):
            for softmax in [node for node in scope.graph if is_softmax(node)]:
                users = [user for user, _ in softmax.outputs[0].uses()]
                reasons = [choosing_refusal(user, softmax, scope) for user in users]
                choosing = [(u, r) for u, r in zip(users, reasons, strict=True) if graph.is_op(u, *CHOOSING)]
                if len(choosing) < len(users) or softmax.outputs[0].is_graph_output() or any(reasons):
                    for user, reason in choosing:
                        report.skipped(user.op_type, graph.site(user), reason or "the probabilities are used elsewhere")
                    continue
                x = softmax.inputs[0]
                assert x is not None
                for user in users:
                    user.replace_input_with(0, x)
                    if user.op_type == "TopK":
                        names = names or graph.Names(model)
                        _probabilities(user, x, scope, names)
                    report.changed(user.op_type, graph.site(user), f"reads {x.name}")
                if users:
                    graph.remove_node(softmax)
        return report


def is_softmax(node: ir.Node) -> bool:
    return graph.is_op(node, "Softmax") or (node.domain, node.op_type) == TWO_PASS_SOFTMAX.identifier


def choosing_refusal(node: ir.Node, softmax: ir.Node, scope: graph.Scope) -> str | None:
    """Why an ArgMax or TopK cannot read what the softmax reads; None when it can."""
    if graph.has_references(node) or graph.has_references(softmax):
        return "an attribute is a parameter of the function; run inline-functions first"
    if scope.opset < ONE_AXIS:
        return f"opset {scope.opset}: a softmax is over one axis from {ONE_AXIS} on; run convert-opset first"
    x = softmax.inputs[0]
    if x is None or x.dtype != ir.DataType.FLOAT:
        return "it is not in float32, where rounding makes many probabilities equal"
    if softmax.graph is not node.graph:
        return "it is in a body, and the softmax outside"
    if node.op_type == "TopK" and not graph.attribute(node, "largest", 1):
        return "it takes the least probabilities"
    if node.op_type == "ArgMax" and graph.attribute(node, "select_last_index", 0):
        return "it takes the last of equal probabilities"
    rank = graph.rank(x)
    axes = [graph.attribute(softmax, "axis", -1), graph.attribute(node, "axis", 0 if node.op_type == "ArgMax" else -1)]
    if axes[0] != axes[1] and (rank is None or axes[0] % rank != axes[1] % rank):
        return f"the softmax is over axis {axes[0]}, {node.op_type} over axis {axes[1]}"
    return None


def _probabilities(node: ir.Node, x: ir.Value, scope: graph.Scope, names: graph.Names) -> None:
    """TopK now gives logits: what they are as probabilities takes the place of its values."""
    values = node.outputs[0]
    if not graph.is_used(values):
        return
    axis = graph.attribute(node, "axis", -1)
    keep = ir.AttrInt64("keepdims", 1)
    if scope.opset >= AXES_INPUT:
        axes = graph.add_constant(scope, node, names.fresh("axes"), np.array([axis], np.int64))
        total = ir.Node("", "ReduceLogSumExp", [x, axes], [keep], name="")
    else:
        total = ir.Node("", "ReduceLogSumExp", [x], [ir.AttrInt64s("axes", [axis]), keep], name="")
    difference = ir.Node("", "Sub", [None, total.outputs[0]], name="")
    result = ir.Node("", "Exp", [difference.outputs[0]], name="")
    for made, stem in ((total, "log_total"), (difference, "log_probability")):
        made.outputs[0].name = names.fresh(stem)
        made.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    scope.graph.insert_after(node, [total, difference, result])
    graph.replace_value(values, result.outputs[0], keep_name=True)
    values.name = names.fresh("logits")
    difference.replace_input_with(0, values)
