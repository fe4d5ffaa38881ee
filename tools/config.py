"""The settings of `optimize` as one value: from the command line, from a YAML file, from defaults, in this order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from graphwright.passes.errors import UsageError, did_you_mean
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .shell import parse_shape


def _pipeline(value: object) -> object:
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _shape(value: object) -> object:
    return parse_shape(value, "pin") if isinstance(value, str) else value


Size = Annotated[int, Field(ge=0)]
# A shape may be written as a list of sizes or as in `--pin`: 1x3x224x224.
Shape = Annotated[tuple[Size, ...], BeforeValidator(_shape, json_schema_input_type=list[Size] | str)]
PipelineText = Annotated[str, BeforeValidator(_pipeline, json_schema_input_type=str | list[str])]


class Settings(BaseModel):
    """Everything `optimize` can be told. In a file the keys are written as the options are: `max-drop: 0.01`.

    Paths in a file are relative to its folder.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=lambda name: name.replace("_", "-"),
        validate_by_name=True,
    )

    model: str | None = Field(default=None, description="The ONNX file to optimize.")
    passes: PipelineText = Field(
        default="", description="Passes to run after the preset: a string, or a list of passes."
    )
    preset: str | None = Field(default=None, description="Passes to run first; default: what the output needs.")
    target: str | None = Field(default=None, description="Compile for this target.")
    output: str | None = Field(default=None, description="ONNX file, or artifact folder with a target.")
    pin: dict[str, Shape] = Field(default_factory=dict, description="Input name -> shape to fix.")
    calibration: str | None = Field(
        default=None,
        description="Real inputs: an .npz file or a folder of them, a text, or images with preprocess.yaml.",
    )
    tokenizer: str | None = Field(default=None, description="A tokenizer.json for a calibration text.")
    dry_run: bool = Field(default=False, description="Say what would change and write nothing.")
    report: str | None = Field(default=None, description="Write what was done to this .html or .json file.")
    seed: int = Field(default=0, ge=0, description="Seed of every random choice.")
    jobs: int = Field(default=1, ge=1, description="Processes for work that can be spread.")
    backend: Literal["local", "ray", "dask"] = Field(default="local", description="Where such work runs.")
    max_drop: float | None = Field(default=None, ge=0, description="Error budget of lossy and learned passes.")
    overwrite: bool = Field(default=False, description="Replace outputs that exist.")
    verify: bool = Field(default=True, description="Compare the result with the original.")
    threads: int | None = Field(default=None, ge=1, description="Threads of the check; default: all processors.")
    tune: float | None = Field(
        default=None, ge=0, allow_inf_nan=False,
        description="Minutes in which tiles of kernels are measured before the model is compiled with the best ones.",
    )  # fmt: skip
    dump: str | None = Field(
        default=None, description="Save the model after every pass that changed it to this folder."
    )


PATHS = ("model", "output", "calibration", "tokenizer", "report", "dump")


def load_settings(given: Mapping[str, Any], file: str | None) -> Settings:
    """Settings from what was given on the command line (names as fields) over those of the file.

    Pins of both are joined input by input. Raises UsageError for a file that cannot be used.
    """
    values = _read(Path(file)) if file else {}
    pins = {**values.get("pin", {}), **given.get("pin", {})}
    values.update(given)
    if pins:
        values["pin"] = pins
    return Settings(**values)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give --config a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"{path}: holds {type(data).__name__}; expected `key: value` lines")
    known = {name.replace("_", "-"): name for name in Settings.model_fields}
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = known.get(str(key).replace("_", "-"))
        if name is None:
            raise UsageError(f"{path}: unknown key {key!r}; {did_you_mean(str(key), known)}")
        values[name] = value
    try:
        settings = Settings(**values)
    except ValidationError as error:
        raise UsageError(f"{path}: {_explain(error)}") from error
    read = {name: getattr(settings, name) for name in values}
    for name in PATHS:
        if read.get(name) is not None:
            read[name] = str(path.parent / read[name])
    return read


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part).replace("_", "-") for part in first["loc"])
    return f"{where}: {first['msg'].lower()}; found {first['input']!r}"


def schema() -> dict[str, Any]:
    """The JSON Schema of a configuration file."""
    data = Settings.model_json_schema(by_alias=True)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **data,
        "title": "graphwright optimize",
    }
