"""Fused attention, float32: softmax(scale · Q K' + mask) V without Q K' in memory.

Few queries are computed by rows (`attention_rows`), many by tiles (`attention_tiles`). Memory beyond the tensors
is a few blocks for each thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ...passes.base import Caches
from ..target import InstructionSet
from ..work import with_flops
from .attention_rows import FEW, RowEmitter
from .attention_spec import AttentionSpec, Columns, Mask
from .attention_tiles import Tensors, Tile, TileEmitter
from .two_pass_softmax import OPAQUE
from .vector_tiles import VectorTiles
from .vectors import Expr

SYMBOL = "attention"
MOST = 256  # keys of a block
# Multiply-adds below which a parallel launch costs more than the second thread saves.
PARALLEL = 1 << 21


def key_block(tile: Tile, lanes: int, caches: Caches) -> int:
    """Keys of a block, MOST at most: its scores take half of the innermost cache, or an eighth of the second one where
    that would be few keys, since the output is scaled again for every block."""
    key = 4 * tile.queries * lanes
    room = caches.l1 // 2 // key
    if room < MOST // 2:
        room = max(room, caches.l2 // 8 // key)
    return max(1, min(MOST, room) // tile.keys) * tile.keys


def attention(
    spec: AttentionSpec, isa: InstructionSet, caches: Caches, threads: int = 1, name: str | None = None
) -> tirx.PrimFunc:
    """A kernel (Q, K, V[, mask][, lengths], Y) -> None of the spec's shapes and layouts.

    threads: how many the kernel may count on; above one, enough work is offered to TVM's thread pool. name: of the
    exported symbol; None for a function that only its own module calls.
    """
    with IRBuilder() as builder, T.prim_func(is_private=name is None, s_tir=True):
        T.func_name(name or SYMBOL)
        T.func_attr({"tirx.noalias": True, "op_pattern": OPAQUE, "tirx.is_scheduled": True})
        tensors = attention_tensors(spec)
        vectors = VectorTiles(isa)
        # Relax looks for a root block in every function that it calls.
        with T.sblock("root"):
            # Nobody asks what the root block touches; left out, TVM looks through every loop for it.
            T.reads()
            T.writes()
            with vectors.prelude():
                _emit(vectors, tensors, caches, threads)
    return with_flops(builder.get(), spec.flops)


def _largest(spec: AttentionSpec) -> int:
    rows = (spec.batch or 0) * max(spec.queries or 0, spec.keys or 0)
    masked = rows * spec.heads * (spec.keys or 0) if spec.mask is not Mask.NO else 0
    pitches = [places.pitch for places in (spec.q, spec.k, spec.v) if isinstance(places, Columns)]
    return max(rows * max(spec.heads * max(spec.head_size, spec.value_size), *pitches, 0), masked)


def attention_tensors(spec: AttentionSpec) -> Tensors:
    """Parameters of the kernel as flat buffers."""
    # Offsets of a static attention fit 32 bits unless it has 2^31 elements somewhere.
    index = "int64" if spec.dynamic or _largest(spec) >= 1 << 31 else "int32"

    def size(known: int | None, name: str) -> tuple[int | Expr, Expr]:
        expression = tirx.Var(name, index) if known is None else tirx.const(known, index)
        return (expression if known is None else known), expression

    (batch, b), (queries, sq), (keys, sk) = (
        size(known, name) for known, name in ((spec.batch, "b"), (spec.queries, "sq"), (spec.keys, "sk"))
    )

    heads, shared = spec.heads, spec.kv_heads
    parameters = {
        "q": (spec.q.shape(b, heads, sq, spec.head_size), "float32"),
        "k": (spec.k.shape(b, shared, sk, spec.head_size), "float32"),
        "v": (spec.v.shape(b, shared, sk, spec.value_size), "float32"),
    }
    if spec.mask is not Mask.NO:
        has_b, has_h, has_q = spec.mask_axes
        shape = [b if has_b else 1, heads if has_h else 1, sq if has_q else 1, sk]
        parameters["mask"] = (shape, "float32" if spec.mask is Mask.ADDED else "bool")
    if spec.lengths:
        parameters["lengths"] = ([b], "int64")
    parameters["y"] = (spec.y.shape(b, heads, sq, spec.value_size), "float32")
    given = {}
    for parameter, (shape, dtype) in parameters.items():
        dims = [tirx.const(d, index) if isinstance(d, int) else d for d in shape]
        given[parameter] = T.match_buffer(T.arg(parameter, T.handle()), dims, dtype)
    flat = {}
    for parameter, buffer in given.items():
        length = reduce(lambda x, y: x * y, buffer.shape)
        flat[parameter] = T.decl_buffer((length,), parameters[parameter][1], data=buffer.data)
    q, k, v, mask, lengths, y = (flat.get(name) for name in ("q", "k", "v", "mask", "lengths", "y"))
    return Tensors(spec, q, k, v, y, mask, lengths, batch, queries, keys, index)


def _emit(vectors: VectorTiles, t: Tensors, caches: Caches, threads: int) -> None:
    """Rows or tiles, by the number of queries."""
    if 0 in (t.spec.batch, t.spec.queries):
        return
    rows = RowEmitter(vectors, t, caches.l1)
    if isinstance(t.queries, int):
        if t.queries <= FEW:
            rows.emit(threads)
        else:
            emit_tiles(vectors, t, caches, threads)
        return
    with T.If(t.queries <= t.const(FEW)):
        with T.Then():
            rows.emit(threads)
        with T.Else():
            emit_tiles(vectors, t, caches, threads)


def emit_tiles(
    vectors: VectorTiles, t: Tensors, caches: Caches, threads: int, kind: Callable[..., TileEmitter] = TileEmitter
) -> None:  # fmt: skip
    """Blocks of queries of all heads, over threads where there is enough work."""
    spec, tile = t.spec, Tile.of(vectors.isa)
    emitter = kind(vectors, t, tile, key_block(tile, vectors.lanes, caches))
    width = emitter.width
    blocks = -(-t.queries // width) if isinstance(t.queries, int) else T.Bind(
        # Never 0, by which TVM would see a division.
        T.max(T.floordiv(t.queries + (width - 1), t.const(width)), t.const(1))
    )  # fmt: skip

    def task(n: Expr) -> None:
        emitter.allocate()
        head = T.Bind(T.floordiv(n, blocks))
        b, h = (vectors.opaque(f(head, t.const(spec.heads))) for f in (T.floordiv, T.floormod))
        first = vectors.opaque(T.floormod(n, blocks) * width)
        rest = t.queries % width if isinstance(t.queries, int) else None
        if isinstance(t.queries, int) and t.queries < width:
            emitter.emit(b, h, first, -(-t.queries // vectors.lanes), t.queries)
            return
        if rest == 0:
            emitter.emit(b, h, first, tile.queries, width)
            return
        with T.If(first + width <= t.queries):
            with T.Then():
                emitter.emit(b, h, first, tile.queries, width)
            with T.Else():
                if rest is not None:
                    emitter.emit(b, h, first, -(-rest // vectors.lanes), rest)
                else:
                    emitter.emit(b, h, first, tile.queries, vectors.opaque(t.queries - first))

    total = t.batch * spec.heads * blocks
    total = t.const(total) if isinstance(total, int) else T.Bind(total)
    work = t.batch * spec.heads * t.queries * t.keys * (spec.head_size + spec.value_size)

    def loop(parallel: bool) -> None:
        with (T.parallel if parallel else T.serial)(total) as n:
            task(n)

    if threads == 1 or isinstance(work, int):
        loop(threads > 1 and work >= PARALLEL)
        return
    with T.If(work >= PARALLEL):
        with T.Then():
            loop(True)
        with T.Else():
            loop(False)
