"""Trees of elementwise operations as explicit vectors."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

from tvm import tirx
from tvm.tirx.script import builder as T

from ..elements import OPERATIONS, Anchor, Apply, Constant, Load, Tree, expression
from . import quantization
from .functions import FUNCTIONS
from .vector_functions import COMPARISONS, NARROW_INTEGERS
from .vectors import Buffer, Expr, Vectors

RANGES = {
    f"{sign}int{bits}": (0, (1 << bits) - 1) if sign else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    for sign in ("", "u") for bits in (8, 16, 32)
}  # fmt: skip
UNKNOWN = (-math.inf, math.inf)


def _compares_floats(tree: Tree) -> TypeGuard[Apply]:
    return isinstance(tree, Apply) and tree.op in COMPARISONS and tree.args[0].dtype == "float32"


def bounds(tree: Tree) -> tuple[float, float]:
    """Least and greatest value that a tree can have, NaN excluded where they are finite; infinite when not known."""
    if isinstance(tree, Constant):
        return (tree.value, tree.value)
    if isinstance(tree, Load):
        return RANGES.get(tree.dtype, UNKNOWN)
    if not isinstance(tree, Apply):
        return UNKNOWN
    if tree.op in ("max", "min") and isinstance(tree.args[1], Constant) and not math.isnan(tree.args[1].value):
        # A NaN on the left gives way to the number on the right.
        (low, high), limit = bounds(tree.args[0]), tree.args[1].value
        return (max(low, limit), max(high, limit)) if tree.op == "max" else (min(low, limit), min(high, limit))
    if tree.op == "nearbyint":
        low, high = bounds(tree.args[0])
        return (round(low), round(high)) if math.isfinite(low) and math.isfinite(high) else UNKNOWN
    if tree.op == "cast":
        low, high = bounds(tree.args[0])
        least, most = RANGES.get(tree.dtype, UNKNOWN)
        return (math.floor(low), math.ceil(high)) if least <= low and high <= most else (least, most)
    if tree.op in ("add", "sub") and tree.dtype == "int32":
        (a, b), (c, d) = map(bounds, tree.args)
        low, high = (a + c, b + d) if tree.op == "add" else (a - d, b - c)
        return (low, high) if low >= -(1 << 31) and high < 1 << 31 else UNKNOWN
    return UNKNOWN


def narrowed(tree: Tree) -> Tree | None:
    """The int32 tree of which a tree of 8 or 16 bits is the value, unchanged; None where it is none or could wrap."""
    if not isinstance(tree, Apply) or tree.op != "cast" or tree.dtype not in NARROW_INTEGERS:
        return None
    if tree.args[0].dtype != "int32":
        return None
    low, high = bounds(tree.args[0])
    return tree.args[0] if RANGES[tree.dtype][0] <= low and high <= RANGES[tree.dtype][1] else None


def _widened_again(tree: Apply) -> Tree | None:
    """The int32 tree behind one that is cast to 8 bits and back, which lose nothing."""
    return narrowed(tree.args[0]) if tree.op == "cast" and tree.dtype == "int32" else None


def _without_zero_point(tree: Apply) -> Tree | None:
    """min(max(x, a), b) where a tree is min(max(x + z, a + z), b + z), in 8 bits, less z; None for others."""
    inner = _widened_again(tree.args[0]) if tree.op == "sub" and isinstance(tree.args[0], Apply) else None
    limits = []
    for op in ("min", "max", "add"):
        if not isinstance(inner, Apply) or inner.op != op or not isinstance(inner.args[1], Constant):
            return None
        limits.append(inner.args[1])
        inner = inner.args[0]
    high, low, zero = limits
    if inner is None or tree.args[1] != zero:
        return None
    least, most = (Constant(limit.value - zero.value, "int32") for limit in (low, high))
    return Apply("min", (Apply("max", (inner, least), "int32"), most), "int32")


def _saturated(tree: Tree) -> Tree | None:
    """The int32 tree that a tree of 8 bits holds between the bounds of its type; None where it does not."""
    inner = narrowed(tree)
    if inner is None or tree.dtype not in ("int8", "uint8"):
        return None
    for op, bound in zip(("min", "max"), reversed(RANGES[tree.dtype]), strict=True):
        if not isinstance(inner, Apply) or inner.op != op or inner.args[1] != Constant(bound, "int32"):
            return None
        inner = inner.args[0]
    return inner


def _quotient(tree: Tree) -> tuple[Tree, float, int, int] | None:
    """(x, s, low, high) where a tree is min(max(x / s, low), high) with numbers s > 0 and whole low and high."""
    inner, limits = tree, []
    for op in ("min", "max", "div"):
        if not isinstance(inner, Apply) or inner.op != op or inner.dtype != "float32":
            return None
        x, limit = inner.args
        if not isinstance(limit, Constant):
            return None
        limits.append(limit.value)
        inner = x
    high, low, scale = limits
    if not all(float(limit).is_integer() and abs(limit) <= 1 << 17 for limit in (low, high)) or not low <= high:
        return None
    return (inner, scale, int(low), int(high)) if 0 < scale < math.inf else None


def _rounded(tree: Apply) -> Tree | None:
    """The float32 tree whose nearest int32 a tree is."""
    inner = tree.args[0]
    if tree.op == "cast" and tree.dtype == "int32" and isinstance(inner, Apply) and inner.op == "nearbyint":
        return inner.args[0]
    return None


def _scaled_integer(tree: Apply) -> bool:
    """Whether a tree is a product of a number and an integer: the value of a dequantized tensor or of a sum."""
    whole = tree.args[0]
    return (
        tree.op == "mul" and tree.dtype == "float32"
        and isinstance(whole, Apply) and whole.op == "cast" and whole.args[0].dtype == "int32"
    )  # fmt: skip


@functools.lru_cache(maxsize=1 << 12)
def _has_function(tree: Tree) -> bool:
    return isinstance(tree, Apply) and (tree.op in FUNCTIONS or any(map(_has_function, tree.args)))


@dataclass
class TreeEmitter:
    """Emits a tree as vectors into the IR builder that is open. buffers: the flat tensors that loads refer to."""

    vectors: Vectors
    buffers: Sequence[Buffer]
    index: str = "int64"
    _done: dict[Tree, Expr] = field(default_factory=dict)

    def vector(self, tree: Tree, place: Sequence[Expr], count: int | Expr | None = None, anchor: Expr = None) -> Expr:
        """`tree` at `place`, the values of the axes of which the last is that of the first lane.

        count: lanes that exist, None for all. anchor: the vector that Anchor stands for.
        """
        self._done = {}
        return self._emit(tree, place, count, anchor)

    def _emit(self, tree: Tree, place: Sequence[Expr], count: int | Expr | None, anchor: Expr) -> Expr:
        if tree in self._done:
            return self._done[tree]
        v = self.vectors
        if isinstance(tree, Anchor):
            result = T.Bind(anchor)
        elif isinstance(tree, Constant):
            return self._constant(tree.value, tree.dtype)
        elif isinstance(tree, Load):
            result = self._load(tree, place, count)
        elif tree.op == "select" and _compares_floats(tree.args[0]) and tree.dtype == "float32":
            comparison = tree.args[0]
            sides = [self._emit(a, place, count, anchor) for a in (*comparison.args, *tree.args[1:])]
            result = v.choose(comparison.op, *sides)
        elif (quotient := _quotient(tree)) is not None:
            x, scale, low, high = quotient
            result = quantization.quotient(v, self._emit(x, place, count, anchor), scale, low, high)
        elif (real := _rounded(tree)) is not None:
            result = v.nearest(self._emit(real, place, count, anchor))
        elif _scaled_integer(tree):
            result = v.apart(
                self._emit(tree.args[0], place, count, anchor) * self._emit(tree.args[1], place, count, anchor)
            )
        elif (whole := _widened_again(tree) or _without_zero_point(tree)) is not None:
            result = self._emit(whole, place, count, anchor)
        elif self.vectors.saturates and (within := _saturated(tree)) is not None:
            result = v.narrow(self._emit(within, place, count, anchor), tree.dtype)
        elif (wide := narrowed(tree)) is not None:
            result = v.narrow(self._emit(wide, place, count, anchor), tree.dtype)
        else:
            args = [self._emit(a, place, count, anchor) for a in tree.args]
            if tree.op == "round":
                result = v.rounded(args[0])
            elif tree.op == "widen":
                result = v.of_bits(args[0])
            elif tree.op == "select":
                result = T.Select(*args)
                result = result if tree.dtype == "bool" else T.Bind(result)
            elif tree.op == "cast" and tree.args[0].dtype == "bool" and tree.dtype != "bool":
                # Nor numbers that are cast from them.
                result = T.Bind(T.Select(args[0], self._constant(1, tree.dtype), self._constant(0, tree.dtype)))
            elif tree.op == "cast":
                result = T.Cast(f"{tree.dtype}x{v.lanes}", args[0])
                result = result if tree.dtype == "bool" else T.Bind(result)
            elif tree.op in OPERATIONS:
                # TVM cannot bind vectors of truth values.
                result = OPERATIONS[tree.op](*args)
                result = result if tree.dtype == "bool" else T.Bind(result)
            else:
                # A function of another one's result would hold all of it, wherever it occurs in the function.
                result = FUNCTIONS[tree.op](v, v.placed(args[0]) if _has_function(tree.args[0]) else args[0])
        self._done[tree] = result
        return result

    def _constant(self, value: float | int, dtype: str) -> Expr:
        return T.broadcast(tirx.const(value, dtype), self.vectors.lanes)

    def _load(self, load: Load, place: Sequence[Expr], count: int | Expr | None) -> Expr:
        v, buffer = self.vectors, self.buffers[load.source]
        offset: Expr = expression(load.base, self.index)
        for stride, at in zip(load.strides, place, strict=True):
            if stride != 0:
                offset = offset + at * expression(stride, self.index)
        if load.strides and load.strides[-1] == 1:
            return v.load(buffer, offset, tirx.const(count, self.index) if isinstance(count, int) else count)
        return T.Bind(T.broadcast(buffer[offset], v.lanes))
