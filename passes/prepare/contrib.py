"""Bodies of standard operators for the smaller contributed operators of onnxruntime."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from .. import graph
from .body_builder import Body
from .contrib_call import Call
from .evaluate import Refusal

STATISTICS = "its mean or deviation is used"


def skip_layer_norm(call: Call) -> Body:
    """input + skip (+ bias), normalized; the sum is a result too."""
    call.refuse_outputs([1, 2], STATISTICS)
    _layer_norm(call, _sum(call, bias=4), 2, 3)
    return call.body


def skip_rms_norm(call: Call) -> Body:
    call.refuse_outputs([1, 2], STATISTICS)
    total, epsilon = _sum(call, bias=3), call.attr("epsilon", 1e-12)
    call.op("RMSNormalization", total, call.given(2), axis=-1, epsilon=epsilon, out="output0")
    return call.body


def _sum(call: Call, bias: int) -> str:
    total = call.op("Add", call.given(0), call.given(1))
    if call.has(bias):
        total = call.op("Add", total, call.x(bias))
    if call.wanted(3):
        call.op("Identity", total, out="output3")
    return total


def _layer_norm(call: Call, x: str, scale: int, bias: int) -> None:
    epsilon = call.attr("epsilon", 1e-12)
    call.op("LayerNormalization", x, call.given(scale), call.x(bias), axis=-1, epsilon=epsilon, out="output0")


def rms_norm(call: Call) -> Body:
    """SimplifiedLayerNormalization, which onnxruntime counts among the standard's operators."""
    call.refuse_outputs([1], STATISTICS)
    if call.attr("stash_type", 1) != 1:
        raise Refusal(f"stash_type is {call.attr('stash_type')}")
    axis, epsilon = call.attr("axis", -1), call.attr("epsilon", 1e-5)
    call.op("RMSNormalization", call.given(0), call.given(1), axis=axis, epsilon=epsilon, out="output0")
    return call.body


def layer_norm(call: Call) -> Body:
    """LayerNormalization in files of an opset that has none yet, which onnxruntime takes all the same."""
    call.refuse_outputs([1, 2], STATISTICS)
    axis, epsilon = call.attr("axis", -1), call.attr("epsilon", 1e-5)
    inputs = [call.given(0), call.given(1), call.x(2)]
    call.op("LayerNormalization", *inputs, axis=axis, epsilon=epsilon, out="output0")
    return call.body


def embed_layer_norm(call: Call) -> Body:
    """Embeddings of words, positions and segments, added and normalized; the length of each sequence by its mask."""
    ids = call.given(0)
    words = call.op("Gather", call.given(2), ids, axis=0)
    if call.has(8):
        places = call.op("Gather", call.given(3), call.x(8), axis=0)
    else:
        places = call.op("Gather", call.given(3), call.count(call.size(ids, 1)), axis=0)
    total = call.op("Add", words, places)
    if call.has(1) and call.has(4):
        total = call.op("Add", total, call.op("Gather", call.given(4), call.given(1), axis=0))
    if call.wanted(2):
        call.op("Identity", total, out="output2")
    _layer_norm(call, total, 5, 6)
    if call.wanted(1):
        if call.has(7):
            taken = call.op("Equal", call.x(7), call.op("CastLike", call.constant(1), call.x(7)))
            number = call.op("Cast", taken, to=ir.DataType.INT64)
            length = call.op("ReduceSum", number, call.constant([1]), keepdims=0)
            call.op("Cast", length, to=ir.DataType.INT32, out="output1")
        else:
            zero = ir.to_proto(ir.tensor([0], ir.DataType.INT32))
            call.op("ConstantOfShape", call.size(ids, 0), value=zero, out="output1")
    return call.body


def gelu(call: Call) -> Body:
    call.op("Gelu", call.given(0), out="output0")
    return call.body


def fast_gelu(call: Call) -> Body:
    call.op("Gelu", _biased(call), approximate="tanh", out="output0")
    return call.body


def bias_gelu(call: Call) -> Body:
    call.op("Gelu", _biased(call), out="output0")
    return call.body


def _biased(call: Call) -> str:
    return call.op("Add", call.given(0), call.given(1)) if call.has(1) else call.given(0)


def quick_gelu(call: Call) -> Body:
    slope = call.op("Mul", call.given(0), call.number(call.attr("alpha", 1.702)))
    call.op("Mul", call.given(0), call.op("Sigmoid", slope), out="output0")
    return call.body


def bias_split_gelu(call: Call) -> Body:
    first, second = call.body.ops("Split", _biased(call), outputs=2, axis=-1, num_outputs=2)
    call.op("Mul", first, call.op("Gelu", second), out="output0")
    return call.body


def bias_add(call: Call) -> Body:
    call.op("Add", _biased(call), call.given(2), out="output0")
    return call.body


def fused_matmul(call: Call) -> Body:
    """alpha · A B, either transposed in its last two axes, or with its rows as the first axis, before the batch's."""
    sides = []
    for index, last, first in ((0, "transA", "transBatchA"), (1, "transB", "transBatchB")):
        side = call.given(index)
        if call.attr(last, 0) or call.attr(first, 0):
            rank = call.rank(index)
            if rank is None:
                raise Refusal(f"the rank of input {index} is not known; run infer-shapes first")
            axes = [*range(rank)]
            if call.attr(first, 0) and rank > 2:
                axes = [*axes[1:-1], 0, axes[-1]]
            if call.attr(last, 0) and rank > 1:
                axes[-2:] = axes[:-3:-1]
            if axes != [*range(rank)]:
                side = call.op("Transpose", side, perm=axes)
        sides.append(side)
    alpha = call.attr("alpha", 1.0)
    product = call.op("MatMul", *sides, out="output0" if alpha == 1.0 else None)
    if alpha != 1.0:
        call.op("Mul", product, call.number(alpha), out="output0")
    return call.body


