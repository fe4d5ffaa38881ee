"""Protobuf's wire format: large tensors are found without being read and written without being held."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphwright.passes import wire
from graphwright.passes.errors import ModelError
from onnx import TensorProto, helper, numpy_helper


def model(*weights: TensorProto) -> onnx.ModelProto:
    outputs = [helper.make_tensor_value_info(w.name, w.data_type, list(w.dims)) for w in weights]
    return helper.make_model(helper.make_graph([], "g", [], outputs, list(weights)))


def numbers(count: int, name: str = "w") -> TensorProto:
    return numpy_helper.from_array(np.arange(count, dtype=np.float32), name)


def location(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 1 << 31, (1 << 63) - 1])
def test_numbers(number: int, tmp_path: Path) -> None:
    path = tmp_path / "number"
    size = path.write_bytes(wire.encode_varint(number))
    with open(path, "rb") as file:
        assert wire._varint(wire._File(file.fileno()), 0, size) == (number, size)


def test_large_tensors_are_referred_to_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    original = model(numbers(4, "small"), numbers(5000, "large"), numbers(6000, "larger"))
    path.write_bytes(original.SerializeToString())
    small, large, larger = wire.read_model(path).graph.initializer
    assert small == original.graph.initializer[0]
    for tensor, count in ((large, 5000), (larger, 6000)):
        assert not tensor.raw_data and tensor.data_location == TensorProto.EXTERNAL
        place = location(tensor)
        assert place["location"] == str(path) and int(place["length"]) == count * 4
        data = path.read_bytes()[int(place["offset"]) :][: count * 4]
        np.testing.assert_array_equal(np.frombuffer(data, np.float32), np.arange(count))


def test_the_rest_of_the_model_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    original = model(numbers(5000))
    original.producer_name = "me"
    original.metadata_props.add(key="k", value="v")
    original.graph.initializer[0].doc_string = "long " * 2000
    original.functions.append(
        helper.make_function("d", "F", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])],
                             [helper.make_opsetid("", 21)])
    )  # fmt: skip
    path.write_bytes(original.SerializeToString())
    found = wire.read_model(path)
    assert found.graph.initializer[0].doc_string == original.graph.initializer[0].doc_string
    for proto in (found, original):
        del proto.graph.initializer[:]
    assert found == original


def test_what_is_written_is_what_protobuf_reads() -> None:
    proto = model(numbers(3, "a"), numbers(2000, "b"), numbers(1, "c"))
    data = np.arange(2000, dtype=np.float32).tobytes()
    file = io.BytesIO()
    copy = onnx.ModelProto.FromString(proto.SerializeToString())
    copy.graph.initializer[1].ClearField("raw_data")
    wire.write_model(copy, {"b": (len(data), lambda out: out.write(data))}, file)
    found = onnx.ModelProto.FromString(file.getvalue())
    assert {t.name: t.raw_data for t in found.graph.initializer} == {
        t.name: t.raw_data for t in proto.graph.initializer
    }
    assert found.graph.output == proto.graph.output and found.opset_import == proto.opset_import


def test_every_cut_is_noticed_or_harmless(tmp_path: Path) -> None:
    """A file cut anywhere is refused; never is a model read whose weights end beyond the file."""
    path = tmp_path / "m.onnx"
    data = model(numbers(4), numbers(2000, "large")).SerializeToString()
    for length in [*range(0, 200), *range(200, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:length])
        try:
            found = wire.read_model(path)
        except ModelError as error:
            assert "\n" not in str(error)
            continue
        for tensor in found.graph.initializer:
            place = location(tensor)
            assert not place or int(place["offset"]) + int(place["length"]) <= length


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"\x00\x01", "number 0"),
        (b"\xff" * 30, "does not end"),
        (b"\x0f\x00", "unknown kind 7"),
        (b"\x3a\xff\xff\x03" + bytes(20), "ends at byte"),
        (b"\x08\x07", "without an ONNX graph"),
    ],
)
def test_what_is_no_model(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=message):
        wire.read_model(path)
