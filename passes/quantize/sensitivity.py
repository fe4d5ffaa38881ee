"""What a layer's quantization costs the outputs, and which width each layer gets for it.

Source: FMPQ: zeta_n(b) is the loss with only layer n at b bits; each layer takes the lowest width whose zeta is below
a threshold, which is bisected until the mean width is the one asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from .. import graph
from ..base import Evaluator
from ..quality import Drops, caches, counts
from .calibrate import Feeds

RIVALS = 10  # classes behind the first whose errors are looked at
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


class Flips:
    """Expects, of rows whose largest number says what class they are of, in which part another becomes the largest.

    Counting would need thousands of rows. Instead errors are measured on some, which tells the spread of what they do
    to the difference of two classes; margins, the differences of the two largest numbers of a row in the original, on
    many; and a margin is taken to be turned by a normal error of that spread. Numbers that are probabilities are taken
    by their logarithms.
    """

    def __init__(
        self, original: ir.Model, output: str, feeds: Sequence[Feeds], judged: Sequence[Feeds], evaluator: Evaluator
    ) -> None:
        self._output, self._judged, self._evaluator = output, list(judged), evaluator
        self._margins = np.concatenate([_margins(rows) for rows in self._rows(original, feeds)])
        self._expected = list(self._rows(original, judged))

    def _rows(self, model: ir.Model, feeds: Sequence[Feeds]) -> Iterator[np.ndarray]:
        for _, _, array in self._evaluator(model, [self._output], feeds):
            yield _as_logits(array.astype(np.float64))

    def share(self, model: ir.Model) -> float:
        """Of rows, that are expected to change their class in this model."""
        squares = []
        for expected, found in zip(self._expected, self._rows(model, self._judged), strict=True):
            rivals = np.argsort(-expected, -1)[:, : RIVALS + 1]
            errors = np.take_along_axis(found - expected, rivals, -1)
            squares.append(np.square(errors[:, 1:] - errors[:, :1]).reshape(-1))
        spread = float(np.sqrt(np.concatenate(squares).mean()))
        if not spread:
            return 0.0
        return float(np.mean([0.5 * math.erfc(margin / spread / math.sqrt(2)) for margin in self._margins]))


def _as_logits(rows: np.ndarray) -> np.ndarray:
    sums = rows.sum(-1)
    if rows.min() < 0 or not np.allclose(sums, 1, atol=1e-3):
        return rows
    return np.log(np.maximum(rows, np.finfo(np.float32).tiny))


def _margins(rows: np.ndarray) -> np.ndarray:
    """(rows,): by how much the largest number of each is ahead of the second."""
    top = np.partition(rows, -2, -1)
    return top[:, -1] - top[:, -2]


def class_output(model: ir.Model) -> str | None:
    """The output whose rows say by their largest number what class an image is of: the only one of a model with
    convolutions, made by a product, whose softmax may follow. None: there is none."""
    if len(model.graph.outputs) != 1 or not any(graph.is_op(node, "Conv") for node in model.graph):
        return None
    output = model.graph.outputs[0]
    node = output.producer()
    while node is not None and graph.is_op(node, "Softmax", "LogSoftmax", "Add", "Identity", "Flatten", "Reshape"):
        node = next((v.producer() for v in node.inputs if v is not None and v.producer() is not None), None)
    dims = list(output.shape or [])
    classes = dims[1] if len(dims) == 2 else None
    known = isinstance(classes, int) and classes > 2
    return output.name if known and graph.is_op(node, "Gemm", "MatMul", "Conv") else None


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
