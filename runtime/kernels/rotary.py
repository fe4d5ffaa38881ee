"""Rotary position embeddings of float32 heads: pairs of elements turned by the angles of their position.

For pair j of the rotary elements with the cosine c and sine s of its position: (a, b) -> (a·c - b·s, b·c + a·s). A pair
is element j and element j + half, or two neighbours. What is behind the rotary elements is copied.

Source: Su et al., "RoFormer", arXiv 2104.09864.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script import builder as T

from ..target import InstructionSet
from .attention_spec import Layout, Places
from .rows import Shape, Size, each_row, flat_kernel
from .vectors import Buffer, Expr, Vectors


@dataclass(frozen=True)
class RotarySpec:
    """X (b, h, s, d) of a layout turned into Y of another.

    batch, length: numbers, or names of sizes that are known at run time. rotary: elements of a head that are turned, an
    even number. x, y: how the tensors are laid out. table: rows of cos and sin, which positions (a tensor of `batch`
    or 1 rows of the type `positions`) choose from; else cos and sin have a row for each position, the same for all
    sequences if `shared`.
    """

    batch: Size
    heads: int
    length: Size
    size: int
    rotary: int
    neighbours: bool = False
    x: Places = Layout.BHSD
    y: Layout = Layout.BHSD
    table: Size | None = None
    positions: str = "int64"
    shared: bool = False


class RotaryVectors(Vectors):
    """Vectors whose neighbours can be parted and joined."""

    def part(self, a: Expr, b: Expr) -> tuple[Expr, Expr]:
        """The elements at even and at odd places of two vectors behind each other."""
        return self._shuffled("even", a, b), self._shuffled("odd", a, b)

    def join(self, even: Expr, odd: Expr) -> tuple[Expr, Expr]:
        """The inverse of `part`."""
        return self._shuffled("low", even, odd), self._shuffled("high", even, odd)

    def _shuffled(self, what: str, a: Expr, b: Expr) -> Expr:
        return T.Bind(T.call_extern(self.dtype, self._name(what), a, b))

    def _ir(self) -> str:
        lanes = self.lanes
        orders = {
            "even": [2 * i for i in range(lanes)],
            "odd": [2 * i + 1 for i in range(lanes)],
            "low": [i // 2 + lanes * (i % 2) for i in range(lanes)],
            "high": [(lanes + i) // 2 + lanes * (i % 2) for i in range(lanes)],
        }
        vector, text = f"<{lanes} x float>", super()._ir()
        for what, order in orders.items():
            index = ", ".join(f"i32 {i}" for i in order)
            text += (
                f"define {vector} @{self._name(what)}({vector} %a, {vector} %b) alwaysinline {{\n"
                f"  %r = shufflevector {vector} %a, {vector} %b, <{lanes} x i32> <{index}>\n  ret {vector} %r\n}}\n"
            )
        return text


def rotary(spec: RotarySpec, isa: InstructionSet, threads: int = 1, name: str | None = None) -> tirx.PrimFunc:
    """A kernel (X, cos, sin[, positions], Y) -> None. name: of the exported symbol; None for a function that only its
    own module calls."""
    half, batch = spec.rotary // 2, 1 if spec.shared else spec.batch
    angles: Shape = (batch, spec.length, half) if spec.table is None else (spec.table, half)
    tensors: dict[str, tuple[Shape, str]] = {
        "x": (spec.x.shape(spec.batch, spec.heads, spec.length, spec.size), "float32"),
        "cos": (angles, "float32"),
        "sin": (angles, "float32"),
    }
    if spec.table is not None:
        tensors["positions"] = ((batch, spec.length), spec.positions)
    tensors["y"] = (spec.y.shape(spec.batch, spec.heads, spec.length, spec.size), "float32")

    def write(v: Vectors, buffers: dict[str, Buffer], size: Callable[[Size], int | Expr], index: str) -> None:
        assert isinstance(v, RotaryVectors)
        length = size(spec.length)
        count = size(spec.batch) * length
        count = count if isinstance(count, int) else T.Bind(count)
        steps = [places.strides(spec.heads, length, spec.size) for places in (spec.x, spec.y)]

        quotient, remainder = v.divisions(isinstance(length, int))

        def emit(row: Expr) -> None:
            s = remainder(row, length) if spec.batch != 1 else row
            b = quotient(row, length) if spec.batch != 1 else tirx.const(0, index)
            angle = s if spec.shared else row
            if spec.table is not None:
                last = tirx.const(size(spec.table), index) if isinstance(spec.table, int) else size(spec.table)
                at = T.Cast(index, buffers["positions"][angle])
                angle = T.max(T.min(at, last - tirx.const(1, index)), tirx.const(0, index))
            angle = T.Bind(angle * tirx.const(half, index))
            from_, to = (T.Bind(b * step["b"] + s * step["s"] + first)
                         for step, first in zip(steps, (spec.x.first, 0), strict=True))  # fmt: skip
            with T.serial(tirx.const(spec.heads, index)) as h:
                _head(v, spec, buffers, T.Bind(from_ + h * steps[0]["h"]), angle, T.Bind(to + h * steps[1]["h"]), index)

        each_row(count, count * (spec.heads * spec.size), threads, index, emit)

    flops = [spec.batch, spec.length, spec.heads, 3 * spec.rotary]
    return flat_kernel(name or "rotary_embedding", tensors, isa, write, name is not None, flops, RotaryVectors)


def _head(
    v: RotaryVectors, spec: RotarySpec, buffers: dict[str, Buffer], from_: Expr, angle: Expr, to: Expr, index: str
) -> None:
    x, y, half = buffers["x"], buffers["y"], spec.rotary // 2

    def load(name: str, offset: Expr, count: int | None) -> Expr:
        return v.load(buffers[name], offset, None if count is None else tirx.const(count, index))

    def store(offset: Expr, value: Expr, count: int | None) -> None:
        v.store(y, offset, T.Bind(value), None if count is None else tirx.const(count, index))

    for j, part in _vectors(half, v.lanes):
        cos, sin = (load(name, angle + j, part) for name in ("cos", "sin"))
        if not spec.neighbours:
            a, b = (load("x", from_ + j + n * half, part) for n in range(2))
            turned = (v.fma(a, cos, v.splat(0.0) - b * sin), v.fma(b, cos, a * sin))
            for n in range(2):
                store(to + j + n * half, turned[n], part)
            continue
        # Of 2 · part elements, how many are in the first vector and how many in the second.
        filled = 2 * (v.lanes if part is None else part)
        parts = [None if filled >= (n + 1) * v.lanes else max(filled - n * v.lanes, 0) for n in range(2)]
        a, b = v.part(*(load("x", from_ + 2 * j + n * v.lanes, parts[n]) if parts[n] != 0 else v.splat(0.0)
                        for n in range(2)))  # fmt: skip
        joined = v.join(T.Bind(v.fma(a, cos, v.splat(0.0) - b * sin)), T.Bind(v.fma(b, cos, a * sin)))
        for n in range(2):
            if parts[n] != 0:
                store(to + 2 * j + n * v.lanes, joined[n], parts[n])
    for j, part in _vectors(spec.size - spec.rotary, v.lanes):
        at = spec.rotary + j
        store(to + at, v.load(x, from_ + at, None if part is None else tirx.const(part, index)), part)


def _vectors(count: int, lanes: int) -> Iterator[tuple[int, int | None]]:
    """First element of each vector of `count` elements, and how many it has, None for all."""
    for first in range(0, count, lanes):
        yield first, None if first + lanes <= count else count - first
