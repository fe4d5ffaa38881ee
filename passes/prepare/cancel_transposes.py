"""The pass `cancel-transposes`: operators that work in any order of axes work in the one that spares transpositions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from .. import graph
from ..base import Contract, Pass, PassContext, PassReport
from .transpose_regions import Body
from .transpose_writer import Writer


@dataclass(frozen=True)
class CancelTransposes(Pass):
    """Let operators that work in any order of axes work in the order that their neighbours want.

        a = Transpose <perm = [0, 3, 1, 2]> (X)         a = Transpose <perm = [0, 3, 1, 2]> (X)
        b = Conv (a, W)                                 b = Conv (a, W)
        c = Transpose <perm = [0, 2, 3, 1]> (b)    ->   d = Relu (b)
        d = Relu (c)                                    Y = Conv (d, V)
        e = Transpose <perm = [0, 3, 1, 2]> (d)
        Y = Conv (e, V)

    Such operators are elementwise ones with broadcasting, Concat, Split, Softmax, Pad, Slice, Gather of one axis,
    reductions, Resize, Squeeze, Unsqueeze, quantization, and others, whose axes are renumbered; constants are stored in
    the new order. A region of them is relaid when that leaves fewer transpositions and none of more bytes in all, or
    as many of fewer bytes; bytes count where the sizes are known, equal symbols included. Nodes for which it makes no
    difference keep their order. Shape of a transposed value becomes a Gather of the other's shape.
    Left alone: convolutions, poolings, products and reshapes, whose axes have meanings; operators on values of
    unknown rank; Softmax before opset 13; axes that are computed; nodes with attributes that are parameters.
    The same operations are done on the same numbers; a sum over several axes may be added up in another order.
    """

    name: ClassVar[str] = "cancel-transposes"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        report = self.report()
        names: graph.Names | None = None
        steps = 0
        for scope in graph.scopes(model):
            if not any(graph.is_op(node, "Transpose") for node in scope.graph):
                continue
            region = Body(scope, report)
            region.decide()
            if region.label:
                names = names or graph.Names(model)
                Writer(region, names).write()
            steps += region.steps
        report.stats["steps"] = steps
        return report
