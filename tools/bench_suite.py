"""Whole models against onnxruntime: the benchmark suite.

    python -m graphwright.tools.bench_suite                         ten models, one and two threads
    python -m graphwright.tools.bench_suite --models minilm,magika --threads 1 --json suite.json
    python -m graphwright.tools.bench_suite --quick                 a few turns each, seconds a model
    python -m graphwright.tools.bench_suite --plain                 onnxruntime's threads spin between its runs
    python -m graphwright.tools.bench_suite --torch                 torch beside them
    python -m graphwright.tools.bench_suite --busy 2                while two other programs compute

Every model has a process of its own, in which both take turns on the same NumPy inputs, called as a user calls them:
a pause until the other's threads sleep, one run that is not timed, then the median of the runs that follow. One
thread count is measured after the other. onnxruntime has all its optimizations and knows the fixed sizes; its threads
spin inside a run, and between runs only with --plain. graphwright has the exact passes of the preset `compile` only.
The ratio is onnxruntime's time over graphwright's, turn by turn: above 1 graphwright is faster; brackets hold the 10th
and 90th percentile. The error is the largest difference over the output's scale.

Exports and artifacts stay in a folder: an artifact is made again when its model, the target or the compiler's sources
have changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.passes.errors import GraphwrightError, UsageError, did_you_mean

from .shell import as_bytes, as_error, fail
from .turns import SETTLE, Runner, aligned, busy

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..runtime.measure import Spread
    from ..runtime.target import Target

# Name in the table of models -> the sizes that differ from the usual ones.
SUITE: dict[str, dict[str, int]] = {
    "mobilenet-v2": {},
    "efficientnet-lite0": {},
    "resnet-50": {},
    "vit-tiny": {},
    "vit-small": {},
    "minilm": {"sequence": 128},
    "smollm2": {"length": 128},
    "ocr-det": {"height": 640, "width": 640},
    "ocr-cls": {},
    "magika": {},
}
FOLDER = Path("bench")
PLAIN_SETTLE = 0.05  # the same when onnxruntime's threads spin on after a run
LIMIT = 1e-3  # relative error beyond which a row is marked: then it is another model that was timed
NUMBERS = ("threads", "onnxruntime ms", "graphwright ms", "ratio", "max error", "load ms", "activations", "compile s")


@dataclass(frozen=True)
class Effort:
    """How long one model is measured on one thread count: turns (at least three), seconds after which no more begin,
    and how many seconds the timed runs of a turn take.
    """

    turns: int = 21
    budget: float = 15.0
    turn: float = 0.02


QUICK = Effort(3, 1.0, 0.0)


@dataclass(frozen=True)
class Compiled:
    """An artifact of the cache. seconds: what `optimize` took when it was made."""

    path: Path
    seconds: float
    fresh: bool


# --- what is measured --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """A model on disk with its inputs. options: of its export."""

    name: str
    path: Path
    feeds: Mapping[str, np.ndarray]
    pins: Mapping[str, Sequence[int]]
    options: Mapping[str, Any]


def prepare(name: str, sizes: Mapping[str, int], folder: Path) -> Prepared:
    """Fetch the model and export it, unless the folder has the same export. Raises a GraphwrightError."""
    from graphwright.models import registry

    registry.fetch(name)
    known = registry.describe(name).options
    options: dict[str, Any] = {word: size for word, size in sizes.items() if word in known}
    key = _digest({"options": options, "sources": sources_digest("models"), "versions": _versions("torch")})
    path = folder / f"{name}-{key}.onnx"
    if not path.exists():
        _forget(folder, f"{name}-{'?' * len(key)}.onnx*")
        registry.export(name, path, **options)
    feeds = {key: aligned(array) for key, array in registry.sample_inputs(name, dims=sizes).items()}
    return Prepared(name, path, feeds, registry.pins(name, sizes), options)


def compiled(model: Prepared, target: Target, folder: Path) -> Compiled:
    """The artifact of the model for this machine, made only where the cache has none. Raises a GraphwrightError."""
    from graphwright.runtime.driver import optimize

    key = _digest({
        "model": [_file_digest(file) for file in sorted(model.path.parent.glob(model.path.name + "*"))],
        "pins": {name: list(shape) for name, shape in model.pins.items()},
        "target": target.to_json(),
        "sources": sources_digest("passes", "runtime"),
        "versions": _versions("graphwright", "apache-tvm", "onnx", "onnx-ir", "onnxscript"),
    })  # fmt: skip
    path = folder / f"{model.name}-{key}"
    note = folder / f"{model.name}-{key}.json"
    if not note.exists() or not path.exists():
        _forget(folder, f"{model.name}-{'?' * len(key)}*", keep=model.path)
        start = time.perf_counter()
        optimize(model.path, target=target, out=path, pins=model.pins, verify=False, overwrite=True)
        note.write_text(json.dumps({"seconds": time.perf_counter() - start}))
        return Compiled(path, json.loads(note.read_text())["seconds"], True)
    return Compiled(path, json.loads(note.read_text())["seconds"], False)


def sources_digest(*rooms: str) -> str:
    """Of every source file of the named rooms of the installed package."""
    import importlib

    digest = hashlib.sha256()
    for room in rooms:
        root = Path(next(iter(importlib.import_module(f"graphwright.{room}").__path__)))
        for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".cc")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _versions(*packages: str) -> dict[str, str | None]:
    from importlib import metadata

    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _forget(folder: Path, pattern: str, keep: Path | None = None) -> None:
    """Remove what an earlier state of the sources has left: the cache holds one artifact a model."""
    for path in folder.glob(pattern):
        if keep is not None and path.name.startswith(keep.name):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


# --- one model, in a process of its own --------------------------------------------------------------------------


@dataclass
class Row:
    """One model on one thread count. Times in milliseconds. nodes: (run by TVM, all)."""

    model: str
    shapes: dict[str, list[int]]
    threads: int
    onnxruntime_ms: Spread
    graphwright_ms: Spread
    ratio: Spread
    turns: int
    relative_error: float | None
    load_ms: float
    compile_seconds: float
    activation_bytes: int | None
    nodes: tuple[int, int]
    torch_ms: Spread | None = None

    def to_json(self) -> dict[str, Any]:
        spreads = {
            name: spread.to_json() if spread is not None else None
            for name, spread in (("onnxruntime_ms", self.onnxruntime_ms), ("graphwright_ms", self.graphwright_ms),
                                 ("ratio", self.ratio), ("torch_ms", self.torch_ms))
        }  # fmt: skip
        return {**vars(self), **spreads, "nodes": list(self.nodes)}


@dataclass(frozen=True)
class Plan:
    """What the child is asked to do."""

    threads: tuple[int, ...]
    effort: Effort
    folder: Path
    plain: bool = False
    with_torch: bool = False
    busy: int = 0
    say: Callable[[str], None] = field(default=lambda message: None)


def measure(name: str, plan: Plan) -> list[Row]:
    """One row a thread count. Raises a GraphwrightError."""
    from graphwright.runtime.target import Target
    from graphwright.runtime.tvm_step import load_tvm
    from graphwright.runtime.worker import Compiler

    plan.folder.mkdir(parents=True, exist_ok=True)
    plan.say("export")
    model = prepare(name, SUITE.get(name, {}), plan.folder)
    plan.say("optimize for cpu")
    artifact = compiled(model, Target.named("cpu"), plan.folder)
    Compiler.shared().close()  # its process would keep its memory
    plan.say(f"compiled in {artifact.seconds:.1f} s{'' if artifact.fresh else ' (cached)'}")
    load_tvm()
    return [_measure_on(threads, model, artifact, plan) for threads in plan.threads]


def _measure_on(threads: int, model: Prepared, artifact: Compiled, plan: Plan) -> Row:
    from graphwright.runtime.compare import compare
    from graphwright.runtime.measure import Spread
    from graphwright.runtime.session import Session

    plan.say(f"{threads} thread{'s' if threads > 1 else ''}")
    start = time.perf_counter()
    session = Session(artifact.path, threads=threads)
    load_ms = (time.perf_counter() - start) * 1e3
    reference = onnxruntime_session(model, threads, plan.plain)
    feeds = dict(model.feeds)

    def named(runner: Any) -> Callable[[Mapping[str, np.ndarray]], dict[str, Any]]:
        names = [value.name for value in runner.get_outputs()]
        return lambda one: dict(zip(names, runner.run(None, dict(one)), strict=True))

    verdict = compare(named(reference), named(session), [feeds])
    runners: dict[str, Runner] = {
        "onnxruntime": partial(reference.run, None, feeds),
        "graphwright": partial(session.run, None, feeds),
    }
    if plan.with_torch and (module := torch_module(model)) is not None:
        runners["torch"] = torch_runner(module, feeds, threads)
    settle = PLAIN_SETTLE if plan.plain or plan.with_torch else SETTLE  # OpenMP threads spin on too
    with busy(plan.busy):
        times = take_turns(runners, plan.effort, settle)
    pairs = [a / b for a, b in zip(times["onnxruntime"], times["graphwright"], strict=True)]
    relative = verdict.relative
    return Row(
        model.name,
        {name: list(array.shape) for name, array in feeds.items()},
        threads,
        Spread.of(times["onnxruntime"]),
        Spread.of(times["graphwright"]),
        Spread.of(pairs),
        len(pairs),
        relative if relative == relative and relative != float("inf") else None,
        load_ms,
        artifact.seconds,
        session.artifact.activation_bytes,
        session.artifact.native_nodes,
        Spread.of(times["torch"]) if "torch" in times else None,
    )


def onnxruntime_session(model: Prepared, threads: int, plain: bool) -> Any:
    """onnxruntime on the original file with all its optimizations, told the sizes of the dynamic axes."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    if not plain:
        # Its threads stop spinning when a run ends; left to spin they take a processor from whoever runs next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
    sizes: dict[str, set[int]] = {}
    for value in onnx.load(model.path, load_external_data=False).graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, model.pins[value.name], strict=True):
            if dim.dim_param:
                sizes.setdefault(dim.dim_param, set()).add(size)
    for word, found in sizes.items():
        if len(found) == 1:  # some exporters give axes of different sizes one name
            options.add_free_dimension_override_by_name(word, found.pop())
    return onnxruntime.InferenceSession(str(model.path), options, providers=["CPUExecutionProvider"])


