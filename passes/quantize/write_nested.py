"""Writing nested weights and their selector into a model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from .. import graph
from ..ops import NESTED_MAT_MUL
from ..ops.nested_mat_mul import WIDE
from .constants import drop_unused, new_constant
from .layers import Layer, find_layers
from .nested import BITS, RATIO, Nested, NestedPlan, Selector
from .plan import LayerPlan, Plan
from .write import write

CHOICES = 2  # widths of a product


def write_nested(
    model: ir.Model, plan: NestedPlan, wide: Sequence[int], dynamic: bool
) -> tuple[frozenset[int], str]:
    """Put the plan into the model. wide: groups that read both parts. dynamic: the plan's selector chooses for those
    that are not led, in the place of `wide`. Returns the groups that it chooses for, and why it chooses for none.

    A product that is narrow for all inputs becomes a standard product with 4-bit weights. Raises PassError when the
    plan is for another model.
    """
    layers = plan.matched(find_layers(model)[0])
    selected: frozenset[int] = frozenset()
    refusal, widths = "", None
    if dynamic and plan.selector is not None:
        data = layers[plan.selector.features].data
        if (rows := _rows(data)) == 1:
            selected = frozenset(range(plan.led, len(plan.groups)))
            widths = add_selector(model, plan.selector, data, len(plan.groups))
        else:
            count = "an unknown number of" if rows is None else rows
            refusal = f"{data.name!r} has {count} rows, and a selector chooses for one; all products are wide"
    writer = _Writer(model)
    narrow = {}
    always = None
    for number, group in enumerate(plan.groups):
        for site in group:
            if number in selected:
                assert widths is not None
                writer.product(layers[site], plan.layers[site], widths, number)
            elif number in wide:
                always = always or new_constant(model, writer.names, "widths", np.array([WIDE], np.int64))
                writer.product(layers[site], plan.layers[site], always, 0)
            else:
                narrow[layers[site].site] = LayerPlan(BITS, plan.layers[site].codes, False)
    write(model, Plan(layers=narrow))
    return selected, refusal


def _rows(data: ir.Value) -> int | None:
    """All axes but the last together; None where they are not known."""
    if data.shape is None:
        return None
    dims = [dim for dim in data.shape[:-1] if isinstance(dim, int)]
    return math.prod(dims) if len(dims) == len(data.shape) - 1 else None


def add_selector(model: ir.Model, selector: Selector, data: ir.Value, groups: int) -> ir.Value:
    """The nodes behind `data`, one row, that give the width of every group: int64 (groups,)."""
    names = graph.Names(model)
    nodes: list[ir.Node] = []

    def add(op: str, inputs: list[ir.Value], dtype: ir.DataType, shape: list[int], **attributes: int) -> ir.Value:
        node = ir.node(op, inputs, attributes, name="")
        (result,) = node.outputs
        result.name = names.fresh(f"selector_{op.lower()}")
        result.type, result.shape = ir.TensorType(dtype), ir.Shape(shape)
        nodes.append(node)
        return result

    def constant(array: np.ndarray, stem: str) -> ir.Value:
        return new_constant(model, names, f"selector_{stem}", array)

    number, whole = ir.DataType.FLOAT, ir.DataType.INT64
    inputs, hidden = selector.first.shape
    row = add("Reshape", [data, constant(np.array([1, inputs]), "row")], number, [1, inputs])
    first = [row, constant(selector.first, "first"), constant(selector.first_bias, "first_bias")]
    x = add("Relu", [add("Gemm", first, number, [1, hidden])], number, [1, hidden])
    second = [x, constant(selector.second, "second"), constant(selector.second_bias, "second_bias")]
    scores = add("Gemm", second, number, [1, groups * CHOICES])
    shape = constant(np.array([groups, CHOICES]), "scores")
    table = add("Reshape", [scores, shape], number, [groups, CHOICES])
    widths = add("ArgMax", [table], whole, [groups], axis=-1, keepdims=0)
    producer = data.producer()
    if producer is not None:
        model.graph.insert_after(producer, nodes)
    elif len(model.graph):
        model.graph.insert_before(model.graph[0], nodes)
    else:
        model.graph.extend(nodes)
    return widths


class _Writer:
    def __init__(self, model: ir.Model) -> None:
        self.model, self.names = model, graph.Names(model)

    def product(self, layer: Layer, nested: Nested, widths: ir.Value, choice: int) -> None:
        """NestedMatMul in the place of a product, and an Add of the bias that it has."""
        NESTED_MAT_MUL.add_to(self.model)
        node, old = layer.node, layer.node.inputs[1]
        assert old is not None
        codes, stem = nested.codes, old.name or layer.site

        def constant(array: np.ndarray, kind: str, dtype: ir.DataType | None = None) -> ir.Value:
            array = np.ascontiguousarray(array.T)
            given = array if dtype is None else array.astype(dtype.numpy())
            return new_constant(self.model, self.names, f"{stem}_{kind}", given, dtype)

        weights = [
            constant(codes.codes, "codes", ir.DataType.UINT4),
            constant(codes.scale, "scale"),
            constant(codes.zero, "zero_point", ir.DataType.UINT4),
            constant(nested.rest, "rest", ir.DataType.INT4),
        ]
        attributes = [
            ir.AttrInt64("block", codes.block), ir.AttrFloat32("ratio", float(RATIO)), ir.AttrInt64("choice", choice)
        ]  # fmt: skip
        new = ir.Node(NESTED_MAT_MUL.domain, NESTED_MAT_MUL.name, [layer.data, widths, *weights], attributes, name="")
        nodes, result = [new], new.outputs[0]
        before = node.outputs[0]
        if layer.bias is not None:
            result.name = self.names.fresh(f"{layer.site}_product")
            result.type, result.shape = before.type, before.shape
            nodes.append(ir.Node("", "Add", [result, layer.bias], name=""))
            result = nodes[-1].outputs[0]
        self.model.graph.insert_before(node, nodes)
        graph.replace_value(before, result, keep_name=True)
        graph.remove_node(node)
        drop_unused(old)
