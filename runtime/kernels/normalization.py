"""LayerNormalization and RMSNormalization of float32 rows.

A row is read three times from the innermost cache: its mean, the mean and the mean square of its deviations from that
mean, the result. The mean of the deviations is what the mean was rounded by, which counts where it is large beside
them; the variance is never a difference of large numbers.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from ..target import InstructionSet
from .rows import Shape, Size, count_of, each_row, flat_kernel, number_of, row_total, sweep
from .vectors import Buffer, Expr, Vectors

GROUP = 4  # vectors of one turn


def normalization(
    rows: Shape,
    row: tuple[int, ...],
    epsilon: float,
    isa: InstructionSet,
    threads: int = 1,
    centred: bool = True,
    bias: bool = False,
    name: str | None = None,
) -> tirx.PrimFunc:
    """A kernel (X, scale[, bias], Y) -> None: Y = (X - mean) / sqrt(variance + epsilon) · scale + bias for each row.

    X and Y have the shape (*rows, *row), scale and bias one axis with as many elements as a row. centred: else the mean
    is taken for 0. name: of the exported symbol; None for a function that only its own module calls.
    """
    length = math.prod(row)
    tensors: dict[str, tuple[Shape, str]] = {"x": ((*rows, *row), "float32"), "scale": ((length,), "float32")}
    if bias:
        tensors["bias"] = ((length,), "float32")
    tensors["y"] = ((*rows, *row), "float32")

    def write(v: Vectors, buffers: dict[str, Buffer], size: Callable[[Size], int | Expr], index: str) -> None:
        count = number_of(rows, size)
        if length == 0:
            return
        emit = _row(v, buffers, length, epsilon, centred, index)
        each_row(count, count * length, threads, index, lambda r: emit(T.Bind(r * tirx.const(length, index))))

    symbol = name or ("layer_normalization" if centred else "rms_normalization")
    return flat_kernel(symbol, tensors, isa, write, name is not None, [*rows, length, 8 if centred else 4])


def _row(
    v: Vectors, buffers: dict[str, Buffer], length: int, epsilon: float, centred: bool, index: str
) -> Callable[[Expr], None]:
    x, y, scale, bias = buffers["x"], buffers["y"], buffers["scale"], buffers.get("bias")
    share = T.float32(1 / length)

    def load(buffer: Buffer, offset: Expr, part: int | Expr | None, fill: Expr | float = 0.0) -> Expr:
        return v.load(buffer, offset, count_of(part, index), fill)

    def emit(start: Expr) -> None:
        mean: Expr = None
        if centred:
            total = row_total(v, length, start, index, lambda s, at, part: s + load(x, at, part))
            mean = T.Bind(v.splat(T.Bind(total * share)))

        left: Buffer = v.registers(GROUP, 0.0) if centred else None
        turn = itertools.count()

        def square(total: Expr, at: Expr, part: int | Expr | None) -> Expr:
            value = load(x, at, part)
            if centred:
                value = T.Bind(value - mean)
                if part is not None:
                    # Lanes behind the row hold 0 - mean.
                    numbers = T.ramp(tirx.const(0, "int32"), 1, v.lanes)
                    there = numbers < T.broadcast(T.Cast("int32", count_of(part, index)), v.lanes)
                    value = T.Bind(T.Select(there, value, v.splat(0.0)))
                place = v.at(next(turn) % GROUP * v.lanes)
                T.buffer_store(left, left[place] + value, [place])
            return v.fma(value, value, total)

        variance = row_total(v, length, start, index, square) * share
        if centred:
            sums = functools.reduce(lambda a, b: a + b, (left[v.at(j * v.lanes)] for j in range(GROUP)))
            rounded = T.Bind(v.total(sums) * share)
            # Infinity, of numbers whose squares are, stays infinity: the row becomes the bias. A NaN stays one.
            square_of_rounded = T.min(rounded * rounded, T.float32(np.finfo(np.float32).max))
            variance = T.max(T.float32(0), T.Bind(variance - square_of_rounded))
        root = T.Bind(T.call_llvm_pure_intrin(
            T.llvm_lookup_intrinsic_id("llvm.sqrt.f32"), variance + T.float32(epsilon), dtype="float32"
        ))  # fmt: skip
        inverse = T.Bind(v.splat(T.Bind(T.float32(1) / root)))
        shift = T.Bind(v.splat(-rounded) * inverse) if centred else None

        def output(offsets: list[Expr], part: int | Expr | None) -> None:
            for offset in offsets:
                column = offset - start
                value = load(x, offset, part)
                value = v.fma(value - mean, inverse, shift) if centred else T.Bind(value * inverse)
                factor = load(scale, column, part)
                value = value * factor if bias is None else v.fma(value, factor, load(bias, column, part))
                v.store(y, offset, value, count_of(part, index))

        sweep(v, length, GROUP, start, index, output)

    return emit
