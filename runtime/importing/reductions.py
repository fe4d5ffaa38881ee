"""Reductions, cumulative operators, arg max and min, softmax and its relatives, top k."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx

from ..kernels import two_pass_softmax
from ..kernels.log_softmax import log_softmax, log_sum_exp
from ..kernels.reductions import EXACT, place_of_greatest
from ..kernels.reductions import reduction as reduction_kernel
from ..kernels.softmax_columns import softmax_columns
from ..kernels.top_k import MOST
from ..kernels.top_k import top_k as top_k_kernel
from .kernels import call, calls, named
from .shapes import filled, reshaped
from .site import (
    NARROW_FLOATS,
    Dim,
    Refuse,
    Result,
    Site,
    Unfixed,
    Value,
    const,
    converts,
    dtype_of,
    int64,
    is_float,
    is_unsigned,
    normal_axis,
    np_dtype,
    product,
    shape_of,
)

CHOICES = 24  # forms of an operator that may be computed side by side when an axis arrives at run time


def chosen(site: Site, options: Sequence[tuple[tvm.ir.Expr, Callable[[], tvm.ir.Expr]]]) -> tvm.ir.Expr:
    """The result of the option whose condition, a boolean scalar, holds at run time; an error when none does."""
    if not options or len(options) > CHOICES:
        raise Unfixed("its axes are computed at run time")
    any_of = options[0][0]
    for condition, _ in options[1:]:
        any_of = site.emit(relax.op.logical_or(any_of, condition))
    site.require(any_of)
    result = site.emit(options[0][1]())
    for condition, make in options[1:]:
        result = site.emit(relax.op.where(condition, site.emit(make()), result))
    return result


def axis_mask(site: Site, axes: tvm.ir.Expr, rank: int) -> tvm.ir.Expr:
    """A boolean vector: which axes a runtime tensor of axes names, negative ones counted from the end."""
    axes = site.cast(axes, "int64")
    (count,) = shape_of(axes) if shape_of(axes) else (None,)
    if count is None:
        axes, count = site.emit(relax.op.reshape(axes, [1])), 1
    if not isinstance(count, int):
        raise Unfixed("the number of its axes is not known")

    def compute(given: te.Tensor) -> te.Tensor:
        def named(i: tirx.Var) -> tirx.Expr:
            hits = [tirx.any(given[j] == i, given[j] + rank == i) for j in range(count)]
            return tirx.any(*hits) if hits else tirx.const(False, "bool")

        return te.compute((tirx.IntImm("int64", rank),), lambda i: named(i), name="axis_mask")

    return site.te(compute, axes, name="axis_mask")


def is_mask(site: Site, mask: tvm.ir.Expr, axes: Sequence[int]) -> tvm.ir.Expr:
    """Whether a mask names exactly these axes."""
    (rank,) = shape_of(mask)
    wanted = np.array([i in axes for i in range(int(rank))])
    equal = relax.op.equal(site.cast(mask, "int8"), const(wanted, "int8"))
    return site.cast(site.emit(relax.op.min(site.cast(equal, "int8"))), "bool")


def reduced(site: Site, x: tvm.ir.Expr, axes: Sequence[int], kind: str) -> tvm.ir.Expr:
    """sum, prod, max or min over axes, which stay as size 1. Small floats are added up in float32."""
    dtype = dtype_of(x)
    if not axes:
        return x
    ours = _by_kernel(site, x, axes, kind)
    if ours is not None:
        return ours
    if kind in ("sum", "prod"):
        wide = site.cast(x, "float32") if dtype in ("float16", "bfloat16") else x
        op = relax.op.sum if kind == "sum" else relax.op.prod
        return site.cast(site.emit(op(wide, list(axes), keepdims=True)), dtype)
    if dtype == "bool":
        return site.cast(reduced(site, site.cast(x, "int8"), axes, kind), "bool")
    if not is_float(dtype):
        return site.emit((relax.op.max if kind == "max" else relax.op.min)(x, list(axes), keepdims=True))
    if dtype in NARROW_FLOATS:
        return site.cast(reduced(site, site.cast(x, "float32"), axes, kind), dtype)
    if len(parts := _neighbours(axes)) > 1:
        for part in parts:
            x = reduced(site, x, part, kind)
        return x
    # TIR's own maximum starts from the least finite number, which is wrong for a row of infinities.
    start = float("-inf") if kind == "max" else float("inf")
    dims = shape_of(x)
    if any(isinstance(dims[a], int) and dims[a] == 0 for a in axes):
        return filled(site, [1 if i in axes else d for i, d in enumerate(dims)], start, dtype)
    pick = tirx.max if kind == "max" else tirx.min
    reducer = te.comm_reducer(lambda a, b: pick(a, b), lambda t: tirx.const(start, t), name=kind)

    def compute(data: te.Tensor) -> te.Tensor:
        over = {a: te.reduce_axis((0, data.shape[a]), name=f"k{a}") for a in axes}
        out = tuple(tirx.IntImm("int64", 1) if i in over else d for i, d in enumerate(data.shape))

        def element(*index: tirx.Var) -> tirx.Expr:
            at = [over.get(i, v) for i, v in enumerate(index)]
            return reducer(data(*at), axis=list(over.values()))

        return te.compute(out, element, name=f"reduce_{kind}")

    return site.te(compute, x, name=f"reduce_{kind}")


def _neighbours(axes: Sequence[int]) -> list[list[int]]:
    """The axes in groups of those that follow each other."""
    parts: list[list[int]] = []
    for axis in sorted(axes):
        if parts and parts[-1][-1] == axis - 1:
            parts[-1].append(axis)
        else:
            parts.append([axis])
    return parts


def _by_kernel(site: Site, x: tvm.ir.Expr, axes: Sequence[int], kind: str) -> tvm.ir.Expr | None:
    """A float32 reduction over neighbouring axes by our kernel; None where it is not for that form."""
    if not site.target.is_cpu or dtype_of(x) != "float32" or kind not in ("sum", "mean", "max", "min"):
        return None
    first, last = min(axes), max(axes) + 1
    dims = shape_of(x)
    if last - first != len(set(axes)) or not all(isinstance(d, int) for d in dims[last:]):
        return None
    (shape,) = named(dims)
    behind = tuple(int(d) for d in dims[last:])
    kernel = reduction_kernel(kind, shape[:first], shape[first:last], behind, site.target.isa, site.target.cores)
    return call(site, kernel, [x], [1 if first <= i < last else d for i, d in enumerate(dims)])


def mean(site: Site, x: tvm.ir.Expr, axes: Sequence[int]) -> tvm.ir.Expr:
    """The mean over axes, which stay as size 1; integers round towards 0."""
    dtype = dtype_of(x)
    ours = _by_kernel(site, x, axes, "mean") if axes else None
    if ours is not None:
        return ours
    if is_float(dtype):
        wide = site.cast(x, "float32") if dtype in ("float16", "bfloat16") else x
        return site.cast(site.emit(relax.op.mean(wide, list(axes), keepdims=True)), dtype)
    total = reduced(site, x, axes, "sum")
    count = product([shape_of(x)[a] for a in axes])

    def compute(data: te.Tensor) -> te.Tensor:
        size = int64(count).astype(dtype)
        return te.compute(data.shape, lambda *i: tirx.truncdiv(data(*i), size), name="mean")

    return site.te(compute, total, name="mean")


def _sum_exp(site: Site, x: tvm.ir.Expr, axes: Sequence[int]) -> tvm.ir.Expr:
    """log(sum(exp(x))), shifted by the maximum where that is finite."""
    dtype, dims = dtype_of(x), shape_of(x)
    first = min(axes, default=0)
    if site.target.is_cpu and dtype == "float32" and sorted(axes) == list(range(first, len(dims))) and axes:
        rows, length = dims[:first] or (1,), product(dims[first:])
        ((*before, row),) = named((*rows, length))
        kernel = log_sum_exp(before, row, site.target.isa, site.target.cores)
        y = call(site, kernel, [reshaped(site, x, [*rows, length])], rows)
        return reshaped(site, y, [*dims[:first], *([1] * len(axes))])
    top = reduced(site, x, axes, "max")
    top = site.emit(relax.op.where(relax.op.isfinite(top), top, const(0, dtype)))
    total = reduced(site, site.emit(relax.op.exp(relax.op.subtract(x, top))), axes, "sum")
    return site.emit(relax.op.add(relax.op.log(total), top))


def reduction(site: Site, x: tvm.ir.Expr, axes: Sequence[int]) -> tvm.ir.Expr:
    """What one of ONNX's Reduce operators computes, the axes kept as size 1."""
    dtype = dtype_of(x)
    kind = site.op.removeprefix("Reduce")
    if kind in ("Sum", "Prod", "Max", "Min"):
        return reduced(site, x, axes, kind.lower())
    if kind == "Mean":
        return mean(site, x, axes) if axes else x
    wide = x if is_float(dtype) and dtype != "float16" else site.cast(x, "float32" if dtype == "float16" else "float64")
    if kind == "L1":
        absolute = x if is_unsigned(dtype) else site.emit(relax.op.abs(x))
        return reduced(site, absolute, axes, "sum")
    if kind == "SumSquare":
        return reduced(site, site.emit(relax.op.multiply(x, x)), axes, "sum")
    if kind == "L2":
        return site.cast(relax.op.sqrt(reduced(site, site.emit(relax.op.multiply(wide, wide)), axes, "sum")), dtype)
    if kind == "LogSum":
        return site.cast(relax.op.log(reduced(site, wide, axes, "sum")), dtype)
    if kind == "LogSumExp":
        return site.cast(_sum_exp(site, wide, axes), dtype)
    raise Refuse(f"{site.op} is unknown")


