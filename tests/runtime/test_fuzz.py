"""Random chains of operators that move elements: fused, their index arithmetic is what code generators get wrong."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from graphwright.runtime.target import Target
from onnx import TensorProto, helper, numpy_helper

pytestmark = pytest.mark.tvm
STEPS = 6
LARGEST = 4000  # elements that a step may still double


class Chain:
    """A model of random steps over one input."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.start = [int(d) for d in self.random.choice([2, 3, 4, 5, 8, 16], 4)]
        self.shape, self.value = list(self.start), "x"
        steps = (self.transpose, self.merge, self.split, self.double, self.tile, self.cut)
        for _ in range(STEPS):
            steps[self.random.integers(len(steps))]()
        self.emit("Sin", [self.value])

    def emit(self, op: str, inputs: list[str], **attributes: object) -> str:
        self.value = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [self.value], **attributes))
        return self.value

    def weight(self, *numbers: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(numbers, np.int64), name))
        return name

    def axis(self) -> int:
        return int(self.random.integers(len(self.shape)))

    def transpose(self) -> None:
        order = [int(i) for i in self.random.permutation(len(self.shape))]
        self.emit("Transpose", [self.value], perm=order)
        self.shape = [self.shape[i] for i in order]

    def merge(self) -> None:
        if len(self.shape) > 2:
            i = int(self.random.integers(len(self.shape) - 1))
            self.shape[i : i + 2] = [self.shape[i] * self.shape[i + 1]]
            self.emit("Reshape", [self.value, self.weight(*self.shape)])

    def split(self) -> None:
        even = [i for i, size in enumerate(self.shape) if size % 2 == 0 and size > 2]
        if even:
            i = even[self.random.integers(len(even))]
            parts = [self.shape[i] // 2, 2]
            self.shape[i : i + 1] = parts if self.random.random() < 0.5 else parts[::-1]
            self.emit("Reshape", [self.value, self.weight(*self.shape)])

    def double(self) -> None:
        if np.prod(self.shape) < LARGEST:
            axis, before = self.axis(), self.value
            self.emit("Concat", [before, self.emit("Neg", [before])], axis=axis)
            self.shape[axis] *= 2

    def tile(self) -> None:
        if np.prod(self.shape) < LARGEST:
            repeats, axis = [1] * len(self.shape), self.axis()
            repeats[axis] = int(self.random.choice([2, 4]))
            self.shape[axis] *= repeats[axis]
            self.emit("Tile", [self.value, self.weight(*repeats)])

    def cut(self) -> None:
        axis = self.axis()
        if self.shape[axis] > 2:
            self.emit("Slice", [self.value, self.weight(1), self.weight(self.shape[axis]), self.weight(axis)])
            self.shape[axis] -= 1

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "chain", [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.start)],
            [helper.make_tensor_value_info(self.value, TensorProto.FLOAT, self.shape)], self.weights,
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


SLOW = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(100, 300)]


@pytest.mark.parametrize("seed", [*range(16), *SLOW])
def test_a_chain_of_moves(seed: int) -> None:
    import tvm
    from graphwright.runtime import importer, phases
    from tvm import relax

    target, chain = Target.named("cpu"), Chain(seed)
    model = chain.model()
    x = chain.random.standard_normal(chain.start).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    executable, constants = phases.compile_module(importer.import_model(model, target), target)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    found = machine["main"](tvm.runtime.tensor(x), tuple(constants)).numpy()
    # Moves are exact; onnxruntime's sine and ours differ in the last bits.
    np.testing.assert_allclose(found, session.run(None, {"x": x})[0], rtol=0, atol=1e-6)
