"""Square tiles of vectors: transposes and the sums of several vectors at once, as LLVM IR for any width.

Both are networks of interleavings, log2(lanes) rounds of them. A round that combines vectors i and i + half keeps
the natural order at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.tirx.script import builder as T

from .vectors import Buffer, Expr, Vectors, _int32


class VectorTiles(Vectors):
    """Vectors, and tiles of lanes x lanes elements."""

    def transpose(
        self,
        source: Buffer,
        offset: Expr,
        stride: Expr,
        rows: Expr | int,
        columns: Expr | int,
        target: Buffer,
        start: Expr,
        width: int,
        factor: float = 1.0,
        keep: bool = False,
    ) -> None:
        """target[start + c * width + r] = factor * source[offset + r * stride + c] for a tile of lanes x lanes.

        Rows from `rows` >= 1 on repeat the last one; columns from `columns` on are 0. The whole tile is written.
        keep: the source is boolean, and True becomes 0, False -infinity.
        """
        name = self._name("keep" if keep else "scaled_transpose")
        from_, to = T.address_of(source[offset]), T.address_of(target[start])
        call = (from_, _int64(stride), _int32(rows), _int32(columns), T.float32(factor), to, _int64(width))
        T.evaluate(T.call_extern("int32", name, *call))

    def put_totals(self, values: Sequence[Expr], buffer: Buffer, offset: Expr) -> None:
        """Write the sums of 1, 2, 4, ... or `lanes` vectors, each over its lanes, one after the other."""
        name = self._name(f"put_totals_{len(values)}")
        T.evaluate(T.call_extern("int32", name, T.address_of(buffer[offset]), *values))

    def kept(self, buffer: Buffer, offset: Expr, count: Expr | int) -> Expr:
        """0 for each True, -infinity for each False of the first `count` booleans at `offset`; the rest -infinity."""
        return T.Bind(
            T.call_extern(self.dtype, self._name("kept"), T.address_of(buffer[offset]), _int32(count))
        )

    def numbers(self, first: Expr | int) -> Expr:
        """first, first + 1, ... as int32."""
        return T.ramp(_int32(first), 1, self.lanes)

    def _ir(self) -> str:
        lanes = self.lanes
        own = _transpose(lanes, False) + _transpose(lanes, True) + _kept(lanes)
        own += "".join(_put_totals(1 << n, lanes) for n in range(lanes.bit_length()))
        return super()._ir() + own


def _int64(value: Expr | int) -> Any:
    return T.int64(value) if isinstance(value, int) else T.Cast("int64", value)


def _interleave(a: str, b: str, lanes: int, high: bool) -> str:
    first = lanes // 2 if high else 0
    index = ", ".join(f"i32 {first + i // 2 + (lanes if i % 2 else 0)}" for i in range(lanes))
    vector = f"<{lanes} x float>"
    return f"shufflevector {vector} {a}, {vector} {b}, <{lanes} x i32> <{index}>"


def _transpose(lanes: int, keep: bool) -> str:
    vector, size = f"<{lanes} x float>", 1 if keep else 4
    name = f"gw_{'keep' if keep else 'scaled_transpose'}_{lanes}"
    lines = [
        f"define i32 @{name}(ptr %s, i64 %st, i32 %n, i32 %c, float %f, ptr %t, i64 %w) {{",
        f"  %m = call <{lanes} x i1> @gw_mask_{lanes}(i32 %c)",
        "  %l = sub i32 %n, 1",
        f"  %fa = insertelement {vector} poison, float %f, i32 0",
        f"  %fs = shufflevector {vector} %fa, {vector} poison, <{lanes} x i32> zeroinitializer",
    ]
    for r in range(lanes):
        lines += [
            f"  %c{r} = icmp slt i32 {r}, %l",
            f"  %i{r} = select i1 %c{r}, i32 {r}, i32 %l",
            f"  %j{r} = sext i32 %i{r} to i64",
            f"  %k{r} = mul i64 %j{r}, %st",
            f"  %p{r} = getelementptr {'i8' if keep else 'float'}, ptr %s, i64 %k{r}",
        ]
        if keep:
            lines += [
                f"  %b{r} = call <{lanes} x i8> @llvm.masked.load.v{lanes}i8.p0(ptr align {size} %p{r}, "
                f"<{lanes} x i1> %m, <{lanes} x i8> zeroinitializer)",
                f"  %e{r} = icmp eq <{lanes} x i8> %b{r}, zeroinitializer",
                f"  %v0_{r} = select <{lanes} x i1> %e{r}, {vector} splat (float 0xFFF0000000000000), "
                f"{vector} zeroinitializer",
            ]
        else:
            lines += [
                f"  %u{r} = call {vector} @llvm.masked.load.v{lanes}f32.p0(ptr align {size} %p{r}, "
                f"<{lanes} x i1> %m, {vector} zeroinitializer)",
                f"  %v0_{r} = fmul {vector} %u{r}, %fs",
            ]
    rounds, half = lanes.bit_length() - 1, lanes // 2
    for k in range(rounds):
        for i in range(half):
            for high in (False, True):
                pair = _interleave(f"%v{k}_{i}", f"%v{k}_{i + half}", lanes, high)
                lines.append(f"  %v{k + 1}_{2 * i + high} = {pair}")
    for r in range(lanes):
        lines += [
            f"  %o{r} = mul i64 %w, {r}",
            f"  %q{r} = getelementptr float, ptr %t, i64 %o{r}",
            f"  store {vector} %v{rounds}_{r}, ptr %q{r}, align 4",
        ]
    return "\n".join([*lines, "  ret i32 0", "}", ""])


def _kept(lanes: int) -> str:
    vector, mask = f"<{lanes} x float>", f"<{lanes} x i1>"
    return f"""
