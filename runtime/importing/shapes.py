"""Operators that read, compute or change shapes. Shapes that are computed from symbolic dimensions stay symbolic.

A shape that only arrives at run time: where ONNX knows the output's shape, the import uses it and the program checks
the tensor against it; otherwise new symbolic dimensions take the tensor's values.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import tvm
from tvm import relax, te, tirx

from . import protos
from .site import (
    CONTENT_LIMIT,
    Dim,
    Refuse,
    Result,
    Site,
    Unfixed,
    Value,
    const,
    constant_of,
    converts,
    dtype_of,
    int64,
    made_by,
    normal_axis,
    np_dtype,
    number,
    product,
    same,
    shape_of,
)


def content_value(
    site: Site, content: Sequence[Dim], dtype: str = "int64", shape: Sequence[int] | None = None
) -> Value:
    """A small integer tensor from its elements; a constant when all are numbers."""
    shape = [len(content)] if shape is None else list(shape)
    if all(isinstance(c, int) for c in content):
        return Value(const(np.array(content, np.int64).reshape(shape), dtype), tuple(content))
    tensor = site.shape_tensor(content)
    if shape != [len(content)]:
        tensor = site.emit(relax.op.reshape(tensor, shape))
    return Value(site.cast(tensor, dtype), tuple(content))


def reshaped(site: Site, expr: tvm.ir.Expr, dims: Sequence[Dim]) -> tvm.ir.Expr:
    """`expr` in another shape of as many elements, which is checked at run time where it is not known. Several changes
    of shape are one, or none."""
    made = made_by(site.bb, expr, "relax.reshape")
    if made is not None and isinstance(made.args[0].ty.shape, relax.ShapeExpr):
        expr = made.args[0]
    if len(shape_of(expr)) == len(dims) and all(same(a, b) for a, b in zip(shape_of(expr), dims, strict=True)):
        return expr
    if any(isinstance(d, int) and d == 0 for d in dims):
        # Relax reads 0 as "the input's size". The unused input keeps TVM from folding this to an empty constant,
        # which it can write into a library but not read back.
        out, nothing = tuple(int64(d) for d in dims), tirx.const(0, dtype_of(expr))
        return site.te(lambda _: te.compute(out, lambda *i: nothing, name="empty"), expr, name="empty")
    shape = relax.ShapeExpr([int64(d) for d in dims])
    before, after = product(shape_of(expr)), product(dims)
    # A view of fewer elements would be made silently.
    site.require_dims([before], [after])
    if site.target.is_cpu and (not same(before, after) or _flattened(shape_of(expr), dims)):
        # Relax would copy, at places that it computes by divisions by several sizes, and hardly get through with them.
        return site.emit(
            relax.call_pure_packed(
                "vm.builtin.reshape", site.emit(expr), shape, ty_args=relax.TensorType(shape, dtype_of(expr))
            )
        )
    return site.emit(relax.op.reshape(expr, shape))


def _flattened(before: Sequence[Dim], after: Sequence[Dim]) -> bool:
    """Whether rows and columns of an image that are known only at run time become one axis."""
    free = [sum(not isinstance(dim, int) for dim in dims) for dims in (before, after)]
    behind = sum(not isinstance(dim, int) for dim in before[2:])
    return len(before) > 3 and isinstance(before[1], int) and behind > 1 and free[1] < free[0]


def settled(site: Site, expr: tvm.ir.Expr, dims: dict[int, Dim]) -> tvm.ir.Expr:
    """`expr` with the given dimensions where it has symbolic ones: a check at run time."""
    have = shape_of(expr)
    wanted = [dims.get(axis, dim) if not isinstance(dim, int) else dim for axis, dim in enumerate(have)]
    if all(same(a, b) for a, b in zip(have, wanted, strict=True)):
        return expr
    return site.bb.match_cast(expr, relax.TensorType([int64(d) for d in wanted], dtype_of(expr)))


def filled(site: Site, dims: Sequence[Dim], value: float | int | bool, dtype: str) -> tvm.ir.Expr:
    """A tensor of one value, infinities included."""
    out = tuple(int64(d) for d in dims)
    if all(isinstance(d, int) for d in dims) and 0 < product(dims) <= CONTENT_LIMIT:
        return const(np.full([int(d) for d in dims], value), dtype)
    return site.te(lambda: te.compute(out, lambda *_: tirx.const(value, dtype), name="fill"), name="fill")


@converts("Shape")
def shape(site: Site) -> Result:
    dims = site.shape()
    rank = len(dims)
    start, end = int(site.attr("start", 0)), int(site.attr("end", rank))

    def clamp(i: int) -> int:
        return min(max(i + rank if i < 0 else i, 0), rank)

    return content_value(site, dims[clamp(start) : clamp(end)])


@converts("Size")
def size(site: Site) -> Result:
    return content_value(site, [product(site.shape())], shape=[])


@converts("Constant")
def constant(site: Site) -> Result:
    for name, dtype in (
        ("value_int", "int64"),
        ("value_ints", "int64"),
        ("value_float", "float32"),
        ("value_floats", "float32"),
    ):
        if name in site.attrs:
            return const(site.attrs[name], dtype)
    if "value" not in site.attrs:
        raise Refuse("sparse and text constants are not compiled")
    return protos.constant(site.attrs["value"])


@converts("Identity")
def identity(site: Site) -> Result:
    return site.value(0)


@converts("Dropout")
def dropout(site: Site) -> Result:
    """The inference form; training mode draws random numbers."""
    if site.opset >= 12 and site.has(2):
        training = site.array(2)
        if training is None:
            fits = site.emit(relax.op.logical_not(site.x(2)))
            if site.has(1):
                fits = site.emit(relax.op.logical_or(fits, relax.op.equal(site.x(1), site.like(0, 1))))
            site.require(fits)
        elif bool(training):
            ratio = site.array(1) if site.has(1) else np.array(0.5)
            if ratio is None or float(ratio) != 0.0:
                raise Refuse("random numbers are not compiled")
    elif site.opset < 7 and not site.attr("is_test", 0):
        raise Refuse("random numbers are not compiled")
    if site.outputs < 2:
        return site.value(0)
    dtype = "bool" if site.opset >= 10 else site.dtype()
    return [site.value(0), filled(site, site.shape(), 1, dtype)]


@converts("Reshape")
def reshape(site: Site) -> Result:
    source = site.shape()
    zero_is_copy = not site.attr("allowzero", 0)
    if site.opset < 5:
        content: tuple[Dim, ...] | None = tuple(site.attr("shape", ()))
    else:
        content = site.content(1)
        if content is None and site.rank(1) == 1 and site.shape(1) == (0,):
            content = ()
    if content is not None:
        dims: list[Dim] = [
            source[i] if zero_is_copy and isinstance(d, int) and d == 0 else d for i, d in enumerate(content)
        ]
        return _with_content(site, _infer_one(source, dims))
    promised = site.promised().static
    shape_tensor = site.cast(site.x(1), "int64")
    (length,) = shape_of(shape_tensor)
    if not isinstance(length, int):
        if promised is None:
            raise Unfixed("the length of its shape input is not known")
        length = len(promised)
        shape_tensor = site.bb.match_cast(shape_tensor, relax.TensorType([length], "int64"))
    minus, zero = const(-1, "int64"), const(0, "int64")
    if zero_is_copy and length:
        copied = [source[i] if i < len(source) else 0 for i in range(length)]
        is_zero = site.emit(relax.op.equal(shape_tensor, zero))
        shape_tensor = site.emit(relax.op.where(is_zero, site.shape_tensor(copied), shape_tensor))
    if length:
        free = site.emit(relax.op.equal(shape_tensor, minus))
        if promised is not None:
            rest = const(np.array(promised, np.int64), "int64")
        else:
            one = const(1, "int64")
            given = site.emit(relax.op.prod(relax.op.where(free, one, shape_tensor)))
            total = site.shape_tensor([product(source)])
            rest = site.emit(relax.op.floor_divide(total, relax.op.maximum(given, one)))
        shape_tensor = site.emit(relax.op.where(free, rest, shape_tensor))
    if promised is None:
        return reshaped(site, site.x(), site.runtime_dims(shape_tensor, "reshape"))
    if length:
        runtime = site.emit(relax.op.tensor_to_shape(shape_tensor))
        site.bb.match_cast(runtime, relax.ShapeType([int64(d) for d in promised]))
    return reshaped(site, site.x(), promised)


def _infer_one(source: Sequence[Dim], dims: list[Dim]) -> list[Dim]:
    """Replace the dimension -1 by what the number of elements leaves for it."""
    free = [i for i, d in enumerate(dims) if isinstance(d, int) and d == -1]
    if not free:
        return dims
    if len(free) > 1:
        raise Refuse("its shape has more than one dimension -1")
    left, given = list(source), [d for i, d in enumerate(dims) if i != free[0]]
    for dim in list(given):  # cancel equal factors so that n*64 / n stays 64
        match = next((s for s in left if same(s, dim)), None)
        if match is not None and not (isinstance(dim, int) and dim == 0):
            left.remove(match)
            given.remove(dim)
    above, below = product(left), product(given)
    if isinstance(below, int) and below == 0:
        raise Refuse("its dimension -1 is not determined")
    if isinstance(above, int) and isinstance(below, int):
        if above % below:
            raise Refuse(f"{above} elements do not divide into {below}")
        dims[free[0]] = above // below
    else:
        dims[free[0]] = number(tvm.sym.Analyzer().simplify(tirx.floordiv(int64(above), int64(below))))
    return dims


def _with_content(site: Site, dims: Sequence[Dim]) -> Result:
    """The first input reshaped, its known elements kept."""
    if len(dims) == len(site.shape()) and all(same(a, b) for a, b in zip(dims, site.shape(), strict=True)):
        return site.value(0)
    value = site.value(0)
    content = value.content if len(dims) <= 1 else None
    array = constant_of(value.expr)
    if array is not None and all(isinstance(d, int) for d in dims):
        return Value(relax.const(array.reshape([int(d) for d in dims]), site.dtype()), content)
    return Value(reshaped(site, value.expr, dims), content)


@converts("Flatten")
def flatten(site: Site) -> Result:
    dims = site.shape()
    axis = int(site.attr("axis", 1))
    axis = axis + len(dims) if axis < 0 else axis
    return reshaped(site, site.x(), [product(dims[:axis]), product(dims[axis:])])


@converts("Squeeze")
def squeeze(site: Site) -> Result:
    dims = site.shape()
    axes = site.attr("axes") if site.opset < 13 else None
    if site.opset >= 13 and site.has(1):
        axes = site.ints(1)
        if axes is None:
            return _shape_by_axes(site, site.x(), dims, site.promised().static or ())
    if axes is None:
        if not all(isinstance(d, int) for d in dims):
            raise Unfixed("which of its dimensions are 1 is only known at run time")
        axes = [i for i, d in enumerate(dims) if d == 1]
    gone = {normal_axis(int(a), len(dims)) for a in axes}
    for axis in gone:
        if dims[axis] != 1:
            if isinstance(dims[axis], int):
                raise Refuse(f"axis {axis} has size {dims[axis]}, not 1")
            narrowed = [1 if i in gone else d for i, d in enumerate(dims)]
            cast = site.bb.match_cast(site.x(), relax.TensorType([int64(d) for d in narrowed], site.dtype()))
            return reshaped(site, cast, [d for i, d in enumerate(dims) if i not in gone])
    return _with_content(site, [d for i, d in enumerate(dims) if i not in gone])


@converts("Unsqueeze")
def unsqueeze(site: Site) -> Result:
    dims = site.shape()
    axes = site.attr("axes") if site.opset < 13 else site.ints(1)
    if axes is None:
        promised = site.promised().static
        return _shape_by_axes(site, site.x(), promised or (), dims)
    rank = len(dims) + len(axes)
    new = {normal_axis(int(a), rank) for a in axes}
    if len(new) != len(axes):
        raise Refuse("its axes repeat")
    rest = iter(dims)
    return _with_content(site, [1 if i in new else next(rest) for i in range(rank)])


def _shape_by_axes(site: Site, x: tvm.ir.Expr, wide: Sequence[Dim], narrow: Sequence[Dim]) -> Result:
    """Squeeze or Unsqueeze with axes that arrive at run time: between the promised shape and the input's.

    The result is the same reshape whichever axes of size 1 they are; the program checks that they fit.
    """
    from .reductions import axis_mask, is_mask

    promised = site.promised().static
    (count,) = site.static(1)
    if promised is None or len(wide) - len(narrow) != count:
        raise Unfixed("its axes are computed at run time")
    mask = axis_mask(site, site.x(1), len(wide))
    fits: tvm.ir.Expr | None = None
    for axes in itertools.combinations([i for i, d in enumerate(wide) if isinstance(d, int) and d == 1], count):
        left = [d for i, d in enumerate(wide) if i not in axes]
        if all(same(a, b) for a, b in zip(left, narrow if site.op == "Unsqueeze" else promised, strict=True)):
            this = is_mask(site, mask, axes)
            fits = this if fits is None else site.emit(relax.op.logical_or(fits, this))
    if fits is None:
        raise Refuse("no axes give the promised shape")
    site.require(fits)
    return reshaped(site, x, promised)


@converts("Concat")
def concat(site: Site) -> Result:
    count = len(site.inputs)
    axis = site.axis(1 if site.opset < 4 else 0)
    contents = [site.content(i) for i in range(count)]
    if site.rank() == 1 and all(c is not None for c in contents):
        joined = [d for c in contents if c is not None for d in c]
        if len(joined) <= CONTENT_LIMIT:
            return content_value(site, joined, site.dtype())
    # Empty operands change nothing, and TVM cannot store an empty constant in a library.
    parts = [site.x(i) for i in range(count) if site.shape(i)[axis] != 0] or [site.x(0)]
    return relax.op.concat(parts, axis) if len(parts) > 1 else parts[0]


@converts("Transpose")
def transpose(site: Site) -> Result:
    rank = site.rank()
    perm = [int(p) for p in site.attr("perm", range(rank)[::-1])]
    if perm == list(range(rank)):
        return site.value(0)
    array = constant_of(site.x())
    if array is not None and array.size <= CONTENT_LIMIT:
        return relax.const(np.transpose(array, perm), site.dtype())
    return permuted(site, site.x(), perm)


def permuted(site: Site, expr: tvm.ir.Expr, perm: Sequence[int]) -> tvm.ir.Expr:
    """`expr` with its axes in another order. Two transpositions are one, or none."""
    made = made_by(site.bb, expr, "relax.permute_dims")
    if made is not None and made.attrs.axes is not None:
        perm = [int(made.attrs.axes[p]) for p in perm]
        expr = made.args[0]
    return expr if list(perm) == list(range(len(perm))) else site.emit(relax.op.permute_dims(expr, perm))


@converts("Expand")
def expand(site: Site) -> Result:
    source = site.shape()
    content = site.content(1)
    if content is None and site.shape(1) == (0,):
        content = ()
    if content is not None:
        return broadcast(site, site.x(), broadcast_dims(source, _agreed(site, source, content)))
    (length,) = site.shape(1)
    promised = site.promised().static
    if promised is not None:
        wanted = site.cast(site.x(1), "int64")
        if isinstance(length, int) and length == len(promised) and len(source) <= length:
            # Where the input has size 1 the tensor decides; elsewhere it may say 1 or the input's size.
            padded = [1] * (length - len(source)) + list(source)
            fixed = const(np.array(promised, np.int64), "int64")
            is_one = site.emit(relax.op.equal(wanted, const(1, "int64")))
            free = const(np.array([not (isinstance(d, int) and d == 1) for d in padded]), "bool")
            either = relax.op.logical_and(is_one, free)
            site.require(site.emit(relax.op.logical_or(relax.op.equal(wanted, fixed), either)))
            return broadcast(site, site.x(), promised)
    if not isinstance(length, int):
        raise Unfixed("the length of its shape input is not known")
    rank = max(length, len(source))
    own = site.shape_tensor([1] * (rank - len(source)) + list(source))
    wanted = site.cast(site.x(1), "int64")
    if length < rank:
        wanted = site.emit(relax.op.concat([const([1] * (rank - length), "int64"), wanted], 0))
    one = const(1, "int64")
    fits = relax.op.logical_or(
        relax.op.equal(own, one), relax.op.logical_or(relax.op.equal(wanted, one), relax.op.equal(own, wanted))
    )
    site.require(site.emit(fits))
    target = site.emit(relax.op.where(relax.op.equal(own, one), wanted, own))
    dims = site.runtime_dims(target, "expand")
    known = [1] * (rank - len(source)) + list(source)
    return broadcast(
        site, site.x(), [k if isinstance(k, int) and k != 1 else d for k, d in zip(known, dims, strict=True)]
    )


def _agreed(site: Site, source: Sequence[Dim], wanted: Sequence[Dim]) -> list[Dim]:
    """A wanted shape with the source's size in the place of those that must be equal to it: `min(sequence, 512)` of a
    sliced table and `sequence`, of which neither is 1 alone. The program checks that they are."""
    result = list(wanted)
    for place in range(1, min(len(source), len(wanted)) + 1):
        own, other = source[-place], wanted[-place]
        if not same(own, other) and (_shortened(own, other) or _shortened(other, own)):
            result[-place] = own
    site.require_dims(wanted, result)
    return result


def _shortened(dim: Dim, whole: Dim) -> bool:
    """Whether a size is min(whole, bound) with a bound above 1."""
    if not isinstance(dim, tirx.Min):
        return False
    bound = number(dim.b)
    return isinstance(bound, int) and bound > 1 and same(number(dim.a), whole)


def broadcast_dims(a: Sequence[Dim], b: Sequence[Dim]) -> list[Dim]:
    """The common shape of two, by ONNX's rules. Raises Refuse where they do not fit or that is not provable."""
    rank = max(len(a), len(b))
    left, right = [1] * (rank - len(a)) + list(a), [1] * (rank - len(b)) + list(b)
    result: list[Dim] = []
    for x, y in zip(left, right, strict=True):
        if isinstance(x, int) and x == 1:
            result.append(y)
        elif (isinstance(y, int) and y == 1) or same(x, y):
            result.append(x)
        elif isinstance(x, int) and isinstance(y, int):
            raise Refuse(f"sizes {x} and {y} do not broadcast")
        else:
            raise Unfixed(f"whether {x} and {y} broadcast is only known at run time")
    return result


