"""Real inputs for the models, prepared as each was trained; a sample takes a generator and sizes by word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from . import assets, datasets, tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Feeds = dict[str, NDArray]
    Sizes = Mapping[str, int]

# The opening of Moby-Dick (1851, public domain): long enough for a few hundred tokens without a download.
TEXT = (
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my "
    "purse, and nothing particular to interest me on shore, I thought I would sail about a little and "
    "see the watery part of the world. It is a way I have of driving off the spleen and regulating "
    "the circulation. Whenever I find myself growing grim about the mouth; whenever it is a damp, "
    "drizzly November in my soul; whenever I find myself involuntarily pausing before coffin "
    "warehouses, and bringing up the rear of every funeral I meet; and especially whenever my hypos "
    "get such an upper hand of me, that it requires a strong moral principle to prevent me from "
    "deliberately stepping into the street, and methodically knocking people's hats off, then, I "
    "account it high time to get to sea as soon as I can. This is my substitute for pistol and ball. "
    "With a philosophical flourish Cato throws himself upon his sword; I quietly take to the ship. "
    "There is nothing surprising in this. If they but knew it, almost all men in their degree, some "
    "time or other, cherish very nearly the same feelings towards the ocean with me."
)

_CLASSIFIED_PHOTOS = ("chelsea", "coffee", "rocket", "motorcycle_left", "astronaut")
_PAGE_LINES = ((8, 36), (62, 84), (98, 120))  # first and last row of three lines of the page


def sentences(rng: np.random.Generator, sizes: Sizes) -> Feeds:
    """Tokens of running text for MiniLM. Row 0 fills the sequence, later rows are shorter and padded."""
    batch, sequence = sizes["batch"], sizes["sequence"]
    encoding = tokens.minilm().encode(TEXT).ids
    start, end, body = encoding[0], encoding[-1], np.array(encoding[1:-1])
    input_ids = np.zeros((batch, sequence), np.int64)
    attention_mask = np.zeros((batch, sequence), np.int64)
    for row in range(batch):
        length = sequence if row == 0 else int(rng.integers(max(1, sequence // 4), sequence + 1))
        first = int(rng.integers(len(body)))
        words = np.roll(body, -first)[np.arange(max(0, length - 2)) % len(body)]
        input_ids[row, :length] = [start, *words, end][:length]
        attention_mask[row, :length] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def text_tokens(rng: np.random.Generator, sizes: Sizes) -> Feeds:
    """Tokens of running text for SmolLM2."""
    body = np.array(tokens.smollm2().encode(TEXT).ids, np.int64)
    first = int(rng.integers(len(body)))
    return {"input_ids": np.roll(body, -first)[np.arange(sizes["length"]) % len(body)][None]}


def text_bytes(rng: np.random.Generator, sizes: Sizes) -> Feeds:
    """Bytes of running text for a model whose tokens are the bytes; every row begins elsewhere."""
    body = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int64)
    rows = [np.roll(body, -int(rng.integers(len(body)))) for _ in range(sizes["batch"])]
    return {"input_ids": np.stack(rows)[:, np.arange(sizes["sequence"]) % len(body)]}


def efficientnet_photos(rng: np.random.Generator, sizes: Sizes) -> Feeds:
    """Photos for EfficientNet-Lite0, the first of them the cat."""
    rows = [_CLASSIFIED_PHOTOS[i % len(_CLASSIFIED_PHOTOS)] for i in range(sizes["batch"])]
    return {"image": np.concatenate([efficientnet_image(datasets.photo(name)) for name in rows])}


def efficientnet_image(photo: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(height, width, 3) -> (1, 3, 224, 224): the central square, resized, (rgb - 127) / 128."""
    side = min(photo.shape[:2])
    top, left = (photo.shape[0] - side) // 2, (photo.shape[1] - side) // 2
    square = _resized(photo[top : top + side, left : left + side], 224, 224)
    return _planes((square.astype(np.float32) - 127) / 128)


def noise_images(rng: np.random.Generator, sizes: Sizes) -> Feeds:
    """Standard normal images for models with random weights, which no photo suits better."""
    return {"image": rng.standard_normal((sizes["batch"], 3, 224, 224), np.float32)}


