"""Compute at rewriting time what does not depend on the inputs."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from .. import graph
from ..base import Contract, Pass, PassContext, PassReport
from .common_subexpressions import is_random
from .equal_dims import MADE
from .evaluate import Limits, Refusal, check_work, evaluate, predict_bytes
from .infer_shapes import InferShapes
from .shape_values import LENGTH, UNKNOWN, Entries, ShapeValues

QUANTIZERS = ("DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear")
WHOLE = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)  # types of shape computations
HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
LARGE = 4096  # elements of weights that stay narrow
# Operators whose result gets its shape from numbers that they read.
SHAPED = frozenset({
    "CenterCropPad", "ConstantOfShape", "Expand", "OneHot", "Pad", "Range", "Reshape", "Resize", "Slice", "Split",
    "Squeeze", "Tile", "TopK", "Unsqueeze", "Upsample",
})  # fmt: skip
SEQUENCES = ("SequenceConstruct", "SequenceEmpty", "SplitToSequence", "Optional")


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace nodes whose result is always the same by that result.

        <float[2] w = {1, 2}>              ->   <float[2] v = {2, 4}>
        {  v = Add (w, w)                       {  Y = Mul (X, v)  }
           Y = Mul (X, v)  }

    Shapes are followed entry by entry: `Gather (Shape (X), 1)` is a constant when that dimension of X is
    fixed, and a Reshape to `[N, 12, 64]` with free N becomes one to `[-1, 12, 64]`. Where a result gets its shape
    from a constant, shapes are inferred again and what follows is folded too. An If with a constant condition becomes
    its branch, and a Where over shapes (`expand (-1, ...)` of an exporter) what it takes.
    Left alone, each with its reason: results above max_bytes or that make the file larger by more than
    max_growth (a ConstantOfShape of 500 MB stays one; sizes are worked out first), work that takes long,
    random operators, quantized weights, float16 and bfloat16 weights that only products, convolutions and gathers
    read, widened by a Cast, nodes of functions with parameters in their attributes.
    Results are computed by NumPy, so they may differ from a runtime's by rounding.
    """

    name: ClassVar[str] = "fold-constants"
    contract: ClassVar[Contract] = Contract.ROUNDING

    max_bytes: int = 16 << 20  # largest result
    max_growth: int = 1 << 20  # bytes that one result may add to the file
    max_total: int = 256 << 20  # bytes of all results together: they are held in memory
    quantized: bool = False  # fold DequantizeLinear and QuantizeLinear of constants too

    def __post_init__(self) -> None:
        if min(self.max_bytes, self.max_growth, self.max_total) < 0:
            raise ValueError("sizes cannot be negative")

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        run = _Run(self, model, self.report())
        while run.round():
            InferShapes().run(model, ctx)
        run.report.stats["bytes"] = run.held
        return run.report


