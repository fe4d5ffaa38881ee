"""The ONNX backend suite through graphwright.

    python -m graphwright.tools.backend_suite --kind node --jobs 2 --json suite.json
    python -m graphwright.tools.backend_suite --kind all --sample 1/20
    python -m graphwright.tools.backend_suite --filter 'resize|topk'

Cases that onnxruntime itself gets right are run twice more: rewritten by the default passes, on onnxruntime, and
compiled for a target, through Session. Each case runs in a child process with a time limit; a crash costs one case.
Exit code 3 when a case is wrong, fails, crashes or hangs, or when, of all node cases, TVM alone runs less than 90 %.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from . import backend_cases
from .backend_cases import KINDS, Case

SKIPPED, PASSED, WRONG, FAILED, CRASHED, HUNG = "skipped", "passed", "wrong", "failed", "crashed", "hung"
NATIVE_GOAL = 0.9  # of the node cases that onnxruntime passes, run by TVM alone


# --- in the child -----------------------------------------------------------------------------------------------


def check(name: str, target: str) -> dict[str, Any]:
    """Run one case. Keys: reference, rewritten, compiled: an outcome, with what was wrong; native, fallback."""
    case = backend_cases.load(name)
    result: dict[str, Any] = {"reference": _outcome(case, lambda: _onnxruntime(case.model))}
    if result["reference"][0] != PASSED:
        return {**result, "rewritten": [SKIPPED, ""], "compiled": [SKIPPED, ""]}
    result["rewritten"] = _outcome(case, lambda: _rewritten(case))
    with tempfile.TemporaryDirectory(prefix="graphwright-suite-") as folder:
        result["compiled"] = _outcome(case, lambda: _compiled(case, target, Path(folder) / "out", result))
    return result


Runner = Any  # callable: feeds by name -> outputs in order


def _outcome(case: Case, prepare: Callable[[], Runner]) -> list[str]:
    try:
        run = prepare()
        for inputs, expected in case.data:
            difference = case.difference(expected, run(case.feeds(inputs)))
            if difference:
                return [WRONG, difference]
    except Exception as error:  # the suite goes on whatever one case raises
        return [FAILED, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]
    return [PASSED, ""]


def _onnxruntime(model: Any) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)


def _rewritten(case: Case) -> Runner:
    import onnx_ir
    from graphwright.runtime import driver

    result = driver.optimize(onnx_ir.serde.deserialize_model(case.model), verify=False)
    return _onnxruntime(onnx_ir.serde.serialize_model(result.model))


def _compiled(case: Case, target: str, out: Path, result: dict[str, Any]) -> Runner:
    import onnx_ir
    from graphwright.runtime import driver
    from graphwright.runtime.session import Session

    made = driver.optimize(onnx_ir.serde.deserialize_model(case.model), target=target, out=out, verify=False)
    assert made.artifact is not None
    regions = made.artifact.manifest.regions
    result["native"] = all(region.runtime == "tvm" for region in regions)
    result["fallback"] = sorted({reason for region in regions for reason in region.reasons.values()})
    session = Session(out, threads=1)
    return lambda feeds: session.run(None, feeds)


def serve(target: str) -> None:
    """Answer one case a line until the input ends."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    answers = os.fdopen(os.dup(1), "w")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    if not os.environ.get("GRAPHWRIGHT_DEBUG"):
        os.dup2(quiet, 2)
    for line in sys.stdin:
        print(json.dumps(check(line.strip(), target)), file=answers, flush=True)


# --- in the parent ----------------------------------------------------------------------------------------------


