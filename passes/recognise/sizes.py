"""Sizes that are read from a value which is to vanish."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from .. import graph

Source = Callable[[int], "tuple[ir.Value, int] | None"]


def read_sizes_elsewhere(shape: ir.Node, source: Source, scope: graph.Scope, names: graph.Names) -> list[str]:
    """Let sizes that are taken from what a Shape node gives come from other values. Returns those sites.

    Single sizes are taken where they lie; what reads all of them reads a concatenation.

    source: for an axis the value, and its axis, that has the same size; None where there is none.
    """
    moved: list[str] = []
    rank = graph.rank(shape.inputs[0])
    start, end = graph.attribute(shape, "start", 0), graph.attribute(shape, "end")
    if not rank:
        return moved
    if end is not None and end - start == 1:
        found = source(start % rank)
        if found is not None:
            shape.replace_input_with(0, found[0])
            shape.attributes.add(ir.AttrInt64("start", found[1]))
            shape.attributes.add(ir.AttrInt64("end", found[1] + 1))
            moved.append(graph.site(shape))
        return moved
    if start or end is not None:
        return moved
    for node, _ in list(shape.outputs[0].uses()):
        index = graph.constant_ints(node.inputs[1]) if graph.is_op(node, "Gather") else None
        found = source(index[0] % rank) if index is not None and len(index) == 1 else None
        if found is None:
            continue
        for place, given in enumerate(_size(found, node, graph.rank(node.inputs[1]) == 0, scope, names)):
            node.replace_input_with(place, given)
        moved.append(graph.site(node))
    if not graph.is_used(shape.outputs[0]):
        graph.remove_node(shape)
        return moved
    every = [source(axis) for axis in range(rank)]
    if None not in every:
        parts: list[ir.Value] = []
        for found in every:
            assert found is not None
            one = ir.Value(name=names.fresh(f"{graph.site(shape)}_size"), type=ir.TensorType(ir.DataType.INT64))
            one.shape = ir.Shape([1])
            read = _size(found, shape, False, scope, names)
            scope.graph.insert_before(shape, ir.Node("", "Gather", read, outputs=[one], name=""))
            parts.append(one)
        shape.op_type = "Concat"
        shape.attributes.clear()
        shape.attributes.add(ir.AttrInt64("axis", 0))
        shape.resize_inputs(rank)
        for place, part in enumerate(parts):
            shape.replace_input_with(place, part)
        moved.append(graph.site(shape))
    return moved


def _size(
    found: tuple[ir.Value, int], before: ir.Node, scalar: bool, scope: graph.Scope, names: graph.Names
) -> tuple[ir.Value, ir.Value]:
    """The inputs of a Gather that gives the size of an axis of a value, as a scalar or a vector of one element."""
    value, axis = found
    sizes = ir.Value(name=names.fresh(f"{graph.site(before)}_shape"), type=ir.TensorType(ir.DataType.INT64))
    sizes.shape = ir.Shape([len(value.shape or ())])
    scope.graph.insert_before(before, ir.Node("", "Shape", [value], outputs=[sizes], name=""))
    place = np.array(axis if scalar else [axis], np.int64)
    return sizes, graph.add_constant(scope, before, names.fresh(f"{graph.site(before)}_axis"), place)
