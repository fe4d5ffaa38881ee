"""Codec folders: images become streams and come back, on every machine the same; streams that are none are refused."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from graphwright.passes.errors import ArtifactError, InputError, OutputError, UsageError
from graphwright.runtime import codec as module
from graphwright.runtime.codec import CANVAS, HEADER, Codec
from graphwright.runtime.codec_build import compile_codec, crops, quantize_codec
from graphwright.runtime.codec_folder import DESCRIPTION, PARTS, TABLES, CodecFolder
from graphwright.runtime.entropy import Damaged

from ..codecs import picture, write_tiny_codec

pytest.importorskip("constriction")

SIZE = (64, 128)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> CodecFolder:
    return CodecFolder.load(write_tiny_codec(tmp_path_factory.mktemp("codec") / "tiny"))


@pytest.fixture(scope="module")
def codec(plain: CodecFolder) -> Codec:
    return Codec(plain, threads=1)


@pytest.fixture(scope="module")
def stream(codec: Codec) -> bytes:
    return codec.encode(picture(*SIZE))


@pytest.fixture(scope="module")
def whole(plain: CodecFolder, tmp_path_factory: pytest.TempPathFactory) -> CodecFolder:
    """Its networks in 8 bits."""
    out = tmp_path_factory.mktemp("int8") / "tiny"
    squares = crops([picture(160, 200)], 4, 64, 0)
    return quantize_codec(plain, out, "dynaquant:least=1", squares, threads=1)


def resigned(stream: bytes, **fields: object) -> bytes:
    """The stream with other fields in its header, and a checksum that fits."""
    names = ("magic", "version", "codec", "height", "width", "checksum", "whole")
    header = {**dict(zip(names, HEADER.unpack_from(stream), strict=True)), **fields}
    data = stream[HEADER.size :]
    front = HEADER.pack(*(header[name] for name in names))[: -module.CHECKED]
    return front + struct.pack("<I", zlib.crc32(data, zlib.crc32(front))) + data


def on_canvas(stream: bytes, rows: int, columns: int) -> bytes:
    """The stream as if it had been coded in another size."""
    return resigned(stream[: HEADER.size] + CANVAS.pack(rows, columns) + stream[HEADER.size :], version=2)


@pytest.mark.parametrize("size", [(1, 1), (63, 64), (64, 65), (130, 70)])
def test_images_of_any_size_come_back(codec: Codec, size: tuple[int, int]) -> None:
    """As what the synthesis makes of the latents, cut to the image."""
    image = picture(*size)
    symbols = codec.symbols(image)
    expected = np.clip(np.rint(codec.compute("synthesis", symbols.y)[0]), 0, 255).transpose(1, 2, 0)
    found = codec.decode(codec.encode(image))
    assert found.dtype == np.uint8 and found.shape == image.shape
    np.testing.assert_array_equal(found, expected[: size[0], : size[1]])


def test_a_stream_is_as_long_as_its_symbols_need(codec: Codec) -> None:
    image = picture(320, 256)
    real, ideal = 8 * len(codec.encode(image)), codec.bits(codec.symbols(image))
    header = 8 * HEADER.size
    print(f"{real} bits, {header} of them the header; ideal {ideal:.0f}")
    assert ideal < real <= header + 1.002 * ideal + 64


def test_streams_do_not_depend_on_threads(plain: CodecFolder, stream: bytes, codec: Codec) -> None:
    two = Codec(plain, threads=2)
    assert two.encode(picture(*SIZE)) == stream
    np.testing.assert_array_equal(two.decode(stream), codec.decode(stream))


def test_every_cut_and_every_changed_byte_is_told(codec: Codec, stream: bytes) -> None:
    for length in range(len(stream)):
        with pytest.raises(Damaged):
            codec.decode(stream[:length])
    for place in range(len(stream)):
        changed = bytearray(stream)
        changed[place] ^= 0x41
        with pytest.raises(InputError):
            codec.decode(bytes(changed))
    with pytest.raises(Damaged, match="cut short or damaged"):
        codec.decode(stream + b"more")


def test_forged_streams_are_refused_before_they_take_memory(
    codec: Codec, stream: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their checksum is right, what they say is not."""
    monkeypatch.setattr(module, "free_memory", lambda: 1e9)
    with pytest.raises(InputError, match=r"65535 x 65535 takes 859\.\d GB to decode, and 1\.0 GB of memory are free"):
        codec.decode(resigned(stream, height=0xFFFF, width=0xFFFF))
    with pytest.raises(InputError, match="0 x 128; expected sides from 1"):
        codec.decode(resigned(stream, height=0))
    with pytest.raises(InputError, match="is of version 9; expected 1 or 2"):
        codec.decode(resigned(stream, version=9))
    with pytest.raises(Damaged, match="other symbols than were coded"):
        codec.decode(resigned(stream, checksum=1))
    with pytest.raises(Damaged, match=r"coded in \d+ x \d+; expected multiples of 64 that hold it"):
        codec.decode(resigned(stream, version=2))  # the first symbols are taken for the canvas
    for rows, columns in ((64, 64), (0, 0), (65, 128), (64, 129), (2**32 - 1, 128)):
        with pytest.raises(Damaged, match=f"coded in {rows} x {columns}; expected multiples of 64"):
            codec.decode(on_canvas(stream, rows, columns))
    with pytest.raises(InputError, match=r"GB to decode, and 1\.0 GB of memory are free"):
        codec.decode(on_canvas(stream, 2**31, 2**31))
    with pytest.raises(Damaged, match="ends before the size"):
        codec.decode(resigned(stream[: HEADER.size], version=2))
    for size in ((64, 64), (128, 128), (640, 640)):  # symbols of another image
        with pytest.raises(Damaged):
            codec.decode(resigned(stream, height=size[0], width=size[1]))
    random = np.random.default_rng(0)
    for length in (0, 1, 4, 40, 400):
        junk = stream[: HEADER.size] + random.bytes(length)
        with pytest.raises(Damaged):
            codec.decode(resigned(junk))


