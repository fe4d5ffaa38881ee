"""Functions of float32 vectors, by polynomials and quotients that every instruction set has.

Each takes and gives vectors of `v.lanes` elements. The errors stated are the largest over the whole range against
float64, in units of the result's last place (ulp) or relative; tests/runtime/kernels/test_functions.py measures them.
NaN stays NaN.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script import builder as T

from .vectors import Expr, Vectors

# erf(x) = x·P(x²)/Q(x²) for |x| <= ERF_EDGE, where the quotient is above 1 by more than it can be wrong: cut off at 1,
# it is exactly 1 from there on, as 1 + erf(x) in a GELU of a huge number needs it. Coefficients by the rational minimax
# fit in Eigen's generic_fast_erf (MPL-2.0), lowest power last.
ERF_EDGE = 3.95
ERF_P = (0.00022905065861350646, 0.0034082910107109506, 0.050955695062380861, 0.18520832239976145, 1.128379143519084)
ERF_Q = (
    -1.1791602954361697e-7, 0.000023547966471313185, 0.0010179625278914885, 0.014070470171167667,
    0.11098505178285362, 0.49746925110067538, 1.0,
)  # fmt: skip
# tanh(x) = x·P(x²)/Q(x²) for |x| <= TANH_EDGE, likewise: Eigen's generic_fast_tanh (MPL-2.0).
TANH_EDGE = 9.9
TANH_P = (
    -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
    1.48572235717979e-05, 6.37261928935436e-04, 4.89352455891786e-03,
)  # fmt: skip
TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
# log(1 + f) = f - f²/2 + f³·P(f) for sqrt(1/2) - 1 <= f < sqrt(2) - 1: Cephes' logf.
LOG_P = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
SMALLEST = 2.0**-126  # normal float32
# exp beyond these is infinite or zero in float32.
EXP_MOST, EXP_LEAST = 88.72283935546875, -104.0

Function = Callable[[Vectors, Expr], Expr]


def _polynomial(v: Vectors, x: Expr, coefficients: tuple[float, ...]) -> Expr:
    """Horner's scheme, highest power first."""
    result = v.splat(coefficients[0])
    for c in coefficients[1:]:
        result = v.fma(result, x, v.splat(c))
    return T.Bind(result)


def _clamp(v: Vectors, x: Expr, least: float, most: float) -> Expr:
    """Constants first: a comparison with NaN is false and lets it through."""
    return T.Bind(T.min(v.splat(most), T.max(v.splat(least), x)))


def exp(v: Vectors, x: Expr) -> Expr:
    """e^x, 2.5 ulp; infinite above 88.7, 0 below -104, and 0 for subnormal results without `scalef`."""
    x = T.Bind(x)
    inside = _clamp(v, x, EXP_LEAST, EXP_MOST)
    n, t = v.split(inside)
    m = v.polynomial(t)
    # 2^128 is no float: two steps.
    half = T.Bind(T.max(v.splat(0.0), n - v.splat(64.0)))
    y = v.times_power(T.Bind(v.times_power(m, n - half)), half)
    return v.choose("gt", x, v.splat(EXP_MOST), v.splat(float("inf")), y)


def sigmoid(v: Vectors, x: Expr) -> Expr:
    """1 / (1 + e^-x), 3.5 ulp; 0 or off by up to 2^-127 for subnormal results without `scalef`."""
    x = T.Bind(x)
    # e^-|x| over itself and 1: small results keep their digits, where 1 / (1 + e^-x) would stop at e^-88.
    e = v.exp(T.min(x, v.splat(0.0) - x))
    return T.Bind(v.choose("lt", x, v.splat(0.0), e, v.splat(1.0)) / (v.splat(1.0) + e))


def tanh(v: Vectors, x: Expr) -> Expr:
    """6 ulp; from -1 to 1, both of which it reaches."""
    x = _clamp(v, x, -TANH_EDGE, TANH_EDGE)
    square = T.Bind(x * x)
    # The quotient first, which is about 1: x times P's last coefficient would lose digits where x is tiny.
    quotient = T.Bind(_polynomial(v, square, TANH_P) / _polynomial(v, square, TANH_Q))
    return _clamp(v, T.Bind(x * quotient), -1.0, 1.0)


def erf(v: Vectors, x: Expr) -> Expr:
    """6 ulp; from -1 to 1, both of which it reaches."""
    x = _clamp(v, x, -ERF_EDGE, ERF_EDGE)
    square = T.Bind(x * x)
    return _clamp(v, T.Bind(x * _polynomial(v, square, ERF_P) / _polynomial(v, square, ERF_Q)), -1.0, 1.0)


def log(v: Vectors, x: Expr) -> Expr:
    """Natural logarithm, 2 ulp; -infinity of 0, NaN of less."""
    x = T.Bind(x)
    integer = f"int32x{v.lanes}"

    def whole(value: int) -> Expr:
        return T.broadcast(T.int32(value), v.lanes)

    # Subnormal numbers have no exponent of their own: as 2^23 times themselves they have.
    smallest = v.splat(SMALLEST)
    normal = T.Bind(v.choose("lt", x, smallest, T.Bind(x * v.splat(2.0**23)), x))
    bits = T.Bind(T.reinterpret(T.max(smallest, normal), dtype=integer))
    # The exponent that leaves a mantissa in [sqrt(1/2), sqrt(2)).
    shifted = T.Bind(bits - whole(0x3F3504F3))
    exponent = T.Bind(T.shift_right(shifted, whole(23)))
    mantissa = T.reinterpret(bits - T.shift_left(exponent, whole(23)), dtype=v.dtype)
    f = T.Bind(mantissa - v.splat(1.0))
    n = T.Bind(T.Cast(v.dtype, exponent) - v.choose("lt", x, smallest, v.splat(23.0), v.splat(0.0)))
    square = T.Bind(f * f)
    y = T.Bind(_polynomial(v, f, LOG_P) * f * square)
    y = v.fma(n, v.splat(-2.12194440e-4), y)
    y = v.fma(square, v.splat(-0.5), y)
    y = T.Bind(v.fma(n, v.splat(0.693359375), f + y))
    y = v.choose("eq", x, v.splat(0.0), v.splat(float("-inf")), y)
    y = v.choose("eq", x, v.splat(float("inf")), v.splat(float("inf")), y)
    # False for NaN.
    return v.choose("ge", x, v.splat(0.0), y, v.splat(float("nan")))


def _llvm(name: str) -> Function:
    def call(v: Vectors, x: Expr) -> Expr:
        return T.Bind(
            T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(f"llvm.{name}.v{v.lanes}f32"), x, dtype=v.dtype)
        )

    return call


sqrt, absolute, floor, ceil = _llvm("sqrt"), _llvm("fabs"), _llvm("floor"), _llvm("ceil")
truncate, round_even = _llvm("trunc"), _llvm("roundeven")


def rsqrt(v: Vectors, x: Expr) -> Expr:
    return T.Bind(v.splat(1.0) / sqrt(v, x))


FUNCTIONS: dict[str, Function] = {
    "exp": exp, "sigmoid": sigmoid, "tanh": tanh, "erf": erf, "log": log, "sqrt": sqrt, "rsqrt": rsqrt,
    "fabs": absolute, "abs": absolute, "floor": floor, "ceil": ceil, "trunc": truncate, "nearbyint": round_even,
}  # fmt: skip
