"""`graphwright compile`: a model as an artifact, by the exact default passes only."""

from __future__ import annotations

from typing import Any

import click

from .optimize import optimize_model, show
from .shell import Command, format_options, parse_pins, pin_option, threads_option, tune_option, verbosity_options


@click.command(cls=Command, name="compile")
@click.argument("model", metavar="MODEL.onnx|DIR")
@click.option("--target", default="cpu", show_default=True, metavar="NAME", help="`graphwright targets` lists them.")
@click.option("-o", "--output", metavar="DIR", help="Artifact folder; by default MODEL.TARGET beside the model.")
@pin_option
@click.option("--calibration", metavar="FILE.npz|DIR", help="Real inputs for verification.")
@click.option("--report", metavar="FILE.html|.json", help="Write what was done, with numbers before and after.")
@click.option("--overwrite", is_flag=True, help="Replace outputs that exist.")
@click.option("--no-verify", "verify", flag_value=False, type=bool, default=True,
              help="Do not compare the artifact with the model.")  # fmt: skip
@threads_option
@tune_option
@format_options
@verbosity_options
def command(pins: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Compile MODEL.onnx for a target. The same as optimize --target without further passes.

    DIR is a folder that `graphwright export` wrote; both of its models are compiled into another such folder.
    """
    from .config import Settings

    show(optimize_model(Settings(**given, pin=parse_pins(pins))), as_json)
