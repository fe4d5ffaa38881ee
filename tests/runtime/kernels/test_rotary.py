"""The rotary kernel against NumPy in float64: both kinds of pairs, layouts, tables, boundaries of vectors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from graphwright.runtime.target import Target
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.tvm

TOLERANCE = 1e-6  # three roundings
X86 = ["cpu-avx512", "cpu-avx2", "cpu-baseline"]


def spec(**fields: Any) -> Any:
    from graphwright.runtime.kernels.rotary import RotarySpec

    return RotarySpec(**{"batch": "b", "heads": 2, "length": "s", "size": 16, "rotary": 16, **fields})


@functools.cache
def kernel(target: Target, description: Any, threads: int = 1) -> Callable[..., Any]:
    import tvm
    from graphwright.runtime.codegen import machine_code
    from graphwright.runtime.kernels.rotary import rotary

    function = rotary(description, target.isa, threads, "rotary")
    return machine_code(tvm.IRModule({"rotary": function}), target)["rotary"]


def reference(s: Any, x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x: (b, h, s, d). cos, sin: (b or 1, s, rotary / 2)."""
    half = s.rotary // 2
    cos, sin, y = cos.astype(np.float64)[:, None], sin.astype(np.float64)[:, None], x.astype(np.float64)
    first, second = (np.s_[..., 0 : s.rotary : 2], np.s_[..., 1 : s.rotary : 2]) if s.neighbours else (
        np.s_[..., :half], np.s_[..., half : s.rotary])  # fmt: skip
    a, b = y[first].copy(), y[second].copy()
    y[first], y[second] = a * cos - b * sin, b * cos + a * sin
    return y


def check(target: Target, description: Any, batch: int = 2, length: int = 5, threads: int = 1, seed: int = 0) -> None:
    import tvm
    from graphwright.runtime.kernels.attention_spec import Columns, Layout

    s, random = description, np.random.default_rng(seed)
    x = random.standard_normal((batch, s.heads, length, s.size)).astype(np.float32)
    rows = 1 if s.shared else batch
    shape = (rows, length, s.rotary // 2) if s.table is None else (11, s.rotary // 2)
    angles = random.random(shape) * 6
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    positions = random.integers(0, 11, (rows, length)).astype(s.positions)
    given_x = x
    if isinstance(s.x, Columns):
        given_x = np.full((batch, length, s.x.pitch), np.nan, np.float32)
        for h in range(s.heads):
            given_x[..., s.x.first + h * s.x.step :][..., : s.size] = x[:, h]
    inputs = [given_x, cos, sin, *([positions] if s.table is not None else [])]
    apart = (batch, s.heads, length, s.size) if s.y is Layout.BHSD else (batch, length, s.heads * s.size)
    # What is left of this value was not written.
    y = tvm.runtime.tensor(np.full(apart, 12345.0, np.float32))
    kernel(target, s, threads)(*(tvm.runtime.tensor(i) for i in inputs), y)
    result = y.numpy()
    if s.y is not Layout.BHSD:
        result = result.reshape(batch, length, s.heads, s.size).transpose(0, 2, 1, 3)
    if s.table is not None:
        cos, sin = cos[positions], sin[positions]
    np.testing.assert_allclose(result, reference(s, x, cos, sin), rtol=0, atol=TOLERANCE * 4)


@pytest.mark.parametrize(
    "size, rotary", [(2, 2), (6, 6), (7, 6), (16, 14), (18, 18), (32, 32), (34, 32), (64, 30), (80, 64)]
)
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("name", X86)
def test_sizes_of_heads(runnable: Callable[[str], Target], name: str, neighbours: bool, size: int, rotary: int) -> None:
    check(runnable(name), spec(size=size, rotary=rotary, neighbours=neighbours))


@pytest.mark.parametrize("fields", [{}, {"shared": True}, {"table": 11}, {"table": "p", "positions": "int32"},
                                    {"table": 11, "shared": True}])  # fmt: skip
def test_tables(fields: dict[str, Any]) -> None:
    for fixed in ({}, {"batch": 2, "length": 5}):
        check(Target.named("cpu"), spec(**fields, **fixed))


def test_layouts() -> None:
    from graphwright.runtime.kernels.attention_spec import Columns, Layout

    for x in (Layout.BHSD, Columns(32, 16), Columns(100, 40, 3)):
        for y in (Layout.BHSD, Layout.BSM):
            check(Target.named("cpu"), spec(x=x, y=y))


def test_one_position_none_and_threads() -> None:
    target = Target.named("cpu")
    check(target, spec(), 1, 1)
    check(target, spec(), 2, 0)
    check(target, spec(batch=1, length=1), 1, 1)
    check(target, spec(heads=8, size=64, rotary=64), 3, 70, threads=2)
    check(target, spec(heads=8, size=64, rotary=64, batch=3, length=70), 3, 70, threads=2)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.booleans(), st.integers(0, 99))
def test_any_lengths(batch: int, length: int, neighbours: bool, seed: int) -> None:
    check(Target.named("cpu"), spec(size=34, rotary=22, neighbours=neighbours), batch, length, seed=seed)


