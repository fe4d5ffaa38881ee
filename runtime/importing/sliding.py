"""Convolutions along one axis whose length is known only at run time, as products and sums over neighbouring rows.

The kernels for convolutions are written for known sizes, those for products take any number of rows. With channels last
a place of the result reads neighbouring rows: a kernel of one place is a product, and a larger one is the product of
rows that lie behind each other (im2col). A depthwise convolution is a sum of a few rows, each times a row of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx

from .shapes import permuted, reshaped
from .site import Site, const, int64, number


def convolution(
    site: Site, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], before: Sequence[Any],
    after: Sequence[Any],
) -> tvm.ir.Expr | None:  # fmt: skip
    """(batch, channels, length) of float32 with constant weights; None for others, and for groups of several."""
    if len(kernel) != 1 or not site.target.is_cpu or site.dtype() != "float32" or isinstance(site.shape()[2], int):
        return None
    weight, groups = site.array(1), int(site.attr("group", 1))
    batch, channels, length = site.shape()
    if weight is None or weight.dtype != np.float32 or not isinstance(channels, int) or weight.size == 0:
        return None
    outputs, each, taps = weight.shape
    if groups * each != channels or (groups > 1 and not groups == channels == outputs):
        return None
    (stride,), (dilation,), first, last = strides, dilations, int(before[0]), int(after[0])
    rows = permuted(site, site.x(0), [0, 2, 1])
    fewest = dilation * (taps - 1) + 1 - first - last
    if fewest > 1:
        # A shorter input has no place for the kernel, and sizes below zero: a run checks that it is long enough.
        length = tirx.max(int64(length), int64(fewest))
        rows = site.bb.match_cast(rows, relax.TensorType([int64(batch), length, int64(channels)], "float32"))
    if first or last:
        rows = site.emit(relax.op.nn.pad(rows, [0, 0, first, last, 0, 0]))
    places = number(tvm.sym.Analyzer().simplify((int64(length) - fewest) // stride + 1))

    if groups > 1:
        table = const(np.ascontiguousarray(weight[:, 0].T), "float32")

        def summed(x: te.Tensor, w: te.Tensor) -> te.Tensor:
            tap = te.reduce_axis((0, taps), name="tap")

            def element(n: Any, i: Any, c: Any) -> Any:
                return te.sum(x[n, i * stride + tap * dilation, c] * w[tap, c], axis=[tap])

            return te.compute((int64(batch), int64(places), channels), element, name="conv1d_depthwise")

        result = site.te(summed, rows, table, name="conv1d_depthwise")
    else:
        if taps > 1 or stride > 1:

            def behind(x: te.Tensor) -> te.Tensor:
                return te.compute(
                    (int64(batch), int64(places), taps, channels),
                    lambda n, i, tap, c: x[n, i * stride + tap * dilation, c],
                    name="neighbours",
                )

            rows = site.te(behind, rows, name="neighbours")
            rows = reshaped(site, rows, [batch, places, taps * channels])
        flat = weight.transpose(2, 1, 0).reshape(taps * channels, outputs)
        result = site.emit(relax.op.matmul(rows, const(np.ascontiguousarray(flat), "float32")))
    if site.has(2):
        result = site.emit(relax.op.add(result, site.x(2)))
    return relax.op.permute_dims(result, [0, 2, 1])
