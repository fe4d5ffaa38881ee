"""What the recognising passes share: reading small formulas backwards, and putting one operator in their place.

A pass names the nodes that a site may be found by, and says for each what the site is: its last node, the values
that go in, and how to write it. Everything between must be used by nothing else. Formulas are read as algebra
(`polynomial`, `climb`), so that the order of factors and terms does not matter.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from .. import graph
from ..base import Pass, PassContext, PassReport
from ..prepare.convert_opset import ConvertOpset

SHAPED = frozenset({"Expand", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Unsqueeze"})  # the rest are sizes
DEEPEST = 12  # nodes of a formula below or above the node it is found by


class Refused(Exception):
    """The first condition that a site does not meet."""


@dataclass(frozen=True)
class Found:
    """A site: `last` is its last node, `inputs` what goes in; `write` makes the value that stands for its output.

    condition: where the two are equal, for the report, when that is not everywhere.
    """

    rule: str
    last: ir.Node
    inputs: tuple[ir.Value, ...]
    write: Callable[[Writer], ir.Value]
    condition: str = ""


class Recogniser(Pass):
    """A pass that looks at every node and writes one operator for the formula that the node is part of."""

    opset: ClassVar[int]  # the first that has the operator

    @abstractmethod
    def find(self, node: ir.Node, scope: graph.Scope) -> Found | None:
        """The site that `node` is found by. None: it is no such node. Raises Refused: it nearly is one."""

    @abstractmethod
    def rule(self, node: ir.Node) -> str:
        """The name of the rule under which a refusal is reported."""

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        report = self.report()
        if not self._raise_opset(model, ctx, report):
            return report
        names: graph.Names | None = None
        for scope in list(graph.scopes(model)):
            for node in list(scope.graph):
                if node.graph is not scope.graph:
                    continue  # part of a site that is written already
                found = self._look(node, scope, report)
                if found is None:
                    continue
                names = names or graph.Names(model)
                inner = inside(found)
                site, output = graph.site(found.last), found.last.outputs[0]
                writer = Writer(scope, found.last, names)
                new = found.write(writer)
                for key, value in found.last.metadata_props.items():
                    producer = new.producer()
                    if producer is not None:
                        producer.metadata_props.setdefault(key, value)
                graph.replace_value(output, new, keep_name=new.producer() in writer.nodes)
                remove(found, inner)
                condition = f"; {found.condition}" if found.condition else ""
                report.changed(found.rule, site, f"{len(inner)} nodes -> {len(writer.nodes)}{condition}")
        return report

    def _look(self, node: ir.Node, scope: graph.Scope, report: PassReport) -> Found | None:
        """The site at `node` when it may be written; a refusal goes to the report."""
        if node.domain != "":
            return None
        try:
            found = self.find(node, scope)
            if found is not None:
                check_inside(found)
        except Refused as refusal:
            report.skipped(self.rule(node), graph.site(node), str(refusal))
            return None
        return found

    def _raise_opset(self, model: ir.Model, ctx: PassContext, report: PassReport) -> bool:
        """Bring the model to the operator's opset if it is older and there is a site. False: nothing to do."""
        if all(scope.opset >= self.opset for scope in graph.scopes(model)):
            return True
        dry = self.report()
        sites = []
        for scope in graph.scopes(model):
            for node in scope.graph:
                found = self._look(node, scope, dry)
                if found is not None:
                    sites.append(found)
        if not sites:
            report.skips.extend(dry.skips)
            return False
        conversion = ConvertOpset(self.opset).run(model, ctx)
        if conversion.skips:
            report.skips.extend(dry.skips)
            for found in sites:
                report.skipped(found.rule, graph.site(found.last), conversion.skips[0].reason)
            return False
        for change in conversion.changes:
            if change.rule == "opset":
                report.changed(*(change.rule, change.value, change.detail))
        return True


