"""Kernels that do one thing as fast as the machine can: multiply-adds, reading, copying. `peaks` times them."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ..target import InstructionSet
from .vectors import Buffer, Vectors

ACCUMULATORS = 12  # independent chains: more than latency times units of any processor, fewer than 1024 bytes of them
UNROLLED = 8  # vectors a step


def multiply_adds(isa: InstructionSet, threads: int, steps: int) -> tirx.PrimFunc:
    """(x, y): every thread does steps * ACCUMULATORS vector multiply-adds on the ACCUMULATORS + 1 vectors of x."""

    def body(v: Vectors, x: Buffer, y: Buffer, thread: tirx.Var) -> None:
        # Known only at run time: of constants the compiler would compute the result itself.
        factor = v.load(x, ACCUMULATORS * v.lanes)
        sums = v.registers(ACCUMULATORS, 0.0)
        for j in range(ACCUMULATORS):
            T.buffer_store(sums, v.load(x, j * v.lanes), [v.at(j * v.lanes)])
        with T.serial(steps):
            for j in range(ACCUMULATORS):
                at = [v.at(j * v.lanes)]
                T.buffer_store(sums, v.fma(sums[at[0]], factor, factor), at)
        total = sums[v.at(0)]
        for j in range(1, ACCUMULATORS):
            total = total + sums[v.at(j * v.lanes)]
        T.buffer_store(y, total, [v.at(thread * v.lanes)])

    lanes = max(4, isa.lanes())
    return _kernel(isa, threads, (ACCUMULATORS + 1) * lanes, threads * lanes, body)


def read(isa: InstructionSet, threads: int, size: int, repeats: int) -> tirx.PrimFunc:
    """(x, y): every thread adds up its part of the `size` floats of x, `repeats` times."""

    def body(v: Vectors, x: Buffer, y: Buffer, thread: tirx.Var) -> None:
        sums = v.registers(UNROLLED, 0.0)
        step = UNROLLED * v.lanes
        with T.serial(repeats), T.serial(size // threads // step) as i:
            for j in range(UNROLLED):
                at = [v.at(j * v.lanes)]
                T.buffer_store(
                    sums, sums[at[0]] + x[v.at(thread * (size // threads) + i * step + j * v.lanes)], at
                )
        total = sums[v.at(0)]
        for j in range(1, UNROLLED):
            total = total + sums[v.at(j * v.lanes)]
        T.buffer_store(y, total, [v.at(thread * v.lanes)])

    return _kernel(isa, threads, size, threads * max(4, isa.lanes()), body)


def copy(isa: InstructionSet, threads: int, size: int, repeats: int) -> tirx.PrimFunc:
    """(x, y): every thread writes its part of x, each time plus another number, to y, `repeats` times."""

    def body(v: Vectors, x: Buffer, y: Buffer, thread: tirx.Var) -> None:
        step = UNROLLED * v.lanes
        with T.serial(repeats) as again:
            more = T.Bind(T.Cast("float32", again))
            with T.serial(size // threads // step) as i:
                for j in range(UNROLLED):
                    at = v.at(thread * (size // threads) + i * step + j * v.lanes)
                    T.buffer_store(y, x[at] + v.splat(more), [at])

    return _kernel(isa, threads, size, size, body)


def _kernel(
    isa: InstructionSet, threads: int, inputs: int, outputs: int,
    body: Callable[[Vectors, Buffer, Buffer, tirx.Var], None],
) -> tirx.PrimFunc:  # fmt: skip
    with IRBuilder() as builder, T.prim_func(is_private=False, s_tir=True):
        T.func_name("probe")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "global_symbol": "probe"})
        x = T.match_buffer(T.arg("x", T.handle()), (inputs,), "float32")
        y = T.match_buffer(T.arg("y", T.handle()), (outputs,), "float32")
        vectors = Vectors(isa)
        with T.sblock("root"), (T.parallel if threads > 1 else T.serial)(threads) as thread:
            body(vectors, x, y, thread)
    return builder.get()
