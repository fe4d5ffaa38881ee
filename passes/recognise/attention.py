"""The pass `recognise-attention`: product, scale, mask, softmax and product -> Attention."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from .. import graph
from ..base import Contract, PassContext, PassReport
from ..graph import same_dim
from .einsum import attention_products, write_product
from .masks import is_causal
from .matching import Found, Recogniser, Refused, Writer, made_by, operands, scalar, user
from .scores import SWAPPED, Dim, Factor, Mask, Scores, check_factor, check_mask, read, weighted, write_masks
from .sizes import read_sizes_elsewhere

ALL_AXES = 13  # from this opset on Softmax is over one axis
LEAST_FACTOR = 0.05  # of a triangle that is added, for what it hides to stay hidden


@dataclass(frozen=True)
class RecogniseAttention(Recogniser):
    """Attention written out in small operators becomes Attention (opset 23).

        T = Transpose <perm = [0, 1, 3, 2]> (K)
        s = MatMul (Q, T)
        c = Mul (s, scale)                         ->    Y = Attention <scale> (Q, K, V, mask)
        m = Add (c, mask)
        p = Softmax (m)
        Y = MatMul (p, V)

    Q, K and V are (batch, heads, length, width), or (batch, length, width), which gets one head. The scale may be on
    Q, K, the product or several of them, Mul or Div; one that is no number, but the same for all keys, goes to Q.
    The mask may be added, or chosen by Where (-10000 or less), in any number; a mask that only hides what comes later
    becomes is_causal. A mask with one row for all queries is expanded, as onnxruntime wants it. K may come transposed
    out of a larger permutation, which is rewritten; K and V that repeat each head several times (Unsqueeze, Expand or
    Tile, Reshape: grouped queries) are taken before the repetition. V P' (channels in front of the length) is found as
    well as P V. A model of an older opset is brought to 23.
    A mask for each window of an image, which is added with windows on an axis of their own (Swin), is repeated for the
    images of the batch.
    Einsum of two operands for the products, in any order of axes, is written as MatMul between transpositions first.
    A softmax in float32 of scores in float16 or bfloat16 becomes softmax_precision; where the mask, or V, is in float32
    too, Q, K and V are cast to it in front of Attention and its result is cast back.
    A guard that turns rows of NaN into zeros, as exporters of PyTorch write it behind a softmax whose row may be
    wholly hidden, is part of what Attention does.
    Left alone: batches or heads that are not known to be equal, masks that may be larger than the product, weights
    that are used elsewhere (an output of the attention matrix), other ranks.

    Source: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762; Ainslie et al., "GQA", arXiv 2305.13245.
    """

    name: ClassVar[str] = "recognise-attention"
    contract: ClassVar[Contract] = Contract.ROUNDING
    opset: ClassVar[int] = 23

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        names: graph.Names | None = None
        moved, products = [], []
        for scope in graph.scopes(model):
            for node in [node for node in scope.graph if graph.is_op(node, "Softmax")]:
                for einsum in attention_products(node):
                    names, site = names or graph.Names(model), graph.site(einsum)
                    if write_product(einsum, scope, names):
                        products.append(site)
                for shape, product in _measured(node):
                    names = names or graph.Names(model)
                    source = functools.partial(_size_source, product)
                    moved += read_sizes_elsewhere(shape, source, scope, names)
        report = super().run(model, ctx)
        for site in products:
            report.changed("einsum", site, "written as a product of matrices")
        for site in moved:
            report.changed("size", site, "read from query or key, not from their product")
        return report

    def rule(self, node: ir.Node) -> str:
        return "attention"

    def find(self, node: ir.Node, scope: graph.Scope) -> Found | None:
        if not graph.is_op(node, "Softmax") or graph.has_references(node):
            return None
        found = weighted(node)
        if found is None:
            return None
        last, turned = found
        if not graph.last_axis(node, -1 if scope.opset >= ALL_AXES else 1):
            raise Refused("softmax is not known to be over the last axis")
        scores = read(node.inputs[0])
        if scores is None:
            raise Refused("softmax is not of a product with a scale and masks")
        site = _site(last, turned, scores)
        return Found("attention", last, site.leaves, site.write)


def _measured(softmax: ir.Node) -> list[tuple[ir.Node, ir.Node]]:
    """The Shape nodes that read scores between their product and the softmax, each with the product."""
    scores = None if graph.has_references(softmax) else read(softmax.inputs[0])
    if scores is None or scores.product.outputs[0].shape is None:
        return []
    found: list[tuple[ir.Node, ir.Node]] = []
    value: ir.Value | None = scores.product.outputs[0]
    while value is not None:
        users = [node for node, _ in value.uses()]
        found += [(node, scores.product) for node in users if graph.is_op(node, "Shape")]
        others = [node for node in users if not graph.is_op(node, "Shape")]
        alike = len(others) == 1 and graph.is_op(others[0], "Cast", "Mul", "Div", "Add", "Where")
        following = others[0].outputs[0] if alike else None
        value = following if graph.same_shape(following, value) else None
    return found


def _size_source(product: ir.Node, axis: int) -> tuple[ir.Value, int] | None:
    """A value that is not made for the product alone, and its axis with the size of this axis of the product."""
    whole = product.outputs[0]
    last = axis == len(whole.shape or ()) - 1
    value = product.inputs[1 if last else 0]
    if value is None or value.shape is None or whole.shape is None or len(value.shape) != len(whole.shape):
        return None
    if not last and axis != len(whole.shape) - 2 and not same_dim(value.shape[axis], whole.shape[axis]):
        return None
    node = value.producer()
    if graph.is_op(node, "Transpose") and node is not None and node.inputs[0] is not None:
        perm = graph.attribute(node, "perm")
        return None if perm is None else (node.inputs[0], int(perm[axis]))
    return value, axis


@dataclass(frozen=True)
class Side:
    """One of Q, K and V: its value, how it is to be transposed, and the factor that was on it."""

    value: ir.Value
    perm: tuple[int, ...] | None = None
    scale: float = 1.0

    @property
    def dims(self) -> list[Dim]:
        shape = self.value.shape
        assert shape is not None
        return [shape[axis] for axis in self.perm or range(len(shape))]

    def write(self, writer: Writer, dtype: ir.DataType | None) -> ir.Value:
        return _as(writer, self.value if self.perm is None else writer.transpose(self.value, self.perm), dtype)


@dataclass(frozen=True)
class Site:
    """dtype: what Attention computes in. wide: its softmax is in float32. turned: the result has length and width, the
    last two axes, in the other order."""

    q: Side
    k: Side
    v: Side
    scale: float
    factor: Factor | None
    masks: tuple[Mask, ...]
    causal: tuple[Mask, ...]
    wide: bool
    dtype: ir.DataType | None
    last: ir.Node
    turned: bool

    @property
    def leaves(self) -> tuple[ir.Value, ...]:
        others = [mask.value for mask in (*self.masks, *self.causal)] + ([self.factor.value] if self.factor else [])
        return (self.q.value, self.k.value, self.v.value, *others)

    def write(self, writer: Writer) -> ir.Value:
        output = self.last.outputs[0]
        flat = len(self.q.dims) == 3
        q, k, v = (side.write(writer, self.dtype) for side in (self.q, self.k, self.v))
        if self.factor is not None:
            by = _as(writer, self.factor.value, self.dtype)
            q = writer.op("Div" if self.factor.divides else "Mul", q, by, dtype=q.dtype, shape=self.q.dims)
        dims = [*self.q.dims[:-1], self.v.dims[-1]]
        mask = write_masks(writer, self.masks, self.dtype or ir.DataType.FLOAT, q, self.q.dims[0])
        if flat:
            axis = writer.ints([1], "heads")
            q, k, v = (
                writer.op("Unsqueeze", value, axis, dtype=value.dtype, shape=_with_head(side.dims))
                for value, side in ((q, self.q), (k, self.k), (v, self.v))
            )
            if mask is not None and mask.shape is not None and len(mask.shape) == 3:
                shape = _with_head(list(mask.shape))
                mask = writer.op("Unsqueeze", mask, axis, dtype=mask.dtype, shape=shape)
            dims = _with_head(dims)
        if mask is not None:
            mask = self._expanded(writer, mask, q, k)
        attributes: dict[str, float | int] = {"scale": self.scale}
        if self.causal:
            attributes["is_causal"] = 1
        if self.wide:
            attributes["softmax_precision"] = int(ir.DataType.FLOAT)
        y = writer.op("Attention", q, k, v, mask, dtype=self.dtype, shape=dims, **attributes)
        if flat:
            y = writer.op("Squeeze", y, axis, dtype=self.dtype, shape=[dims[0], *dims[2:]])
        if self.turned:
            y = writer.transpose(y, SWAPPED[3 if flat else 4])
        return _as(writer, y, output.dtype)

    def _expanded(self, writer: Writer, mask: ir.Value, q: ir.Value, k: ir.Value) -> ir.Value:
        """The mask with a row for each query and a column for each key."""
        assert mask.shape is not None
        wanted = [self.q.dims[-2], self.k.dims[-2]]
        have: list[Dim] = [*[1] * (2 - len(mask.shape)), *list(mask.shape)[-2:]]
        if len(mask.shape) >= 2 and all(same_dim(a, b) for a, b in zip(have, wanted, strict=True)):
            return mask
        parts: list[int | ir.Value] = [1, 1]
        for mine, whole, source in zip(have, wanted, (q, k), strict=True):
            if same_dim(mine, whole):
                parts.append(1)
            elif isinstance(whole, int):
                parts.append(whole)
            else:
                parts.append(writer.op("Shape", source, start=2, end=3, dtype=ir.DataType.INT64, shape=[1]))
        numbers = [part for part in parts if isinstance(part, int)]
        if len(numbers) == len(parts):
            target = writer.ints(numbers, "mask_shape")
        else:
            ends = [writer.ints([part], "one") if isinstance(part, int) else part for part in parts]
            target = writer.op("Concat", *ends, axis=0, dtype=ir.DataType.INT64, shape=[4])
        lead: list[Dim] = [*[1] * (4 - len(mask.shape)), *list(mask.shape)[:-2]] if len(mask.shape) >= 2 else [1, 1]
        return writer.op("Expand", mask, target, dtype=mask.dtype, shape=[*lead, *wanted])


def _as(writer: Writer, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """The value in this type."""
    if dtype is None or value.dtype in (dtype, None):
        return value
    return writer.op("Cast", value, to=int(dtype), dtype=dtype, shape=value.shape)


def _with_head(dims: list[Dim]) -> list[Dim]:
    return [dims[0], 1, *dims[1:]]


def _site(last: ir.Node, turned: bool, scores: Scores) -> Site:
    """The site with everything checked. Raises Refused."""
    q, k = _query(scores.product.inputs[0]), _key(scores.product.inputs[1])
    v = Side(_given(last.inputs[0 if turned else 1]))
    rank = len(q.dims)
    if turned and len(v.dims) == rank:
        v = replace(v, perm=SWAPPED.get(rank))
    if rank not in SWAPPED or len(k.dims) != rank or len(v.dims) != rank:
        raise Refused(f"query, key and value have ranks {rank}, {len(k.dims)} and {len(v.dims)}, not all 3 or all 4")
    dtype = q.value.dtype
    if dtype is not None and dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        raise Refused(f"{dtype.name.lower()} input")
    if rank == 4:
        k, v = _ungrouped(q, k, v)
    for name, side in (("key", k), ("value", v)):
        if not same_dim(q.dims[0], side.dims[0]):
            raise Refused(
                f"the batch of the query ({q.dims[0]}) is not known to be that of the {name} ({side.dims[0]})"
            )
    scale = scores.scale * q.scale * k.scale
    if not scale > 0:
        raise Refused(f"the scale {scale:g} is not positive")
    whole = [*q.dims[:-1], k.dims[-2]]
    masks, causal, dtypes = [], [], (dtype, ir.DataType.FLOAT) if scores.wide else (dtype,)
    if scores.factor is not None:
        check_factor(scores.factor, whole, dtypes)
    for mask in scores.masks:
        check_mask(mask, whole, dtypes)
        chosen = mask.fill is not None
        hides = chosen or mask.factor >= LEAST_FACTOR
        if hides and is_causal(mask.value, mask.keep, chosen) and same_dim(*whole[-2:]):
            causal.append(mask)
        else:
            masks.append(mask)
    added = [mask.value.dtype for mask in masks if mask.fill is None]
    added += [scores.factor.value.dtype] if scores.factor is not None else []
    if scores.wide and ir.DataType.FLOAT in (v.value.dtype, *added):
        dtype = ir.DataType.FLOAT
    wide = scores.wide and dtype != ir.DataType.FLOAT
    scale = float(np.float32(scale))
    return Site(q, k, v, scale, scores.factor, tuple(masks), tuple(causal), wide, dtype, last, turned)


def _given(value: ir.Value | None) -> ir.Value:
    if value is None or value.shape is None:
        raise Refused("the rank of query, key or value is not known; run infer-shapes first")
    return value


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """The value without factors that nothing else needs, and their product."""
    factor = 1.0
    while value is not None and user(value) is not None:
        node = made_by(value, "Mul", "Div")
        if node is None:
            break
        pairs = operands(node) if node.op_type == "Mul" else [(node.inputs[0], node.inputs[1])]
        found = next(((a, n) for a, b in pairs if (n := scalar(b, a)) is not None), None)
        if found is None or not found[1]:
            break
        value, factor = found[0], factor * (found[1] if node.op_type == "Mul" else 1 / found[1])
    return value, factor


def _query(value: ir.Value | None) -> Side:
    inner, scale = _unscaled(value)
    return Side(_given(inner), scale=scale)


def _key(value: ir.Value | None) -> Side:
    """K from Kᵀ: what a transpose made, in the order (batch, heads, length, width), or Kᵀ transposed once more."""
    inner, scale = _unscaled(value)
    transposed = _given(inner)
    rank = len(transposed.shape or ())
    swap = SWAPPED.get(rank)
    if swap is None:
        raise Refused(f"the key has rank {rank}")
    node = made_by(transposed, "Transpose")
    source = _through_three_axes(transposed)
    if node is not None and user(transposed) is not None:
        first = graph.attribute(node, "perm")
        if first is not None and node.inputs[0] is not None and node.inputs[0].shape is not None:
            perm = tuple(first[axis] for axis in swap)
            source, swap = node.inputs[0], (() if perm == tuple(range(rank)) else perm)
    elif source is not None:
        swap = ()
    if source is None:
        return Side(transposed, swap, scale)
    if not swap:
        source, more = _unscaled(source)
        scale *= more
        source = _given(source)
    return Side(source, swap or None, scale)


def _through_three_axes(value: ir.Value) -> ir.Value | None:
    """K when its transpose goes through three axes: Reshape (·, T, D), Transpose, Reshape (B, H, D, T)."""
    back = made_by(value, "Reshape")
    swap = made_by(back.inputs[0] if back is not None else None, "Transpose")
    flat = made_by(swap.inputs[0] if swap is not None else None, "Reshape")
    if back is None or swap is None or flat is None or list(graph.attribute(swap, "perm") or ()) != [0, 2, 1]:
        return None
    k, three = flat.inputs[0], flat.outputs[0].shape
    if k is None or k.shape is None or value.shape is None or three is None or len(k.shape) != 4 or len(three) != 3:
        return None
    wanted = [k.shape[0], k.shape[1], k.shape[3], k.shape[2]]
    right = all(same_dim(a, b) for a, b in zip(value.shape, wanted, strict=False)) and len(value.shape) == 4
    return k if right and same_dim(three[1], k.shape[2]) and same_dim(three[2], k.shape[3]) else None


def _ungrouped(q: Side, k: Side, v: Side) -> tuple[Side, Side]:
    """K and V before their heads are repeated, when both are, as often. Raises Refused when heads do not fit."""
    if k.perm is None:
        first, second = _repeated(k.value), _repeated(v.value)
        if first is not None and second is not None and first[1] == second[1]:
            return replace(k, value=first[0]), replace(v, value=second[0])
    if not all(same_dim(side.dims[1], q.dims[1]) for side in (k, v)) and not (k.dims[1] == v.dims[1] == 1):
        heads = ", ".join(str(side.dims[1]) for side in (q, k, v))
        raise Refused(f"the heads of query, key and value ({heads}) are not known to be equal")
    return k, v


def _repeated(value: ir.Value) -> tuple[ir.Value, int] | None:
    """(x, n) when the value is x (B, H, S, D) with each head n times: Reshape(Expand(x with an axis of 1 behind H)).

    Or when it is x with its only head n times.
    """
    only = made_by(value, "Expand", "Tile")
    if only is not None and user(value) is not None:
        x = only.inputs[0]
        one, many = (list(v.shape or ()) if v is not None else [] for v in (x, value))
        right = len(one) == len(many) == 4 and one[1] == 1
        count = many[1] if right else None
        if x is None or not isinstance(count, int) or not all(same_dim(one[i], many[i]) for i in (0, 2, 3)):
            return None
        return x, count
    merge = made_by(value, "Reshape")
    expand = made_by(merge.inputs[0] if merge is not None else None, "Expand", "Tile")
    split = made_by(expand.inputs[0] if expand is not None else None, "Unsqueeze", "Reshape")
    x = split.inputs[0] if split is not None else None
    if expand is None or split is None or x is None or user(value) is None:
        return None
    shapes = [item.shape for item in (x, split.outputs[0], expand.outputs[0], value)]
    if any(shape is None for shape in shapes):
        return None
    before, apart, many, after = ([] if shape is None else list(shape) for shape in shapes)
    if [len(s) for s in (before, apart, many, after)] != [4, 5, 5, 4]:
        return None
    heads, count = before[1], many[2]
    if not isinstance(heads, int) or not isinstance(count, int) or apart[2] != 1 or after[1] != heads * count:
        return None
    if not all(
        same_dim(before[i], apart[j]) and same_dim(before[i], many[j]) for i, j in ((0, 0), (1, 1), (2, 3), (3, 4))
    ):
        return None
    unknown = [i for i in (0, 2, 3) if not same_dim(before[i], after[i])]
    return (x, count) if len(unknown) <= 1 else None  # one size is told by the number of elements
