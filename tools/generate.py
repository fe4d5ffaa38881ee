"""`graphwright generate`: text from a language model, as it comes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from graphwright.passes.errors import InputError, UsageError

from .generators import capacity_option
from .shell import Command, count_of, progress, threads_option, verbosity, verbosity_options

if TYPE_CHECKING:
    from graphwright.runtime.generator import Stats


def generate_text(
    model: str, prompt: str, write: Callable[[str], None], *, backend: str | None = None, threads: int | None = None,
    capacity: int | None = None, chat: bool = False, **options: Any,
) -> tuple[Stats, int]:  # fmt: skip
    """Write the text behind the prompt piece by piece; return its figures and the capacity. capacity: of a model that
    is exported first.

    `options` are those of `Generator.tokens`. Raises a GraphwrightError.
    """
    from graphwright.runtime.generator import Generator, checked_options
    from graphwright.runtime.tvm_import import runtime_alone

    from .generators import ready

    checked_options(**options)  # before minutes of compilation
    folder = ready(model, backend, threads, capacity)
    runtime_alone()
    generator = Generator(folder, threads=threads, backend=backend)
    pieces = generator.generate(prompt, chat=chat, **options)
    with progress() as say:
        say("load")
        generator.load()
    for piece in pieces:
        write(piece)
    return generator.stats, generator.capacity


def read_prompt(prompt: str | None, file: str | None) -> str:
    """The prompt that was given: itself, of standard input for "-", or of a file. Raises UsageError, InputError."""
    if (prompt is None) == (file is None):
        raise UsageError("give one of --prompt TEXT (- for standard input) and --prompt-file FILE")
    if file is None and prompt != "-":
        return prompt or ""
    where = file or "standard input"
    try:
        data = sys.stdin.buffer.read() if file is None else Path(file).read_bytes()
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: cannot be read as text ({error}); expected UTF-8") from error


def figures(stats: Stats) -> str:
    """One line of speed."""
    line = f"{count_of(stats.prompt_tokens, 'token')} of prompt, {stats.first_token_seconds * 1e3:.1f} ms to the first"
    line += f" token; {count_of(stats.tokens, 'token')}"
    return line if stats.tokens_per_second is None else f"{line}, {stats.tokens_per_second:.1f} tokens per second"


@click.command(cls=Command, name="generate")
@click.argument("model", metavar="MODEL")
@click.option("-p", "--prompt", metavar="TEXT", help="What the text begins with; - reads it from standard input.")
@click.option("--prompt-file", metavar="FILE", help="Read the prompt from a file.")
@click.option("-n", "--max-tokens", type=int, default=128, show_default=True, help="Tokens to generate at most.")
@click.option("--temperature", type=float, default=0.0, show_default=True,
              help="0 takes the likeliest token; 1 draws from the model's distribution.")  # fmt: skip
@click.option("--top-k", type=int, default=0, show_default=True, help="Draw from the K likeliest tokens; 0: from all.")
@click.option("--top-p", type=float, default=1.0, show_default=True,
              help="Draw from the fewest tokens that have this share of the probability.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws.")
@click.option("--chat", is_flag=True, help="The prompt is a message, written by the model's chat template.")
@click.option("--backend", type=click.Choice(["tvm", "onnxruntime"]),
              help="tvm where the folder is compiled and for what is kept in the cache, unless given.")  # fmt: skip
@capacity_option
@threads_option
@verbosity_options
def command(model: str, prompt: str | None, prompt_file: str | None, **options: Any) -> None:
    """Continue a text, token by token, on stdout; speed goes to stderr.

    MODEL is a folder that `graphwright export` or `compile` made, or a name (smollm2, gpt-moby), a .gguf file or a
    Hugging Face folder: these are exported and compiled on first use, and kept in the cache.
    """
    written = False

    def write(piece: str) -> None:
        nonlocal written
        written = True
        click.echo(piece, nl=False)

    try:
        stats, capacity = generate_text(model, read_prompt(prompt, prompt_file), write, **options)
    finally:
        if written:
            click.echo()
    if verbosity() >= 0:
        if stats.ended == "capacity":
            click.echo(f"stopped: the cache is full ({capacity} tokens); export with --capacity for more", err=True)
        click.echo(figures(stats), err=True)
