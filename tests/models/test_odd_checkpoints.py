"""Files of decoders that nobody would write on purpose: each is read rightly or refused in a line that says why."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphwright.models import tokens
from graphwright.passes.errors import ModelError

torch = pytest.importorskip("torch")
pytest.importorskip("gguf")
from gguf import GGUFValueType as Kind  # noqa: E402
from graphwright.models import gguf_file, gpt, huggingface, llama  # noqa: E402 -- needs torch

from . import decoders  # noqa: E402 -- needs torch
from .test_generators import UNTIED, logits_of, write_folder, write_gguf  # noqa: E402 -- needs torch

pytestmark = pytest.mark.torch
COUNT, NUMBER = "expected a whole number of at least 1", "expected a number above 0"
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_size", "48", f"hidden_size is '48', {COUNT}"),
        ("hidden_size", None, f"hidden_size is None, {COUNT}"),
        ("hidden_size", 0, f"hidden_size is 0, {COUNT}"),
        ("hidden_size", 48.0, f"hidden_size is 48.0, {COUNT}"),
        ("hidden_size", 10**9, r"embed_tokens.weight has shape \[256, 48\], expected \[256, 1000000000\]"),
        ("intermediate_size", 2**40, "gate_proj.weight has shape"),
        ("num_attention_heads", 0, f"num_attention_heads is 0, {COUNT}"),
        ("num_attention_heads", 7, "has 7 heads of width 8 and 2 of keys; expected an even width"),
        ("num_key_value_heads", 4, "has 6 heads of width 8 and 4 of keys"),
        ("num_key_value_heads", None, "k_proj.weight has shape"),
        ("head_dim", 7, "has 6 heads of width 7 and 2 of keys"),
        ("num_hidden_layers", 10**7, "tensors, too few for 10000000 layers"),
        ("num_hidden_layers", 3, "has no tensor model.layers.2."),
        ("num_hidden_layers", 1, "holds model.layers.1.input_layernorm.weight and 8 more, which this architecture"),
        ("rms_norm_eps", "x", f"rms_norm_eps is 'x', {NUMBER}"),
        ("rope_theta", 0, f"rope_theta is 0, {NUMBER}"),
        ("rope_theta", None, f"rope_theta is None, {NUMBER}"),
        ("rope_parameters", 3, "has rotary positions of 3, expected an object"),
        ("rope_parameters", {"rope_type": "yarn"}, r"scales its rotary positions \(yarn\)"),
        ("rope_scaling", {"type": "linear"}, f"factor is None, {NUMBER}"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8}, f"low_freq_factor is None, {NUMBER}"),
        ("rope_scaling", {**LLAMA3, "low_freq_factor": 4}, "low_freq_factor is 4, expected less than high_freq_factor"),
        ("partial_rotary_factor", 0.5, r"turns a part of each head \(0.5\)"),
        ("layer_types", ["full_attention", "sliding_attention"], "attends in a sliding window"),
        ("max_position_embeddings", "a", f"max_position_embeddings is 'a', {COUNT}"),
        ("eos_token_id", "x", "eos_token_id is 'x', expected a token, 0 to 255"),
        ("eos_token_id", [2, 256], "eos_token_id is 256, expected a token, 0 to 255"),
        ("model_type", ["llama"], r"is of model type \['llama'\]; expected one of llama"),
    ],
)
def test_odd_sizes_in_a_hugging_face_folder(name: str, value: Any, message: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", decoders.small_llama(decoders.GROUPED), config={name: value})
    with pytest.raises(ModelError, match=message):
        huggingface.load(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors.index.json", '{"weight_map": []}', "has no map of tensors to files"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 3}}', "has no map of tensors to files"),
        ("model.safetensors.index.json", '{"weight_map": {}}', "has 0 tensors, too few for 2 layers"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "/etc/passwd"}}', "expected files of the same folder"),
        ("config.json", "[" * 100_000, "config.json: cannot be read as JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: holds a list, expected an object"),
        ("tokenizer_config.json", '{"chat_template": 5}', "has a chat template of int, expected text"),
        ("generation_config.json", '{"eos_token_id": [1, "a"]}', "eos_token_id is 'a', expected a token"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: cannot be read as text"),
        ("model.safetensors", b"", "is not a whole safetensors file"),
        ("model.safetensors", b"\xff" * 100, "is not a whole safetensors file"),
    ],
)
def test_odd_files_in_a_hugging_face_folder(file: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", decoders.small_llama(decoders.GROUPED))
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError, match=message):
        huggingface.load(folder)


def test_templates_by_other_names_are_none(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", decoders.small_llama(decoders.GROUPED))
    for listed in ([{"x": 1}], ["a"], [{"name": "tools", "template": "t"}]):
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
        assert huggingface.load(folder).chat_template is None


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_quantized_weights_without_their_scales_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", decoders.small_llama(decoders.GROUPED), dtype=dtype)
    with pytest.raises(ModelError, match=r"embed_tokens.weight holds torch.u?int8, expected floating-point numbers"):
        huggingface.load(folder)


def by_definition(width: int, base: float, scaling: dict[str, Any]) -> list[float]:
    """Frequencies of Llama 3.1 as Meta's implementation computes them, one by one."""
    old, low, high = (scaling[n] for n in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    found = []
    for i in range(0, width, 2):
        frequency = base ** (-i / width)
        length = 2 * math.pi / frequency
        if length < old / high:
            found.append(frequency)
        elif length > old / low:
            found.append(frequency / scaling["factor"])
        else:
            smooth = (old / length - low) / (high - low)
            found.append((1 - smooth) * frequency / scaling["factor"] + smooth * frequency)
    return found


def test_scaled_rotary_positions_of_llama_3(tmp_path: Path) -> None:
    """By the folder's options as by the factors that a GGUF file holds: all three kinds of frequency occur."""
    sizes = decoders.GROUPED
    model = decoders.small_llama(sizes)
    folder = write_folder(tmp_path / "m", model, config={"rope_scaling": LLAMA3})
    found = huggingface.load(folder).decoder
    expected = by_definition(sizes.head_width, sizes.rotary_base, LLAMA3)
    plain = by_definition(sizes.head_width, sizes.rotary_base, {**LLAMA3, "factor": 1.0})
    factors = np.array(plain) / np.array(expected)
    assert factors.min() == 1 and factors.max() > 7.9 and ((factors > 1.01) & (factors < 7.9)).any()
    cos, sin = (table.double().numpy() for table in found.sizes.rotary_tables(24))
    angles = np.outer(np.arange(24), expected)
    np.testing.assert_allclose(cos, np.cos(np.tile(angles, 2)), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(np.tile(angles, 2)), atol=1e-6)
    assert np.abs(logits_of(found) - logits_of(model)).max() > 1e-3

    def add(writer: Any) -> None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))

    file = write_gguf(tmp_path / "m.gguf", model, change=add)
    np.testing.assert_allclose(logits_of(gguf_file.load(file).decoder), logits_of(found), atol=1e-5)


