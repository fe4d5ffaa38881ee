"""Normalizations. Variances are means of squared differences, not differences of means, which cancel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tvm
from tvm import relax

from ..kernels.normalization import normalization
from .kernels import call, for_kernels, named
from .reductions import mean, reduced
from .shapes import broadcast, reshaped, settled
from .site import Dim, Refuse, Result, Site, Unfixed, const, converts, dtype_of, onnx_dtype, product, shape_of


def _normalized(
    site: Site, x: tvm.ir.Expr, axes: Sequence[int], epsilon: float
) -> tuple[tvm.ir.Expr, tvm.ir.Expr, tvm.ir.Expr]:
    """(x - mean) / sqrt(variance + epsilon) over axes, with the mean and the reciprocal of the deviation."""
    centre = mean(site, x, axes)
    difference = site.emit(relax.op.subtract(x, centre))
    variance = mean(site, site.emit(relax.op.multiply(difference, difference)), axes)
    inverse = site.emit(
        relax.op.divide(const(1, dtype_of(x)), relax.op.sqrt(relax.op.add(variance, const(epsilon, dtype_of(x)))))
    )
    return site.emit(relax.op.multiply(difference, inverse)), centre, inverse


def _per_channel(site: Site, vector: tvm.ir.Expr, rank: int, channel: int = 1) -> tvm.ir.Expr:
    dims: list[Dim] = [1] * rank
    dims[channel] = shape_of(vector)[0]
    return reshaped(site, vector, dims)


def _fitted(site: Site) -> tvm.ir.Expr:
    """The input with the sizes of the scale, which lines up with its last axes."""
    scale, rank = site.shape(1), site.rank()
    return settled(site, site.x(), {rank - len(scale) + i: d for i, d in enumerate(scale) if d != 1})


def _with_channels(site: Site) -> tvm.ir.Expr:
    """The input with as many channels as the scale has."""
    return settled(site, site.x(), {1: site.shape(1)[0]})


def _by_rows(site: Site, centred: bool) -> tvm.ir.Expr | None:
    """The normalization of rows by our kernel; None where it is not for that form."""
    if not for_kernels(site, 0, 1, 2) or site.outputs > 1 or int(site.attr("stash_type", 1)) != 1:
        return None
    axis, x = site.axis(-1), _fitted(site)
    dims = shape_of(x)
    row, weights = dims[axis:], []
    if not all(isinstance(d, int) for d in row):
        return None
    for i in range(1, 3 if site.has(2) else 2):
        own = list(site.shape(i))
        while own and own[0] == 1:
            own.pop(0)
        if len(own) > len(row):
            return None
        weight = broadcast(site, reshaped(site, site.x(i), own), row)
        weights.append(reshaped(site, weight, [product(row)]))
    (rows,) = named(dims[:axis])
    kernel = normalization(
        rows,
        tuple(int(d) for d in row),
        float(site.attr("epsilon", 1e-5)),
        site.target.isa,
        site.target.cores,
        centred,
        len(weights) > 1,
    )
    return call(site, kernel, [x, *weights], dims)


@converts("LayerNormalization")
def layer_normalization(site: Site) -> Result:
    y = _by_rows(site, True)
    if y is not None:
        return y
    dtype, rank = site.dtype(), site.rank()
    stash = onnx_dtype(int(site.attr("stash_type", 1)))
    axes = list(range(site.axis(-1), rank))
    y, centre, inverse = _normalized(site, site.cast(_fitted(site), stash), axes, float(site.attr("epsilon", 1e-5)))
    y = site.emit(relax.op.multiply(site.cast(y, dtype), site.x(1)))
    if site.has(2):
        y = site.emit(relax.op.add(y, site.x(2)))
    return [y, centre, inverse]


@converts("RMSNormalization")
def rms_normalization(site: Site) -> Result:
    y = _by_rows(site, False)
    if y is not None:
        return y
    dtype, rank = site.dtype(), site.rank()
    stash = onnx_dtype(int(site.attr("stash_type", 1)))
    axes = list(range(site.axis(-1), rank))
    x = site.cast(_fitted(site), stash)
    square = mean(site, site.emit(relax.op.multiply(x, x)), axes)
    root = relax.op.sqrt(relax.op.add(square, const(float(site.attr("epsilon", 1e-5)), stash)))
    return relax.op.multiply(site.cast(relax.op.divide(x, site.emit(root)), dtype), site.x(1))


@converts("InstanceNormalization")
def instance_normalization(site: Site) -> Result:
    rank = site.rank()
    y, _, _ = _normalized(site, _with_channels(site), list(range(2, rank)), float(site.attr("epsilon", 1e-5)))
    scaled = relax.op.multiply(y, _per_channel(site, site.x(1), rank))
    return relax.op.add(site.emit(scaled), _per_channel(site, site.x(2), rank))


@converts("GroupNormalization")
def group_normalization(site: Site) -> Result:
    dims, dtype = site.shape(), site.dtype()
    groups = int(site.attr("num_groups"))
    channels = dims[1]
    if not isinstance(channels, int):
        raise Unfixed("the number of channels is not known")
    stash = onnx_dtype(int(site.attr("stash_type", 1))) if site.opset >= 21 else dtype
    grouped: list[Dim] = [dims[0], groups, channels // groups, *dims[2:]]
    x = reshaped(site, site.cast(site.x(), stash), grouped)
    y, _, _ = _normalized(site, x, list(range(2, len(grouped))), float(site.attr("epsilon", 1e-5)))
    if site.opset >= 21:
        y = site.cast(reshaped(site, y, dims), dtype)
        scale, bias = (_per_channel(site, site.x(i), len(dims)) for i in (1, 2))
        return relax.op.add(site.emit(relax.op.multiply(y, scale)), bias)
    scale, bias = (_per_channel(site, site.x(i), len(grouped)) for i in (1, 2))
    return reshaped(site, site.emit(relax.op.add(site.emit(relax.op.multiply(y, scale)), bias)), dims)


@converts("MeanVarianceNormalization")
def mean_variance_normalization(site: Site) -> Result:
    """As the standard's body has it: division by the deviation plus 1e-9."""
    axes = [a % site.rank() for a in site.attr("axes", [0, 2, 3])]
    x = site.x()
    difference = site.emit(relax.op.subtract(x, mean(site, x, axes)))
    variance = mean(site, site.emit(relax.op.multiply(difference, difference)), axes)
    deviation = site.emit(relax.op.add(relax.op.sqrt(variance), const(1e-9, site.dtype())))
    return relax.op.divide(difference, deviation)


