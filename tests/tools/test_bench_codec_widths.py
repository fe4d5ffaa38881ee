"""How widths are chosen from what they cost, and what a codec reads with them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from graphwright.tools.bench_codec_widths import (
    FULL,
    WIDTHS,
    Coder,
    choose,
    layers_of,
    leading,
    narrowed,
    selector,
    summed,
)
from graphwright.tools.codec import export_codec


@pytest.mark.parametrize("bits", WIDTHS)
def test_leading_bits_are_the_nearest_of_fewer_codes(bits: int) -> None:
    codes = np.arange(-127, 128, dtype=np.int8)
    found = leading(codes, bits)
    step = 2 ** (FULL - bits)
    assert found.dtype == np.int8 and not (found % step).any()
    assert len(np.unique(found)) == 2**bits - 1
    inside = np.abs(codes) <= (2 ** (bits - 1) - 1) * step
    assert np.abs(found.astype(int) - codes)[inside].max() <= step // 2
    np.testing.assert_array_equal(found, -found[::-1])


def test_widths_have_the_least_damage_at_their_mean() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        sizes = [int(size) for size in random.integers(1, 10, 4)]
        tables = [
            [{4: float(a + b), 6: float(a), 8: 0.0} for a, b in random.uniform(0, 1, (4, 2))] for _ in range(2)
        ]
        chosen = choose(tables, sizes, 6)

        def bits(widths: tuple[tuple[int, ...], ...], sizes: list[int] = sizes) -> float:
            return sum(b * s for w in widths for b, s in zip(w, sizes, strict=True)) / sum(sizes) / 2

        def damage(widths: tuple[tuple[int, ...], ...], tables: list[list[dict[int, float]]] = tables) -> float:
            return sum(t[b] for table, w in zip(tables, widths, strict=True) for t, b in zip(table, w, strict=True))

        reached = bits(tuple(chosen))
        assert reached <= 6
        every = list(itertools.product(WIDTHS, repeat=4))
        best = min(damage(both) for both in itertools.product(every, repeat=2) if bits(both) <= reached)
        assert damage(tuple(chosen)) == pytest.approx(best)


def test_what_costs_nothing_is_not_paid_for() -> None:
    table = [{4: 0.0, 6: -0.1, 8: 0.0}]
    assert choose([table], [1], 8) == [(6,)]
    assert summed([table, [{4: 1.0, 6: 0.1, 8: 0.0}]]) == [{4: 0.5, 6: 0.0, 8: 0.0}]


@pytest.mark.torch
@pytest.mark.slow
def test_a_codec_reads_the_leading_bits(tmp_path: Path) -> None:
    """The real codec, quantized on noise: narrower layers have coarser codes, and figures are kept."""
    from graphwright.runtime.codec_build import quantize_codec
    from graphwright.runtime.codec_folder import CodecFolder

    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (64, 64, 3)).astype(np.uint8) for _ in range(2)]
    export_codec(1, tmp_path / "float")
    root = tmp_path / "int8"
    quantize_codec(CodecFolder.load(tmp_path / "float"), root, "dynaquant:together=false", images, threads=1)
    layers = layers_of(root)
    assert {layer.part for layer in layers} == {"analysis", "synthesis"} and len(layers) == 10
    coder = Coder(root, tmp_path, layers, 0.0016, 1)
    narrow = (4,) * len(layers)
    assert coder.mean_bits(narrow) == 4 and coder.mean_bits((FULL,) * len(layers)) == FULL
    noise = {"noise": images[0]}
    wide = coder.coded((FULL,) * len(layers), noise)["noise"]
    assert coder.coded(narrow, noise)["noise"]["cost"] > wide["cost"] > 0
    made = layers_of(narrowed(root, tmp_path / "narrow", layers, narrow))
    assert [layer.size for layer in made] == [layer.size for layer in layers]
    again = Coder(tmp_path / "gone", tmp_path, layers, 0.0016, 1, dict(coder.figures))
    assert again.coded(narrow, noise)["noise"] == coder.coded(narrow, noise)["noise"]


def test_a_selector_gives_a_width_for_each_layer() -> None:
    import onnx_ir as ir
    import onnxruntime

    proto = ir.to_proto(selector(16, 3, (1, 16, 23, 34)))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((1, 16, 23, 34)).astype(np.float32)
    found = session.run(None, {"x": x})[0]
    assert found.shape == (1, 3) and set(found.reshape(-1)) <= set(range(len(WIDTHS)))
