"""Questions and edits that passes share. Everything here takes time linear in what it returns or touches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

SMALL = 64 << 10  # bytes: what a pass may read of a constant without asking


@dataclass(frozen=True)
class Scope:
    """One graph and what surrounds it: `opsets` are the imports that hold in it, `function` the function
    whose body (or body's subgraph) it is, `parent` the node that owns it when it is a subgraph."""

    graph: ir.Graph
    opsets: dict[str, int]
    function: ir.Function | None = None
    parent: ir.Node | None = None

    @property
    def opset(self) -> int:
        """Version of the standard operators here."""
        return self.opsets.get("", 1)


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The bodies that `node` owns (If, Loop, Scan and the like), not those inside them."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def nested(scope: Scope) -> Iterator[Scope]:
    """The scope, then the subgraphs inside it at any depth, outer before inner.

    Each is looked up when its turn comes, so the graph just yielded may be changed.
    """
    stack = [scope]
    while stack:
        current = stack.pop()
        yield current
        inner = [
            Scope(body, current.opsets, current.function, node)
            for node in current.graph
            if node.attributes
            for body in subgraphs(node)
        ]
        stack.extend(reversed(inner))


def scopes(model: ir.Model) -> Iterator[Scope]:
    """The main graph, then function bodies; each followed by the subgraphs inside it, outer before inner."""
    yield from nested(Scope(model.graph, model.graph.opset_imports))
    for function in list(model.functions.values()):
        yield from nested(Scope(function.graph, function.opset_imports, function))


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """Every graph of the model: main, subgraphs at any depth, function bodies and their subgraphs."""
    return (scope.graph for scope in scopes(model))


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node of every graph. The graph a node is in may be changed during the iteration."""
    for graph in all_graphs(model):
        yield from graph


def count_nodes(model: ir.Model) -> int:
    return sum(len(graph) for graph in all_graphs(model))


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether `node` is one of these standard operators."""
    return node is not None and node.domain == "" and node.op_type in op_types


def site(node: ir.Node) -> str:
    """The name that identifies a node in reports: its first named output."""
    return next((v.name for v in node.outputs if v.name), node.name or node.op_type)


def input_of(node: ir.Node, index: int) -> ir.Value | None:
    """Input `index`, or None when it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The attribute's Python value. Raises ValueError for a reference to a function's parameter."""
    found = node.attributes.get(name)
    if found is None:
        return default
    if found.is_ref():
        raise ValueError(f"attribute {name!r} is a parameter of the function")
    return found.value


def has_references(node: ir.Node) -> bool:
    """Whether an attribute is a parameter of the surrounding function, so that its value is not known."""
    return any(a.is_ref() for a in node.attributes.values())


def rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape when every dimension is a number."""
    if value is None or value.shape is None:
        return None
    dims = tuple(d for d in value.shape if isinstance(d, int))
    return dims if len(dims) == len(value.shape) else None


def same_dim(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> bool:
    """Whether two dimensions are certainly equal: numbers, or symbols by name."""
    return a == b and (isinstance(a, int) or a.value is not None)


def same_shape(a: ir.Value | None, b: ir.Value | None) -> bool:
    """Whether both shapes are known and equal, symbols by name; an unnamed dimension equals nothing."""
    if a is None or b is None or a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    return all(same_dim(x, y) for x, y in zip(a.shape, b.shape, strict=True))


def last_axis(node: ir.Node, default: int = -1) -> bool:
    """Whether the attribute `axis` of `node` is the last axis of its first input."""
    axis = attribute(node, "axis", default)
    dims = rank(input_of(node, 0))
    return axis == -1 or (dims is not None and axis == dims - 1)


def _better_dim(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    """The more exact of two dimensions that are equal at run time: a number, then a name, then `a`."""
    if isinstance(a, int) or isinstance(b, int):
        return a if isinstance(a, int) else b
    return b if a.value is None else a


def carry_type(old: ir.Value, new: ir.Value) -> None:
    """Give `new` what is known of the type and shape of `old`, which it stands for; the more exact wins."""
    if new.type is None:
        new.type = old.type
    if old.shape is None:
        return
    if new.shape is None:
        new.shape = old.shape.copy()
    elif len(new.shape) == len(old.shape) and new.const_value is None:
        new.shape = ir.Shape([_better_dim(a, b) for a, b in zip(new.shape, old.shape, strict=True)])


def nbytes(tensor: ir.TensorProtocol) -> int:
    """Size of the tensor's data in bytes, from its shape and type alone; of strings, a guess."""
    if tensor.dtype == ir.DataType.STRING:
        return 16 * tensor.size
    return tensor.nbytes


def tensor_shape(tensor: ir.TensorProtocol) -> ir.Shape:
    return ir.Shape(tuple(tensor.shape.numpy()))


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that `value` always is, not loaded; None when it may differ between runs.

    An initializer that is a graph input too is only a default, so not a constant.
    """
    if value is None or value.is_graph_input():
        return None
    if value.is_initializer():
        return value.const_value
    node = value.producer()
    if node is None or not is_op(node, "Constant") or len(node.attributes) != 1 or has_references(node):
        return None
    (found,) = node.attributes.values()
    if found.name == "value":
        return found.as_tensor()
    if found.name in ("value_int", "value_ints"):
        return ir.Tensor(np.array(found.value, np.int64), name=value.name)
    if found.name in ("value_float", "value_floats"):
        return ir.Tensor(np.array(found.value, np.float32), name=value.name)
    if found.name == "value_string":
        return ir.StringTensor([found.as_string().encode()], shape=ir.Shape([]), name=value.name)
    if found.name == "value_strings":
        texts = [text.encode() for text in found.as_strings()]
        return ir.StringTensor(texts, shape=ir.Shape([len(texts)]), name=value.name)
    return None


def is_constant(value: ir.Value | None) -> bool:
    return constant_tensor(value) is not None


def constant_value(value: ir.Value | None, limit: int = SMALL) -> np.ndarray | None:
    """The array that `value` always is; None when it is not constant or takes more than `limit` bytes."""
    tensor = constant_tensor(value)
    if tensor is None or nbytes(tensor) > limit:
        return None
    return tensor.numpy()


def constant_ints(value: ir.Value | None) -> list[int] | None:
    """A small constant as a flat list of whole numbers: axes, a shape, repeats."""
    array = constant_value(value)
    if array is None or array.dtype.kind not in "iu":
        return None
    return [int(x) for x in array.reshape(-1)]


def weight_readers(value: ir.Value, axes: int) -> Iterator[tuple[ir.Node, bool]]:
    """Who reads a constant of so many axes, itself or transposed, and whether as the weight of a product or a
    convolution or as the table of a gather, which kernels take in 16 bits."""
    for user, index in value.uses():
        if axes == 2 and is_op(user, "Transpose") and not user.outputs[0].is_graph_output():
            yield from weight_readers(user.outputs[0], axes)
        elif is_op(user, "Conv"):
            yield user, index == 1 and axes in (3, 4)
        else:
            as_weight = is_op(user, "MatMul", "Gemm") and index == 1
            yield user, axes == 2 and (as_weight or (is_op(user, "Gather") and index == 0))


def is_only_weight(value: ir.Value, axes: int) -> bool:
    """Whether something reads the constant, and everything that does as `weight_readers` says."""
    readers = [as_weight for _, as_weight in weight_readers(value, axes)]
    return not value.is_graph_output() and bool(readers) and all(readers)


class Names:
    """Gives names that nothing in the model has. Build it once a pass: it reads every name."""

    def __init__(self, model: ir.Model) -> None:
        self._used: set[str | None] = set()
        self._next: dict[str, int] = {}
        for graph in all_graphs(model):
            self._used.update(value.name for value in graph.inputs)
            self._used.update(graph.initializers)
            for node in graph:
                self._used.add(node.name)
                self._used.update(value.name for value in node.outputs)

    def fresh(self, stem: str) -> str:
        """`stem` itself if it is free, else `stem_1`, `stem_2` ..."""
        name, count = stem, self._next.get(stem, 0)
        while name in self._used:
            count += 1
            name = f"{stem}_{count}"
        self._next[stem] = count
        self._used.add(name)
        return name


def is_graph_output(value: ir.Value) -> bool:
    """Whether the value is an output of the graph, subgraph or function that it is in."""
    return value.is_graph_output()


def is_used(value: ir.Value) -> bool:
    return value.is_graph_output() or bool(value.uses())


def can_be_output(value: ir.Value, graph: ir.Graph) -> bool:
    """Whether `value` may take over an output of `graph`, name included."""
    producer = value.producer()
    return producer is not None and producer.graph is graph and not value.is_graph_output()


def replace_value(old: ir.Value, new: ir.Value, *, keep_name: bool = False) -> None:
    """Let `new` take the place of `old` everywhere, subgraphs included; graph outputs keep their names.

    Where `new` cannot be that output itself (it is an input, an initializer, another output, or from an outer
    graph), an Identity behind the producer of `old` carries the name. `old` is unused afterwards; `new` must
    be available wherever `old` is. The producer of `old` stays: remove it with `remove_node`.
    keep_name: `new` was made for this and takes the name of `old` inside the graph too: sites keep theirs.
    """
    carry_type(old, new)
    graph, name = old.graph, old.name
    if keep_name and not new.is_graph_output():
        old.name = None
        new.name = name
    if old.is_graph_output() and graph is not None:
        output = new
        old.name = None
        if can_be_output(new, graph):
            new.name = name
        else:
            producer = old.producer()
            assert producer is not None, "an input of a graph cannot be replaced"
            output = ir.Value(name=name, type=old.type, shape=old.shape)
            identity = ir.Node("", "Identity", [new], outputs=[output], name="")
            graph.insert_after(producer, identity)
        for index, value in enumerate(graph.outputs):
            if value is old:
                graph.outputs[index] = output
    for user, position in old.uses():
        user.replace_input_with(position, new)


def remove_node(node: ir.Node) -> None:
    """Take an unused node out of its graph and off its inputs. Subgraph bodies let go of outer values too."""
    assert node.graph is not None
    for body in subgraphs(node):
        detach(body)
    for index in range(len(node.inputs)):
        node.replace_input_with(index, None)
    node.graph.remove(node)


def detach(graph: ir.Graph) -> None:
    """Let the nodes of a graph that is thrown away go of their inputs: outer values lose those uses."""
    for inner in nested(Scope(graph, {})):
        for node in inner.graph:
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)


def bypass(node: ir.Node, new: ir.Value) -> None:
    """Put `new` in the place of the node's first output and remove the node."""
    replace_value(node.outputs[0], new)
    remove_node(node)


def keep_metadata(old: ir.Node, new: ir.Node) -> None:
    """Copy the origin notes of `old` onto the node that stands for it."""
    if old.metadata_props:
        new.metadata_props.update({**old.metadata_props, **new.metadata_props})


def add_constant(scope: Scope, before: ir.Node, name: str, array: np.ndarray | ir.TensorProtocol) -> ir.Value:
    """A constant in the scope: an initializer, or in a function body, which has none, a Constant node."""
    tensor = ir.tensor(array, name=name)
    if scope.function is not None:
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor_shape(tensor))
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], outputs=[value], name="")
        scope.graph.insert_before(before, node)
        return value
    value = ir.val(name, const_value=tensor)
    scope.graph.register_initializer(value)
    return value
