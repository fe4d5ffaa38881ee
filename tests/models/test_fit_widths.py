"""The trainer of widths on a model of which every row needs one of two products, and not the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.base import PassContext, Weights, WidthJob
from graphwright.passes.errors import PassError

torch = pytest.importorskip("torch")
from graphwright.models import fit_widths  # noqa: E402 -- needs torch
from graphwright.models.trainer import train  # noqa: E402

pytestmark = pytest.mark.torch

WIDTH, LOGITS = 16, 24


def model() -> tuple[ir.Model, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """y = x · wl + relu(x0) x · wa + relu(-x0) x · wb: one of the last two counts, by the sign of x0."""
    text = f"""<ir_version: 10, opset_import: ["": 21]>
    g (float[1, S, {WIDTH}] x) => (float[1, S, {LOGITS}] y_logits) <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] last = {{2}}> {{
        l = MatMul (x, wl)  x0 = Slice (x, zero, one, last)
        p = Relu (x0)  n = Neg (x0)  q = Relu (n)
        xa = Mul (x, p)  a = MatMul (xa, wa)  xb = Mul (x, q)  b = MatMul (xb, wb)
        ab = Add (a, b)  y_logits = Add (ab, l)
    }}"""  # noqa: E501
    proto = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    parts = {}
    for site, name, size in (("l", "wl", 1.0), ("a", "wa", 1.0), ("b", "wb", 1.0)):
        weight = (random.standard_normal((WIDTH, LOGITS)) * size).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
        first = np.round(weight * 2) / 2
        parts[site] = (first.astype(np.float32), (weight - first).astype(np.float32))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto)), parts


def job(steps: int = 0, **more: Any) -> WidthJob:
    made, parts = model()
    # A third of the weights is the led product's, one of the other two thirds is bought for each row.
    return WidthJob(made, parts, (("l",), ("a",), ("b",)), 1, "xa", 4 + 4 * 2 / 3, (4, 8), "r", steps=steps, **more)


def context(tmp_path: Path, samples: int = 40, progress: Callable[[str], None] = lambda message: None) -> PassContext:
    random = np.random.default_rng(7)
    x = [random.standard_normal((1, 32, WIDTH)).astype(np.float32) for _ in range(samples)]
    return PassContext(calibration={"x": x}, output=tmp_path / "m", progress=progress)


@pytest.mark.parametrize("steps", [0, 20])
def test_a_selector_learns_what_each_row_needs(tmp_path: Path, steps: int) -> None:
    found = train(job(steps), context(tmp_path))
    stats = {name: float(value) for name, value in found.stats.items()}
    assert stats["loss_wide"] < 1e-6 < stats["loss_static"] < stats["loss_narrow"], stats
    assert stats["loss_dynamic"] < 0.3 * stats["loss_static"], stats
    assert abs(stats["bits_dynamic"] - 4 - 8 / 3) < 0.25, stats
    assert len(found.sites) == 2 and not (tmp_path / "m.widths").exists()
    first, bias, second, ends = (found.arrays[n] for n in ("first", "first_bias", "second", "second_bias"))
    x = np.random.default_rng(1).standard_normal((200, WIDTH)).astype(np.float32)
    scores = np.maximum(x * np.maximum(x[:, :1], 0) @ first + bias, 0) @ second + ends
    wide = scores.reshape(-1, 3, 2).argmax(-1)
    assert (wide[:, 1] == (x[:, 0] > 0)).mean() > 0.7 and (wide[:, 2] == (x[:, 0] < 0)).mean() > 0.7


def test_it_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def interrupt(message: str) -> None:
        if "step 13" in message:
            raise Stop

    whole = train(job(20), context(tmp_path / "whole"))
    fit_widths.SAID_EVERY, before = -1.0, fit_widths.SAID_EVERY
    try:
        with pytest.raises(Stop):
            train(job(20), context(tmp_path, progress=interrupt))
    finally:
        fit_widths.SAID_EVERY = before
    assert (tmp_path / "m.widths").is_file()
    again = train(job(20), context(tmp_path))
    assert _same(again, whole)


def _same(a: Weights, b: Weights) -> bool:
    return a.sites == b.sites and all((a.arrays[name] == array).all() for name, array in b.arrays.items())


def test_the_fixed_choice_is_what_is_worth_most_for_its_size() -> None:
    worths, sizes = torch.tensor([3.0, 4.0, 1.0, -1.0]), torch.tensor([1.0, 4.0, 1.0, 1.0])
    assert fit_widths.fixed_choice(worths, sizes, 0.0) == ()
    assert fit_widths.fixed_choice(worths, sizes, 2 / 7) == (0, 2)
    assert fit_widths.fixed_choice(worths, sizes, 5 / 7) == (0, 1)
    assert fit_widths.fixed_choice(worths, sizes, 1.0) == (0, 1, 2)


def test_products_of_other_rows_than_the_selector_sees_are_named(tmp_path: Path) -> None:
    made = job()
    node = next(node for node in made.model.graph if node.outputs[0].name == "l")
    rows = ir.Value(name="rows", const_value=ir.tensor(np.array([3]), name="rows"))
    made.model.graph.register_initializer(rows)
    some = ir.node("Gather", [node.inputs[0], rows], {"axis": 1})
    made.model.graph.insert_before(node, some)
    node.replace_input_with(0, some.outputs[0])
    with pytest.raises(PassError, match=r"l computes rows \[1, 1\], but widths are chosen for \[1, 32\]"):
        train(made, context(tmp_path))


def test_too_few_samples_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="9 calibration samples; widths need at least 10, of which one is held out"):
        train(job(), context(tmp_path, samples=9))
