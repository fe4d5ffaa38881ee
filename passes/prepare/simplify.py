"""Remove nodes that do nothing, and merge chains of casts, transposes and reshapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import ml_dtypes
import numpy as np
import onnx_ir as ir

from .. import graph
from ..base import Contract, Pass, PassContext, PassReport


@dataclass(frozen=True)
class Simplify(Pass):
    """Drop what changes nothing and shorten chains whose result is the same, bit for bit.

        {  a = Transpose <perm = [1, 0]> (X)       ->   {  Y = Relu (X)  }
           b = Transpose <perm = [1, 0]> (a)
           Y = Relu (b)  }

    Dropped: Identity; Dropout that does not train; casts to the same type; transposes, reshapes, squeezes,
    slices, pads, expands, tiles, flattens, concats and splits that keep the shape; Clip without bounds; Sum,
    Max, Min, Mean of one input; x*1, x/1, x-0, x+0.
    Merged: Cast after an exact Cast; Transpose after Transpose; Reshape after Reshape, Flatten, Squeeze or
    Unsqueeze.
    Left alone: an operator whose output is an output of the graph, when its input cannot take that place;
    casts that round in between; whatever depends on a shape that is not known (run infer-shapes first).
    """

    name: ClassVar[str] = "simplify"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        report = self.report()
        for scope in graph.scopes(model):
            for node in scope.graph:
                rule = RULES.get(node.op_type)
                if rule is None or node.domain != "" or graph.has_references(node):
                    continue
                found = rule(node, scope)
                if found is not None:
                    _apply(node, found, report)
        return report


class Drop(NamedTuple):
    """The node's first output is `value`."""

    rule: str
    value: ir.Value


class Rewire(NamedTuple):
    """The node does the same when it reads `value`, with these attributes."""

    rule: str
    value: ir.Value
    attributes: tuple[ir.Attr, ...] = ()


Found = Drop | Rewire | None
Rule = Callable[[ir.Node, graph.Scope], Found]


def _apply(node: ir.Node, found: Drop | Rewire, report: PassReport) -> None:
    site, before = graph.site(node), node.inputs[0]
    output = node.outputs[0]
    if isinstance(found, Rewire):
        node.replace_input_with(0, found.value)
        for attribute in found.attributes:
            node.attributes.add(attribute)
        report.changed(found.rule, site, f"{node.op_type} reads {found.value.name}, not {before and before.name}")
        return
    owner = node.graph
    assert owner is not None
    if output.is_graph_output() and not graph.can_be_output(found.value, owner):
        if node.op_type != "Identity":
            report.skipped(found.rule, site, f"it is an output and {found.value.name} cannot take its place")
        return
    graph.bypass(node, found.value)
    report.changed(found.rule, site, f"{node.op_type} dropped, {found.value.name} instead")


def _first(node: ir.Node) -> ir.Value | None:
    return graph.input_of(node, 0)


def _others_unused(node: ir.Node) -> bool:
    return not any(graph.is_used(value) for value in node.outputs[1:])


# --- nodes that do nothing


def _identity(node: ir.Node, scope: graph.Scope) -> Found:
    value = _first(node)
    return Drop("identity", value) if value is not None else None


def _only_input(node: ir.Node, scope: graph.Scope) -> Found:
    value = _first(node)
    return Drop("one-input", value) if value is not None and len(node.inputs) == 1 else None


def _split(node: ir.Node, scope: graph.Scope) -> Found:
    value = _first(node)
    return Drop("one-output", value) if value is not None and len(node.outputs) == 1 else None


def _dropout(node: ir.Node, scope: graph.Scope) -> Found:
    value, mode = _first(node), graph.input_of(node, 2)
    if value is None or not _others_unused(node):
        return None
    if scope.opset < 7 and not graph.attribute(node, "is_test", 0):
        return None
    if mode is not None:
        training = graph.constant_value(mode)
        if training is None or training.any():
            return None
    return Drop("dropout", value)


def _same_shape(node: ir.Node, scope: graph.Scope) -> Found:
    """Operators that only rearrange and keep the order of elements: nothing happens if the shape stays.

    Symbols of a graph output are the exporter's words and may be wrong; numbers and inferred symbols count.
    """
    value, output = _first(node), node.outputs[0]
    if value is None or not graph.same_shape(value, output):
        return None
    if output.is_graph_output() and graph.static_shape(output) is None:
        return None
    return Drop("same-shape", value)


