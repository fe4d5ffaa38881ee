"""A language model that generates text, as a folder: two graphs over one key-value cache, a tokenizer, a description.

    generator.json            what it is: `Description`
    tokenizer.json            in the format of Hugging Face's tokenizers
    prefill.onnx, decode.onnx and the weights.data of both; or prefill/, decode/: the artifacts compiled from them

prefill takes any number of tokens a call and gives the logits of those that are wanted, decode a fixed number and gives
the logits of all. Inputs: input_ids int64 (1, s), position int64 (1,) = tokens in the cache before the call, of prefill
wanted int64 (n,) = indices below s, and the cache past_key_0, past_value_0, ... float32 (1, k, c, e). Outputs: logits
float32 (1, n, V), top_logits and top_tokens (1, n, K) in falling order, present_key_0, ... = the cache with the call's
rows. Legend: tokens of a call s, capacity c, key-value heads k, head width e, vocabulary V, candidates K.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..passes.errors import ArtifactError, InputError, first_line
from .artifact import MANIFEST, MODEL

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SCHEMA = 1
DESCRIPTION, TOKENIZER, WEIGHTS = "generator.json", "tokenizer.json", "weights.data"
PREFILL, DECODE = "prefill", "decode"
PARTS = (PREFILL, DECODE)


class Description(BaseModel):
    """generator.json. weights: the type they are stored in. add_bos: the token that every text begins with, if any.

    special_tokens: their texts by name (bos_token and the like), which the chat template refers to.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1]
    architecture: str
    capacity: int = Field(ge=2)
    vocabulary: int = Field(ge=1)
    layers: int = Field(ge=1)
    key_value_heads: int = Field(ge=1)
    head_width: int = Field(ge=1)
    decode_tokens: int = Field(ge=1)
    weights: str
    stop_tokens: tuple[int, ...] = ()
    add_bos: int | None = None
    chat_template: str | None = None
    special_tokens: dict[str, str] = Field(default_factory=dict)
    source: str = ""

    @property
    def cache_names(self) -> list[str]:
        """key_0, value_0, ...: inputs have `past_` before it, outputs `present_`."""
        return [f"{kind}_{layer}" for layer in range(self.layers) for kind in ("key", "value")]

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        return (1, self.key_value_heads, self.capacity, self.head_width)


@dataclass(frozen=True)
class GeneratorFolder:
    """compiled: its graphs are artifacts."""

    root: Path
    about: Description
    compiled: bool

    @classmethod
    def load(cls, root: str | os.PathLike[str]) -> GeneratorFolder:
        """Raises ArtifactError when the folder is no generator, or not a whole one."""
        root = Path(root)
        path = root / DESCRIPTION
        if not path.is_file():
            raise ArtifactError(f"{root}: no {DESCRIPTION} in it; expected a folder made by `graphwright export`")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ArtifactError(f"{path}: cannot be read ({first_line(error)}); export the model again") from error
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA:
            raise ArtifactError(f"{path}: schema version {version}; expected {SCHEMA}, export the model again")
        try:
            about = Description.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ArtifactError(f"{path}: {where}: {first['msg'].lower()}; export the model again") from error
        compiled = all((root / part / MANIFEST).is_file() for part in PARTS)
        wanted = [] if compiled else [f"{part}.onnx" for part in PARTS]
        for name in (TOKENIZER, *wanted):
            if not (root / name).is_file():
                raise ArtifactError(f"{root / name}: is missing; copy the folder again or export the model again")
        return cls(root, about, compiled)

    def model(self, part: str) -> Path:
        """The ONNX file of a part; of an artifact the one it carries."""
        return self.root / part / MODEL if self.compiled else self.root / f"{part}.onnx"

    def tokenizer(self) -> Tokenizer:
        """Raises ArtifactError when the file is none, InputError when the package that reads it is not installed."""
        return load_tokenizer(self.root / TOKENIZER)


def is_generator(path: str | os.PathLike[str]) -> bool:
    return (Path(path) / DESCRIPTION).is_file()


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json, which neither pads nor cuts. Raises ArtifactError, and InputError without its package."""
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise InputError(
            "text needs tokenizers, which is not installed: run `pip install 'graphwright[generate]'`"
        ) from error
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ArtifactError(f"{path}: not a tokenizer ({first_line(error)}); expected a tokenizer.json") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
