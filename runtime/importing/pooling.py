"""Poolings of any rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax, te, tirx

from .integers import in_steps, scaled
from .quantization import conv_pads, require_room
from .reductions import mean
from .shapes import reshaped
from .site import NARROW_FLOATS, Dim, Result, Site, Unfixed, const, converts, int64, is_float, np_dtype

MAXIMUM = ("float32", "int8", "uint8")  # types of a greatest element


def pooled_sizes(
    site: Site,
    sizes: Sequence[Dim],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
) -> list[Dim]:
    """Spatial sizes of a pooling's output."""
    require_room(site, sizes, kernel, dilations, before, after)
    out: list[Dim] = []
    for axis, size in enumerate(sizes):
        room = size + before[axis] + after[axis] - dilations[axis] * (kernel[axis] - 1) - 1
        if site.attr("ceil_mode", 0):
            if not isinstance(room, int) or not isinstance(size, int):
                raise Unfixed("ceil_mode on a dynamic axis")
            steps = -(-room // strides[axis]) + 1
            # The last window must start inside the input or its left padding.
            out.append(steps - 1 if (steps - 1) * strides[axis] >= size + before[axis] else steps)
        else:
            out.append(room // strides[axis] + 1 if isinstance(room, int) else tirx.floordiv(room, strides[axis]) + 1)
    return out


def templated(site: Site, types: Sequence[str] = ("float32",)) -> bool:
    """Whether the CPU's pooling templates take this node: two axes, or one of a known size, and known channels. types:
    that the template takes.
    """
    dims = site.shape()
    known = [d for d in dims if isinstance(d, int)]
    sizes = all(isinstance(d, int) for d in dims[1:] if len(dims) == 3) and isinstance(dims[1], int)
    return site.target.is_cpu and site.dtype() in types and len(dims) in (3, 4) and sizes and 0 not in known


def _pool_anchor(
    site: Site, kind: str, out: Sequence[Dim], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int],
    before: Sequence[int], after: Sequence[int], include: bool = False,
) -> Result:  # fmt: skip
    from ..templates import anchor

    rank = len(kernel)

    def two(values: Sequence[int], fill: int) -> list[int]:
        return [fill] * (2 - rank) + [int(v) for v in values]

    parameters = {
        "kind": kind, "kernel": two(kernel, 1), "strides": two(strides, 1), "dilations": two(dilations, 1),
        "pads": two(before, 0), "after": two(after, 0), "include": include,
    }  # fmt: skip
    x, shape = site.x(), list(out)
    operand = in_steps(site, x) if kind == "mean" else None
    if operand is not None:
        x, parameters["zero"] = operand.value, int(operand.zero_point)
    if rank == 1:
        dims = site.shape()
        x, shape = reshaped(site, x, [*dims[:2], 1, dims[2]]), [*shape[:2], 1, shape[2]]
    flops = work(shape, math.prod(kernel))
    y = anchor(site.bb, "pool", parameters, [x], relax.TensorType(shape, site.dtype()), flops)
    y = y if operand is None else scaled(site, y, operand)
    return reshaped(site, y, [*out]) if rank == 1 else y


@converts("GlobalAveragePool")
def global_average_pool(site: Site) -> Result:
    axes = list(range(2, site.rank()))
    if not templated(site):
        return mean(site, site.x(), axes)
    return global_pool(site, "mean")


@converts("GlobalMaxPool")
def global_max_pool(site: Site) -> Result:
    if not templated(site, MAXIMUM):
        return site.emit(relax.op.max(site.x(), list(range(2, site.rank())), keepdims=True))
    return global_pool(site, "max")


def global_pool(site: Site, kind: str) -> Any:
    """Mean or greatest over all axes behind the channels as a template; the axes stay."""
    from ..templates import anchor

    dims = site.shape()
    out = relax.TensorType([*dims[:2], *([1] * (len(dims) - 2))], site.dtype())
    operand = in_steps(site, site.x()) if kind == "mean" else None
    if operand is None:
        return anchor(site.bb, "global-pool", {"kind": kind}, [site.x()], out, work(dims, 1))
    parameters = {"kind": kind, "zero": int(operand.zero_point)}
    return scaled(site, anchor(site.bb, "global-pool", parameters, [operand.value], out, work(dims, 1)), operand)


def work(dims: Sequence[Dim], each: int) -> int:
    """Operations on a tensor, `each` an element; a size that is known only at run time counts as 1."""
    return math.prod(d for d in dims if isinstance(d, int)) * each


@converts("AveragePool")
def average_pool(site: Site) -> Result:
    """Mean of each window; padding counts where count_include_pad says so."""
    dims = site.shape()
    rank = len(dims) - 2
    kernel = [int(k) for k in site.attr("kernel_shape")]
    strides = [int(s) for s in site.attr("strides", [1] * rank)]
    dilations = [int(d) for d in site.attr("dilations", [1] * rank)]
    before, after = conv_pads(site, dims[2:], kernel, strides, dilations)
    out: list[Dim] = [*dims[:2], *pooled_sizes(site, dims[2:], kernel, strides, dilations, before, after)]
    include = bool(site.attr("count_include_pad", 0)) and any((*before, *after))
    if not include and all(isinstance(d, int) for d in dims[2:]):
        # Places of a window behind the input count in none: with ceil_mode it may be far larger than the image.
        reach = [-(-(int(size) + first) // step) for size, first, step in zip(dims[2:], before, dilations, strict=True)]
        kernel = [max(1, min(k, most)) for k, most in zip(kernel, reach, strict=True)]
    if templated(site) and not (include and site.attr("ceil_mode", 0)):
        return _pool_anchor(site, "mean", out, kernel, strides, dilations, before, after, include)
    return window_means(site, out, kernel, strides, dilations, before, after, include)


def window_means(
    site: Site, out: Sequence[Dim], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int],
    before: Sequence[int], after: Sequence[int], include: bool,
) -> Result:  # fmt: skip
    """Any rank; half precision adds up in float32."""
    dims, dtype = site.shape(), site.dtype()
    wide = "float32" if dtype in NARROW_FLOATS else dtype
    zero = tirx.const(0, wide)

    def inside(where: Sequence[Any], whole: bool) -> Any:
        reach = [
            (-before[a] if whole else 0, int64(dims[2 + a]) + (after[a] if whole else 0)) for a in range(len(where))
        ]
        return tirx.all(*(tirx.all(w >= low, w < high) for w, (low, high) in zip(where, reach, strict=True)))

    def places(at: Sequence[Any], window: Sequence[Any]) -> list[Any]:
        return [v * strides[a] + window[a] * dilations[a] - before[a] for a, v in enumerate(at)]

    def compute(data: te.Tensor) -> te.Tensor:
        axes = [te.reduce_axis((0, k), name=f"k{a}") for a, k in enumerate(kernel)]

        def total(n: Any, c: Any, *at: Any) -> tirx.Expr:
            where = places(at, axes)
            value = data(n, c, *where).astype(wide)
            return te.sum(tirx.if_then_else(inside(where, False), value, zero), axis=axes)

        sums = te.compute(tuple(int64(d) for d in out), total, name="window_sum")
        others = [te.reduce_axis((0, k), name=f"j{a}") for a, k in enumerate(kernel)]

        def counted(*at: Any) -> tirx.Expr:
            return te.sum(tirx.Select(inside(places(at, others), include), tirx.const(1, wide), zero), axis=others)

        counts = te.compute(tuple(int64(d) for d in out[2:]), counted, name="window_count")
        return te.compute(
            tuple(int64(d) for d in out),
            lambda n, c, *at: (sums(n, c, *at) / counts(*at)).astype(dtype),
            name="average_pool",
        )

    return site.te(compute, site.x(), name="average_pool")


@converts("MaxPool")
def max_pool(site: Site) -> Result:
    """Any rank and type; padding never wins. The second output is the place of the maximum in the input."""
    dims = site.shape()
    rank = len(dims) - 2
    kernel = [int(k) for k in site.attr("kernel_shape")]
    strides = [int(s) for s in site.attr("strides", [1] * rank)]
    dilations = [int(d) for d in site.attr("dilations", [1] * rank)]
    before, after = conv_pads(site, dims[2:], kernel, strides, dilations)
    out: list[Dim] = [*dims[:2], *pooled_sizes(site, dims[2:], kernel, strides, dilations, before, after)]
    dtype = site.dtype()
    if site.outputs == 1 and templated(site, MAXIMUM):
        return _pool_anchor(site, "max", out, kernel, strides, dilations, before, after)
    low = float("-inf") if is_float(dtype) else int(np.iinfo(np_dtype(dtype)).min)
    least = tirx.const(low, dtype)

    def window_axes() -> list[Any]:
        return [te.reduce_axis((0, k), name=f"k{a}") for a, k in enumerate(kernel)]

    def read(data: te.Tensor, n: Any, c: Any, at: Any, window: list[Any]) -> tuple[list[Any], tirx.Expr, tirx.Expr]:
        where = [v * strides[a] + window[a] * dilations[a] - before[a] for a, v in enumerate(at)]
        checks = [
            tirx.all(w >= 0, w < int64(dims[2 + a]))
            for a, w in enumerate(where)
            if before[a] or after[a] or site.attr("ceil_mode", 0)
        ]
        inside = tirx.all(*checks) if checks else tirx.const(True, "bool")
        value = tirx.if_then_else(inside, data(n, c, *where), least) if checks else data(n, c, *where)
        return where, inside, value

    if site.outputs == 1:
        biggest = te.comm_reducer(lambda a, b: tirx.max(a, b), lambda t: tirx.const(low, t), name="max")

        def compute(data: te.Tensor) -> te.Tensor:
            window = window_axes()
            return te.compute(
                tuple(int64(d) for d in out),
                lambda n, c, *at: biggest(read(data, n, c, at, window)[2], axis=window),
                name="max_pool",
            )

        return site.te(compute, site.x(), name="max_pool")
    column = bool(site.attr("storage_order", 0))

    def better(a: Any, b: Any) -> tuple[tirx.Expr, tirx.Expr]:
        first = tirx.any(a[0] > b[0], tirx.all(a[0] == b[0], a[1] >= 0, tirx.any(b[1] < 0, a[1] <= b[1])))
        return tirx.Select(first, a[0], b[0]), tirx.Select(first, a[1], b[1])

    reducer = te.comm_reducer(better, lambda t0, t1: (tirx.const(low, t0), tirx.const(-1, t1)), name="max_at")

    def with_places(data: te.Tensor) -> list[te.Tensor]:
        window = window_axes()

        def element(n: Any, c: Any, *at: Any) -> Any:
            where, inside, value = read(data, n, c, at, window)
            place: Any = tirx.IntImm("int64", 0)
            order = list(range(rank))[::-1] if column else list(range(rank))
            for a in order:
                place = place * int64(dims[2 + a]) + where[a].astype("int64")
            plane = int64(1)
            for a in range(rank):
                plane = plane * int64(dims[2 + a])
            place = (n.astype("int64") * int64(dims[1]) + c.astype("int64")) * plane + place
            return reducer((value, tirx.Select(inside, place, tirx.IntImm("int64", -1))), axis=window)

        return te.compute(tuple(int64(d) for d in out), lambda *i: element(*i), name="max_pool")

    both = site.te(with_places, site.x(), name="max_pool_with_argmax")
    return [site.emit(relax.TupleGetItem(both, i)) for i in range(2)]


@converts("LpPool")
def lp_pool(site: Site) -> Result:
    """(sum |x|^p)^(1/p) over each window; padding adds nothing."""
    dims = site.shape()
    rank = len(dims) - 2
    power = float(site.attr("p", 2))
    kernel = [int(k) for k in site.attr("kernel_shape")]
    strides = [int(s) for s in site.attr("strides", [1] * rank)]
    dilations = [int(d) for d in site.attr("dilations", [1] * rank)]
    before, after = conv_pads(site, dims[2:], kernel, strides, dilations)
    out: list[Dim] = [*dims[:2], *pooled_sizes(site, dims[2:], kernel, strides, dilations, before, after)]
    dtype = site.dtype()
    raised = site.emit(relax.op.power(relax.op.abs(site.x()), const(power, dtype)))

    def compute(data: te.Tensor) -> te.Tensor:
        window = [te.reduce_axis((0, k), name=f"k{a}") for a, k in enumerate(kernel)]

        def element(n: Any, c: Any, *at: Any) -> tirx.Expr:
            where = [v * strides[a] + window[a] * dilations[a] - before[a] for a, v in enumerate(at)]
            inside = tirx.all(*(tirx.all(w >= 0, w < int64(dims[2 + a])) for a, w in enumerate(where)))
            return te.sum(tirx.if_then_else(inside, data(n, c, *where), tirx.const(0, dtype)), axis=window)

        return te.compute(tuple(int64(d) for d in out), lambda *i: element(*i), name="lp_pool")

    return relax.op.power(site.te(compute, raised, name="lp_pool"), const(1.0 / power, dtype))
