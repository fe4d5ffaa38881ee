"""What must hold of a model file before anything is done with it, each failure in one line of text.

The checks work on the parsed protobuf, whose large weights are references (see `wire`). Three of them also mend what
is valid but known to nobody else here: nodes out of order are sorted, sparse initializers made dense, and dimensions
that say "unknown" in a way of their own left empty.
"""

from __future__ import annotations

import heapq
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from .errors import ModelError, WeightsError, did_you_mean

LARGEST_TENSOR = 1 << 48  # elements; beyond it a shape is a mistake or an attack
LARGEST_FUNCTION = 10_000_000  # nodes
LARGEST_SPARSE = 1 << 28  # elements of a sparse tensor that is made dense

# Domains whose operators onnxruntime has without a function body in the model.
RUNTIME_DOMAINS = frozenset(
    {
        "ai.onnx.ml",
        "ai.onnx.training",
        "ai.onnx.preview",
        "ai.onnx.preview.training",
        "com.microsoft",
        "com.microsoft.nchwc",
        "com.microsoft.experimental",
        "com.ms.internal.nhwc",
        "pkg.onnxscript.torch_lib",
    }
)
# Operators that onnxruntime has in the standard's domain, in every opset, and that its optimizer writes.
RUNTIME_OPERATORS = frozenset({"LayerNormalization", "SimplifiedLayerNormalization"})


def check_proto(proto: onnx.ModelProto, path: Path) -> None:
    """Raises ModelError or WeightsError. `path` is where the model was read from."""
    _check_text(proto, path)
    _check_weights(proto, path)
    _fill_sparse(proto, path)
    _check_structure(proto, path)
    _check_interface(proto, path)
    _forget_unknown_dims(proto)


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


def _all_graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph, the bodies of functions as graphs, and every subgraph."""
    yield from _graphs(proto.graph)
    for function in proto.functions:
        for node in function.node:
            yield from _node_graphs(node)


def _all_nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in _all_graphs(proto):
        yield from graph.node
    for function in proto.functions:
        yield from function.node


def _check_text(proto: onnx.ModelProto, path: Path) -> None:
    """Names are UTF-8; protobuf hands others out as bytes."""

    def texts() -> Iterator[object]:
        yield from (proto.producer_name, proto.producer_version, proto.domain, proto.doc_string)
        yield from (entry.domain for entry in proto.opset_import)
        yield from (text for prop in proto.metadata_props for text in (prop.key, prop.value))
        for function in proto.functions:
            yield from (function.name, function.domain, function.overload, function.doc_string)
            yield from (*function.input, *function.output, *function.attribute)
            yield from (entry.domain for entry in function.opset_import)
        for node in _all_nodes(proto):
            yield from (node.name, node.op_type, node.domain, node.doc_string, *node.input, *node.output)
            for attribute in node.attribute:
                yield from (attribute.name, attribute.ref_attr_name, attribute.doc_string, attribute.t.name)
        for graph in _all_graphs(proto):
            yield from (graph.name, graph.doc_string, *(tensor.name for tensor in graph.initializer))
            for value in (*graph.input, *graph.output, *graph.value_info):
                yield from (value.name, value.doc_string, value.type.denotation)
                yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)

    if any(isinstance(text, bytes) for text in texts()):
        raise ModelError(f"{path}: a name is not UTF-8 text; the file is damaged, fetch or export it again")


def _check_weights(proto: onnx.ModelProto, path: Path) -> None:
    own = os.path.abspath(path)
    for graph in _all_graphs(proto):
        for tensor in graph.initializer:
            _check_tensor(tensor, path, own)
        for sparse in graph.sparse_initializer:
            _check_tensor(sparse.values, path, own, inline=True)
            _check_tensor(sparse.indices, path, own, inline=True)
    for node in _all_nodes(proto):
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.UNDEFINED:
                raise ModelError(f"{path}: attribute {attribute.name!r} of node {_node_name(node)} has no known type")
            for tensor in (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors):
                _check_tensor(tensor, path, own, inline=True)
            if attribute.HasField("sparse_tensor"):
                _check_tensor(attribute.sparse_tensor.values, path, own, inline=True)
                _check_tensor(attribute.sparse_tensor.indices, path, own, inline=True)


def _check_tensor(tensor: onnx.TensorProto, path: Path, own: str, *, inline: bool = False) -> None:
    """Shape, type and bytes belong together. inline: bytes that lie in another file are read into the tensor."""
    elements = 1
    for dim in tensor.dims:
        if dim < 0:
            raise ModelError(f"{path}: tensor {tensor.name!r} has a negative dimension in {list(tensor.dims)}")
        elements *= dim
    if elements > LARGEST_TENSOR:
        raise ModelError(f"{path}: tensor {tensor.name!r} has an impossible shape {list(tensor.dims)}")
    if tensor.data_type not in onnx.TensorProto.DataType.values() or tensor.data_type == 0:
        raise ModelError(f"{path}: tensor {tensor.name!r} has unknown element type {tensor.data_type}")
    shape = f"tensor {tensor.name!r} of shape {list(tensor.dims)}"
    if tensor.data_type == onnx.TensorProto.STRING:
        if len(tensor.string_data) != elements:
            raise ModelError(f"{path}: {shape} holds {len(tensor.string_data)} strings; expected {elements}")
        return
    expected = math.ceil(elements * ir.DataType(tensor.data_type).bitwidth / 8)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        file, offset = _check_external(tensor, expected, path, own)
        if inline or not expected:
            with open(file, "rb") as data:
                data.seek(offset)
                tensor.raw_data = data.read(expected)
            tensor.ClearField("data_location")
            del tensor.external_data[:]
    elif tensor.HasField("raw_data"):
        if len(tensor.raw_data) != expected:
            raise ModelError(f"{path}: {shape} holds {len(tensor.raw_data)} bytes; expected {expected}")
    else:
        field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
        found = len(getattr(tensor, field))
        if found != _typed_length(tensor.data_type, elements):
            raise ModelError(f"{path}: {shape} holds {found} numbers; expected {elements}")


def _typed_length(dtype: int, elements: int) -> int:
    """Entries of the typed data field: two for a complex number, one for each byte of packed small integers."""
    bits = ir.DataType(dtype).bitwidth
    if dtype in (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128):
        return 2 * elements
    return math.ceil(elements * bits / 8) if bits < 8 else elements


def _check_external(tensor: onnx.TensorProto, expected: int, path: Path, own: str) -> tuple[str, int]:
    """The file and offset of a tensor's bytes. The tensor's location becomes the file's absolute path."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if not location:
        raise WeightsError(f"{path}: tensor {tensor.name!r} is external but names no file")
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", expected))
    except ValueError as error:
        raise WeightsError(f"{path}: tensor {tensor.name!r} has an offset or length that is no number") from error
    file = own if location == own else _beside(location, tensor.name, path)
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = file
    size = os.path.getsize(file)
    if offset < 0 or length != expected or offset + length > size:
        raise WeightsError(
            f"{path}: tensor {tensor.name!r} of shape {list(tensor.dims)} needs {expected} bytes; found {length} "
            f"at offset {offset} of {os.path.basename(location)!r}, which has {size}"
        )
    return file, offset


