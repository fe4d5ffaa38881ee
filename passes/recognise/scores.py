"""Scores of attention read backwards from their softmax: product, scale and masks; and the product behind it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from .. import graph
from ..graph import same_dim
from .masks import HIDES
from .matching import Refused, Writer, made_by, only_user, operands, producer, same, scalar, user

ABSORBS = -1e30  # a score vanishes when it is added to this, which onnxruntime does not take for -inf

SWAPPED = {3: (0, 2, 1), 4: (0, 1, 3, 2)}  # rank -> the last two axes change places

Dim = int | ir.SymbolicDim


@dataclass(frozen=True)
class Mask:
    """Added to the scores; or, with `fill`, a condition that leaves scores where it is `keep`. `factor`: of either.

    windows: 0, or how many windows of an image follow each other in the batch; the mask, (1, windows, 1 or heads,
    queries, keys), is that of each.
    """

    value: ir.Value
    factor: float = 1.0
    fill: float | None = None
    keep: bool = True
    windows: int = 0

    @property
    def low(self) -> float:
        """What stands in the place of a hidden score."""
        return (self.fill or 0.0) * self.factor


@dataclass(frozen=True)
class Factor:
    """What the product is multiplied by, or divided, before any mask: the same for all keys of a query."""

    value: ir.Value
    divides: bool


@dataclass(frozen=True)
class Scores:
    """(q · kᵀ) times `scale` and `factor`, plus `masks`; `product` is the MatMul.

    wide: the softmax is in float32 between casts.
    """

    product: ir.Node
    scale: float = 1.0
    factor: Factor | None = None
    masks: tuple[Mask, ...] = ()
    wide: bool = False


def read(value: ir.Value | None, depth: int = 8) -> Scores | None:
    """The scores as read backwards from the softmax. None when they do not come from a MatMul."""
    node = producer(value)
    if node is None or depth == 0 or value is None or graph.has_references(node):
        return None
    if graph.is_op(node, "MatMul"):
        return Scores(node)
    if graph.is_op(node, "Cast"):
        inner = read(node.inputs[0], depth - 1)
        if inner is not None and graph.attribute(node, "to") == ir.DataType.FLOAT:
            return replace(inner, wide=True)
        return None
    if graph.is_op(node, "Mul", "Div"):
        pairs = list(operands(node)) if node.op_type == "Mul" else [(node.inputs[0], node.inputs[1])]
        for a, b in pairs:
            number = scalar(b, a)
            inner = None if number is None else read(a, depth - 1)
            if inner is not None and number:
                number = number if node.op_type == "Mul" else 1 / number
                masks = tuple(replace(mask, factor=mask.factor * number) for mask in inner.masks)
                return replace(inner, scale=inner.scale * number, masks=masks)
        for a, b in pairs:
            inner = read(a, depth - 1) if _one_for_all_keys(b) else None
            if b is not None and inner is not None and not inner.masks and inner.factor is None:
                return replace(inner, factor=Factor(b, node.op_type == "Div"))
        return None
    if graph.is_op(node, "Add"):
        for a, b in operands(node):
            inner = read(a, depth - 1)
            if inner is not None:
                return replace(inner, masks=(*inner.masks, Mask(b)))
        return None
    if graph.is_op(node, "Reshape"):
        return _of_windows(node, depth)
    if graph.is_op(node, "Where"):
        condition, *choices = node.inputs
        for keep in (True, False):
            kept, other = choices if keep else choices[::-1]
            fill = scalar(other, kept)
            inner = None if fill is None else read(kept, depth - 1)
            if inner is not None and condition is not None:
                return replace(inner, masks=(*inner.masks, Mask(condition, fill=fill, keep=keep)))
    return None


def _of_windows(back: ir.Node, depth: int) -> Scores | None:
    """Scores (b·w, h, q, k) that get a mask (1, w, 1, q, k) as (b, w, h, q, k), as in Swin transformers."""
    add = made_by(back.inputs[0], "Add")
    for a, mask in operands(add):
        apart = made_by(a, "Reshape")
        inner = read(apart.inputs[0], depth - 1) if apart is not None and user(a) is add else None
        if apart is None or inner is None:
            continue
        values = (apart.inputs[0], a, mask, back.outputs[0])
        before, split, hidden, after = (list(v.shape or ()) if v is not None else [] for v in values)
        count = split[1] if len(split) == 5 else None
        if len(before) != 4 or len(after) != 4 or not isinstance(count, int):
            continue
        kept = all(same_dim(before[i], shape[i - 4]) for i in (1, 2, 3) for shape in (split, after))
        fits = hidden[-4:-3] == [count] and hidden[-3] in (1, before[1]) and hidden[-2:] == before[2:]
        if kept and fits and hidden[:-4] in ([], [1]) and all(isinstance(dim, int) for dim in hidden):
            return replace(inner, masks=(*inner.masks, Mask(mask, windows=count)))
    return None


def _one_for_all_keys(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None and list(value.shape)[-1:] in ([], [1])


def weighted(node: ir.Node) -> tuple[ir.Node, bool] | None:
    """The MatMul that the weights go into, behind a cast or a guard against NaN, and whether it is V P' and not P V.

    None when there is none.
    """
    value, turned = node.outputs[0], False
    for _ in range(4):
        following = user(value) or _guard(value)
        if following is None:
            near = any(graph.is_op(u, "MatMul") and u.inputs[0] is value for u, _ in value.uses())
            if near and read(node.inputs[0]) is not None:
                only_user(value)  # says why not
            return None
        if graph.is_op(following, "MatMul"):
            return (following, turned) if same(following.inputs[1 if turned else 0], value) else None
        if graph.is_op(following, "Transpose") and not graph.has_references(following):
            perm = tuple(graph.attribute(following, "perm") or ())
            if turned or perm != SWAPPED.get(len(perm)):
                return None
            turned = True
        elif not graph.is_op(following, "Cast", "Where"):
            return None
        value = following.outputs[0]
    return None


def _guard(weights: ir.Value) -> ir.Node | None:
    """Where(IsNaN(weights), 0, weights)"""
    users = [node for node, _ in weights.uses()]
    test = next((node for node in users if graph.is_op(node, "IsNaN")), None)
    choice = None if test is None else user(test.outputs[0])
    if choice is None or len(users) != 2 or weights.is_graph_output() or not graph.is_op(choice, "Where"):
        return None
    condition, zero, other = choice.inputs
    right = same(condition, test.outputs[0] if test else None) and scalar(zero, weights) == 0.0 and same(other, weights)
    return choice if right else None


def check_mask(mask: Mask, whole: list[Dim], dtypes: tuple[ir.DataType | None, ...]) -> None:
    """Raise Refused unless the mask broadcasts to scores of the sizes `whole`, in one of these types."""
    if not mask.windows:
        _check_shape("mask", mask.value, whole)
    if mask.fill is not None:
        _check_low(mask, whole)
    elif mask.value.dtype not in (*dtypes, None):
        raise Refused(f"the mask {mask.value.name} is of another type than the query")


def check_factor(factor: Factor, whole: list[Dim], dtypes: tuple[ir.DataType | None, ...]) -> None:
    """Raise Refused unless the factor broadcasts to scores of the sizes `whole`, in one of these types."""
    _check_shape("factor", factor.value, whole)
    if factor.value.dtype not in (*dtypes, None):
        raise Refused(f"the factor {factor.value.name} is of another type than the query")


def _check_shape(what: str, value: ir.Value, whole: list[Dim]) -> None:
    shape = value.shape
    if shape is None:
        raise Refused(f"the shape of the {what} {value.name} is not known")
    if len(shape) > len(whole):
        raise Refused(f"the {what} {value.name} has rank {len(shape)}")
    for mine, theirs in zip(list(shape)[::-1], whole[::-1], strict=False):
        if mine != 1 and not same_dim(mine, theirs):
            raise Refused(
                f"an axis of the {what} {value.name} ({mine}) is not known to be that of the product ({theirs})"
            )


def _check_low(mask: Mask, whole: list[Dim]) -> None:
    name, low = mask.value.name, mask.low
    if not low <= HIDES:
        raise Refused(f"{name} puts {low:g} in the place of scores; only {HIDES:g} and less are known to hide a key")
    last = list(mask.value.shape or ())[-1:]
    if low == -math.inf and last in ([], [1]) and whole[-1] != 1:
        raise Refused(f"{name} hides all keys of a query or none, by -inf: weights of NaN, which are 0 in Attention")


def write_masks(
    writer: Writer, masks: tuple[Mask, ...], dtype: ir.DataType, q: ir.Value, batch: Dim
) -> ir.Value | None:
    """All masks as one of numbers to add, for q (batch, heads, queries, size).

    As in the scores, what hides replaces what was added before. A number that hides becomes one that absorbs every
    score, so that a row of which all is hidden keeps equal weights.
    """
    total: ir.Value | None = None
    for mask in masks:
        value = _for_every_image(writer, mask, q, batch) if mask.windows else mask.value
        shape = _broadcast(value, total)
        if mask.fill is not None:
            lowest = ABSORBS if dtype != ir.DataType.FLOAT16 else float(np.finfo(np.float16).min)
            low = mask.low if mask.low == -math.inf else lowest
            hidden = writer.constant(np.array(low, dtype.numpy()), "hidden", dtype)
            seen = writer.constant(np.array(0, dtype.numpy()), "zero", dtype) if total is None else total
            pair = (seen, hidden) if mask.keep else (hidden, seen)
            total = writer.op("Where", value, *pair, dtype=dtype, shape=shape)
            continue
        if mask.factor != 1.0:
            factor = writer.constant(np.array(mask.factor, dtype.numpy()), "factor", dtype)
            value = writer.op("Mul", value, factor, dtype=dtype, shape=value.shape)
        total = value if total is None else writer.op("Add", total, value, dtype=dtype, shape=shape)
    return total


def _for_every_image(writer: Writer, mask: Mask, q: ir.Value, batch: Dim) -> ir.Value:
    """A mask of windows for the whole batch, (batch, 1 or heads, queries, keys)."""
    value, count = mask.value, mask.windows
    dims = [dim for dim in list(value.shape or ())[-3:] if isinstance(dim, int)]
    value = writer.reshape(value, [count, *dims])
    if batch == count:
        return value
    if isinstance(batch, int):
        times = writer.ints([batch // count, 1, 1, 1], "images")
    else:
        size = writer.op("Shape", q, start=0, end=1, dtype=ir.DataType.INT64, shape=[1])
        images = writer.op("Div", size, writer.ints([count], "count"), dtype=ir.DataType.INT64, shape=[1])
        ones = writer.ints([1, 1, 1], "ones")
        times = writer.op("Concat", images, ones, axis=0, dtype=ir.DataType.INT64, shape=[4])
    return writer.op("Tile", value, times, dtype=value.dtype, shape=[batch, *dims])


def _broadcast(a: ir.Value, b: ir.Value | None) -> list[Dim] | None:
    if b is None:
        return None if a.shape is None else list(a.shape)
    if a.shape is None or b.shape is None:
        return None
    count = max(len(a.shape), len(b.shape))
    pairs = zip([1] * (count - len(a.shape)) + list(a.shape), [1] * (count - len(b.shape)) + list(b.shape), strict=True)
    return [y if x == 1 else x for x, y in pairs]