define {vector} @gw_kept_{lanes}(ptr %p, i32 %n) alwaysinline {{
  %m = call {mask} @gw_mask_{lanes}(i32 %n)
  %b = call <{lanes} x i8> @llvm.masked.load.v{lanes}i8.p0(ptr align 1 %p, {mask} %m, <{lanes} x i8> zeroinitializer)
  %e = icmp eq <{lanes} x i8> %b, zeroinitializer
  %v = select {mask} %e, {vector} splat (float 0xFFF0000000000000), {vector} zeroinitializer
  ret {vector} %v
}}
"""


def _sums(count: int, lanes: int) -> tuple[list[str], str]:
    """IR that adds vectors %v0_0, %v0_1, ... pairwise; element j · count + i of the result belongs to the i-th."""
    vector = f"<{lanes} x float>"
    lines, left, k = [], count, 0
    while left > 1:
        left //= 2
        for i in range(left):
            a, b = f"%v{k}_{i}", f"%v{k}_{i + left}"
            lines += [
                f"  %l{k}_{i} = {_interleave(a, b, lanes, False)}",
                f"  %h{k}_{i} = {_interleave(a, b, lanes, True)}",
                f"  %v{k + 1}_{i} = fadd {vector} %l{k}_{i}, %h{k}_{i}",
            ]
        k += 1
    return lines, f"%v{k}_0"


def _put_totals(count: int, lanes: int) -> str:
    arguments = ", ".join(f"<{lanes} x float> %v0_{i}" for i in range(count))
    lines, total = _sums(count, lanes)
    lines.insert(0, f"define i32 @gw_put_totals_{count}_{lanes}(ptr %p, {arguments}) alwaysinline {{")
    width = lanes
    while width > count:
        vector, half = f"<{width} x float>", width // 2
        for part, first in (("a", 0), ("b", half)):
            index = ", ".join(f"i32 {first + i}" for i in range(half))
            lines.append(f"  %{part}{half} = shufflevector {vector} {total}, {vector} poison, <{half} x i32> <{index}>")
        lines.append(f"  %s{half} = fadd <{half} x float> %a{half}, %b{half}")
        width, total = half, f"%s{half}"
    return "\n".join([*lines, f"  store <{count} x float> {total}, ptr %p, align 4", "  ret i32 0", "}", ""])
