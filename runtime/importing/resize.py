"""Resize and Upsample in every mode of the standard, one axis after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx

from ..kernels.resampling import F32, NEAREST, TRANSFORMS, Rule, coordinate, number, weights
from .site import Dim, Refuse, Result, Site, Unfixed, const, converts, dtype_of, int64, is_float, normal_axis, shape_of


def _along(
    site: Site,
    x: tvm.ir.Expr,
    axis: int,
    out: Dim,
    scale: Callable[[list[te.Tensor]], tirx.Expr],
    roi: tuple[Any, Any],
    rule: Rule,
    extra: Sequence[tvm.ir.Expr],
) -> tvm.ir.Expr:
    """One axis resized. `extra`: runtime tensors that `scale` and `roi` read."""
    size = shape_of(x)[axis]

    def compute(data: te.Tensor, *tensors: te.Tensor) -> te.Tensor:
        dims = tuple(int64(out) if i == axis else d for i, d in enumerate(data.shape))

        def element(*index: tirx.Var) -> tirx.Expr:
            window = tuple(r(list(tensors)) if callable(r) else r for r in roi)
            given = int64(size)
            at = coordinate(rule, index[axis], given, int64(out), scale(list(tensors)), window)
            terms = [
                (data(*index[:axis], place, *index[axis + 1 :]), weight) for place, weight in weights(rule, at, given)
            ]
            if rule.mode == "nearest":
                value = terms[0][0]
            else:
                value = terms[0][0] * terms[0][1].astype(data.dtype)
                for source, weight in terms[1:]:
                    value = value + source * weight.astype(data.dtype)
            if rule.transform == "tf_crop_and_resize":
                outside = tirx.any(at < number(0), at > int64(size).astype(F32) - number(1))
                value = tirx.Select(outside, tirx.const(rule.extrapolation, data.dtype), value)
            return value

        return te.compute(dims, element, name=f"resize_{rule.mode}")

    return site.te(compute, x, *extra, name=f"resize_{rule.mode}")


def _centres(rule: Rule, size: int, out: int, scale: float, dtype: type[np.floating[Any]]) -> np.ndarray:
    """The input coordinate of every output position along an axis of known size, as `_coordinate` computes it."""
    one = dtype(1)
    at, length, new, scale_ = np.arange(out, dtype=dtype), dtype(size), dtype(out), dtype(scale)
    half = one / 2
    if rule.transform == "align_corners":
        return at * (length - one) / max(new - one, one)
    if rule.transform == "asymmetric":
        return at / scale_
    if rule.transform == "half_pixel_symmetric":
        return length * half * (one - new / (scale_ * length)) + (at + half) / scale_ - half
    if rule.transform == "pytorch_half_pixel" and out == 1:
        return np.zeros(1, dtype)
    if rule.transform in ("half_pixel", "pytorch_half_pixel"):
        return (at + half) / scale_ - half
    raise Refuse(f"{rule.transform} is not compiled for fixed positions")


def _table(rule: Rule, size: int, out: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """For every output position along an axis: the input positions that it is made of (int32), and their weights."""
    x = _centres(rule, size, out, scale, np.float32)
    base = np.floor(x)
    part = x - base
    if rule.mode == "linear":
        weights, first = [np.float32(1) - part, part], 0
    else:
        weights, first = [_keys(distance, rule.cubic) for distance in (part + 1, part, 1 - part, 2 - part)], -1
    places = base.astype(np.int64)[:, None] + np.arange(first, first + len(weights))
    table = np.stack(weights, axis=1).astype(np.float32)
    if rule.exclude_outside:
        table = np.where((places >= 0) & (places < size), table, np.float32(0))
        table = table / table.sum(axis=1, keepdims=True)
    return places.clip(0, size - 1).astype(np.int32), table


def _interpolated(
    site: Site, rule: Rule, out: Sequence[Dim], axes: Sequence[int], scales: Sequence[float] | None, has_scales: bool
) -> Result | None:
    """An image whose rows and columns are weighted sums, by a kernel; None for other forms."""
    from ..kernels.interpolate import interpolated, interpolated_by
    from ..kernels.vectors import Vectors
    from .pooling import templated

    dims = site.shape()
    if not templated(site) or len(dims) != 4 or tuple(out[:2]) != tuple(dims[:2]) or rule.antialias:
        return None
    if rule.mode == "nearest" or rule.transform == "tf_crop_and_resize" or (has_scales and scales is None):
        return None
    if site.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
        return None
    if rule.transform not in TRANSFORMS or 0 in (*dims[2:], *out[2:]):
        return None
    known = dict(zip(axes, scales, strict=True)) if scales is not None else {}
    lanes, kind = Vectors(site.target.isa).lanes, relax.TensorType(list(out), F32)
    tables = []
    for axis in (2, 3):
        size, new = dims[axis], out[axis]
        if not isinstance(size, int) or not isinstance(new, int):
            return interpolated_by(site.bb, site.x(), rule, [known.get(axis) for axis in (2, 3)], kind, lanes)
        scale = known.get(axis, float(np.float32(new) / np.float32(size)))
        if size == new and scale == 1:
            tables.append((np.arange(size, dtype=np.int32)[:, None], np.ones((size, 1), np.float32)))
        else:
            tables.append(_table(rule, size, new, scale))
    return interpolated(site.bb, site.x(), tables, kind, lanes)


def _keys(distance: Any, a: float) -> Any:
    """Keys' cubic filter at distances of up to 2."""
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    return np.where(distance <= 1, near, ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a)


