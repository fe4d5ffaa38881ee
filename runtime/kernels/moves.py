"""Kernels that only move elements: transpositions by square tiles in registers, channels into blocks and out of them.

A tile of L x L elements is read as L vectors along the axis that is contiguous in the source, transposed by log2(L)
rounds of shuffles, and written as L vectors along the axis that is contiguous in the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .vectors import Buffer, Expr, Vectors

# Elements below which a second thread costs more than it gives.
PARALLEL = 1 << 16


def transposition(lanes: int) -> str:
    """LLVM IR of gw_transpose_L(source, its stride, result, its stride): a tile of L x L float32, strides in elements
    between vectors of the source and of the result."""
    vector = f"<{lanes} x float>"
    lines = [f"define i32 @gw_transpose_{lanes}(ptr %s, i64 %ss, ptr %d, i64 %ds) alwaysinline {{"]
    for i in range(lanes):
        lines.append(f"  %so{i} = mul i64 %ss, {i}")
        lines.append(f"  %sp{i} = getelementptr float, ptr %s, i64 %so{i}")
        lines.append(f"  %r0_{i} = load {vector}, ptr %sp{i}, align 4")
    half, stage = lanes // 2, 0
    while half:
        # Swap the off-diagonal blocks of `half` x `half` elements between rows that are `half` apart.
        for i in range(lanes):
            if i & half:
                continue
            a, b = f"%r{stage}_{i}", f"%r{stage}_{i + half}"
            low = [(j if not j & half else lanes + j - half) for j in range(lanes)]
            high = [(j + half if not j & half else lanes + j) for j in range(lanes)]
            for row, order in ((i, low), (i + half, high)):
                index = ", ".join(f"i32 {o}" for o in order)
                lines.append(
                    f"  %r{stage + 1}_{row} = shufflevector {vector} {a}, {vector} {b}, <{lanes} x i32> <{index}>"
                )
        half, stage = half // 2, stage + 1
    for i in range(lanes):
        lines.append(f"  %do{i} = mul i64 %ds, {i}")
        lines.append(f"  %dp{i} = getelementptr float, ptr %d, i64 %do{i}")
        lines.append(f"  store {vector} %r{stage}_{i}, ptr %dp{i}, align 4")
    return "\n".join([*lines, "  ret i32 0", "}", ""])


def prelude(v: Vectors) -> Any:
    """A scope in which `emit_transpose` may be called, besides that of the vectors."""
    return T.attr(T.int32(0), "pragma_import_llvm", transposition(v.lanes))


def emit_transpose(
    v: Vectors,
    x: Buffer,
    base: int,
    strides: Sequence[int],
    extents: Sequence[int],
    y: Buffer,
    threads: int,
    index: str,
) -> None:
    """Y[i...] = X[base + strides · i] for a row-major Y of the extents. One stride is 1, not the last.

    x, y: flat float32. Emits into the IR builder that is open, within `prelude`.
    """
    row_axis = max(axis for axis, stride in enumerate(strides) if stride == 1 and extents[axis] > 1)
    last = len(extents) - 1
    size = [math.prod(extents[axis + 1 :]) for axis in range(len(extents))]
    rows, columns = extents[row_axis], extents[last]
    outer = [axis for axis in range(len(extents)) if axis not in (row_axis, last)]
    lanes = v.lanes

    def const(value: int) -> Expr:
        return tirx.const(value, index)

    strips = -(-rows // lanes)
    count = math.prod(extents[axis] for axis in outer) * strips
    wide = threads > 1 and math.prod(extents) >= PARALLEL and count > 1
    with (T.parallel if wide else T.serial)(const(count)) as step:
        strip = T.Bind(tirx.floormod(step, const(strips)))
        rest = T.Bind(tirx.floordiv(step, const(strips)))
        source: Expr = const(base)
        result: Expr = const(0)
        for position, axis in reversed(list(enumerate(outer))):
            at = rest if position == 0 else T.Bind(tirx.floormod(rest, const(extents[axis])))
            rest = rest if position == 0 else T.Bind(tirx.floordiv(rest, const(extents[axis])))
            source = source + at * const(strides[axis])
            result = result + at * const(size[axis])
        row = strip * const(lanes)
        source = T.Bind(source + row)
        result = T.Bind(result + row * const(size[row_axis]))

        def single(i: Expr, j: Expr) -> None:
            T.buffer_store(y, x[source + j * const(strides[last]) + i], [result + i * const(size[row_axis]) + j])

        def whole() -> None:
            if columns // lanes:
                with T.serial(const(columns // lanes)) as tile:
                    column = T.Bind(tile * const(lanes))
                    arguments = (
                        T.address_of(x[source + column * const(strides[last])]), T.int64(strides[last]),
                        T.address_of(y[result + column]), T.int64(size[row_axis]),
                    )  # fmt: skip
                    T.evaluate(T.call_extern("int32", f"gw_transpose_{lanes}", *arguments))
            if columns % lanes:
                with T.serial(const(lanes)) as i:
                    for j in range(columns - columns % lanes, columns):
                        single(i, const(j))

        def partly() -> None:
            with T.serial(const(rows % lanes)) as i, T.serial(const(columns)) as j:
                single(i, j)

        if rows % lanes == 0:
            whole()
        elif rows < lanes:
            partly()
        else:
            with T.If(strip < const(rows // lanes)):
                with T.Then():
                    whole()
                with T.Else():
                    partly()
