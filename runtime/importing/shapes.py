"""Operators that read, compute or change shapes. Shapes that are computed from symbolic dimensions stay symbolic.

A shape that only arrives at run time: where ONNX knows the output's shape, the import uses it and the program checks
the tensor against it; otherwise new symbolic dimensions take the tensor's values.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import tvm
from tvm import relax, te, tirx

from .site import (
    CONTENT_LIMIT,
    Dim,
    Refuse,
    Result,
    Site,
    Value,
    const,
    constant_of,
    converts,
    dtype_of,
    int64,
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
    """`expr` in another shape of as many elements."""
    if len(shape_of(expr)) == len(dims) and all(same(a, b) for a, b in zip(shape_of(expr), dims, strict=True)):
        return expr
    if any(isinstance(d, int) and d == 0 for d in dims):
        # Relax reads 0 as "the input's size". The unused input keeps TVM from folding this to an empty constant,
        # which it can write into a library but not read back.
        out, nothing = tuple(int64(d) for d in dims), tirx.const(0, dtype_of(expr))
        return site.te(lambda _: te.compute(out, lambda *i: nothing, name="empty"), expr, name="empty")
    return site.emit(relax.op.reshape(expr, relax.ShapeExpr([int64(d) for d in dims])))


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
    value = site.attrs["value"]
    return relax.const(value, str(value.dtype))


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
            raise Refuse("the length of its shape input is not known")
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
            raise Refuse("which of its dimensions are 1 is only known at run time")
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
        raise Refuse("its axes are computed at run time")
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
    return relax.op.permute_dims(site.x(), perm)


@converts("Expand")
def expand(site: Site) -> Result:
    source = site.shape()
    content = site.content(1)
    if content is None and site.shape(1) == (0,):
        content = ()
    if content is not None:
        return broadcast(site, site.x(), broadcast_dims(source, content))
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
        raise Refuse("the length of its shape input is not known")
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
            raise Refuse(f"whether {x} and {y} broadcast is only known at run time")
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


@converts("Slice")
def slice_(site: Site) -> Result:
    dims = site.shape()
    rank = len(dims)
    if site.opset < 10:
        starts, ends = list(site.attr("starts")), list(site.attr("ends"))
        axes, steps = list(site.attr("axes", range(len(starts)))), [1] * len(starts)
    else:
        found_axes = site.ints(3) if site.has(3) else None
        if site.has(3) and found_axes is None:
            return _runtime_slice(site, None)
        found_steps = site.ints(4) if site.has(4) else None
        start_content, end_content = site.content(1), site.content(2)
        if start_content is None or end_content is None or (site.has(4) and found_steps is None):
            return _runtime_slice(site, found_axes)
        starts, ends = list(start_content), list(end_content)
        axes = found_axes if found_axes is not None else list(range(len(starts)))
        steps = found_steps if found_steps is not None else [1] * len(starts)
    axes = [normal_axis(int(a), rank) for a in axes]
    if site.content(0) is not None and rank == 1 and all(isinstance(v, int) for v in (*starts, *ends)):
        content = site.content(0) or ()
        for start, end, step in zip(starts, ends, steps, strict=True):
            content = content[_python_slice(int(start), int(end), step)]
        return content_value(site, content, site.dtype())
    begins: list[Dim] = []
    stops: list[Dim] = []
    lengths: list[Dim] = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        begin, length = _bounds(start, end, int(step), dims[axis])
        begins.append(begin)
        lengths.append(length)
        stops.append(end)
    out: list[Dim] = list(dims)
    for axis, length in zip(axes, lengths, strict=True):
        out[axis] = length
    if all(s == 1 for s in steps) and all(
        isinstance(b, int) and isinstance(n, int) for b, n in zip(begins, lengths, strict=True)
    ):
        last = [int(b) + int(n) for b, n in zip(begins, lengths, strict=True)]
        return relax.op.strided_slice(site.x(), axes, [int(b) for b in begins], last)
    place = {axis: (begin, step) for axis, begin, step in zip(axes, begins, steps, strict=True)}

    def compute(data: te.Tensor) -> te.Tensor:
        def element(*index: tirx.Var) -> tirx.Expr:
            return data(
                *(
                    int64(place[a][0]) + i * tirx.IntImm("int64", place[a][1]) if a in place else i
                    for a, i in enumerate(index)
                )
            )

        return te.compute(tuple(int64(d) for d in out), element, name="slice")

    return site.te(compute, site.x(), name="slice")


def _python_slice(start: int, end: int, step: int) -> slice:
    """ONNX's bounds as Python's: the smallest number means "past the beginning"."""
    if step < 0 and end <= -(1 << 31):
        return slice(start, None, step)
    return slice(start, end, step)


# Exporters write the end of an axis as a number beyond any size: 2^31 - 1, 2^63 - 1, or 10^9.
BEYOND = 10**9


def _bounds(start: Dim, end: Dim, step: int, size: Dim) -> tuple[Dim, Dim]:
    """First index and number of elements of a slice of an axis."""
    if step == 0:
        raise Refuse("its step is 0")
    if isinstance(start, int) and isinstance(end, int) and isinstance(size, int):
        first, last, step = _python_slice(start, end, step).indices(size)
        return first, max(0, -((first - last) // step) if step > 0 else -((last - first) // -step))
    if step != 1:
        raise Refuse("a dynamic axis is sliced with a step")
    analyzer = tvm.sym.Analyzer()
    wide = int64(size)

    def clamped(bound: Dim) -> tirx.Expr:
        if isinstance(bound, int) and bound >= BEYOND:
            return wide
        if isinstance(bound, int) and bound < 0:
            return tirx.max(wide + bound, tirx.IntImm("int64", 0))
        if same(bound, size) or (isinstance(bound, int) and bound == 0):
            return int64(bound)
        return tirx.min(int64(bound), wide)

    first, last = clamped(start), clamped(end)
    if isinstance(start, int) and start == 0 and not isinstance(end, int):
        return 0, number(analyzer.simplify(last))
    return number(analyzer.simplify(first)), number(analyzer.simplify(tirx.max(last - first, tirx.IntImm("int64", 0))))


def _runtime_slice(site: Site, axes: list[int] | None) -> Result:
    """A slice whose bounds arrive at run time: the output's length is known from the promise or computed."""
    dims = site.shape()
    (count,) = site.static(1)
    starts, ends = site.cast(site.x(1), "int64"), site.cast(site.x(2), "int64")
    step = site.cast(site.x(4), "int64") if site.has(4) else const([1] * count, "int64")
    zero, one = const(0, "int64"), const(1, "int64")
    if axes is None and site.has(3):
        given = site.cast(site.x(3), "int64")
        starts, ends, step = (
            _spread(site, given, t, len(dims), default)
            for t, default in ((starts, 0), (ends, (1 << 63) - 1), (step, 1))
        )
        axes = list(range(len(dims)))
    axes = [normal_axis(a, len(dims)) for a in (axes if axes is not None else range(count))]
    sizes = site.shape_tensor([dims[a] for a in axes])
    forward = site.emit(relax.op.greater(step, zero))

    def clamp(bound: tvm.ir.Expr) -> tvm.ir.Expr:
        wide = site.cast(bound, "int64")
        wide = relax.op.where(relax.op.less(wide, zero), relax.op.add(wide, sizes), wide)
        low = relax.op.where(forward, zero, const(-1, "int64"))
        high = relax.op.where(forward, sizes, relax.op.subtract(sizes, one))
        return site.emit(relax.op.minimum(relax.op.maximum(wide, low), high))

    first, last = clamp(starts), clamp(ends)
    up = relax.op.subtract(relax.op.subtract(last, first), relax.op.where(forward, one, const(-1, "int64")))
    length = site.emit(relax.op.maximum(relax.op.add(relax.op.floor_divide(up, step), one), zero))
    promised = site.promised().static
    if promised is not None:
        expected = const(np.array([promised[a] for a in axes], np.int64), "int64")
        site.require(site.emit(relax.op.equal(length, expected)))
        out: list[Dim] = list(promised)
    else:
        out = list(dims)
        for axis, dim in zip(axes, site.runtime_dims(length, "slice"), strict=True):
            out[axis] = dim

    def compute(data: te.Tensor, begin: te.Tensor, stride: te.Tensor) -> te.Tensor:
        def element(*index: tirx.Var) -> tirx.Expr:
            where = list(index)
            for place, axis in enumerate(axes):
                where[axis] = begin[place] + where[axis] * stride[place]
            return data(*where)

        return te.compute(tuple(int64(d) for d in out), element, name="slice")

    return site.te(compute, site.x(), first, step, name="slice")


