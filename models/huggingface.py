"""Decoders in Hugging Face folders: config.json, safetensors in one file or several, tokenizer.json.

Importing this file imports torch.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.passes.errors import ModelError

from . import gpt, llama, tokens
from .checkpoint import Checkpoint, Names, check_heads, fill, positive, token_id, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from .decoding import Decoder

CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
INDEX = WEIGHTS + ".index.json"  # of a model in several files
LLAMA = Names(
    "model.layers.{}.",
    {
        "embedding": "model.embed_tokens",
        "norm": "model.norm",
        "head": "lm_head",
        "attention_norm": "input_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "hidden_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
)
GPT2 = Names(
    "h.{}.",
    {
        "words": "wte",
        "positions": "wpe",
        "norm": "ln_f",
        "attention_norm": "ln_1",
        "qkv": "attn.c_attn",
        "output": "attn.c_proj",
        "hidden_norm": "ln_2",
        "expand": "mlp.c_fc",
        "contract": "mlp.c_proj",
    },
)
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2 keeps these as (in, out)
MASKS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # tables that older files hold beside the weights
PLAIN_GPT2 = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
GELU = ("gelu_new", "gelu_pytorch_tanh")  # the same function


def load(folder: Path) -> Checkpoint:
    """Raises ModelError for a folder that is damaged, incomplete, or of a model type that is not known here."""
    config = _json(folder / CONFIG)
    kinds = {"llama": _llama, "qwen2": _llama, "gpt2": _gpt2}
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise ModelError(f"{folder / CONFIG}: is of model type {kind!r}; expected one of {', '.join(kinds)}")
    try:
        decoder, context = kinds[kind](config, folder)
    except KeyError as error:
        raise ModelError(f"{folder / CONFIG}: has no {error}; expected the sizes of a {kind} model") from error
    tokenizer = _tokenizer(folder / TOKENIZER)
    told = _json(folder / "tokenizer_config.json", {})
    generation = _json(folder / "generation_config.json", {})
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    named = [
        token_id(token, "eos_token_id", decoder.sizes.vocabulary, folder)
        for token in (eos if isinstance(eos, list) else [eos])
        if token is not None
    ]
    return Checkpoint(
        architecture=kind,
        decoder=decoder,
        context=context,
        tokenizer=tokenizer,
        stop_tokens=tokens.ends(tokenizer, named),
        add_bos=_first(tokenizer),
        chat_template=_chat_template(folder, told),
        special_tokens={
            name: text
            for name, value in told.items()
            if name.endswith("_token") and (text := value.get("content") if isinstance(value, dict) else value)
            and isinstance(text, str)
        },
        source=folder.resolve().name,
    )  # fmt: skip


def _llama(config: Mapping[str, Any], folder: Path) -> tuple[Decoder, int]:
    file = folder / CONFIG
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rotary, dict):
        raise ModelError(f"{file}: has rotary positions of {rotary!r}, expected an object")
    if (part := rotary.get("partial_rotary_factor", config.get("partial_rotary_factor", 1))) != 1:
        raise ModelError(f"{folder}: turns a part of each head ({part}); expected a model that turns all of it")
    if config.get("use_sliding_window") or set(config.get("layer_types") or []) - {"full_attention"}:
        raise ModelError(f"{folder}: attends in a sliding window; expected a model that attends to all tokens")
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{folder}: has the activation {config['hidden_act']}, expected silu")
    count = _counts(config, file)
    state = _state(folder)
    sizes = llama.Sizes(
        vocabulary=count("vocab_size"),
        width=count("hidden_size"),
        layers=count("num_hidden_layers"),
        heads=count("num_attention_heads"),
        key_value_heads=count("num_key_value_heads", "num_attention_heads"),
        hidden=count("intermediate_size"),
        own_head_width=None if config.get("head_dim") is None else count("head_dim"),
        rotary_base=positive(rotary.get("rope_theta", config.get("rope_theta", 10_000.0)), "rope_theta", file),
        epsilon=positive(config["rms_norm_eps"], "rms_norm_eps", file),
        tied=config.get("tie_word_embeddings", False) or "lm_head.weight" not in state,
        biases="model.layers.0.self_attn.q_proj.bias" in state,
    )
    check_heads(sizes, file)
    sizes = dataclasses.replace(sizes, rotary_factors=_rotary_factors(rotary, sizes, file))
    if sizes.tied:
        state.pop("lm_head.weight", None)
    return fill(llama.Decoder, sizes, state, LLAMA, folder), count("max_position_embeddings")


def _rotary_factors(rotary: Mapping[str, Any], sizes: llama.Sizes, file: Path) -> tuple[float, ...]:
    """What the frequencies of rotary positions are divided by."""
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind == "default":
        return ()
    if kind not in ("linear", "llama3"):
        raise ModelError(f"{file}: scales its rotary positions ({kind}); expected default, linear or llama3")

    def number(name: str) -> float:
        return positive(rotary.get(name), name, file)

    if kind == "linear":
        return (number("factor"),) * (sizes.head_width // 2)
    low, high = number("low_freq_factor"), number("high_freq_factor")
    if low >= high:
        raise ModelError(f"{file}: low_freq_factor is {low:g}, expected less than high_freq_factor, {high:g}")
    positions = number("original_max_position_embeddings")
    return llama.llama3_factors(sizes.head_width, sizes.rotary_base, number("factor"), low, high, positions)


def _gpt2(config: Mapping[str, Any], folder: Path) -> tuple[Decoder, int]:
    if config.get("activation_function", "gelu_new") not in GELU:
        raise ModelError(
            f"{folder}: has the activation {config['activation_function']}, expected one of {', '.join(GELU)}"
        )
    for option, usual in PLAIN_GPT2.items():
        if config.get(option, usual) != usual:
            raise ModelError(f"{folder / CONFIG}: has {option} {config[option]}, expected {usual}")
    state = {name.removeprefix("transformer."): tensor for name, tensor in _state(folder).items()}
    head, words = state.pop("lm_head.weight", None), state.get("wte.weight")
    if head is not None and words is not None and not head.equal(words):
        raise ModelError(f"{folder}: has an output head of its own, expected the embedding, as in GPT-2")
    state = {name: t.T.contiguous() if name.endswith(TRANSPOSED) else t for name, t in state.items()}
    file = folder / CONFIG
    count = _counts(config, file)
    sizes = gpt.Sizes(
        vocabulary=count("vocab_size"),
        positions=count("n_positions"),
        width=count("n_embd"),
        layers=count("n_layer"),
        heads=count("n_head"),
        epsilon=positive(config.get("layer_norm_epsilon", 1e-5), "layer_norm_epsilon", file),
    )
    if sizes.width % sizes.heads:
        raise ModelError(f"{file}: n_embd is {sizes.width}, expected a multiple of n_head, {sizes.heads}")
    return fill(gpt.GPT, sizes, state, GPT2, folder), sizes.positions


def _counts(config: Mapping[str, Any], file: Path) -> Callable[..., int]:
    """What reads a count of config.json; `instead` is the name of the one that stands for one that is left out."""

    def count(name: str, instead: str | None = None) -> int:
        chosen = instead if instead is not None and config.get(name) is None else name
        return whole(config[chosen], chosen, file)

    return count


def save_gpt2(model: gpt.GPT, folder: Path) -> None:
    """Write config.json and model.safetensors, float16, in the form that `load` reads."""
    import torch
    from safetensors.torch import save_file

    sizes = model.sizes
    config = {
        "model_type": "gpt2", "vocab_size": sizes.vocabulary, "n_positions": sizes.positions, "n_embd": sizes.width,
        "n_layer": sizes.layers, "n_head": sizes.heads, "activation_function": "gelu_new",
        "layer_norm_epsilon": sizes.epsilon, "torch_dtype": "float16",
    }  # fmt: skip
    state = {GPT2.of(name): tensor.detach() for name, tensor in model.state_dict().items()}
    state = {name: t.T if name.endswith(TRANSPOSED) else t for name, t in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.to(torch.float16).contiguous() for name, t in state.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _state(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder by their names there, without masks."""
    from safetensors import SafetensorError, safe_open

    index = _json(folder / INDEX, {}).get("weight_map")
    if index is not None and not (isinstance(index, dict) and all(isinstance(name, str) for name in index.values())):
        raise ModelError(f"{folder / INDEX}: has no map of tensors to files; download it again")
    if index is None and not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder}: has neither {WEIGHTS} nor {INDEX}; expected weights in safetensors")
    state: dict[str, Tensor] = {}
    for name in sorted(set(index.values())) if index is not None else [WEIGHTS]:
        path = folder / name
        if path.parent != folder:
            raise ModelError(f"{folder / INDEX}: refers to {name}; expected files of the same folder")
        try:
            with safe_open(path, framework="pt") as file:
                state |= {key: file.get_tensor(key) for key in file.keys() if not key.endswith(MASKS)}  # noqa: SIM118
        except FileNotFoundError as error:
            raise ModelError(f"{path}: no such file, though {INDEX} names it; download it") from error
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: is not a whole safetensors file ({error}); download it again") from error
    return state


def _json(path: Path, default: Any = None) -> Any:
    if default is not None and not path.is_file():
        return default
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file; expected a Hugging Face folder with {CONFIG}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds a {type(found).__name__}, expected an object")
    return found


def _tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    if not path.is_file():
        raise ModelError(f"{path}: no such file; expected a tokenizer in the format of Hugging Face's tokenizers")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # of that package's own, which has no narrower class
        raise ModelError(f"{path}: is not a tokenizer ({error})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _first(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts in front of every text."""
    added = tokenizer.encode("", add_special_tokens=True).ids
    return added[0] if added else None


def _chat_template(folder: Path, told: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{file}: cannot be read as text ({error}); expected UTF-8") from error
    template = told.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [each for each in template if isinstance(each, dict) and each.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise ModelError(f"{folder}: has a chat template of {type(template).__name__}, expected text")
    return template
