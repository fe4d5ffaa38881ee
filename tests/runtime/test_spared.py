"""Which convolutions, and what around them, are left to onnxruntime because it is faster."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.graph import site
from graphwright.runtime.build import build
from graphwright.runtime.reference import Reference
from graphwright.runtime.session import Session
from graphwright.runtime.spared import BETWEEN, DEEP, UNKNOWN, spared
from graphwright.runtime.target import Target
from onnx import numpy_helper, parser

# A convolution, a gate from the mean of its result, an upsampling to the input's own size, and a product behind it.
NET = """({input} x) => (y, s) {{
  a = Conv <pads = [1, 1, 1, 1]> (x, w)
  r = Relu(a)
  m = GlobalAveragePool(r)
  g = Conv (m, v)
  b = Mul(r, g)
  h = Shape <start = 2> (x)
  k = Concat <axis = 0> (two, h)
  u = Resize <mode = "nearest"> (b, , , k)
  f = ReduceMean <axes = [2, 3], keepdims = 0> (u)
  y = MatMul(f, p)
  s = Softmax <axis = -1> (y)
}}"""


def net(shape: str) -> ir.Model:
    random = np.random.default_rng(0)
    weights = {
        "w": random.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "v": random.standard_normal((4, 4, 1, 1)).astype(np.float32),
        "p": random.standard_normal((4, 5)).astype(np.float32),
        "two": np.array([2, 4], np.int64),
    }
    text = NET.format(input=f"float[{shape}]").replace("(y, s)", "(float[2, 5] y, float[2, 5] s)", 1)
    proto = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\ng {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def found(model: ir.Model) -> dict[str, str]:
    return {site(node): reason for node, reason in spared(model, 16).items()}


def test_known_sizes_are_compiled() -> None:
    assert found(net("2, 3, 8, 8")) == {}
    assert found(net("n, 3, 8, 8")) == {}


def layer(after: str) -> ir.Model:
    """A convolution over rows of free length, and what follows it."""
    random = np.random.default_rng(0)
    shapes = {"w": (8, 8, 3), "p": (8, 8), "grouped": (8, 2, 3)}
    weights = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    proto = parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2, n, 8] x) => (float[a, b, c] y) {{
            t = Transpose <perm = [0, 2, 1]> (x)
            r = Conv <pads = [1, 1]> (t, w)
            {after} }}""")
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def test_a_convolution_of_free_length_among_products_becomes_one() -> None:
    assert found(layer("u = Transpose <perm = [0, 2, 1]> (r) y = MatMul(u, p)")) == {}


@pytest.mark.parametrize(
    "after",
    [
        "y = Conv <pads = [1, 1]> (r, w)",
        "s = Conv <pads = [1, 1], group = 4> (r, grouped) u = Transpose <perm = [0, 2, 1]> (s) y = MatMul(u, p)",
    ],
)
def test_convolutions_of_free_length_alone_or_in_groups_are_left_alone(after: str) -> None:
    assert UNKNOWN in found(layer(after)).values()


@pytest.mark.parametrize("shape", ["2, 3, h, w", "2, 3, 8, w", "2, 3, h, 8"])
def test_an_image_of_unknown_size_is_left_alone_with_what_lies_between(shape: str) -> None:
    """The gate and the computed size are between convolutions; the product and what follows it stay."""
    result = found(net(shape))
    assert result["a"] == UNKNOWN and {result[name] for name in "rgbku"} == {BETWEEN}
    assert "y" not in result and "s" not in result


def test_without_products_nothing_else_is_left() -> None:
    model = net("2, 3, h, w")
    model.graph.outputs[:] = [v for node in model.graph for v in node.outputs if v.name == "u"]
    for node in reversed([n for n in model.graph if site(n) in ("f", "y", "s")]):
        model.graph.remove(node, safe=True)
    assert set(found(model)) == {site(node) for node in model.graph}


def test_three_axes() -> None:
    text = """g (float[1, 2, 4, 5, 6] x, float[2, 2, 1, 1, 1] w) => (float[1, 2, 4, 5, 6] y) {
      a = Conv(x, w)  y = Relu(a) }"""
    proto = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}')
    assert found(ir.from_proto(onnx.shape_inference.infer_shapes(proto))) == {"a": DEEP, "y": BETWEEN}


def test_an_artifact_takes_any_size(tmp_path: Path) -> None:
    model = net("2, 3, h, w")
    artifact = build(model, Target.named("cpu"), tmp_path / "out")
    assert [region.runtime for region in artifact.manifest.regions] == ["onnxruntime", "tvm"]
    session, reference = Session(tmp_path / "out"), Reference(model)
    for size in ((5, 7), (8, 8)):
        x = np.random.default_rng(1).standard_normal((2, 3, *size)).astype(np.float32)
        expected = reference.run({"x": x})
        for value, name in zip(session.run(None, {"x": x}), ("y", "s"), strict=True):
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5)


def test_devices_without_onnxruntime_compile_all(tmp_path: Path) -> None:
    artifact = build(net("2, 3, h, w"), Target.named("arm64"), tmp_path / "out")
    assert [region.runtime for region in artifact.manifest.regions] == ["tvm"]


@pytest.mark.parametrize(("size", "expected"), [("n", {"y": UNKNOWN}), ("9", {})])
def test_a_branch_with_such_a_convolution_is_left_alone_as_a_whole(size: str, expected: dict[str, str]) -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    g (bool c, float[1, 2, {size}] x) => (float[1, 2, {size}] y)
      <float[2, 2, 3] w = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}}>
    {{
      y = If (c) <
        then_branch = g1 () => (float[1, 2, {size}] t) {{ t = Conv <pads = [1, 1]> (x, w) }},
        else_branch = g2 () => (float[1, 2, {size}] e) {{ e = Relu(x) }}
      >
    }}"""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(parser.parse_model(text)))
    assert found(model) == expected


@pytest.mark.parametrize(
    ("between", "left"),
    [
        ("Slice (r, zero, one, one)", False),
        ("Resize <mode = \"linear\"> (r, , scales)", False),
        ("Resize <mode = \"linear\", antialias = 1> (r, , scales)", True),
        ("Transpose <perm = [0, 1, 3, 2]> (r)", True),
        ("Pad (r, pads)", True),
        ("ConvTranspose <strides = [2, 2]> (r, t)", False),
    ],
)
def test_what_stands_between_convolutions_of_free_size(between: str, left: bool) -> None:
    """In front of another convolution all of a network is left where something has no kernel; behind the last one
    moves of elements count for nothing."""
    random = np.random.default_rng(0)
    constants = {
        "w": random.standard_normal((4, 3, 3, 3)).astype(np.float32), "zero": np.array([0]), "one": np.array([1]),
        "v": random.standard_normal((4, 1 if between.startswith("Slice") else 4, 1, 1)).astype(np.float32),
        "t": random.standard_normal((4, 4, 2, 2)).astype(np.float32), "scales": np.array([1, 1, 2, 2], np.float32),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    }  # fmt: skip

    def model(ending: str) -> ir.Model:
        proto = parser.parse_model(
            f'<ir_version: 8, opset_import: ["" : 18]> g (float[1, 3, h, w] x) => (float[a, b, c, d] y)'
            f" {{ s = Conv (x, w) r = Relu (s) m = {between} {ending} }}"
        )
        proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in constants.items())
        return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))

    assert bool(found(model("y = Conv (m, v)"))) is left
    if "Transpose" in between:
        assert found(model("y = Relu (m)")) == {}
