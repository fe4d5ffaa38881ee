"""What each part of learned quantization brings, at 8, 6 and 4 bits of weights and data.

    python -m graphwright.tools.bench_learned_scales [--folder DIR] [--only MODEL] [--bits N] [--json FILE]

One row for each model and width; plain is quantization after training, then scales, offsets, the modulator of
the gradient and the rounding of weights are learned, one more from column to column. Each cell is the model's
own measure and how far the outputs are above their error, in decibels, both on inputs that nothing was calibrated
on or learned from. Every cell is kept in the folder as soon as it is measured: a run that is interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench_dynaquant import crops, export_digits, session_of
from .turns import print_row

if TYPE_CHECKING:
    import numpy as np

    Arrays = list[np.ndarray]

BITS = (8, 6, 4)
PARTS = {  # column -> options
    "plain": "",
    "scales": ":learn=scales:modulator=0.0",
    "+ offsets": ":learn=scales+offsets:modulator=0.0",
    "+ modulator": ":learn=scales+offsets",
    "+ rounding": ":learn=all",
    "- modulator": ":learn=all:modulator=0.0",
}
WINDOW, WINDOWS, JUDGED_WINDOWS = 64, 320, 256  # bytes of text, samples to learn from, and to judge by
DIGITS, PHOTO_CROPS, JUDGED_CROPS = 500, 96, 150
# First and last rows of lines of the page, to learn from and to judge by, and how many cuttings of them.
LEARNED_LINES, JUDGED_LINES = ((12, 36), (68, 84), (104, 122)), ((48, 64), (86, 102))
CUTTINGS, JUDGED_CUTTINGS = 240, 400


@dataclass(frozen=True)
class Case:
    """One model. feed: its input. learned, judged: samples, and what is judged with. measure: (outputs of float,
    outputs of quantized) -> figure. options: of the training; ranges: of every column."""

    name: str
    measured: str
    feed: str
    export: Callable[[Path], object]
    learned: Callable[[], Arrays]
    judged: Callable[[], Arrays]
    measure: Callable[[np.ndarray, np.ndarray], float]
    options: str
    ranges: str = ""


@lru_cache
def _digits() -> Any:
    from graphwright.models import digits_cnn

    return digits_cnn.split()


def digits_to_learn() -> Arrays:
    learned = _digits()[0]
    return [one[None] for one in learned[:: len(learned) // DIGITS]]


def right(old: np.ndarray, new: np.ndarray) -> float:
    return float((new.argmax(1) == _digits()[3]).mean())


def export_moby(path: Path) -> None:
    import torch
    from graphwright.models import export, gpt_moby, huggingface
    from graphwright.passes import io

    decoder = huggingface.load(gpt_moby.FOLDER).decoder
    example = (torch.zeros((2, WINDOW), dtype=torch.int64),)
    shape: dict[str, tuple[int | str, ...]] = {"input_ids": ("batch", WINDOW)}
    io.save(export.from_torch("gpt-moby", decoder, example, shape, ("logits",)), path)


@lru_cache
def _windows() -> tuple[np.ndarray, np.ndarray]:
    """(n, WINDOW + 1) bytes to learn from, and held out."""
    import numpy as np
    from graphwright.models import gpt_moby

    corpus = gpt_moby.corpus()
    starts = np.random.default_rng(0).integers(0, len(corpus.learned) - WINDOW, WINDOWS)
    rows = corpus.held_out[:, : -(corpus.held_out.shape[1] % (WINDOW + 1)) or None].reshape(-1, WINDOW + 1)
    return corpus.learned[starts[:, None] + np.arange(WINDOW + 1)], rows[:: max(1, len(rows) // JUDGED_WINDOWS)]


def windows_to_learn() -> Arrays:
    return [row[None, :-1].astype("int64") for row in _windows()[0]]


def perplexity(old: np.ndarray, new: np.ndarray) -> float:
    """Of a byte."""
    import numpy as np
    from graphwright.runtime.perplexity import token_losses

    rows = _windows()[1]
    return float(np.exp(np.mean([token_losses(logits, row[1:]) for logits, row in zip(new, rows, strict=True)])))


def photo_crops(judged: bool) -> Arrays:
    from graphwright.models import datasets

    names = datasets.photo_names()
    return crops(names[1::2], JUDGED_CROPS, 7) if judged else crops(names[::2], PHOTO_CROPS, 1)


def same(old: np.ndarray, new: np.ndarray) -> float:
    return float((old.argmax(1) == new.argmax(1)).mean())


def cuttings(lines: Sequence[tuple[int, int]], count: int, seed: int) -> tuple[Arrays, np.ndarray]:
    """Pieces of lines of the page, somewhat moved, darker, paler or noisy, (1, 3, 48, 192); which are upside down."""
    import numpy as np
    from graphwright.models import datasets
    from graphwright.models.samples import ocr_line

    page, random = datasets.page(), np.random.default_rng(seed)
    turned = random.integers(2, size=count)
    found = []
    for number in range(count):
        first, last = lines[number % len(lines)]
        top, bottom = first + int(random.integers(-3, 4)), last + int(random.integers(-3, 4))
        width = int(4 * (bottom - top) * random.uniform(0.6, 1.2))
        left = int(random.integers(0, page.shape[1] - width + 1))
        piece = page[top:bottom, left : left + width].astype(float)
        contrast, light, noise = random.uniform(0.5, 1.2), random.uniform(-40, 40), random.uniform(0, 12)
        piece = (piece - 128) * contrast + 128 + light + random.normal(0, noise, piece.shape)
        piece = piece[::-1, ::-1] if turned[number] else piece
        found.append(ocr_line(np.clip(piece, 0, 255).astype(np.uint8), 48, 192))
    return found, turned


@lru_cache
def _judged_cuttings() -> tuple[Arrays, np.ndarray]:
    return cuttings(JUDGED_LINES, JUDGED_CUTTINGS, 7)


def right_way_up(old: np.ndarray, new: np.ndarray) -> float:
    return float((new.argmax(1) == _judged_cuttings()[1]).mean())


def cases() -> list[Case]:
    from graphwright.models import registry

    return [
        Case("digits", "right", "image", export_digits, digits_to_learn, lambda: [one[None] for one in _digits()[2]],
             right, ":block_steps=120:steps=120:rate=0.003"),
        Case("gpt-moby", "perplexity", "input_ids", export_moby, windows_to_learn,
             lambda: [row[None, :-1].astype("int64") for row in _windows()[1]], perplexity,
             ":block_steps=40:steps=30:batch=8:rate=0.003"),
        Case("ocr-cls", "right", "x", partial(registry.export, "ocr-cls"),
             lambda: cuttings(LEARNED_LINES, CUTTINGS, 1)[0], lambda: _judged_cuttings()[0], right_way_up,
             ":block_steps=30:steps=40:batch=12:rate=0.003"),
        Case("efficientnet-lite0", "same class", "image", partial(registry.export, "efficientnet-lite0"),
             partial(photo_crops, False), partial(photo_crops, True), same,
             ":block_steps=20:steps=0:batch=4:rate=0.001", ":samples=64"),
    ]  # fmt: skip


def outputs(path: Path, feed: str, samples: Arrays, threads: int) -> np.ndarray:
    import numpy as np

    session = session_of(path, threads)
    return np.concatenate([session.run(None, {feed: one})[0] for one in samples])


def measure(case: Case, bits: int, column: str, folder: Path, threads: int, seed: int = 0) -> dict[str, Any]:
    """One cell. seed: of the training."""
    from graphwright.models.trainer import train
    from graphwright.passes.quantize.scales import signal_to_noise
    from graphwright.runtime import driver

    kept = folder / f"{case.name}.{bits}.{column.replace(' ', '')}{f'.{seed}' if seed else ''}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    source = folder / f"{case.name}.onnx"
    if not source.is_file():
        case.export(source)
    passes = f"dynaquant:weights={bits}:activations={bits}:tables=false{PARTS[column]}"
    passes += (case.options if PARTS[column] else "") + case.ranges
    path = kept.with_suffix(".onnx")
    start = time.perf_counter()
    done = driver.optimize(
        source, passes, out=path, calibration={case.feed: case.learned()}, verify=False, overwrite=True,
        seed=seed, threads=threads or None, trainer=train,
        progress=lambda message: print(f"  {message}", file=sys.stderr),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    judged = case.judged()
    old, new = (outputs(one, case.feed, judged, threads) for one in (source, path))
    report = done.reports[-1]
    cell = {
        "model": case.name, "bits": bits, "column": column, "passes": passes, "float": case.measure(old, old),
        "figure": case.measure(old, new), "decibels": signal_to_noise(old, new), "seconds": seconds,
        "layers": sum(change.rule == "layer" for change in report.changes), "stats": dict(report.stats),
    }  # fmt: skip
    kept.write_text(json.dumps(cell, indent=1) + "\n")
    return cell


def line(cells: Sequence[dict[str, Any]]) -> list[str]:
    """A row of the table."""
    first = cells[0]
    begin = [first["model"], str(first["bits"]), str(first["layers"]), f"{first['float']:.4g}"]
    return begin + [f"{cell['figure']:.4g} ({cell['decibels']:.1f} dB)" for cell in cells]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("learned-scales"), help="where models and cells are kept")
    parser.add_argument("--only", action="append", metavar="NAME", help="only this model; may be given again")
    parser.add_argument("--bits", action="append", type=int, choices=BITS, help="only this width; may be given again")
    parser.add_argument("--columns", action="append", choices=list(PARTS), help="only this; may be given again")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the training")
    parser.add_argument("--threads", type=int, default=0, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    columns = options.columns or list(PARTS)
    header = ["model", "bits", "layers", "float", *columns]
    print_row(header)
    print_row(["---"] * len(header))
    rows = []
    for case in cases():
        if options.only and case.name not in options.only:
            continue
        for bits in options.bits or BITS:
            cells = [measure(case, bits, column, options.folder, options.threads, options.seed) for column in columns]
            print_row(line(cells))
            rows += cells
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