class _Run:
    """One run of the pass: what it has found out so far."""

    def __init__(self, options: FoldConstants, model: ir.Model, report: PassReport) -> None:
        self.options, self.model, self.report = options, model, report
        self.held = 0
        self._shapes = ShapeValues()
        self._decides_shapes = False
        self._limits = Limits(options.max_bytes, 4 * options.max_bytes)
        self._uses_of_names: Counter[str | None] | None = None
        self._names: graph.Names | None = None
        self._chose_branch = False

    def round(self) -> bool:
        """Go through the model once. Whether a constant was made that gives a node's result a shape, from which more
        may follow: a Pad by sizes that are computed from what the Pad before it gives."""
        self._shapes, self._decides_shapes = ShapeValues(), False
        for scope in graph.scopes(self.model):
            for node in scope.graph:
                self._visit(node, scope)
        return self._decides_shapes

    def _visit(self, node: ir.Node, scope: graph.Scope) -> None:
        if node.domain != "" or node.op_type == "Constant":
            return
        if node.op_type == "If" and self._choose_branch(node, scope):
            return
        entries = self._shapes.visit(node, scope.opset)
        if entries is not None and entries.known and self._fold_shape(node, entries, scope):
            return
        if node.op_type == "Range" and self._chose_branch:
            self._read_scalars(node, scope)
        if node.op_type == "Reshape":
            self._complete_reshape(node, scope)
        if node.op_type == "Where" and self._choose_entries(node, scope):
            return
        if all(v is None or graph.is_constant(v) for v in node.inputs):
            self._fold_node(node, scope)

    def _fold_shape(self, node: ir.Node, entries: Entries, scope: graph.Scope) -> bool:
        """A shape computation whose entries are all numbers."""
        if entries.dtype not in WHOLE:
            return False
        array = np.array(entries.items, entries.dtype.numpy())
        self._replace(node, [array.reshape(()) if entries.scalar else array], scope, "shape")
        return True

    def _complete_reshape(self, node: ir.Node, scope: graph.Scope) -> None:
        """Reshape to numbers and one length: the length follows from the rest."""
        target = graph.input_of(node, 1)
        entries = self._shapes.of(target)
        if target is None or entries is None or entries.known or graph.has_references(node):
            return
        free = [item for item in entries.items if not isinstance(item, int)]
        fixed = [item for item in entries.items if isinstance(item, int)]
        if free != [LENGTH] or any(item <= 0 for item in fixed):
            return
        dims = np.array([item if isinstance(item, int) else -1 for item in entries.items], np.int64)
        name = self._fresh(f"{target.name}_fixed")
        node.replace_input_with(1, graph.add_constant(scope, node, name, dims))
        self.report.changed("reshape", graph.site(node), f"to {dims.tolist()}")

    def _choose_entries(self, node: ir.Node, scope: graph.Scope) -> bool:
        """Put the entries that a constant condition takes in the place of a Where over shapes: one of the two as it is,
        or a Concat of numbers and of parts of those that were put together by one."""
        condition, *choices = (self._shapes.of(value) for value in node.inputs)
        length = graph.static_shape(node.outputs[0])
        if condition is None or not condition.known or length is None or len(length) != 1:
            return False
        taken = [1 if item else 2 for item in condition.items] * (length[0] if len(condition.items) == 1 else 1)
        if len(taken) != length[0] or graph.has_references(node):
            return False
        whole = graph.input_of(node, taken[0]) if len(set(taken)) == 1 else None
        if whole is not None and graph.same_shape(whole, node.outputs[0]) and not node.outputs[0].is_graph_output():
            self._shaped(node.outputs[0])
            graph.bypass(node, whole)
            self.report.changed("where", graph.site(node), f"always {whole.name}")
            return True
        parts: list[int | ir.Value] = []
        for place, index in enumerate(taken):
            part = _entry(graph.input_of(node, index), choices[index - 1], place)
            if part is None:
                return False
            parts.append(part)
        if all(isinstance(part, int) for part in parts):
            return False
        dtype = (node.inputs[1] or node.outputs[0]).dtype or ir.DataType.INT64
        values = [
            graph.add_constant(scope, node, self._fresh("entry"), np.array([part], dtype.numpy()))
            if isinstance(part, int)
            else part
            for part in parts
        ]
        concat = ir.Node("", "Concat", values, [ir.AttrInt64("axis", 0)], name=node.name)
        new, old = concat.outputs[0], node.outputs[0]
        new.shape, new.type = old.shape, old.type
        scope.graph.insert_before(node, concat)
        self._shaped(old)
        graph.replace_value(old, new, keep_name=True)
        site = graph.site(node)
        graph.remove_node(node)
        self._shapes.visit(concat, scope.opset)
        self.report.changed("where", site, f"Concat of {len(parts)} entries")
        return True

    def _shaped(self, value: ir.Value) -> None:
        """Note that more is known now of a value from which a node's result may get its shape."""
        self._decides_shapes |= any(user.op_type in SHAPED and _unknown_shape(user) for user, _ in value.uses())

    def _read_scalars(self, node: ir.Node, scope: graph.Scope) -> None:
        """Make the inputs of a Range scalars.

        Runtimes take vectors of one number too, but only where they cannot see the shape, as behind an If.
        """
        for index, value in enumerate(node.inputs):
            if value is None or graph.rank(value) == 0:
                continue
            scalar = graph.add_constant(scope, node, self._fresh("scalar"), np.zeros(0, np.int64))
            reshape = ir.Node("", "Reshape", [value, scalar], name="")
            reshape.outputs[0].name = self._fresh(f"{value.name}_scalar")
            scope.graph.insert_before(node, reshape)
            node.replace_input_with(index, reshape.outputs[0])

    def _fold_node(self, node: ir.Node, scope: graph.Scope) -> None:
        if graph.has_references(node) or any(True for _ in graph.subgraphs(node)) or is_random(node):
            return
        if node.op_type in SEQUENCES or not any(graph.is_used(value) for value in node.outputs):
            return
        if node.op_type in QUANTIZERS and not self.options.quantized:
            self.report.skipped("fold", graph.site(node), f"{node.op_type} of a constant; quantized=true folds it")
            return
        tensors = [graph.constant_tensor(value) for value in node.inputs]
        if _widens_weights(node):
            self.report.skipped("fold", graph.site(node), "Cast of weights that kernels read as they are")
            return
        try:
            self._check_size(node, scope, tensors)
            arrays = evaluate(node, scope.opset, tensors)
            size = sum(array.nbytes for array in arrays)
            self._check_result(size, node, tensors)
        except Refusal as refusal:
            self.report.skipped("fold", graph.site(node), f"{node.op_type}: {refusal}")
            return
        self.held += size
        self._replace(node, arrays, scope, "fold")

    def _check_size(self, node: ir.Node, scope: graph.Scope, tensors: list[ir.TensorProtocol | None]) -> None:
        read = sum(graph.nbytes(t) for t in tensors if t is not None)
        if read > self._limits.inputs:
            raise Refusal(f"it reads {_megabytes(read)}; max_bytes={read} allows it")
        predicted = predict_bytes(node, scope.opset, tensors)
        check_work(node, tensors, predicted)
        if predicted > self._limits.result:
            raise Refusal(f"the result takes {_megabytes(predicted)}; max_bytes={predicted} allows it")

    def _check_result(self, size: int, node: ir.Node, tensors: list[ir.TensorProtocol | None]) -> None:
        freed = sum(
            graph.nbytes(tensor)
            for value, tensor in zip(node.inputs, tensors, strict=True)
            if value is not None and tensor is not None and len(value.uses()) == 1
        )
        if size - freed > self.options.max_growth:
            raise Refusal(f"the file would grow by {_megabytes(size - freed)}; max_growth={size - freed} allows it")
        if self.held + size > self.options.max_total:
            raise Refusal(f"results take {_megabytes(self.held)} already; max_total={self.held + size} allows it")

    def _replace(self, node: ir.Node, arrays: list[np.ndarray], scope: graph.Scope, rule: str) -> None:
        """Put constants of the same names in the place of the outputs."""
        site = graph.site(node)
        for old, array in zip(node.outputs, arrays, strict=False):
            if not old.name or not graph.is_used(old):
                continue
            name = old.name
            if old.is_graph_output():
                tensor = ir.tensor(array, name=name)
                constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], name="")
                scope.graph.insert_before(node, constant)
                new = constant.outputs[0]
                new.shape, new.type = graph.tensor_shape(tensor), ir.TensorType(tensor.dtype)
                graph.replace_value(old, new, keep_name=True)
                continue
            old.name = None
            new = graph.add_constant(scope, node, name, array)
            graph.replace_value(old, new)
            self._shaped(new)
        graph.remove_node(node)
        self.report.changed(rule, site, f"{node.op_type} -> {', '.join(_describe(a) for a in arrays)}")

    def _fresh(self, stem: str) -> str:
        self._names = self._names or graph.Names(self.model)
        return self._names.fresh(stem)

    # --- If

    def _choose_branch(self, node: ir.Node, scope: graph.Scope) -> bool:
        """Put the branch that a constant condition takes in the place of the If."""
        condition = graph.constant_value(node.inputs[0])
        if condition is None:
            return False
        which = "then_branch" if bool(condition.reshape(-1)[0]) else "else_branch"
        attribute = node.attributes.get(which)
        if attribute is None or attribute.is_ref():
            return False
        branch = attribute.as_graph()
        site = graph.site(node)
        self._rename_clashes(branch)
        results = list(branch.outputs)
        branch.outputs.clear()
        moved = set(branch)
        for name, value in list(branch.initializers.items()):
            del branch.initializers[name]
            assert value.const_value is not None
            if scope.function is None:
                scope.graph.register_initializer(value)
            else:
                constant = graph.add_constant(scope, node, name, value.const_value)
                results = [constant if value is r else r for r in results]
                graph.replace_value(value, constant)
        nodes = list(branch)
        for inner in nodes:
            branch.remove(inner)
        scope.graph.insert_before(node, nodes)
        taken: set[ir.Value] = set()
        for old, new in zip(node.outputs, results, strict=True):
            if graph.is_used(old):
                fresh = new.producer() in moved and new not in taken
                graph.replace_value(old, new, keep_name=fresh)
                taken.add(new)
        graph.remove_node(node)
        self._chose_branch = True
        self.report.changed("if", site, f"always {which}: {len(nodes)} nodes")
        for inner in nodes:  # they stand before the node that the walk over the graph is at
            self._visit(inner, scope)
        return True

    def _rename_clashes(self, branch: ir.Graph) -> None:
        """Branches may use the same names; in one graph each must be unique."""
        if self._uses_of_names is None:
            self._uses_of_names = Counter()
            for body in graph.all_graphs(self.model):
                self._uses_of_names.update(body.initializers)
                self._uses_of_names.update(value.name for node in body for value in node.outputs)
        for value in [*branch.initializers.values(), *(v for node in branch for v in node.outputs)]:
            if value.name and self._uses_of_names[value.name] > 1:
                value.name = self._fresh(value.name)


