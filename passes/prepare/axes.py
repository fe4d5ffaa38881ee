"""Which axes of an operator's tensors belong together, and how the operator is written when they change places.

Order-insensitive operators have one list of axes, the reference; each tensor has some of them. The rewriting of a
node for the order `p` makes it compute transpose(result, p) from transposed inputs: new axis i is old axis p[i].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from .. import graph
from .common_subexpressions import is_random

Perm = tuple[int, ...]


def identity(rank: int) -> Perm:
    return tuple(range(rank))


def compose(first: Sequence[int], then: Sequence[int]) -> Perm:
    """The permutation of a transposition by `first` and then by `then`."""
    return tuple(first[axis] for axis in then)


def inverse(perm: Sequence[int]) -> Perm:
    result = [0] * len(perm)
    for new, old in enumerate(perm):
        result[old] = new
    return tuple(result)


class Unknown(Exception):
    """The node might be order-insensitive, but something about it is not known; the message says what."""


class Port(NamedTuple):
    """The reference axes that a tensor has, ascending. aligned: it is broadcast, aligned to the last axis."""

    axes: tuple[int, ...]
    aligned: bool = False

    def order(self, perm: Perm) -> Perm:
        """How the tensor is transposed when the reference is transposed by `perm`."""
        if len(self.axes) == len(perm):
            return perm
        number = {axis: i for i, axis in enumerate(self.axes)}
        return tuple(number[axis] for axis in perm if axis in number)

    def missing(self, perm: Perm) -> tuple[int, ...]:
        """Where a broadcast tensor needs axes of size 1, as axes of an Unsqueeze; none in front."""
        if not self.aligned or len(self.axes) == len(perm):
            return ()
        own = set(self.axes)
        first = next((i for i, axis in enumerate(perm) if axis in own), len(perm))
        return tuple(i - first for i, axis in enumerate(perm) if i > first and axis not in own)

    def reference(self, order: Perm, rank: int) -> Perm | None:
        """An order of the reference that transposes this tensor by `order`; axes that it has not stay in place."""
        if self.aligned and len(self.axes) < rank:
            return None
        result = list(range(rank))
        for place, axis in zip(self.axes, order, strict=True):
            result[place] = self.axes[axis]
        return tuple(result)


class Editor:
    """Writes one node anew: attributes, and inputs that are constants or computed vectors."""

    def __init__(self, node: ir.Node, scope: graph.Scope, names: graph.Names) -> None:
        self.node, self.scope, self.names = node, scope, names

    def constant(self, array: np.ndarray, stem: str) -> ir.Value:
        return graph.add_constant(self.scope, self.node, self.names.fresh(stem), array)

    def set_input(self, index: int, array: np.ndarray) -> None:
        if index >= len(self.node.inputs):
            self.node.resize_inputs(index + 1)
        self.node.replace_input_with(index, self.constant(array, f"{graph.site(self.node)}_axes"))

    def pick_input(self, index: int, indices: Sequence[int]) -> None:
        """Input `index`, a vector, with its entries in another order."""
        value = self.node.inputs[index]
        assert value is not None
        array = graph.constant_value(value)
        if array is not None:
            new = self.constant(array[list(indices)], value.name or "vector")
        else:
            order = self.constant(np.array(indices, np.int64), "order")
            gather = ir.Node("", "Gather", [value, order], [ir.AttrInt64("axis", 0)], name="")
            new = gather.outputs[0]
            new.name = self.names.fresh(f"{value.name}_ordered")
            new.type, new.shape = value.type, value.shape
            self.scope.graph.insert_before(self.node, gather)
        self.node.replace_input_with(index, new)

    def ints(self, name: str, values: Sequence[int]) -> None:
        self.node.attributes.add(ir.AttrInt64s(name, list(values)))


@dataclass(frozen=True)
class Layout:
    """The axes of an order-insensitive node."""

    rank: int
    inputs: tuple[Port | None, ...]
    outputs: tuple[Port | None, ...]
    rewrite: Callable[[Editor, Perm], None] = lambda editor, perm: None
    allows: Callable[[Perm], bool] = lambda perm: True


class Ranks:
    """Ranks of values: declared, or what a Transpose or an order-insensitive operator says."""

    def __init__(self) -> None:
        self.found: dict[ir.Value, int] = {}

    def get(self, value: ir.Value | None) -> int | None:
        if value is None:
            return None
        if value.shape is not None:
            return len(value.shape)
        tensor = graph.constant_tensor(value)
        return len(tensor.shape) if tensor is not None else self.found.get(value)

    def __call__(self, value: ir.Value | None) -> int:
        rank = self.get(value)
        if rank is None:
            raise Unknown(f"the rank of {value.name if value is not None else 'an input'} is not known")
        return rank


class At(NamedTuple):
    node: ir.Node
    opset: int
    rank: Ranks


Rule = Callable[[At], Layout | None]


def layout_of(node: ir.Node, opset: int, ranks: Ranks) -> Layout | None:
    """The axes of the node; None when the order of its axes matters. Raises Unknown."""
    rule = RULES.get(node.op_type) if node.domain == "" else None
    if rule is None or not node.inputs or node.inputs[0] is None or graph.has_references(node) or is_random(node):
        return None
    found = rule(At(node, opset, ranks))
    if found is None or len(found.outputs) < len(node.outputs):
        return None
    for value, port in zip(node.outputs, found.outputs, strict=False):
        known = ranks.get(value)
        if port is not None and known is not None and known != len(port.axes):
            return None
        if port is not None and known is None:
            ranks.found[value] = len(port.axes)
    return found


# --- elementwise operators


def _same(at: At) -> Layout:
    """Everything follows the first input; the others are no tensors of the same axes."""
    rank = at.rank(at.node.inputs[0])
    whole = Port(identity(rank))
    return Layout(rank, (whole,) + (None,) * (len(at.node.inputs) - 1), (whole,))


def _dropout(at: At) -> Layout | None:
    if any(graph.is_used(value) for value in at.node.outputs[1:]) or at.opset < 7:
        return None
    whole = _same(at)
    return Layout(whole.rank, whole.inputs, (whole.outputs[0], None))


def _broadcast(since: int) -> Rule:
    """Operators whose inputs broadcast; before opset `since` they do so by attributes."""

    def rule(at: At) -> Layout | None:
        if at.opset < since:
            return None
        ranks = [at.rank(value) for value in at.node.inputs]
        rank = max(ranks)
        ports = tuple(Port(tuple(range(rank - own, rank)), own < rank) for own in ranks)
        return Layout(rank, ports, (Port(identity(rank)),))

    return rule


# --- operators with one axis


def _axis_of(at: At, rank: int, default: int) -> int:
    axis = int(graph.attribute(at.node, "axis", default))
    return axis + rank if axis < 0 else axis


def _move_axis(axis: int) -> Callable[[Editor, Perm], None]:
    def rewrite(editor: Editor, perm: Perm) -> None:
        editor.node.attributes.add(ir.AttrInt64("axis", perm.index(axis)))

    return rewrite


def _along(default: int, since: int = 1, every: bool = False) -> Rule:
    """Operators that work along one axis. every: all inputs are tensors of those axes."""

    def rule(at: At) -> Layout | None:
        if at.opset < since:
            return None
        rank = at.rank(at.node.inputs[0])
        axis = _axis_of(at, rank, default)
        if not 0 <= axis < rank:
            return None
        whole = Port(identity(rank))
        if every and any(at.rank(value) != rank for value in at.node.inputs):
            return None
        inputs = tuple(whole if every or i == 0 else None for i in range(len(at.node.inputs)))
        return Layout(rank, inputs, (whole,) * len(at.node.outputs), _move_axis(axis))

    return rule


def _concat(at: At) -> Layout | None:
    return _along(1, every=True)(at) if at.opset >= 4 else None


def _gather(at: At) -> Layout | None:
    rank, indices = at.rank(at.node.inputs[0]), at.rank(at.node.inputs[1])
    axis = _axis_of(at, rank, 0)
    if indices > 1 or not 0 <= axis < rank:
        return None
    kept = tuple(a for a in range(rank) if a != axis or indices)
    return Layout(rank, (Port(identity(rank)), None), (Port(kept),), _move_axis(axis))


def _arg(at: At) -> Layout | None:
    rank = at.rank(at.node.inputs[0])
    axis = _axis_of(at, rank, 0)
    if not 0 <= axis < rank:
        return None
    kept = tuple(a for a in range(rank) if a != axis or graph.attribute(at.node, "keepdims", 1))
    return Layout(rank, (Port(identity(rank)),), (Port(kept),), _move_axis(axis))


def _quantize(at: At) -> Layout | None:
    node = at.node
    whole, scale = _same(at), at.rank(graph.input_of(node, 1))
    if scale == 0:
        return whole
    axis = _axis_of(at, whole.rank, 1)
    if scale != 1 or at.opset < 13 or graph.attribute(node, "block_size", 0) or not 0 <= axis < whole.rank:
        return None
    return Layout(whole.rank, whole.inputs, whole.outputs, _move_axis(axis))


def _batch_norm(at: At) -> Layout | None:
    """Channels have to stay axis 1."""
    node = at.node
    if at.opset < 9 or graph.attribute(node, "training_mode", 0) or len(node.outputs) != 1:
        return None
    whole = _same(at)
    return Layout(whole.rank, whole.inputs, whole.outputs, allows=lambda perm: len(perm) > 1 and perm[1] == 1)


def _last_axes(at: At) -> Layout | None:
    """Normalizations over the axes from one on: those have to stay, and scale and bias have no others."""
    if any(graph.is_used(value) for value in at.node.outputs[1:]):
        return None
    whole = _same(at)
    first = _axis_of(at, whole.rank, -1)
    if any(at.rank(value) > whole.rank - first for value in at.node.inputs[1:] if value is not None):
        return None  # broadcast to the axes in front
    outputs = whole.outputs + (None,) * (len(at.node.outputs) - 1)
    return Layout(
        whole.rank, whole.inputs, outputs, allows=lambda perm: perm[first:] == tuple(range(first, whole.rank))
    )


# --- operators with several axes


def _given_axes(at: At, attribute_until: int, index: int = 1) -> list[int] | None:
    """The node's axes as written; None when they are left out. Raises Unknown when they are computed."""
    if at.opset < attribute_until:
        found = graph.attribute(at.node, "axes")
        return None if found is None else [int(axis) for axis in found]
    value = graph.input_of(at.node, index)
    if value is None:
        return None
    axes = graph.constant_ints(value)
    if axes is None:
        raise Unknown(f"the axes {value.name} are computed")
    return axes


