"""Whether a mask only hides from each query the keys behind it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .. import graph
from .matching import made_by, producer, scalar

HIDES = -1e4  # a weight is 0 beside others where this is added to a score, or stands in its place
BEFORE = {  # operator: what it says of the first of its inputs, or of the second
    "LessOrEqual": ("or equal", False), "GreaterOrEqual": ("or equal", True),
    "Less": ("less", False), "Greater": ("less", True),
}  # fmt: skip


def is_causal(value: ir.Value | None, keep: bool, condition: bool, depth: int = 8) -> bool:
    """Whether the last two axes of a mask let query i see exactly the keys up to i.

    condition: it is boolean, and a key is seen where it is `keep`; else it is added, 0 where a key is seen.
    """
    if value is None or depth == 0:
        return False
    array = graph.constant_value(value, limit=16 << 20)
    if array is not None:
        return _constant(array, keep, condition)
    node = producer(value)
    if node is None or graph.has_references(node):
        return False
    if graph.is_op(node, "Unsqueeze", "Reshape"):
        return _keeps_matrix(node) and is_causal(node.inputs[0], keep, condition, depth - 1)
    if graph.is_op(node, "Trilu"):
        return _triangle(node, keep, condition)
    if graph.is_op(node, "Slice"):
        return _from_start(node) and is_causal(node.inputs[0], keep, condition, depth - 1)
    if condition:
        return _condition(node, keep, depth)
    if graph.is_op(node, "Where"):
        seen, hidden = (scalar(node.inputs[i], node.outputs[0]) for i in (1, 2))
        for zero, low, kept in ((seen, hidden, True), (hidden, seen, False)):
            if zero == 0.0 and low is not None and low <= HIDES:
                return is_causal(node.inputs[0], kept, True, depth - 1)
    return False


def _constant(array: np.ndarray, keep: bool, condition: bool) -> bool:
    if array.ndim < 2 or array.size != array.shape[-1] * array.shape[-2]:
        return False
    matrix = array.reshape(array.shape[-2:])
    lower = np.tril(np.ones(matrix.shape, bool))
    if condition:
        return matrix.dtype == bool and bool((matrix == (lower == keep)).all())
    if matrix.dtype.kind not in "f":
        return False
    return bool((matrix[lower] == 0).all() and (matrix[~lower] <= HIDES).all())


def _keeps_matrix(node: ir.Node) -> bool:
    """Whether only axes in front of the last two are added or taken."""
    before, after = (v.shape if v is not None else None for v in (node.inputs[0], node.outputs[0]))
    if before is None or after is None or min(len(before), len(after)) < 2:
        return False
    if any(dim != 1 for dim in [*list(before)[:-2], *list(after)[:-2]]):
        return False
    return all(graph.same_dim(a, b) for a, b in zip(before[-2:], after[-2:], strict=True))


def _triangle(node: ir.Node, keep: bool, condition: bool) -> bool:
    """Trilu of one number everywhere: above the diagonal hidden, or up to it seen."""
    upper = graph.attribute(node, "upper", 1)
    offset = graph.input_of(node, 1)
    start = 0.0 if offset is None else scalar(offset)
    number = _everywhere(node.inputs[0])
    if number is None or start is None:
        return False
    if not condition:
        return bool(upper) and start == 1.0 and number <= HIDES
    if upper:
        return start == 1.0 and number != 0 and not keep
    return start == 0.0 and number != 0 and keep


def _everywhere(value: ir.Value | None) -> float | None:
    """The number that every element of the value is."""
    array = graph.constant_value(value, limit=16 << 20)
    if array is not None and array.size:
        flat = array.reshape(-1)
        return float(flat[0]) if (flat == flat[0]).all() else None
    node = made_by(value, "Expand", "ConstantOfShape")
    if node is None:
        return None
    if node.op_type == "Expand":
        return _everywhere(node.inputs[0])
    given = graph.attribute(node, "value")
    return 0.0 if given is None else float(given.numpy().reshape(-1)[0])


def _condition(node: ir.Node, keep: bool, depth: int) -> bool:
    if graph.is_op(node, "Not"):
        return is_causal(node.inputs[0], not keep, True, depth - 1)
    if graph.is_op(node, "Equal"):
        for i in (0, 1):
            if scalar(node.inputs[1 - i], node.inputs[i]) == 0.0:
                return is_causal(node.inputs[i], not keep, True, depth - 1)
        return False
    if graph.is_op(node, "Cast"):
        return is_causal(node.inputs[0], keep, True, depth - 1)
    if node.op_type in BEFORE:
        first, swapped = BEFORE[node.op_type]
        places = [_places(value) for value in (node.inputs[::-1] if swapped else node.inputs)]
        return (places, keep, first) in (([-1, -2], True, "or equal"), ([-2, -1], False, "less"))
    return False


def _places(value: ir.Value | None) -> int | None:
    """-1 when the value is the number of each column, 0, 1 and so on; -2: of each row."""
    node = made_by(value, "Unsqueeze", "Reshape", "Cast")
    if value is None or value.shape is None:
        return None
    if node is not None:
        inner = node.inputs[0]
        if _places(inner) is None or inner is None or inner.shape is None:
            return None
        if node.op_type == "Cast":
            return _places(inner)
        long = [axis - len(value.shape) for axis, dim in enumerate(value.shape) if dim != 1]
        return long[0] if len(long) == 1 and long[0] >= -2 else None
    array = graph.constant_value(value)
    if array is not None:
        counted = array.dtype.kind in "iuf" and bool((array.reshape(-1) == np.arange(array.size)).all())
        long = [axis - array.ndim for axis, size in enumerate(array.shape) if size != 1]
        return long[0] if counted and len(long) == 1 and long[0] >= -2 else None
    node = made_by(value, "Range")
    start, step = (scalar(node.inputs[index]) for index in (0, 2)) if node is not None else (None, None)
    return -1 if (start, step) == (0.0, 1.0) else None


def _from_start(node: ir.Node) -> bool:
    """Whether a Slice takes the first elements of its axes, in order: the first rows of a triangle are a triangle."""
    starts = graph.constant_ints(graph.input_of(node, 1))
    steps = graph.constant_ints(graph.input_of(node, 4)) if graph.input_of(node, 4) is not None else [1]
    return starts is not None and not any(starts) and steps is not None and all(step == 1 for step in steps)
