"""One step of a product: a vector of sums takes up elements of the depth, for float32 and for narrower numbers.

    float32        sums[lane] += x · w[lane]
    8-bit numbers  sums[lane] += x[0] · w[lane][0] + ... + x[group - 1] · w[lane][group - 1], exactly, in int32
    bfloat16       the same with two numbers, in float32

Loops of products and convolutions count in steps. A step's elements of x are one element of a flat buffer: a float32,
or an int32 that holds `group` numbers as the instruction wants them. Weights of a group are [step][lane][group], and
stay int8 or bfloat16 in memory. 8-bit numbers of x may be shifted by a constant (`shift`), which the sums must be
corrected for: they start at `first_sums`.

AVX2's product of bytes adds neighbours in int16, which general weights exceed. Where the weights themselves say that
int16 holds them (`joined_steps`), even over two steps, x stays in bytes and a step takes up half or a quarter as many
instructions as by pairs of int16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from ..target import InstructionSet
from .vectors import Buffer, Expr, Vectors

# Bytes below which a buffer of scope "global" stays on the stack, where LLVM turns it into registers.
REGISTER_BUFFER = 1024
INTEGERS = ("uint8", "int8")
BITS = "uint16"  # what numbers of bfloat16 are kept as in compiled code
# Products of 8-bit numbers of which an int32 can hold two sums, whatever they are: those of x, and of its shift.
LONGEST = (1 << 30) // (255 * 128) - 1
INT16 = (1 << 15) - 1
_QUAD_SUMS = {8: "llvm.x86.avx512.vpdpbusd.256", 16: "llvm.x86.avx512.vpdpbusd.512"}


class Dot:
    """float32: a step is one fused multiply-add."""

    sums = "float32"
    dtype = "float32"  # of the weights
    itemsize = 4  # bytes of a weight
    group = 1
    spare = 0  # vectors that a step needs beside sums, weights and x

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors

    @property
    def width(self) -> int:
        """Weights of a step of one vector of sums."""
        return self.vectors.lanes * self.group

    @property
    def line(self) -> int:
        """Weights of a cache line."""
        return 64 // self.itemsize

    def steps(self, depth: int) -> int:
        """Steps of so many elements of the depth; the last may have some that are not there."""
        return -(-depth // self.group)

    def zeros(self) -> Expr:
        return self.vectors.splat(0.0)

    def weights(self, buffer: Buffer, offset: Expr) -> Expr:
        """Those of one step of a vector of sums."""
        return T.Bind(buffer[self.vectors.at(offset)])

    def same(self, buffer: Buffer, offset: Expr) -> Expr:
        """An element of x for all lanes."""
        return T.Bind(self.vectors.splat(buffer[offset]))

    def each(self, buffer: Buffer, offset: Expr) -> Expr:
        """An element of x for each lane."""
        return T.Bind(buffer[self.vectors.at(offset)])

    def add(self, sums: Expr, x: Expr, weights: Expr) -> Expr:
        return self.vectors.fma(x, weights, sums)


class StoredDot(Dot):
    """float32 by weights that are stored in 16 bits, of type `stored`."""

    itemsize = 2

    def __init__(self, vectors: Vectors, stored: str) -> None:
        super().__init__(vectors)
        self.dtype = stored

    def weights(self, buffer: Buffer, offset: Expr) -> Expr:
        return T.Bind(self.vectors.widened(buffer, offset, self.dtype))


@dataclass(frozen=True)
class Form:
    """How elements of x lie in a step. group: how many. element: type of each, in which it is exact."""

    group: int
    element: str

    @property
    def bits(self) -> int:
        return 32 // self.group


FORMS = {
    "pairs": Form(2, "int16"), "quads": Form(4, "uint8"), "signed-quads": Form(4, "int8"), "bytes": Form(4, "uint8"),
    "": Form(1, "int32"),
}  # fmt: skip
ROUNDED = Form(2, BITS)


class SteppedDot(Dot):
    """Takes x from a copy that holds steps of `form.group` numbers as int32. data: type of the elements of x, which are
    moved by `shift` so that the form's type holds them."""

    def __init__(self, vectors: Vectors, data: str, form: Form, shift: int = 0) -> None:
        super().__init__(vectors)
        self.data, self.form, self.shift, self.group = data, form, shift, form.group

    def packed(self, x: Buffer, offset: Expr, steps: int) -> Expr:
        """`steps` steps from the elements of x that lie behind each other from `offset` on, as a vector of int32."""
        count = steps * self.group
        value = x[T.ramp(offset, 1, count)] if count > 1 else x[offset]
        suffix = f"x{count}" if count > 1 else ""
        if self.shift:
            # The only shifts are by 128, up or down: the highest bit changes.
            flipped = T.reinterpret(value, dtype=f"uint8{suffix}") if self.data == "int8" else value
            high = tirx.const(128, "uint8")
            value = T.bitwise_xor(flipped, T.broadcast(high, count) if count > 1 else high)
        elif self.form.element != self.data and self.form.bits > 8:
            value = T.Cast(f"{self.form.element}{suffix}", value)
        if self.group == 1:
            return value
        return T.reinterpret(value, dtype=f"int32x{steps}" if steps > 1 else "int32")

    def gathered(
        self, x: Buffer, offsets: Sequence[Expr | None], count: int, there: Sequence[Expr] | None = None,
        zero: Expr = None,
    ) -> Expr:  # fmt: skip
        """`count` steps of which the elements of each number lie behind each other from an offset on; None: any.

        there: for each of them -1, or 0 where all are `zero` instead, which is shifted already.
        """
        suffix = f"x{count}" if count > 1 else ""

        def splat(value: Expr | int) -> Expr:
            value = T.int32(value) if isinstance(value, int) else value
            return T.broadcast(value, count) if count > 1 else value

        result = None
        signed = not self.form.element.startswith("uint") and (self.data == "int8" or self.shift)
        for number, offset in enumerate(offsets):
            if offset is None:
                continue
            value = T.Cast(f"int32{suffix}", x[T.ramp(offset, 1, count)] if count > 1 else x[offset])
            if self.shift:
                value = value + splat(self.shift)
            if there is not None:
                value = T.bitwise_and(value - splat(zero), splat(there[number])) + splat(zero)
            if signed and number + 1 < self.group:
                value = T.bitwise_and(value, splat((1 << self.form.bits) - 1))
            if number:
                value = T.shift_left(value, splat(self.form.bits * number))
            result = value if result is None else T.bitwise_or(result, value)
        return splat(0) if result is None else T.Bind(result)

    def constant(self, value: int) -> int:
        """A step whose elements are all a number of x, as int32."""
        array = np.full(self.group, value + self.shift).astype(self.form.element)
        return int(array.view(np.int32)[0])


