"""SmoothQuant: large channels of a product's data become smaller and the weights that read them larger.

Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv 2211.10438: factor of channel j = max|x_j|^strength / max|w_j|^(1 - strength). The strength is chosen here for
each product by the error of its result on rows of real data, and where nothing gains nothing is changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from .. import graph
from .calibrate import Seen
from .constants import new_constant, put_constant
from .layers import Layer
from .placement import comes_from_image
from .plan import Edit
from .ranges import Histogram, Method
from .scales import affine, data_grid, dequantize, fit_weights, quantize, weight_grid

STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
GAIN_ABSORBED, GAIN_MUL = 0.9, 0.6  # the error that must be left at most; a Mul costs time
MOST_CHANNELS = 512  # of the weights that strengths are compared on
NORMS = ("LayerNormalization", "RMSNormalization")


def smoothing(
    value: ir.Value, layers: Sequence[Layer], seen: Seen, bits: int, data_bits: int, method: Method,
    strength: float | None,
) -> Edit | None:  # fmt: skip
    """The edit of a value that these products read. strength: the one to take; None: the best of several, if it is
    worth it. None where there is none."""
    assert seen.channels is not None
    weights = np.concatenate([_some_rows(layer) for layer in layers])
    largest = seen.channels.largest
    heaviest = np.max([np.abs(layer.matrix(layer.weight())).max(0) for layer in layers], axis=0)
    live = (largest > 0) & (heaviest > 0)
    if not live.any():
        return None

    def factors(by: float) -> np.ndarray:
        found = np.ones(len(largest))
        found[live] = largest[live] ** by / heaviest[live] ** (1 - by)
        found[live] /= np.exp(np.log(found[live]).mean())
        return found.astype(np.float32)

    sites = (value.name or "", *(layer.site for layer in layers))
    if strength is not None:
        return Edit("smooth", sites, factors(strength))
    absorbed = absorber(value, [layer.node for layer in layers]) is not None
    if not absorbed and comes_from_image(value):
        return None
    rows = seen.rows
    plain = _error(rows, weights, np.ones(len(largest), np.float32), bits, data_bits, method)
    errors = {by: _error(rows, weights, factors(by), bits, data_bits, method) for by in STRENGTHS}
    best = min(errors, key=lambda by: errors[by])
    gain = GAIN_ABSORBED if absorbed else GAIN_MUL
    return Edit("smooth", sites, factors(best)) if errors[best] < gain * plain else None


def _some_rows(layer: Layer) -> np.ndarray:
    matrix = layer.matrix(layer.weight())
    return matrix[:: max(1, len(matrix) // MOST_CHANNELS)][:MOST_CHANNELS]


def _error(
    rows: np.ndarray, weights: np.ndarray, factors: np.ndarray, bits: int, data_bits: int, method: Method
) -> float:
    """Squared error of rows @ weights.T when both are quantized after the factors were moved."""
    data, heavier = rows / factors, weights * factors
    histogram = Histogram()
    histogram.add(data)
    grid = data_grid(data_bits)
    scale, zero = affine(*histogram.range(method, grid), grid)
    rounded = dequantize(quantize(data, scale, zero, grid), scale, zero)
    codes = fit_weights(heavier, weight_grid(bits), search=False)
    return float(((rounded @ codes.values.T - rows @ weights.T) ** 2).sum())


def absorber(value: ir.Value, readers: Sequence[ir.Node]) -> ir.Node | None:
    """The node in front of a value that can divide it by factors of the last axis: a normalization, or a product with
    a constant vector. None where there is none, or something else reads the value."""
    node = value.producer()
    if node is None or value.is_graph_output() or any(user not in readers for user, _ in value.uses()):
        return None
    width = value.shape[-1] if value.shape is not None and len(value.shape) else None
    indices = _vectors(node)
    for index in indices:
        tensor = graph.constant_tensor(graph.input_of(node, index))
        if tensor is None or list(tensor.shape.numpy()) != [width] or tensor.dtype != ir.DataType.FLOAT:
            return None
    return node if indices and not graph.has_references(node) else None


def _vectors(node: ir.Node) -> list[int]:
    """The inputs that multiply the last axis of the result."""
    if graph.is_op(node, *NORMS):
        if graph.attribute(node, "axis", -1) != -1 and not graph.last_axis(node):
            return []
        return [index for index in (1, 2) if graph.input_of(node, index) is not None]
    if graph.is_op(node, "Mul"):
        return [index for index in (0, 1) if graph.is_constant(node.inputs[index])][:1]
    return []


def smooth(model: ir.Model, edit: Edit, value: ir.Value, layers: Sequence[Layer]) -> None:
    """Divide the value by the edit's factors where these layers read it, and multiply their weights."""
    names = graph.Names(model)
    nodes = [layer.node for layer in layers]
    node = absorber(value, nodes)
    if node is not None:
        for index in _vectors(node):
            old = node.inputs[index]
            tensor = graph.constant_tensor(old)
            assert old is not None and tensor is not None
            put_constant(model, names, node, index, (tensor.numpy() / edit.factors).astype(np.float32))
    else:
        divisor = new_constant(model, names, f"{value.name}_smoothing", (1 / edit.factors).astype(np.float32))
        result = ir.Value(name=names.fresh(f"{value.name}_smooth"), type=value.type, shape=value.shape)
        mul = ir.Node("", "Mul", [value, divisor], outputs=[result], name="")
        producer = value.producer()
        if producer is None:
            model.graph.insert_before(model.graph[0], mul)
        else:
            model.graph.insert_after(producer, mul)
        for user in nodes:
            user.replace_input_with(0, result)
    for layer in layers:
        put_constant(model, names, layer.node, 1, layer.unmatrix(layer.matrix(layer.weight()) * edit.factors))
