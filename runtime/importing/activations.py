"""Activations, by comparisons that leave NaN as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tvm
from tvm import tirx

from .elementwise import binary, mapped
from .requantized import clamp
from .shapes import reshaped
from .site import NARROW_FLOATS, Refuse, Result, Site, constant_of, converts, is_float, is_unsigned


def _activation(
    site: Site, function: Callable[[Any, Callable[[float], tirx.Expr]], Any], attrs: Mapping[str, Any] | None = None
) -> tvm.ir.Expr:
    """`function` of an element and of a maker of constants of its type; half precision computes in float32."""
    dtype = site.dtype()
    wide = "float32" if dtype in NARROW_FLOATS else dtype

    def element(x: Any) -> Any:
        return function(x.astype(wide), lambda value: tirx.const(value, wide)).astype(dtype)

    return mapped(site, element, site.op.lower(), site.x(), attrs=attrs)


@converts("Relu")
def relu(site: Site) -> Result:
    return _activation(site, lambda x, c: tirx.Select(x < c(0), c(0), x), clamp(0.0, None))


@converts("LeakyRelu")
def leaky_relu(site: Site) -> Result:
    alpha = float(site.attr("alpha", 0.01))
    return _activation(site, lambda x, c: tirx.Select(x < c(0), x * c(alpha), x))


@converts("PRelu")
def prelu(site: Site) -> Result:
    return binary(site, lambda x, slope: tirx.Select(x < tirx.const(0, site.dtype()), x * slope, x), "prelu")


@converts("Elu", "Selu", "Celu")
def exponential_units(site: Site) -> Result:
    alpha = float(site.attr("alpha", 1.67326319217681884765625 if site.op == "Selu" else 1.0))
    gamma = float(site.attr("gamma", 1.05070102214813232421875)) if site.op == "Selu" else 1.0

    def unit(x: Any, c: Callable[[float], tirx.Expr]) -> Any:
        inner = x / c(alpha) if site.op == "Celu" else x
        below = (tirx.exp(inner) - c(1)) * c(alpha * gamma)
        return tirx.Select(x < c(0), below, x * c(gamma) if gamma != 1.0 else x)

    return _activation(site, unit)


@converts("ThresholdedRelu", "Shrink")
def thresholds(site: Site) -> Result:
    if site.op == "ThresholdedRelu":
        alpha = float(site.attr("alpha", 1.0))
        return _activation(site, lambda x, c: tirx.Select(x > c(alpha), x, c(0)))
    edge, bias = float(site.attr("lambd", 0.5)), float(site.attr("bias", 0.0))
    if not is_float(site.dtype()) and not (edge.is_integer() and bias.is_integer()):
        raise Refuse("integers are compared with fractions")

    def shrink(x: Any, c: Callable[[float], tirx.Expr]) -> Any:
        return tirx.Select(x < c(-edge), x + c(bias), tirx.Select(x > c(edge), x - c(bias), c(0)))

    return _activation(site, shrink)


@converts("HardSigmoid", "HardSwish")
def hard(site: Site) -> Result:
    swish = site.op == "HardSwish"
    alpha, beta = (1 / 6, 0.5) if swish else (float(site.attr("alpha", 0.2)), float(site.attr("beta", 0.5)))

    def line(x: Any, c: Callable[[float], tirx.Expr]) -> Any:
        y = x * c(alpha) + c(beta)
        y = tirx.Select(y < c(0), c(0), tirx.Select(y > c(1), c(1), y))
        return x * y if swish else y

    return _activation(site, line)


@converts("Gelu")
def gelu(site: Site) -> Result:
    """x · Φ(x), exact or by the tanh approximation of Hendrycks and Gimpel (arXiv 1606.08415)."""
    approximate = str(site.attr("approximate", "none")) == "tanh"

    def unit(x: Any, c: Callable[[float], tirx.Expr]) -> Any:
        if approximate:
            inner = x * (c(0.7978845608028654) + x * x * c(0.044715 * 0.7978845608028654))
            return c(0.5) * x * (c(1) + tirx.tanh(inner))
        return c(0.5) * x * (c(1) + tirx.erf(x * c(0.7071067811865476)))

    return _activation(site, unit)


@converts("Swish")
def swish(site: Site) -> Result:
    """x · sigmoid(alpha · x)."""
    alpha = float(site.attr("alpha", 1.0))

    def unit(x: Any, c: Callable[[float], tirx.Expr]) -> Any:
        return x * tirx.sigmoid(x * c(alpha) if alpha != 1.0 else x)

    return _activation(site, unit)


@converts("Sign")
def sign(site: Site) -> Result:
    if is_unsigned(site.dtype()):
        return _activation(site, lambda x, c: tirx.Select(x > c(0), c(1), x))
    return _activation(site, lambda x, c: tirx.Select(x < c(0), c(-1), tirx.Select(x > c(0), c(1), x)))


@converts("Clip")
def clip(site: Site) -> Result:
    if site.opset < 11:
        bounds = [site.like(float(site.attr(name))) if name in site.attrs else None for name in ("min", "max")]
    else:
        bounds = [site.x(i) if site.has(i) else None for i in (1, 2)]
    low, high = bounds
    given = [reshaped(site, bound, []) for bound in bounds if bound is not None]

    def element(x: Any, *limits: Any) -> Any:
        rest = list(limits)
        if low is not None:
            least = rest.pop(0)
            x = tirx.Select(x < least, least, x)
        if high is not None:
            most = rest.pop(0)
            x = tirx.Select(x > most, most, x)
        return x

    if not given:
        return site.value(0)
    numbers = [None if bound is None else constant_of(bound) for bound in bounds]
    known = all(bound is None or number is not None for bound, number in zip(bounds, numbers, strict=True))
    limits = (None if n is None else float(n.reshape(-1)[0]) for n in numbers)
    return mapped(site, element, "clip", site.x(), *given, attrs=clamp(*limits) if known else None)


@converts("Softplus", "Softsign", "Mish")
def soft(site: Site) -> Result:
    """softplus as max(x, 0) + log1p(exp(-|x|)), which does not overflow.

    Near 0 log1p is t - t^2/2 + t^3/3 - t^4/4; the usual quotient by (u - 1) with u = 1 + t would not do, because TVM
    simplifies it as if numbers were real.
    """

    def softplus(x: Any, c: Callable[[float], tirx.Expr]) -> Any:
        size = tirx.Select(x < c(0), c(0) - x, x)
        t = tirx.exp(c(0) - size)
        series = t * (c(1) + t * (c(-0.5) + t * (c(1 / 3) - t * c(0.25))))
        return tirx.Select(x < c(0), c(0), x) + tirx.Select(t < c(0.03), series, tirx.log(t + c(1)))

    def absolute(x: Any, c: Callable[[float], tirx.Expr]) -> Any:
        return tirx.Select(x < c(0), c(0) - x, x)

    functions: dict[str, Callable[..., Any]] = {
        "Softplus": softplus,
        "Softsign": lambda x, c: x / (absolute(x, c) + c(1)),
        "Mish": lambda x, c: x * tirx.tanh(softplus(x, c)),
    }
    return _activation(site, functions[site.op])
