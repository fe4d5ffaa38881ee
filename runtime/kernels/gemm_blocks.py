"""Products with weights of a few bits: codes in blocks along the depth, each with a scale of its own.

    Y[m, n] = finish(sum over blocks b of scale[b, n] · sum over k in b of A[m, k] · (code[k, n] - zero[b, n]))

`pack` lays the codes in panels as `gemm` lays numbers, but each 32-bit lane holds `32 / bits` codes of its column, of
steps of k behind each other. A few rows unpack them in registers: a shift, a mask and a conversion for a vector of
weights, which all rows share; a block's zero point is a first sum of -zero · sum of A. Many rows unpack a panel once
into numbers, which stay in the second cache while all rows go through them as in `gemm`.

Names: m, n, k rows, columns, depth; a, y flat buffers; word: one vector of codes, those of 32 / bits steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from ..target import InstructionSet
from .block_steps import each_vector, steps_of_block
from .dots import IntegerDot
from .gemm import PARALLEL, Finish, GemmEmitter
from .gemm_parts import Panel
from .gemm_spec import panels
from .vectors import Buffer, Expr, Vectors

CARRY = 32  # steps whose products of 4 bits and 8 bits 16 bits hold
AHEAD = 4096  # bytes of a panel that are asked for before they are read


@dataclass(frozen=True)
class BlockSpec:
    """Sizes of a product with weights in blocks. rows: None when known at run time. block: steps of k of one scale, a
    multiple of 32 / bits. bits: of a code: 2, 4 or 8. zeros: each block of a column has a zero point; without them it
    is the middle, 2^(bits - 1). scales: type that they are stored in. integer: blocks of A become bytes, which meet the
    codes in integers; for a few rows."""

    rows: int | None
    inner: int
    columns: int
    block: int
    bits: int = 4
    zeros: bool = False
    scales: str = "float32"
    integer: bool = False

    @property
    def blocks(self) -> int:
        return -(-self.inner // self.block)

    @property
    def words(self) -> int:
        """Of one column."""
        return -(-self.inner // self.per_word)

    @property
    def per_word(self) -> int:
        """Codes of a 32-bit lane."""
        return 32 // self.bits

    def shift(self, step: int) -> int:
        """Place of a step's code in its word: a mask of every byte leaves four steps behind each other."""
        return 8 * (step % 4) + self.bits * (step // 4)


@dataclass(frozen=True)
class Packed:
    """What `pack` makes. words: int32, panels of [words of the depth][columns]; scales, zeros: panels of
    [blocks][columns], zeros None or uint8."""

    words: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None


def pack(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, spec: BlockSpec, width: int) -> Packed:
    """codes: (K, N) of 0 .. 2^bits - 1. scales, zeros: (blocks, N). width: columns of a panel; lanes beyond N are 0."""
    words = pack_words(codes, spec, width)
    return Packed(words, _panels(scales, width), None if zeros is None else _panels(zeros.astype(np.uint8), width))


def pack_words(codes: np.ndarray, spec: BlockSpec, width: int) -> np.ndarray:
    """The codes alone. The depth is filled up to whole words with codes that meet no row."""
    inner, columns = codes.shape
    count, words = -(-columns // width), spec.words
    padded = np.zeros((words * spec.per_word, count * width), np.uint32)
    padded[:inner, :columns] = codes
    shifts = np.array([spec.shift(step) for step in range(spec.per_word)], np.uint32)[None, :, None]
    together = np.bitwise_or.reduce(padded.reshape(words, spec.per_word, -1) << shifts, axis=1).view(np.int32)
    return _panels(together, width)


def _panels(x: np.ndarray, width: int) -> np.ndarray:
    """Rows (n, N) as panels of [n][width], flat."""
    count = -(-x.shape[1] // width)
    wide = np.zeros((len(x), count * width), x.dtype)
    wide[:, : x.shape[1]] = x
    return np.ascontiguousarray(wide.reshape(len(x), count, width).transpose(1, 0, 2)).reshape(-1)


@dataclass(frozen=True)
class Weights:
    """Flat buffers of what `pack` made. part: of a scale that a step of the codes is."""

    spec: BlockSpec
    words: Buffer
    scales: Buffer
    zeros: Buffer | None
    part: float = 1.0

    def scale(self, v: Vectors, at: Expr) -> Expr:
        """A vector of scales as float32."""
        scale = T.Bind(T.Cast(v.dtype, self.scales[T.ramp(at, 1, v.lanes)]))
        return scale if self.part == 1 else T.Bind(scale * v.splat(self.part))

    def zero_points(self, v: Vectors, at: list[Expr]) -> list[Expr] | None:
        """Vectors of zero points as int32; None where all are the middle code."""
        if self.zeros is None:
            return None
        return [T.Bind(T.Cast(f"int32x{v.lanes}", self.zeros[T.ramp(a, 1, v.lanes)])) for a in at]

    def unpack(
        self, v: Vectors, panel: Expr, width: int, count: int, into: Buffer, index: str, add: bool = False
    ) -> None:
        """The numbers of `count` vectors of a panel that is `width` vectors wide: [K][count vectors]. add: to those
        that are there."""
        spec, lanes = self.spec, v.lanes

        def const(value: int) -> Expr:
            return tirx.const(value, index)

        first_word = T.Bind(panel * const(spec.words * width * lanes))
        first_scale = T.Bind(panel * const(spec.blocks * width * lanes))

        def block(b: Expr, steps: int) -> None:
            at = [T.Bind(first_scale + b * const(width * lanes) + const(j * lanes)) for j in range(count)]
            scales = [self.scale(v, a) for a in at]
            middle = T.Bind(T.broadcast(T.int32(1 << (spec.bits - 1)), lanes))
            zeros = self.zero_points(v, at) or [middle] * count

            def word(n: Expr, steps: int) -> None:
                row = T.Bind(first_word + (b * const(spec.block // spec.per_word) + n) * const(width * lanes))
                k = T.Bind(b * const(spec.block) + n * const(spec.per_word))
                codes = [T.Bind(self.words[T.ramp(row + const(j * lanes), 1, lanes)]) for j in range(count)]
                for step in range(steps):
                    for j in range(count):
                        number = T.Cast(v.dtype, _unpacked(spec, v, codes[j], step) - zeros[j]) * scales[j]
                        place = T.Bind((k + const(step)) * const(count * lanes) + const(j * lanes))
                        v.store(into, place, T.Bind(number + into[v.at(place)] if add else number))

            whole, rest = divmod(steps, spec.per_word)
            with T.serial(const(whole)) as n:
                word(n, spec.per_word)
            if rest:
                word(const(whole), rest)

        whole, rest = divmod(spec.inner, spec.block)
        with T.serial(const(whole)) as b:
            block(b, spec.block)
        if rest:
            block(const(whole), rest)


def integer_form(isa: InstructionSet) -> str:
    """How codes of at most 4 bits meet bytes of A: "quads" and "signed-quads" add four products into 32 bits, "pairs"
    two into 16 bits; "" where no such instruction is used."""
    if isa.dot_int8 == "pairs":
        return "pairs" if isa.vector_bits >= 256 else ""
    return isa.dot_int8


@dataclass
class FewRows:
    """Emits the product of a few rows, whose number is known, into the IR builder that is open.

    panel: vectors of a panel.
    """

    vectors: Vectors
    spec: BlockSpec
    panel: int
    a: Buffer
    weights: Weights
    finish: Finish
    threads: int
    index: str = "int64"

    def const(self, value: int) -> Expr:
        return tirx.const(value, self.index)

    def emit(self) -> None:
        spec, v, const = self.spec, self.vectors, self.const
        rows, width = spec.rows or 0, self.panel * v.lanes
        panels = -(-spec.columns // width)
        if not rows or not panels:
            return
        self.dot = _IntegerDot(self) if spec.integer else _FloatDot(self)
        for m in range(rows):
            with T.serial(const(spec.blocks)) as b:
                self.dot.prepare(m, b)
        whole, rest = divmod(spec.columns, width)
        parallel = self.threads > 1 and spec.columns * spec.inner * rows >= PARALLEL
        with (T.parallel if parallel else T.serial)(const(panels)) as panel:
            if not rest:
                self._panel(panel, width)
            elif not whole:
                self._panel(panel, rest)
            else:
                with T.If(panel < const(whole)):
                    with T.Then():
                        self._panel(panel, width)
                    with T.Else():
                        self._panel(panel, rest)

    def _panel(self, panel: Expr, columns: int) -> None:
        """All rows against a panel, of which so many columns exist."""
        v, const = self.vectors, self.const
        rows, lanes = self.spec.rows or 0, v.lanes
        count, width = -(-columns // lanes), self.panel * lanes
        totals = [[v.registers(1, 0.0) for _ in range(count)] for _ in range(rows)]
        self._sum(panel, totals)
        for j in range(count):
            column = T.Bind(panel * const(width) + const(j * lanes))
            there = columns - j * lanes
            for m in range(rows):
                self.finish(totals[m][j][v.at(0)], const(m), column, there if there < lanes else None)

    def _sum(self, panel: Expr, totals: list[list[Buffer]]) -> None:
        """Add all products of a panel to the vectors of each row."""
        self._add(self.weights, panel, totals)

    def _add(self, weights: Weights, panel: Expr, totals: list[list[Buffer]]) -> None:
        spec, v, const, dot = self.spec, self.vectors, self.const, self.dot
        rows, lanes = spec.rows or 0, v.lanes
        count, width = len(totals[0]), self.panel * lanes
        first_word = T.Bind(panel * const(spec.words * width))
        first_scale = T.Bind(panel * const(spec.blocks * width))

        def block(b: Expr, steps: int) -> None:
            """Block b, of which `steps` steps of k exist."""
            at = [T.Bind(first_scale + b * const(width) + const(j * lanes)) for j in range(count)]
            dot.begin(b, count, weights.zero_points(v, at))

            def word(n: Expr, steps: int) -> None:
                row = T.Bind(first_word + (b * const(spec.block // spec.per_word) + n) * const(width))
                v.prefetch(weights.words, row + const(AHEAD // 4))
                codes = [T.Bind(weights.words[T.ramp(row + const(j * lanes), 1, lanes)]) for j in range(count)]
                dot.add(T.Bind(b * const(spec.block) + n * const(spec.per_word)), codes, steps)

            whole, rest = divmod(steps, spec.per_word)
            each = dot.words
            with T.serial(const(whole // each)) as n:
                for u in range(each):
                    word(T.Bind(n * const(each) + const(u)), spec.per_word)
                dot.carry()
            for n in range(whole - whole % each, whole):
                word(const(n), spec.per_word)
            if rest:
                word(const(whole), rest)
            if rest or whole % each:
                dot.carry()
            for j in range(count):
                scale = weights.scale(v, at[j])
                for m in range(rows):
                    total = v.fma(scale, dot.value(b, m, j), totals[m][j][v.at(0)])
                    T.buffer_store(totals[m][j], total, [v.at(0)])

        whole, rest = divmod(spec.inner, spec.block)
        with T.serial(const(whole)) as b:
            block(b, spec.block)
        if rest:
            block(const(whole), rest)


class _FloatDot:
    """Codes become float32 and meet A as it is."""

    words = 1  # that are added before `carry`

    def __init__(self, rows: FewRows) -> None:
        self.rows, self.spec, self.vectors, self.a, self.const = rows, rows.spec, rows.vectors, rows.a, rows.const
        # -sum of each block of each row of A.
        self.corrections = T.alloc_buffer(((self.spec.rows or 0) * self.spec.blocks,), "float32", scope="global")

    def prepare(self, m: int, b: Expr) -> None:
        spec, v, const = self.spec, self.vectors, self.const
        total = v.registers(1, 0.0)

        def add(x: Expr) -> None:
            T.buffer_store(total, total[v.at(0)] + x, [v.at(0)])

        start, count = _block_of_row(self, m, b)
        each_vector(v, start, count, self.rows.index, lambda at, left: add(v.load(self.a, at, left)))
        T.buffer_store(self.corrections, v.total(total[v.at(0)]) * T.float32(-1), [const(m * spec.blocks) + b])

    def begin(self, b: Expr, count: int, zeros: list[Expr] | None) -> None:
        spec, v, const = self.spec, self.vectors, self.const
        self.sums = [[v.registers(1, 0.0) for _ in range(count)] for _ in range(spec.rows or 0)]
        for m, sums in enumerate(self.sums):
            correction = T.Bind(self.corrections[const(m * spec.blocks) + b])
            if zeros is None:
                correction = T.Bind(correction * T.float32(1 << (spec.bits - 1)))
            start = T.Bind(v.splat(correction))
            for j, into in enumerate(sums):
                T.buffer_store(into, start if zeros is None else start * T.Cast(v.dtype, zeros[j]), [v.at(0)])

    def add(self, k: Expr, codes: list[Expr], steps: int) -> None:
        spec, v, const = self.spec, self.vectors, self.const
        for step in range(steps):
            a = [T.Bind(v.splat(self.a[const(m * spec.inner) + k + const(step)])) for m in range(len(self.sums))]
            for j, word in enumerate(codes):
                code = T.Bind(T.Cast(v.dtype, _unpacked(spec, v, word, step)))
                for m, sums in enumerate(self.sums):
                    T.buffer_store(sums[j], v.fma(a[m], code, sums[j][v.at(0)]), [v.at(0)])

    def carry(self) -> None:
        pass

    def value(self, b: Expr, m: int, j: int) -> Expr:
        return self.sums[m][j][self.vectors.at(0)]


class _IntegerDot:
    """A becomes signed bytes, block by block, before the products: x = scale · q, scale = max |x| / 127. Products of
    codes and bytes are exact: of four steps at once in 32 bits where there is such an instruction, else as sums of two
    in 16 bits, which hold those of CARRY steps."""

    def __init__(self, rows: FewRows) -> None:
        self.rows, self.spec, self.vectors, self.a, self.const = rows, rows.spec, rows.vectors, rows.a, rows.const
        spec, count = self.spec, self.spec.rows or 0
        self.lanes = self.vectors.lanes
        # What adds four products at once, where there is such an instruction.
        self.quads = IntegerDot(self.vectors, "uint8") if integer_form(self.vectors.isa) != "pairs" else None
        self.words = 1 if self.quads else CARRY // spec.per_word
        self.wide = spec.blocks * spec.block  # bytes of a row
        # Whole vectors are written, the last one beyond the row.
        self.bytes = T.alloc_buffer((count * self.wide + self.lanes,), "int8", scope="global")
        self.factors = T.alloc_buffer((count * spec.blocks,), "float32", scope="global")
        self.corrections = T.alloc_buffer((count * spec.blocks,), "int32", scope="global")

    def prepare(self, m: int, b: Expr) -> None:
        spec, v, const = self.spec, self.vectors, self.const
        start, count = _block_of_row(self, m, b)
        target = T.Bind(const(m * self.wide) + b * const(spec.block))
        total = v.registers(1, 0.0)

        def give(at: Expr, numbers: Expr, left: Expr | None) -> None:
            place = T.ramp(T.Bind(target + (at - start)), 1, self.lanes)
            T.buffer_store(self.bytes, T.Cast(f"int8x{self.lanes}", numbers), [place])
            T.buffer_store(total, total[v.at(0)] + T.Cast(v.dtype, numbers), [v.at(0)])

        factor = steps_of_block(v, self.a, start, count, self.rows.index, give)
        T.buffer_store(self.factors, factor, [const(m * spec.blocks) + b])
        correction = T.Cast("int32", v.total(total[v.at(0)])) * -1
        T.buffer_store(self.corrections, correction, [const(m * spec.blocks) + b])

    def _registers(self, count: int, bits: int) -> list[list[Buffer]]:
        size = self.lanes * 32 // bits
        return [
            [T.alloc_buffer((size,), f"int{bits}", scope="global") for _ in range(count)]
            for _ in range(self.spec.rows or 0)
        ]

    def begin(self, b: Expr, count: int, zeros: list[Expr] | None) -> None:
        spec, const, lanes = self.spec, self.const, self.lanes
        self.sums = self._registers(count, 32)
        self.halves = [] if self.quads else self._registers(count, 16)
        for m, sums in enumerate(self.sums):
            correction = self.corrections[const(m * spec.blocks) + b]
            if zeros is None:
                correction = correction * (1 << (spec.bits - 1))
            start = T.Bind(T.broadcast(correction, lanes))
            for j, into in enumerate(sums):
                T.buffer_store(into, start if zeros is None else start * zeros[j], [T.ramp(0, 1, lanes)])
        self._clear()

    def _clear(self) -> None:
        for halves in self.halves:
            for half in halves:
                T.buffer_store(half, T.broadcast(T.int16(0), 2 * self.lanes), [T.ramp(0, 1, 2 * self.lanes)])

    def add(self, k: Expr, codes: list[Expr], steps: int) -> None:
        spec, const, lanes = self.spec, self.const, self.lanes
        mask = ((1 << spec.bits) - 1) * 0x01010101
        all16, all32 = T.ramp(0, 1, 2 * lanes), T.ramp(0, 1, lanes)
        for quad in range(-(-steps // 4)):
            a = []
            for m in range(len(self.sums)):
                four = self.bytes[T.ramp(const(m * self.wide) + k + const(4 * quad), 1, 4)]
                same = T.broadcast(T.reinterpret(four, dtype="int32"), lanes)
                a.append(T.Bind(T.reinterpret(same, dtype=f"int8x{4 * lanes}")))
            for j, word in enumerate(codes):
                x = word
                if quad:
                    x = T.shift_right(x, T.broadcast(T.int32(quad * spec.bits), lanes))
                x = T.bitwise_and(x, T.broadcast(T.int32(mask), lanes))
                x = T.Bind(T.reinterpret(x, dtype=f"int8x{4 * lanes}"))
                for m, sums in enumerate(self.sums):
                    if self.quads:
                        T.buffer_store(sums[j], self.quads.add(sums[j][all32], x, a[m]), [all32])
                    else:
                        half = self.halves[m][j]
                        T.buffer_store(half, half[all16] + _pairs(self.vectors, x, a[m]), [all16])

    def carry(self) -> None:
        lanes = self.lanes
        all16, all32 = T.ramp(0, 1, 2 * lanes), T.ramp(0, 1, lanes)
        for m, halves in enumerate(self.halves):
            for j, half in enumerate(halves):
                total = self.sums[m][j][all32] + _widened_pairs(self.vectors, half[all16])
                T.buffer_store(self.sums[m][j], total, [all32])
        self._clear()

    def value(self, b: Expr, m: int, j: int) -> Expr:
        v = self.vectors
        number = T.Cast(v.dtype, self.sums[m][j][T.ramp(0, 1, self.lanes)])
        return T.Bind(number * v.splat(self.factors[self.const(m * self.spec.blocks) + b]))


class ManyRows(GemmEmitter):
    """A product whose panels of B are unpacked into numbers, one after the other, before all rows go through them.

    b: of `weights.spec.inner` times the columns of a panel; the emitter sets it.
    """

    def __init__(self, weights: Weights, *fields: Any) -> None:
        super().__init__(*fields)
        self.weights = weights

    def emit(self) -> None:
        spec, v, const = self.weights.spec, self.vectors, self.const
        cuts = panels(spec.columns, self.tile, v.lanes)
        if not cuts or self.rows == 0:
            return
        chunks, per_chunk = self._chunks()
        with (T.parallel if self._parallel() else T.serial)(const(len(cuts))) as number:
            self.b = T.alloc_buffer((spec.inner * self.tile.vectors * v.lanes,), "float32", scope="global")

            def body(panel: Panel) -> None:
                self.unpack(panel)
                with T.serial(const(chunks)) as chunk:
                    self._panel(panel, chunk, chunks, per_chunk, const(0))

            self._any_panel(cuts, number, body)

    def unpack(self, panel: Panel) -> None:
        """Put the numbers of a panel into b."""
        self.weights.unpack(self.vectors, panel.number, self.tile.vectors, panel.vectors, self.b, self.index)

    def panel_start(self, column: Expr) -> Expr:
        return self.const(0)

    def _tile(self, height: int, panel: Panel, row: Expr, item: Expr, part: Any = None, turn: Any = None) -> None:
        """Nothing is asked for ahead: the panel is in a cache."""
        super()._tile(height, panel, row, item)


def _pairs(v: Vectors, codes: Expr, a: Expr) -> Expr:
    """Products of bytes without a sign and bytes with one, added in pairs of neighbours: int16, exact for 4 bits."""
    name = {8: "llvm.x86.avx2.pmadd.ub.sw", 16: "llvm.x86.avx512.pmaddubs.w.512"}[v.lanes]
    call = T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), codes, a, dtype=f"int16x{2 * v.lanes}")
    return T.Bind(call)


def _widened_pairs(v: Vectors, halves: Expr) -> Expr:
    """Neighbours of int16 added to int32."""
    name = {8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}[v.lanes]
    ones = T.broadcast(T.int16(1), 2 * v.lanes)
    call = T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), halves, ones, dtype=f"int32x{v.lanes}")
    return T.Bind(call)


def _unpacked(spec: BlockSpec, v: Vectors, word: Expr, step: int) -> Expr:
    """The codes of one step of k, as int32."""
    x = word
    if spec.shift(step):
        x = T.shift_right(x, T.broadcast(T.int32(spec.shift(step)), v.lanes))
    return T.bitwise_and(x, T.broadcast(T.int32((1 << spec.bits) - 1), v.lanes))


def _block_of_row(dot: _FloatDot | _IntegerDot, m: int, b: Expr) -> tuple[Expr, Expr]:
    """Offset in A of block b of row m, and how many elements it has."""
    spec, const = dot.spec, dot.const
    start = T.Bind(const(m * spec.inner) + b * const(spec.block))
    return start, T.Bind(T.min(const(spec.block), const(spec.inner) - b * const(spec.block)))
