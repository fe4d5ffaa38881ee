"""`graphwright config-schema`: the JSON Schema of a --config file."""

from __future__ import annotations

import click

from .shell import Command, print_json


@click.command(cls=Command, name="config-schema")
def command() -> None:
    """Print the JSON Schema of the file that `optimize --config FILE.yaml` reads, for editors and checks."""
    from .config import schema

    print_json(schema())
