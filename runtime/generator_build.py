"""A generator folder made of another one: both graphs rewritten or compiled, and checked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..passes import shared_weights
from ..passes.errors import InputError, OutputError, UsageError
from . import sharing
from .artifact import Workplace
from .decoders import OnnxruntimeDecoder
from .generator_folder import DECODE, DESCRIPTION, PARTS, PREFILL, TOKENIZER, WEIGHTS, GeneratorFolder
from .target import Target

ONE_MODEL = ("pins", "checks", "learned", "dry_run")
CALIBRATION_LENGTH = 512  # tokens of a calibration sample, if the cache holds so many
READ_TOKENS = 64  # of the text that the cache of a check comes from
LENGTHS = (40, 7)  # of prefill's calls in a check

Feeds = dict[str, list[np.ndarray]]
Written = TypeVar("Written")


def check_feeds(folder: GeneratorFolder, threads: int | None = None, seed: int = 0) -> dict[str, Feeds]:
    """Part -> input name -> two samples that it is checked with: for prefill of two lengths, the second of which fills
    the cache to its last row.

    The cache is what the model made of random tokens, over and over: numbers that no text gives, such as random ones,
    are numbers that rounding errors can grow on from layer to layer.
    """
    rng, about = np.random.default_rng(seed), folder.about
    c = about.capacity
    past = {f"past_{name}": [rows, rows] for name, rows in _read_cache(folder, threads, rng).items()}
    found: dict[str, Feeds] = {}
    for part, lengths in ((PREFILL, [min(length, c) for length in LENGTHS]), (DECODE, [about.decode_tokens] * 2)):
        positions = [min(c // 4, c - lengths[0]), c - lengths[1]]
        found[part] = {
            "input_ids": [rng.integers(0, about.vocabulary, (1, length)) for length in lengths],
            "position": [np.array([position]) for position in positions],
            **past,
        }
    found[PREFILL]["wanted"] = [np.array([ids.shape[1] - 1]) for ids in found[PREFILL]["input_ids"]]
    found[PREFILL]["wanted"][1] = np.array([0, min(LENGTHS[1], c) - 1])
    return found


def _read_cache(folder: GeneratorFolder, threads: int | None, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A full cache: the rows of READ_TOKENS random tokens, repeated."""
    count = min(READ_TOKENS, folder.about.capacity)
    decoder = OnnxruntimeDecoder(folder, threads)
    decoder.extend(rng.integers(0, folder.about.vocabulary, count).tolist(), 0, [count - 1])
    places = np.arange(folder.about.capacity) % count
    return {name: np.take(rows, places, 2) for name, rows in decoder.cache().items()}


def text_samples(folder: GeneratorFolder, path: Path) -> Feeds:
    """Input name of prefill -> samples: windows of a text, each read into an empty cache.

    Raises InputError for a file that is no text or holds less than a window.
    """
    if path.suffix != ".txt":
        raise InputError(f"{path}: is no .txt file; a generator is calibrated on a text")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}); expected UTF-8") from error
    length = min(CALIBRATION_LENGTH, folder.about.capacity)
    ids = np.array(folder.tokenizer().encode(text, add_special_tokens=False).ids, np.int64)
    count = len(ids) // length
    if not count:
        raise InputError(f"{path}: holds {len(ids)} tokens; expected {length} or more, the length of a sample")
    empty = np.zeros(folder.about.cache_shape, np.float32)
    return {
        "input_ids": list(ids[: count * length].reshape(count, 1, length)),
        "position": [np.zeros(1, np.int64)] * count,
        "wanted": [np.arange(length)] * count,
        **{f"past_{name}": [empty] * count for name in folder.about.cache_names},
    }


def replayed(pipeline: str) -> dict[str, Any]:
    """Options with which decode becomes what prefill became by this pipeline: what was learned of one is taken for the
    other, so that they go on sharing their weights."""
    return {"passes": pipeline, "preset": "none", "calibration": None, "max_drop": None}


def rewrite(
    source: GeneratorFolder, out: Path, optimize: Callable[[str, Path], Written], *, compiles: bool,
    overwrite: bool = False,
) -> dict[str, Written]:  # fmt: skip
    """Make another generator of one, part by part, whole or not at all, and return what `optimize` says of each.

    optimize: writes a part to where its result goes. compiles: the results are artifacts. Raises OutputError, and what
    `optimize` raises.
    """
    if out.exists() and os.path.samefile(out, source.root):
        raise OutputError(f"{out}: is read by this run and will not be replaced; choose another output")
    with Workplace(out, overwrite, DESCRIPTION, "a generator") as folder:
        done = {part: optimize(part, folder / (part if compiles else f"{part}.onnx")) for part in PARTS}
        if compiles:
            sharing.share_weights(folder, PARTS)
        else:
            shared_weights.share_weights([folder / f"{part}.onnx" for part in PARTS], folder / WEIGHTS)
        for name in (DESCRIPTION, TOKENIZER):
            shutil.copyfile(source.root / name, folder / name)
    return done


def compile_generator(
    path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *, target: str | Target = "cpu",
    overwrite: bool = False, calibration: str | os.PathLike[str] | None = None, **options: Any,
) -> GeneratorFolder:  # fmt: skip
    """`driver.optimize` on both graphs of a generator in ONNX form, with its options but for those of ONE_MODEL.

    out: by default beside the folder, with the target's name behind its own. calibration: a text (.txt), on whose
    windows prefill is calibrated; decode takes over what was learned, which is in files called after `out`.

    Raises what reading, rewriting and compiling raise, UsageError for a compiled folder; then nothing is left behind.
    """
    from . import driver

    if not isinstance(calibration, str | os.PathLike | None):
        raise UsageError(f"calibration is {type(calibration).__name__}; a generator takes the path of a .txt file")
    for name in ONE_MODEL:
        if options.get(name):
            raise UsageError(f"{name} is for one model; a generator's parts have inputs of their own")
    source = GeneratorFolder.load(path)
    if source.compiled:
        raise UsageError(f"{path}: is compiled; give the folder that `graphwright export` wrote")
    if out is None:
        whole = source.root.absolute()
        out = whole.with_name(f"{whole.name}.{target if isinstance(target, str) else target.name}")

    def optimize(part: str, to: Path) -> driver.Result:
        given = {"calibration": samples, **options}
        if samples is not None and part == DECODE:
            given |= replayed(pipelines[PREFILL])
        result = driver.optimize(
            source.model(part), out=to, target=target, checks=feeds[part], learned=Path(out), **given
        )
        pipelines[part] = str(result.pipeline)
        return result

    pipelines: dict[str, str] = {}
    samples = None if calibration is None else text_samples(source, Path(calibration))
    feeds = check_feeds(source, options.get("threads"))
    rewrite(source, Path(out), optimize, compiles=True, overwrite=overwrite)
    return GeneratorFolder.load(out)
