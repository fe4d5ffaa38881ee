"""Fused groups as kernels of their own: epilogues, refusals, kernels that are shared, and where constants go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphwright.runtime.target import Target
from onnx import numpy_helper, parser

pytestmark = pytest.mark.tvm


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) / 4).astype(np.float32)


def test_two_consumers(compile_model: Callable[..., Any]) -> None:
    """A product that two operators read, that is an output too, or whose readers meet again."""
    text = """g (float[5,16] x) => (float[5,24] a, float[5,24] b, float[5,24] c, float[5,24] p, float[5,24] q) {
      p = MatMul(x, w)  a = Relu(p)  b = Neg(p)
      r = MatMul(x, v)  s = Sigmoid(r)  t = Tanh(r)  c = Mul(s, t)
      m = MatMul(a, u)  n = MatMul(m, w)  q = Add(n, b) }"""
    weights = {"w": draw(16, 24), "v": draw(16, 24, seed=1), "u": draw(24, 16)}
    compile_model(text, **weights).check({"x": draw(5, 16)})


def test_a_result_that_its_epilogue_reads_twice(compile_model: Callable[..., Any]) -> None:
    text = """g (float[7,9] x) => (float[7,21] y, float[7,21] z) {
      p = MatMul(x, w)  b = Add(p, v)  s = Sigmoid(b)  y = Mul(b, s)
      q = MatMul(x, u)  r = Mul(q, q)  t = Add(r, q)  z = Sub(t, p) }"""
    model = compile_model(text, w=draw(9, 21), v=draw(21), u=draw(9, 21, seed=3))
    model.check({"x": draw(7, 9)})


RESIDUALS = [(3, 6, 20), (3, 6, 1), (3, 1, 20), (1, 6, 20), (6, 20), (6, 1), (20,), (3, 1, 1), (1,), (1, 1, 1), ()]


@pytest.mark.parametrize("columns", [20, 1, 8])
def test_residuals(columns: int, compile_model: Callable[..., Any]) -> None:
    """Broadcast along each axis of a batch of rows; as many columns as fill vectors, more, and one."""
    shapes = [tuple(columns if d == 20 else d for d in shape) for shape in RESIDUALS]

    def kind(shape: tuple[int, ...]) -> str:
        return f"float[{','.join(map(str, shape))}]" if shape else "float"

    inputs = ", ".join(f"{kind(shape)} r{i}" for i, shape in enumerate(shapes))
    outputs = ", ".join(f"float[3,6,{columns}] y{i}" for i in range(len(shapes)))
    nodes = " ".join(f"p{i} = MatMul(x, w)  q{i} = Add(p{i}, r{i})  y{i} = Relu(q{i})" for i in range(len(shapes)))
    feeds = {f"r{i}": draw(*shape, seed=i) if shape else np.asarray(draw(1)[0]) for i, shape in enumerate(shapes)}
    text = f"g (float[3,6,10] x, {inputs}) => ({outputs}) {{ {nodes} }}"
    compile_model(text, w=draw(10, columns)).check(feeds | {"x": draw(3, 6, 10)})


@pytest.mark.parametrize("columns", [16, 21])
def test_other_types_behind_a_product(columns: int, compile_model: Callable[..., Any]) -> None:
    """Casts within the epilogue and as its end: whole numbers and truth values."""
    n = columns
    text = f"""g (float[5,8] x, int64[5,{n}] k, bool[5,{n}] b)
        => (float[5,{n}] y, int64[5,{n}] i, int32[5,{n}] j, bool[5,{n}] m, float[5,{n}] z, float[5,{n}] u) {{
      p = MatMul(x, w)  t = Cast<to=7>(p)  f = Cast<to=1>(t)  y = Sub(p, f)
      q = MatMul(x, v)  s = Mul(q, ten)  i = Cast<to=7>(s)
      r = MatMul(x, w)  e = Mul(r, r)  j = Cast<to=6>(e)
      o = MatMul(x, v)  m = Greater(o, tenth)
      c = MatMul(x, w)  g = Cast<to=1>(k)  z = Mul(c, g)
      d = MatMul(x, v)  u = Where(b, d, tenth) }}"""
    weights = {"w": draw(8, n) * 4, "v": draw(8, n, seed=1) * 4, "ten": np.float32(10), "tenth": np.float32(0.1)}
    random = np.random.default_rng(0)
    feeds = {"x": draw(5, 8) * 4, "k": random.integers(-9, 9, (5, n)), "b": random.random((5, n)) < 0.5}
    compile_model(text, **weights).check(feeds)


def test_what_templates_refuse(compile_model: Callable[..., Any]) -> None:
    """Epilogues that change the shape, read other places, or compute what vectors cannot; products of other sizes."""
    text = """g (float[4,4] x, float[3,4,5] z, float[4] k)
        => (float[3,4,4] a, float[4,4] b, float[4] c, float[4,4] d, float[4,4] e, double[4,4] f, float[4,16] h,
            float[4] i, float[3,4,4] l, float[2,3,4,5] n) {
      p = MatMul(x, w)  q = MatMul(x, v)
      row = MatMul(first, w)  a0 = Add(row, three)  a = Relu(a0)
      t = Transpose<perm=[1,0]>(p)  b = Add(t, p)
      c = ReduceMax<keepdims=0>(q, zero)
      s = Sin(p)  d = Mul(s, q)
      u = Pow(p, q)  e0 = IsNaN(u)  e = Cast<to=1>(e0)
      f = Cast<to=11>(q)
      h0 = Concat<axis=1>(p, q, p, q)  h = Neg(h0)
      i0 = MatMul(x, k)  i = Relu(i0)
      l0 = MatMul(z, five)  l = Abs(l0)
      m = MatMul(x, z)  n = Mul(m, two) }"""
    weights = {
        "w": draw(4, 4), "v": draw(4, 4, seed=2), "first": draw(1, 4), "three": draw(3, 4, 1), "zero": np.int64([0]),
        "five": draw(5, 4), "two": draw(2, 1, 1, 1),
    }  # fmt: skip
    compile_model(text, **weights).check({"x": draw(4, 4) * 4, "z": draw(3, 4, 5), "k": draw(4, seed=9)})


PRODUCTS = [
    ((2, 3, 5, 6), (2, 3, 6, 9)), ((5, 6), (2, 3, 6, 9)), ((2, 3, 5, 6), (6, 9)), ((2, 3, 5, 6), (1, 1, 6, 9)),
    ((2, 1, 5, 6), (1, 3, 6, 9)), ((1, 3, 5, 6), (2, 1, 6, 17)), ((3, 5, 6), (2, 3, 6, 9)), ((6,), (6, 9)),
    ((2, 5, 6), (6,)), ((1, 6), (6, 1)), ((7, 1), (1, 9)), ((5, 6), (1, 1, 1, 6, 9)),
    ((0, 6), (6, 9)), ((2, 0), (0, 9)),
]  # fmt: skip


@pytest.mark.parametrize("constant", [True, False])
def test_ranks_of_products(constant: bool, compile_model: Callable[..., Any]) -> None:
    """Batches that meet or are broadcast, vectors, and nothing at all; B constant or computed."""
    inputs, outputs, nodes, feeds, weights = [], [], [], {}, {}
    for i, (a, b) in enumerate(PRODUCTS):
        out = np.matmul(np.zeros(a), np.zeros(b)).shape
        inputs.append(f"float[{','.join(map(str, a))}] a{i}")
        if not constant:
            inputs.append(f"float[{','.join(map(str, b))}] b{i}")
        outputs.append(f"float[{','.join(map(str, out))}] y{i}")
        nodes.append(f"p{i} = MatMul(a{i}, b{i})  y{i} = LeakyRelu(p{i})")
        feeds[f"a{i}"] = draw(*a, seed=i)
        (weights if constant else feeds)[f"b{i}"] = draw(*b, seed=i)
    text = f"g ({', '.join(inputs)}) => ({', '.join(outputs)}) {{ {' '.join(nodes)} }}"
    compile_model(text, **weights).check(feeds)


LAYERS = """g (float[6,32] x) => (float[6,32] y) {
  a = MatMul(x, w0)  b = Relu(a)  c = MatMul(b, w1)  d = Relu(c)  e = MatMul(d, w2)  f = Relu(e)
  h = MatMul(f, w0)  i = Add(h, x)  y = Relu(i) }"""


def layers() -> dict[str, np.ndarray]:
    return {f"w{i}": draw(32, 32, seed=i) for i in range(3)}


def test_equal_kernels_are_compiled_once(compile_model: Callable[..., Any]) -> None:
    """Three layers of one shape share a kernel; the fourth, with a residual, has its own."""
    model = compile_model(LAYERS, **layers())
    model.check({"x": draw(6, 32)})
    assert len(model.kernels()) == 2


def test_weights_are_kept_once(compile_model: Callable[..., Any], tmp_path: Path) -> None:
    """Packed weights are the only copy: none of their bytes are in the library, and each stands once in the
    parameters, however often it is read."""
    weights = layers() | {"k": draw(40, 16, 3, 3)}
    text = LAYERS.replace("(float[6,32] x)", "(float[6,32] x, float[1,16,9,9] p)").replace(
        "=> (float[6,32] y) {",
        "=> (float[6,32] y, float[1,40,9,9] q) { q = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(p, k)",
    )
    model = compile_model(text, **weights)
    model.check({"x": draw(6, 32), "p": draw(1, 16, 9, 9)})
    held = [c.numpy() for c in model.constants]
    lanes = Target.named("cpu").isa.lanes()
    assert sorted(c.size for c in held) == [1024, 1024, 1024, -(-40 // lanes) * lanes * 16 * 9]
    library = tmp_path / "library.o"
    model.executable.mod.imports[0].write_to_file(str(library))
    code = library.read_bytes()
    for constant in held:
        assert constant.reshape(-1)[:16].tobytes() not in code


def test_functions_behind_a_kernel_that_stores_in_many_places_are_a_kernel_of_their_own() -> None:
    """Mish behind each of the 126 vectors that a transposed convolution stores takes minutes to compile."""
    import tvm
    from graphwright.runtime import importer, phases

    target = Target.named("cpu-avx2")
    proto = parser.parse_model("""<ir_version: 10, opset_import: ["": 20]> g (float[n,16,64,64] x) => (float[n,8,a,c] y)
        { t = ConvTranspose <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w, b) y = Mish (t) }""")
    weights = {"w": draw(16, 8, 4, 4), "b": draw(8)}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    with target.tvm(), tvm.transform.PassContext(opt_level=3):
        module = phases.fuse(phases.legalize(importer.import_model(proto, target), target), target)
    names = [variable.name_hint for variable, _ in module.functions_items()]
    assert any("conv-transposed" in name for name in names)
    assert any(name.startswith("blocked") for name in names)


@pytest.mark.parametrize("name", ["cpu-avx2", "cpu-avx512"])
def test_a_product_of_free_sizes_compiles_in_seconds(
    name: str, compile_model: Callable[..., Any], runnable: Callable[[str], Target]
) -> None:
    """TVM once put floors by sizes of the run into one another, in every vector of the epilogue: 7 and 21 seconds."""
    import time

    text = """g (float[b, n, 32] x, float[1, n, 24] r) => (float[1, n, 24] y, float[b, 3, n, 24] z) {
      m = MatMul (r, v)  s = Sigmoid (m)  t = Mul (m, s)  y = Add (t, r)
      p = MatMul (x, w)  a = Add (p, r)  q = Unsqueeze (a, one)  z = Expand (q, shape) }"""
    start = time.process_time()
    constants = {"one": np.array([1]), "shape": np.array([1, 3, 1, 1])}
    model = compile_model(text, runnable(name).name, w=draw(32, 24), v=draw(24, 24), **constants)
    assert time.process_time() - start < 6
    for b, n in ((1, 5), (3, 61)):
        model.check({"x": draw(b, n, 32), "r": draw(1, n, 24)})


def test_functions_of_functions_compile_in_seconds(compile_model: Callable[..., Any]) -> None:
    """x tanh(log(1 + e^x)): TVM once wrote each function out wherever its result occurred in the next, 16 seconds."""
    import time

    text = """g (float[1, 12, 30, 31] x) => (float[1, 20, 30, 31] y) {
      c = Conv <pads = [2, 2, 2, 2]> (x, w)  y = Mish (c) }"""
    start = time.process_time()
    model = compile_model(text, w=draw(20, 12, 5, 5))
    assert time.process_time() - start < 6
    model.check({"x": draw(1, 12, 30, 31)})


@pytest.mark.parametrize("name", ["cpu", "cpu-avx2", "cpu-baseline"])
def test_products_of_free_columns(
    name: str, compile_model: Callable[..., Any], runnable: Callable[[str], Target]
) -> None:
    """Scores of attention that nothing recognises, of each item and of a matrix for all, with what is fused to them."""
    text = """g (float[b, h, l, d] x, float[b, h, d, s] v, float[1, 1, l, s] r, float[d, s] w)
        => (float[b, h, l, s] y, float[b, h, l, s] z) {
      m = MatMul (x, v)  y = Add (m, r)  n = MatMul (x, w)  z = Sigmoid (n) }"""
    model = compile_model(text, runnable(name).name)
    assert model.kernels("gemm") and not model.kernels("matmul")
    sizes = [(1, 2, 5, 7, 3), (3, 2, 61, 130, 9), (1, 1, 1, 1, 1), (2, 1, 17, 64, 8), (1, 2, 3, 63, 16)]
    for b, h, rows, s, d in [*sizes, (1, 2, 3, 65, 16), (1, 1, 200, 129, 33), (1, 1, 0, 5, 3), (1, 1, 4, 0, 3)]:
        shapes = {"x": (b, h, rows, d), "v": (b, h, d, s), "r": (1, 1, rows, s), "w": (d, s)}
        model.check({key: draw(*shape) for key, shape in shapes.items()})