def _beside(location: str, name: str, path: Path) -> str:
    """The data file `location` of a model, which must lie in the model's folder.

    A model that is a link has two: where the link is and where it points. Caches of downloads keep both files as
    links to places where they have other names, so the data may be found in the one and lie in the other.
    """
    folders = list(dict.fromkeys(os.path.realpath(f) for f in (path.parent, Path(os.path.realpath(path)).parent)))
    files = [] if os.path.isabs(location) else [os.path.join(folder, location) for folder in folders]
    inside = [f for f in files if any(os.path.realpath(f).startswith(d.rstrip(os.sep) + os.sep) for d in folders)]
    found = next((os.path.realpath(f) for f in inside if os.path.isfile(f)), None)
    if found:
        return found
    if len(inside) == len(files) and files:
        raise WeightsError(f"{path}: external data {location!r} is missing; put it beside the model")
    raise WeightsError(
        f"{path}: tensor {name!r} points to {location!r}, outside the model's folder; move the data beside the model"
    )


def _fill_sparse(proto: onnx.ModelProto, path: Path) -> None:
    """Sparse initializers become dense ones: no pass, and not onnx_ir, knows them."""
    for graph in _all_graphs(proto):
        for sparse in graph.sparse_initializer:
            graph.initializer.append(_dense(sparse, path))
        del graph.sparse_initializer[:]


def _dense(sparse: onnx.SparseTensorProto, path: Path) -> onnx.TensorProto:
    name, shape = sparse.values.name, list(sparse.dims)
    if min(shape, default=1) < 0 or math.prod(shape) > LARGEST_SPARSE:
        raise ModelError(f"{path}: sparse tensor {name!r} of shape {shape} is too large to be made dense")
    values = onnx.numpy_helper.to_array(sparse.values)
    indices = onnx.numpy_helper.to_array(sparse.indices)
    if indices.ndim == 2:
        indices = indices @ np.array([math.prod(shape[axis + 1 :]) for axis in range(len(shape))], np.int64)
    dense = np.zeros(math.prod(shape), values.dtype)
    if indices.shape != values.shape or (indices.size and not 0 <= indices.min() <= indices.max() < dense.size):
        raise ModelError(f"{path}: sparse tensor {name!r} has indices that do not fit its shape {shape}")
    dense[indices] = values
    return onnx.numpy_helper.from_array(dense.reshape(shape), name)