def _antialiased(site: Site, x: tvm.ir.Expr, axis: int, out: int, scale: float, rule: Rule) -> tvm.ir.Expr:
    """One axis resized with a filter that widens as the image shrinks: the weights are a constant matrix."""
    size = shape_of(x)[axis]
    if not isinstance(size, int):
        raise Unfixed("antialiasing needs a known size")
    narrow = min(scale, 1.0)

    def kernel(t: float) -> float:
        t = abs(t)
        return max(0.0, 1 - t) if rule.mode == "linear" else float(_keys(t, rule.cubic)) if t < 2 else 0.0

    reach = (1 if rule.mode == "linear" else 2) / narrow
    matrix = np.zeros((out, size), np.float64)
    for position, centre in enumerate(_centres(rule, size, out, scale, np.float64).tolist()):
        low, high = math.floor(centre - reach) + 1, math.ceil(centre + reach) - 1
        weights = {i: kernel((i - centre) * narrow) for i in range(low, high + 1)}
        if rule.exclude_outside:
            weights = {i: w for i, w in weights.items() if 0 <= i < size}
        total = sum(weights.values()) or 1.0
        for i, weight in weights.items():
            matrix[position, min(max(i, 0), size - 1)] += weight / total
    table = const(matrix, dtype_of(x))

    def compute(data: te.Tensor, weight: te.Tensor) -> te.Tensor:
        k = te.reduce_axis((0, size), name="k")
        dims = tuple(int64(out) if i == axis else d for i, d in enumerate(data.shape))
        return te.compute(
            dims, lambda *i: te.sum(data(*i[:axis], k, *i[axis + 1 :]) * weight[i[axis], k], axis=k), name="resize"
        )

    return site.te(compute, x, table, name="resize_antialiased")