@converts(
    "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
    "ReduceLogSumExp", "ReduceSumSquare",
)  # fmt: skip
def reduce(site: Site) -> Result:
    dims = site.shape()
    rank = len(dims)
    keep = bool(site.attr("keepdims", 1))
    by_input = site.opset >= (13 if site.op == "ReduceSum" else 18)
    axes: Sequence[int] | None = site.attr("axes")
    if by_input:
        axes = None
        if site.has(1):
            if site.shape(1) == (0,):
                axes = []
            else:
                axes = site.ints(1)
                if axes is None:
                    return _runtime_axes(site, keep)
        if not axes and site.attr("noop_with_empty_axes", 0):
            # Nothing is reduced, but what happens to each element does.
            return reduction(site, site.x(), [])
    over = sorted({normal_axis(int(a), rank) for a in axes}) if axes else list(range(rank))
    if site.op == "ReduceMean" and over == list(range(2, rank)):
        from .pooling import global_pool, templated

        if templated(site):
            return squeezed(site, global_pool(site, "mean"), over, keep)
    return squeezed(site, reduction(site, site.x(), over), over, keep)


def squeezed(site: Site, expr: tvm.ir.Expr, axes: Sequence[int], keep: bool) -> tvm.ir.Expr:
    """Without the axes of size 1 that a reduction left, unless they are kept."""
    expr = site.emit(expr)
    return expr if keep else reshaped(site, expr, [d for i, d in enumerate(shape_of(expr)) if i not in axes])


