"""Indices of what is written: those that point outside fail, and write nowhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.tvm

# Operator -> (model, indices that are right, the greatest that may be, whether they may be counted from the end)
CASES: dict[str, tuple[str, list[Any], int, bool]] = {
    "elements": (
        "g (float[n, 5] x, int64[m, 5] i, float[m, 5] u) => (float[n, 5] y) { y = ScatterElements (x, i, u) }",
        [[0, -1, 2, 6, -7], [1, 0, -1, 5, 3]], 6, True,
    ),
    "axis": (
        "g (float[7, n] x, int32[7, m] i, float[7, m] u) => (float[7, n] y)"
        " { y = ScatterElements <axis = -1, reduction = \"add\"> (x, i, u) }",
        [[0, -1, 2]] * 7, 4, True,
    ),
    "slices": (
        "g (float[n, 5] x, int64[m, 1] i, float[m, 5] u) => (float[n, 5] y) { y = ScatterND (x, i, u) }",
        [[0], [-1], [3]], 6, True,
    ),
    "tuples": (
        "g (float[7, 5] x, int64[m, 2] i, float[m] u) => (float[7, 5] y)"
        " { y = ScatterND <reduction = \"add\"> (x, i, u) }",
        [[0, 1], [-1, 2], [6, -5]], 6, True,
    ),
    "unpool": (
        "g (float[1, 1, 2, 2] u, int64[1, 1, 2, 2] i) => (float[1, 1, 4, 4] y)"
        " { y = MaxUnpool <kernel_shape = [2, 2], strides = [2, 2]> (u, i) }",
        [[[[0, 3], [9, 15]]]], 15, False,
    ),
}  # fmt: skip


def feeds(case: str, indices: np.ndarray) -> dict[str, np.ndarray]:
    text = CASES[case][0]
    random = np.random.default_rng(0)
    updates = indices.shape[:-1] if case == "tuples" else (*indices.shape[:1], 5) if case == "slices" else indices.shape
    given = {"i": indices, "u": random.standard_normal(updates).astype(np.float32)}
    return given if " x," not in text else {"x": random.standard_normal((7, 5)).astype(np.float32), **given}


@pytest.mark.parametrize("case", CASES)
def test_indices_outside_fail(case: str, compile_model: Callable[..., Any]) -> None:
    text, right, most, counted = CASES[case]
    model = compile_model(text)
    indices = np.array(right, np.int32 if "int32" in text else np.int64)
    model.check(feeds(case, indices))
    if "[m" in text:
        model.check(feeds(case, indices[:0]))
    for wrong in (most + 1, 60, 10**8, -most - 2 if counted else -1, -(10**9)):
        outside = indices.copy()
        outside.flat[0] = wrong
        with pytest.raises(Exception, match="mismatch"):
            model.run(feeds(case, outside))


@pytest.mark.parametrize("index", [7, -8])
def test_constant_indices_outside_are_refused(index: int, compile_model: Callable[..., Any]) -> None:
    text = "g (float[7, 5] x, float[1, 5] u) => (float[7, 5] y) { y = ScatterND (x, i, u) }"
    with pytest.raises(Exception, match=f"its indices from {index} to {index} do not lie in 7"):
        compile_model(text, i=np.array([[index]]))


@pytest.mark.parametrize(
    ("node", "indices"),
    [("Gather <axis = 1> (r, i)", [1, 0]), ("GatherElements <axis = 1> (r, i)", [[1, 0], [0, 1]]),
     ("GatherND (r, i)", [[0, 1], [1, 0]]), ("Gather <axis = 0> (r, i)", [0])],
)  # fmt: skip
def test_nothing_is_taken_from_an_axis_without_elements(
    node: str, indices: list[Any], compile_model: Callable[..., Any]
) -> None:
    where = np.array(indices)
    tuples = "ND" in node
    dims = "m, 2" if tuples else ", ".join("mk"[: where.ndim])
    model = compile_model(
        f"g (float[a, b] x, int64[{dims}] i) => (float[{'p' if tuples else 'p, q'}] y) {{ r = Relu (x) y = {node} }}"
    )
    model.check({"x": np.ones((2, 3), np.float32), "i": where})
    empty = np.ones((0, 3) if "0>" in node else (2, 0), np.float32)
    with pytest.raises(RuntimeError, match="match_cast"):
        model.run({"x": empty, "i": where})
    model.run({"x": empty, "i": where[:0] if "Elements" not in node else where[:, :0]})
