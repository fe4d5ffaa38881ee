"""Numbers of float32 as whole ones, block by block: what `graphwright.BlockQuantize` does, in registers."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script import builder as T

from ...passes.ops.block_quantize import SMALLEST, STEPS
from .vectors import ROUND, Buffer, Expr, Vectors

ROUND_BITS = 0x4B400000  # of ROUND


def each_vector(v: Vectors, start: Expr, count: Expr, index: str, body: Callable[[Expr, Expr | None], None]) -> None:
    """Offset of each vector of `count` elements, and how many it has; None for all."""
    lanes = tirx.const(v.lanes, index)
    whole = T.Bind(count // lanes)
    with T.serial(whole) as n:
        body(T.Bind(start + n * lanes), None)
    left = T.Bind(count - whole * lanes)
    with T.If(left > tirx.const(0, index)), T.Then():
        body(T.Bind(start + whole * lanes), left)


def steps_of_block(
    v: Vectors, x: Buffer, start: Expr, count: Expr, index: str, give: Callable[[Expr, Expr, Expr | None], None]
) -> Expr:
    """A block of x as whole numbers: x = scale · q, scale = max |x| / 127, q rounded half to even. Returns the scale,
    NaN where an element is infinite or NaN. give: called with the offset of each vector, its q as int32, and how many
    elements it has."""
    best, mark = v.registers(1, SMALLEST), v.registers(1, 0.0)

    def look(at: Expr, left: Expr | None) -> None:
        value = v.load(x, at, left)
        T.buffer_store(best, T.max(best[v.at(0)], T.max(value, v.splat(0.0) - value)), [v.at(0)])
        T.buffer_store(mark, v.fma(value, v.splat(0.0), mark[v.at(0)]), [v.at(0)])

    each_vector(v, start, count, index, look)
    scale = T.Bind(v.greatest(best[v.at(0)]) / T.float32(STEPS))
    divisor = T.Bind(v.splat(scale))

    def quantize(at: Expr, left: Expr | None) -> None:
        shifted = T.Bind(v.load(x, at, left) / divisor + v.splat(ROUND))
        bits = T.reinterpret(shifted, dtype=f"int32x{v.lanes}") - T.broadcast(T.int32(ROUND_BITS), v.lanes)
        give(at, T.Bind(bits), left)

    each_vector(v, start, count, index, quantize)
    return T.Bind(scale + v.total(mark[v.at(0)]))
