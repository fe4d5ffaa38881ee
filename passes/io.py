"""Reading and writing model files: checked on the way in, streamed and atomic on the way out."""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from . import wire
from .checking import check_operators, check_proto
from .errors import ModelError, OutputError, WeightsError, did_you_mean, first_line
from .graph import all_graphs, subgraphs

log = logging.getLogger("graphwright")

# A protobuf message ends at 2 GiB; leave room for the graph itself.
EMBED_LIMIT = 1 << 30
ALIGNMENT = 4096
SET_ASIDE = "graphwright.type"


def load(path: str | os.PathLike[str]) -> ir.Model:
    """The model at `path`, valid and with its large weights still on disk.

    Raises ModelError (not ONNX, cut short, cyclic, unknown operators, duplicate names, impossible shapes) or
    WeightsError (external data missing, short, or outside the model's folder), each in one line.
    """
    path = Path(path)
    if path.is_dir():
        raise ModelError(f"{path}: is a folder; expected an ONNX file")
    if not path.exists():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.onnx")]) if path.parent.is_dir() else ""
        raise ModelError(f"{path}: no such file" + (f"; {near}" if "did" in near else ""))
    if not path.is_file():
        raise ModelError(f"{path}: is not a regular file; expected an ONNX file")
    proto = wire.read_model(path)
    check_proto(proto, path)
    set_aside = _set_aside(proto)
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # onnx_ir raises many kinds for what a protobuf can hold
        raise ModelError(f"{path}: not a valid model: {first_line(error)}") from error
    for value in model.graph.outputs:
        if value.name in set_aside:
            value.metadata_props[SET_ASIDE] = set_aside[value.name]
    check_operators(model, path)
    return model


def _set_aside(proto: onnx.ModelProto) -> dict[str, str]:
    """Take away the types that onnx_ir has no word for, those with maps: output name -> the type in base64.

    Classifiers exported from scikit-learn end in a sequence of maps; onnxruntime finds these types by itself.
    """
    found: dict[str, str] = {}
    for value in (*proto.graph.output, *proto.graph.value_info):
        if has_map(value.type):
            found[value.name] = base64.b64encode(value.type.SerializeToString()).decode()
            value.ClearField("type")
    return found


def has_map(kind: onnx.TypeProto) -> bool:
    if kind.HasField("sequence_type"):
        return has_map(kind.sequence_type.elem_type)
    if kind.HasField("optional_type"):
        return has_map(kind.optional_type.elem_type)
    return kind.HasField("map_type")


def set_aside_type(value: ir.Value) -> onnx.TypeProto | None:
    """The declared type of a graph output that onnx_ir cannot hold; None for every other value."""
    text = value.metadata_props.get(SET_ASIDE)
    return onnx.TypeProto.FromString(base64.b64decode(text)) if text else None


# --- tensors ----------------------------------------------------------------------------------------------------


def external_source(tensor: ir.TensorProtocol | None) -> tuple[Path, int, int] | None:
    """(file, offset, bytes) of a tensor that lies on disk; None for one in memory."""
    if isinstance(tensor, ir.ExternalTensor):
        return Path(tensor.path), tensor.offset or 0, tensor.nbytes
    return None


def tensor_chunks(tensor: ir.TensorProtocol) -> Iterator[bytes]:
    """The raw little-endian bytes of a tensor, a few megabytes at a time and, from disk, without mapping them."""
    source = external_source(tensor)
    if source is None:
        yield tensor.tobytes()
        return
    path, offset, left = source
    with open(path, "rb") as file:
        file.seek(offset)
        while left:
            chunk = file.read(min(wire.CHUNK, left))
            if not chunk:
                raise WeightsError(f"{path}: ends {left} bytes early; was it changed while being read?")
            left -= len(chunk)
            yield chunk


def special_numbers(tensor: ir.TensorProtocol) -> tuple[int, int]:
    """How many numbers of a tensor of floats are (NaN, infinite), read a few megabytes at a time."""
    if tensor.dtype.bitwidth < 16:  # the small types are told apart by their library only as a whole
        values = tensor.numpy().astype(np.float32)
        return int(np.isnan(values).sum()), int(np.isinf(values).sum())
    dtype = tensor.dtype.numpy()
    nans = infinities = 0
    for chunk in tensor_chunks(tensor):
        values = np.frombuffer(chunk, dtype)
        if not np.isfinite(values).all():
            nans += int(np.isnan(values).sum())
            infinities += int(np.isinf(values).sum())
    return nans, infinities


def weights_nbytes(model: ir.Model) -> int:
    """Bytes of all initializers of the model, subgraphs' included."""
    graphs = [model.graph, *(g for node in model.graph.all_nodes() for g in subgraphs(node))]
    return sum(v.const_value.nbytes for g in graphs for v in g.initializers.values() if v.const_value is not None)


# --- saving -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well and vanishes when it does not.

    Raises OutputError when the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); choose another output") from error
    os.close(handle)
    temporary = Path(name)
    umask = os.umask(0)
    os.umask(umask)
    try:
        yield temporary
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}); choose another output") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_output(path: Path, overwrite: bool) -> None:
    """Raises OutputError when `path` exists and may not be replaced."""
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise OutputError(f"{path}: already exists; give --overwrite to replace it or -o to write elsewhere")


def check_folder(folder: Path) -> None:
    """Raises OutputError when no file can be made in `folder`, which need not exist yet. Leaves nothing behind."""
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); choose another output") from error


def save(model: ir.Model, path: str | os.PathLike[str], *, overwrite: bool = False) -> int:
    """Write `model` to `path`, large weights streamed, and return the bytes written.

    Weights go into the file itself, or into `path`.data when they exceed 1 GiB. Nothing is left behind on failure.
    """
    path = Path(path)
    check_output(path, overwrite)
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; expected a file name")
    large = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
        and value.const_value.nbytes >= wire.LARGE
        and value.const_value.dtype != ir.DataType.STRING
    }
    data_path = path.with_name(path.name + ".data")
    for used in _files_of(model):
        if any(other.exists() and used.samefile(other) for other in (path, data_path)):
            raise OutputError(f"{used}: holds weights of the model and will not be replaced; choose another output")
    proto = _proto_without(model, large)
    if sum(tensor.nbytes for tensor in large.values()) <= EMBED_LIMIT:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            wire.write_model(proto, {name: (t.nbytes, _streamer(t)) for name, t in large.items()}, file)
        return path.stat().st_size
    check_output(data_path, overwrite)
    with replacing(data_path) as data_temporary, replacing(path) as temporary:
        with open(data_temporary, "wb") as data:
            for tensor in proto.graph.initializer:
                if tensor.name in large:
                    data.seek(-data.tell() % ALIGNMENT, os.SEEK_CUR)
                    _refer(tensor, data_path.name, data.tell(), large[tensor.name].nbytes)
                    _streamer(large[tensor.name])(data)
        temporary.write_bytes(proto.SerializeToString())
    return path.stat().st_size + data_path.stat().st_size


def _files_of(model: ir.Model) -> set[Path]:
    """The files that tensors of the model lie in."""
    values = (v for graph in all_graphs(model) for v in graph.initializers.values())
    return {source[0] for v in values if (source := external_source(v.const_value)) and source[0].exists()}


def _streamer(tensor: ir.TensorProtocol) -> wire.Stream:
    def stream(file: object) -> None:
        for chunk in tensor_chunks(tensor):
            file.write(chunk)  # type: ignore[attr-defined]  # BinaryIO, as wire.Stream says

    return stream


def _refer(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    del tensor.external_data[:]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as protobuf with every weight inside: for models known to be small, such as a cut-out region."""
    return _proto_without(model, {})


def _proto_without(model: ir.Model, large: dict[str, ir.TensorProtocol]) -> onnx.ModelProto:
    """The protobuf of `model` in which the tensors of `large` have no bytes and no other tensor is on disk."""
    held: list[tuple[ir.Value, ir.TensorProtocol]] = []
    graphs = [model.graph, *(g for node in model.graph.all_nodes() for g in subgraphs(node))]
    try:
        for graph in graphs:
            for name, value in graph.initializers.items():
                tensor = value.const_value
                if tensor is None:
                    continue
                if graph is model.graph and name in large:
                    value.const_value = _placeholder(name, tensor)
                elif external_source(tensor) is not None:
                    value.const_value = ir.Tensor(
                        np.array(tensor.numpy()), dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
                    )
                else:
                    continue
                held.append((value, tensor))
        proto = ir.to_proto(model)
    finally:
        for value, tensor in held:
            value.const_value = tensor
    for value, written in zip(model.graph.outputs, proto.graph.output, strict=True):
        if (kind := set_aside_type(value)) is not None:
            written.type.CopyFrom(kind)
            del written.metadata_props[:]
    return proto


def _placeholder(name: str, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        "weights", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name, base_dir=""
    )