def _expand(node: ir.Node, scope: graph.Scope) -> Found:
    value, dims = _first(node), graph.constant_ints(graph.input_of(node, 1))
    known = graph.rank(value)
    if value is not None and dims is not None and known is not None and len(dims) <= known and set(dims) <= {1}:
        return Drop("same-shape", value)
    return _same_shape(node, scope)


def _tile(node: ir.Node, scope: graph.Scope) -> Found:
    value, repeats = _first(node), graph.constant_ints(graph.input_of(node, 1))
    if value is None or repeats is None or scope.opset < 6 or any(r != 1 for r in repeats):
        return None
    return Drop("tile-by-one", value)


def _slice(node: ir.Node, scope: graph.Scope) -> Found:
    """A slice that takes everything, forwards."""
    value = _first(node)
    if value is None or scope.opset < 10:
        return None
    starts, ends = (graph.constant_ints(graph.input_of(node, i)) for i in (1, 2))
    steps = graph.constant_ints(graph.input_of(node, 4)) if graph.input_of(node, 4) else [1]
    if starts is None or ends is None or steps is None or any(s != 0 for s in starts) or set(steps) > {1}:
        return None
    if any(step != 1 for step in steps):
        return None
    if all(end >= np.iinfo(np.int32).max for end in ends) or _same_shape(node, scope) is not None:
        return Drop("slice-of-all", value)
    return None


def _pad(node: ir.Node, scope: graph.Scope) -> Found:
    value = _first(node)
    new = scope.opset >= 11
    pads = graph.constant_ints(graph.input_of(node, 1)) if new else graph.attribute(node, "pads")
    return Drop("pad-by-zero", value) if value is not None and pads is not None and not any(pads) else None


def _clip(node: ir.Node, scope: graph.Scope) -> Found:
    value = _first(node)
    bounded = any(v is not None for v in node.inputs[1:]) or node.attributes
    return Drop("no-bounds", value) if value is not None and not bounded and scope.opset >= 11 else None


def _neutral(number: int, side: str) -> Rule:
    """`x op number` is `x`. side: which operand may be the number."""

    def rule(node: ir.Node, scope: graph.Scope) -> Found:
        if len(node.inputs) != 2 or scope.opset < 7:
            return None
        for index in (1, 0) if side == "both" else (1,):
            array = graph.constant_value(node.inputs[index])
            other = node.inputs[1 - index]
            if array is None or other is None or array.dtype.kind in "OSU" or not (array == number).all():
                continue
            smaller = array.ndim == 0 or (array.size == 1 and array.ndim <= (graph.rank(other) or 0))
            if array.size and (smaller or graph.same_shape(other, node.outputs[0])):
                return Drop(f"{node.op_type.lower()}-{number}", other)
        return None

    return rule


# --- chains


def _cast(node: ir.Node, scope: graph.Scope) -> Found:
    value = _first(node)
    if value is None:
        return None
    target = ir.DataType(graph.attribute(node, "to"))
    if value.dtype == target:
        return Drop("same-type", value)
    inner = value.producer()
    if not graph.is_op(inner, "Cast") or inner is None or graph.has_references(inner):
        return None
    source = _first(inner)
    if source is None or source.dtype is None or value.dtype is None:
        return None
    if not holds(ir.DataType(graph.attribute(inner, "to")), source.dtype):
        return None
    return Drop("exact-cast", source) if source.dtype == target else Rewire("exact-cast", source)


def _cast_like(node: ir.Node, scope: graph.Scope) -> Found:
    value, model = _first(node), graph.input_of(node, 1)
    if value is None or model is None or value.dtype is None or value.dtype != model.dtype:
        return None
    return Drop("same-type", value)