class RoundedDot(SteppedDot):
    """bfloat16, of which x has the bits (BITS): a step is one `vdpbf16ps`, two products that are added to a float32.
    Numbers below the normal ones count as 0."""

    dtype = "bfloat16"
    itemsize = 2

    def __init__(self, vectors: Vectors) -> None:
        super().__init__(vectors, BITS, ROUNDED)

    def weights(self, buffer: Buffer, offset: Expr) -> Expr:
        return T.Bind(buffer[T.ramp(offset, 1, self.width)])

    def same(self, buffer: Buffer, offset: Expr) -> Expr:
        return T.Bind(T.broadcast(buffer[offset], self.vectors.lanes))

    def add(self, sums: Expr, x: Expr, weights: Expr) -> Expr:
        return self.vectors.add_rounded(sums, x, weights)


class IntegerDot(SteppedDot):
    """8-bit numbers. data: type of x, uint8 or int8. joined: steps whose products int16 holds together, by the weights
    (`joined_steps`)."""

    sums = "int32"
    dtype = "int8"
    itemsize = 1

    def __init__(self, vectors: Vectors, data: str, joined: int = 0) -> None:
        self.joined, self.kind = max(1, joined), "bytes" if joined else vectors.isa.dot_int8
        moved = {("quads", "int8"): 128, ("bytes", "int8"): 128, ("signed-quads", "uint8"): -128}
        super().__init__(vectors, data, FORMS[self.kind], moved.get((self.kind, data), 0))
        self.spare = {"pairs": 1, "": 1, "bytes": 2}.get(self.kind, 0)

    def zeros(self) -> Expr:
        return T.broadcast(T.int32(0), self.vectors.lanes)

    def weights(self, buffer: Buffer, offset: Expr) -> Expr:
        vector = buffer[T.ramp(offset, 1, self.width)]
        wide = {"pairs": "int16", "": "int32"}.get(self.kind)
        return T.Bind(T.Cast(f"{wide}x{self.width}", vector) if wide else vector)

    def same(self, buffer: Buffer, offset: Expr) -> Expr:
        return T.Bind(self._elements(T.broadcast(buffer[offset], self.vectors.lanes)))

    def each(self, buffer: Buffer, offset: Expr) -> Expr:
        return T.Bind(self._elements(buffer[self.vectors.at(offset)]))

    def _elements(self, steps: Expr) -> Expr:
        """int32 vector -> vector of the elements in it. LLVM's vpdpbusd has operands of int8, whatever they hold."""
        element = {"pairs": "int16", "": "int32"}.get(self.kind, "int8")
        return steps if element == "int32" else T.reinterpret(steps, dtype=f"{element}x{self.width}")

    def add(self, sums: Expr, x: Expr, weights: Expr) -> Expr:
        lanes, dtype = self.vectors.lanes, f"int32x{self.vectors.lanes}"
        if self.kind == "pairs":
            return self.vectors.add_pairs(sums, x, weights)
        if self.kind == "quads":
            return T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(_QUAD_SUMS[lanes]), sums, x, weights, dtype=dtype
            )
        assert self.kind != "bytes", "its rows of sums take up steps as one (`Accumulators.add_bytes`)"
        if self.kind == "signed-quads":
            number = T.llvm_lookup_intrinsic_id("llvm.aarch64.neon.sdot.v4i32.v16i8")
            return T.call_llvm_pure_intrin(number, sums, x, weights, dtype=dtype)
        return sums + x * weights


