"""`--tune`: the kernels of a model are measured with several tiles each, and the model is compiled with the best ones.

What was found stays in a file of the cache folder, one for each processor, from which the next run goes on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..passes import io
from ..passes.errors import CompileError, TargetError, UsageError
from .link import cache_dir
from .partition import TVM, cut, partition
from .target import Target, host_cores, host_flags
from .tuning import Database, Measured, Tunable, Tuning
from .worker import Compiler

KERNEL_SECONDS = 30.0  # that one kernel gets at most
BAR = 20  # characters
# What the tiles of a kernel, and the time it takes, depend on.
TEMPLATES = ("kernels/*.py", "claiming.py", "templates.py", "trials.py", "turns.py")

log = logging.getLogger("graphwright")


@dataclass(frozen=True)
class Tuned:
    """What is known about the tiles of a model's kernels.

    kernels: those that have tiles. known: those that were measured, now or before; measured: now. faster: those that
    get another tile than by rule. rule_ms, tuned_ms: of all calls of the known ones in a run of the model, each kernel
    measured alone.
    """

    tuning: Tuning
    kernels: int
    known: int
    measured: int
    faster: int
    rule_ms: float
    tuned_ms: float

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self)
        del fields["tuning"]
        return fields


def check_tunable(minutes: float, target: Target | None) -> None:
    """Raises UsageError or TargetError where there is nothing to measure, OutputError where what is measured cannot be
    kept."""
    if math.isnan(minutes) or minutes < 0:
        raise UsageError(f"--tune {minutes:g}: expected minutes, 0 or more")
    if target is None:
        raise UsageError("--tune measures compiled kernels; name a --target")
    if not target.runs_here:
        raise TargetError(f"--tune: target {target.name} does not run on this machine; leave --tune out for it")
    database().check(writable=minutes > 0)


def database() -> Database:
    """What was measured on this machine's processor."""
    processor = _digest([_processor(), sorted(host_flags())])
    return Database(cache_dir() / "tuning" / f"{platform.machine()}-{processor}.jsonl")


def find_tiles(
    model: ir.Model, target: Target, minutes: float, threads: int | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Tuned:  # fmt: skip
    """Measure kernels of a model that are not known yet, those first that take the longest, for so many minutes."""
    progress("tune: look for kernels")
    count = min(threads or target.cores, host_cores())
    kernels = sorted(model_kernels(model, target), key=lambda k: -k.cycles * k.calls)
    store = database()
    keys = {kernel.name: _key(kernel, target, count) for kernel in kernels}
    stored = store.read()
    known = {name: stored[key] for name, key in keys.items() if key in stored}
    todo = [kernel for kernel in kernels if kernel.name not in known or not known[kernel.name].complete]
    measured = 0
    end = time.monotonic() + 60 * minutes
    for number, kernel in enumerate(todo):
        left = end - time.monotonic()
        if left <= 0:
            break
        faster = sum(1 for found in known.values() if found.tile)
        progress(bar(len(kernels) - len(todo) + number, len(kernels), faster, left))
        try:
            found = Compiler.shared().measure(kernel, target.to_json(), count, min(left, KERNEL_SECONDS))
        except CompileError as error:
            log.warning("not tuned: %s: %s", kernel.name, error)
            continue
        if left >= KERNEL_SECONDS:  # no other run gives it more
            found = replace(found, complete=True)
        store.add(keys[kernel.name], found)
        known[kernel.name] = found
        measured += 1
    return summary(kernels, known, measured)


def summary(kernels: Sequence[Tunable], known: Mapping[str, Measured], measured: int) -> Tuned:
    tiles = {name: found.tile for name, found in known.items() if found.tile}
    calls = {kernel.name: kernel.calls for kernel in kernels}
    rule = sum(calls[name] * found.rule_us for name, found in known.items())
    tuned = sum(calls[name] * found.rule_us / found.ratio for name, found in known.items())
    return Tuned(Tuning.from_json(tiles), len(kernels), len(known), measured, len(tiles), rule / 1e3, tuned / 1e3)


def bar(done: int, count: int, faster: int, left: float) -> str:
    """How far it is: `tune #####--------------- 12 of 48 kernels, 3 faster, 4:10 left`."""
    filled = BAR * done // max(1, count)
    clock = f", {int(left) // 60}:{int(left) % 60:02} left" if math.isfinite(left) else ""
    return f"tune {'#' * filled}{'-' * (BAR - filled)} {done} of {count} kernels, {faster} faster{clock}"


def model_kernels(model: ir.Model, target: Target) -> list[Tunable]:
    """The kernels of what TVM is going to compile, each once."""
    from .build import ask_types, find_refused, fix_outputs

    model = model.clone()
    fix_outputs(model)
    ask_types(model)
    found: dict[str, Tunable] = {}
    with tempfile.TemporaryDirectory(prefix="graphwright-") as folder:
        work = Path(folder)
        regions = partition(model, find_refused(model, target, work))
        for index, (region, part) in enumerate(zip(regions, cut(model, [r.nodes for r in regions]), strict=True)):
            if region.runtime != TVM:
                continue
            path = work / f"region{index}.onnx"
            io.save(part, path, overwrite=True)
            try:
                kernels = Compiler.shared().tunables(path, target.to_json())
            except CompileError as error:  # the compilation says more about it
                log.debug("no kernels of region %d: %s", index, error)
                continue
            for kernel in kernels:
                before = found[kernel.name].calls if kernel.name in found else 0
                found[kernel.name] = Tunable(kernel.template, kernel.spec, before + kernel.calls, kernel.cycles)
    return list(found.values())


def _key(kernel: Tunable, target: Target, threads: int) -> str:
    """What a measurement holds for: the kernel, what its code depends on, and the number of threads."""
    code = {
        "mcpu": target.mcpu, "mattr": target.mattr, "isa": asdict(target.isa), "caches": asdict(target.caches),
        "cores": target.cores,
    }  # fmt: skip
    conditions = {"target": _digest(code), "threads": threads, "templates": _templates()}
    return json.dumps({**json.loads(kernel.name), **conditions}, sort_keys=True)


@functools.cache
def _templates() -> str:
    """The version of what the kernels are made by."""
    here = Path(__file__).parent
    files = sorted(path for pattern in TEMPLATES for path in here.glob(pattern))
    return _digest([metadata.version("apache-tvm"), *(path.read_text(encoding="utf-8") for path in files)])


def _processor() -> str:
    """The processor's name; "" where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part"))), "")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
