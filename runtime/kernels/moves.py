"""Kernels that only move elements: transpositions by square tiles in registers, channels into blocks and out of them.

A tile of L x L elements of 1, 2 or 4 bytes is read as L vectors along the axis that is contiguous in the source,
transposed by log2(L) rounds of shuffles, and written as L vectors along the axis that is contiguous in the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ..elements import Size, Symbol, expression, fixed, product
from ..target import Target
from .vectors import Buffer, Expr, Vectors

OPAQUE = 8  # Relax's operator pattern of a function that nothing is fused into
# Elements below which a second thread costs more than it gives.
PARALLEL = 1 << 16
PLACES = 1 << 12  # what an image is taken to have where that is known only at run time
# LLVM's type of elements that are moved, by the type of theirs; bits are not looked at.
ELEMENTS = {"float32": "float", "int32": "float", "int16": "i16", "uint16": "i16", "int8": "i8", "uint8": "i8"}
BYTES = {"float": 4, "i16": 2, "i8": 1}


def function_name(lanes: int, dtype: str, part: bool = False) -> str:
    return f"gw_transpose_{ELEMENTS[dtype]}_{'part_' if part else ''}{lanes}"


def transposition(lanes: int, dtype: str, part: bool = False) -> str:
    """LLVM IR of a function (source, its stride, result, its stride): a tile of L x L elements, strides in elements
    between vectors of the source and of the result.

    part: it takes two more, how many vectors of the source and of the result there are. Those beyond
    are the last one of the source, and left out of the result.
    """
    element = ELEMENTS[dtype]
    vector, align = f"<{lanes} x {element}>", BYTES[element]
    name, more = function_name(lanes, dtype, part), ", i64 %sn, i64 %dn" if part else ""
    lines = [f"define i32 @{name}(ptr %s, i64 %ss, ptr %d, i64 %ds{more}) alwaysinline {{"]

    def address(side: str, i: int) -> None:
        number = str(i)
        if part:
            number = f"%{side}i{i}"
            lines.append(f"  %{side}c{i} = icmp slt i64 {i}, %{side}n")
            lines.append(f"  {number} = select i1 %{side}c{i}, i64 {i}, i64 %{side}l")
        lines.append(f"  %{side}o{i} = mul i64 %{side}s, {number}")
        lines.append(f"  %{side}p{i} = getelementptr {element}, ptr %{side}, i64 %{side}o{i}")

    if part:
        lines += [f"  %{side}l = sub i64 %{side}n, 1" for side in "sd"]
    for i in range(lanes):
        address("s", i)
        lines.append(f"  %r0_{i} = load {vector}, ptr %sp{i}, align {align}")
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
    # The last vector that exists is written after those beyond it, which go to its place.
    for i in reversed(range(lanes)):
        address("d", i)
        lines.append(f"  store {vector} %r{stage}_{i}, ptr %dp{i}, align {align}")
    return "\n".join([*lines, "  ret i32 0", "}", ""])


def prelude(v: Vectors, dtype: str) -> Any:
    """A scope in which the functions below may be called on one type of elements, besides that of the vectors."""
    code = transposition(v.lanes, dtype) + transposition(v.lanes, dtype, part=True)
    return T.attr(T.int32(0), "pragma_import_llvm", code)


def blocks(shape: Sequence[Any], target: Target, into: bool, dtype: str) -> tirx.PrimFunc:
    """A kernel (x, y) that brings the channels of (N, C, ...) into blocks of a vector, or out of them. Sizes other than
    C may be known only at run time.
    """
    v = Vectors(target.isa)
    batch, channels, *rest = (d if isinstance(d, int) else Symbol(tirx.Var("size", "int64")) for d in shape)
    assert isinstance(channels, int)
    places = product(rest)
    plain = (batch, channels, *rest)
    packed = (batch, -(-channels // v.lanes), *rest, v.lanes)
    size = product(packed)
    index = "int32" if isinstance(size, int) and size < 1 << 30 else "int64"
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_name("pack" if into else "unpack")
        T.func_attr({"tirx.noalias": True, "op_pattern": OPAQUE, "tirx.is_scheduled": True})
        ends = [
            T.match_buffer(T.arg(name, T.handle()), [expression(d, index) for d in dims], dtype)
            for name, dims in (("x", plain if into else packed), ("y", packed if into else plain))
        ]
        with T.sblock("root"):
            T.reads()
            T.writes()
            x, y = (
                T.decl_buffer((expression(product(dims), index),), dtype, data=e.data)
                for e, dims in zip(ends, (plain, packed) if into else (packed, plain), strict=True)
            )
            with v.prelude(), prelude(v, dtype):
                emit_blocks(v, x, y, batch, channels, places, target.cores, index, into)
    return builder.get()


def emit_blocks(
    v: Vectors, x: Buffer, y: Buffer, batch: Size, channels: int, places: Size, threads: int, index: str, into: bool
) -> None:
    """Y = X with its channels in blocks of a vector, or (into=False) out of them. Lanes beyond the channels repeat the
    last one, or are 0 where there is known to be one place.

    x, y: flat, of one type. Emits into the IR builder that is open, within `prelude`.
    """
    lanes, blocks = v.lanes, -(-channels // v.lanes)

    def const(value: int) -> Expr:
        return tirx.const(value, index)

    known = (batch if isinstance(batch, int) else 1) * (places if isinstance(places, int) else PLACES)
    count = product((batch, blocks))
    size = const(places) if isinstance(places, int) else v.opaque(expression(places, index))
    wide = threads > 1 and known * channels >= PARALLEL and count != 1
    with (T.parallel if wide else T.serial)(expression(count, index)) as task:
        n, block = T.Bind(task // const(blocks)), T.Bind(task % const(blocks))
        plain = T.Bind((n * const(channels) + block * const(lanes)) * size)
        packed = T.Bind(task * (size * const(lanes)))

        def one_by_one(there: int) -> None:
            with T.serial(size) as place:
                for lane in range(lanes if into else there):
                    outside = plain + const(min(lane, there - 1)) * size + place
                    inside = packed + place * const(lanes) + const(lane)
                    source, result = (outside, inside) if into else (inside, outside)
                    T.buffer_store(y, x[source], [result])

        def by_tiles(there: int) -> None:
            with T.serial((size + const(lanes - 1)) // const(lanes)) as tile:
                place = T.Bind(T.min(tile * const(lanes), size - const(lanes)))
                outside, inside = plain + place, packed + place * const(lanes)
                sides = ((outside, T.Cast("int64", size), there), (inside, T.int64(lanes), lanes))
                (source, step, first), (result, apart, second) = sides if into else reversed(sides)
                arguments = [T.address_of(x[source]), step, T.address_of(y[result]), apart]
                if there < lanes:
                    arguments += [T.int64(first), T.int64(second)]
                name = function_name(lanes, str(x.dtype), there < lanes)
                T.evaluate(T.call_extern("int32", name, *arguments))

        def move(there: int) -> None:
            """The block's first `there` channels."""
            if places == 1:
                count = None if there == lanes else const(there)
                source, result = (plain, packed) if into else (packed, plain)
                value = v.load(x, source, count if into else None)
                v.store(y, result, value, None if into else count)
            elif isinstance(places, int):
                (by_tiles if places >= lanes else one_by_one)(there)
            else:
                with T.If(size >= const(lanes)):
                    with T.Then():
                        by_tiles(there)
                    with T.Else():
                        one_by_one(there)

        if channels % lanes == 0:
            move(lanes)
        elif blocks == 1:
            move(channels)
        else:
            with T.If(block < const(blocks - 1)):
                with T.Then():
                    move(lanes)
                with T.Else():
                    move(channels % lanes)


