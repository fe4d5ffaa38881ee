"""A learned image codec as a folder: four networks between whole numbers, tables of frequencies, a description.

    codec.json                what it is: `Description`
    tables.npz                y (scales, symbols) and z (channels of z, symbols): how often each symbol is expected
    analysis.onnx             image (1, 3, h, w), 0 to 255    -> latents (1, Y, h / 16, w / 16); rounded: y
    hyper-analysis.onnx       symbols y                       -> hyper_latents (1, Z, h / 64, w / 64); rounded: z
    hyper-synthesis.onnx      hyper_symbols z                 -> places (1, Y, h / 16, w / 16); rounded: tables of y
    synthesis.onnx            symbols y                       -> image; rounded, 0 to 255

or analysis/, hyper-analysis/, ...: the artifacts that were compiled from them, for images of one size. All are float32.
Legend: channels of the latents Y and Z.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..passes.errors import ArtifactError, first_line
from .artifact import MANIFEST, MODEL
from .entropy import Tables

SCHEMA = 1
DESCRIPTION, TABLES = "codec.json", "tables.npz"
PARTS = ("analysis", "hyper-analysis", "hyper-synthesis", "synthesis")
DECODING = PARTS[2:]
Kind = Literal["analysis", "hyper-analysis", "hyper-synthesis", "synthesis"]
REMEDY = "export the codec again"


class Description(BaseModel):
    """codec.json. stride, hyper_stride: pixels of the image for a place of y and of z. passes: what the networks were
    rewritten with. size: (height, width) of compiled networks, in multiples of hyper_stride. streams: a hash of what
    decoding depends on; a stream is for codecs of the same one."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1]
    name: str
    latents: int = Field(ge=1, le=4096)
    hyper: int = Field(ge=1, le=4096)
    stride: int = Field(ge=1, le=256)
    hyper_stride: int = Field(ge=1, le=1024)
    passes: str = ""
    size: tuple[int, int] | None = None
    streams: str = Field(pattern="^[0-9a-f]{8}$")


@dataclass(frozen=True)
class CodecFolder:
    """compiled: its networks are artifacts."""

    root: Path
    about: Description
    y: Tables
    z: Tables

    @classmethod
    def load(cls, root: str | os.PathLike[str]) -> CodecFolder:
        """Raises ArtifactError when the folder is no codec, or not a whole one."""
        root = Path(root)
        about = _description(root)
        y, z = _tables(root / TABLES, about)
        compiled = about.size is not None
        for part in PARTS:
            path = root / part / MANIFEST if compiled else root / f"{part}.onnx"
            if not path.is_file():
                raise ArtifactError(f"{path}: is missing; copy the folder again or {REMEDY}")
        return cls(root, about, y, z)

    @property
    def compiled(self) -> bool:
        return self.about.size is not None

    def part(self, name: str) -> Path:
        """The artifact or ONNX file of a network."""
        return self.root / name if self.compiled else self.root / f"{name}.onnx"

    def model(self, name: str) -> Path:
        """The ONNX file of a network; of an artifact the one it carries."""
        return self.root / name / MODEL if self.compiled else self.root / f"{name}.onnx"

    def shapes(self, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Input shape of each network for images of a size, which is in multiples of hyper_stride."""
        about = self.about
        latents = (1, about.latents, height // about.stride, width // about.stride)
        hyper = (1, about.hyper, height // about.hyper_stride, width // about.hyper_stride)
        return dict(zip(PARTS, ((1, 3, height, width), latents, hyper, latents), strict=True))


def write_description(folder: Path, about: dict[str, Any]) -> None:
    """codec.json of a folder of ONNX files, with the hash of what its streams depend on."""
    digest = hashlib.sha256()
    for name in (TABLES, *(f"{part}.onnx" for part in DECODING)):
        digest.update(hashlib.sha256((folder / name).read_bytes()).digest())
    checked = Description.model_validate({**about, "schema_version": SCHEMA, "streams": digest.hexdigest()[:8]})
    (folder / DESCRIPTION).write_text(json.dumps(checked.model_dump(), indent=1) + "\n", encoding="utf-8")


def _description(root: Path) -> Description:
    path = root / DESCRIPTION
    if not path.is_file():
        raise ArtifactError(f"{root}: no {DESCRIPTION} in it; expected the folder of an image codec")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: cannot be read ({first_line(error)}); {REMEDY}") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA:
        raise ArtifactError(f"{path}: schema version {version}; expected {SCHEMA}, {REMEDY}")
    try:
        return Description.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{path}: {where}: {first['msg'].lower()}; {REMEDY}") from error


def _tables(path: Path, about: Description) -> tuple[Tables, Tables]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in ("y", "z")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{path}: cannot be read ({first_line(error)}); {REMEDY}") from error
    rows: dict[str, Callable[[int], bool]] = {"y": lambda n: n > 0, "z": lambda n: n == about.hyper}
    for name, array in found.items():
        right = array.ndim == 2 and array.dtype == np.uint32 and rows[name](len(array)) and array.shape[1] % 2 == 1
        if not right or not 3 <= array.shape[1] < 1 << 12 or not array.any(1).all():
            raise ArtifactError(f"{path}: {name} is {array.dtype} {array.shape}, no table of frequencies; {REMEDY}")
    return Tables(found["y"]), Tables(found["z"])
