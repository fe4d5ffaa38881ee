"""Elementwise operators: arithmetic, comparison, logic, bits, casts and activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx

from . import rounded_products
from .shapes import broadcast_dims, content_value, reshaped
from .site import (
    CONTENT_LIMIT,
    Dim,
    Refuse,
    Result,
    Site,
    const,
    constant_of,
    converts,
    dtype_of,
    int64,
    is_float,
    is_unsigned,
    number,
    onnx_dtype,
    same,
    shape_of,
)

# Arithmetic.


def mapped(
    site: Site, function: Callable[..., Any], name: str, *inputs: tvm.ir.Expr, attrs: Mapping[str, Any] | None = None
) -> tvm.ir.Expr:
    """A TIR expression of one element of each input, broadcast as ONNX does. Constants of one element become part of
    it: Relax fuses nothing into a function that reads a number from a tensor. attrs: of the TIR function.
    """
    out = list(shape_of(inputs[0]))
    for other in inputs[1:]:
        out = broadcast_dims(out, shape_of(other))
    numbers = {place: number for place, i in enumerate(inputs) if (number := _number(i)) is not None}
    if numbers and len(numbers) < len(inputs):
        given, inner = inputs, function
        inputs = tuple(i for place, i in enumerate(given) if place not in numbers)

        def function(*rest: Any) -> Any:
            left = iter(rest)
            return inner(*(numbers[p] if p in numbers else next(left) for p in range(len(given))))

    def compute(*tensors: te.Tensor) -> te.Tensor:
        def pick(tensor: te.Tensor, index: tuple[tirx.Var, ...]) -> tirx.Expr:
            own = index[len(out) - len(tensor.shape) :]
            return tensor(
                *(
                    0 if isinstance(s, tirx.IntImm) and s.value == 1 else i
                    for i, s in zip(own, tensor.shape, strict=True)
                )
            )

        def element(*index: tirx.Var) -> tirx.Expr:
            return function(*(pick(tensor, index) for tensor in tensors))

        return te.compute(tuple(int64(d) for d in out), element, name=name)

    return site.te(compute, *inputs, name=name, attrs=attrs)


def _number(expr: tvm.ir.Expr) -> tirx.Expr | None:
    """The only element of a constant, in types that TIR has numbers of."""
    array = constant_of(expr)
    if array is None or array.size != 1 or dtype_of(expr) not in ("float32", "float64", "int32", "int64", "bool"):
        return None
    return tirx.const(array.reshape(-1)[0].item(), dtype_of(expr))


def binary(site: Site, function: Callable[[Any, Any], Any], name: str) -> tvm.ir.Expr:
    """A TIR expression of an element of each of two inputs."""
    return mapped(site, function, name, site.x(0), site.x(1))


def _old_broadcast(site: Site) -> None:
    """Before version 7 the second input was lined up with `axis` of the first."""
    if site.opset >= 7 or not site.attr("broadcast", 0) or "axis" not in site.attrs:
        return
    from .site import Value

    axis, tail = int(site.attr("axis")), site.rank(0) - site.rank(1)
    axis = axis + site.rank(0) if axis < 0 else axis
    if axis < tail:
        dims = [*site.shape(1), *([1] * (tail - axis))]
        site.inputs[1] = Value(reshaped(site, site.x(1), dims))


def _content_pair(site: Site) -> list[tuple[Dim, Dim]] | None:
    """Elements of two small integer inputs, paired by broadcasting."""
    a, b = site.content(0), site.content(1)
    if a is None or b is None or not site.dtype().startswith("int"):
        return None
    if len(a) != len(b):
        if len(a) != 1 and len(b) != 1:
            return None
        length = max(len(a), len(b)) if 0 not in (len(a), len(b)) else 0
        a, b = (a * length if len(a) == 1 else a), (b * length if len(b) == 1 else b)
    return list(zip(a, b, strict=True))


def _content_result(site: Site, function: Callable[[Dim, Dim], Dim]) -> Result:
    pairs = _content_pair(site)
    if pairs is None:
        return None
    analyzer = tvm.sym.Analyzer()
    result = []
    for a, b in pairs:
        value = function(a, b)
        result.append(value if isinstance(value, int) else number(analyzer.simplify(value)))
    shape = site.shape(0) if site.rank(0) >= site.rank(1) else site.shape(1)
    dims = [len(result)] if shape else []
    return content_value(site, result, site.dtype(), dims)


def _truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@converts("Add", "Sub", "Mul")
def add_sub_mul(site: Site) -> Result:
    _old_broadcast(site)
    plain: dict[str, Callable[[Any, Any], Any]] = {
        "Add": lambda a, b: a + b, "Sub": lambda a, b: a - b, "Mul": lambda a, b: a * b,
    }  # fmt: skip
    small = _content_result(site, plain[site.op])
    if small is not None:
        return small
    op = {"Add": relax.op.add, "Sub": relax.op.subtract, "Mul": relax.op.multiply}[site.op]
    return op(site.x(0), site.x(1))


@converts("Div")
def div(site: Site) -> Result:
    _old_broadcast(site)
    dtype = site.dtype()
    if is_float(dtype):
        return relax.op.divide(site.x(0), site.x(1))
    pairs = _content_pair(site)
    if pairs is not None and all(not isinstance(b, int) or b > 0 for _, b in pairs):
        small = _content_result(
            site,
            lambda a, b: (
                _truncated(a, b) if isinstance(a, int) and isinstance(b, int) else tirx.truncdiv(int64(a), int64(b))
            ),
        )
        if small is not None:
            return small
    return binary(site, lambda a, b: _safe_division(a, b, dtype, tirx.truncdiv), "divide")


def _safe_division(a: Any, b: Any, dtype: str, function: Callable[[Any, Any], Any]) -> Any:
    """Integer division or remainder that cannot trap: by 0 the result is 0, the least number by -1 wraps."""
    zero, one = tirx.const(0, dtype), tirx.const(1, dtype)
    safe = tirx.Select(b == zero, one, b)
    if not is_unsigned(dtype):
        minus = tirx.const(-1, dtype)
        safe = tirx.Select(b == minus, one, safe)
    result = function(a, safe)
    if not is_unsigned(dtype):
        wrapped = zero - a if function is tirx.truncdiv else zero
        result = tirx.Select(b == tirx.const(-1, dtype), wrapped, result)
    return tirx.Select(b == zero, zero, result)


@converts("Mod")
def mod(site: Site) -> Result:
    dtype = site.dtype()
    if is_float(dtype):
        wide = "float64" if dtype == "float64" else "float32"
        name = "fmod" if wide == "float64" else "fmodf"
        floored = not site.attr("fmod", 0)

        def remainder(a: Any, b: Any) -> Any:
            a, b = a.astype(wide), b.astype(wide)
            rest = tirx.call_pure_extern(wide, name, a, b)
            if floored:  # the sign of the divisor, as numpy.mod
                zero = tirx.const(0, wide)
                apart = tirx.any(tirx.all(rest < zero, b > zero), tirx.all(rest > zero, b < zero))
                rest = tirx.Select(apart, rest + b, rest)
            return rest.astype(dtype)

        return binary(site, remainder, "mod")
    pairs = _content_pair(site)
    if pairs is not None and not site.attr("fmod", 0) and all(not isinstance(b, int) or b > 0 for _, b in pairs):
        small = _content_result(
            site,
            lambda a, b: a % b if isinstance(a, int) and isinstance(b, int) else tirx.floormod(int64(a), int64(b)),
        )
        if small is not None:
            return small
    function = tirx.truncmod if site.attr("fmod", 0) else tirx.floormod
    return binary(site, lambda a, b: _safe_division(a, b, dtype, function), "mod")


@converts("Pow")
def power(site: Site) -> Result:
    _old_broadcast(site)
    base, exponent = site.dtype(0), site.dtype(1)
    constant = site.array(1) if site.has(1) else None
    if is_float(base) and constant is not None and constant.size == 1 and constant.ndim <= site.rank(0):
        value = float(constant.reshape(-1)[0])
        if value in (1.0, 2.0, 3.0):
            x = site.x(0)
            result = x
            for _ in range(int(value) - 1):
                result = site.emit(relax.op.multiply(result, x))
            return result
    if base in ("float32", "float64") and is_float(exponent):
        return relax.op.power(site.x(0), site.cast(site.x(1), base))
    wide = "float32" if base in ("float16", "bfloat16") else base if is_float(base) else "float64"
    name = "powf" if wide == "float32" else "pow"
    return binary(
        site, lambda a, b: tirx.call_pure_extern(wide, name, a.astype(wide), b.astype(wide)).astype(base), "power"
    )


@converts("Max", "Min", "Sum", "Mean")
def variadic(site: Site) -> Result:
    dtype = site.dtype()
    if len(site.inputs) == 1:
        return site.value(0)
    if len(site.inputs) == 2 and site.op in ("Max", "Min"):
        pick = max if site.op == "Max" else min
        tir = tirx.max if site.op == "Max" else tirx.min
        small = _content_result(
            site,
            lambda a, b: pick(a, b) if isinstance(a, int) and isinstance(b, int) else tir(int64(a), int64(b)),
        )
        if small is not None:
            return small
    result = site.x(0)
    for i in range(1, len(site.inputs)):
        other = site.x(i)
        if site.op in ("Max", "Min"):
            result = _extreme(site, result, other, dtype)
        else:
            result = site.emit(relax.op.add(result, other))
    if site.op == "Mean":
        result = relax.op.divide(result, const(len(site.inputs), dtype))
    return result


def _extreme(site: Site, a: tvm.ir.Expr, b: tvm.ir.Expr, dtype: str) -> tvm.ir.Expr:
    """Maximum or minimum that hands on a NaN of either side."""
    highest = site.op == "Max"
    if not is_float(dtype):
        return site.emit((relax.op.maximum if highest else relax.op.minimum)(a, b))

    def pick(x: Any, y: Any) -> Any:
        first, second = (x > y, y >= x) if highest else (x < y, y <= x)
        return tirx.Select(first, x, tirx.Select(second, y, x + y))

    return mapped(site, pick, site.op.lower(), a, b)


# Comparison, logic, bits.


@converts("Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual")
def compare(site: Site) -> Result:
    _old_broadcast(site)
    op = {
        "Equal": relax.op.equal, "Greater": relax.op.greater, "Less": relax.op.less,
        "GreaterOrEqual": relax.op.greater_equal, "LessOrEqual": relax.op.less_equal,
    }[site.op]  # fmt: skip
    pairs = _content_pair(site)
    if pairs is not None and site.op == "Equal":
        known = [_equal(a, b) for a, b in pairs]
        if all(k is not None for k in known):
            shape = site.shape(0) if site.rank(0) >= site.rank(1) else site.shape(1)
            return const(np.array(known).reshape([len(known)] if shape else []), "bool")
    if site.dtype() == "bool":
        return op(site.cast(site.x(0), "int8"), site.cast(site.x(1), "int8"))
    return op(site.x(0), site.x(1))


def _equal(a: Dim, b: Dim) -> bool | None:
    """Whether two elements are equal, where that is known during the import."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if same(a, b):
        return True
    negative = any(isinstance(d, int) and d < 0 for d in (a, b))
    return False if negative and any(isinstance(d, tirx.Var) for d in (a, b)) else None


