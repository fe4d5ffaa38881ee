"""LLVM IR text of the functions that `Vectors` calls: what TIR has no words for.

Every function is always-inline: nothing is left of the calls.
"""

from __future__ import annotations

import struct

from ..target import InstructionSet
from .narrow_floats import rounding, widening

PARTS = 8  # of a power of two, which one register holds
# x·2^k is 0 for k below this, whatever float x below 2^27 is: 2^-150 is half the smallest one.
POWER_ZERO = -180.0
GROUP = 4  # vectors that are narrowed together
NARROW_INTEGERS = ("int8", "uint8", "int16", "uint16")
BYTE_COLUMNS = 4  # vectors of sums that take up steps of bytes together
# Comparison -> LLVM's predicate.
COMPARISONS = {"lt": "olt", "le": "ole", "gt": "ogt", "ge": "oge", "eq": "oeq", "ne": "une"}


def functions_of(isa: InstructionSet, lanes: int) -> str:
    """The functions that `Vectors` calls, for vectors of so many float32."""
    vector, mask = f"<{lanes} x float>", f"<{lanes} x i1>"
    text = _MEMORY.format(
        lanes=lanes,
        vector=vector,
        mask=mask,
        align=4 * lanes,
        below=4 * lanes - 1,
        index=", ".join(f"i32 {i}" for i in range(lanes)),
        lowest=", ".join(["float 0xFFF0000000000000"] * lanes),
    )
    for bits in (8, 16, 32, 64):
        text += _WHOLE.format(lanes=lanes, bits=bits, vector=f"<{lanes} x i{bits}>", mask=mask, align=bits // 8)
    text += _narrowing(lanes, pack=isa.lookup)
    text += _reduction("max", lanes) + _reduction("sum", lanes)
    for name, word in COMPARISONS.items():
        text += _CHOOSE.format(name=name, word=word, lanes=lanes, vector=vector, mask=mask)
    for name, word in (("above", "ogt"), ("above_or_nan", "ugt")):
        text += _ABOVE.format(name=name, word=word, lanes=lanes, vector=vector, mask=mask)
    text += _LOWEST_BIT + widening(isa, lanes) + rounding(isa, lanes)
    if isa.dot_int8 == "pairs":
        text += _PAIRS_SSE2 if lanes == 4 else _PAIRS.format(lanes=lanes, twice=2 * lanes)
        text += "".join(_bytes(lanes, c, s) for c in range(1, BYTE_COLUMNS + 1) for s in (1, 2) if lanes > 4)
    if isa.dot_bf16:
        text += _ADD_ROUNDED.format(lanes=lanes, twice=2 * lanes, bits=32 * lanes)
    if isa.lookup:
        text += _LOOKUP.format(entries=", ".join(f"i32 {_root_of_two(j)}" for j in range(PARTS)))
    if isa.scalef:
        text += _SCALEF.format(zero=", ".join([f"float {POWER_ZERO}"] * 16))
    if isa.streaming:
        text += _FENCE
    return text


def _root_of_two(j: int) -> int:
    """The bits of 2^(j/PARTS) less those of j parts, which have been shifted into the mantissa, and of the exponent."""
    (bits,) = struct.unpack("<i", struct.pack("<f", 2 ** (j / PARTS)))
    return bits - (127 << 23) - (j << 23) // PARTS


def bits_of(dtype: str) -> int:
    """Bits of an element of a type such as uint8."""
    return int("".join(c for c in dtype if c.isdigit()))


_MEMORY = """
define {mask} @gw_mask_{lanes}(i32 %n) alwaysinline {{
  %a = insertelement <{lanes} x i32> poison, i32 %n, i32 0
  %s = shufflevector <{lanes} x i32> %a, <{lanes} x i32> poison, <{lanes} x i32> zeroinitializer
  %m = icmp ult <{lanes} x i32> <{index}>, %s
  ret {mask} %m
}}
define {vector} @gw_load_{lanes}(ptr %p, i32 %n, float %fill) alwaysinline {{
  %a = insertelement {vector} poison, float %fill, i32 0
  %s = shufflevector {vector} %a, {vector} poison, <{lanes} x i32> zeroinitializer
  %m = call {mask} @gw_mask_{lanes}(i32 %n)
  %v = call {vector} @llvm.masked.load.v{lanes}f32.p0(ptr align 4 %p, {mask} %m, {vector} %s)
  ret {vector} %v
}}
define {vector} @gw_select_{lanes}(ptr %p, i32 %n, {vector} %v) alwaysinline {{
  %m = call {mask} @gw_mask_{lanes}(i32 %n)
  %b = call <{lanes} x i8> @llvm.masked.load.v{lanes}i8.p0(ptr align 1 %p, {mask} %m, <{lanes} x i8> zeroinitializer)
  %k = icmp ne <{lanes} x i8> %b, zeroinitializer
  %r = select {mask} %k, {vector} %v, {vector} <{lowest}>
  ret {vector} %r
}}
define {vector} @gw_ended_{lanes}({vector} %v, i32 %n) alwaysinline {{
  %m = call {mask} @gw_mask_{lanes}(i32 %n)
  %r = select {mask} %m, {vector} %v, {vector} <{lowest}>
  ret {vector} %r
}}
define i32 @gw_store_{lanes}(ptr %p, i32 %n, {vector} %v) alwaysinline {{
  %m = call {mask} @gw_mask_{lanes}(i32 %n)
  call void @llvm.masked.store.v{lanes}f32.p0({vector} %v, ptr align 4 %p, {mask} %m)
  ret i32 0
}}
define i32 @gw_stream_{lanes}(ptr %p, {vector} %v) alwaysinline {{
  store {vector} %v, ptr %p, align {align}, !nontemporal !0
  ret i32 0
}}
define i32 @gw_to_aligned_{lanes}(ptr %p) alwaysinline {{
  %i = ptrtoint ptr %p to i64
  %n = sub i64 0, %i
  %b = and i64 %n, {below}
  %e = lshr i64 %b, 2
  %r = trunc i64 %e to i32
  ret i32 %r
}}
define i32 @gw_opaque_int32(i32 %x) alwaysinline {{
  ret i32 %x
}}
define i64 @gw_opaque_int64(i64 %x) alwaysinline {{
  ret i64 %x
}}
define i32 @gw_prefetch(ptr %p) alwaysinline {{
  call void @llvm.prefetch.p0(ptr %p, i32 0, i32 3, i32 1)
  ret i32 0
}}
define {vector} @gw_apart_{lanes}({vector} %v) alwaysinline {{
  %r = call {vector} @llvm.arithmetic.fence.v{lanes}f32({vector} %v)
  ret {vector} %r
}}
declare {vector} @llvm.arithmetic.fence.v{lanes}f32({vector})
define {vector} @gw_add_{lanes}({vector} %v, {vector} %c) alwaysinline {{
  %r = fadd {vector} %v, %c
  ret {vector} %r
}}
declare {vector} @llvm.masked.load.v{lanes}f32.p0(ptr, {mask}, {vector})
declare void @llvm.masked.store.v{lanes}f32.p0({vector}, ptr, {mask})
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
!0 = !{{i32 1}}
"""

# Whole numbers.
_WHOLE = """
define {vector} @gw_load_i{bits}_{lanes}(ptr %p, i32 %n) alwaysinline {{
  %m = call {mask} @gw_mask_{lanes}(i32 %n)
  %v = call {vector} @llvm.masked.load.v{lanes}i{bits}.p0(ptr align {align} %p, {mask} %m, {vector} zeroinitializer)
  ret {vector} %v
}}
define i32 @gw_store_i{bits}_{lanes}(ptr %p, i32 %n, {vector} %v) alwaysinline {{
  %m = call {mask} @gw_mask_{lanes}(i32 %n)
  call void @llvm.masked.store.v{lanes}i{bits}.p0({vector} %v, ptr align {align} %p, {mask} %m)
  ret i32 0
}}
declare {vector} @llvm.masked.load.v{lanes}i{bits}.p0(ptr, {mask}, {vector})
declare void @llvm.masked.store.v{lanes}i{bits}.p0({vector}, ptr, {mask})
"""

_CHOOSE = """
define {vector} @gw_choose_{name}_{lanes}({vector} %a, {vector} %b, {vector} %x, {vector} %y) alwaysinline {{
  %c = fcmp {word} {vector} %a, %b
  %r = select {mask} %c, {vector} %x, {vector} %y
  ret {vector} %r
}}
"""

_ABOVE = """
define i32 @gw_{name}_{lanes}({vector} %a, {vector} %b) alwaysinline {{
  %c = fcmp {word} {vector} %a, %b
  %m = bitcast {mask} %c to i{lanes}
  %r = zext i{lanes} %m to i32
  ret i32 %r
}}
"""

# As one piece with one register beside its operands: of intrinsics LLVM makes trees of sums, or holds more products
# than there are registers.
_PAIRS = """
define <{lanes} x i32> @gw_pairs_{lanes}(<{lanes} x i32> %s, <{twice} x i16> %x, <{twice} x i16> %w) alwaysinline {{
  %r = call {{ <{lanes} x i32>, <{lanes} x i32> }} asm "vpmaddwd $3, $2, $1\\0A\\09vpaddd $1, $0, $0",
      "=v,=&v,v,v,0"(<{twice} x i16> %x, <{twice} x i16> %w, <{lanes} x i32> %s)
  %v = extractvalue {{ <{lanes} x i32>, <{lanes} x i32> }} %r, 0
  ret <{lanes} x i32> %v
}}
"""
_ADD_ROUNDED = """
define <{lanes} x float> @gw_add_rounded_{lanes}(<{lanes} x float> %s, <{lanes} x i32> %x, <{twice} x i16> %w)
    alwaysinline {{
  %a = bitcast <{lanes} x i32> %x to <{twice} x bfloat>
  %b = bitcast <{twice} x i16> %w to <{twice} x bfloat>
  %r = call <{lanes} x float> @llvm.x86.avx512bf16.dpbf16ps.{bits}(
      <{lanes} x float> %s, <{twice} x bfloat> %a, <{twice} x bfloat> %b)
  ret <{lanes} x float> %r
}}
declare <{lanes} x float> @llvm.x86.avx512bf16.dpbf16ps.{bits}(
    <{lanes} x float>, <{twice} x bfloat>, <{twice} x bfloat>)
"""
_PAIRS_SSE2 = """
define <4 x i32> @gw_pairs_4(<4 x i32> %s, <8 x i16> %x, <8 x i16> %w) alwaysinline {
  %p = call <4 x i32> @llvm.x86.sse2.pmadd.wd(<8 x i16> %x, <8 x i16> %w)
  %r = add <4 x i32> %s, %p
  ret <4 x i32> %r
}
declare <4 x i32> @llvm.x86.sse2.pmadd.wd(<8 x i16>, <8 x i16>)
"""


def _bytes(lanes: int, columns: int, steps: int) -> str:
    """Products of one or two steps of bytes added to a row of sums, as one piece: weights are read where they are
    multiplied, so that 16 registers hold more sums, and nothing else lives than a product for each column.

    Weights have one pointer, and distances in the instructions: of a pointer for each LLVM makes as many induction
    variables, which do not fit into registers. It does not see that weights are read, so nothing may write them.
    """
    sums, words, line = f"<{lanes} x i32>", f"<{2 * lanes} x i16>", 4 * lanes
    outputs = [*[sums] * columns, *[words] * columns, words, *([words] if steps > 1 else [])]
    x, spare, ones = 2 * columns, 2 * columns + 1, len(outputs) + columns
    weights, apart, memory = ones + 1, ones + 2, ones + 3
    lines = []
    for step in range(steps):
        lines.append(f"vpbroadcastd ${memory + step}, ${x}")
        for c in range(columns):
            distance = f"${{{apart}:c}}+{c * line}" if step else str(c * line)
            product = spare if step else columns + c
            lines.append(f"vpmaddubsw {distance}(${weights}), ${x}, ${product}")
            lines += [f"vpaddw ${spare}, ${columns + c}, ${columns + c}"] * (step > 0)
    lines += [f"vpmaddwd ${ones}, ${columns + c}, ${columns + c}" for c in range(columns)]
    lines += [f"vpaddd ${columns + c}, ${c}, ${c}" for c in range(columns)]
    kinds = ["=v"] * columns + ["=&v"] * (len(outputs) - columns)
    kinds += [str(c) for c in range(columns)] + ["v", "r", "i"] + ["*m"] * steps
    given = [f"{sums} %a{c}" for c in range(columns)] + [f"{words} splat (i16 1)", "ptr %w", "i64 %apart"]
    given += [f"ptr elementtype(i32) %x{s}" for s in range(steps)]
    pointers = [*(f"ptr %s{c}" for c in range(columns)), "ptr %x0", "ptr %w"]
    body = [f"  %a{c} = load {sums}, ptr %s{c}, align 4" for c in range(columns)]
    if steps > 1:
        body.append("  %x1 = getelementptr i8, ptr %x0, i64 4")
    result = "{ " + ", ".join(outputs) + " }"
    text = "\\0A\\09".join(lines)
    body.append(f'  %r = call {result} asm "{text}", "{",".join(kinds)}"({", ".join(given)})')
    for c in range(columns):
        body.append(f"  %v{c} = extractvalue {result} %r, {c}")
        body.append(f"  store {sums} %v{c}, ptr %s{c}, align 4")
    name = f"gw_bytes_{columns}_{steps}_{lanes}"
    return "\n".join([
        f"define i32 @{name}({', '.join([*pointers, 'i64 %apart'])}) alwaysinline {{", *body, "  ret i32 0", "}", ""
    ])  # fmt: skip


_LOWEST_BIT = """
define i32 @gw_lowest_bit(i32 %n) alwaysinline {
  %r = call i32 @llvm.cttz.i32(i32 %n, i1 true)
  ret i32 %r
}
declare i32 @llvm.cttz.i32(i32, i1)
"""

# A lane that becomes 0 is left out: a result below the normal numbers takes the processor about 150 cycles. The second
# form keeps a NaN whatever its power is.
_SCALEF = """
define <16 x float> @gw_scalef_16(<16 x float> %v, <16 x float> %k) alwaysinline {{
  %c = fcmp uge <16 x float> %k, <{zero}>
  %m = bitcast <16 x i1> %c to i16
  %r = call <16 x float> @llvm.x86.avx512.mask.scalef.ps.512(
      <16 x float> %v, <16 x float> %k, <16 x float> zeroinitializer, i16 %m, i32 4)
  ret <16 x float> %r
}}
define <16 x float> @gw_scalef_nan_16(<16 x float> %v, <16 x float> %k) alwaysinline {{
  %c = fcmp uge <16 x float> %k, <{zero}>
  %n = fcmp uno <16 x float> %v, %v
  %o = or <16 x i1> %c, %n
  %m = bitcast <16 x i1> %o to i16
  %r = call <16 x float> @llvm.x86.avx512.mask.scalef.ps.512(
      <16 x float> %v, <16 x float> %k, <16 x float> zeroinitializer, i16 %m, i32 4)
  ret <16 x float> %r
}}
declare <16 x float> @llvm.x86.avx512.mask.scalef.ps.512(<16 x float>, <16 x float>, <16 x float>, i16, i32)
"""

# By the low three bits of each lane.
_LOOKUP = """
define <8 x i32> @gw_roots_of_two(<8 x i32> %j) alwaysinline {{
  %r = call <8 x i32> @llvm.x86.avx2.permd(<8 x i32> <{entries}>, <8 x i32> %j)
  ret <8 x i32> %r
}}
declare <8 x i32> @llvm.x86.avx2.permd(<8 x i32>, <8 x i32>)
"""

_FENCE = """
define i32 @gw_fence() alwaysinline {
  call void @llvm.x86.sse.sfence()
  ret i32 0
}
declare void @llvm.x86.sse.sfence()
"""


_NARROW = """
define {narrow} @gw_narrow_{name}_{lanes}({wide} %x) alwaysinline {{
  %r = trunc {wide} %x to {narrow}
  ret {narrow} %r
}}
"""
_NARROW_GROUP = """
define i32 @gw_narrow_group_{name}_{lanes}(ptr %p, {wide} %a, {wide} %b, {wide} %c, {wide} %d) alwaysinline {{
  %ab = shufflevector {wide} %a, {wide} %b, <{two} x i32> <{first}>
  %cd = shufflevector {wide} %c, {wide} %d, <{two} x i32> <{first}>
  %x = shufflevector <{two} x i32> %ab, <{two} x i32> %cd, <{four} x i32> <{second}>
  %r = trunc <{four} x i32> %x to <{four} x i{bits}>
  store <{four} x i{bits}> %r, ptr %p, align {align}
  ret i32 0
}}
"""
# x86 below AVX-512 has no truncation of whole registers, but packs two into one, in each half of a register.
_PACK = """
define <8 x i8> @gw_narrow_{name}_8(<8 x i32> %x) alwaysinline {{
  %l = shufflevector <8 x i32> %x, <8 x i32> poison, <4 x i32> <i32 0, i32 1, i32 2, i32 3>
  %h = shufflevector <8 x i32> %x, <8 x i32> poison, <4 x i32> <i32 4, i32 5, i32 6, i32 7>
  %w = call <8 x i16> @llvm.x86.sse2.packssdw.128(<4 x i32> %l, <4 x i32> %h)
  %b = call <16 x i8> @llvm.x86.sse2.{pack}.128(<8 x i16> %w, <8 x i16> %w)
  %r = shufflevector <16 x i8> %b, <16 x i8> poison, <8 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7>
  ret <8 x i8> %r
}}
define i32 @gw_narrow_group_{name}_8(ptr %p, <8 x i32> %a, <8 x i32> %b, <8 x i32> %c, <8 x i32> %d) alwaysinline {{
  %ab = call <16 x i16> @llvm.x86.avx2.packssdw(<8 x i32> %a, <8 x i32> %b)
  %cd = call <16 x i16> @llvm.x86.avx2.packssdw(<8 x i32> %c, <8 x i32> %d)
  %x = call <32 x i8> @llvm.x86.avx2.{pack}(<16 x i16> %ab, <16 x i16> %cd)
  %y = bitcast <32 x i8> %x to <8 x i32>
  %r = shufflevector <8 x i32> %y, <8 x i32> poison,
      <8 x i32> <i32 0, i32 4, i32 1, i32 5, i32 2, i32 6, i32 3, i32 7>
  store <8 x i32> %r, ptr %p, align 1
  ret i32 0
}}
declare <16 x i8> @llvm.x86.sse2.{pack}.128(<8 x i16>, <8 x i16>)
declare <32 x i8> @llvm.x86.avx2.{pack}(<16 x i16>, <16 x i16>)
"""
_PACK_WORDS = """
declare <8 x i16> @llvm.x86.sse2.packssdw.128(<4 x i32>, <4 x i32>)
declare <16 x i16> @llvm.x86.avx2.packssdw(<8 x i32>, <8 x i32>)
"""


def _narrowing(lanes: int, pack: bool) -> str:
    """Functions that make vectors of int32 narrower, one and GROUP at a time. pack: by AVX2's instructions."""
    text = _PACK_WORDS if pack else ""
    for name in NARROW_INTEGERS:
        bits = bits_of(name)
        if pack and bits == 8:
            text += _PACK.format(name=name, pack="packsswb" if name == "int8" else "packuswb")
            continue
        text += _NARROW.format(narrow=f"<{lanes} x i{bits}>", wide=f"<{lanes} x i32>", lanes=lanes, name=name)
        text += _NARROW_GROUP.format(
            wide=f"<{lanes} x i32>", lanes=lanes, two=2 * lanes, four=GROUP * lanes, name=name, bits=bits,
            align=bits // 8, first=", ".join(f"i32 {i}" for i in range(2 * lanes)),
            second=", ".join(f"i32 {i}" for i in range(GROUP * lanes)),
        )  # fmt: skip
    return text


def _reduction(what: str, lanes: int) -> str:
    """A reduction by halving. `llvm.vector.reduce` of floats is a chain of scalar operations instead."""
    lines = [f"define float @gw_{what}_{lanes}(<{lanes} x float> %v{lanes}) alwaysinline {{"]
    width = lanes
    while width > 1:
        half = width // 2
        whole, part = f"<{width} x float>", f"<{half} x float>"
        for side, first in (("l", 0), ("h", half)):
            index = ", ".join(f"i32 {first + i}" for i in range(half))
            lines.append(f"  %{side}{half} = shufflevector {whole} %v{width}, {whole} poison, <{half} x i32> <{index}>")
        if what == "sum":
            lines.append(f"  %v{half} = fadd {part} %l{half}, %h{half}")
        else:
            lines.append(f"  %c{half} = fcmp ogt {part} %l{half}, %h{half}")
            lines.append(f"  %v{half} = select <{half} x i1> %c{half}, {part} %l{half}, {part} %h{half}")
        width = half
    lines += ["  %r = extractelement <1 x float> %v1, i32 0", "  ret float %r", "}", ""]
    return "\n".join(lines)
