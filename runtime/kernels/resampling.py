"""Where Resize reads: coordinates and weights of every mode of the standard, as expressions of TIR.

Numbers are float32, as onnxruntime computes them: the rounding of a coordinate decides between neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

F32 = "float32"
TRANSFORMS = frozenset({
    "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_crop_and_resize",
})  # fmt: skip
NEAREST: dict[str, Callable[[tirx.Expr], tirx.Expr]] = {
    "round_prefer_floor": lambda x: tirx.ceil(x - number(0.5)),
    "round_prefer_ceil": lambda x: tirx.floor(x + number(0.5)),
    "floor": tirx.floor,
    "ceil": tirx.ceil,
}
TAPS = {"nearest": 1, "linear": 2, "cubic": 4}


@dataclass(frozen=True)
class Rule:
    """How an output coordinate becomes an input coordinate and what is read there."""

    mode: str
    transform: str
    nearest: str
    cubic: float
    exclude_outside: bool
    antialias: bool
    extrapolation: float


def number(value: float) -> tirx.Expr:
    return tirx.const(value, F32)


def coordinate(
    rule: Rule, at: tirx.Expr, size: tirx.Expr, out: tirx.Expr, scale: tirx.Expr, roi: tuple[Any, Any] = (None, None)
) -> tirx.Expr:
    """The input coordinate of output position `at` along an axis. roi: first and last part of the image to crop."""
    x, length, new = at.astype(F32), size.astype(F32), out.astype(F32)
    single = tirx.all(out == 1)
    if rule.transform == "half_pixel":
        return (x + number(0.5)) / scale - number(0.5)
    if rule.transform == "half_pixel_symmetric":
        exact = scale * length
        offset = length / number(2) * (number(1) - new / exact)
        return offset + (x + number(0.5)) / scale - number(0.5)
    if rule.transform == "pytorch_half_pixel":
        return tirx.Select(single, number(0), (x + number(0.5)) / scale - number(0.5))
    if rule.transform == "align_corners":
        return tirx.Select(single, number(0), x * (length - number(1)) / tirx.max(new - number(1), number(1)))
    if rule.transform == "asymmetric":
        return x / scale
    start, end = roi
    last = length - number(1)
    many = start * last + x * (end - start) * last / tirx.max(new - number(1), number(1))
    return tirx.Select(single, number(0.5) * (start + end) * last, many)


def weights(rule: Rule, x: tirx.Expr, size: tirx.Expr) -> list[tuple[tirx.Expr, tirx.Expr]]:
    """(index, weight) of every input element that contributes at input coordinate x."""
    last = size - 1
    if rule.mode == "nearest":
        return [(_inside(NEAREST[rule.nearest](x).astype("int64"), last), number(1))]
    base = tirx.floor(x)
    part = x - base
    first = base.astype("int64")
    if rule.mode == "linear":
        pairs = [(first, number(1) - part), (first + 1, part)]
    else:
        pairs = [(first + k - 1, w) for k, w in enumerate(_cubic(part, rule.cubic))]
    if rule.exclude_outside:
        kept = [(i, tirx.Select(tirx.all(i >= 0, i <= last), w, number(0))) for i, w in pairs]
        total = kept[0][1]
        for _, weight in kept[1:]:
            total = total + weight
        pairs = [(i, w / total) for i, w in kept]
    return [(_inside(i, last), w) for i, w in pairs]


def _inside(index: tirx.Expr, last: tirx.Expr) -> tirx.Expr:
    return tirx.max(tirx.min(index, last), tirx.IntImm("int64", 0))


def _cubic(part: tirx.Expr, a: float) -> list[tirx.Expr]:
    """Keys' cubic convolution at distances 1+t, t, 1-t, 2-t."""

    def near(t: tirx.Expr) -> tirx.Expr:
        return ((number(a + 2) * t - number(a + 3)) * t) * t + number(1)

    def far(t: tirx.Expr) -> tirx.Expr:
        return ((number(a) * t - number(5 * a)) * t + number(8 * a)) * t - number(4 * a)

    return [far(part + number(1)), near(part), near(number(1) - part), far(number(2) - part)]
