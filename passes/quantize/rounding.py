"""Rounding weights so that the errors of a row cancel on real data, instead of each to its nearest code.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv
2210.17323. Inputs are rounded one after the other, those with the largest numbers first, and what each loses is made
up for by those that are left, by the Cholesky factor of the inverse of X'X, X being what the weights are multiplied
with. Scales are chosen before and stay.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .. import graph
from .layers import Layer
from .narrow_sums import Lanes
from .scales import Codes, Grid, dequantize, quantize

MOST_INPUTS = 4608  # of a row; X'X of more takes too much memory
POSITIONS = 1024  # of an image that are taken in
DAMPING = 0.01  # of the mean diagonal of X'X, added to it
PIECE = 1 << 20  # weights that are rounded at a time
FEW_INPUTS = 64  # of a row, up to which its scale is chosen by what rounding together leaves
FACTORS = np.setdiff1d(np.linspace(0.8, 1.2, 41), 1.0)  # on such a scale that are tried
BLOCK = 128  # inputs after which the rest is made up for at once


def can_be_rounded(layer: Layer) -> bool:
    """Whether what the layer multiplies its weights with can be told from its data."""
    if layer.is_product:
        return layer.size // layer.channels <= MOST_INPUTS
    node = layer.node
    padded = graph.attribute(node, "auto_pad", "NOTSET") == "NOTSET"
    grouped = layer.groups == 1 or layer.shape[1] == 1
    images = len(layer.shape) == 4
    return node.op_type == "Conv" and padded and grouped and images and layer.size // layer.channels <= MOST_INPUTS


def products(layer: Layer, data: np.ndarray) -> np.ndarray:
    """X'X of one sample: (groups, inputs, inputs) float32, X being the rows that the weights are multiplied with."""
    rows = data.reshape(1, -1, data.shape[-1]) if layer.is_product else _windows(layer, data)
    return np.matmul(rows.swapaxes(1, 2), rows)