def emit_transpose(
    v: Vectors,
    x: Buffer,
    base: int,
    strides: Sequence[Size],
    extents: Sequence[Size],
    y: Buffer,
    threads: int,
    index: str,
) -> None:
    """Y[i...] = X[base + strides · i] for a row-major Y of the extents. One stride is 1, not the last. Raises
    NotElementwise where a size of that axis or of the last is known only at run time.

    x, y: flat, of one type. Emits into the IR builder that is open, within `prelude`.
    """
    row_axis = max(axis for axis, stride in enumerate(strides) if stride == 1 and extents[axis] != 1)
    last = len(extents) - 1
    size = [product(extents[axis + 1 :]) for axis in range(len(extents))]
    rows, columns, row_size, step_size = fixed((extents[row_axis], extents[last], size[row_axis], strides[last]))
    outer = [axis for axis in range(len(extents)) if axis not in (row_axis, last)]
    lanes = v.lanes

    def const(value: int) -> Expr:
        return tirx.const(value, index)

    strips = -(-rows // lanes)
    count = product((*(extents[axis] for axis in outer), strips))
    known = math.prod(extent for extent in extents if isinstance(extent, int))
    wide = threads > 1 and known >= PARALLEL and count != 1
    quotient, remainder = v.divisions(isinstance(count, int))
    with (T.parallel if wide else T.serial)(expression(count, index)) as step:
        strip = remainder(step, const(strips))
        rest = quotient(step, const(strips))
        source: Expr = const(base)
        result: Expr = const(0)
        for position, axis in reversed(list(enumerate(outer))):
            at = rest if position == 0 else remainder(rest, expression(extents[axis], index))
            rest = rest if position == 0 else quotient(rest, expression(extents[axis], index))
            source = source + at * expression(strides[axis], index)
            result = result + at * expression(size[axis], index)
        row = strip * const(lanes)
        source = T.Bind(source + row)
        result = T.Bind(result + row * const(row_size))

        def single(i: Expr, j: Expr) -> None:
            T.buffer_store(y, x[source + j * const(step_size) + i], [result + i * const(row_size) + j])

        def whole() -> None:
            if columns // lanes:
                with T.serial(const(columns // lanes)) as tile:
                    column = T.Bind(tile * const(lanes))
                    arguments = (
                        T.address_of(x[source + column * const(step_size)]), T.int64(step_size),
                        T.address_of(y[result + column]), T.int64(row_size),
                    )  # fmt: skip
                    T.evaluate(T.call_extern("int32", function_name(lanes, str(x.dtype)), *arguments))
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