def test_linearly_scaled_rotary_positions(tmp_path: Path) -> None:
    model = decoders.small_llama(decoders.GROUPED)
    folder = write_folder(tmp_path / "m", model, config={"rope_scaling": {"type": "linear", "factor": 2}})
    found = huggingface.load(folder).decoder
    cos, _ = found.sizes.rotary_tables(9)
    plain, _ = model.sizes.rotary_tables(9)
    np.testing.assert_allclose(cos[::2], plain[:5], atol=1e-6)

    def add(writer: Any) -> None:
        writer.add_rope_scaling_factor(2.0)

    np.testing.assert_array_equal(logits_of(gguf_file.load(write_gguf(tmp_path / "a.gguf", model, change=add)).decoder),
                                  logits_of(found))  # fmt: skip


@pytest.mark.parametrize("factors", [np.ones(3, np.float32), np.zeros(4, np.float32), np.ones(4, np.float16)])
def test_bad_factors_of_rotary_positions_are_refused(factors: np.ndarray, tmp_path: Path) -> None:
    file = write_gguf(
        tmp_path / "m.gguf", decoders.small_llama(decoders.GROUPED),
        change=lambda writer: writer.add_tensor("rope_freqs.weight", factors),
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"rope_freqs.weight is float\d+\[\d\], expected 4 float32 above 0"):
        gguf_file.load(file)


FORMS = {
    "head width of its own": dataclasses.replace(decoders.GROUPED, own_head_width=12),
    "untied": UNTIED,
    "biases, tied, grouped": dataclasses.replace(decoders.GROUPED, biases=True),
    "slow angles": dataclasses.replace(decoders.GROUPED, rotary_base=1e6),
    "one key head": dataclasses.replace(decoders.GROUPED, key_value_heads=1),
    "one layer": dataclasses.replace(decoders.GROUPED, layers=1),
}


