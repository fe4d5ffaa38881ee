"""LogSoftmax and the logarithm of the sum of exponentials of rows, in float32, m being the row's maximum:

LSE = m + log of the sum of e^(x - m),   Y = (x - m) - log of the sum of e^(x - m)
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script import builder as T

from ..target import InstructionSet
from . import functions
from .rows import Shape, Size, count_of, each_row, flat_kernel, number_of, row_most, row_total, sweep
from .vectors import NEGATIVE_INFINITY, Buffer, Expr, Vectors

GROUP = 4  # vectors of one turn
# Work of an element against that of a sum: an exponential.
WEIGHT = 4


def _log_total(v: Vectors, x: Buffer, start: Expr, length: int | Expr, most: Expr, index: str) -> Expr:
    """log of the sum of e^(x - most) over a row, in every lane."""

    def term(total: Expr, at: Expr, part: Expr | int | None) -> Expr:
        value = v.load(x, at, count_of(part, index), NEGATIVE_INFINITY)
        return total + v.exp(value - v.splat(most), low=False)

    return T.Bind(functions.log(v, v.splat(row_total(v, length, start, index, term))))


def log_sum_exp(
    rows: Shape, length: Size, isa: InstructionSet, threads: int = 1, name: str | None = None, dtype: str = "float32"
) -> tirx.PrimFunc:
    """A kernel (X, Y) -> None: the LSE of each row of X (*rows, length); infinite where an element is, or all are -inf.
    A NaN gives NaN.

    name: of the exported symbol; None for a function that only its own module calls. dtype: of X, float32, float16 or
    bfloat16; Y is float32.
    """

    def write(v: Vectors, buffers: dict[str, Buffer], size: Callable[[Size], int | Expr], index: str) -> None:
        count, width = number_of(rows, size), size(length)
        x, y = buffers["x"], buffers["y"]

        def square(total: Expr, at: Expr, part: Expr | int | None) -> Expr:
            value = v.load(x, at, count_of(part, index))
            return v.fma(value, value, total)

        def emit(row: Expr) -> None:
            start = T.Bind(row * width)
            most = row_most(v, width, start, index, x)
            with T.If(most == T.float32(math.inf)):
                with T.Then():
                    # inf - inf is no number, though the sum is infinite; that of squares is NaN where an element is.
                    v.store(y, row, v.splat(row_total(v, width, start, index, square)), tirx.const(1, index))
                with T.Else():
                    total = v.splat(most) + _log_total(v, x, start, width, most, index)
                    v.store(y, row, T.Bind(total), tirx.const(1, index))

        each_row(count, count * width * WEIGHT, threads, index, emit)

    known = [d for d in (*rows, length) if isinstance(d, int)]
    flops = 20 * math.prod(known) if len(known) == len(rows) + 1 else None
    tensors: dict[str, tuple[Shape, str]] = {"x": ((*rows, length), dtype), "y": (tuple(rows), "float32")}
    return flat_kernel(name or "log_sum_exp", tensors, isa, write, name is not None, flops)


def log_softmax(
    shape: Shape, isa: InstructionSet, threads: int = 1, name: str | None = None,
    types: tuple[str, str] = ("float32", "float32"),
) -> tirx.PrimFunc:  # fmt: skip
    """A kernel (X, Y) -> None over the last axis of a shape.

    name: of the exported symbol; None for a function that only its own module calls. types: of X and Y, float32,
    float16 or bfloat16.
    """
    *rows, row = shape

    def write(v: Vectors, buffers: dict[str, Buffer], size: Callable[[Size], int | Expr], index: str) -> None:
        count, length = number_of(rows, size), size(row)
        if isinstance(length, int) and length == 0:
            return
        x, y = buffers["x"], buffers["y"]

        def emit(number: Expr) -> None:
            start = T.Bind(number * length)
            most = row_most(v, length, start, index, x)
            shift = _log_total(v, x, start, length, most, index)

            def output(offsets: list[Expr], part: Expr | int | None) -> None:
                for offset in offsets:
                    value = v.load(x, offset, count_of(part, index))
                    v.store(y, offset, (value - v.splat(most)) - shift, count_of(part, index))

            sweep(v, length, GROUP, start, index, output)

        each_row(count, count * length * WEIGHT, threads, index, emit)

    static = [d for d in shape if isinstance(d, int)]
    flops = 20 * math.prod(static) if len(static) == len(shape) else None
    tensors: dict[str, tuple[Shape, str]] = {"x": (shape, types[0]), "y": (shape, types[1])}
    return flat_kernel(name or "log_softmax", tensors, isa, write, name is not None, flops)
