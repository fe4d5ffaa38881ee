"""Attention for many queries: blocks of queries against blocks of keys, each product an outer-product tile.

Scores are computed transposed, queries along the lanes. So keys and values are read where they are, one element
for all lanes, and the greatest score and the sum of a query need no reduction across lanes; only a block of queries is
transposed, once. For a block of W queries and one of `keys` keys after the other:

    S[j, i] = sum over d of K[j, d] · Q'[d, i]          a tile: `Tile.keys` x W, over all d in registers
    m'[i] = max(m[i], S[.., i]),  a[i] = exp(m[i] - m'[i]),  S = exp(S - m'),  l[i] = l[i] · a[i] + sum S[.., i]
    O[i, e] = O[i, e] · a[i] + sum over j of S[j, i] · V[j, e]      a tile: rows x vectors, over the block's keys

and in the end Y = O / l. Scratch, for each thread: Q', S, O of a block.

Source of the running maximum: Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867;
of the blocks: Dao et al., "FlashAttention", arXiv 2205.14135.

Names: b batch, h head, i query, j key, d element of a key, e element of a value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ..target import InstructionSet
from .attention_spec import AttentionSpec, Causal, Mask
from .vector_tiles import VectorTiles
from .vectors import LOWEST, NEGATIVE_INFINITY, Buffer, Expr

WRITTEN_OUT = 16  # vectors up to which each has code of its own; more are taken in a loop, whatever the head's size


@dataclass(frozen=True)
class Tile:
    """Register tiles. queries: vectors of queries in a block; keys: of a tile of scores; rows: queries of a tile of
    the output for each number of vectors of values in it."""

    queries: int
    keys: int
    rows: dict[int, int]

    @classmethod
    def of(cls, isa: InstructionSet) -> Tile:
        if isa.registers >= 32 and isa.vector_bits >= 512:
            return cls(3, 8, {1: 16, 2: 12, 3: 8, 4: 6})
        if isa.vector_bits >= 256:
            return cls(3, 4, {1: 8, 2: 6})
        if isa.registers >= 32 and isa.vector_bits >= 128:
            return cls(4, 6, {1: 16, 2: 8})
        if isa.vector_bits >= 128:
            return cls(2, 4, {1: 8, 2: 4})
        return cls(1, 4, {1: 4})


@dataclass
class Tensors:
    """Flat buffers and sizes of one attention, in a kernel that is being built."""

    spec: AttentionSpec
    q: Buffer
    k: Buffer
    v: Buffer
    y: Buffer
    mask: Buffer | None
    lengths: Buffer | None
    batch: int | Expr
    queries: int | Expr
    keys: int | Expr
    index: str

    def const(self, value: int) -> Expr:
        return tirx.const(value, self.index)

    def step(self, name: str, axis: str) -> int | Expr:
        """Elements of tensor q, k, v or y from one index of an axis to the next."""
        s = self.spec
        heads = s.heads if name in "qy" else s.kv_heads
        length = self.queries if name in "qy" else self.keys
        size = s.head_size if name in "qk" else s.value_size
        return getattr(s, name).strides(heads, length, size)[axis]

    def at(self, name: str, b: Expr, h: Expr, s: Expr | int = 0) -> Expr:
        """Offset of element 0 of a head and position."""
        first = getattr(self.spec, name).first
        return b * self.step(name, "b") + h * self.step(name, "h") + s * self.step(name, "s") + first

    def there(self, b: Expr) -> int | Expr:
        """Keys that batch b has. What a run says is cut down to what a tensor holds."""
        if self.lengths is None:
            return self.keys
        most = self.const(self.keys) if isinstance(self.keys, int) else self.keys
        # Compared as it is: of a number that is far too large the narrow type would keep the low bits.
        given = T.max(T.min(self.lengths[b], T.Cast("int64", most)), T.int64(0))
        return T.Bind(T.Cast(self.index, given))

    def offset(self, there: int | Expr) -> int | Expr:
        """Query i sees keys j <= i + offset, of `there` keys."""
        return there - self.queries if self.spec.causal is Causal.END else 0

    def mask_at(self, b: Expr, h: Expr, i: Expr) -> Expr:
        """Offset of key 0 in the mask of a query."""
        has_b, has_h, has_q = self.spec.mask_axes
        rows: Any = self.queries if has_q else 1
        offset = self.const(0)
        for has, at, step in ((has_q, i, 1), (has_h, h, rows), (has_b, b, rows * (self.spec.heads if has_h else 1))):
            if has:
                offset = offset + at * step * self.keys
        return offset


@dataclass
class TileEmitter:
    """Emits the work of one block of queries into the IR builder that is open."""

    vectors: VectorTiles
    tensors: Tensors
    tile: Tile
    block: int  # keys of a block, a multiple of the tile's

    def __post_init__(self) -> None:
        v, spec = self.vectors, self.tensors.spec
        self.width = self.tile.queries * v.lanes
        self.value_vectors = -(-spec.value_size // v.lanes)
        self.head_vectors = -(-spec.head_size // v.lanes)
        most = max(self.tile.rows)
        groups = -(-self.value_vectors // most)
        size, larger = divmod(self.value_vectors, groups)
        # How many groups of how many vectors lie behind each other. The last may have a vector that is not full.
        self.groups = [(larger, size + 1), (groups - larger - 1, size), (1, size)]

    def allocate(self) -> None:
        """Scratch of one thread, where the work of a task begins."""
        lanes = self.vectors.lanes
        spare = max(self.tile.rows.values())
        stride = self.value_vectors * lanes
        # A mask is transposed into the block of scores, a whole square at a time.
        rows = self.block + lanes
        self.queries = self._scratch(self.head_vectors * lanes * self.width)
        self.scores = self._scratch(rows * self.width + spare)
        self.result = self._scratch((self.width + spare) * stride)
        self.top, self.sums, self.scale = (self._scratch(self.width + spare) for _ in range(3))

    def _scratch(self, size: int) -> Buffer:
        buffer = T.alloc_buffer((size,), "float32", scope="global")
        # TVM cuts a buffer down to the elements that it sees used; those behind a pointer it does not see.
        T.buffer_store(buffer, T.float32(0), [self._expr(size - 1)])
        return buffer

    # -- a block of queries ----------------------------------------------------------------------------------

    def emit(self, b: Expr, h: Expr, first: Expr, vectors: int, rows: int | Expr) -> None:
        """Queries first .. first + rows of head h, in `vectors` vectors; rows: 1 to vectors · lanes."""
        t, v, spec = self.tensors, self.vectors, self.tensors.spec
        kv = h if spec.group == 1 else T.Bind(T.floordiv(h, t.const(spec.group)))
        self.used, self.rows, self.first = vectors, rows, first
        self.stride = vectors * v.lanes
        self.mask_base = v.opaque(t.mask_at(b, h, first)) if spec.mask is not Mask.NO else None
        self.k_base = v.opaque(t.at("k", b, kv))
        self.v_base = v.opaque(t.at("v", b, kv))
        stop = there = t.there(b)
        self.offset = v.opaque(first + t.offset(there)) if spec.causal is not Causal.NO else None
        self._take_queries(v.opaque(t.at("q", b, h, first)))
        if self.offset is not None:
            # Keys that some query of the block sees, in whole tiles; none where the offset is negative.
            seen = self.offset + rows
            tiles = T.floordiv(seen + (self.tile.keys - 1), t.const(self.tile.keys))
            stop = v.opaque(T.max(t.const(0), T.min(tiles * self.tile.keys, self._expr(there))))
        self._each_block(stop)
        self._give_result(v.opaque(t.at("y", b, h, first)))

    def _expr(self, value: int | Expr) -> Expr:
        return self.tensors.const(value) if isinstance(value, int) else value

    def _take_queries(self, start: Expr) -> None:
        """Q' = scale · Q transposed; O = 0, l = 0, m the lowest float."""
        v, t, lanes = self.vectors, self.tensors, self.vectors.lanes
        size = t.spec.head_size

        def take(w: Expr, c: Expr) -> None:
            rows, row = self._vector(w)
            offset = start + row * t.step("q", "s") + c * lanes
            target = c * (lanes * self.stride) + w * lanes
            columns = lanes if size % lanes == 0 else T.min(t.const(lanes), size - c * lanes)
            v.transpose(t.q, offset, t.step("q", "s"), rows, columns, self.queries, target, self.stride, t.spec.scale)

        # One place in the code: a transpose is a hundred instructions.
        with T.serial(t.const(self.used)) as w, T.serial(t.const(self.head_vectors)) as c:
            take(w, c)
        for w in range(self.used):
            here = v.at(self._expr(w * lanes))
            T.buffer_store(self.top, v.splat(LOWEST), [here])
            T.buffer_store(self.sums, v.splat(0.0), [here])
        with T.serial(t.const(self.stride * self.value_vectors)) as n:
            T.buffer_store(self.result, v.splat(0.0), [v.at(n * lanes)])

    def _vector(self, w: Expr) -> tuple[Expr, Expr]:
        """Of the block's vector w: how many queries there are, at least 1, and the first one that is."""
        left = self.vectors.opaque(self.rows - w * self.vectors.lanes)
        if isinstance(self.rows, int):  # as many vectors as hold queries
            return left, w * self.vectors.lanes
        return T.max(left, self.tensors.const(1)), T.Select(left > 0, w * self.vectors.lanes, self.tensors.const(0))

    # -- a block of keys -------------------------------------------------------------------------------------

    def _each_block(self, stop: int | Expr) -> None:
        """All keys below `stop`."""
        t, v = self.tensors, self.vectors
        if isinstance(stop, int):
            blocks, rest = divmod(stop, self.block)
            if blocks == 1 and not rest:
                self._block(t.const(0), self.block)
                return
            if blocks:
                with T.serial(t.const(blocks)) as n:
                    self._block(n * self.block, self.block)
            if rest:
                self._block(t.const(blocks * self.block), rest)
            return
        with T.serial(v.opaque(T.floordiv(stop + (self.block - 1), t.const(self.block)))) as n:
            first = T.Bind(n * self.block)
            self._block(first, v.opaque(T.min(t.const(self.block), stop - first)))

    def _block(self, key: Expr, count: int | Expr) -> None:
        """Keys key .. key + count."""
        t, v, mk = self.tensors, self.vectors, self.tile.keys
        if t.spec.mask is not Mask.NO and t.spec.mask_axes[2]:
            self._transpose_mask(key, count)
        best = [v.registers(1, LOWEST) for _ in range(self.used)]
        whole, rest = (
            (count // mk, count % mk)
            if isinstance(count, int)
            else (T.floordiv(count, t.const(mk)), T.floormod(count, t.const(mk)))
        )
        if not isinstance(whole, int):
            whole, rest = v.opaque(whole), v.opaque(rest)
        with T.serial(self._expr(whole)) as n:
            self._scores(key, n * mk, None, best)
        if isinstance(rest, int):
            if rest:
                self._scores(key, self._expr(whole * mk), rest, best)
        elif t.spec.lengths or not isinstance(t.keys, int) or t.keys % mk:
            with T.If(rest > t.const(0)), T.Then():
                self._scores(key, T.Bind(count - rest), rest, best)
        tiles = T.floordiv(self._expr(count) + (mk - 1), t.const(mk))
        self._exponentials(tiles if isinstance(count, int) else v.opaque(tiles), best)
        self._values(key, count)

    def _transpose_mask(self, key: Expr, count: int | Expr) -> None:
        """The block of the mask, transposed, where the scores are to be; finite elsewhere."""
        t, v, lanes = self.tensors, self.vectors, self.vectors.lanes
        base = v.opaque(self.mask_base + key)
        step = v.opaque(self._expr(t.keys))
        with T.serial(v.opaque(T.floordiv(self._expr(count) + (lanes - 1), t.const(lanes)))) as n:
            columns = v.opaque(T.min(t.const(lanes), count - n * lanes))
            with T.serial(t.const(self.used)) as w:
                rows, row = self._vector(w)
                offset = base + row * step + n * lanes
                target = n * (lanes * self.stride) + w * lanes
                keep = t.spec.mask is Mask.KEEP
                v.transpose(t.mask, offset, step, rows, columns, self.scores, target, self.stride, 1.0, keep)

    def _scores(self, key: Expr, slot: Expr, rest: int | Expr | None, best: list[Buffer]) -> None:
        """One tile of scores, of keys key + slot on; the block's greatest in `best`. rest: how many there are."""
        t, v, mk, lanes = self.tensors, self.vectors, self.tile.keys, self.vectors.lanes
        step, along = t.step("k", "s"), t.step("k", "d")
        sums = [v.registers(self.used, 0.0) for _ in range(mk)]
        # A key that is not there is read as the last one that is.
        places: list[Any] = [
            u if rest is None else min(u, rest - 1) if isinstance(rest, int) else T.min(t.const(u), rest - 1)
            for u in range(mk)
        ]
        base = v.opaque(self.k_base + (key + slot) * step)
        with T.serial(t.const(t.spec.head_size)) as d:
            columns = [v.load(self.queries, d * self.stride + w * lanes) for w in range(self.used)]
            for u in range(mk):
                element = T.Bind(v.splat(t.k[base + places[u] * step + d * along]))
                for w in range(self.used):
                    here = v.at(w * lanes)
                    T.buffer_store(sums[u], v.fma(columns[w], element, sums[u][here]), [here])

        def finish(seen: Callable[[int, int, Expr], Expr]) -> None:
            for u in range(mk):
                for w in range(self.used):
                    s = self._adjusted(sums[u][v.at(w * lanes)], key + slot + places[u], slot + u, w)
                    s = T.Bind(seen(u, w, s))
                    if rest is not None:
                        s = T.Bind(T.Select(self._expr(rest) > t.const(u), s, v.splat(NEGATIVE_INFINITY)))
                    T.buffer_store(self.scores, s, [v.at((slot + u) * self.stride + w * lanes)])
                    T.buffer_store(best[w], T.max(best[w][v.at(0)], s), [v.at(0)])

        if self.offset is None:
            finish(lambda u, w, s: s)
            return
        with T.If(key + slot + (mk - 1) > self.offset):
            with T.Then():
                finish(self._causal(key + slot))
            with T.Else():
                finish(lambda u, w, s: s)

    def _causal(self, key: Expr) -> Callable[[int, int, Expr], Expr]:
        v, lanes = self.vectors, self.vectors.lanes
        ahead = T.Bind(T.Cast("int32", key - self.offset))

        def seen(u: int, w: int, s: Expr) -> Expr:
            late = T.broadcast(ahead + u, lanes)
            return T.Select(v.numbers(w * lanes) >= late, s, v.splat(NEGATIVE_INFINITY))

        return seen

    def _adjusted(self, s: Expr, key: Expr, slot: Expr, w: int) -> Expr:
        """A vector of scores after softcap and mask."""
        t, v, lanes = self.tensors, self.vectors, self.vectors.lanes
        spec = t.spec
        if spec.softcap:
            s = self.capped(v, s, spec.softcap)
        if spec.mask is Mask.NO:
            return s
        if spec.mask_axes[2]:
            return s + self.scores[v.at(slot * self.stride + w * lanes)]
        assert t.mask is not None
        element = t.mask[self.mask_base + key]
        if spec.mask is Mask.KEEP:
            element = T.Select(T.Cast("bool", element), T.float32(0), T.float32(NEGATIVE_INFINITY))
        return s + v.splat(T.Bind(element))

    @staticmethod
    def capped(v: VectorTiles, s: Expr, cap: float) -> Expr:
        """cap · tanh(s / cap), as cap - 2 · cap / (e^(2 s / cap) + 1). A NaN stays one."""
        x = T.Bind(s * v.splat(2.0 / cap))
        e = v.exp(T.min(v.splat(40.0), x))
        return T.Bind(v.splat(cap) - v.splat(2.0 * cap) / (e + v.splat(1.0)))

    def _exponentials(self, tiles: Expr, best: list[Buffer]) -> None:
        """S = exp(S - m), with new m, l and a."""
        v, mk, lanes = self.vectors, self.tile.keys, self.vectors.lanes
        tops, sums = [], []
        for w in range(self.used):
            here = v.at(self.tensors.const(w * lanes))
            old = v.load(self.top, self.tensors.const(w * lanes))
            tops.append(T.Bind(T.max(old, best[w][v.at(0)])))
            scale = v.exp(old - tops[w])
            T.buffer_store(self.top, tops[w], [here])
            T.buffer_store(self.scale, scale, [here])
            sums.append(v.registers(1, 0.0))
            T.buffer_store(sums[w], self.sums[here] * scale, [v.at(0)])
        with T.serial(tiles) as n:
            for w in range(self.used):
                places = [(n * mk + u) * self.stride + w * lanes for u in range(mk)]
                exps = [v.exp(v.load(self.scores, place) - tops[w]) for place in places]
                for place, e in zip(places, exps, strict=True):
                    v.store(self.scores, place, e)
                T.buffer_store(sums[w], sums[w][v.at(0)] + _sum(exps), [v.at(0)])
        for w in range(self.used):
            T.buffer_store(self.sums, sums[w][v.at(0)], [v.at(self.tensors.const(w * lanes))])

    # -- values ----------------------------------------------------------------------------------------------

    def _values(self, key: Expr, count: int | Expr) -> None:
        """O = O · a + S' V over the block's keys."""
        t = self.tensors
        base = self.vectors.opaque(self.v_base + key * t.step("v", "s"))
        first = 0
        for groups, size in self.groups:
            if groups <= WRITTEN_OUT // size:
                for g in range(groups):
                    self._group(first + g * size, size, base, count)
            else:
                with T.serial(t.const(groups)) as g:
                    self._group(self.vectors.opaque(g * size + first), size, base, count)
            first += groups * size

    def _group(self, first: int | Expr, size: int, base: Expr, count: int | Expr) -> None:
        """`size` vectors of O from vector `first`."""
        t, rows = self.tensors, self.tile.rows[size]
        if isinstance(self.rows, int):
            whole, rest = divmod(self.rows, rows)
            if whole:
                with T.serial(t.const(whole)) as n:
                    self._output(n * rows, rows, first, size, base, count)
            if rest:
                self._output(t.const(whole * rows), rest, first, size, base, count)
        else:
            with T.serial(self.vectors.opaque(T.floordiv(self.rows + (rows - 1), t.const(rows)))) as n:
                self._output(n * rows, rows, first, size, base, count)

    def _output(self, row: Expr, rows: int, first: int | Expr, size: int, base: Expr, count: int | Expr) -> None:
        """One tile of O: `rows` queries from `row`, `size` vectors from vector `first`."""
        t, v, lanes = self.tensors, self.vectors, self.vectors.lanes
        pitch = self.value_vectors * lanes
        sums = [v.registers(size, 0.0) for _ in range(rows)]
        for r in range(rows):
            factor = T.Bind(v.splat(self.scale[row + r]))
            for c in range(size):
                held = v.load(self.result, (row + r) * pitch + (first + c) * lanes)
                T.buffer_store(sums[r], held * factor, [v.at(c * lanes)])
        with T.serial(self._expr(count)) as j:
            row_of_v = base + j * t.step("v", "s")
            values = [
                v.load(t.v, row_of_v + (first + c) * lanes, tail(t, t.spec.value_size, first + c, lanes))
                for c in range(size)
            ]
            for r in range(rows):
                p = T.Bind(v.splat(self.scores[j * self.stride + row + r]))
                for c in range(size):
                    here = v.at(c * lanes)
                    T.buffer_store(sums[r], v.fma(values[c], p, sums[r][here]), [here])
        for r in range(rows):
            for c in range(size):
                v.store(self.result, (row + r) * pitch + (first + c) * lanes, sums[r][v.at(c * lanes)])

    def _give_result(self, start: Expr) -> None:
        """Y = O / l for the queries that there are."""
        t, v, lanes = self.tensors, self.vectors, self.vectors.lanes
        with T.serial(self._expr(self.rows)) as r:
            total = T.Bind(self.sums[r])
            factor = T.Bind(T.float32(1) / total)

            def give(c: Expr | int, tail: Expr | None, r: Expr = r, total: Expr = total, factor: Expr = factor) -> None:
                held = v.load(self.result, r * (self.value_vectors * lanes) + c * lanes) * v.splat(factor)
                if t.spec.zero_rows:
                    held = T.Select(total == T.float32(0), v.splat(0.0), held)
                v.store(t.y, start + r * t.step("y", "s") + c * lanes, T.Bind(held), tail)

            each_vector(t, t.spec.value_size, lanes, give)


def each_vector(t: Tensors, size: int, lanes: int, body: Callable[[Expr | int, Expr | None], None]) -> None:
    """body(c, tail) for each vector of `size` elements, of which the last has `tail`; None for all."""
    whole = size // lanes
    if whole <= WRITTEN_OUT:
        for c in range(whole):
            body(c, None)
    else:
        with T.serial(t.const(whole)) as c:
            body(c, None)
    if size % lanes:
        body(whole, tail(t, size, whole, lanes))


def tail(t: Tensors, size: int, vector: Expr | int, lanes: int) -> Expr | None:
    """How many elements a vector of `size` elements has, None for all, as every one has that a loop takes."""
    full = not isinstance(vector, int) or (vector + 1) * lanes <= size
    return None if full else t.const(size - vector * lanes)


def _sum(values: list[Expr]) -> Expr:
    while len(values) > 1:
        pairs = [T.Bind(a + b) for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + ([values[-1]] if len(values) % 2 else [])
    return values[0]
