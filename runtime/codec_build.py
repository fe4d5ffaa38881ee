"""A codec folder made of another one: its networks quantized, or compiled for images of one size."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..passes.errors import OutputError, UsageError
from . import driver
from .artifact import Workplace
from .codec import Codec
from .codec_folder import DESCRIPTION, PARTS, TABLES, CodecFolder, write_description
from .target import Target

Samples = dict[str, list[NDArray[np.float32]]]


def samples(codec: Codec, images: Sequence[NDArray[np.uint8]]) -> Samples:
    """Part -> what it is given for each image (height, width, 3), whose sides are multiples of hyper_stride."""
    found: Samples = {part: [] for part in PARTS}
    for image in images:
        symbols = codec.symbols(image)
        found["analysis"].append(image.transpose(2, 0, 1)[None].astype(np.float32))
        found["hyper-synthesis"].append(symbols.z.astype(np.float32))
        for part in ("hyper-analysis", "synthesis"):
            found[part].append(symbols.y.astype(np.float32))
    return found


def crops(images: Sequence[NDArray[np.uint8]], count: int, side: int, seed: int) -> list[NDArray[np.uint8]]:
    """Random squares of the images in turn, of `side` pixels."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        image = images[number % len(images)]
        top, left = (int(random.integers(0, size - side + 1)) for size in image.shape[:2])
        found.append(image[top : top + side, left : left + side])
    return found


def quantize_codec(
    source: CodecFolder, out: Path, passes: str | Mapping[str, str], images: Sequence[NDArray[np.uint8]], *,
    overwrite: bool = False, threads: int | None = None, progress: Callable[[str], None] = lambda message: None,
) -> CodecFolder:  # fmt: skip
    """The codec with its networks rewritten by passes, or by those given for each part, calibrated on images.

    images: (height, width, 3), whose sides are multiples of hyper_stride. A network is calibrated on what the others
    make of the images in float. Raises what the passes raise, and UsageError for a compiled folder.
    """
    _check(source, out)
    each = {part: passes if isinstance(passes, str) else passes.get(part, "") for part in PARTS}
    given = samples(Codec(source, threads=threads), images)
    with Workplace(out, overwrite, DESCRIPTION, "a codec") as folder:
        for part in PARTS:
            progress(f"{part}: {each[part] or 'as it is'}")
            path = source.part(part)
            (name,) = (value.name or "" for value in driver.io.load(path).graph.inputs)
            driver.optimize(
                path, each[part], out=folder / path.name, calibration={name: given[part]}, verify=False,
                threads=threads, progress=progress,
            )  # fmt: skip
        shutil.copyfile(source.root / TABLES, folder / TABLES)
        write_description(folder, {**source.about.model_dump(), "passes": _said(each)})
    return CodecFolder.load(out)


def compile_codec(
    source: CodecFolder, out: Path, size: tuple[int, int], *, target: str | Target = "cpu", overwrite: bool = False,
    **options: Any,
) -> CodecFolder:  # fmt: skip
    """The codec compiled for images of up to (height, width), which is raised to multiples of hyper_stride.

    options: those of `driver.optimize`. Raises what it raises, and UsageError for a compiled folder.
    """
    _check(source, out)
    step = source.about.hyper_stride
    height, width = (-(-side // step) * step for side in size)
    shapes = source.shapes(height, width)
    with Workplace(out, overwrite, DESCRIPTION, "a codec") as folder:
        for part in PARTS:
            path = source.part(part)
            (name,) = (value.name or "" for value in driver.io.load(path).graph.inputs)
            driver.optimize(path, out=folder / part, target=target, pins={name: shapes[part]}, **options)
        shutil.copyfile(source.root / TABLES, folder / TABLES)
        about = source.about.model_copy(update={"size": (height, width)})
        (folder / DESCRIPTION).write_text(about.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return CodecFolder.load(out)


def _check(source: CodecFolder, out: Path) -> None:
    if source.compiled:
        raise UsageError(f"{source.root}: is compiled; give the folder of ONNX files that it was made from")
    if out.exists() and os.path.samefile(out, source.root):
        raise OutputError(f"{out}: is read by this run and will not be replaced; choose another output")


def _said(passes: Mapping[str, str]) -> str:
    """What codec.json says of the passes of each part."""
    if len(set(passes.values())) == 1:
        return next(iter(passes.values()))
    return "; ".join(f"{part}: {text}" for part, text in passes.items())
