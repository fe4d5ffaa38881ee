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
    after, reports = Pipeline.parse("infer-shapes,simplify,infer-shapes,cancel-transposes").run(model)
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
        feeds = {
            name: random_numbers.integers(-4, 5, [SIZES[d] * (scale if d != "D" else 1) for d in dims]).astype(np.float32)
            for name, dims in builder.inputs
        }
        for expected, got in zip(run(model, feeds), run(after, feeds), strict=True):
            assert expected.dtype == got.dtype
            np.testing.assert_array_equal(got, expected)
