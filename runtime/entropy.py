"""Symbols as bits: range coding by tables of whole numbers, one table for each kind of symbol.

A table says how often each symbol is expected, in whole numbers that were computed once and are stored with a codec, so
that every machine codes with the same ones. The coder is that of `constriction` (Bamler, arXiv 2201.01741): range
coding, in 32-bit words, with probabilities of 24 bits, none of which is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..passes.errors import AssetError, InputError

BITS = 24  # of a probability in the coder
TOTAL = 1 << 20  # of the frequencies of a table, about


def _stream() -> Any:
    """The coders of constriction. Raises AssetError where it is not installed."""
    try:
        import constriction
    except ModuleNotFoundError as error:
        raise AssetError(
            "range coding needs constriction, which is not installed: run `pip install 'graphwright[codec]'`"
        ) from error
    return constriction.stream


class Damaged(InputError):
    """Bits that no encoder has written with these tables."""


def gaussian_frequencies(scales: NDArray[np.float64], largest: int) -> NDArray[np.uint32]:
    """Tables (n, 2 largest + 1) of normal distributions around 0, rounded; the ends stand for all beyond."""
    edges = np.arange(-largest, largest) + 0.5
    below = np.array([[0.5 * math.erfc(-edge / scale / math.sqrt(2)) for edge in edges] for scale in scales])
    return frequencies(np.diff(np.pad(below, ((0, 0), (1, 1)), constant_values=((0, 0), (0, 1)))))


def frequencies(probabilities: NDArray[np.float64]) -> NDArray[np.uint32]:
    """Tables of probabilities (n, symbols) as whole numbers."""
    return np.rint(probabilities * TOTAL).astype(np.uint32)


@dataclass(frozen=True, eq=False)
class Tables:
    """frequencies: (n, 2 largest + 1) whole numbers, of the symbols -largest to largest."""

    frequencies: NDArray[np.uint32]

    @property
    def largest(self) -> int:
        return self.frequencies.shape[1] // 2

    @cached_property
    def models(self) -> list[Any]:
        """constriction's, which it computes by sums and products in float64 alone, as every machine does."""
        categorical = _stream().model.Categorical
        return [categorical(row.astype(np.float64), perfect=False) for row in self.frequencies]

    def bits(self, symbols: NDArray[np.int32], chosen: NDArray[np.intp]) -> float:
        """What an ideal coder needs for the symbols, each with its table of number `chosen`."""
        spare = 2.0**-BITS
        rows = self.frequencies.astype(np.float64)
        share = rows / rows.sum(1, keepdims=True) * (1 - rows.shape[1] * spare) + spare
        return float(-np.log2(share[chosen.ravel(), symbols.ravel() + self.largest]).sum())


class Encoder:
    """Writes groups of symbols behind each other."""

    def __init__(self) -> None:
        self._coder = _stream().queue.RangeEncoder()

    def put(self, symbols: NDArray[np.int32], chosen: NDArray[np.intp], tables: Tables) -> None:
        """Symbols (any shape) within the tables' range, each with its table of number `chosen` (the same shape)."""
        flat = symbols.ravel() + tables.largest
        for number, places in _groups(chosen):
            self._coder.encode(np.ascontiguousarray(flat[places], np.int32), tables.models[number])

    def data(self) -> bytes:
        return self._coder.get_compressed().astype("<u4").tobytes()


class Decoder:
    """Reads them in the same order. Raises Damaged for bits that are no symbols."""

    def __init__(self, data: bytes) -> None:
        if len(data) % 4:
            raise Damaged(f"{len(data)} bytes of symbols; expected a multiple of 4")
        words = np.frombuffer(data, "<u4").astype(np.uint32)
        try:
            self._coder = _stream().queue.RangeDecoder(words)
        except AssertionError as error:
            raise Damaged("the symbols are damaged") from error

    def get(self, chosen: NDArray[np.intp], tables: Tables) -> NDArray[np.int32]:
        """The next symbols, in the shape of `chosen`, the numbers of their tables."""
        found = np.empty(chosen.size, np.int32)
        for number, places in _groups(chosen):
            try:
                found[places] = self._coder.decode(tables.models[number], len(places))
            except AssertionError as error:  # what constriction raises for such bits
                raise Damaged("the symbols are damaged") from error
        return found.reshape(chosen.shape) - tables.largest

    def end(self) -> None:
        """Raises Damaged when more symbols follow."""
        if not self._coder.maybe_exhausted():
            raise Damaged("there is more behind the last symbol")


def _groups(chosen: NDArray[np.intp]) -> Iterable[tuple[int, NDArray[np.intp]]]:
    """Each number among `chosen`, in rising order, with its places in the flattened array, also in rising order."""
    flat = chosen.ravel()
    order = np.argsort(flat, kind="stable")
    numbers, starts = np.unique(flat[order], return_index=True)
    ends = [*starts[1:], len(order)]
    return [(int(n), order[a:b]) for n, a, b in zip(numbers, starts, ends, strict=False)]
