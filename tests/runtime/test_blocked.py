"""Convolutional networks through the compile road, in blocks of channels and out of them, against onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.tvm

CHANNELS = (1, 3, 4, 5, 15, 16, 17, 33)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    """Weights of a size that keeps values near 1 from one convolution to the next."""
    scale = 1 / np.sqrt(np.prod(shape[1:])) if len(shape) > 2 else 1.0
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(np.float32)


def feeds(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: draw(*shape, seed=7) * np.float32(np.sqrt(np.prod(shape[1:]))) for name, shape in shapes.items()}


SLOW = [pytest.param(c, batch, marks=pytest.mark.slow) for c in CHANNELS for batch in (2, 5)]


@pytest.mark.parametrize(("channels", "batch"), [(1, 1), (17, 3), *SLOW])
def test_a_residual_block(channels: int, batch: int, compile_model: Callable[..., Any]) -> None:
    """conv -> batch normalization -> relu -> add -> conv, with a residual from in front of it."""
    c = channels
    text = f"""g (float[{batch},{c},7,9] x) => (float[{batch},{c},7,9] y) {{
      a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w, b)
      n = BatchNormalization(a, scale, shift, mean, var)
      r = Relu(n)  s = Add(r, x)
      y = Conv<kernel_shape=[1,1]>(s, v) }}"""
    weights = {
        "w": draw(c, c, 3, 3), "b": draw(c), "scale": draw(c, seed=1), "shift": draw(c, seed=2),
        "mean": draw(c, seed=3), "var": np.abs(draw(c, seed=4)) + np.float32(0.5), "v": draw(c, c, 1, 1),
    }  # fmt: skip
    model = compile_model(text, **weights)
    model.check(feeds(x=(batch, c, 7, 9)))
    assert not model.kernels("batch_norm")


@pytest.mark.parametrize("first", [8, 17, *(pytest.param(c, marks=pytest.mark.slow) for c in (5, 16, 24))])
def test_channels_behind_each_other(first: int, compile_model: Callable[..., Any]) -> None:
    """Concatenations that fill blocks and that do not, followed by a convolution."""
    text = """g (float[2,6,5,5] x) => (float[2,9,5,5] y) {
      a = Conv<kernel_shape=[1,1]>(x, w)  b = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, v)
      c = Concat<axis=1>(a, b)  r = LeakyRelu(c)  y = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(r, u) }"""
    weights = {"w": draw(first, 6, 1, 1), "v": draw(11, 6, 3, 3), "u": draw(9, first + 11, 3, 3)}
    compile_model(text, **weights).check(feeds(x=(2, 6, 5, 5)))


POOLS = {
    "max": "MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>",
    "max, ceil": "MaxPool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>",
    "max, ceil, window beyond the end": "MaxPool<kernel_shape=[2,2], strides=[3,3], ceil_mode=1>",
    "max, dilated": "MaxPool<kernel_shape=[2,3], dilations=[3,2], pads=[1,2,1,2]>",
    "mean": "AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>",
    "mean, padding counts": "AveragePool<kernel_shape=[3,3], strides=[1,2], pads=[1,1,1,1], count_include_pad=1>",
    "mean, uneven pads": "AveragePool<kernel_shape=[2,4], pads=[0,3,1,0]>",
    "mean, ceil": "AveragePool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>",
    "mean, dilated": "AveragePool<kernel_shape=[2,2], dilations=[2,3], pads=[1,1,0,1]>",
    "mean, wide": "AveragePool<kernel_shape=[1,7], pads=[0,3,0,3]>",
}


@pytest.mark.parametrize("channels", [*(pytest.param(c, marks=pytest.mark.slow) for c in (3, 16)), 17])
def test_poolings(channels: int, compile_model: Callable[..., Any]) -> None:
    """All of them over one convolution, and some also read by another one."""
    from onnx import parser, shape_inference

    c = channels
    nodes = "\n".join(f"p{i} = {pool}(a)" for i, pool in enumerate(POOLS.values()))
    nodes += "\n".join(f"q{i} = Conv<kernel_shape=[1,1]>(p{i}, v)" for i in (2, 5, 8))
    outputs = ", ".join(
        [f"float[n,c,h,w] p{i}" for i in range(len(POOLS))] + [f"float[n,c,h,w] q{i}" for i in (2, 5, 8)]
    )
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
      g (float[2,{c},11,14] x) => ({outputs}) {{ a = Conv<kernel_shape=[1,1]>(x, w) {nodes} }}"""
    proto = parser.parse_model(text)
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    proto = shape_inference.infer_shapes(proto)
    compile_model(proto, w=draw(c, c, 1, 1), v=draw(5, c, 1, 1)).check(feeds(x=(2, c, 11, 14)))


