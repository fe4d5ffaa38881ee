"""Scales and zero points, and codes of weights: the arithmetic of ONNX's QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .narrow_sums import Lanes

FEW_STEPS = 16  # of a grid below which scales of blocks are numbers that float16 holds too: a fifth of all bytes else
SMALLEST = 2.0**-100  # of a scale: smaller ones stand for a tensor of zeros
WIDE_SHRINKS = np.linspace(1.0, 0.4, 31)  # factors on the range of a row that the search tries, with few codes
SHRINKS = np.linspace(1.0, 0.8, 11)  # and with many, of which a large number costs less
# Tried where lanes hold the sums of codes: larger steps make them smaller.
HELD_SHRINKS = (1.0, 0.9, 0.8, 1.15, 1.3, 1.5, 1.75, 2.0, 2.35, 2.75, 3.3, 4.0)
PIECE = 1 << 18  # weights that are fitted at a time: they stay in the cache


@dataclass(frozen=True)
class Grid:
    """The codes that numbers become: whole numbers from `low` to `high`.

    symmetric: the zero point is 0, else it is a code.
    """

    low: int
    high: int
    symmetric: bool

    @property
    def steps(self) -> int:
        return self.high - self.low


@lru_cache
def data_grid(bits: int) -> Grid:
    """Of activations: unsigned, with a zero point."""
    return Grid(0, 2**bits - 1, False)


@lru_cache
def weight_grid(bits: int, symmetric: bool = True) -> Grid:
    """Of weights. 8 bits leave -128 out, so that a code can be negated; 4 bits cannot spare a sixteenth of their codes.
    6 bits are stored as int8."""
    if not symmetric:
        return Grid(0, 2**bits - 1, False)
    return Grid(-(2 ** (bits - 1)) + (bits > 4), 2 ** (bits - 1) - 1, True)


def quantize(x: np.ndarray, scale: np.ndarray, zero: np.ndarray | int, grid: Grid) -> np.ndarray:
    """clip(round(x / scale) + zero), halves to the even number, computed in float32 as ONNX does. scale and zero are
    broadcast against x. int32."""
    steps = np.rint(np.asarray(x, np.float32) / np.asarray(scale, np.float32))
    # In float32 a number beyond the grid stays beyond it; as int32 it could wrap.
    low, high = (np.float32(end) - np.asarray(zero, np.float32) for end in (grid.low, grid.high))
    return np.clip(steps, low, high).astype(np.int32) + np.asarray(zero, np.int32)


def dequantize(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | int) -> np.ndarray:
    """(codes - zero) * scale in float32."""
    return (codes.astype(np.int32) - np.asarray(zero, np.int32)).astype(np.float32) * np.asarray(scale, np.float32)


def affine(low: np.ndarray | float, high: np.ndarray | float, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Scale (float32) and zero point (int32) with which `grid` covers low..high, widened to hold 0 exactly."""
    bottom, top = np.minimum(low, 0.0).astype(np.float64), np.maximum(high, 0.0).astype(np.float64)
    if grid.symmetric:
        scale = np.maximum(top / grid.high, -bottom / -grid.low)
        scale = np.where(scale > SMALLEST, scale, 1.0).astype(np.float32)
        return scale, np.zeros(scale.shape, np.int32)
    scale = (top - bottom) / grid.steps
    scale = np.where(scale > SMALLEST, scale, 1.0).astype(np.float32)
    zero = np.clip(np.rint(grid.low - bottom / scale), grid.low, grid.high)
    return scale, zero.astype(np.int32)


