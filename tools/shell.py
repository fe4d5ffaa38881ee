"""What all commands share: how errors end, where output goes, and the options that many of them have.

Results go to stdout, log and progress to stderr. A user's mistake ends in one line `error: ...` and its exit code, a
defect of graphwright in its traceback. Only click and the standard library are imported here.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import click
from graphwright.passes.errors import GraphwrightError, UsageError

log = logging.getLogger("graphwright")

F = TypeVar("F", bound=Callable[..., Any])

INTERRUPTED, TERMINATED, PIPE_CLOSED = 130, 143, 141  # 128 + the signal's number, as shells say it
VERBOSITY = "graphwright.verbosity"
CONTEXT_SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "max_content_width": 110,
}


class _Clean:
    """Gives a click command our way of ending."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        run = functools.partial(super().main, *args, standalone_mode=False, **extra)  # type: ignore[misc]  # a mixin
        if not standalone_mode:
            return run()
        sys.exit(_ended(run))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)  # type: ignore[misc]  # a mixin
        except BrokenPipeError:  # click would turn it into exit code 1
            raise click.exceptions.Exit(_drop_stdout()) from None
        except EOFError as error:  # click would take it for the end of typed input; nothing here asks for any
            raise RuntimeError("unexpected end of data") from error


def _ended(run: Callable[[], Any]) -> int:
    """Run a command and return its exit code, with errors written to stderr."""
    if threading.current_thread() is threading.main_thread():
        # Unwinding removes what is half written.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(TERMINATED))
    try:
        code = run()
        sys.stdout.flush()
        return code if isinstance(code, int) and not isinstance(code, bool) else 0
    except BrokenPipeError:
        return _drop_stdout()
    except GraphwrightError as error:
        return fail(str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.UsageError as error:
        return fail(_usage(error), error.exit_code)
    except click.Abort:
        return fail("interrupted", INTERRUPTED)
    except click.ClickException as error:
        return fail(error.format_message(), error.exit_code)


def fail(message: str, code: int) -> int:
    """Write the one line of an error and return the exit code."""
    click.echo("error: " + " ".join(message.split()), err=True)
    return code


def _drop_stdout() -> int:
    """The reader of our output went away: write no more, also not at exit."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stdout.fileno() == 1:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return PIPE_CLOSED


def _usage(error: click.UsageError) -> str:
    """click's message as ours: one line, with the closest option and where the help is."""
    ctx = error.ctx
    where = f"; see `{ctx.command_path} --help`" if ctx else ""
    if isinstance(error, click.NoSuchOption) and ctx:
        names = [name for option in ctx.command.get_params(ctx) for name in (*option.opts, *option.secondary_opts)]
        long = [name[2:] for name in names if name.startswith("--")]
        close = [f"--{name}" for name in get_close_matches(error.option_name.lstrip("-"), long, 3, 0.6)]
        hint = f"; did you mean {' or '.join(close)}?" if close else where
        return f"no option {error.option_name!r}{hint}"
    return error.format_message().rstrip(".") + where


class Command(_Clean, click.Command):
    """A click command that ends our way."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        attributes["context_settings"] = {**CONTEXT_SETTINGS, **(attributes.get("context_settings") or {})}
        super().__init__(*args, **attributes)


class Group(_Clean, click.Group):
    """A click group that ends our way and knows what a misspelt command was meant to be."""

    command_class = Command

    def __init__(self, *args: Any, **attributes: Any) -> None:
        attributes["context_settings"] = {**CONTEXT_SETTINGS, **(attributes.get("context_settings") or {})}
        super().__init__(*args, **attributes)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        word = args[0]
        name = word.replace("_", "-")
        if not word.startswith("-") and name not in (known := self.list_commands(ctx)):
            close = get_close_matches(name, known, 3, 0.6)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
            raise click.UsageError(f"no command {word!r}; {hint}")
        return super().resolve_command(ctx, args)


# --- options that many commands have -----------------------------------------------------------------------------


def verbosity_options(function: F) -> F:
    """-v and -q. They set up the log on stderr before the command runs."""

    def verbose(ctx: click.Context, option: click.Parameter, count: int) -> None:
        _set_up(ctx, ctx.meta.get(VERBOSITY, 0) + count)

    def quiet(ctx: click.Context, option: click.Parameter, given: bool) -> None:
        _set_up(ctx, ctx.meta.get(VERBOSITY, 0) - given)

    function = click.option(
        "-q", "--quiet", is_flag=True, expose_value=False, callback=quiet, help="Only errors on stderr."
    )(function)
    return click.option(
        "-v", "--verbose", count=True, expose_value=False, callback=verbose,
        help="Say what happens; -vv says more, -v also shows every site.",
    )(function)  # fmt: skip


def _set_up(ctx: click.Context, level: int) -> None:
    ctx.meta[VERBOSITY] = level
    levels = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}
    log.setLevel(levels.get(level, logging.DEBUG if level > 0 else logging.ERROR))
    for handler in [h for h in log.handlers if isinstance(h, _Stderr)]:
        log.removeHandler(handler)
    log.addHandler(_Stderr())
    log.propagate = level > 1
    if level < 1:
        # Notes of the libraries underneath are not addressed to the user of a command.
        root = logging.getLogger()
        if not root.handlers:
            root.addHandler(logging.NullHandler())
        if not sys.warnoptions:
            warnings.simplefilter("ignore")


class _Stderr(logging.Handler):
    """Writes to whatever stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        click.echo(f"{level}{record.getMessage()}", err=True)


def verbosity() -> int:
    """-1 quiet, 0 usual, 1 and above verbose."""
    ctx = click.get_current_context(silent=True)
    return int(ctx.meta.get(VERBOSITY, 0)) if ctx else 0


def format_options(function: F) -> F:
    """--format table|json and its short form --json; the command gets `as_json`."""

    @click.option("--format", "format_", type=click.Choice(["table", "json"]), default="table",
                  show_default=True, help="How to print the result.")  # fmt: skip
    @click.option("--json", "json_", is_flag=True, help="The same as --format json.")
    @functools.wraps(function)
    def with_format(*args: Any, format_: str, json_: bool, **options: Any) -> Any:
        return function(*args, as_json=json_ or format_ == "json", **options)

    return with_format  # type: ignore[return-value]  # the wrapper takes two more options


def pin_option(function: F) -> F:
    return click.option(
        "--pin", "pins", multiple=True, metavar="NAME=SHAPE",
        help="Fix the shape of an input, as in --pin images=1x3x224x224. May be repeated.",
    )(function)  # fmt: skip


def threads_option(function: F) -> F:
    return click.option(
        "--threads", type=click.IntRange(min=1), help="Threads of every run; by default all processors."
    )(function)


class AtLeastZero(click.FloatRange):
    """A number of at least zero."""

    def __init__(self) -> None:
        super().__init__(min=0)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if number != number:
            self.fail(f"{value!r} is not in the range x>=0.", param, ctx)
        return number


tune_option = click.option(
    "--tune", type=AtLeastZero(), metavar="MINUTES",
    help="Measure tiles of kernels for so long and compile with the best; 0: use what earlier runs found.",
)  # fmt: skip


def parse_pins(pins: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """`["x=1x3", "y=4"]` -> `{"x": (1, 3), "y": (4,)}`. Raises UsageError for anything else."""
    shapes: dict[str, tuple[int, ...]] = {}
    for text in pins:
        name, equals, written = text.rpartition("=")
        if not equals or not name:
            raise UsageError(f"--pin {text!r} names no input; write --pin NAME=1x3x224x224")
        if name in shapes:
            raise UsageError(f"--pin {name!r} is given twice; give one shape an input")
        shapes[name] = parse_shape(written, f"--pin {name}")
    return shapes


def parse_shape(text: str, where: str) -> tuple[int, ...]:
    """`1x3x224x224` (or with commas) as a tuple. `where` names the option in an error."""
    parts = text.lower().replace(",", "x").split("x")
    for part in parts:
        if not part.strip().isdecimal():
            raise UsageError(f"{where}: {part!r} in {text!r} is not a size; write sizes as in 1x3x224x224")
    return tuple(int(part) for part in parts)


# --- output ------------------------------------------------------------------------------------------------------


def print_json(data: Any) -> None:
    """`data` as JSON on stdout."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def write_json(data: Any, path: str, overwrite: bool = True) -> None:
    """`data` as a JSON file, whole or not at all; `-` is stdout."""
    if path == "-":
        print_json(data)
        return
    write_text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", Path(path), overwrite)


def write_text(text: str, path: Path, overwrite: bool) -> None:
    """Write a text file, whole or not at all. Raises OutputError."""
    from graphwright.passes import io

    io.check_output(path, overwrite)
    with io.replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "", right: Sequence[str] = ()
) -> None:
    """A table on stdout: drawn by rich on a terminal, aligned plain text elsewhere. `right`: columns of numbers."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        _rich_table(columns, cells, title, right)
        return
    if title:
        click.echo(title)
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    for row in [list(columns), *cells]:
        padded = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        click.echo("  ".join(padded).rstrip())


def _rich_table(columns: Sequence[str], cells: list[list[str]], title: str, right: Sequence[str]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    Console().print(table)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that says on stderr what is being done: a spinner on a terminal, lines with -v, else nothing."""
    start = time.perf_counter()
    if verbosity() > 0:
        yield lambda message: click.echo(f"{time.perf_counter() - start:8.2f} s  {message}", err=True)
    elif verbosity() < 0 or not sys.stderr.isatty():
        yield lambda message: None
    else:
        from rich.console import Console
        from rich.markup import escape

        with Console(stderr=True).status("") as status:
            yield lambda message: status.update(escape(message))


def as_bytes(count: int | float | None) -> str:
    """12345678 -> "12.3 MB"."""
    if count is None:
        return ""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{int(count)} B"


def as_error(value: float | None) -> str:
    """An error measure with two digits."""
    return "" if value is None else f"{value:.1e}"


def as_shape(shape: Sequence[Any] | None) -> str:
    """[1, "n", None] -> "1 x n x ?"; no dimensions: "scalar"."""
    if shape is None:
        return "?"
    return " x ".join("?" if dim is None else str(dim) for dim in shape) or "scalar"


def count_of(number: int, noun: str) -> str:
    """(2, "node") -> "2 nodes"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
