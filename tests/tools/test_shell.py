"""How commands start and end: quickly, in one line, with the right exit code."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from graphwright.passes.errors import BudgetError, ModelError, UsageError, VerificationError
from graphwright.tools import shell
from graphwright.tools.cli import COMMANDS, main, optimize

Cli = Callable[..., Result]
HEAVY = ("tvm", "torch", "onnxruntime", "onnx", "onnx_ir", "numpy", "pydantic", "rich")


def python(code: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, **options
    )


START = "import sys; from graphwright.tools.cli import {name}; {name}(sys.argv[1:])"


@pytest.mark.parametrize("name", ["optimize", "main"])
def test_help_answers_in_under_three_tenths_of_a_second(name: str) -> None:
    """Processor time, start of the interpreter included: the wall clock also counts the tests running beside."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = python(START.format(name=name), "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert done.returncode == 0 and "Usage:" in done.stdout
    assert min(seconds) < 0.3, seconds


def test_no_command_at_all_shows_the_help() -> None:
    done = python(START.format(name="main"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("Usage: ") and "\nCommands:\n" in done.stderr and "error" not in done.stderr


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, atexit; from graphwright.tools.cli import optimize\n"
    code += "atexit.register(lambda: print('LOADED', *sys.modules)); optimize(['--help'])"
    loaded = python(code).stdout.partition("LOADED ")[2].split()
    assert "click" in loaded
    assert not set(HEAVY) & set(loaded)


def test_passes_never_import_a_compiler_or_a_runtime() -> None:
    code = (
        "import sys, importlib; from graphwright.passes.registry import PASSES\n"
        "[importlib.import_module(home.partition(':')[0]) for home in PASSES.values()]\n"
        "import graphwright.passes.pipeline, graphwright.passes.io; print('LOADED', *sys.modules)"
    )
    done = python(code)
    loaded = done.stdout.partition("LOADED ")[2].split()
    assert "onnx_ir" in loaded, done.stderr
    assert not {"tvm", "torch", "onnxruntime"} & set(loaded)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(cli: Cli, name: str) -> None:
    assert cli(name, "--help").stdout.startswith("Usage: ")


def test_the_overview_lists_every_command(cli: Cli) -> None:
    text = cli("--help").stdout
    assert all(re.search(rf"^  {name} ", text, re.M) for name in COMMANDS)


def test_a_misspelt_command_is_recognised(cli: Cli) -> None:
    assert cli("optimise", expect=2).stderr == "error: no command 'optimise'; did you mean optimize?\n"


def test_an_unknown_command_lists_the_known(cli: Cli) -> None:
    assert "no command 'xyzzy'; known: optimize, compile" in cli("xyzzy", expect=2).stderr


def test_a_misspelt_option_is_recognised(cli: Cli) -> None:
    assert cli("optimize", "m.onnx", "--tagret", "cpu", expect=2).stderr == (
        "error: no option '--tagret'; did you mean --target?\n"
    )


def test_an_option_unlike_any_points_to_the_help(cli: Cli) -> None:
    assert cli("optimize", "m.onnx", "--xyzzy", expect=2).stderr == (
        "error: no option '--xyzzy'; see `graphwright optimize --help`\n"
    )


def test_names_in_snake_case_are_accepted(cli: Cli, model: Path) -> None:
    cli("config_schema")
    cli("optimize", model, "--preset", "none", "--dry_run", "--passes", "dead_code")


def test_misspelt_values_are_recognised(cli: Cli, model: Path) -> None:
    for option, value, hint in (
        ("--passes", "simplfy", "unknown pass 'simplfy'; did you mean simplify?"),
        ("--preset", "compil", "unknown preset 'compil'; did you mean compile?"),
        ("--target", "arm46", "unknown target 'arm46'; did you mean arm64"),
        ("--passes", "fold-constants:max_byte=1", "fold-constants has no option 'max_byte'; did you mean max_bytes?"),
    ):
        assert hint in cli("optimize", model, option, value, expect=2).stderr


@click.command(cls=shell.Command)
@click.argument("kind")
def failing(kind: str) -> None:
    errors = {
        "usage": UsageError("no such thing"),
        "model": ModelError("found this;\nexpected that"),
        "verification": VerificationError("differs"),
        "budget": BudgetError("too much"),
        "interrupt": KeyboardInterrupt(),
        "defect": ZeroDivisionError("ours"),
        "end": EOFError("ours too"),
    }
    raise errors[kind]


@pytest.mark.parametrize(
    ("kind", "code", "line"),
    [
        ("usage", 2, "no such thing"),
        ("model", 1, "found this; expected that"),
        ("verification", 3, "differs"),
        ("budget", 4, "too much"),
        ("interrupt", 130, "interrupted"),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(kind: str, code: int, line: str) -> None:
    result = CliRunner().invoke(failing, [kind])
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.strip() == f"error: {line}"


@pytest.mark.parametrize(("kind", "error"), [("defect", ZeroDivisionError), ("end", RuntimeError)])
def test_our_own_defects_keep_their_traceback(kind: str, error: type[Exception]) -> None:
    result = CliRunner().invoke(failing, [kind])
    assert isinstance(result.exception, error)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_cleanly_and_leaves_nothing(tmp_path: Path, number: int, code: int) -> None:
    """A command that is writing when the signal comes removes what it has written."""
    script = f"""
import click, pathlib, time
from graphwright.passes import io
from graphwright.tools import shell

@click.command(cls=shell.Command)
def slow():
    with io.replacing(pathlib.Path({str(tmp_path / "out")!r})) as temporary:
        temporary.write_text("half")
        print("writing", flush=True)
        time.sleep(60)

slow()
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "writing\n"
    child.send_signal(number)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == code
    assert "Traceback" not in stderr
    assert not list(tmp_path.iterdir())


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = START.format(name="main")
    child = subprocess.Popen(
        [sys.executable, "-c", code, "config-schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait(60) in (0, shell.PIPE_CLOSED)


def test_pins_are_read() -> None:
    assert shell.parse_pins(["x=1x3X8", "a=b=4", "y=2,5"]) == {"x": (1, 3, 8), "a=b": (4,), "y": (2, 5)}


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        (["x"], r"--pin 'x' names no input; write --pin NAME=1x3x224x224"),
        (["x=1xN"], r"--pin x: 'n' in '1xN' is not a size"),
        (["x=1", "x=2"], r"--pin 'x' is given twice"),
    ],
)
def test_pins_that_are_none(pins: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        shell.parse_pins(pins)


def test_tables_are_plain_when_not_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    shell.print_table(("name", "n"), [("[bold]", 1), ("b", 22)], right=("n",))
    assert capsys.readouterr().out == "name     n\n[bold]   1\nb       22\n"


def test_tables_on_a_terminal_are_drawn_and_obey_no_color() -> None:
    """In a pseudo-terminal, so that rich decides as it does for a user."""
    pty = pytest.importorskip("pty")
    code = "from graphwright.tools.shell import print_table; print_table(('name',), [('[bold]x',)], title='T')"
    main_end, child_end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": "1"}
    child = subprocess.Popen([sys.executable, "-c", code], stdout=child_end, env=environment)
    os.close(child_end)
    assert child.wait(60) == 0
    text = os.read(main_end, 1 << 16).decode()
    os.close(main_end)
    assert "[bold]x" in text and "─" in text
    assert not re.search(r"\x1b\[[0-9;]*[34][0-9]m", text)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (18_500_000, "18.5 MB"), (2.5e9, "2.5 GB")]
)
def test_sizes(count: float, text: str) -> None:
    assert shell.as_bytes(count) == text


def test_both_entry_points_are_one_command() -> None:
    assert main.get_command(click.Context(main), "optimize") is optimize
