"""Options and fixtures of the whole suite: models exported once a session, from assets fetched where they can be."""

from __future__ import annotations

import fcntl
import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest
from graphwright.models import registry
from graphwright.passes.errors import AssetError


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-snapshots", action="store_true", help="rewrite the lower halves of tests/cases from what passes do"
    )


@functools.cache
def _refusal(name: str) -> str | None:
    """Why a model's or asset's files cannot be had; None when they are in the cache now."""
    try:
        registry.fetch(name)
    except AssetError as error:
        return str(error)
    return None


@pytest.fixture(scope="session")
def fetched() -> Callable[[str], None]:
    """Fetches what a model or asset needs; skips the test with the reason where that is not possible."""

    def fetch(name: str) -> None:
        if reason := _refusal(name):
            pytest.skip(reason)

    return fetch


@pytest.fixture(scope="session")
def exported(fetched: Callable[[str], None], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The ONNX file of a model, exported on first use by whichever worker of the run comes first."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exported"
    folder.mkdir(exist_ok=True)

    def export(name: str, **options: Any) -> Path:
        path = folder / f"{'-'.join([name, *(f'{k}{v}' for k, v in sorted(options.items()))])}.onnx"
        fetched(name)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                registry.export(name, path, **options)
        return path

    return export


@dataclass(frozen=True)
class TinyGenerator:
    """A generator folder with seeded weights: a Llama-like decoder of bytes. weights: by name, float32."""

    root: Path
    weights: dict[str, np.ndarray]
    layers: int = 2
    heads: int = 4
    key_value_heads: int = 2
    head_width: int = 8

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """All tokens at once in float64, without a cache: (s, V)."""
        w = {name: array.astype(np.float64) for name, array in self.weights.items()}
        s, half = len(ids), self.head_width // 2
        cos, sin = w["cos"][:s], w["sin"][:s]

        def normed(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

        def split(x: np.ndarray) -> np.ndarray:  # (s, h e) -> (h, s, e)
            return x.reshape(s, -1, self.head_width).swapaxes(0, 1)

        def turned(x: np.ndarray) -> np.ndarray:
            a, b = x[..., :half], x[..., half:]
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

        x = w["words"][list(ids)]
        for i in range(self.layers):
            y = normed(x, w[f"norm_{i}"])
            q, k, v = (split(y @ w[f"{name}_{i}"]) for name in ("query", "key", "value"))
            k, v = (np.repeat(t, self.heads // self.key_value_heads, 0) for t in (turned(k), v))
            scores = turned(q) @ k.swapaxes(-1, -2) / np.sqrt(self.head_width)
            scores = np.where(np.tri(s, dtype=bool), scores, -np.inf)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = shares / shares.sum(-1, keepdims=True) @ v
            x = x + mixed.swapaxes(0, 1).reshape(s, -1) @ w[f"output_{i}"]
            y = normed(x, w[f"hidden_norm_{i}"])
            gate = y @ w[f"gate_{i}"]
            x = x + (gate / (1 + np.exp(-gate)) * (y @ w[f"up_{i}"])) @ w[f"down_{i}"]
        return normed(x, w["norm"]) @ w["words"].T


SPECIAL = ("<|end|>", "<|begin|>", "<|user|>", "<|answer|>")  # tokens 256 to 259, behind the bytes
CHAT_TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|answer|>{% endif %}"
)


def _tiny_weights(layers: int, heads: int, groups: int, e: int, capacity: int) -> dict[str, np.ndarray]:
    rng, d, hidden, vocabulary = np.random.default_rng(7), heads * e, 48, 256 + len(SPECIAL)

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * shape[0] ** -0.5).astype(np.float32)

    angles = np.arange(capacity)[:, None] * 10_000.0 ** (-np.arange(0, e, 2) / e)
    words = draw(vocabulary, d) * 4
    weights = {"words": words, "cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    for i in range(layers):
        weights |= {f"query_{i}": draw(d, heads * e), f"output_{i}": draw(heads * e, d)}
        weights |= {f"{name}_{i}": draw(d, groups * e) for name in ("key", "value")}
        weights |= {f"gate_{i}": draw(d, hidden), f"up_{i}": draw(d, hidden), f"down_{i}": draw(hidden, d)}
        weights |= {f"{name}_{i}": 1 + draw(d) / 4 for name in ("norm", "hidden_norm")}
    return weights | {"norm": 1 + draw(d) / 4}


def _tiny_graph(part: str, tiny: TinyGenerator, capacity: int) -> onnx.ModelProto:
    """prefill or decode (one token a call) as ONNX."""
    h, k, e, decode = tiny.heads, tiny.key_value_heads, tiny.head_width, part == "decode"
    caches = [f"{kind}_{i}" for i in range(tiny.layers) for kind in ("key", "value")]
    n = "1" if decode else "wanted"
    inputs = [f"int64[1,{'1' if decode else 'tokens'}] input_ids", "int64[1] position"]
    inputs += [] if decode else ["int64[wanted] wanted"]
    inputs += [f"float[1,{k},{capacity},{e}] past_{name}" for name in caches]
    vocabulary = len(tiny.weights["words"])
    outputs = [f"float[1,{n},{vocabulary}] logits", f"float[1,{n},64] top_logits", f"int64[1,{n},64] top_tokens"]
    outputs += [f"float[1,{k},{capacity},{e}] present_{name}" for name in caches]
    lines = [
        "x_0 = Gather(words, input_ids)", "count = Shape<start = 1, end = 2>(input_ids)",
        "filled = Add(position, count)", "first = Squeeze(position)", "last = Squeeze(filled)",
        "one = Constant<value = int64 {1}>()", "range = Range(first, last, one)",
        "zero = Constant<value = int64[1] {0}>()", "places = Unsqueeze(range, zero)",
        f"query_shape = Constant<value = int64[4] {{1, -1, {h}, {e}}}>()",
        f"key_shape = Constant<value = int64[4] {{1, -1, {k}, {e}}}>()",
        f"flat = Constant<value = int64[3] {{1, -1, {h * e}}}>()",
    ]  # fmt: skip
    for i in range(tiny.layers):
        lines += [f"a_{i} = RMSNormalization<epsilon = 0.00001>(x_{i}, norm_{i})"]
        for name in ("query", "key", "value"):
            shape = "query_shape" if name == "query" else "key_shape"
            lines += [
                f"{name}_rows_{i} = MatMul(a_{i}, {name}_{i})", f"{name}_heads_{i} = Reshape({name}_rows_{i}, {shape})",
                f"{name}_split_{i} = Transpose<perm = [0, 2, 1, 3]>({name}_heads_{i})",
            ]  # fmt: skip
        lines += [
            f"query_turned_{i} = RotaryEmbedding(query_split_{i}, cos, sin, places)",
            f"key_turned_{i} = RotaryEmbedding(key_split_{i}, cos, sin, places)",
            f'present_key_{i} = TensorScatter<axis = -2, mode = "linear">(past_key_{i}, key_turned_{i}, position)',
            f'present_value_{i} = TensorScatter<axis = -2, mode = "linear">(past_value_{i}, value_split_{i}, position)',
            f"mixed_{i} = Attention<is_causal = 1>(query_turned_{i}, present_key_{i}, present_value_{i}, , , , filled)",
            f"mixed_rows_{i} = Transpose<perm = [0, 2, 1, 3]>(mixed_{i})",
            f"joined_{i} = Reshape(mixed_rows_{i}, flat)",
            f"attended_{i} = MatMul(joined_{i}, output_{i})", f"y_{i} = Add(x_{i}, attended_{i})",
            f"b_{i} = RMSNormalization<epsilon = 0.00001>(y_{i}, hidden_norm_{i})",
            f"g_{i} = MatMul(b_{i}, gate_{i})", f"s_{i} = Sigmoid(g_{i})", f"silu_{i} = Mul(g_{i}, s_{i})",
            f"u_{i} = MatMul(b_{i}, up_{i})", f"gated_{i} = Mul(silu_{i}, u_{i})",
            f"fed_{i} = MatMul(gated_{i}, down_{i})", f"x_{i + 1} = Add(y_{i}, fed_{i})",
        ]  # fmt: skip
    chosen = f"x_{tiny.layers}" if decode else "chosen"
    lines += [] if decode else [f"chosen = Gather<axis = 1>(x_{tiny.layers}, wanted)"]
    lines += [
        f"normed = RMSNormalization<epsilon = 0.00001>({chosen}, norm)", "head = Transpose<perm = [1, 0]>(words)",
        "logits = MatMul(normed, head)", "sixty_four = Constant<value = int64[1] {64}>()",
        "top_logits, top_tokens = TopK(logits, sixty_four)",
    ]  # fmt: skip
    header = f'<ir_version: 11, opset_import: ["" : 24]>\n{part} ({", ".join(inputs)}) => ({", ".join(outputs)})'
    model = onnx.parser.parse_model("\n".join([header, "{", *lines, "}"]))
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in tiny.weights.items())
    return model


def write_tiny_generator(root: Path, *, capacity: int = 96, **about: Any) -> TinyGenerator:
    """A generator folder at `root`. `about` changes its description."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tiny = TinyGenerator(root, {})
    tiny.weights.update(_tiny_weights(tiny.layers, tiny.heads, tiny.key_value_heads, tiny.head_width, capacity))
    root.mkdir(parents=True)
    for part in ("prefill", "decode"):
        onnx.save(_tiny_graph(part, tiny, capacity), root / f"{part}.onnx")
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {**{chr(byte): byte for byte in printable}, **{chr(256 + i): byte for i, byte in enumerate(others)}}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.save(str(root / "tokenizer.json"))
    description = {
        "schema_version": 1, "architecture": "llama", "capacity": capacity, "vocabulary": 256 + len(SPECIAL),
        "layers": tiny.layers, "key_value_heads": tiny.key_value_heads, "head_width": tiny.head_width,
        "decode_tokens": 1, "weights": "float32", "stop_tokens": [256], "add_bos": None,
        "chat_template": CHAT_TEMPLATE, "special_tokens": {"bos_token": "<|begin|>", "eos_token": "<|end|>"},
        "source": "tests", **about,
    }  # fmt: skip
    (root / "generator.json").write_text(json.dumps(description))
    return tiny


@pytest.fixture(scope="session")
def tiny_generator(tmp_path_factory: pytest.TempPathFactory) -> TinyGenerator:
    """The folder in ONNX form. Do not change it: take `make_generator`."""
    pytest.importorskip("tokenizers")
    return write_tiny_generator(tmp_path_factory.mktemp("generator") / "tiny")


@pytest.fixture
def make_generator(tmp_path: Path) -> Callable[..., TinyGenerator]:
    """`make_generator(capacity=8, add_bos=257)`: one of its own, with another description."""
    pytest.importorskip("tokenizers")
    return lambda name="tiny", **about: write_tiny_generator(tmp_path / name, **about)


@pytest.fixture(scope="session")
def compiled_generator(tiny_generator: TinyGenerator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, compiled for this machine. Do not change it."""
    pytest.importorskip("tvm")
    from graphwright.runtime.generator_build import compile_generator

    return compile_generator(tiny_generator.root, tmp_path_factory.mktemp("compiled") / "tiny").root
