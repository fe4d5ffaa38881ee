"""Range coding by tables: what is written is read, no longer than an ideal coder's, and damage is told."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from graphwright.passes.errors import AssetError
from graphwright.runtime import entropy
from graphwright.runtime.entropy import Damaged, Decoder, Encoder, Tables
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("constriction")

SCALES = np.geomspace(0.11, 64, 12)
TABLES = Tables(entropy.gaussian_frequencies(SCALES, 127))


def drawn(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Symbols of the normal distributions, and the numbers of their tables."""
    random = np.random.default_rng(seed)
    chosen = random.integers(0, len(SCALES), count)
    symbols = np.clip(np.rint(random.standard_normal(count) * SCALES[chosen]), -127, 127)
    return symbols.astype(np.int32), chosen.astype(np.intp)


def test_tables_are_the_normal_distribution_in_whole_numbers() -> None:
    """Against sums of the density at a thousand places of each symbol, in float64."""
    for scale, row in zip(SCALES, TABLES.frequencies, strict=True):
        fine = (np.arange(-127.5, 127.5, 1e-3) + 5e-4) / scale
        expected = np.exp(-(fine**2) / 2).reshape(255, 1000).sum(1) * 1e-3 / scale / np.sqrt(2 * np.pi)
        expected[[0, -1]] += (1 - expected.sum()) / 2
        error = np.abs(row / entropy.TOTAL - expected).max()
        print(f"scale {scale:.2f}: largest error {error:.1e}, limit 1e-6")
        assert error < 1e-6 and np.array_equal(row, row[::-1])


@given(st.integers(0, 60), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    chosen = random.integers(0, len(SCALES), count).astype(np.intp)
    symbols = random.integers(-127, 128, count).astype(np.int32)  # unlikely ones too
    encoder = Encoder()
    encoder.put(symbols, chosen, TABLES)
    decoder = Decoder(encoder.data())
    assert np.array_equal(decoder.get(chosen, TABLES), symbols)
    decoder.end()


def test_groups_follow_each_other_in_any_shape() -> None:
    symbols, chosen = drawn(600)
    encoder = Encoder()
    encoder.put(symbols[:100], chosen[:100], TABLES)
    encoder.put(symbols[100:].reshape(5, 10, 10), chosen[100:].reshape(5, 10, 10), TABLES)
    decoder = Decoder(encoder.data())
    assert np.array_equal(decoder.get(chosen[:100], TABLES), symbols[:100])
    assert np.array_equal(decoder.get(chosen[100:].reshape(5, 10, 10), TABLES).ravel(), symbols[100:])


def test_the_length_is_that_of_an_ideal_coder() -> None:
    """The words of 32 bits at the end cost up to 64 bits, fixed-point probabilities less than 1 in 1000."""
    symbols, chosen = drawn(50_000)
    encoder = Encoder()
    encoder.put(symbols, chosen, TABLES)
    real, ideal = 8 * len(encoder.data()), TABLES.bits(symbols, chosen)
    print(f"{real} bits, ideal {ideal:.0f}")
    assert ideal - 64 <= real <= 1.001 * ideal + 64


def test_no_symbols_take_no_bits() -> None:
    none = np.zeros((0, 3), np.int32)
    encoder = Encoder()
    encoder.put(none, none.astype(np.intp), TABLES)
    assert encoder.data() == b"" and TABLES.bits(none, none.astype(np.intp)) == 0


def test_damaged_bits_are_told() -> None:
    symbols, chosen = drawn(5000)
    encoder = Encoder()
    encoder.put(symbols, chosen, TABLES)
    data = encoder.data()
    with pytest.raises(Damaged, match="7 bytes of symbols; expected a multiple of 4"):
        Decoder(data[:7])
    told = 0
    for cut in range(4, len(data), len(data) // 40 // 4 * 4):
        decoder = Decoder(data[:cut])
        try:
            wrong = not np.array_equal(decoder.get(chosen, TABLES), symbols)
            decoder.end()
        except Damaged:
            told += 1
        else:
            assert wrong  # a shorter stream may decode to something else, which a checksum tells
    assert told
    decoder = Decoder(data + data)
    decoder.get(chosen, TABLES)
    with pytest.raises(Damaged, match="more behind the last symbol"):
        decoder.end()


def test_without_the_coder_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(AssetError, match=r"pip install 'graphwright\[codec\]'"):
        Encoder()
