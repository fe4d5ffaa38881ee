"""TopK of float32 rows: one pass with a short sorted list of the best so far.

A block of vectors is compared with the last of the list, lane by lane, and passed over where none is above it; of
others each element that is above is inserted. Of random numbers a row of n elements takes about k·log(n/k) insertions.
Equal elements stay in the order of their places. NaN counts as infinity, or as minus infinity where the least are asked
for.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script import builder as T

from ..target import InstructionSet
from .rows import Shape, Size, count_of, each_row, flat_kernel, number_of, tree
from .vectors import NEGATIVE_INFINITY, Buffer, Expr, Vectors

GROUP = 8  # vectors of a block
MOST = 256  # elements of the list: an insertion moves up to all of them
# Work of an element against that of a sum, insertions included.
WEIGHT = 2


def top_k(
    rows: Shape, length: int, count: int, isa: InstructionSet, threads: int = 1, least: bool = False,
    name: str | None = None,
) -> tirx.PrimFunc:  # fmt: skip
    """A kernel (X, values, places) -> None: the `count` greatest elements of each row of X (*rows, length), the
    greatest first, and their places as int64.

    least: the least elements, the least first. count: from 1 to MOST, at most `length`. name: of the exported symbol;
    None for a function that only its own module calls.
    """
    if not 1 <= count <= min(MOST, length):
        raise ValueError(f"count is {count}; expected 1 to {min(MOST, length)}")
    tensors: dict[str, tuple[Shape, str]] = {
        "x": ((*rows, length), "float32"),
        "values": ((*rows, count), "float32"),
        "places": ((*rows, count), "int64"),
    }

    def write(v: Vectors, buffers: dict[str, Buffer], size: Callable[[Size], int | Expr], index: str) -> None:
        number = number_of(rows, size)
        each_row(number, number * length * WEIGHT, threads, index, lambda row: _row(v, buffers, row, length, count,
                                                                                    least, index))  # fmt: skip

    return flat_kernel(name or "top_k", tensors, isa, write, name is not None, [*rows, length])


def _row(
    v: Vectors, buffers: dict[str, Buffer], row: Expr, length: int, count: int, least: bool, index: str
) -> None:
    x, lanes, size = buffers["x"], v.lanes, GROUP * v.lanes
    start = T.Bind(row * tirx.const(length, index))
    # The list begins with a sentinel, at which every search ends.
    best = T.alloc_buffer((count + 1,), "float32", scope="global")
    found = T.alloc_buffer((count + 1,), "int32", scope="global")
    keys = T.alloc_buffer((lanes,), "float32", scope="global")
    at = T.alloc_buffer((1,), "int32", scope="global")
    rest = T.alloc_buffer((1,), "int32", scope="global")  # bits of the lanes that are still to be inserted
    with T.serial(T.int32(count + 1)) as j:
        T.buffer_store(best, T.float32(NEGATIVE_INFINITY), [j])
        T.buffer_store(found, T.int32(0), [j])
    T.buffer_store(best, T.float32(math.inf), [T.int32(0)])

    def insert(key: Expr, place: Expr) -> None:
        T.buffer_store(at, T.min(place, T.int32(count - 1)) + T.int32(1), [T.int32(0)])
        with T.While(best[at[0] - T.int32(1)] < key):
            T.buffer_store(best, best[at[0] - T.int32(1)], [at[0]])
            T.buffer_store(found, found[at[0] - T.int32(1)], [at[0]])
            T.buffer_store(at, at[0] - T.int32(1), [T.int32(0)])
        T.buffer_store(best, key, [at[0]])
        T.buffer_store(found, place, [at[0]])

    def block(first: Expr, elements: int) -> None:
        """first: place of the block's first element."""
        bound = v.splat(best[T.int32(count)])
        values, above = [], []
        for j in range(-(-elements // lanes)):
            part = elements - j * lanes if elements < (j + 1) * lanes else None
            value = v.load(x, start + T.Cast(index, first) + j * lanes, count_of(part, index), NEGATIVE_INFINITY)
            values.append(T.Bind(v.splat(0.0) - value) if least else value)
            above.append(v.above(values[-1], bound, unordered=not least))
        early = T.Bind(first < T.int32(count))  # the first elements fill the list, whatever they are
        with T.If(tirx.any(tree(T.bitwise_or, [*above]) != T.int32(0), early)), T.Then():
            for j, (value, some) in enumerate(zip(values, above, strict=True)):
                every = T.int32((1 << min(lanes, elements - j * lanes)) - 1)
                with T.If(tirx.any(some != T.int32(0), early)), T.Then():
                    known = v.choose("ne", value, value, v.splat(NEGATIVE_INFINITY if least else math.inf), value)
                    v.store(keys, T.int32(0), known)
                    T.buffer_store(rest, T.bitwise_and(T.Select(early, every, some), every), [T.int32(0)])
                    with T.While(rest[T.int32(0)] != T.int32(0)):
                        lane = v.lowest_bit(rest[T.int32(0)])
                        left = T.bitwise_and(rest[T.int32(0)], rest[T.int32(0)] - T.int32(1))
                        T.buffer_store(rest, left, [T.int32(0)])
                        key, place = T.Bind(keys[lane]), T.Bind(first + T.int32(j * lanes) + lane)
                        with T.If(tirx.any(key > best[T.int32(count)], place < T.int32(count))), T.Then():
                            insert(key, place)

    if length // size:
        with T.serial(T.int32(length // size)) as turn:
            block(T.Bind(turn * T.int32(size)), size)
    if length % size:
        block(T.int32(length - length % size), length % size)
    to = T.Bind(row * tirx.const(count, index))
    with T.serial(T.int32(count)) as j:
        place = T.Bind(found[j + T.int32(1)])
        T.buffer_store(buffers["values"], x[start + T.Cast(index, place)], [to + T.Cast(index, j)])
        T.buffer_store(buffers["places"], T.Cast("int64", place), [to + T.Cast(index, j)])