class Child:
    """A process that runs cases one after the other, in a process group of its own."""

    def __init__(self, target: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "graphwright.tools.backend_suite", "--serve", "--target", target],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def ask(self, name: str, limit: float) -> dict[str, Any]:
        """The result of a case, or what happened to the child instead."""
        timed_out = threading.Event()

        def stop() -> None:
            timed_out.set()
            self.kill()

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            stdin, stdout = _pipes(self.process)
            stdin.write(name + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            return json.loads(line)
        self.kill()
        outcome = [HUNG, f"no answer within {limit:.0f} s"] if timed_out.is_set() else [
            CRASHED, f"exit code {self.process.wait()}"]  # fmt: skip
        return {"reference": [PASSED, ""], "rewritten": outcome, "compiled": outcome}

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # it ended meanwhile
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout


@contextmanager
def _child(target: str, slot: list[Child | None]) -> Iterator[Child]:
    """The slot's process, a new one when the last died."""
    current = slot[0]
    if current is None or current.process.poll() is not None:
        current = slot[0] = Child(target)
    yield current


def run(
    names: list[str], target: str, jobs: int, limit: float, done: Callable[[str, dict[str, Any]], None]
) -> dict[str, dict[str, Any]]:
    """All cases, on `jobs` processes at a time. `done` sees each result as it comes."""
    results: dict[str, dict[str, Any]] = {}
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    lock = threading.Lock()

    def work() -> None:
        slot: list[Child | None] = [None]
        try:
            while True:
                try:
                    name = waiting.get_nowait()
                except queue.Empty:
                    return
                with _child(target, slot) as child:
                    result = child.ask(name, limit)
                with lock:
                    results[name] = result
                    done(name, result)
        finally:
            if slot[0] is not None:
                slot[0].kill()

    threads = [threading.Thread(target=work) for _ in range(max(1, min(jobs, len(names))))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def summary(results: dict[str, dict[str, Any]], target: str) -> str:
    """Counts for each kind, and the share of cases that TVM ran alone."""
    lines = []
    for kind in KINDS:
        mine = [r for name, r in results.items() if name.startswith(f"{kind}/") and r["reference"][0] == PASSED]
        if not mine:
            continue
        for road in ("rewritten", "compiled"):
            counts = Counter(r[road][0] for r in mine)
            shown = ", ".join(f"{counts[o]} {o}" for o in (PASSED, WRONG, FAILED, CRASHED, HUNG) if counts[o])
            label = "default passes, onnxruntime" if road == "rewritten" else f"compiled for {target}"
            lines.append(f"{kind:18s} {label:28s} {shown}, of {len(mine)}")
        native = sum(map(_native, mine))
        lines.append(f"{kind:18s} {'run by TVM alone':28s} {native} of {len(mine)}: {100 * native / len(mine):.1f} %")
    return "\n".join(lines)


def _native(result: dict[str, Any]) -> bool:
    return bool(result.get("native")) and result["compiled"][0] == PASSED


def meets_goal(results: dict[str, dict[str, Any]]) -> bool:
    """Whether TVM alone runs the share of node cases that it should."""
    mine = [r for name, r in results.items() if name.startswith("node/") and r["reference"][0] == PASSED]
    return sum(map(_native, mine)) >= NATIVE_GOAL * len(mine)


def failures(results: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each road of a case that went wrong."""
    return [
        f"{name}: {road} {result[road][0]}: {result[road][1]}"
        for name, result in sorted(results.items())
        for road in ("rewritten", "compiled")
        if result[road][0] not in (PASSED, SKIPPED)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run and print. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m graphwright.tools.backend_suite", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--kind", choices=[*KINDS, "all"], default="node")
    parser.add_argument("--target", default="cpu", help="a target that runs on this machine")
    parser.add_argument("--sample", default="1/1", metavar="K/N", help="every N-th case, from the K-th")
    parser.add_argument("--filter", default="", metavar="RE", help="only cases whose name matches")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=float, default=120.0, metavar="SECONDS", help="for one case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.target)
        return 0
    sample = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", options.sample)
    if sample is None or int(sample[1]) > int(sample[2]):
        parser.error(f"--sample {options.sample!r}: expected K/N with K from 1 to N")
    chosen = [name for name in backend_cases.names(options.kind) if re.search(options.filter, name)]
    chosen = chosen[int(sample[1]) - 1 :: int(sample[2])]
    if not chosen:
        parser.error(f"no case matches {options.filter!r}")
    seen: dict[str, dict[str, Any]] = {}

    def done(name: str, result: dict[str, Any]) -> None:
        seen[name] = result
        if options.json and len(seen) % 50 == 0:
            backend_cases.save(options.json, seen)
        if sys.stderr.isatty():
            print(f"\r{len(seen)}/{len(chosen)} ", end="", file=sys.stderr, flush=True)

    results = run(chosen, options.target, options.jobs, options.limit, done)
    if options.json:
        backend_cases.save(options.json, dict(sorted(results.items())))
    bad = failures(results)
    for line in bad:
        print(line)
    print(summary(results, options.target) or "onnxruntime passes none of these cases")
    whole = not options.filter and options.sample == "1/1"
    if whole and not meets_goal(results):
        print(f"TVM alone runs less than {100 * NATIVE_GOAL:.0f} % of the node cases")
        return 3
    return 3 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
