"""Generators for commands: a folder as it is, or what `export` and `compile` make of a model, made once and kept.

The kept ones lie in the folder `generators` of the assets' cache under a name that holds hashes of everything they
follow from: the model's files, the options, this host and graphwright's own code.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from graphwright.passes.errors import UsageError

from .shell import progress, verbosity

if TYPE_CHECKING:
    from .config import Settings

_IN_USE: dict[Path, int] = {}  # kept generators that this process runs -> its lock


capacity_option = click.option(
    "--capacity", type=click.IntRange(2), metavar="N",
    help="Tokens that the cache holds, of a name, a .gguf file or a Hugging Face folder; as for export.",
)  # fmt: skip


def is_generator(path: str) -> bool:
    from graphwright.runtime import generator_folder

    return generator_folder.is_generator(path)


def optimize_folder(settings: Settings) -> dict[str, Any]:
    """`optimize_file` on both parts of a generator folder: the result is one too, `output`, with `parts` by name.

    Raises a GraphwrightError; then nothing is left behind.
    """
    from graphwright.runtime.generator_build import check_feeds, replayed, rewrite, text_samples
    from graphwright.runtime.generator_folder import DECODE, PARTS, PREFILL, GeneratorFolder

    from .optimize import Inputs, optimize_file

    assert settings.model is not None  # its folder was looked at
    if settings.pin or settings.tokenizer:
        raise UsageError("--pin and --tokenizer are for one model; a generator has sizes and a tokenizer of its own")
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
        learns = samples is not None and part == PREFILL
        if samples is not None and part == DECODE and not settings.dry_run:
            change |= replayed(pipelines[PREFILL])
        inputs = Inputs(samples if learns else None, feeds[part] if feeds else None, out)
        done = optimize_file(settings.model_copy(update=change), inputs)
        pipelines[part] = done["pipeline"]
        return {**done, "output": None if settings.dry_run else str(out / to.name)}

    pipelines: dict[str, str] = {}
    samples = text_samples(source, Path(settings.calibration)) if settings.calibration else None
    feeds = check_feeds(source, settings.threads) if settings.verify and not settings.dry_run else None
    if settings.dry_run:
        parts = {part: optimize(part, out) for part in PARTS}
    else:
        parts = rewrite(source, out, optimize, compiles=bool(settings.target), overwrite=settings.overwrite)
    return {"model": settings.model, "output": None if settings.dry_run else str(out), "parts": parts}


def ready(model: str, backend: str | None, threads: int | None = None, capacity: int | None = None) -> Path:
    """The generator folder for a run of `model` on `backend`, made and kept first where there is none.

    model: a generator folder, or what `export` takes. backend: tvm needs a compiled folder; None is tvm for what is
    kept, and a folder as it is. capacity: of what is exported. What is kept stays as long as this process runs. Raises
    what exporting and compiling raise, UsageError for another capacity than a folder has.
    """
    if is_generator(model):
        from graphwright.runtime.generator_folder import GeneratorFolder

        folder = GeneratorFolder.load(model)
        if capacity not in (None, folder.about.capacity):
            raise UsageError(
                f"--capacity {capacity}: {model} was exported with {folder.about.capacity}; export the model again"
            )
        if folder.compiled or backend != "tvm":
            return folder.root
        files = sorted(path for path in folder.root.iterdir() if path.is_file())
    else:
        files = model_files(model)
    place = kept_place(model, files, backend != "onnxruntime", capacity)
    with _alone(place):
        if not place.exists():
            if verbosity() >= 0:
                what = "exporting" if backend == "onnxruntime" else "exporting and compiling"
                click.echo(f"{what} {model}, once; it is kept in {place}", err=True)
            _make(model, place, backend != "onnxruntime", threads, capacity)
            _remove_replaced(place)
        _keep(place)
    return place


def _make(model: str, place: Path, compiles: bool, threads: int | None, capacity: int | None) -> None:
    from graphwright.runtime.generator_build import compile_generator

    from .export import export_generator

    with progress() as say, tempfile.TemporaryDirectory(prefix=".export-", dir=place.parent) as scratch:
        if not compiles:
            export_generator(model, place, capacity=capacity, say=say)
            return
        source = Path(model)
        if not is_generator(model):
            source = Path(scratch) / "model"
            export_generator(model, source, capacity=capacity, say=say)
        compile_generator(source, place, threads=threads, progress=say)


def model_files(model: str) -> list[Path]:
    """The files that a model which `export` takes is read from. Raises UsageError, AssetError, ModelError."""
    from graphwright.models import assets, generators
    from graphwright.passes.errors import ModelError, did_you_mean

    if model in generators.NAMED:
        asset = generators.NAMED[model].asset
        path = assets.find(asset) if asset else Path(generators.__file__).with_name("gpt_moby")
    else:
        path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{path}: has neither generator.json nor config.json; expected a generator or a Hugging Face folder"
            )
        return sorted(file for file in path.iterdir() if file.is_file())
    if not path.exists():
        raise UsageError(
            f"{model!r} is neither a generator nor a file nor a model of text: {did_you_mean(model, generators.NAMED)}"
        )
    return [path]


def kept_place(model: str, files: list[Path], compiles: bool, capacity: int | None = None) -> Path:
    """Where the generator made of a model with these files is kept: under the model's name, a hash of which model and
    what it is made for, and one of what it is made of and by. Of two that differ in the last the older is replaced.
    """
    import json

    from blake3 import blake3
    from graphwright.models.assets import cache_folder
    from graphwright.runtime.target import host_traits

    path = Path(model).absolute()
    name, which = (path.name, str(path.resolve())) if path.exists() else (model, model)
    purpose = blake3(json.dumps([which, capacity, host_traits() if compiles else None], sort_keys=True).encode())
    origin = blake3(json.dumps(_versions()).encode())
    for file in [*files, *_own_sources()]:
        digest = blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest()
        origin.update(f"{file.name} {digest}\n".encode())
    kind = "compiled" if compiles else "onnx"
    return cache_folder() / "generators" / f"{name}-{kind}-{purpose.hexdigest()[:8]}-{origin.hexdigest()[:16]}"


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
    from graphwright.passes.errors import OutputError

    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(_lock_of(place, "making"), fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is None:
            if verbosity() >= 0:
                click.echo("waiting for another process that makes the same generator", err=True)
            lock = _locked(_lock_of(place, "making"), fcntl.LOCK_EX)
    except OSError as error:
        raise OutputError(
            f"{place.parent}: cannot be written ({error.strerror}); set GRAPHWRIGHT_CACHE to another folder"
        ) from error
    assert lock is not None  # it was waited for
    try:
        yield
    finally:
        if not place.exists():  # a lock of nothing
            _lock_of(place, "making").unlink(missing_ok=True)
        os.close(lock)


def _lock_of(place: Path, what: str) -> Path:
    return place.parent / f".{place.name}.{what}"


def _locked(path: Path, how: int) -> int | None:
    """A file descriptor with a lock; None where another process holds one and `how` does not wait."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, how)
            if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        except BlockingIOError:
            os.close(lock)
            return None
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # it was removed with what it guarded while we waited


def _keep(place: Path) -> None:
    """Let no process remove what is kept there until this one ends."""
    if place not in _IN_USE:
        lock = _locked(_lock_of(place, "used"), fcntl.LOCK_SH)
        assert lock is not None  # it was waited for
        _IN_USE[place] = lock


def _remove_replaced(place: Path) -> None:
    """Remove the generators that this one was made in the place of, those in use excepted."""
    stem = place.name.rpartition("-")[0]
    for old in place.parent.glob(f"{glob.escape(stem)}-{'[0-9a-f]' * 16}"):
        if old == place or (lock := _locked(_lock_of(old, "used"), fcntl.LOCK_EX | fcntl.LOCK_NB)) is None:
            continue
        shutil.rmtree(old, ignore_errors=True)
        for what in ("making", "used"):
            _lock_of(old, what).unlink(missing_ok=True)
        os.close(lock)