@pytest.mark.parametrize("sizes", FORMS.values(), ids=FORMS)
def test_forms_of_the_family(sizes: llama.Sizes, tmp_path: Path) -> None:
    """In both formats; biases make it a qwen2."""
    model = decoders.small_llama(sizes)
    kind = "qwen2" if sizes.biases else "llama"
    expected = logits_of(model)
    folder = write_folder(tmp_path / "m", model, config={"model_type": kind})
    np.testing.assert_array_equal(logits_of(huggingface.load(folder).decoder), expected)
    file = write_gguf(tmp_path / "m.gguf", model, kind)
    np.testing.assert_array_equal(logits_of(gguf_file.load(file).decoder), expected)


def write_gpt2(folder: Path, config: dict[str, Any], change: Callable[[dict[str, Any]], object] | None = None) -> Path:
    from safetensors.torch import load_file, save_file

    huggingface.save_gpt2(gpt.seeded(0, decoders.LEARNED), folder)
    tokens.single_bytes().save(str(folder / "tokenizer.json"))
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, **config}))
    if change:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n_head": 5}, "n_embd is 48, expected a multiple of n_head, 5"),
        ({"n_layer": 0}, f"n_layer is 0, {COUNT}"),
        ({"n_positions": 4}, r"wpe.weight has shape \[24, 48\], expected \[4, 48\]"),
        ({"layer_norm_epsilon": None}, f"layer_norm_epsilon is None, {NUMBER}"),
        ({"scale_attn_weights": False}, "has scale_attn_weights False, expected True"),
        ({"scale_attn_by_inverse_layer_idx": True}, "has scale_attn_by_inverse_layer_idx True, expected False"),
        ({"activation_function": "relu"}, "has the activation relu"),
    ],
)
def test_odd_sizes_of_a_gpt2(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        huggingface.load(write_gpt2(tmp_path / "m", config))


def test_a_gpt2_with_a_head_of_its_own_is_refused(tmp_path: Path) -> None:
    """Files that hold the embedding twice are not."""
    twice = write_gpt2(tmp_path / "a", {}, lambda s: s.update({"lm_head.weight": s["wte.weight"].clone()}))
    huggingface.load(twice)
    other = write_gpt2(tmp_path / "b", {}, lambda s: s.update({"lm_head.weight": s["wte.weight"] + 1}))
    with pytest.raises(ModelError, match="has an output head of its own"):
        huggingface.load(other)


@pytest.mark.parametrize(
    ("key", "value", "kind", "message"),
    [
        ("llama.attention.head_count", [6, 6], Kind.ARRAY, r"head_count is \[6, 6\], expected a whole number"),
        ("llama.attention.head_count", 0, Kind.UINT32, f"attention.head_count is 0, {COUNT}"),
        ("llama.attention.head_count", "six", Kind.STRING, f"attention.head_count is 'six', {COUNT}"),
        ("llama.attention.head_count_kv", 4, Kind.UINT32, "has 6 heads of width 8 and 4 of keys"),
        ("llama.block_count", 0, Kind.UINT32, f"block_count is 0, {COUNT}"),
        ("llama.block_count", 10**9, Kind.UINT32, "too few for 1000000000 layers"),
        ("llama.embedding_length", 10**9, Kind.UINT32, "token_embd.weight has shape"),
        ("llama.context_length", "x", Kind.STRING, f"context_length is 'x', {COUNT}"),
        ("llama.rope.freq_base", 0.0, Kind.FLOAT32, f"rope.freq_base is 0.0, {NUMBER}"),
        ("llama.attention.layer_norm_rms_epsilon", "x", Kind.STRING, f"rms_epsilon is 'x', {NUMBER}"),
        ("tokenizer.ggml.bos_token_id", 999, Kind.UINT32, "bos_token_id is 999, expected a token, 0 to 255"),
        ("tokenizer.ggml.eos_token_id", "x", Kind.STRING, "eos_token_id is 'x', expected a token"),
        ("tokenizer.ggml.tokens", ["a"] * 256, Kind.ARRAY, "a token is listed twice"),
        ("tokenizer.ggml.tokens", "abc", Kind.STRING, "tokenizer.ggml.tokens is no list of texts"),
        ("tokenizer.ggml.merges", ["ab"], Kind.ARRAY, "the file's tokenizer is damaged"),
        ("tokenizer.ggml.pre", "unknown", Kind.STRING, "has a tokenizer of kind 'gpt2', 'unknown'"),
        ("tokenizer.chat_template", 5, Kind.UINT32, "has a chat template of int, expected text"),
    ],
)
def test_odd_fields_of_a_gguf_file(key: str, value: Any, kind: Kind, message: str, tmp_path: Path) -> None:
    def change(writer: Any) -> None:
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, kind)

    path = write_gguf(tmp_path / "m.gguf", decoders.small_llama(decoders.GROUPED), change=change)
    with pytest.raises(ModelError, match=message):
        gguf_file.load(path)
