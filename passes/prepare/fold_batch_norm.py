"""The pass `fold-batch-norm`: a BatchNormalization becomes part of the weights of the convolution or product before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from .. import graph
from ..base import Contract, Pass, PassContext, PassReport

RULE = "batch-norm"
FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Scale and offset of a BatchNormalization go into the weights and bias of the operator whose result it reads.

        c = Conv (X, W, b)                                   ->    Y = Conv (X, W·f, (b - mean)·f + beta)
        Y = BatchNormalization (c, gamma, beta, mean, var)          f = gamma / sqrt(var + epsilon), per channel

    The operator is a Conv, a ConvTranspose, or a Gemm; factors are computed in float64. Weights are read when the model
    is saved, so large ones are not held in memory.
    Left alone: training; weights or statistics that are not constant; a result that is used elsewhere or is an output.
    """

    name: ClassVar[str] = "fold-batch-norm"
    contract: ClassVar[Contract] = Contract.ROUNDING

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        report, names = self.report(), None
        for scope in graph.scopes(model):
            for node in scope.graph:
                if not graph.is_op(node, "BatchNormalization") or node.domain != "" or graph.has_references(node):
                    continue
                reason = _refusal(node, scope)
                if reason is not None:
                    report.skipped(RULE, graph.site(node), reason)
                    continue
                names = names or graph.Names(model)
                before = node.inputs[0].producer()  # type: ignore[union-attr]
                assert before is not None
                report.changed(RULE, graph.site(node), f"into {before.op_type} {graph.site(before)}")
                _fold(before, node, scope, names)
        return report


def _refusal(node: ir.Node, scope: graph.Scope) -> str | None:
    value = graph.input_of(node, 0)
    before = value.producer() if value is not None else None
    if value is None or before is None or before.domain != "":
        return "no convolution or product makes its input"
    if before.op_type not in ("Conv", "ConvTranspose", "Gemm") or graph.has_references(before):
        return f"{before.op_type} makes its input, which is no convolution or Gemm"
    trains = graph.attribute(node, "training_mode", 0) or (scope.opset < 7 and not graph.attribute(node, "is_test", 0))
    if trains or any(graph.is_used(output) for output in node.outputs[1:]):
        return "it trains"
    if not graph.attribute(node, "spatial", 1):
        return "its statistics are not those of channels"
    if value.is_graph_output() or len(value.uses()) > 1:
        return f"{value.name} is used elsewhere"
    if before.graph is not node.graph:
        return f"{value.name} is made outside this graph"
    constants = [*before.inputs[1:], *node.inputs[1:5]]
    for constant in constants:
        tensor = graph.constant_tensor(constant)
        if constant is not None and (tensor is None or tensor.dtype not in FLOATS):
            return f"{constant.name} is not a constant of floats"
    weight = graph.static_shape(before.inputs[1])
    channels = graph.static_shape(node.inputs[1])
    if weight is None or channels is None or len(channels) != 1 or len(weight) < 2:
        return "the shape of the weights is not known"
    if _channels(before, weight) != channels[0]:
        return f"weights of shape {list(weight)} do not have its {channels[0]} channels"
    bias = graph.static_shape(graph.input_of(before, 2)) if graph.input_of(before, 2) is not None else channels
    return None if bias in (channels, (1, *channels), (1,), ()) else f"a bias of shape {bias}"


def _channels(before: ir.Node, weight: tuple[int, ...]) -> int:
    if before.op_type == "Conv":
        return weight[0]
    if before.op_type == "ConvTranspose":
        return weight[1] * int(graph.attribute(before, "group", 1))
    return weight[0 if graph.attribute(before, "transB", 0) else 1]


def _fold(before: ir.Node, node: ir.Node, scope: graph.Scope, names: graph.Names) -> None:
    gamma, beta, mean, variance = (_wide(graph.constant_tensor(value)) for value in node.inputs[1:5])
    with np.errstate(divide="ignore", invalid="ignore"):  # what a runtime makes of it, too
        factor = gamma / np.sqrt(variance + float(graph.attribute(node, "epsilon", 1e-5)))
    weight = graph.constant_tensor(before.inputs[1])
    assert weight is not None
    shape, dtype, groups = weight.shape.numpy(), weight.dtype, int(graph.attribute(before, "group", 1))
    op_type, transposed = before.op_type, bool(graph.attribute(before, "transB", 0))

    def scaled() -> ir.Tensor:
        whole = _wide(weight)
        if op_type == "ConvTranspose":
            parts = whole.reshape(groups, shape[0] // groups, shape[1], -1)
            whole = (parts * factor.reshape(groups, 1, shape[1], 1)).reshape(shape)
        elif op_type == "Conv" or transposed:
            whole = whole * factor.reshape(-1, *[1] * (len(shape) - 1))
        else:
            whole = whole * factor
        return ir.Tensor(whole.astype(dtype.numpy()), dtype=dtype)

    old = graph.constant_tensor(graph.input_of(before, 2))
    bias = np.zeros_like(mean) if old is None else _wide(old).reshape(-1) * float(graph.attribute(before, "beta", 1.0))
    offset = (bias - mean) * factor + beta
    first, second = (names.fresh(f"{graph.site(before)}_{what}") for what in ("weight", "bias"))
    before.resize_inputs(3)
    for index, name, tensor in (
        (1, first, ir.LazyTensor(scaled, dtype=dtype, shape=ir.Shape(shape), name=first)),
        (2, second, ir.Tensor(offset.astype(dtype.numpy()), dtype=dtype, name=second)),
    ):
        before.replace_input_with(index, graph.add_constant(scope, before, name, tensor))
    before.attributes.pop("beta", None)
    graph.replace_value(node.outputs[0], before.outputs[0], keep_name=True)
    graph.remove_node(node)


def _wide(tensor: ir.TensorProtocol | None) -> np.ndarray:
    assert tensor is not None
    return tensor.numpy().astype(np.float64)
