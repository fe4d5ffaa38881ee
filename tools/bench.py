"""`graphwright bench`: time a model against onnxruntime or another model, run by run in turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
from graphwright.passes.errors import UsageError

from .shell import (
    Command,
    as_bytes,
    as_error,
    count_of,
    print_json,
    print_table,
    progress,
    threads_option,
    verbosity,
    verbosity_options,
    write_json,
)

if TYPE_CHECKING:
    import numpy as np
    from graphwright.runtime.measure import Timing
    from graphwright.runtime.profile import Profile
    from graphwright.runtime.session import Session

    from .opened import Opened

RUNS = 50
BUDGET = 60.0  # seconds
KERNELS_SHOWN = 20


@dataclass(frozen=True)
class Bench:
    """What was measured. labels: of candidate and reference. peak_rss_mb: of a process of its own for each.

    max_abs_error is None when an output is no tensor of the same shape. left: what of the candidate onnxruntime ran,
    and why; None where it is all compiled, or is onnxruntime's.
    """

    labels: tuple[str, str]
    threads: int
    timing: Timing
    max_abs_error: float | None
    peak_rss_mb: tuple[float, float]
    left: str | None = None

    def to_json(self) -> dict[str, Any]:
        candidate, reference = self.peak_rss_mb
        return {
            "threads": self.threads,
            **self.timing.to_json(),
            "max_abs_error": self.max_abs_error,
            "peak_rss_mb": {"candidate": candidate, "reference": reference},
            **({} if self.left is None else {"left_to_onnxruntime": self.left}),
        }


def bench_models(
    candidate: str,
    against: str = "onnxruntime",
    file: str | None = None,
    *,
    backend: str | None = None,
    threads: int | None = None,
    runs: int = RUNS,
    seed: int = 0,
    feeds: Mapping[str, np.ndarray] | None = None,
) -> Bench:
    """Time `candidate` against a reference, alternating run by run in this process, inputs and outputs as NumPy.

    against: an artifact or ONNX file, or "onnxruntime" for the candidate's own graph there. An ONNX candidate is
    compiled for this host first when it is timed against onnxruntime itself, or with backend "tvm". onnxruntime has
    all its optimizations on. Raises a GraphwrightError.
    """
    from graphwright.runtime.feeds import check_names
    from graphwright.runtime.measure import alternate
    from graphwright.runtime.ort import default_threads

    from .memory import peak_of
    from .opened import choose_feeds, opened

    threads = threads or default_threads()
    itself = against == "onnxruntime"
    first = backend or ("tvm" if itself else None)
    second = "onnxruntime" if itself else None
    with progress() as say:
        say("load")
        with (
            opened(candidate, first, threads=threads) as a,
            opened(candidate if itself else against, second, threads=threads) as b,
        ):
            if feeds is None:
                feeds = choose_feeds(b, a, file, seed, sets=1)[0][0]
            for model in (a, b):
                check_names(feeds, model.graph, f"inputs for {model.name}")
            error = _difference(a, b, feeds)
            say(f"time {runs} runs")
            given = dict(feeds)
            timing = alternate(lambda: a.session.run(None, given), lambda: b.session.run(None, given), runs, BUDGET)
            say("measure memory")
            peaks = (
                peak_of(a.file, a.backend, threads, feeds),
                peak_of(b.file, b.backend, threads, feeds),
            )
            left = _left(a.session) if a.backend == "tvm" else None
            return Bench((_label(a), _label(b)), threads, timing, error, peaks, left)


def profile_model(
    candidate: str,
    file: str | None = None,
    *,
    threads: int | None = None,
    runs: int = RUNS,
    seed: int = 0,
) -> Profile:
    """Where the time of an artifact goes, kernel by kernel; an ONNX file is compiled first.

    Raises a GraphwrightError.
    """
    from graphwright.runtime.profile import profile

    from .opened import choose_feeds, opened

    with progress() as say:
        say("load")
        with opened(candidate, "tvm", threads=threads) as a:
            feeds = choose_feeds(a, a, file, seed, sets=1)[0][0]
            say(f"watch {runs} runs")
            return profile(a.session, feeds, runs)


def print_profile(found: Profile) -> None:
    """The kernels, longest first, and what they come to. All of them with -v."""
    data = found.to_json()
    columns = ("kernel", "calls", "ms", "share", "GFLOP/s", "GB/s", "of limit")
    shown = data["kernels"] if verbosity() > 0 else data["kernels"][:KERNELS_SHOWN]
    print_table(columns, [_cells(row) for row in shown], right=columns[1:])
    if len(shown) < len(data["kernels"]):
        click.echo(f"and {count_of(len(data['kernels']) - len(shown), 'further kernel')}; -v shows all")
    click.echo()
    columns = ("operators", *columns[1:])
    print_table(columns, [_cells(row) for row in data["operators"][:KERNELS_SHOWN]], right=columns[1:])
    click.echo()
    limit = f", {data['limit_ms']:.3f} ms if each ran at its limit" if data["limit_ms"] is not None else ""
    click.echo(f"run {data['run_ms']:.3f} ms, kernels {data['kernels_ms']:.3f} ms{limit}")
    peaks = [f"{found.peaks.flops / 1e9:.0f} GFLOP/s"]
    peaks += [f"{level.name} {max(level.read, level.copy) / 1e9:.0f} GB/s" for level in found.peaks.levels]
    click.echo(f"limits measured on {count_of(found.threads, 'thread')}: {', '.join(peaks)}")
    if found.activation_bytes is not None:
        click.echo(f"activations {as_bytes(found.activation_bytes)}")


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    def number(key: str, form: str) -> str:
        return "" if row[key] is None else format(row[key], form)

    return (
        row["name"], str(row["calls"]), f"{row['ms']:.3f}", number("share", ".1%"), number("gflops_per_s", ".1f"),
        number("gbytes_per_s", ".1f"), number("of_limit", ".0%"),
    )  # fmt: skip


def _left(session: Session) -> str | None:
    """What of a compiled model onnxruntime ran, and why."""
    if session.left_to_onnxruntime:
        return f"all of it, with these inputs: {session.left_to_onnxruntime}"
    native, nodes = session.artifact.native_nodes
    reasons = [reason for region in session.artifact.manifest.regions for reason in region.reasons.values()]
    return f"{nodes - native} of {nodes} nodes: {reasons[0]}" if reasons else None


def _label(model: Opened) -> str:
    return f"{model.name} ({'graphwright' if model.backend == 'tvm' else model.backend})"


def _difference(a: Opened, b: Opened, feeds: Mapping[str, np.ndarray]) -> float | None:
    import math

    from graphwright.runtime.compare import compare

    found = compare(b.run, a.run, [feeds]).max_abs
    return found if math.isfinite(found) else None


@click.command(cls=Command, name="bench")
@click.argument("candidate", metavar="A")
@click.option("--against", default="onnxruntime", show_default=True, metavar="onnxruntime|B",
              help="The reference: an artifact or ONNX file, or A's own graph on onnxruntime.")  # fmt: skip
@click.option("-i", "--input", "file", metavar="IN.npz", help="One array an input; made up when not given.")
@click.option("--backend", type=click.Choice(["tvm", "onnxruntime"]), help="What runs A.")
@click.option("--runs", type=click.IntRange(min=3), default=RUNS, show_default=True, help="Runs of each.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of inputs made up.")
@click.option("--json", "json_file", metavar="FILE", help="Also write the result here as JSON; - is stdout.")
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True,
              help="How to print the result.")  # fmt: skip
@click.option("--profile", is_flag=True, help="Where A's time goes: every kernel against what the machine can do.")
@threads_option
@verbosity_options
def command(
    candidate: str,
    against: str,
    file: str | None,
    backend: str | None,
    runs: int,
    seed: int,
    json_file: str | None,
    form: str,
    profile: bool,
    threads: int | None,
) -> None:
    """Time A, an artifact or ONNX file, against onnxruntime or another model on the same inputs and threads.

    Both alternate run by run; the ratio is reference / candidate of such pairs, so above 1 A is the faster. An
    artifact's own graph is the rewritten one: give the original file to --against to compare with that.
    """
    if profile:
        if against != "onnxruntime" or backend == "onnxruntime":
            raise UsageError("--profile looks at A on TVM alone; leave out --against and --backend")
        found = profile_model(candidate, file, threads=threads, runs=runs, seed=seed)
        data = found.to_json()
    else:
        measured = bench_models(candidate, against, file, backend=backend, threads=threads, runs=runs, seed=seed)
        data = measured.to_json()
    if json_file is not None:
        write_json(data, json_file)
    if json_file == "-":
        return
    if form == "json":
        print_json(data)
        return
    if profile:
        print_profile(found)
        return
    columns = ("", "median ms", "10 %", "90 %", "peak MB")
    rows = [
        (label, *(f"{data[key][part]:.3f}" for part in ("median", "low", "high")), f"{peak:.0f}")
        for label, key, peak in zip(
            measured.labels, ("candidate_ms", "reference_ms"), measured.peak_rss_mb, strict=True
        )
    ]
    rows.append(("ratio", *(f"{data['ratio'][part]:.2f}" for part in ("median", "low", "high")), ""))
    print_table(columns, rows, right=columns[1:])
    error = as_error(measured.max_abs_error) or "not measurable"
    click.echo(f"{measured.timing.runs} runs, {measured.threads} threads, largest absolute difference {error}")
    if measured.left is not None:
        click.echo(f"onnxruntime ran {measured.left}")
