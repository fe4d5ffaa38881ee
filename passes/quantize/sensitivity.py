"""What a layer's quantization costs the outputs, and which width each layer gets for it.

Source: FMPQ: zeta_n(b) is the loss with only layer n at b bits; each layer takes the lowest width whose zeta is below
a threshold, which is bisected until the mean width is the one asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ..base import Evaluator
from ..quality import Drops, caches, counts
from .calibrate import Feeds

HELD_BYTES = 256 << 20  # of the original's outputs that are kept between measurements


class Judge:
    """Measures how far a model's outputs are from the original's: the largest, over the outputs, of 1 - the mean
    cosine of rows."""

    def __init__(
        self, original: ir.Model, feeds: Sequence[Feeds], evaluator: Evaluator, outputs: Sequence[str] = ()
    ) -> None:
        self._feeds, self._evaluator, self._original = list(feeds), evaluator, original
        values = [value for value in original.graph.outputs if not value.is_graph_input()]
        left_out = set() if outputs else caches(original)
        self.names = [v.name or "" for v in values if v.name not in left_out and (not outputs or v.name in outputs)]
        self._held: dict[tuple[int, str], np.ndarray] = {}
        self._complete = False

    def drop(self, model: ir.Model) -> float:
        """0 when all outputs are equal."""
        drops, held = Drops(), 0
        theirs = None if self._complete else self._evaluator(self._original, self.names, self._feeds)
        for number, name, found in self._evaluator(model, self.names, self._feeds):
            if theirs is None:
                expected = self._held[number, name]
            else:
                expected = next(theirs)[2]
                held += expected.nbytes
                if held <= HELD_BYTES:
                    self._held[number, name] = expected
            if counts(expected):
                drops.add(name, expected, found, self._feeds[number])
        if held <= HELD_BYTES:
            self._complete = True
        else:
            self._held.clear()
        return max(drops.means().values(), default=0.0)


def allot(damages: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], mean_bits: float) -> dict[str, int]:
    """The width of each layer: its lowest whose damage is at most a threshold, the smallest threshold with which the
    mean width, weighted by `sizes`, is at most `mean_bits`; a layer above the threshold at every width takes its
    widest. Without any such threshold all take their lowest."""
    thresholds = sorted({0.0, *(damage for widths in damages.values() for damage in widths.values())})

    def widths(threshold: float) -> dict[str, int]:
        return {
            site: min((bits for bits, damage in found.items() if damage <= threshold), default=max(found))
            for site, found in damages.items()
        }

    total = sum(sizes[site] for site in damages)

    def mean(chosen: Mapping[str, int]) -> float:
        return sum(bits * sizes[site] for site, bits in chosen.items()) / max(total, 1)

    low, high = 0, len(thresholds) - 1
    if mean(widths(thresholds[high])) > mean_bits:
        return {site: min(found) for site, found in damages.items()}
    while low < high:
        middle = (low + high) // 2
        if mean(widths(thresholds[middle])) <= mean_bits:
            high = middle
        else:
            low = middle + 1
    return widths(thresholds[low])


def fewest(order: Sequence[str], holds: Callable[[int], bool]) -> int:
    """How many of the first in `order` must go so that `holds`, which is true of all. Bisected: more never hurts."""
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
