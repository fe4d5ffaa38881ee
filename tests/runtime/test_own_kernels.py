"""Operators of models that become kernels of our own: which ones do, and that they give onnxruntime's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from graphwright.runtime.target import Target

onnxruntime = pytest.importorskip("onnxruntime")
tvm = pytest.importorskip("tvm")
pytestmark = pytest.mark.tvm

TARGET = Target.named("cpu")
RTOL, ATOL = 1e-5, 1e-5
HEAD = '<ir_version: 10, opset_import: ["": 23]> '


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


class Model:
    """A model compiled once."""

    def __init__(self, text: str, **weights: np.ndarray) -> None:
        from graphwright.runtime import phases
        from graphwright.runtime.importer import import_model
        from tvm import relax

        self.proto = onnx.parser.parse_model(HEAD + text)
        self.proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
        lowered: list[Any] = []
        executable, constants = phases.compile_module(import_model(self.proto, TARGET), TARGET, lowered.append)
        self.lowered = lowered[0]
        self.main = relax.VirtualMachine(executable, tvm.cpu())["main"]
        self.constants = tvm.runtime.convert(list(constants))
        self.names = [info.name for info in self.proto.graph.input]

    @property
    def kernels(self) -> set[str]:
        """Operators of the kernels that it calls."""
        from graphwright.runtime.work import work_of

        return {kernel["op"] for kernel in work_of(self.lowered).kernels.values()} - {"shape_func"}

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        result = self.main(*(tvm.runtime.tensor(np.asarray(feeds[name])) for name in self.names), self.constants)
        results = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
        return [tensor.numpy() for tensor in results]

    def check(self, *runs: Mapping[str, np.ndarray]) -> None:
        session = onnxruntime.InferenceSession(self.proto.SerializeToString(), providers=["CPUExecutionProvider"])
        for feeds in runs:
            for actual, expected in zip(self(feeds), session.run(None, dict(feeds)), strict=True):
                assert actual.dtype == expected.dtype and actual.shape == expected.shape
                scale = np.nanmax(np.abs(expected[np.isfinite(expected)]), initial=1.0)
                np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=ATOL * scale)


# Normalizations.


def test_layer_normalization_of_dynamic_rows() -> None:
    model = Model("g (float[b,s,20] x, float[20] w, float[20] c) => (float[b,s,20] y) "
                  "{ y = LayerNormalization(x, w, c) }")  # fmt: skip
    assert model.kernels == {"layer_normalization"}
    model.check(*({"x": draw(b, s, 20), "w": draw(20), "c": draw(20)} for b, s in ((2, 3), (1, 1), (4, 0))))


@pytest.mark.parametrize(
    "axis, weight", [(1, (5, 20)), (1, (20,)), (2, (20,)), (2, (1,)), (-1, (1, 1, 20)), (0, (20,))]
)
@pytest.mark.parametrize("op", ["LayerNormalization", "RMSNormalization"])
def test_normalization_over_axes_with_weights_that_broadcast(op: str, axis: int, weight: tuple[int, ...]) -> None:
    shape = ",".join(map(str, weight))
    model = Model(f"g (float[2,5,20] x, float[{shape}] w) => (float[2,5,20] y) {{ y = {op} <axis={axis}> (x, w) }}")
    assert model.kernels & {"layer_normalization", "rms_normalization"}
    model.check({"x": draw(2, 5, 20), "w": draw(*weight)})


def test_forms_of_normalization_without_a_kernel() -> None:
    """Weights that change from row to row, further outputs, half precision."""
    model = Model("g (float[2,5,20] x, float[5,1] w) => (float[2,5,20] y) { y = RMSNormalization(x, w) }")
    assert "rms_normalization" not in model.kernels
    model.check({"x": draw(2, 5, 20), "w": draw(5, 1)})
    model = Model("g (float[5,20] x, float[20] w) => (float[5,20] y, float[5,1] m) { y, m = LayerNormalization(x, w) }")
    assert "layer_normalization" not in model.kernels
    model.check({"x": draw(5, 20), "w": draw(20)})
    model = Model("g (float16[5,20] x, float16[20] w) => (float16[5,20] y) { y = LayerNormalization(x, w) }")
    assert "layer_normalization" not in model.kernels
