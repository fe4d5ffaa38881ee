"""Softmax over the last axis of a float32 tensor: the two-pass form on (m, n) pairs and a three-pass form.

Two-pass: a number is kept as (m, n) = m·2^n, so a sum of exponentials never overflows and needs no maximum.
    pass 1 reads X and adds up pairs, pass 2 reads X again and writes Y. 2 reads and 1 write per element.
Three-pass: maximum, exponentials into Y and their sum, Y times 1/sum. Blocks of a few KiB take the first two
    passes while they are in the innermost cache, each against its own maximum; the third aligns them.
Rows of up to `REGISTER_VECTORS` vectors stay in registers from load to store.

A row's blocks are independent and merge at the end, so one long row is split over threads as well as many
rows are. Source: Dukhan and Ablavatski, "The Two-Pass Softmax Algorithm", arXiv 2001.04438.

Names: x, y the flat tensors; row its number; `length` elements of a row; `start` a flat offset.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from tvm import relax, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ...passes.base import Caches
from ...passes.ops.two_pass_softmax import TWO_PASS_SOFTMAX, Form, choose_form, longest_in_cache
from ..lowering import lowers
from ..target import InstructionSet, Target
from .vectors import LOWEST, NEGATIVE_INFINITY, POLYNOMIAL, Buffer, Expr, Vectors

SYMBOL = "two_pass_softmax"
OPAQUE = 8  # Relax's operator pattern of a function that nothing is fused into
REGISTER_VECTORS = 16
# Elements below which a parallel launch (1 to 9 us) costs more than the second thread saves.
PARALLEL = 1 << 17
# Elements of a three-pass block: input and output together are half of a 32 KiB cache.
RELOAD_BLOCK = 1 << 11
# What a float32 lane of the two-pass form adds up before its block ends: a sum of 2^26 elements in 64 lanes is
# off by 8e-4, one in blocks of this size by 2e-7.
LANE_TERMS = 1 << 8
# Where n is still exact: below FLOOR an element counts as FLOOR, and a row whose greatest n is outside
# (-LIMIT, LIMIT) is left to the three-pass form, as are rows with a NaN.
FLOOR, LIMIT = -2.9e6, 4.0e6
COMPUTED = ("float32", "float16", "bfloat16")
EMPTY = -16777216.0  # the n of an empty sum

Emit = Callable[[], None]


def _when(condition: Expr | bool, then: Emit, otherwise: Emit | None = None) -> None:
    """`if` of the kernel, or of its construction where the condition is known."""
    if isinstance(condition, bool):
        if condition:
            then()
        elif otherwise:
            otherwise()
        return
    with T.If(condition):
        with T.Then():
            then()
        if otherwise:
            with T.Else():
                otherwise()


def _all(*conditions: Expr | bool) -> Expr | bool:
    open_ones = [c for c in conditions if not isinstance(c, bool)]
    if not all(c for c in conditions if isinstance(c, bool)):
        return False
    return reduce(tirx.all, open_ones) if open_ones else True


@dataclass
class SoftmaxEmitter:
    """Emits softmax over the rows of flat float32 buffers into the IR builder that is open."""

    vectors: Vectors
    x: Buffer
    y: Buffer
    index: str = "int64"  # type of offsets

    def sweep(
        self, count: int | Expr, group: int, body: Callable[[list[Expr], Expr | None], None], start: Expr = 0
    ) -> None:
        """`body(offsets, part)` over `count` elements from `start`: `group` vectors at a time, then single ones,
        then the `part` elements that remain. Few enough vectors are written out without a loop."""
        lanes = self.vectors.lanes
        step = group * lanes

        def offsets(first: Expr, vectors: int) -> list[Expr]:
            return [first + j * lanes for j in range(vectors)]

        if isinstance(count, int):
            groups, rest = divmod(count, step)
            if groups * group <= REGISTER_VECTORS:
                for i in range(groups):
                    body(offsets(start + i * step, group), None)
            else:
                with T.serial(self.const(groups)) as i:
                    body(offsets(start + i * step, group), None)
            done = groups * step
            if rest // lanes:
                body(offsets(start + done, rest // lanes), None)
            if rest % lanes:
                body([start + (count - rest % lanes)], self.const(rest % lanes))
            return
        count = T.Bind(count)
        groups = T.Bind(T.shift_right(count, self.const(step.bit_length() - 1)))
        with T.serial(groups) as i:
            body(offsets(start + i * step, group), None)
        done = T.Bind(groups * step)
        singles = T.Bind(T.shift_right(count - done, self.const(lanes.bit_length() - 1)))
        with T.serial(singles) as i:
            body([start + done + i * lanes], None)
        part = T.Bind(T.bitwise_and(count, self.const(lanes - 1)))
        with T.If(part > self.const(0)), T.Then():
            body([start + (count - part)], part)

    def const(self, value: int) -> Expr:
        return tirx.const(value, self.index)

    # -- one row that fits in registers -----------------------------------------------------------------------

    def register_row(self, start: Expr, length: int) -> None:
        """A row of at most REGISTER_VECTORS vectors, read once and written once."""
        v = self.vectors
        parts = [(j, None) for j in range(length // v.lanes)]
        if length % v.lanes:
            parts.append((length // v.lanes, self.const(length % v.lanes)))
        rows = [v.load(self.x, start + j * v.lanes, part, NEGATIVE_INFINITY) for j, part in parts]
        # Not below the smallest float: -inf minus -inf would make a NaN of a lane that only fills up.
        top = v.greatest(_tree(T.max, [*rows]))
        exps = [v.exp(row - v.splat(top)) for row in rows]
        factor = T.Bind(T.float32(1) / v.total(_tree(lambda a, b: a + b, exps)))
        for (j, part), e in zip(parts, exps, strict=True):
            v.store(self.y, start + j * v.lanes, e * v.splat(factor), part)

    # -- three-pass -------------------------------------------------------------------------------------------

    def maximum(self, start: Expr, count: int | Expr) -> Expr:
        """The greatest of `count` elements, LOWEST if all are -inf."""
        v = self.vectors
        group = 8
        best = v.registers(group, LOWEST)

        def body(offsets: list[Expr], part: Expr | None) -> None:
            for j, offset in enumerate(offsets):
                here = v.at(j * v.lanes)
                T.buffer_store(best, T.max(best[here], v.load(self.x, offset, part, LOWEST)), [here])

        self.sweep(count, group, body, start)
        return v.greatest(_tree(T.max, [best[v.at(j * v.lanes)] for j in range(group)]))

    def exponentials(self, start: Expr, count: int | Expr, top: Expr) -> Expr:
        """Y = exp(X - top) over `count` elements; returns their sum."""
        v = self.vectors
        group = 4
        sums = v.registers(group, 0.0)

        def body(offsets: list[Expr], part: Expr | None) -> None:
            xs = [v.load(self.x, offset, part, NEGATIVE_INFINITY) for offset in offsets]
            for j, (offset, x) in enumerate(zip(offsets, xs, strict=True)):
                here = v.at(j * v.lanes)
                e = v.exp(x - v.splat(top))
                v.store(self.y, offset, e, part)
                T.buffer_store(sums, sums[here] + e, [here])

        self.sweep(count, group, body, start)
        return v.total(_tree(lambda a, b: a + b, [sums[v.at(j * v.lanes)] for j in range(group)]))

    def scale(self, start: Expr, count: int | Expr, factor: Expr) -> None:
        """Y *= factor over `count` elements."""
        v = self.vectors

        def body(offsets: list[Expr], part: Expr | None) -> None:
            for offset in offsets:
                v.store(self.y, offset, v.load(self.y, offset, part) * v.splat(factor), part)

        self.sweep(count, 8, body, start)

    def reload_row(self, start: Expr, length: int | Expr) -> None:
        """A row in three passes over all of it."""
        top = self.maximum(start, length)
        total = self.exponentials(start, length, top)
        self.scale(start, length, T.Bind(T.float32(1) / total))

    def merge_tops(self, tops: Buffer, sums: Buffer, blocks: int | Expr) -> Expr:
        """Turn the blocks' sums, each against its own maximum, into factors onto a common one.

        Returns 1 / the sum over the row; `sums[b]` is then exp(top of b - top of the row).
        """
        inner = SoftmaxEmitter(self.vectors, tops, sums, self.index)
        v = self.vectors
        top = inner.maximum(self.const(0), blocks)
        total = v.registers(1, 0.0)

        def body(offsets: list[Expr], part: Expr | None) -> None:
            for offset in offsets:
                factor = v.exp(v.load(tops, offset, part, LOWEST) - v.splat(top))
                here = v.at(0)
                T.buffer_store(total, v.fma(v.load(sums, offset, part), factor, total[here]), [here])
                v.store(sums, offset, factor, part)

        inner.sweep(blocks, 1, body, self.const(0))
        return T.Bind(T.float32(1) / v.total(total[v.at(0)]))

    # -- two-pass ---------------------------------------------------------------------------------------------

    @property
    def pair_sums(self) -> int:
        """Accumulators of the two-pass form."""
        return 4 if self.vectors.wide else 2

    @property
    def pair_block(self) -> int:
        """Elements of a two-pass block."""
        return LANE_TERMS * self.pair_sums * self.vectors.lanes

    def pairs(self, offsets: Sequence[Expr], part: Expr | None, coefficients: Sequence[Expr] | None) -> list[Any]:
        """(m, n) of each vector of X: e^x = m·2^n, times whatever the coefficients were multiplied by."""
        v = self.vectors
        result = []
        for offset in offsets:
            # The constant first: a NaN passes.
            x = T.Bind(T.max(v.splat(FLOOR), v.load(self.x, offset, part, NEGATIVE_INFINITY)))
            n, t = v.split(x)
            result.append((T.Bind(v.polynomial(t, coefficients)), n))
        return result

    def pair_sum(self, start: Expr, count: int | Expr) -> tuple[Expr, Expr]:
        """(m, n) of the sum of e^x over `count` elements."""
        v = self.vectors
        sums, share = self.pair_sums, 2  # two vectors share an accumulator and so its rescaling
        ms, ns = v.registers(sums, 0.0), v.registers(sums, EMPTY)

        def body(offsets: list[Expr], part: Expr | None) -> None:
            terms = self.pairs(offsets, part, None)
            for w in range(0, len(terms), share):
                here = v.at(w // share * v.lanes)
                greatest = ns[here]
                for _, n in terms[w : w + share]:
                    # A NaN in n loses here; it stays in m.
                    greatest = T.max(n, greatest)
                greatest = T.Bind(greatest)
                total = v.times_power(ms[here], ns[here] - greatest)
                for m, n in terms[w : w + share]:
                    total = total + v.times_power(m, n - greatest)
                T.buffer_store(ms, total, [here])
                T.buffer_store(ns, greatest, [here])

        self.sweep(count, sums * share, body, start)
        each = [v.at(w * v.lanes) for w in range(sums)]
        n_sum = v.greatest(_tree(T.max, [ns[at] for at in each]))
        aligned = [v.times_power(ms[at], ns[at] - v.splat(n_sum)) for at in each]
        return v.total(_tree(lambda a, b: a + b, aligned)), n_sum

    def merge_pairs(self, ms: Buffer, ns: Buffer, blocks: int | Expr) -> tuple[Expr, Expr]:
        """(m, n) of the sum of the blocks' pairs: exponents are aligned, which is exact, and mantissas added."""
        v = self.vectors
        n_sum = SoftmaxEmitter(v, ns, ns, self.index).maximum(self.const(0), blocks)
        total = v.registers(1, 0.0)

        def body(offsets: list[Expr], part: Expr | None) -> None:
            for offset in offsets:
                m, n = v.load(ms, offset, part), v.load(ns, offset, part, EMPTY)
                here = v.at(0)
                T.buffer_store(total, total[here] + v.times_power(m, n - v.splat(n_sum)), [here])

        self.sweep(blocks, 1, body, self.const(0))
        return v.total(total[v.at(0)]), n_sum

    def pair_output(self, start: Expr, count: int | Expr, m_sum: Expr, n_sum: Expr, stream: bool) -> None:
        """Y = m/m_sum · 2^(n - n_sum) over `count` elements. 1/m_sum goes into the polynomial's coefficients.

        stream: whole vectors of Y bypass the caches; the elements in front of the first aligned address do not.
        """
        v = self.vectors
        factor = T.Bind(T.float32(1) / m_sum)
        coefficients = [T.Bind(v.splat(T.Bind(factor * T.float32(c)))) for c in POLYNOMIAL]

        def body(offsets: list[Expr], part: Expr | None) -> None:
            for offset, (m, n) in zip(offsets, self.pairs(offsets, part, coefficients), strict=True):
                v.store(self.y, offset, v.times_power(m, n - v.splat(n_sum)), part, stream)

        if stream:
            count = tirx.const(count, self.index) if isinstance(count, int) else count
            head = T.Bind(T.min(T.Cast(self.index, v.to_aligned(self.y, start)), count))
            with T.If(head > self.const(0)), T.Then():
                body([start], head)
            start, count = T.Bind(start + head), count - head
        self.sweep(count, 8 if v.wide else 4, body, start)
        if stream:
            v.fence()


