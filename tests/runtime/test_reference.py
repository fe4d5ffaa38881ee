"""onnxruntime as the reference: the same answers whole and in segments, in bounded memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes import io
from graphwright.passes.errors import InputError, ModelError
from graphwright.runtime import reference
from graphwright.runtime.reference import Reference, mapped
from onnx import TensorProto, numpy_helper, parser

HEADER = '<ir_version: 10, opset_import: ["" : 20]>'
X = np.linspace(-1, 2, 4, dtype=np.float32)


def model(text: str, **weights: np.ndarray) -> ir.Model:
    proto = parser.parse_model(f"{HEADER}\ng {text}")
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    return ir.from_proto(proto)


def both(text: str, feeds: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, **weights: np.ndarray) -> None:
    """Whole and in segments of one node each; the model says nothing of the types inside it."""
    whole = model(text, **weights)
    expected = Reference(whole, threads=1).run(feeds)
    monkeypatch.setattr(reference, "WHOLE_LIMIT", -1)
    monkeypatch.setattr(reference, "segments", lambda model: [[node] for node in model.graph])
    found = Reference(whole, threads=1).run(feeds)
    assert list(found) == list(expected) == [value.name for value in whole.graph.outputs]
    for name, array in expected.items():
        for a, b in zip(*(v if isinstance(v, list) else [v] for v in (array, found[name])), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("text", "feeds"),
    [
        ("(float[4] x) => (float[4] d) { a = Add(x, w)  b = Exp(a)  c = Mul(b, w)  d = Sub(c, a) }", {"x": X}),
        ("(float[4] x) => (float[4] w, float[4] x, float[4] y) { y = Neg(x)  z = Neg(w) }", {"x": X}),
        ("(float[4] x) => (string[4] s) { a = Neg(x)  t = Cast<to=8>(a)  s = StringConcat(t, t) }", {"x": X}),
        ("(float[4] x) => (float[8] y) { a = Neg(x)  s = SequenceConstruct(a, x)  y = ConcatFromSequence<axis=0>(s) }",
         {"x": X}),
        ("(float[4] x, bool k) => (float[4] y) { t = Relu(x)  y = If (k) <then_branch = a () => (float[4] o)"
         " { o = Add(t, w) }, else_branch = b () => (float[4] p) { p = Neg(t) }> }", {"x": X, "k": np.array(True)}),
        ("(float[4] x) => (float[4] y) { a = Cast<to=16>(x)  b = Cast<to=1>(a)  y = Neg(b) }", {"x": X}),
    ],
)  # fmt: skip
def test_whole_or_in_segments(text: str, feeds: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    both(text, feeds, monkeypatch, w=X)


def test_types_that_numpy_does_not_have() -> None:
    text = "(bfloat16[4] x) => (bfloat16[4] y, float[4] z) { z = Cast<to=1>(x)  n = Neg(z)  y = Cast<to=16>(n) }"
    whole = model(text)
    x = X.astype(ml_dtypes.bfloat16)
    found = Reference(whole).run({"x": x})
    assert found["y"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found["y"], -x)
    np.testing.assert_array_equal(found["z"], x.astype(np.float32))


def test_feeds_that_the_model_does_not_read_are_ignored() -> None:
    assert set(Reference(model("(float[4] x) => (float[4] y) { y = Neg(x) }")).run({"x": X, "z": X})) == {"y"}


def test_what_onnxruntime_refuses() -> None:
    with pytest.raises(ModelError, match="onnxruntime cannot load the model: "):
        Reference(model("(float[4] x, int64[4] i) => (float[4] y) { y = Add(x, i) }"))
    with pytest.raises(InputError, match="onnxruntime cannot run the model on these inputs: ") as caught:
        Reference(model("(float[4] x) => (float[4] y) { y = Neg(x) }")).run({"x": X[:2]})
    assert "\n" not in str(caught.value)


def test_weights_on_disk_are_mapped(tmp_path: Path) -> None:
    weights = np.arange(5000, dtype=np.float32)
    proto = parser.parse_model(f"{HEADER} g (float[5000] x) => (float[5000] y) {{ y = Add(x, w) }}")
    proto.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    onnx.save(proto, tmp_path / "m.onnx")
    loaded = io.load(tmp_path / "m.onnx")
    tensor = loaded.graph.initializers["w"].const_value
    assert tensor is not None
    array = mapped(tensor)
    assert not array.flags.writeable and isinstance(array.base, np.ndarray)
    np.testing.assert_array_equal(array, weights)
    np.testing.assert_array_equal(Reference(loaded).run({"x": weights})["y"], 2 * weights)


def test_memory_of_a_large_model_is_that_of_a_segment(tmp_path: Path) -> None:
    """640 MB of weights and as much of results, in less than 520 MB above what Python takes."""
    size = 20 << 20
    with open(tmp_path / "w.bin", "wb") as file:
        file.truncate(size * 4 * 8)
    nodes = "  ".join(f"v{i + 1} = Add(v{i}, w{i})" for i in range(8))
    proto = parser.parse_model(f"{HEADER} g (float[1] v0) => (float[{size}] v8) {{ {nodes} }}")
    for index in range(8):
        tensor = TensorProto(name=f"w{index}", dims=[size], data_type=1, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="w.bin")
        tensor.external_data.add(key="offset", value=str(index * size * 4))
        proto.graph.initializer.append(tensor)
    onnx.save(proto, tmp_path / "m.onnx")
    code = f"""