def _runtime_axes(site: Site, keep: bool) -> Result:
    """Axes that arrive at run time: every set of axes that gives the promised shape is an option."""
    dims, promised = site.shape(), site.promised().shape
    (count,) = site.static(1)
    if promised is None:
        raise Unfixed("its axes are computed at run time")
    mask = axis_mask(site, site.x(1), len(dims))
    options = []
    for axes in itertools.combinations(range(len(dims)), count):
        left = [1 if i in axes else d for i, d in enumerate(dims) if keep or i not in axes]
        if len(left) != len(promised):
            continue
        if any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(left, promised, strict=True)):
            continue
        condition = is_mask(site, mask, axes)
        options.append((condition, lambda axes=axes: squeezed(site, reduction(site, site.x(), axes), axes, keep)))
    return chosen(site, options)


# Arg max and min, sorting.


@converts("ArgMax", "ArgMin")
def arg(site: Site) -> Result:
    if site.rank() == 0:
        return const(0, "int64")
    axis = site.axis()
    x = site.x()
    if site.dtype() == "bool":
        x = site.cast(x, "int8")
    last = bool(site.attr("select_last_index", 0))
    largest = site.op == "ArgMax"
    keep = bool(site.attr("keepdims", 1))
    dims = shape_of(x)
    length = dims[axis]
    if (
        site.target.is_cpu and dtype_of(x) == "float32" and not last and axis == len(dims) - 1
        and isinstance(length, int) and 1 <= length <= EXACT
    ):  # fmt: skip
        (rows,) = named(dims[:axis])
        kernel = place_of_greatest(rows, length, site.target.isa, site.target.cores, not largest)
        places = call(site, kernel, [x], dims[:axis], "int64")
        return reshaped(site, places, [*dims[:axis], 1]) if keep else places
    dtype = dtype_of(x)
    low = float("-inf") if is_float(dtype) else np.iinfo(np_dtype(dtype)).min
    high = float("inf") if is_float(dtype) else np.iinfo(np_dtype(dtype)).max
    start = tirx.const(low if largest else high, dtype)

    def better(a: Any, b: Any) -> tuple[tirx.Expr, tirx.Expr]:
        wins = a[1] > b[1] if largest else a[1] < b[1]
        tie = a[1] == b[1]
        first = tirx.any(wins, tirx.all(tie, a[0] > b[0] if last else a[0] < b[0]))
        # The neutral index -1 always loses a tie.
        first = tirx.any(b[0] < 0, tirx.all(first, a[0] >= 0))
        return tirx.Select(first, a[0], b[0]), tirx.Select(first, a[1], b[1])

    reducer = te.comm_reducer(better, lambda t0, t1: (tirx.const(-1, t0), start), name="arg")

    def compute(data: te.Tensor) -> te.Tensor:
        k = te.reduce_axis((0, data.shape[axis]), name="k")
        out = tuple(d for i, d in enumerate(data.shape) if i != axis)

        def element(*index: tirx.Var) -> Any:
            at = [*index[:axis], k, *index[axis:]]
            return reducer((k.var.astype("int64"), data(*at)), axis=k)

        return te.compute(
            out or (tirx.IntImm("int64", 1),), (lambda *i: element(*i)) if out else (lambda i: element()), name="arg"
        )[0]

    found = site.te(compute, x, name=site.op.lower())
    return reshaped(site, found, [1 if i == axis else d for i, d in enumerate(dims) if keep or i != axis])