def _move_axes(axes: Sequence[int], attribute: bool, index: int = 1) -> Callable[[Editor, Perm], None]:
    """Axes counted from the front, written as an attribute or as input `index`."""

    def rewrite(editor: Editor, perm: Perm) -> None:
        new = [perm.index(axis) for axis in axes]
        if attribute:
            editor.ints("axes", new)
            return
        old = graph.constant_tensor(graph.input_of(editor.node, index))
        editor.set_input(index, np.array(new, np.int64 if old is None else old.dtype.numpy()))

    return rewrite


def _from_front(axes: Sequence[int], rank: int) -> list[int] | None:
    found = [axis + rank if axis < 0 else axis for axis in axes]
    return found if all(0 <= axis < rank for axis in found) and len(set(found)) == len(found) else None


def _reduce(attribute_until: int) -> Rule:
    def rule(at: At) -> Layout | None:
        node, rank = at.node, at.rank(at.node.inputs[0])
        given = _given_axes(at, attribute_until)
        none = (None,) * (len(node.inputs) - 1)
        whole = Port(identity(rank))
        keeps = graph.attribute(node, "keepdims", 1)
        if not given:
            if graph.attribute(node, "noop_with_empty_axes", 0):
                return Layout(rank, (whole, *none), (whole,))
            return Layout(rank, (whole, *none), (whole if keeps else Port(()),))
        axes = _from_front(given, rank)
        if axes is None:
            return None
        kept = whole if keeps else Port(tuple(a for a in range(rank) if a not in axes))
        return Layout(rank, (whole, *none), (kept,), _move_axes(axes, at.opset < attribute_until))

    return rule