import numpy as np
from graphwright.passes import io
from graphwright.runtime.measure import peak_rss_mb
from graphwright.runtime.reference import Reference, ort_session
import onnxruntime
before = peak_rss_mb()
y = Reference(io.load({str(tmp_path / "m.onnx")!r}), threads=1).run({{"v0": np.ones(1, np.float32)}})["v8"]
assert (y == 1).all()
print(peak_rss_mb() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # What the last segment reads, makes, and its copies, each of 80 MB.
    assert float(done.stdout) < 520


def test_products_of_bytes_do_not_saturate() -> None:
    """255 * 127 * 2 does not fit the 16 bits in which processors without VNNI add two products."""
    x, w = np.full((1, 8, 4, 4), 255, np.uint8), np.full((2, 8, 1, 1), 127, np.int8)
    text = """(uint8[1,8,4,4] x) => (uint8[1,2,4,4] y)
    { y = QLinearConv (x, one, zero, w, one, signed, scale, zero) }"""
    weights = {"one": np.float32(1), "zero": np.uint8(0), "signed": np.int8(0), "scale": np.float32(2000)}
    found = Reference(model(text, w=w, **weights), threads=1).run({"x": x})
    assert np.unique(found["y"]).tolist() == [round(8 * 255 * 127 / 2000)]


def test_products_of_bytes_that_share_a_weight() -> None:
    """onnxruntime's exact products replace a weight, and refuse to do it twice; the model stays as it is."""
    w = np.full((8, 4), 127, np.int8)
    text = """(uint8[2,8] x, uint8 a, uint8 b) => (int32[2,4] y, int32[2,4] z)
    { y = MatMulInteger (x, w, a, zero)  z = MatMulInteger (x, w, b, zero) }"""
    a, b = np.array(0, np.uint8), np.array(1, np.uint8)
    whole = model(text, w=w, zero=np.array(0, np.int8))
    found = Reference(whole, threads=1).run({"x": np.full((2, 8), 255, np.uint8), "a": a, "b": b})
    assert np.unique(found["y"]).tolist() == [8 * 255 * 127] and np.unique(found["z"]).tolist() == [8 * 254 * 127]
    assert list(whole.graph.initializers) == ["w", "zero"]


def test_products_of_signed_bytes_by_signed_bytes() -> None:
    """Which onnxruntime refuses where it is told to multiply bytes exactly."""
    text = """<ir_version: 8, opset_import: ["": 17]> g (int8[5,8] x) => (int8[5,4] y) <float s = {0.5}, int8 z = {0}>
        { y = QLinearMatMul (x, s, z, w, s, z, s, z) }"""
    proto = parser.parse_model(text)
    weight = np.arange(-16, 16, dtype=np.int8).reshape(8, 4)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    x = np.arange(40, dtype=np.int8).reshape(5, 8) - 20
    (y,) = Reference(ir.from_proto(proto)).run({"x": x}).values()
    expected = np.clip(np.rint(x.astype(np.int64) @ weight.astype(np.int64) * 0.5), -128, 127)
    np.testing.assert_array_equal(y, expected)
