"""The parts of the recovery script that need no training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from graphwright.tools.recover_minilm import WORDS, sentences, spearman


def test_ranks_are_compared_and_not_numbers() -> None:
    x = np.array([0.1, 0.5, 0.3, 0.9])
    assert spearman(x, np.exp(9 * x)) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    assert spearman(np.array([1.0, 2, 2, 3]), np.array([1.0, 3, 2, 4])) == pytest.approx(0.9486833)


@pytest.mark.assets
def test_sentences_are_different_and_follow_from_the_seed(fetched: Callable[[str], None]) -> None:
    for name in ("sotu", "moby-dick"):
        fetched(name)
    found = sentences(500, 1)
    assert found == sentences(500, 1) != sentences(500, 2)
    assert len(set(found)) == 500
    assert all(WORDS[0] <= len(line.split()) <= WORDS[1] for line in found)
