"""Writing a plan into a model: Q and DQ nodes, weights in codes, biases as whole numbers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .. import graph
from ..errors import PassError
from .constants import drop_unused, new_constant
from .layers import Layer, find_layers
from .placement import place
from .plan import LayerPlan, Plan, Point, TablePlan
from .scales import Grid, data_grid
from .tables import Table, find_tables

DATA_TYPES = {4: ir.DataType.UINT8, 6: ir.DataType.UINT8, 8: ir.DataType.UINT8, 16: ir.DataType.UINT16}
BIAS_BITS = 8  # of the data up to which the bias becomes whole: sums of wider products do not fit into int32
BIAS_GRID = Grid(-(2**31 - 1), 2**31 - 1, True)


def write(model: ir.Model, plan: Plan, *, alone: bool = False) -> None:
    """Put the plan into the model, whose edits were made. alone: see `place`. Raises PassError when the plan is for
    another model."""
    found = find_layers(model)[0]
    layers = {layer.site: layer for layer in found}
    for site, planned in plan.layers.items():
        if site not in layers or layers[site].size != planned.codes.codes.size:
            raise PassError(f"the plan is for another model or preset: this one has no such layer {site!r}")
    tables = {table.name: table for table in find_tables(model, found)[0]} if plan.tables else {}
    for name, stored in plan.tables.items():
        codes = stored.codes if stored.shared is None else plan.layers[stored.shared].codes
        if name not in tables or codes is None or codes.codes.shape != tables[name].rows_shape:
            raise PassError(f"the plan is for another model or preset: this one has no such table {name!r}")
    writer = _Writer(model)
    placement = place(model, [layers[site] for site, planned in plan.layers.items() if planned.data], alone=alone)
    points = {}
    for value in placement.values:
        point = plan.values.get(value.name or "")
        if point is None:
            raise PassError(f"the plan is for another model or preset: it has no range of {value.name!r}")
        points[value] = point
    shared = {stored.shared for stored in plan.tables.values()}
    for site, planned in plan.layers.items():
        layer = layers[site]
        if site in shared:
            writer.rows_of(layer, planned)
        else:
            writer.weight(layer, planned)
        writer.bias(layer, planned, points.get(layer.data) if planned.data else None)
    # Behind the weights: a node reads its data by then as before.
    for value, point in points.items():
        writer.value(value, point, placement.readers)
    for name, stored in plan.tables.items():
        writer.table(tables[name], stored)


class _Writer:
    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.names = graph.Names(model)
        self.shared: dict[str, tuple[ir.Value, np.ndarray]] = {}  # site -> codes and scales of a layer and a table

    def constant(self, array: np.ndarray, stem: str, dtype: ir.DataType | None = None) -> ir.Value:
        return new_constant(self.model, self.names, stem, array, dtype)

    def dequantized(
        self, codes: ir.Value, scale: ir.Value, zero: ir.Value | None, like: ir.Value | None, stem: str,
        attributes: dict[str, int], shape: ir.Shape | None,
    ) -> tuple[ir.Node, ir.Value]:  # fmt: skip
        result = ir.Value(name=self.names.fresh(f"{stem}_dequantized"), type=ir.TensorType(ir.DataType.FLOAT),
                          shape=like.shape if like is not None else shape)  # fmt: skip
        inputs = [codes, scale] if zero is None else [codes, scale, zero]
        given = [ir.AttrInt64(key, number) for key, number in attributes.items()]
        return ir.Node("", "DequantizeLinear", inputs, given, outputs=[result], name=""), result

    def weight(self, layer: Layer, planned: LayerPlan) -> None:
        """Codes -> DequantizeLinear -> the layer, and the old weight goes where nothing else reads it."""
        node, old = layer.node, layer.node.inputs[1]
        assert old is not None
        codes = planned.codes
        stem = old.name or layer.site
        dtype = {(4, True): ir.DataType.INT4, (4, False): ir.DataType.UINT4}.get(
            (planned.bits, codes.codes.dtype == np.int8), ir.DataType.from_numpy(codes.codes.dtype)
        )
        axis = layer.axis
        attributes = {"axis": axis}
        if codes.block:
            axis = 1 - layer.axis  # of a matrix: blocks lie along the inputs
            attributes = {"axis": axis, "block_size": codes.block}
        scale, zero = (
            layer_shape(layer, x) if codes.block else np.ascontiguousarray(x[:, 0]) for x in (codes.scale, codes.zero)
        )
        value = self.constant(layer.unmatrix(codes.codes).astype(dtype.numpy()), f"{stem}_quantized", dtype)
        point = None
        if codes.codes.dtype == np.uint8:
            point = self.constant(zero.astype(dtype.numpy()), f"{stem}_zero_point", dtype)
        new, result = self.dequantized(
            value, self.constant(scale, f"{stem}_scale"), point, None, stem, attributes, ir.Shape(layer.shape)
        )
        self.model.graph.insert_before(node, new)
        node.replace_input_with(1, result)
        drop_unused(old)

    def rows_of(self, layer: Layer, planned: LayerPlan) -> None:
        """The same for a weight whose codes a table shares: they lie in its rows, and are turned where the layer reads
        columns."""
        node, old = layer.node, layer.node.inputs[1]
        assert old is not None
        stem, scale = old.name or layer.site, np.ascontiguousarray(planned.codes.scale[:, 0])
        codes = self.constant(planned.codes.codes, f"{stem}_quantized")
        self.shared[layer.site] = codes, scale
        shape = ir.Shape(planned.codes.codes.shape)
        new, result = self.dequantized(
            codes, self.constant(scale, f"{stem}_scale"), None, None, stem, {"axis": 0}, shape
        )
        self.model.graph.insert_before(node, new)
        if layer.axis == 1:
            turned = ir.Node("", "Transpose", [result], [ir.AttrInt64s("perm", [1, 0])], name="")
            self.model.graph.insert_before(node, turned)
            turned.outputs[0].name = self.names.fresh(f"{stem}_transposed")
            result = turned.outputs[0]
            result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(layer.shape)
        node.replace_input_with(1, result)
        drop_unused(old)

    def table(self, table: Table, planned: TablePlan) -> None:
        """Gather -> Gather of codes and of scales, Cast, Mul: never more than the rows that are taken is computed."""
        if planned.shared is not None:
            codes, scale = self.shared[planned.shared]
        else:
            assert planned.codes is not None
            codes = self.constant(planned.codes.codes.reshape(table.shape), f"{table.name}_quantized")
            scale = planned.codes.scale
        ones = [1] * (len(table.shape) - 1)  # axes of a row
        scales = self.constant(np.ascontiguousarray(scale.reshape(-1, *ones)), f"{table.name}_scale")
        for node in table.gathers:
            self.gather(node, codes, scales, ones)
        drop_unused(table.value)

    def gather(self, node: ir.Node, codes: ir.Value, scales: ir.Value, ones: list[int]) -> None:
        index, old = node.inputs[1], node.outputs[0]
        one_each = None if index is None or index.shape is None else ir.Shape([*index.shape, *ones])
        float32 = ir.DataType.FLOAT
        kinds = ((ir.DataType.INT8, old.shape), (float32, one_each), (float32, old.shape), (float32, old.shape))
        stem = old.name or "rows"
        picked, scale, steps, rows = (
            ir.Value(name=self.names.fresh(f"{stem}_{what}"), type=ir.TensorType(dtype), shape=shape)
            for what, (dtype, shape) in zip(("quantized", "scale", "steps", "rows"), kinds, strict=True)
        )
        made = [
            ir.Node("", "Gather", [codes, index], outputs=[picked], name=""),
            ir.Node("", "Gather", [scales, index], outputs=[scale], name=""),
            ir.Node("", "Cast", [picked], [ir.AttrInt64("to", float32)], outputs=[steps], name=""),
            ir.Node("", "Mul", [steps, scale], outputs=[rows], name=""),
        ]
        graph.keep_metadata(node, made[-1])
        self.model.graph.insert_before(node, made)
        graph.replace_value(old, rows, keep_name=True)
        graph.remove_node(node)

    def bias(self, layer: Layer, planned: LayerPlan, point: Point | None) -> None:
        """The bias in steps of the product's scale where the layer computes in whole numbers; else a float one."""
        place = bias_place(layer)
        if place is None:
            return
        node, index = place
        old = graph.input_of(node, index)
        tensor = graph.constant_tensor(old)
        whole = node is layer.node and point is not None and point.bits <= BIAS_BITS and not planned.codes.block
        if planned.bias is None and (tensor is None or not whole):
            return
        bias = planned.bias if planned.bias is not None else tensor.numpy().reshape(-1)  # type: ignore[union-attr]
        bias = np.ascontiguousarray(np.broadcast_to(bias, (layer.channels,)), np.float32)
        stem = old.name if old is not None and old.name else f"{layer.site}_bias"
        if len(node.inputs) <= index:
            node.resize_inputs(index + 1)
        if whole and point is not None:
            scale = np.float32(point.scale) * planned.codes.scale[:, 0]
            codes = self.constant(whole_bias(bias, scale), f"{stem}_quantized")
            new, result = self.dequantized(
                codes, self.constant(scale, f"{stem}_scale"), None, None, stem, {"axis": 0}, ir.Shape(bias.shape)
            )
            self.model.graph.insert_before(node, new)
            node.replace_input_with(index, result)
        else:
            node.replace_input_with(index, self.constant(bias, f"{stem}_corrected"))
        if old is not None:
            drop_unused(old)

    def value(self, value: ir.Value, point: Point, readers: set[ir.Node]) -> None:
        """Value -> QuantizeLinear -> DequantizeLinear -> those that read codes. A Clip goes before where the type of
        the codes holds more of them than there are."""
        uses = [(node, index) for node, index in value.uses() if node in readers]
        stem = value.name or "value"
        dtype = DATA_TYPES[point.bits]
        scale = self.constant(np.array(point.scale, np.float32), f"{stem}_scale")
        zero = self.constant(np.array(point.zero, dtype.numpy()), f"{stem}_zero_point")
        codes = ir.Value(name=self.names.fresh(f"{stem}_quantized"), type=ir.TensorType(dtype), shape=value.shape)
        made = []
        inside = value
        if 2**point.bits <= np.iinfo(dtype.numpy()).max:
            ends = np.float32(point.scale) * (np.array([0, data_grid(point.bits).high]) - point.zero).astype(np.float32)
            inside = ir.Value(name=self.names.fresh(f"{stem}_clipped"), type=value.type, shape=value.shape)
            limits = [self.constant(end, f"{stem}_{what}") for end, what in zip(ends, ("least", "most"), strict=True)]
            made.append(ir.Node("", "Clip", [value, *limits], outputs=[inside], name=""))
        made.append(ir.Node("", "QuantizeLinear", [inside, scale, zero], outputs=[codes], name=""))
        second, result = self.dequantized(codes, scale, zero, value, stem, {}, None)
        made.append(second)
        producer = value.producer()
        if producer is None:
            self.model.graph.insert_before(self.model.graph[0], made)
        else:
            self.model.graph.insert_after(producer, made)
        for node, index in uses:
            node.replace_input_with(index, result)


