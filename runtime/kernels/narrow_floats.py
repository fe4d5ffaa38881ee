"""float16 and bfloat16 in memory, float32 in registers: what reads and writes their vectors, as LLVM IR.

Widening is exact; narrowing rounds to nearest, half to even, and gives infinity beyond the type's numbers. A NaN stays
one. float16 takes one instruction where the instruction set has it (`half`: F16C, AArch64), else a few on integers, as
bfloat16 does everywhere.
"""

from __future__ import annotations

from ..target import InstructionSet

NARROW = ("float16", "bfloat16")

_WIDEN_BFLOAT16 = """
  %w = zext {short} %h to {whole}
  %s = shl {whole} %w, splat (i32 16)
  %r = bitcast {whole} %s to {vector}
"""
# Half of the last place that stays is added, less one where that place is even. A NaN could become infinite by that.
_NARROW_BFLOAT16 = """
  %b = bitcast {vector} %v to {whole}
  %k = lshr {whole} %b, splat (i32 16)
  %o = and {whole} %k, splat (i32 1)
  %a = add {whole} %b, splat (i32 32767)
  %c = add {whole} %a, %o
  %d = lshr {whole} %c, splat (i32 16)
  %q = or {whole} %k, splat (i32 64)
  %n = fcmp uno {vector} %v, %v
  %e = select {mask} %n, {whole} %q, {whole} %d
  %r = trunc {whole} %e to {short}
"""
# One instruction, for which numbers below the normal ones are 0.
_ROUND_BFLOAT16 = """
  %x = call <{lanes} x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.{size}({vector} %v)
  %r = bitcast <{lanes} x bfloat> %x to {short}
"""
_WIDEN_HALF = """
  %x = bitcast {short} %h to <{lanes} x half>
  %r = fpext <{lanes} x half> %x to {vector}
"""
_NARROW_HALF = """
  %x = fptrunc {vector} %v to <{lanes} x half>
  %r = bitcast <{lanes} x half> %x to {short}
"""
# Exponents are rebiased by 112. Those of infinity and NaN go on to 255; a number below the normal ones, whose exponent
# is 0, becomes 2^-14·(1 + fraction), from which 2^-14 is taken.
_WIDEN_FLOAT16 = """
  %w = zext {short} %h to {whole}
  %m = and {whole} %w, splat (i32 32767)
  %o = shl {whole} %m, splat (i32 13)
  %a = add {whole} %o, splat (i32 939524096)
  %i = add {whole} %a, splat (i32 939524096)
  %u = add {whole} %a, splat (i32 8388608)
  %f = bitcast {whole} %u to {vector}
  %t = fsub {vector} %f, splat (float 0x3F10000000000000)
  %z = bitcast {vector} %t to {whole}
  %big = icmp uge {whole} %o, splat (i32 260046848)
  %small = icmp ult {whole} %o, splat (i32 8388608)
  %b = select {mask} %big, {whole} %i, {whole} %a
  %c = select {mask} %small, {whole} %z, {whole} %b
  %n = and {whole} %w, splat (i32 32768)
  %s = shl {whole} %n, splat (i32 16)
  %d = or {whole} %c, %s
  %r = bitcast {whole} %d to {vector}
"""
# A result below the normal numbers is rounded by the addition of 1/2, whose last place is 2^-24.
_NARROW_FLOAT16 = """
  %b = bitcast {vector} %v to {whole}
  %m = and {whole} %b, splat (i32 2147483647)
  %k = lshr {whole} %m, splat (i32 13)
  %o = and {whole} %k, splat (i32 1)
  %a = add {whole} %m, splat (i32 -939520001)
  %c = add {whole} %a, %o
  %d = lshr {whole} %c, splat (i32 13)
  %f = bitcast {whole} %m to {vector}
  %t = fadd {vector} %f, splat (float 0.5)
  %u = bitcast {vector} %t to {whole}
  %z = sub {whole} %u, splat (i32 1056964608)
  %small = icmp ult {whole} %m, splat (i32 947912704)
  %big = icmp uge {whole} %m, splat (i32 1199570944)
  %nan = icmp ugt {whole} %m, splat (i32 2139095040)
  %e = select {mask} %small, {whole} %z, {whole} %d
  %g = select {mask} %big, {whole} splat (i32 31744), {whole} %e
  %i = select {mask} %nan, {whole} splat (i32 32256), {whole} %g
  %n = lshr {whole} %b, splat (i32 16)
  %s = and {whole} %n, splat (i32 32768)
  %q = or {whole} %i, %s
  %r = trunc {whole} %q to {short}
"""
_WIDENING = """
define {vector} @gw_widen_{kind}_{lanes}({short} %h) alwaysinline {{{widen}  ret {vector} %r
}}
"""
_ROUNDING = """
define {short} @gw_rounded_{lanes}({vector} %v) alwaysinline {{{round}  ret {short} %r
}}
"""
_DECLARED_ROUNDING = """
declare <{lanes} x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.{size}({vector})
"""
# take and give: a whole vector. load and store: the first n elements, as of float32.
_ACCESS = """
define {short} @gw_narrow_{kind}_{lanes}({vector} %v) alwaysinline {{{narrow}  ret {short} %r
}}
define {vector} @gw_take_{kind}_{lanes}(ptr %p) alwaysinline {{
  %h = load {short}, ptr %p, align 2
  %r = call {vector} @gw_widen_{kind}_{lanes}({short} %h)
  ret {vector} %r
}}
define {vector} @gw_load_{kind}_{lanes}(ptr %p, i32 %n, float %fill) alwaysinline {{
  %a = insertelement {vector} poison, float %fill, i32 0
  %s = shufflevector {vector} %a, {vector} poison, {whole} zeroinitializer
  %m = call {mask} @gw_mask_{lanes}(i32 %n)
  %h = call {short} @llvm.masked.load.v{lanes}i16.p0(ptr align 2 %p, {mask} %m, {short} zeroinitializer)
  %v = call {vector} @gw_widen_{kind}_{lanes}({short} %h)
  %r = select {mask} %m, {vector} %v, {vector} %s
  ret {vector} %r
}}
define i32 @gw_give_{kind}_{lanes}(ptr %p, {vector} %v) alwaysinline {{
  %h = call {short} @gw_narrow_{kind}_{lanes}({vector} %v)
  store {short} %h, ptr %p, align 2
  ret i32 0
}}
define i32 @gw_store_{kind}_{lanes}(ptr %p, i32 %n, {vector} %v) alwaysinline {{
  %m = call {mask} @gw_mask_{lanes}(i32 %n)
  %h = call {short} @gw_narrow_{kind}_{lanes}({vector} %v)
  call void @llvm.masked.store.v{lanes}i16.p0({short} %h, ptr align 2 %p, {mask} %m)
  ret i32 0
}}
define i32 @gw_stream_{kind}_{lanes}(ptr %p, {vector} %v) alwaysinline {{
  %h = call {short} @gw_narrow_{kind}_{lanes}({vector} %v)
  store {short} %h, ptr %p, align {align}, !nontemporal !0
  ret i32 0
}}
define i32 @gw_to_aligned_{kind}_{lanes}(ptr %p) alwaysinline {{
  %i = ptrtoint ptr %p to i64
  %n = sub i64 0, %i
  %b = and i64 %n, {below}
  %e = lshr i64 %b, 1
  %r = trunc i64 %e to i32
  ret i32 %r
}}
"""


