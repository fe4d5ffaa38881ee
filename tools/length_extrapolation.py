"""How softmax attention and LSSAR do on texts longer than those they were trained on.

`python -m graphwright.tools.length_extrapolation` trains two small decoders over bytes that differ in their attention
alone (State of the Union addresses and Moby-Dick), exports them, compiles them, and prints their loss on held-out text
in windows of 1, 2, 4, 8 and 16 times the training length. All lengths predict the same bytes. Losses are measured with
the compiled artifact; on some of the text torch and onnxruntime compute them too, at the first and the last length.
It can be interrupted and started again: what is finished is read from the folder, training goes on from its checkpoint.

Source: Gao and Spratling, "Softplus Attention with Re-weighting", arXiv 2501.13428.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .shell import Command, print_table, progress, verbosity_options

if TYPE_CHECKING:
    import numpy as np
    from graphwright.models.tiny_lm import TinyLM
    from graphwright.models.tiny_lm_training import Corpus, Plan
    from numpy.typing import NDArray

    Logits = Callable[[NDArray[np.int64]], NDArray[np.float32]]
    Say = Callable[[str], None]

FACTORS = (1, 2, 4, 8, 16)
CHECKED = (FACTORS[0], FACTORS[-1])
PASSES = "fused-attention,recognise-softplus-attention"
MOST_GROWTH, LEAST_GROWTH = 0.05, 0.30  # at the last length: what LSSAR may lose, and what softmax loses more than
POSITIVE = click.IntRange(1)


def text() -> bytes:
    """The addresses in the order of their years, then Moby-Dick. Raises AssetError when they are not fetched."""
    from graphwright.models import datasets

    return "\n".join([*datasets.state_of_the_union().values(), datasets.moby_dick()]).encode()


def export(model: TinyLM, file: Path) -> None:
    """Write the model as ONNX, any batch and any length up to its positions."""
    import onnx_ir as ir
    import torch
    from graphwright.models.export import from_torch

    made = from_torch(
        f"tiny-lm-{model.sizes.attention}",
        model,
        (torch.ones((2, 8), dtype=torch.int64),),
        {"input_ids": ("batch", "sequence")},
        ("logits",),
        largest={"sequence": model.sizes.positions},
    )
    ir.save(made, file)


def runs(folder: Path, model: TinyLM, threads: int, say: Say) -> dict[str, Logits]:
    """The model in torch, its export in onnxruntime, and the artifact: name -> logits of ids."""
    import onnxruntime
    from graphwright.models.tiny_lm_training import in_torch
    from graphwright.runtime import driver
    from graphwright.runtime.session import Session

    name = model.sizes.attention
    file, artifact = folder / f"{name}.onnx", folder / name
    say(f"{name}: export and compile")
    export(model, file)
    driver.optimize(file, PASSES, target="cpu", out=artifact, overwrite=True, threads=threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    reference = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    session = Session(artifact, threads=threads)
    return {
        "torch": in_torch(model),
        "onnxruntime": lambda ids: reference.run(["logits"], {"input_ids": ids})[0],
        "artifact": lambda ids: session.run(["logits"], {"input_ids": ids})[0],
    }


def measure(folder: Path, plan: Plan, corpus: Corpus, checked: int, threads: int, say: Say) -> dict[str, Any]:
    """Train, unless that is done, and the losses at every length. `checked`: stretches for all three runtimes."""
    from graphwright.models import tiny_lm_training

    from .shell import write_json

    name = plan.sizes.attention
    checkpoint, file = folder / f"{name}.pt", folder / f"{name}.json"
    key = {"plan": repr(plan), "held_out": list(corpus.held_out.shape), "checked": checked}
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if known.get("key") != key:
        known = {"key": key, "attention": name, "length": plan.length, "loss": {}, "tail": {}, "check": {}}
    if len(known["loss"]) == len(FACTORS) and len(known["check"]) == len(CHECKED):
        return known
    model = tiny_lm_training.train(plan, corpus, checkpoint, lambda message: say(f"{name} {message}"))
    known["minutes"] = tiny_lm_training.seconds_spent(checkpoint) / 60
    known["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    by = runs(folder, model, threads, say)
    for factor in FACTORS:
        if str(factor) in known["loss"]:
            continue
        length = factor * plan.length
        say(f"{name}: loss in windows of {length} bytes")
        if factor in CHECKED:
            part = corpus.held_out[:checked]
            known["check"][factor] = {
                runtime: tiny_lm_training.loss_at(run, part, length, plan.length)[0] for runtime, run in by.items()
            }
        known["loss"][factor], known["tail"][factor] = tiny_lm_training.loss_at(
            by["artifact"], corpus.held_out, length, plan.length
        )
        write_json(known, str(file))
        known = json.loads(file.read_text())  # keys of JSON are text
    return known


def growth(found: dict[str, Any], factor: int, key: str = "loss") -> float:
    """By what share the loss at `factor` times the training length is above that at the training length."""
    return float(found[key][str(factor)] / found[key][str(FACTORS[0])] - 1)


def show(results: list[dict[str, Any]], stretches: int) -> None:
    """The table, how far the runtimes agree, and whether LSSAR keeps its loss where softmax does not."""
    rows = [
        (found["attention"], f"{factor}x", factor * found["length"], f"{found['loss'][str(factor)]:.4f}",
         f"{growth(found, factor):+.1%}", f"{found['tail'][str(factor)]:.4f}", f"{growth(found, factor, 'tail'):+.1%}")
        for found in results
        for factor in FACTORS
    ]  # fmt: skip
    length = results[0]["length"]
    print_table(
        ("attention", "length", "bytes", "loss", "growth", f"last {length}", "growth of it"),
        rows,
        title=f"Loss in nats a byte on {stretches * FACTORS[-1] * length:,} held-out bytes, trained at {length}",
        right=("length", "bytes", "loss", "growth", f"last {length}", "growth of it"),
    )
    for found in results:
        for factor, losses in found["check"].items():
            each = ", ".join(f"{runtime} {loss:.6f}" for runtime, loss in losses.items())
            click.echo(f"{found['attention']} at {factor}x on {found['key']['checked']} stretches: {each}")
        trained = f"{found['parameters']:,} parameters, trained in {found['minutes']:.0f} minutes"
        click.echo(f"{found['attention']}: {trained}")
    by = {found["attention"]: growth(found, FACTORS[-1]) for found in results}
    if len(by) == len(results) > 1:
        kept = by["lssar"] <= MOST_GROWTH and by["softmax"] > LEAST_GROWTH
        click.echo(
            f"{'met' if kept else 'not met'}: at {FACTORS[-1]}x the loss of lssar is {by['lssar']:+.1%} (at most "
            f"{MOST_GROWTH:+.0%}), that of softmax {by['softmax']:+.1%} (above {LEAST_GROWTH:+.0%})"
        )


def plot(results: list[dict[str, Any]], file: str) -> None:
    """The losses over the length as an SVG."""
    from .chart import line_chart
    from .shell import write_text

    lines = {found["attention"]: [found["loss"][str(factor)] for factor in FACTORS] for found in results}
    labels = [f"{factor}x ({factor * results[0]['length']})" for factor in FACTORS]
    title = "Loss on held-out text (nats a byte) by length of the window (times the training length, bytes)"
    write_text(line_chart(title, labels, lines), Path(file), overwrite=True)


@click.command(cls=Command, name="length_extrapolation")
@click.option("--folder", default="extrapolation", show_default=True, help="Where everything is kept.")
@click.option("--attention", type=click.Choice(["softmax", "lssar", "both"]), default="both", show_default=True)
@click.option("--length", type=POSITIVE, default=128, show_default=True, help="Bytes of a window in training.")
@click.option("--steps", type=POSITIVE, default=1200, show_default=True)
@click.option("--batch", type=POSITIVE, default=8, show_default=True, help="Windows of a step.")
@click.option("--power", type=click.IntRange(1, 64), default=15, show_default=True, help="Of lssar's re-weighting.")
@click.option("--layers", type=POSITIVE, default=4, show_default=True)
@click.option("--width", type=click.IntRange(2), default=192, show_default=True, help="A multiple of twice the heads.")
@click.option("--heads", type=POSITIVE, default=3, show_default=True)
@click.option("--stretches", type=POSITIVE, default=32, show_default=True, help="Held-out pieces of 16 windows each.")
@click.option("--checked", type=POSITIVE, default=2, show_default=True, help="Pieces that all runtimes compute.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--threads", type=POSITIVE, default=1, show_default=True)
@click.option("--plot", "picture", metavar="FILE.svg", help="Draw the losses.")
@click.option("--json", "file", metavar="FILE", help="Write the figures there.")
@verbosity_options
def command(
    folder: str, attention: str, length: int, steps: int, batch: int, power: int, layers: int, width: int, heads: int,
    stretches: int, checked: int, seed: int, threads: int, picture: str | None, file: str | None,
) -> None:  # fmt: skip
    """Train small decoders with softmax and LSSAR at one length and print their losses at up to 16 times that."""
    from graphwright.models import tiny_lm, tiny_lm_training
    from graphwright.passes.errors import InputError

    from .shell import write_json

    if width % (2 * heads):
        raise click.BadParameter(f"{width} is no multiple of {2 * heads}, twice the heads", param_hint="'--width'")
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror}); give another --folder") from error
    tiny_lm_training.use_threads(threads)
    corpus = tiny_lm_training.Corpus.of(text(), stretches, FACTORS[-1] * length + 1)
    results = []
    for name in tiny_lm.ATTENTIONS if attention == "both" else (attention,):
        sizes = tiny_lm.Sizes(
            name, positions=FACTORS[-1] * length, width=width, layers=layers, heads=heads, power=power
        )
        plan = tiny_lm_training.Plan(sizes, length, steps, batch, seed=seed)
        with progress() as say:
            results.append(measure(place, plan, corpus, checked, threads, say))
    show(results, stretches)
    if file:
        write_json(results, file)
    if picture:
        plot(results, picture)


if __name__ == "__main__":
    command()
