"""The pass `recognise-rotary-embedding`: x · cos + rotated x · sin -> RotaryEmbedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from .. import graph
from ..base import Contract
from ..graph import same_dim
from .matching import Found, Recogniser, Refused, Writer, made_by, only_user, operands, same, scalar

TABLE = 64 << 20  # bytes of a table of angles that is read to see whether its halves are equal


@dataclass(frozen=True)
class RecogniseRotaryEmbedding(Recogniser):
    """Rotary position embeddings written out in small operators become RotaryEmbedding (opset 23).

        a, b = Split <axis = -1> (X)
        n = Neg (b)
        r = Concat <axis = -1> (n, a)              ->    Y = RotaryEmbedding (X, cos, sin)
        p = Mul (X, cos)
        q = Mul (r, sin)
        Y = Add (p, q)

    X is (batch, heads, length, width). The halves may be cut by Split or Slice. Both halves of a row of cos and sin
    must be known to be equal: constant tables, Concat of something with itself, and what Cos, Sin, Cast, Mul by a
    number, Gather and Slice of rows, Unsqueeze make of those; the operator gets one half. Also the form that turns
    the halves one by one: Concat (a · cos - b · sin, b · cos + a · sin). A model of an older opset is brought to 23.
    Left alone: other layouts, pairs of neighbours (interleaved), tables that are not known to have equal halves, and
    sites one of whose inner values is used elsewhere or is an output.

    Source: Su et al., "RoFormer", arXiv 2104.09864.
    """

    name: ClassVar[str] = "recognise-rotary-embedding"
    contract: ClassVar[Contract] = Contract.ROUNDING
    opset: ClassVar[int] = 23

    def rule(self, node: ir.Node) -> str:
        return "rotary-embedding"

    def find(self, node: ir.Node, scope: graph.Scope) -> Found | None:
        if not graph.is_op(node, "Concat") or graph.has_references(node) or len(node.inputs) != 2:
            return None
        negated = made_by(node.inputs[0], "Neg")
        if negated is not None:
            x = _halved_value(node.inputs[1], negated.inputs[0])
            if x is None:
                return None
            last, cos, sin = _rotated(node, x)
            whole = True
        else:
            turned = _turned(node)
            if turned is None:
                return None
            x, cos, sin = turned
            last, whole = node, False
        _check(node, x, cos, sin)
        tables = [half(value) if whole else value for value in (cos, sin)]

        def write(writer: Writer) -> ir.Value:
            output = last.outputs[0]
            made = [_table(writer, x, table.write(writer) if isinstance(table, Half) else table) for table in tables]
            return writer.op("RotaryEmbedding", x, *made, dtype=output.dtype or x.dtype, shape=x.shape)

        return Found("rotary-embedding", last, (x, cos, sin), write)


def _halved_value(first: ir.Value | None, second: ir.Value | None) -> ir.Value | None:
    """The value whose last axis these are the first and the second half of."""
    a, b = made_by(first, "Split", "Slice"), made_by(second, "Split", "Slice")
    x = a.inputs[0] if a is not None else None
    if a is None or b is None or x is None or not same(x, b.inputs[0]) or x.shape is None or not len(x.shape):
        return None
    width, rank = x.shape[-1], len(x.shape)
    if not isinstance(width, int) or width % 2:
        return None
    if a is b and a.op_type == "Split":
        sizes = graph.constant_ints(graph.input_of(a, 1))
        right = len(a.outputs) == 2 and sizes in (None, [width // 2, width // 2])
        right = right and graph.attribute(a, "axis", 0) in (-1, rank - 1)
        return x if right and same(first, a.outputs[0]) and same(second, a.outputs[1]) else None
    if a.op_type == b.op_type == "Slice":
        spans = _span(a, width, rank), _span(b, width, rank)
        return x if spans == ((0, width // 2), (width // 2, width)) else None
    return None


def _span(node: ir.Node, width: int, rank: int) -> tuple[int, int] | None:
    """(start, end) of a Slice of the last axis alone."""
    starts, ends, axes, steps = (graph.constant_ints(graph.input_of(node, i)) for i in (1, 2, 3, 4))
    if graph.input_of(node, 4) is not None and steps != [1]:
        return None
    if axes not in ([-1], [rank - 1]) or starts is None or ends is None or len(starts) != 1:
        return None
    start, end = (min(max(i + width if i < 0 else i, 0), width) for i in (starts[0], ends[0]))
    return start, end


def _rotated(concat: ir.Node, x: ir.Value) -> tuple[ir.Node, ir.Value, ir.Value]:
    """The sum of x · cos and the rotated x · sin, cos and sin. Raises Refused."""
    product = only_user(concat.outputs[0])
    sin = next((b for a, b in operands(product) if same(a, concat.outputs[0])), None)
    if sin is None or not graph.is_op(product, "Mul"):
        raise Refused(f"the rotated half goes into {product.op_type}, not into Mul")
    last = only_user(product.outputs[0])
    other = next((b for a, b in operands(last) if same(a, product.outputs[0])), None)
    straight = made_by(other, "Mul")
    cos = next((b for a, b in operands(straight) if same(a, x)), None)
    if not graph.is_op(last, "Add") or cos is None:
        raise Refused("the other term is not the same value times a table")
    return last, cos, sin


def _turned(concat: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """x, cos and sin of Concat (a · cos - b · sin, b · cos + a · sin), where a and b are the halves of x."""
    difference, total = made_by(concat.inputs[0], "Sub"), made_by(concat.inputs[1], "Add")
    if difference is None or total is None:
        return None
    first, second = (made_by(value, "Mul") for value in difference.inputs)
    for a, cos in operands(first):
        for b, sin in operands(second):
            x = _halved_value(a, b)
            if x is None:
                continue
            for left, right in operands(total):
                one, two = made_by(left, "Mul"), made_by(right, "Mul")
                third = any(same(p, b) and same(q, cos) for p, q in operands(one))
                if third and any(same(p, a) and same(q, sin) for p, q in operands(two)):
                    return x, cos, sin
    return None


def _check(concat: ir.Node, x: ir.Value, cos: ir.Value, sin: ir.Value) -> None:
    """Raise Refused unless the tables are (batch or 1, 1, length, width) for x (batch, heads, length, width)."""
    assert x.shape is not None
    rank = len(x.shape)
    if graph.attribute(concat, "axis") not in (-1, rank - 1):
        raise Refused("the halves are not joined along the last axis")
    if rank != 4:
        raise Refused(f"x has rank {rank}, not (batch, heads, length, width)")
    if x.dtype is not None and x.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        raise Refused(f"{x.dtype.name.lower()} input")
    for table in (cos, sin):
        if table.shape is None or len(table.shape) < 2 or len(table.shape) > 4:
            raise Refused(f"the shape of {table.name} is not known; run infer-shapes first")
        dims = [*[1] * (4 - len(table.shape)), *table.shape]
        if dims[1] != 1 or not same_dim(dims[2], x.shape[2]):
            raise Refused(f"{table.name} {table.shape} is not one row for each position of x {x.shape}")
        if dims[0] != 1 and not same_dim(dims[0], x.shape[0]):
            raise Refused(f"the batch of {table.name} ({dims[0]}) is not known to be that of x ({x.shape[0]})")
        if table.dtype not in (None, x.dtype):
            raise Refused(f"{table.name} is of another type than x")


@dataclass(frozen=True)
class Half:
    """The first half of the last axis of a value whose halves are equal, and how to write it without the other."""

    value: ir.Value
    array: np.ndarray | None = None
    inner: Half | None = None  # None: `value` is that half itself

    def write(self, writer: Writer) -> ir.Value:
        if self.array is not None:
            return writer.constant(self.array, "table", self.value.dtype)
        node = self.value.producer()
        if self.inner is None or node is None:
            return self.value
        inner = self.inner.write(writer)
        given = [inner if i == self._place(node) else value for i, value in enumerate(node.inputs)]
        shape = None if self.value.shape is None else [*self.value.shape[:-1], _half_of(self.value.shape[-1])]
        kept = {key: item.value for key, item in node.attributes.items()}
        return writer.op(node.op_type, *given, dtype=self.value.dtype, shape=shape, **kept)

    @staticmethod
    def _place(node: ir.Node) -> int:
        return 1 if node.op_type == "Mul" and scalar(node.inputs[0]) is not None else 0


def _half_of(dim: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    return dim // 2 if isinstance(dim, int) else ir.SymbolicDim(None)


def half(value: ir.Value | None, depth: int = 8) -> Half:
    """The half of a table whose halves are equal. Raises Refused when they are not known to be."""
    if value is None or value.shape is None or depth == 0:
        raise Refused("the shape of a table is not known; run infer-shapes first")
    array = graph.constant_value(value, TABLE)
    if array is not None and array.ndim:
        count = array.shape[-1] // 2
        if array.shape[-1] % 2 or not np.array_equal(array[..., :count], array[..., count:]):
            raise Refused(f"the halves of {value.name} are not equal")
        return Half(value, array=np.ascontiguousarray(array[..., :count]))
    rank = len(value.shape)
    joined = made_by(value, "Concat")
    if joined is not None and graph.attribute(joined, "axis") in (-1, rank - 1) and len(joined.inputs) == 2:
        first, second = joined.inputs
        if first is not None and same(first, second):
            return Half(first)
    node = made_by(value, "Cos", "Sin", "Cast", "Mul", "Gather", "Slice", "Unsqueeze")
    source = None if node is None else _elementwise_source(node, rank)
    if source is None:
        raise Refused(f"the halves of {value.name} are not known to be equal")
    return Half(value, inner=half(source, depth - 1))


def _elementwise_source(node: ir.Node, rank: int) -> ir.Value | None:
    """What the node computes its output of, place by place along the last axis; None when it does not."""
    source = node.inputs[0]
    if node.op_type == "Mul":
        return next((a for a, b in operands(node) if scalar(b, a) is not None), None)
    if node.op_type == "Gather":
        return source if graph.attribute(node, "axis", 0) == 0 and graph.rank(source) == 2 else None
    if node.op_type == "Slice":
        return source if _leaves_last(node, rank) else None
    if node.op_type == "Unsqueeze":
        axes = graph.constant_ints(node.inputs[1]) if len(node.inputs) == 2 else graph.attribute(node, "axes")
        return source if axes is not None and not {-1, rank - 1} & set(axes) else None
    return source


def _leaves_last(node: ir.Node, rank: int) -> bool:
    axes = graph.constant_ints(graph.input_of(node, 3))
    return axes is not None and not {-1, rank - 1} & set(axes)


def _table(writer: Writer, x: ir.Value, table: ir.Value) -> ir.Value:
    """The table as (batch, length, half a width)."""
    assert x.shape is not None and table.shape is not None
    dims = list(table.shape)
    if len(dims) == 4:
        table = writer.op("Squeeze", table, writer.ints([1], "heads"), dtype=table.dtype, shape=[dims[0], *dims[2:]])
    elif len(dims) == 2:
        table = writer.op("Unsqueeze", table, writer.ints([0], "batch"), dtype=table.dtype, shape=[1, *dims])
    batch = x.shape[0]
    if table.shape is not None and same_dim(table.shape[0], batch):
        return table
    if isinstance(batch, int):
        target = writer.ints([batch, 1, 1], "sizes")
    else:
        count = writer.op("Shape", x, start=0, end=1, dtype=ir.DataType.INT64, shape=[1])
        target = writer.op("Concat", count, writer.ints([1, 1], "ones"), axis=0, dtype=ir.DataType.INT64, shape=[3])
    return writer.op("Expand", table, target, dtype=table.dtype, shape=[batch, *dims[-2:]])
