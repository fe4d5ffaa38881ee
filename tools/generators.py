"""Generators for commands: a folder as it is, or what `export` and `compile` make of a model, made once and kept.

The kept ones lie in the folder `generators` of the assets' cache under a name that holds a hash of everything they
follow from: the model's files, the options, the target and graphwright's own code.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from graphwright.passes.errors import UsageError

from .shell import progress, verbosity

if TYPE_CHECKING:
    from .config import Settings


def is_generator(path: str) -> bool:
    from graphwright.runtime import generator_folder

    return generator_folder.is_generator(path)


def optimize_folder(settings: Settings) -> dict[str, Any]:
    """`optimize_file` on both parts of a generator folder: the result is one too, `output`, with `parts` by name.

    Raises a GraphwrightError; then nothing is left behind.
    """
    from graphwright.runtime.generator_build import check_feeds, rewrite
    from graphwright.runtime.generator_folder import PARTS, GeneratorFolder

    from .optimize import optimize_file

    assert settings.model is not None  # its folder was looked at
    if settings.pin or settings.calibration:
        raise UsageError("--pin and --calibration are for one model; a generator's parts have inputs of their own")
    source = GeneratorFolder.load(settings.model)
    if source.compiled:
        raise UsageError(f"{settings.model}: is compiled; give the folder that `graphwright export` wrote")
    name = Path(settings.model).absolute().name
    out = Path(settings.output or Path(settings.model).absolute().with_name(f"{name}.{settings.target or 'opt'}"))

    def optimize(part: str, to: Path) -> dict[str, Any]:
        change: dict[str, Any] = {"model": str(source.model(part)), "output": str(to)}
        if settings.report is not None:
            report = Path(settings.report)
            change["report"] = str(report.with_name(f"{report.stem}.{part}{report.suffix}"))
        done = optimize_file(settings.model_copy(update=change), feeds[part] if feeds else None)
        return {**done, "output": None if settings.dry_run else str(out / to.name)}

    feeds = check_feeds(source, settings.threads) if settings.verify and not settings.dry_run else None
    if settings.dry_run:
        parts = {part: optimize(part, out) for part in PARTS}
    else:
        parts = rewrite(source, out, optimize, compiles=bool(settings.target), overwrite=settings.overwrite)
    return {"model": settings.model, "output": None if settings.dry_run else str(out), "parts": parts}


def ready(model: str, backend: str | None, threads: int | None = None) -> Path:
    """The generator folder for a run of `model` on `backend`, made and kept first where there is none.

    model: a generator folder, or what `export` takes. backend: tvm needs a compiled folder; None is tvm for what is
    kept, and a folder as it is. Raises what exporting and compiling raise.
    """
    from graphwright.runtime.generator_build import compile_generator
    from graphwright.runtime.generator_folder import GeneratorFolder

    from .export import export_generator

    if is_generator(model):
        folder = GeneratorFolder.load(model)
        if folder.compiled or backend != "tvm":
            return folder.root
        files = sorted(path for path in folder.root.iterdir() if path.is_file())
    else:
        files = model_files(model)
    compiles = backend != "onnxruntime"
    name = Path(model).absolute().name if Path(model).exists() else model
    place = kept_place(name, files, compiles)
    with _alone(place):
        if place.exists():
            return place
        if verbosity() >= 0:
            what = "exporting and compiling" if compiles else "exporting"
            click.echo(f"{what} {model}, once; it is kept in {place}", err=True)
        with progress() as say, tempfile.TemporaryDirectory(prefix=".export-", dir=place.parent) as scratch:
            if not compiles:
                export_generator(model, place, say=say)
                return place
            source = Path(model)
            if not is_generator(model):
                source = Path(scratch) / "model"
                export_generator(model, source, say=say)
            compile_generator(source, place, threads=threads, progress=say)
    return place


def model_files(model: str) -> list[Path]:
    """The files that a model which `export` takes is read from. Raises UsageError, AssetError."""
    from graphwright.models import assets, generators
    from graphwright.passes.errors import did_you_mean

    if model in generators.NAMED:
        asset = generators.NAMED[model]
        path = assets.find(asset) if asset else Path(generators.__file__).with_name("gpt_moby")
    else:
        path = Path(model)
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    if not path.exists():
        raise UsageError(
            f"{model!r} is neither a generator nor a file nor a model of text: {did_you_mean(model, generators.NAMED)}"
        )
    return [path]


def kept_place(name: str, files: list[Path], compiles: bool) -> Path:
    """Where the generator made of these files is kept."""
    import json

    from blake3 import blake3
    from graphwright.models.assets import cache_folder
    from graphwright.runtime.target import Target

    key = blake3()
    for file in [*files, *_own_sources()]:
        digest = blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest()
        key.update(f"{file.name} {digest}\n".encode())
    key.update(json.dumps([_versions(), Target.named("cpu").to_json() if compiles else None], sort_keys=True).encode())
    kind = "compiled" if compiles else "onnx"
    return cache_folder() / "generators" / f"{name}-{kind}-{key.hexdigest()[:16]}"


def _own_sources() -> list[Path]:
    """The code that a generator follows from."""
    import graphwright.models
    import graphwright.passes
    import graphwright.runtime

    rooms = (graphwright.models, graphwright.passes, graphwright.runtime)
    return sorted(path for room in rooms for path in Path(room.__path__[0]).rglob("*") if path.suffix in (".py", ".cc"))


def _versions() -> list[str]:
    from importlib.metadata import version

    return [version(package) for package in ("graphwright", "apache-tvm", "onnxscript", "ziglang")]


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Inside, no other process makes what is kept there; one that comes later waits."""
    import fcntl

    from graphwright.passes.errors import OutputError

    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(place.parent / f".{place.name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OutputError(
            f"{place.parent}: cannot be written ({error.strerror}); set GRAPHWRIGHT_CACHE to another folder"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if verbosity() >= 0:
                click.echo("waiting for another process that makes the same generator", err=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
