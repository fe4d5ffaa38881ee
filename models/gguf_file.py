"""Decoders in GGUF: sizes, weights made float32, tokenizer and chat template.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Importing this file imports torch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from graphwright.passes.errors import ModelError, first_line

from . import llama, tokens
from .checkpoint import Checkpoint, Names, check_heads, fill, positive, token_id, whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

ARCHITECTURES = ("llama", "qwen2")  # qwen2: llama with biases at query, key and value
NAMES = Names(
    "blk.{}.",
    {
        "embedding": "token_embd",
        "norm": "output_norm",
        "head": "output",
        "attention_norm": "attn_norm",
        "attention.query": "attn_q",
        "attention.key": "attn_k",
        "attention.value": "attn_v",
        "attention.output": "attn_output",
        "hidden_norm": "ffn_norm",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
    },
)
MAGIC = b"GGUF"
HEAD = "output.weight"  # absent when the embedding is the output projection
ROTARY_FACTORS = "rope_freqs.weight"  # of Llama 3.1: what each frequency of rotary positions is divided by


def load(path: Path) -> Checkpoint:
    """Raises ModelError for a file that is none, is damaged, or has an unknown architecture or tokenizer."""
    reader = _reader(path)
    architecture, sizes = _architecture(reader, path), _sizes(reader, path)
    decoder = fill(llama.Decoder, sizes, _state(reader, sizes, path), NAMES, path)
    vocabulary = _vocabulary(reader, path)
    bos, eos = (_token(reader, f"tokenizer.ggml.{key}_token_id", len(vocabulary), path) for key in ("bos", "eos"))
    fields = {key: _optional(reader, f"tokenizer.ggml.{key}", None) for key in tokens.GGUF_KEYS}
    tokenizer = tokens.from_gguf({key: value for key, value in fields.items() if value is not None})
    special = {"bos_token": bos, "eos_token": eos}
    template = _optional(reader, "tokenizer.chat_template", None)
    if template is not None and not isinstance(template, str):
        raise ModelError(f"{path}: has a chat template of {type(template).__name__}, expected text")
    return Checkpoint(
        architecture=architecture,
        decoder=decoder,
        context=whole(_value(reader, f"{architecture}.context_length", path), "context_length", path),
        tokenizer=tokenizer,
        stop_tokens=tokens.ends(tokenizer, [] if eos is None else [eos]),
        add_bos=bos if _optional(reader, "tokenizer.ggml.add_bos_token", False) else None,
        chat_template=template,
        special_tokens={name: vocabulary[index] for name, index in special.items() if index is not None},
        source=path.name,
    )


def load_llama(path: Path, length: int) -> llama.Llama:
    """The decoder for one fixed length, without a cache."""
    reader = _reader(path)
    sizes = _sizes(reader, path)
    return fill(lambda sizes: llama.Llama(length, sizes), sizes, _state(reader, sizes, path), NAMES, path)


def halves_from_pairs(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a query or key weight from GGUF's order to ours.

    GGUF stores the two members of a rotated pair next to each other (2i, 2i + 1); `rotate` wants them half a
    head apart (i, i + e/2).
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _reader(path: Path) -> Any:
    from gguf import GGUFReader

    try:
        with open(path, "rb") as file:
            begin = file.read(len(MAGIC))
        if len(begin) == len(MAGIC) and begin != MAGIC:
            raise ModelError(f"{path}: is not a GGUF file; expected one, a Hugging Face folder or a generator folder")
        return GGUFReader(path)
    except ModelError:
        raise
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error}); expected a GGUF file") from error
    except Exception as error:  # whatever the reader meets behind the end or in wrong bytes
        raise ModelError(f"{path}: is not a whole GGUF file ({first_line(error)}); download it again") from error


def _value(reader: Any, key: str, path: Path) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ModelError(f"{path}: has no {key}; expected a complete GGUF file of a decoder")
    return field.contents()


def _optional(reader: Any, key: str, default: Any) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _vocabulary(reader: Any, path: Path) -> list[str]:
    tokens = _value(reader, "tokenizer.ggml.tokens", path)
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ModelError(f"{path}: tokenizer.ggml.tokens is no list of texts; expected a complete GGUF file")
    return tokens


def _token(reader: Any, key: str, vocabulary: int, path: Path) -> int | None:
    found = _optional(reader, key, None)
    return None if found is None else token_id(found, key, vocabulary, path)


def _architecture(reader: Any, path: Path) -> str:
    found = _value(reader, "general.architecture", path)
    if found not in ARCHITECTURES:
        raise ModelError(f"{path}: is of architecture {found!r}; expected one of {', '.join(ARCHITECTURES)}")
    return found


def _sizes(reader: Any, path: Path) -> llama.Sizes:
    architecture = _architecture(reader, path)

    def count(key: str, default: int | None = None) -> int:
        name = f"{architecture}.{key}"
        return whole(_value(reader, name, path) if default is None else _optional(reader, name, default), key, path)

    def number(key: str, default: float | None = None) -> float:
        name = f"{architecture}.{key}"
        return positive(_value(reader, name, path) if default is None else _optional(reader, name, default), key, path)

    tensors = {tensor.name for tensor in reader.tensors}
    heads, width = count("attention.head_count"), count("embedding_length")
    own = count("attention.key_length", width // heads)
    turned, values = count("rope.dimension_count", own), count("attention.value_length", own)
    if not own == turned == values:
        raise ModelError(
            f"{path}: heads have keys of width {own}, of which {turned} turn, and values of width {values}; "
            "expected one width for all three"
        )
    sizes = llama.Sizes(
        vocabulary=len(_vocabulary(reader, path)),
        width=width,
        layers=count("block_count"),
        heads=heads,
        key_value_heads=count("attention.head_count_kv", heads),
        hidden=count("feed_forward_length"),
        own_head_width=own,
        rotary_base=number("rope.freq_base", 10_000.0),
        epsilon=number("attention.layer_norm_rms_epsilon"),
        tied=HEAD not in tensors,
        biases=architecture == "qwen2",
    )
    check_heads(sizes, path)
    factor = number("rope.scaling.factor", 1.0)
    return dataclasses.replace(sizes, rotary_factors=_rotary_factors(reader, architecture, factor, sizes, path))


def _rotary_factors(
    reader: Any, architecture: str, factor: float, sizes: llama.Sizes, path: Path
) -> tuple[float, ...]:
    """What the frequencies of rotary positions are divided by: all by one factor, or each by its own."""
    kind = _optional(reader, f"{architecture}.rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise ModelError(f"{path}: scales its rotary positions ({kind}); expected none or linear")
    scale = 1.0 if kind == "none" else factor
    own = next((tensor.data for tensor in reader.tensors if tensor.name == ROTARY_FACTORS), None)
    count = sizes.head_width // 2
    if own is None:
        return () if scale == 1 else (scale,) * count
    if own.shape != (count,) or own.dtype != np.float32 or not (np.isfinite(own) & (own > 0)).all():
        raise ModelError(f"{path}: {ROTARY_FACTORS} is {own.dtype}{list(own.shape)}, expected {count} float32 above 0")
    return tuple(scale * value for value in own.tolist())


def _state(reader: Any, sizes: llama.Sizes, path: Path) -> dict[str, torch.Tensor]:
    """Tensors by GGUF's names. Rows of query and key are put in our order where GGUF has another, in llama."""
    from gguf import dequantize

    paired = {"attn_q.weight": sizes.heads, "attn_k.weight": sizes.key_value_heads}
    state = {}
    for tensor in reader.tensors:
        if tensor.name == ROTARY_FACTORS:
            continue
        try:
            array = dequantize(tensor.data, tensor.tensor_type)
            heads = paired.get(tensor.name.partition(".")[2].partition(".")[2])
            if heads and not sizes.biases:
                array = halves_from_pairs(array, heads)
        except (NotImplementedError, ValueError) as error:
            kind = tensor.tensor_type.name
            raise ModelError(f"{path}: {tensor.name} of type {kind} cannot be read ({first_line(error)})") from error
        state[tensor.name] = torch.from_numpy(array.copy())
    return state