@converts("Resize", "Upsample")
def resize(site: Site) -> Result:
    dims = site.shape()
    rank = len(dims)
    upsample = site.op == "Upsample"
    mode = site.attr("mode", "nearest")
    mode = "linear" if mode in ("bilinear", "trilinear") else mode
    old = upsample or site.opset < 11
    rule = Rule(
        mode=mode,
        transform="asymmetric" if old else site.attr("coordinate_transformation_mode", "half_pixel"),
        nearest="floor" if old else site.attr("nearest_mode", "round_prefer_floor"),
        cubic=float(site.attr("cubic_coeff_a", -0.75)),
        exclude_outside=bool(site.attr("exclude_outside", 0)),
        antialias=bool(site.attr("antialias", 0)),
        extrapolation=float(site.attr("extrapolation_value", 0.0)),
    )
    if mode not in ("nearest", "linear", "cubic"):
        raise Refuse(f"mode {mode!r} is unknown")
    axes = [normal_axis(int(a), rank) for a in site.attr("axes", range(rank))]
    scales_at, sizes_at, roi_at = (1, None, None) if old else (2, 3, 1)
    if upsample and site.opset < 9:
        fixed_scales: list[float] | None = [float(s) for s in site.attr("scales", ())]
        if site.opset < 7 or not fixed_scales:
            fixed_scales = [1.0, 1.0, float(site.attr("height_scale", 1)), float(site.attr("width_scale", 1))]
        has_scales = True
    else:
        has_scales = site.has(scales_at) and site.shape(scales_at) != (0,)
        array = site.array(scales_at) if has_scales else None
        fixed_scales = None if array is None else [float(s) for s in array.reshape(-1)]
    out, scale_of, extra = _extents(site, axes, has_scales, fixed_scales, scales_at, sizes_at)
    roi: list[tuple[Any, Any]] = [(number(0), number(1))] * len(axes)
    if rule.transform == "tf_crop_and_resize":
        window = site.array(roi_at) if roi_at is not None and site.has(roi_at) else None
        if window is not None:
            flat = [float(v) for v in window.reshape(-1)]
            roi = [(number(flat[i]), number(flat[len(axes) + i])) for i in range(len(axes))]
        else:
            window_at = len(extra)
            extra = [*extra, site.cast(site.x(1), F32)]
            roi = [
                (lambda t, i=i: t[window_at][i], lambda t, i=i: t[window_at][len(axes) + i]) for i in range(len(axes))
            ]
    if mode == "nearest" and (factors := _whole_factors(site, rule, out, fixed_scales)) is not None:
        from ..templates import anchor

        return anchor(site.bb, "upsample", {"factors": factors}, [site.x()], relax.TensorType(list(out), site.dtype()))
    if (made := _interpolated(site, rule, out, axes, fixed_scales, has_scales)) is not None:
        return made
    if rule.transform not in TRANSFORMS:
        raise Refuse(f"coordinate_transformation_mode {rule.transform!r} is unknown")
    if mode == "nearest" and rule.nearest not in NEAREST:
        raise Refuse(f"nearest_mode {rule.nearest!r} is unknown")
    x, dtype = site.x(), site.dtype()
    work = dtype if mode == "nearest" or dtype in (F32, "float64") else F32
    x = site.cast(x, work)
    for place, axis in enumerate(axes):
        known = None if fixed_scales is None else fixed_scales[place]
        unchanged = isinstance(out[axis], int) and out[axis] == dims[axis] and (known is None or known == 1.0)
        if unchanged and rule.transform != "tf_crop_and_resize" and (known == 1.0 or not has_scales):
            continue
        if rule.antialias and mode != "nearest":
            if not isinstance(out[axis], int) or not isinstance(dims[axis], int):
                raise Unfixed("antialiasing needs known sizes")
            if known is None and has_scales:
                raise Unfixed("antialiasing with scales computed at run time")
            ratio = known if known is not None else int(out[axis]) / int(dims[axis])
            if ratio < 1:
                x = _antialiased(site, x, axis, int(out[axis]), ratio, rule)
                continue
        x = _along(site, x, axis, out[axis], scale_of[place], roi[place], rule, extra)
    if dtype != work and not is_float(dtype):
        info = np.iinfo(np.dtype(dtype))
        x = site.emit(relax.op.clip(relax.op.round(x), float(info.min), float(info.max)))
    return site.cast(x, dtype)


