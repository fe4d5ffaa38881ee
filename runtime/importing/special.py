"""Operators with an algorithm of their own: boxes, patches, determinants, windows and filter banks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import relax, te, tirx

from .shapes import reshaped
from .site import Dim, Result, Site, Unfixed, const, converts, int64, onnx_dtype, shape_of


@converts("Col2Im")
def col2im(site: Site) -> Result:
    """Each pixel gathers the patch elements that cover it."""
    image, block = site.ints(1), site.ints(2)
    if image is None:
        promised = site.promised().static
        if promised is None:
            raise Unfixed("its image shape is computed at run time")
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
        raise Unfixed("the number of its columns is not known")
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
        raise Unfixed("its block shape is computed at run time")
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
        raise Unfixed("its block shape is computed at run time")
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


@converts("HannWindow", "HammingWindow", "BlackmanWindow")
def window(site: Site) -> Result:
    dtype = onnx_dtype(int(site.attr("output_datatype", 1)))
    sizes = site.ints(0)
    if sizes is None:
        promised = site.promised().static
        if promised is None:
            raise Unfixed("its size is computed at run time")
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
        raise Unfixed("its inputs are computed at run time")
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
            raise Unfixed("its size is computed at run time")
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
