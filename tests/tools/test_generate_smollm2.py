"""SmolLM2 as a generator, in onnxruntime and compiled: what it foresees, and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from graphwright.models import assets
from graphwright.runtime.generator import Generator

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
    options: list[Any] = ["--text", assets.find("moby-dick"), "--skip-characters", 30_000, "--max-tokens", 2048]
    found = json.loads(cli("perplexity", smollm2, *options, "--json").stdout)
    print(f"{found['backend']}: perplexity {found['perplexity']:.4f}")
    assert (found["predictions"], found["windows"], found["length"]) == (2044, 4, 512)
    assert found["perplexity"] == pytest.approx(32.33, abs=0.02)


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