def _entry(value: ir.Value | None, entries: Entries | None, place: int) -> int | ir.Value | None:
    """An entry of a vector of shapes: a number, or the vector of one element that a Concat put there."""
    if value is None:
        return None
    if entries is not None:
        item = entries.items[place if len(entries.items) > 1 else 0] if entries.items else UNKNOWN
        if isinstance(item, int):
            return item
    producer = value.producer()
    if producer is None or not graph.is_op(producer, "Concat"):
        return None
    for part in producer.inputs:
        dims = graph.static_shape(part)
        if dims is None or len(dims) != 1:
            return None
        if place < dims[0]:
            return part if dims == (1,) else None
        place -= dims[0]
    return None


def _unknown_shape(node: ir.Node) -> bool:
    """Whether nothing, or only a name that onnx has made up, is known of a result's size."""
    return any(
        value.shape is None or any(not isinstance(d, int) and MADE.fullmatch(d.value or "unk__0") for d in value.shape)
        for value in node.outputs
    )


def _widens_weights(node: ir.Node) -> bool:
    """Whether a node makes float32 of a large constant of a narrower type that is read as a weight alone."""
    source = graph.input_of(node, 0)
    shape = graph.static_shape(source)
    if not graph.is_op(node, "Cast") or source is None or source.dtype not in HALF or shape is None:
        return False
    widened = graph.attribute(node, "to") == ir.DataType.FLOAT and math.prod(shape) >= LARGE
    return widened and graph.is_only_weight(node.outputs[0], len(shape))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _describe(array: np.ndarray) -> str:
    return f"{array.dtype}{list(array.shape)}"