def page_images(rng: np.random.Generator, sizes: Sizes) -> Feeds:
    """The photographed page for the text detector; rows after the first are a little darker each."""
    page = _resized(datasets.page(), sizes["height"], sizes["width"])
    rows = [_ocr_image((page * 0.9**i).astype(np.uint8)) for i in range(sizes["batch"])]
    return {"x": np.concatenate(rows)}


def line_images(rng: np.random.Generator, sizes: Sizes) -> Feeds:
    """Lines of the page for the orientation classifier: upright in even rows, upside down in odd ones."""
    height, width = sizes["height"], sizes["width"]
    rows = []
    for row in range(sizes["batch"]):
        top, bottom = _PAGE_LINES[row // 2 % len(_PAGE_LINES)]
        line = datasets.page()[top:bottom, : (bottom - top) * width // height]
        if row % 2:
            line = line[::-1, ::-1]
        rows.append(ocr_line(line, height, width))
    return {"x": np.concatenate(rows)}


def ocr_line(line: NDArray[np.uint8], height: int, width: int) -> NDArray[np.float32]:
    """(rows, columns, 3) -> (1, 3, height, width) for the orientation classifier: resized, -1 to 1."""
    return _ocr_image(_resized(line, height, width))


def file_bytes(rng: np.random.Generator, sizes: Sizes) -> Feeds:
    """For magika: a Markdown, a JSON and a Python file, in this order and again from the first."""
    folder = assets.find("magika-files")
    files = [folder / name for name in ("README.md", "config.min.json", "magika.py")]
    rows = [magika_features(files[i % len(files)].read_bytes()) for i in range(sizes["batch"])]
    return {"bytes": np.stack(rows)}


def magika_features(content: bytes) -> NDArray[np.int32]:
    """(2048,): the first and last 1024 bytes without white space around them; 256 where there are none."""
    block, side, padding = 4096, 1024, 256
    first, last = content[:block].lstrip()[:side], content[-block:].rstrip()[-side:]
    features = np.full(2 * side, padding, np.int32)
    features[: len(first)] = list(first)
    features[2 * side - len(last) :] = list(last)
    return features


def speech(rng: np.random.Generator, sizes: Sizes) -> Feeds:
    """The first frame of a voice for silero at 16 kHz, with the state it starts from."""
    batch, sequence = sizes["batch"], sizes["sequence"]
    onset = 1024  # where the first syllable is loud
    rows = [voice(rng, onset + sequence)[onset:] for _ in range(batch)]
    return {
        "input": np.stack(rows),
        "sr": np.array(16000, np.int64),
        "state": np.zeros((2, batch, 128), np.float32),
    }


def voice(rng: np.random.Generator, samples: int, rate: int = 16000) -> NDArray[np.float32]:
    """An open vowel at about 120 Hz in four syllables a second, (samples,), within -1 and 1.

    The source-filter picture of speech: harmonics of the voice, weighted by four resonances of the mouth.
    """
    time = np.arange(samples) / rate
    pitch = 120 + 15 * np.sin(2 * np.pi * 3 * time) + 5 * rng.standard_normal()
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    harmonics = np.arange(1, 40)
    resonances = ((700, 110, 1.0), (1200, 120, 0.6), (2600, 160, 0.3), (3500, 200, 0.15))
    weights = sum(gain / (1 + ((harmonics * 120 - centre) / width) ** 2) for centre, width, gain in resonances)
    wave = weights @ np.sin(harmonics[:, None] * phase) * (1 - np.cos(2 * np.pi * 4 * time))
    wave = 0.4 * wave / np.abs(wave).max() + 0.002 * rng.standard_normal(samples)
    return wave.astype(np.float32)


def _resized(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def _ocr_image(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    return _planes((image.astype(np.float32) / 255 - 0.5) / 0.5)


def _planes(image: NDArray[np.floating]) -> NDArray[np.float32]:
    """(height, width, 3) -> (1, 3, height, width)."""
    return np.ascontiguousarray(image.transpose(2, 0, 1)[None], np.float32)
