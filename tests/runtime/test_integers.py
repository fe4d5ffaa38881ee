"""8-bit tensors between operators: poolings, concatenations, moves and elementwise chains, against onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper, parser, shape_inference

pytestmark = pytest.mark.tvm

NUMBERS = {
    "s": np.array(0.05, np.float32), "z": np.array(120, np.uint8), "t": np.array(0.06, np.float32),
    "r": np.array(0.0613, np.float32), "u": np.array(10, np.uint8),
    "two": np.array([1, 1, 2, 2], np.float32), "order": np.array([0, 2, 3, 1]),
    "pads": np.array([0, 0, 1, 2, 0, 0, 1, 0]), "k": np.array([2, 3]), "ones": np.array([1, 1, 1, 1]),
}  # fmt: skip


def model(body: str, inputs: str, outputs: int, opset: int = 21) -> ModelProto:
    """QDQ text over the NUMBERS; outputs y0, y1, ... in uint8."""
    out = ", ".join(f"uint8 y{i}" for i in range(outputs))
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> g ({inputs}) => ({out}) {{ {body} }}')
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in NUMBERS.items() if n in used)
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    return shape_inference.infer_shapes(proto)


def check(compiled: Any, feeds: dict[str, np.ndarray], exact: bool = True) -> None:
    """Within one step of onnxruntime, its optimizations off; the very numbers where nothing is added up."""
    import onnx_ir as ir
    from graphwright.runtime.reference import Reference

    expected = Reference(ir.from_proto(compiled.proto), threads=1).run(feeds)
    for (name, wanted), got in zip(expected.items(), compiled.run(feeds), strict=True):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype, name
        apart = np.abs(got.astype(int) - wanted.astype(int))
        assert apart.max(initial=0) <= (0 if exact else 1) and (apart != 0).mean() < 0.02, (name, apart.max())


def float_tensors(compiled: Any) -> int:
    """How many tensors of float32 the compiled code has in memory."""
    return str(compiled.lowered["main"]).count('R.dtype("float32")')


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape).astype(np.uint8)


POOLINGS = """p = DequantizeLinear (x, s, z)
    a = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (p)  y0 = QuantizeLinear (a, s, z)
    b = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (p)  y1 = QuantizeLinear (b, t, u)
    c = AveragePool <kernel_shape = [2, 2], pads = [0, 1, 1, 0], count_include_pad = 1> (p)
    y2 = QuantizeLinear (c, t, u)
    d = GlobalAveragePool (p)  y3 = QuantizeLinear (d, s, z)
    e = GlobalMaxPool (p)  y4 = QuantizeLinear (e, s, z)"""


@pytest.mark.parametrize("channels", [1, 12, 16])
@pytest.mark.parametrize("batch", ["2", "n"])
def test_poolings(channels: int, batch: str, compile_model: Callable[..., Any]) -> None:
    """Greatest elements are those of the integers; means are of whole steps, and so round once."""
    compiled = compile_model(model(POOLINGS, f"uint8[{batch}, {channels}, 9, 11] x", 5))
    assert not float_tensors(compiled)
    check(compiled, {"x": draw(2, channels, 9, 11)}, exact=False)


MOVES = """p = DequantizeLinear (x, s, z)
    a = Transpose <perm = [0, 2, 3, 1]> (p)  y0 = QuantizeLinear (a, s, z)
    b = Pad (p, pads)  y1 = QuantizeLinear (b, s, z)
    c = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"> (p, , two)
    y2 = QuantizeLinear (c, s, z)
    d = Slice (p, k, order)  e = Flatten (d)  y3 = QuantizeLinear (e, s, z)
    f, g = Split <axis = 1, num_outputs = 2> (p)  h = Concat <axis = 1> (g, f)  y4 = QuantizeLinear (h, s, z)"""


@pytest.mark.parametrize("channels", [6, 16])
def test_elements_move_as_integers(channels: int, compile_model: Callable[..., Any]) -> None:
    text = MOVES.replace("Slice (p, k, order)", "Slice (p, k, ends, k)")
    proto = model(text, f"uint8[2, {channels}, 5, 7] x", 5)
    proto.graph.initializer.append(numpy_helper.from_array(np.array([5, 7]), "ends"))
    compiled = compile_model(shape_inference.infer_shapes(proto))
    assert not float_tensors(compiled)
    check(compiled, {"x": draw(2, channels, 5, 7)})


@pytest.mark.parametrize("size", [1, 8, 37])
def test_concatenations_of_several_scales_are_quantized_first(size: int, compile_model: Callable[..., Any]) -> None:
    body = """p = DequantizeLinear (x, s, z)  q = DequantizeLinear (w, t, u)
        a = Concat <axis = 1> (p, q)  y0 = QuantizeLinear (a, t, u)"""
    compiled = compile_model(model(body, f"uint8[n, {size}] x, uint8[n, 5] w", 1))
    assert not float_tensors(compiled)
    check(compiled, {"x": draw(3, size), "w": draw(3, 5)})


def test_a_tensor_with_several_users_is_never_kept_in_floats(compile_model: Callable[..., Any]) -> None:
    """x * sigmoid(x), and x + that: three users of one DequantizeLinear. The ratio of the scales leaves few ties."""
    body = """p = DequantizeLinear (x, s, z)  a = Sigmoid (p)  b = Mul (p, a)  c = QuantizeLinear (b, r, u)
        d = DequantizeLinear (c, r, u)  e = Add (p, d)  y0 = QuantizeLinear (e, r, u)
        f = Neg (p)  y1 = QuantizeLinear (f, s, z)"""
    compiled = compile_model(model(body, "uint8[n, 40] x", 2))
    assert not float_tensors(compiled)
    check(compiled, {"x": draw(7, 40)}, exact=False)


def test_a_table_of_embeddings_stays_in_bytes(compile_model: Callable[..., Any]) -> None:
    proto = model("p = DequantizeLinear (w, s)  a = Gather (p, i)  y0 = QuantizeLinear (a, t, u)", "int64[n, 3] i", 1)
    table = np.random.default_rng(0).integers(-128, 128, (50, 24)).astype(np.int8)
    proto.graph.initializer.append(numpy_helper.from_array(table, "w"))
    compiled = compile_model(shape_inference.infer_shapes(proto))
    assert [str(c.dtype) for c in compiled.constants] == ["int8"]
    check(compiled, {"i": np.array([[0, 49, 3], [-1, 7, 7]])})


@pytest.mark.parametrize("value", [0.05, 0.051, -7.0])
def test_padding_with_numbers_that_are_steps_and_that_are_none(value: float, compile_model: Callable[..., Any]) -> None:
    proto = model("p = DequantizeLinear (x, s, z)  a = Pad (p, pads, v)  y0 = QuantizeLinear (a, s, z)",
                  "uint8[1, 3, 4, 5] x", 1)  # fmt: skip
    proto.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), "v"))
    compiled = compile_model(proto)
    check(compiled, {"x": draw(1, 3, 4, 5)})