class Writer:
    """Writes nodes in front of the last node of a site."""

    def __init__(self, scope: graph.Scope, before: ir.Node, names: graph.Names) -> None:
        self._scope, self._before, self._names = scope, before, names
        self._stem = graph.site(before)
        self.nodes: list[ir.Node] = []

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        dtype: ir.DataType | None = None,
        shape: Iterable[Any] | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """A node with one output and that value, with what is known of its type and shape."""
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        value = ir.Value(
            name=self._names.fresh(f"{self._stem}_{op_type.lower()}"),
            type=None if dtype is None else ir.TensorType(dtype),
            shape=None if shape is None else ir.Shape(list(shape)),
        )
        kept = [ir.convenience.convert_attribute(key, item) for key, item in attributes.items()]
        node = ir.Node("", op_type, given, kept, outputs=[value], name="")
        self._scope.graph.insert_before(self._before, node)
        self.nodes.append(node)
        return value

    def constant(self, array: np.ndarray, stem: str, dtype: ir.DataType | None = None) -> ir.Value:
        tensor = ir.Tensor(array, dtype=dtype) if dtype is not None else ir.tensor(array)
        name = self._names.fresh(f"{self._stem}_{stem}")
        return graph.add_constant(self._scope, self._before, name, tensor)

    def ints(self, numbers: Sequence[int], stem: str) -> ir.Value:
        return self.constant(np.array(numbers, np.int64), stem)

    def reshape(self, value: ir.Value, dims: Sequence[int]) -> ir.Value:
        """`value` with these sizes; a small constant is written anew, anything else goes through a Reshape."""
        if shape_of(value) == tuple(dims):
            return value
        tensor = graph.constant_tensor(value)
        if tensor is not None and graph.nbytes(tensor) <= graph.SMALL:
            return self.constant(tensor.numpy().reshape(dims), "reshaped", tensor.dtype)
        return self.op("Reshape", value, self.ints(dims, "shape"), dtype=value.dtype, shape=dims)

    def transpose(self, value: ir.Value, perm: Sequence[int]) -> ir.Value:
        """`value` with its axes in another order; a transpose that made it is merged or cancelled."""
        inner = producer(value)
        if graph.is_op(inner, "Transpose") and inner is not None and not graph.has_references(inner):
            source, first = inner.inputs[0], graph.attribute(inner, "perm")
            if source is not None and first is not None:
                value, perm = source, [first[axis] for axis in perm]
        if list(perm) == list(range(len(perm))):
            return value
        shape = None if value.shape is None else [value.shape[axis] for axis in perm]
        return self.op("Transpose", value, perm=list(perm), dtype=value.dtype, shape=shape)


# --- what is inside a site


def inside(found: Found) -> list[ir.Node]:
    """The nodes of a site from its last back to its inputs and constants, each behind those that use it."""
    leaves = set(found.inputs)
    order: list[ir.Node] = []
    seen: set[ir.Node] = set()

    def visit(node: ir.Node) -> None:
        seen.add(node)
        for value in node.inputs[:1] if node.op_type in SHAPED else node.inputs:
            inner = None if value is None or value in leaves or graph.is_constant(value) else value.producer()
            if inner is not None and inner not in seen:
                visit(inner)
        order.append(node)

    visit(found.last)
    return order[::-1]


def check_inside(found: Found) -> None:
    """Raise Refused if something inside a site is needed outside it."""
    nodes = inside(found)
    inner = set(nodes)
    for node in nodes[1:]:
        if node.graph is not found.last.graph:
            raise Refused("it spans more than one graph")
        for value in node.outputs:
            if value.is_graph_output():
                raise Refused(f"{value.name} is an output of the graph too")
            if any(user not in inner for user, _ in value.uses()):
                raise Refused(f"{value.name} is used elsewhere too, so it has to be computed anyway")


def remove(found: Found, nodes: Sequence[ir.Node]) -> None:
    """Remove the nodes of a site, users first, and then what only it used: constants, and inputs it needs no more."""
    rest: dict[ir.Value, None] = dict.fromkeys(found.inputs)
    for node in nodes:
        if any(graph.is_used(value) for value in node.outputs):
            continue  # an input of the new operator
        rest.update((value, None) for value in node.inputs if value is not None)
        graph.remove_node(node)
    values = list(rest)
    while values:
        value = values.pop()
        producer = value.producer()
        if producer is not None and producer.graph is not None:
            if not any(map(graph.is_used, producer.outputs)):
                values.extend(given for given in producer.inputs if given is not None)
                graph.remove_node(producer)
            continue
        owner = value.graph
        if isinstance(owner, ir.Graph) and value.name and graph.is_constant(value) and not graph.is_used(value):
            owner.initializers.pop(value.name, None)


