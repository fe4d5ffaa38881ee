"""Layers return to float where that is faster: the search with times made up, and the pass with a clock made up."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphwright.passes.base import PassContext, PassReport, Ratio
from graphwright.passes.errors import PassError
from graphwright.passes.pipeline import Pipeline
from graphwright.passes.quantize.paying import slower_runs
from graphwright.runtime.evaluator import evaluate
from hypothesis import given
from hypothesis import strategies as st

from .test_dynaquant import cnn, plan_of, samples

SITES = ("c", "d", "p", "y")


def sums(losses: Sequence[int]) -> dict[tuple[int, int], int]:
    return {(i, j): sum(losses[i:j]) for i in range(len(losses)) for j in range(i + 1, len(losses) + 1)}


@given(st.lists(st.integers(-5, 5), max_size=12))
def test_the_largest_run_is_the_largest_of_all(losses: list[int]) -> None:
    runs = slower_runs(losses, 1)
    best = max(sums(losses).values(), default=0)
    assert bool(runs) == (best > 0)
    if runs:
        assert sum(losses[runs[0]]) == best
    covered = [index for run in runs for index in range(run.start, run.stop)]
    assert len(covered) == len(set(covered))  # runs are apart
    assert all(index in covered for index, loss in enumerate(losses) if loss > 0)


def test_runs_reach_over_a_layer_that_gains_less_than_they_lose() -> None:
    assert slower_runs([3, -1, 2], 1) == [slice(0, 3)]
    assert slower_runs([3, -4, 5], 1) == [slice(2, 3), slice(0, 1)]
    assert slower_runs([3, -4, 5], 4) == [slice(2, 3)]
    assert slower_runs([], 1) == [] == slower_runs([-1, 0], 0)


class Clock:
    """A stopwatch that makes times up. costs: seconds of each layer (in codes, in float); a border between codes and
    float takes `border` more."""

    def __init__(self, costs: Mapping[str, tuple[float, float]], border: float = 0.0) -> None:
        self.costs, self.border, self.compilations = costs, border, 0

    def compile(self, model: ir.Model) -> dict[str, float]:
        self.compilations += 1
        made = {value.name: node for node in model.graph for value in node.outputs}
        coded = {site: _reads_codes(made[site]) for site in self.costs}
        times = {site: self.costs[site][0 if coded[site] else 1] for site in self.costs}
        order = list(self.costs)
        for one, other in itertools.pairwise(order):
            times[other] += self.border * (coded[one] != coded[other])
        return times

    def layers(
        self, compiled: Sequence[dict[str, float]], operations: Mapping[str, float], feeds: Mapping[str, np.ndarray]
    ) -> list[dict[str, float]]:
        positions = {"c": 2 * 36, "d": 2 * 36, "p": 2 * 36, "y": 2}
        weights = {"c": 4 * 27, "d": 4 * 9, "p": 16, "y": 20}
        assert dict(operations) == {site: 2 * positions[site] * weights[site] for site in SITES}
        return [dict(one) for one in compiled]

    def ratio(self, candidate: dict[str, float], reference: dict[str, float], feeds: object) -> Ratio:
        ratio = sum(reference.values()) / sum(candidate.values())
        return Ratio(ratio, ratio * 0.99, ratio * 1.01)


def _reads_codes(node: ir.Node) -> bool:
    weight = node.inputs[1]
    assert weight is not None
    producer = weight.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def measured(clock: Any, folder: Path, options: str = "", **more: Any) -> tuple[ir.Model, PassReport]:
    ctx = PassContext(
        calibration=samples((2, 3, 6, 6)), evaluator=partial(evaluate, threads=1), output=folder / "m.onnx",
        overwrite=True, stopwatch=clock, **more,
    )  # fmt: skip
    pipeline = Pipeline.parse(f"dynaquant:least=1:measure=true{options}")
    model, reports = pipeline.run(ir.from_proto(cnn()[0]), ctx)
    return model, reports[-1]


def coded(model: ir.Model) -> list[str]:
    made = {value.name: node for node in model.graph for value in node.outputs}
    return [site for site in SITES if _reads_codes(made[site])]


def test_a_layer_that_is_slower_in_codes_returns_to_float(tmp_path: Path) -> None:
    clock = Clock({"c": (1, 2), "d": (3, 1), "p": (1, 2), "y": (1, 1.5)})
    model, report = measured(clock, tmp_path)
    assert coded(model) == ["c", "p", "y"]
    rows = {row["layer"]: row for row in report.rows}
    assert rows["d"]["ms"] == 3000 and rows["d"]["ms in float"] == 1000
    assert rows["d"]["decision"] == "float; in float the whole is 1.50 [1.48, 1.52] times as fast"
    assert rows["c"]["decision"] == "codes" and rows["c"]["dB"] > 10 and rows["c"]["bits"] == 8
    assert [skip.reason for skip in report.skips if skip.value == "d"] == [
        "with the layers beside it, it is slower in codes: 3000.000 ms, 1000.000 in float"
    ]
    assert report.stats["times_float"] == 1.625
    assert clock.compilations == 3


def test_a_layer_stays_in_codes_where_the_border_costs_more_than_it_gains(tmp_path: Path) -> None:
    clock = Clock({"c": (1, 2), "d": (1.5, 1), "p": (1, 2), "y": (1, 1.5)}, border=0.4)
    model, report = measured(clock, tmp_path)
    assert coded(model) == list(SITES)
    assert {row["layer"]: row["decision"] for row in report.rows}["d"].startswith("codes; in float the whole is 0.94")


def test_several_runs_go_together_or_one_by_one(tmp_path: Path) -> None:
    clock = Clock({"c": (3, 1), "d": (1, 3), "p": (1, 1.5), "y": (3, 1)})
    assert coded(measured(clock, tmp_path)[0]) == ["d", "p"]
    assert clock.compilations == 3
    # A border costs nothing at c, which is the first, and more than is gained at y: only that stays.
    clock = Clock({"c": (4, 1), "d": (1, 6), "p": (1, 1.5), "y": (1.3, 1)}, border=2)
    assert coded(measured(clock, tmp_path)[0]) == ["d", "p", "y"]


def test_without_any_layer_that_pays_the_model_stays_in_float(tmp_path: Path) -> None:
    clock = Clock({site: (1.3, 1.4) for site in SITES}, border=0)
    clock.ratio = lambda candidate, reference, feeds: Ratio(0.9, 0.88, 0.92)  # type: ignore[method-assign]
    model, report = measured(clock, tmp_path)
    assert not coded(model)
    assert not any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph)
    assert all(
        row["decision"] == "float; with codes the model is 0.90 [0.88, 0.92] times as fast" for row in report.rows
    )


def test_small_losses_are_not_tried(tmp_path: Path) -> None:
    clock = Clock({"c": (1, 2), "d": (1.02, 1), "p": (1, 2), "y": (1, 1.5)})
    assert coded(measured(clock, tmp_path)[0]) == list(SITES)
    assert clock.compilations == 2


def test_a_layer_without_a_time_is_left_as_it_is(tmp_path: Path) -> None:
    clock = Clock({"c": (1, 2), "d": (3, 1), "p": (1, 2), "y": (1, 1.5)})
    layers: Callable[..., list[dict[str, float]]] = clock.layers
    clock.layers = lambda *given: [  # type: ignore[method-assign]
        {site: time for site, time in one.items() if site != "d"} for one in layers(*given)
    ]
    model, report = measured(clock, tmp_path)
    assert coded(model) == list(SITES)
    row = next(row for row in report.rows if row["layer"] == "d")
    assert row["ms"] is None and row["decision"] == "codes; no kernel is known to be its own"


def test_the_decision_is_in_the_file_and_repeats_without_a_clock(tmp_path: Path) -> None:
    clock = Clock({"c": (1, 2), "d": (3, 1), "p": (1, 2), "y": (1, 1.5)})
    model, report = measured(clock, tmp_path)
    assert plan_of(report, tmp_path).timing["d"].coded == 3
    again, reports = Pipeline.parse(report.spec).run(ir.from_proto(cnn()[0]), PassContext())
    assert ir.to_proto(again).SerializeToString() == ir.to_proto(model).SerializeToString()
    assert reports[-1].rows == report.rows


def test_a_budget_holds_before_time_is_looked_at(tmp_path: Path) -> None:
    clock = Clock({site: (1, 2) for site in SITES})
    model, report = measured(clock, tmp_path, ":weights=4:group=0", max_drop=1e-5)
    assert len(coded(model)) < len(SITES)
    assert {row["layer"] for row in report.rows} == set(coded(model))


def test_times_need_a_target_that_runs_here_and_real_inputs(tmp_path: Path) -> None:
    pipeline, model = Pipeline.parse("dynaquant:measure=true"), ir.from_proto(cnn()[0])
    with pytest.raises(PassError, match=r"dynaquant needs a target that this machine runs.* or leave measure out"):
        pipeline.run(model, PassContext(calibration=samples((2, 3, 6, 6)), target="riscv64"))
    with pytest.raises(PassError, match="dynaquant needs real inputs to take times with: give"):
        pipeline.run(model, PassContext(stopwatch=Clock({})))
    pipeline.run(model, PassContext(dry_run=True))
