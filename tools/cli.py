"""The entry points `optimize` and `graphwright`. A command's module is imported when the command is used."""

from __future__ import annotations

import importlib

import click

from graphwright import __version__

from .optimize import command as optimize
from .shell import Group

# Each is a module of this package that holds a click command called `command`, and the line it has in the overview.
COMMANDS = {
    "optimize": "Rewrite a model with passes and, with --target, compile it.",
    "compile": "Compile a model with the exact default passes only.",
    "export": "Write a language model as a generator folder: prefill, decode, tokenizer.",
    "generate": "Continue a text with a language model, token by token.",
    "perplexity": "How well a language model foresees a text.",
    "run": "Run an artifact or an ONNX model on inputs from a file.",
    "compare": "Are two models the same function? Exit 3 if they are not.",
    "bench": "Time a model against onnxruntime or another model.",
    "doctor": "What stands between a model and a target, and what cures it.",
    "explain": "Why a pass fires or does not, site by site.",
    "passes": "List the passes, or show one in full.",
    "targets": "List the targets, or show one in full.",
    "models": "List, fetch, export and inspect models.",
    "config-schema": "The JSON Schema of a --config file.",
}


class _Commands(Group):
    """The commands of COMMANDS, imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        key = name.replace("_", "-")
        if key not in COMMANDS:
            return None
        return importlib.import_module(f"graphwright.tools.{key.replace('-', '_')}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, name="graphwright")
@click.version_option(__version__, prog_name="graphwright")
def main() -> None:
    """Rewrite ONNX models with passes taken from research, compile them with TVM, prove the result.

    Exit codes: 0 ok, 1 a mistake or unusable input, 2 usage, 3 verification failed, 4 a budget is not met.
    """


__all__ = ["COMMANDS", "main", "optimize"]
