"""SmolLM2 as a generator, in onnxruntime and compiled, here and for ARM: what it foresees, and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from graphwright.models import assets
from graphwright.runtime.generator import Generator

PROMPTS = (
    "The capital of France is", "Once upon a time", "Water boils at", "The quick brown fox", "In 1969,",
    "def fibonacci(n):", "The meaning of life", "Call me Ishmael.", "To make bread, you", "The largest planet",
    "A recipe for soup:", "Dear Sir,", "The theory of relativity", "My favourite animal is", "Python is a",
    "1, 2, 3, 4,", "The president said", "If it rains tomorrow", "Music is", "The sea was",
)  # fmt: skip
MOBY_DICK: list[Any] = ["--skip-characters", 30_000, "--max-tokens", 2048, "--json"]

pytestmark = [pytest.mark.slow, pytest.mark.assets, pytest.mark.torch, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def exported(fetched: Callable[[str], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from graphwright.tools.export import export_generator

    fetched("smollm2-gguf")
    folder = tmp_path_factory.mktemp("smollm2") / "onnx"
    export_generator("smollm2", folder)
    return folder


@pytest.fixture(scope="module", params=["onnxruntime", "tvm"])
def smollm2(request: pytest.FixtureRequest, exported: Path) -> Path:
    if request.param == "onnxruntime":
        return exported
    from graphwright.runtime.generator_build import compile_generator

    return compile_generator(exported, exported.with_name("compiled")).root


def test_perplexity_on_moby_dick(smollm2: Path, cli: Callable[..., Result], fetched: Callable[[str], None]) -> None:
    """From character 30,000, the first 2,048 tokens in windows of 512: 32.33 in torch."""
    fetched("moby-dick")
    found = json.loads(cli("perplexity", smollm2, "--text", assets.find("moby-dick"), *MOBY_DICK).stdout)
    print(f"{found['backend']}: perplexity {found['perplexity']:.4f}")
    assert (found["predictions"], found["windows"], found["length"]) == (2044, 4, 512)
    assert found["perplexity"] == pytest.approx(32.33, abs=0.02)


@pytest.mark.parametrize("weights", ["float16", "bfloat16"])
def test_perplexity_with_weights_of_16_bits(
    weights: str, cli: Callable[..., Result], fetched: Callable[[str], None], tmp_path: Path
) -> None:
    """Compiled they stay 16 bits wide, and cost at most 0.5 % of the perplexity."""
    from graphwright.runtime.generator_build import compile_generator
    from graphwright.tools.export import export_generator

    fetched("smollm2-gguf")
    fetched("moby-dick")
    export_generator("smollm2", tmp_path / "onnx", weights=weights)
    compiled = compile_generator(tmp_path / "onnx", tmp_path / "compiled").root
    for manifest in compiled.glob("*/manifest.json"):
        (region,) = json.loads(manifest.read_text())["regions"]
        wide = sum(parameter["nbytes"] for parameter in region["parameters"] if parameter["dtype"] == "float32")
        assert wide < 3e6, "norms and tables of angles alone"
    found = json.loads(cli("perplexity", compiled, "--text", assets.find("moby-dick"), *MOBY_DICK).stdout)
    print(f"{weights}: perplexity {found['perplexity']:.4f}")
    assert found["backend"] == "tvm" and found["perplexity"] == pytest.approx(32.33, rel=0.005)


@pytest.fixture(scope="module")
def likeliest(fetched: Callable[[str], None]) -> Callable[[list[int]], list[int]]:
    """The token that torch finds likeliest behind each token of a text."""
    fetched("smollm2-gguf")
    torch = pytest.importorskip("torch")
    from graphwright.models import decoding, generators

    step = decoding.Decode(generators.open_model("smollm2").decoder, 96)

    def found(ids: list[int]) -> list[int]:
        with torch.inference_mode():
            _, _, best, *_ = step(torch.tensor([ids]), torch.tensor([0]), step.empty())
        return best[0, :, 0].tolist()

    return found


def test_greedy_text_is_torchs(smollm2: Path, likeliest: Callable[[list[int]], list[int]]) -> None:
    """Each token is the one that torch finds likeliest behind those before it, so that torch writes the same text."""
    generator, total = Generator(smollm2), 0
    for prompt in PROMPTS:
        ids = generator.encode(prompt)
        text = list(generator.tokens(ids, max_tokens=64))
        expected = likeliest([*ids, *text])[len(ids) - 1 :]
        assert text == expected[: len(text)], prompt
        assert len(text) == 64 or expected[-1] in generator.folder.about.stop_tokens
        total += len(text)
    print(f"{len(PROMPTS)} prompts, {total} tokens")
    assert total > 50 * len(PROMPTS)  # few are stopped


@pytest.mark.qemu
def test_arm64_says_the_same_under_qemu(fetched: Callable[[str], None], tmp_path: Path) -> None:
    from graphwright.runtime.device import qemu_available
    from graphwright.runtime.generator_build import compile_generator
    from graphwright.tools.export import export_generator

    if reason := qemu_available():
        pytest.skip(reason)
    fetched("smollm2-gguf")
    export_generator("smollm2", tmp_path / "onnx", capacity=64)
    arm = compile_generator(tmp_path / "onnx", tmp_path / "arm64", target="arm64", verify=False).root
    expected = list(Generator(tmp_path / "onnx").tokens(PROMPTS[0], max_tokens=8))
    assert len(expected) == 8 and list(Generator(arm).tokens(PROMPTS[0], max_tokens=8)) == expected


def test_the_capital_of_france(smollm2: Path) -> None:
    generator = Generator(smollm2)
    assert "".join(generator.generate("The capital of France is", max_tokens=2)).startswith(" Paris")
    answer = "".join(generator.generate("What is the capital of France?", max_tokens=24, chat=True))
    print(answer)
    assert "Paris" in answer


def test_both_parts_run_on_tvm_alone(smollm2: Path) -> None:
    for manifest in smollm2.glob("*/manifest.json"):
        regions = json.loads(manifest.read_text())["regions"]
        assert [region["runtime"] for region in regions] == ["tvm"], manifest
