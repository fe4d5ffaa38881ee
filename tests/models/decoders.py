"""Small decoders with random weights, and an exported generator called through onnxruntime."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from graphwright.models import gpt, llama, tokens
from graphwright.models.checkpoint import Checkpoint

GROUPED = llama.Sizes(vocabulary=256, width=48, layers=2, heads=6, key_value_heads=2, hidden=80)
PLAIN = dataclasses.replace(GROUPED, key_value_heads=6, own_head_width=12, tied=False, biases=True)
LEARNED = gpt.Sizes(vocabulary=256, positions=24, width=48, layers=2, heads=4)
POSITIONS = 24


def small_llama(sizes: llama.Sizes) -> llama.Llama:
    """Weights with std fan_in^-1/2, biases and norms that are not trivial."""
    generator = torch.Generator().manual_seed(0)
    model = llama.Llama(POSITIONS, sizes).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        else:
            std = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.3
            torch.nn.init.normal_(parameter, std=std, generator=generator)
    return model


DECODERS: dict[str, Callable[[], torch.nn.Module]] = {
    "grouped": lambda: small_llama(GROUPED),
    "plain": lambda: small_llama(PLAIN),
    "learned": lambda: gpt.seeded(0, LEARNED),
}


def checkpoint(decoder: Any, **changes: Any) -> Checkpoint:
    """A decoder over bytes as `generators.write` takes it."""
    about: dict[str, Any] = {
        "architecture": "test", "context": POSITIONS, "tokenizer": tokens.single_bytes(), "stop_tokens": (0,),
        "add_bos": None, "chat_template": None, "special_tokens": {}, "source": "test",
    }  # fmt: skip
    return Checkpoint(decoder=decoder, **{**about, **changes})


class Exported:
    """A generator folder in onnxruntime: calls that return the new cache along with the results."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime
        from tokenizers import Tokenizer

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        options.log_severity_level = 3
        self.about = json.loads((folder / "generator.json").read_text())
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.prefill, self.decode = (
            onnxruntime.InferenceSession(folder / file, options, providers=["CPUExecutionProvider"])
            for file in ("prefill.onnx", "decode.onnx")
        )
        self.names = [output.name for output in self.prefill.get_outputs()]

    def empty(self) -> dict[str, np.ndarray]:
        shape = (1, self.about["key_value_heads"], self.about["capacity"], self.about["head_width"])
        layers = range(self.about["layers"])
        return {f"past_{kind}_{i}": np.zeros(shape, np.float32) for i in layers for kind in ("key", "value")}

    def call(
        self, ids: Sequence[int], position: int, past: dict[str, np.ndarray], wanted: Sequence[int] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Prefill with `wanted`, decode without: results by name, and the cache after them."""
        feeds = {"input_ids": np.array([ids], np.int64), "position": np.array([position], np.int64), **past}
        if wanted is not None:
            feeds["wanted"] = np.array(wanted, np.int64)
        session = self.decode if wanted is None else self.prefill
        results = dict(zip(self.names, session.run(None, feeds), strict=True))
        return results, {f"past_{name[8:]}": v for name, v in results.items() if name.startswith("present_")}

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The `count` likeliest next tokens, one decode call each; needs decode_tokens = 1."""
        results, past = self.call(ids, 0, self.empty(), [len(ids) - 1])
        found = [int(results["top_tokens"][0, 0, 0])]
        while len(found) < count:
            results, past = self.call(found[-1:], len(ids) + len(found) - 1, past)
            found.append(int(results["top_tokens"][0, 0, 0]))
        return found
