"""The tool `codec`: a folder in, streams and images out; mistakes end in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from graphwright.tools.bench_codec import bd_rate
from graphwright.tools.codec import command

from ..codecs import picture, write_tiny_codec

pytest.importorskip("constriction")
Image = pytest.importorskip("PIL.Image")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in arguments])


@pytest.fixture
def codec(tmp_path: Path) -> Path:
    return write_tiny_codec(tmp_path / "codec")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(picture(70, 90)).save(path)
    return path


def test_an_image_becomes_a_stream_and_comes_back(codec: Path, photo: Path, tmp_path: Path) -> None:
    stream, back = tmp_path / "photo.gwhp", tmp_path / "back.png"
    done = run("encode", codec, photo, "-o", stream)
    assert done.exit_code == 0, done.output
    assert f"{8 * stream.stat().st_size / 70 / 90:.3f} bits a pixel" in done.output
    done = run("decode", codec, stream, "-o", back, "--threads", 1)
    assert done.exit_code == 0 and "90 x 70 pixels" in done.output
    with Image.open(back) as image:
        assert image.size == (90, 70)


def test_networks_are_quantized_on_images(codec: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(picture(128, 128)).save(folder / "a.png")
    done = run("quantize", codec, "--images", folder, "--passes", "dynaquant:least=1", "-o", tmp_path / "int8")
    assert done.exit_code == 0, (done.output, done.exception)
    assert (tmp_path / "int8" / "codec.json").is_file()
    (folder / "a.png").unlink()
    with pytest.raises(Exception, match="holds no image of at least 128 x 128 pixels"):
        arguments = ["quantize", str(codec), "--images", str(folder), "-o", str(tmp_path / "x")]
        CliRunner().invoke(command, arguments, catch_exceptions=False, standalone_mode=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("encode", "CODEC", "STREAM", "-o", "x.gwhp"), "cannot be read as an image"),
        (("encode", "PHOTO", "PHOTO", "-o", "x.gwhp"), "no codec.json in it"),
        (("encode", "CODEC", "PHOTO", "-o", "PHOTO"), "already exists; give --overwrite"),
        (("decode", "CODEC", "PHOTO", "-o", "x.png"), "photo.png: .* are no stream of an image codec"),
        (("decode", "CODEC", "absent", "-o", "x.png"), "absent: cannot be read"),
        (("compile", "CODEC", "--size", "64", "-o", "x"), "expected a height and a width"),
        (("export", "--quality", "9", "-o", "x"), "quality is 9, expected 1"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(
    arguments: tuple[str, ...], message: str, codec: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stream").write_bytes(b"GWHP")
    names = {"CODEC": codec, "PHOTO": photo, "STREAM": tmp_path / "stream"}
    with pytest.raises(SystemExit) as ended:
        command.main([str(names.get(a, a)) for a in arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code in (1, 2) and len(lines) == 1
    assert pytest.importorskip("re").search(message, lines[0]), lines[0]
    assert not list(tmp_path.glob("x*"))


def test_the_difference_in_rate_is_bjontegaards() -> None:
    """Curves that differ by a factor everywhere differ by it, and the curve by itself by nothing."""
    anchor = [(0.2, 28.0), (0.4, 31.0), (0.7, 33.5), (1.2, 36.0)]
    assert bd_rate(anchor, anchor) == pytest.approx(0)
    assert bd_rate(anchor, [(1.3 * rate, dB) for rate, dB in anchor]) == pytest.approx(0.3)
    assert np.isnan(bd_rate(anchor, [(rate, dB + 20) for rate, dB in anchor]))
