"""A cache changes what is computed again, not what is computed: both graphs equal the model over the whole text."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphwright.models import generators
from graphwright.passes.errors import UsageError

torch = pytest.importorskip("torch")
from graphwright.models import decoding  # noqa: E402 -- needs torch

from . import decoders  # noqa: E402 -- needs torch

pytestmark = pytest.mark.torch
CAPACITY, VERIFIED = 24, 4
LIMIT = 1e-5  # of the largest logit: float32 sums in another order
TEXT = np.random.default_rng(1).integers(0, 256, CAPACITY)


@pytest.fixture(scope="module", params=list(decoders.DECODERS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, Path]:
    """Logits of the model without a cache for TEXT, (s, V), and the exported folder."""
    model = decoders.DECODERS[request.param]()
    folder = tmp_path_factory.mktemp(request.param)
    with torch.inference_mode():
        logits = model(torch.from_numpy(TEXT)[None])[0].numpy()
    generators.write(decoders.checkpoint(model), folder, capacity=CAPACITY, decode_tokens=VERIFIED)
    return logits, folder


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    error = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"largest error {error:.1e} of the largest logit, limit {LIMIT}")
    assert error <= LIMIT


@pytest.mark.parametrize("cuts", [[0, 24], [0, 1, 24], [0, 1, 2, 3], [0, 7, 19, 24], [0, 23, 24]])
def test_prefill_in_chunks_equals_the_whole_text(cuts: list[int], pair: tuple[np.ndarray, Path]) -> None:
    """Single tokens, a chunk behind a cache, and the last row of the cache are among them."""
    logits, folder = pair
    generator = decoders.Exported(folder)
    past = generator.empty()
    for first, end in itertools.pairwise(cuts):
        results, past = generator.call(TEXT[first:end], first, past, range(end - first))
        assert_close(results["logits"][0], logits[first:end])


@pytest.mark.parametrize("first", [1, 9, CAPACITY - VERIFIED])
def test_decode_of_several_tokens_verifies_them_at_once(first: int, pair: tuple[np.ndarray, Path]) -> None:
    logits, folder = pair
    generator = decoders.Exported(folder)
    _, past = generator.call(TEXT[:first], 0, generator.empty(), [0])
    results, _ = generator.call(TEXT[first : first + VERIFIED], first, past)
    assert_close(results["logits"][0], logits[first : first + VERIFIED])


def test_rows_behind_the_filled_ones_do_not_matter(pair: tuple[np.ndarray, Path]) -> None:
    """A cache may hold anything there: what a longer text, or guesses that were wrong, left behind."""
    logits, folder = pair
    generator = decoders.Exported(folder)
    past = {name: np.full_like(rows, 1e3) for name, rows in generator.empty().items()}
    results, past = generator.call(TEXT[:5], 0, past, [4])
    assert_close(results["logits"][0], logits[4:5])
    results, past = generator.call(TEXT[5:9], 5, past)
    assert_close(results["logits"][0], logits[5:9])


def test_logits_are_those_that_are_wanted_with_the_best_in_order(pair: tuple[np.ndarray, Path]) -> None:
    logits, folder = pair
    generator = decoders.Exported(folder)
    results, past = generator.call(TEXT[:6], 0, generator.empty(), [5, 0, 5])
    assert_close(results["logits"][0], logits[[5, 0, 5]])
    order = np.argsort(-results["logits"][0], axis=-1, kind="stable")[:, : decoding.CANDIDATES]
    np.testing.assert_array_equal(results["top_tokens"][0], order)
    np.testing.assert_array_equal(results["top_logits"][0], np.take_along_axis(results["logits"][0], order, axis=-1))
    assert all((rows[:, :, 6:] == 0).all() and rows[:, :, :6].any() for rows in past.values())


def test_torch_computes_the_cached_graph_too() -> None:
    """The custom operators have values of their own, which is what greedy text of torch comes from."""
    model = decoders.DECODERS["grouped"]()
    step = decoding.Decode(model, CAPACITY)
    past = step.empty()
    with torch.inference_mode():
        expected = model(torch.from_numpy(TEXT)[None])[0].numpy()
        for place, token in enumerate(TEXT):
            logits, _, _, *past = step(torch.tensor([[token]]), torch.tensor([place]), tuple(past))
            assert_close(logits[0].numpy(), expected[place : place + 1])


def test_heads_stay_grouped_and_tables_are_constants(pair: tuple[np.ndarray, Path]) -> None:
    _, folder = pair
    for file in (generators.PREFILL, generators.DECODE):
        model = onnx.load(folder / file)
        onnx.checker.check_model(model)
        kinds = [node.op_type for node in model.graph.node]
        assert kinds.count("Attention") == 2 and kinds.count("TensorScatter") == 4
        assert not {"Expand", "Tile", "Cos", "Sin", "Trilu", "Softmax"} & set(kinds)
        assert [v.name for v in model.graph.output][:3] == ["logits", "top_logits", "top_tokens"]


def test_learned_positions_bound_the_capacity() -> None:
    with pytest.raises(UsageError, match="capacity is 25, but the model has learned 24 positions; give no more"):
        decoding.Decode(decoders.DECODERS["learned"](), 25)
