"""Generator folders: one weights file, narrow types, and every format that a decoder comes in, damaged ones too."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphwright.models import generators, tokens
from graphwright.passes import wire
from graphwright.passes.errors import ModelError, UsageError

torch = pytest.importorskip("torch")
from graphwright.models import gguf_file, gpt, huggingface, llama  # noqa: E402 -- needs torch

from . import decoders  # noqa: E402 -- needs torch

pytestmark = pytest.mark.torch
IDS = np.random.default_rng(2).integers(0, 256, 11)


def external(path: Path) -> dict[str, dict[str, str]]:
    model = onnx.load(path, load_external_data=False)
    return {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data}


def logits_of(decoder: Any) -> np.ndarray:
    """Of the cached way through the model, (s, V)."""
    from graphwright.models import decoding

    step = decoding.Decode(decoder, len(IDS))
    with torch.inference_mode():
        return step(torch.from_numpy(IDS)[None], torch.zeros(1, dtype=torch.int64), step.empty())[0][0].numpy()


@pytest.mark.parametrize("weights", generators.TYPES)
def test_both_graphs_share_one_file_with_every_tensor_once(weights: str, tmp_path: Path) -> None:
    model = decoders.DECODERS["grouped"]()
    generators.write(decoders.checkpoint(model), tmp_path, capacity=12, weights=weights)
    prefill, decode = (external(tmp_path / file) for file in (generators.PREFILL, generators.DECODE))
    offsets = {about["offset"] for about in prefill.values()}
    assert offsets == {about["offset"] for about in decode.values()}
    assert {about["location"] for about in prefill.values()} == {generators.WEIGHTS}
    matrices = sum(p.numel() for p in model.parameters() if p.numel() * 4 >= wire.LARGE)
    stored = sum({about["offset"]: int(about["length"]) for about in prefill.values()}.values())
    width = 4 if weights == "float32" else 2
    assert stored <= matrices * width  # a matrix below the limit once it is narrow stays in the graph

    with torch.inference_mode():
        narrow = decoders.DECODERS["grouped"]()
        for parameter in narrow.parameters():
            if parameter.dim() == 2 and parameter.numel() * 4 >= wire.LARGE:
                parameter.copy_(parameter.to(getattr(torch, weights)).float())
        expected = narrow(torch.from_numpy(np.resize(IDS, decoders.POSITIONS))[None])[0, : len(IDS)].numpy()
    generator = decoders.Exported(tmp_path)
    results, _ = generator.call(IDS, 0, generator.empty(), range(len(IDS)))
    assert np.abs(results["logits"][0] - expected).max() <= 1e-5 * np.abs(expected).max()
    assert json.loads((tmp_path / "generator.json").read_text())["weights"] == weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 25}, "capacity is 25, expected 2 to 24, the positions of the model"),
        ({"capacity": 8, "decode_tokens": 9}, "decode-tokens is 9, expected 1 to 8, the capacity"),
        ({"weights": "int4"}, "weights are 'int4', expected one of float32, float16, bfloat16"),
    ],
)
def test_sizes_that_the_model_does_not_have(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        generators.write(decoders.checkpoint(decoders.DECODERS["grouped"]()), tmp_path, **options)


def pairs_from_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(
    path: Path, model: llama.Llama, architecture: str = "llama", change: Callable[[Any], None] | None = None,
    leave_out: str = "", shapes: dict[str, np.ndarray] | None = None,
) -> Path:  # fmt: skip
    from gguf import GGUFWriter

    sizes = model.sizes
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(decoders.POSITIONS)
    writer.add_embedding_length(sizes.width)
    writer.add_block_count(sizes.layers)
    writer.add_feed_forward_length(sizes.hidden)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.key_value_heads)
    writer.add_key_length(sizes.head_width)
    writer.add_value_length(sizes.head_width)
    writer.add_rope_dimension_count(sizes.head_width)
    writer.add_rope_freq_base(sizes.rotary_base)
    writer.add_layer_norm_rms_eps(sizes.epsilon)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    vocabulary = tokens.single_bytes().get_vocab()
    words = sorted(vocabulary, key=lambda word: vocabulary[word])
    writer.add_token_list(words)
    writer.add_token_types([1] * 256)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ bos_token }}")
    if change:
        change(writer)
    for ours, tensor in model.state_dict().items():
        name, array = gguf_file.NAMES.of(ours), tensor.numpy()
        if architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            array = pairs_from_halves(array, sizes.heads if "attn_q" in name else sizes.key_value_heads)
        if name != leave_out:
            writer.add_tensor(name, (shapes or {}).get(name, np.ascontiguousarray(array)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


UNTIED = dataclasses.replace(decoders.PLAIN, biases=False)


@pytest.mark.parametrize(
    ("sizes", "architecture"),
    [(decoders.GROUPED, "llama"), (UNTIED, "llama"), (decoders.PLAIN, "qwen2")],
    ids=["grouped", "untied", "qwen2"],
)
def test_a_gguf_file_gives_the_model_back(sizes: llama.Sizes, architecture: str, tmp_path: Path) -> None:
    model = decoders.small_llama(sizes)
    found = gguf_file.load(write_gguf(tmp_path / "m.gguf", model, architecture))
    np.testing.assert_array_equal(logits_of(found.decoder), logits_of(model))
    assert (found.architecture, found.context, found.add_bos) == (architecture, decoders.POSITIONS, 1)
    assert found.stop_tokens == (2,) and found.chat_template == "{{ bos_token }}"
    assert set(found.special_tokens) == {"bos_token", "eos_token"} and found.source == "m.gguf"
    text = "Grüße, 日本 \n\t'tis 12"
    assert found.tokenizer.decode(found.tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_1", "Q4_0", "Q4_K", "Q6_K", "IQ4_NL"])
def test_quantized_matrices_of_a_gguf_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each becomes what the package gguf makes of its blocks, query and key in our order."""
    import gguf

    sizes = llama.Sizes(vocabulary=256, width=256, layers=1, heads=4, key_value_heads=2, hidden=256)
    model = decoders.small_llama(sizes)
    type_, plain, expected = gguf.GGMLQuantizationType[kind], gguf.GGUFWriter.add_tensor, {}
    rng, (block, nbytes) = np.random.default_rng(0), gguf.GGML_QUANT_SIZES[type_]

    def quantized(writer: Any, name: str, array: np.ndarray) -> None:
        if array.ndim < 2:
            return plain(writer, name, array)
        data = rng.integers(0, 60, (len(array), array.shape[1] // block * nbytes), dtype=np.uint8)  # finite scales
        expected[name] = gguf.dequantize(data, type_)
        plain(writer, name, data, raw_dtype=type_)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", quantized)
    found = gguf_file.load(write_gguf(tmp_path / "m.gguf", model)).decoder.state_dict()
    assert len(expected) == 8
    for ours, tensor in found.items():
        name, array = gguf_file.NAMES.of(ours), tensor.numpy()
        if heads := {"attn_q.weight": 4, "attn_k.weight": 2}.get(name.removeprefix("blk.0.")):
            array = pairs_from_halves(array, heads)
        if name in expected:
            np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_gguf_files_that_are_refused(tmp_path: Path) -> None:
    model = decoders.small_llama(decoders.GROUPED)
    path = write_gguf(tmp_path / "m.gguf", model)
    data = path.read_bytes()
    for size in (0, 3, 30, len(data) // 2, len(data) - 4000):
        cut = tmp_path / f"cut{size}.gguf"
        cut.write_bytes(data[:size])
        with pytest.raises(ModelError, match=r"is not a whole GGUF file .*; download it again"):
            gguf_file.load(cut)
    odd = tmp_path / "odd.gguf"
    odd.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60))
    with pytest.raises(ModelError, match="is not a whole GGUF file"):
        gguf_file.load(odd)
    other = tmp_path / "m.onnx"
    other.write_bytes(b"\x08\x0a" * 100)
    with pytest.raises(ModelError, match="is not a GGUF file; expected one, a Hugging Face folder"):
        gguf_file.load(other)
    with pytest.raises(ModelError, match=r"cannot be read .*; expected a GGUF file"):
        gguf_file.load(tmp_path)
    for made, message in [
        (write_gguf(tmp_path / "a.gguf", model, "mamba"), "is of architecture 'mamba'; expected one of llama, qwen2"),
        (write_gguf(tmp_path / "b.gguf", model, leave_out="blk.1.ffn_up.weight"),
         r"has no tensor blk.1.ffn_up.weight, shape \[80, 48\]; expected a complete model"),
        (write_gguf(tmp_path / "c.gguf", model, shapes={"blk.0.ffn_up.weight": np.ones((80, 40), np.float32)}),
         r"blk.0.ffn_up.weight has shape \[80, 40\], expected \[80, 48\]"),
        (write_gguf(tmp_path / "d.gguf", model, change=lambda w: w.add_string("llama.rope.scaling.type", "yarn")),
         r"scales its rotary positions \(yarn\); expected none or linear"),
        (write_gguf(tmp_path / "e.gguf", model,
                    change=lambda w: w.add_tensor("blk.0.attn_k_norm.weight", np.ones(4, np.float32))),
         "holds blk.0.attn_k_norm.weight, which this architecture does not have here"),
        (write_gguf(tmp_path / "f.gguf", model, shapes={"blk.0.attn_q.weight": np.ones((45, 48), np.float32)}),
         "blk.0.attn_q.weight of type F32 cannot be read"),
    ]:  # fmt: skip
        with pytest.raises(ModelError, match=message):
            gguf_file.load(made)


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    fields = {"model": "llama", "pre": "default", "tokens": ["a"], "token_type": [1], "merges": []}
    with pytest.raises(ModelError, match="tokenizer of kind 'llama', 'default'; expected byte-level pairs"):
        tokens.from_gguf(fields)


def write_folder(
    folder: Path, model: llama.Llama, shards: int = 1, config: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32, leave_out: str = "",
) -> Path:  # fmt: skip
    from safetensors.torch import save_file

    sizes = model.sizes
    folder.mkdir()
    about = {
        "model_type": "llama", "vocab_size": sizes.vocabulary, "hidden_size": sizes.width, "eos_token_id": [2, 3],
        "num_hidden_layers": sizes.layers, "num_attention_heads": sizes.heads, "rope_theta": sizes.rotary_base,
        "num_key_value_heads": sizes.key_value_heads, "intermediate_size": sizes.hidden, "head_dim": sizes.head_width,
        "rms_norm_eps": sizes.epsilon, "tie_word_embeddings": sizes.tied, "max_position_embeddings": 24,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**about, **(config or {})}))
    tokens.single_bytes().save(str(folder / "tokenizer.json"))
    told = {"chat_template": "{{ eos_token }}", "eos_token": {"content": "E"}, "bos_token": "B", "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    state = {huggingface.LLAMA.of(name): t.to(dtype).contiguous() for name, t in model.state_dict().items()}
    state.pop(leave_out, None)
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    names = {key: f"model-{i % shards}.safetensors" for i, key in enumerate(sorted(state))}
    for file in set(names.values()):
        save_file({key: state[key] for key, name in names.items() if name == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


@pytest.mark.parametrize(
    ("sizes", "shards", "kind"),
    [(decoders.GROUPED, 1, "llama"), (UNTIED, 3, "llama"), (decoders.PLAIN, 2, "qwen2")],
    ids=["grouped", "untied-sharded", "qwen2"],
)
def test_a_hugging_face_folder_gives_the_model_back(sizes: llama.Sizes, shards: int, kind: str, tmp_path: Path) -> None:
    model = decoders.small_llama(sizes)
    found = huggingface.load(write_folder(tmp_path / "m", model, shards, {"model_type": kind}))
    np.testing.assert_array_equal(logits_of(found.decoder), logits_of(model))
    assert found.stop_tokens == (2, 3) and found.chat_template == "{{ eos_token }}" and found.add_bos is None
    assert found.special_tokens == {"eos_token": "E", "bos_token": "B"} and found.context == 24


def test_weights_beyond_float16_are_refused_before_they_become_infinite(tmp_path: Path) -> None:
    model = decoders.DECODERS["grouped"]()
    with torch.no_grad():
        model.layers[1].down.weight[0, 0] = -7e4
    (tmp_path / "m").mkdir()
    with pytest.raises(UsageError, match="has 7e\\+04, more than float16 holds; take bfloat16"):
        generators.write(decoders.checkpoint(model), tmp_path / "m", weights="float16")


def test_bfloat16_weights_are_widened(tmp_path: Path) -> None:
    model = decoders.small_llama(decoders.GROUPED)
    found = huggingface.load(write_folder(tmp_path / "m", model, dtype=torch.bfloat16))
    assert {t.dtype for t in found.decoder.state_dict().values()} == {torch.float32}
    assert np.abs(logits_of(found.decoder) - logits_of(model)).max() < 0.3


def test_gpt2_survives_its_own_format(tmp_path: Path) -> None:
    """Linear weights lie transposed there; what is stored is float16, and so is the model that comes back."""
    model = gpt.seeded(0, decoders.LEARNED)
    huggingface.save_gpt2(model, tmp_path)
    tokens.single_bytes().save(str(tmp_path / "tokenizer.json"))
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    found = huggingface.load(tmp_path)
    np.testing.assert_array_equal(logits_of(found.decoder), logits_of(model))
    assert (found.context, found.architecture, found.stop_tokens) == (24, "gpt2", ())


def test_hugging_face_folders_that_are_refused(tmp_path: Path) -> None:
    model = decoders.small_llama(UNTIED)
    cases: list[tuple[Callable[[Path], object], dict[str, Any], str]] = [
        (lambda f: (f / "config.json").unlink(), {}, "config.json: no such file; expected a Hugging Face folder"),
        (lambda f: (f / "config.json").write_text("{"), {}, "config.json: cannot be read as JSON"),
        (lambda f: (f / "config.json").write_text("[]"), {}, "config.json: holds a list, expected an object"),
        (lambda f: (f / "tokenizer.json").unlink(), {}, "tokenizer.json: no such file; expected a tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), {}, "tokenizer.json: is not a tokenizer"),
        (lambda f: (f / "model-1.safetensors").unlink(), {}, "model-1.safetensors: no such file, though .* names it"),
        (lambda f: (f / "model-1.safetensors").write_bytes((f / "model-1.safetensors").read_bytes()[:-9]), {},
         "model-1.safetensors: is not a whole safetensors file"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), {}, "has neither model.safetensors nor"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}'), {},
         "refers to ../x; expected files of the same folder"),
        (lambda f: None, {"model_type": "mamba"}, "is of model type 'mamba'; expected one of llama, qwen2, gpt2"),
        (lambda f: None, {"rope_scaling": {"rope_type": "dynamic"}},
         r"scales its rotary positions \(dynamic\); expected default, linear or llama3"),
        (lambda f: None, {"hidden_act": "gelu"}, "has the activation gelu, expected silu"),
        (lambda f: None, {"use_sliding_window": True}, "attends in a sliding window"),
        (lambda f: None, {"vocab_size": 255},
         r"model.embed_tokens.weight has shape \[256, 48\], expected \[255, 48\]"),
    ]  # fmt: skip
    for number, (harm, config, message) in enumerate(cases):
        folder = write_folder(tmp_path / str(number), model, 2, config)
        harm(folder)
        with pytest.raises(ModelError, match=message):
            huggingface.load(folder)
    folder = write_folder(tmp_path / "missing", model, leave_out="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ModelError, match=r"has no tensor model.layers.1.mlp.up_proj.weight, shape \[80, 48\]"):
        huggingface.load(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="has no 'hidden_size'; expected the sizes of a llama model"):
        huggingface.load(folder)


def test_a_name_that_is_nothing_gets_a_hint() -> None:
    with pytest.raises(UsageError, match="'smolm2' is neither a file nor a folder nor a model of text: did you mean"):
        generators.open_model("smolm2")
