"""Matrix products of 8-bit numbers, with sums in int32, and of bfloat16: A in steps (`dots`), then the loops of `gemm`.

    Y[m, n] = finish(first[n] + sum over k of A[m, k] · B[k, n])

B is constant and packed. A is copied once, as the instruction set's dot product wants it, with what is missing of the
last step; B is zero there. bfloat16 whose rows are whole steps are read where they are.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx
from tvm.tirx.script import builder as T

from ...passes.base import Caches
from .conv_steps import runs
from .dots import BITS, SteppedDot, dot_of
from .gemm import Finish, GemmEmitter
from .gemm_spec import GemmSpec, GemmTile
from .vectors import Buffer, Expr, Vectors

# Steps from which on a second thread is worth its launch.
PARALLEL = 1 << 17


def emit(
    vectors: Vectors, spec: GemmSpec, tile: GemmTile, rows: Expr | int, a: Buffer, b: Buffer, first: Buffer | None,
    finish: Finish, threads: int, caches: Caches, index: str = "int64",
) -> None:  # fmt: skip
    """Emit the product into the IR builder that is open. b: from `gemm.pack`. first: from `dots.first_sums`, or 0."""
    dot = dot_of(vectors, spec.data, joined=spec.joined)
    assert isinstance(dot, SteppedDot) and spec.inner is not None and spec.packed, "the weights are constant"
    steps = dot.steps(spec.inner)
    if spec.data == BITS and spec.inner % dot.group == 0:
        size = rows * steps if isinstance(rows, int) else rows * tirx.const(steps, index)
        copy = T.decl_buffer((size,), "int32", data=a.data, elem_offset=a.elem_offset // tirx.const(dot.group, index))
    else:
        copy = _in_steps(dot, a, rows, spec.inner, threads, index)
    seen = replace(spec, inner=steps)
    GemmEmitter(vectors, seen, tile, rows, steps, 1, copy, b, finish, threads, caches, index, first).emit()


def _in_steps(dot: SteppedDot, a: Buffer, rows: Expr | int, inner: int, threads: int, index: str) -> Buffer:
    """A (rows, inner) as whole steps of each row."""

    def const(value: int) -> Expr:
        return tirx.const(value, index)

    steps, whole = dot.steps(inner), inner // dot.group
    size = rows * steps if isinstance(rows, int) else rows * const(steps)
    copy = T.alloc_buffer((max(1, size) if isinstance(size, int) else size,), "int32", scope="global")
    wide = threads > 1 and (not isinstance(rows, int) or rows * steps >= PARALLEL) and rows != 1
    with (T.parallel if wide else T.serial)(rows if not isinstance(rows, int) else const(rows)) as row:
        at, a_at = T.Bind(row * const(steps)), T.Bind(row * const(inner))

        def some(done: Expr, count: int) -> None:
            value = dot.packed(a, T.Bind(a_at + done * const(dot.group)), count)
            T.buffer_store(copy, value, [T.ramp(at + done, 1, count) if count > 1 else at + done])

        runs(whole, dot.vectors.lanes, some, const)
        if whole < steps:
            last = range(whole * dot.group, steps * dot.group)
            places = [T.Bind(a_at + const(k)) if k < inner else None for k in last]
            T.buffer_store(copy, dot.gathered(a, places, 1), [at + const(whole)])
    return copy
