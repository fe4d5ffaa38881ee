"""Attention for a few queries, as when a model writes one token after the other: keys and values are read once.

A key head's queries, of all query heads that share it, are its rows. A bundle of them goes through a block of keys
together: a vector of a key or value is loaded once and meets all rows of the bundle. For each block and row r, with
elements along the lanes:

    s[j] = K[j, :] · Q[r, :]           several keys at a time, whose sums over the lanes are taken at once
    m' = max(m, s),  a = exp(m - m'),  s = exp(s - m'),  l = l · a + sum s,  O[r, :] = O[r, :] · a + sum s[j] · V[j, :]

Where all rows are one bundle, memory is what it waits for: while a block's scores are computed its values are asked
for, and while these are added the next block's keys.

Where heads do not fill the threads the keys are cut into parts. Their results (m, l, O) merge as blocks do.

Names: b batch, g key head, r row, i query, j key, c vector of a key or value.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from .attention_spec import Causal, Layout, Mask
from .attention_tiles import WRITTEN_OUT, Tensors, TileEmitter, each_vector, tail
from .vector_tiles import VectorTiles
from .vectors import LINE, LOWEST, NEGATIVE_INFINITY, Buffer, Expr

FEW = 8  # queries up to which rows are faster than tiles
BUNDLES = (4, 3, 2)  # rows of a bundle where there are more; the first of which the rows are a multiple
SHARE = 8  # of the innermost cache that a block of keys takes; its values and the next keys are on their way too
# Elements of keys and values below which a parallel launch costs more than the second thread saves.
PARALLEL = 1 << 18


def parts_of(tasks: int, threads: int) -> int:
    """Parts of the keys, so that the threads get equally much."""
    return 1 if tasks >= 4 * threads else threads // math.gcd(tasks, threads)


@dataclass
class RowEmitter:
    """Emits attention of at most FEW queries into the IR builder that is open."""

    vectors: VectorTiles
    tensors: Tensors
    l1: int  # bytes of the innermost cache

    def __post_init__(self) -> None:
        spec, lanes = self.tensors.spec, self.vectors.lanes
        self.head_vectors = -(-spec.head_size // lanes)
        self.value_vectors = -(-spec.value_size // lanes)
        keys = self.l1 // SHARE // (4 * max(spec.head_size, spec.value_size))
        self.block = max(1, min(256, keys) // lanes) * lanes
        most = min(FEW, spec.queries) if spec.queries is not None else FEW
        self.most = most * spec.group
        self.pitch = self.value_vectors * lanes
        self.bundle = 1
        if spec.queries is not None:
            self.bundle = self.most if self.most <= BUNDLES[0] else next((n for n in BUNDLES if self.most % n == 0), 3)
        self.ahead = self.bundle == self.most
        # Vectors of sums beside those that are loaded.
        self.sums_held = 24 if self.vectors.wide else 12

    def emit(self, threads: int) -> None:
        t, spec = self.tensors, self.tensors.spec
        tasks = t.batch * spec.kv_heads
        parts = parts_of((spec.batch or 1) * spec.kv_heads, threads)
        work = tasks * t.keys * (spec.head_size + spec.value_size)
        large = threads > 1 and work >= PARALLEL

        def run(parallel: bool) -> None:
            self._run(tasks, parts if parallel else 1, parallel)

        if isinstance(large, bool):
            run(large)
            return
        with T.If(large):
            with T.Then():
                run(True)
            with T.Else():
                run(False)

    def _run(self, tasks: int | Expr, parts: int, parallel: bool) -> None:
        t, lanes = self.tensors, self.vectors.lanes
        results = None
        if parts > 1:
            size = tasks * parts * self.most
            results = tuple(T.alloc_buffer((size * n,), "float32", scope="global") for n in (1, lanes, self.pitch))
        total = tasks * parts
        with (T.parallel if parallel else T.serial)(t.const(total) if isinstance(total, int) else total) as n:
            self._allocate()
            task = T.Bind(T.floordiv(n, t.const(parts)))
            self._locate(task)
            if results is None:
                self._keys(t.const(0), t.const(self.there) if isinstance(self.there, int) else self.there)
                self._each_row(lambda r: self._give(r, self.sums, self.result, r))
            else:
                there = self.there
                share = T.Bind(
                    T.floordiv(T.floordiv(there + (parts - 1), t.const(parts)) + (lanes - 1), t.const(lanes)) * lanes
                )
                first = self.vectors.opaque(T.min(T.floormod(n, t.const(parts)) * share, there))
                self._keys(first, self.vectors.opaque(T.min(first + share, there)))
                self._each_row(lambda r: self._keep(r, n * self.most + r, results))
        if results is not None:
            with T.serial(t.const(tasks) if isinstance(tasks, int) else tasks) as task:
                self._locate(task)
                self._each_row(lambda r: self._merge(r, task * (parts * self.most) + r, parts, results))

    def _allocate(self) -> None:
        lanes = self.vectors.lanes

        def scratch(size: int) -> Buffer:
            return T.alloc_buffer((size,), "float32", scope="global")

        self.queries = scratch(self.most * self.head_vectors * lanes)
        self.scores, self.factors = scratch(self.bundle * self.block), scratch(self.bundle * lanes)
        self.top, self.sums = scratch(self.most), scratch(self.most * lanes)
        self.result = scratch(self.most * self.pitch)

    def _locate(self, task: Expr) -> None:
        t = self.tensors
        heads = t.const(t.spec.kv_heads)
        opaque = self.vectors.opaque
        self.b, self.g = opaque(T.floordiv(task, heads)), opaque(T.floormod(task, heads))
        self.there = t.there(self.b)
        self.k_base, self.v_base = opaque(t.at("k", self.b, self.g)), opaque(t.at("v", self.b, self.g))

    def _each_row(self, body: Callable[[Expr], None]) -> None:
        """Rows of the key head."""
        rows = self.tensors.queries * self.tensors.spec.group
        self._rows(self.tensors.const(0), rows, lambda r, n: body(r))

    def _rows(self, first: Expr, count: int | Expr, body: Callable[[Expr, Expr], None]) -> None:
        """Rows from `first` on, with their number from there: query i of its query head r // queries."""
        t = self.tensors
        if isinstance(count, int) and count == 1:
            self._row(first)
            body(first, t.const(0))
            return
        with T.serial(t.const(count) if isinstance(count, int) else count) as n:
            r = self.vectors.opaque(first + n)
            self._row(r)
            body(r, n)

    def _row(self, r: Expr) -> None:
        t, opaque = self.tensors, self.vectors.opaque
        if isinstance(t.queries, int) and t.queries == 1:
            self.h, self.i = opaque(self.g * t.spec.group + r), t.const(0)
            return
        queries = t.const(t.queries) if isinstance(t.queries, int) else t.queries
        self.h = opaque(self.g * t.spec.group + T.floordiv(r, queries))
        self.i = opaque(T.floormod(r, queries))

    def _each_bundle(self, body: Callable[[Expr, int], None]) -> None:
        """First row and number of rows of each bundle."""
        t, rows = self.tensors, self.tensors.queries * self.tensors.spec.group
        if not isinstance(rows, int):
            with T.serial(rows) as r:
                body(r, 1)
            return
        whole, rest = divmod(rows, self.bundle)
        if whole == 1:
            body(t.const(0), self.bundle)
        else:
            with T.serial(t.const(whole)) as n:
                body(self.vectors.opaque(n * self.bundle), self.bundle)
        if rest:
            body(t.const(whole * self.bundle), rest)

    # -- scores ----------------------------------------------------------------------------------------------

    def _keys(self, first: Expr, stop: Expr) -> None:
        """All rows against keys first .. stop."""
        t, v, lanes = self.tensors, self.vectors, self.vectors.lanes

        def start(r: Expr) -> None:
            origin = v.opaque(t.at("q", self.b, self.h, self.i))

            def take(c: Expr | int, part: Expr | None) -> None:
                x = v.load(t.q, origin + c * lanes, part)
                v.store(self.queries, (r * self.head_vectors + c) * lanes, T.Bind(x * v.splat(t.spec.scale)))

            each_vector(t, t.spec.head_size, lanes, take)
            T.buffer_store(self.top, T.float32(LOWEST), [r])
            v.store(self.sums, r * lanes, v.splat(0.0))
            self._each_value(lambda c: v.store(self.result, r * self.pitch + c * lanes, v.splat(0.0)))

        self._each_row(start)
        if t.spec.causal is not Causal.NO:
            # Keys beyond what the last query sees.
            stop = v.opaque(T.max(first, T.min(stop, t.offset(self.there) + t.queries)))
        with T.serial(v.opaque(T.floordiv(stop - first + (self.block - 1), t.const(self.block)))) as n:
            key = v.opaque(first + n * self.block)
            count = v.opaque(T.min(t.const(self.block), stop - key))
            self._each_bundle(lambda r, rows: self._block(r, rows, key, count, stop))

    def _block(self, first: Expr, rows: int, key: Expr, count: Expr, stop: Expr) -> None:
        """A bundle of rows against `count` keys from `key` on."""
        if self.tensors.spec.k is Layout.BHDS:
            self._rows(first, rows, lambda r, n: self._columns(r, n, key, count))
        else:
            self._products(first, rows, key, count)
        self._rows(first, rows, lambda r, n: self._weights(r, n, key, count))
        self._values(first, rows, key, count, stop)

    def _columns(self, r: Expr, n: Expr, key: Expr, count: Expr) -> None:
        """Scores of one row, before mask and softcap, where an element of all keys is contiguous."""
        t, v, lanes, spec = self.tensors, self.vectors, self.vectors.lanes, self.tensors.spec

        def scores(slot: Expr, part: Expr | None) -> None:
            base = v.opaque(self.k_base + (key + slot) * t.step("k", "s"))
            total = v.registers(1, 0.0)
            with T.serial(t.const(spec.head_size)) as d:
                column = v.load(t.k, base + d * t.step("k", "d"), part)
                q = T.Bind(v.splat(self.queries[r * (self.head_vectors * lanes) + d]))
                T.buffer_store(total, v.fma(column, q, total[v.at(0)]), [v.at(0)])
            v.store(self.scores, n * self.block + slot, total[v.at(0)])

        self._each_vector(count, scores)

    def _each_vector(self, count: Expr, body: Callable[[Expr, Expr | None], None]) -> None:
        """Offset of each vector of `count` elements, and how many it has; None for all."""
        t, v, lanes = self.tensors, self.vectors, self.vectors.lanes
        whole = v.opaque(T.floordiv(count, t.const(lanes)))
        with T.serial(whole) as n:
            body(n * lanes, None)
        rest = v.opaque(count - whole * lanes)
        with T.If(rest > t.const(0)), T.Then():
            body(whole * lanes, rest)

    def _products(self, first: Expr, rows: int, key: Expr, count: Expr) -> None:
        """Scores of a bundle before mask and softcap, several keys at a time."""
        t, v, lanes, spec = self.tensors, self.vectors, self.vectors.lanes, self.tensors.spec
        keys = min(lanes, 1 << (self.sums_held // rows).bit_length() - 1)
        pitch = self.head_vectors * lanes

        def scores(slot: Expr, part: Expr | None) -> None:
            base = v.opaque(self.k_base + (key + slot) * t.step("k", "s"))
            # A key that is not there is read as the last one that is.
            places: list[Any] = [j * t.step("k", "s") for j in range(keys)]
            if part is not None:
                places = [T.Bind(T.min(t.const(j), part - 1) * t.step("k", "s")) for j in range(keys)]
            elif self.ahead:
                for j in range(keys):
                    self._ask(t.v, self.v_base + (key + slot + j) * t.step("v", "s"), spec.value_size)
            totals = [[v.registers(1, 0.0) for _ in range(keys)] for _ in range(rows)]

            def add(c: Expr | int, tail: Expr | None) -> None:
                q = [v.load(self.queries, (first + n) * pitch + c * lanes) for n in range(rows)]
                for j in range(keys):
                    k = v.load(t.k, base + places[j] + c * lanes, tail)
                    for n in range(rows):
                        T.buffer_store(totals[n][j], v.fma(q[n], k, totals[n][j][v.at(0)]), [v.at(0)])

            whole = spec.head_size // lanes
            with T.serial(t.const(whole)) as c:
                add(c, None)
            if spec.head_size % lanes:
                add(whole, tail(t, spec.head_size, whole, lanes))
            for n in range(rows):
                v.put_totals([total[v.at(0)] for total in totals[n]], self.scores, n * self.block + slot)

        whole = v.opaque(T.floordiv(count, t.const(keys)))
        with T.serial(whole) as n:
            scores(n * keys, None)
        rest = v.opaque(count - whole * keys)
        with T.If(rest > t.const(0)), T.Then():
            scores(whole * keys, rest)

    def _ask(self, buffer: Buffer, offset: Expr, size: int) -> None:
        """The cache lines of `size` elements."""
        each_vector(self.tensors, size, LINE, lambda line, part: self.vectors.prefetch(buffer, offset + line * LINE))

    def _weights(self, r: Expr, n: Expr, key: Expr, count: Expr) -> None:
        """The scores of row r, which is the bundle's n-th, become exp(s - m'); m, l and the factor of O follow."""
        t, v, lanes = self.tensors, self.vectors, self.vectors.lanes
        best = v.registers(1, LOWEST)
        limit = None
        if t.spec.causal is not Causal.NO:
            limit = T.Bind(T.Cast("int32", self.i + t.offset(self.there) - key))
        base = v.opaque(n * self.block)

        def adjusted(slot: Expr, part: Expr | None) -> None:
            s = self._adjusted(v.load(self.scores, base + slot), key + slot, part)
            if limit is not None:
                seen = v.numbers(T.Cast("int32", slot)) <= T.broadcast(limit, lanes)
                s = T.Bind(T.Select(seen, s, v.splat(NEGATIVE_INFINITY)))
            if part is not None:
                there = v.numbers(0) < T.broadcast(T.Cast("int32", part), lanes)
                s = T.Bind(T.Select(there, s, v.splat(NEGATIVE_INFINITY)))
            v.store(self.scores, base + slot, s)
            T.buffer_store(best, T.max(best[v.at(0)], s), [v.at(0)])

        self._each_vector(count, adjusted)
        old = T.Bind(self.top[r])
        top = T.Bind(T.max(old, v.greatest(best[v.at(0)])))
        T.buffer_store(self.top, top, [r])
        factor = v.exp(T.Bind(v.splat(T.Bind(old - top))))
        T.buffer_store(best, v.load(self.sums, r * lanes) * factor, [v.at(0)])
        with T.serial(v.opaque(T.floordiv(count + (lanes - 1), t.const(lanes)))) as j:
            e = v.exp(v.load(self.scores, base + j * lanes) - v.splat(top))
            v.store(self.scores, base + j * lanes, e)
            T.buffer_store(best, best[v.at(0)] + e, [v.at(0)])
        v.store(self.sums, r * lanes, best[v.at(0)])
        v.store(self.factors, n * lanes, factor)

    def _adjusted(self, s: Expr, key: Expr, part: Expr | None) -> Expr:
        """Scores of keys after softcap and mask."""
        t, v, spec = self.tensors, self.vectors, self.tensors.spec
        if spec.softcap:
            s = TileEmitter.capped(v, s, spec.softcap)
        if spec.mask is Mask.NO:
            return s
        offset = v.opaque(t.mask_at(self.b, self.h, self.i) + key)
        if spec.mask is Mask.KEEP:
            return T.Bind(s + v.kept(t.mask, offset, v.lanes if part is None else part))
        return T.Bind(s + v.load(t.mask, offset, part))

    # -- values ----------------------------------------------------------------------------------------------

    def _values(self, first: Expr, rows: int, key: Expr, count: Expr, stop: Expr) -> None:
        """O[r] = O[r] · a + s V for the rows of a bundle, a few vectors at a time; of two keys in turn where these sums
        would be too few to keep the multipliers busy."""
        t, v = self.tensors, self.vectors
        base = v.opaque(self.v_base + key * t.step("v", "s"))
        passes = -(-self.value_vectors * rows // self.sums_held)
        wide = -(-self.value_vectors // passes)
        full = self.value_vectors // wide - (self.value_vectors % wide == 0)  # passes before the last
        some = functools.partial(self._some_values, first=first, rows=rows, key=key, base=base, count=count, stop=stop)
        if full * wide <= WRITTEN_OUT:
            for n in range(full):
                some(n * wide, wide)
        else:
            some(0, wide)
            with T.serial(t.const(full - 1)) as n:
                some(v.opaque((n + 1) * wide), wide)
        some(full * wide, self.value_vectors - full * wide)

    def _some_values(
        self, start: Expr | int, size: int, *, first: Expr, rows: int, key: Expr, base: Expr, count: Expr, stop: Expr
    ) -> None:
        """`size` vectors of values from vector `start`."""
        t, v, lanes = self.tensors, self.vectors, self.vectors.lanes
        turns = 2 if rows * size < 8 else 1
        sums = [[[v.registers(1, 0.0) for _ in range(size)] for _ in range(rows)] for _ in range(turns)]
        for n in range(rows):
            factor = v.load(self.factors, t.const(n * lanes))
            for c in range(size):
                old = v.load(self.result, (first + n) * self.pitch + (start + c) * lanes)
                T.buffer_store(sums[0][n][c], old * factor, [v.at(0)])

        def add(j: Expr, into: list[list[Buffer]]) -> None:
            if self.ahead and isinstance(start, int) and start == 0 and t.spec.k is not Layout.BHDS:
                place = T.Bind(T.min(key + self.block + j, stop - 1))
                self._ask(t.k, self.k_base + place * t.step("k", "s"), t.spec.head_size)
            p = [T.Bind(v.splat(self.scores[n * self.block + j])) for n in range(rows)]
            for c in range(size):
                part = tail(t, t.spec.value_size, start + c, lanes)
                y = v.load(t.v, base + j * t.step("v", "s") + (start + c) * lanes, part)
                for n in range(rows):
                    T.buffer_store(into[n][c], v.fma(p[n], y, into[n][c][v.at(0)]), [v.at(0)])

        with T.serial(v.opaque(T.floordiv(count, t.const(turns)))) as j:
            for turn in range(turns):
                add(v.opaque(j * turns + turn), sums[turn])
        if turns > 1:
            with T.If(T.floormod(count, t.const(turns)) > t.const(0)), T.Then():
                add(count - 1, sums[0])
        for n in range(rows):
            for c in range(size):
                total = sums[0][n][c][v.at(0)]
                for other in sums[1:]:
                    total = total + other[n][c][v.at(0)]
                v.store(self.result, (first + n) * self.pitch + (start + c) * lanes, T.Bind(total))

    def _each_value(self, body: Callable[[Expr | int], None]) -> None:
        """Vectors of values, the last of them filled up."""
        each_vector(self.tensors, self.pitch, self.vectors.lanes, lambda c, part: body(c))

    def _give(self, r: Expr, sums: Buffer, result: Buffer, place: Expr) -> None:
        """Y = O / l."""
        v, lanes = self.vectors, self.vectors.lanes
        total = v.total(v.load(sums, place * lanes))
        self._write(total, lambda c: v.load(result, place * self.pitch + c * lanes))

    def _write(self, total: Expr, value: Callable[[Expr | int], Expr]) -> None:
        t, v, lanes = self.tensors, self.vectors, self.vectors.lanes
        factor = T.Bind(T.float32(1) / total)
        start = v.opaque(t.at("y", self.b, self.h, self.i))

        def write(c: Expr | int, part: Expr | None) -> None:
            y = value(c) * v.splat(factor)
            if t.spec.zero_rows:
                y = T.Select(total == T.float32(0), v.splat(0.0), y)
            v.store(t.y, start + c * lanes, T.Bind(y), part)

        each_vector(t, t.spec.value_size, lanes, write)

    # -- parts -----------------------------------------------------------------------------------------------

    def _keep(self, r: Expr, place: Expr, results: tuple[Buffer, ...]) -> None:
        v, lanes = self.vectors, self.vectors.lanes
        T.buffer_store(results[0], self.top[r], [place])
        v.store(results[1], place * lanes, v.load(self.sums, r * lanes))

        def keep(c: Expr | int) -> None:
            v.store(results[2], place * self.pitch + c * lanes, v.load(self.result, r * self.pitch + c * lanes))

        self._each_value(keep)

    def _merge(self, r: Expr, place: Expr, parts: int, results: tuple[Buffer, ...]) -> None:
        """Parts against their common maximum."""
        v, lanes = self.vectors, self.vectors.lanes
        places = [T.Bind(place + p * self.most) for p in range(parts)]
        tops = [T.Bind(results[0][p]) for p in places]
        top = tops[0]
        for other in tops[1:]:
            top = T.Bind(T.max(top, other))
        factors = [v.exp(T.Bind(v.splat(T.Bind(other - top)))) for other in tops]

        def combined(buffer: Buffer, pitch: int, c: Expr | int) -> Expr:
            total = v.splat(0.0)
            for p, factor in zip(places, factors, strict=True):
                total = v.fma(v.load(buffer, p * pitch + c * lanes), factor, total)
            return T.Bind(total)

        total = v.total(combined(results[1], lanes, 0))
        self._write(total, lambda c: combined(results[2], self.pitch, c))
