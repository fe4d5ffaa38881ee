"""Constants of the main graph: new ones, and the end of those that nothing reads any more."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .. import graph


def new_constant(
    model: ir.Model, names: graph.Names, stem: str, array: np.ndarray, dtype: ir.DataType | None = None
) -> ir.Value:
    """An initializer of the main graph. dtype: the ONNX type where NumPy's own does not tell it."""
    name = names.fresh(stem)
    value = ir.val(name, const_value=ir.Tensor(array, dtype=dtype, name=name))
    model.graph.register_initializer(value)
    return value


def put_constant(model: ir.Model, names: graph.Names, node: ir.Node, index: int, array: np.ndarray) -> None:
    """Give one input of a node a constant of its own."""
    old = node.inputs[index]
    stem = old.name if old is not None and old.name else f"{graph.site(node)}_{index}"
    node.replace_input_with(index, new_constant(model, names, f"{stem}_scaled", array))
    if old is not None:
        drop_unused(old)


def drop_unused(value: ir.Value) -> None:
    """Remove a constant of the main graph, or the Transpose of one, unless something reads it."""
    if graph.is_used(value) or value.is_graph_input():
        return
    if value.is_initializer():
        assert value.graph is not None and value.name is not None
        value.graph.initializers.pop(value.name)
        return
    node = value.producer()
    if node is not None and graph.is_op(node, "Constant", "Transpose"):
        inputs = [v for v in node.inputs if v is not None]
        graph.remove_node(node)
        for inner in inputs:
            drop_unused(inner)