@pytest.mark.parametrize("name", ["cpu", "cpu-avx2", "cpu-baseline"])
def test_the_greatest_of_nothing_but_nan_is_nan(
    name: str, runnable: Callable[..., Any], compile_model: Callable[..., Any]
) -> None:
    """Beside finite numbers NaN does not count, whatever its place in the window; padding never wins."""
    runnable(name)
    text = """g (float[1,17,6,9] x) => (float[1,17,3,4] a, float[1,17,6,9] b, float[1,17,6,7] c, float[1,17,1,1] d) {
      a = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x)
      b = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(x)
      c = MaxPool<kernel_shape=[2,2], dilations=[5,2], pads=[2,0,3,0]>(x)
      d = GlobalMaxPool(x) }"""
    model = compile_model(text, name)
    x = np.random.default_rng(0).standard_normal((1, 17, 6, 9)).astype(np.float32)
    x[np.random.default_rng(1).random(x.shape) < 0.6] = np.nan
    x[0, 3], x[0, 4], x[0, 5] = np.nan, -np.inf, np.inf

    def greatest(kernel: tuple[int, int], strides: int, dilations: tuple[int, int], pads: tuple[int, ...]) -> Any:
        padded = np.pad(x.astype(float), ((0, 0), (0, 0), pads[::2], pads[1::2]), constant_values=np.nan)
        real = np.pad(np.ones(x.shape, bool), ((0, 0), (0, 0), pads[::2], pads[1::2]))
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        views = [
            np.lib.stride_tricks.sliding_window_view(a, reach, (2, 3))[
                :, :, ::strides, ::strides, :: dilations[0], :: dilations[1]
            ]
            for a in (padded, real)
        ]
        found = np.fmax.reduce(views[0], axis=(4, 5))
        return np.where(views[1].any((4, 5)), found, -np.inf)

    expected = [
        greatest((2, 2), 2, (1, 1), (0, 0, 0, 0)),
        greatest((3, 3), 1, (1, 1), (1, 1, 1, 1)),
        greatest((2, 2), 1, (5, 2), (2, 0, 3, 0)),
        np.fmax.reduce(x.astype(float), axis=(2, 3), keepdims=True),
    ]
    assert all(np.isnan(array).any() and not np.isnan(array).all() for array in expected)
    for got, wanted in zip(model.run({"x": x}), expected, strict=True):
        np.testing.assert_array_equal(got, wanted.astype(np.float32))


@pytest.mark.parametrize("channels", [17])
def test_poolings_of_one_axis_and_of_all(channels: int, compile_model: Callable[..., Any]) -> None:
    c = channels
    text = f"""g (float[3,{c},13] x, float[3,{c},5,6] z)
        => (float[3,{c},6] a, float[3,{c},13] b, float[3,{c},1] d, float[3,{c},1,1] e, float[3,7,1,1] f) {{
      k = Conv<kernel_shape=[3], pads=[1,1]>(x, w)
      a = MaxPool<kernel_shape=[3], strides=[2]>(k)
      b = AveragePool<kernel_shape=[4], pads=[2,1], count_include_pad=1>(k)
      d = GlobalAveragePool(k)
      m = Conv<kernel_shape=[1,1]>(z, v)  e = GlobalAveragePool(m)
      s = Sigmoid(e)  t = Mul(m, s)  o = GlobalAveragePool(t)  f = Conv<kernel_shape=[1,1]>(o, u) }}"""
    weights = {"w": draw(c, c, 3), "v": draw(c, c, 1, 1), "u": draw(7, c, 1, 1)}
    compile_model(text, **weights).check(feeds(x=(3, c, 13), z=(3, c, 5, 6)))


