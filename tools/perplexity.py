"""`graphwright perplexity`: how well a language model foresees a text."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from graphwright.passes.errors import InputError, UsageError

from .generators import capacity_option
from .shell import Command, format_options, print_json, threads_option, verbosity, verbosity_options

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from graphwright.runtime.perplexity import Perplexity

    from .opened import Opened

LENGTH = 512  # tokens of a window where the model does not fix it
Told = Callable[[int, int], None]


def judge_text(
    model: str, file: str, *, length: int | None = None, max_tokens: int | None = None, skip_characters: int = 0,
    tokenizer: str | None = None, backend: str | None = None, threads: int | None = None,
    capacity: int | None = None, progress: Told = lambda done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Perplexity of a text file, from a character on. model: what `generators.ready` takes, or an ONNX file or artifact
    from tokens (1, s) to logits (1, s, V). Raises a GraphwrightError.
    """
    text = _read(Path(file), skip_characters)
    start = time.perf_counter()
    if _is_plain(Path(model)):
        if capacity is not None:
            raise UsageError("--capacity is for a model that is exported first; this one has no cache")
        from .opened import opened

        with opened(model, backend, threads=threads) as ready:
            found = _judge_plain(ready, text, tokenizer, length, max_tokens, progress)
            used = ready.backend
    else:
        from graphwright.runtime.generator import Generator
        from graphwright.runtime.tvm_import import runtime_alone

        from .generators import ready as made

        if tokenizer is not None:
            raise UsageError("--tokenizer is for an ONNX file or an artifact; a generator has its own")
        folder = made(model, backend, threads, capacity)
        runtime_alone()
        generator = Generator(folder, threads=threads, backend=backend)
        start = time.perf_counter()
        length = min(LENGTH, generator.capacity) if length is None else length
        found = generator.perplexity(text, length=length, max_tokens=max_tokens, progress=progress)
        used = generator.backend
    seconds = time.perf_counter() - start
    return {"model": model, "backend": used, "text": file, **found.to_json(), "seconds": seconds}


def _read(path: Path, skip: int) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}); expected UTF-8") from error
    if skip and skip >= len(text):
        raise InputError(f"{path}: has {len(text)} characters; --skip-characters {skip} leaves none")
    return text[skip:]


def _is_plain(path: Path) -> bool:
    """Whether it is one model, not a generator or something that one is made of."""
    from graphwright.runtime.artifact import MANIFEST

    return path.suffix == ".onnx" or (path / MANIFEST).is_file()


def _judge_plain(
    ready: Opened, text: str, tokenizer: str | None, length: int | None, max_tokens: int | None, progress: Told
) -> Perplexity:
    import numpy as np
    from graphwright.runtime.perplexity import measure, token_losses

    value, fixed = _tokens_input(ready)
    if length is not None and fixed is not None and length > fixed:
        raise UsageError(f"--length {length}: {ready.name} takes {fixed} tokens; give at most those")
    ids = list(_tokenizer(ready, tokenizer).encode(text, add_special_tokens=False).ids)
    kind = value.dtype.numpy() if value.dtype is not None else np.int64

    def losses(window: Sequence[int]) -> Iterator[np.ndarray]:
        row = np.zeros((1, fixed or len(window)), kind)  # what stands behind the window changes nothing before it
        row[0, : len(window)] = window
        yield token_losses(_logits(ready, row, value.name or "")[: len(window) - 1], window[1:])

    return measure(ids[:max_tokens], length or fixed or LENGTH, losses, progress)


def _tokens_input(ready: Opened) -> tuple[ir.Value, int | None]:
    """The input of tokens (1, s), and s where the model fixes it. Raises InputError for another kind of model."""
    from graphwright.runtime.feeds import required_inputs

    inputs = required_inputs(ready.graph)
    value = inputs[0] if len(inputs) == 1 else None
    if value is None or value.dtype is None or not value.dtype.is_integer() or len(value.shape or ()) != 2:
        names = ", ".join(f"{one.name} {one.shape}" for one in inputs)
        raise InputError(f"{ready.name}: its inputs are {names}; expected one of whole numbers, (batch, tokens)")
    assert value.shape is not None  # it has two dimensions
    batch, length = value.shape[0], value.shape[1]
    if isinstance(batch, int) and batch != 1:
        raise InputError(f"{ready.name}: takes a batch of {batch}; expected 1")
    return value, length if isinstance(length, int) else None


def _logits(ready: Opened, row: np.ndarray, name: str) -> np.ndarray:
    """(s, V). Raises InputError when the model gives no such thing."""
    first, logits = next(iter(ready.run({name: row}).items()))
    shape = getattr(logits, "shape", ())
    if len(shape) != 3 or shape[:2] != row.shape or logits.dtype.kind != "f":
        raise InputError(f"{ready.name}: output {first!r} has shape {list(shape)}; expected logits (1, {row.size}, V)")
    return logits[0]


def _tokenizer(ready: Opened, file: str | None) -> Any:
    from graphwright.models import tokens
    from graphwright.runtime.generator_folder import load_tokenizer

    if file is not None:
        return load_tokenizer(Path(file))
    name = ready.graph.graph.name or ""
    if name in tokens.TOKENIZERS:
        return tokens.TOKENIZERS[name]()
    raise InputError(f"{ready.name}: no tokenizer is known for the model {name!r}; give --tokenizer FILE.json")


@contextlib.contextmanager
def progress_bar() -> Iterator[Told]:
    """A function that draws on stderr how far things are, where that is a terminal."""
    if verbosity() < 0 or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tokens", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@click.command(cls=Command, name="perplexity")
@click.argument("model", metavar="MODEL")
@click.option("--text", required=True, metavar="FILE", help="The text, UTF-8.")
@click.option("--length", type=click.IntRange(min=2), metavar="N",
              help="Tokens of a window; by default 512, or what the model takes if that is less.")  # fmt: skip
@click.option("-n", "--max-tokens", type=click.IntRange(min=2), metavar="N", help="Judge the first N tokens only.")
@click.option("--skip-characters", type=click.IntRange(min=0), default=0, metavar="N", help="Begin behind these.")
@click.option("--tokenizer", metavar="FILE.json", help="Of an ONNX file or an artifact.")
@click.option("--backend", type=click.Choice(["tvm", "onnxruntime"]), help="What runs the model.")
@capacity_option
@threads_option
@format_options
@verbosity_options
def command(model: str, text: str, as_json: bool, **options: Any) -> None:
    """exp of the mean negative log-probability of a text's tokens, each given those before it in its window.

    MODEL is what `graphwright generate` takes, or an ONNX file or artifact from tokens (1, s) to logits (1, s, V).
    """
    with progress_bar() as told:
        found = judge_text(model, text, progress=told, **options)
    if as_json:
        print_json(found)
        return
    windows = "a window" if found["windows"] == 1 else f"{found['windows']} windows"
    click.echo(f"perplexity {found['perplexity']:.4f}")
    click.echo(f"{found['predictions']} predictions in {windows} of up to {found['length']} tokens, "
               f"{found['backend']}, {found['seconds']:.1f} s")  # fmt: skip
