"""The trainer on a tiny model: it learns, goes on where it was interrupted, and what it learned replays."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes import io
from graphwright.passes.attention.linear_attention import LinearAttention
from graphwright.passes.attention.softplus_attention import SoftplusAttention
from graphwright.passes.base import Block, Loss, PassContext, Recover
from graphwright.passes.errors import InputError, PassError
from graphwright.passes.pipeline import Pipeline
from graphwright.passes.quality import held_out
from graphwright.passes.weights import load_weights

torch = pytest.importorskip("torch")
from graphwright.models import fit, fit_undo  # noqa: E402 -- needs torch

pytestmark = pytest.mark.torch

LAYER = """
    q{n} = MatMul ({x}, wq{n})  k{n} = MatMul ({x}, wk{n})  v{n} = MatMul ({x}, wv{n})
    a{n} = Attention <q_num_heads = 2, kv_num_heads = 2> (q{n}, k{n}, v{n})
    o{n} = MatMul (a{n}, wo{n})  p{n} = Add (o{n}, bo{n})  r{n} = Add ({x}, p{n})
    h{n} = LayerNormalization (r{n}, ones)
"""


def two_layers(seed: int = 0) -> ir.Model:
    """x (B, S, 8) -> two layers of attention with residuals -> y (B, S, 8)."""
    random = np.random.default_rng(seed)
    weights = {f"w{m}{n}": random.standard_normal((8, 8)) * 0.35 for n in range(2) for m in "qkvo"}
    weights |= {f"bo{n}": random.standard_normal(8) * 0.1 for n in range(2)} | {"ones": np.ones(8)}
    body = LAYER.format(n=0, x="x") + LAYER.format(n=1, x="h0") + "y = Identity (h1)"
    text = f'<ir_version: 10, opset_import: ["": 23]> g (float[B, S, 8] x) => (float[B, S, 8] y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def context(tmp_path: Path, samples: int = 200, **more: object) -> PassContext:
    random = np.random.default_rng(7)
    lengths = [6 if i % 3 else 9 for i in range(samples)]
    x = [random.standard_normal((1, n, 8)).astype(np.float32) for n in lengths]
    return PassContext(calibration={"x": x}, trainer=fit.train, output=tmp_path / "m.onnx", **more)  # type: ignore[arg-type]


def small(**more: object) -> SoftplusAttention:
    options: dict[str, object] = {"block_steps": 60, "steps": 60, "batch": 8, "rate": 0.002, **more}
    return SoftplusAttention(**options)  # type: ignore[arg-type]


def proto(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def test_it_learns_and_what_it_learned_replays(tmp_path: Path) -> None:
    model = two_layers()
    learned, (report,) = Pipeline((small(),)).run(model, context(tmp_path))
    stats = report.stats
    assert [c.detail for c in report.changes] == ["layer 0: lssar", "layer 1: lssar"]
    assert stats["drop_after_blocks"] < 0.7 * stats["drop_before"]  # type: ignore[operator]  # numbers
    assert stats["drop"] < stats["drop_after_blocks"]  # type: ignore[operator]  # numbers
    file = tmp_path / "m.onnx.softplus-attention.npz"
    assert f":weights={file}:" in report.spec and file.is_file()
    assert not (tmp_path / "m.onnx.fit").exists()
    assert proto(model) == proto(two_layers()), "the model that was given is changed"
    again, (replayed,) = Pipeline.parse(report.spec).run(two_layers(), PassContext())
    assert proto(again) == proto(learned)
    assert replayed.spec == report.spec


def replay(tmp_path: Path, spec: str) -> None:
    """in.onnx -> again.onnx in a process that cannot import torch."""
    code = f"""
