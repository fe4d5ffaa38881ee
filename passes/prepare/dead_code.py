"""Remove what nothing uses."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from .. import graph
from ..base import Contract, Pass, PassContext, PassReport


@dataclass(frozen=True)
class DeadCode(Pass):
    """Remove nodes, initializers, functions and opset imports that no output depends on.

        {  unused = Exp (X)             ->   {  Y = Relu (X)  }
           Y = Relu (X)  }

    Optional outputs that nobody reads are left out (`Y, mask = Dropout (X)` -> `Y = Dropout (X)`).
    Left alone: inputs and outputs of the model, variadic outputs, and the outputs of a BatchNormalization
    that may be training, whose number changes what it computes.
    """

    name: ClassVar[str] = "dead-code"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        report = self.report()
        _sweep(graph.Scope(model.graph, model.graph.opset_imports), report)
        called = _called(model)
        for identifier in [known for known in model.functions if known not in called]:
            del model.functions[identifier]
            report.changed("function", "::".join(filter(None, identifier)))
        for function in model.functions.values():
            _sweep(graph.Scope(function.graph, function.opset_imports, function), report)
        _drop_imports(model, report)
        return report


def _sweep(scope: graph.Scope, report: PassReport) -> None:
    """Remove unused nodes from last to first, bodies before the node that owns them, then initializers."""
    for node in reversed(scope.graph):
        if not any(graph.is_used(value) for value in node.outputs):
            report.changed("node", graph.site(node), node.op_type)
            graph.remove_node(node)
            continue
        if node.attributes:
            for body in graph.subgraphs(node):
                _sweep(graph.Scope(body, scope.opsets, scope.function, node), report)
        if len(node.outputs) > 1:
            _drop_outputs(node, scope.opset, report)
    for name, value in list(scope.graph.initializers.items()):
        if not graph.is_used(value) and not value.is_graph_input():
            del scope.graph.initializers[name]
            report.changed("initializer", name)


@functools.cache
def _optional_outputs(op_type: str, opset: int) -> tuple[bool, ...]:
    """For each output of a standard operator whether it may be left out; empty when it is not known."""
    import onnx.defs

    try:
        schema = onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return ()
    options = [output.option for output in schema.outputs]
    if onnx.defs.OpSchema.FormalParameterOption.Variadic in options:
        return ()
    return tuple(option == onnx.defs.OpSchema.FormalParameterOption.Optional for option in options)


def _may_train(node: ir.Node, opset: int) -> bool:
    if node.op_type != "BatchNormalization":
        return False
    mode = node.attributes.get("training_mode")
    return opset < 14 or (mode is not None and (mode.is_ref() or mode.as_int() != 0))


def _drop_outputs(node: ir.Node, opset: int, report: PassReport) -> None:
    if node.domain != "" or _may_train(node, opset):
        return
    optional = _optional_outputs(node.op_type, opset)
    for value, may_go in zip(node.outputs, optional, strict=False):
        if may_go and value.name and not graph.is_used(value):
            report.changed("output", value.name, node.op_type)
            value.name = ""
    count = len(node.outputs)
    while count and not node.outputs[count - 1].name:
        count -= 1
    if count < len(node.outputs):
        node.resize_outputs(count)


def _called(model: ir.Model) -> set[ir.OperatorIdentifier]:
    """The functions that the main graph reaches, directly or through others."""
    found: set[ir.OperatorIdentifier] = set()
    pending = [model.graph]
    while pending:
        for node in pending.pop().all_nodes():
            identifier = node.op_identifier()
            if identifier in model.functions and identifier not in found:
                found.add(identifier)
                pending.append(model.functions[identifier].graph)
    return found


def _drop_imports(model: ir.Model, report: PassReport) -> None:
    """Domains that no node uses; the standard one always stays."""
    own = {"", *(function.domain for function in model.functions.values())}
    owners: list[ir.Graph] = [model.graph, *(function.graph for function in model.functions.values())]
    for owner in owners:
        used = {node.domain for node in owner.all_nodes()} | (own if owner is model.graph else {""})
        for domain in sorted(owner.opset_imports.keys() - used):
            del owner.opset_imports[domain]
            report.changed("import", domain)
