"""Symbolic dimensions that must be equal at run time, made one before an operator sees them.

`min(sequence, 512)` of a sliced table and `sequence` of the tokens are added to each other: ONNX's semantics leave
only "equal" or "one of them is 1", but TVM cannot derive the sum's shape and would refuse it. Such operands get the
same dimension by a `match_cast`, which is a check at run time: a size that does not fit, a dynamic dimension that
is 1 and meant to broadcast included, is an error there and never a wrong answer. A session then has onnxruntime run it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from onnx import AttributeProto
from tvm import relax, tirx

from .site import Dim, Value, dtype_of, int64, normal_axis, same, shape_of

BROADCASTING = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Mod", "PRelu", "Where", "Max", "Min", "Sum", "Mean", "And", "Or", "Xor",
     "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitShift"}
)  # fmt: skip


def unified(
    bb: relax.BlockBuilder, op_type: str, attrs: Mapping[str, AttributeProto], inputs: Sequence[Value | None]
) -> list[Value | None]:
    """The operands, with equal dimensions where the operator demands them."""
    if op_type not in BROADCASTING and op_type not in ("Concat", "MatMul"):
        return list(inputs)
    shapes = [_shape(value) for value in inputs]
    if any(shape is None for shape in shapes):
        return list(inputs)
    known = [list(shape) for shape in shapes if shape is not None]
    if op_type == "Concat":
        axis = normal_axis(attrs["axis"].i if "axis" in attrs else 0, len(known[0]))
        groups = [[(i, a) for i in range(len(known))] for a in range(len(known[0])) if a != axis]
    elif op_type == "MatMul":
        if len(known) != 2 or min(map(len, known)) < 2:
            return list(inputs)
        groups = [[(0, len(known[0]) - 1), (1, len(known[1]) - 2)], *_from_the_right(known, range(3, 99))]
    else:
        groups = _from_the_right(known, range(1, 99))
    for group in groups:
        _settle(known, group)
    return [_cast(bb, value, dims) for value, dims in zip(inputs, known, strict=True)]


def _shape(value: Value | None) -> tuple[Dim, ...] | None:
    if value is None or not isinstance(value.expr.ty, relax.TensorType):
        return None
    return shape_of(value.expr) if isinstance(value.expr.ty.shape, relax.ShapeExpr) else None


def _from_the_right(shapes: Sequence[Sequence[Dim]], places: range) -> list[list[tuple[int, int]]]:
    """(operand, axis) of the dimensions that broadcast with each other, for each place counted from the right."""
    deepest = max(map(len, shapes), default=0)
    return [
        [(i, len(shape) - place) for i, shape in enumerate(shapes) if len(shape) >= place]
        for place in places
        if place <= deepest
    ]


def _settle(shapes: list[list[Dim]], group: Sequence[tuple[int, int]]) -> None:
    """Give the dimensions of a group that are not 1 one value: a number, else an expression.

    Never a plain symbol: TVM takes a cast to `n` as a definition of `n`. Two symbols get their maximum, which both
    equal exactly when they are equal.
    """
    wide = [(i, axis) for i, axis in group if not (isinstance(shapes[i][axis], int) and shapes[i][axis] == 1)]
    dims = [shapes[i][axis] for i, axis in wide]
    if len(dims) < 2 or all(same(dims[0], dim) for dim in dims[1:]):
        return
    numbers = [dim for dim in dims if isinstance(dim, int)]
    if len(set(numbers)) > 1:
        return  # not broadcastable: the converter refuses it
    chosen: Any = next(iter(numbers), None)
    if chosen is None:
        expressions = [dim for dim in dims if not isinstance(dim, tirx.Var)]
        chosen = expressions[0] if expressions else functools.reduce(tirx.max, dims)
    for i, axis in wide:
        shapes[i][axis] = chosen


def _cast(bb: relax.BlockBuilder, value: Value | None, dims: Sequence[Dim]) -> Value | None:
    if value is None or all(same(a, b) for a, b in zip(shape_of(value.expr), dims, strict=True)):
        return value
    kind = relax.TensorType([int64(dim) for dim in dims], dtype_of(value.expr))
    return Value(bb.match_cast(value.expr, kind), value.content)
