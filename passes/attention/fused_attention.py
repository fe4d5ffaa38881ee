"""The pass `fused-attention`: attention in any of its spellings -> one Attention that the fused kernel takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from .. import graph
from ..base import Contract, Pass, PassContext, PassReport
from ..prepare.contrib_attention import BY_HEADS
from ..prepare.infer_shapes import InferShapes
from ..prepare.standardise_contrib import ATTENTIONS, StandardiseContrib
from ..prepare.transformer import not_fused
from ..recognise.attention import RecogniseAttention
from ..recognise.matching import Refused, made_by, user
from ..recognise.sizes import read_sizes_elsewhere

HEADS, KERNEL = "heads", "kernel"


@dataclass(frozen=True)
class FusedAttention(Pass):
    """Attention, however it is written, becomes one Attention that takes and gives (batch, length, heads x width).

        q, k, v = Transpose (Reshape (Q, K, V))
        s = MatMul (q, Transpose (k))
        m = Add (Mul (s, scale), mask)
        p = Softmax (m)                            ->    Y = Attention <scale, q_num_heads,
        y = MatMul (p, v)                                               kv_num_heads> (Q, K, V, mask)
        Y = Reshape (Transpose (y))

    Compiled for a CPU it is one kernel that keeps, for each query, the greatest score m and the sum n of
    exponentials so far, and never has the scores in memory: memory grows linearly with the length.
    Found are attention in small operators (all that recognise-attention finds: scaled, masked, causal, grouped,
    cross), onnxruntime's MultiHeadAttention, Attention and GroupQueryAttention (all that standardise-contrib
    takes), and Attention of the standard. Reshapes and transpositions that only split and join heads become part of
    the operator. The model is brought to opset 23 when it has attention. The result is plain ONNX, which onnxruntime
    runs with its own kernel.
    Left alone, with the reason: what is nearly attention; heads that are made by something else than a reshape, such
    as rotary embedding, keep their four axes; forms that the kernel does not take (bfloat16) stay one Attention.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867; Rabe and Staats,
    "Self-attention Does Not Need O(n^2) Memory", arXiv 2112.05682; Dao et al., "FlashAttention", arXiv 2205.14135.
    """

    name: ClassVar[str] = "fused-attention"
    contract: ClassVar[Contract] = Contract.ROUNDING

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        report = self.report()
        InferShapes().run(model, ctx)
        for step in (StandardiseContrib(ATTENTIONS), RecogniseAttention()):
            part = step.run(model, ctx)
            report.changes.extend(part.changes)
            report.skips.extend(part.skips)
            if part.changes:
                InferShapes().run(model, ctx)
        found = [(n, scope) for scope in graph.scopes(model) for n in scope.graph if graph.is_op(n, "Attention")]
        names = graph.Names(model) if found else None
        fused = 0
        for node, scope in found:
            assert names is not None
            try:
                count = _take_heads(node, scope, names)
                report.changed(HEADS, graph.site(node), f"{count} nodes around it are part of it")
            except Refused as refusal:
                if graph.rank(node.inputs[0]) != 3:
                    report.skipped(HEADS, graph.site(node), str(refusal))
            reason = not_fused(node)
            fused += reason is None
            if reason is not None:
                report.skipped(KERNEL, graph.site(node), reason)
        if found:
            report.stats.update({"attentions": len(found), "fused": fused})
        return report


def _take_heads(node: ir.Node, scope: graph.Scope, names: graph.Names) -> int:
    """Make the reshapes and transpositions that split and join heads part of an Attention. Returns how many.

    Raises Refused when something else is there.
    """
    if graph.has_references(node):
        raise Refused("its attributes are parameters of the function")
    sides = [_split(value, name) for value, name in zip(node.inputs, ("query", "key", "value"), strict=False)]
    _read_sizes(node, sides, scope, names)
    turn, join = _join(node)
    split = [value for value in node.inputs[:3] if value is not None]
    for index, name in enumerate(("q_num_heads", "kv_num_heads")):
        heads = list(split[index].shape or ())[1]
        assert isinstance(heads, int)
        node.attributes.add(ir.AttrInt64(name, heads))
    for index, source in enumerate(sides):
        node.replace_input_with(index, source)
    whole, output = join.outputs[0], node.outputs[0]
    output.shape = whole.shape
    graph.replace_value(whole, output, keep_name=True)
    for unused in (join, turn):
        graph.remove_node(unused)
    return 2 + sum(_remove_unused(value) for value in dict.fromkeys(split))


def _read_sizes(node: ir.Node, sides: list[ir.Value], scope: graph.Scope, names: graph.Names) -> None:
    """Let what reads batch and length from (b, h, s, d), or from the result, read them from (b, s, h·d)."""
    turn = next((n for n, _ in node.outputs[0].uses() if _by_heads(n)), None)
    results = [(node.outputs[0], 2), (None if turn is None else turn.outputs[0], 1)]
    whole = [(value, 2, side) for value, side in zip(node.inputs, sides, strict=False)]
    whole += [(value, axis, sides[0]) for value, axis in results]
    for value, length, side in whole:

        def source(axis: int, length: int = length, side: ir.Value = side) -> tuple[ir.Value, int] | None:
            return (side, 0 if axis == 0 else 1) if axis in (0, length) else None

        for shape in [n for n, _ in value.uses() if graph.is_op(n, "Shape")] if value is not None else []:
            read_sizes_elsewhere(shape, source, scope, names)


def _remove_unused(value: ir.Value) -> int:
    """Remove what made a value that nobody reads any more: the transposition and the reshape in front of it."""
    count = 0
    for _ in range(2):
        node = value.producer()
        if node is None or graph.is_used(value) or node.inputs[0] is None:
            break
        value = node.inputs[0]
        graph.remove_node(node)
        count += 1
    return count


def _split(value: ir.Value | None, name: str) -> ir.Value:
    """x (b, s, h·d) from what Transpose (Reshape (x)) made of it, (b, h, s, d). Raises Refused."""
    turn = made_by(value, "Transpose")
    apart = turn.inputs[0] if turn is not None and _by_heads(turn) else None
    reshape = made_by(apart, "Reshape")
    if apart is None or reshape is None or reshape.inputs[0] is None:
        raise Refused(f"the {name} is not split into heads by a reshape and a transposition")
    if not _same_rows(reshape.inputs[0], apart):
        raise Refused(f"the reshape in front of the {name} is not known to only split its heads")
    return reshape.inputs[0]


def _join(node: ir.Node) -> tuple[ir.Node, ir.Node]:
    """The transposition and the reshape that join the heads of the result. Raises Refused."""
    turn = user(node.outputs[0])
    join = user(turn.outputs[0]) if turn is not None and _by_heads(turn) else None
    if turn is None or join is None or not graph.is_op(join, "Reshape"):
        raise Refused("its result is not joined by a transposition and a reshape")
    if not _same_rows(join.outputs[0], turn.outputs[0]):
        raise Refused("the reshape behind it is not known to only join its heads")
    return turn, join


def _by_heads(node: ir.Node) -> bool:
    return graph.is_op(node, "Transpose") and list(graph.attribute(node, "perm", ())) == BY_HEADS


def _same_rows(whole: ir.Value, apart: ir.Value) -> bool:
    """Whether (b, s, h·d) and (b, s, h, d), which have as many elements, have the same rows."""
    if whole.shape is None or apart.shape is None or len(whole.shape) != 3 or len(apart.shape) != 4:
        return False
    heads, size, width = apart.shape[2], apart.shape[3], whole.shape[2]
    if not (isinstance(heads, int) and isinstance(size, int) and width == heads * size):
        return False
    return any(graph.same_dim(whole.shape[i], apart.shape[i]) for i in (0, 1))  # the other one follows
