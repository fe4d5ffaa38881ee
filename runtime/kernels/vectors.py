"""Explicit float32 vectors for TIR kernels: loads with tails, reductions, 2^k and exp, for any instruction set.

Kernels are built with TVM's IR builder, so ordinary Python functions compose them. What TIR has no words for
(masked and non-temporal memory accesses, reductions by halving) is LLVM IR text (`vector_functions`) that
`Vectors.prelude` links into the kernel.

Source of the exponential and its constants: Dukhan and Ablavatski, "The Two-Pass Softmax Algorithm",
arXiv 2001.04438, and its implementation in google/XNNPACK.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ..target import InstructionSet
from .narrow_floats import NARROW, functions_for
from .vector_functions import BYTE_COLUMNS, PARTS, bits_of, functions_of

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
SHORT_POLYNOMIAL = (float.fromhex("0x1.555658p-3"), float.fromhex("0x1.000884p-1"), 1.0, 1.0)
# Adding 1.5·2^23 to a float rounds it to a whole number, half to even, and leaves that number in the low
# mantissa bits. Exact for |n| < 2^22; needs no rounding instruction, which SSE2 and 32-bit ARM do not have.
ROUND = 12582912.0
BIAS = 127.0  # of an exponent: the low mantissa bits of ROUND + BIAS + n are the exponent bits of 2^n
# Where 2^n is built from its exponent bits: here n is -127, whose exponent bits are those of 0.
EXP_ZERO_BITS = -88.0
LOWEST = -3.4028234663852886e38
NEGATIVE_INFINITY = float("-inf")
LINE = 16  # elements of a cache line

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
        self, sums: Sequence[Expr], x: Buffer, x_at: Expr, w: Buffer, w_at: Expr, apart: int, steps: int
    ) -> None:
        """Add to vectors of int32, at each pointer of `sums`, the products of one or two steps of four bytes.

        x: buffer of int32, whose elements hold four uint8 each; steps lie behind each other. w: buffer of int8 that
        nothing writes, four for each lane; those of the vectors' first step lie behind each other from w_at on, those
        of the second `apart` behind. The sums that int16 takes on the way must fit into it.
        """
        for first in range(0, len(sums), BYTE_COLUMNS):
            part = sums[first : first + BYTE_COLUMNS]
            name = self._name(f"bytes_{len(part)}_{steps}")
            weights = T.address_of(w[w_at + first * 4 * self.lanes])
            T.evaluate(T.call_extern("int32", name, *part, T.address_of(x[x_at]), weights, T.int64(apart)))

    def rounded(self, x: Expr) -> Expr:
        """The bits of the nearest bfloat16, half to even, as uint16; with `dot_bf16` subnormal numbers are 0."""
        return T.Bind(T.call_extern(f"uint16x{self.lanes}", self._name("rounded"), x))

    def of_bits(self, bits: Expr) -> Expr:
        """The numbers of bits of bfloat16."""
        return T.Bind(T.call_extern(self.dtype, self._name("widen_bfloat16"), bits))

    def add_rounded(self, sums: Expr, x: Expr, w: Expr) -> Expr:
        """float32 sums + the products of neighbouring bfloat16, pair by pair. x: pairs as int32. w: bits as uint16."""
        return T.call_extern(self.dtype, self._name("add_rounded"), sums, x, w)

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
            name = self._name(f"load_i{bits_of(dtype)}")
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
            name = self._name(f"store_i{bits_of(dtype)}") if whole else self._access("store", buffer)
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

    def opaque(self, value: Expr) -> Expr:
        """An integer whose origin TVM does not see. It would follow sizes and offsets through every loop nest, which
        takes minutes; for LLVM it is the value itself."""
        dtype = str(value.ty.dtype) if hasattr(value, "ty") else "int32"
        return T.Bind(T.call_extern(dtype, f"gw_opaque_{dtype}", value))

    def divisions(self, known: bool) -> tuple[Callable[[Expr, Expr], Expr], Callable[[Expr, Expr], Expr]]:
        """Quotient, rounded down, and remainder of what is not negative. known: whether all sizes in it are. A floor by
        a size of the run would be written out for negative numbers too, many times over where floors stand in one
        another."""
        if known:
            return lambda a, b: T.Bind(tirx.floordiv(a, b)), lambda a, b: T.Bind(tirx.floormod(a, b))
        return lambda a, b: self.opaque(tirx.truncdiv(a, b)), lambda a, b: self.opaque(tirx.truncmod(a, b))

    def prefetch(self, buffer: Buffer, offset: Expr) -> None:
        """Ask for the cache line of an element; past the buffer's end nothing happens."""
        T.evaluate(T.call_extern("int32", "gw_prefetch", T.address_of(buffer[offset])))

    def ahead(
        self, buffer: Buffer, begin: Expr, total: int, group: int, turn: Expr, turns: int,
        const: Callable[[int], Expr], line: int = LINE, apart: int | None = None,
    ) -> Callable[[Expr], None] | None:  # fmt: skip
        """What asks for the `total` elements that are read next, while `turns` tiles read those from `begin` on.

        Every tile reads all of them, `group` elements at a time, and calls the result with the offset of each group.
        The first tiles ask for a share each, a few lines a group, so that all has come when the next elements are
        read, and no tile waits for many lines at once. turn: number of the tile. line: elements of a cache line. apart:
        how far behind `begin` the next ones start; None: directly behind. None where groups are too small.
        """
        lines = group // line
        if not lines or not turns:
            return None
        each = -(-lines // turns)  # lines that are asked for in a group
        shares = -(-lines // each)
        of_share = total // group * each * line
        share = T.min(turn, const(shares - 1)) * const(of_share)
        start = T.Bind(begin + const(total if apart is None else apart) + share)

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
        narrow = functions_for(set(dtypes).intersection(NARROW), self.isa, self.lanes)
        return T.attr(T.int32(0), "pragma_import_llvm", self._ir() + narrow)

    def _ir(self) -> str:
        return functions_of(self.isa, self.lanes)


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


def _int32(value: Expr | int) -> Expr:
    return T.int32(value) if isinstance(value, int) else T.Cast("int32", value)
