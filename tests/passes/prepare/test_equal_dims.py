"""Sizes that onnx's inference leaves open and that follow all the same."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.pipeline import Pipeline

HEAD = '<ir_version: 10, opset_import: ["" : 21]> '
# What stands before y, and the shape that y must get.
FOLLOWS = {
    "reshape": (
        "g (float[N,S,8] x) => (float[a,b,c,d] out) <int64[1] m = {-1}, int64[1] h = {2}, int64[1] e = {4}>"
        " { n = Shape <start = 0, end = 1> (x) t = Concat <axis = 0> (n, m, h, e) y = Reshape (x, t)"
        " out = Identity (y) }",
        ["N", "S", 2, 4],
    ),
    "reshape-number": (
        "g (float[N,6] x) => (float[a,b,c] out) <int64[1] m = {-1}, int64[1] h = {2}>"
        " { n = Shape <start = 0, end = 1> (x) t = Concat <axis = 0> (n, h, m) y = Reshape (x, t)"
        " out = Identity (y) }",
        ["N", 2, 3],
    ),
    "range": (
        "g (float[N,S] x) => (int64[a] out) <int64 zero = {0}, int64 one = {1}, int64[1] two = {0}>"
        " { n = Shape (x) s = Gather <axis = 0> (n, one) y = Range (zero, s, one)"
        " out = Identity (y) }",
        ["S"],
    ),
    "through-layers": (
        "g (float[N,S,8] x) => (float[a,b,c] out) <int64[1] m = {-1}, int64[1] h = {2}, int64[1] e = {4},"
        " int64[1] w = {8}> { n = Shape <start = 0, end = 1> (x) t = Concat <axis = 0> (n, m, h, e)"
        " r = Reshape (x, t) q = Relu (r) b = Concat <axis = 0> (n, m, w) z = Reshape (q, b) y = Add (x, z)"
        " out = Identity (y) }",
        ["N", "S", 8],
    ),
    "cut-mask": (
        "g (float[N,S,S] x) => (float[a,b,c] out) <int64[3] nine = {1, 9, 9}, int64[2] o = {0, 0},"
        " int64[2] axes = {1, 2}>"
        " { k = ConstantOfShape (nine) t = Shape <start = 1, end = 3> (x) m = Slice (k, o, t, axes) y = Add (x, m)"
        " out = Identity (y) }",
        ["N", "S", "S"],
    ),
    "convolution": (
        "g (float[N,1,H,W] x) => (float[a,b,c,d] out) <float[2,1,3,1] w = {1, 2, 3, 4, 5, 6}>"
        " { y = Conv <pads = [2, 0, 2, 0], dilations = [2, 1]> (x, w) out = Identity (y) }",
        ["N", 2, "H", "W"],
    ),
    "pooling": (
        "g (float[N,1,H,W] x) => (float[a,b,c,d] out)"
        ' { y = MaxPool <kernel_shape = [3, 3], auto_pad = "SAME_UPPER"> (x) out = Identity (y) }',
        ["N", 1, "H", "W"],
    ),
    "tile": (
        "g (float[N,S] x) => (float[a,b,c] out) <float[1,3,1] q = {1, 2, 3}, int64[1] o = {1}>"
        " { n = Shape <start = 0, end = 1> (x) s = Shape <start = 1, end = 2> (x) t = Concat <axis = 0> (n, o, s)"
        " y = Tile (q, t) out = Identity (y) }",
        ["N", 3, "S"],
    ),
    "resize": (
        "g (float[N,1,9,9] x) => (float[a,b,c,d] out) <int64[1] o = {0}, int64[1] two = {2}, int64[2] e = {4, 5}>"
        " { n = Shape (x) h = Slice (n, o, two) t = Concat <axis = 0> (h, e) y = Resize (x, , , t)"
        " out = Identity (y) }",
        ["N", 1, 4, 5],
    ),
}
# What only looks as if it followed: two open sizes, a range from 1, a slice that may be shorter.
OPEN = {
    "two-open": (
        "g (float[N,S] x) => (float[a,b] out) <int64[1] m = {-1}, int64[1] h = {2}>"
        " { t = Concat <axis = 0> (m, h) y = Reshape (x, t)"
        " out = Identity (y) }",
        0,
    ),
    "convolution-without-padding": (
        "g (float[N,1,H] x) => (float[a,b,c] out) <float[1,1,3] w = {1, 2, 3}>"
        " { y = Conv <pads = [1, 0]> (x, w) out = Identity (y) }",
        2,
    ),
    "convolution-with-strides": (
        "g (float[N,1,H] x) => (float[a,b,c] out) <float[1,1,3] w = {1, 2, 3}>"
        " { y = Conv <pads = [1, 1], strides = [2]> (x, w) out = Identity (y) }",
        2,
    ),
    "range-from-1": (
        "g (float[N,S] x) => (int64[a] out) <int64 one = {1}>"
        " { n = Shape (x) s = Gather <axis = 0> (n, one) y = Range (one, s, one)"
        " out = Identity (y) }",
        0,
    ),
    "cut": (
        "g (float[N,S] x) => (float[a] out) <int64[1] nine = {9}, int64[1] o = {0}>"
        " { k = ConstantOfShape (nine) t = Shape <start = 1, end = 2> (x) y = Slice (k, o, t, o)"
        " out = Identity (y) }",
        0,
    ),
    "broadcast-with-another": (
        "g (float[N,S] x, float[T] z) => (float[a] out) <int64[1] nine = {9}, int64[1] o = {0}>"
        " { k = ConstantOfShape (nine) t = Shape <start = 1, end = 2> (x) m = Slice (k, o, t, o) y = Add (m, z)"
        " out = Identity (y) }",
        0,
    ),
}


def inferred(text: str) -> list[int | str | None]:
    proto = onnx.parser.parse_model(HEAD + text)
    return shape_of_y(proto)


def shape_of_y(proto: onnx.ModelProto) -> list[int | str | None]:
    model, _ = Pipeline.parse("infer-shapes").run(ir.from_proto(proto))
    shape = next(value for node in model.graph for value in node.outputs if value.name == "y").shape
    assert shape is not None
    return [d if isinstance(d, int) else d.value for d in shape]


@pytest.mark.parametrize("name", FOLLOWS)
def test_what_follows(name: str) -> None:
    text, expected = FOLLOWS[name]
    assert inferred(text) == expected


@pytest.mark.parametrize("name", OPEN)
def test_what_does_not_follow(name: str) -> None:
    text, axis = OPEN[name]
    assert inferred(text)[axis] not in ("N", "S", "T", "H", 9)


def test_names_of_an_earlier_inference_give_way() -> None:
    """A file that was saved with names of onnx's own for sizes gets better ones."""
    text, expected = FOLLOWS["reshape"]
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(HEAD + text), data_prop=True)
    (info,) = (info for info in proto.graph.value_info if info.name == "y")
    assert info.type.tensor_type.shape.dim[1].dim_param.startswith("unk__")
    assert shape_of_y(proto) == expected
