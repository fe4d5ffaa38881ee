"""Where the time of a run goes: every kernel's against the least that the machine could do its work in.

TVM's virtual machine calls an observer before and after every instruction, which adds about half a microsecond to
each call. The work of the kernels comes from the manifest, and where it depends on sizes that are known only at run
time, from the tensors of the call; the limits from `peaks`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..passes.errors import InputError
from .artifact import Artifact, KernelWork, RegionSpec
from .partition import TVM
from .peaks import Peaks, peaks
from .session import Session, Step
from .tvm_step import TvmStep
from .work import moved

RUNS = 10
WARMUP = 2
BUILTIN = "vm."


@dataclass(frozen=True)
class Row:
    """One kernel, or a region on onnxruntime. calls: in one run. seconds: of all of them. limit: the least seconds that
    they could take; None where their work is not known.
    """

    name: str
    op: str
    calls: int
    seconds: float
    flops: float | None
    nbytes: float | None
    limit: float | None

    @property
    def of_limit(self) -> float | None:
        """1.0: as fast as the machine can. More than that: the work was overestimated, or done with less of it."""
        return self.limit / self.seconds if self.limit is not None and self.seconds else None

    def to_json(self, total: float) -> dict[str, Any]:
        seconds = self.seconds or None
        return {
            "name": self.name, "op": self.op, "calls": self.calls, "ms": self.seconds * 1e3,
            "share": self.seconds / total if total else None, "flops": self.flops, "bytes": self.nbytes,
            "gflops_per_s": self.flops / seconds / 1e9 if seconds and self.flops is not None else None,
            "gbytes_per_s": self.nbytes / seconds / 1e9 if seconds and self.nbytes is not None else None,
            "of_limit": self.of_limit,
        }  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """Of one artifact on one number of threads. run: seconds of a run that nobody watches. rows: longest first."""

    threads: int
    runs: int
    run: float
    rows: tuple[Row, ...]
    peaks: Peaks
    activation_bytes: int | None

    @property
    def kernels(self) -> float:
        """Seconds of all rows."""
        return sum(row.seconds for row in self.rows)

    @property
    def limit(self) -> float | None:
        """Seconds of a run in which every kernel whose work is known runs at its limit, and nothing lies between. One
        that does with fewer operations than are counted, such as Winograd's, counts as it is."""
        known = [min(row.limit, row.seconds) for row in self.rows if row.limit is not None]
        return sum(known) if known else None

    def by_op(self) -> list[Row]:
        """The rows with the same operators as one, longest first."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.op, []).append(row)
        joined = [_joined(op, op, rows) for op, rows in groups.items()]
        return sorted(joined, key=lambda row: -row.seconds)

    def to_json(self) -> dict[str, Any]:
        return {
            "threads": self.threads,
            "runs": self.runs,
            "run_ms": self.run * 1e3,
            "kernels_ms": self.kernels * 1e3,
            "limit_ms": self.limit * 1e3 if self.limit is not None else None,
            "activation_bytes": self.activation_bytes,
            "peaks": self.peaks.to_json(),
            "kernels": [row.to_json(self.kernels) for row in self.rows],
            "operators": [row.to_json(self.kernels) for row in self.by_op()],
        }


def _joined(name: str, op: str, rows: Sequence[Row]) -> Row:
    """Several rows as one."""
    return Row(name, op, sum(r.calls for r in rows), sum(r.seconds for r in rows), _sum(r.flops for r in rows),
               _sum(r.nbytes for r in rows), _sum(r.limit for r in rows))  # fmt: skip


def _sum(values: Iterator[float | None]) -> float | None:
    found = list(values)
    known = [value for value in found if value is not None]
    return sum(known) if len(known) == len(found) else None


@dataclass
class Call:
    """One call of a kernel, or a run of a region on onnxruntime. shapes: of its arguments, () for what is no tensor.
    sizes: of the tensors, in bytes.
    """

    name: str
    seconds: float = 0.0
    shapes: Sequence[tuple[int, ...]] = ()
    sizes: Sequence[int] = ()

    def flops(self, known: KernelWork | None) -> float | None:
        return known.flops_of(self.shapes) if known is not None else None

    def bytes(self, known: KernelWork | None) -> float | None:
        if known is None or known.bytes is not None:
            return known.bytes if known is not None else None
        return moved(self.sizes, known.op) if self.sizes else None


@dataclass
class _Watch:
    """The observer: every call of a kernel, in order."""

    calls: list[Call] = field(default_factory=list)
    _start: float = 0.0

    def __call__(self, function: Any, name: str, before: bool, result: Any, *arguments: Any) -> int:
        if before:
            tensors = [a for a in arguments if hasattr(a, "data_ptr")]
            shapes = [tuple(a.shape) if hasattr(a, "data_ptr") else () for a in arguments]
            sizes = [math.prod(a.shape) * a.dtype.itemsize for a in tensors]
            self.calls.append(Call(name, shapes=shapes, sizes=sizes))
            self._start = time.perf_counter()
        else:
            self.calls[-1].seconds = time.perf_counter() - self._start
        return 0  # go on


def profile(session: Session, feeds: Mapping[str, Any], runs: int = RUNS) -> Profile:
    """Run `feeds` a few times unwatched and a few times watched. Raises InputError for an artifact of a device."""
    artifact = session.artifact
    if not artifact.target.is_cpu or not artifact.target.runs_here:
        raise InputError(f"{artifact.root}: built for {artifact.target.name}; expected a target of this processor")
    for _ in range(WARMUP):
        session.run(None, feeds)
    unwatched = []
    for _ in range(runs):
        start = time.perf_counter()
        session.run(None, feeds)
        unwatched.append(time.perf_counter() - start)
    seen = [watched(session, feeds) for _ in range(WARMUP + runs)][WARMUP:]
    most = peaks(artifact.target, session.threads)
    return Profile(
        session.threads, runs, statistics.median(unwatched), _rows(artifact, seen, most), most,
        artifact.activation_bytes,
    )  # fmt: skip


def watched(session: Session, feeds: Mapping[str, Any]) -> list[Call]:
    """Every call of a kernel in one run, in order, and every run of a region on onnxruntime."""
    values = session._check(feeds)
    calls: list[Call] = []
    regions = session.artifact.manifest.regions
    for index, (step, region) in enumerate(zip(session._steps, regions, strict=True)):
        start = time.perf_counter()
        if region.runtime == TVM:
            with _watch(step) as watch:
                values.update(step(values))
            for call in watch.calls:
                if not call.name.startswith(BUILTIN):
                    call.name = _label(regions, index, call.name)
                    calls.append(call)
        else:
            values.update(step(values))
            calls.append(Call(f"region {index} on onnxruntime", time.perf_counter() - start))
    return calls


def _label(regions: Sequence[RegionSpec], index: int, name: str) -> str:
    """The kernel's name, with its region's number where there are several: both may have a kernel of the name."""
    return name if sum(region.runtime == TVM for region in regions) == 1 else f"{index}:{name}"


@contextmanager
def _watch(step: Step) -> Iterator[_Watch]:
    """Lets a virtual machine of its own run the next call of the step."""
    assert isinstance(step, TvmStep)
    watch, machine = _Watch(), step._machine()
    machine.vm.set_instrument(watch)
    step._idle.append(machine)
    try:
        yield watch
    finally:
        if machine in step._idle:  # not after an error
            step._idle.remove(machine)


def _rows(artifact: Artifact, runs: list[list[Call]], most: Peaks) -> tuple[Row, ...]:
    """Calls of the same kernel as one row, each call's time the median of the runs."""
    work = work_by_name(artifact)
    names = [call.name for call in runs[0]]
    if any([call.name for call in run] != names for run in runs):
        raise InputError("the model takes another way through its branches in every run; nothing to average")
    calls: dict[str, list[Row]] = {}
    for index, call in enumerate(runs[0]):
        known = work.get(call.name)
        flops, nbytes = call.flops(known), call.bytes(known)
        time_ = statistics.median(run[index].seconds for run in runs)
        row = Row(call.name, known.op if known else call.name, 1, time_, flops, nbytes, most.seconds(flops, nbytes))
        calls.setdefault(call.name, []).append(row)
    rows = [_joined(name, several[0].op, several) for name, several in calls.items()]
    return tuple(sorted(rows, key=lambda row: -row.seconds))


def work_by_name(artifact: Artifact) -> dict[str, KernelWork]:
    """The work of each kernel, by the name of its calls."""
    regions = artifact.manifest.regions
    return {
        _label(regions, index, name): known
        for index, region in enumerate(regions)
        for name, known in region.kernels.items()
    }
