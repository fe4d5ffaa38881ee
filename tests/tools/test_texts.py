"""Calibration from a text: sentences for encoders, windows for language models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.errors import ArtifactError, InputError
from graphwright.tools.calibration import load_calibration

tokenizers = pytest.importorskip("tokenizers")

ENCODER = """<ir_version: 10, opset_import: ["" : 20]>
odd (int64[B,S] input_ids, int64[B,S] attention_mask, int32[B,S] token_type_ids) => (int64[B,S] y)
{ y = Mul (input_ids, attention_mask) }"""
DECODER = """<ir_version: 10, opset_import: ["" : 20]>
odd (int64[B,S] ids) => (int64[B,S] y) { y = Identity (ids) }"""
WORDS = ["[PAD]", "[END]", *"abcdefghij"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer whose tokens are the words a to j, with [END] behind."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A [END]", special_tokens=[("[END]", 1)])
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def load(folder: Path, text: str, model: str = ENCODER, **more: object) -> dict[str, list[np.ndarray]]:
    (folder / "t.txt").write_text(text)
    graph = ir.from_proto(onnx.parser.parse_model(model))
    return load_calibration(folder / "t.txt", graph, **{"pins": {}, **more})  # type: ignore[arg-type]


def test_a_sentence_a_line_padded_to_eights(folder: Path) -> None:
    found = load(folder, "a b c\n\n a b c d e f g h \n")
    assert [x.shape for x in found["input_ids"]] == [(1, 8), (1, 16)]
    np.testing.assert_array_equal(found["input_ids"][0], [[2, 3, 4, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(found["attention_mask"][0], [[1, 1, 1, 1, 0, 0, 0, 0]])
    assert found["attention_mask"][1].sum() == 9 and found["token_type_ids"][0].dtype == np.int32


def test_a_pinned_length_cuts_before_the_last_token(folder: Path) -> None:
    pins = {name: (1, 4) for name in ("input_ids", "attention_mask", "token_type_ids")}
    found = load(folder, "a b c d e f\na", pins=pins)
    np.testing.assert_array_equal(found["input_ids"][0], [[2, 3, 4, 1]])
    np.testing.assert_array_equal(found["attention_mask"][1], [[1, 1, 0, 0]])


def test_a_language_model_gets_windows(folder: Path) -> None:
    found = load(folder, "a b c\nd e f g", DECODER, pins={"ids": (1, 3)})
    np.testing.assert_array_equal(np.concatenate(found["ids"]), [[2, 3, 4], [5, 6, 7]])


def test_a_named_tokenizer_wins(folder: Path) -> None:
    other = folder / "other.json"
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"].update(a=9, h=2)
    other.write_text(json.dumps(data))
    found = load(folder, "a", DECODER.replace("S]", "2]"), tokenizer=other)
    np.testing.assert_array_equal(found["ids"][0], [[9, 1]])


@pytest.mark.parametrize(
    "text, model, message",
    [
        ("\n", ENCODER, "holds too little text"),
        ("a", DECODER, "holds too little text"),
        ("a", ENCODER.replace("int64[B,S] input_ids", "float[B,S] input_ids"), "a text gives one input of tokens"),
        ("a", DECODER.replace("[B,S]", "[4,S]"), "has a batch of 4; a text gives samples of 1"),
        ("a", DECODER.replace("[B,S]", "[S]"), "has rank 1; a text gives"),
    ],
)
def test_refusals(folder: Path, text: str, model: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(folder, text, model)


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer is known for the model 'odd'; give --tokenizer FILE\.json"):
        load(folder, "a")
    with pytest.raises(ArtifactError, match="not a tokenizer"):
        load(folder, "a", tokenizer=folder / "t.txt")
    (folder / "t.txt").unlink()
    with pytest.raises(InputError, match="cannot be read as text"):
        load_calibration(folder / "t.txt", ir.from_proto(onnx.parser.parse_model(ENCODER)), {})
