"""Calibration inputs from a text: sentences for encoders, windows of running text for language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.passes.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

MASK, TYPES = "attention_mask", "token_type_ids"
STEP = 8  # lengths of sentences are rounded up to a multiple of this, so that many have the same
LONGEST = 128  # tokens of a sentence or window where the model does not say


def load_text(
    path: Path, model: ir.Model, pins: Mapping[str, Sequence[int]], tokenizer: Path | None = None
) -> dict[str, list[np.ndarray]]:
    """Input name -> arrays (1, tokens), one a sample.

    A model with an input `attention_mask` gets a sentence a line, padded to a multiple of 8 tokens; another one gets
    windows of the whole text. The tokenizer is `tokenizer`, or the file tokenizer.json or MODEL.tokenizer.json beside
    the text, or the one of the model of that name in `graphwright models list`. Raises InputError.
    """
    import numpy as np

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}); expected UTF-8, one sentence a line") from error
    from graphwright.runtime.feeds import required_inputs

    inputs = {value.name or "": value for value in required_inputs(model)}
    names = [name for name in inputs if name not in (MASK, TYPES)]
    if len(names) != 1 or any(v.dtype is not None and not v.dtype.is_integer() for v in inputs.values()):
        raise InputError(
            f"{path}: a text gives one input of tokens, {MASK} and {TYPES}; the model's inputs are {', '.join(inputs)}"
        )
    fixed = _length(inputs[names[0]], pins)
    encoder = _tokenizer(path, model, tokenizer)
    if MASK in inputs:
        rows = _sentences(encoder, [line.strip() for line in text.splitlines() if line.strip()], fixed)
    else:
        rows = _windows(encoder, text, fixed or LONGEST)
    if not rows:
        raise InputError(f"{path}: holds too little text for a sample")
    samples: dict[str, list[np.ndarray]] = {name: [] for name in inputs}
    for ids, length in rows:
        made = {names[0]: ids, MASK: np.arange(len(ids)) < length, TYPES: np.zeros(len(ids))}
        for name, value in inputs.items():
            kind = value.dtype.numpy() if value.dtype is not None else np.int64
            samples[name].append(np.asarray(made[name], kind)[None])
    return samples


def _length(value: ir.Value, pins: Mapping[str, Sequence[int]]) -> int | None:
    """Tokens of a sample when the model or a pin fixes them. Raises InputError when the batch is not 1."""
    shape: Sequence[Any] = pins.get(value.name or "") or list(value.shape if value.shape is not None else [None, None])
    if len(shape) != 2:
        raise InputError(f"input {value.name!r} has rank {len(shape)}; a text gives (batch, tokens)")
    batch, length = shape
    if isinstance(batch, int) and batch != 1:
        raise InputError(f"input {value.name!r} has a batch of {batch}; a text gives samples of 1")
    return length if isinstance(length, int) else None


def _tokenizer(path: Path, model: ir.Model, given: Path | None) -> Any:
    from graphwright.models import tokens
    from graphwright.runtime.generator_folder import load_tokenizer

    name = model.graph.name or ""
    for file in [given] if given else [path.with_name("tokenizer.json"), path.with_name(f"{name}.tokenizer.json")]:
        if given or file.is_file():
            return load_tokenizer(file)
    if name in tokens.TOKENIZERS:
        return tokens.TOKENIZERS[name]()
    raise InputError(f"{path}: no tokenizer is known for the model {name!r}; give --tokenizer FILE.json")


def _sentences(encoder: Any, lines: Sequence[str], fixed: int | None) -> list[tuple[np.ndarray, int]]:
    """(tokens padded with 0, how many there are) of each line. A longer one keeps its last token."""
    import numpy as np

    most = fixed or LONGEST
    rows = []
    for encoding in encoder.encode_batch(list(lines)):
        ids = encoding.ids if len(encoding.ids) <= most else [*encoding.ids[: most - 1], encoding.ids[-1]]
        size = fixed or min(most, -(-len(ids) // STEP) * STEP)
        padded = np.zeros(size, np.int64)
        padded[: len(ids)] = ids
        rows.append((padded, len(ids)))
    return rows


def _windows(encoder: Any, text: str, length: int) -> list[tuple[np.ndarray, int]]:
    import numpy as np

    ids = np.array(encoder.encode(text).ids, np.int64)
    return [(ids[at : at + length], length) for at in range(0, len(ids) - length + 1, length)]
