"""The pass `two-pass-softmax`: softmax over one axis -> the custom operator with its own kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from ..base import Contract, Pass, PassContext, PassReport
from ..graph import (
    Names,
    Scope,
    all_nodes,
    attribute,
    carry_type,
    constant_ints,
    input_of,
    is_op,
    rank,
    remove_node,
    scopes,
    site,
)
from ..ops import OPERATORS
from ..ops.masked_softmax import OPSET as FOLDED
from ..ops.two_pass_softmax import (
    NARROW_ROW,
    NEGATIVE_AXES,
    TWO_PASS_SOFTMAX,
    Form,
    choose_column_form,
    choose_form,
    longest_column,
    longest_in_cache,
)
from ..recognise.softmax import WITHOUT_MAXIMUM
from .softmax_source import Source, source_of

ALL_AXES = 13  # from this opset on Softmax is over one axis; before, over all axes from `axis` to the last
NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
COMPUTED = (ir.DataType.FLOAT, *NARROW)


class _Refused(Exception):
    """The first condition that a site does not meet."""


@dataclass(frozen=True)
class TwoPassSoftmax(Pass):
    """Softmax over one axis, and its chains of exponentials over the last, become `graphwright.TwoPassSoftmax`.

    Compiled for a CPU it runs on kernels of two forms. Long rows that do not stay in the cache take two passes
    over memory instead of three: every number is kept as a pair (m, n) that stands for m·2^n, so nothing can
    overflow and no pass is needed to find the maximum. Rows that stay in the cache take three, because there
    arithmetic is the limit and the third pass saves an exponential. Along another axis than the last the same
    happens for a vector of neighbouring columns at a time; nothing is transposed.

        y = Softmax <axis = k> (x)                                 y = graphwright.TwoPassSoftmax <axis = k> (x)

        m = ReduceMax <keepdims = 1> (x, last)
        d = Sub (x, m)
        e = Exp (d)                                          ->    y = graphwright.TwoPassSoftmax <axis = -1> (x)
        s = ReduceSum <keepdims = 1> (e, last)
        y = Div (e, s)                                             (also without Sub, and as Mul by Reciprocal)

        c = Mul (x, scale)
        m = Add (c, mask)                                    ->    y = graphwright.MaskedSoftmax <scale> (x, mask)
        y = Softmax (m)

    A constant scale, by Mul or Div, and a mask are taken in as the softmax reads x, so that their results are never
    written: ScaledSoftmax without a mask, SelectedSoftmax where Where chooses between x and -inf, and TemperedSoftmax,
    TemperedMaskedSoftmax and TemperedSelectedSoftmax where the factor, one number or one for each row, is known at run
    time only. They must be along
    the last axis, of opset 15 or later, used nowhere else, and the mask known to broadcast to x.

    The operator's body is Softmax itself: the file stays plain ONNX and runs at full speed everywhere.
    Left alone: float64, several axes (before opset 13), and chains along another axis, for which `recognise-softmax`
    is, or whose exponentials or sum are used elsewhere. A chain without the maximum is equal to the operator where the
    sum of its exponentials neither overflows nor is lost, which the report says; beyond, as for rows above 88 or below
    -103, the chain gives NaN and the operator the softmax.

    Source: Dukhan and Ablavatski, "The Two-Pass Softmax Algorithm", arXiv 2001.04438.

    Options: form: auto, two-pass or three-pass; auto chooses by row length and the target's caches.
    min_row: rows, or axes, known to be shorter than this are left alone.
    """

    name: ClassVar[str] = "two-pass-softmax"
    contract: ClassVar[Contract] = Contract.ROUNDING

    form: Form = Form.AUTO
    min_row: int = 1

    def __post_init__(self) -> None:
        if self.min_row < 0:
            raise ValueError(f"min_row is {self.min_row}, must be at least 0")

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        report, names = self.report(), Names(model)
        opset = model.graph.opset_imports.get("", ALL_AXES)
        for scope in list(scopes(model)):
            if scope.function is not None and scope.function.domain == TWO_PASS_SOFTMAX.domain:
                continue
            for node in list(scope.graph):
                self._visit(node, scope, opset, ctx, report, names)
        if report.changes:
            used = {(node.domain, node.op_type) for node in all_nodes(model)}
            for identifier, operator in OPERATORS.items():
                if identifier in used:
                    operator.add_to(model)
        return report

    def _visit(
        self, node: ir.Node, scope: Scope, opset: int, ctx: PassContext, report: PassReport, names: Names
    ) -> None:
        """Rewrite `node` if it is a softmax or ends a chain that is one. `opset` is the model's."""
        chain = _chain(node)
        if chain is None and not is_op(node, "Softmax"):
            return
        rule = "chain" if chain else "softmax"
        try:
            if chain is None:
                x = input_of(node, 0)
                axis = _softmax_axis(node, scope, opset)
            else:
                x, axis = chain.input(node), -1
            if x is None:
                raise _Refused("it has no input")
            if opset < NEGATIVE_AXES and x.shape is None and node.outputs[0].shape is None:
                raise _Refused(f"rank unknown, and before opset {NEGATIVE_AXES} an axis counts from the front")
            self._check_rows(x, node.outputs[0], axis)
        except _Refused as refusal:
            report.skipped(rule, site(node), str(refusal))
            return
        unshifted = chain is not None and x is input_of(chain.exp, 0)
        source = source_of(x) if chain is None and axis == -1 and opset >= FOLDED else None
        self._rewrite(node, x, axis, opset, source, names)
        if scope.function is not None:
            scope.function.opset_imports[TWO_PASS_SOFTMAX.domain] = TWO_PASS_SOFTMAX.version
        condition = f"; {WITHOUT_MAXIMUM}" if unshifted else f"; of {source}, which is not written" if source else ""
        report.changed(rule, site(node), self._detail(node.outputs[0], axis, ctx) + condition)

    def _check_rows(self, x: ir.Value, y: ir.Value, axis: int) -> None:
        dtype = x.dtype or y.dtype
        if dtype is not None and dtype not in COMPUTED:
            raise _Refused(f"{_numpy_name(dtype)} input, the kernel computes in float32")
        row = _row_length(y if x.shape is None else x, axis)
        if isinstance(row, int) and row < self.min_row:
            raise _Refused(f"rows of {row} are shorter than min_row={self.min_row}")

    def _rewrite(
        self, node: ir.Node, x: ir.Value, axis: int, opset: int, source: Source | None, names: Names
    ) -> None:
        """Turn `node` itself into the operator, so that its output keeps name, type and users."""
        carry_type(x, node.outputs[0])
        before = [value for value in node.inputs if value is not None and value is not x]
        if opset < NEGATIVE_AXES:
            axis = (rank(node.outputs[0]) or 1) - 1
        operator = source.operator if source else TWO_PASS_SOFTMAX
        node.domain, node.op_type, node.version = operator.domain, operator.name, None
        node.attributes.clear()
        if source is None:
            node.attributes.add(ir.AttrInt64("axis", axis))
        elif source.factor is None:
            node.attributes.add(ir.AttrFloat32("scale", source.scale))
        if self.form is not Form.AUTO:
            node.attributes.add(ir.AttrString("form", self.form.value))
        inputs = [x] if source is None else [source.x]
        if source is not None and source.factor is not None:
            inputs.append(_reciprocal(source.factor, node, names) if source.divided else source.factor)
        if source is not None and source.mask is not None:
            inputs.append(source.mask)
        if source is not None:
            before.append(x)
        node.resize_inputs(len(inputs))
        for place, value in enumerate(inputs):
            node.replace_input_with(place, value)
        _remove_unused(before, node.graph)

    def _detail(self, y: ir.Value, axis: int, ctx: PassContext) -> str:
        if self.form is not Form.AUTO:
            return f"{self.form.value}: asked for by form={self.form.value}"
        row, columns = _row_length(y, axis), not _is_last(y.shape, axis)
        where = f"along axis {axis}, " if columns else ""
        if isinstance(row, int):
            narrow = y.dtype in NARROW
            form, why = choose_column_form(row, ctx.caches) if columns else choose_form(row, ctx.caches, narrow)
            return f"{where}{form.value}: {why}"
        limit = (longest_column if columns else longest_in_cache)(ctx.caches)
        limit = NARROW_ROW if y.dtype in NARROW and not columns else limit
        return f"{where}by row length at run time, which is {row}: three-pass up to {limit} elements, two-pass above"