def test_a_stream_is_for_its_codec(stream: bytes, tmp_path: Path) -> None:
    other = Codec(write_tiny_codec(tmp_path / "other", seed=4))
    with pytest.raises(InputError, match=r"is for codec [0-9a-f]{8}, this one is [0-9a-f]{8}"):
        other.decode(stream)


def test_only_images_are_encoded(codec: Codec) -> None:
    for array in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)):
        with pytest.raises(InputError, match=r"expected uint8 \(height, width, 3\)"):
            codec.encode(array)
    with pytest.raises(InputError, match="0 x 8; expected sides from 1"):
        codec.encode(np.zeros((0, 8, 3), np.uint8))


def test_folders_that_are_no_codec_are_told(plain: CodecFolder, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no codec\.json in it"):
        CodecFolder.load(tmp_path)
    for number, (name, text, message) in enumerate((
        (DESCRIPTION, "{", "cannot be read"),
        (DESCRIPTION, '{"schema_version": 2}', "schema version 2; expected 1"),
        (DESCRIPTION, json.dumps({**plain.about.model_dump(), "stride": 0}), "stride: .*greater than or equal to 1"),
        (TABLES, "PK", "cannot be read"),
    )):  # fmt: skip
        root = tmp_path / str(number)
        shutil.copytree(plain.root, root)
        (root / name).write_text(text)
        with pytest.raises(ArtifactError, match=message):
            CodecFolder.load(root)
    root = tmp_path / "missing"
    shutil.copytree(plain.root, root)
    np.savez(root / TABLES, y=np.zeros((2, 3), np.uint32), z=plain.z.frequencies)
    with pytest.raises(ArtifactError, match=r"y is uint32 \(2, 3\), no table of frequencies"):
        CodecFolder.load(root)
    shutil.copyfile(plain.root / TABLES, root / TABLES)
    (root / "synthesis.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"synthesis\.onnx: is missing"):
        CodecFolder.load(root)


def test_a_quantized_codec_decodes_what_it_wrote(whole: CodecFolder, plain: CodecFolder, codec: Codec) -> None:
    """And to nearly the image that the codec in float gives."""
    assert whole.about.passes == "dynaquant:least=1" and whole.about.streams != plain.about.streams
    image, small = picture(*SIZE), Codec(whole, threads=1)
    stream = small.encode(image)
    found = small.decode(stream)
    np.testing.assert_array_equal(found, Codec(whole, threads=2).decode(stream))
    error = np.abs(found.astype(int) - codec.decode(codec.encode(image))).mean()
    print(f"mean difference {error:.2f}")
    assert error < 6


def test_building_a_codec_refuses_what_it_cannot_do(plain: CodecFolder, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is read by this run"):
        quantize_codec(plain, plain.root, "dynaquant", [picture(64, 64)], overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(OutputError, match="is not a codec folder"):
        quantize_codec(plain, tmp_path / "other", "", [picture(64, 64)], overwrite=True)


@pytest.fixture(scope="module")
def compiled(whole: CodecFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CodecFolder]:
    pytest.importorskip("tvm")
    yield compile_codec(whole, tmp_path_factory.mktemp("cpu") / "tiny", SIZE, target="cpu", verify=False)


@pytest.mark.tvm
def test_compiled_codecs_agree_to_the_byte_on_any_number_of_threads(compiled: CodecFolder, whole: CodecFolder) -> None:
    image = picture(50, 110)
    one, two = (Codec(compiled, threads=n) for n in (1, 2))
    stream = one.encode(image)
    assert two.encode(image) == stream
    np.testing.assert_array_equal(one.decode(stream), two.decode(stream))
    with pytest.raises(InputError, match=r"an image of 65 x 10; .* was compiled for up to 64 x 128"):
        one.encode(picture(65, 10))
    with pytest.raises(InputError, match="was compiled for up to 64 x 128"):
        one.decode(resigned(stream, height=65))
    small = one.encode(picture(17, 33))  # the networks see 64 x 128 all the same
    np.testing.assert_array_equal(Codec(whole).decode(small), one.decode(small))
    with pytest.raises(InputError, match=r"was coded in 64 x 64 and .* was compiled for 64 x 128; decode with the"):
        one.decode(Codec(whole).encode(picture(17, 33)))
    with pytest.raises(UsageError, match="is compiled; give the folder of ONNX files"):
        compile_codec(compiled, compiled.root.with_name("again"), SIZE)


@pytest.mark.tvm
@pytest.mark.qemu
@pytest.mark.slow
def test_arm_decodes_what_this_machine_wrote_to_the_byte(
    compiled: CodecFolder, whole: CodecFolder, tmp_path: Path
) -> None:
    from graphwright.runtime.device import qemu_available

    if reason := qemu_available():
        pytest.skip(reason)
    image = picture(50, 110)
    here = Codec(compiled, threads=2)
    there = Codec(compile_codec(whole, tmp_path / "arm", SIZE, target="arm64", verify=False))
    stream = here.encode(image)
    assert there.encode(image) == stream
    np.testing.assert_array_equal(there.decode(stream), here.decode(stream))


def test_every_part_has_a_shape(plain: CodecFolder) -> None:
    assert plain.shapes(128, 64) == dict(
        zip(PARTS, ((1, 3, 128, 64), (1, 6, 8, 4), (1, 4, 2, 1), (1, 6, 8, 4)), strict=True)
    )
