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
