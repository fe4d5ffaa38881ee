"""Operators with an algorithm of their own: boxes, patches, determinants, windows and filter banks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx

from .quantization import conv_pads
from .shapes import reshaped
from .site import Dim, Refuse, Result, Site, const, converts, int64, is_float, np_dtype, onnx_dtype, shape_of


@converts("NonMaxSuppression")
def non_max_suppression(site: Site) -> Result:
    """Greedy selection for each batch entry and class, boxes in descending order of score, the first of equals first.

    A box is dropped when its intersection over union with a kept one is above the threshold.
    """
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    batch, boxes, _ = site.static(0)
    _, classes, _ = site.static(1)
    centre = bool(site.attr("center_point_box", 0))
    f32 = "float32"

    def scalar(index: int, default: float, dtype: str) -> tvm.ir.Expr:
        if not site.has(index) or site.shape(index) == (0,):
            return const([default], dtype)
        return reshaped(site, site.cast(site.x(index), dtype), [1])

    limit, overlap = scalar(2, 0, "int64"), scalar(3, 0.0, f32)
    floor = scalar(4, 0.0, f32)
    has_floor = site.has(4) and site.shape(4) != (0,)
    capacity = batch * classes * boxes
    if capacity == 0:
        return const(np.zeros((0, 3)), "int64")

    def corner(data: Any, n: Any, i: Any, which: int) -> Any:
        """y1, x1, y2, x2 in order; the two corners may be given in any order."""
        base = (n * boxes + i) * 4
        if centre:
            middle, extent = data[base + (1 - which % 2)], data[base + 2 + (1 - which % 2)]
            half = extent / tirx.const(2, f32)
            return middle - half if which < 2 else middle + half
        first, second = data[base + which % 2], data[base + which % 2 + 2]
        return tirx.min(first, second) if which < 2 else tirx.max(first, second)

    def kernel(ins: Any, outs: Any) -> Any:
        data, score, most, iou, least = (T.buffer_proxy(b) for b in ins)
        rows, count, alive = (T.buffer_proxy(b) for b in outs)
        zero = tirx.const(0, f32)
        with IRBuilder() as ib, T.seq_scope():
            count[0] = tirx.const(0, "int64")
            with T.serial(0, tirx.IntImm("int64", batch * classes)) as group:
                n = tirx.floordiv(group, classes)
                with T.serial(0, tirx.IntImm("int64", boxes)) as i:
                    keep = score[group * boxes + i] > least[0] if has_floor else tirx.const(True, "bool")
                    alive[i] = tirx.Select(keep, tirx.const(1, "int32"), tirx.const(0, "int32"))
                # alive[boxes]: the best box of this round, -1 for none; alive[boxes + 1]: how many were kept.
                alive[boxes + 1] = tirx.const(0, "int32")
                with T.serial(0, tirx.IntImm("int64", boxes)):
                    alive[boxes] = tirx.const(-1, "int32")
                    with T.serial(0, tirx.IntImm("int64", boxes)) as i:
                        best = alive[boxes]
                        better = tirx.any(best < 0, score[group * boxes + i] > score[group * boxes + tirx.max(best, 0)])
                        with T.If(tirx.all(alive[i] == 1, better)), T.Then():
                            alive[boxes] = i.astype("int32")
                    room = alive[boxes + 1].astype("int64") < most[0]
                    with T.If(tirx.all(alive[boxes] >= 0, room)), T.Then():
                        rows[count[0] * 3] = n.astype("int64")
                        rows[count[0] * 3 + 1] = tirx.floormod(group, classes).astype("int64")
                        rows[count[0] * 3 + 2] = alive[boxes].astype("int64")
                        count[0] = count[0] + tirx.const(1, "int64")
                        alive[boxes + 1] = alive[boxes + 1] + 1
                        with T.serial(0, tirx.IntImm("int64", boxes)) as i:
                            best = alive[boxes]
                            y1, x1, y2, x2 = (corner(data, n, i, w) for w in range(4))
                            v1, u1, v2, u2 = (corner(data, n, best, w) for w in range(4))
                            high = tirx.max(tirx.min(y2, v2) - tirx.max(y1, v1), zero)
                            wide = tirx.max(tirx.min(x2, u2) - tirx.max(x1, u1), zero)
                            shared = high * wide
                            union = (y2 - y1) * (x2 - x1) + (v2 - v1) * (u2 - u1) - shared
                            drop = tirx.any(i == best, tirx.all(union > zero, shared > iou[0] * union))
                            with T.If(tirx.all(alive[i] == 1, drop)), T.Then():
                                alive[i] = tirx.const(0, "int32")
        return ib.get()

    def compute(*inputs: te.Tensor) -> list[te.Tensor]:
        return te.extern(
            [(capacity, 3), (1,), (boxes + 2,)],
            list(inputs),
            kernel,
            dtype=["int64", "int64", "int32"],
            name="non_max_suppression",
        )

    done = site.te(compute, site.x(0), site.x(1), limit, overlap, floor, name="non_max_suppression")
    rows = site.emit(relax.TupleGetItem(done, 0))
    (found,) = site.runtime_dims(site.emit(relax.TupleGetItem(done, 1)), "selected")
    return site.te(
        lambda table: te.compute((int64(found), tirx.IntImm("int64", 3)), lambda i, j: table[i, j], name="rows"),
        rows,
        name="selected_rows",
    )


@converts("Col2Im")
def col2im(site: Site) -> Result:
    """Each pixel gathers the patch elements that cover it."""
    image, block = site.ints(1), site.ints(2)
    if image is None:
        promised = site.promised().static
        if promised is None:
            raise Refuse("its image shape is computed at run time")
        image = list(promised[2:])
        site.require_content(1, image)
    rank = len(image)
    batch, columns, patches = site.shape()
    dilations = [int(d) for d in site.attr("dilations", [1] * rank)]
    strides = [int(s) for s in site.attr("strides", [1] * rank)]
    pads = [int(p) for p in site.attr("pads", [0] * (2 * rank))]
    if block is None:
        promised = site.promised().static
        block = _block(site, promised, columns, patches, image, dilations, strides, pads)
        site.require_content(2, block)
    steps = [
        (image[a] + pads[a] + pads[rank + a] - dilations[a] * (block[a] - 1) - 1) // strides[a] + 1 for a in range(rank)
    ]
    if not isinstance(columns, int):
        raise Refuse("the number of its columns is not known")
    channels = columns // math.prod(block)
    dtype = site.dtype()

    def compute(data: te.Tensor) -> te.Tensor:
        window = [te.reduce_axis((0, b), name=f"k{a}") for a, b in enumerate(block)]

        def element(n: Any, c: Any, *at: Any) -> tirx.Expr:
            inside, patch, offset = [], tirx.IntImm("int64", 0), c
            for a in range(rank):
                start = at[a].astype("int64") + pads[a] - window[a].var.astype("int64") * dilations[a]
                step = tirx.floordiv(start, strides[a])
                inside.append(tirx.all(start >= 0, tirx.floormod(start, strides[a]) == 0, step < steps[a]))
                patch = patch * steps[a] + tirx.max(tirx.min(step, steps[a] - 1), 0)
                offset = offset * block[a] + window[a]
            value = tirx.if_then_else(tirx.all(*inside), data(n, offset, patch), tirx.const(0, dtype))
            return te.sum(value, axis=window)

        return te.compute((int64(batch), channels, *image), lambda *i: element(*i), name="col2im")

    return site.te(compute, site.x(), name="col2im")


def _block(
    site: Site,
    promised: tuple[int, ...] | None,
    columns: Dim,
    patches: Dim,
    image: list[int],
    dilations: list[int],
    strides: list[int],
    pads: list[int],
) -> list[int]:
    """The only block shape that fits the promised channels and the number of patches."""
    if promised is None or not isinstance(columns, int) or not isinstance(patches, int):
        raise Refuse("its block shape is computed at run time")
    rank, size = len(image), columns // promised[1]
    found = []

    def search(prefix: list[int], left: int) -> None:
        if len(prefix) == rank:
            steps = [
                (image[a] + pads[a] + pads[rank + a] - dilations[a] * (prefix[a] - 1) - 1) // strides[a] + 1
                for a in range(rank)
            ]
            if left == 1 and math.prod(steps) == patches:
                found.append(prefix)
            return
        for extent in range(1, left + 1):
            if left % extent == 0:
                search([*prefix, extent], left // extent)

    search([], size)
    if len(found) != 1:
        raise Refuse("its block shape is computed at run time")
    return found[0]


@converts("Det")
def det(site: Site) -> Result:
    """Gaussian elimination with the largest pivot of each column."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    dims = site.static()
    size, batch = dims[-1], int(np.prod(dims[:-2]))
    dtype = site.dtype()

    def kernel(ins: Any, outs: Any) -> Any:
        source = T.buffer_proxy(ins[0])
        result, work, pivot = (T.buffer_proxy(b) for b in outs)
        area = size * size
        with IRBuilder() as ib, T.seq_scope(), T.serial(0, batch) as n:
            with T.serial(0, area) as i:
                work[i] = source[n * area + i]
            result[n] = tirx.const(1, dtype)
            with T.serial(0, size) as c:
                pivot[0] = c.astype("int32")
                with T.serial(0, size - c) as k:
                    best = work[pivot[0] * size + c]
                    here = work[(c + k) * size + c]
                    with T.If(tirx.abs(here) > tirx.abs(best)), T.Then():
                        pivot[0] = (c + k).astype("int32")
                with T.If(pivot[0] != c), T.Then():
                    result[n] = tirx.const(0, dtype) - result[n]
                    with T.serial(0, size) as j:
                        work[area] = work[c * size + j]
                        work[c * size + j] = work[pivot[0] * size + j]
                        work[pivot[0] * size + j] = work[area]
                result[n] = result[n] * work[c * size + c]
                with T.serial(0, size - c - 1) as r:
                    row = (c + 1 + r) * size
                    with T.If(work[c * size + c] != tirx.const(0, dtype)), T.Then():
                        work[area] = work[row + c] / work[c * size + c]
                        with T.serial(0, size) as j:
                            work[row + j] = work[row + j] - work[area] * work[c * size + j]
        return ib.get()

    def compute(data: te.Tensor) -> list[te.Tensor]:
        return te.extern(
            [(batch,), (size * size + 1,), (1,)], [data], kernel, dtype=[dtype, dtype, "int32"], name="det"
        )

    done = site.te(compute, site.x(), name="det")
    return reshaped(site, site.emit(relax.TupleGetItem(done, 0)), dims[:-2])


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
    out: list[Dim] = []
    for axis, size in enumerate(sizes):
        room = size + before[axis] + after[axis] - dilations[axis] * (kernel[axis] - 1) - 1
        if site.attr("ceil_mode", 0):
            if not isinstance(room, int) or not isinstance(size, int):
                raise Refuse("ceil_mode on a dynamic axis")
            steps = -(-room // strides[axis]) + 1
            # The last window must start inside the input or its left padding.
            out.append(steps - 1 if (steps - 1) * strides[axis] >= size + before[axis] else steps)
        else:
            out.append(room // strides[axis] + 1 if isinstance(room, int) else tirx.floordiv(room, strides[axis]) + 1)
    return out


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


@converts("HannWindow", "HammingWindow", "BlackmanWindow")
def window(site: Site) -> Result:
    dtype = onnx_dtype(int(site.attr("output_datatype", 1)))
    sizes = site.ints(0)
    if sizes is None:
        promised = site.promised().static
        if promised is None:
            raise Refuse("its size is computed at run time")
        sizes = [promised[0]]
        site.require_content(0, sizes)
    size = sizes[0]
    steps = size if site.attr("periodic", 1) else size - 1
    turn = 2 * np.pi * np.arange(size) / max(steps, 1)
    values = {
        "HannWindow": 0.5 - 0.5 * np.cos(turn),
        "HammingWindow": 25 / 46 - (1 - 25 / 46) * np.cos(turn),
        "BlackmanWindow": 0.42 - 0.5 * np.cos(turn) + 0.08 * np.cos(2 * turn),
    }[site.op]
    return const(values, dtype)


@converts("DeformConv")
def deform_conv(site: Site) -> Result:
    """A convolution that reads at learnt offsets, by bilinear interpolation; outside the input is zero."""
    batch, channels, height, width = site.static(0)
    outputs, per_group, kh, kw = site.static(1)
    dtype = site.dtype()
    strides = [int(s) for s in site.attr("strides", [1, 1])]
    dilations = [int(d) for d in site.attr("dilations", [1, 1])]
    pads = [int(p) for p in site.attr("pads", [0] * 4)]
    groups, offsets = int(site.attr("group", 1)), int(site.attr("offset_group", 1))
    rows = (height + pads[0] + pads[2] - dilations[0] * (kh - 1) - 1) // strides[0] + 1
    columns = (width + pads[1] + pads[3] - dilations[1] * (kw - 1) - 1) // strides[1] + 1
    masked = site.has(4)
    tensors = [site.x(0), site.x(2), *([site.x(4)] if masked else [])]

    def sample(data: te.Tensor, offset: te.Tensor, *mask: te.Tensor) -> te.Tensor:
        def element(n: Any, c: Any, i: Any, j: Any, y: Any, x: Any) -> tirx.Expr:
            group = tirx.floordiv(c, channels // offsets)
            tap = (group * kh + i) * kw + j
            top = (y * strides[0] - pads[0] + i * dilations[0]).astype(dtype) + offset[n, tap * 2, y, x]
            left = (x * strides[1] - pads[1] + j * dilations[1]).astype(dtype) + offset[n, tap * 2 + 1, y, x]
            y0, x0 = tirx.floor(top), tirx.floor(left)
            total: Any = tirx.const(0, dtype)
            for dy in range(2):
                for dx in range(2):
                    row, column = y0.astype("int64") + dy, x0.astype("int64") + dx
                    weight = (top - y0 if dy else tirx.const(1, dtype) - (top - y0)) * (
                        left - x0 if dx else tirx.const(1, dtype) - (left - x0)
                    )
                    inside = tirx.all(row >= 0, row < height, column >= 0, column < width)
                    total = total + tirx.if_then_else(inside, data[n, c, row, column] * weight, tirx.const(0, dtype))
            return total * mask[0][n, tap, y, x] if mask else total

        return te.compute((batch, channels, kh, kw, rows, columns), element, name="deformed")

    patches = site.te(sample, *tensors, name="deform_sample")

    def convolve(taps: te.Tensor, weight: te.Tensor) -> te.Tensor:
        c = te.reduce_axis((0, per_group), name="c")
        i, j = te.reduce_axis((0, kh), name="i"), te.reduce_axis((0, kw), name="j")

        def element(n: Any, o: Any, y: Any, x: Any) -> tirx.Expr:
            channel = tirx.floordiv(o, outputs // groups) * per_group + c
            return te.sum(taps[n, channel, i, j, y, x] * weight[o, c, i, j], axis=[c, i, j])

        return te.compute((batch, outputs, rows, columns), element, name="deform_conv")

    result = site.te(convolve, patches, site.x(1), name="deform_conv")
    if site.has(3):
        result = relax.op.add(result, reshaped(site, site.x(3), [1, outputs, 1, 1]))
    return result


@converts("MelWeightMatrix")
def mel_weight_matrix(site: Site) -> Result:
    """All inputs known during the import: a constant."""
    arrays = [site.array(i) for i in range(5)]
    if any(a is None for a in arrays):
        raise Refuse("its inputs are computed at run time")
    bins, length, rate, low, high = (float(a.reshape(-1)[0]) for a in arrays if a is not None)
    dtype = onnx_dtype(int(site.attr("output_datatype", 1)))
    rows = int(length) // 2 + 1
    edges = np.arange(0, int(bins) + 2, dtype=np.float64)
    low_mel, high_mel = (2595 * np.log10(1 + f / 700) for f in (low, high))
    edges = edges * (high_mel - low_mel) / edges.shape[0] + low_mel
    edges = np.floor((length + 1) * (700 * (np.power(10, edges / 2595) - 1)) / rate).astype(np.int64)
    table = np.zeros((rows, int(bins)))
    for i in range(int(bins)):
        left, middle, right = edges[i], edges[i + 1], edges[i + 2]
        if middle == left:
            table[middle, i] = 1
        else:
            table[left : middle + 1, i] = (np.arange(left, middle + 1) - left) / (middle - left)
        if right != middle:
            table[middle:right, i] = (right - np.arange(middle, right)) / (right - middle)
    return const(table.astype(np.float32), dtype)


@converts("AffineGrid")
def affine_grid(site: Site) -> Result:
    """Points of a regular grid over [-1, 1], moved by an affine matrix for each batch entry; x first."""
    size = site.ints(1)
    if size is None:
        promised = site.promised().static
        count = site.static(1)[0]
        batch, channels = site.shape(0)[0], tirx.Var("channels", "int64")
        if promised is None or len(promised) != count or not isinstance(batch, int):
            raise Refuse("its size is computed at run time")
        size = [batch, 0, *promised[1:-1]]
        site.require_content(1, [batch, channels, *promised[1:-1]])
    extents = size[2:]
    rank = len(extents)
    corners = bool(site.attr("align_corners", 0))
    dtype = site.dtype()

    def coordinate(at: Any, extent: int) -> tirx.Expr:
        place = at.astype(dtype)
        if corners:
            step = 2 / (extent - 1) if extent > 1 else 0.0
            return place * tirx.const(step, dtype) - tirx.const(1.0, dtype)
        return (place * tirx.const(2.0, dtype) + tirx.const(1.0 - extent, dtype)) / tirx.const(extent, dtype)

    def compute(theta: te.Tensor) -> te.Tensor:
        def element(n: Any, *rest: Any) -> tirx.Expr:
            at, row = rest[:rank], rest[rank]
            total = theta[n, row, rank]
            for axis in range(rank):  # the last spatial axis is x, the first column
                total = total + theta[n, row, rank - 1 - axis] * coordinate(at[axis], extents[axis])
            return total

        return te.compute((size[0], *extents, rank), lambda *i: element(*i), name="affine_grid")

    return site.te(compute, site.x(0), name="affine_grid")


@converts("Unique")
def unique(site: Site) -> Result:
    """TVM's unique; without an axis of the flattened input."""
    given = site.attrs.get("axis")
    x = site.x() if given is not None else reshaped(site, site.x(), [_count(site.shape())])
    axis = 0 if given is None else site.axis()
    dims = shape_of(x)
    more = {"return_index": site.outputs > 1, "return_inverse": site.outputs > 2, "return_counts": site.outputs > 3}
    found = site.emit(
        relax.op.unique(x, sorted=bool(site.attr("sorted", 1)), axis=None if given is None else axis, **more)
    )
    several = site.outputs > 1
    parts = [site.emit(relax.TupleGetItem(found, i)) for i in range(site.outputs)] if several else [found]
    number = tirx.Var("unique", "int64")
    shapes: list[list[Dim]] = [
        [number if i == axis else d for i, d in enumerate(dims)],
        [number],
        [dims[axis]],
        [number],
    ]
    return [
        site.bb.match_cast(part, relax.TensorType([int64(d) for d in dims], part.ty.dtype))
        for part, dims in zip(parts, shapes, strict=False)
    ]


def _count(dims: tuple[Dim, ...]) -> Dim:
    total: Dim = 1
    for dim in dims:
        total = total * dim if isinstance(total, int) and isinstance(dim, int) else int64(total) * int64(dim)
    return total


@converts("RoiAlign")
def roi_align(site: Site) -> Result:
    """Averages of bilinear samples on a fixed grid in each bin."""
    if site.attr("mode", "avg") != "avg":
        raise Refuse("mode max is not compiled")
    samples = int(site.attr("sampling_ratio", 0))
    if samples <= 0:
        raise Refuse("the number of samples depends on the regions")
    batch, channels, height, width = site.shape()
    regions = site.shape(1)[0]
    rows, columns = int(site.attr("output_height", 1)), int(site.attr("output_width", 1))
    dtype = site.dtype()
    scale = tirx.const(float(site.attr("spatial_scale", 1.0)), dtype)
    half = site.attr("coordinate_transformation_mode", "half_pixel" if site.opset >= 16 else "output_half_pixel")
    shift = tirx.const(0.5 if half == "half_pixel" else 0.0, dtype)
    one, none = tirx.const(1, dtype), tirx.const(0, dtype)

    def compute(data: te.Tensor, rois: te.Tensor, owner: te.Tensor) -> te.Tensor:
        sy, sx = te.reduce_axis((0, samples), name="sy"), te.reduce_axis((0, samples), name="sx")

        def along(low: Any, high: Any, bins: int, at: Any, step: Any) -> Any:
            start, extent = low * scale - shift, (high - low) * scale
            if half != "half_pixel":
                extent = tirx.max(extent, one)
            size = extent / tirx.const(bins, dtype)
            return (
                start
                + at.astype(dtype) * size
                + (step.astype(dtype) + tirx.const(0.5, dtype)) * size / tirx.const(samples, dtype)
            )

        def corner(value: Any, size: Dim) -> tuple[Any, Any, Any]:
            """Lower and upper index and the weight of the upper."""
            value = tirx.max(value, none)
            last = int64(size) - 1
            low = tirx.min(value.astype("int64"), last)
            inside = value.astype("int64") < last
            return low, tirx.min(low + 1, last), tirx.Select(inside, value - low.astype(dtype), none)

        def element(r: Any, c: Any, i: Any, j: Any) -> tirx.Expr:
            y = along(rois[r, 1], rois[r, 3], rows, i, sy.var)
            x = along(rois[r, 0], rois[r, 2], columns, j, sx.var)
            image = tirx.max(tirx.min(owner[r], int64(batch) - 1), 0)
            top, bottom, dy = corner(y, height)
            left, right, dx = corner(x, width)
            value = (one - dy) * ((one - dx) * data[image, c, top, left] + dx * data[image, c, top, right])
            value = value + dy * ((one - dx) * data[image, c, bottom, left] + dx * data[image, c, bottom, right])
            edge = tirx.const(-1, dtype)
            outside = tirx.any(y < edge, y > int64(height).astype(dtype), x < edge, x > int64(width).astype(dtype))
            weight = tirx.const(1.0 / (samples * samples), dtype)
            return te.sum(tirx.if_then_else(outside, none, value * weight), axis=[sy, sx])

        return te.compute((int64(regions), int64(channels), rows, columns), element, name="roi_align")

    return site.te(compute, site.x(0), site.x(1), site.cast(site.x(2), "int64"), name="roi_align")


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
