"""Trains gpt-moby, the GPT-2 over bytes that comes with graphwright: `python -m graphwright.tools.train_gpt_moby`.

The same seed, text and number of threads give the same weights. An interrupted run goes on from its checkpoints,
which are beside the folder.
"""

from __future__ import annotations

from pathlib import Path

import click
from graphwright.passes.errors import OutputError

from .shell import Command, progress, verbosity_options


@click.command(cls=Command)
@click.option("-o", "--output", required=True, metavar="DIR", help="Folder for config, weights and tokenizer.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Of torch; another number gives other last digits.")
@click.option("--overwrite", is_flag=True, help="Replace the files of a folder that exists.")
@verbosity_options
def command(output: str, threads: int, overwrite: bool) -> None:
    """Train gpt-moby on Moby-Dick and write it as a Hugging Face folder."""
    folder = Path(output)
    if folder.exists() and not overwrite:
        raise OutputError(f"{folder}: already exists; give --overwrite to replace it or -o to write elsewhere")
    from graphwright.models import gpt_moby
    from graphwright.models.tiny_lm_training import use_threads

    use_threads(threads)
    with progress() as say:
        loss, seconds = gpt_moby.make(folder, say)
    click.echo(f"{folder}: {loss:.3f} nats a byte on held-out text, {seconds / 60:.0f} min")


if __name__ == "__main__":
    command()
