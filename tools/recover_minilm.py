"""How well MiniLM recovers from another attention: the ranking of sentence pairs, before and after.

`python -m graphwright.tools.recover_minilm` exports MiniLM, replaces its attention by softplus attention or, with
`--pass`, by another, in the layers that `layers=auto` chooses and in all, and lets it learn from unlabelled sentences
(State of the Union addresses and Moby-Dick). On pairs of sentences that nothing was learned from, the cosines of the
result are ranked against the original's: Spearman's correlation. It can be interrupted and started again: what is
finished is read from the folder, what is not goes on from its checkpoint.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .shell import Command, print_table, progress, verbosity_options

if TYPE_CHECKING:
    import numpy as np

EMBEDDING = "sentence_embedding"
WORDS = (5, 20)  # of a sentence, fewest and most
BATCH = 32


def sentences(count: int, seed: int) -> list[str]:
    """Different sentences of the texts, drawn at random. Raises AssetError when they are not fetched."""
    import random

    from graphwright.models import datasets

    text = " ".join([*datasets.state_of_the_union().values(), datasets.moby_dick()])
    found = dict.fromkeys(" ".join(part.split()) for part in re.split(r"(?<=[.!?;])\s+", text))
    fitting = [line for line in found if WORDS[0] <= len(line.split()) <= WORDS[1]]
    random.Random(seed).shuffle(fitting)
    if len(fitting) < count:
        raise click.UsageError(f"the texts hold {len(fitting)} sentences, {count} are asked for")
    return fitting[:count]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of the ranks of two lists of numbers; equal numbers share their mean rank."""
    import numpy as np

    def ranks(x: np.ndarray) -> np.ndarray:
        _, places, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[places]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def cosines(model: Path, lines: list[str]) -> np.ndarray:
    """The cosine of each pair of neighbours in `lines`, by onnxruntime."""
    import onnxruntime

    return pair_cosines(onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"]), lines)


def pair_cosines(session: Any, lines: list[str]) -> np.ndarray:
    """The same by a session."""
    import numpy as np
    from graphwright.models import tokens

    vectors = []
    for at in range(0, len(lines), BATCH):
        rows = [encoding.ids for encoding in tokens.minilm().encode_batch(lines[at : at + BATCH])]
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for row, given in zip(ids, rows, strict=True):
            row[: len(given)] = given
        mask = np.array([[i < len(given) for i in range(ids.shape[1])] for given in rows]).astype(np.int64)
        vectors.append(session.run([EMBEDDING], {"input_ids": ids, "attention_mask": mask})[0])
    whole = np.concatenate(vectors)
    return (whole[::2] * whole[1::2]).sum(-1)


def recover(folder: Path, name: str, layers: str, options: str, seed: int, lines: list[str]) -> dict[str, Any]:
    """Learn with that pass and these layers, unless that is done, and measure. Raises a GraphwrightError."""
    from graphwright.passes.weights import load_weights
    from graphwright.runtime import driver

    from .config import Settings
    from .optimize import optimize_file

    model, out = folder / "minilm.onnx", folder / f"{name}.{layers}.onnx"
    result = out.with_suffix(".json")
    if not (result.is_file() and out.is_file()):
        spec = f"{name}:layers={layers}:outputs={EMBEDDING}{options}"
        done = optimize_file(
            Settings(
                model=str(model), passes=spec, output=str(out), calibration=str(folder / "sentences.txt"), seed=seed,
                overwrite=True,
            )
        )  # fmt: skip
        result.write_text(json.dumps(done["passes"][-1]["stats"]))
    weights = load_weights(out.with_name(f"{out.name}.{name}.npz"))
    raw = out.with_suffix(".raw.onnx")
    if not raw.is_file():
        numbers = "+".join(str(n) for n, site in enumerate(attention_sites(model, name)) if site in weights.sites)
        # The record is the name with the options that the operator depends on.
        text = f"{weights.record}:layers={numbers}:recover=none"
        driver.optimize(model, text, out=raw, verify=False, overwrite=True)
    original = cosines(model, lines)
    return {
        **json.loads(result.read_text()),
        "layers": layers,
        "replaced": len(weights.sites),
        "before": spearman(original, cosines(raw, lines)),
        "after": spearman(original, cosines(out, lines)),
    }


def attention_sites(model: Path, name: str) -> list[str]:
    """The attentions of the model in the order in which the pass numbers them."""
    from graphwright.runtime import driver

    result = driver.optimize(model, f"{name}:recover=none", dry_run=True)
    return [change.value for change in result.reports[-1].changes]


@click.command(cls=Command, name="recover_minilm")
@click.option("--folder", default="recover", show_default=True, help="Where everything is kept.")
@click.option("--pass", "name", default="softplus-attention", show_default=True, help="Which learned pass.")
@click.option("--layers", default="auto,all", show_default=True, help="What to replace, one run each.")
@click.option("--sentences", "count", default=20000, show_default=True, help="Sentences to learn from.")
@click.option("--pairs", default=2000, show_default=True, help="Pairs of other sentences to rank.")
@click.option("--options", default="", metavar="key=value:...", help="Further options of the pass.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "file", metavar="FILE", help="Write the figures there.")
@verbosity_options
def command(
    folder: str, name: str, layers: str, count: int, pairs: int, options: str, seed: int, file: str | None
) -> None:  # fmt: skip
    """Recover MiniLM from another attention and print how it ranks held-out pairs of sentences."""
    from graphwright.models import registry

    from .shell import write_json

    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    lines = sentences(count + 2 * pairs, seed)
    text = "\n".join(lines[2 * pairs :]) + "\n"
    if not (place / "sentences.txt").is_file() or (place / "sentences.txt").read_text() != text:
        for old in place.glob("*.json"):
            old.unlink()
        (place / "sentences.txt").write_text(text)
    if not (place / "minilm.onnx").is_file():
        registry.export("minilm", place / "minilm.onnx")
    found = []
    for one in layers.split(","):
        with progress() as say:
            say(f"{name}:layers={one}")
        found.append(recover(place, name, one, f":{options}" if options else "", seed, lines[: 2 * pairs]))
    print_table(
        ("layers", "replaced", "Spearman before", "after", "1 - cosine before", "after", "minutes"),
        [
            (one["layers"], one["replaced"], f"{one['before']:.4f}", f"{one['after']:.4f}",
             f"{one['drop_before']:.4f}", f"{one['drop']:.4f}", f"{one['seconds'] / 60:.1f}")
            for one in found
        ],
        title=f"{name}: {pairs} pairs of sentences, {count} to learn from, {os.cpu_count()} processors",
        right=("replaced", "Spearman before", "after", "1 - cosine before", "minutes"),
    )  # fmt: skip
    if file:
        write_json(found, file)


if __name__ == "__main__":
    command()
