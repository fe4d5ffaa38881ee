"""What quantization costs in quality, model by model.

    python -m graphwright.tools.bench_dynaquant [--folder DIR] [--only NAME] [--json FILE]

Every model is exported, quantized by `dynaquant` with inputs that it is not judged on, and judged in onnxruntime,
which computes its Q and DQ nodes in float32 here, so that no product of bytes saturates:
EfficientNet-Lite0 by the share of crops of photos on which the first class is the float model's, calibrated on crops
of other photos; MiniLM by Spearman's correlation of the cosines of pairs of sentences with the float model's; SmolLM2
by its perplexity of the beginning of Moby-Dick, calibrated on a later part; a small network by its share of right
digits.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .turns import print_row

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime

    Calibration = dict[str, list[np.ndarray]]

CROPS, PAIRS, TOKENS, WINDOW = 2500, 2000, 2048, 512
PHOTO_CALIBRATION, TEXT_CALIBRATION, DIGIT_CALIBRATION, LINE_CALIBRATION = 64, 8, 128, 64
SKIPPED, LATER = 30_000, 600_000  # characters of Moby-Dick in front of what is judged, and of what is calibrated on
SAME_CLASSES = "dynaquant:narrow_sums=0:flips=0.02"  # few images change their first class
HEADER = ["model", "pass", "judged by", "float", "quantized", "asked for", "", "weights MB", "seconds"]


@dataclass(frozen=True)
class Setting:
    """Passes to try. holds: (float, quantized) -> whether it is what is asked for, which `asked` says in words.
    calibrated: whether they are given inputs."""

    passes: str
    asked: str = "-"
    holds: Callable[[float, float], bool] = lambda old, new: True
    calibrated: bool = True


@dataclass(frozen=True)
class Case:
    """One model and what to try on it. judge: both sessions -> their figures."""

    name: str
    measure: str
    export: Callable[[Path], object]
    calibration: Callable[[], Calibration]
    judge: Callable[[onnxruntime.InferenceSession, onnxruntime.InferenceSession], tuple[float, float]]
    settings: tuple[Setting, ...]


def crops(photos: Sequence[str], count: int, seed: int) -> list[np.ndarray]:
    """Random squares of the photos, four tenths to all of their shorter side, as EfficientNet-Lite0 takes them."""
    import numpy as np
    from graphwright.models import datasets
    from graphwright.models.samples import efficientnet_image

    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        photo = datasets.photo(photos[number % len(photos)])
        side = int(random.uniform(0.4, 1) * min(photo.shape[:2]))
        top, left = (int(random.integers(0, size - side + 1)) for size in photo.shape[:2])
        found.append(efficientnet_image(photo[top : top + side, left : left + side]))
    return found


def agreement(old: onnxruntime.InferenceSession, new: onnxruntime.InferenceSession) -> tuple[float, float]:
    """The share of crops whose first class is the same; of photos that were not calibrated on."""
    from graphwright.models import datasets

    same = [
        int(old.run(None, {"image": one})[0].argmax() == new.run(None, {"image": one})[0].argmax())
        for one in crops(datasets.photo_names()[1::2], CROPS, 7)
    ]
    return 1.0, sum(same) / len(same)


def photo_calibration() -> Calibration:
    from graphwright.models import datasets

    return {"image": crops(datasets.photo_names()[::2], PHOTO_CALIBRATION, 1)}


def line_calibration() -> Calibration:
    """Sentences behind those that are judged."""
    import numpy as np
    from graphwright.models import tokens

    from .recover_minilm import sentences

    lines = sentences(2 * PAIRS + LINE_CALIBRATION, 0)[2 * PAIRS :]
    rows = [np.array([encoding.ids], np.int64) for encoding in tokens.minilm().encode_batch(lines)]
    return {"input_ids": rows, "attention_mask": [np.ones_like(row) for row in rows]}


def ranking(old: onnxruntime.InferenceSession, new: onnxruntime.InferenceSession) -> tuple[float, float]:
    from .recover_minilm import pair_cosines, sentences, spearman

    lines = sentences(2 * PAIRS + LINE_CALIBRATION, 0)[: 2 * PAIRS]
    return 1.0, spearman(pair_cosines(old, lines), pair_cosines(new, lines))


def text_calibration() -> Calibration:
    import numpy as np
    from graphwright.models import datasets, tokens

    text = datasets.moby_dick()[LATER : LATER + 8 * WINDOW * TEXT_CALIBRATION]
    ids = tokens.smollm2().encode(text).ids[: WINDOW * TEXT_CALIBRATION]
    return {"input_ids": list(np.array(ids, np.int64).reshape(-1, 1, WINDOW))}


_PERPLEXITIES: dict[int, float] = {}  # of sessions, by id: the float model is judged once


def perplexities(old: onnxruntime.InferenceSession, new: onnxruntime.InferenceSession) -> tuple[float, float]:
    if id(old) not in _PERPLEXITIES:
        _PERPLEXITIES[id(old)] = perplexity(old)
    return _PERPLEXITIES[id(old)], perplexity(new)


def perplexity(session: onnxruntime.InferenceSession) -> float:
    import numpy as np
    from graphwright.models import datasets, tokens
    from graphwright.runtime.perplexity import measure, token_losses

    def losses(window: Sequence[int]) -> list[np.ndarray]:
        row = np.zeros((1, WINDOW), np.int64)
        row[0, : len(window)] = window
        logits = session.run(None, {"input_ids": row})[0][0]
        return [token_losses(logits[: len(window) - 1], window[1:])]

    ids = tokens.smollm2().encode(datasets.moby_dick()[SKIPPED : SKIPPED + 8 * TOKENS]).ids[:TOKENS]
    return measure(ids, WINDOW, losses).perplexity


def export_digits(path: Path) -> None:
    import torch
    from graphwright.models import digits_cnn, export
    from graphwright.passes import io

    example = (torch.zeros((2, 1, 28, 28)),)
    shape: dict[str, tuple[int | str, ...]] = {"image": ("batch", 1, 28, 28)}
    io.save(export.from_torch("digits", digits_cnn.train(), example, shape, ("logits",)), path)


def digit_calibration() -> Calibration:
    from graphwright.models import digits_cnn

    learned = digits_cnn.split()[0]
    return {"image": [one[None] for one in learned[:: len(learned) // DIGIT_CALIBRATION]]}


def right_digits(old: onnxruntime.InferenceSession, new: onnxruntime.InferenceSession) -> tuple[float, float]:
    from graphwright.models import digits_cnn

    images, labels = digits_cnn.split()[2:]
    first, second = (float((s.run(None, {"image": images})[0].argmax(1) == labels).mean()) for s in (old, new))
    return first, second


def cases() -> list[Case]:
    from functools import partial

    from graphwright.models import registry

    def at_least(limit: float) -> Callable[[float, float], bool]:
        return lambda old, new: new >= limit

    def within(part: float) -> Callable[[float, float], bool]:
        return lambda old, new: new <= old * (1 + part)

    return [
        Case("digits", "right of 1,000", export_digits, digit_calibration, right_digits,
             (Setting("dynaquant", "-0.2 points", lambda old, new: new >= old - 0.002),)),
        Case("efficientnet-lite0", f"same first class of {CROPS:,}", partial(registry.export, "efficientnet-lite0"),
             photo_calibration, agreement,
             (Setting("dynaquant"), Setting(SAME_CLASSES, "97 %", at_least(0.97)))),
        Case("minilm", f"Spearman of {PAIRS:,}", partial(registry.export, "minilm"), line_calibration, ranking,
             (Setting("dynaquant:outputs=sentence_embedding", "0.99", at_least(0.99)),)),
        Case("smollm2", "perplexity", partial(registry.export, "smollm2", length=WINDOW), text_calibration,
             perplexities, (Setting("dynaquant"),
                            Setting("dynaquant:activations=none", "+1 %", within(0.01), calibrated=False),
                            Setting("dynaquant:weights=4:activations=none", "+8 %", within(0.08)))),
    ]  # fmt: skip


def session_of(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """onnxruntime with its optimizations, Q and DQ nodes computed as they stand."""
    from graphwright.passes import io
    from graphwright.runtime.reference import ort_session

    return ort_session(io.load(path), threads=threads, optimized=True)


def measure(case: Case, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each setting of a model. A quantized model that is there is judged again and not made again."""
    from graphwright.runtime import driver

    source = folder / f"{case.name}.onnx"
    if not source.is_file():
        case.export(source)
    old, rows = session_of(source, options.threads), []
    own = [Setting(passes, calibrated=not options.uncalibrated) for passes in options.passes or ()]
    for setting in own or case.settings:
        passes = setting.passes
        budget = "" if options.max_drop is None else f".{options.max_drop:g}"
        budget += "" if setting.calibrated else ".uncalibrated"
        path = folder / f"{case.name}.{passes.replace(':', '_').replace('=', '-')}{budget}.onnx"
        seconds = 0.0
        if not path.is_file():
            start = time.perf_counter()
            driver.optimize(
                source, passes, out=path, calibration=case.calibration() if setting.calibrated else None, verify=False,
                max_drop=options.max_drop, overwrite=True, threads=options.threads or None,
            )  # fmt: skip
            seconds = time.perf_counter() - start
        before, after = case.judge(old, session_of(path, options.threads))
        rows.append({
            "model": case.name, "passes": passes, "measure": case.measure, "float": before, "quantized": after,
            "asked": setting.asked, "holds": setting.holds(before, after), "seconds": seconds,
            "megabytes": [p.stat().st_size / 1e6 for p in (source, path)],
        })  # fmt: skip
        print_row(line(rows[-1]))
    return rows


def line(row: dict[str, Any]) -> list[str]:
    sizes = "{:.1f} -> {:.1f}".format(*row["megabytes"])
    verdict = "" if row["asked"] == "-" else "holds" if row["holds"] else "NOT MET"
    seconds = f"{row['seconds']:.0f}" if row["seconds"] else "-"
    return [row["model"], row["passes"], row["measure"], f"{row['float']:.4f}", f"{row['quantized']:.4f}", row["asked"],
            verdict, sizes, seconds]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("dynaquant"), help="where models are kept")
    parser.add_argument("--only", action="append", metavar="NAME", help="only this model; may be given again")
    parser.add_argument("--passes", action="append", metavar="SPEC", help="in the place of the settings of the table")
    parser.add_argument("--uncalibrated", action="store_true", help="give --passes no inputs")
    parser.add_argument("--max-drop", type=float, metavar="X", help="layers return to float until it holds")
    parser.add_argument("--threads", type=int, default=0, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    print_row(HEADER)
    print_row(["---"] * len(HEADER))
    rows = [
        row
        for case in cases()
        if not options.only or case.name in options.only
        for row in measure(case, options.folder, options)
    ]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