def broadcast(site: Site, expr: tvm.ir.Expr, dims: Sequence[Dim]) -> tvm.ir.Expr:
    """`expr` repeated to a larger shape."""
    have = shape_of(expr)
    if len(have) == len(dims) and all(same(a, b) for a, b in zip(have, dims, strict=True)):
        return expr
    return site.emit(relax.op.broadcast_to(expr, relax.ShapeExpr([int64(d) for d in dims])))


@converts("ConstantOfShape")
def constant_of_shape(site: Site) -> Result:
    value = np.asarray(site.attr("value", np.zeros(1, np.float32))).reshape(-1)
    dtype = str(value.dtype)
    dims: Sequence[Dim] | None = site.content(0)
    if dims is None and site.shape(0) == (0,):
        dims = ()
    if dims is None:
        promised = site.promised().static
        if promised is not None:
            site.require_content(0, promised)
            dims = promised
        else:
            dims = site.runtime_dims(site.x(), "filled")
    return filled(site, dims, value[0].item(), dtype)


@converts("Range")
def range_(site: Site) -> Result:
    dtype = site.dtype()
    bounds = [site.content(i) for i in range(3)]
    if dtype.startswith("int") and all(b is not None and len(b) == 1 for b in bounds):
        start, limit, delta = (b[0] for b in bounds if b is not None)
        if isinstance(start, int) and isinstance(limit, int) and isinstance(delta, int):
            return const(np.arange(start, limit, delta), dtype)
        if isinstance(delta, int) and delta == 1:
            length = number(tvm.sym.Analyzer().simplify(int64(limit) - int64(start)))
            return site.te(
                lambda: te.compute((int64(length),), lambda i: (int64(start) + i).astype(dtype), name="range"),
                name="range",
            )
    arrays = [site.array(i) for i in range(3)]
    if all(a is not None for a in arrays):
        numbers = [a.reshape(()).item() for a in arrays if a is not None]
        return const(np.arange(*numbers, dtype=np_dtype(dtype)), dtype)
    start_x, limit_x, delta_x = (site.emit(relax.op.reshape(site.x(i), [1])) for i in range(3))
    wide = "float64" if dtype.startswith("float") else "int64"
    span = relax.op.subtract(site.cast(limit_x, wide), site.cast(start_x, wide))
    if wide == "float64":
        count = site.cast(site.emit(relax.op.ceil(relax.op.divide(span, site.cast(delta_x, wide)))), "int64")
    else:
        count = site.emit(relax.op.negative(relax.op.floor_divide(relax.op.negative(span), site.cast(delta_x, wide))))
    count = site.emit(relax.op.maximum(count, const(0, "int64")))
    promised = site.promised().static
    if promised is not None:
        site.require(site.emit(relax.op.equal(count, const(list(promised), "int64"))))
        dims: Sequence[Dim] = promised
    else:
        dims = site.runtime_dims(count, "range")

    def compute(first: te.Tensor, step: te.Tensor) -> te.Tensor:
        return te.compute((int64(dims[0]),), lambda i: first[0] + i.astype(dtype) * step[0], name="range")

    return site.te(compute, start_x, delta_x, name="range")
