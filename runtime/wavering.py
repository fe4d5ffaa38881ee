"""How far a model that quantizes between its operators may be from itself: what one rounding of a float32 can change.

A number that lies between two steps becomes the one or the other by its last digits, and what follows carries the whole
step on. Two correct runtimes differ by that; how much depends on the model, so it is measured: onnxruntime runs the
model once more with all that is quantized larger by DISTANCE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..passes.graph import Names, all_nodes
from .compare import judge
from .feeds import Feeds
from .reference import Reference

# Operators that round what was computed to a few steps.
QUANTIZERS = frozenset({"BlockQuantize", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "QGemm", "QuantizeLinear"})
# What is allowed of every model with such an operator.
LEAST = 5e-2
# Times what DISTANCE makes: other roundings may fall less well.
MARGIN = 3.0
DISTANCE = 2.0**-20


def quantizes(model: ir.Model) -> bool:
    """Whether a model rounds what it has computed to a few steps, or chooses a product's width by it."""
    return any(_rounds(node) for node in all_nodes(model))


def _rounds(node: ir.Node) -> bool:
    if node.op_type == "NestedMatMul":
        return node.inputs[1] is not None and node.inputs[1].const_value is None
    return node.op_type in QUANTIZERS or node.op_type.startswith("QLinear")


class Wavering:
    """Of one model. Measured when it is first asked for."""

    def __init__(self, model: ir.Model, threads: int = 0) -> None:
        self.model, self.threads = model, threads
        self.found: float | None = None

    def limit(self, feeds: Sequence[Feeds], expected: Sequence[Mapping[str, Any]]) -> float:
        """The largest relative error of an output that is no mistake. expected: what the model makes of the feeds."""
        if self.found is None:
            reference = Reference(_moved(self.model), threads=self.threads)
            errors = [o.relative for o in judge(feeds, expected, reference.run).outputs if np.isfinite(o.relative)]
            self.found = max(LEAST, MARGIN * max(errors, default=0.0))
        return self.found


def _moved(model: ir.Model) -> ir.Model:
    """A copy in which every float32 that is quantized at run time is DISTANCE larger."""
    copy = model.clone()
    graph, names = copy.graph, Names(copy)
    factor = ir.Value(
        name=names.fresh("distance"), type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]),
        const_value=ir.tensor(np.float32(1 + DISTANCE)),
    )  # fmt: skip
    graph.register_initializer(factor)
    for node in list(graph):
        x = node.inputs[0] if node.inputs else None
        if not _rounds(node) or x is None or x.dtype != ir.DataType.FLOAT or x.const_value is not None:
            continue
        moved = ir.node("Mul", [x, factor], name=names.fresh(f"{node.name}_moved"))
        moved.outputs[0].name = names.fresh(f"{x.name}_moved")
        graph.insert_before(node, moved)
        node.replace_input_with(0, moved.outputs[0])
    return copy
