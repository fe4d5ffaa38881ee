"""What flows through a model on real inputs: a histogram of each value, figures of its channels, some of its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ..base import Evaluator
from ..errors import PassError
from .ranges import Histogram, NotFinite

Feeds = dict[str, np.ndarray]
ROWS = 512  # of a product's data that are kept, over all samples


@dataclass
class Channels:
    """Figures of a value's channels, each (channels,), over everything seen. largest: of the absolute numbers."""

    largest: np.ndarray
    total: np.ndarray
    squares: np.ndarray
    count: int = 0

    @classmethod
    def of(cls, count: int) -> Channels:
        return cls(np.zeros(count), np.zeros(count), np.zeros(count))

    def add(self, x: np.ndarray, axis: int) -> None:
        rows = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
        if not len(rows):
            return
        self.largest = np.maximum(self.largest, np.abs(rows).max(0))
        self.total = self.total + rows.sum(0, dtype=np.float64)
        self.squares = self.squares + np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
        self.count += len(rows)

    @property
    def mean(self) -> np.ndarray:
        return self.total / max(self.count, 1)

    @property
    def mean_square(self) -> np.ndarray:
        return self.squares / max(self.count, 1)


@dataclass
class Seen:
    """What was seen of one value. rows: (up to ROWS, channels) of a product's data."""

    histogram: Histogram = field(default_factory=Histogram)
    channels: Channels | None = None
    pieces: list[np.ndarray] = field(default_factory=list)

    @property
    def rows(self) -> np.ndarray:
        return np.concatenate(self.pieces)


def observe(
    model: ir.Model, axes: Mapping[str, int | None], feeds: Sequence[Feeds], evaluator: Evaluator,
    also: Callable[[str, np.ndarray], None],
) -> dict[str, Seen]:  # fmt: skip
    """Run the samples and look at these values. axes: the axis of each value's channels; None: they do not matter; -1:
    the last, and rows are kept. also: is shown every array. Raises PassError where a value is NaN or infinite."""
    found = {name: Seen() for name in axes}
    share = -(-ROWS // len(feeds))
    for number, name, array in evaluator(model, list(axes), feeds):
        one, axis = found[name], axes[name]
        try:
            one.histogram.add(array)
        except NotFinite as error:
            raise PassError(
                f"{name!r} {error} on calibration sample {number}; expected inputs on which the model is finite"
            ) from error
        also(name, array)
        if axis is None:
            continue
        one.channels = one.channels or Channels.of(array.shape[axis])
        one.channels.add(array, axis)
        if axis == -1:
            rows = array.reshape(-1, array.shape[-1])
            one.pieces.append(rows[:: max(1, len(rows) // share)][:share].copy())
    return found
