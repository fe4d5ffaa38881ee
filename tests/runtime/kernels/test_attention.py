"""Fused attention against NumPy in float64: layouts, masks, boundaries of every tile, few queries and many."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from graphwright.runtime.target import Target
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.tvm

# Of the output's scale. Scores of 30 are 2e-6 apart in float32, and the exponential carries that over.
TOLERANCE = 1e-5
X86 = ["cpu-avx512", "cpu-avx2", "cpu-baseline"]
WIDE = [*X86[:2], pytest.param(X86[2], marks=pytest.mark.slow)]
INF = np.float32(np.inf)

Arrays = dict[str, np.ndarray]


def spec(**fields: Any) -> Any:
    from graphwright.runtime.kernels.attention_spec import AttentionSpec, Causal, Layout, Mask

    kinds = {"causal": Causal, "mask": Mask, "q": Layout, "k": Layout, "v": Layout, "y": Layout}
    fields = {name: kinds[name](value) if isinstance(value, str) else value for name, value in fields.items()}
    return AttentionSpec(**{"heads": 2, "head_size": 16, "scale": 0.25, **fields})


@functools.cache
def kernel(target: Target, description: Any, threads: int = 1) -> Callable[..., Any]:
    import tvm
    from graphwright.runtime.codegen import machine_code
    from graphwright.runtime.kernels.attention import attention

    function = attention(description, target.isa, target.caches, threads, "attention")
    return machine_code(tvm.IRModule({"attention": function}), target)["attention"]


def draw(description: Any, batch: int = 1, queries: int = 0, keys: int = 0, seed: int = 0) -> Arrays:
    """q, k, v as (batch, heads, sequence, size), and a mask. The numbers stand where the spec leaves a size open."""
    s = description
    random = np.random.default_rng(seed)
    b, nq, nk = s.batch or batch, queries if s.queries is None else s.queries, keys if s.keys is None else s.keys

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    arrays = {
        "q": normal(b, s.heads, nq, s.head_size),
        "k": normal(b, s.kv_heads, nk, s.head_size),
        "v": normal(b, s.kv_heads, nk, s.value_size),
    }
    has_b, has_h, has_q = s.mask_axes
    shape = (b if has_b else 1, s.heads if has_h else 1, nq if has_q else 1, nk)
    if s.mask.value == "added":
        arrays["mask"] = normal(*shape)
    elif s.mask.value == "keep":
        arrays["mask"] = random.random(shape) < 0.7
    if s.lengths:
        arrays["lengths"] = random.integers(0, nk + 1, b)
    return arrays


def laid_out(x: np.ndarray, places: Any) -> np.ndarray:
    """(batch, heads, sequence, size) in another layout."""
    layout = places.value
    if layout == "columns":
        b, heads, length, size = x.shape
        y = np.full((b, length, places.pitch), np.nan, np.float32)
        for h in range(heads):
            at = places.first + h * places.step
            y[..., at : at + size] = x[:, h]
        return y
    orders = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3), "bsm": (0, 2, 1, 3), "bhds": (0, 1, 3, 2)}
    y = np.ascontiguousarray(x.transpose(orders[layout]))
    return y.reshape(*y.shape[:2], -1) if layout == "bsm" else y


def run(target: Target, description: Any, arrays: Arrays, threads: int = 1) -> np.ndarray:
    """The kernel's output as (batch, heads, query, size)."""
    import tvm

    s = description
    inputs = [laid_out(arrays[name], getattr(s, name)) for name in "qkv"]
    inputs += [arrays[name] for name in ("mask", "lengths") if name in arrays]
    b, h, nq, _ = arrays["q"].shape
    # What is left of this value was not written.
    y = tvm.runtime.tensor(laid_out(np.full((b, h, nq, s.value_size), 12345.0, np.float32), s.y))
    kernel(target, s, threads)(*(tvm.runtime.tensor(a) for a in inputs), y)
    result = y.numpy()
    if s.y.value == "bsm":
        result = result.reshape(b, nq, h, -1)
    return result if s.y.value == "bhsd" else result.transpose(0, 2, 1, 3)


