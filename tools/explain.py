"""`graphwright explain`: why a pass fires or does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .shell import (
    Command,
    count_of,
    format_options,
    parse_pins,
    pin_option,
    print_json,
    progress,
    verbosity_options,
)

if TYPE_CHECKING:
    from graphwright.passes.base import PassReport
    from graphwright.passes.pipeline import Pipeline


def explain(
    model: Path,
    spec: str,
    *,
    pins: Mapping[str, Sequence[int]] | None = None,
    target: str | None = None,
    preset: str | None = None,
    calibration: Path | None = None,
) -> tuple[PassReport, Pipeline]:
    """The report of one pass on the model, and what ran in front of it.

    In front of it runs what does in `optimize`: the preset up to the pass where it is one of its own, else all of it.
    Nothing is written. Raises a GraphwrightError.
    """
    from graphwright.passes import io
    from graphwright.passes.base import Caches, PassContext
    from graphwright.passes.pipeline import Pipeline
    from graphwright.passes.registry import parse_pass
    from graphwright.runtime.driver import plan
    from graphwright.runtime.target import Target

    from .calibration import load_calibration

    step = parse_pass(spec)
    goal = Target.named(target) if target else None
    steps = list(plan("", preset, goal, pins or {}))
    names = [one.name for one in steps]
    before = Pipeline(tuple(steps[: names.index(step.name)] if step.name in names else steps))
    with progress() as say:
        say("load")
        graph = io.load(model)
        ctx = PassContext(
            pins=pins or {},
            calibration=load_calibration(calibration, graph, pins or {}) if calibration else None,
            target=goal.name if goal else None,
            caches=goal.caches if goal else Caches(),
            dot_bf16=goal is not None and goal.isa.dot_bf16,
            progress=say,
            dry_run=True,
        )
        _, reports = (before + Pipeline((step,))).run(graph, ctx)
    return reports[-1], before


@click.command(cls=Command, name="explain")
@click.argument("model", metavar="MODEL.onnx")
@click.option("--pass", "spec", required=True, metavar="NAME[:key=value]", help="The pass to look at.")
@pin_option
@click.option("--target", metavar="NAME", help="As it would run for this target.")
@click.option("--preset", metavar="NAME", help="What runs in front of it, as for optimize.")
@click.option("--calibration", metavar="FILE.npz|DIR", help="Real inputs, for a pass that needs them.")
@format_options
@verbosity_options
def command(
    model: str,
    spec: str,
    pins: tuple[str, ...],
    target: str | None,
    preset: str | None,
    calibration: str | None,
    as_json: bool,
) -> None:
    """Why a pass fires or does not on MODEL.onnx, site by site, with the first condition that failed."""
    from .summary import print_sites

    report, before = explain(
        Path(model),
        spec,
        pins=parse_pins(pins),
        target=target,
        preset=preset,
        calibration=Path(calibration) if calibration else None,
    )
    data = report.to_json()
    if as_json:
        print_json({"model": model, "after": str(before), **data})
        return
    click.echo(f"{data['spec']} after {before if before.passes else 'nothing'}")
    print_sites(data)
    fired, skipped = len(data["changes"]), len(data["skips"])
    click.echo(f"fires at {count_of(fired, 'site')}, not at {skipped}")
