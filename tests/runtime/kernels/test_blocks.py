"""Operators between convolutions whose tensors stay in blocks of channels, and the ways in and out of blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from graphwright.runtime.target import Target
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper, parser

tvm = pytest.importorskip("tvm")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.tvm

from graphwright.runtime import phases  # noqa: E402
from graphwright.runtime.blocked import blocked_array  # noqa: E402
from graphwright.runtime.codegen import machine_code  # noqa: E402
from graphwright.runtime.importer import import_model  # noqa: E402
from graphwright.runtime.kernels import moves  # noqa: E402
from graphwright.runtime.kernels.channels import pieces  # noqa: E402

HEADER = '<ir_version: 10, opset_import: ["" : 20]>'
TARGET = Target.named("cpu")
X86 = ["cpu-avx512", "cpu-avx2", "cpu-baseline"]


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(math.prod(shape)).standard_normal(shape, np.float32)


def model(text: str, weights: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    proto = parser.parse_model(f"{HEADER}\n{text}")
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items())
    return proto


def compare(text: str, target: Target = TARGET, **weights: np.ndarray) -> list[str]:
    """Compile and compare with onnxruntime; the names of the kernels, those that do nothing left out."""
    from tvm import relax

    proto = model(text, weights)
    seen: list[Any] = []
    executable, constants = phases.compile_module(import_model(proto, target), target, seen.append)
    feeds = {
        i.name: draw(*(d.dim_value for d in i.type.tensor_type.shape.dim))
        for i in proto.graph.input
        if i.name not in weights
    }
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, feeds)
    inputs = [tvm.runtime.tensor(f) for f in feeds.values()]
    got = relax.VirtualMachine(executable, tvm.cpu())["main"](*inputs, tuple(constants))
    for e, g in zip(expected, got if len(expected) > 1 else [got], strict=True):
        g = g.numpy()
        assert g.shape == e.shape and g.dtype == e.dtype
        np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-5 * float(np.abs(e).max()))
    called: set[str] = set()

    def visit(e: Any) -> None:
        if isinstance(e, tvm.ir.GlobalVar):
            called.add(e.name_hint)

    relax.analysis.post_order_visit(seen[0]["main"], visit)
    return sorted(name for name in called if "reshape" not in name)


# --- into blocks and out of them --------------------------------------------------------------------------------


@pytest.mark.parametrize("places", [(1,), (3,), (7,), (8,), (9,), (4, 4), (5, 7), (16, 17)])
@pytest.mark.parametrize("channels", [1, 7, 8, 9, 15, 16, 17, 24, 33])
@pytest.mark.parametrize("name", ["cpu-avx512", "cpu-avx2"])
def test_into_blocks_and_out(
    runnable: Callable[[str], Target], name: str, channels: int, places: tuple[int, ...]
) -> None:
    moved(runnable(name), draw(2, channels, *places))


@pytest.mark.parametrize("places", [(1,), (3,), (9,), (16, 17)])
@pytest.mark.parametrize("channels", [1, 7, 8, 17, 33])
@pytest.mark.parametrize("name, dtype", [("cpu-avx512", "int8"), ("cpu-avx2", "uint8"), ("cpu-baseline", "uint8")])
def test_bytes_into_blocks_and_out(
    runnable: Callable[[str], Target], name: str, dtype: str, channels: int, places: tuple[int, ...]
) -> None:
    random = np.random.default_rng(channels)
    moved(runnable(name), random.integers(0, 120, (2, channels, *places)).astype(dtype))


def moved(target: Target, x: np.ndarray) -> None:
    channels, places = x.shape[1], x.shape[2:]
    lanes = max(4, target.isa.lanes(32))
    packed = blocked_array(x, lanes)
    functions = {n: moves.blocks(x.shape, target, n == "pack", str(x.dtype)) for n in ("pack", "unpack")}
    module = tvm.IRModule({n: f.with_attr("global_symbol", n) for n, f in functions.items()})
    compiled = machine_code(module, target)
    y = tvm.runtime.tensor(np.full(packed.shape, 7, x.dtype))
    compiled["pack"](tvm.runtime.tensor(x), y)
    there = np.moveaxis(y.numpy(), -1, 2).reshape(2, -1, *places)
    np.testing.assert_array_equal(there[:, :channels], x)
    assert np.isfinite(there).all() and np.abs(there).max() <= np.abs(x).max()
    back = tvm.runtime.tensor(np.full(x.shape, 7, x.dtype))
    compiled["unpack"](tvm.runtime.tensor(packed), back)
    np.testing.assert_array_equal(back.numpy(), x)


# --- channels behind each other, and ranges of them -------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=5),
    st.sampled_from([4, 8, 16]),
)
def test_every_lane_is_made_of_the_right_channel(ranges, lanes) -> None:
    """ranges: channels taken, and those before and after them in the tensor they are of."""
    expected = [(i, before + c) for i, (count, before, _) in enumerate(ranges) for c in range(count)]
    got = {}
    for block, made in enumerate(pieces([(i, b, c) for i, (c, b, _) in enumerate(ranges)], lanes)):
        for p in made:
            for j in range(p.count):
                got[block * lanes + p.at + j] = (p.source, (block + p.block) * lanes + p.lane + j)
    assert [got[c] for c in range(len(got))] == expected


@pytest.mark.parametrize("channels", [(8, 8), (24, 24), (3, 5, 9), (1, 1, 1, 1), (17, 16, 15), (40, 7)])
@pytest.mark.parametrize("name", X86)
def test_concat_of_convolutions(runnable: Callable[[str], Target], name: str, channels: tuple[int, ...]) -> None:
    weights = {f"w{i}": draw(c, 8, 1, 1) for i, c in enumerate(channels)}
    convs = "  ".join(f"c{i} = Conv(x, w{i})" for i in range(len(channels)))
    names = ", ".join(f"c{i}" for i in range(len(channels)))
    text = f"""g (float[2,8,5,6] x) => (float[2,4,5,6] y) {{
      {convs}  t = Concat<axis=1>({names})  y = Conv(t, v) }}"""
    kernels = compare(text, runnable(name), v=draw(4, sum(channels), 1, 1), **weights)
    # One way into blocks, one out; nothing between.
    assert sum("pack" in k or "transpose" in k for k in kernels) <= 2


def test_concat_with_a_plain_tensor() -> None:
    text = """g (float[1,8,5,6] x, float[1,3,5,6] z) => (float[1,4,5,6] y) {
      c = Conv(x, w)  t = Concat<axis=1>(z, c)  y = Conv(t, v) }"""
    compare(text, w=draw(13, 8, 1, 1), v=draw(4, 16, 1, 1))


def test_concat_along_one_axis_of_the_image() -> None:
    text = """g (float[1,8,5,30] x) => (float[1,4,5,60] y) {
      c = Conv(x, w)  d = Conv(x, u)  t = Concat<axis=3>(c, d)  y = Conv(t, v) }"""
    compare(text, w=draw(16, 8, 1, 1), u=draw(16, 8, 1, 1), v=draw(4, 16, 1, 1))


@pytest.mark.parametrize("sizes", [(8, 24), (16, 16), (5, 27), (1, 30, 1), (4, 4, 4, 20)])
@pytest.mark.parametrize("name", X86)
def test_split_between_convolutions(runnable: Callable[[str], Target], name: str, sizes: tuple[int, ...]) -> None:
    names = [f"s{i}" for i in range(len(sizes))]
    weights = {f"w{i}": draw(8, c, 1, 1) for i, c in enumerate(sizes)}
    convs = "  ".join(f"c{i} = Conv({n}, w{i})" for i, n in enumerate(names))
    total = ", ".join(f"c{i}" for i in range(len(sizes)))
    text = f"""g (float[2,8,5,6] x) => (float[2,8,5,6] y) {{
      t = Conv(x, u)  {", ".join(names)} = Split<axis=1>(t, p)  {convs}  y = Sum({total}) }}"""
    kernels = compare(text, runnable(name), u=draw(32, 8, 1, 1), p=np.array(sizes), **weights)
    assert sum("pack" in k or "transpose" in k for k in kernels) <= 2


def test_one_dimensional_concat_and_slice() -> None:
    text = """g (float[1,8,24] x) => (float[1,4,20] y) { c = Conv(x, w)  d = Conv(x, u)  t = Concat<axis=1>(c, d)
      s = Slice(t, a, b, ax)  y = Conv(s, v) }"""
    numbers = {"a": np.array([3]), "b": np.array([14]), "ax": np.array([1])}
    compare(text, w=draw(9, 8, 3), u=draw(7, 8, 3), v=draw(4, 11, 3), **numbers)


# --- what follows a kernel --------------------------------------------------------------------------------------

ACTIVATIONS = {
    "Relu": "t = Relu(c)",
    "HardSwish": "t = HardSwish(c)",
    "HardSigmoid": "t = HardSigmoid(c)",
    "HardSwish in four": "a = Add(c, three)  b = Clip(a, zero, top)  d = Mul(c, b)  t = Div(d, six)",
    "a scalar": "t = Add(c, three)",
    "PRelu": "t = PRelu(c, slope)",
    "LeakyRelu": "t = LeakyRelu(c)",
    "Clip": "t = Clip(c, zero, top)",
    "SiLU": "a = Sigmoid(c)  t = Mul(c, a)",
    "Mish": "a = Softplus(c)  b = Tanh(a)  t = Mul(c, b)",
    "Gelu": "t = Gelu(c)",
    "BatchNormalization": "t = BatchNormalization(c, scale, shift, mean, variance)",
    "the block's input": "t = Add(c, x)",
}
NUMBERS = {
    "three": np.float32([3]), "six": np.float32([6]), "zero": np.float32(0), "top": np.float32(6),
    "slope": draw(16, 1, 1), "scale": draw(16), "shift": draw(16), "mean": draw(16), "variance": np.abs(draw(16)) + 1,
}  # fmt: skip


def with_numbers(body: str, **weights: np.ndarray) -> dict[str, np.ndarray]:
    """The weights, and those of NUMBERS that a body names."""
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return {**weights, **{name: value for name, value in NUMBERS.items() if name in words}}


def moving(kernels: list[str]) -> list[str]:
    return [k for k in kernels if "pack" in k or "transpose" in k]


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_a_convolution_computes_what_follows(case: str) -> None:
    body = ACTIVATIONS[case]
    text = f"""g (float[1,16,6,7] x) => (float[1,16,6,7] y) {{
      c = Conv<pads=[1,1,1,1]>(x, w)  {body}  y = Conv<pads=[1,1,1,1]>(t, v) }}"""
    kernels = compare(text, **with_numbers(body, w=draw(16, 16, 3, 3), v=draw(16, 16, 3, 3)))
    assert len(moving(kernels)) == 2 and len(kernels) == 4, kernels


NORMALIZED = {
    "MaxPool": ("b = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(c)", 24),
    "Concat": ("d = Conv(x, u)  b = Concat<axis=1>(c, d)", 31),
    "Slice": ("b = Slice(c, first, last, one)", 13),
}


@pytest.mark.parametrize("case", NORMALIZED)
def test_a_normalization_after_another_kernel(case: str) -> None:
    before, channels = NORMALIZED[case]
    text = f"""g (float[1,8,6,7] x) => (float[1,8,6,7] y) {{
      c = Conv(x, w)  {before}  n = BatchNormalization(b, s, h, m, r)  t = Relu(n)  y = Conv(t, v) }}"""
    weights = {"w": draw(24, 8, 1, 1), "v": draw(8, channels, 1, 1)}
    if case == "Concat":
        weights["u"] = draw(7, 8, 1, 1)
    if case == "Slice":
        weights |= {"first": np.array([5]), "last": np.array([18]), "one": np.array([1])}
    normal = {name: draw(channels) for name in ("s", "h", "m")}
    kernels = compare(text, **weights, **normal, r=np.abs(draw(channels)) + 1)
    assert len(moving(kernels)) == 2 and len(kernels) == 5 + (case == "Concat"), kernels


@pytest.mark.parametrize("gate", ["Sigmoid", "HardSigmoid"])
@pytest.mark.parametrize("mean", ["GlobalAveragePool(c)", "ReduceMean<keepdims=1>(c, axes)"])
def test_squeeze_and_excite_in_four_kernels(gate: str, mean: str) -> None:
    """The mean, two small convolutions with what follows each, and the product with what is added to it."""
    text = f"""g (float[1,8,6,7] x) => (float[1,8,6,7] y) {{
      c = Conv(x, w)  p = {mean}  a = Conv(p, w1, b1)  b = Relu(a)  d = Conv(b, w2, b2)  e = {gate}(d)
      f = Mul(c, e)  t = Add(c, f)  y = Conv(t, v) }}"""
    weights = {"w": draw(16, 8, 1, 1), "v": draw(8, 16, 1, 1), "w1": draw(5, 16, 1, 1), "w2": draw(16, 5, 1, 1)}
    axes = {"axes": np.array([2, 3])} if "axes" in mean else {}
    kernels = compare(text, **weights, **axes, b1=draw(5), b2=draw(16))
    assert len(moving(kernels)) == 2 and len(kernels) == 8, kernels
