"""Each model is the one it claims to be: it knows what it was trained for, and its export equals torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from graphwright.models import assets, datasets, registry, samples, tokens

if TYPE_CHECKING:
    import torch

Exported = Callable[..., Path]


def run(path: Path, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def assert_equals_torch(path: Path, module: torch.nn.Module, feeds: Mapping[str, np.ndarray]) -> None:
    """float32 sums in another order differ by a few 1e-7 per layer; 1e-5 of the scale leaves room."""
    import torch

    with torch.inference_mode():
        result = module(*(torch.from_numpy(array) for array in feeds.values()))
    expected = result if isinstance(result, tuple) else (result,)
    for theirs, ours in zip(expected, run(path, feeds), strict=True):
        error = np.abs(theirs.numpy() - ours).max() / np.abs(theirs.numpy()).max()
        print(f"{path.stem}: largest error {error:.2e} of the output's scale, limit 1e-5")
        assert error <= 1e-5


@pytest.mark.torch
@pytest.mark.parametrize(
    "name",
    [
        "mobilenet-v2", "unet", "vit-tiny",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mobilenet-v3-small", "resnet-50", "vit-small")),
        pytest.param("efficientnet-lite0", marks=pytest.mark.assets),
    ],
)  # fmt: skip
def test_image_models_equal_torch_at_any_batch(name: str, exported: Exported) -> None:
    path, module = exported(name), registry.torch_module(name)
    for batch in (1, 3):
        assert_equals_torch(path, module, registry.sample_inputs(name, 1, {"batch": batch}))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mobilenet-v2", 3_504_872), ("mobilenet-v3-small", 2_542_856), ("resnet-50", 25_557_032),
        ("vit-tiny", 5_717_416), ("vit-small", 22_050_664),
    ],
)  # fmt: skip
def test_seeded_models_have_the_published_size(name: str, parameters: int) -> None:
    """Sandler et al. give 3.4 M for MobileNetV2, Howard et al. 2.5 M for V3-Small, Touvron et al. 5.7 and 22 M for
    DeiT-Ti and DeiT-S; the exact numbers are those of torchvision and timm.
    """
    assert sum(p.numel() for p in registry.torch_module(name).parameters()) == parameters


@pytest.mark.torch
@pytest.mark.parametrize(
    "name",
    [
        "mobilenet-v3-small", "unet", "vit-tiny", "gpt-mini",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mobilenet-v2", "resnet-50")),
    ],
)  # fmt: skip
def test_seeded_models_keep_their_numbers_in_range(name: str) -> None:
    """Logits of trained networks are between about 1 and 30; the exact numbers follow from the seed."""
    import torch

    feeds = [torch.from_numpy(array) for array in registry.sample_inputs(name).values()]
    with torch.inference_mode():
        first, again, other = (registry.torch_module(name, seed=seed)(*feeds) for seed in (0, 0, 1))
    print(f"{name}: largest {first.abs().max():.2f}")
    assert 1 < first.abs().max() < 30
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=0.1)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "operators"),
    [
        ("mobilenet-v3-small", {"HardSwish", "HardSigmoid", "Conv", "ReduceMean"}),
        ("unet", {"ConvTranspose", "Resize", "Concat", "MaxPool"}),
        ("gpt-mini", {"Gather", "LayerNormalization", "Softmax", "Gelu"}),
    ],
)
def test_exports_have_the_operators_they_are_there_for(
    name: str, operators: set[str], exported: Exported
) -> None:
    assert operators <= {node.op_type for node in onnx.load(exported(name)).graph.node}


@pytest.mark.torch
def test_the_byte_decoder_equals_torch_at_any_batch_and_length(exported: Exported) -> None:
    path, module = exported("gpt-mini"), registry.torch_module("gpt-mini")
    for batch, sequence in ((1, 128), (3, 17), (1, 256)):
        feeds = registry.sample_inputs("gpt-mini", 1, {"batch": batch, "sequence": sequence})
        assert_equals_torch(path, module, feeds)


@pytest.mark.torch
@pytest.mark.assets
def test_minilm_equals_torch_at_any_batch_and_length(exported: Exported) -> None:
    from graphwright.models import minilm

    path, module = exported("minilm"), minilm.load(assets.find("minilm-weights"))
    for batch, sequence in ((1, 128), (3, 17), (2, 1), (1, 512)):
        feeds = registry.sample_inputs("minilm", 1, {"batch": batch, "sequence": sequence})
        assert_equals_torch(path, module, feeds)


@pytest.mark.torch
@pytest.mark.assets
def test_minilm_puts_a_paraphrase_near_and_an_unrelated_sentence_far(exported: Exported) -> None:
    path = exported("minilm")
    tokens.minilm().enable_padding()
    encoded = tokens.minilm().encode_batch(
        [
            "A man is playing a guitar on the street.",
            "Someone plays guitar outdoors.",
            "The stock market fell sharply yesterday.",
        ]
    )
    tokens.minilm().no_padding()
    _, vectors = run(
        path,
        {
            "input_ids": np.array([e.ids for e in encoded], np.int64),
            "attention_mask": np.array([e.attention_mask for e in encoded], np.int64),
        },
    )
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    cosine = vectors @ vectors.T
    print(f"paraphrase {cosine[0, 1]:.3f}, unrelated {cosine[0, 2]:.3f} and {cosine[1, 2]:.3f}")
    assert cosine[0, 1] > 0.65
    assert abs(cosine[0, 2]) < 0.1 and abs(cosine[1, 2]) < 0.1


@pytest.mark.torch
@pytest.mark.assets
@pytest.mark.parametrize(
    ("photo", "classes"),
    [("chelsea", {282, 285, 281}), ("coffee", {967}), ("rocket", {657}), ("motorcycle_left", {665})],
)
def test_efficientnet_names_what_the_photo_shows(photo: str, classes: set[int], exported: Exported) -> None:
    """ImageNet: 281, 282, 285 are cats, 967 espresso, 657 missile, 665 moped."""
    path = exported("efficientnet-lite0")
    (logits,) = run(path, {"image": samples.efficientnet_image(datasets.photo(photo))})
    best = np.argsort(-logits[0])[: len(classes)]
    assert set(best.tolist()) == classes


@pytest.mark.torch
@pytest.mark.assets
def test_smollm2_knows_the_capital_of_france(fetched: Callable[[str], None]) -> None:
    import torch
    from graphwright.models import gguf_file

    fetched("smollm2")
    prompt = tokens.smollm2().encode("The capital of France is").ids
    model = gguf_file.load_llama(assets.find("smollm2-gguf"), len(prompt))
    with torch.inference_mode():
        logits = model(torch.tensor([prompt]))
    assert tokens.smollm2().decode([int(logits[0, -1].argmax())]) == " Paris"


SMALL = {
    "vocabulary": 3000,
    "width": 48,
    "layers": 2,
    "heads": 6,
    "key_value_heads": 2,
    "hidden": 80,
}


def small_llama(length: int) -> torch.nn.Module:
    import torch
    from graphwright.models import llama

    torch.manual_seed(0)
    return llama.Llama(length, llama.Sizes(**SMALL)).eval()


@pytest.mark.torch
def test_a_small_llama_equals_torch_and_stores_its_embedding_once(tmp_path: Path) -> None:
    import torch
    from graphwright.models import export
    from graphwright.passes import io

    module = small_llama(9)
    ids = torch.randint(SMALL["vocabulary"], (1, 9), generator=torch.Generator().manual_seed(1))
    model = export.from_torch("small-llama", module, (ids,), {"input_ids": (1, 9)}, ("logits",))
    io.save(model, tmp_path / "small-llama.onnx")
    assert_equals_torch(tmp_path / "small-llama.onnx", module, {"input_ids": ids.numpy()})
    size = SMALL["vocabulary"] * SMALL["width"]
    assert sum(np.prod(t.dims) == size for t in onnx.load(tmp_path / "small-llama.onnx").graph.initializer) == 1


@pytest.mark.torch
def test_a_decoder_does_not_look_ahead() -> None:
    """Changing the last token changes the last row of logits and no other."""
    import torch

    module = small_llama(9)
    ids = torch.arange(9)[None]
    other = ids.clone()
    other[0, -1] = 50
    with torch.inference_mode():
        first, second = module(ids), module(other)
    assert torch.equal(first[:, :-1], second[:, :-1])
    assert not torch.allclose(first[:, -1], second[:, -1])


@pytest.mark.torch
def test_rotation_depends_only_on_the_distance() -> None:
    """The defining property of rotary positions: <rotate(q, m), rotate(k, n)> is a function of m - n."""
    import torch
    from graphwright.models import llama

    query, key = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    cos, sin = (t.double() for t in llama.rotary_tables(64, 16, 100.0))

    def product(m: int, n: int) -> float:
        turned = llama.rotate(query, cos[m], sin[m]) @ llama.rotate(key, cos[n], sin[n])
        return float(turned)

    # The tables are float32, so each product carries its rounding: 16 terms of about 1 at 6e-8.
    assert product(5, 2) == pytest.approx(product(45, 42), abs=2e-6)
    assert abs(product(5, 2) - product(2, 5)) > 1e-3


@pytest.mark.torch
def test_gguf_rows_come_out_half_a_head_apart() -> None:
    from graphwright.models import gguf_file

    pairs = np.array([[0], [10], [1], [11], [2], [12], [3], [13]], np.float32)  # two heads of width 4
    assert gguf_file.halves_from_pairs(pairs, 2)[:, 0].tolist() == [0, 1, 10, 11, 2, 3, 12, 13]


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.assets
@pytest.mark.parametrize("length", [32, 64])
def test_smollm2_export_equals_torch(length: int, exported: Exported) -> None:
    from graphwright.models import gguf_file

    path = exported("smollm2", length=length)
    assert path.stat().st_size < 550e6  # 135 M parameters, the tied embedding among them once
    feeds = registry.sample_inputs("smollm2", 1, {"length": length})
    assert_equals_torch(path, gguf_file.load_llama(assets.find("smollm2-gguf"), length), feeds)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.assets
def test_smollm2_perplexity_on_moby_dick(fetched: Callable[[str], None]) -> None:
    """From character 30,000, the first 2,048 tokens in windows of 512: 2,044 predictions."""
    import torch
    from graphwright.models import gguf_file

    fetched("smollm2")
    fetched("moby-dick")
    ids = tokens.smollm2().encode(datasets.moby_dick()[30_000:45_000]).ids[:2048]
    windows = torch.tensor(ids).reshape(4, 512)
    model = gguf_file.load_llama(assets.find("smollm2-gguf"), 512)
    with torch.inference_mode():
        losses = [torch.nn.functional.cross_entropy(model(w[None])[0, :-1], w[1:], reduction="sum") for w in windows]
    perplexity = float((torch.stack(losses).sum() / 2044).exp())
    print(f"perplexity {perplexity:.2f}")
    assert perplexity == pytest.approx(32.33, abs=0.05)


@pytest.mark.assets
def test_the_text_detector_finds_the_lines_of_the_page(exported: Exported) -> None:
    path = exported("ocr-det")
    (text,) = run(path, registry.sample_inputs("ocr-det"))
    rows = (text[0, 0] > 0.3).mean(axis=1) > 0.1
    runs = int(np.count_nonzero(np.diff(rows.astype(int)) == 1))
    print(f"{runs} lines of text")
    assert runs == 7  # a heading, five lines of the paragraph and one line of code


@pytest.mark.assets
def test_the_orientation_classifier_tells_upright_from_upside_down(exported: Exported) -> None:
    path = exported("ocr-cls")
    (turned,) = run(path, registry.sample_inputs("ocr-cls", dims={"batch": 6}))
    assert turned.argmax(axis=1).tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.assets
def test_magika_names_the_types_of_three_files(exported: Exported) -> None:
    path = exported("magika")
    (scores,) = run(path, registry.sample_inputs("magika", dims={"batch": 3}))
    config: dict[str, Any] = json.loads((assets.find("magika-files") / "config.min.json").read_text())
    labels = [config["target_labels_space"][i] for i in scores.argmax(axis=1)]
    assert labels == ["markdown", "json", "python"]


@pytest.mark.assets
def test_silero_hears_a_voice_and_not_the_noise(exported: Exported) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(exported("silero-vad"), providers=["CPUExecutionProvider"])

    def highest(wave: np.ndarray) -> float:
        feeds = registry.sample_inputs("silero-vad")
        probabilities = []
        for start in range(64, len(wave) - 512, 512):
            feeds["input"] = wave[None, start - 64 : start + 512]
            probability, feeds["state"] = session.run(None, feeds)
            probabilities.append(float(probability[0, 0]))
        return max(probabilities)

    rng = np.random.default_rng(0)
    assert highest(samples.voice(rng, 8000)) > 0.5
    assert highest((0.02 * rng.standard_normal(8000)).astype(np.float32)) < 0.1
