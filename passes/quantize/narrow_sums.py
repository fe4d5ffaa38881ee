"""Weights whose products with bytes int16 holds, a few together: processors without VNNI multiply such ones faster.

AVX2 multiplies bytes by int8 and adds neighbours in int16 (pmaddubsw), which saturates for general weights. Where of
any inputs that meet in one int16 neither the positive weights nor the negative ones exceed 128 in sum, nothing can be
lost, whatever the data are: 255 · 128 < 2^15. In a step of four bytes inputs 0, 1 and 2, 3 meet; where two steps are
added in int16, inputs 0, 1, 4, 5 and 2, 3, 6, 7 of every eight. Each tap of a convolution has its own. That is the
order of every kernel that reads channels in fours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .layers import Layer

MOST = 128  # of the weights of one sign that meet in an int16
MEETING = (2, 4)  # inputs that can: of one step, or of two


@dataclass(frozen=True, eq=False)
class Lanes:
    """Which inputs meet. of: (inputs,) the number of each one's lane. places: (lanes, meeting) the inputs of each,
    `inputs` where there is none."""

    of: np.ndarray
    places: np.ndarray

    def held(self, codes: np.ndarray) -> np.ndarray:
        """Codes (..., inputs) with those of a lane that exceed MOST together brought nearer to 0, all by as much: the
        nearest codes that do not. Of the same type."""
        padded = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), codes.dtype)], -1)
        parts = np.take(padded, self.places, -1)
        over = self._over(parts)
        if not over.any():
            return codes
        parts[over] = _nearer(parts[over])
        padded[..., self.places.reshape(-1)] = parts.reshape(*codes.shape[:-1], -1)
        return np.ascontiguousarray(padded[..., :-1])

    def fits(self, codes: np.ndarray) -> bool:
        """Whether no lane exceeds MOST."""
        padded = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), codes.dtype)], -1)
        return not self._over(np.take(padded, self.places, -1)).any()

    def reordered(self, order: np.ndarray) -> Lanes:
        """Of inputs in another order: number i is input order[i] of these."""
        back = np.append(np.argsort(order), len(order))
        return Lanes(self.of[order], back[self.places])

    def room(self, shape: tuple[int, ...]) -> Room:
        """What lanes may still take up: of (..., inputs) codes, whose shape in front is given, none so far."""
        return Room(self, np.full((2, *shape, len(self.places)), MOST, np.int32))

    def _over(self, parts: np.ndarray) -> np.ndarray:
        wide = parts.astype(np.int16 if parts.dtype == np.int8 else parts.dtype)
        return (np.maximum(wide, 0).sum(-1) > MOST) | (np.maximum(-wide, 0).sum(-1) > MOST)


@dataclass(eq=False)
class Room:
    """left: (2, ..., lanes) what positive and what negative codes may still add."""

    lanes: Lanes
    left: np.ndarray

    def take(self, codes: np.ndarray, place: int) -> np.ndarray:
        """Codes (...) of input `place` as far as there is room for them, which they take."""
        lane = self.lanes.of[place]
        held = np.clip(codes, -self.left[1, ..., lane], self.left[0, ..., lane])
        self.left[0, ..., lane] -= np.maximum(held, 0)
        self.left[1, ..., lane] -= np.maximum(-held, 0)
        return held


def lanes_of(layer: Layer, meeting: int) -> Lanes | None:
    """Of the columns of a layer's matrix; None where no two inputs meet."""
    inputs = layer.size // layer.channels
    taps = 1 if layer.is_product else int(np.prod(layer.shape[2:]))
    if inputs == taps:
        return None
    return lanes(inputs // taps, taps, meeting)


def lanes(channels: int, taps: int = 1, meeting: int = 4) -> Lanes:
    """Of inputs (channels, taps), of which `meeting` meet."""
    channel, tap = np.divmod(np.arange(channels * taps), taps)
    of = (channel // 2 if meeting == 2 else channel // 8 * 2 + channel % 4 // 2) * taps + tap
    _, of = np.unique(of, return_inverse=True)
    order = np.argsort(of, kind="stable")
    count = int(of.max()) + 1
    starts = np.searchsorted(of[order], np.arange(count))
    places = np.full((count, meeting), channels * taps)
    places[of[order], np.arange(len(order)) - starts[of[order]]] = order
    return Lanes(of, places)


def _nearer(parts: np.ndarray) -> np.ndarray:
    """Lanes (n, meeting), each sign of which is brought down to MOST."""
    wide = parts.astype(np.int32)
    result = np.zeros_like(wide)
    for sign in (1, -1):
        side = np.maximum(sign * wide, 0)
        # Each turn takes away what is too much in equal shares; those that reach 0 leave theirs to the next one.
        while ((excess := side.sum(-1) - MOST) > 0).any():
            count = np.maximum((side > 0).sum(-1), 1)
            side = np.maximum(side - np.maximum(-(-excess // count), 0)[:, None], 0)
        result += sign * side
    return result.astype(parts.dtype)
