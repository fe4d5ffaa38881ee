"""Learning scales, offsets and rounding: what is trained, that it helps on inputs not learned from, and replays."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes import graph, io
from graphwright.passes.base import PassContext, PassReport, TrainingJob, Weights
from graphwright.passes.errors import PassError, UsageError
from graphwright.passes.pipeline import Pipeline
from graphwright.passes.quantize.layers import find_layers
from graphwright.passes.quantize.learn import _segments
from graphwright.passes.quantize.narrow_sums import lanes
from graphwright.runtime.evaluator import evaluate
from graphwright.runtime.reference import Reference
from onnx import numpy_helper, parser

CNN = """<ir_version: 10, opset_import: ["" : 21]> g (float[B, 3, 6, 6] x) => (float[B, 5] y)
{
    c = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) r = Relu (c)
    d = Conv <pads = [1, 1, 1, 1], group = 4> (r, w2, b2) e = Relu (d)
    p = Conv (e, w3) s = Add (p, r)
    a = GlobalAveragePool (s) f = Flatten (a) y = Gemm <transB = 1> (f, w4, b4)
}"""
SHAPES = {"w1": (4, 3, 3, 3), "b1": (4,), "w2": (4, 1, 3, 3), "b2": (4,), "w3": (4, 4, 1, 1), "w4": (5, 4), "b4": (5,)}
MLP = """<ir_version: 10, opset_import: ["" : 21]> g (float[B, S, 8] x) => (float[B, S, 8] y)
{
    q = MatMul (x, wq) v = MatMul (x, wv) t = Mul (q, v) o = MatMul (t, wo) p = Add (o, bo) h = Relu (p)
    z = MatMul (h, wz) y = Add (z, x)
}"""
MLP_SHAPES = {"wq": (8, 8), "wv": (8, 8), "wo": (8, 8), "bo": (8,), "wz": (8, 8)}
SHORT = ":block_steps=60:steps=40:batch=8:rate=0.002"
LEARN = "dynaquant:least=1:weights=4:activations=4:learn=all" + SHORT


def model_of(text: str, shapes: Mapping[str, tuple[int, ...]]) -> ir.Model:
    random = np.random.default_rng(0)
    proto = parser.parse_model(text)
    proto.graph.initializer.extend(
        numpy_helper.from_array((random.standard_normal(shape) * 0.5).astype(np.float32), name)
        for name, shape in shapes.items()
    )
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def samples(shape: tuple[int, ...], count: int, seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape).astype(np.float32) for _ in range(count)]


def context(folder: Path, x: list[np.ndarray], **more: object) -> PassContext:
    from graphwright.models.trainer import train

    given: dict[str, object] = {"trainer": train, "evaluator": partial(evaluate, threads=1), **more}
    return PassContext(calibration={"x": x}, output=folder / "m.onnx", overwrite=True, **given)  # type: ignore[arg-type]


def quantized(spec: str, model: ir.Model, ctx: PassContext) -> tuple[ir.Model, PassReport]:
    found, (report,) = Pipeline.parse(spec).run(model, ctx)
    onnx.checker.check_model(ir.to_proto(found), full_check=True)
    return found, report


def error(model: ir.Model, original: ir.Model, x: list[np.ndarray]) -> float:
    """Squared error of the outputs over their squares."""
    old, new = Reference(original, threads=1), Reference(model, threads=1)
    pairs = [(old.run({"x": one})["y"], new.run({"x": one})["y"]) for one in x]
    return sum(float(((a - b) ** 2).sum()) for a, b in pairs) / sum(float((a**2).sum()) for a, _ in pairs)


def bytes_of(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


@pytest.mark.torch
@pytest.mark.parametrize("which", ["cnn", "mlp", "weights alone"])
def test_learning_helps_on_inputs_that_nothing_was_learned_from(which: str, tmp_path: Path) -> None:
    """... and the recorded pipeline repeats it, without inputs and without a trainer."""
    pytest.importorskip("torch")
    convolutions = which == "cnn"
    model = model_of(CNN, SHAPES) if convolutions else model_of(MLP, MLP_SHAPES)
    shape = (1, 3, 6, 6) if convolutions else (1, 5, 8)
    learned_from, others = samples(shape, 120, 1), samples(shape, 40, 2)
    options, most = {
        "cnn": (":activations=4", 0.8), "mlp": (":group=0:together=false", 0.95),
        "weights alone": (":activations=none:group=0", 0.85),
    }[which]  # fmt: skip
    ctx = context(tmp_path, learned_from)
    plain, _ = quantized(f"dynaquant:least=1:weights=4{options}", model, ctx)
    ours, report = quantized(f"dynaquant:least=1:weights=4{options}:learn=all{SHORT}", model, ctx)
    assert error(ours, model, others) < most * error(plain, model, others)
    assert {"learned_drop_before", "learned_drop_after_blocks", "learned_steps", "drop"} <= set(report.stats)
    assert not (tmp_path / "m.onnx.fit").exists()
    again, (replayed,) = Pipeline.parse(report.spec).run(model, PassContext())
    assert bytes_of(again) == bytes_of(ours)
    assert replayed.spec == report.spec


@pytest.mark.torch
def test_a_replay_in_a_fresh_process_needs_no_torch(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    model = model_of(MLP, MLP_SHAPES)
    io.save(model, tmp_path / "in.onnx")
    spec = LEARN.replace("block_steps=60", "block_steps=4").replace(":steps=40", ":steps=4")
    ours, report = quantized(spec, io.load(tmp_path / "in.onnx"), context(tmp_path, samples((1, 5, 8), 40, 1)))
    io.save(ours, tmp_path / "learned.onnx")
    code = f"""
