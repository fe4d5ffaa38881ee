"""Operators that pick, place, mark or reorder elements by index."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import relax, te, tirx

from ..kernels.cache import scatter
from .kernels import named
from .shapes import reshaped
from .site import (
    Dim,
    Result,
    Site,
    Unfixed,
    converts,
    int64,
    onnx_dtype,
    product,
)


def zero() -> tirx.Expr:
    return tirx.IntImm("int64", 0)


def wrapped(index: tirx.Expr, size: Dim) -> tirx.Expr:
    """An index counted from 0, negative ones from the end; out of range ones brought to the nearest."""
    wide = index.astype("int64")
    wide = tirx.Select(wide < 0, wide + int64(size), wide)
    return tirx.max(tirx.min(wide, int64(size) - 1), zero())


@converts("GatherElements")
def gather_elements(site: Site) -> Result:
    axis = site.axis()
    size = site.shape()[axis]
    site.require_source(size, product(site.shape(1)))

    def compute(data: te.Tensor, indices: te.Tensor) -> te.Tensor:
        def element(*i: tirx.Var) -> tirx.Expr:
            return data(*i[:axis], wrapped(indices(*i), size), *i[axis + 1 :])

        return te.compute(tuple(indices.shape), element, name="gather_elements")

    return site.te(compute, site.x(0), site.x(1), name="gather_elements")


@converts("GatherND")
def gather_nd(site: Site) -> Result:
    dims, where = site.shape(0), site.shape(1)
    batch = int(site.attr("batch_dims", 0))
    depth = where[-1]
    if not isinstance(depth, int):
        raise Unfixed("the length of its index tuples is not known")
    out = [*where[:-1], *dims[batch + depth :]]
    inner = len(where) - 1
    for size in dims[batch : batch + depth]:
        site.require_source(size, product(where[:-1]))

    def compute(data: te.Tensor, indices: te.Tensor) -> te.Tensor:
        def element(*i: tirx.Var) -> tirx.Expr:
            at = [wrapped(indices(*i[:inner], k), dims[batch + k]) for k in range(depth)]
            return data(*i[:batch], *at, *i[inner:])

        return te.compute(tuple(int64(d) for d in out), element, name="gather_nd")

    if not out:
        flat = site.te(
            lambda data, indices: te.compute(
                (tirx.IntImm("int64", 1),),
                lambda _: data(*(wrapped(indices(k), dims[k]) for k in range(depth))),
                name="gather_nd",
            ),
            site.x(0),
            site.x(1),
            name="gather_nd",
        )
        return reshaped(site, flat, [])
    return site.te(compute, site.x(0), site.x(1), name="gather_nd")


@converts("OneHot")
def one_hot(site: Site) -> Result:
    """Indices may be negative; those out of range give a row of off values."""
    rank = site.rank()
    axis = int(site.attr("axis", -1))
    axis = axis + rank + 1 if axis < 0 else axis
    found = site.array(1)
    if found is not None:
        depth: Dim = int(found.reshape(-1)[0])
    else:
        promised = site.promised().static
        if promised is None:
            raise Unfixed("its depth is computed at run time")
        depth = promised[axis]
        site.require_content(1, [depth])
    dims = site.shape()
    out = [*dims[:axis], depth, *dims[axis:]]

    def compute(indices: te.Tensor, values: te.Tensor) -> te.Tensor:
        def element(*i: tirx.Var) -> tirx.Expr:
            index = indices(*i[:axis], *i[axis + 1 :]).astype("int64")
            index = tirx.Select(index < 0, index + int64(depth), index)
            return tirx.if_then_else(index == i[axis].astype("int64"), values[1], values[0])

        return te.compute(tuple(int64(d) for d in out), element, name="one_hot")

    return site.te(compute, site.x(0), site.x(2), name="one_hot")


@converts("EyeLike")
def eye_like(site: Site) -> Result:
    dtype = onnx_dtype(int(site.attr("dtype"))) if "dtype" in site.attrs else site.dtype()
    offset = int(site.attr("k", 0))
    out = tuple(int64(d) for d in site.shape())
    one, none = tirx.const(1, dtype), tirx.const(0, dtype)

    def compute() -> te.Tensor:
        return te.compute(out, lambda i, j: tirx.Select(j - i == offset, one, none), name="eye")

    return site.te(compute, name="eye")


@converts("Trilu")
def trilu(site: Site) -> Result:
    dtype = site.dtype()
    upper = bool(site.attr("upper", 1))
    rank = site.rank()
    if any(isinstance(d, int) and d == 0 for d in site.shape()):
        return site.value(0)
    offset = site.ints(1) if site.has(1) else [0]

    def keep(i: Sequence[tirx.Var], k: tirx.Expr) -> tirx.Expr:
        across = i[rank - 1].astype("int64") - i[rank - 2].astype("int64")
        return across >= k if upper else across <= k

    if offset is not None:
        fixed = tirx.IntImm("int64", offset[0])
        return site.te(
            lambda data: te.compute(
                data.shape, lambda *i: tirx.if_then_else(keep(i, fixed), data(*i), tirx.const(0, dtype)), name="trilu"
            ),
            site.x(),
            name="trilu",
        )
    k = site.emit(relax.op.reshape(site.cast(site.x(1), "int64"), [1]))
    return site.te(
        lambda data, start: te.compute(
            data.shape, lambda *i: tirx.if_then_else(keep(i, start[0]), data(*i), tirx.const(0, dtype)), name="trilu"
        ),
        site.x(),
        k,
        name="trilu",
    )


@converts("ReverseSequence")
def reverse_sequence(site: Site) -> Result:
    time, batch = int(site.attr("time_axis", 0)), int(site.attr("batch_axis", 1))

    def compute(data: te.Tensor, lengths: te.Tensor) -> te.Tensor:
        def element(*i: tirx.Var) -> tirx.Expr:
            length, at = lengths[i[batch]], i[time].astype("int64")
            source = tirx.Select(at < length, length - 1 - at, at)
            source = tirx.max(tirx.min(source, data.shape[time].astype("int64") - 1), zero())
            return data(*(source if a == time else v for a, v in enumerate(i)))

        return te.compute(data.shape, element, name="reverse_sequence")

    return site.te(compute, site.x(0), site.cast(site.x(1), "int64"), name="reverse_sequence")


@converts("TensorScatter")
def tensor_scatter(site: Site) -> Result:
    """Writes an update of a few steps into a cache, from a position of its own for each batch entry."""
    axis = site.axis(-2)
    circular = site.attr("mode", "linear") == "circular"
    size, steps = site.shape()[axis], site.shape(1)[axis]
    tensors = [site.x(0), site.x(1)]
    if site.has(2):
        tensors.append(site.cast(site.x(2), "int64"))
    if site.in_place and site.target.is_cpu:
        cache, update = named(site.shape(), site.shape(1))
        kernel = scatter(cache, update[axis], axis, site.dtype(), site.target.isa, len(tensors) == 3, circular)
        function = site.bb.add_func(kernel, "cache_scatter")
        arguments = [tensors[0], *(site.emit(x) for x in tensors[1:])]
        return relax.op.call_tir_inplace(function, arguments, 0, site.x(0).ty)

    def compute(cache: te.Tensor, update: te.Tensor, *start: te.Tensor) -> te.Tensor:
        def element(*i: tirx.Var) -> tirx.Expr:
            first = start[0][i[0]] if start else zero()
            step = i[axis].astype("int64") - first
            if circular:
                step = tirx.floormod(step, int64(size))
            written = tirx.all(step >= 0, step < int64(steps))
            return tirx.if_then_else(written, update(*i[:axis], step, *i[axis + 1 :]), cache(*i))

        return te.compute(cache.shape, element, name="tensor_scatter")

    return site.te(compute, *tensors, name="tensor_scatter")
