"""Short bodies for the usual forms of Attention and RotaryEmbedding; the standard's cover every form in 75 nodes."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from .. import graph
from .body_builder import Body
from .evaluate import Refusal

LARGEST_TRIANGLE = 1024 * 1024  # numbers in a causal mask that is written as a constant


def fused_attention(node: ir.Node) -> bool:
    """Whether the fused kernel takes the form of an Attention."""
    return not_fused(node) is None


def not_fused(node: ir.Node) -> str | None:
    """Why the fused kernel does not take an Attention: float32 or float16, known heads and head sizes, a mask for all
    keys.

    None: it takes it.
    """
    if graph.has_references(node):
        return "its attributes are parameters of the function; run inline-functions first"
    q, k, v, mask, past, past_value, lengths = [*node.inputs, *[None] * 7][:7]
    attribute = graph.attribute
    values = {"query": q, "key": k, "value": v}
    for name, value in values.items():
        if value is None or value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            kind = "unknown type" if value is None or value.dtype is None else value.dtype.name.lower()
            return f"the {name} is of {kind}; the kernel takes float32 and float16"
    shapes = [list(value.shape) if value is not None and value.shape is not None else [] for value in values.values()]
    if (attribute(node, "left_window_size", -1), attribute(node, "right_window_size", -1)) != (-1, -1):
        return "it sees a window"
    if lengths is not None and (past is not None or lengths.dtype != ir.DataType.INT64 or graph.rank(lengths) != 1):
        return "it is told how many keys there are, and has a past or another type of numbers than int64"
    if attribute(node, "softcap", 0.0) < 0 or attribute(node, "softmax_precision", 1) not in (0, 1):
        return "its softmax is in another precision"
    for name, shape, option in zip(values, shapes, ("q_num_heads", "kv_num_heads", "kv_num_heads"), strict=True):
        heads = shape[1] if len(shape) == 4 else attribute(node, option, 0) if len(shape) == 3 else None
        if not isinstance(heads, int) or not heads or not isinstance(shape[-1], int):
            return f"the heads or head sizes of the {name} are not known; run infer-shapes, or pin shapes"
    (*_, queries, _), (*_, keys, _) = shapes[:2]
    cached = past is not None
    if cached != (past_value is not None):
        return "it has only one of a past key and a past value"
    if any(output.name for output in node.outputs[3 if cached else 1 :]):
        return "its products, or keys without a past, are results"
    if cached and attribute(node, "is_causal", 0) and not graph.same_dim(queries, keys):
        return f"it has {keys} new keys for {queries} queries, a past, and is causal"
    if mask is None:
        return None
    kinds = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BOOL)
    if mask.dtype not in kinds or mask.shape is None or not len(mask.shape):
        return "the type or rank of its mask is not known; run infer-shapes first"
    columns = mask.shape[-1]
    if cached or not isinstance(keys, int) or not isinstance(columns, int) or columns in (1, keys):
        return None
    return f"its mask has {columns} columns for {keys} keys"


def rotary_kernel(node: ir.Node) -> bool:
    """Whether the rotary kernel takes the form: float32, known heads, as many angles as pairs."""
    x, cos, sin, positions = [*node.inputs, None][:4]
    if graph.has_references(node) or any(v is None or v.dtype != ir.DataType.FLOAT for v in (x, cos, sin)):
        return False
    shapes = [list(v.shape) if v is not None and v.shape is not None else [] for v in (x, cos, sin)]
    shape, *angles = shapes
    heads = shape[1] if len(shape) == 4 else graph.attribute(node, "num_heads", 0) if len(shape) == 3 else None
    if not isinstance(heads, int) or not heads or not isinstance(shape[-1], int):
        return False
    turned = graph.attribute(node, "rotary_embedding_dim", 0) or (shape[-1] if len(shape) == 4 else shape[-1] // heads)
    rank = 3 if positions is None else 2
    return all(len(a) == rank and isinstance(a[-1], int) and 2 * a[-1] == turned for a in angles)


def attention(node: ir.Node, opset: int, max_steps: int) -> Body:
    """Four axes, float32, no cache; a float mask or causal for fixed lengths, or neither. Raises Refusal for others."""
    q, k, v, mask, *rest = [*node.inputs, *[None] * 7][:7]
    attribute = graph.attribute
    special = attribute(node, "softcap", 0.0) or attribute(node, "qk_matmul_output_mode", 0)
    windows = attribute(node, "left_window_size", -1), attribute(node, "right_window_size", -1)
    shapes = [value.shape if value is not None else None for value in (q, k, v)]
    if any(rest) or special or windows != (-1, -1) or len([value for value in node.outputs if value.name]) != 1:
        raise Refusal("a form of Attention that the standard's body is for")
    if any(shape is None or len(shape) != 4 for shape in shapes) or q is None or q.dtype != ir.DataType.FLOAT:
        raise Refusal("a form of Attention that the standard's body is for")
    (_, heads, queries, width), (_, groups, keys, _), (_, _, _, depth) = [list(shape or ()) for shape in shapes]
    if not (isinstance(heads, int) and isinstance(groups, int) and isinstance(width, int) and isinstance(depth, int)):
        raise Refusal("heads and widths are not known")
    body = Body(opset)
    scale = attribute(node, "scale")
    factor = body.constant(1 / math.sqrt(width) if scale is None else scale, ir.DataType.FLOAT)
    key, value = (_repeated(body, f"input{i}", heads, groups, size) for i, size in ((1, width), (2, depth)))
    scores = body.op("MatMul", body.op("Mul", "input0", factor), body.op("Transpose", key, perm=[0, 1, 3, 2]))
    causal = bool(attribute(node, "is_causal", 0))
    if causal:
        if not isinstance(queries, int) or not isinstance(keys, int) or queries * keys > LARGEST_TRIANGLE:
            raise Refusal("a causal mask of free length")
        if mask is not None:
            raise Refusal("a causal mask with another mask")
        triangle = np.triu(np.full((queries, keys), np.finfo(np.float32).min), 1)
        scores = body.op("Add", scores, body.constant(triangle, ir.DataType.FLOAT))
    elif mask is not None:
        if mask.dtype != ir.DataType.FLOAT or mask.shape is None or not graph.same_dim(mask.shape[-1], keys):
            raise Refusal("a mask of conditions, or one that is shorter than the keys")
        scores = body.op("Add", scores, "input3")
    weights = body.op("Softmax", scores, axis=-1)
    if mask is None or is_finite(mask):
        body.op("MatMul", weights, value, out="output0")
        return body
    mixed = body.op("MatMul", weights, value)  # NaN in rows that the mask hides wholly, which are to be zeros
    best = body.op("ReduceMax", "input3", body.constant([-1]), keepdims=1)
    hidden = body.op("Equal", best, body.constant(-np.inf, ir.DataType.FLOAT))
    body.op("Where", hidden, body.constant(0.0, ir.DataType.FLOAT), mixed, out="output0")
    return body


def _repeated(body: Body, name: str, heads: int, groups: int, width: int) -> str:
    """Each head of (batch, groups, length, width) heads/groups times."""
    if heads == groups or groups == 1:
        return name
    apart = body.op("Unsqueeze", name, body.constant([2]))
    many = body.op("Expand", apart, body.constant([1, 1, heads // groups, 1, 1]))
    return body.op("Reshape", many, body.constant([0, heads, -1, width]))


def is_finite(value: ir.Value | None, depth: int = 8) -> bool:
    """Whether a mask holds only finite numbers."""
    array = graph.constant_value(value, limit=16 << 20)
    if array is not None:
        return bool(np.isfinite(array).all())
    node = value.producer() if value is not None else None
    if node is None or depth == 0:
        return False
    if graph.is_op(node, "Expand", "Unsqueeze", "Reshape", "Trilu", "Slice", "Transpose", "Identity"):
        return is_finite(node.inputs[0], depth - 1)
    return graph.is_op(node, "Where") and all(is_finite(given, depth - 1) for given in node.inputs[1:])


def rotary_embedding(node: ir.Node, opset: int, max_steps: int) -> Body:
    """Four axes, tables of one row for each position, whole width, halves. Raises Refusal for other forms."""
    x = node.inputs[0]
    partial = graph.attribute(node, "rotary_embedding_dim", 0) or graph.attribute(node, "interleaved", 0)
    if graph.rank(x) != 4 or partial or graph.input_of(node, 3) is not None:
        raise Refusal("a form of RotaryEmbedding that the standard's body is for")
    body = Body(opset)
    cos, sin = (
        body.op("Concat", *[body.op("Unsqueeze", f"input{i}", body.constant([1]))] * 2, axis=-1) for i in (1, 2)
    )
    first, second = body.ops("Split", "input0", outputs=2, axis=-1, num_outputs=2)
    turned = body.op("Concat", body.op("Neg", second), first, axis=-1)
    body.op("Add", body.op("Mul", "input0", cos), body.op("Mul", turned, sin), out="output0")
    return body
