"""Put function bodies in the place of their calls."""

from __future__ import annotations

import functools
import graphlib
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from .. import graph
from ..base import Contract, Pass, PassContext, PassReport
from ..errors import ModelError
from .bodies import inline_call

OURS = "graphwright"


@dataclass(frozen=True)
class InlineFunctions(Pass):
    """Replace every call of a function of the model by the function's nodes.

        {  Y = local.scale (X)  }                  ->   {  Y_two = Constant <value_float = 2.0> ()
        local.scale (x) => (y)                             Y = Mul (X, Y_two)  }
        {  two = Constant <value_float = 2.0> ()
           y = Mul (x, two)  }

    Left alone: functions of the domain graphwright, which have kernels of their own (unless all=true), and
    functions written for another opset whose operators mean something else there; convert-opset cures that.
    """

    name: ClassVar[str] = "inline-functions"
    contract: ClassVar[Contract] = Contract.EXACT

    all: bool = False  # inline the operators of the domain graphwright too

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        report = self.report()
        if not model.functions:
            return report
        for identifier in _callees_first(model):
            function = model.functions[identifier]
            _inline_in(self, model, graph.Scope(function.graph, function.opset_imports, function), report)
        _inline_in(self, model, graph.Scope(model.graph, model.graph.opset_imports), report)
        called = {node.op_identifier() for node in graph.all_nodes(model)}
        for identifier in [known for known in model.functions if known not in called]:
            del model.functions[identifier]
        return report


def _callees_first(model: ir.Model) -> list[ir.OperatorIdentifier]:
    calls = {
        identifier: {node.op_identifier() for node in function.all_nodes()} & model.functions.keys()
        for identifier, function in model.functions.items()
    }
    try:
        return list(graphlib.TopologicalSorter(calls).static_order())
    except graphlib.CycleError as error:
        cycle = " -> ".join(name for _, name, _ in error.args[1])
        raise ModelError(f"functions call each other in a circle: {cycle}; break the circle") from error


def _inline_in(options: InlineFunctions, model: ir.Model, top: graph.Scope, report: PassReport) -> None:
    """Inline the calls in one graph or function body and its subgraphs. Callees hold no calls any more."""
    names: graph.Names | None = None
    for scope in graph.nested(top):
        for node in scope.graph:
            function = model.functions.get(node.op_identifier())
            if function is None:
                continue
            called = f"{function.domain}.{function.name}"
            if function.domain == OURS and not options.all:
                report.skipped("inline", graph.site(node), f"{called} has kernels of its own; all=true inlines it")
                continue
            reason = _obstacle(function, scope.opsets)
            if reason is not None:
                report.skipped("inline", graph.site(node), f"{called}: {reason}")
                continue
            names = names or graph.Names(model)
            report.changed("inline", graph.site(node), f"{called}, {len(function)} nodes")
            for domain, version in function.opset_imports.items():
                scope.opsets.setdefault(domain, version)
            inline_call(node, function, names)


def _obstacle(function: ir.Function, opsets: dict[str, int]) -> str | None:
    """Why the body cannot stand in a graph with these imports."""
    differing = {
        domain: version for domain, version in function.opset_imports.items() if opsets.get(domain, version) != version
    }
    if not differing:
        return None
    for node in function.all_nodes():
        theirs, ours = differing.get(node.domain), opsets.get(node.domain)
        if theirs is None or ours is None:
            continue
        if _since(node.domain, node.op_type, theirs) != _since(node.domain, node.op_type, ours):
            domain = node.domain or "ai.onnx"
            return f"{node.op_type} of {domain} {theirs} is not that of {ours}; run convert-opset first"
    return None


@functools.cache
def _since(domain: str, op_type: str, version: int) -> int | str:
    """Opset in which the operator got the meaning that it has at `version`."""
    import onnx.defs

    try:
        return onnx.defs.get_schema(op_type, version, domain).since_version
    except onnx.defs.SchemaError:
        return f"unknown at {version}"