@converts("LpNormalization")
def lp_normalization(site: Site) -> Result:
    """A row of zeros stays zeros."""
    axis, power, x = site.axis(-1), int(site.attr("p", 2)), site.x()
    if power == 1:
        norm = reduced(site, site.emit(relax.op.abs(x)), [axis], "sum")
    else:
        norm = site.emit(relax.op.sqrt(reduced(site, site.emit(relax.op.multiply(x, x)), [axis], "sum")))
    safe = relax.op.where(relax.op.equal(norm, site.like(0)), site.like(1), norm)
    return relax.op.divide(x, site.emit(safe))


@converts("BatchNormalization")
def batch_normalization(site: Site) -> Result:
    rank, dtype = site.rank(), site.dtype()
    epsilon = float(site.attr("epsilon", 1e-5))
    training = bool(site.attr("training_mode", 0)) if site.opset >= 14 else site.outputs > 1
    if site.opset < 7 and not site.attr("is_test", 0):
        training = True
    x = _with_channels(site)
    scale, bias, centre, variance = (site.x(i) for i in range(1, 5))
    if not training:
        arrays = [site.array(i) for i in range(1, 5)]
        if all(a is not None for a in arrays):
            s, b, m, v = (np.asarray(a, np.float64) for a in arrays if a is not None)
            factor = s / np.sqrt(v + epsilon)
            scale, bias = const(factor, dtype), const(b - m * factor, dtype)
            y = relax.op.multiply(x, _per_channel(site, scale, rank))
            return relax.op.add(site.emit(y), _per_channel(site, bias, rank))
        wide = dtype_of(variance)
        inverse = relax.op.sqrt(relax.op.add(variance, const(epsilon, wide)))
        y = relax.op.subtract(site.cast(x, wide), _per_channel(site, centre, rank))
        y = relax.op.divide(site.emit(y), _per_channel(site, site.emit(inverse), rank))
        y = relax.op.multiply(site.emit(y), _per_channel(site, site.cast(scale, wide), rank))
        return site.cast(relax.op.add(site.emit(y), _per_channel(site, site.cast(bias, wide), rank)), dtype)
    if site.opset < 14:
        raise Refuse("the training form of this version is not compiled")
    momentum = float(site.attr("momentum", 0.9))
    axes = [0, *range(2, rank)]
    now = mean(site, x, axes)
    difference = site.emit(relax.op.subtract(x, now))
    spread = mean(site, site.emit(relax.op.multiply(difference, difference)), axes)
    y = relax.op.divide(difference, relax.op.sqrt(relax.op.add(spread, site.like(epsilon))))
    y = relax.op.multiply(site.emit(y), _per_channel(site, scale, rank))
    y = site.emit(relax.op.add(site.emit(y), _per_channel(site, bias, rank)))
    (channels,) = shape_of(centre)

    def running(old: tvm.ir.Expr, new: tvm.ir.Expr) -> tvm.ir.Expr:
        wide = dtype_of(old)
        fresh = site.cast(reshaped(site, new, [channels]), wide)
        kept = relax.op.multiply(old, const(momentum, wide))
        return site.emit(relax.op.add(kept, relax.op.multiply(fresh, const(1 - momentum, wide))))

    return [y, running(centre, now), running(variance, spread)]