def _squeeze(at: At) -> Layout | None:
    rank, given = at.rank(at.node.inputs[0]), _given_axes(at, 13)
    axes = _from_front(given or (), rank)
    if not axes:
        return None
    kept = Port(tuple(a for a in range(rank) if a not in axes))
    none = (None,) * (len(at.node.inputs) - 1)
    return Layout(rank, (Port(identity(rank)), *none), (kept,), _move_axes(axes, at.opset < 13))


def _unsqueeze(at: At) -> Layout | None:
    given = _given_axes(at, 13)
    rank = at.rank(at.node.inputs[0]) + len(given or ())
    axes = _from_front(given or (), rank)
    if not axes:
        return None
    kept = Port(tuple(a for a in range(rank) if a not in axes))
    none = (None,) * (len(at.node.inputs) - 1)
    return Layout(rank, (kept, *none), (Port(identity(rank)),), _move_axes(axes, at.opset < 13))


def _slice(at: At) -> Layout | None:
    whole = _same(at)
    given = _given_axes(at, 10, 3)
    if given is None:
        if at.opset < 10:
            count = len(graph.attribute(at.node, "starts", ()))
        else:
            dims = graph.static_shape(graph.input_of(at.node, 1))
            if dims is None or len(dims) != 1:
                raise Unknown("the number of sliced axes is not known")
            count = dims[0]
        given = list(range(count))
    axes = _from_front(given, whole.rank)
    if axes is None:
        return None
    if at.opset >= 10 and graph.input_of(at.node, 3) is None:
        starts = graph.input_of(at.node, 1)
        tensor = graph.constant_tensor(starts)
        dtype = tensor.dtype if tensor is not None else starts.dtype if starts is not None else None
        if dtype is None:
            raise Unknown("the type of the starts is not known")
        kind = dtype.numpy()

        def rewrite(editor: Editor, perm: Perm) -> None:
            editor.set_input(3, np.array([perm.index(axis) for axis in axes], kind))

        return Layout(whole.rank, (*whole.inputs, None), whole.outputs, rewrite)
    return Layout(whole.rank, whole.inputs, whole.outputs, _move_axes(axes, at.opset < 10, 3))