import sys
sys.modules["torch"] = None
from graphwright.runtime.driver import optimize
optimize({str(tmp_path / "in.onnx")!r}, {report.spec!r}, preset="none", out={str(tmp_path / "again.onnx")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "learned.onnx").read_bytes()


def test_what_takes_the_outputs_further_away_counts_for_nothing(tmp_path: Path) -> None:
    model, x = model_of(MLP, MLP_SHAPES), samples((1, 5, 8), 30, 1)
    found = {}
    for drop in (0.2, 0.4):

        def trainer(job: TrainingJob, ctx: PassContext, drop: float = drop) -> Weights:
            arrays = {f"{site}|bias": np.ones(8, np.float32) for site in ("o", "z")}
            return Weights(arrays, (), job.record, {"drop_before": 0.3, "drop": drop})

        ours, report = quantized("dynaquant:least=1:learn=all", model, context(tmp_path, x, trainer=trainer))
        plain, _ = quantized("dynaquant:least=1", model, context(tmp_path, x))
        found[drop] = (bytes_of(ours) == bytes_of(plain), "learned" in report.stats)
    assert found == {0.2: (False, False), 0.4: (True, True)}


def test_rounding_that_is_learned_keeps_sums_of_weights_narrow(tmp_path: Path) -> None:
    model, x = model_of(MLP, MLP_SHAPES), samples((1, 5, 8), 30, 1)

    def trainer(job: TrainingJob, ctx: PassContext) -> Weights:
        arrays = {f"{site}|rounding": np.full((8, 8), 9, np.float32) for site in ("q", "v", "o", "z")}
        return Weights(arrays, (), job.record, {"drop_before": 0.3, "drop": 0.2})

    plain, _ = quantized("dynaquant:least=1:narrow_sums=4", model, context(tmp_path, x))
    ours, _ = quantized("dynaquant:least=1:narrow_sums=4:learn=rounding", model, context(tmp_path, x, trainer=trainer))
    before, after = _codes(plain), _codes(ours)
    assert len(before) == len(after) == 4
    for old, learned in zip(before, after, strict=True):
        assert (learned > old).any()
        assert lanes(8, meeting=4).fits(learned)


def _codes(model: ir.Model) -> list[np.ndarray]:
    """Of every product's weight (outputs, inputs)."""
    tensors = [graph.constant_tensor(node.inputs[0]) for node in model.graph if graph.is_op(node, "DequantizeLinear")]
    return [tensor.numpy().T for tensor in tensors if tensor is not None]


class Interrupted(Exception):
    pass


@pytest.mark.torch
def test_an_interrupted_run_goes_on_and_another_width_does_not_take_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("torch")
    from graphwright.models import fit

    monkeypatch.setattr(fit, "SAID_EVERY", 0.0)
    model, x = model_of(MLP, MLP_SHAPES), samples((1, 5, 8), 40, 1)
    spec = "dynaquant:least=1:weights=4:learn=all:block_steps=20:steps=10:batch=8"
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    whole, _ = quantized(spec, model, context(tmp_path / "a", x))
    said: list[str] = []

    def interrupt(message: str) -> None:
        said.append(message)
        if "whole model" in message:
            raise Interrupted

    with pytest.raises(Interrupted):
        quantized(spec, model, context(tmp_path / "b", x, progress=interrupt))
    assert any("held-out loss" in message and "left" in message for message in said)
    checkpoint = (tmp_path / "b" / "m.onnx.fit").read_bytes()
    quantized(spec.replace("weights=4", "weights=6"), model, context(tmp_path / "b", x))
    assert "is of another run; training starts anew" in caplog.text
    (tmp_path / "b" / "m.onnx.fit").write_bytes(checkpoint)
    resumed, _ = quantized(spec, model, context(tmp_path / "b", x))
    assert "going on from the checkpoint" in caplog.text
    assert bytes_of(resumed) == bytes_of(whole)


@pytest.mark.parametrize(
    ("parts", "learned"),
    [
        ("scales", {"scale", "data_scale"}),
        ("offsets", {"bias", "data_zero"}),
        ("rounding", {"rounding"}),
        ("all", {"scale", "data_scale", "bias", "data_zero", "rounding"}),
    ],
)
def test_each_part_can_be_learned_by_itself(parts: str, learned: set[str], tmp_path: Path) -> None:
    """Every layer and value has its own numbers, which some block learns; the student starts as the plan says."""
    jobs: list[TrainingJob] = []

    def trainer(job: TrainingJob, ctx: PassContext) -> Weights:
        jobs.append(job)
        zeros = {name: job.teacher.graph.initializers[name] for block in job.blocks for name in block.weights}
        return Weights({name: value.const_value.numpy() for name, value in zeros.items()}, (), job.record)  # type: ignore[union-attr]

    model = model_of(CNN, SHAPES)
    ctx = context(tmp_path, samples((1, 3, 6, 6), 30, 1), trainer=trainer)
    plain, _ = quantized("dynaquant:least=1:weights=4:activations=4", model, ctx)
    ours, _ = quantized(f"dynaquant:least=1:weights=4:activations=4:learn={parts}", model, ctx)
    x = {"x": samples((2, 3, 6, 6), 1, 2)[0]}
    assert (Reference(ours, threads=1).run(x)["y"] == Reference(plain, threads=1).run(x)["y"]).all()
    (job,) = jobs
    names = {name for block in job.blocks for name in block.weights}
    assert {name.partition("|")[2] for name in names} == learned
    for name in learned:
        of_data = name.startswith("data_")
        assert len([n for n in names if n.endswith(f"|{name}")]) == (6 if of_data else 4)
    assert [block.output for block in job.blocks] == ["r", "f", "y"]


def test_blocks_lie_between_values_that_everything_passes_through() -> None:
    for text, shapes, wanted in (
        (CNN, SHAPES, [(None, "r"), ("r", "f"), ("f", "y")]),
        (MLP, MLP_SHAPES, [(None, "q"), ("q", "t"), ("t", "h"), ("h", "y")]),
    ):
        model = model_of(text, shapes)
        found = _segments(model, {layer.node for layer in find_layers(model)[0]})
        assert [(None if a is None else a.name, b.name) for a, b in found] == wanted


def test_what_lies_behind_the_last_such_value_is_a_block_for_each_layer() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[B, 8] x) => (float[B, 8] y, float[B, 8] z)
    { a = MatMul (x, wa) h = Relu (a) y = MatMul (h, wb) z = MatMul (h, wc) }"""
    model = model_of(text, {name: (8, 8) for name in ("wa", "wb", "wc")})
    found = _segments(model, {layer.node for layer in find_layers(model)[0]})
    assert [(None if a is None else a.name, b.name) for a, b in found] == [(None, "h"), ("h", "y"), ("h", "z")]


def test_refusals(tmp_path: Path) -> None:
    model = model_of(MLP, MLP_SHAPES)
    with pytest.raises(PassError, match=r"dynaquant needs inputs to learn from: give --calibration, plan=FILE.npz"):
        Pipeline.parse(LEARN).run(model, PassContext())
    with pytest.raises(PassError, match=r"nothing here can train; use the command optimize, plan=FILE.npz, or leave"):
        Pipeline.parse(LEARN).run(model, context(tmp_path, samples((1, 5, 8), 4, 1), trainer=None))
    for options, message in (
        ("learn=zeros", "learn names 'zeros'; expected scales, offsets, rounding, joined by"),
        ("modulator=-1", "modulator is -1, must be at least 0"),
        ("batch=0", "batch is 0, must be at least 1"),
        ("rate=1", "rate is 1, must be between 0 and 1"),
    ):
        with pytest.raises(UsageError, match=message):
            Pipeline.parse(f"dynaquant:{options}")
