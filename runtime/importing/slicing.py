"""Operators that cut, repeat, pad or pick parts of a tensor, by bounds that may be symbolic or arrive at run time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import tvm
from tvm import relax, te, tirx

from ..kernels.reductions import gather_rows
from .block_weights import gathered
from .kernels import call, for_kernels, named
from .shapes import broadcast, content_value, filled, reshaped
from .site import (
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
    normal_axis,
    number,
    product,
    same,
    shape_of,
)
from .stored import stored_bits, stored_weight


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
        raise Unfixed("a dynamic axis is sliced with a step")
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
        raise Unfixed("the number of its axes is not known")

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
                raise Unfixed("its sizes are computed at run time")
            sizes = [p[axis] for p in promised if p is not None]
            site.require_content(1, sizes)
    if count == 1:
        return site.value(0)
    if sizes is None and not isinstance(size, int):
        promised_size = site.promised(0).static
        if promised_size is None or (count != 1 and "num_outputs" in site.attrs):
            raise Unfixed("a dynamic axis is split evenly")
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
            raise Unfixed("its counts are computed at run time")
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


CODES = ("int8", "uint8")  # types of tables whose rows a kernel takes, beside float32


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
    site.require_source(size, product(site.shape(1)))
    if axis == 0 and (rows := gathered(site, index)) is not None:
        return rows
    stored = stored_weight(site, 0)
    if stored is not None:
        bits, widen = stored_bits(stored)
        return site.te(lambda data, where: _gather(data, where, axis, widen), bits, index, name="gather")
    behind = site.shape()[axis + 1 :]
    kind = site.dtype()
    numbers = for_kernels(site, 0) or (site.target.is_cpu and kind in CODES)
    if axis == 0 and numbers and all(isinstance(d, int) for d in behind) and product(behind) != 1:
        row, chosen = product(behind), site.shape(1)
        ((height,), places) = named([size], chosen)
        kernel = gather_rows(
            height, int(row), places, dtype_of(index), site.target.isa, site.target.cores, dtype=kind
        )
        picked = call(site, kernel, [reshaped(site, site.x(), [size, row]), index], [*chosen, row], kind)
        return reshaped(site, picked, [*chosen, *behind])
    return site.te(lambda data, where: _gather(data, where, axis), site.x(), index, name="gather")


def _gather(
    data: te.Tensor, indices: te.Tensor, axis: int, made: Callable[[tirx.Expr], tirx.Expr] = lambda element: element
) -> te.Tensor:
    """numpy.take with negative indices; indices out of range are brought to the nearest valid one. made: of each
    element that is taken."""
    rank = len(indices.shape)
    out = [*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]]
    size = data.shape[axis].astype("int64")

    def element(*index: tirx.Var) -> tirx.Expr:
        at = indices(*index[axis : axis + rank]).astype("int64")
        at = tirx.Select(at < 0, at + size, at)
        at = tirx.max(tirx.min(at, size - 1), tirx.IntImm("int64", 0))
        return made(data(*index[:axis], at, *index[axis + rank :]))

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
