"""Which layers are worth their codes in time: measured on the compiled model, not counted.

The model in codes and the float model are compiled and watched kernel by kernel. Layers that follow each other and
together take longer in codes return to float, all such runs at once or else one by one, if the whole is faster then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from ..base import Stopwatch
from .plan import Plan, Timed

LEAST_GAIN = 0.01  # of the model's time, that a change must promise to be worth a compilation
LEAST_LOSS = 0.002  # of the model's time, that neighbours must lose to be part of a change
MOST_TRIALS = 4  # compilations beyond the first two


@dataclass(frozen=True)
class Clock:
    """What times are taken with. build: a plan's model. operations: see `Stopwatch.layers`. feeds: one sample."""

    stopwatch: Stopwatch
    build: Callable[[Plan], ir.Model]
    operations: Mapping[str, float]
    feeds: Mapping[str, np.ndarray]
    progress: Callable[[str], None]


def paying(plan: Plan, clock: Clock, decibels: Mapping[str, float]) -> Plan:
    """The plan with layers in float where codes do not pay, and with the times of all. decibels: of each layer's result
    above its error."""
    watch, feeds = clock.stopwatch, clock.feeds
    clock.progress("dynaquant: times of layers")
    nothing = plan.without(dict.fromkeys(plan.layers, ""))
    floats, now = watch.compile(clock.build(nothing)), watch.compile(clock.build(plan))
    coded, plain = watch.layers([now, floats], clock.operations, feeds)
    sites = [site for site in plan.layers if site in coded and site in plain]
    decisions = {site: "codes" if site in sites else "codes; no kernel is known to be its own" for site in plan.layers}
    total = sum(coded.values())
    groups = [sites[run] for run in slower_runs([coded[s] - plain[s] for s in sites], LEAST_LOSS * total)]
    together = [[site for group in groups for site in group]] if len(groups) > 1 else []
    trials = [
        group for group in together + groups if sum(coded[s] - plain[s] for s in group) >= LEAST_GAIN * total
    ]  # fmt: skip
    current = plan
    for number, group in enumerate(trials[:MOST_TRIALS]):
        clock.progress(f"dynaquant: {number + 1} of {min(len(trials), MOST_TRIALS)} runs of layers in float")
        tried = current.without({site: _slower(coded[site], plain[site]) for site in group})
        compiled = watch.compile(clock.build(tried))
        ratio = watch.ratio(compiled, now, feeds)
        taken = ratio.low > 1
        decisions.update(dict.fromkeys(group, f"{'float' if taken else 'codes'}; in float the whole is {ratio}"))
        if taken:
            current, now = tried, compiled
            if group in together:
                break
    whole = watch.ratio(now, floats, feeds)
    if whole.high < 1:
        current = current.without(dict.fromkeys(current.layers, f"with codes the model is {whole}"))
        decisions = dict.fromkeys(plan.layers, f"float; with codes the model is {whole}")
    timing = {
        site: Timed(plan.layers[site].bits, decibels.get(site), coded.get(site), plain.get(site), decision)
        for site, decision in decisions.items()
    }
    return replace(current, timing=timing, stats={**current.stats, "times_float": round(whole.median, 3)})


def _slower(coded: float, plain: float) -> str:
    return f"with the layers beside it, it is slower in codes: {coded * 1e3:.3f} ms, {plain * 1e3:.3f} in float"


def slower_runs(losses: Sequence[float], least: float) -> list[slice]:
    """Runs of neighbours whose sums are as large as can be, those of at least `least`, the largest first.

    Source: Ruzzo and Tompa, "A linear time algorithm for finding all maximal scoring subsequences", 1999.
    """
    found: list[tuple[int, int, float, float]] = []  # start, stop, and the sums of all in front of both
    total = 0.0
    for index, loss in enumerate(losses):
        start, before, total = index, total, total + loss
        if loss <= 0:
            continue
        while True:
            j = next((j for j in reversed(range(len(found))) if found[j][2] < before), None)
            if j is None or found[j][3] >= total:
                break
            start, before = found[j][0], found[j][2]
            del found[j:]
        found.append((start, index + 1, before, total))
    enough = [run for run in found if run[3] - run[2] >= least]
    return [slice(run[0], run[1]) for run in sorted(enough, key=lambda run: run[2] - run[3])]
