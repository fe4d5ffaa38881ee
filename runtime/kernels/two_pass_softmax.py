"""Softmax over the last axis of a tensor: the two-pass form on (m, n) pairs and a three-pass form, in float32.

Two-pass: a number is kept as (m, n) = m·2^n, so a sum of exponentials never overflows and needs no maximum.
    pass 1 reads X and adds up pairs, pass 2 reads X again and writes Y. 2 reads and 1 write per element.
Three-pass: maximum, exponentials into Y and their sum, Y times 1/sum. Blocks of a few KiB take the first two
    passes while they are in the innermost cache, each against its own maximum; the third aligns them. Where the
    result of many long rows does not stay in the caches, the exponentials wait in scratch memory of one row, which
    does, and the third pass writes Y past the caches: 1 read and 1 write of memory per element.
Rows of up to `REGISTER_VECTORS` vectors stay in registers from load to store.

float16 and bfloat16 are widened as they are read and rounded as they are written. Y then is too narrow for
exponentials: in the three-pass form those of a row wait in scratch memory, so it is chosen for short rows only.

A row's blocks are independent and merge at the end, so one long row is split over threads as well as many
rows are. Source: Dukhan and Ablavatski, "The Two-Pass Softmax Algorithm", arXiv 2001.04438.

Names: x, y the flat tensors; row its number; `length` elements of a row; `start` a flat offset.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from tvm import relax, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ...passes.base import Caches
from ...passes.ops.two_pass_softmax import NARROW_ROW, TWO_PASS_SOFTMAX, Form, choose_form, longest_in_cache
from ..lowering import lowers
from ..target import InstructionSet, Target
from .narrow_floats import NARROW
from .rows import Size
from .softmax_columns import softmax_columns
from .softmax_passes import REGISTER_VECTORS, Factor, Mask, SoftmaxEmitter, Source, merged
from .vectors import Expr, Vectors

SYMBOL = "two_pass_softmax"
OPAQUE = 8  # Relax's operator pattern of a function that nothing is fused into
# Elements below which a parallel launch (1 to 9 us) costs more than the second thread saves; a row that is split over
# threads takes two launches and moves between their caches.
PARALLEL, SPLIT = 1 << 17, 1 << 19
# Elements of a three-pass block: input and output together are half of a 32 KiB cache.
RELOAD_BLOCK = 1 << 11
# The three-pass form writes rows past the caches that, with their result, are more than this share of the last-level
# cache: they gain a tenth by it, shorter ones nothing.
STREAM_SHARE = 8
COMPUTED = ("float32", *NARROW)
PLAIN = Source()
Types = tuple[str, str]  # of X and of Y, each one of COMPUTED
FLOAT32: Types = ("float32", "float32")

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
    stream: bool | Expr  # whether the two-pass form writes past the caches
    stream_rows: bool | Expr  # whether the three-pass form does

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
            start = row * self.length
            self.emitter.at_row(row, start)
            body(start)

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
            few = _all(few or uneven, self.length >= SPLIT)
        else:
            few = few if long else _all(few, self.length >= SPLIT)

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

    def three_pass(self, start: Expr, kind: str, stream: bool) -> None:
        e, blocks = self.emitter, _blocks(self.length, RELOAD_BLOCK, self.emitter.index)
        tops = T.alloc_buffer((blocks,), "float32", scope="global")
        sums = T.alloc_buffer((blocks,), "float32", scope="global")
        size = e.const(self.length) if isinstance(self.length, int) else self.length
        scratch = (T.alloc_buffer((size,), "float32", scope="global"), start) if stream or e.narrow else None
        with self.loop(kind, blocks) as b:
            first, count = start + b * RELOAD_BLOCK, self.count(RELOAD_BLOCK, b)
            top = e.maximum(first, count)
            T.buffer_store(tops, top, [b])
            T.buffer_store(sums, e.exponentials(first, count, top, scratch, RELOAD_BLOCK), [b])
        factor = e.merge_tops(tops, sums, blocks)
        self.output(
            kind,
            RELOAD_BLOCK,
            lambda b, count: e.scale(start + b * RELOAD_BLOCK, count, T.Bind(sums[b] * factor), scratch, stream),
            stream,
        )

    def output(self, kind: str, block: int, body: Callable[[Expr, int | Expr], None], stream: bool) -> None:
        """The pass that writes a row, block by block; what was streamed is then seen by all threads."""
        with self.loop(kind, _blocks(self.length, block, self.emitter.index)) as b:
            body(b, self.count(block, b))
            if stream and kind == "parallel":
                self.emitter.vectors.fence()
        if stream and kind == "serial":
            self.emitter.vectors.fence()

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
            self.output(
                kind,
                block,
                lambda b, count: e.pair_output(start + b * block, count, m_sum, n_sum, stream),
                stream,
            )

        # Rows with a NaN, and those whose greatest n is not exact, are left to three plain passes.
        limit = e.vectors.farthest * 1.4
        usual = _all(m_sum > T.float32(0), m_sum < T.float32(3e38), n_sum < T.float32(limit), n_sum > T.float32(-limit))
        _when(usual, output, lambda: (e.recompute_row if e.narrow else e.reload_row)(start, self.length))

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

            self.by_work_or_blocks(row, long=form is Form.AUTO and limit >= SPLIT)

        def blocks(start: Expr, kind: str) -> None:
            _when(
                self.stream_rows,
                lambda: self.three_pass(start, kind, True),
                lambda: self.three_pass(start, kind, False),
            )

        def short(start: Expr) -> None:
            size = self.emitter.const(length if isinstance(length, int) else RELOAD_BLOCK)
            room = T.alloc_buffer((size,), "float32", scope="global") if self.emitter.narrow else None
            self.emitter.reload_row(start, length, (room, start) if room is not None else None)

        def three_pass() -> None:
            _when(
                True if form is Form.AUTO and limit <= RELOAD_BLOCK else length <= RELOAD_BLOCK,
                lambda: self.by_work(short),
                lambda: self.by_work_or_blocks(blocks),
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
    source: Source = PLAIN,
    types: Types = FLOAT32,
) -> tirx.PrimFunc:
    """A kernel (X, Y) -> None: Y = softmax of X over the last axis, both of `shape`, row-major.

    shape: None for a dimension that is known at run time. threads: how many the kernel may count on; above one, enough
    work is offered to TVM's thread pool. form: AUTO chooses by row length and cache sizes, at run time where the length
    is dynamic. name: of the exported symbol; None for a function that only its own module calls. source: scales X or
    puts a factor and a mask on it, which are arguments behind X. types: of X and Y.
    """
    narrow = types[1] in NARROW
    x_size, y_size = (2 if dtype in NARROW else 4 for dtype in types)
    limit = NARROW_ROW if narrow else longest_in_cache(caches)

    def emit(emitter: SoftmaxEmitter, rows: int | Expr, length: int | Expr) -> None:
        known = choose_form(length, caches, narrow)[0] if form is Form.AUTO and isinstance(length, int) else form
        large = _all(isa.streaming, rows * length * y_size > caches.last_level)
        # A dynamic row too long for the three-pass form has nearly that size.
        stream = isa.streaming if form is Form.AUTO and not isinstance(length, int) and not narrow else large
        stream_rows = _all(large, length * (x_size + y_size) * STREAM_SHARE > caches.last_level)
        _Driver(emitter, rows, length, threads, stream, stream_rows).emit(known, limit)

    return rowwise(shape, isa, emit, name, source, types)


def rowwise(
    shape: Sequence[int | None],
    isa: InstructionSet,
    emit: Callable[[SoftmaxEmitter, int | Expr, int | Expr], None],
    name: str | None = None,
    source: Source = PLAIN,
    types: Types = FLOAT32,
) -> tirx.PrimFunc:
    """A kernel (X, Y) -> None over tensors of one shape, whose body `emit(emitter, rows, length)` writes.

    A factor of run time and a mask come between them, in this order.
    """
    if not shape:
        raise ValueError("softmax needs at least one axis, got a scalar")
    size = math.prod(d for d in shape if d is not None)
    index = "int32" if None not in shape and size < 1 << 30 else "int64"
    with IRBuilder() as builder, T.prim_func(is_private=name is None, s_tir=True):
        T.func_name(name or SYMBOL)
        T.func_attr({"tirx.noalias": True, "op_pattern": OPAQUE, "tirx.is_scheduled": True})
        dims = [tirx.Var(f"d{i}", index) if d is None else tirx.const(d, index) for i, d in enumerate(shape)]
        x = T.match_buffer(T.arg("x", T.handle()), dims, types[0])
        more: dict[str, Any] = {}
        for what, dtype, axes in (("factor", source.factor, source.factor_axes), ("mask", source.mask, source.axes)):
            if dtype is not None:
                own = [d if has else tirx.const(1, index) for d, has in zip(dims, axes, strict=True)]
                more[what] = T.match_buffer(T.arg(what, T.handle()), own, dtype)
        y = T.match_buffer(T.arg("y", T.handle()), dims, types[1])
        rows = _product(shape[:-1], dims[:-1])
        length = dims[-1] if shape[-1] is None else shape[-1]
        flat = reduce(operator.mul, dims)
        x = T.decl_buffer((flat,), types[0], data=x.data)
        y = T.decl_buffer((flat,), types[1], data=y.data)
        for what, buffer in more.items():
            more[what] = T.decl_buffer((reduce(operator.mul, buffer.shape),), buffer.dtype, data=buffer.data)
        vectors = Vectors(isa)
        # Relax looks for a root block in every function that it calls.
        with T.sblock("root"), vectors.prelude(*types, *(str(buffer.dtype) for buffer in more.values())):
            sizes = [d if s is None else s for s, d in zip(shape, dims, strict=True)]
            mask = Mask(more["mask"], merged(source.axes, sizes), length) if source.mask else None
            factor = Factor(more["factor"], merged(source.factor_axes, sizes)) if source.factor else None
            emit(SoftmaxEmitter(vectors, x, y, index, source.scale, mask, factor), rows, length)
    return builder.get()


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
    """Softmax of an axis."""
    form = Form(attrs.get("form", Form.AUTO.value))
    return along_axis(bb, inputs[0], int(attrs.get("axis", -1)), target, form)


def along_axis(
    bb: relax.BlockBuilder, x: Any, axis: int, target: Target, form: Form = Form.AUTO, result: str | None = None
) -> Any:
    """Softmax of an axis through a kernel. result: the element type of Y, by default that of X.

    Another element type or an unknown rank falls back to Relax's softmax.
    """
    dtype, rank = str(x.ty.dtype.dtype), int(x.ty.ndim)
    shape = x.ty.shape
    if rank < 1 or dtype not in COMPUTED or not isinstance(shape, relax.ShapeExpr):
        return relax.op.nn.softmax(x, axis=axis)
    types = (dtype, result or dtype)
    dims, axis = list(shape.values), axis % rank
    sizes = [int(d) if isinstance(d, tirx.IntImm) else None for d in dims]
    isa, caches, cores = target.isa, target.caches, target.cores
    if all(d == 1 for d in sizes[axis + 1 :]):  # rows
        dims = dims[: axis + 1]
        kernel = softmax(sizes[: axis + 1], isa, caches, cores, form, types=types)
    else:
        names: list[Size] = [f"d{i}" if d is None else d for i, d in enumerate(sizes)]
        outer, length, inner = names[:axis], names[axis], names[axis + 1 :]
        kernel = softmax_columns(outer, length, inner, isa, caches, cores, form, types=types)
    x = x if len(dims) == rank else bb.emit(relax.op.reshape(x, dims))
    y = relax.call_tir(bb.add_func(kernel, SYMBOL), [x], relax.TensorType(dims, types[1]))
    return y if len(dims) == rank else relax.op.reshape(bb.emit(y), shape)