def _reciprocal(value: ir.Value, before: ir.Node, names: Names) -> ir.Value:
    """1 / value, by a node in front of `before`."""
    name = names.fresh(f"{value.name}_reciprocal")
    made = ir.node("Reciprocal", [value], name=name)
    (result,) = made.outputs
    result.name, result.type = name, value.type
    result.shape = None if value.shape is None else value.shape.copy()
    assert before.graph is not None
    before.graph.insert_before(before, [made])
    return result


def _numpy_name(dtype: ir.DataType) -> str:
    return "float64" if dtype == ir.DataType.DOUBLE else dtype.name.lower()


def _row_length(value: ir.Value, axis: int) -> int | str:
    """Elements along an axis: a number, a name, or "unknown"."""
    if value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return "unknown"
    size = value.shape[axis]
    return size if isinstance(size, int) else (size.value or "unknown")


def _is_last(shape: ir.Shape | None, axis: int) -> bool:
    """Whether only axes of one element are behind an axis."""
    if shape is None:
        return axis == -1
    return all(dim == 1 for dim in shape[axis % len(shape) + 1 :])


def _shape(node: ir.Node) -> ir.Shape | None:
    """The shape of the first output of `node`, or of its first input, which has the same."""
    x = input_of(node, 0)
    return node.outputs[0].shape or (x.shape if x is not None else None)


