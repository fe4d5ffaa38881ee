"""Tables whose rows are gathered, such as embeddings: a code for each number and a scale for each row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from .. import graph
from .layers import Layer, NotQuantized
from .plan import TABLE_BITS, LayerPlan, Plan, TablePlan, read_by_float
from .scales import fit_weights, signal_to_noise, weight_grid

LEAST = 4096  # numbers in a table that are worth three nodes more
SHORTEST = 16  # numbers in a row that are worth a scale
MOST_LOST = 6.0  # decibels: a bit, that a table may lose by reading the codes of a product


@dataclass(frozen=True)
class Table:
    """A constant that Gathers of the main graph read along its first axis.

    name: of the constant. gathers: in the order of their uses. products: sites of the layers whose weight it is too.
    """

    name: str
    value: ir.Value
    tensor: ir.TensorProtocol
    gathers: tuple[ir.Node, ...]
    products: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(dim) for dim in self.tensor.shape.numpy())

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def rows_shape(self) -> tuple[int, int]:
        """Of `rows`."""
        return self.shape[0], self.size // self.shape[0]

    def rows(self) -> np.ndarray:
        """(rows, numbers of a row), float32."""
        return np.ascontiguousarray(self.tensor.numpy()).reshape(self.shape[0], -1)


def find_tables(model: ir.Model, layers: Sequence[Layer]) -> tuple[list[Table], list[tuple[str, str]]]:
    """Every table of the main graph in the order of its Gathers, and the names of those that are left alone with the
    reason. layers: of the model."""
    by_node = {layer.node: layer for layer in layers}
    tables, others = [], []
    for value in dict.fromkeys(node.inputs[0] for node in model.graph if _gathers(node)):
        assert value is not None
        try:
            tables.append(_table(model, value, by_node))
        except NotQuantized as error:
            others.append((value.name or "", str(error)))
    return tables, others


def _gathers(node: ir.Node) -> bool:
    """Whether a node takes elements of a float matrix, or of more axes, at places that change from run to run."""
    if not graph.is_op(node, "Gather"):
        return False
    tensor = graph.constant_tensor(node.inputs[0])
    if tensor is None or graph.is_constant(node.inputs[1]):
        return False
    return tensor.dtype == ir.DataType.FLOAT and len(tensor.shape.numpy()) >= 2


def _table(model: ir.Model, value: ir.Value, by_node: Mapping[ir.Node, Layer]) -> Table:
    tensor = graph.constant_tensor(value)
    assert tensor is not None
    shape = tensor.shape.numpy()
    if tensor.size < LEAST:
        raise NotQuantized(f"it has {tensor.size} numbers, too few to matter")
    if tensor.size // shape[0] < SHORTEST:
        raise NotQuantized(f"its rows have {tensor.size // shape[0]} numbers, too few for a scale each")
    if value.is_graph_output():
        raise NotQuantized("it is an output of the model")
    gathers, products = [], []
    for user, index in value.uses():
        layer = _layer_that_reads(user, index, by_node)
        if _gathers(user) and index == 0 and user.graph is model.graph:
            if graph.has_references(user) or graph.attribute(user, "axis", 0) % len(shape):
                raise NotQuantized(f"{graph.site(user)!r} takes it apart along another axis than the first")
            if any(graph.is_op(node, "RotaryEmbedding") for node, _ in user.outputs[0].uses()):
                raise NotQuantized("its rows are angles of a rotary embedding")
            gathers.append(user)
        elif layer is not None:
            products.append(layer.site)
        else:
            raise NotQuantized(f"{user.op_type} at {graph.site(user)!r} reads it too")
    return Table(value.name or "", value, tensor, tuple(gathers), tuple(products))


def _layer_that_reads(user: ir.Node, index: int, by_node: Mapping[ir.Node, Layer]) -> Layer | None:
    """The one layer of whose weight this is a use, itself or through a Transpose; None for any other use."""
    if user in by_node and index == 1:
        return by_node[user]
    if not graph.is_op(user, "Transpose") or user.outputs[0].is_graph_output():
        return None
    readers = list(user.outputs[0].uses())
    layer = by_node.get(readers[0][0]) if len(readers) == 1 and readers[0][1] == 1 else None
    return layer if layer is not None and layer.transposed else None


def plan_tables(
    plan: Plan, tables: Sequence[Table], layers: Sequence[Layer], search: bool, progress: Callable[[str], None]
) -> Plan:
    """The plan with these tables. layers: of the model that is planned for. search: as for `fit_weights`.

    A table that is the weight of a product too reads the product's codes where those have a scale for each row and
    are nearly as good for it as codes of its own, which no data moves.
    """
    kept, found = dict(plan.kept), {}
    for table in tables:
        progress(f"dynaquant: table {table.name}")
        rows = table.rows()
        if not np.isfinite(rows).all():
            kept[table.name] = "it holds NaN or infinity"
            continue
        lost = next((site for site in table.products if site not in plan.layers), None)
        if lost is not None:
            kept[table.name] = read_by_float(lost)
            continue
        with np.errstate(over="ignore"):  # squares of numbers beyond 1e19: their plain range is taken
            codes = fit_weights(rows, weight_grid(TABLE_BITS), search=search)
        own = signal_to_noise(rows, codes.values)
        found[table.name] = TablePlan(codes, table.products, None, own)
        for layer in layers if len(table.shape) == 2 else ():
            tied = plan.layers.get(layer.site)
            if tied is None or not _is_of_rows(tied, rows.shape) or not _is_weight(layer, rows):
                continue
            shared = signal_to_noise(rows, tied.codes.values)
            if shared >= own - MOST_LOST:
                found[table.name] = replace(found[table.name], shared=layer.site, decibels=shared)
                break
    return replace(plan, tables=found, kept=kept)


def _is_of_rows(tied: LayerPlan, shape: tuple[int, ...]) -> bool:
    """Whether a layer's codes could be those of the rows of a table."""
    codes = tied.codes
    return codes.codes.shape == shape and codes.codes.dtype == np.int8 and not codes.block


def _is_weight(layer: Layer, rows: np.ndarray) -> bool:
    """Whether the rows of a table are what the output channels of a product are made with."""
    return layer.is_product and np.array_equal(layer.matrix(layer.weight()), rows)