import sys
sys.modules["torch"] = None
from graphwright.runtime.driver import optimize
optimize({str(tmp_path / "in.onnx")!r}, {spec!r}, preset="none", out={str(tmp_path / "again.onnx")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_a_replay_in_a_fresh_process_needs_no_torch(tmp_path: Path) -> None:
    io.save(two_layers(), tmp_path / "in.onnx")
    step = small(block_steps=4, steps=4)
    learned, (report,) = Pipeline((step,)).run(io.load(tmp_path / "in.onnx"), context(tmp_path))
    io.save(learned, tmp_path / "learned.onnx")
    replay(tmp_path, report.spec)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "learned.onnx").read_bytes()


def test_linear_attention_learns_and_replays_in_a_fresh_process_without_torch(tmp_path: Path) -> None:
    io.save(two_layers(), tmp_path / "in.onnx")
    step = LinearAttention(block_steps=40, steps=20, batch=8, rate=0.002)
    learned, (report,) = Pipeline((step,)).run(io.load(tmp_path / "in.onnx"), context(tmp_path))
    assert [c.detail for c in report.changes] == ["layer 0: linear", "layer 1: linear"]
    assert report.stats["drop"] < 0.8 * report.stats["drop_before"]  # type: ignore[operator]  # numbers
    io.save(learned, tmp_path / "learned.onnx")
    replay(tmp_path, report.spec)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "learned.onnx").read_bytes()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("at", [25, 75])
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the blocks and in the whole model."""
    monkeypatch.setattr(fit, "SAID_EVERY", 0.0)
    step = small(layers="auto")
    whole, _ = Pipeline((step,)).run(two_layers(), context(tmp_path / "a"))
    calls = 0

    def interrupt(message: str) -> None:
        nonlocal calls
        calls += "held-out" in message
        if calls == at:
            raise Interrupted

    ctx = context(tmp_path / "b")
    with pytest.raises(Interrupted):
        Pipeline((step,)).run(two_layers(), dataclasses.replace(ctx, progress=interrupt))
    assert (tmp_path / "b" / "m.onnx.fit").is_file()
    resumed, _ = Pipeline((step,)).run(two_layers(), ctx)
    assert "going on from the checkpoint" in caplog.text
    assert proto(resumed) == proto(whole)


def test_what_blocks_learn_is_kept_where_it_helps() -> None:
    """Beside what was taken before: `c` helps with `a` alone, `b` and a number that is none never."""
    blocks = [Block(site, (), site, (site,)) for site in "abcd"]
    before, after = ({site: torch.tensor(x) for site in "abcd"} for x in (0.0, 1.0))
    drops = {"a": 0.2, "ab": 0.3, "ac": 0.1, "acd": float("nan")}
    asked: list[str] = []

    def drop(weights: dict[str, torch.Tensor]) -> float:
        asked.append("".join(site for site in "abcd" if weights[site]))
        return drops[asked[-1]]

    found = fit_undo.helpful(blocks, before, after, 0.25, drop, lambda message: None)
    assert found == {"sites": ["a", "c"], "drop": 0.1} and asked == list(drops)
    assert fit_undo.helpful(blocks[1:2], before, after, 0.2, lambda w: 0.2, lambda m: None) == {
        "sites": [], "drop": 0.2
    }  # fmt: skip


def harmful_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer's block ends with weights that are nonsense."""
    learn = fit._Trainer._blocks

    def blocks(self: fit._Trainer, student: object, weights: dict[str, torch.Tensor]) -> fit._Stage:
        stage = learn(self, student, weights)  # type: ignore[arg-type]
        for name in self.job.blocks[0].weights:
            stage.best[name] = -3 * weights[name]
        return stage

    monkeypatch.setattr(fit._Trainer, "_blocks", blocks)


@pytest.mark.slow
def test_blocks_that_take_the_outputs_further_away_are_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """... and a run that is interrupted behind it ends alike."""
    _, (good,) = Pipeline((small(steps=0),)).run(two_layers(), context(tmp_path / "good"))
    assert "drop_of_the_helpful" not in good.stats
    harmful_blocks(monkeypatch)
    monkeypatch.setattr(fit, "SAID_EVERY", 0.0)
    step = small(block_steps=20, steps=10)
    whole, (report,) = Pipeline((step,)).run(two_layers(), context(tmp_path / "a"))
    stats = report.stats
    assert stats["drop_of_the_helpful"] < stats["drop_before"] < stats["drop_after_blocks"]  # type: ignore[operator]
    assert stats["drop"] <= stats["drop_of_the_helpful"]  # type: ignore[operator]  # numbers
    for stop in ("what a1 learned", "whole model"):
        ctx = context(tmp_path / stop.replace(" ", "-"))
        seen: list[str] = []

        def interrupt(message: str, stop: str = stop, seen: list[str] = seen) -> None:
            seen.append(message)
            if message.startswith(stop):
                raise Interrupted

        with pytest.raises(Interrupted):
            Pipeline((step,)).run(two_layers(), dataclasses.replace(ctx, progress=interrupt))
        resumed, _ = Pipeline((step,)).run(two_layers(), ctx)
        assert proto(resumed) == proto(whole)
    assert "going on from the checkpoint" in caplog.text


def test_a_checkpoint_of_another_run_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "m.onnx.fit").write_bytes(b"something else")
    Pipeline((small(block_steps=2, steps=0),)).run(two_layers(), context(tmp_path))
    assert "is of another run; training starts anew" in caplog.text


def test_auto_keeps_softmax_where_it_hurts_most(tmp_path: Path) -> None:
    model = two_layers()
    # A layer whose output projection is nothing cannot hurt.
    model.graph.initializers["wo0"].const_value = ir.tensor(np.zeros((8, 8), np.float32), name="wo0")
    _, (report,) = Pipeline((small(layers="auto", keep=1, block_steps=4, steps=2),)).run(model, context(tmp_path))
    assert [c.value for c in report.changes] == ["a0"]
    assert [(s.value, s.reason) for s in report.skips] == [("a1", "layer 1 stays softmax")]
    assert load_weights(tmp_path / "m.onnx.softplus-attention.npz").sites == ("a0",)


