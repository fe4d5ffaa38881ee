"""Write operators that a compiler has no kernel for as operators that it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from .. import graph
from ..base import Contract, Pass, PassContext, PassReport
from . import quantized, recurrent, transformer, volumes
from .bodies import inline_call
from .body_builder import Body
from .evaluate import Refusal
from .infer_shapes import InferShapes
from .standard_bodies import standard_body

# Standard operators without a converter in the importer of TVM 0.27, as (domain, operator).
SPELLED: dict[str, Callable[[ir.Node, int, int], Body]] = {
    "AveragePool": volumes.average_pool,
    "Conv": volumes.conv,
    "ConvTranspose": volumes.conv_transpose,
    "MaxPool": volumes.max_pool,
    "LSTM": recurrent.unroll,
    "GRU": recurrent.unroll,
    "RNN": recurrent.unroll,
    "ConvInteger": quantized.conv_integer,
    "QLinearConv": quantized.qlinear_conv,
    "QLinearMatMul": quantized.qlinear_matmul,
}
# Forms that are spelled, of operators of which not every form is.
SPELLED_FORMS: dict[str, Callable[[ir.Node], bool]] = dict.fromkeys(
    ("AveragePool", "Conv", "ConvTranspose", "MaxPool"), volumes.along_three_axes
)
# Shorter than the standard's body, for the forms that are usual.
SHORT: dict[str, Callable[[ir.Node, int, int], Body]] = {
    "Attention": transformer.attention,
    "RotaryEmbedding": transformer.rotary_embedding,
}
WITH_BODY = frozenset(
    {"Attention", "BlackmanWindow", "CausalConvWithState", "Celu", "CenterCropPad", "HammingWindow", "HannWindow",
     "LinearAttention", "NegativeLogLikelihoodLoss", "RotaryEmbedding", "SoftmaxCrossEntropyLoss", "SwiGLU",
     "Swish"}
)  # fmt: skip

# Operators that are left whole for targets of that name, or whose name begins with it and a dash: there is a kernel.
_ON_CPUS = frozenset({"Attention", "GRU", "LSTM", "RNN", "RotaryEmbedding", "Swish"})
KERNELS: dict[str, frozenset[str]] = dict.fromkeys(("cpu", "arm64", "armv7", "riscv64"), _ON_CPUS)
# Whether a kernel takes the form of a node, for operators of which it does not take every form.
FORMS: dict[str, Callable[[ir.Node], bool]] = {
    "Attention": transformer.fused_attention,
    "GRU": recurrent.recurrent_kernel,
    "LSTM": recurrent.recurrent_kernel,
    "RNN": recurrent.recurrent_kernel,
    "RotaryEmbedding": transformer.rotary_kernel,
}


@dataclass(frozen=True)
class Decompose(Pass):
    """Replace operators that the compiler refuses by operators that it has.

        {  Y = Swish (X)  }        ->   {  s = Sigmoid (X)
                                           Y = Mul (X, s)  }

    LSTM, GRU and RNN that no kernel takes (weights that are computed, clip, peepholes, batch first, unusual
    activations) are unrolled when their number of steps is fixed. QLinearConv, QLinearMatMul and ConvInteger
    become the float operator between DequantizeLinear and QuantizeLinear. Convolutions and pools along three axes
    become those of pictures, whose channels are those of the depths that meet. Attention, RotaryEmbedding, Swish, Celu
    and other standard operators that the standard defines by a body get that body, or a shorter one where they have
    their usual form.
    Operators in a form that the target has a kernel for, and those named by `keep`, stay.
    Left alone, with the reason: recurrences of free length or of more than max_steps steps, and bodies that
    need what is not known. Meant for compiling: onnxruntime has kernels for these operators.
    """

    name: ClassVar[str] = "decompose"
    contract: ClassVar[Contract] = Contract.ROUNDING

    max_steps: int = 256  # longest recurrence that is unrolled; each step is about ten nodes
    ops: tuple[str, ...] = ()  # further standard operators to replace by the body that the standard gives
    keep: tuple[str, ...] = ()  # operators to leave whole, besides those that the target has kernels for

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        report = self.report()
        refused: set[ir.Node] = set()
        kernels = kept_whole(ctx.target)

        def wanted(node: ir.Node) -> bool:
            if node.domain != "" or node.op_type in self.keep:
                return False
            if node.op_type in kernels and FORMS.get(node.op_type, lambda _: True)(node):
                return False
            if node.op_type in SPELLED_FORMS and node.op_type not in self.ops:
                return SPELLED_FORMS[node.op_type](node)
            return node.op_type in SPELLED or node.op_type in WITH_BODY or node.op_type in self.ops

        while self._round(model, wanted, refused, report):
            InferShapes().run(model, ctx)  # bodies hold operators that are decomposed in turn, by their types
        return report

    def _round(
        self, model: ir.Model, wanted: Callable[[ir.Node], bool], refused: set[ir.Node], report: PassReport
    ) -> bool:
        """Replace what there is now. Returns whether the bodies hold more."""
        names: graph.Names | None = None
        more = False
        for scope in graph.scopes(model):
            for node in [node for node in scope.graph if wanted(node) and node not in refused]:
                site, op_type = graph.site(node), node.op_type
                try:
                    function = self._body(node, scope)
                except Refusal as refusal:
                    refused.add(node)
                    report.skipped("decompose", site, f"{op_type}: {refusal}")
                    continue
                names = names or graph.Names(model)
                outputs = [value for value in node.outputs if value.name]
                made = inline_call(node, function, names, outputs)
                report.changed("decompose", site, f"{op_type}: {len(made)} nodes")
                more = more or any(wanted(node) for node in made)
        return more

    def _body(self, node: ir.Node, scope: graph.Scope) -> ir.Function:
        if graph.has_references(node):
            raise Refusal("its attributes are parameters of the function; run inline-functions first")
        if node.op_type in SPELLED:
            return SPELLED[node.op_type](node, scope.opset, self.max_steps).function(node)
        if node.op_type in SHORT:
            try:
                return SHORT[node.op_type](node, scope.opset, self.max_steps).function(node)
            except Refusal:
                pass  # a form that only the standard's body covers
        return standard_body(node, scope.opset)


def kept_whole(target: str | None) -> frozenset[str]:
    """The operators that the target has kernels for."""
    names = [] if target is None else [name for name in KERNELS if target == name or target.startswith(f"{name}-")]
    return frozenset().union(*(KERNELS[name] for name in names))