@converts("And", "Or", "Xor")
def logic(site: Site) -> Result:
    _old_broadcast(site)
    op = {"And": relax.op.logical_and, "Or": relax.op.logical_or, "Xor": relax.op.logical_xor}[site.op]
    return op(site.x(0), site.x(1))


@converts("Not")
def logical_not(site: Site) -> Result:
    return relax.op.logical_not(site.x())


@converts("BitwiseAnd", "BitwiseOr", "BitwiseXor")
def bitwise(site: Site) -> Result:
    op = {"BitwiseAnd": relax.op.bitwise_and, "BitwiseOr": relax.op.bitwise_or, "BitwiseXor": relax.op.bitwise_xor}
    return op[site.op](site.x(0), site.x(1))


@converts("BitShift")
def bit_shift(site: Site) -> Result:
    """A shift by at least the width gives 0, or -1 for a negative number shifted right."""
    dtype = site.dtype()
    bits = int(dtype.lstrip("uint"))
    left = site.attr("direction") == "LEFT"

    def shift(a: Any, b: Any) -> Any:
        safe = tirx.max(tirx.min(b, tirx.const(bits - 1, dtype)), tirx.const(0, dtype))
        shifted = (a << safe) if left else (a >> safe)
        past = tirx.const(0, dtype) if left or is_unsigned(dtype) else (a >> tirx.const(bits - 1, dtype))
        outside = b > tirx.const(bits - 1, dtype)
        if not is_unsigned(dtype):
            outside = tirx.any(outside, b < tirx.const(0, dtype))
        return tirx.Select(outside, past, shifted.astype(dtype))

    return binary(site, shift, "bit_shift")