# --- reading backwards


def skip_identity(value: ir.Value | None) -> ir.Value | None:
    """The value that an Identity, or several, only passes on."""
    while value is not None:
        node = value.producer()
        if node is None or not graph.is_op(node, "Identity"):
            break
        value = node.inputs[0]
    return value


def producer(value: ir.Value | None) -> ir.Node | None:
    """The node that makes the value, behind any Identity."""
    found = skip_identity(value)
    return None if found is None else found.producer()


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes the value, when it is one of these operators and its attributes are known."""
    node = producer(value)
    return node if graph.is_op(node, *op_types) and node is not None and not graph.has_references(node) else None


def same(a: ir.Value | None, b: ir.Value | None) -> bool:
    """Whether both are one value, Identity aside."""
    return a is not None and skip_identity(a) is skip_identity(b)


def scalar(value: ir.Value | None, other: ir.Value | None = None) -> float | None:
    """A constant of one element that leaves the shape of `other` as it is when the two are combined."""
    value = skip_identity(value)
    tensor = graph.constant_tensor(value)
    if tensor is None or tensor.size != 1 or tensor.dtype == ir.DataType.STRING:
        return None
    if len(tensor.shape) and len(tensor.shape) > (graph.rank(other) or 0):
        return None
    return float(np.asarray(tensor.numpy(), np.float64).reshape(()))


def shape_of(value: ir.Value | None) -> tuple[int, ...] | None:
    """The sizes of a value where all are known; a constant's always are."""
    tensor = graph.constant_tensor(skip_identity(value))
    return graph.static_shape(value) if tensor is None else tuple(int(size) for size in tensor.shape.numpy())


