"""Time two runners against each other: run by run in turn, in one process, on the same inputs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WARMUP = 2


@dataclass(frozen=True)
class Spread:
    """Median with the 10th and 90th percentile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        low, median, high = np.percentile(values, (10, 50, 90))
        return cls(float(median), float(low), float(high))

    def to_json(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Timing:
    """Milliseconds a run of candidate and reference, and the ratio reference / candidate of the pairs."""

    candidate: Spread
    reference: Spread | None
    ratio: Spread | None
    runs: int

    def to_json(self) -> dict[str, Any]:
        return {
            "runs": self.runs,
            "candidate_ms": self.candidate.to_json(),
            "reference_ms": self.reference.to_json() if self.reference else None,
            "ratio": self.ratio.to_json() if self.ratio else None,
        }


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def alternate(
    candidate: Callable[[], object], reference: Callable[[], object] | None = None, runs: int = 20,
    budget: float = 60.0,
) -> Timing:  # fmt: skip
    """Run both in turn `runs` times after a warm-up, or until `budget` seconds are spent (at least three pairs)."""
    calls = [candidate] + ([reference] if reference else [])
    start = time.perf_counter()
    for _ in range(WARMUP):
        for call in calls:
            call()
        if time.perf_counter() - start > budget / 4:
            break
    times: list[list[float]] = [[] for _ in calls]
    while len(times[0]) < runs and (len(times[0]) < 3 or time.perf_counter() - start < budget):
        for kept, call in zip(times, calls, strict=True):
            kept.append(milliseconds(call))
    pairs = [b / a for a, b in zip(times[0], times[1], strict=True)] if reference else []
    return Timing(
        Spread.of(times[0]),
        Spread.of(times[1]) if reference else None,
        Spread.of(pairs) if reference else None,
        len(times[0]),
    )


def peak_rss_mb() -> float:
    """The largest resident set of this program so far, in MB.

    Linux's own counter of this address space where there is one: `getrusage` of a child also counts the pages that
    its parent held when it started the child.
    """
    import resource

    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