def _whole_factors(
    site: Site, rule: Rule, out: Sequence[Dim], scales: Sequence[float] | None
) -> list[int] | None:
    """How often each row and column is repeated, where that is all that a resize to `out` does; else None."""
    from .pooling import MAXIMUM, templated

    dims = site.shape()
    if not templated(site, MAXIMUM) or len(dims) != 4 or tuple(out[:2]) != tuple(dims[:2]):
        return None
    sizes = [(d, o) for d, o in zip(dims[2:], out[2:], strict=True) if isinstance(d, int) and isinstance(o, int)]
    if len(sizes) == 2:
        if any(o % d for d, o in sizes):
            return None
        factors = [o // d for d, o in sizes]
    elif scales is not None and all(float(s).is_integer() for s in list(scales)[-2:]):
        factors = [int(s) for s in list(scales)[-2:]]
    else:
        return None
    if scales is not None and [float(s) for s in list(scales)[-2:]] != [float(f) for f in factors]:
        return None
    plain = rule.transform in ("asymmetric", "tf_half_pixel_for_nn") and rule.nearest == "floor"
    # Centres of pixels: every new pixel's centre lies in the old pixel that it is a part of.
    centred = rule.transform in ("half_pixel", "half_pixel_symmetric") and rule.nearest in (
        "round_prefer_floor", "round_prefer_ceil"
    )  # fmt: skip
    return factors if plain or centred else None


def _fixed(value: float) -> Callable[[list[te.Tensor]], tirx.Expr]:
    return lambda _: number(value)


def _element(place: int) -> Callable[[list[te.Tensor]], tirx.Expr]:
    """An element of the first runtime tensor."""
    return lambda tensors: tensors[0][place]


def _ratio(size: Dim, source: Dim) -> Callable[[list[te.Tensor]], tirx.Expr]:
    """size / source rounded to float32, which decides ties of nearest neighbours."""
    if isinstance(size, int) and isinstance(source, int):
        return _fixed(float(np.float32(size) / np.float32(source)))
    return lambda t: int64(size).astype(F32) / int64(source).astype(F32)


def _extents(
    site: Site, axes: list[int], has_scales: bool, fixed: list[float] | None, scales_at: int, sizes_at: int | None
) -> tuple[list[Dim], list[Callable[[list[te.Tensor]], tirx.Expr]], list[tvm.ir.Expr]]:
    """Output dimensions, the scale of each resized axis, and the runtime tensors the scales read."""
    dims = site.shape()
    out: list[Dim] = list(dims)
    promised = site.promised().static
    scale_of: list[Callable[[list[te.Tensor]], tirx.Expr]] = []
    if has_scales:
        if fixed is not None:
            for axis, scale in zip(axes, fixed, strict=True):
                size = dims[axis]
                if isinstance(size, int):
                    out[axis] = math.floor(size * np.float32(scale))
                elif float(scale).is_integer():
                    out[axis] = size * int(scale)
                elif promised is not None:
                    out[axis] = promised[axis]
                else:
                    raise Unfixed("a dynamic axis is scaled by a fraction")
                scale_of.append(_fixed(scale))
            return out, scale_of, []
        if promised is None or not all(isinstance(d, int) for d in dims):
            raise Unfixed("its scales are computed at run time")
        given = site.cast(site.x(scales_at), F32)
        sizes = const(np.array([dims[a] for a in axes]), F32)
        expected = const(np.array([promised[a] for a in axes]), "int64")
        actual = site.cast(site.emit(relax.op.floor(relax.op.multiply(given, sizes))), "int64")
        site.require(site.emit(relax.op.equal(actual, expected)))
        for place, axis in enumerate(axes):
            out[axis] = promised[axis]
            scale_of.append(_element(place))
        return out, scale_of, [given]
    if sizes_at is None or not site.has(sizes_at):
        raise Refuse("it has neither scales nor sizes")
    policy = site.attr("keep_aspect_ratio_policy", "stretch")
    wanted = site.content(sizes_at)
    if policy != "stretch":
        if promised is None or not all(isinstance(dims[a], int) for a in axes):
            raise Unfixed("keeping the aspect ratio needs known sizes")
        return _keeping_ratio(site, axes, policy, wanted, sizes_at)
    if wanted is None:
        if promised is None:
            wanted = tuple(site.runtime_dims(site.x(sizes_at), "size"))
        else:
            wanted = tuple(promised[a] for a in axes)
            site.require_content(sizes_at, wanted)
    for axis, size in zip(axes, wanted, strict=True):
        site.require_source(dims[axis], size)
        out[axis] = size
        scale_of.append(_ratio(size, dims[axis]))
    return out, scale_of, []


def _keeping_ratio(
    site: Site, axes: list[int], policy: str, wanted: tuple[Dim, ...] | None, sizes_at: int
) -> tuple[list[Dim], list[Callable[[list[te.Tensor]], tirx.Expr]], list[tvm.ir.Expr]]:
    """All axes by one scale: the largest (not_smaller) or least (not_larger) of what the sizes ask for."""
    dims = [int(d) for d in site.static()]
    promised = site.promised().static
    assert promised is not None
    out: list[Dim] = list(promised)
    pick = max if policy == "not_smaller" else min
    if wanted is not None and all(isinstance(w, int) for w in wanted):
        scale = pick(int(w) / dims[a] for w, a in zip(wanted, axes, strict=True))
        for axis in axes:
            out[axis] = math.floor(scale * dims[axis] + 0.5)
        return out, [_fixed(scale)] * len(axes), []
    given = site.cast(site.x(sizes_at), F32)
    sizes = const(np.array([dims[a] for a in axes]), F32)
    ratio = site.emit(relax.op.divide(given, sizes))
    one = site.emit((relax.op.max if policy == "not_smaller" else relax.op.min)(ratio, keepdims=True))
    actual = relax.op.floor(relax.op.add(relax.op.multiply(one, sizes), const(0.5, F32)))
    expected = const(np.array([promised[a] for a in axes]), "int64")
    site.require(site.emit(relax.op.equal(site.cast(actual, "int64"), expected)))
    return out, [_element(0)] * len(axes), [one]