def _softmax_axis(node: ir.Node, scope: Scope, opset: int) -> int:
    """The axis of the Softmax `node`, -1 where it is the last one. Raises _Refused unless it is over one axis.

    opset: of the model, whose Softmax the operator's body is.
    """
    try:
        axis = attribute(node, "axis", -1 if scope.opset >= ALL_AXES else 1)
    except ValueError as error:
        raise _Refused(f"{error}, its value is not known here") from error
    shape = _shape(node)
    if axis == -1 or (shape is not None and axis == len(shape) - 1):
        return -1
    if scope.opset >= ALL_AXES and opset >= ALL_AXES:
        return int(axis)
    if shape is None:
        raise _Refused(f"rank unknown, so axis {axis} may not be the last axis, as it must before opset {ALL_AXES}")
    dims = len(shape)
    first = axis + dims if axis < 0 else axis
    if scope.opset >= ALL_AXES:
        raise _Refused(f"axis {axis} is not the last axis of rank {dims}, as it must be before opset {ALL_AXES}")
    if first >= dims or any(dim != 1 for dim in shape[first : dims - 1]):
        raise _Refused(
            f"before opset {ALL_AXES} axis {axis} means all axes from it on, which are not only the last of rank {dims}"
        )
    return -1


@dataclass(frozen=True)
class _Chain:
    """Exp and what divides by its sum: `e` the exponentials, `total` the sum, `reciprocal` 1/total or None."""

    exp: ir.Node
    e: ir.Value
    total: ir.Value
    reciprocal: ir.Value | None = None

    def input(self, end: ir.Node) -> ir.Value | None:
        """What the chain, with `end` as its last node, is the softmax of. Raises _Refused if it is none that may go."""
        inner = [value for value in (self.total, self.reciprocal) if value is not None]
        if any(value.graph is not end.graph for value in (self.e, *inner)):
            raise _Refused("the chain spans more than one graph")
        shapes = [v.shape for v in (end.outputs[0], self.e, input_of(self.exp, 0)) if v is not None]
        dims = next((len(shape) for shape in shapes if shape is not None), None)
        _check_reduction(self.total.producer(), dims)
        for value, uses in ((self.e, 2), *((v, 1) for v in inner)):
            if value.is_graph_output():
                raise _Refused(f"{value.name} is an output of the graph too")
            if len(value.uses()) != uses:
                raise _Refused(f"{value.name} is used elsewhere too, so it has to be computed anyway")
        x = input_of(self.exp, 0)
        difference = _producer(x)
        if difference is not None and is_op(difference, "Sub"):
            whole = input_of(difference, 0)
            if _is_maximum(input_of(difference, 1), whole, dims):
                return whole
        return x