def _windows(layer: Layer, data: np.ndarray) -> np.ndarray:
    """(groups, positions, inputs): the windows of a convolution at up to POSITIONS places."""
    node = layer.node
    height, width = layer.shape[2:]
    pads = graph.attribute(node, "pads", (0, 0, 0, 0))
    strides, dilations = (graph.attribute(node, name, (1, 1)) for name in ("strides", "dilations"))
    x = np.pad(data, [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])])
    reach = [(size - 1) * dilation + 1 for size, dilation in zip((height, width), dilations, strict=True)]
    views = np.lib.stride_tricks.sliding_window_view(x, reach, (2, 3))
    views = views[:, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
    batch, channels, rows, columns = views.shape[:4]
    count = batch * rows * columns
    chosen = np.arange(0, count, max(1, count // POSITIONS))[:POSITIONS]
    n, i, j = np.unravel_index(chosen, (batch, rows, columns))
    picked = views[n, :, i, j].reshape(len(chosen), channels, height * width)
    if layer.groups == 1:
        return picked.reshape(1, len(chosen), -1)
    return np.ascontiguousarray(picked.swapaxes(0, 1))


def fit_together(
    weights: np.ndarray, codes: Codes, grid: Grid, gram: np.ndarray, lanes: Lanes | None = None,
    least: np.ndarray | None = None,
) -> Codes:  # fmt: skip
    """`round_together`, for rows of few inputs with several scales around those of `codes`: of each row the one with
    which its results are nearest. The errors of many inputs are alike with all scales, those of few are not. least:
    (channels,) smallest scale allowed."""
    best = round_together(weights, codes, grid, gram, lanes)
    if codes.block or weights.shape[1] > FEW_INPUTS:
        return best
    error = _errors(weights - best.values, gram)
    for factor in FACTORS:
        scale = codes.scale * np.float32(factor)
        scale = scale if least is None else np.maximum(scale, least.astype(np.float32)[:, None])
        nearest = quantize(weights, scale, codes.zero, grid)
        nearest = (nearest if lanes is None else lanes.held(nearest)).astype(codes.codes.dtype)
        found = round_together(weights, replace(codes, codes=nearest, scale=scale), grid, gram, lanes)
        lost = _errors(weights - found.values, gram)
        better = (lost < error)[:, None]
        error = np.minimum(lost, error)
        best = replace(best, codes=np.where(better, found.codes, best.codes), scale=np.where(better, scale, best.scale))
    return best


def round_together(
    weights: np.ndarray, codes: Codes, grid: Grid, gram: np.ndarray, lanes: Lanes | None = None
) -> Codes:
    """The codes of a matrix (channels, inputs) with the same scales, rounded together. gram: (groups, inputs, inputs)
    X'X. lanes: what sums of codes are held by. A row that ends with a larger error on X than before keeps its codes."""
    channels, inputs = weights.shape
    groups = len(gram)
    matrix = gram.astype(np.float64)
    diagonal = np.einsum("gii->gi", matrix).copy()
    mean = diagonal.mean(1, keepdims=True)
    alive = (mean > 0)[:, 0]
    if not alive.any():
        return codes
    damping = np.where(mean > 0, DAMPING * mean, 1.0)
    matrix[:, range(inputs), range(inputs)] += damping
    order = np.argsort(-diagonal.sum(0), kind="stable")
    back = np.argsort(order)
    matrix = matrix[:, order][:, :, order]
    factor = np.linalg.cholesky(np.linalg.inv(matrix)).swapaxes(1, 2).astype(np.float32)
    rows_of = channels // groups
    scale, zero = (np.repeat(x, codes.block or inputs, 1)[:, :inputs][:, order] for x in (codes.scale, codes.zero))
    shaped = weights[:, order].reshape(groups, rows_of, inputs)
    scale, zero = scale.reshape(shaped.shape), zero.reshape(shaped.shape)
    step = max(1, PIECE // (groups * inputs))
    moved = None if lanes is None else lanes.reordered(order)
    parts = [
        _rounded(shaped[:, at : at + step], scale[:, at : at + step], zero[:, at : at + step], grid, factor, moved)
        for at in range(0, rows_of, step)
    ]
    new = np.concatenate(parts, 1).reshape(channels, inputs)[:, back].astype(codes.codes.dtype)
    together = replace(codes, codes=new)
    better = _errors(weights - together.values, gram) < _errors(weights - codes.values, gram)
    return replace(codes, codes=np.where(better[:, None], new, codes.codes))


def _rounded(
    weights: np.ndarray, scale: np.ndarray, zero: np.ndarray, grid: Grid, factor: np.ndarray, lanes: Lanes | None
) -> np.ndarray:
    """Codes int32 of (groups, rows, inputs), whose inputs are in the order of rounding. factor: upper triangles."""
    left = weights.astype(np.float32).copy()
    codes = np.zeros(left.shape, np.int32)
    room = None if lanes is None else lanes.room(left.shape[:-1])
    inputs = left.shape[-1]
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        errors = np.zeros((*left.shape[:2], end - start), np.float32)
        for j in range(start, end):
            one = left[..., j]
            nearest = quantize(one, scale[..., j], zero[..., j], grid)
            codes[..., j] = nearest if room is None else room.take(nearest, j)
            lost = one - dequantize(codes[..., j], scale[..., j], zero[..., j])
            error = lost / factor[:, j, j, None]
            errors[..., j - start] = error
            left[..., j + 1 : end] -= error[..., None] * factor[:, None, j, j + 1 : end]
        left[..., end:] -= errors @ factor[:, start:end, end:]
    return codes


def _errors(lost: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """(channels,): squared error of each channel's results, up to a constant."""
    grouped = lost.reshape(len(gram), -1, lost.shape[-1])
    return (np.matmul(grouped, gram) * grouped).sum(-1).reshape(-1)
