"""How long the layers of a model take here: compiled, and watched kernel by kernel, for passes that decide by it.

Kernels carry no names of nodes, but they run in the order of the nodes and know their operations. So the kernels of
layers are the longest common subsequence of the layers' operations and the kernels'. What runs behind the kernel of a
layer and in front of the next one's is counted as the layer's: it is there because of what the layer reads or gives.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..passes.base import Ratio
from .build import build
from .profile import WARMUP, Call, watched, work_by_name
from .session import Session
from .target import Target
from .turns import medians, take_turns

ROUNDS = 15  # watched runs of each model
SECONDS = 15.0  # that a round of measurements takes about, at most
NEAR = 1e-6  # between numbers of operations that are the same


@dataclass(frozen=True)
class Compiled:
    """A model that can be run. folder: goes when nothing refers to it any more."""

    session: Session
    folder: tempfile.TemporaryDirectory[str] = field(repr=False)


@dataclass(frozen=True)
class Stopwatch:
    """`passes.base.Stopwatch` for a target that this machine runs. threads: of the runs; None for all."""

    target: Target
    threads: int | None = None
    progress: Callable[[str], None] = lambda message: None

    def compile(self, model: ir.Model) -> Compiled:
        folder = tempfile.TemporaryDirectory(prefix="graphwright-")
        artifact = build(model, self.target, Path(folder.name) / "model", progress=self.progress)
        return Compiled(Session(artifact, threads=self.threads, verify=False), folder)

    def layers(
        self, compiled: Sequence[Compiled], operations: Mapping[str, float], feeds: Mapping[str, np.ndarray]
    ) -> list[dict[str, float]]:
        runs: list[list[list[Call]]] = [[] for _ in compiled]
        start = time.perf_counter()
        for number in range(WARMUP + ROUNDS):
            for seen, one in zip(runs, compiled, strict=True):
                seen.append(watched(one.session, feeds))
            if number > WARMUP and time.perf_counter() - start > SECONDS:
                break
        return [layer_seconds(one.session, seen[WARMUP:], operations) for one, seen in zip(compiled, runs, strict=True)]

    def ratio(self, candidate: Compiled, reference: Compiled, feeds: Mapping[str, np.ndarray]) -> Ratio:
        runners = {
            "candidate": lambda: candidate.session.run(None, feeds),
            "reference": lambda: reference.session.run(None, feeds),
        }
        turns = medians(take_turns(runners, 0.0, SECONDS))
        return ratio_of([b / a for a, b in zip(turns["candidate"], turns["reference"], strict=True)])


def ratio_of(ratios: Sequence[float]) -> Ratio:
    """The median of ratios, and its interval of 95 % confidence by order statistics."""
    ordered, count = sorted(ratios), len(ratios)
    reach = 1.96 * math.sqrt(count) / 2
    low, high = math.floor(count / 2 - reach), math.ceil(count / 2 + reach) - 1
    return Ratio(statistics.median(ordered), ordered[max(0, low)], ordered[min(count - 1, high)])


def layer_seconds(
    session: Session, runs: Sequence[Sequence[Call]], operations: Mapping[str, float]
) -> dict[str, float]:
    """Seconds of each layer, the median of the runs that took the same way as the first."""
    work = work_by_name(session.artifact)
    names = [call.name for call in runs[0]]
    same = [run for run in runs if [call.name for call in run] == names]
    flops = [call.flops(work.get(call.name)) for call in runs[0]]
    seconds = [statistics.median(run[index].seconds for run in same) for index in range(len(names))]
    sites = list(operations)
    found = matched([operations[site] for site in sites], flops)
    borders = [0, *(place for _, place in found[1:]), len(seconds)]
    return {
        sites[layer]: sum(seconds[borders[number] : borders[number + 1]]) for number, (layer, _) in enumerate(found)
    }


def matched(layers: Sequence[float], kernels: Sequence[float | None]) -> list[tuple[int, int]]:
    """Pairs (number of a layer, number of a kernel) of the longest common subsequence of operations."""

    def same(layer: float, kernel: float | None) -> bool:
        return kernel is not None and math.isclose(layer, kernel, rel_tol=NEAR)

    # lengths[i][j]: of the longest one of layers[i:] and kernels[j:]
    lengths = [[0] * (len(kernels) + 1) for _ in range(len(layers) + 1)]
    for i in range(len(layers) - 1, -1, -1):
        for j in range(len(kernels) - 1, -1, -1):
            both = lengths[i + 1][j + 1] + 1 if same(layers[i], kernels[j]) else 0
            lengths[i][j] = max(both, lengths[i + 1][j], lengths[i][j + 1])
    pairs, i, j = [], 0, 0
    while i < len(layers) and j < len(kernels):
        if same(layers[i], kernels[j]) and lengths[i][j] == lengths[i + 1][j + 1] + 1:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif lengths[i + 1][j] >= lengths[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs
