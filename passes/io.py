"""Reading and writing model files: checked on the way in, streamed and atomic on the way out."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from . import wire
from .errors import ModelError, OutputError, WeightsError, did_you_mean
from .graph import subgraphs

log = logging.getLogger("graphwright")

# A protobuf message ends at 2 GiB; leave room for the graph itself.
EMBED_LIMIT = 1 << 30
ALIGNMENT = 4096
LARGEST_TENSOR = 1 << 48  # elements; beyond it a shape is a mistake or an attack

# Domains whose operators onnxruntime has without a function body in the model.
RUNTIME_DOMAINS = frozenset(
    {"ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview", "ai.onnx.preview.training", "com.microsoft",
     "com.microsoft.nchwc", "com.microsoft.experimental", "com.ms.internal.nhwc", "pkg.onnxscript.torch_lib"}
)


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
    proto = wire.read_model(path)
    _check_weights(proto, path)
    _check_structure(proto, path)
    _forget_unknown_dims(proto)
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # onnx_ir raises many kinds for what a protobuf can hold
        raise ModelError(f"{path}: not a valid model: {first_line(error)}") from error
    _check_opsets(model, path)
    return model


def first_line(error: BaseException) -> str:
    """The message of an error as one line."""
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__


# --- checks -----------------------------------------------------------------------------------------------------


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        yield from _node_graphs(node)


def _node_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield from _graphs(attribute.g)
        for inner in attribute.graphs:
            yield from _graphs(inner)


def _check_weights(proto: onnx.ModelProto, path: Path) -> None:
    own = os.path.abspath(path)
    tensors = [t for graph in _graphs(proto.graph) for t in graph.initializer]
    for graph in _graphs(proto.graph):
        for node in graph.node:
            tensors += [a.t for a in node.attribute if a.HasField("t")]
    for tensor in tensors:
        elements = 1
        for dim in tensor.dims:
            if dim < 0:
                raise ModelError(f"{path}: tensor {tensor.name!r} has a negative dimension in {list(tensor.dims)}")
            elements *= dim
        if elements > LARGEST_TENSOR:
            raise ModelError(f"{path}: tensor {tensor.name!r} has an impossible shape {list(tensor.dims)}")
        if tensor.data_type not in onnx.TensorProto.DataType.values() or tensor.data_type == 0:
            raise ModelError(f"{path}: tensor {tensor.name!r} has unknown element type {tensor.data_type}")
        if tensor.data_type == onnx.TensorProto.STRING:
            continue
        expected = math.ceil(elements * ir.DataType(tensor.data_type).bitwidth / 8)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(tensor, expected, path, own)
        elif tensor.HasField("raw_data") and len(tensor.raw_data) != expected:
            raise ModelError(
                f"{path}: tensor {tensor.name!r} of shape {list(tensor.dims)} holds {len(tensor.raw_data)} bytes; "
                f"expected {expected}"
            )


def _check_external(tensor: onnx.TensorProto, expected: int, path: Path, own: str) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if not location:
        raise WeightsError(f"{path}: tensor {tensor.name!r} is external but names no file")
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", expected))
    except ValueError as error:
        raise WeightsError(f"{path}: tensor {tensor.name!r} has an offset or length that is no number") from error
    if location != own:
        folder = os.path.realpath(path.parent)
        file = os.path.realpath(os.path.join(folder, location))
        if os.path.isabs(location) or not file.startswith(folder.rstrip(os.sep) + os.sep):
            raise WeightsError(
                f"{path}: tensor {tensor.name!r} points to {location!r}, outside the model's folder; "
                "move the data beside the model"
            )
        if not os.path.isfile(file):
            raise WeightsError(f"{path}: external data {location!r} is missing; put it beside the model")
        location = file
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = file
    size = os.path.getsize(location)
    if offset < 0 or length != expected or offset + length > size:
        raise WeightsError(
            f"{path}: tensor {tensor.name!r} of shape {list(tensor.dims)} needs {expected} bytes; found {length} "
            f"at offset {offset} of {os.path.basename(location)!r}, which has {size}"
        )


def _forget_unknown_dims(proto: onnx.ModelProto) -> None:
    """Some exporters write -1 or "?" for a dimension that is not known; ONNX leaves it empty."""
    for graph in _graphs(proto.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            for dim in value.type.tensor_type.shape.dim:
                if dim.HasField("dim_value") and dim.dim_value < 0:
                    dim.ClearField("dim_value")
                elif dim.dim_param == "?":
                    dim.ClearField("dim_param")


def _check_structure(proto: onnx.ModelProto, path: Path) -> None:
    """Names defined once, every use defined, no cycles: in the graph, its subgraphs and the functions."""
    _check_scope(proto.graph, set(), path)
    for function in proto.functions:
        scope = onnx.GraphProto(name=function.name)
        scope.node.extend(function.node)
        scope.input.extend(onnx.ValueInfoProto(name=name) for name in function.input)
        _check_scope(scope, set(), path)


def _check_scope(graph: onnx.GraphProto, outer: set[str], path: Path) -> None:
    defined = {value.name for value in graph.input}
    if len(defined) != len(graph.input):
        raise ModelError(f"{path}: two inputs share the name {_twice(v.name for v in graph.input)!r}; rename one")
    weights = [t.name for t in graph.initializer] + [s.values.name for s in graph.sparse_initializer]
    if len(set(weights)) != len(weights):
        raise ModelError(f"{path}: two initializers share the name {_twice(weights)!r}; rename one")
    defined.update(weights)
    producer: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        for name in node.output:
            if name and (name in producer or name in defined):
                raise ModelError(f"{path}: the value name {name!r} is defined twice; rename one of them")
            if name:
                producer[name] = index
    needs = [_uses(node) for node in graph.node]
    for index, names in enumerate(needs):
        for name in names:
            if name not in producer and name not in defined and name not in outer:
                node = graph.node[index]
                raise ModelError(f"{path}: node {_node_name(node)} reads {name!r}, which nothing defines")
    _check_acyclic(graph, needs, producer, path)
    for value in graph.output:
        if value.name not in producer and value.name not in defined and value.name not in outer:
            raise ModelError(f"{path}: the graph output {value.name!r} is not defined by any node")
    visible = outer | defined | set(producer)
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else list(attribute.graphs):
                _check_scope(inner, visible, path)


def _twice(names: Iterator[str] | list[str]) -> str:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return ""


def _node_name(node: onnx.NodeProto) -> str:
    return repr(node.name or (node.output[0] if node.output else "")) + f" ({node.op_type})"


def _uses(node: onnx.NodeProto) -> set[str]:
    """Names a node reads, those its subgraphs read from outside included."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.HasField("g") else list(attribute.graphs):
            own = {v.name for v in graph.input} | {t.name for t in graph.initializer}
            own |= {s.values.name for s in graph.sparse_initializer}
            own |= {name for inner in graph.node for name in inner.output}
            for inner in graph.node:
                names |= _uses(inner) - own
            names |= {v.name for v in graph.output} - own
    return names


def _check_acyclic(
    graph: onnx.GraphProto, needs: list[set[str]], producer: dict[str, int], path: Path
) -> None:
    waiting = [0] * len(needs)
    readers: list[list[int]] = [[] for _ in needs]
    in_order = True
    for index, names in enumerate(needs):
        for source in {producer[name] for name in names if name in producer}:
            readers[source].append(index)
            waiting[index] += 1
            in_order &= source < index
    if in_order:
        return
    ready = [index for index, count in enumerate(waiting) if not count]
    done = 0
    while ready:
        index = ready.pop()
        done += 1
        for reader in readers[index]:
            waiting[reader] -= 1
            if not waiting[reader]:
                ready.append(reader)
    if done < len(needs):
        stuck = next(index for index, count in enumerate(waiting) if count)
        raise ModelError(f"{path}: the graph has a cycle through node {_node_name(graph.node[stuck])}")


def _check_opsets(model: ir.Model, path: Path) -> None:
    """Every operator is known: by a schema, by a function of the model, or to onnxruntime by its domain."""
    newest = onnx.defs.onnx_opset_version()
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if version is not None and not 1 <= version <= newest:
        raise ModelError(f"{path}: opset {version} is not known; expected 1 to {newest}")
    functions = {(domain, name) for domain, name, _ in model.functions}
    checked: set[tuple[str, str]] = set()
    for graph in [model.graph, *(f.graph for f in model.functions.values())]:
        for node in graph.all_nodes():
            key = (node.domain, node.op_type)
            if key in checked or key in functions:
                continue
            checked.add(key)
            _check_operator(node, version, path)


def _check_operator(node: ir.Node, version: int | None, path: Path) -> None:
    where = f"node {node.name or node.outputs[0].name!r}" if node.outputs else f"node {node.name!r}"
    if node.domain not in ("", "ai.onnx"):
        if node.domain not in RUNTIME_DOMAINS:
            raise ModelError(
                f"{path}: {where} is {node.domain}::{node.op_type}, an operator domain nobody here knows; "
                "add its function body to the model or export without it"
            )
        return
    if version is None:
        raise ModelError(f"{path}: {where} is {node.op_type} of ai.onnx, but the model imports no ai.onnx opset")
    if not onnx.defs.has(node.op_type, version, ""):
        names = {s.name for s in onnx.defs.get_all_schemas() if not s.domain}
        raise ModelError(
            f"{path}: {where}: ai.onnx opset {version} has no operator {node.op_type!r}; "
            f"{did_you_mean(node.op_type, names)}"
        )


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
    proto = _proto_without(model, large)
    if sum(tensor.nbytes for tensor in large.values()) <= EMBED_LIMIT:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            wire.write_model(proto, {name: (t.nbytes, _streamer(t)) for name, t in large.items()}, file)
        return path.stat().st_size
    data_path = path.with_name(path.name + ".data")
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
        return ir.to_proto(model)
    finally:
        for value, tensor in held:
            value.const_value = tensor


def _placeholder(name: str, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        "weights", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name, base_dir=""
    )
