"""Writing new steps into a cache where it lies."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script import builder as T

from ..target import InstructionSet
from .rows import Shape, Size, flat_kernel, number_of
from .vectors import Buffer, Expr, Vectors


def scatter(
    cache: Shape, steps: Size, axis: int, dtype: str, isa: InstructionSet, starts: bool = True, circular: bool = False
) -> tirx.PrimFunc:
    """A kernel (cache, update[, start]) -> None: `update` goes into `cache` along `axis`, as by ONNX's TensorScatter.

    cache: (batch, ..., size, ...), the update of the same shape but with `steps` along `axis`, start int64 (batch,),
    without it 0. circular: positions beyond the size begin anew; else they are left out, and so are negative ones.
    """
    update = (*cache[:axis], steps, *cache[axis + 1 :])
    tensors: dict[str, tuple[Shape, str]] = {"cache": (cache, dtype), "update": (update, dtype)}
    if starts:
        tensors["start"] = (cache[:1], "int64")

    def write(v: Vectors, buffers: dict[str, Buffer], size: Callable[[Size], int | Expr], index: str) -> None:
        def const(value: int | Expr) -> Expr:
            return tirx.const(value, index) if isinstance(value, int) else value

        batch, middle = const(size(cache[0])), const(number_of(cache[1:axis], size))
        length, count = const(size(cache[axis])), const(size(steps))
        inner = const(number_of(cache[axis + 1 :], size))
        with T.serial(batch) as item:
            first = T.Bind(buffers["start"][item]) if starts else tirx.const(0, "int64")
            with T.serial(middle) as row, T.serial(count) as step:
                position = T.Bind(first + T.Cast("int64", step))
                size_of_axis = T.Cast("int64", length)
                if circular:
                    position = T.Bind(tirx.floormod(position, size_of_axis))
                with T.If(tirx.all(position >= tirx.const(0, "int64"), position < size_of_axis)), T.Then():
                    slab = item * middle + row
                    to = T.Bind((slab * length + T.Cast(index, position)) * inner)
                    source = T.Bind((slab * count + step) * inner)
                    with T.serial(inner) as i:
                        T.buffer_store(buffers["cache"], buffers["update"][source + i], [to + i])

    return flat_kernel("cache_scatter", tensors, isa, write)