def _forget_unknown_dims(proto: onnx.ModelProto) -> None:
    """Some exporters write -1 or "?" for a dimension that is not known; ONNX leaves it empty."""
    for graph in _all_graphs(proto):
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
        scope.output.extend(onnx.ValueInfoProto(name=name) for name in function.output)
        _check_scope(scope, set(), path)
        del function.node[:]
        function.node.extend(scope.node)
    _check_recursion(proto, path)


def _check_interface(proto: onnx.ModelProto, path: Path) -> None:
    """The version is known, inputs have types, and there is something to compute."""
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"{path}: IR version {proto.ir_version} is not known; expected at most {onnx.IR_VERSION}, export with it"
        )
    if not proto.graph.output:
        raise ModelError(f"{path}: the graph has no outputs; expected at least one, name one when exporting")
    weights = {tensor.name for tensor in proto.graph.initializer}
    for value in proto.graph.input:
        kind = value.type.WhichOneof("value")
        known = value.type.tensor_type.elem_type if kind == "tensor_type" else kind
        if not known and value.name not in weights:
            raise ModelError(
                f"{path}: input {value.name!r} has no element type; expected one, such as float, export with it"
            )
    for value in (*proto.graph.input, *proto.graph.output):
        dims = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in value.type.tensor_type.shape.dim]
        if math.prod(dim for dim in dims if isinstance(dim, int) and dim >= 0) > LARGEST_TENSOR:
            raise ModelError(f"{path}: {value.name!r} has an impossible shape {dims}; expected at most 2^48 elements")


def _check_recursion(proto: onnx.ModelProto, path: Path) -> None:
    """No function calls itself, over others neither, and written out they do not explode."""
    bodies = {(f.domain, f.name): f for f in proto.functions}
    calls = {}
    for key, function in bodies.items():
        nodes = [*function.node, *(n for node in function.node for g in _node_graphs(node) for n in g.node)]
        calls[key] = [(n.domain, n.op_type) for n in nodes]
    sizes: dict[tuple[str, str], int] = {}  # nodes of a function when every call in it is written out
    while leaves := [key for key, called in calls.items() if all(c in sizes or c not in bodies for c in called)]:
        for key in leaves:
            sizes[key] = sum(sizes.get(c, 1) for c in calls.pop(key))
            if sizes[key] > LARGEST_FUNCTION:
                raise ModelError(
                    f"{path}: the function {key[0]}::{key[1]} has more than {LARGEST_FUNCTION:,} nodes when the "
                    "functions it calls are written out; export with fewer nested functions"
                )
    if calls:
        domain, name = next(iter(calls))
        raise ModelError(f"{path}: the function {domain}::{name} calls itself; functions of a model may not")


def _check_scope(graph: onnx.GraphProto, outer: set[str], path: Path) -> None:
    defined = {value.name for value in graph.input}
    if len(defined) != len(graph.input):
        raise ModelError(f"{path}: two inputs share the name {_twice(v.name for v in graph.input)!r}; rename one")
    weights = [tensor.name for tensor in graph.initializer]
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
    _sort(graph, needs, producer, path)
    for value in graph.output:
        if value.name not in producer and value.name not in defined:
            hint = "; put an Identity between" if value.name in outer else ""
            raise ModelError(f"{path}: the graph output {value.name!r} is not defined by any node of its graph{hint}")
    inner_graphs = [inner for node in graph.node for inner in _own_graphs(node)]
    visible = outer | defined | set(producer) if inner_graphs else set()
    for inner in inner_graphs:
        _check_scope(inner, visible, path)


def _own_graphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [g for a in node.attribute for g in ([a.g] if a.HasField("g") else a.graphs)]


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
    for graph in _own_graphs(node):
        own = {v.name for v in graph.input} | {t.name for t in graph.initializer}
        own |= {name for inner in graph.node for name in inner.output}
        for inner in graph.node:
            names |= _uses(inner) - own
        names |= {v.name for v in graph.output} - own
    return names


def _sort(graph: onnx.GraphProto, needs: list[set[str]], producer: dict[str, int], path: Path) -> None:
    """Put the nodes into an order in which every value is there before it is read, the given one where it is."""
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
    order = []
    heapq.heapify(ready)
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for reader in readers[index]:
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, reader)
    if len(order) < len(needs):
        stuck = next(index for index, count in enumerate(waiting) if count)
        raise ModelError(f"{path}: the graph has a cycle through node {_node_name(graph.node[stuck])}")
    nodes = [graph.node[index] for index in order]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def check_operators(model: ir.Model, path: Path) -> None:
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
    if node.op_type not in RUNTIME_OPERATORS and not onnx.defs.has(node.op_type, version, ""):
        names = {s.name for s in onnx.defs.get_all_schemas() if not s.domain}
        raise ModelError(
            f"{path}: {where}: ai.onnx opset {version} has no operator {node.op_type!r}; "
            f"{did_you_mean(node.op_type, names)}"
        )