class ExactDot(Dot):
    """8-bit numbers in float32: a step is one multiply-add, exact for up to 514 products, whose sum is at most 2^24.

    Elements of x are widened where they are; pairs would have to be gathered.
    """

    dtype = "int8"
    itemsize = 1

    def weights(self, buffer: Buffer, offset: Expr) -> Expr:
        return self._widened(buffer, offset)

    def each(self, buffer: Buffer, offset: Expr) -> Expr:
        return self._widened(buffer, offset)

    def _widened(self, buffer: Buffer, offset: Expr) -> Expr:
        return T.Bind(T.Cast(self.vectors.dtype, buffer[self.vectors.at(offset)]))

    def whole(self, sums: Expr) -> Expr:
        """The sums as int32."""
        return T.Cast(f"int32x{self.vectors.lanes}", sums)


def dot_of(vectors: Vectors, data: str, stored: str = "float32", joined: int = 0) -> Dot:
    """What takes x of type `data`, BITS for those of bfloat16, and weights of float32 that are stored as `stored`."""
    if data in INTEGERS:
        return IntegerDot(vectors, data, joined)
    if data == BITS:
        return RoundedDot(vectors)
    return Dot(vectors) if stored == "float32" else StoredDot(vectors, stored)


def grouped(weights: np.ndarray, depth: int, group: int) -> np.ndarray:
    """Weights with axis `depth` in groups, which become the last axis; zeros where the last group is not full."""
    moved = np.moveaxis(weights, depth, -1)
    missing = -moved.shape[-1] % group
    moved = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, missing)])
    parts = moved.reshape(*moved.shape[:-1], moved.shape[-1] // group, group)
    return np.moveaxis(parts, -2, depth)


def joined_steps(weights: np.ndarray, depth: int, isa: InstructionSet) -> int:
    """How many neighbouring steps of bytes int16 holds the products of, two at most, whatever bytes x has.

    0: not those of one, or the instruction set does not multiply bytes so. weights: int8; axis `depth` is the one that
    steps go along, from a multiple of two steps on.
    """
    if isa.dot_int8 != "pairs" or isa.vector_bits < 256:
        return 0
    group = FORMS["bytes"].group
    moved = np.moveaxis(weights, depth, -1).astype(np.int16)
    padded = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, -moved.shape[-1] % (2 * group))])
    # Two lanes of int16 a step, of two neighbours each: [..., step, lane, neighbour].
    parts = padded.reshape(*padded.shape[:-1], -1, 2, group // 2, 2)

    def most(axes: tuple[int, ...]) -> int:
        """Of the sums of positive and of negative weights that one lane may take up."""
        return max(int(np.maximum(side, 0).sum(axis=axes).max(initial=0)) for side in (parts, -parts))

    if most((-1,)) * 255 > INT16:
        return 0
    return 2 if most((-3, -1)) * 255 <= INT16 else 1


def first_sums(
    sums: np.ndarray, bias: np.ndarray, data: str, zero: int, isa: InstructionSet, lanes: int, joined: int = 0
) -> np.ndarray:
    """What sums of (x - zero) · w + bias start at, one for each output channel, in whole vectors, int32.

    sums: of the weights of each channel. bias: of each channel.
    """
    shift = IntegerDot(Vectors(isa), data, joined).shift
    values = bias.astype(np.int64) - (zero + shift) * sums.astype(np.int64)
    # Sums wrap around; only the last one must be a number of int32.
    wrapped = values.astype(np.uint64).astype(np.uint32).view(np.int32)
    return np.pad(wrapped, (0, -len(wrapped) % lanes))


class Accumulators:
    """rows x columns vectors of sums in registers."""

    def __init__(self, dot: Dot, rows: int, columns: int) -> None:
        self.dot, self.vectors, self.columns = dot, dot.vectors, columns
        self.each = min(rows * columns, (REGISTER_BUFFER - 1) // (4 * self.vectors.lanes))
        count = rows * columns
        sizes = [min(self.each, count - first) for first in range(0, count, self.each)]
        self.buffers = [T.alloc_buffer((size * self.vectors.lanes,), dot.sums, scope="global") for size in sizes]

    def _place(self, row: int, column: int) -> tuple[Buffer, Expr]:
        buffer, slot = divmod(row * self.columns + column, self.each)
        return self.buffers[buffer], self.vectors.at(slot * self.vectors.lanes)

    def get(self, row: int, column: int) -> Expr:
        buffer, at = self._place(row, column)
        return buffer[at]

    def set(self, row: int, column: int, value: Expr) -> None:
        buffer, at = self._place(row, column)
        T.buffer_store(buffer, value, [at])

    def add(self, row: int, column: int, x: Expr, weights: Expr) -> None:
        """Take up one step."""
        self.set(row, column, self.dot.add(self.get(row, column), x, weights))

    def add_bytes(
        self, row: int, x: Buffer, x_at: Expr, w: Buffer, w_at: Expr, apart: int, steps: int, columns: range
    ) -> None:
        """Take up `steps` <= `dot.joined` neighbouring steps in some columns of a row.

        w_at: where the weights of these columns lie; those of their next step are `apart` behind.
        """
        places = [self._place(row, column) for column in columns]
        pointers = [T.address_of(buffer[at.base]) for buffer, at in places]
        self.vectors.add_bytes(pointers, x, x_at, w, w_at, apart, steps)
