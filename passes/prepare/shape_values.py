"""What is known about values that hold shapes: `[N, 3, H*W]` is partly numbers even when N is free.

An entry is a whole number, or one of: LENGTH, a number from 0 that depends on the input; UNKNOWN, anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from .. import graph

LENGTH = "length"
UNKNOWN = "unknown"
Entry = int | str
MOST = 64  # entries: longer vectors are data, not shapes


@dataclass(frozen=True)
class Entries:
    """The entries of a vector, or of a scalar when `scalar`. dtype: an integer type or bool; None: not known."""

    items: tuple[Entry, ...]
    scalar: bool = False
    dtype: ir.DataType | None = None

    @property
    def known(self) -> bool:
        return all(isinstance(item, int) for item in self.items)


class ShapeValues:
    """Follows shapes through the nodes of a graph, in order."""

    def __init__(self) -> None:
        self._entries: dict[ir.Value, Entries] = {}

    def of(self, value: ir.Value | None) -> Entries | None:
        if value is None:
            return None
        found = self._entries.get(value)
        if found is None:
            tensor = graph.constant_tensor(value)
            if tensor is None or tensor.size > MOST or len(tensor.shape) > 1:
                return None
            array = graph.constant_value(value)
            if array is None or array.dtype.kind not in "iub":
                return None
            found = Entries(tuple(int(x) for x in array.reshape(-1)), array.ndim == 0, tensor.dtype)
            self._entries[value] = found
        return found

    def visit(self, node: ir.Node, opset: int) -> Entries | None:
        """What `node` gives, remembered for the nodes that read it; None when it is no shape computation."""
        rule = RULES.get(node.op_type)
        if rule is None or node.domain != "" or graph.has_references(node):
            return None
        result = rule(self, node, opset)
        if result is None or len(result.items) > MOST:
            return None
        dtype = self._type(node)
        result = replace(result, items=tuple(_wrapped(item, dtype) for item in result.items), dtype=dtype)
        self._entries[node.outputs[0]] = result
        return result

    def _type(self, node: ir.Node) -> ir.DataType | None:
        """The type of the node's output. Values in functions have none of their own."""
        if node.op_type in ("Shape", "Size"):
            return ir.DataType.INT64
        if node.op_type == "Cast":
            return ir.DataType(graph.attribute(node, "to"))
        if node.op_type == "Equal":
            return ir.DataType.BOOL
        source = node.inputs[1 if node.op_type == "Where" else 0]
        entries = self.of(source)
        if entries is not None and entries.dtype is not None:
            return entries.dtype
        return node.outputs[0].dtype or (source.dtype if source is not None else None)


def _wrapped(item: Entry, dtype: ir.DataType | None) -> Entry:
    """The number as the type holds it: arithmetic of integers wraps."""
    if isinstance(item, str) or dtype == ir.DataType.BOOL:
        return item
    if dtype is None or not dtype.is_integer():
        return UNKNOWN
    info = np.iinfo(dtype.numpy())
    return (item - info.min) % (1 << info.bits) + info.min


Rule = Callable[[ShapeValues, ir.Node, int], Entries | None]


def _shape(values: ShapeValues, node: ir.Node, opset: int) -> Entries | None:
    source = node.inputs[0]
    if source is None or source.shape is None:
        return None
    dims: list[Entry] = [dim if isinstance(dim, int) else LENGTH for dim in source.shape]
    start, end = graph.attribute(node, "start", 0), graph.attribute(node, "end")
    return Entries(tuple(dims[start:end]))


def _size(values: ShapeValues, node: ir.Node, opset: int) -> Entries | None:
    dims = graph.static_shape(node.inputs[0])
    if dims is None:
        return None
    size = 1
    for dim in dims:
        size *= dim
    return Entries((size,), True)


def _gather(values: ShapeValues, node: ir.Node, opset: int) -> Entries | None:
    data, index = values.of(node.inputs[0]), values.of(node.inputs[1])
    if data is None or index is None or data.scalar or graph.attribute(node, "axis", 0) not in (0, -1):
        return None
    if not all(isinstance(i, int) and -len(data.items) <= i < len(data.items) for i in index.items):
        return None
    return Entries(tuple(data.items[i] for i in index.items if isinstance(i, int)), index.scalar)


def _slice(values: ShapeValues, node: ir.Node, opset: int) -> Entries | None:
    data = values.of(node.inputs[0])
    if data is None or data.scalar or opset < 10:
        return None
    parts: list[int] = []
    for index, default in ((1, 0), (2, 0), (4, 1)):
        if graph.input_of(node, index) is None:
            parts.append(default)
            continue
        given = graph.constant_ints(graph.input_of(node, index))
        if given is None or len(given) != 1:
            return None
        parts.append(given[0])
    start, end, step = parts
    if step <= 0:
        return None
    return Entries(data.items[start:end:step])