def reference(description: Any, arrays: Arrays) -> np.ndarray:
    s = description
    q, k, v = (arrays[name].astype(np.float64) for name in "qkv")
    k, v = (np.repeat(x, s.group, axis=1) for x in (k, v))
    scores = s.scale * (q @ k.transpose(0, 1, 3, 2))
    if s.softcap:
        scores = s.softcap * np.tanh(scores / s.softcap)
    nq, nk = scores.shape[2:]
    there = arrays.get("lengths", np.full(len(q), nk)).clip(0, nk)[:, None, None, None]
    if s.causal.value != "no":
        offset = there - nq if s.causal.value == "end" else 0
        scores = np.where(np.arange(nk) <= np.arange(nq)[:, None] + offset, scores, -np.inf)
    scores = np.where(np.arange(nk) < there, scores, -np.inf)
    v = np.where(np.arange(nk)[:, None] < there, v, 0)
    if "mask" in arrays:
        mask = arrays["mask"]
        with np.errstate(over="ignore"):
            scores = scores + (np.where(mask, 0, -np.inf) if mask.dtype == bool else mask.astype(np.float64))
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    e = np.exp(scores - np.where(np.isneginf(top), 0, top))
    total = e.sum(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        y = (e @ v) / total
    return np.where(total == 0, 0.0 if s.zero_rows else np.nan, y)


def check(target: Target, description: Any, arrays: Arrays, threads: int = 1) -> None:
    expected = reference(description, arrays)
    scale = np.nanmax(np.abs(arrays["v"]), initial=1e-30)
    np.testing.assert_allclose(run(target, description, arrays, threads), expected, rtol=0, atol=TOLERANCE * scale)


# Blocks are 48, 24, 16 or 8 queries and about 128 keys; tiles 6 to 16 rows and 4 or 8 keys.
SIZES = [1, 2, 7, 8, 9, 15, 16, 17, 23, 24, 25, 33, 47, 48, 49, 64, 97]
KEYS = [1, 3, 4, 5, 7, 8, 9, 16, 17, 63, 64, 65, 127, 128, 129, 197, 257, 300]


@pytest.mark.parametrize("queries", SIZES)
@pytest.mark.parametrize("name", X86)
def test_static_lengths(runnable: Callable[[str], Target], name: str, queries: int) -> None:
    for keys in (1, 5, 8, 67, 128, 197):
        description = spec(queries=queries, keys=keys)
        check(runnable(name), description, draw(description))


@pytest.mark.parametrize("causal", ["no", "start", "end"])
@pytest.mark.parametrize("name", X86)
def test_dynamic_lengths(runnable: Callable[[str], Target], name: str, causal: str) -> None:
    description = spec(batch=None, causal=causal)
    for queries in SIZES:
        for keys in KEYS:
            check(runnable(name), description, draw(description, 2, queries, keys))


@pytest.mark.parametrize("queries", [1, 5, 33])
@pytest.mark.parametrize("name", X86)
def test_heads_in_columns_beside_other_things(runnable: Callable[[str], Target], name: str, queries: int) -> None:
    """What stands between them, here NaN, is not read: queries, keys and values of one projection, heads together or
    each head's three together."""
    from graphwright.runtime.kernels.attention_spec import Columns

    for places in (
        {"q": Columns(104, 17, 1), "k": Columns(104, 17, 35), "v": Columns(104, 17, 69)},
        {"q": Columns(102, 51), "k": Columns(102, 51, 17), "v": Columns(102, 51, 34)},
    ):
        for fixed in ({"queries": queries, "keys": 19}, {"batch": None}):
            description = spec(head_size=17, y="bsm", **places, **fixed)
            check(runnable(name), description, draw(description, 2, queries, 19))


@pytest.mark.parametrize(
    "size, value_size",
    [(1, 1), (3, 5), (8, 24), (17, 33), (32, 32), (40, 80), (64, 64), (72, 128), (128, 96), (270, 1031)],
)
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("name", X86)
def test_head_sizes(runnable: Callable[[str], Target], name: str, queries: int, size: int, value_size: int) -> None:
    description = spec(queries=queries, keys=37, head_size=size, value_size=value_size, scale=size**-0.5)
    check(runnable(name), description, draw(description))


@pytest.mark.parametrize(
    "layouts",
    ["bhsd bhsd bhsd bhsd", "bshd bshd bshd bshd", "bsm bsm bsm bsm", "bsm bhds bshd bhsd", "bhsd bhds bhsd bsm"],
)
@pytest.mark.parametrize("queries", [1, 3, 53, None])
@pytest.mark.parametrize("name", X86)
def test_layouts(runnable: Callable[[str], Target], name: str, queries: int | None, layouts: str) -> None:
    target = runnable(name)
    q, k, v, y = layouts.split()
    description = spec(batch=2, queries=queries, keys=queries and 75, q=q, k=k, v=v, y=y, heads=4, kv_heads=2)
    for length in [queries] if queries else [1, 5, 60]:
        check(target, description, draw(description, 2, length, 75))


@pytest.mark.parametrize(
    "axes", [(False, False, False), (True, False, False), (False, True, True), (True, True, True), (False, False, True)]
)
@pytest.mark.parametrize("mask", ["added", "keep"])
@pytest.mark.parametrize("causal", ["no", "end"])
@pytest.mark.parametrize("queries", [1, 4, 53])
@pytest.mark.parametrize("name", WIDE)
def test_masks(
    runnable: Callable[[str], Target], name: str, queries: int, causal: str, mask: str, axes: tuple[bool, bool, bool]
) -> None:
    target = runnable(name)
    description = spec(batch=2, queries=queries, keys=299, mask=mask, mask_axes=axes, causal=causal)
    check(target, description, draw(description))
    if name == "cpu-avx512":
        free = dataclasses.replace(description, batch=None, queries=None, keys=None)
        for rows in (queries, 17, 33):
            check(target, free, draw(free, 2, rows, 299))


@pytest.mark.parametrize("heads, kv_heads", [(9, 3), (4, 1), (6, 6)])
@pytest.mark.parametrize("queries", [1, 2, 8, 9, 50])
@pytest.mark.parametrize("causal", ["no", "start", "end"])
def test_grouped_heads(causal: str, queries: int, heads: int, kv_heads: int) -> None:
    description = spec(heads=heads, kv_heads=kv_heads, queries=queries, keys=77, causal=causal)
    check(Target.named("cpu"), description, draw(description))


@pytest.mark.parametrize("queries", [1, 50])
@pytest.mark.parametrize("name", X86)
def test_softcap(runnable: Callable[[str], Target], name: str, queries: int) -> None:
    description = spec(queries=queries, keys=60, softcap=5.0, scale=2.0, mask="keep", mask_axes=(False, False, True))
    check(runnable(name), description, draw(description))


@pytest.mark.parametrize("queries", [2, 30])
@pytest.mark.parametrize("zero_rows", [True, False])
@pytest.mark.parametrize("name", WIDE)
def test_queries_that_see_no_key(runnable: Callable[[str], Target], name: str, zero_rows: bool, queries: int) -> None:
    """They give 0 as the standard's Attention does, or NaN as a softmax does; masked by the lowest float, the mean."""
    target = runnable(name)
    masked = spec(queries=queries, keys=40, mask="added", mask_axes=(False, False, True), zero_rows=zero_rows)
    arrays = draw(masked)
    arrays["mask"][0, 0, 1] = -INF
    arrays["mask"][0, 0, 0] = np.finfo(np.float32).min
    check(target, masked, arrays)
    kept = spec(queries=queries, keys=40, mask="keep", mask_axes=(False, False, True), zero_rows=zero_rows)
    arrays = draw(kept)
    arrays["mask"][0, 0, 1] = False
    check(target, kept, arrays)
    late = spec(queries=queries, keys=1, causal="end", zero_rows=zero_rows)
    check(target, late, draw(late))
    none = spec(zero_rows=zero_rows)
    check(target, none, draw(none, 1, queries, 0))


@pytest.mark.parametrize("queries", [3, 30])
def test_special_numbers(queries: int) -> None:
    """A NaN stays in its query; a score of +inf makes NaN; keys masked by -inf add nothing."""
    target = Target.named("cpu")
    description = spec(queries=queries, keys=300)
    arrays = draw(description)
    arrays["q"][0, 0, 1, 3] = np.nan
    arrays["q"][0, 1, 2] = 0
    got, expected = run(target, description, arrays), reference(description, arrays)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    assert np.isnan(got).sum() == description.value_size
    arrays = draw(description)
    arrays["k"][0, 0, 150] = 3e38
    arrays["q"][0, 0, 1] = 3e38
    assert np.isnan(run(target, description, arrays)[0, 0, 1]).all()
    description = spec(queries=queries, keys=300, mask="added")
    arrays = draw(description)
    arrays["mask"][..., 20:] = -INF
    seen = {**arrays, "k": arrays["k"][:, :, :20], "v": arrays["v"][:, :, :20], "mask": arrays["mask"][..., :20]}
    check(target, description, arrays)
    np.testing.assert_allclose(run(target, description, arrays), reference(description, seen), atol=2e-6)


@pytest.mark.parametrize("spread", [1e-3, 30.0, 1e4])
@pytest.mark.parametrize("queries", [1, 60])
def test_large_and_small_scores(queries: int, spread: float) -> None:
    """Where scores are far apart the answer is the value of the best key."""
    description = spec(queries=queries, keys=300, scale=spread)
    arrays = draw(description)
    for name in "qk":
        arrays[name] = np.round(arrays[name] * 4) / 4  # products without rounding
    check(Target.named("cpu"), description, arrays)


@pytest.mark.parametrize(
    "queries, keys, heads", [(1, 5000, 3), (2, 3000, 1), (1, 300, 9), (300, 300, 3), (64, 2000, 1)]
)
@pytest.mark.parametrize("causal", [pytest.param("no", marks=pytest.mark.slow), "end"])
def test_threads_share_heads_and_keys(causal: str, queries: int, keys: int, heads: int) -> None:
    target = Target.named("cpu")
    for batch in (1, None):
        description = spec(batch=batch, heads=heads, queries=queries, keys=keys, head_size=32, causal=causal)
        check(target, description, draw(description), threads=4)


@pytest.mark.parametrize("queries", [1, 3, 9, 53])
@pytest.mark.parametrize("causal", ["no", "end"])
@pytest.mark.parametrize("name", X86)
def test_counts_of_keys(runnable: Callable[[str], Target], name: str, causal: str, queries: int) -> None:
    """What lies behind the keys that there are, here NaN, is not read; fewer keys than queries leave queries of 0."""
    target, fixed = runnable(name), spec(batch=4, queries=queries, keys=139, causal=causal, lengths=True)
    masked = spec(batch=4, queries=queries, keys=139, causal=causal, lengths=True, mask="keep",
                  mask_axes=(False, False, True), heads=4, kv_heads=2)  # fmt: skip
    for description in (fixed, dataclasses.replace(fixed, batch=None, queries=None, keys=None), masked):
        for lengths in ((0, 1, 2, 139), (64, 8, 138, 7), (-3, 140, 1 << 33, 130)):
            arrays = draw(description, 4, queries, 139)
            arrays["lengths"] = np.array(lengths)
            for one, count in enumerate(lengths):
                for x in (arrays["k"], arrays["v"]):
                    x[one, :, max(count, 0) :] = np.nan
            expected = reference(description, {**arrays, "k": np.nan_to_num(arrays["k"])})
            np.testing.assert_allclose(run(target, description, arrays), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("queries", [1, 64])
def test_threads_share_the_keys_that_there_are(queries: int) -> None:
    description = spec(heads=3, batch=2, queries=queries, keys=4000, head_size=32, causal="end", lengths=True)
    for lengths in ((4000, 1), (2501, 70)):
        arrays = {**draw(description), "lengths": np.array(lengths)}
        check(Target.named("cpu"), description, arrays, threads=4)


def test_empty_tensors() -> None:
    target = Target.named("cpu")
    for batch, queries in ((0, 5), (1, 0), (0, 0)):
        free, fixed = spec(batch=None), spec(batch=batch, queries=queries, keys=7)
        for description in (free, fixed):
            arrays = draw(free, 1, queries, 7)
            arrays = {name: a[:batch] for name, a in arrays.items()}
            assert run(target, description, arrays).shape == (batch, 2, queries, 16)


def test_scores_are_not_in_memory() -> None:
    """The largest buffer is as large for ten times as many keys; the last tiles of keys have smaller ones."""
    from graphwright.runtime.kernels.attention import attention

    target = Target.named("cpu")

    def scratch(keys: int) -> int:
        text = attention(spec(queries=64, keys=keys), target.isa, target.caches).script()
        return max(map(int, re.findall(r"alloc_buffer\(\((\d+),\)", text)))

    assert scratch(1024) == scratch(10240)


def test_heads_must_divide() -> None:
    with pytest.raises(ValueError, match="5 query heads are not a multiple of 2 key heads"):
        spec(heads=5, kv_heads=2)
    with pytest.raises(ValueError, match="only keys"):
        spec(v="bhds")


FORMS = [(causal, mask) for causal in ("no", "start", "end") for mask in ("no", "added", "keep")]
FAST = [("no", "added"), ("end", "keep")]


@pytest.mark.parametrize(
    "causal, mask", [*FAST, *(pytest.param(*form, marks=pytest.mark.slow) for form in FORMS if form not in FAST)]
)
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 70), st.integers(1, 300))
def test_outputs_are_means_of_values(causal: str, mask: str, seed: int, batch: int, queries: int, keys: int) -> None:
    """They match the oracle, and lie between the least and the greatest value of the keys."""
    description = spec(batch=None, heads=4, kv_heads=2, causal=causal, mask=mask, mask_axes=(True, True, True))
    arrays = draw(description, batch, queries, keys, seed)
    target = Target.named("cpu")
    check(target, description, arrays)
    got = run(target, description, arrays)
    v = np.repeat(arrays["v"], 2, axis=1)
    low, high = np.minimum(v.min(2, keepdims=True), 0), np.maximum(v.max(2, keepdims=True), 0)
    assert ((got >= low - 1e-5) & (got <= high + 1e-5)).all()