def test_more_places_without_interpolation(compile_model: Callable[..., Any]) -> None:
    """Upsampling by whole numbers between convolutions, as a pyramid of features has it."""
    text = """g (float[2,5,4,6] x, float[2,17,8,18] z) => (float[2,9,8,18] y, float[2,17,8,18] u) {
      a = Conv<kernel_shape=[1,1]>(x, w)
      u = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(a, , scales)
      c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(z, v)  s = Add(u, c)
      y = Conv<kernel_shape=[1,1]>(s, k) }"""
    weights = {
        "w": draw(17, 5, 1, 1), "v": draw(17, 17, 3, 3), "k": draw(9, 17, 1, 1), "scales": np.float32([1, 1, 2, 3]),
    }  # fmt: skip
    compile_model(text, **weights).check(feeds(x=(2, 5, 4, 6), z=(2, 17, 8, 18)))


ONE_AXIS = {
    "plain": (5, 12, 1, "kernel_shape=[3], pads=[1,1]"),
    "stride": (17, 16, 1, "kernel_shape=[5], strides=[2]"),
    "dilated": (16, 3, 1, "kernel_shape=[3], dilations=[4], pads=[4,4]"),
    "one side": (3, 33, 1, "kernel_shape=[4], pads=[3,0]"),
    "groups": (12, 18, 3, "kernel_shape=[3], group=3"),
    "depthwise": (17, 17, 17, "kernel_shape=[3], group=17, pads=[1,1]"),
}