@converts("TopK")
def top_k(site: Site) -> Result:
    axis = site.axis(-1)
    size = site.shape()[axis]
    if site.opset < 10:
        count: int | None = int(site.attr("k"))
    else:
        found = site.ints(1)
        count = found[0] if found else None
    if count is None:
        promised = site.promised().static
        if promised is None:
            raise Unfixed("k is computed at run time")
        count = promised[axis]
        site.require_content(1, [count])
    if isinstance(size, int) and count > size:
        raise Refuse(f"k is {count}, the axis has {size}")
    if not isinstance(size, int):
        site.require_dims([size], [tirx.max(size, int64(count))])
    dtype = site.dtype()
    if dtype in ("float16", "bfloat16", "int8", "uint8", "int16", "uint16"):
        wide = "float32" if is_float(dtype) else "int32"
        values, indices = _top_k(site, site.cast(site.x(), wide), count, axis)
        return [site.cast(values, dtype), indices]
    if dtype in ("uint32", "uint64"):
        raise Refuse(f"TVM sorts no {dtype}")
    return list(_top_k(site, site.x(), count, axis))


def _top_k(site: Site, x: tvm.ir.Expr, count: int, axis: int) -> tuple[tvm.ir.Expr, tvm.ir.Expr]:
    largest, dims = bool(site.attr("largest", 1)), shape_of(x)
    length = dims[-1]
    if site.target.is_cpu and dtype_of(x) == "float32" and axis == len(dims) - 1 and isinstance(length, int) and (
        1 <= count <= min(MOST, length)
    ):  # fmt: skip
        (rows,) = named(dims[:-1])
        kernel = top_k_kernel(rows, length, count, site.target.isa, site.target.cores, not largest)
        out = [*dims[:-1], count]
        values, places = calls(site, kernel, [x], [(out, "float32"), (out, "int64")])
        return values, places
    both = site.emit(relax.op.topk(x, count, axis, "both", largest, "int64"))
    return site.emit(relax.TupleGetItem(both, 0)), site.emit(relax.TupleGetItem(both, 1))


# Cumulative operators.


@converts("CumSum", "CumProd")
def cumulative(site: Site) -> Result:
    rank = site.rank()
    axes = site.ints(1)
    if axes is not None:
        return _cumulative(site, normal_axis(axes[0], rank))
    mask = axis_mask(site, site.x(1), rank)
    return chosen(site, [(is_mask(site, mask, [a]), functools.partial(_cumulative, site, a)) for a in range(rank)])


