"""Calibration inputs from a folder of images and a file that says how they are prepared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.passes.errors import InputError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

DECLARED = "preprocess.yaml"
ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
# What preprocess.yaml may say, and what holds where it does not.
KEYS: dict[str, Any] = {
    "resize": None,  # shorter side in pixels before the crop; none: the size of the crop
    "scale": 1 / 255,  # of the bytes, before mean and std
    "mean": [0.0, 0.0, 0.0],
    "std": [1.0, 1.0, 1.0],
    "order": "rgb",  # or bgr
}


def load_images(folder: Path, model: ir.Model, pins: Mapping[str, Sequence[int]]) -> dict[str, list[np.ndarray]]:
    """Input name -> arrays (1, 3, height, width) or (1, height, width, 3), one an image, in the order of their names.

    An image is scaled so that its shorter side is `resize`, cut to the middle, and becomes
    (bytes · scale - mean) / std. Raises InputError.
    """
    import numpy as np
    from graphwright.runtime.feeds import required_inputs

    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS) if folder.is_dir() else []
    if not files:
        raise InputError(f"{folder}: holds no .npz file and no image; expected a sample each")
    settings = _settings(folder / DECLARED)
    inputs = required_inputs(model)
    if len(inputs) != 1:
        raise InputError(f"{folder}: images are for a model of one input; it has {len(inputs)}")
    (value,) = inputs
    name = value.name or ""
    shape: Sequence[Any] = pins.get(name) or list(value.shape if value.shape is not None else [])
    if len(shape) != 4 or 3 not in (shape[1], shape[3]):
        raise InputError(f"input {name!r} has shape {list(shape)}; images are (1, 3, H, W) or (1, H, W, 3)")
    if isinstance(shape[0], int) and shape[0] != 1:
        raise InputError(f"input {name!r} has a batch of {shape[0]}; images are samples of 1")
    planes = shape[1] == 3
    height, width = shape[2:] if planes else shape[1:3]
    if not isinstance(height, int) or not isinstance(width, int):
        raise InputError(f"input {name!r} has a free height or width; fix them with --pin {name}=1x3x224x224")
    kind = value.dtype.numpy() if value.dtype is not None else np.float32
    samples = []
    for file in files:
        pixels = _pixels(file, height, width, settings["resize"])
        if settings["order"] == "bgr":
            pixels = pixels[..., ::-1]
        numbers = (pixels.astype(np.float32) * settings["scale"] - settings["mean"]) / settings["std"]
        samples.append((numbers.transpose(2, 0, 1) if planes else numbers)[None].astype(kind))
    return {name: samples}


def _settings(file: Path) -> dict[str, Any]:
    import numpy as np
    import yaml

    if not file.is_file():
        raise InputError(f"{file}: no such file; it says how the images are prepared, such as `mean: [0.5, 0.5, 0.5]`")
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file}: holds {type(found).__name__}; expected `key: value` lines")
    for key in found:
        if key not in KEYS:
            raise InputError(f"{file}: unknown key {key!r}; {did_you_mean(str(key), KEYS)}")
    settings = {**KEYS, **found}
    try:
        for key in ("mean", "std"):
            settings[key] = np.broadcast_to(np.asarray(settings[key], np.float32), (3,))
        settings["scale"] = float(settings["scale"])
        settings["resize"] = None if settings["resize"] is None else int(settings["resize"])
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: {error}; expected numbers, three or one for mean and std") from error
    if settings["order"] not in ("rgb", "bgr"):
        raise InputError(f"{file}: order is {settings['order']!r}; expected rgb or bgr")
    return settings


def _pixels(file: Path, height: int, width: int, resize: int | None) -> np.ndarray:
    """uint8 (height, width, 3): the image scaled and cut to its middle."""
    import numpy as np

    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise InputError("images need pillow: run `pip install 'graphwright[models]'`") from error
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{file}: not an image that can be read ({error})") from error
    # The crop must fit into the scaled image whatever its proportions are.
    factor = max((resize or 0) / min(image.size), height / image.height, width / image.width)
    size = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))
