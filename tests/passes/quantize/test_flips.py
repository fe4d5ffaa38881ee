"""How many images are expected to change their class, and layers that return to float until few enough do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.errors import PassError, UsageError
from graphwright.passes.pipeline import Pipeline
from graphwright.passes.quantize.sensitivity import Flips, class_output
from onnx import parser

from .test_dynaquant import cnn, mlp, quantized, run, samples


class Evaluator:
    """Hands out rows that were made up: by the name of the model's graph, one array for all samples."""

    def __init__(self, **rows: np.ndarray) -> None:
        self.rows = rows

    def __call__(
        self, model: ir.Model, names: Sequence[str], feeds: Sequence[dict[str, np.ndarray]]
    ) -> Iterator[tuple[int, str, np.ndarray]]:
        for number, one in enumerate(feeds):
            yield number, names[0], self.rows[model.graph.name or ""][one["at"]]


def named(name: str) -> ir.Model:
    text = f'<ir_version: 10, opset_import: ["" : 20]> {name} (float[2] x) => (float[2] y) {{ y = Relu (x) }}'
    return ir.from_proto(parser.parse_model(text))


def test_expected_flips_are_those_that_are_counted() -> None:
    """4,000 rows with normal errors: the part that flips, within three standard deviations of counting."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((4000, 1, 20)) * 2
    noise = random.standard_normal(rows.shape) * 0.1
    evaluator = Evaluator(old=rows, new=rows + noise)
    feeds = [{"at": number} for number in range(len(rows))]
    flips = Flips(named("old"), "y", feeds, feeds[:50], evaluator)
    expected = flips.share(named("new"))
    counted = float((rows.argmax(-1) != (rows + noise).argmax(-1)).mean())
    print(f"{expected:.4f} expected, {counted:.4f} counted")
    assert abs(expected - counted) < 3 * np.sqrt(counted / len(rows)) + 0.003
    assert flips.share(named("old")) == 0
    louder = Evaluator(old=rows, new=rows + 2 * noise)
    assert Flips(named("old"), "y", feeds, feeds[:50], louder).share(named("new")) > expected


def test_probabilities_count_as_their_logarithms() -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((40, 1, 5))
    noise = random.standard_normal(rows.shape) * 0.1

    def softmax(x: np.ndarray) -> np.ndarray:
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)

    feeds = [{"at": number} for number in range(len(rows))]
    of = [
        Flips(named("old"), "y", feeds, feeds, evaluator).share(named("new"))
        for evaluator in (
            Evaluator(old=rows, new=rows + noise), Evaluator(old=softmax(rows), new=softmax(rows + noise))
        )
    ]  # fmt: skip
    assert of[0] > 0
    assert of[1] == pytest.approx(of[0], rel=1e-6)


def test_a_model_classifies_images_by_its_only_output() -> None:
    proto = cnn()[0]
    assert class_output(ir.from_proto(proto)) == "y"
    assert class_output(ir.from_proto(mlp()[0])) is None  # no image
    softmax = onnx.ModelProto()
    softmax.CopyFrom(proto)
    softmax.graph.node[-1].output[0] = "logits"
    softmax.graph.node.append(onnx.helper.make_node("Softmax", ["logits"], ["y"]))
    assert class_output(ir.from_proto(softmax)) == "y"
    two = onnx.ModelProto()
    two.CopyFrom(proto)
    two.graph.output.append(onnx.helper.make_tensor_value_info("s", onnx.TensorProto.FLOAT, None))
    assert class_output(ir.from_proto(two)) is None


def test_layers_return_to_float_until_few_images_change_their_class(tmp_path: Path) -> None:
    proto = cnn()[0]
    calibration = samples((1, 3, 6, 6), 60)
    counts, flips, errors = [], [], []
    for options in ("", ":flips=0.2", ":flips=0.02", ":flips=0.0001"):
        model, report = quantized(proto, f":weights=4:group=0{options}", calibration, tmp_path)
        counts.append(sum(change.rule == "layer" for change in report.changes))
        flips.append(report.stats.get("flips"))
        x = {"x": np.concatenate(calibration["x"])}
        errors.append(float(np.abs(run(model, x) - run(proto, x)).mean()))
    assert counts[0] == 4 and counts == sorted(counts, reverse=True) and counts[-1] < 4
    assert errors[-1] < errors[0]
    assert flips[0] is None
    assert all(share <= most for share, most in zip(flips[1:], (0.2, 0.02, 0.0001), strict=True))
    reasons = [skip.reason for skip in report.skips if skip.rule == "layer"]
    assert reasons and all("of the outputs, more than flips=0.0001 leaves" in reason for reason in reasons)


def test_models_without_classes_stay_as_they_are(tmp_path: Path) -> None:
    _, report = quantized(mlp()[0], ":flips=0.0001", samples((1, 3, 8)), tmp_path)
    assert "flips" not in report.stats and not report.skips


def test_flips_need_inputs_and_a_share() -> None:
    with pytest.raises(UsageError, match="flips is 1, must be between 0 and 1"):
        Pipeline.parse("dynaquant:flips=1")
    with pytest.raises(PassError, match="real inputs"):
        Pipeline.parse("dynaquant:activations=none:flips=0.1").run(ir.from_proto(cnn()[0]))