def _cumulative(site: Site, axis: int) -> tvm.ir.Expr:
    """A running sum or product along an axis, by te.scan's plain form: one pass over each row."""
    exclusive, reverse = bool(site.attr("exclusive", 0)), bool(site.attr("reverse", 0))
    dtype = site.dtype()
    x = site.x()
    if reverse:
        x = site.emit(relax.op.flip(x, axis))
    op = relax.op.cumsum if site.op == "CumSum" else relax.op.cumprod
    result = site.emit(op(x, axis, dtype=dtype, exclusive=exclusive))
    return site.emit(relax.op.flip(result, axis)) if reverse else result


# Softmax and its relatives.


def _coerced(site: Site, x: tvm.ir.Expr) -> tuple[tvm.ir.Expr, int, Sequence[Dim]]:
    """Input, axis and shape to return to: before version 13 the input was flattened to a matrix at the axis."""
    if site.opset >= 13:
        return x, site.axis(-1), site.shape()
    axis, dims = site.axis(1), site.shape()
    return reshaped(site, x, [product(dims[:axis]), product(dims[axis:])]), 1, dims


@converts("Softmax", "LogSoftmax")
def softmax(site: Site) -> Result:
    """On a CPU small floats are read and written by the kernel, unless the input is known before it was rounded.

    What computes in float32 behind it gets a kernel of its own, which does not round; of the two only those that
    somebody reads are left.
    """
    dtype = site.dtype()
    if site.rank() == 0:
        return const(1.0 if site.op == "Softmax" else 0.0, dtype)
    own = site.target.is_cpu and (dtype == "float32" or dtype in NARROW_FLOATS)
    unrounded = site.value(0).wide
    x, axis, dims = _coerced(site, site.widened() if unrounded is not None or not own else site.x())
    if not own:
        y = site.emit((relax.op.nn.softmax if site.op == "Softmax" else relax.op.nn.log_softmax)(x, axis))
        return site.narrowed(reshaped(site, y, dims), dtype)
    results = (dtype,) if dtype == "float32" else (dtype, "float32")
    y, *wide = (site.emit(reshaped(site, _softmax_by_kernel(site, x, axis, result), dims)) for result in results)
    return Value(y, wide=wide[0] if wide else None)


def _softmax_by_kernel(site: Site, x: tvm.ir.Expr, axis: int, result: str) -> tvm.ir.Expr:
    """Softmax or LogSoftmax in the element type `result`."""
    if site.op == "Softmax":
        return site.emit(two_pass_softmax.along_axis(site.bb, x, axis, site.target, result=result))
    dims, isa, threads, types = shape_of(x), site.target.isa, site.target.cores, (dtype_of(x), result)
    if product(dims[axis + 1 :]) == 1:
        rows = dims[: axis + 1]
        (shape,) = named(rows)
        kernel = log_softmax(shape, isa, threads, types=types)
        return call(site, kernel, [reshaped(site, x, rows)], rows, result)
    (shape,) = named(dims)
    outer, length, inner = shape[:axis], shape[axis], shape[axis + 1 :]
    kernel = softmax_columns(outer, length, inner, isa, site.target.caches, threads, log=True, types=types)
    return call(site, kernel, [x], dims, result)


@converts("Hardmax")
def hardmax(site: Site) -> Result:
    x, axis, dims = _coerced(site, site.x())
    inner = Site("ArgMax", site.bb, site.target, 13, [type(site.value(0))(x)], {"axis": axis, "keepdims": 1})
    place = site.emit(arg(inner))
    dtype = dtype_of(x)

    def compute(index: te.Tensor) -> te.Tensor:
        out = tuple(int64(d) for d in shape_of(x))
        one, zero = tirx.const(1, dtype), tirx.const(0, dtype)

        def element(*i: tirx.Var) -> tirx.Expr:
            at = [tirx.IntImm("int64", 0) if a == axis else v for a, v in enumerate(i)]
            return tirx.Select(index(*at) == i[axis].astype("int64"), one, zero)

        return te.compute(out, element, name="hardmax")

    return reshaped(site, site.te(compute, place, name="hardmax"), dims)