def test_convolutions_of_one_axis(compile_model: Callable[..., Any]) -> None:
    from onnx import helper, parser, shape_inference

    inputs = ", ".join(f"float[2,{c},19] x{i}" for i, (c, _, _, _) in enumerate(ONE_AXIS.values()))
    nodes = " ".join(f"y{i} = Conv<{attributes}>(x{i}, w{i})" for i, (*_, attributes) in enumerate(ONE_AXIS.values()))
    outputs = ", ".join(f"float y{i}" for i in range(len(ONE_AXIS)))
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> g ({inputs}) => ({outputs}) {{ {nodes} }}')
    weights = {}
    for i, (c, k, groups, attributes) in enumerate(ONE_AXIS.values()):
        weights[f"w{i}"] = draw(k, c // groups, int(attributes.split("[")[1].split("]")[0]))
        proto.graph.output[i].type.CopyFrom(helper.make_tensor_type_proto(1, None))
    known = shape_inference.infer_shapes(with_weights(proto, weights))
    compile_model(known).check(feeds(**{f"x{i}": (2, c, 19) for i, (c, *_) in enumerate(ONE_AXIS.values())}))


def with_weights(proto: Any, weights: dict[str, np.ndarray]) -> Any:
    from onnx import numpy_helper

    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    return proto


REST = ((24, 24, 24), (33, 33, 33), (12, 20, 4), (15, 15, 5), (40, 80, 40), (80, 40, 40))
GROUPS = [pytest.param(*sizes, marks=pytest.mark.slow) for sizes in REST]


@pytest.mark.parametrize(
    ("inputs", "outputs", "groups"), [(16, 32, 2), (17, 17, 17), (6, 12, 6), (32, 32, 8), (15, 21, 3), *GROUPS]
)
def test_groups(inputs: int, outputs: int, groups: int, compile_model: Callable[..., Any]) -> None:
    text = f"""g (float[2,{inputs},6,7] x) => (float[2,{outputs},6,7] y) {{
      a = Conv<kernel_shape=[3,3], pads=[1,1,1,1], group={groups}>(x, w, b)  r = Relu(a)
      y = Conv<kernel_shape=[1,1]>(r, v) }}"""
    weights = {"w": draw(outputs, inputs // groups, 3, 3), "b": draw(outputs), "v": draw(outputs, outputs, 1, 1)}
    model = compile_model(text, **weights)
    model.check(feeds(x=(2, inputs, 6, 7)))
    assert bool(model.kernels("conv2d")) == (groups > 32 and outputs < inputs)  # TVM's general code


@pytest.mark.parametrize(
    ("inputs", "outputs", "groups", "kernel", "more"),
    [
        (24, 24, 2, 3, "output_padding=[1,1]"), (10, 6, 2, 2, ""), (12, 24, 6, 3, ""),
        pytest.param(15, 12, 3, 4, "", marks=pytest.mark.slow),
    ],
)
def test_groups_of_transposed_convolutions(
    inputs: int, outputs: int, groups: int, kernel: int, more: str, compile_model: Callable[..., Any]
) -> None:
    attributes = ", ".join(filter(None, ["strides=[2,2]", f"group={groups}", more]))
    text = f"""g (float[batch,{inputs},6,7] x) => (float[batch,{outputs},h,w] y) {{
      a = ConvTranspose<{attributes}>(x, w, b)  y = Relu(a) }}"""
    model = compile_model(text, w=draw(inputs, outputs // groups, kernel, kernel), b=draw(outputs))
    model.check(feeds(x=(2, inputs, 6, 7)))
    assert not model.kernels("conv2d")


def test_batches_known_at_run_time_of_groups_that_share_vectors(compile_model: Callable[..., Any]) -> None:
    text = "g (float[batch,10,5,6] x) => (float[batch,6,3,4] y) { y = Conv<group=2>(x, w) }"
    model = compile_model(text, w=draw(6, 5, 3, 3))
    for batch in (1, 3):
        model.check(feeds(x=(batch, 10, 5, 6)))


@pytest.mark.parametrize("channels", [5, 16])
def test_values_used_in_blocks_and_plain(channels: int, compile_model: Callable[..., Any]) -> None:
    """Results that convolutions, other operators and the caller read, in the middle and at the end."""
    c = channels
    text = f"""g (float[2,{c},4,6] x)
        => (float[2,{c},4,6] a, float[2,{c},4,6] r, float[2,4,6,{c}] t, float[2,{4 * 6 * c}] f, float[2,{c},4,6] y,
            float[2,{c},4,1] m) {{
      a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w)
      r = Relu(a)  t = Transpose<perm=[0,2,3,1]>(r)  f = Flatten(a)
      m = ReduceMax<keepdims=1>(a, last)  d = Add(r, m)
      b = Conv<kernel_shape=[1,1]>(d, v)  y = Mul(b, a) }}"""
    weights = {"w": draw(c, c, 3, 3), "v": draw(c, c, 1, 1), "last": np.int64([3])}
    compile_model(text, **weights).check(feeds(x=(2, c, 4, 6)))


@pytest.mark.parametrize("channels", [pytest.param(4, marks=pytest.mark.slow), 17])
def test_operators_that_are_not_finite_beyond_the_last_channel(
    channels: int, compile_model: Callable[..., Any]
) -> None:
    """Lanes that no channel fills are 0 or a bias: 1 / 0, log 0 and sqrt of less must not reach the next sum."""
    c = channels
    text = f"""g (float[1,{c},5,5] x) => (float[1,6,5,5] y, float[1,6,5,5] z, float[1,6,5,5] u, float[1,6,5,5] s) {{
      p = Conv<kernel_shape=[1,1]>(x, w)  a = Abs(p)  o = Add(a, one)
      q = Div(p, a)  i = Reciprocal(a)  l = Log(a)  r = Sqrt(a)  e = Exp(p)  k = Sum(q, l, r, e)
      y = Conv<kernel_shape=[1,1]>(k, v)  z = Conv<kernel_shape=[1,1]>(i, v)
      j = Sub(o, big)  n = Mul(o, far)  h = Min(j, n)  g = Max(h, low)  u = Conv<kernel_shape=[1,1]>(g, v)
      m = Softplus(p)  f = Mul(m, p)  s = Conv<kernel_shape=[1,1]>(f, v) }}"""
    far = np.ones((1, c, 1, 1), np.float32)
    weights = {
        "w": draw(c, c, 1, 1), "v": draw(6, c, 1, 1), "one": np.float32(1), "far": far, "low": np.float32(-3),
        "big": np.full((1, c, 1, 1), 2, np.float32),
    }  # fmt: skip
    compile_model(text, **weights).check(feeds(x=(1, c, 5, 5)), 2e-5)


@pytest.mark.parametrize("channels", [3, 16, 17])
def test_broadcasts_over_each_axis(channels: int, compile_model: Callable[..., Any]) -> None:
    """Against tensors in blocks: constants and computed values that have channels, and that have none."""
    c = channels
    text = f"""g (float[2,{c},5,6] x, float[1,1,5,6] plane, float[2,1,1,1] item, float[6] row, float[2,{c},1,1] gate)
        => (float[2,{c},5,6] y, float[2,{c},5,6] z) {{
      a = Conv<kernel_shape=[1,1]>(x, w)
      b = Add(a, plane)  d = Mul(b, item)  e = Add(d, row)  f = Mul(e, perchannel)  h = Add(f, first)
      s = Conv<kernel_shape=[1,1]>(gate, w)  t = Mul(h, s)  i = Mul(t, gate)
      z = Conv<kernel_shape=[1,1]>(t, v)  y = Conv<kernel_shape=[1,1]>(i, v) }}"""
    weights = {
        "w": draw(c, c, 1, 1), "v": draw(c, c, 1, 1), "perchannel": draw(c, 1, 1, seed=5), "first": draw(1, c, 5, 1),
    }  # fmt: skip
    shapes = {"x": (2, c, 5, 6), "plane": (1, 1, 5, 6), "item": (2, 1, 1, 1), "row": (6,), "gate": (2, c, 1, 1)}
    compile_model(text, **weights).check(feeds(**shapes))


@pytest.mark.parametrize("channels", [3, 8])
def test_axes_taken_away_and_turned(channels: int, compile_model: Callable[..., Any]) -> None:
    """Operators whose second axis is no longer that of the channels, before further ones that keep places."""
    c = channels
    text = f"""g (float[3,2,{c},8] x) => (float[3,{c},8] y, float[3,8,{c}] t, float[2,3,{c},8] p, float[3,1,{c},8] k,
            float[3,2,8,{c}] q, float[3,2,{c},3] l) {{
      a = Conv<kernel_shape=[1,1]>(x, w)  s = Squeeze(a, one)  y = Relu(s)
      u = Transpose<perm=[0,2,1]>(s)  t = Neg(u)
      b = Conv<kernel_shape=[1,1]>(x, v)  d = Transpose<perm=[1,0,2,3]>(b)  p = Relu(d)
      e = Slice(b, one, two, one)  k = Abs(e)
      f = Transpose<perm=[0,1,3,2]>(b)  q = Conv<kernel_shape=[1,1]>(f, v)
      h = Slice(b, two, five, three)  l = Conv<kernel_shape=[1,1]>(h, v) }}"""
    weights = {
        "w": draw(1, 2, 1, 1), "v": draw(2, 2, 1, 1), "one": np.int64([1]), "two": np.int64([2]),
        "five": np.int64([5]), "three": np.int64([3]),
    }  # fmt: skip
    compile_model(text, **weights).check(feeds(x=(3, 2, c, 8)))


def test_channels_of_tensors_of_other_ranks(compile_model: Callable[..., Any]) -> None:
    """Aligned to the right, the channels of a tensor of three axes meet the rows of one of four."""
    text = """g (float[5,4,6] x, float[2,5,4,6] z) => (float[2,5,4,6] y) {
      a = Conv<kernel_shape=[1]>(x, w)  b = Conv<kernel_shape=[1,1]>(z, v)  c = Add(a, b)
      y = Conv<kernel_shape=[1,1]>(c, v) }"""
    compile_model(text, w=draw(4, 4, 1), v=draw(5, 5, 1, 1)).check(feeds(x=(5, 4, 6), z=(2, 5, 4, 6)))


@pytest.mark.parametrize("channels", [5, 16])
def test_other_types_in_blocks(channels: int, compile_model: Callable[..., Any]) -> None:
    """Comparisons, choices and casts between convolutions; whole numbers and truth values as outputs."""
    c = channels
    text = f"""g (float[2,{c},4,5] x)
        => (float[2,{c},4,5] y, int64[2,{c},4,5] i, bool[2,{c},4,5] m, int32[2,{c},4,5] j) {{
      a = Conv<kernel_shape=[1,1]>(x, w)  m = Greater(a, zero)  n = Not(m)
      b = Where(m, a, x)  i = Cast<to=7>(b)  k = Mul(i, four)  j = Cast<to=6>(k)
      f = Cast<to=1>(n)  g = Cast<to=1>(k)  h = Add(f, g)  y = Conv<kernel_shape=[1,1]>(h, v) }}"""
    weights = {"w": draw(c, c, 1, 1), "v": draw(c, c, 1, 1), "zero": np.float32(0.1), "four": np.int64(4)}
    compile_model(text, **weights).check(feeds(x=(2, c, 4, 5)))


def test_constants_that_are_not_finite(compile_model: Callable[..., Any]) -> None:
    """Infinity in a place that has no channel would make the next sum NaN."""
    text = """g (float[1,5,3,3] x) => (float[1,4,3,3] y, float[1,4,3,3] z) {
      a = Conv<kernel_shape=[1,1]>(x, w)  b = Add(a, far)  c = Max(b, zero)  y = Conv<kernel_shape=[1,1]>(c, v)
      d = Mul(a, infinite)  e = Min(d, one)  f = Max(e, zero)  z = Conv<kernel_shape=[1,1]>(f, v) }"""
    weights = {
        "w": draw(5, 5, 1, 1), "v": draw(4, 5, 1, 1), "far": np.full((5, 1, 1), -np.inf, np.float32),
        "zero": np.float32(0), "one": np.float32(1), "infinite": np.float32(np.inf),
    }  # fmt: skip
    compile_model(text, **weights).check(feeds(x=(1, 5, 3, 3)))


@pytest.mark.parametrize("channels", [3, 17])
def test_columns_of_one_place_and_other_views(channels: int, compile_model: Callable[..., Any]) -> None:
    """A convolution along one axis, written as one over two, whose result loses the axis in front of a pooling."""
    text = f"""g (float[2,{channels},19,1] x) => (float[2,21,17] y, float[2,21,1] m, float[2,5,19,1] z) {{
      a = Conv<kernel_shape=[3,1]>(x, w, b)  s = Squeeze(a, axis)  y = Relu(s)  m = GlobalMaxPool(y)
      z = Conv<kernel_shape=[5,1], pads=[4,0,4,0], dilations=[2,1]>(x, v) }}"""
    weights = {
        "w": draw(21, channels, 3, 1), "b": draw(21), "v": draw(5, channels, 5, 1), "axis": np.array([3], np.int64),
    }  # fmt: skip
    compile_model(text, **weights).check(feeds(x=(2, channels, 19, 1)))


def test_a_batch_that_is_known_at_run_time(compile_model: Callable[..., Any]) -> None:
    """Everything that works on blocks, for one item and for several."""
    text = """g (float[N,3,12,10] x) => (float[N,9,12,10] y, float[N,7,1,1] g, float[N,20,6,5] p) {
      a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w, b)  h = HardSwish(a)
      d = Conv<kernel_shape=[3,3], pads=[1,1,1,1], group=20>(h, k)  c = Concat<axis=1>(d, h)
      p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(d)  q = AveragePool<kernel_shape=[2,2], strides=[2,2]>(d)
      r = Add(p, q)  t = ConvTranspose<kernel_shape=[2,2], strides=[2,2]>(r, u)
      e = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(c, v)  y = Add(e, t)
      o = GlobalAveragePool(c)  f = Conv<kernel_shape=[1,1]>(o, s)  g = Sigmoid(f) }"""
    weights = {
        "w": draw(20, 3, 3, 3), "b": draw(20), "k": draw(20, 1, 3, 3), "u": draw(20, 9, 2, 2), "v": draw(9, 40, 3, 3),
        "s": draw(7, 40, 1, 1),
    }  # fmt: skip
    model = compile_model(text, **weights)
    for batch in (1, 3):
        model.check(feeds(x=(batch, 3, 12, 10)))
    assert not model.kernels("conv2d")