def _chain(end: ir.Node) -> _Chain | None:
    """The chain that `end` may be the last node of: Exp / ReduceSum(Exp), or Exp · Reciprocal(ReduceSum(Exp))."""
    first, second = input_of(end, 0), input_of(end, 1)
    if is_op(end, "Div"):
        return _divided(first, second)
    if is_op(end, "Mul"):
        for e, inverse in ((first, second), (second, first)):
            node = _producer(inverse)
            if node is not None and is_op(node, "Reciprocal"):
                return _divided(e, input_of(node, 0), inverse)
    return None


def _divided(e: ir.Value | None, total: ir.Value | None, reciprocal: ir.Value | None = None) -> _Chain | None:
    exp, reduction = _producer(e), _producer(total)
    if e is None or total is None or exp is None or reduction is None:
        return None
    if not is_op(exp, "Exp") or not is_op(reduction, "ReduceSum") or input_of(reduction, 0) is not e:
        return None
    return _Chain(exp, e, total, reciprocal)


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _is_maximum(value: ir.Value | None, x: ir.Value | None, dims: int | None) -> bool:
    """Whether `value` is the maximum of `x` over the last of `dims` axes, kept as an axis."""
    node = _producer(value)
    if node is None or not is_op(node, "ReduceMax") or input_of(node, 0) is not x:
        return False
    try:
        _check_reduction(node, dims)
    except _Refused:
        return False
    return True


def _check_reduction(node: ir.Node | None, dims: int | None) -> None:
    """Raise _Refused unless `node` reduces only the last of `dims` axes and keeps it. None: not known how many."""
    assert node is not None
    try:
        axes, keepdims = attribute(node, "axes"), attribute(node, "keepdims", 1)
    except ValueError as error:
        raise _Refused(f"{node.op_type}: {error}, its value is not known here") from error
    if not keepdims:
        raise _Refused(f"{node.op_type} does not keep the axis (keepdims = 0)")
    given = input_of(node, 1)
    if given is not None:
        axes = constant_ints(given)
        if axes is None:
            raise _Refused(f"the axes of {node.op_type} are computed, not constant")
    if not axes:
        if attribute(node, "noop_with_empty_axes", 0):
            raise _Refused(f"{node.op_type} has no axes and does nothing")
        if dims != 1:
            raise _Refused(f"{node.op_type} is over all axes")
        return
    if len(axes) != 1:
        raise _Refused(f"{node.op_type} is over {len(axes)} axes")
    (axis,) = axes
    if axis == -1:
        return
    if dims is None:
        raise _Refused(f"rank unknown, so axis {axis} of {node.op_type} may not be the last axis")
    if axis != dims - 1:
        raise _Refused(f"axis {axis} of {node.op_type} is not the last axis of rank {dims}")


def _remove_unused(values: list[ir.Value], graph: ir.Graph | ir.Function | None) -> None:
    """Remove the nodes of `graph` that make only values nobody uses, and then their producers."""
    while values:
        node = values.pop().producer()
        if node is None or node.graph is not graph or graph is None:
            continue
        if any(value.uses() or value.is_graph_output() for value in node.outputs):
            continue
        values.extend(value for value in node.inputs if value is not None)
        remove_node(node)
