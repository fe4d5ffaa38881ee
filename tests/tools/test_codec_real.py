"""The codec that comes with graphwright, quantized and compiled: its streams mean the same on every machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from graphwright.models import codecs, datasets
from graphwright.tools.codec import export_codec

pytestmark = [pytest.mark.torch, pytest.mark.assets, pytest.mark.tvm, pytest.mark.slow]
pytest.importorskip("torch")
pytest.importorskip("constriction")

SIZE = (64, 128)


@pytest.mark.qemu
def test_streams_of_the_int8_artifact_are_read_on_other_threads_and_on_arm(
    fetched: Callable[[str], None], tmp_path: Path
) -> None:
    """To identical bytes, and every network gives identical numbers."""
    from graphwright.runtime.codec import Codec
    from graphwright.runtime.codec_build import compile_codec, crops, quantize_codec
    from graphwright.runtime.codec_folder import PARTS, CodecFolder
    from graphwright.runtime.device import qemu_available

    fetched("photos")
    fetched("two-photos")
    export_codec(3, tmp_path / "float")
    source = CodecFolder.load(tmp_path / "float")
    whole = quantize_codec(source, tmp_path / "int8", "dynaquant", crops(codecs.photos(), 4, 128, 0))
    here = compile_codec(whole, tmp_path / "cpu", SIZE, target="cpu", verify=False)
    one, two = (Codec(here, threads=n) for n in (1, 2))
    image = datasets.photo("chelsea")[100:160, 100:220]
    stream = one.encode(image)
    decoded = one.decode(stream)
    assert two.encode(image) == stream
    np.testing.assert_array_equal(two.decode(stream), decoded)
    if reason := qemu_available():
        pytest.skip(reason)
    there = Codec(compile_codec(whole, tmp_path / "arm", SIZE, target="arm64", verify=False))
    np.testing.assert_array_equal(there.decode(stream), decoded)
    assert there.encode(image) == stream
    symbols = one.symbols(image)
    for part, given in zip(PARTS[1:], (symbols.y, symbols.z, symbols.y), strict=True):
        np.testing.assert_array_equal(there.compute(part, given), one.compute(part, given))
