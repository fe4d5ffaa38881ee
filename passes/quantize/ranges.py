"""Which range of an activation its codes should cover: histograms over samples, and four ways to read them.

Bins have widths that are powers of two, so that a histogram of more samples, or of two values together, is the exact
sum of the parts, in any order. Sources of the methods: Migacz, "8-bit inference with TensorRT" (entropy);
Nagel et al., "A White Paper on Neural Network Quantization", arXiv 2106.08295 (percentile, MSE).
"""

from __future__ import annotations

import enum

import numpy as np

from .scales import Grid, affine, dequantize, quantize

SIDE = 4096  # bins of each sign
LEAST = -100  # exponent of the narrowest histogram
KEPT = 0.9999  # of the numbers, by percentile
RANGES = 2.0 ** (-np.arange(41) / 8)  # parts of the largest number that are tried as the end of the range
FEWEST_BINS = 128  # of the shortest range that entropy tries: as many as it makes of them


class Method(enum.Enum):
    """How a range is chosen."""

    MINMAX = "minmax"  # everything that was seen
    PERCENTILE = "percentile"  # 99.99 % of it
    ENTROPY = "entropy"  # least Kullback-Leibler divergence from what was seen
    MSE = "mse"  # least squared error


class NotFinite(ValueError):
    """NaN or infinity, for which there is no range."""


