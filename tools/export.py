"""`graphwright export`: a language model as a generator folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .shell import Command, as_bytes, count_of, progress, verbosity_options


def export_generator(
    model: str,
    out: Path,
    *,
    capacity: int | None = None,
    decode_tokens: int = 1,
    weights: str = "float32",
    overwrite: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Write `out`, whole or not at all, and return its description, which is generator.json.

    model: a name of `generators.NAMED`, a .gguf file or a Hugging Face folder. capacity: None for 2048, or the
    model's positions if they are fewer. Raises UsageError, ModelError, AssetError or OutputError.
    """
    import json

    from graphwright.models import generators
    from graphwright.passes.io import check_output
    from graphwright.runtime.artifact import Workplace

    check_output(out, overwrite)
    say(f"read {model}")
    checkpoint = generators.open_model(model)
    with Workplace(out, overwrite, mark=generators.DESCRIPTION, what="a generator") as folder:
        generators.write(checkpoint, folder, capacity=capacity, decode_tokens=decode_tokens, weights=weights, say=say)
    return json.loads((out / generators.DESCRIPTION).read_text(encoding="utf-8"))


@click.command(cls=Command)
@click.argument("model", metavar="NAME|FILE.gguf|DIR")
@click.option("-o", "--output", required=True, metavar="DIR", help="The generator folder.")
@click.option("--capacity", type=click.IntRange(2), metavar="N",
              help="Tokens that prompt and answer may have together; 2048, or the model's positions if they are fewer.")
@click.option("--decode-tokens", type=click.IntRange(1), default=1, show_default=True, metavar="M",
              help="Tokens of a decode call; more than 1 to verify guesses.")
@click.option("--weights", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", show_default=True,
              help="The type that matrices are stored in; they are computed with in float32.")
@click.option("--overwrite", is_flag=True, help="Replace a generator folder that exists.")
@verbosity_options
def command(
    model: str, output: str, capacity: int | None, decode_tokens: int, weights: str, overwrite: bool
) -> None:  # fmt: skip
    """Write a language model as a generator folder: prefill and decode in ONNX, weights, tokenizer.

    NAME is smollm2 or gpt-moby. DIR is a Hugging Face folder: config.json, safetensors, tokenizer.json.
    """
    out = Path(output)
    with progress() as say:
        about = export_generator(
            model, out, capacity=capacity, decode_tokens=decode_tokens, weights=weights, overwrite=overwrite, say=say
        )
    size = sum(file.stat().st_size for file in out.iterdir())
    click.echo(f"{out}: {about['architecture']}, {count_of(about['layers'], 'layer')}, {about['vocabulary']} tokens, "
               f"capacity {about['capacity']}, {as_bytes(size)}")  # fmt: skip
