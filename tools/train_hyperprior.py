"""Trains the image codec that comes with graphwright: `python -m graphwright.tools.train_hyperprior`.

The same seed, photos and number of threads give the same weights. An interrupted run goes on from its checkpoint,
which is beside the file.
"""

from __future__ import annotations

from pathlib import Path

import click
from graphwright.passes.errors import OutputError

from .shell import Command, progress, verbosity_options


@click.command(cls=Command)
@click.option("-o", "--output", required=True, metavar="FILE", help="Weights, in safetensors.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Of torch; another number gives other last digits.")
@click.option("--overwrite", is_flag=True, help="Replace a file that exists.")
@verbosity_options
def command(output: str, threads: int, overwrite: bool) -> None:
    """Train the hyperprior codec on photos and write its weights."""
    path = Path(output)
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: already exists; give --overwrite to replace it or -o to write elsewhere")
    from graphwright.models import hyperprior, hyperprior_training
    from graphwright.models.tiny_lm_training import use_threads

    use_threads(threads)
    checkpoint = path.with_name(f"{path.name}.checkpoint")
    with progress() as say:
        model = hyperprior_training.train(hyperprior_training.Plan(), checkpoint, say)
    hyperprior.save(model, path)
    click.echo(f"{path}: {hyperprior_training.seconds_spent(checkpoint) / 60:.0f} min")


if __name__ == "__main__":
    command()