class Histogram:
    """How often a tensor, or each of its channels, took which numbers.

    counts: (channels, 2 SIDE), bins of width 2^exponent / SIDE from -2^exponent to 2^exponent. low, high: (channels,),
    what was seen exactly. total, squares: (channels,) sums of the numbers and of their squares; count: how many.
    """

    def __init__(self, channels: int = 1) -> None:
        self.counts = np.zeros((channels, 2 * SIDE), np.int64)
        self.exponent = np.full(channels, LEAST)
        self.low, self.high = np.full(channels, np.inf), np.full(channels, -np.inf)
        self.total, self.squares = np.zeros(channels), np.zeros(channels)
        self.count = 0

    def add(self, x: np.ndarray, axis: int | None = None) -> None:
        """Take in a tensor; axis: that of its channels. Raises NotFinite."""
        channels = len(self.exponent)
        rows = x.reshape(1, -1) if axis is None else np.moveaxis(x, axis, 0).reshape(channels, -1)
        rows = np.ascontiguousarray(rows, np.float32)
        if not rows.size:
            return
        low, high = rows.min(1).astype(np.float64), rows.max(1).astype(np.float64)
        if not np.isfinite([low, high]).all():
            raise NotFinite("holds NaN or infinity")
        largest = np.maximum(-low, high)
        self._widen(np.where(largest > 0, np.frexp(largest)[1], LEAST))
        places = rows * (SIDE * np.exp2(-self.exponent)).astype(np.float32)[:, None]
        np.floor(places, out=places)
        places = places.astype(np.int64) + SIDE + np.arange(channels)[:, None] * 2 * SIDE
        self.counts += np.bincount(places.ravel(), minlength=self.counts.size).reshape(self.counts.shape)
        self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)
        self.total += rows.sum(1, dtype=np.float64)
        self.squares += np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
        self.count += rows.shape[1]

    def merge(self, other: Histogram) -> None:
        """Take in another's numbers, exactly as if they had been added here."""
        exponent = np.maximum(self.exponent, other.exponent)
        self._widen(exponent)
        self.counts += np.stack(
            [_folded(row, by) for row, by in zip(other.counts, exponent - other.exponent, strict=True)]
        )
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        self.total, self.squares = self.total + other.total, self.squares + other.squares
        self.count += other.count

    def _widen(self, exponent: np.ndarray) -> None:
        wider = np.maximum(self.exponent, exponent)
        for channel in np.flatnonzero(wider > self.exponent):
            self.counts[channel] = _folded(self.counts[channel], wider[channel] - self.exponent[channel])
        self.exponent = wider

    @property
    def largest(self) -> np.ndarray:
        """(channels,): the largest absolute number; 0 where nothing was seen."""
        return np.maximum(np.maximum(-self.low, self.high), 0.0) if self.count else np.zeros(len(self.exponent))

    @property
    def mean(self) -> np.ndarray:
        return self.total / max(self.count, 1)

    @property
    def mean_square(self) -> np.ndarray:
        return self.squares / max(self.count, 1)

    def range(self, method: Method, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
        """(low, high), each (channels,), that `grid` should cover; zeros where nothing was seen."""
        found = [self._range(channel, method, grid) for channel in range(len(self.exponent))]
        return np.array([low for low, _ in found]), np.array([high for _, high in found])

    def _range(self, channel: int, method: Method, grid: Grid) -> tuple[float, float]:
        low, high = float(self.low[channel]), float(self.high[channel])
        if low > high:
            return 0.0, 0.0
        if method is Method.MINMAX or low == high:
            return low, high
        edges = (np.arange(2 * SIDE + 1) - SIDE) * 2.0 ** self.exponent[channel] / SIDE
        counts = self.counts[channel]
        if method is Method.PERCENTILE:
            return _percentile(counts, edges, low, high)
        seen = np.flatnonzero(counts)
        centres = np.clip((edges[:-1] + edges[1:]) / 2, low, high)
        if method is Method.MSE:
            return least_error(centres[seen], counts[seen], low, high, grid)
        return _entropy(counts, edges, low, high)


def _folded(counts: np.ndarray, by: int) -> np.ndarray:
    """The same numbers in bins 2^by as wide."""
    if not by or not counts.any():
        return counts
    result = np.zeros_like(counts)
    if 1 << min(int(by), 62) >= SIDE:
        result[SIDE - 1], result[SIDE] = counts[:SIDE].sum(), counts[SIDE:].sum()
        return result
    folded = counts.reshape(-1, 1 << int(by)).sum(1)
    start = SIDE - len(folded) // 2
    result[start : start + len(folded)] = folded
    return result


def _percentile(counts: np.ndarray, edges: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """The range that leaves out at most (1 - KEPT) / 2 of the numbers at each end."""
    cut = (1 - KEPT) / 2 * counts.sum()
    first = int(np.searchsorted(np.cumsum(counts), cut, "right"))
    last = len(counts) - 1 - int(np.searchsorted(np.cumsum(counts[::-1]), cut, "right"))
    return max(low, float(edges[first])), min(high, float(edges[last + 1]))


def least_error(numbers: np.ndarray, counts: np.ndarray, low: float, high: float, grid: Grid) -> tuple[float, float]:
    """The range with the least squared error of `numbers`, each as often as `counts` says: both ends shrunk together
    first, then each by itself."""

    def error(bottom: np.ndarray, top: np.ndarray) -> np.ndarray:
        scale, zero = affine(bottom[:, None], top[:, None], grid)
        found = dequantize(quantize(numbers[None], scale, zero, grid), scale, zero)
        return ((found - numbers) ** 2 * counts).sum(1)

    ends = np.array([min(low, 0.0), max(high, 0.0)])
    parts = np.ones(2)

    def choose(ends_tried: np.ndarray) -> np.ndarray:
        """ends_tried: (candidates, 2) parts of both ends."""
        return ends_tried[int(np.argmin(error(ends_tried[:, 0] * ends[0], ends_tried[:, 1] * ends[1])))]

    parts = choose(np.stack([RANGES, RANGES], 1))
    if ends.all():
        for side in (0, 1, 0):
            tried = np.tile(parts, (len(RANGES), 1))
            tried[:, side] = RANGES
            parts = choose(tried)
    return float(ends[0] * parts[0]), float(ends[1] * parts[1])


def _entropy(counts: np.ndarray, edges: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """The symmetric range -t..t, cut to what was seen, whose FEWEST_BINS steps a side tell most of the numbers' sizes.

    The numbers beyond t are counted at t; D(P || Q) compares what was seen with what the steps leave of it.
    """
    sizes = counts[SIDE:] + counts[:SIDE][::-1]
    width = edges[1] - edges[0]
    last = int(np.flatnonzero(sizes)[-1]) + 1
    best, chosen = np.inf, last
    for bins in range(FEWEST_BINS, last + 1, max(1, (last - FEWEST_BINS) // 256)):
        inside = sizes[:bins].astype(np.float64)
        seen = inside.copy()
        seen[-1] += sizes[bins:].sum()
        steps = np.arange(bins) * FEWEST_BINS // bins
        filled = inside > 0
        total = np.bincount(steps, inside, FEWEST_BINS)
        places = np.bincount(steps, filled, FEWEST_BINS)
        spread = np.where(filled, total[steps] / np.maximum(places[steps], 1), 0.0)
        p, q = seen / seen.sum(), spread / max(spread.sum(), 1.0)
        at = p > 0
        # A step that lost all its numbers to the clipping would make the divergence infinite.
        divergence = float((p[at] * np.log(p[at] / np.maximum(q[at], 1e-12))).sum())
        if divergence < best:
            best, chosen = divergence, bins
    end = chosen * width
    return max(low, -end), min(high, end)
