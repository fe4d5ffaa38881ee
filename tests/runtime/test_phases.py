"""The Relax pipeline: large constants leave the library, small ones stay, and nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from graphwright.runtime.target import Target
from onnx import numpy_helper, parser

pytestmark = pytest.mark.tvm
HEADER = '<ir_version: 10, opset_import: ["" : 20]>'
RANDOM = np.random.default_rng(0)
W = RANDOM.standard_normal((16, 32)).astype(np.float32)
BIAS = RANDOM.standard_normal(32).astype(np.float32)
SMALL = np.float32([2.0])
TEXT = """g (float[4,16] x) => (float[4,32] y, float[4,32] z) {
  h = MatMul(x, w)  b = Add(h, v)  y = Mul(b, s)  k = Mul(h, s)  z = Sub(k, v) }"""


def model(text: str = TEXT, **weights: np.ndarray) -> onnx.ModelProto:
    proto = parser.parse_model(f"{HEADER}\n{text}")
    weights = weights or {"w": W, "v": BIAS, "s": SMALL}
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    return proto


def compiled(proto: onnx.ModelProto, name: str = "cpu") -> tuple[Any, list[np.ndarray]]:
    from graphwright.runtime import importer, phases

    target = Target.named(name)
    executable, constants = phases.compile_module(importer.import_model(proto, target), target)
    return executable, constants


def run(executable: Any, x: np.ndarray, constants: Any) -> list[np.ndarray]:
    import tvm
    from tvm import relax

    machine = relax.VirtualMachine(executable, tvm.cpu())
    result = machine["main"](tvm.runtime.tensor(x), tuple(constants))
    return [tensor.numpy() for tensor in (result if not hasattr(result, "numpy") else [result])]


def test_large_constants_become_parameters_once() -> None:
    """`v` is used twice and `s` is small: two parameters of five uses."""
    executable, constants = compiled(model())
    held = sorted(tuple(int(d) for d in c.shape) for c in constants)
    assert len(held) == 2 and sum(int(np.prod(s)) for s in held) == W.size + BIAS.size
    x = RANDOM.standard_normal((4, 16)).astype(np.float32)
    h = x @ W
    y, z = run(executable, x, constants)
    np.testing.assert_allclose(y, (h + BIAS) * 2, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(z, h * 2 - BIAS, rtol=1e-5, atol=1e-5)


def test_the_code_takes_other_weights() -> None:
    """The parameters are what is computed with, not copies of them in the code."""
    import tvm

    executable, constants = compiled(model("g (float[2,32] x) => (float[2,32] y) { y = Add(x, v) }", v=BIAS))
    other = [tvm.runtime.tensor(np.full(c.shape, 5, np.float32)) for c in constants]
    x = np.ones((2, 32), np.float32)
    np.testing.assert_array_equal(run(executable, x, other)[0], x + 5)


def test_a_model_without_weights_takes_no_parameters() -> None:
    executable, constants = compiled(model("g (float[4] x) => (float[4] y) { y = Relu(x) }", unused=SMALL))
    assert constants == []
    np.testing.assert_array_equal(run(executable, np.float32([-1, 0, 1, 2]), [])[0], [0, 0, 1, 2])


def test_constants_of_many_types() -> None:
    text = """g (float[40] x) => (float[40] y) { a = Cast<to=1>(i)  b = Cast<to=1>(h)  c = Cast<to=1>(k)
      d = Sum(a, b, c)  y = Add(x, d) }"""
    weights = {"i": np.arange(40), "h": np.arange(40).astype(np.float16), "k": np.arange(40) % 2 == 0}
    executable, constants = compiled(model(text, **weights))
    x = np.zeros(40, np.float32)
    expected = 2.0 * np.arange(40) + (np.arange(40) % 2 == 0)
    np.testing.assert_array_equal(run(executable, x, constants)[0], expected.astype(np.float32))


def test_every_loop_nest_of_a_gpu_is_bound_to_threads() -> None:
    """A nest that is not cannot be compiled for one."""
    from graphwright.runtime import importer, phases
    from tvm import tirx

    target = Target.named("cuda")
    where = target.tvm()
    with where:
        module = phases.fuse(phases.legalize(importer.import_model(model(), target), target), target)
    nests = [f for _, f in module.functions_items() if isinstance(f, tirx.PrimFunc)]
    assert nests and all("threadIdx.x" in nest.script() for nest in nests)
