"""Operators on boxes and regions of images."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx

from .shapes import reshaped
from .site import Dim, Refuse, Result, Site, const, converts, int64


@converts("NonMaxSuppression")
def non_max_suppression(site: Site) -> Result:
    """Greedy selection for each batch entry and class, boxes in descending order of score, the first of equals first.

    A box is dropped when its intersection over union with a kept one is above the threshold. Boxes come from a heap,
    so that those behind the last that is kept cost nothing.
    """
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    batch, boxes, _ = site.shape(0)
    _, classes, _ = site.shape(1)
    centre = bool(site.attr("center_point_box", 0))
    f32 = "float32"

    def scalar(index: int, default: float, dtype: str) -> tvm.ir.Expr:
        if not site.has(index) or site.shape(index) == (0,):
            return const([default], dtype)
        return reshaped(site, site.cast(site.x(index), dtype), [1])

    limit, overlap = scalar(2, 0, "int64"), scalar(3, 0.0, f32)
    floor = scalar(4, 0.0, f32)
    has_floor = site.has(4) and site.shape(4) != (0,)
    most_known = site.array(2) if site.has(2) else np.zeros(1)
    each = boxes
    if most_known is not None and most_known.size:
        most = max(0, int(most_known.reshape(-1)[0]))
        each = min(boxes, most) if isinstance(boxes, int) else most
    if 0 in [d for d in (batch, boxes, classes, each) if isinstance(d, int)]:
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

    def overlaps(data: Any, n: Any, i: Any, j: Any, iou: Any) -> Any:
        zero = tirx.const(0, f32)
        y1, x1, y2, x2 = (corner(data, n, i, w) for w in range(4))
        v1, u1, v2, u2 = (corner(data, n, j, w) for w in range(4))
        high = tirx.max(tirx.min(y2, v2) - tirx.max(y1, v1), zero)
        wide = tirx.max(tirx.min(x2, u2) - tirx.max(x1, u1), zero)
        shared = high * wide
        union = (y2 - y1) * (x2 - x1) + (v2 - v1) * (u2 - u1) - shared
        return tirx.all(union > zero, shared > iou * union)

    def kernel(ins: Any, outs: Any) -> Any:
        data, score, most, iou, least = (T.buffer_proxy(b) for b in ins)
        rows, count, heap, state = (T.buffer_proxy(b) for b in outs)
        # What the loops change. heap[0 : state[size]] are boxes, each before those at 2 i + 1 and 2 i + 2.
        size, node, top, held, kept, seen, dropped = range(7)
        zero, one = tirx.const(0, "int32"), tirx.const(1, "int32")

        def before(group: Any, i: Any, j: Any) -> Any:
            a, b = score[group * boxes + i], score[group * boxes + j]
            return tirx.any(a > b, tirx.all(a == b, i < j))

        def sink(group: Any, start: Any) -> None:
            """Exchange a box with the better one below it until none is better."""
            state[node], state[held] = start, one
            with T.While(state[held] >= 0):
                state[top] = state[node]
                for child in (1, 2):
                    below = state[node] * 2 + child
                    better = before(group, heap[below], heap[state[top]])
                    with T.If(below < state[size]), T.Then(), T.If(better), T.Then():
                        state[top] = below
                with T.If(state[top] == state[node]):
                    with T.Then():
                        state[held] = -one
                    with T.Else():
                        state[held] = heap[state[node]]
                        heap[state[node]] = heap[state[top]]
                        heap[state[top]] = state[held]
                        state[node] = state[top]

        with IRBuilder() as ib, T.seq_scope():
            count[0] = tirx.const(0, "int64")
            with T.serial(0, int64(batch) * int64(classes)) as group:
                n = tirx.floordiv(group, classes)
                state[size] = zero
                with T.serial(0, int64(boxes)) as i:
                    keep = score[group * boxes + i] > least[0] if has_floor else tirx.const(True, "bool")
                    with T.If(keep), T.Then():
                        heap[state[size]] = i.astype("int32")
                        state[size] = state[size] + 1
                state[seen] = tirx.floordiv(state[size], 2)
                with T.While(state[seen] > 0):
                    state[seen] = state[seen] - 1
                    sink(group, state[seen])
                state[kept] = zero
                with T.While(tirx.all(state[size] > 0, state[kept].astype("int64") < most[0])):
                    state[dropped], state[seen] = zero, zero
                    with T.While(tirx.all(state[dropped] == 0, state[seen] < state[kept])):
                        other = rows[(count[0] - 1 - state[seen].astype("int64")) * 3 + 2]
                        with T.If(overlaps(data, n, heap[0].astype("int64"), other, iou[0])), T.Then():
                            state[dropped] = one
                        state[seen] = state[seen] + 1
                    with T.If(state[dropped] == 0), T.Then():
                        rows[count[0] * 3] = n.astype("int64")
                        rows[count[0] * 3 + 1] = tirx.floormod(group, classes).astype("int64")
                        rows[count[0] * 3 + 2] = heap[0].astype("int64")
                        count[0] = count[0] + tirx.const(1, "int64")
                        state[kept] = state[kept] + 1
                    state[size] = state[size] - 1
                    heap[0] = heap[state[size]]
                    sink(group, zero)
        return ib.get()

    def compute(*inputs: te.Tensor) -> list[te.Tensor]:
        return te.extern(
            [(int64(batch) * int64(classes) * int64(each), 3), (1,), (int64(boxes),), (7,)],
            list(inputs),
            kernel,
            dtype=["int64", "int64", "int32", "int32"],
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
