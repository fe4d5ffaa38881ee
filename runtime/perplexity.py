"""How well a language model foresees a text.

Perplexity is exp of the mean negative log-probability of tokens, each given those before it in its window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..passes.errors import InputError, UsageError


@dataclass(frozen=True)
class Perplexity:
    """perplexity: of `predictions` tokens in `windows` windows of up to `length`; loss: mean, in nats."""

    perplexity: float
    loss: float
    tokens: int
    predictions: int
    windows: int
    length: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    ids: Sequence[int], length: int, losses: Callable[[Sequence[int]], Iterable[np.ndarray]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:  # fmt: skip
    """Perplexity of the tokens in windows of `length`, the last of which may be shorter.

    losses: of a window of at least two tokens, the losses of all but the first, in any number of arrays. progress: is
    told how many of the predictions are done. Raises UsageError for a length below 2, InputError for too short a text.
    """
    if length < 2:
        raise UsageError(f"length is {length}; expected at least 2, one token to predict another from")
    windows = [ids[at : at + length] for at in range(0, len(ids), length)]
    windows = [window for window in windows if len(window) > 1]
    total = sum(len(window) - 1 for window in windows)
    if not total:
        raise InputError(f"the text has {len(ids)} token{'' if len(ids) == 1 else 's'}; expected at least 2")
    found: list[float] = []
    for window in windows:
        for part in losses(window):
            found += part.tolist()
            progress(len(found), total)
    loss = math.fsum(found) / total
    # Beyond what a float holds, no model is worse.
    return Perplexity(math.exp(loss) if loss < 700 else math.inf, loss, len(ids), total, len(windows), length)


def token_losses(logits: np.ndarray, targets: Sequence[int]) -> np.ndarray:
    """-log softmax(logits)[target] of each row in float64: logits (n, V), n targets -> (n,)."""
    result = np.empty(len(targets))
    for row, target in enumerate(targets):  # a row at a time: all of them in float64 would not stay in the cache
        wide = logits[row].astype(np.float64)
        largest = wide.max()
        result[row] = largest + math.log(float(np.exp(wide - largest).sum())) - wide[target]
    return result
