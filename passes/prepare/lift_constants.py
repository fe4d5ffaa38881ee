"""Turn Constant nodes into initializers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from .. import graph
from ..base import Contract, Pass, PassContext, PassReport


@dataclass(frozen=True)
class LiftConstants(Pass):
    """Make every Constant node an initializer of the graph it is in, under the same name.

        {  two = Constant <value_float = 2.0> ()   ->   <float two = {2}>
           Y = Mul (X, two)  }                          {  Y = Mul (X, two)  }

    Left alone: constants that are outputs of their graph, sparse constants, and function bodies, which have
    no initializers.
    """

    name: ClassVar[str] = "lift-constants"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        report = self.report()
        for scope in graph.scopes(model):
            if scope.function is not None:
                continue
            for node in scope.graph:
                if graph.is_op(node, "Constant"):
                    _lift(node, scope.graph, report)
        return report


def _lift(node: ir.Node, owner: ir.Graph, report: PassReport) -> None:
    (old,) = node.outputs
    tensor = graph.constant_tensor(old)
    if tensor is None:
        report.skipped("lift", old.name, f"a Constant with {', '.join(node.attributes)} is no dense tensor")
        return
    if old.is_graph_output():
        report.skipped("lift", old.name, "it is an output of its graph")
        return
    name, old.name = old.name, None
    new = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=graph.tensor_shape(tensor), const_value=tensor)
    new.metadata_props.update(old.metadata_props)
    owner.register_initializer(new)
    graph.replace_value(old, new)
    graph.remove_node(node)
    report.changed("lift", name)
