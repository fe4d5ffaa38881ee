"""Protobuf's wire format, as far as weights need it: find them in a file without reading them, write them without
holding them.

A model of a gigabyte is a few hundred kilobytes of graph around raw tensor bytes. `read_model` parses only the
graph and leaves each large tensor where it is, as a reference (file, offset, length); `write_model` streams such
tensors into their place. Field numbers are those of onnx.proto3.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import onnx

from .errors import ModelError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MODEL_GRAPH, GRAPH_INITIALIZER, TENSOR_RAW_DATA = 7, 5, 9
LARGE = 4096  # bytes; smaller tensors stay in the parsed graph
CHUNK = 4 << 20
WINDOW = 64 << 10


class _File:
    """A file read through a window that moves along: what is skipped costs no memory, not even a mapped page."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        self._start, self._window = 0, b""

    def __len__(self) -> int:
        return self._size

    def byte(self, at: int) -> int:
        offset = at - self._start
        if not 0 <= offset < len(self._window):
            self._start, self._window, offset = at, os.pread(self._descriptor, WINDOW, at), 0
        return self._window[offset]

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`, from the window if it holds them."""
        offset = start - self._start
        if offset >= 0 and end - self._start <= len(self._window):
            return self._window[offset : offset + end - start]
        parts = []
        while start < end:
            part = os.pread(self._descriptor, min(end - start, CHUNK), start)
            if not part:
                raise _Damaged(f"it ends at byte {start}")
            parts.append(part)
            start += len(part)
        return b"".join(parts)


class _Damaged(Exception):
    pass


def _varint(data: _File, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= end or shift > 63:
            raise _Damaged(f"a number at byte {at} does not end")
        byte = data.byte(at)
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: _File, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(number, kind, first byte of the tag, first byte of the value, end) of each field of a message."""
    at = start
    while at < end:
        tag_at = at
        tag, at = _varint(data, at, end)
        number, kind = tag >> 3, tag & 7
        value_at = at
        if kind == BYTES:
            length, value_at = _varint(data, at, end)
            at = value_at + length
        elif kind == VARINT:
            _, at = _varint(data, at, end)
        elif kind in (FIXED64, FIXED32):
            at += 8 if kind == FIXED64 else 4
        else:
            raise _Damaged(f"field {number} at byte {tag_at} is of unknown kind {kind}")
        if number == 0:
            raise _Damaged(f"a field at byte {tag_at} has number 0")
        if at > end:
            raise _Damaged(f"field {number} at byte {tag_at} ends at byte {at}, its container at byte {end}")
        yield number, kind, tag_at, value_at, at


def encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_bytes_header(number: int, length: int) -> bytes:
    """Tag and length of a length-delimited field; `length` bytes must follow."""
    return encode_varint(number << 3 | BYTES) + encode_varint(length)


def _external(data: _File, start: int, end: int, location: str) -> bytes | None:
    """The TensorProto between start and end with its large raw bytes replaced by a reference; None: keep it."""
    rest, raw = bytearray(), None
    for number, kind, tag_at, value_at, field_end in _fields(data, start, end):
        if number == TENSOR_RAW_DATA and kind == BYTES:
            raw = (value_at, field_end)
        else:
            rest += data.read(tag_at, field_end)
    if raw is None or raw[1] - raw[0] < LARGE:
        return None
    tensor = onnx.TensorProto.FromString(bytes(rest))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(raw[0])), ("length", str(raw[1] - raw[0]))):
        tensor.external_data.add(key=key, value=value)
    return tensor.SerializeToString()


def _without_weights(data: _File, location: str) -> bytes:
    model, size = bytearray(), len(data)
    for number, kind, tag_at, value_at, end in _fields(data, 0, size):
        if number != MODEL_GRAPH or kind != BYTES:
            model += data.read(tag_at, end)
            continue
        graph, kept_from = bytearray(), value_at
        for inner, inner_kind, inner_tag_at, inner_at, inner_end in _fields(data, value_at, end):
            if inner != GRAPH_INITIALIZER or inner_kind != BYTES or inner_end - inner_at < LARGE:
                continue
            tensor = _external(data, inner_at, inner_end, location)
            if tensor is not None:
                graph += data.read(kept_from, inner_tag_at)
                graph += encode_bytes_header(GRAPH_INITIALIZER, len(tensor)) + tensor
                kept_from = inner_end
        graph += data.read(kept_from, end)
        model += encode_bytes_header(MODEL_GRAPH, len(graph)) + graph
    return bytes(model)


def read_model(path: Path) -> onnx.ModelProto:
    """The model at `path`; every large initializer is an external reference to its bytes in that same file, with
    the file's absolute path as location.

    Raises ModelError when the file is empty, cut short, or not an ONNX protobuf.
    """
    location = os.path.abspath(path)
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ModelError(f"{path}: the file is empty; expected an ONNX model")
            proto = onnx.ModelProto.FromString(_without_weights(_File(file.fileno()), location))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); expected an ONNX model") from error
    except _Damaged as error:
        raise ModelError(
            f"{path}: cut short or not an ONNX file ({error}); expected an ONNX protobuf, fetch or export it again"
        ) from error
    except Exception as error:  # DecodeError: protobuf's two implementations raise different classes
        if type(error).__name__ != "DecodeError":
            raise
        raise ModelError(
            f"{path}: cut short or not an ONNX file (protobuf cannot parse it); fetch or export it again"
        ) from error
    if not proto.HasField("graph") or not proto.ir_version:
        raise ModelError(f"{path}: a protobuf without an ONNX graph; expected an ONNX model file")
    return proto


Stream = Callable[[BinaryIO], None]


def write_model(proto: onnx.ModelProto, streams: dict[str, tuple[int, Stream]], file: BinaryIO) -> None:
    """Write `proto` with the raw bytes of some initializers streamed in.

    streams: initializer name -> (bytes, function that writes exactly that many bytes to the file). `proto` is
    emptied of its graph on the way.
    """
    graph = onnx.GraphProto()
    graph.CopyFrom(proto.graph)
    proto.ClearField("graph")
    tensors = list(graph.initializer)
    inline = [t for t in tensors if t.name not in streams]
    streamed = [t for t in tensors if t.name in streams]
    del graph.initializer[:]
    graph.initializer.extend(inline)
    body = graph.SerializeToString()
    parts: list[tuple[bytes, Stream]] = []
    length = len(body)
    for tensor in streamed:
        nbytes, stream = streams[tensor.name]
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        tensor.ClearField("raw_data")
        header = tensor.SerializeToString() + encode_bytes_header(TENSOR_RAW_DATA, nbytes)
        header = encode_bytes_header(GRAPH_INITIALIZER, len(header) + nbytes) + header
        parts.append((header, stream))
        length += len(header) + nbytes
    file.write(proto.SerializeToString())
    file.write(encode_bytes_header(MODEL_GRAPH, length))
    file.write(body)
    for header, stream in parts:
        file.write(header)
        stream(file)
