"""`graphwright export` writes a whole generator folder or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

torch = pytest.importorskip("torch")
from graphwright.models import generators, gpt, huggingface, tokens  # noqa: E402 -- needs torch

pytestmark = pytest.mark.torch
Cli = Callable[..., Result]
FILES = {"generator.json", "tokenizer.json", "prefill.onnx", "decode.onnx", "weights.data"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Hugging Face folder of a small GPT-2."""
    folder = tmp_path / "model"
    huggingface.save_gpt2(gpt.seeded(0, gpt.Sizes(vocabulary=256, positions=32, width=32, layers=1, heads=2)), folder)
    tokens.single_bytes().save(str(folder / "tokenizer.json"))
    return folder


def test_a_folder_is_written_and_described(cli: Cli, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cli("export", model, "-o", out, "--decode-tokens", 3, "--weights", "bfloat16")
    assert result.stdout.startswith(f"{out}: gpt2, 1 layer, 256 tokens, capacity 32, ")
    assert {file.name for file in out.iterdir()} == FILES
    about = json.loads((out / "generator.json").read_text())
    assert about == {
        "schema_version": 1, "architecture": "gpt2", "capacity": 32, "vocabulary": 256, "layers": 1,
        "key_value_heads": 2, "head_width": 16, "decode_tokens": 3, "weights": "bfloat16", "stop_tokens": [],
        "add_bos": None, "chat_template": None, "special_tokens": {}, "source": "model",
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_only_a_generator_folder_is_replaced(cli: Cli, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("precious")
    assert "already exists; give --overwrite" in cli("export", model, "-o", out, expect=1).stderr
    result = cli("export", model, "-o", out, "--overwrite", expect=1)
    assert f"{out}: is not a generator folder and will not be replaced" in result.stderr
    (out / "precious").rename(out / generators.DESCRIPTION)
    cli("export", model, "-o", out, "--overwrite")
    assert {file.name for file in out.iterdir()} == FILES


def test_mistakes_end_in_one_line_and_leave_nothing(cli: Cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    before = sorted(tmp_path.iterdir())
    for arguments, code, message in [
        ((tmp_path / "bad.gguf",), 1, "bad.gguf: is not a whole GGUF file"),
        ((tmp_path / "absent.gguf",), 2, "absent.gguf' is neither a file nor a folder nor a model of text"),
        ((model, "--capacity", 33), 2, "capacity is 33, expected 2 to 32, the positions of the model"),
        ((model, "--weights", "int4"), 2, "'int4' is not one of"),
    ]:
        result = cli("export", *arguments, "-o", tmp_path / "out", expect=code)
        assert message in result.stderr and result.stderr.count("\n") <= 3, result.stderr
    assert sorted(tmp_path.iterdir()) == before