# --- operators with a number for each axis


def _entries(at: At, index: int, count: int) -> bool:
    """Whether input `index` is known to have `count` entries."""
    value = graph.input_of(at.node, index)
    tensor = graph.constant_tensor(value)
    dims = graph.static_shape(value) if tensor is None else tuple(tensor.shape.numpy())
    return dims == (count,)


def _both_ends(perm: Perm) -> list[int]:
    return [*perm, *(axis + len(perm) for axis in perm)]


def _pad(at: At) -> Layout | None:
    node, whole = at.node, _same(at)
    if at.opset < 11:
        pads = graph.attribute(node, "pads")
        if pads is None or len(pads) != 2 * whole.rank:
            return None

        def reorder(editor: Editor, perm: Perm) -> None:
            editor.ints("pads", [pads[i] for i in _both_ends(perm)])

        return Layout(whole.rank, whole.inputs, whole.outputs, reorder)
    given = _given_axes(at, 18, 3)
    if given is not None:
        axes = _from_front(given, whole.rank)
        move = None if axes is None else _move_axes(axes, False, 3)
        return None if move is None else Layout(whole.rank, whole.inputs, whole.outputs, move)
    if not _entries(at, 1, 2 * whole.rank):
        raise Unknown(f"the number of pads {getattr(graph.input_of(node, 1), 'name', '')} is not known")
    return Layout(whole.rank, whole.inputs, whole.outputs, lambda editor, perm: editor.pick_input(1, _both_ends(perm)))