def operands(node: ir.Node | None) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Both orders of the two inputs of an Add or Mul."""
    if node is not None and len(node.inputs) == 2:
        a, b = node.inputs
        if a is not None and b is not None:
            yield a, b
            yield b, a


def user(value: ir.Value) -> ir.Node | None:
    """The node that alone uses the value, behind any Identity; None when there are more, or it is an output."""
    while not value.is_graph_output():
        nodes = {node for node, _ in value.uses()}
        if len(nodes) != 1:
            return None
        (node,) = nodes
        if not graph.is_op(node, "Identity"):
            return node
        value = node.outputs[0]
    return None


def only_user(value: ir.Value) -> ir.Node:
    """The node that alone uses the value. Raises Refused when there is none, or something else needs it too."""
    found = user(value)
    if found is not None:
        return found
    if value.is_graph_output():
        raise Refused(f"{value.name} is an output of the graph too")
    raise Refused(f"{value.name} is used elsewhere too" if value.uses() else f"{value.name} is not used")


def close(a: float, b: float, dtype: ir.DataType | None) -> bool:
    """Whether two numbers of a formula are the same, as far as constants of this type can tell."""
    limit = {ir.DataType.FLOAT16: 2e-3, ir.DataType.BFLOAT16: 1e-2}.get(dtype or ir.DataType.FLOAT, 1e-5)
    return abs(a - b) <= limit * max(abs(a), abs(b))


Polynomial = dict[int, float]


def polynomial(value: ir.Value | None, x: ir.Value, depth: int = DEEPEST) -> Polynomial | None:
    """`value` as a polynomial of `x`, degree -> factor; None when it is not one."""
    if value is None or depth == 0:
        return None
    if same(value, x):
        return {1: 1.0}
    number = scalar(value, x)
    if number is not None:
        return {0: number}
    node = made_by(value, "Neg", "Add", "Sum", "Sub", "Mul", "Div", "Pow")
    known: list[Polynomial] = []
    for given in [] if node is None else node.inputs:
        term = polynomial(given, x, depth - 1)
        if term is None:
            return None
        known.append(term)
    if node is None or not known:
        return None
    if node.op_type == "Neg":
        return {d: -c for d, c in known[0].items()}
    if node.op_type in ("Add", "Sum"):
        return _added(known)
    if node.op_type == "Sub":
        return _added([known[0], {d: -c for d, c in known[1].items()}])
    if node.op_type == "Mul":
        return _multiplied(known[0], known[1])
    if node.op_type == "Div" and set(known[1]) == {0} and known[1][0] != 0:
        return {d: c / known[1][0] for d, c in known[0].items()}
    if node.op_type == "Pow" and set(known[1]) == {0} and known[1][0] in (2.0, 3.0):
        square = _multiplied(known[0], known[0])
        return square if known[1][0] == 2.0 else _multiplied(square, known[0])
    return None


def _added(terms: Sequence[Polynomial]) -> Polynomial:
    result: Polynomial = {}
    for term in terms:
        for degree, factor in term.items():
            result[degree] = result.get(degree, 0.0) + factor
    return result


def _multiplied(a: Polynomial, b: Polynomial) -> Polynomial:
    result: Polynomial = {}
    for i, p in a.items():
        for j, q in b.items():
            result[i + j] = result.get(i + j, 0.0) + p * q
    return result


def is_polynomial(found: Polynomial | None, wanted: Polynomial, dtype: ir.DataType | None) -> bool:
    if found is None or {d for d, c in found.items() if c} != {d for d, c in wanted.items() if c}:
        return False
    return all(close(found[d], c, dtype) for d, c in wanted.items() if c)


def linear_sources(value: ir.Value | None) -> Iterator[ir.Value]:
    """The value, and what it is a multiple of: a, from a·2, from a·2/3."""
    for _ in range(DEEPEST):
        value = skip_identity(value)
        if value is None:
            return
        yield value
        node = made_by(value, "Mul", "Div", "Neg")
        if node is None:
            return
        following = None
        if node.op_type in ("Neg", "Div"):
            divisor = graph.input_of(node, 1)
            following = node.inputs[0] if divisor is None or scalar(divisor, node.inputs[0]) is not None else None
        else:
            following = next((a for a, b in operands(node) if scalar(b, a) is not None), None)
        value = following


@dataclass(frozen=True)
class Step:
    """`last` computes (scale · inner + offset) · factor, where `inner` is where the climb began; factor None is 1."""

    last: ir.Node
    scale: float
    offset: float
    factor: ir.Value | None


def climb(inner: ir.Value) -> Iterator[Step]:
    """The formulas that are made of a value alone: times and plus numbers, and times one other value."""
    value, step = inner, None
    scale, offset, factor = 1.0, 0.0, None
    for _ in range(DEEPEST):
        node = user(value)
        if node is None or node.domain != "" or len(node.inputs) not in (1, 2):
            return
        mine = [i for i, given in enumerate(node.inputs) if same(given, value)]
        other = node.inputs[1 - mine[0]] if len(mine) == 1 and len(node.inputs) == 2 else None
        number = scalar(other, value)
        if node.op_type == "Neg":
            scale, offset = -scale, -offset
        elif other is None:
            return
        elif node.op_type == "Mul" and number is not None:
            scale, offset = scale * number, offset * number
        elif node.op_type == "Div" and number and mine == [0]:
            scale, offset = scale / number, offset / number
        elif node.op_type == "Add" and number is not None and factor is None:
            offset += number
        elif node.op_type == "Sub" and number is not None and factor is None:
            scale, offset = (scale, offset - number) if mine == [0] else (-scale, number - offset)
        elif node.op_type == "Mul" and factor is None:
            factor = other
        else:
            return
        value = node.outputs[0]
        step = Step(node, scale, offset, factor)
        yield step


def reduced_axes(node: ir.Node, dims: int | None) -> tuple[int, ...] | None:
    """The axes of a reduction counted from the back (-1 is the last), ascending. None: not known, or all."""
    axes = graph.attribute(node, "axes")
    if graph.input_of(node, 1) is not None:
        axes = graph.constant_ints(node.inputs[1])
    if not axes:
        return None
    if dims is None:
        return tuple(sorted(axes)) if all(axis < 0 for axis in axes) else None
    return tuple(sorted(axis - dims if axis >= 0 else axis for axis in axes))