def bias_place(layer: Layer) -> tuple[ir.Node, int] | None:
    """The node and input that hold a layer's bias, or could: its own, or the Add behind a MatMul. None: there is no
    place for one, or it changes from run to run."""
    node = layer.node
    if node.op_type != "MatMul":
        own = graph.constant_tensor(layer.bias)
        usable = layer.bias is None or (own is not None and own.size in (1, layer.channels))
        return (node, 2) if usable else None
    result = node.outputs[0]
    users = list(result.uses())
    if len(users) != 1 or result.is_graph_output():
        return None
    add, index = users[0]
    if not graph.is_op(add, "Add") or add.graph is not node.graph:
        return None
    tensor = graph.constant_tensor(add.inputs[1 - index])
    fits = tensor is not None and list(tensor.shape.numpy()) == [layer.channels]
    return (add, 1 - index) if fits else None


def whole_bias(bias: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """int32, in steps of scale. float64, as a float32 quotient has 24 bits only."""
    steps = np.rint(bias.astype(np.float64) / scale.astype(np.float64))
    return np.clip(steps, BIAS_GRID.low, BIAS_GRID.high).astype(np.int32)


def layer_shape(layer: Layer, rows: np.ndarray) -> np.ndarray:
    """(channels, blocks) in the order of the weight's axes."""
    return np.ascontiguousarray(rows if layer.axis == 0 else rows.T)
