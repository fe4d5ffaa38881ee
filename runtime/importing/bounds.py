"""Indices of what is written are checked when the model runs: TVM writes wherever they point."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from tvm import relax

from .site import Dim, Refuse, Site, Unfixed, const, product


def _below(site: Site, limits: Sequence[Dim], from_end: bool = True) -> None:
    """Make the program fail where an index of input 1 is not below its limit: one limit for all, or one for each place
    of the last axis. from_end: whether an index may be negative, which counts from the end."""
    array, names = site.array(1), " x ".join(map(str, limits))
    if array is not None and all(isinstance(size, int) for size in limits):
        sizes = np.array(limits, np.int64)
        if ((array >= sizes) | (array < (-sizes if from_end else 0))).any():
            raise Refuse(f"its indices from {array.min()} to {array.max()} do not lie in {names}")
        return
    indices = site.cast(site.x(1), "int64")
    limit = site.shape_tensor(limits)
    least = site.emit(relax.op.negative(limit)) if from_end else const(0, "int64")
    outside = relax.op.logical_or(relax.op.greater_equal(indices, limit), relax.op.less(indices, least))
    count = site.emit(relax.op.sum(site.cast(site.emit(outside), "int64")))
    shape = site.emit(relax.op.tensor_to_shape(site.emit(relax.op.reshape(count, [1]))))
    site.bb.match_cast(shape, relax.ShapeType([0]))


def _elements(site: Site) -> None:
    _below(site, [site.shape()[site.axis(0)]])


def _slices(site: Site) -> None:
    depth = site.shape(1)[-1]
    if not isinstance(depth, int):
        raise Unfixed("the length of its index tuples is not known")
    if depth:
        _below(site, site.shape()[:depth])


def _places(site: Site) -> None:
    promised = site.promised().static
    if promised is None:
        raise Unfixed("the size of its result is not known")
    _below(site, [product(promised)], from_end=False)


CHECKS: dict[str, Callable[[Site], None]] = {
    "MaxUnpool": _places, "Scatter": _elements, "ScatterElements": _elements, "ScatterND": _slices
}  # fmt: skip
