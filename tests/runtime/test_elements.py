"""Elementwise nests and chains of them, as kernels of their own and by the default schedule, against NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.tvm

X86 = ["cpu", "cpu-avx512", "cpu-avx2", "cpu-baseline"]


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


BROADCASTS = {
    "each axis": [(3, 1, 5, 7), (1, 4, 5, 7), (3, 4, 1, 7), (3, 4, 5, 1)],
    "two axes": [(1, 1, 5, 17), (3, 4, 1, 1), (3, 1, 1, 17), (1, 4, 5, 1)],
    "outer and inner": [(3, 1, 5, 1), (1, 4, 1, 16)],
    "other ranks": [(17,), (4, 1), (3, 1, 1), (2, 3, 4, 17)],
    "one element": [(1,), (1, 1, 1), ()],
    "one element and more": [(1, 1, 1), (3, 1, 19), ()],
    "one axis of one": [(33, 1), (33, 1), (1, 1)],
    "a vector and one": [(1, 9), (8, 1)],
    "odd": [(1,), (31,), (1,)],
    "long": [(2, 129), (1, 129), (2, 1)],
}


@pytest.mark.parametrize("name", X86)
def test_broadcasts(name: str, runnable: Callable[..., Any], compile_model: Callable[..., Any]) -> None:
    """A sum of products over every shape that meets the others, all in one model."""
    runnable(name)
    inputs, outputs, nodes, feeds = [], [], [], {}
    for n, shapes in enumerate(BROADCASTS.values()):
        for i, shape in enumerate(shapes):
            inputs.append(f"float[{','.join(map(str, shape))}] x{n}_{i}" if shape else f"float x{n}_{i}")
            feeds[f"x{n}_{i}"] = draw(*shape, seed=i)
        out = np.broadcast_shapes(*shapes)
        outputs.append(f"float[{','.join(map(str, out))}] y{n}" if out else f"float y{n}")
        last = f"x{n}_0"
        for i in range(1, len(shapes)):
            nodes.append(f"a{n}_{i} = {'Mul' if i % 2 else 'Sub'}({last}, x{n}_{i})")
            last = f"a{n}_{i}"
        nodes.append(f"y{n} = Add({last}, x{n}_0)")
    text = f"g ({', '.join(inputs)}) => ({', '.join(outputs)}) {{ {' '.join(nodes)} }}"
    compile_model(text, name).check(feeds, 1e-6)


def test_types_and_casts(compile_model: Callable[..., Any]) -> None:
    """Whole numbers, truth values and choices; lengths that fill vectors and that do not, and no axis at all."""
    inputs, outputs, nodes, feeds = [], [], [], {}
    for n, shape in enumerate([(3, 16), (5, 7), (1,), ()]):
        dims = f"[{','.join(map(str, shape))}]" if shape else ""
        inputs += [f"float{dims} x{n}", f"int64{dims} i{n}", f"int32{dims} j{n}", f"bool{dims} b{n}"]
        kinds = {"y": "float", "k": "int64", "l": "int32", "m": "bool", "f": "float", "u": "int64", "v": "bool"}
        outputs += [f"{kind}{dims} {name}{n}" for name, kind in kinds.items()]
        nodes.append(f"""
          g{n} = Cast<to=1>(i{n})  y{n} = Mul(g{n}, x{n})  t{n} = Add(i{n}, i{n})  k{n} = Mul(t{n}, i{n})
          c{n} = Cast<to=6>(x{n})  l{n} = Sub(c{n}, j{n})  m{n} = Less(j{n}, c{n})
          f{n} = Where(b{n}, x{n}, g{n})  p{n} = Greater(x{n}, g{n})  u{n} = Where(p{n}, i{n}, k{n})
          q{n} = Not(p{n})  r{n} = And(q{n}, b{n})  v{n} = Or(r{n}, m{n})""")
        random = np.random.default_rng(n)
        feeds[f"x{n}"] = np.asarray(random.standard_normal(shape) * 3, np.float32)
        feeds[f"i{n}"] = np.asarray(random.integers(-5, 5, shape), np.int64)
        feeds[f"j{n}"] = np.asarray(random.integers(-5, 5, shape), np.int32)
        feeds[f"b{n}"] = np.asarray(random.random(shape) < 0.5)
    text = f"g ({', '.join(inputs)}) => ({', '.join(outputs)}) {{ {' '.join(nodes)} }}"
    compile_model(text).check(feeds, 1e-6)


@pytest.mark.parametrize("name", X86)
def test_comparisons_with_nan(name: str, runnable: Callable[..., Any], compile_model: Callable[..., Any]) -> None:
    """Choices by comparisons, alone and behind a product: a NaN takes the branch that IEEE gives it."""
    runnable(name)
    special = np.float32([np.nan, np.inf, -np.inf, 0, -0.0, 1, -1, 1e-45])
    x = np.repeat(special, 8).reshape(4, 16)
    z = np.tile(special, 8).reshape(4, 16)
    ops = ("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal")
    nodes = " ".join(f"c{i} = {op}(x, z)  y{i} = Where(c{i}, two, x)" for i, op in enumerate(ops))
    nodes += " ".join(f" n{i} = Not(c{i})  u{i} = Where(n{i}, two, z)" for i in range(len(ops)))
    nodes += """ r = Relu(x)  l = LeakyRelu(x)  k = Clip(x, low, high)  h = Max(x, z)  e = Min(x, z)  s = Sign(x)
      a = Abs(x)  p = MatMul(x, eye)  t = Relu(p)  o = Greater(p, z)  v = Where(o, p, two)"""
    shape = "float[4,16]"
    outputs = ", ".join(f"{shape} {o}" for o in [*(f"{w}{i}" for i in range(len(ops)) for w in "yu"), *"rlkhesatv"])
    text = f"g ({shape} x, {shape} z) => ({outputs}) {{ {nodes} }}"
    weights = {
        "two": np.float32(2),
        "low": np.float32(-0.5),
        "high": np.float32(0.5),
        "eye": np.eye(16, dtype=np.float32),
    }
    model = compile_model(text, name, **weights)
    model.check({"x": np.nan_to_num(x, nan=3, posinf=2, neginf=-2), "z": z})
    got = dict(zip([o.name for o in model.proto.graph.output], model.run({"x": x, "z": z}), strict=True))
    numpy_ops = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal)
    for i, op in enumerate(numpy_ops):
        np.testing.assert_array_equal(got[f"y{i}"], np.where(op(x, z), np.float32(2), x), ops[i])
        np.testing.assert_array_equal(got[f"u{i}"], np.where(~op(x, z), np.float32(2), z), ops[i])
    np.testing.assert_array_equal(got["r"], np.maximum(x, 0))
    np.testing.assert_array_equal(got["l"], np.where(x < 0, x * np.float32(0.01), x))
    np.testing.assert_array_equal(got["k"], np.clip(x, -0.5, 0.5))
    np.testing.assert_array_equal(got["h"], np.maximum(x, z))
    np.testing.assert_array_equal(got["e"], np.minimum(x, z))
    np.testing.assert_array_equal(got["a"], np.abs(x))
    assert np.isnan(got["s"][np.isnan(x)]).all() or not got["s"][np.isnan(x)].any()


def test_signs_of_zero(compile_model: Callable[..., Any]) -> None:
    """0 and -0 compare equal and are other numbers all the same: constants of a chain too."""
    text = """g (float[3,8] x) => (float[3,8] y) {
      small = Less(x, half)  a = Where(small, zero, x)  b = Where(small, negative, x)
      c = Reciprocal(a)  d = Reciprocal(b)  y = Sub(c, d) }"""
    weights = {"zero": np.float32(0), "negative": np.float32(-0.0), "half": np.float32(0.5)}
    x = np.abs(draw(3, 8))
    with np.errstate(divide="ignore"):
        (y,) = compile_model(text, **weights).run({"x": x})
    np.testing.assert_array_equal(y, np.where(x < 0.5, np.float32(np.inf), 0))


def test_powers(compile_model: Callable[..., Any]) -> None:
    exponents = (0.5, 1.0, 2.0, 3.0, -1.0, 2.5, 0.0)
    outputs = ", ".join(f"float[3,11] y{i}" for i in range(len(exponents)))
    nodes = " ".join(f"y{i} = Pow(x, e{i})" for i in range(len(exponents)))
    text = f"g (float[3,11] x) => ({outputs}) {{ {nodes} }}"
    model = compile_model(text, **{f"e{i}": np.float32(e) for i, e in enumerate(exponents)})
    x = np.abs(draw(3, 11))
    x[0, :3] = 0, np.inf, np.nan
    special = np.float32([-0.0, -np.inf, -4, 0, 1, np.inf, np.nan, 2, 3, 4, 5])
    with np.errstate(divide="ignore", invalid="ignore"):
        for e, got in zip(exponents, model.run({"x": x}), strict=True):
            np.testing.assert_allclose(got, x.astype(np.float64) ** e, rtol=1e-6, err_msg=str(e))
        got, *_ = model.run({"x": np.tile(special, (3, 1))})
        # C's pow, which NumPy's shortcut for 0.5 is not.
        expected = [0, np.inf, np.nan, 0, 1, np.inf, np.nan, *np.sqrt([2, 3, 4, 5])]
        np.testing.assert_allclose(got[0], expected, rtol=1e-6)
        assert not np.signbit(got[0, 0])


def test_whole_numbers_are_divided(compile_model: Callable[..., Any]) -> None:
    """Towards zero, in vectors and where lengths fill none."""
    text = """g (int64[4,16] a, int64[4,16] b, int32[3,5] c, int32[3,5] d)
        => (int64[4,16] y, int64[4,16] z, int64[4,16] m, int32[3,5] u) {
      y = Div(a, b)  z = Div(a, three)  m = Mod(a, b)  u = Div(c, d) }"""
    random = np.random.default_rng(0)
    feeds = {"a": random.integers(-20, 20, (4, 16)), "b": random.integers(1, 5, (4, 16))}
    feeds["c"] = random.integers(-20, 20, (3, 5)).astype(np.int32)
    feeds["d"] = random.integers(-5, 0, (3, 5)).astype(np.int32)
    compile_model(text, three=np.int64(3)).check(feeds)


def test_views_in_between(compile_model: Callable[..., Any]) -> None:
    """Reshapes, transpositions, slices, repetitions and single places that a chain of operators reads through."""
    text = """g (float[4,6,10] x, float[6,4] z) => (float[24,10] a, float[10,6,4] b, float[4,3,10] c, float[4,6,5] d,
          float[6,4,10] e, float[4,10] f, float[8,6,10] h, float[4,1,6,10] k, float[4,6,10] l) {
      r = Reshape(x, flat)  a = Neg(r)
      t = Transpose<perm=[2,1,0]>(x)  b = Add(t, z)
      s = Slice(x, one, four, one)  c = Mul(s, s)
      v = Slice(x, zero, ten, two, two)  d = Abs(v)
      w = Transpose<perm=[1,0,2]>(x)  q = Unsqueeze(z, two)  e = Add(w, q)
      g = Gather<axis=1>(x, three)  f = Relu(g)
      i = Tile(x, repeats)  h = Neg(i)  u = Unsqueeze(x, one)  k = Relu(u)
      m = Transpose<perm=[1,0]>(z)  n = Unsqueeze(m, two)  l = Mul(x, n) }"""
    numbers = {"one": [1], "two": [2], "four": [4], "zero": [0], "ten": [10], "flat": [24, 10], "repeats": [2, 1, 1]}
    weights = {name: np.int64(value) for name, value in numbers.items()} | {"three": np.int64(3)}
    compile_model(text, **weights).check({"x": draw(4, 6, 10), "z": draw(6, 4)}, 0)


# --- random trees -----------------------------------------------------------------------------------------------

UNARY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Relu": lambda x: np.maximum(x, 0), "Neg": np.negative, "Abs": np.abs, "Tanh": np.tanh,
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)), "Floor": np.floor, "Ceil": np.ceil, "Sin": np.sin,
}  # fmt: skip
BINARY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Max": np.maximum, "Min": np.minimum,
}  # fmt: skip
STEPS = {"Floor", "Ceil"}  # where a rounding of the argument may be a whole 1 of the result


@dataclass
class Value:
    name: str
    array: np.ndarray  # float64
    exact: bool  # computed without a rounding


def grow(data: st.DataObject, number: int) -> tuple[list[str], dict[str, np.ndarray], Value]:
    """A random tree: nodes, inputs, the result."""
    rank = data.draw(st.integers(0, 4))
    whole = [data.draw(st.sampled_from([1, 2, 3, 5, 8, 9, 16])) for _ in range(rank)]
    feeds: dict[str, np.ndarray] = {}
    nodes: list[str] = []
    values: list[Value] = []
    for i in range(data.draw(st.integers(1, 3))):
        first = 0 if i == 0 else data.draw(st.integers(0, rank))
        shape = [1 if i and data.draw(st.booleans()) else d for d in whole[first:]]
        # Quarters: sums of them and comparisons are exact.
        array = np.asarray(np.random.default_rng([number, i]).integers(-12, 13, shape) / 4, np.float32)
        feeds[f"x{number}_{i}"] = array
        values.append(Value(f"x{number}_{i}", array.astype(np.float64), True))
    for i in range(data.draw(st.integers(1, 7))):
        a, b, c = (values[data.draw(st.integers(0, len(values) - 1))] for _ in range(3))
        name = f"v{number}_{i}"
        kind = data.draw(st.sampled_from([*UNARY, *BINARY, "Where", "Cast"]))
        if kind in STEPS | {"Where", "Cast"} and not (a.exact and b.exact):
            kind = "Neg"
        if kind == "Where":
            nodes.append(f"{name}_c = Less({a.name}, {b.name})  {name} = Where({name}_c, {b.name}, {c.name})")
            made = Value(name, np.where(a.array < b.array, b.array, c.array), c.exact)
        elif kind == "Cast":
            nodes.append(f"{name}_i = Cast<to=7>({a.name})  {name} = Cast<to=1>({name}_i)")
            made = Value(name, np.trunc(a.array), True)
        elif kind in UNARY:
            nodes.append(f"{name} = {kind}({a.name})")
            made = Value(name, UNARY[kind](a.array), a.exact and kind not in ("Tanh", "Sigmoid", "Sin"))
        else:
            nodes.append(f"{name} = {kind}({a.name}, {b.name})")
            result = BINARY[kind](a.array, b.array)
            exact = a.exact and b.exact and bool((result == result.astype(np.float32)).all())
            made = Value(name, result, exact)
        values.append(made)
    return nodes, feeds, values[-1]


@given(st.data())
@settings(max_examples=6, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
def test_random_trees(compile_model: Callable[..., Any], data: st.DataObject) -> None:
    """Three trees a compilation, in float64 up to what seven roundings can make of numbers of their size."""
    trees = [grow(data, n) for n in range(3)]

    def kind(array: np.ndarray) -> str:
        return f"float[{','.join(map(str, array.shape))}]" if array.ndim else "float"

    feeds = {name: array for _, arrays, _ in trees for name, array in arrays.items()}
    inputs = ", ".join(f"{kind(array)} {name}" for name, array in feeds.items())
    outputs = ", ".join(f"{kind(value.array)} {value.name}" for *_, value in trees)
    text = f"g ({inputs}) => ({outputs}) {{ {' '.join(n for nodes, *_ in trees for n in nodes)} }}"
    for (*_, value), got in zip(trees, compile_model(text).run(feeds), strict=True):
        assert got.shape == value.array.shape
        scale = max(1.0, float(np.abs(value.array).max(initial=0)))
        tolerance = 0 if value.exact else 2e-5 * scale
        np.testing.assert_allclose(got, value.array, rtol=0, atol=tolerance, err_msg=text)
