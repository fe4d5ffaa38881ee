"""cancel-transposes on random graphs, on graphs of many nodes, and on models as exporters of NHWC write them."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes import graph
from graphwright.passes.base import PassContext, PassReport
from graphwright.passes.pipeline import Pipeline
from graphwright.passes.prepare import axes
from graphwright.passes.prepare.cancel_transposes import CancelTransposes
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from .conftest import run

NCHW, NHWC = [0, 3, 1, 2], [0, 2, 3, 1]
SIZES = {"A": 2, "B": 3, "C": 4, "D": 1}


def transposes(model: ir.Model) -> int:
    return sum(graph.is_op(node, "Transpose") for node in graph.all_nodes(model))


def cancelled(model: ir.Model) -> tuple[ir.Model, PassReport]:
    """The model after the pass, which takes every Transpose for one that is needed: unused ones are removed before."""
    after, reports = Pipeline.parse("infer-shapes,simplify,infer-shapes,dead-code,cancel-transposes").run(model)
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    return after, reports[-1]


class Builder:
    """A graph of small whole numbers, on which every operation is exact. `sizes` are those of a run by symbol."""

    def __init__(self, seed: random.Random, opset: int, symbols: bool) -> None:
        self.random, self.opset, self.symbols = seed, opset, symbols
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[tuple[str, list[str]]] = []
        self.weights: list[onnx.TensorProto] = []
        self.values: list[tuple[str, list[str]]] = []  # names and dims by symbol
        for i in range(seed.randint(1, 3)):
            dims = [seed.choice("ABCD") for _ in range(seed.choice([2, 3, 4, 4, 4]))]
            self.inputs.append((f"x{i}", dims))
        self.values += self.inputs

    def constant(self, array: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(onnx.numpy_helper.from_array(array, name))
        return name

    def ints(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))

    def add(self, op_type: str, inputs: list[str], dims: list[str], **attributes: object) -> tuple[str, list[str]]:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        value = name, dims
        self.values.append(value)
        return value

    def size(self, symbol: str) -> int | str:
        return symbol if self.symbols and symbol != "D" else SIZES[symbol]

    def transpose(self, value: tuple[str, list[str]], perm: list[int]) -> tuple[str, list[str]]:
        return self.add("Transpose", [value[0]], [value[1][a] for a in perm], perm=perm)

    def step(self) -> None:
        pick = self.random
        name, dims = value = pick.choice(self.values[-4:])
        rank = len(dims)
        if rank >= 2 and pick.random() < 0.45:
            common = {4: [NCHW, NHWC, [0, 2, 1, 3]], 3: [[0, 2, 1]], 2: [[1, 0]]}[rank]
            self.transpose(value, pick.choice([*common, pick.sample(range(rank), rank)]))
            return
        makers: list[Callable[[], object]] = [
            lambda: self.add(pick.choice(["Relu", "Neg", "Abs", "Floor"]), [name], dims),
            self.binary,
            lambda: self.scaled(value),
        ]
        if rank:
            makers += [
                lambda: self.reduce(value),
                lambda: self.concat(value),
                lambda: self.pieces(value),
                lambda: self.pad(value),
                lambda: self.gather(value),
            ]
        if rank in (1, 2, 3):
            makers.append(lambda: self.unsqueeze(value))
        pick.choice(makers)()

    def bounded(self, value: tuple[str, list[str]]) -> None:
        low, high = (self.constant(np.array(x, np.float32)) for x in (-8, 8))
        self.add("Clip", [value[0], low, high], value[1])

    def binary(self) -> None:
        name, dims = self.random.choice(self.values[-4:])
        others = [n for n, d in self.values if len(d) <= len(dims) and all(
            x in (y, "D") for x, y in zip(d[::-1], dims[::-1], strict=False))]  # fmt: skip
        pair = [name, self.random.choice(others)]
        self.random.shuffle(pair)
        self.bounded(self.add(self.random.choice(["Add", "Mul", "Sub", "Max"]), pair, dims))

    def scaled(self, value: tuple[str, list[str]]) -> None:
        name, dims = value
        count = self.random.randint(0, len(dims))
        shape = [1 if self.symbols or self.random.random() < 0.3 else SIZES[d] for d in dims[len(dims) - count :]]
        array = np.array([self.random.randint(-3, 3) for _ in range(int(np.prod(shape)))], np.float32).reshape(shape)
        self.bounded(self.add(self.random.choice(["Add", "Mul", "PRelu"]), [name, self.constant(array)], dims))

    def reduce(self, value: tuple[str, list[str]]) -> None:
        name, dims = value
        chosen = self.random.sample(range(len(dims)), self.random.randint(1, min(2, len(dims))))
        keeps = self.random.randint(0, 1)
        kept = [("D" if a in chosen else d) for a, d in enumerate(dims) if keeps or a not in chosen]
        written = [a - len(dims) * self.random.randint(0, 1) for a in chosen]
        if self.opset >= 18 or self.random.random() < 0.5:
            new = self.opset >= 13
            inputs = [name, self.ints(*written)] if new else [name]
            extra = {} if new else {"axes": written}
            self.bounded(self.add("ReduceSum", inputs, kept, keepdims=keeps, **extra))
        else:
            self.add("ReduceMax", [name], kept, keepdims=keeps, axes=written)

    def concat(self, value: tuple[str, list[str]]) -> None:
        name, dims = value
        axis = self.random.randrange(len(dims))
        both = self.add("Concat", [name, name], [*dims[:axis], "?", *dims[axis + 1 :]], axis=axis - len(dims))
        self.values.pop()
        inputs = [both[0], *(self.ints(n) for n in (0, 2**31 - 1, axis, 2))]
        self.add("Slice", inputs, dims)

    def pieces(self, value: tuple[str, list[str]]) -> None:
        name, dims = value
        axis = self.random.randrange(len(dims))
        self.add("Slice", [name, *(self.ints(n) for n in (0, 1, axis - len(dims)))],
                 [*dims[:axis], "D", *dims[axis + 1 :]])  # fmt: skip

    def pad(self, value: tuple[str, list[str]]) -> None:
        name, dims = value
        pads = [0] * (2 * len(dims))
        axis = self.random.randrange(len(dims))
        pads[axis] = 1
        padded = self.add("Pad", [name, self.ints(*pads)], dims)
        self.values.pop()
        self.add("Slice", [padded[0], *(self.ints(n) for n in (1, 2**31 - 1, axis))], dims)

    def gather(self, value: tuple[str, list[str]]) -> None:
        name, dims = value
        axis = self.random.randrange(len(dims))
        index = self.constant(np.array(0, np.int64))
        self.add("Gather", [name, index], dims[:axis] + dims[axis + 1 :], axis=axis)

    def unsqueeze(self, value: tuple[str, list[str]]) -> None:
        name, dims = value
        axis = self.random.randint(0, len(dims))
        self.add("Unsqueeze", [name, self.ints(axis)], [*dims[:axis], "D", *dims[axis:]])

    def model(self) -> ir.Model:
        ends = [*self.random.sample(self.values, min(len(self.values), self.random.randint(1, 3))), self.values[-1]]
        ends = [end for end in ends if end[0].startswith("v")]
        names = list(dict.fromkeys(name for name, _ in ends))
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [self.size(d) for d in dims])
            for name, dims in self.inputs
        ]
        body = helper.make_graph(self.nodes, "g", inputs, outputs, self.weights)
        proto = helper.make_model(body, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=9)
        return ir.from_proto(proto)


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([13, 17, 18, 21]), st.booleans())
def test_random_graphs_keep_every_bit(seed: random.Random, opset: int, symbols: bool) -> None:
    builder = Builder(seed, opset, symbols)
    for _ in range(seed.randint(2, 14)):
        builder.step()
    if not builder.nodes:
        return
    model = builder.model()
    if not model.graph.outputs:
        return
    before, _ = Pipeline.parse("infer-shapes,simplify,infer-shapes").run(model)
    before, _ = Pipeline.parse("dead-code").run(before)
    after, _ = cancelled(model)
    after, _ = Pipeline.parse("dead-code").run(after)
    assert transposes(after) <= transposes(before)
    again, _ = Pipeline.parse("cancel-transposes").run(after)
    assert transposes(again) <= transposes(after)
    random_numbers = np.random.default_rng(seed.randint(0, 1 << 30))
    for scale in (1, 2) if symbols else (1,):
        feeds = {}
        for name, dims in builder.inputs:
            shape = [SIZES[d] * (1 if d == "D" else scale) for d in dims]
            feeds[name] = random_numbers.integers(-4, 5, shape).astype(np.float32)
        for expected, got in zip(run(model, feeds), run(after, feeds), strict=True):
            assert expected.dtype == got.dtype
            np.testing.assert_array_equal(got, expected)


class Images:
    """Models on NHWC images as tf2onnx writes them: every convolution between two Transposes."""

    def __init__(self, batch: int | str, size: int, channels: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)
        self.input = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, size, size, channels])

    def weight(self, *dims: int) -> str:
        name = f"w{len(self.weights)}"
        array = self.random.standard_normal(dims).astype(np.float32) / np.float32(np.prod(dims[1:]) ** 0.5)
        self.weights.append(onnx.numpy_helper.from_array(array, name))
        return name

    def ints(self, *numbers: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(onnx.numpy_helper.from_array(np.array(numbers, np.int64), name))
        return name

    def op(self, op_type: str, *inputs: str, **attributes: object) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], **attributes))
        return name

    def conv(self, x: str, cin: int, cout: int, kernel: int = 1, stride: int = 1, group: int = 1) -> str:
        a = self.op("Transpose", x, perm=NCHW)
        pads = [kernel // 2] * 4
        b = self.op("Conv", a, self.weight(cout, cin // group, kernel, kernel), pads=pads, group=group,
                    strides=[stride, stride])  # fmt: skip
        c = self.op("Transpose", b, perm=NHWC)
        return self.op("Add", c, self.weight(cout))

    def relu6(self, x: str) -> str:
        if not any(weight.name == "six" for weight in self.weights):
            for name, number in (("zero", 0), ("six", 6)):
                self.weights.append(onnx.numpy_helper.from_array(np.array(number, np.float32), name))
        return self.op("Clip", x, "zero", "six")

    def model(self, *outputs: str) -> ir.Model:
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        body = helper.make_graph(self.nodes, "g", [self.input], ends, self.weights)
        return ir.from_proto(helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))


def mobilenet(batch: int | str = 1, size: int = 32, blocks: int = 3, width: int = 16) -> ir.Model:
    """Inverted residuals with squeeze-and-excite, then the mean over height and width, and a product."""
    net = Images(batch, size, 3)
    x = net.relu6(net.conv("x", 3, width, 3, 2))
    for _ in range(blocks):
        y = net.relu6(net.conv(x, width, 4 * width))
        y = net.relu6(net.conv(y, 4 * width, 4 * width, 3, group=4 * width))
        gate = net.op("ReduceMean", y, axes=[1, 2], keepdims=1)
        gate = net.op("Relu", net.conv(gate, 4 * width, width))
        gate = net.op("Sigmoid", net.conv(gate, width, 4 * width))
        x = net.op("Add", net.conv(net.op("Mul", y, gate), 4 * width, width), x)
    mean = net.op("ReduceMean", x, axes=[1, 2], keepdims=0)
    return net.model(net.op("Softmax", net.op("MatMul", mean, net.weight(width, 10)), axis=-1))


def yolo(batch: int | str = 1, size: int = 32, width: int = 16) -> ir.Model:
    """Two scales that are resized and concatenated, and a head of boxes on each."""
    net = Images(batch, size, 3)

    def silu(x: str) -> str:
        return net.op("Mul", x, net.op("Sigmoid", x))

    fine = silu(net.conv("x", 3, width, 3, 2))
    coarse = silu(net.conv(fine, width, 2 * width, 3, 2))
    scales = net.weight(1)
    net.weights[-1] = onnx.numpy_helper.from_array(np.array([1, 2, 2, 1], np.float32), scales)
    up = net.op("Resize", coarse, "", scales, mode="nearest", coordinate_transformation_mode="asymmetric",
                nearest_mode="floor")  # fmt: skip
    joined = silu(net.conv(net.op("Concat", up, fine, axis=3), 3 * width, width, 3))
    outputs = []
    for x, channels in ((joined, width), (coarse, 2 * width)):
        y = net.op("Sigmoid", net.conv(x, channels, 24))
        outputs.append(net.op("Reshape", y, net.ints(0, -1, 8)))
    return net.model(net.op("Concat", *outputs, axis=1))


def convnext(batch: int | str = 1, size: int = 32, width: int = 16) -> ir.Model:
    """Blocks of torchvision: NCHW between blocks, NHWC for the normalization and the products within."""
    net = Images(batch, size, 3)
    x = net.op("Transpose", net.conv("x", 3, width, 4, 4), perm=NCHW)
    for _ in range(2):
        y = net.op("Conv", x, net.weight(width, 1, 7, 7), net.weight(width), pads=[3] * 4, group=width)
        y = net.op("Transpose", y, perm=NHWC)
        y = net.op("LayerNormalization", y, net.weight(width), net.weight(width))
        y = net.op("Relu", net.op("MatMul", y, net.weight(width, 4 * width)))
        y = net.op("Mul", net.op("MatMul", y, net.weight(4 * width, width)), net.weight(width))
        x = net.op("Add", net.op("Transpose", y, perm=NCHW), x)
    return net.model(net.op("GlobalAveragePool", x))


@pytest.mark.parametrize(
    ("build", "before", "after"),
    [(mobilenet, 32, 1), (yolo, 10, 3), (convnext, 7, 5)],
)
@pytest.mark.parametrize("batch", [1, "N"])
def test_nhwc_models_keep_the_transposes_that_they_need(
    build: Callable[[int | str], ir.Model], before: int, after: int, batch: int | str
) -> None:
    """The input's and those in front of reshapes; ConvNeXt's normalization and products need two a block."""
    model = build(batch)
    assert transposes(model) == before
    result, _ = cancelled(model)
    assert transposes(result) == after
    for count in (1, 3) if batch == "N" else (1,):
        feeds = {"x": np.random.default_rng(count).standard_normal((count, 32, 32, 3)).astype(np.float32)}
        for expected, got in zip(run(model, feeds), run(result, feeds), strict=True):
            scale = float(np.abs(expected).max())
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * scale)


def test_two_dynamic_sizes_and_a_shape() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[N,H,W,2] x, float[2,2,1,1] w) => (float[N,K,2] y) <int64[1] flat = {-1}, int64[1] two = {2}> {
      a = Transpose <perm = [0, 3, 1, 2]> (x)  b = Conv (a, w)  c = Transpose <perm = [0, 2, 3, 1]> (b)
      d = Relu (c)  s = Shape <start = 0, end = 1> (d)  e = Transpose <perm = [0, 3, 1, 2]> (d)
      f = Conv (e, w)  g = Transpose <perm = [0, 2, 3, 1]> (f)  h = Add (g, d)
      t = Concat <axis = 0> (s, flat, two)  y = Reshape (h, t) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    after, _ = cancelled(model)
    assert transposes(after) == 2
    generator = np.random.default_rng(0)
    for n, height, width in ((1, 3, 4), (2, 1, 5)):
        feeds = {
            "x": generator.integers(-3, 4, (n, height, width, 2)).astype(np.float32),
            "w": generator.integers(-3, 4, (2, 2, 1, 1)).astype(np.float32),
        }
        np.testing.assert_array_equal(run(after, feeds)[0], run(model, feeds)[0])


@pytest.mark.parametrize("step", ["Relu", "LeakyRelu", "residual", "hub", "unchanged"])
def test_work_grows_linearly(step: str) -> None:
    """Counted, not timed: chains, residuals, one value with many readers, and regions that stay."""

    def steps(blocks: int) -> int:
        net = Images(1, 4, 2)
        first = value = net.op("Transpose", "x", perm=NCHW)
        ends = []
        for _ in range(blocks):
            if step == "residual":
                value = net.op("Add", net.op("Relu", value), value)
            elif step == "hub":
                ends.append(net.op("Relu", first))
            elif step == "unchanged":
                value = net.op("Transpose", net.op("Softplus", net.op("MatMul", value, value)), perm=[0, 1, 3, 2])
            else:
                value = net.op(step, value)
        if ends:
            value = net.op("Concat", *ends, axis=1)
        model = net.model(net.op("Transpose", value, perm=NHWC) if step != "unchanged" else value)
        report = CancelTransposes().run(model, PassContext())
        assert bool(report.changes) == (step != "unchanged")
        return int(report.stats["steps"])

    small, large = steps(50), steps(400)
    assert large <= 10 * small + 100


def test_every_rule_is_of_a_standard_operator() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    assert set(axes.RULES) <= known


OPERATORS = [
    (21, "y = Where (c, a, z)", "c = Greater (a, z)"),
    (21, "y = PRelu (a, v)", ""),
    (21, "y = Softmax <axis = 3> (a)", ""),
    (13, "y = LogSoftmax <axis = 1> (a)", ""),
    (21, "y = Hardmax (a)", ""),
    (21, "y, i = TopK <axis = 3> (a, one)", ""),
    (21, "p, q = Split <axis = 3> (a, ones)  y = Sub (p, q)", ""),
    (21, "m = ReduceSum (a)  y = Sub (a, m)", ""),
    (21, "m = ReduceL1 <keepdims = 0> (a)  y = Sub (a, m)", ""),
    (21, "m = ReduceMax <keepdims = 0> (a, last)  n = Unsqueeze (m, last)  y = Sub (a, n)", ""),
    (17, "m = ReduceMax <axes = [1, -1]> (a)  y = Sub (a, m)", ""),
    (21, "m = ArgMin <axis = 3, keepdims = 1> (a)  n = Cast <to = 1> (m)  y = Add (a, n)", ""),
    (21, "m = Gather <axis = 3> (a, turned)  y = Sub (a, m)", ""),
    (21, "m = Gather <axis = -1> (a, zero)  n = Unsqueeze (m, last)  y = Sub (a, n)", ""),
    (21, "y = Tile (a, repeats)", ""),
    (21, "m = ReduceMax (a, last)  y = Expand (m, dims)", ""),
    (21, "y = Pad <mode = \"reflect\"> (a, pads)", ""),
    (21, "y = Pad (a, two, , last_two)", ""),
    (13, "y = Pad (a, computed)", "computed = Add (pads, pads)"),
    (9, "y = Pad <pads = [0, 1, 0, 0, 0, 0, 2, 1]> (a)", ""),
    (21, "y = Slice (a, one, five, last)", ""),
    (21, "y = Slice (a, zeros, threes)", ""),
    (9, "y = Slice <axes = [1, 3], starts = [1, 0], ends = [3, 1]> (a)", ""),
    (9, "y = Slice <starts = [0, 1], ends = [1, 3]> (a)", ""),
    (21, "y = Resize <mode = \"linear\"> (a, , , sizes)", ""),
    (21, "y = Resize <mode = \"cubic\", axes = [1, 2]> (a, , scales_two)", ""),
    (11, "y = Resize (a, none, scales)", ""),
    (10, "y = Resize (a, scales)", ""),
    (9, "y = Upsample (a, scales)", ""),
    (7, "y = Upsample <scales = [1.0, 2.0, 2.0, 1.0]> (a)", ""),
    (21, "q = QuantizeLinear (a, half, byte)  y = DequantizeLinear (q, half, byte)", ""),
    (21, "q = QuantizeLinear <axis = -1> (a, v1)  y = DequantizeLinear <axis = 3> (q, v1)", ""),
    (21, "y = Clip (a, low)", ""),
    (21, "y = Max (a, z, v)", ""),
    (21, "y = Gelu (a)", ""),
]  # fmt: skip
CONSTANTS = """float[4,4,2] z = {1, 2, 3, -1, -2, -3, 0, 1, 2, 3, -1, -2, -3, 0, 1, 2, 3, -1, -2, -3, 0, 1, 2, 3, -1,
    -2, -3, 0, 1, 2, 3, 5}, float[2] v = {3, -2}, float[2] v1 = {0.5, 2}, int64[1] one = {1}, int64[2] ones = {1, 1},
    int64[1] last = {-1}, int64[2] turned = {1, 0}, int64 zero = {0}, int64[4] repeats = {1, 2, 1, 3},
    int64[4] dims = {2, 4, 4, 2}, int64[8] pads = {0, 1, 0, 0, 0, 2, 1, 1}, int64[4] two = {1, 0, 2, 1},
    int64[2] last_two = {-1, 1}, int64[1] five = {5}, int64[2] zeros = {0, 1}, int64[2] threes = {1, 3},
    int64[4] sizes = {2, 7, 3, 2}, float[2] scales_two = {2, 3}, float[4] scales = {1, 2, 2, 1}, float[0] none = {},
    float half = {0.5}, uint8 byte = {7}, float low = {-1}"""


@pytest.mark.parametrize(
    ("opset", "text", "before"), OPERATORS, ids=[f"{o}-{t.split('(')[0]}" for o, t, _ in OPERATORS]
)
def test_an_operator_between_two_transposes_takes_their_order(opset: int, text: str, before: str) -> None:
    used = [line for line in CONSTANTS.replace("\n", " ").split("}, ") if f" {line.split('=')[0].split()[1]}" in
            " " + (text + before).replace("(", " ").replace(",", " ").replace(")", " ") + " "]  # fmt: skip
    constants = ", ".join(line.rstrip("}") + "}" for line in used)
    model = ir.from_proto(
        onnx.parser.parse_model(
            f"""<ir_version: 8, opset_import: ["" : {opset}]> g (float[2,2,4,4] x) => (float[N,C,H,W] out)
            <{constants}> {{ a = Transpose <perm = [0, 2, 3, 1]> (x)  {before}  {text}
            out = Transpose <perm = [0, 3, 1, 2]> (y) }}"""
        )
    )
    after, _ = cancelled(model)
    assert transposes(after) == 0
    feeds = {"x": np.random.default_rng(0).integers(-4, 5, (2, 2, 4, 4)).astype(np.float32)}
    (expected,), (got,) = run(model, feeds), run(after, feeds)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * float(np.abs(expected).max()))


@pytest.mark.parametrize("op_type", ["LayerNormalization", "RMSNormalization"])
@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 2)])
def test_a_normalization_whose_scale_has_axes_in_front_stays(op_type: str, shape: tuple[int, ...]) -> None:
    """Its scale is broadcast to the axes in front of the normalized ones, which therefore cannot change places."""
    scale = helper.make_tensor("g", TensorProto.FLOAT, shape, range(1, 1 + int(np.prod(shape))))
    nodes = [
        helper.make_node("Transpose", ["x"], ["a"], perm=[1, 0, 2]),
        helper.make_node(op_type, ["a", "g"], ["b"], axis=-1),
        helper.make_node("Transpose", ["b"], ["y"], perm=[1, 0, 2]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, 2, 2]) for name in ("x", "y")]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:], [scale]),
        opset_imports=[helper.make_opsetid("", 23)], ir_version=10,
    )  # fmt: skip
    after, _ = cancelled(ir.from_proto(proto))
    assert transposes(after) == 2
