"""The experiment with tiny models: interrupted runs end the same, and all runtimes give one loss."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from graphwright.passes.errors import InputError
from graphwright.tools import length_extrapolation
from graphwright.tools.chart import line_chart, nice_step

torch = pytest.importorskip("torch")
from graphwright.models import tiny_lm, tiny_lm_training  # noqa: E402 -- needs torch

pytestmark = pytest.mark.torch

TEXT = bytes(np.random.default_rng(0).choice(np.frombuffer(b"abcde \n", np.uint8), 6000))
SIZES = tiny_lm.Sizes("lssar", positions=64, width=16, layers=2, heads=2, hidden=24)


def plan(steps: int = 8) -> tiny_lm_training.Plan:
    return tiny_lm_training.Plan(SIZES, length=4, steps=steps, batch=4)


def test_held_out_stretches_are_not_learned_from() -> None:
    text = bytes(range(200)) * 2
    corpus = tiny_lm_training.Corpus.of(text, 4, 10)
    assert corpus.held_out.shape == (4, 10) and len(corpus.learned) == len(text) - 40
    assert bytes(corpus.held_out[0]) == bytes(range(45, 55))
    assert bytes(corpus.learned[40:50]) == bytes([40, 41, 42, 43, 44, 55, 56, 57, 58, 59])
    with pytest.raises(InputError, match="400 bytes of text; holding out 40 x 10 needs at least twice that"):
        tiny_lm_training.Corpus.of(text, 40, 10)


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_lm_training, "CHECKPOINT_EVERY", 3)
    monkeypatch.setattr(tiny_lm_training, "SAID_EVERY", 0.0)
    corpus = tiny_lm_training.Corpus.of(TEXT, 2, 65)

    def stop(message: str) -> None:
        if " 5/8" in message:
            raise KeyboardInterrupt

    whole = tiny_lm_training.train(plan(), corpus, tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        tiny_lm_training.train(plan(), corpus, tmp_path / "parts.pt", stop)
    assert torch.load(tmp_path / "parts.pt", weights_only=True)["step"] == 3
    parts = tiny_lm_training.train(plan(), corpus, tmp_path / "parts.pt")
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    finished = tiny_lm_training.train(plan(), corpus, tmp_path / "parts.pt", stop)  # trains nothing, says nothing
    assert torch.equal(finished.embedding.weight, whole.embedding.weight)


def test_a_checkpoint_of_another_plan_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus = tiny_lm_training.Corpus.of(TEXT, 2, 65)
    tiny_lm_training.train(plan(2), corpus, tmp_path / "c.pt")
    tiny_lm_training.train(plan(3), corpus, tmp_path / "c.pt")
    assert "c.pt: is of another run; training starts anew" in caplog.text
    assert torch.load(tmp_path / "c.pt", weights_only=True)["step"] == 3


def test_lssar_weights_are_those_of_the_operator_and_their_gradient_is_right() -> None:
    from graphwright.passes.ops.softplus_attention import START, lssar

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((1, 2, 9, 8), generator=generator, dtype=torch.float64) for _ in range(3))
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    found = tiny_lm.lssar_weights(q, k, seen, 15) @ v
    wanted = lssar(q.numpy(), k.numpy(), v.numpy(), np.zeros((1, 1, 1, 1)), causal=START, power=15)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-6)  # the mask's numbers are float32

    def output(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return tiny_lm.lssar_weights(q, k, seen, 3) @ v

    # The maximum that the rows are divided by is left out of the gradient.
    assert torch.autograd.gradcheck(output, (q.requires_grad_(), k.requires_grad_()))


@pytest.mark.tvm
def test_the_script_prints_losses_that_all_runtimes_agree_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm")
    monkeypatch.setattr(length_extrapolation, "text", lambda: TEXT)
    arguments = ["--folder", tmp_path, "--length", 4, "--steps", 3, "--batch", 4, "--layers", 1, "--width", 16]
    arguments += ["--heads", 2, "--stretches", 2, "--json", tmp_path / "all.json", "--plot", tmp_path / "p.svg"]

    def run() -> str:
        result = CliRunner().invoke(length_extrapolation.command, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    printed = run()
    assert printed.count("16x") == 5 and "at 16x the loss of lssar is" in printed
    results = json.loads((tmp_path / "all.json").read_text())
    assert [found["attention"] for found in results] == ["softmax", "lssar"]
    for found in results:
        assert list(found["loss"]) == ["1", "2", "4", "8", "16"]
        assert all(np.isfinite(list(found["loss"].values()))) and list(found["check"]) == ["1", "16"]
        for losses in found["check"].values():
            assert max(losses.values()) - min(losses.values()) < 1e-5 * max(losses.values())
    for name, operator in (("softmax", "Attention"), ("lssar", "ReweightedSoftplusAttention")):
        model = onnx.load(tmp_path / name / "model.onnx", load_external_data=False)
        assert operator in [node.op_type for node in model.graph.node]
    ElementTree.parse(tmp_path / "p.svg")
    assert run() == printed  # nothing is computed again


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--length 0", "0 is not in the range x>=1"),
        ("--threads 0", "0 is not in the range x>=1"),
        ("--seed -1", "-1 is not in the range x>=0"),
        ("--width 6 --heads 2", "6 is no multiple of 4, twice the heads"),
        ("--folder /proc/none", "/proc/none: cannot be made"),
    ],
)
def test_options_that_make_no_sense(arguments: str, message: str) -> None:
    result = CliRunner().invoke(length_extrapolation.command, arguments.split())
    assert result.exit_code in (1, 2) and message in result.output


def test_steps_of_an_axis_are_round_numbers() -> None:
    assert [nice_step(span) for span in (0.9, 1.3, 5.0, 40.0)] == [0.2, 0.5, 1.0, 10.0]
    chart = line_chart("a < b", ["1", "2"], {"x": [1.0, 2.0], "y": [1.0, 1.0]})
    root = ElementTree.fromstring(chart)
    assert "a < b" in "".join(root.itertext())
    assert len([e for e in root if e.tag.endswith("polyline")]) == 2
    ElementTree.fromstring(line_chart("flat", ["1"], {"x": [1.0]}))
