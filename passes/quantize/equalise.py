"""Cross-layer equalisation: channels between two layers are scaled alike, which the layers' weights make up for.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721. That
formula balances two weights that have one scale each. Here weights have a scale for each output channel, so what gains
is the value between the layers, which has one: its channels are brought to the same largest number, as far as the
inputs of the second layer share a scale. Between them stands nothing, Relu, or a Clip from 0: a channel that reaches
its upper end stays as it is, another may grow up to it only with room for numbers that were not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .. import graph
from .calibrate import Seen
from .constants import put_constant
from .layers import Layer
from .plan import Edit

ROOM = 2.0  # below the upper end of a Clip
MOST = 64.0  # largest factor
REACHED = 0.99  # of the upper end: such a channel is taken to be cut off


@dataclass(frozen=True)
class Pair:
    """Two layers and the value between them. end: what the value is cut off at; None: nothing cuts it."""

    first: Layer
    second: Layer
    between: ir.Value
    end: float | None


def pairs(layers: Sequence[Layer]) -> list[Pair]:
    """Neighbours with nothing but Relu or Clip between them, whose value nobody else reads."""
    by_node = {layer.node: layer for layer in layers}
    found = []
    for second in layers:
        value, end, usable = second.data, None, True
        node = value.producer()
        if graph.is_op(node, "Relu", "Clip") and node is not None:
            end, usable = _upper_end(node)
            inner = node.inputs[0]
            usable = usable and inner is not None and _only_read_once(inner)
            node = inner.producer() if inner is not None else None
        first = by_node.get(node) if node is not None else None
        if first is None or not usable or not _only_read_once(value):
            continue
        if first.is_product == second.is_product and second.groups in (1, first.channels):
            found.append(Pair(first, second, value, end))
    return found


def _only_read_once(value: ir.Value) -> bool:
    return not value.is_graph_output() and len(value.uses()) == 1


def _upper_end(node: ir.Node) -> tuple[float | None, bool]:
    """Where a Relu or Clip cuts off, and whether it may stand between two layers: numbers below 0 must become 0."""
    if node.op_type == "Relu":
        return None, True
    low, high = (graph.constant_value(graph.input_of(node, index)) for index in (1, 2))
    if low is None or low.size != 1 or float(low.reshape(-1)[0]) != 0 or (high is not None and high.size != 1):
        return None, False
    if high is None:
        return None, graph.input_of(node, 2) is None
    return float(high.reshape(-1)[0]), True


def equalising(pair: Pair, seen: Seen) -> Edit | None:
    """What the channels between two layers are divided by; None where nothing would change."""
    assert seen.channels is not None
    largest = seen.channels.largest
    live = largest > 0
    if not live.any():
        return None
    target = float(largest.max())
    wanted = np.ones(len(largest))
    wanted[live] = largest[live] / target
    if pair.second.groups == 1:  # the inputs of a channel share a scale: meet in the middle
        wanted = np.sqrt(wanted)
    wanted = np.maximum(wanted, 1 / MOST)
    if pair.end is not None:
        cut = largest >= REACHED * pair.end
        wanted = np.where(cut, 1.0, np.maximum(wanted, np.minimum(1.0, largest * ROOM / pair.end)))
    if np.all(wanted > 0.95):
        return None
    return Edit("equalise", (pair.first.site, pair.second.site), wanted.astype(np.float32))


def equalise(model: ir.Model, edit: Edit, first: Layer, second: Layer) -> None:
    """Divide the first layer's channels by the factors and multiply the second's inputs."""
    names = graph.Names(model)
    factors = edit.factors
    weight = first.matrix(first.weight()) / factors[:, None]
    put_constant(model, names, first.node, 1, first.unmatrix(weight.astype(np.float32)))
    bias = graph.constant_tensor(first.bias)
    if bias is not None:
        scaled = np.broadcast_to(bias.numpy().reshape(-1), factors.shape) / factors
        put_constant(model, names, first.node, 2, scaled.astype(np.float32))
    wide = second.matrix(second.weight()) * second.per_input(factors)
    put_constant(model, names, second.node, 1, second.unmatrix(wide.astype(np.float32)))
