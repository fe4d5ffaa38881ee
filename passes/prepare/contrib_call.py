"""What the bodies of contributed operators share: a call with its inputs, and shapes read through small operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from .. import graph
from .body_builder import Body
from .evaluate import Refusal

CONTRIB = "com.microsoft"
Dim: TypeAlias = "int | ir.SymbolicDim"
UNKNOWN = ir.SymbolicDim(None)
DEEPEST = 24  # nodes that a shape is followed through

# Operators whose first output has the shape of the first input.
KEEP_SHAPE = frozenset(
    {"Cast", "Clip", "Dropout", "Elu", "Erf", "Exp", "Gelu", "Identity", "LayerNormalization", "Neg",
     "RMSNormalization", "Relu", "Sigmoid", "SimplifiedLayerNormalization", "Softmax", "Sqrt", "Swish", "Tanh"}
)  # fmt: skip
CONTRIB_KEEP_SHAPE = frozenset(
    {"BiasGelu", "FastGelu", "Gelu", "GroupQueryAttention", "MultiHeadAttention", "QuickGelu", "RotaryEmbedding",
     "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}
)  # fmt: skip
# Operators whose results have the type of the first input, or of the first choice of Where.
SAME_TYPE = frozenset(
    {*KEEP_SHAPE, "Add", "Attention", "Concat", "Conv", "Div", "Expand", "Flatten", "Gather", "Gemm", "MatMul", "Mul",
     "ReduceMean", "Reshape", "RotaryEmbedding", "Slice", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"}
    - {"Cast"}
)  # fmt: skip
CONTRIB_SAME_TYPE = frozenset({*CONTRIB_KEEP_SHAPE, "Attention", "BiasAdd", "BiasSplitGelu", "FusedConv", "FusedGemm",
                               "FusedMatMul"})  # fmt: skip


class Call:
    """One node that is to be replaced, and the body that is written for it."""

    def __init__(self, node: ir.Node, opset: int) -> None:
        self.node, self.body = node, Body(opset)
        self.op, self.constant = self.body.op, self.body.constant

    def has(self, index: int) -> bool:
        return graph.input_of(self.node, index) is not None

    def x(self, index: int) -> str | None:
        return f"input{index}" if self.has(index) else None

    def given(self, index: int) -> str:
        if not self.has(index):
            raise Refusal(f"input {index} is left out")
        return f"input{index}"

    def wanted(self, index: int) -> bool:
        """Whether output `index` is used."""
        outputs = self.node.outputs
        return index < len(outputs) and bool(outputs[index].name) and graph.is_used(outputs[index])

    def attr(self, name: str, default: Any = None) -> Any:
        return graph.attribute(self.node, name, default)

    def text(self, name: str) -> str:
        value = self.attr(name, "")
        return value.decode() if isinstance(value, bytes) else value

    def dims(self, index: int) -> list[Dim] | None:
        return dims_of(graph.input_of(self.node, index))

    def rank(self, index: int) -> int | None:
        dims = self.dims(index)
        return None if dims is None else len(dims)

    def last(self, index: int) -> int | None:
        """The size of the last axis."""
        dims = self.dims(index)
        return dims[-1] if dims and isinstance(dims[-1], int) else None

    def dtype(self, index: int = 0) -> ir.DataType | None:
        return dtype_of(graph.input_of(self.node, index))

    def refuse_inputs(self, indices: Sequence[int], what: str) -> None:
        if any(self.has(i) for i in indices):
            raise Refusal(what)

    def refuse_outputs(self, indices: Sequence[int], what: str) -> None:
        if any(self.wanted(i) for i in indices):
            raise Refusal(what)

    def number(self, value: float, index: int = 0) -> str:
        """A constant in the type of input `index`."""
        dtype = self.dtype(index)
        if dtype is not None:
            return self.constant(value, dtype)
        return self.op("CastLike", self.constant(value, ir.DataType.FLOAT), self.given(index))

    def size(self, value: str, axis: int) -> str:
        """The size of one axis as a vector of one int64."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def count(self, length: str) -> str:
        """0, 1 ... up to a length, which is a vector of one int64."""
        scalar = self.op("Squeeze", length, self.constant([0]))
        return self.op("Range", self.constant(0), scalar, self.constant(1))


def dims_of(value: ir.Value | None, depth: int = DEEPEST) -> list[Dim] | None:
    """The dimensions of a value, followed through operators whose results onnx's inference could not reach because
    a contributed operator is in front of them. None: the rank is not known."""
    if value is None:
        return None
    tensor = graph.constant_tensor(value)
    if tensor is not None:
        return [int(d) for d in tensor.shape.numpy()]
    if value.shape is not None:
        return list(value.shape)
    node = value.producer()
    if node is None or depth == 0 or not node.inputs or node.outputs[0] is not value:
        return None

    def given(index: int) -> list[Dim] | None:
        return dims_of(graph.input_of(node, index), depth - 1)

    if (node.domain == "" and node.op_type in KEEP_SHAPE) or (
        node.domain == CONTRIB and node.op_type in CONTRIB_KEEP_SHAPE
    ):
        found = given(0)
        if node.op_type in ("MultiHeadAttention", "GroupQueryAttention") and found is not None:
            found = [*found[:2], UNKNOWN]  # values may have another width
    elif graph.is_op(node, "Add", "Sub", "Mul", "Div"):
        found = _broadcast(given(0), given(1))
    elif graph.is_op(node, "MatMul"):
        a, b = given(0), given(1)
        found = [*a[:-1], b[-1]] if a is not None and b is not None and len(b) == 2 and len(a) >= 2 else None
    elif node.domain == CONTRIB and node.op_type in ("Attention", "EmbedLayerNormalization"):
        found = [UNKNOWN] * 3
    else:
        found = None
    if found is not None:
        value.shape = ir.Shape(found)
    return found


def dtype_of(value: ir.Value | None, depth: int = DEEPEST) -> ir.DataType | None:
    """The element type of a value, followed like its dimensions."""
    if value is None or value.dtype is not None or depth == 0:
        return None if value is None else value.dtype
    tensor, node = graph.constant_tensor(value), value.producer()
    if tensor is not None:
        return tensor.dtype
    if node is None or not node.inputs or (node.outputs.index(value) > 0 and node.op_type != "Split"):
        return None
    if graph.is_op(node, *SAME_TYPE) or (node.domain == CONTRIB and node.op_type in CONTRIB_SAME_TYPE):
        found = dtype_of(node.inputs[1 if node.op_type == "Where" else 0], depth - 1)
        if found is not None:
            value.dtype = found
        return found
    return None


def _broadcast(a: list[Dim] | None, b: list[Dim] | None) -> list[Dim] | None:
    if a is None or b is None:
        return None
    count = max(len(a), len(b))
    pairs = zip([1] * (count - len(a)) + a, [1] * (count - len(b)) + b, strict=True)
    return [_wider(x, y) for x, y in pairs]


def _wider(x: Dim, y: Dim) -> Dim:
    """The size of an axis after broadcasting."""
    if x == 1:
        return y
    if y == 1 or graph.same_dim(x, y):
        return x
    known = next((d for d in (x, y) if isinstance(d, int)), None)
    return UNKNOWN if known is None else known


def finite(value: float, dtype: ir.DataType | None) -> float:
    """The number, or the lowest one of a type that cannot hold it."""
    lowest = float(np.finfo(np.float16).min) if dtype == ir.DataType.FLOAT16 else float(np.finfo(np.float32).min)
    return max(value, lowest)