def _per_axis(index: int) -> Rule:
    """Tile and Expand: input `index` has one number for each axis."""

    def rule(at: At) -> Layout | None:
        whole = _same(at)
        if at.opset < 6 or not _entries(at, index, whole.rank):
            return None
        return Layout(whole.rank, whole.inputs, whole.outputs, lambda editor, perm: editor.pick_input(index, perm))

    return rule


def _resize(at: At) -> Layout | None:
    """Images stay or become (N, C, ...), the only layout that every runtime resizes in every mode."""
    node, whole = at.node, _same(at)
    rank = whole.rank
    if graph.attribute(node, "axes") is not None:
        axes = _from_front(graph.attribute(node, "axes"), rank)
        if axes is None:
            return None
        sized, move = frozenset(axes), _move_axes(axes, True)
        return Layout(rank, whole.inputs, whole.outputs, move, lambda perm: not sized & set(perm[:2]))
    scales = graph.attribute(node, "scales") if at.opset < 9 else None
    indices = [0] if at.opset < 9 else [1] if at.opset < 11 else [1, 2, 3]
    vectors = []
    for index in indices[-2:] if at.opset >= 11 else indices if at.opset >= 9 else ():
        value = graph.input_of(node, index)
        tensor = graph.constant_tensor(value)
        if value is None or (tensor is not None and tensor.size == 0):
            continue
        if not _entries(at, index, rank):
            raise Unknown(f"the number of entries of {value.name} is not known")
        vectors.append(index)
    crops = graph.attribute(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize"
    if crops and not _entries(at, 1, 2 * rank):
        return None
    known = None
    if scales is not None:
        known = list(scales)
    elif vectors and vectors[0] < 3:
        array = graph.constant_value(graph.input_of(node, vectors[0]))
        known = None if array is None else array.tolist()
    fixed = [axis for axis in range(rank) if known[axis] == 1] if known is not None else [0, rank - 1]

    def rewrite(editor: Editor, perm: Perm) -> None:
        if scales is not None:
            editor.node.attributes.add(ir.AttrFloat32s("scales", [scales[axis] for axis in perm]))
        for index in vectors:
            editor.pick_input(index, perm)
        if crops:
            editor.pick_input(1, _both_ends(perm))

    def allows(perm: Perm) -> bool:
        return rank >= 3 and perm[0] in fixed and perm[1] in fixed and list(perm[2:]) == sorted(perm[2:])

    return Layout(rank, whole.inputs, whole.outputs, rewrite, allows)


UNARY = [
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "CastLike", "Ceil", "Celu",
    "Clip", "Cos", "Cosh", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf",
    "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid",
    "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu",
]  # fmt: skip
BINARY = [
    "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "Less", "Mod",
    "Mul", "Or", "PRelu", "Pow", "Sub", "Xor",
]  # fmt: skip
REDUCTIONS = [
    "L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare",
]  # fmt: skip

RULES: dict[str, Rule] = {
    **dict.fromkeys(UNARY, _same),
    "Dropout": _dropout,
    **dict.fromkeys(BINARY, _broadcast(7)),
    **dict.fromkeys(("GreaterOrEqual", "LessOrEqual"), _broadcast(12)),
    **dict.fromkeys(("Max", "Min", "Sum", "Mean"), _broadcast(8)),
    "Where": _broadcast(9),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _along(-1, since=13)),
    "Concat": _concat,
    "Split": _along(0, since=2),
    "TopK": _along(-1),
    "Gather": _gather,
    **dict.fromkeys(("ArgMax", "ArgMin"), _arg),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantize),
    "BatchNormalization": _batch_norm,
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _last_axes),
    "ReduceSum": _reduce(13),
    **{f"Reduce{name}": _reduce(18) for name in REDUCTIONS},
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Slice": _slice,
    "Pad": _pad,
    "Tile": _per_axis(1),
    "Expand": _per_axis(1),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
}