def _spread(site: Site, axes: tvm.ir.Expr, values: tvm.ir.Expr, rank: int, default: int) -> tvm.ir.Expr:
    """One value for each axis of a tensor: `values` at the axes that a runtime tensor names, else `default`."""
    (count,) = shape_of(axes)
    if not isinstance(count, int):
        raise Refuse("the number of its axes is not known")

    def compute(named: te.Tensor, given: te.Tensor) -> te.Tensor:
        def element(i: tirx.Var) -> tirx.Expr:
            value = tirx.const(default, "int64")
            for j in range(count):
                value = tirx.Select(tirx.any(named[j] == i, named[j] + rank == i), given[j], value)
            return value

        return te.compute((tirx.IntImm("int64", rank),), lambda i: element(i), name="spread")

    return site.te(compute, axes, values, name="spread_axes")


@converts("Split")
def split(site: Site) -> Result:
    axis = site.axis()
    size = site.shape()[axis]
    count = site.outputs
    sizes = site.attr("split") if site.opset < 13 else None
    if site.opset >= 13 and site.has(1):
        sizes = site.ints(1)
        if sizes is None:
            promised = [site.promised(i).static for i in range(count)]
            if any(p is None for p in promised):
                raise Refuse("its sizes are computed at run time")
            sizes = [p[axis] for p in promised if p is not None]
            site.require_content(1, sizes)
    if count == 1:
        return site.value(0)
    if sizes is None and not isinstance(size, int):
        promised_size = site.promised(0).static
        if promised_size is None or (count != 1 and "num_outputs" in site.attrs):
            raise Refuse("a dynamic axis is split evenly")
        sizes = [promised_size[axis]] * count
    if sizes is None:
        part = -(-size // count)
        sizes = [max(0, min(part, size - i * part)) for i in range(count)]
    if isinstance(size, int) and sum(sizes) != size:
        raise Refuse(f"its sizes add up to {sum(sizes)}, the axis has {size}")
    if count == 1:
        return site.value(0)
    pieces, begin = [], 0
    for part in sizes:
        pieces.append(site.emit(relax.op.strided_slice(site.x(), [axis], [begin], [begin + int(part)])))
        begin += int(part)
    return pieces


@converts("Tile")
def tile(site: Site) -> Result:
    dims = site.shape()
    if site.opset < 6:
        tiles, axis = site.array(1), site.array(2)
        if tiles is None or axis is None:
            raise Refuse("its counts are computed at run time")
        repeats: Sequence[Dim] = [int(tiles) if i == int(axis) else 1 for i in range(len(dims))]
    else:
        found = site.content(1)
        promised = site.promised().static
        if found is None and promised is not None and all(isinstance(d, int) and d > 0 for d in dims):
            found = tuple(out // int(d) for out, d in zip(promised, dims, strict=True))
            site.require_content(1, found)
        repeats = found if found is not None else site.runtime_dims(site.x(1), "repeats")
    if any(isinstance(d, int) and d == 0 for d in (*dims, *repeats)):
        return filled(site, [_times(r, s) for r, s in zip(repeats, dims, strict=True)], 0, site.dtype())
    # Spread and reshape rather than index modulo the size, which LLVM's vectorizer gets wrong with AVX-512.
    spread = [d for r, s in zip(repeats, dims, strict=True) for d in (r, s)]
    apart = reshaped(site, site.x(), [d for s in dims for d in (1, s)])
    return reshaped(site, broadcast(site, apart, spread), [_times(r, s) for r, s in zip(repeats, dims, strict=True)])


def _times(a: Dim, b: Dim) -> Dim:
    return a * b if isinstance(a, int) and isinstance(b, int) else int64(a) * int64(b)


@converts("Pad")
def pad(site: Site) -> Result:
    dims = site.shape()
    rank = len(dims)
    mode = site.attr("mode", "constant")
    dtype = site.dtype()
    fill: tvm.ir.Expr = const(0, dtype)
    if site.opset < 11:
        pads: Sequence[Dim] = list(site.attr("pads", site.attr("paddings", [])))
        axes = list(range(rank))
        fill = const(site.attr("value", 0.0), dtype)
    else:
        axes = list(range(rank))
        if site.has(3):
            known = site.ints(3)
            if known is None:
                return _pad_runtime_axes(site)
            axes = [normal_axis(a, rank) for a in known]
        if site.has(2):
            fill = site.x(2)
        content = site.content(1)
        pads = content if content is not None else _runtime_pads(site, site.x(1), 2 * len(axes))
    half = len(axes)
    before: list[Dim] = [0] * rank
    after: list[Dim] = [0] * rank
    for place, axis in enumerate(axes):
        before[axis], after[axis] = pads[place], pads[half + place]
    out = tuple(int64(d) + int64(b) + int64(a) for d, b, a in zip(dims, before, after, strict=True))
    zero = tirx.IntImm("int64", 0)

    def source(axis: int, index: tirx.Expr) -> tirx.Expr:
        """Where an element comes from along one axis; outside the input for mode constant."""
        size, at = int64(dims[axis]), index - int64(before[axis])
        if mode == "edge":
            return tirx.max(zero, tirx.min(size - 1, at))
        if mode == "wrap":
            return tirx.floormod(at, size)
        if mode == "reflect":
            period = tirx.max(2 * (size - 1), tirx.IntImm("int64", 1))
            at = tirx.floormod(at, period)
            return tirx.min(at, period - at) if not (isinstance(dims[axis], int) and dims[axis] == 1) else zero
        return at

    def padded(axis: int) -> bool:
        return not all(isinstance(p, int) and p == 0 for p in (before[axis], after[axis]))

    def compute(data: te.Tensor, value: te.Tensor) -> te.Tensor:
        def element(*index: tirx.Var) -> tirx.Expr:
            at = [source(a, i) if padded(a) else i for a, i in enumerate(index)]
            if mode != "constant":
                return data(*at)
            inside = [tirx.all(v >= 0, v < int64(dims[a])) for a, v in enumerate(at) if padded(a)]
            constant = value(*([0] * len(value.shape)))
            if any(isinstance(d, int) and d == 0 for d in dims):
                return constant
            return tirx.if_then_else(tirx.all(*inside), data(*at), constant) if inside else data(*at)

        return te.compute(out, element, name="pad")

    if mode not in ("constant", "edge", "reflect", "wrap"):
        raise Refuse(f"mode {mode!r} is unknown")
    plain = [number(p) for p in (*before, *after)]
    scalar = constant_of(fill)
    if mode == "constant" and scalar is not None and all(isinstance(p, int) and p >= 0 for p in plain):
        if not any(plain):
            return site.value(0)
        widths = [w for a in range(rank) for w in (int(plain[a]), int(plain[rank + a]))]
        if dtype.startswith("float") and all(d != 0 for d in dims):
            return relax.op.nn.pad(site.x(), widths, "constant", float(scalar.reshape(-1)[0]))
    return site.te(compute, site.x(), fill, name="pad")


def _runtime_pads(site: Site, tensor: tvm.ir.Expr, length: int) -> list[Dim]:
    """Pads that arrive at run time as symbolic numbers."""
    tensor = site.cast(tensor, "int64")
    if shape_of(tensor) != (length,):
        tensor = site.bb.match_cast(tensor, relax.TensorType([length], "int64"))
    return site.runtime_dims(tensor, "pads")


def _pad_runtime_axes(site: Site) -> Result:
    """Pad with axes that arrive at run time, as a Pad of all axes."""
    rank = site.rank()
    (count,) = site.static(3)
    axes, pads = site.cast(site.x(3), "int64"), site.cast(site.x(1), "int64")
    halves = [site.emit(relax.op.strided_slice(pads, [0], [i * count], [(i + 1) * count])) for i in range(2)]
    spread = [_spread(site, axes, half, rank, 0) for half in halves]
    whole = _runtime_pads(site, site.emit(relax.op.concat(spread, 0)), 2 * rank)
    inputs = [site.inputs[0], Value(spread[0], tuple(whole)), site.inputs[2] if len(site.inputs) > 2 else None]
    return pad(dataclasses.replace(site, inputs=inputs))


@converts("Cast", "CastLike")
def cast(site: Site) -> Result:
    from .elementwise import cast_to
    from .site import onnx_dtype

    target = site.dtype(1) if site.op == "CastLike" else onnx_dtype(int(site.attr("to")))
    value = site.value(0)
    if value.content is not None and target in ("int32", "int64"):
        return content_value(site, value.content, target, site.static())
    return cast_to(site, value.expr, target, bool(site.attr("saturate", 1)))


@converts("Gather")
def gather(site: Site) -> Result:
    axis = site.axis()
    size = site.shape()[axis]
    content, indices = site.content(0), site.ints(1)
    if content is not None and site.rank() == 1 and indices is not None and site.rank(1) <= 1:
        picked = [content[i] for i in indices]
        return content_value(site, picked, site.dtype(), site.static(1))
    index = site.cast(site.x(1), "int64") if not isinstance(size, int) else site.x(1)
    known = site.array(1)
    if known is not None and isinstance(size, int):
        if known.size and (known.max() >= size or known.min() < -size):
            raise Refuse("an index is out of range")
        fixed = const(np.where(known < 0, known + size, known), site.dtype(1))
        return relax.op.take(site.x(), fixed, axis)
    return site.te(lambda data, where: _gather(data, where, axis), site.x(), index, name="gather")


def _gather(data: te.Tensor, indices: te.Tensor, axis: int) -> te.Tensor:
    """numpy.take with negative indices; indices out of range are brought to the nearest valid one."""
    rank = len(indices.shape)
    out = [*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]]
    size = data.shape[axis].astype("int64")

    def element(*index: tirx.Var) -> tirx.Expr:
        at = indices(*index[axis : axis + rank]).astype("int64")
        at = tirx.Select(at < 0, at + size, at)
        at = tirx.max(tirx.min(at, size - 1), tirx.IntImm("int64", 0))
        return data(*index[:axis], at, *index[axis + rank :])

    return te.compute(tuple(out), element, name="gather")


@converts("DepthToSpace", "SpaceToDepth")
def depth_space(site: Site) -> Result:
    batch, channels, height, width = site.shape()
    block = int(site.attr("blocksize"))
    columns_first = site.attr("mode", "DCR") == "CRD"
    if site.op == "DepthToSpace":
        depth = _over(channels, block * block)
        inner = [depth, block, block] if columns_first else [block, block, depth]
        apart = reshaped(site, site.x(), [batch, *inner, height, width])
        order = [0, 1, 4, 2, 5, 3] if columns_first else [0, 3, 4, 1, 5, 2]
        joined = [batch, depth, _times(block, height), _times(block, width)]
    else:
        rows, columns = _over(height, block), _over(width, block)
        apart = reshaped(site, site.x(), [batch, channels, rows, block, columns, block])
        order = [0, 1, 3, 5, 2, 4] if columns_first else [0, 3, 5, 1, 2, 4]
        joined = [batch, _times(block * block, channels), rows, columns]
    return reshaped(site, site.emit(relax.op.permute_dims(apart, order)), joined)


def _over(size: Dim, parts: int) -> Dim:
    if isinstance(size, int):
        if size % parts:
            raise Refuse(f"size {size} does not divide by {parts}")
        return size // parts
    return tirx.floordiv(int64(size), parts)
