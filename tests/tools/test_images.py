"""Calibration from a folder of images with a file that says how they are prepared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.errors import InputError
from graphwright.tools.calibration import load_calibration

Image = pytest.importorskip("PIL.Image")

MODEL = """<ir_version: 10, opset_import: ["" : 20]>
g (float[B,3,4,6] x) => (float[B,3,4,6] y) { y = Identity (x) }"""


def load(folder: Path, model: str = MODEL, pins: dict[str, tuple[int, ...]] | None = None) -> list[np.ndarray]:
    return load_calibration(folder, ir.from_proto(onnx.parser.parse_model(model)), pins or {})["x"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size, colour in (("b.png", (6, 4), (255, 0, 51)), ("a.jpg", (40, 30), (128, 128, 128))):
        Image.new("RGB", size, colour).save(tmp_path / name)
    (tmp_path / "preprocess.yaml").write_text("mean: [0.5, 0.0, 0.2]\nstd: 0.5\n")
    return tmp_path


def test_images_are_prepared_as_declared(folder: Path) -> None:
    grey, red = load(folder)
    assert grey.shape == red.shape == (1, 3, 4, 6) and red.dtype == np.float32
    np.testing.assert_allclose(red[0, :, 1, 1], [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(grey[0, :, 1, 1], [(128 / 255 - m) / 0.5 for m in (0.5, 0, 0.2)], atol=0.02)


def test_order_scale_and_layout(folder: Path) -> None:
    (folder / "preprocess.yaml").write_text("order: bgr\nscale: 1\n")
    (_, red) = load(folder, MODEL.replace("[B,3,4,6]", "[B,4,6,3]"))
    np.testing.assert_allclose(red[0, 1, 1], [51, 0, 255])


def test_the_middle_is_kept(folder: Path) -> None:
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[2:6, 3:9] = 255
    for file in folder.glob("*.*g"):
        file.unlink()
    Image.fromarray(pixels).save(folder / "c.png")
    (folder / "preprocess.yaml").write_text("resize: 8\n")
    np.testing.assert_allclose(load(folder)[0], 1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("means: 0", "unknown key 'means'; did you mean mean?"),
        ("mean: [1, 2]", "expected numbers, three or one"),
        ("order: gbr", "order is 'gbr'; expected rgb or bgr"),
        ("- 1", "holds list; expected"),
        ("a: [", "not YAML"),
    ],
)
def test_what_the_file_may_not_say(folder: Path, text: str, message: str) -> None:
    (folder / "preprocess.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load(folder)


def test_refusals(folder: Path) -> None:
    with pytest.raises(InputError, match="free height or width; fix them with --pin x=1x3x224x224"):
        load(folder, MODEL.replace("4,6", "H,W"))
    assert load(folder, MODEL.replace("4,6", "H,W"), {"x": (1, 3, 5, 5)})[0].shape == (1, 3, 5, 5)
    with pytest.raises(InputError, match=r"images are \(1, 3, H, W\) or \(1, H, W, 3\)"):
        load(folder, MODEL.replace("3,4,6", "1,4,6"))
    with pytest.raises(InputError, match="has a batch of 2"):
        load(folder, MODEL.replace("B,", "2,"))
    (folder / "d.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="not an image that can be read"):
        load(folder)
    (folder / "preprocess.yaml").unlink()
    with pytest.raises(InputError, match="it says how the images are prepared"):
        load(folder)
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(InputError, match=r"holds no \.npz file and no image"):
        load(folder)