@dataclass(frozen=True)
class Codes:
    """A weight matrix in codes. codes: int8, or uint8 with zero points, (channels, inputs). scale: float32 (channels,
    blocks); zero: int32 of the same shape. block: inputs that share a scale; 0: all of a channel."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    block: int

    @property
    def values(self) -> np.ndarray:
        """What the codes stand for: float32 (channels, inputs)."""
        inputs = self.codes.shape[1]
        scale, zero = (np.repeat(x, self.block or inputs, 1)[:, :inputs] for x in (self.scale, self.zero))
        return dequantize(self.codes, scale, zero)


def fit_weights(
    weights: np.ndarray, grid: Grid, block: int = 0, importance: np.ndarray | None = None, search: bool = True,
    least: np.ndarray | None = None, lanes: Lanes | None = None,
) -> Codes:  # fmt: skip
    """Codes of a matrix (channels, inputs), each row, or each `block` of a row, with a scale of its own.

    search: take of several ranges the one with the least squared error, each error weighted by `importance`
    (1 or channels, inputs): the mean square of what the weight is multiplied with. Else the range of the largest
    weight. least: (channels,) smallest scale allowed. lanes: what sums of codes are held by, of whole rows.
    """
    channels, inputs = weights.shape
    step = max(1, PIECE // max(1, inputs))
    parts = []
    for at in range(0, channels, step):
        rows = slice(at, at + step)
        of = None if importance is None else importance if len(importance) == 1 else importance[rows]
        smallest = None if least is None else least[rows]
        parts.append(_fit_rows(weights[rows], grid, block, of, search, smallest, lanes))
    codes, scale, zero = (np.concatenate([part[i] for part in parts]) for i in range(3))
    return Codes(codes, scale, zero, block)


def in_half(scale: np.ndarray) -> np.ndarray:
    """The nearest numbers that float16 holds, as float32; those below its normal ones stay as they are."""
    half = scale.astype(np.float16)
    return np.where((half >= np.finfo(np.float16).tiny) & np.isfinite(half), half.astype(np.float32), scale)


def _fit_rows(
    weights: np.ndarray, grid: Grid, block: int, importance: np.ndarray | None, search: bool,
    least: np.ndarray | None, lanes: Lanes | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and zero points of some rows."""
    channels, inputs = weights.shape
    size = block or inputs
    blocks = -(-inputs // size)

    def blocked(matrix: np.ndarray, fill: float = 0.0) -> np.ndarray:
        padded = np.full((len(matrix), blocks * size), fill, np.float32)
        padded[:, :inputs] = matrix
        return padded.reshape(len(matrix), blocks, size)

    rows = blocked(weights)
    of = None
    if importance is not None and importance.mean() > 0:
        of = blocked(importance / importance.mean(), 1.0)
    low, high = rows.min(-1, keepdims=True), rows.max(-1, keepdims=True)
    scale, zero = affine(low, high, grid)
    if search:
        _, error = _tried(rows, grid, of, scale, zero, lanes)
        shrinks = WIDE_SHRINKS if grid.steps < 64 else SHRINKS if lanes is None else HELD_SHRINKS
        for shrink in shrinks[1:]:
            candidate = affine(low * shrink, high * shrink, grid)
            _, found = _tried(rows, grid, of, *candidate, lanes)
            scale, zero, error = _better((*candidate, found), (scale, zero, error))
        # The scale that fits these codes best, by least squares; the codes are then rounded anew.
        steps, _ = _tried(rows, grid, of, scale, zero, lanes)
        weighted = steps if of is None else steps * of
        norm = np.maximum((weighted * steps).sum(-1, keepdims=True), np.float32(1e-30))
        fitted = (weighted * rows).sum(-1, keepdims=True) / norm
        fitted = np.where(fitted > SMALLEST, fitted, scale)
        _, found = _tried(rows, grid, of, fitted, zero, lanes)
        scale, zero, error = _better((fitted, zero, found), (scale, zero, error))
    if block and grid.steps < FEW_STEPS:
        scale = in_half(scale)
    if least is not None:
        scale = np.maximum(scale, least.astype(np.float32).reshape(-1, 1, 1))
    flat = quantize(rows, scale, zero, grid).reshape(channels, -1)[:, :inputs]
    flat = flat if lanes is None else lanes.held(flat)
    return np.ascontiguousarray(flat.astype(np.int8 if grid.low < 0 else np.uint8)), scale[..., 0], zero[..., 0]


def _tried(
    rows: np.ndarray, grid: Grid, of: np.ndarray | None, scale: np.ndarray, zero: np.ndarray, lanes: Lanes | None
) -> tuple[np.ndarray, np.ndarray]:
    """codes - zero as float32, and the weighted squared error of each row (.., 1); as `quantize`, but in float32
    throughout, which is exact here and several times as fast."""
    steps = rows / scale
    np.rint(steps, out=steps)
    if grid.symmetric:
        np.clip(steps, np.float32(grid.low), np.float32(grid.high), out=steps)
    else:
        np.clip(steps, (grid.low - zero).astype(np.float32), (grid.high - zero).astype(np.float32), out=steps)
    if lanes is not None:
        steps = lanes.held(steps)
    lost = steps * scale
    np.subtract(rows, lost, out=lost)
    np.multiply(lost, lost, out=lost)
    if of is not None:
        np.multiply(lost, of, out=lost)
    return steps, lost.sum(-1, keepdims=True)


Candidate = tuple[np.ndarray, np.ndarray, np.ndarray]  # scales, zero points, errors, of every row


def _better(new: Candidate, old: Candidate) -> Candidate:
    """Of each row that with the smaller error."""
    better = new[2] < old[2]
    scale, zero, error = (np.where(better, a, b) for a, b in zip(new, old, strict=True))
    return scale, zero, error


def signal_to_noise(expected: np.ndarray, found: np.ndarray) -> float:
    """10 log10 of the mean square of `expected` over that of the difference, in decibels; infinite when equal."""
    wide = expected.astype(np.float64)
    noise = float(((wide - found) ** 2).sum())
    signal = float((wide**2).sum())
    return decibels(signal, noise)


def decibels(signal: float, noise: float) -> float:
    """10 log10 (signal / noise); infinite without noise, -infinite without signal."""
    if noise == 0:
        return float("inf")
    return 10 * float(np.log10(signal / noise)) if signal > 0 else float("-inf")
