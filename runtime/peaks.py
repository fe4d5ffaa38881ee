"""What this machine can do at most, measured: multiply-adds a second, and bytes a second from each level of memory."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .target import Target

SECONDS = 0.001  # that one timed call should take: short enough to fall between the turns of other programs
CALLS = 25


@dataclass(frozen=True)
class Level:
    """A level of the memory. capacity: bytes that it holds for all threads. read, copy: bytes a second; copying
    counts what is read and what is written.
    """

    name: str
    capacity: int
    read: float
    copy: float


@dataclass(frozen=True)
class Peaks:
    """The limits for one number of threads. flops: float32 operations a second, a multiply-add being two."""

    threads: int
    flops: float
    levels: tuple[Level, ...]

    def level(self, nbytes: float) -> Level:
        """The smallest level that holds so many bytes."""
        return next((level for level in self.levels if nbytes <= level.capacity), self.levels[-1])

    def seconds(self, flops: float | None, nbytes: float | None) -> float | None:
        """The least time for so much work: computing and moving may overlap. None when neither is known."""
        bounds = []
        if flops is not None:
            bounds.append(flops / self.flops)
        if nbytes is not None:
            level = self.level(nbytes)
            bounds.append(nbytes / max(level.read, level.copy))
        return max(bounds, default=None)

    def to_json(self) -> dict[str, Any]:
        return {"threads": self.threads, "flops": self.flops, "levels": [asdict(level) for level in self.levels]}


@functools.cache
def peaks(target: Target, threads: int) -> Peaks:
    """Measure, once a process: about a second. target: must run here."""
    from .pool import Pool

    Pool.here(target).use(threads)
    caches = target.caches
    sizes = {  # name -> (bytes worked on, capacity)
        "L2": (threads * caches.l2 // 2, threads * caches.l2),
        "L3": (caches.last_level // 2, caches.last_level),
        "memory": (_beyond_caches(target), 1 << 62),
    }
    levels = [
        Level(name, capacity, _bandwidth("read", target, threads, nbytes), _bandwidth("copy", target, threads, nbytes))
        for name, (nbytes, capacity) in sizes.items()
        if name == "memory" or nbytes > 0
    ]
    return Peaks(threads, _flops(target, threads), tuple(levels))


def moving(
    what: Literal["read", "copy"], target: Target, threads: int, nbytes: int = 0
) -> tuple[Callable[[], object], int]:
    """A call that moves memory as fast as this machine can, and the bytes that it moves: to be timed beside something
    else. The process must have that number of threads set already.

    nbytes: of what is read, or of what is read and written; 0 for more than any cache holds.
    """
    return _probe(what, target, threads, nbytes or _beyond_caches(target))


def _beyond_caches(target: Target) -> int:
    """Bytes that no cache holds."""
    return max(4 * target.caches.last_level, 128 << 20)


def _flops(target: Target, threads: int) -> float:
    from .kernels import probes

    steps = 10_000
    lanes = max(4, target.isa.lanes())
    work = 2.0 * threads * steps * probes.ACCUMULATORS * lanes
    probe = probes.multiply_adds(target.isa, threads, steps)
    return work / _fastest(_runner(probe, target, (probes.ACCUMULATORS + 1) * lanes, threads * lanes))


def _bandwidth(what: str, target: Target, threads: int, nbytes: int) -> float:
    """nbytes: of all arrays that the probe touches."""
    run, moved = _probe(what, target, threads, nbytes)
    return moved / _fastest(run)


def _probe(what: str, target: Target, threads: int, nbytes: int) -> tuple[Callable[[], object], int]:
    """A call that takes about SECONDS or one pass over nbytes, and the bytes that it moves."""
    from .kernels import probes

    arrays = 2 if what == "copy" else 1
    lanes = max(4, target.isa.lanes())
    part = threads * probes.UNROLLED * lanes
    size = max(part, nbytes // 4 // arrays // part * part)
    repeats = max(1, int(SECONDS * 50e9 / (size * 4 * arrays)))
    probe = getattr(probes, what)(target.isa, threads, size, repeats)
    run = _runner(probe, target, size, size if what == "copy" else threads * lanes)
    return run, size * 4 * arrays * repeats


def _runner(function: Any, target: Target, inputs: int, outputs: int) -> Callable[[], object]:
    """A call of a probe on arrays of so many float32."""
    import numpy as np
    import tvm

    from .codegen import machine_code
    from .pool import on_pool

    run = on_pool(machine_code(tvm.IRModule({"probe": function}), target), target)["probe"]
    x = tvm.runtime.tensor(np.arange(inputs, dtype=np.float32) % 7 / 8)  # below 1: sums stay finite
    y = tvm.runtime.tensor(np.zeros(outputs, np.float32))
    return lambda: run(x, y)


def _fastest(run: Callable[[], object]) -> float:
    """Seconds of a call: the second fastest, which neither another program nor one lucky reading moves."""
    run()
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[1]
