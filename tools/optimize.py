"""`optimize`: rewrite a model, compile it, prove it, and say what happened."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from graphwright.passes.errors import OutputError, UsageError

from .shell import (
    AtLeastZero,
    Command,
    format_options,
    parse_pins,
    pin_option,
    print_json,
    progress,
    threads_option,
    tune_option,
    verbosity,
    verbosity_options,
)

if TYPE_CHECKING:
    import numpy as np

    from .config import Settings

REPORTS = (".html", ".json")


def optimize_model(settings: Settings) -> dict[str, Any]:
    """`optimize_file`, or for a generator folder `generators.optimize_folder`."""
    if settings.model is not None and Path(settings.model).is_dir():
        from .generators import is_generator, optimize_folder

        if is_generator(settings.model):
            return optimize_folder(settings)
    return optimize_file(settings)


class Inputs(NamedTuple):
    """In the place of what the settings say. calibration, checks, learned: as for `driver.optimize`."""

    calibration: Mapping[str, Sequence[np.ndarray]] | None
    checks: Mapping[str, Sequence[np.ndarray]] | None
    learned: Path


def optimize_file(settings: Settings, inputs: Inputs | None = None) -> dict[str, Any]:
    """Do what the settings say and return what was done, as `summary.summarize` describes it.

    Raises a GraphwrightError; then nothing is left behind.
    """
    from graphwright.models.trainer import train
    from graphwright.passes import io
    from graphwright.passes.pipeline import Dumper, Observer
    from graphwright.runtime import driver

    from .report import write_report
    from .summary import Census, summarize

    if settings.model is None:
        raise UsageError("no model; write optimize MODEL.onnx, or `model:` in the --config file")
    model = Path(settings.model)
    out = Path(settings.output) if settings.output else driver.default_output(model, settings.target)
    report = Path(settings.report) if settings.report else None
    if report is not None:
        if report.suffix not in REPORTS:
            raise UsageError(f"--report {report}: unknown kind {report.suffix!r}; expected .html or .json")
        io.check_output(report, settings.overwrite)
        io.check_folder(report.parent)
    if not settings.dry_run:
        keep_input(model, out, settings.overwrite)
    census = Census()
    observers: list[Observer] = [census]
    if settings.dump:
        io.check_folder(Path(settings.dump))
        observers.append(Dumper(Path(settings.dump)))
    start = time.perf_counter()
    with progress() as say, spread(settings.jobs, settings.backend):
        result = driver.optimize(
            model,
            settings.passes,
            preset=settings.preset,
            target=settings.target,
            out=out,
            pins=settings.pin,
            **(inputs._asdict() if inputs else {"calibration": _calibration(settings, model)}),
            seed=settings.seed,
            max_drop=settings.max_drop,
            verify=settings.verify,
            overwrite=settings.overwrite,
            dry_run=settings.dry_run,
            threads=settings.threads,
            tune=settings.tune,
            observers=observers,
            progress=say,
            trainer=train,
        )
    done = summarize(str(model), result, census, settings.target, time.perf_counter() - start)
    if report is not None:
        write_report(done, report, overwrite=settings.overwrite)
    return done


def _calibration(settings: Settings, model: Path) -> Any:
    if settings.calibration is None:
        return None
    from graphwright.passes import io

    from .calibration import load_calibration

    tokenizer = Path(settings.tokenizer) if settings.tokenizer else None
    return load_calibration(Path(settings.calibration), io.load(model), settings.pin, tokenizer)


def keep_input(model: Path, out: Path, overwrite: bool) -> None:
    """Raises OutputError when writing `out` would replace the model or the weights it is read from."""
    if not overwrite or not model.is_file():
        return
    from graphwright.passes import io

    from .summary import weight_files

    written = [path for path in (out, out.with_name(out.name + ".data")) if path.is_file()]
    sources = [model, *(weight_files(io.load(model)) if written else [])]
    for path in written:
        for source in sources:
            if os.path.samefile(path, source):
                raise OutputError(f"{path}: is read by this run and will not be replaced; choose another output")


@contextlib.contextmanager
def spread(jobs: int, backend: str) -> Iterator[None]:
    """Inside, joblib work without settings of its own runs as `jobs` processes on `backend`.

    Raises UsageError when the backend's package is not installed.
    """
    if jobs == 1 and backend == "local":
        yield
        return
    import joblib

    if backend == "ray":
        try:
            from ray.util.joblib import register_ray  # type: ignore[import-not-found]  # an optional package
        except ImportError as error:
            raise UsageError("--backend ray: ray is not installed; pip install ray, or use local") from error
        register_ray()
    elif backend == "dask":
        try:
            from distributed import Client  # type: ignore[import-not-found]  # an optional package
        except ImportError as error:
            raise UsageError(
                "--backend dask: dask.distributed is not installed; pip install distributed, or use local"
            ) from error
        with Client(), joblib.parallel_config(backend="dask", n_jobs=jobs):
            yield
        return
    with joblib.parallel_config(backend={"local": "loky"}.get(backend, backend), n_jobs=jobs):
        yield


def show(done: dict[str, Any], as_json: bool) -> None:
    """Print what was done."""
    from .summary import print_sites, print_summary

    if as_json:
        print_json(done)
        return
    if "parts" in done:
        for name, part in done["parts"].items():
            click.echo(f"{name}:")
            show(part, False)
            click.echo()
        return
    dry = done["output"] is None
    if dry or verbosity() > 0:
        for one in done["passes"]:
            if one["changes"] or one["skips"]:
                click.echo(one["spec"])
                print_sites(one)
                click.echo()
    print_summary(done)


@click.command(cls=Command, name="optimize")
@click.argument("model", required=False, metavar="MODEL.onnx")
@click.option(
    "--passes",
    metavar="a,b:key=value",
    help="Passes to run after the preset; `graphwright passes` lists them.",
)
@click.option(
    "--preset",
    metavar="NAME",
    help="Passes to run first: compile (with --target), default (without) or none.",
)
@click.option("--target", metavar="NAME", help="Compile for this target; `graphwright targets` lists them.")
@click.option("-o", "--output", metavar="OUT",
              help="ONNX file (MODEL.opt.onnx), or with --target artifact folder (MODEL.TARGET).")  # fmt: skip
@pin_option
@click.option("--calibration", metavar="FILE.npz|FILE.txt|DIR",
              help="Real inputs for calibration, training and verification: arrays, lines of text, or images.")
@click.option("--tokenizer", metavar="FILE.json", help="Turns a calibration text into tokens.")  # fmt: skip
@click.option("--config", metavar="FILE.yaml", help="The same settings in a file; the command line goes first.")
@click.option("--dry-run", is_flag=True, default=None,
              help="Which passes would change what, and why the others would not; writes nothing.")  # fmt: skip
@click.option("--report", metavar="FILE.html|.json", help="Write what was done, with numbers before and after.")
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Seed of every random choice (0).")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Processes for passes that evaluate many candidates (1).",
)
@click.option("--backend", type=click.Choice(["local", "ray", "dask"]), help="Where these processes run (local).")
@click.option("--max-drop", type=AtLeastZero(), metavar="X", help="Error budget of lossy and learned passes.")
@click.option("--overwrite", is_flag=True, default=None, help="Replace outputs that exist.")
@click.option("--no-verify", "verify", flag_value=False, type=bool, default=None,
              help="Do not compare the result with the original.")  # fmt: skip
@threads_option
@tune_option
@click.option("--dump", metavar="DIR", help="Save the model after every pass that changed it.")
@format_options
@verbosity_options
def command(pins: tuple[str, ...], config: str | None, as_json: bool, **given: Any) -> None:
    """Rewrite MODEL.onnx with passes and save it, or with --target compile it to an artifact folder.

    The result is compared with the original and written only when it is the same function.
    """
    from .config import load_settings

    values = {name: value for name, value in given.items() if value is not None}
    if pins:
        values["pin"] = parse_pins(pins)
    show(optimize_model(load_settings(values, config)), as_json)
