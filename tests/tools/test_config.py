"""Settings from a file: precedence, kinds, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from click.testing import Result
from graphwright.passes.errors import UsageError
from graphwright.tools.config import Settings, load_settings, schema

Cli = Callable[..., Result]
SCHEMA = Path(__file__).parents[2] / "docs" / "config.schema.json"


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "job.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_the_command_line_goes_before_the_file_and_the_file_before_defaults(config: Callable[[str], str]) -> None:
    file = config("seed: 7\nmax-drop: 0.5\npin: {x: 1x3, y: [4]}\n")
    settings = load_settings({"seed": 9, "pin": {"y": (5,)}}, file)
    assert (settings.seed, settings.max_drop, settings.jobs) == (9, 0.5, 1)
    assert settings.pin == {"x": (1, 3), "y": (5,)}


def test_keys_may_be_written_with_underscores_and_passes_as_a_list(config: Callable[[str], str]) -> None:
    settings = load_settings({}, config("max_drop: 0.5\npasses: [simplify, 'fold-constants:max_bytes=1']\n"))
    assert (settings.max_drop, settings.passes) == (0.5, "simplify,fold-constants:max_bytes=1")


def test_paths_are_relative_to_the_file(config: Callable[[str], str], tmp_path: Path) -> None:
    settings = load_settings({}, config("model: m.onnx\noutput: /abs/out.onnx\n"))
    assert (settings.model, settings.output) == (str(tmp_path / "m.onnx"), "/abs/out.onnx")


def test_an_empty_file_says_nothing(config: Callable[[str], str]) -> None:
    assert load_settings({}, config("")) == Settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("overwrit: true", r"unknown key 'overwrit'; did you mean overwrite\?"),
        ("seed: many", "seed: input should be a valid integer.*; found 'many'"),
        ("seed: -1", "seed: input should be greater than or equal to 0; found -1"),
        ("backend: slurm", "backend: input should be 'local', 'ray' or 'dask'; found 'slurm'"),
        ("pin: {x: 1xN}", "pin: 'n' in '1xN' is not a size"),
        ("pin: {x: [1, -3]}", "pin.x.1: input should be greater than or equal to 0; found -3"),
        ("- a\n- b", "holds list; expected `key: value` lines"),
        ("a: [", "not YAML: "),
    ],
)
def test_a_file_that_cannot_be_used(config: Callable[[str], str], text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_settings({}, config(text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be read .*; give --config a YAML file"):
        load_settings({}, str(tmp_path / "none.yaml"))


def test_optimize_reads_it(cli: Cli, model: Path, config: Callable[[str], str]) -> None:
    file = config("model: model.onnx\npreset: none\npasses: simplify\noutput: from-file.onnx\nverify: false\n")
    assert "NOT VERIFIED: --no-verify" in cli("optimize", "--config", file).stdout
    assert len(onnx.load(model.with_name("from-file.onnx")).graph.node) == 3
    cli("optimize", "--config", file, "--passes", "", "-o", model.with_name("other.onnx"))
    assert len(onnx.load(model.with_name("other.onnx")).graph.node) == 4


def test_the_published_schema_is_the_one_in_force(cli: Cli) -> None:
    """Rewrite it with `graphwright config-schema > docs/config.schema.json`."""
    assert json.loads(SCHEMA.read_text()) == schema() == json.loads(cli("config-schema").stdout)


def test_the_schema_knows_every_option_of_the_command() -> None:
    from graphwright.tools.optimize import command

    names = {param.name for param in command.params}
    keys = {key.replace("-", "_") for key in schema()["properties"]}
    only_on_the_command_line = {"config", "format_", "json_", "verbose", "quiet", "pins"}
    assert names - only_on_the_command_line == keys - {"pin"}
