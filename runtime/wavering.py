"""How far a model that quantizes between its operators, or rounds to bfloat16, may be from itself: what one rounding of
a float32 can change.

A number that lies between two steps becomes the one or the other by its last digits, and what follows carries the whole
step on. Two correct runtimes differ by that; how much depends on the model, so it is measured: onnxruntime runs the
model once more with all that is rounded so larger by DISTANCE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..passes.base import PassContext
from ..passes.graph import Names, add_constant, all_nodes, attribute, has_references, is_constant, scopes
from ..passes.prepare.infer_shapes import InferShapes
from .compare import judge
from .feeds import Feeds
from .reference import Reference

# Operators that round what was computed to a few steps.
QUANTIZERS = frozenset({"BlockQuantize", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "QGemm", "QuantizeLinear"})
# What is allowed of every model with such an operator, and of one that only rounds to bfloat16, whose numbers are 2^-8
# apart.
LEAST = 5e-2
LEAST_ROUNDED = 1e-2
# Times what DISTANCE makes: other roundings may fall less well.
MARGIN = 3.0
DISTANCE = 2.0**-20


def least(model: ir.Model) -> float | None:
    """What is allowed of a model that rounds what it has computed to a few steps, or chooses a product's width by it;
    None of others."""
    return max((allowed for node in all_nodes(model) if (allowed := _allowed(node)) is not None), default=None)


def _allowed(node: ir.Node) -> float | None:
    if node.op_type == "NestedMatMul":
        return LEAST if node.inputs[1] is not None and node.inputs[1].const_value is None else None
    if node.op_type in QUANTIZERS or node.op_type.startswith("QLinear"):
        return LEAST
    if node.op_type != "Cast" or not node.inputs or node.inputs[0] is None or is_constant(node.inputs[0]):
        return None
    if has_references(node) or attribute(node, "to") != int(ir.DataType.BFLOAT16):
        return None
    # Files need not tell types.
    return LEAST_ROUNDED if node.inputs[0].dtype in (None, ir.DataType.FLOAT) else None


class Wavering:
    """Of one model, of which at least `least` is allowed. Measured when it is first asked for."""

    def __init__(self, model: ir.Model, least: float, threads: int = 0) -> None:
        self.model, self.least, self.threads = model, least, threads
        self.found: float | None = None

    def limit(self, feeds: Sequence[Feeds], expected: Sequence[Mapping[str, Any]]) -> float:
        """The largest relative error of an output that is no mistake. expected: what the model makes of the feeds."""
        if self.found is None:
            reference = Reference(_moved(self.model), threads=self.threads)
            errors = [o.relative for o in judge(feeds, expected, reference.run).outputs if np.isfinite(o.relative)]
            self.found = max(self.least, MARGIN * max(errors, default=0.0))
        return self.found


def _moved(model: ir.Model) -> ir.Model:
    """A copy in which every float32 that is rounded to steps at run time is DISTANCE larger."""
    copy = model.clone()
    InferShapes().run(copy, PassContext())  # files need not tell types
    names = Names(copy)
    for scope in scopes(copy):
        for node in list(scope.graph):
            x = node.inputs[0] if node.inputs else None
            if _allowed(node) is None or x is None or x.dtype != ir.DataType.FLOAT or x.const_value is not None:
                continue
            name = names.fresh("distance")
            factor = add_constant(scope, node, name, ir.tensor(np.float32(1 + DISTANCE), name=name))
            moved = ir.node("Mul", [x, factor], name=names.fresh(f"{node.name}_moved"))
            moved.outputs[0].name = names.fresh(f"{x.name}_moved")
            scope.graph.insert_before(node, moved)
            node.replace_input_with(0, moved.outputs[0])
    return copy