def torch_module(model: Prepared) -> torch.nn.Module | None:
    """The module that was exported; None for a model that torch does not define."""
    from graphwright.models import registry

    if registry.describe(model.name).module is None:
        return None
    return registry.torch_module(model.name, **model.options)


def torch_runner(module: torch.nn.Module, feeds: Mapping[str, np.ndarray], threads: int) -> Runner:
    """The module in inference mode on `threads` threads."""
    import torch

    torch.set_num_threads(threads)
    tensors = [torch.from_numpy(array) for array in feeds.values()]

    def run() -> object:
        with torch.inference_mode():
            return module(*tensors)

    return run


def take_turns(runners: Mapping[str, Runner], effort: Effort, settle: float) -> dict[str, list[float]]:
    """Milliseconds of each runner, turn by turn: the median of as many runs as take `effort.turn` seconds."""
    from graphwright.runtime.measure import milliseconds

    repeats = {}
    for name, run in runners.items():
        run()
        repeats[name] = max(1, min(20, int(effort.turn * 1e3 / max(1e-6, milliseconds(run)))))
    times: dict[str, list[float]] = {name: [] for name in runners}
    start, turns = time.perf_counter(), 0
    while turns < 3 or (turns < effort.turns and time.perf_counter() - start < effort.budget):
        for name, run in runners.items():
            time.sleep(settle)
            run()
            turn = sorted(milliseconds(run) for _ in range(repeats[name]))
            times[name].append(turn[len(turn) // 2])
        turns += 1
    return times


# --- the table ---------------------------------------------------------------------------------------------------


def header(with_torch: bool) -> list[str]:
    return ["model", "input", *NUMBERS, *(["torch ms"] if with_torch else [])]


def line(row: Mapping[str, Any], with_torch: bool) -> list[str]:
    """A row's JSON as cells."""
    error = as_error(row["relative_error"]) or "not comparable"
    if row["relative_error"] is None or row["relative_error"] > LIMIT:
        error += " WRONG"
    native, nodes = row["nodes"]
    inputs = ", ".join("x".join(map(str, shape)) for shape in dict.fromkeys(map(tuple, row["shapes"].values())))
    model = row["model"] if native == nodes else f"{row['model']} ({native} of {nodes} nodes)"
    cells = [
        model, inputs, str(row["threads"]), f"{row['onnxruntime_ms']['median']:.2f}",
        f"{row['graphwright_ms']['median']:.2f}", "{median:.2f} [{low:.2f}, {high:.2f}]".format(**row["ratio"]), error,
        f"{row['load_ms']:.0f}", as_bytes(row["activation_bytes"]), f"{row['compile_seconds']:.0f}",
    ]  # fmt: skip
    return [*cells, *([f"{row['torch_ms']['median']:.2f}" if row["torch_ms"] else ""] if with_torch else [])]


def geometric_means(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Thread count -> geometric mean of the models' median ratios."""
    import math

    ratios: dict[int, list[float]] = {}
    for row in rows:
        ratios.setdefault(row["threads"], []).append(row["ratio"]["median"])
    return {threads: math.exp(sum(map(math.log, found)) / len(found)) for threads, found in sorted(ratios.items())}


def print_line(cells: Sequence[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


# --- the command -------------------------------------------------------------------------------------------------


def ask(name: str, arguments: Sequence[str], tool: str = "bench_suite") -> list[dict[str, Any]]:
    """The rows of one model, from a process of its own. Raises GraphwrightError with the last line it wrote."""
    command = [sys.executable, "-m", f"graphwright.tools.{tool}", "--child", name, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=None, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise GraphwrightError(lines[-1] if lines else f"its process ended with exit code {done.returncode}")
    return json.loads(lines[-1])


@contextmanager
def _quiet_stdout() -> Iterator[Any]:
    """Keeps what libraries print out of the answer, which goes to the stream that this gives."""
    kept = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        yield kept
    finally:
        kept.flush()


def child(name: str, options: argparse.Namespace) -> int:
    """Measure one model and write its rows as one line of JSON."""
    start = time.perf_counter()

    def say(message: str) -> None:
        print(f"{time.perf_counter() - start:7.1f} s  {name}: {message}", file=sys.stderr, flush=True)

    effort = QUICK if options.quick else Effort()
    plan = Plan(options.threads, effort, options.folder, options.plain, options.torch, options.busy, say)
    with _quiet_stdout() as answer:
        try:
            rows = measure(name, plan)
        except GraphwrightError as error:
            print(" ".join(str(error).split()), file=answer)
            return error.exit_code
        print(json.dumps([row.to_json() for row in rows]), file=answer)
    return 0


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(part) for part in text.split(","))
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected thread counts such as 1,2")
    return counts


def _names(text: str) -> tuple[str, ...]:
    from graphwright.models import registry

    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        if name not in registry.names():
            raise UsageError(f"no model {name!r}: {did_you_mean(name, registry.names())}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite and return its exit code: 4 when a model failed or gave other numbers than onnxruntime."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default=",".join(SUITE), metavar="A,B", help="these only, of any in the table")
    parser.add_argument("--threads", type=_counts, default=(1, 2), metavar="1,2")
    parser.add_argument("--quick", action="store_true", help="three turns each")
    parser.add_argument("--plain", action="store_true", help="onnxruntime's threads spin between its runs too")
    parser.add_argument("--torch", action="store_true", help="time torch too, where torch defines the model")
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="other programs that compute meanwhile")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of exports and artifacts (bench)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--child", metavar="MODEL", help=argparse.SUPPRESS)
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    if options.child:
        return child(options.child, options)
    try:
        names = _names(options.models)
    except UsageError as error:
        return fail(str(error), error.exit_code)
    passed = ["--threads", ",".join(map(str, options.threads)), "--folder", str(options.folder)]
    passed += ["--busy", str(options.busy)]
    passed += [f"--{flag}" for flag in ("quick", "plain", "torch") if getattr(options, flag)]
    columns = header(options.torch)
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    print_line(columns)
    print("|" + "---|" * len(columns), flush=True)
    for name in names:
        try:
            found = ask(name, passed)
        except GraphwrightError as error:
            failed[name] = str(error)
            print_line([name, f"failed: {error}", *[""] * (len(columns) - 2)])
            continue
        except KeyboardInterrupt:
            return fail("interrupted", 130)
        rows += found
        for row in found:
            print_line(line(row, options.torch))
    means = geometric_means(rows)
    print()
    for threads, mean in means.items():
        count = sum(row["threads"] == threads for row in rows)
        print(f"geometric mean of {count} ratios on {threads} thread{'s' if threads > 1 else ''}: {mean:.3f}")
    if options.json:
        data = {
            "machine": machine(), "plain": options.plain, "busy": options.busy, "rows": rows, "failed": failed,
            "geometric_mean": means,
        }  # fmt: skip
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    wrong = [row for row in rows if row["relative_error"] is None or row["relative_error"] > LIMIT]
    return 4 if failed or wrong else 0


def machine() -> dict[str, Any]:
    """What the figures were measured on and with."""
    from graphwright.runtime.target import Target

    target = Target.named("cpu")
    packages = _versions("graphwright", "apache-tvm", "onnxruntime", "numpy", "torch")
    return {"target": target.to_json(), "processors": os.cpu_count(), "versions": packages}


if __name__ == "__main__":
    sys.exit(main())
