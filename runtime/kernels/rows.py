"""Kernels over the rows of tensors: flat parameters of any shape, sweeps in vectors along a row, rows over threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, TypeAlias

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ..target import InstructionSet
from ..work import OP, with_flops
from .vectors import LOWEST, Buffer, Expr, Vectors

OPAQUE = 8  # Relax's operator pattern of a function that nothing is fused into
# Elements below which a second thread costs more than it gives.
PARALLEL = 1 << 16
UNROLLED = 16  # vectors of a row up to which a sweep is written out without a loop
# What a lane of float32 adds up before its sum is added to those of the other blocks.
LANE_TERMS = 1 << 8

# A size, or the name of one that is known at run time. Equal names are equal sizes.
Size: TypeAlias = "int | str"
Shape: TypeAlias = "Sequence[Size]"
# Called with offsets of vectors, and how many elements the last of them has, None for all.
Body = Callable[[list[Expr], "int | Expr | None"], None]


def flat_kernel(
    symbol: str,
    tensors: Mapping[str, tuple[Shape, str]],
    isa: InstructionSet,
    write: Callable[[Vectors, dict[str, Buffer], Callable[[Size], int | Expr], str], None],
    exported: bool = False,
    flops: int | Sequence[Size] | None = None,
    vectors: Callable[[InstructionSet], Vectors] = Vectors,
) -> tirx.PrimFunc:
    """A function of tensors, the output last, each as (shape, element type).

    write: called as `write(vectors, flat buffers by name, size, index)`; size(d) is d as a number or expression,
    index the type of offsets. exported: keep the symbol; else only its own module calls it. flops: the number of
    operations, or sizes whose product it is; None where nobody knows.
    """
    shapes = [shape for shape, _ in tensors.values()]
    static = all(isinstance(d, int) for shape in shapes for d in shape)
    index = "int32" if static and all(_product(s) < 1 << 30 for s in shapes) else "int64"
    symbols = {d: tirx.Var(d, index) for shape in shapes for d in shape if isinstance(d, str)}

    def size(d: Size) -> int | Expr:
        return d if isinstance(d, int) else symbols[d]

    with IRBuilder() as builder, T.prim_func(is_private=not exported, s_tir=True):
        T.func_name(symbol)
        T.func_attr({"tirx.noalias": True, "op_pattern": OPAQUE, "tirx.is_scheduled": True, OP: symbol})
        given, flat = {}, {}
        for name, (shape, dtype) in tensors.items():
            dims = [tirx.const(d, index) if isinstance(d, int) else symbols[d] for d in shape]
            given[name] = T.match_buffer(T.arg(name, T.handle()), dims, dtype)
        v = vectors(isa)
        with T.sblock("root"):
            # Nobody asks what the root block touches; left out, TVM spends up to minutes to find it out.
            T.reads()
            T.writes()
            for name, buffer in given.items():
                length = reduce(lambda a, b: a * b, buffer.shape, tirx.const(1, index))
                flat[name] = T.decl_buffer((length,), tensors[name][1], data=buffer.data)
            with v.prelude(*(dtype for _, dtype in tensors.values())):
                write(v, flat, size, index)
    if flops is None:
        return builder.get()
    return with_flops(builder.get(), [flops] if isinstance(flops, int) else flops)


def _product(shape: Shape) -> int:
    return reduce(lambda a, b: a * (b if isinstance(b, int) else 1), shape, 1)


def number_of(dims: Shape, size: Callable[[Size], int | Expr]) -> int | Expr:
    """The product of sizes."""
    known = _product(dims)
    open_ones = [size(d) for d in dims if isinstance(d, str)]
    return T.Bind(reduce(lambda a, b: a * b, open_ones) * known) if open_ones else known


def each_row(rows: int | Expr, work: int | Expr, threads: int, index: str, body: Callable[[Expr], None]) -> None:
    """`body(row)` for all rows, over threads where `work` elements are enough."""
    count = tirx.const(rows, index) if isinstance(rows, int) else rows

    def loop(parallel: bool) -> None:
        with (T.parallel if parallel else T.serial)(count) as row:
            body(row)

    if rows == 0:
        return
    if threads == 1 or (isinstance(rows, int) and rows == 1) or isinstance(work, int):
        loop(threads > 1 and rows != 1 and isinstance(work, int) and work >= PARALLEL)
        return
    with T.If(work >= tirx.const(PARALLEL, index)):
        with T.Then():
            loop(True)
        with T.Else():
            loop(False)


def sweep(v: Vectors, length: int | Expr, group: int, start: Expr, index: str, body: Body) -> None:
    """`body` over `length` elements from `start`: `group` vectors at a time, then those that remain, the last of them
    with fewer elements where there are fewer."""
    step = group * v.lanes
    if not isinstance(length, int):
        _open_sweep(v, length, step, start, index, body)
        return
    turns, rest = divmod(length, step)
    if length <= UNROLLED * v.lanes:
        for turn in range(turns):
            body([start + (turn * step + j * v.lanes) for j in range(group)], None)
    elif turns:
        with T.serial(tirx.const(turns, index)) as turn:
            at = T.Bind(start + turn * tirx.const(step, index))
            body([at + j * v.lanes for j in range(group)], None)
    done, part = turns * step, rest % v.lanes
    if rest // v.lanes:
        body([start + (done + j * v.lanes) for j in range(rest // v.lanes)], None)
    if part:
        body([start + (length - part)], part)


def _open_sweep(v: Vectors, length: Expr, step: int, start: Expr, index: str, body: Body) -> None:
    """A sweep over a number of elements that is known at run time."""

    def const(value: int) -> Expr:
        return tirx.const(value, index)

    turns = T.Bind(T.shift_right(length, const(step.bit_length() - 1)))
    with T.serial(turns) as turn:
        at = T.Bind(start + turn * const(step))
        body([at + j for j in range(0, step, v.lanes)], None)
    done = T.Bind(turns * const(step))
    with T.serial(T.shift_right(length - done, const(v.lanes.bit_length() - 1))) as turn:
        body([T.Bind(start + done + turn * const(v.lanes))], None)
    part = T.Bind(T.bitwise_and(length, const(v.lanes - 1)))
    with T.If(part > const(0)), T.Then():
        body([T.Bind(start + (length - part))], part)


# Called with a sum, the offset of a vector and its number of elements, None for all; gives the new sum.
Term = Callable[[Expr, Expr, "int | Expr | None"], Expr]


def row_total(v: Vectors, length: int | Expr, start: Expr, index: str, term: Term) -> Expr:
    """The sum over a row, as a scalar. term(sum, offset, count): the sum with the vector at the offset added."""
    group = 4 if v.wide else 2
    block = LANE_TERMS * group * v.lanes
    if isinstance(length, int) and length <= block:
        return v.total(_lanes_total(v, length, group, start, index, term))
    whole = v.registers(1, 0.0)

    def add(count: int | Expr, first: Expr) -> None:
        T.buffer_store(whole, whole[v.at(0)] + _lanes_total(v, count, group, first, index, term), [v.at(0)])

    if isinstance(length, int):
        blocks, rest = tirx.const(length // block, index), length % block
    else:
        blocks = T.Bind(T.shift_right(length, tirx.const(block.bit_length() - 1, index)))
        rest = T.Bind(T.bitwise_and(length, tirx.const(block - 1, index)))
    with T.serial(blocks) as b:
        add(block, T.Bind(start + b * tirx.const(block, index)))
    if not isinstance(rest, int) or rest:
        add(rest, T.Bind(start + (length - rest)))
    return v.total(whole[v.at(0)])


def _lanes_total(v: Vectors, length: int | Expr, group: int, start: Expr, index: str, term: Term) -> Expr:
    return folded(v, length, group, start, index, 0.0, term, lambda a, b: a + b)


def row_most(v: Vectors, length: int | Expr, start: Expr, index: str, x: Buffer) -> Expr:
    """The greatest element of a row, as a scalar; LOWEST where all are -infinity. Whether a NaN is seen depends on its
    place."""

    def term(most: Expr, at: Expr, part: int | Expr | None) -> Expr:
        return T.max(most, v.load(x, at, count_of(part, index), LOWEST))

    return v.greatest(folded(v, length, 4, start, index, LOWEST, term, T.max))


def folded(
    v: Vectors, length: int | Expr, group: int, start: Expr, index: str, first: float, term: Term,
    combine: Callable[[Expr, Expr], Expr],
) -> Expr:  # fmt: skip
    """A row folded into one vector by `group` accumulators that begin with `first`."""
    sums = v.registers(group, first)

    def body(offsets: list[Expr], part: int | Expr | None) -> None:
        for j, offset in enumerate(offsets):
            here = v.at(j * v.lanes)
            T.buffer_store(sums, term(sums[here], offset, part), [here])

    sweep(v, length, group, start, index, body)
    return tree(combine, [sums[v.at(j * v.lanes)] for j in range(group)])


def tree(combine: Callable[[Expr, Expr], Expr], values: list[Any]) -> Expr:
    """`values` combined pairwise, so that the chain of dependent operations is short."""
    while len(values) > 1:
        pairs = [T.Bind(combine(a, b)) for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + ([values[-1]] if len(values) % 2 else [])
    return values[0]


def count_of(part: int | Expr | None, index: str) -> Expr | None:
    """Elements of a vector as `Vectors.load` and `store` take them."""
    return tirx.const(part, index) if isinstance(part, int) else part