def test_a_model_with_a_fixed_batch_learns_sample_by_sample(tmp_path: Path) -> None:
    model = two_layers()
    model.graph.inputs[0].shape = ir.Shape([1, "S", 8])
    _, (report,) = Pipeline((small(block_steps=20, steps=0, batch=3),)).run(model, context(tmp_path))
    assert report.stats["drop"] < report.stats["drop_before"]  # type: ignore[operator]  # numbers


def test_only_the_weights_that_the_pass_names_change(tmp_path: Path) -> None:
    before = two_layers()
    for options, expected in (
        ({"layers": "1"}, {"wq1", "wk1", "wv1", "wo1", "bo1"}),
        ({"layers": "1", "train": "all"}, {f"w{m}{n}" for m in "qkvo" for n in "01"} | {"bo0", "bo1"}),
    ):
        text = ":".join(f"{k}={v}" for k, v in {**options, "block_steps": 3, "steps": 3}.items())
        after, _ = Pipeline.parse(f"softplus-attention:{text}").run(before, context(tmp_path, overwrite=True))
        changed = {
            name
            for name, value in before.graph.initializers.items()
            if not np.array_equal(value.const_value.numpy(), after.graph.initializers[name].const_value.numpy())
        }
        assert changed == expected


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    samples = ctx.calibration["x"]  # type: ignore[index]  # it is given
    judged = held_out(len(samples))
    broken = {"x": [x if i in judged else x * np.float32(np.inf) for i, x in enumerate(samples)]}
    with pytest.raises(PassError, match="the gradient is not finite 11 times in a row; try a smaller rate"):
        Pipeline((small(),)).run(two_layers(), dataclasses.replace(ctx, calibration=broken))


def test_samples_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    """Nothing would be learned from them, without a word."""
    ctx = context(tmp_path)
    samples = list(ctx.calibration["x"])  # type: ignore[index]  # it is given
    samples[3] = samples[3] * np.float32(np.nan)
    with pytest.raises(InputError, match="input 'x' has NaN in sample 3; leave such samples out"):
        Pipeline((small(),)).run(two_layers(), dataclasses.replace(ctx, calibration={"x": samples}))
    infinite = {"x": [x * np.float32(np.inf) for x in ctx.calibration["x"]]}  # type: ignore[index]  # it is given
    with pytest.raises(PassError, match="blocks: values of the model are not finite on held-out samples"):
        Pipeline((small(),)).run(two_layers(), dataclasses.replace(ctx, calibration=infinite))


@pytest.mark.parametrize("options", [{}, {"recover": Recover.NONE}])
def test_a_layer_that_does_not_exist_is_refused(tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(PassError, match=r"layers=0\+2: there is no layer 2; the model has 0 to 1"):
        Pipeline((small(layers="0+2", **options),)).run(two_layers(), context(tmp_path))


def test_refusals(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    with pytest.raises(PassError, match=r"give --calibration, weights=FILE\.npz of an earlier run, or recover=none"):
        Pipeline((SoftplusAttention(),)).run(two_layers(), PassContext())
    with pytest.raises(PassError, match="nothing here can train"):
        Pipeline((SoftplusAttention(),)).run(two_layers(), dataclasses.replace(ctx, trainer=None))
    with pytest.raises(PassError, match="outputs=z is not an output of floats; expected some of y"):
        Pipeline((small(outputs=("z",)),)).run(two_layers(), ctx)
    with pytest.raises(InputError, match="holds no samples"):
        Pipeline((small(),)).run(two_layers(), dataclasses.replace(ctx, calibration={"x": []}))


@pytest.mark.parametrize(
    "name, array, kind",
    [
        ("y", np.eye(4)[None], Loss.COSINE),
        ("logits", np.ones((2, 4)), Loss.KL),
        ("y", np.ones((2, 1000)), Loss.KL),
        ("y", np.ones((2, 999)), Loss.MSE),
        ("y", np.ones(()), Loss.MSE),
    ],
)
def test_the_loss_of_an_output(name: str, array: np.ndarray, kind: Loss) -> None:
    assert fit.loss_for(name, torch.from_numpy(array)) is kind


@pytest.mark.parametrize("loss", [fit.relative_mse, fit.cosine_distance, fit.divergence])
def test_losses_are_zero_for_the_same_and_ignore_padding(loss: Callable[..., torch.Tensor]) -> None:
    x = torch.randn((2, 5, 8), generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[:, 3:] = 9.0
    rows = torch.tensor([[True] * 3 + [False] * 2] * 2)
    assert float(loss(x, x)) == pytest.approx(0, abs=1e-6)
    assert float(loss(y, x, rows)) == pytest.approx(0, abs=1e-6)
    assert float(loss(y, x)) > 0.01


def test_the_schedule_warms_up_and_falls() -> None:
    rates = [fit.schedule(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == 1.0 and rates[-1] == pytest.approx(fit.LOWEST, abs=0.01)
    assert rates[5:] == sorted(rates[5:], reverse=True)
