"""Attention for a few queries, as when a model writes one token after the other: keys and values are read once.

A key head's queries, of all query heads that share it, are its rows. For a block of keys that stays in the innermost
cache and each row r, with elements along the lanes:

    s[j] = K[j, :] · Q[r, :]           the sums of `lanes` products at once, so that scores come as vectors
    m' = max(m, s),  a = exp(m - m'),  s = exp(s - m'),  l = l · a + sum s,  O[r, :] = O[r, :] · a + sum s[j] · V[j, :]

Where heads do not fill the threads the keys are cut into parts. Their results (m, l, O) merge as blocks do.

Names: b batch, g key head, r row, i query, j key, c vector of a key or value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from .attention_spec import Causal, Layout, Mask
from .attention_tiles import Tensors, TileEmitter
from .vector_tiles import VectorTiles
from .vectors import LOWEST, NEGATIVE_INFINITY, Buffer, Expr

FEW = 8  # queries up to which rows are faster than tiles
HELD = 4  # vectors of a query or an output that are kept in registers
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
        keys = self.l1 // 2 // (4 * max(spec.head_size, spec.value_size))
        self.block = max(1, min(256, keys) // lanes) * lanes
        most = min(FEW, spec.queries) if spec.queries is not None else FEW
        self.most = most * spec.group
        self.pitch = self.value_vectors * lanes

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
        self.scores = scratch(self.block)
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
        """Rows of the key head: query i of its query head r // queries."""
        t = self.tensors
        rows = t.queries * t.spec.group
        if isinstance(rows, int) and rows == 1:
            self.h, self.i = self.g, t.const(0)
            body(t.const(0))
            return
        with T.serial(t.const(rows) if isinstance(rows, int) else rows) as r:
            if isinstance(t.queries, int) and t.queries == 1:
                self.h, self.i = self.vectors.opaque(self.g * t.spec.group + r), t.const(0)
            else:
                queries = t.const(t.queries) if isinstance(t.queries, int) else t.queries
                self.h = self.vectors.opaque(self.g * t.spec.group + T.floordiv(r, queries))
                self.i = self.vectors.opaque(T.floormod(r, queries))
            body(r)

    # -- scores ----------------------------------------------------------------------------------------------

    def _keys(self, first: Expr, stop: Expr) -> None:
        """All rows against keys first .. stop."""
        t, v, lanes = self.tensors, self.vectors, self.vectors.lanes

        def start(r: Expr) -> None:
            origin = v.opaque(t.at("q", self.b, self.h, self.i))
            for c in range(self.head_vectors):
                x = v.load(t.q, origin + c * lanes, _tail(t, t.spec.head_size, c, lanes))
                v.store(self.queries, (r * self.head_vectors + c) * lanes, T.Bind(x * v.splat(t.spec.scale)))
            T.buffer_store(self.top, T.float32(LOWEST), [r])
            v.store(self.sums, r * lanes, v.splat(0.0))
            for c in range(self.value_vectors):
                v.store(self.result, r * self.pitch + c * lanes, v.splat(0.0))

        self._each_row(start)
        if t.spec.causal is not Causal.NO:
            # Keys beyond what the last query sees.
            stop = v.opaque(T.max(first, T.min(stop, t.offset(self.there) + t.queries)))
        with T.serial(v.opaque(T.floordiv(stop - first + (self.block - 1), t.const(self.block)))) as n:
            key = v.opaque(first + n * self.block)
            count = v.opaque(T.min(t.const(self.block), stop - key))
            self._each_row(lambda r: self._block(r, key, count))

    def _block(self, r: Expr, key: Expr, count: Expr) -> None:
        t, v, lanes = self.tensors, self.vectors, self.vectors.lanes
        best = v.registers(1, LOWEST)
        held = None
        if self.head_vectors <= HELD and t.spec.k is not Layout.BHDS:
            held = [v.load(self.queries, (r * self.head_vectors + c) * lanes) for c in range(self.head_vectors)]
        limit = None
        if t.spec.causal is not Causal.NO:
            limit = T.Bind(T.Cast("int32", self.i + t.offset(self.there) - key))

        def scores(slot: Expr, part: Expr | None) -> None:
            s = self._products(r, key + slot, part, held)
            s = self._adjusted(s, key + slot, part)
            if limit is not None:
                seen = v.numbers(T.Cast("int32", slot)) <= T.broadcast(limit, lanes)
                s = T.Bind(T.Select(seen, s, v.splat(NEGATIVE_INFINITY)))
            if part is not None:
                there = v.numbers(0) < T.broadcast(T.Cast("int32", part), lanes)
                s = T.Bind(T.Select(there, s, v.splat(NEGATIVE_INFINITY)))
            v.store(self.scores, slot, s)
            T.buffer_store(best, T.max(best[v.at(0)], s), [v.at(0)])

        whole = v.opaque(T.floordiv(count, t.const(lanes)))
        with T.serial(whole) as n:
            scores(n * lanes, None)
        rest = v.opaque(count - whole * lanes)
        with T.If(rest > t.const(0)), T.Then():
            scores(whole * lanes, rest)
        old = T.Bind(self.top[r])
        top = T.Bind(T.max(old, v.greatest(best[v.at(0)])))
        T.buffer_store(self.top, top, [r])
        factor = v.exp(T.Bind(v.splat(T.Bind(old - top))))
        T.buffer_store(best, v.load(self.sums, r * lanes) * factor, [v.at(0)])
        with T.serial(v.opaque(T.floordiv(count + (lanes - 1), t.const(lanes)))) as n:
            e = v.exp(v.load(self.scores, n * lanes) - v.splat(top))
            v.store(self.scores, n * lanes, e)
            T.buffer_store(best, best[v.at(0)] + e, [v.at(0)])
        v.store(self.sums, r * lanes, best[v.at(0)])
        self._values(r, key, count, factor)

    def _products(self, r: Expr, key: Expr, part: Expr | None, held: list[Expr] | None) -> Expr:
        """The scores of `lanes` keys, of which `part` are there, before mask and softcap."""
        t, v, lanes, spec = self.tensors, self.vectors, self.vectors.lanes, self.tensors.spec
        base = v.opaque(self.k_base + key * t.step("k", "s"))
        row = r * (self.head_vectors * lanes)
        if spec.k is Layout.BHDS:
            total = v.registers(1, 0.0)
            with T.serial(t.const(spec.head_size)) as d:
                column = v.load(t.k, base + d * t.step("k", "d"), part)
                q = T.Bind(v.splat(self.queries[row + d]))
                T.buffer_store(total, v.fma(column, q, total[v.at(0)]), [v.at(0)])
            return T.Bind(total[v.at(0)])
        # A key that is not there is read as the last one that is.
        places: list[Any] = [j * t.step("k", "s") for j in range(lanes)]
        if part is not None:
            places = [T.Bind(T.min(t.const(j), part - 1) * t.step("k", "s")) for j in range(lanes)]
        totals = [v.registers(1, 0.0) for _ in range(lanes)]

        def add(c: Expr | int, q: Expr, tail: Expr | None) -> None:
            for j in range(lanes):
                k = v.load(t.k, base + places[j] + c * lanes, tail)
                T.buffer_store(totals[j], v.fma(q, k, totals[j][v.at(0)]), [v.at(0)])

        if held is not None:
            for c, q in enumerate(held):
                add(c, q, _tail(t, spec.head_size, c, lanes))
        else:
            whole = spec.head_size // lanes
            with T.serial(t.const(whole)) as c:
                add(c, v.load(self.queries, row + c * lanes), None)
            if spec.head_size % lanes:
                add(whole, v.load(self.queries, row + whole * lanes), _tail(t, spec.head_size, whole, lanes))
        return v.totals([total[v.at(0)] for total in totals])

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

    def _values(self, r: Expr, key: Expr, count: Expr, factor: Expr) -> None:
        """O[r] = O[r] · a + s V; a few vectors at a time, of two keys in turn."""
        t, v, lanes = self.tensors, self.vectors, self.vectors.lanes
        base = v.opaque(self.v_base + key * t.step("v", "s"))
        for first in range(0, self.value_vectors, HELD):
            here = range(first, min(first + HELD, self.value_vectors))
            sums = [[v.registers(1, 0.0) for _ in here] for _ in range(2)]
            for n, c in enumerate(here):
                T.buffer_store(sums[0][n], v.load(self.result, r * self.pitch + c * lanes) * factor, [v.at(0)])

            def add(j: Expr, into: list[Buffer], here: range = here) -> None:
                p = T.Bind(v.splat(self.scores[j]))
                for n, c in enumerate(here):
                    x = v.load(t.v, base + j * t.step("v", "s") + c * lanes, _tail(t, t.spec.value_size, c, lanes))
                    T.buffer_store(into[n], v.fma(p, x, into[n][v.at(0)]), [v.at(0)])

            with T.serial(v.opaque(T.floordiv(count, t.const(2)))) as half:
                add(half * 2, sums[0])
                add(half * 2 + 1, sums[1])
            with T.If(T.floormod(count, t.const(2)) > t.const(0)), T.Then():
                add(count - 1, sums[0])
            for n, c in enumerate(here):
                total = T.Bind(sums[0][n][v.at(0)] + sums[1][n][v.at(0)])
                v.store(self.result, r * self.pitch + c * lanes, total)

    def _give(self, r: Expr, sums: Buffer, result: Buffer, place: Expr) -> None:
        """Y = O / l."""
        v, lanes = self.vectors, self.vectors.lanes
        total = v.total(v.load(sums, place * lanes))
        self._write(total, [v.load(result, place * self.pitch + c * lanes) for c in range(self.value_vectors)])

    def _write(self, total: Expr, values: list[Expr]) -> None:
        t, v, lanes = self.tensors, self.vectors, self.vectors.lanes
        factor = T.Bind(T.float32(1) / total)
        start = v.opaque(t.at("y", self.b, self.h, self.i))
        for c, value in enumerate(values):
            y = value * v.splat(factor)
            if t.spec.zero_rows:
                y = T.Select(total == T.float32(0), v.splat(0.0), y)
            v.store(t.y, start + c * lanes, T.Bind(y), _tail(t, t.spec.value_size, c, lanes))

    # -- parts -----------------------------------------------------------------------------------------------

    def _keep(self, r: Expr, place: Expr, results: tuple[Buffer, ...]) -> None:
        v, lanes = self.vectors, self.vectors.lanes
        T.buffer_store(results[0], self.top[r], [place])
        v.store(results[1], place * lanes, v.load(self.sums, r * lanes))
        for c in range(self.value_vectors):
            v.store(results[2], place * self.pitch + c * lanes, v.load(self.result, r * self.pitch + c * lanes))

    def _merge(self, r: Expr, place: Expr, parts: int, results: tuple[Buffer, ...]) -> None:
        """Parts against their common maximum."""
        v, lanes = self.vectors, self.vectors.lanes
        places = [T.Bind(place + p * self.most) for p in range(parts)]
        tops = [T.Bind(results[0][p]) for p in places]
        top = tops[0]
        for other in tops[1:]:
            top = T.Bind(T.max(top, other))
        factors = [v.exp(T.Bind(v.splat(T.Bind(other - top)))) for other in tops]

        def combined(buffer: Buffer, pitch: int, c: int) -> Expr:
            total = v.splat(0.0)
            for p, factor in zip(places, factors, strict=True):
                total = v.fma(v.load(buffer, p * pitch + c * lanes), factor, total)
            return T.Bind(total)

        total = v.total(combined(results[1], lanes, 0))
        self._write(total, [combined(results[2], self.pitch, c) for c in range(self.value_vectors)])


def _tail(t: Tensors, size: int, vector: int, lanes: int) -> Expr | None:
    """How many elements a vector has, None for all."""
    return None if (vector + 1) * lanes <= size else t.const(size - vector * lanes)