@converts("Where")
def where(site: Site) -> Result:
    contents = [site.content(i) for i in range(3)]
    if all(c is not None for c in contents) and site.dtype(1).startswith("int"):
        length = max(len(c) for c in contents if c is not None)
        wide = [c * length if len(c) == 1 else c for c in contents if c is not None]
        if all(len(c) == length for c in wide) and all(isinstance(c, int) for c in wide[0]):
            picked = [a if flag else b for flag, a, b in zip(*wide, strict=True)]
            return content_value(site, picked, site.dtype(1), [length] if any(map(site.shape, range(3))) else [])
    if any(value is not None and value.wide is not None for value in site.inputs):
        return site.narrowed(_select(site, site.widened(1), site.widened(2)), site.dtype(1))
    return _select(site, site.x(1), site.x(2))


def _select(site: Site, a: tvm.ir.Expr, b: tvm.ir.Expr) -> tvm.ir.Expr:
    return mapped(site, lambda c, x, y: tirx.Select(c, x, y), "where", site.x(0), a, b)


# Casts.


@converts("Cast", "CastLike")
def cast(site: Site) -> Result:

    target = site.dtype(1) if site.op == "CastLike" else onnx_dtype(int(site.attr("to")))
    value = site.value(0)
    if value.content is not None and target in ("int32", "int64"):
        return content_value(site, value.content, target, site.static())
    if (rounded := rounded_products.rounded(site, target)) is not None:
        return rounded
    return cast_to(site, value.expr, target, bool(site.attr("saturate", 1)))


