"""Choosing the next token from logits: greedily, or at random by temperature, top-k and top-p.

The order is that of Hugging Face's transformers: temperature, then the k most likely, then of those the fewest whose
probabilities add up to p. Source of top-p: Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv
1904.09751. Legend: vocabulary V, candidates K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from ..passes.errors import ModelError, UsageError


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 takes the most likely token, 1 draws from the model's own distribution. top_k: how many tokens are
    drawn from, 0 for all. top_p: the share of the probability that they must have, at most 1. seed: of the draws.

    Raises UsageError for a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature}; expected a number of at least 0 (0: greedy)")
        if self.top_k < 0:
            raise UsageError(f"top-k is {self.top_k}; expected at least 0 (0: all tokens)")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p is {self.top_p}; expected more than 0 and at most 1 (1: off)")
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}; expected at least 0")


@dataclass
class Sampler:
    """Draws tokens one after the other; the same seed and logits give the same tokens."""

    sampling: Sampling
    _random: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.sampling.seed)

    def choose(self, logits: np.ndarray, top_logits: np.ndarray, top_tokens: np.ndarray) -> int:
        """logits (V,), the K largest of them in falling order (K,), and their tokens (K,).

        Raises ModelError when the logits are no distribution.
        """
        if not math.isfinite(float(top_logits[0])):
            raise ModelError(f"the model's largest logit is {top_logits[0]}; expected a finite number")
        if self.sampling.temperature == 0:
            return int(top_tokens[0])
        tokens, probabilities = candidates(self.sampling, logits, top_logits, top_tokens)
        reached = np.cumsum(probabilities)
        at = int(np.searchsorted(reached, self._random.random() * reached[-1], side="right"))
        return int(tokens[min(at, int(np.flatnonzero(probabilities)[-1]))])


def candidates(
    sampling: Sampling, logits: np.ndarray, top_logits: np.ndarray, top_tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that may be drawn, and their probabilities in float64, which add up to 1; temperature above 0.

    The likelier tokens come first unless all of them may be drawn. All logits are looked at only where the K largest
    do not say enough.
    """
    wanted, share = min(sampling.top_k, len(logits)), sampling.top_p
    if wanted == 0 and share == 1:
        weights = _weights(logits, top_logits[0], sampling.temperature)
        return np.arange(len(logits)), weights / weights.sum()
    tokens, likely = top_tokens, _weights(top_logits, top_logits[0], sampling.temperature)
    total = math.nan
    if wanted == 0:  # a share of all, which the K largest may have
        total = float(_weights(logits, top_logits[0], sampling.temperature).sum())
    if wanted > len(top_tokens) or (wanted == 0 and likely.sum() < share * total):
        tokens = np.argsort(-logits, kind="stable")
        likely = _weights(logits[tokens], top_logits[0], sampling.temperature)
    if wanted:
        tokens, likely = tokens[:wanted], likely[:wanted]
        total = float(likely.sum())
    if share < 1:
        count = int(np.searchsorted(np.cumsum(likely), share * total)) + 1
        tokens, likely = tokens[:count], likely[:count]
    return tokens, likely / likely.sum()


def _weights(logits: np.ndarray, largest: float, temperature: float) -> np.ndarray:
    """exp((logits - largest) / temperature) in float64."""
    with np.errstate(over="ignore"):  # far below the largest is -inf at a small temperature, which is a weight of 0
        return np.exp((logits.astype(np.float64) - float(largest)) / temperature)
