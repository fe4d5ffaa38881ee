"""The main job on real models: `python -m graphwright.tools.demo`, which `make demo` runs.

Fetches and exports each model, optimizes it with two-pass-softmax for this machine, compares the artifact with the
original on real inputs, and times it against onnxruntime with the same number of threads.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from graphwright.passes.errors import GraphwrightError

from .shell import as_bytes, as_error, fail, print_table

MODELS = ("efficientnet-lite0", "minilm")
PASSES = "two-pass-softmax"
FOLDER = Path("demo")
RUNS = 30
NUMBERS = ("size", "onnxruntime ms", "graphwright ms", "max error")


@dataclass(frozen=True)
class Row:
    """One line of the table. size: bytes of the artifact. error: relative to the output's scale."""

    model: str
    fired: str
    size: int
    reference_ms: float
    candidate_ms: float
    error: float

    def cells(self) -> tuple[str, ...]:
        times = (f"{self.reference_ms:.2f}", f"{self.candidate_ms:.2f}")
        return self.model, self.fired, as_bytes(self.size), *times, as_error(self.error)


def run(name: str, folder: Path, threads: int | None = None) -> Row:
    """The whole road for one model; its files go into `folder`. Raises a GraphwrightError."""
    from graphwright.models import registry
    from graphwright.passes.registry import pass_names
    from graphwright.runtime.driver import optimize

    from .bench import bench_models
    from .compare import compare_models
    from .run import write_npz

    folder.mkdir(parents=True, exist_ok=True)
    original, artifact, inputs = folder / f"{name}.onnx", folder / f"{name}.cpu", folder / f"{name}.npz"
    start, steps = time.perf_counter(), frozenset(pass_names())

    def say(what: str) -> None:
        print(f"{time.perf_counter() - start:7.1f} s  {name}: {what}", file=sys.stderr, flush=True)

    say("fetch")
    registry.fetch(name)
    say("export to ONNX")
    registry.export(name, original, overwrite=True)
    feeds = registry.sample_inputs(name)
    write_npz(feeds, inputs)
    result = optimize(
        original,
        PASSES,
        target="cpu",
        out=artifact,
        pins=registry.pins(name),
        calibration={key: [value] for key, value in feeds.items()},
        overwrite=True,
        threads=threads,
        progress=lambda what: None if what in steps else say(what),
    )
    assert result.artifact is not None  # a target was named
    say("compare with the original")
    verdict = compare_models(str(original), str(artifact), str(inputs), threads=threads)
    verdict.check(f"{artifact} against {original}")
    say("time against onnxruntime")
    measured = bench_models(str(artifact), str(original), str(inputs), threads=threads, runs=RUNS)
    assert measured.timing.reference is not None  # there is a model to time against
    fired = {report.spec.partition(":")[0]: None for report in result.reports if report.changes}
    return Row(
        name,
        ", ".join(fired),
        result.artifact.nbytes,
        measured.timing.reference.median,
        measured.timing.candidate.median,
        verdict.relative,
    )


def main() -> int:
    """Run the demo and return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"models to run ({', '.join(MODELS)})")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files go (demo)")
    parser.add_argument("--threads", type=int, help="threads of both runtimes (all processors)")
    given = parser.parse_args()
    rows = []
    try:
        for name in given.models:
            rows.append(run(name, given.folder, given.threads))
    except GraphwrightError as error:
        return fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    print()
    print_table(("model", "passes fired", *NUMBERS), [row.cells() for row in rows], right=NUMBERS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