def _concat(values: ShapeValues, node: ir.Node, opset: int) -> Entries | None:
    parts: list[Entry] = []
    for value in node.inputs:
        found = values.of(value)
        if found is None:
            dims = graph.static_shape(value)
            if dims is None or len(dims) != 1 or dims[0] > MOST:
                return None
            found = Entries((UNKNOWN,) * dims[0])
        if found.scalar:
            return None
        parts.extend(found.items)
    return Entries(tuple(parts))


def _same(values: ShapeValues, node: ir.Node, opset: int) -> Entries | None:
    return values.of(node.inputs[0])


def _cast(values: ShapeValues, node: ir.Node, opset: int) -> Entries | None:
    whole = (ir.DataType.INT64, ir.DataType.INT32)
    return values.of(node.inputs[0]) if ir.DataType(graph.attribute(node, "to")) in whole else None


def _unsqueeze(values: ShapeValues, node: ir.Node, opset: int) -> Entries | None:
    data = values.of(node.inputs[0])
    return Entries(data.items) if data is not None and data.scalar and graph.rank(node.outputs[0]) == 1 else None


def _squeeze(values: ShapeValues, node: ir.Node, opset: int) -> Entries | None:
    data = values.of(node.inputs[0])
    return Entries(data.items, True) if data is not None and not data.scalar and len(data.items) == 1 else None


def _reshape(values: ShapeValues, node: ir.Node, opset: int) -> Entries | None:
    data, dims = values.of(node.inputs[0]), graph.constant_ints(graph.input_of(node, 1))
    if data is None or dims is None or len(dims) > 1:
        return None
    return Entries(data.items, scalar=not dims)


def _elementwise(combine: Callable[[Entry, Entry], Entry]) -> Rule:
    def rule(values: ShapeValues, node: ir.Node, opset: int) -> Entries | None:
        a, b = values.of(node.inputs[0]), values.of(node.inputs[1])
        if a is None or b is None:
            return None
        length = max(len(a.items), len(b.items))
        if any(len(x.items) not in (1, length) for x in (a, b)):
            return None
        left, right = (x.items * (length // len(x.items)) if x.items else () for x in (a, b))
        return Entries(tuple(combine(x, y) for x, y in zip(left, right, strict=True)), a.scalar and b.scalar)

    return rule


def _natural(*entries: Entry) -> bool:
    """Whether all are known to be at least 0."""
    return all(e == LENGTH or (isinstance(e, int) and e >= 0) for e in entries)


def _add(x: Entry, y: Entry) -> Entry:
    if isinstance(x, int) and isinstance(y, int):
        return x + y
    return LENGTH if _natural(x, y) else UNKNOWN


def _subtract(x: Entry, y: Entry) -> Entry:
    if isinstance(x, int) and isinstance(y, int):
        return x - y
    return UNKNOWN


def _multiply(x: Entry, y: Entry) -> Entry:
    if isinstance(x, int) and isinstance(y, int):
        return x * y
    return LENGTH if _natural(x, y) else UNKNOWN


def _divide(x: Entry, y: Entry) -> Entry:
    if isinstance(x, int) and isinstance(y, int) and y != 0:
        quotient = abs(x) // abs(y)
        return quotient if (x < 0) == (y < 0) else -quotient
    return LENGTH if _natural(x, y) else UNKNOWN


def _equal(x: Entry, y: Entry) -> Entry:
    if isinstance(x, int) and isinstance(y, int):
        return int(x == y)
    for number, other in ((x, y), (y, x)):
        if isinstance(number, int) and number < 0 and other == LENGTH:
            return 0
    return UNKNOWN


def _where(values: ShapeValues, node: ir.Node, opset: int) -> Entries | None:
    chosen = [values.of(value) for value in node.inputs]
    if any(c is None for c in chosen):
        return None
    condition, yes, no = (c for c in chosen if c is not None)
    length = max(len(c.items) for c in (condition, yes, no))
    if any(len(c.items) not in (1, length) for c in (condition, yes, no)):
        return None
    parts = [c.items * (length // len(c.items)) for c in (condition, yes, no)]
    items = tuple(UNKNOWN if isinstance(c, str) else (y if c else n) for c, y, n in zip(*parts, strict=True))
    return Entries(items, all(c.scalar for c in (condition, yes, no)))


RULES: dict[str, Rule] = {
    "Shape": _shape,
    "Size": _size,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Identity": _same,
    "Cast": _cast,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Add": _elementwise(_add),
    "Sub": _elementwise(_subtract),
    "Mul": _elementwise(_multiply),
    "Div": _elementwise(_divide),
    "Equal": _elementwise(_equal),
    "Where": _where,
}