def fused_gemm(call: Call) -> Body:
    names = [name for name in ("alpha", "beta", "transA", "transB") if name in call.node.attributes]
    given = [call.given(0), call.given(1), call.x(2)]
    y = call.op("Gemm", *given, **{name: call.attr(name) for name in names})
    parameters = [call.attr(f"activation_{name}") for name in ("alpha", "beta")]
    _activation(call, y, [p for p in parameters if p is not None])
    return call.body


def fused_conv(call: Call) -> Body:
    y = _conv(call, call.given(0))
    if call.has(3):
        y = call.op("Add", y, call.x(3))
    _activation(call, y, call.attr("activation_params", ()))
    return call.body


def nhwc_fused_conv(call: Call) -> Body:
    """FusedConv of images whose channels are the last axis; the weights are laid out as ever."""
    rank = call.rank(0) or call.rank(1)
    if rank is None:
        raise Refusal("the rank of its input is not known; run infer-shapes first")
    first = call.op("Transpose", call.given(0), perm=[0, rank - 1, *range(1, rank - 1)])
    y = call.op("Transpose", _conv(call, first), perm=[0, *range(2, rank), 1])
    if call.has(3):
        y = call.op("Add", y, call.x(3))
    _activation(call, y, call.attr("activation_params", ()))
    return call.body


def _conv(call: Call, x: str) -> str:
    names = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
    attributes = {name: call.attr(name) for name in names if name in call.node.attributes}
    return call.op("Conv", x, call.given(1), call.x(2), **attributes)


def _activation(call: Call, x: str, parameters: tuple[float, ...] | list[float]) -> None:
    """The activation that is fused behind a product, as an operator of its own."""
    kind = call.text("activation")
    names = {"LeakyRelu": ("alpha",), "HardSigmoid": ("alpha", "beta"), "Relu": (), "Tanh": (), "Sigmoid": ()}
    if not kind:
        call.op("Identity", x, out="output0")
    elif kind == "Clip" and len(parameters) == 2:
        call.op("Clip", x, *(call.number(p) for p in parameters), out="output0")
    elif kind in names and len(parameters) >= len(names[kind]):
        values = dict(zip(names[kind], map(float, parameters), strict=False))
        call.op(kind, x, out="output0", **values)
    else:
        raise Refusal(f"its activation {kind} with {len(parameters)} parameters is not known")


def rotary_embedding(call: Call) -> Body:
    """The standard's operator takes the same tables; positions may be one number for the first of a sequence."""
    if call.attr("scale", 1.0) != 1.0 or call.attr("is_packed_batching", 0):
        raise Refusal("it is scaled, or its batch is packed")
    rank, table, positions = call.rank(0), call.last(2), call.dims(1)
    if rank not in (3, 4) or positions is None:
        raise Refusal("the rank of its input or positions is not known; run infer-shapes first")
    turned, heads = call.attr("rotary_embedding_dim", 0), call.attr("num_heads", 0)
    if rank == 3 and not heads:
        width = call.last(0)
        if turned or not table or width is None or width % (2 * table):
            raise Refusal("the number of its heads is not known")
        heads = width // (2 * table)
    x, indices = call.given(0), call.op("Cast", call.given(1), to=ir.DataType.INT64)
    if len(positions) == 1:
        length = call.size(x, rank - 2)
        run = call.op("Add", indices, call.count(length))
        indices = call.op("Expand", run, call.op("Concat", call.size(x, 0), length, axis=0))
    attributes = {"rotary_embedding_dim": turned} if turned else {}
    if rank == 3:
        attributes["num_heads"] = heads
    interleaved = call.attr("interleaved", 0)
    inputs = [x, call.given(2), call.given(3), indices]
    call.op("RotaryEmbedding", *inputs, interleaved=interleaved, out="output0", **attributes)
    return call.body


BODIES: dict[str, Callable[[Call], Body]] = {
    "BiasAdd": bias_add,
    "BiasGelu": bias_gelu,
    "BiasSplitGelu": bias_split_gelu,
    "EmbedLayerNormalization": embed_layer_norm,
    "FastGelu": fast_gelu,
    "FusedConv": fused_conv,
    "FusedGemm": fused_gemm,
    "FusedMatMul": fused_matmul,
    "Gelu": gelu,
    "NhwcFusedConv": nhwc_fused_conv,
    "QuickGelu": quick_gelu,
    "RotaryEmbedding": rotary_embedding,
    "SkipLayerNormalization": skip_layer_norm,
    "SkipSimplifiedLayerNormalization": skip_rms_norm,
}
# Operators that onnxruntime has in the standard's domain although the standard (of that opset) has not.
STRAY: dict[str, Callable[[Call], Body]] = {"LayerNormalization": layer_norm, "SimplifiedLayerNormalization": rms_norm}
STRAY_UNTIL = {"LayerNormalization": 17}  # the first opset that has it


def is_stray(node: ir.Node, opset: int) -> bool:
    """Whether the node is one of onnxruntime's operators in the standard's domain."""
    return graph.is_op(node, *STRAY) and opset < STRAY_UNTIL.get(node.op_type, 1 << 30)