def _tree(combine: Callable[[Expr, Expr], Expr], values: list[Expr]) -> Expr:
    """`values` combined pairwise, so that the chain of dependent operations is short."""
    while len(values) > 1:
        pairs = [T.Bind(combine(a, b)) for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + ([values[-1]] if len(values) % 2 else [])
    return values[0]


def _blocks(length: int | Expr, block: int, index: str) -> int | Expr:
    if isinstance(length, int):
        return -(-length // block)
    shift = tirx.const(block.bit_length() - 1, index)
    return T.Bind(T.shift_right(length + tirx.const(block - 1, index), shift))


@dataclass
class _Driver:
    """Which rows and blocks go where: serial, rows over threads, or the blocks of one row over threads."""

    emitter: SoftmaxEmitter
    rows: int | Expr
    length: int | Expr
    threads: int
    stream: bool | Expr

    def loop(self, kind: str, extent: int | Expr) -> Any:
        extent = self.emitter.const(extent) if isinstance(extent, int) else extent
        return (T.parallel if kind == "parallel" else T.serial)(extent)

    def count(self, block: int, b: Expr) -> int | Expr:
        """Elements of block `b`."""
        if isinstance(self.length, int) and self.length % block == 0:
            return block
        return T.Bind(T.min(self.emitter.const(block), self.length - b * block))

    def each_row(self, body: Callable[[Expr], None], kind: str) -> None:
        with self.loop(kind, self.rows) as row:
            body(row * self.length)

    def by_work(self, body: Callable[[Expr], None]) -> None:
        """Rows over threads where there is enough to do."""
        _when(
            _all(self.threads > 1, self.rows > 1, self.rows * self.length >= PARALLEL),
            lambda: self.each_row(body, "parallel"),
            lambda: self.each_row(body, "serial"),
        )

    def by_work_or_blocks(self, body: Callable[[Expr, str], None], long: bool = False) -> None:
        """Like `by_work`; the blocks of each row are split instead where rows do not fill the threads.

        long: every row is known to be worth a parallel launch.
        """
        few: bool | Expr = self.rows < self.threads
        if isinstance(self.rows, int):
            uneven = self.rows % self.threads != 0 and self.rows < 4 * self.threads
            few = _all(few or uneven, self.length >= PARALLEL)
        else:
            few = few if long else _all(few, self.length >= PARALLEL)

        def serial() -> None:
            self.each_row(lambda start: body(start, "serial"), "serial")

        if self.threads == 1:
            serial()
            return
        _when(
            few,
            lambda: self.each_row(lambda start: body(start, "parallel"), "serial"),
            lambda: _when(
                long or self.rows * self.length >= PARALLEL,
                lambda: self.each_row(lambda start: body(start, "serial"), "parallel"),
                serial,
            ),
        )

    def three_pass(self, start: Expr, kind: str) -> None:
        e, blocks = self.emitter, _blocks(self.length, RELOAD_BLOCK, self.emitter.index)
        tops = T.alloc_buffer((blocks,), "float32", scope="global")
        sums = T.alloc_buffer((blocks,), "float32", scope="global")
        with self.loop(kind, blocks) as b:
            first, count = start + b * RELOAD_BLOCK, self.count(RELOAD_BLOCK, b)
            top = e.maximum(first, count)
            T.buffer_store(tops, top, [b])
            T.buffer_store(sums, e.exponentials(first, count, top), [b])
        factor = e.merge_tops(tops, sums, blocks)
        with self.loop(kind, blocks) as b:
            first, count = start + b * RELOAD_BLOCK, self.count(RELOAD_BLOCK, b)
            e.scale(first, count, T.Bind(sums[b] * factor))

    def two_pass(self, start: Expr, kind: str, stream: bool) -> None:
        e, block = self.emitter, self.emitter.pair_block
        blocks = _blocks(self.length, block, e.index)
        ms = T.alloc_buffer((blocks,), "float32", scope="global")
        ns = T.alloc_buffer((blocks,), "float32", scope="global")
        with self.loop(kind, blocks) as b:
            m, n = e.pair_sum(start + b * block, self.count(block, b))
            T.buffer_store(ms, m, [b])
            T.buffer_store(ns, n, [b])
        m_sum, n_sum = e.merge_pairs(ms, ns, blocks)

        def output() -> None:
            with self.loop(kind, blocks) as b:
                e.pair_output(start + b * block, self.count(block, b), m_sum, n_sum, stream)

        usual = _all(m_sum > T.float32(0), m_sum < T.float32(3e38), n_sum < T.float32(LIMIT), n_sum > T.float32(-LIMIT))
        _when(usual, output, lambda: e.reload_row(start, self.length))

    def emit(self, form: Form, limit: int) -> None:
        """The whole kernel. `limit`: longest row for the three-pass form when the length is known only at run
        time."""
        length, v = self.length, self.emitter.vectors
        if isinstance(length, int) and length <= REGISTER_VECTORS * v.lanes and form is not Form.TWO_PASS:
            if length and self.rows != 0:
                self.by_work(lambda start: self.emitter.register_row(start, length))
            return

        def two_pass() -> None:
            def row(start: Expr, kind: str) -> None:
                _when(
                    self.stream,
                    lambda: self.two_pass(start, kind, True),
                    lambda: self.two_pass(start, kind, False),
                )

            self.by_work_or_blocks(row, long=form is Form.AUTO and limit >= PARALLEL)

        def three_pass() -> None:
            _when(
                length <= RELOAD_BLOCK,
                lambda: self.by_work(lambda start: self.emitter.reload_row(start, length)),
                lambda: self.by_work_or_blocks(self.three_pass),
            )

        if form is Form.AUTO:
            _when(length <= limit, three_pass, two_pass)
        elif form is Form.THREE_PASS:
            three_pass()
        else:
            two_pass()


def softmax(
    shape: Sequence[int | None],
    isa: InstructionSet,
    caches: Caches,
    threads: int = 1,
    form: Form = Form.AUTO,
    name: str | None = None,
) -> tirx.PrimFunc:
    """A kernel (X, Y) -> None: Y = softmax of X over the last axis, both float32 of `shape`, row-major.

    shape: None for a dimension that is known at run time. threads: how many the kernel may count on; more work
    than one thread's share is offered to TVM's thread pool only if it is above one. form: AUTO chooses by row
    length and cache sizes, at run time where the length is dynamic. name: of the exported symbol; None for a
    function that only its own module calls.
    """
    if not shape:
        raise ValueError("softmax needs at least one axis, got a scalar")
    static = all(isinstance(d, int) for d in shape)
    size = 1
    for d in shape:
        size *= d if isinstance(d, int) else 1
    index = "int32" if static and size < 1 << 30 else "int64"
    vectors = Vectors(isa)
    with IRBuilder() as builder, T.prim_func(is_private=name is None, s_tir=True):
        T.func_name(name or SYMBOL)
        T.func_attr({"tirx.noalias": True, "op_pattern": OPAQUE, "tirx.is_scheduled": True})
        dims = [
            tirx.const(d, index) if isinstance(d, int) else tirx.Var(f"d{i}", index) for i, d in enumerate(shape)
        ]
        x = T.match_buffer(T.arg("x", T.handle()), dims, "float32")
        y = T.match_buffer(T.arg("y", T.handle()), dims, "float32")
        rows = _product(shape[:-1], dims[:-1])
        length = shape[-1] if isinstance(shape[-1], int) else dims[-1]
        flat = reduce(lambda a, b: a * b, dims)
        x = T.decl_buffer((flat,), "float32", data=x.data)
        y = T.decl_buffer((flat,), "float32", data=y.data)
        # Relax looks for a root block in every function that it calls.
        with T.sblock("root"), vectors.prelude():
            stream = _streams(rows, length, form, isa, caches)
            driver = _Driver(SoftmaxEmitter(vectors, x, y, index), rows, length, threads, stream)
            known = form
            if form is Form.AUTO and isinstance(length, int):
                known, _ = choose_form(length, caches)
            driver.emit(known, longest_in_cache(caches))
    return builder.get()


def _streams(
    rows: int | Expr, length: int | Expr, form: Form, isa: InstructionSet, caches: Caches
) -> bool | Expr:
    """Whether the two-pass form writes past the caches: where the result would not be found in them anyway."""
    if not isa.streaming:
        return False
    if form is Form.AUTO and not isinstance(length, int):
        return True  # a row too long for the other form nearly is that
    return rows * length * 4 > caches.last_level


def _product(shape: Sequence[int | None], dims: Sequence[Expr]) -> int | Expr:
    known, expression = 1, None
    for d, e in zip(shape, dims, strict=True):
        if isinstance(d, int):
            known *= d
        else:
            expression = e if expression is None else expression * e
    return known if expression is None else T.Bind(expression * known)


@lowers(TWO_PASS_SOFTMAX.identifier, kinds=("llvm",))
def lower(bb: relax.BlockBuilder, inputs: list[Any], attrs: dict[str, Any], target: Target) -> Any:
    """Softmax of the last axis through the kernel; float16 and bfloat16 are computed in float32.

    Another element type, another axis or an unknown rank falls back to Relax's softmax.
    """
    x = inputs[0]
    axis, dtype, rank = int(attrs.get("axis", -1)), str(x.ty.dtype.dtype), int(x.ty.ndim)
    shape = x.ty.shape
    if axis not in (-1, rank - 1) or rank < 1 or dtype not in COMPUTED or not isinstance(shape, relax.ShapeExpr):
        return relax.op.nn.softmax(x, axis=axis)
    dims = [int(d) if isinstance(d, tirx.IntImm) else None for d in shape.values]
    form = Form(attrs.get("form", Form.AUTO.value))
    kernel = bb.add_func(softmax(dims, target.isa, target.caches, target.cores, form), SYMBOL)
    wide = x if dtype == "float32" else bb.emit(relax.op.astype(x, "float32"))
    y = relax.call_tir(kernel, [wide], relax.TensorType(shape, "float32"))
    return y if dtype == "float32" else relax.op.astype(bb.emit(y), dtype)