def _words(lanes: int) -> dict[str, str | int]:
    return {
        "lanes": lanes, "vector": f"<{lanes} x float>", "whole": f"<{lanes} x i32>", "short": f"<{lanes} x i16>",
        "mask": f"<{lanes} x i1>", "align": 2 * lanes, "below": 2 * lanes - 1,
    }  # fmt: skip


def widening(isa: InstructionSet, lanes: int) -> str:
    """Functions that make float32 of vectors of each type of NARROW."""
    words = _words(lanes)
    texts = {"float16": _WIDEN_HALF if isa.half else _WIDEN_FLOAT16, "bfloat16": _WIDEN_BFLOAT16}
    return "".join(
        _WIDENING.format(kind=kind, widen=text.format(**words), **words) for kind, text in texts.items()
    )


def rounding(isa: InstructionSet, lanes: int) -> str:
    """The function that rounds to bfloat16 what products of it, where there are any, are made of."""
    words = _words(lanes)
    text = (_ROUND_BFLOAT16 if isa.dot_bf16 else _NARROW_BFLOAT16).format(size=32 * lanes, **words)
    declared = _DECLARED_ROUNDING.format(size=32 * lanes, **words) if isa.dot_bf16 else ""
    return _ROUNDING.format(round=text, **words) + declared


def functions_for(kinds: set[str], isa: InstructionSet, lanes: int) -> str:
    """What reads and writes tensors of these of NARROW, beside `widening`; empty for none. `Vectors` declares accesses
    of 16 bits under a mask."""
    words = _words(lanes)
    texts = {"float16": _NARROW_HALF if isa.half else _NARROW_FLOAT16, "bfloat16": _NARROW_BFLOAT16}
    return "".join(_ACCESS.format(kind=kind, narrow=texts[kind].format(**words), **words) for kind in sorted(kinds))
