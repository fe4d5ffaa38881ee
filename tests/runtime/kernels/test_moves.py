"""Transpositions through the compile road: exact, of any rank, order, type and size."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.tvm

X86 = ["cpu", "cpu-avx512", "cpu-avx2", "cpu-baseline"]
ONNX = {"float32": "float", "int64": "int64", "int8": "int8", "bool": "bool"}
Case = tuple[tuple[int, ...], tuple[int, ...], str]


def transposed(cases: list[Case], name: str, compile_model: Callable[..., Any]) -> None:
    """Every case (shape, order, type) as an output of one model."""
    inputs, outputs, nodes, feeds = [], [], [], {}
    for i, (shape, order, dtype) in enumerate(cases):
        kind, dims = ONNX[dtype], ",".join(map(str, shape))
        after = ",".join(str(shape[a]) for a in order)
        inputs.append(f"{kind}[{dims}] x{i}")
        outputs.append(f"{kind}[{after}] y{i}")
        nodes.append(f"y{i} = Transpose<perm=[{','.join(map(str, order))}]>(x{i})")
        numbers = np.arange(np.prod(shape)).reshape(shape)
        feeds[f"x{i}"] = (numbers % 3 == 0) if dtype == "bool" else (numbers % 101 - 50).astype(dtype)
    model = compile_model(f"g ({', '.join(inputs)}) => ({', '.join(outputs)}) {{ {' '.join(nodes)} }}", name)
    for i, (got, (_, order, _)) in enumerate(zip(model.run(feeds), cases, strict=True)):
        np.testing.assert_array_equal(got, feeds[f"x{i}"].transpose(order), str(cases[i]))


SHAPES = [(3, 5), (9, 8), (3, 5, 7), (17, 3, 9), (2, 3, 5, 9), (2, 3, 2, 5, 3)]
FULL = [pytest.param(part, marks=pytest.mark.slow) for part in range(1, 8)]


@pytest.mark.parametrize("part", [0, *FULL])
def test_every_order(part: int, compile_model: Callable[..., Any]) -> None:
    """All permutations of small odd shapes and each type; of all of them each part takes every eighth."""
    every = [
        (shape, order, dtype)
        for shape in SHAPES for order in itertools.permutations(range(len(shape))) for dtype in ONNX
        if dtype == "float32" or len(shape) < 5
    ]  # fmt: skip
    # A prime stride, so that no part holds one type or order only.
    transposed([every[i * 37 % len(every)] for i in range(part, len(every), 8)], "cpu", compile_model)


@pytest.mark.parametrize("name", X86)
def test_tile_edges(name: str, runnable: Callable[..., Any], compile_model: Callable[..., Any]) -> None:
    """Rows and columns of the tiles of one register: one less, as many, one more, several."""
    from graphwright.runtime.kernels.vectors import Vectors

    lanes = Vectors(runnable(name).isa).lanes
    sizes = (1, lanes - 1, lanes, lanes + 1, 2 * lanes + 1)
    cases: list[Case] = [((m, n), (1, 0), "float32") for m, n in itertools.product(sizes, sizes) if (m + n) % 2]
    cases += [((2, lanes + 1, 3, 2 * lanes - 1), (0, 3, 2, 1), "float32"), ((300, 260), (1, 0), "float32")]
    transposed(cases, name, compile_model)


def test_parts_of_a_tensor(compile_model: Callable[..., Any]) -> None:
    """Transpositions that start inside of what they read, that repeat it, and that go through it backwards."""
    text = """g (float[6,11,17] x) => (float[9,3,17] a, float[17,9,6] b, float[2,17,11,6] c, float[17,11,6] d) {
      s = Slice(x, one, four, zero)  t = Slice(s, two, eleven, one)  a = Transpose<perm=[1,0,2]>(t)
      u = Slice(x, two, eleven, one)  b = Transpose<perm=[2,1,0]>(u)
      v = Transpose<perm=[2,1,0]>(x)  w = Unsqueeze(v, zero)  c = Expand(w, both)
      r = Slice(x, last, first, one, back)  d = Transpose<perm=[2,1,0]>(r) }"""
    numbers = {
        "zero": [0], "one": [1], "two": [2], "four": [4], "eleven": [11], "both": [2, 17, 11, 6], "last": [10],
        "first": [-100], "back": [-1],
    }  # fmt: skip
    model = compile_model(text, **{name: np.int64(value) for name, value in numbers.items()})
    model.check({"x": np.arange(6 * 11 * 17, dtype=np.float32).reshape(6, 11, 17)}, 0)
