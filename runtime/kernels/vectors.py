"""Explicit float32 vectors for TIR kernels: loads with tails, reductions, 2^k and exp, for any instruction set.

Kernels are built with TVM's IR builder, so ordinary Python functions compose them. What TIR has no words for
(masked and non-temporal memory accesses, reductions by halving) is LLVM IR text that `Vectors.prelude` links
into the kernel; TVM marks those functions always-inline, so nothing is left of the calls.

Source of the exponential and its constants: Dukhan and Ablavatski, "The Two-Pass Softmax Algorithm",
arXiv 2001.04438, and its implementation in google/XNNPACK.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ..target import InstructionSet
from .narrow_floats import NARROW, functions_for, widening

LN2 = float.fromhex("0x1.62E42FEFA39EFp-1")
LOG2E = float.fromhex("0x1.715476p+0")
# ln 2 in two parts. With a fused multiply-add n·LN2_HIGH is exact inside it; without one the high part must
# end in zeros so that the product itself is exact.
LN2_FUSED = (float.fromhex("0x1.62E43p-1"), float.fromhex("-0x1.05C61p-29"))
LN2_SPLIT = (float.fromhex("0x1.62E400p-1"), float.fromhex("0x1.7F7D1Cp-20"))
# exp(t) = c0 + t·(c1 + ... t·c5) for |t| <= ln(2)/2, highest first.
POLYNOMIAL = tuple(
    float.fromhex(c)
    for c in ("0x1.0F9F9Cp-7", "0x1.573A1Ap-5", "0x1.555A80p-3", "0x1.FFFDC6p-2", "0x1.FFFFF6p-1", "1.0")
)
# 2^(j/PARTS) in one register, where the instruction set can look it up, leaves |t| <= ln(2)/(2·PARTS), for which this
# is off by 2.6e-8. By Lawson's iteration, the last two coefficients being set.
PARTS = 8
SHORT_POLYNOMIAL = (float.fromhex("0x1.555658p-3"), float.fromhex("0x1.000884p-1"), 1.0, 1.0)
# Adding 1.5·2^23 to a float rounds it to a whole number, half to even, and leaves that number in the low
# mantissa bits. Exact for |n| < 2^22; needs no rounding instruction, which SSE2 and 32-bit ARM do not have.
ROUND = 12582912.0
BIAS = 127.0  # of an exponent: the low mantissa bits of ROUND + BIAS + n are the exponent bits of 2^n
# Where 2^n is built from its exponent bits: here n is -127, whose exponent bits are those of 0.
EXP_ZERO_BITS = -88.0
# x·2^k is 0 for k below this, whatever float x below 2^27 is: 2^-150 is half the smallest one.
POWER_ZERO = -180.0
LOWEST = -3.4028234663852886e38
NEGATIVE_INFINITY = float("-inf")
GROUP = 4  # vectors that are narrowed together
NARROW_INTEGERS = ("int8", "uint8", "int16", "uint16")
LINE = 16  # elements of a cache line
BYTE_COLUMNS = 4  # vectors of sums that take up steps of bytes together

Expr = Any  # a TIR expression; TVM gives its expression classes no common public name
Buffer = Any


class Vectors:
    """Vector operations for one instruction set. Emits into the IR builder that is open.

    lanes: float32 elements of one vector, a power of two, at least 4: where the machine has no vectors LLVM
    splits them into scalars.
    """

    def __init__(self, isa: InstructionSet) -> None:
        self.isa = isa
        self.lanes = max(4, isa.lanes(32))
        self.dtype = f"float32x{self.lanes}"
        # Steps that a power of two is taken in by `Exponential`.
        self.parts = PARTS if isa.lookup else 1
        # Live vectors that fit beside the constants of exp.
        self.wide = isa.registers >= 32
        # Whether `narrow` to 8 bits holds numbers between the bounds of the type.
        self.saturates = isa.lookup

    # -- values ---------------------------------------------------------------------------------------------

    def splat(self, value: float | Expr) -> Expr:
        """`value` in every lane."""
        return T.broadcast(T.float32(value) if isinstance(value, int | float) else value, self.lanes)

    def fma(self, a: Expr, b: Expr, c: Expr, lanes: int | None = None) -> Expr:
        """a·b + c, rounded once where the instruction set can."""
        if not self.isa.fma:
            return a * b + c
        lanes = lanes or self.lanes
        name, dtype = ("llvm.fma.f32", "float32") if lanes == 1 else (f"llvm.fma.v{lanes}f32", f"float32x{lanes}")
        return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), a, b, c, dtype=dtype)

    def product(self, a: Expr, b: Expr) -> Expr:
        """a·b as it is rounded: what is added to it is no part of a multiply-add, whose product is exact."""
        fence = T.llvm_lookup_intrinsic_id(f"llvm.arithmetic.fence.v{self.lanes}f32")
        return T.Bind(T.call_llvm_pure_intrin(fence, a * b, dtype=self.dtype))

    def round(self, x: Expr, magic: float | Expr, parts: int = 1) -> Expr:
        """x·log2 e in whole `parts`, plus `magic`, whose low mantissa bits it is in."""
        log2e = self.splat(LOG2E * parts)
        addend = self.splat(magic) if isinstance(magic, float) else magic
        if self.isa.fma:
            return T.Bind(self.fma(x, log2e, addend))
        # Hidden from TVM, which takes (a + c) - c for a.
        return self.placed(T.call_extern(self.dtype, self._name("add"), x * log2e, addend))

    def split(self, x: Expr) -> tuple[Expr, Expr]:
        """x = n·ln 2 + t with n whole and |t| <= ln(2)/2, for |x| < 2.9e6. Returns (n, t)."""
        n = T.Bind(self.round(x, ROUND) - self.splat(ROUND))
        return n, self.rest(x, n)

    def rest(self, x: Expr, n: Expr, low: bool = True, parts: int = 1) -> Expr:
        """x - n·ln(2)/parts; without `low` only its high part, where one multiply-add is exact in it."""
        high_part, low_part = (part / parts for part in (LN2_FUSED if self.isa.fma else LN2_SPLIT))
        t = self.fma(n, self.splat(-high_part), x)
        return T.Bind(self.fma(n, self.splat(-low_part), t) if low or not self.isa.fma else t)

    def polynomial(self, t: Expr, coefficients: Sequence[Expr] | None = None) -> Expr:
        """e^t for |t| <= ln(2)/2, or whatever polynomial has the coefficients, highest power first."""
        k = coefficients or [self.splat(c) for c in POLYNOMIAL]
        p = k[0]
        for c in k[1:]:
            p = self.fma(p, t, c)
        return p

    def times_power(self, x: Expr, k: Expr) -> Expr:
        """x·2^k for whole k <= 127, |x| < 2^27; 0 where k < -126 without `scalef`. A NaN stays one."""
        if self.isa.scalef:
            return T.call_extern(self.dtype, self._name("scalef_nan"), x, k)
        # The constant first: the comparison is false for NaN, which then passes. -127 has the bits of 0.0.
        bits = T.reinterpret(T.max(self.splat(-127.0), k) + self.splat(ROUND), dtype=f"int32x{self.lanes}")
        one = T.broadcast(T.int32(127 << 23), self.lanes)
        return x * T.reinterpret(T.shift_left(bits, T.broadcast(T.int32(23), self.lanes)) + one, dtype=self.dtype)

    def exp(self, x: Expr, low: bool = True) -> Expr:
        """e^x for x <= 88; a NaN stays one. 0 for x < -105 and -inf; without `scalef` for x < -88.1.

        There, results below the normal numbers are off by up to 2^-127.

        low: use the low part of ln 2. Left out, the error grows by 2e-9·|x|: no more than a difference is rounded by.
        Without a fused multiply-add it is always used.
        """
        if self.isa.scalef:
            # Of -inf n is -inf, whose power is 0, and p a NaN.
            n = T.Bind(self.round(x, ROUND) - self.splat(ROUND))
            return T.Bind(T.call_extern(self.dtype, self._name("scalef"), self.polynomial(self.rest(x, n, low)), n))
        zero, magic = self.splat(EXP_ZERO_BITS), self.splat(ROUND + BIAS * self.parts)
        exponential = Exponential(self, zero, magic, None, low)
        m, power = exponential.factors(exponential.clamp(x))
        return T.Bind(m * power)

    @property
    def farthest(self) -> float:
        """How far from 0 `exponential` takes arguments: below 2^22 parts."""
        return 2.9e6 / self.parts

    def exponential(self, n: Expr, factor: Expr | None = None) -> Exponential:
        """What computes factor·e^x / 2^n. n: whole, the same in every lane, that of e^±`farthest` at most."""
        floor = T.Bind((n - self.splat(BIAS)) * self.splat(LN2))
        magic = T.Bind(self.splat(ROUND) + (self.splat(BIAS) - n) * self.splat(float(self.parts)))
        return Exponential(self, floor, magic, factor, low=False)

    def add_pairs(self, sums: Expr, x: Expr, w: Expr) -> Expr:
        """int32 sums + the products of neighbouring int16 of x and w, pair by pair."""
        return T.call_extern(f"int32x{self.lanes}", self._name("pairs"), sums, x, w)

    def add_bytes(
        self, sums: Sequence[Expr], x: Buffer, x_at: Expr, w: Buffer, w_at: Sequence[Expr], apart: int, steps: int
    ) -> None:
        """Add to vectors of int32, at each pointer of `sums`, the products of one or two steps of four bytes.

        x: buffer of int32, whose elements hold four uint8 each; steps lie behind each other. w: buffer of int8, four
        for each lane; the first step of vector v is at w_at[v], the second `apart` behind. The sums that int16 takes on
        the way must fit into it.
        """
        most = BYTE_COLUMNS
        for first in range(0, len(sums), most):
            part = slice(first, first + most)
            name = self._name(f"bytes_{len(sums[part])}_{steps}")
            weights = [T.address_of(w[at]) for at in w_at[part]]
            pointers = (*sums[part], T.address_of(x[x_at]), *weights)
            T.evaluate(T.call_extern("int32", name, *pointers, T.int64(apart)))

    def choose(self, comparison: str, a: Expr, b: Expr, then: Expr, otherwise: Expr) -> Expr:
        """Lane by lane `then` where a compares so with b, else `otherwise`.

        comparison: lt, le, gt, ge, eq, ne; all but ne are false for NaN. Hidden from TVM, which takes every two floats
        for ordered and so drops the branch that a NaN takes.
        """
        return T.Bind(T.call_extern(self.dtype, self._name(f"choose_{comparison}"), a, b, then, otherwise))

    def above(self, v: Expr, bound: Expr, unordered: bool) -> Expr:
        """Which lanes are greater than those of `bound`, as the bits of an int32. unordered: a NaN is greater."""
        return T.Bind(T.call_extern("int32", self._name("above_or_nan" if unordered else "above"), v, bound))

    def lowest_bit(self, bits: Expr) -> Expr:
        """The place of the lowest bit that is set in an int32 other than 0."""
        return T.Bind(T.call_extern("int32", "gw_lowest_bit", bits))

    def greatest(self, v: Expr) -> Expr:
        """The greatest lane, as a scalar. Whether a NaN is seen depends on its place."""
        return T.Bind(T.call_extern("float32", self._name("max"), v))

    def total(self, v: Expr) -> Expr:
        """The sum of the lanes, as a scalar, added by halving."""
        return T.Bind(T.call_extern("float32", self._name("sum"), v))

    # -- memory ---------------------------------------------------------------------------------------------

    def at(self, offset: Expr) -> Expr:
        """Indices of one vector from `offset` on."""
        return T.ramp(offset, 1, self.lanes)

    def load(self, buffer: Buffer, offset: Expr, count: Expr | None = None, fill: float = 0.0) -> Expr:
        """The vector at `offset`, of float32 where the buffer is of float16 or bfloat16, else of what the buffer is of;
        with `count` < lanes only so many elements are read, the rest are `fill`, which is 0 for whole numbers."""
        narrow = buffer.dtype in NARROW
        if count is None and not narrow:
            return T.Bind(buffer[self.at(offset)])
        pointer, dtype = T.address_of(buffer[offset]), str(buffer.dtype)
        if count is None:
            return T.Bind(T.call_extern(self.dtype, self._access("take", buffer), pointer))
        if dtype != "float32" and not narrow:
            name = self._name(f"load_i{_bits(dtype)}")
            return T.Bind(T.call_extern(f"{dtype}x{self.lanes}", name, pointer, _int32(count)))
        name = self._access("load", buffer)
        return T.Bind(T.call_extern(self.dtype, name, pointer, _int32(count), T.float32(fill)))

    def widened(self, buffer: Buffer, offset: Expr, kind: str) -> Expr:
        """The vector at `offset` of a buffer of uint16, the bits of numbers of type `kind`, float16 or bfloat16."""
        return T.Bind(T.call_extern(self.dtype, self._name(f"widen_{kind}"), buffer[self.at(offset)]))

    def ended(self, x: Expr, count: Expr | int) -> Expr:
        """The first `count` elements of x, -inf in the lanes behind them."""
        return T.Bind(T.call_extern(self.dtype, self._name("ended"), x, _int32(count)))

    def select(self, x: Expr, kept: Buffer, offset: Expr, count: Expr | None = None) -> Expr:
        """x where the booleans at `offset` are true, else -inf; with `count` only so many are read."""
        count = T.int32(self.lanes) if count is None else _int32(count)
        return T.Bind(T.call_extern(self.dtype, self._name("select"), T.address_of(kept[offset]), count, x))

    def store(self, buffer: Buffer, offset: Expr, value: Expr, count: Expr | None = None, stream: bool = False) -> None:
        """Write a vector, or its first `count` elements; of float32 as what the buffer is of, float16 or bfloat16.
        `stream`: past the caches, to an aligned address."""
        pointer, dtype = T.address_of(buffer[offset]), str(buffer.dtype)
        if count is not None:
            whole = dtype != "float32" and dtype not in NARROW
            name = self._name(f"store_i{_bits(dtype)}") if whole else self._access("store", buffer)
            T.evaluate(T.call_extern("int32", name, pointer, _int32(count), value))
        elif stream:
            T.evaluate(T.call_extern("int32", self._access("stream", buffer), pointer, value))
        elif buffer.dtype in NARROW:
            T.evaluate(T.call_extern("int32", self._access("give", buffer), pointer, value))
        else:
            T.buffer_store(buffer, value, [self.at(offset)])

    def nearest(self, x: Expr) -> Expr:
        """The nearest int32 of floats within its range, half to even."""
        integer = f"int32x{self.lanes}"
        if self.isa.streaming:  # x86: one instruction, where rounding to a float first takes two, or a call
            name = f"llvm.lrint.v{self.lanes}i32.v{self.lanes}f32"
            return T.Bind(T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), x, dtype=integer))
        name = f"llvm.roundeven.v{self.lanes}f32"
        whole = T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), x, dtype=self.dtype)
        return T.Bind(T.Cast(integer, whole))

    def apart(self, x: Expr) -> Expr:
        """A product that no addition may take in: fused, it would not be rounded, and not everywhere."""
        return T.Bind(T.call_extern(self.dtype, self._name("apart"), x))

    def narrow(self, value: Expr, dtype: str) -> Expr:
        """A vector of int32 as one of 8 or 16 bits, whose numbers fit into them, unless it `saturates`."""
        return T.Bind(T.call_extern(f"{dtype}x{self.lanes}", self._name(f"narrow_{dtype}"), value))

    def store_narrow(self, buffer: Buffer, offset: Expr, values: Sequence[Expr]) -> None:
        """Write GROUP vectors of int32 behind each other as numbers of 8 or 16 bits, into which they fit."""
        name = self._name(f"narrow_group_{buffer.dtype}")
        T.evaluate(T.call_extern("int32", name, T.address_of(buffer[offset]), *values))

    def prefetch(self, buffer: Buffer, offset: Expr) -> None:
        """Ask for the cache line of an element; past the buffer's end nothing happens."""
        T.evaluate(T.call_extern("int32", "gw_prefetch", T.address_of(buffer[offset])))

    def ahead(
        self, buffer: Buffer, begin: Expr, total: int, group: int, turn: Expr, turns: int,
        const: Callable[[int], Expr], line: int = LINE,
    ) -> Callable[[Expr], None] | None:  # fmt: skip
        """What asks for the `total` elements behind those from `begin` on, while `turns` tiles read these in groups.

        Every tile reads all of them, `group` elements at a time, and calls the result with the offset of each group.
        The first tiles ask for a share each, a few lines a group, so that all has come when the next elements are
        read, and no tile waits for many lines at once. turn: number of the tile. line: elements of a cache line. None
        where groups are too small.
        """
        lines = group // line
        if not lines or not turns:
            return None
        each = -(-lines // turns)  # lines that are asked for in a group
        shares = -(-lines // each)
        of_share = total // group * each * line
        start = T.Bind(begin + const(total) + T.min(turn, const(shares - 1)) * const(of_share))

        def ask(at: Expr) -> None:
            first = T.Bind(start + (at - begin) // const(group) * const(each * line))
            for number in range(each):
                self.prefetch(buffer, first + const(number * line))

        return ask

    def to_aligned(self, buffer: Buffer, offset: Expr) -> Expr:
        """Elements from `offset` to the next address that a whole vector is aligned to, as int32."""
        return T.Bind(T.call_extern("int32", self._access("to_aligned", buffer), T.address_of(buffer[offset])))

    def fence(self) -> None:
        """Make streamed stores visible to other threads. Once after the last of them, on each thread."""
        if self.isa.streaming:
            T.evaluate(T.call_extern("int32", "gw_fence"))

    def registers(self, count: int, value: float, dtype: str = "float32") -> Buffer:
        """`count` vectors that live in registers, filled with `value`.

        TVM keeps a buffer of scope "global" under 1024 bytes on the stack, which LLVM turns into registers;
        scope "local" would be a heap allocation.
        """
        buffer = T.alloc_buffer((count * self.lanes,), dtype, scope="global")
        filled = T.broadcast(tirx.const(value, dtype), self.lanes)
        for j in range(count):
            T.buffer_store(buffer, filled, [self.at(j * self.lanes)])
        return buffer

    def placed(self, x: Expr) -> Expr:
        """x by way of a register. TVM's analyzer, when it generates code, puts the expression of a bound variable into
        every expression that it occurs in; an exponential of a masked element grew until it took half a minute."""
        register = T.alloc_buffer((self.lanes,), "float32", scope="global")
        T.buffer_store(register, x, [self.at(0)])
        return T.Bind(register[self.at(0)])

    # -- LLVM IR --------------------------------------------------------------------------------------------

    def _name(self, what: str) -> str:
        return f"gw_{what}_{self.lanes}"

    def _access(self, what: str, buffer: Buffer) -> str:
        return self._name(f"{what}_{buffer.dtype}" if buffer.dtype in NARROW else what)

    def prelude(self, *dtypes: str) -> Any:
        """A scope that makes the functions called here known: `with vectors.prelude(): ...` around the kernel.

        dtypes: of its tensors, some of which may be float16 or bfloat16.
        """
        text = self._ir() + functions_for(set(dtypes).intersection(NARROW), self.isa, self.lanes)
        return T.attr(T.int32(0), "pragma_import_llvm", text)

    def _ir(self) -> str:
        lanes = self.lanes
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
        text += _narrowing(lanes, pack=self.isa.lookup)
        text += _reduction("max", lanes) + _reduction("sum", lanes)
        for name, word in COMPARISONS.items():
            text += _CHOOSE.format(name=name, word=word, lanes=lanes, vector=vector, mask=mask)
        for name, word in (("above", "ogt"), ("above_or_nan", "ugt")):
            text += _ABOVE.format(name=name, word=word, lanes=lanes, vector=vector, mask=mask)
        text += _LOWEST_BIT + widening(self.isa, lanes)
        if self.isa.dot_int8 == "pairs":
            text += _PAIRS_SSE2 if lanes == 4 else _PAIRS.format(lanes=lanes, twice=2 * lanes)
            text += "".join(_bytes(lanes, c, s) for c in range(1, BYTE_COLUMNS + 1) for s in (1, 2) if lanes > 4)
        if self.isa.lookup:
            text += _LOOKUP.format(entries=", ".join(f"i32 {_root_of_two(j)}" for j in range(PARTS)))
        if self.isa.scalef:
            text += _SCALEF.format(zero=", ".join([f"float {POWER_ZERO}"] * 16))
        if self.isa.streaming:
            text += _FENCE
        return text


class Exponential:
    """factor·e^x / 2^n for x that are less than 88 above n·ln 2; 0 for those 88.1 below it.

    The power of two of x is taken against 2^n from the start, in whole parts, so that the loop over a row neither
    subtracts a maximum nor rescales. The error is 2 ulp (2.5 without fma) and, without `low`, 2.7e-9·x, in softmax of
    the difference to the greatest; results between 87.3 and 88.1 below n·ln 2, which are no normal numbers, are off by
    up to 2^-127.

    floor: (n - 127)·ln 2, to which less is raised; its power has the bits of 0. magic: ROUND + parts·(BIAS - n).
    """

    def __init__(self, vectors: Vectors, floor: Expr, magic: Expr, factor: Expr | None, low: bool) -> None:
        self.vectors, self.floor, self.magic, self.low = vectors, floor, magic, low
        polynomial = POLYNOMIAL if vectors.parts == 1 else SHORT_POLYNOMIAL
        self.coefficients = [
            T.Bind(vectors.splat(c if factor is None else T.Bind(factor * T.float32(c)))) for c in polynomial
        ]

    def clamp(self, x: Expr) -> Expr:
        """x, or `floor` where it is less. The constant first: a NaN passes."""
        return T.Bind(T.max(self.floor, x))

    def factors(self, x: Expr) -> tuple[Expr, Expr]:
        """Two numbers whose product is the result for an x that is clamped."""
        v, integer = self.vectors, f"int32x{self.vectors.lanes}"
        rounded = v.round(x, self.magic, v.parts)
        t = v.rest(x, T.Bind(rounded - self.magic), self.low, v.parts)
        bits = T.Bind(T.reinterpret(rounded, dtype=integer))
        power = T.shift_left(bits, T.broadcast(T.int32(23 - (v.parts.bit_length() - 1)), v.lanes))
        if v.parts > 1:
            power = power + T.call_extern(integer, "gw_roots_of_two", bits)
        return T.Bind(v.polynomial(t, self.coefficients)), T.Bind(T.reinterpret(power, dtype=v.dtype))


def _root_of_two(j: int) -> int:
    """The bits of 2^(j/PARTS) less those of j parts, which have been shifted into the mantissa, and of the exponent."""
    (bits,) = struct.unpack("<i", struct.pack("<f", 2 ** (j / PARTS)))
    return bits - (127 << 23) - (j << 23) // PARTS


def _bits(dtype: str) -> int:
    """Bits of an element of a type such as uint8."""
    return int("".join(c for c in dtype if c.isdigit()))


def _int32(value: Expr | int) -> Expr:
    return T.int32(value) if isinstance(value, int) else T.Cast("int32", value)


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

# Comparison -> LLVM's predicate.
COMPARISONS = {"lt": "olt", "le": "ole", "gt": "ogt", "ge": "oge", "eq": "oeq", "ne": "une"}

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
    multiplied, so that 16 registers hold more sums, and nothing else lives than a product for each column."""
    sums, words = f"<{lanes} x i32>", f"<{2 * lanes} x i16>"
    outputs = [*[sums] * columns, *[words] * columns, words, *([words] if steps > 1 else [])]
    x, spare, ones = 2 * columns, 2 * columns + 1, len(outputs) + columns
    memory = ones + 1
    lines = []
    for step in range(steps):
        lines.append(f"vpbroadcastd ${memory + step}, ${x}")
        for c in range(columns):
            weight, product = memory + steps + step * columns + c, spare if step else columns + c
            lines.append(f"vpmaddubsw ${weight}, ${x}, ${product}")
            lines += [f"vpaddw ${spare}, ${columns + c}, ${columns + c}"] * (step > 0)
    lines += [f"vpmaddwd ${ones}, ${columns + c}, ${columns + c}" for c in range(columns)]
    lines += [f"vpaddd ${columns + c}, ${c}, ${c}" for c in range(columns)]
    kinds = ["=v"] * columns + ["=&v"] * (len(outputs) - columns)
    kinds += [str(c) for c in range(columns)] + ["v"] + ["*m"] * (steps + steps * columns)
    vector = f"<{4 * lanes} x i8>"
    given = [f"{sums} %a{c}" for c in range(columns)] + [f"{words} splat (i16 1)"]
    given += [f"ptr elementtype(i32) %x{s}" for s in range(steps)]
    given += [f"ptr elementtype({vector}) %w{c}_{s}" for s in range(steps) for c in range(columns)]
    pointers = [*(f"ptr %s{c}" for c in range(columns)), "ptr %x0", *(f"ptr %w{c}_0" for c in range(columns))]
    body = [f"  %a{c} = load {sums}, ptr %s{c}, align 4" for c in range(columns)]
    if steps > 1:
        body.append("  %x1 = getelementptr i8, ptr %x0, i64 4")
        body += [f"  %w{c}_1 = getelementptr i8, ptr %w{c}_0, i64 %apart" for c in range(columns)]
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
        bits = _bits(name)
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
