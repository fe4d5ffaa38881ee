"""A pipeline is a string: pass specs joined by commas. Running it never touches the model it was given."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .base import Contract, Pass, PassContext, PassReport
from .errors import GraphwrightError, PassError
from .registry import parse_pass

if TYPE_CHECKING:
    import onnx_ir as ir

log = logging.getLogger("graphwright")

NEEDS = {
    "calibration": "real inputs: give --calibration FILE.npz",
    "target": "a target: give --target NAME",
    "samples": "real inputs to take times with: give --calibration, plan=FILE.npz of an earlier run, or leave "
    "measure out",
    "times": "a target that this machine runs, to see which layers are faster: give --target cpu, plan=FILE.npz of an "
    "earlier run, or leave measure out",
    "ranges": "real inputs to see how large numbers become: give --calibration, plan=FILE.npz of an earlier run, or "
    "activations=none for the weights alone",
    "widths": "real inputs to choose widths by: give --calibration, or plan=FILE.npz of an earlier run",
    "learning": "inputs to learn from: give --calibration, plan=FILE.npz of an earlier run, or leave learn out",
    "recovery": "inputs to learn from, because it puts another function in place of the model's: give --calibration, "
    "weights=FILE.npz of an earlier run, or recover=none for the change alone",
}


class Observer(Protocol):
    """Watches a pipeline. `before` and `after` see the model around each pass and must not change it."""

    def before(self, step: Pass, model: ir.Model) -> None: ...

    def after(self, step: Pass, model: ir.Model, report: PassReport) -> None: ...


@dataclass(frozen=True)
class Pipeline:
    """An ordered run of passes. `Pipeline.parse(str(p)) == p`."""

    passes: tuple[Pass, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Raises UsageError for a name, option or value that is not known."""
        return cls(tuple(parse_pass(part) for part in text.split(",") if part.strip()))

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __add__(self, other: Pipeline) -> Pipeline:
        return Pipeline(self.passes + other.passes)

    @property
    def contract(self) -> Contract:
        """The weakest promise of its passes."""
        order = list(Contract)
        return max((p.contract for p in self.passes), key=order.index, default=Contract.EXACT)

    def check_needs(self, ctx: PassContext) -> None:
        """Raises PassError, naming the option to give, before any work is done."""
        given = {
            "calibration": ctx.calibration is not None,
            "target": ctx.target is not None,
            "samples": ctx.calibration is not None or ctx.dry_run,
            "times": ctx.stopwatch is not None or ctx.dry_run,
            "ranges": ctx.calibration is not None or ctx.dry_run,
            "widths": ctx.calibration is not None or ctx.dry_run,
            "learning": ctx.calibration is not None or ctx.dry_run,
            "recovery": ctx.calibration is not None or ctx.dry_run,
        }
        for step in self.passes:
            for need in sorted(step.needs()):
                if not given[need]:
                    raise PassError(f"pass {step.name} needs {NEEDS[need]}")

    def run(
        self, model: ir.Model, ctx: PassContext | None = None, observers: Sequence[Observer] = (), *,
        in_place: bool = False,
    ) -> tuple[ir.Model, list[PassReport]]:  # fmt: skip
        """Rewrite a copy of `model`. Returns the copy and one report a pass, in order.

        in_place: rewrite `model` itself, for a caller that has no other use for it. A GraphwrightError of a pass is
        raised on with the pass's name in front.
        """
        ctx = ctx or PassContext()
        self.check_needs(ctx)
        if not in_place:
            model = model.clone()
        reports: list[PassReport] = []
        for step in self.passes:
            for observer in observers:
                observer.before(step, model)
            ctx.progress(step.name)
            start = time.perf_counter()
            try:
                report = step.run(model, ctx)
            except GraphwrightError as error:
                raise type(error)(f"{step.name}: {error}") from error
            report.seconds = time.perf_counter() - start
            log.debug("%s: %d changes, %d skips, %.3f s", step, len(report.changes), len(report.skips), report.seconds)
            reports.append(report)
            for observer in observers:
                observer.after(step, model, report)
        return model, reports


@dataclass
class Timer:
    """Observer: wall seconds by pass spec, in order of running."""

    seconds: list[tuple[str, float]] = dataclasses.field(default_factory=list)

    def before(self, step: Pass, model: ir.Model) -> None:
        pass

    def after(self, step: Pass, model: ir.Model, report: PassReport) -> None:
        self.seconds.append((report.spec, report.seconds))


@dataclass
class Dumper:
    """Observer: saves the model after every pass that changed something, as FOLDER/03-simplify.onnx.

    Raises OutputError when the folder cannot be written.
    """

    folder: Path
    count: int = 0

    def before(self, step: Pass, model: ir.Model) -> None:
        self.count += 1

    def after(self, step: Pass, model: ir.Model, report: PassReport) -> None:
        from .io import save

        if report.changes:
            save(model, self.folder / f"{self.count:02d}-{step.name}.onnx", overwrite=True)
