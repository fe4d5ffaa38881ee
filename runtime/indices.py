"""Integer inputs that are places in other tensors: what numbers a model takes for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

Extent = Callable[[ir.Value, int], int | None]  # size of an axis, None where it is not known

THROUGH = frozenset({"Cast", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Identity", "Flatten", "Expand"})
RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
LARGEST_TABLE = 1 << 24  # places that are shuffled to find distinct ones


def declared(value: ir.Value, axis: int) -> int | None:
    """The size that the model itself says an axis has."""
    size = value.shape[axis] if value.shape is not None and -len(value.shape) <= axis < len(value.shape) else None
    return size if isinstance(size, int) else None


def index_range(value: ir.Value, extent: Extent = declared) -> tuple[int, int] | None:
    """Smallest number, and the one after the largest, that every reader of an input takes as a place or a length.

    None when nothing that is known reads it so.
    """
    low, high = 0, None
    for node, index in _readers(value):
        lengths = (node.op_type in RECURRENT and index == 4) or (node.op_type == "ReverseSequence" and index == 1)
        sizes = [size for size in _extents(node, index, extent) if size is not None]
        if not sizes:
            continue
        top = min(sizes) + lengths
        low, high = max(low, int(lengths)), top if high is None else min(high, top)
    return None if high is None else (low, high)


def distinct_places(
    value: ir.Value, shape: Sequence[int], rng: np.random.Generator, extent: Extent = declared
) -> np.ndarray | None:
    """Places for a node that writes there, no two the same: of two writes to one place either may win.

    None when no such node reads the input, or when there are fewer places than writes.
    """
    for node, index in value.uses():
        if index != 1 or node.attributes.get_string("reduction", "none") != "none":
            continue
        sizes = _extents(node, index, extent)
        places = math.prod(size or 0 for size in sizes)
        if not 0 < places <= LARGEST_TABLE:
            continue
        if node.op_type in ("ScatterElements", "Scatter"):
            axis = node.attributes.get_int("axis", 0)
            if -len(shape) <= axis < len(shape) and shape[axis] <= places and math.prod(shape) <= LARGEST_TABLE:
                order = rng.random([*shape[:axis], places, *shape[axis:][1:]]).argsort(axis)
                return np.take(order, np.arange(shape[axis]), axis)
        elif node.op_type == "ScatterND" and (count := math.prod(shape[:-1])) <= places:
            flat = rng.choice(places, count, replace=False)
            return np.stack(np.unravel_index(flat, [size or 0 for size in sizes]), -1).reshape(shape)
    return None


def _readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Nodes, and which input, that read a value or what only its form was changed of."""
    seen: set[ir.Value] = set()
    stack = [value]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        for node, index in current.uses():
            yield node, index
            if node.op_type in THROUGH and index == 0:
                stack.extend(node.outputs)


def _extents(node: ir.Node, index: int, extent: Extent) -> list[int | None]:
    """Sizes of the axes that input `index` of a node tells places in; empty when it tells none."""
    table = node.inputs[0] if node.inputs else None
    if table is None or node.domain not in ("", "ai.onnx"):
        return []
    if index == 1 and node.op_type in ("Gather", "GatherElements", "ScatterElements", "Scatter"):
        return [extent(table, node.attributes.get_int("axis", 0))]
    if index == 1 and node.op_type in ("GatherND", "ScatterND"):
        first = node.attributes.get_int("batch_dims", 0)
        places = node.inputs[1]
        depth = extent(places, -1) if places is not None else None
        return [extent(table, axis) for axis in range(first, first + (depth or 0))]
    if index == 1 and node.op_type == "ReverseSequence":
        return [extent(table, node.attributes.get_int("time_axis", 0))]
    if index == 4 and node.op_type in RECURRENT:
        return [extent(table, node.attributes.get_int("layout", 0))]
    if index == 2 and node.op_type == "TensorScatter":
        axis, update = node.attributes.get_int("axis", -2), node.inputs[1]
        size, steps = extent(table, axis), extent(update, axis) if update is not None else None
        if size is None or node.attributes.get_string("mode", "linear") == "circular":
            return [size]
        # The update begins there and must end within the cache; one of unknown length may be half as long.
        return [max(1, size - (size // 2 if steps is None else steps) + 1)]
    return []
