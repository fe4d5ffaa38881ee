"""The pass `fold-pad`: a Pad becomes part of the convolution or pooling behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from .. import graph
from ..base import Contract, Pass, PassContext, PassReport

RULE = "pad"
WINDOWS = ("Conv", "MaxPool", "AveragePool")
NEVER_NEGATIVE = ("Relu", "Sigmoid", "HardSigmoid", "Softplus", "Abs", "Exp", "Softmax", "Sqrt")


@dataclass(frozen=True)
class FoldPad(Pass):
    """What a Pad adds to an image is added by the convolution or pooling that reads it.

        {  a = Pad (X, [0, 0, 0, 0, 0, 0, 1, 1])     ->   {  Y = Conv <pads = [0, 0, 1, 1]> (X, W)  }
           Y = Conv (a, W)  }

    So exports write the padding of TensorFlow and Keras. The Pad adds zeros in front of a Conv or an AveragePool; in
    front of a MaxPool it adds minus infinity, or zeros to what is never negative, such as the result of a Relu. The Pad
    stays where something else reads it too.
    Left alone: a Pad that repeats or mirrors the image, cuts it, or pads batch or channels; numbers that are not
    constant; auto_pad of SAME; a pooling with ceil_mode, or whose padding would be as large as its window.
    """

    name: ClassVar[str] = "fold-pad"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        report = self.report()
        for scope in graph.scopes(model):
            for node in scope.graph:
                pad = _pad_of(node)
                if pad is None:
                    continue
                reason = _fold(node, pad, scope)
                if reason is not None:
                    report.skipped(RULE, graph.site(node), reason)
                    continue
                report.changed(RULE, graph.site(node), f"Pad {graph.site(pad)} into {node.op_type}")
        return report


def _pad_of(node: ir.Node) -> ir.Node | None:
    if not graph.is_op(node, *WINDOWS):
        return None
    value = graph.input_of(node, 0)
    pad = value.producer() if value is not None else None
    return pad if pad is not None and graph.is_op(pad, "Pad") else None


def _fold(node: ir.Node, pad: ir.Node, scope: graph.Scope) -> str | None:
    """Let the node pad. The reason why it cannot, or None."""
    source = graph.input_of(pad, 0)
    if graph.has_references(node) or graph.has_references(pad) or source is None:
        return "its attributes are those of a function's call"
    rank = graph.rank(source)
    if rank is None:
        window = graph.attribute(node, "kernel_shape", ())
        rank = graph.rank(node.inputs[1]) if node.op_type == "Conv" else 2 + len(window)
    if rank is None or rank < 3:
        return f"{source.name} is not known to be an image"
    if graph.attribute(pad, "mode", "constant") != "constant":
        return "the Pad repeats parts of the image"
    added, number = _added(pad, rank, scope), _number(pad, scope)
    if added is None or number is None:
        return "what the Pad adds is not constant"
    if min(added) < 0 or any((*added[:2], *added[rank : rank + 2])):
        return f"pads of {added} are not those of an image"
    if graph.attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "auto_pad goes by the size of the padded image"
    here = [int(n) for n in graph.attribute(node, "pads", ())] or [0] * (2 * (rank - 2))
    both = [n + more for n, more in zip(here, [*added[2:rank], *added[rank + 2 :]], strict=True)]
    attributes = [ir.AttrString("auto_pad", "NOTSET"), ir.AttrInt64s("pads", both)]
    if node.op_type == "Conv":
        if number != 0:
            return f"the Pad adds {number:g}, a convolution 0"
    else:
        reason = _pool_refusal(node, scope, source, number, any(here), both)
        if reason is not None:
            return reason
        if node.op_type == "AveragePool":
            attributes.append(ir.AttrInt64("count_include_pad", 1))
    for attribute in attributes:
        if attribute.name != "auto_pad" or "auto_pad" in node.attributes:
            node.attributes.add(attribute)
    node.replace_input_with(0, source)
    return None


def _added(pad: ir.Node, rank: int, scope: graph.Scope) -> list[int] | None:
    """What is added in front of each axis, then behind each; None where it is not known."""
    given = graph.attribute(pad, "pads") if scope.opset < 11 else graph.constant_ints(graph.input_of(pad, 1))
    if given is None:
        return None
    axes: Sequence[int] | None = range(rank)
    if graph.input_of(pad, 3) is not None:
        axes = graph.constant_ints(graph.input_of(pad, 3))
    if axes is None or len(given) != 2 * len(axes):
        return None
    added = [0] * (2 * rank)
    for number, axis in enumerate(axes):
        added[axis % rank] = int(given[number])
        added[rank + axis % rank] = int(given[len(axes) + number])
    return added


def _number(pad: ir.Node, scope: graph.Scope) -> float | None:
    """What the Pad fills with; None where it is not known."""
    if scope.opset < 11:
        return float(graph.attribute(pad, "value", 0.0))
    value = graph.input_of(pad, 2)
    if value is None:
        return 0.0
    array = graph.constant_value(value)
    return None if array is None or array.size != 1 else float(array.reshape(-1)[0])


def _pool_refusal(
    node: ir.Node, scope: graph.Scope, source: ir.Value, number: float, pads_already: bool, both: Sequence[int]
) -> str | None:
    kernel = [int(n) for n in graph.attribute(node, "kernel_shape", ())]
    if graph.attribute(node, "ceil_mode", 0):
        return "with ceil_mode the last window must begin inside the image"
    if any(n >= size for n, size in zip(both, [*kernel, *kernel], strict=True)):
        return f"pads of {list(both)} are as large as windows of {kernel}"
    if node.op_type == "AveragePool":
        if number != 0:
            return f"the Pad adds {number:g}, the mean 0"
        if scope.opset < 7 or (pads_already and not graph.attribute(node, "count_include_pad", 0)):
            return "its own padding does not count"
        return None
    if any(graph.is_used(output) for output in node.outputs[1:]):
        return "its places are those in the padded image"
    if number == -np.inf:
        return None
    if number != 0 or not _never_negative(source):
        return f"the Pad adds {number:g}, which may be the greatest of a window"
    # Every window then holds a number of the image, which no zero exceeds unless it is one.
    return None if all(n == 1 for n in graph.attribute(node, "dilations", ())) else "its windows may miss the image"


def _never_negative(value: ir.Value) -> bool:
    node = value.producer()
    if node is None:
        return False
    if graph.is_op(node, "Clip"):
        least = graph.constant_value(graph.input_of(node, 1)) if len(node.inputs) > 1 else None
        given = graph.attribute(node, "min") if least is None else float(least.reshape(-1)[0])
        return given is not None and given >= 0
    return graph.is_op(node, *NEVER_NEGATIVE)
