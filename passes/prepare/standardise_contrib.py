"""The pass `standardise-contrib`: operators that onnxruntime's optimizer writes -> operators of the standard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from .. import graph
from ..base import Contract, Pass, PassContext, PassReport
from . import contrib, contrib_attention, contrib_quantized
from .bodies import inline_call
from .contrib_call import CONTRIB, Call
from .convert_opset import ConvertOpset
from .evaluate import Refusal
from .infer_shapes import InferShapes

OPSET = 23  # the first with Attention, RMSNormalization and RotaryEmbedding
BODIES = {**contrib.BODIES, **contrib_attention.BODIES, **contrib_quantized.BODIES}
ATTENTIONS = (*contrib_attention.BODIES, *contrib.STRAY)  # without strays the opset can be raised


@dataclass(frozen=True)
class StandardiseContrib(Pass):
    """Operators that only onnxruntime has (domain com.microsoft) become operators of the standard.

        Y = com.microsoft.SkipLayerNormalization    ->    s = Add (X, S)
            <epsilon> (X, S, g, b)                        Y = LayerNormalization <epsilon> (s, g, b)
        Y = com.microsoft.MultiHeadAttention        ->    Y = Attention <q_num_heads, kv_num_heads> (Q, K, V)
            <num_heads> (Q, K, V)

    onnxruntime's optimizer and Olive write them: MultiHeadAttention, Attention and GroupQueryAttention (packed or
    not, with bias, masks, rotary embedding and cache), SkipLayerNormalization, SkipSimplifiedLayerNormalization,
    SimplifiedLayerNormalization, EmbedLayerNormalization, RotaryEmbedding, Gelu, FastGelu, BiasGelu, QuickGelu,
    BiasSplitGelu, BiasAdd, FusedMatMul, FusedGemm, FusedConv and NhwcFusedConv. The model is brought to opset 23.
    Quantized operators become the operator between DequantizeLinear and QuantizeLinear: QLinearAdd, QLinearMul and
    others of that name, QGemm, DynamicQuantizeMatMul, MatMulIntegerToFloat, and MatMulNBits with 4 or 8 bits, whose
    weight becomes a constant of that width.
    A cache becomes the past with the new keys put in their places, also where sequences differ in length.
    Left alone, with the reason: forms that the standard has no words for, such as caches that share a buffer,
    attention sinks, quantized caches, and causal attention of unequal lengths; onnxruntime runs those as they are.

    Options: ops: only these operators; all when empty.
    """

    name: ClassVar[str] = "standardise-contrib"
    contract: ClassVar[Contract] = Contract.ROUNDING

    ops: tuple[str, ...] = ()  # operators to replace; all when empty

    def __post_init__(self) -> None:
        unknown = [name for name in self.ops if name not in BODIES and name not in contrib.STRAY]
        if unknown:
            raise ValueError(f"{unknown[0]} is not one of {', '.join(sorted({*BODIES, *contrib.STRAY}))}")

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        report = self.report()
        found = [node for scope in graph.scopes(model) for node in scope.graph if self._wanted(node, scope)]
        if not found:
            return report
        strays = {n: None for scope in graph.scopes(model) for n in scope.graph if contrib.is_stray(n, scope.opset)}
        found = list(dict.fromkeys([*found, *strays]))  # the opset cannot be raised with strays in it
        for node in strays:  # the version converter would look for them in the standard
            node.domain = CONTRIB
        InferShapes().run(model, ctx)
        refused = _refusals(found)
        if len(refused) == len(found):
            _leave(refused, strays, report)
            return report
        conversion = ConvertOpset(OPSET).run(model, ctx)
        if conversion.skips:
            _leave(dict.fromkeys(found, conversion.skips[0].reason), strays, report)
            return report
        for change in conversion.changes:
            if change.rule == "opset":
                report.changed(change.rule, change.value, change.detail)
        names, refused = graph.Names(model), dict.fromkeys(found, "")
        count = 0
        while refused and len(refused) != count:
            InferShapes().run(model, ctx)  # what was replaced may tell the shapes of what is left
            count = len(refused)
            refused = self._round(list(refused), names, report)
        _leave(refused, strays, report)
        if not any(node.domain == CONTRIB for node in graph.all_nodes(model)):
            for imports in (model.graph.opset_imports, *(f.opset_imports for f in model.functions.values())):
                imports.pop(CONTRIB, None)
        return report

    def _wanted(self, node: ir.Node, scope: graph.Scope) -> bool:
        if self.ops and node.op_type not in self.ops:
            return False
        return (node.domain == CONTRIB and node.op_type in BODIES) or contrib.is_stray(node, scope.opset)

    def _round(self, nodes: list[ir.Node], names: graph.Names, report: PassReport) -> dict[ir.Node, str]:
        """Replace what can be by what is known now. Returns the rest with the reasons."""
        refused: dict[ir.Node, str] = {}
        for node in nodes:
            try:
                function = _body(node)
            except Refusal as refusal:
                refused[node] = str(refusal)
                continue
            site, op_type = graph.site(node), node.op_type
            unused = [value for value in node.outputs if value.name and not graph.is_used(value)]
            for value in unused:
                value.name = None
            made = inline_call(node, function, names, [value for value in node.outputs if value.name])
            report.changed(op_type, site, f"{len(made)} nodes")
        return refused


def _refusals(nodes: Sequence[ir.Node]) -> dict[ir.Node, str]:
    """The nodes that have no body by what is known now, with the reasons."""
    refused = {}
    for node in nodes:
        try:
            _body(node)
        except Refusal as refusal:
            refused[node] = str(refusal)
    return refused


def _leave(refused: dict[ir.Node, str], strays: dict[ir.Node, None], report: PassReport) -> None:
    for node, reason in refused.items():
        node.domain = "" if node in strays else node.domain
        report.skipped(node.op_type, graph.site(node), reason)


def _body(node: ir.Node) -> ir.Function:
    if graph.has_references(node):
        raise Refusal("its attributes are parameters of the function; run inline-functions first")
    call = Call(node, OPSET)
    write = BODIES.get(node.op_type) or contrib.STRAY[node.op_type]
    return write(call).function(node, [i for i in range(len(node.outputs)) if call.wanted(i)])