def holds(wide: ir.DataType, narrow: ir.DataType) -> bool:
    """Whether every value of `narrow` is a value of `wide`, so that a cast to `wide` and on loses nothing."""
    if wide == narrow:
        return True
    if ir.DataType.STRING in (wide, narrow) or wide == ir.DataType.BOOL:
        return False
    if narrow == ir.DataType.BOOL:
        return wide.is_floating_point() or wide.is_integer()
    if wide.is_integer() and narrow.is_integer():
        outer, inner = ml_dtypes.iinfo(wide.numpy()), ml_dtypes.iinfo(narrow.numpy())
        return outer.min <= inner.min and inner.max <= outer.max
    if wide not in _PLAIN_FLOATS:
        return False
    outer_float = ml_dtypes.finfo(wide.numpy())
    if narrow.is_integer():
        whole = ml_dtypes.iinfo(narrow.numpy())
        return max(abs(int(whole.min)), int(whole.max)) <= 2 ** (outer_float.nmant + 1)
    if narrow not in _PLAIN_FLOATS:
        return False
    inner_float = ml_dtypes.finfo(narrow.numpy())
    return inner_float.nmant <= outer_float.nmant and float(inner_float.max) <= float(outer_float.max)


_PLAIN_FLOATS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)


def _transpose(node: ir.Node, scope: graph.Scope) -> Found:
    value = _first(node)
    perm = _perm(node)
    if value is None or perm is None:
        return None
    if perm == list(range(len(perm))):
        return Drop("same-order", value)
    inner = value.producer()
    if not graph.is_op(inner, "Transpose") or inner is None:
        return None
    first, source = _perm(inner), _first(inner)
    if first is None or source is None or len(first) != len(perm):
        return None
    both = [first[axis] for axis in perm]
    if both == list(range(len(both))):
        return Drop("transposes-cancel", source)
    return Rewire("transposes-merge", source, (ir.AttrInt64s("perm", both),))


def _perm(node: ir.Node) -> list[int] | None:
    if graph.has_references(node):
        return None
    perm = graph.attribute(node, "perm")
    if perm is not None:
        return list(perm)
    known = graph.rank(_first(node))
    return None if known is None else list(range(known))[::-1]


def _reshape(node: ir.Node, scope: graph.Scope) -> Found:
    same = _same_shape(node, scope)
    if same is not None:
        return same
    value, dims = _first(node), graph.constant_ints(graph.input_of(node, 1))
    inner = value.producer() if value is not None else None
    if dims is None or 0 in dims or inner is None or inner.domain != "":
        return None
    source = _first(inner)
    if inner.op_type in ("Reshape", "Flatten", "Squeeze", "Unsqueeze") and source is not None:
        return Rewire("reshapes-merge", source)
    return None


def _axes(node: ir.Node, scope: graph.Scope, known: int | None) -> list[int] | None:
    """The axes of a Squeeze or Unsqueeze, counted from the front of a value of rank `known`."""
    old = scope.opset < 13
    axes = graph.attribute(node, "axes") if old else graph.constant_ints(graph.input_of(node, 1))
    if axes is None or (known is None and any(axis < 0 for axis in axes)):
        return None
    return sorted(axis + (known or 0) if axis < 0 else axis for axis in axes)


def _inverse(op_type: str) -> Rule:
    """Squeeze after Unsqueeze of the same axes, or the other way round."""

    def rule(node: ir.Node, scope: graph.Scope) -> Found:
        same = _same_shape(node, scope)
        if same is not None:
            return same
        value = _first(node)
        inner = value.producer() if value is not None else None
        if not graph.is_op(inner, op_type) or inner is None or graph.has_references(inner):
            return None
        source = _first(inner)
        outer_rank = graph.rank(node.outputs[0] if node.op_type == "Unsqueeze" else value)
        inner_rank = graph.rank(value if op_type == "Unsqueeze" else source)
        mine, theirs = _axes(node, scope, outer_rank), _axes(inner, scope, inner_rank)
        return Drop("squeezes-cancel", source) if source is not None and mine is not None and mine == theirs else None

    return rule


RULES: dict[str, Rule] = {
    "Identity": _identity,
    "Dropout": _dropout,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _same_shape,
    "Squeeze": _inverse("Unsqueeze"),
    "Unsqueeze": _inverse("Squeeze"),
    "Expand": _expand,
    "Tile": _tile,
    "Slice": _slice,
    "Pad": _pad,
    "Concat": _only_input,
    "Split": _split,
    "Sum": _only_input,
    "Max": _only_input,
    "Min": _only_input,
    "Mean": _only_input,
    "Clip": _clip,
    "Mul": _neutral(1, "both"),
    "Div": _neutral(1, "right"),
    "Add": _neutral(0, "both"),
    "Sub": _neutral(0, "right"),
}
