"""How far a learned model is from its original: which samples are not learned from, and what is measured on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from .errors import PassError
from .graph import is_op

MOST_JUDGED = 256  # samples that quality is measured on
EVERY = 10  # of so many samples one is held out
WORD_MASK = "attention_mask"  # the input by which language models leave out padding, as tokenizers call it


def held_out(count: int) -> list[int]:
    """Indices of the samples that nothing is learned from; of fewer than ten, none."""
    return list(range(EVERY - 1, count, EVERY))


def judged(count: int) -> list[int]:
    """Indices of the samples that quality is measured on: those held out, or all when none are."""
    return (held_out(count) or list(range(count)))[:MOST_JUDGED]


def caches(model: ir.Model) -> set[str]:
    """Outputs that hold what a model is given again, with a few rows replaced: the rows show in what it makes of them.
    """
    made = {value.name or "": value.producer() for value in model.graph.outputs}
    return {
        name
        for name, node in made.items()
        if node is not None and is_op(node, "TensorScatter") and node.inputs[0] in model.graph.inputs
    }


def outputs_that_count(model: ir.Model, asked: Sequence[str]) -> tuple[str, ...]:
    """The outputs that an option names, or all of floats. Raises PassError for a name that is none of these."""
    floats = [v.name or "" for v in model.graph.outputs if v.dtype is None or v.dtype.is_floating_point()]
    for name in asked:
        if name not in floats:
            raise PassError(f"outputs={name} is not an output of floats; expected some of {', '.join(floats)}")
    return tuple(asked or floats)


def counts(value: Any) -> bool:
    """Whether an output is judged: an array of floats with rows."""
    floats = isinstance(value, np.ndarray) and (value.dtype.kind == "f" or value.dtype.name == "bfloat16")
    return floats and value.ndim > 0


def rows_that_count(feeds: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray | None:
    """bool, shape[:-1]: rows of an output that are not padding. None: all are."""
    mask = feeds.get(WORD_MASK)
    if mask is None or tuple(mask.shape) != tuple(shape[:-1]):
        return None
    return np.asarray(mask) != 0


def cosine_drop(expected: np.ndarray, found: np.ndarray, rows: np.ndarray | None = None) -> float:
    """1 - the mean cosine of the rows (last axis) of two arrays; two rows of zeros are equal."""
    a, b = (x.astype(np.float64).reshape(-1, x.shape[-1] if x.ndim else 1) for x in (expected, found))
    if rows is not None:
        a, b = a[rows.reshape(-1)], b[rows.reshape(-1)]
    if not a.size:
        return 0.0
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    equal = (a == b).all(-1)
    cosine = np.where(equal, 1.0, (a * b).sum(-1) / np.where(norms > 0, norms, 1.0))
    return float(1 - cosine.mean())


class Drops:
    """The mean drop of each output over samples."""

    def __init__(self) -> None:
        self._found: dict[str, list[float]] = {}

    def add(self, name: str, expected: np.ndarray, found: np.ndarray, feeds: Mapping[str, Any]) -> None:
        """Take in one output of one sample, whose feeds say which rows count."""
        drop = cosine_drop(expected, found, rows_that_count(feeds, expected.shape))
        self._found.setdefault(name, []).append(drop)

    def means(self) -> dict[str, float]:
        return {name: float(np.mean(drops)) for name, drops in self._found.items()}