def cast_to(site: Site, expr: tvm.ir.Expr, target: str, saturate: bool = True) -> tvm.ir.Expr:
    """A cast with C's rules where they are defined: to bool by comparison with 0, to integers towards 0."""
    source = dtype_of(expr)
    if source == target:
        return expr
    array = None if not isinstance(expr, tvm.ir.GenericConst) else np.asarray(expr.value.numpy())
    if array is not None and array.size <= CONTENT_LIMIT and source not in _NARROW and target not in _NARROW:
        with np.errstate(all="ignore"):
            return const(array, target)
    if source in _NARROW or target in _NARROW:
        raise Refuse(f"a cast between {source} and {target} is not compiled")
    if target == "bool":
        different = relax.op.not_equal(expr, const(0, source))
        # TIR's "not equal" is false for NaN.
        return relax.op.logical_or(different, relax.op.isnan(expr)) if is_float(source) else different
    return relax.op.astype(expr, target)


_NARROW = frozenset({
    "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn",
    "int4", "uint4", "int2", "uint2",
})  # fmt: skip


# Activations, by comparisons that leave NaN as it is.


@converts("BitCast")
def bit_cast(site: Site) -> Result:
    target, source = onnx_dtype(int(site.attr("to"))), site.dtype()
    if target == source:
        return site.value(0)
    if "bool" in (target, source):
        raise Refuse("the bits of a bool are not compiled")
    return site.te(
        lambda data: te.compute(data.shape, lambda *i: tirx.reinterpret(target, data(*i)), name="bit_cast"),
        site.x(),
        name="bit_cast",
    )


@converts("IsInf")
def is_inf(site: Site) -> Result:
    x = site.x()
    high, low = bool(site.attr("detect_positive", 1)), bool(site.attr("detect_negative", 1))
    up = relax.op.equal(x, site.like(float("inf")))
    down = relax.op.equal(x, site.like(float("-inf")))
    if high and low:
        return relax.op.logical_or(up, down)
    if not high and not low:
        return relax.op.logical_and(up, down)
    return up if high else down
