"""Matrix products: a register tile of rows x vectors, B in panels of a tile's width, an epilogue on the tile.

    Y[m, n] = finish(sum over k of A[m, k] · B[k, n])

B is constant and packed once (`pack`): panels of up to `GemmTile.packed` vectors of columns, each [K][panel width], so
that the inner loop reads it in order. It may be stored in 16 bits, which become float32 in registers. Where B is
computed at run time (`packed=False`) its rows are read in place.
Rows are cut into tiles of two sizes that differ by one, so that no tile is nearly empty.

Names: m, n, k rows, columns, depth; a, b, y flat buffers; tile: rows x vectors of accumulators in registers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script import builder as T

from ...passes.base import Caches
from .dots import Accumulators, Dot, dot_of
from .gemm_parts import Panel, Part, repeat
from .gemm_spec import FEW, PAGE, UNROLL, GemmSpec, GemmTile, panels, part_of_depth, streams_of_depth
from .vectors import LINE, Buffer, Expr, Vectors

# Multiply-adds below which a second thread costs more than it gives.
PARALLEL = 1 << 17
NEAR = 2  # tiles of a panel up to which none asks for the next one: it would be gone again before it is read
BESIDE = 4  # panels side by side from which on each is a stream
CHUNK = 16  # tiles of rows in a chunk, at most, where their number is known at run time only
SUMS = 1 << 18  # elements of the sums that wait between two parts of the depth

# Called with a vector of results, its row and first column, and how many of its lanes exist (None: all).
Finish = Callable[[Expr, Expr, Expr, "int | Expr | None"], None]


@dataclass
class GemmEmitter:
    """Emits a product into the IR builder that is open.

    rows, inner, batch: the sizes, as numbers where the spec knows them. a, b: flat buffers, b of uint16 where it is
    stored in 16 bits. index: type of offsets. first: what the sums of a column start at, in whole vectors; None: 0.

    The depth is counted in steps (`dots`): of 8-bit numbers, a holds whole steps, which inner and spec.inner count.
    """

    vectors: Vectors
    spec: GemmSpec
    tile: GemmTile
    rows: Expr | int
    inner: Expr | int
    batch: Expr | int
    a: Buffer
    b: Buffer
    finish: Finish
    threads: int
    caches: Caches
    index: str = "int64"
    first: Buffer | None = None
    columns: Expr | None = None  # where the spec does not know them

    @functools.cached_property
    def dot(self) -> Dot:
        return dot_of(self.vectors, self.spec.data, self.spec.weights, self.spec.joined)

    def const(self, value: int | Expr) -> Expr:
        return tirx.const(value, self.index) if isinstance(value, int) else value

    def emit(self) -> None:
        """The whole product."""
        spec, lanes = self.spec, self.vectors.lanes
        if spec.columns is None:
            self._of_free_columns()
            return
        cuts = panels(spec.columns, self.tile, lanes)
        if not cuts or self.rows == 0 or self.batch == 0:
            return
        if (depth := self.part_of_depth()) is not None:
            self._deep(cuts, depth)
            return
        chunks, per_chunk = self._chunks()
        tasks = self.const(self.batch) * self.const(chunks) * self.const(len(cuts))
        # Threads have panels of their own where that gives all of them as many: chunks of rows differ in size.
        shares = self.threads if self._parallel() and self.batch == 1 and len(cuts) % self.threads == 0 else 1
        each = self.const(len(cuts) // shares)
        with (T.parallel if self._parallel() else T.serial)(tasks) as task:
            panel = T.Bind(tirx.floormod(task, each))
            rest = T.Bind(tirx.floordiv(task, each))
            chunk, item = (self._bind(f(rest, self.const(chunks))) for f in (tirx.truncmod, tirx.truncdiv))
            if shares > 1:
                panel, item = T.Bind(item * each + panel), self.const(0)
            self._any_panel(cuts, panel, lambda chosen: self._panel(chosen, chunk, chunks, per_chunk, item))

    def _of_free_columns(self) -> None:
        """Columns that are known at run time only: of a B in place."""
        if self.rows == 0 or self.batch == 0:
            return
        opaque, const = self.vectors.opaque, self.const
        width = const(self.tile.vectors * self.vectors.lanes)
        count = opaque(tirx.truncdiv(self.columns + width - const(1), width))
        chunks, per_chunk = self._chunks()
        tasks = const(self.batch) * const(chunks) * count
        with (T.parallel if self._parallel() else T.serial)(tasks) as task:
            number, rest = (opaque(f(task, count)) for f in (tirx.truncmod, tirx.truncdiv))
            chunk, item = (opaque(f(rest, const(chunks))) for f in (tirx.truncmod, tirx.truncdiv))
            left = opaque(self.columns - number * width)
            with T.If(left >= width):
                with T.Then():
                    self._panel(Panel(number, self.tile.vectors, None), chunk, chunks, per_chunk, item)
                with T.Else():
                    self._panel(Panel(number, self.tile.vectors, None, left), chunk, chunks, per_chunk, item)

    def _any_panel(self, cuts: Sequence[tuple[int, int]], number: Expr, body: Callable[[Panel], None]) -> None:
        """`body` of panel `number`; the last one may have fewer columns."""
        spec, lanes = self.spec, self.vectors.lanes
        more = (spec.columns or 0) % lanes
        uneven = cuts[-1][1] < self.tile.vectors or more != 0
        full = len(cuts) - uneven

        def whole() -> None:
            body(Panel(number, self.tile.vectors, None))

        def last() -> None:
            body(Panel(self.const(full), cuts[-1][1], more or None))

        if not uneven:
            whole()
        elif not full:
            last()
        else:
            with T.If(number < self.const(full)):
                with T.Then():
                    whole()
                with T.Else():
                    last()

    # -- depth in parts --------------------------------------------------------------------------------------

    def part_of_depth(self) -> int | None:
        """Steps of k of one part; None where all of it is one."""
        if not (self.spec.packed and isinstance(self.rows, int) and isinstance(self.inner, int)):
            return None
        if self.tile.depth is not None:
            return self.tile.depth or None
        return part_of_depth(self.rows, self.inner, self.tile, self.caches, self.vectors.lanes)

    def _deep(self, cuts: Sequence[tuple[int, int]], depth: int) -> None:
        """The product in parts of the depth: a part of A stays in the second cache while all panels of a task go
        through it, packed, so that it is one stream and its rows do not meet in the same lines. Sums wait in a buffer
        until the last part."""
        assert isinstance(self.rows, int) and isinstance(self.inner, int)
        const, height, inner = self.const, self.tile.rows, self.inner
        tiles, each = -(-self.rows // height), height * self.tile.vectors * self.vectors.lanes
        chunks = -(-tiles // max(1, self.caches.l2 * 5 // 8 // (4 * height * depth)))
        groups = max(1, -(-tiles // chunks) * each * len(cuts) // SUMS)
        if self._parallel():
            # Two shares for a thread, so that one that is late holds up less.
            chunks = max(chunks, min(2 * self.threads, tiles // FEW))
            groups = max(groups, min(len(cuts), -(-2 * self.threads // chunks)))
        per_chunk, per_group = -(-tiles // chunks), -(-len(cuts) // groups)
        groups = -(-len(cuts) // per_group)
        with (T.parallel if self._parallel() and chunks * groups > 1 else T.serial)(const(chunks * groups)) as task:
            chunk, group = T.Bind(task // const(groups)), T.Bind(task % const(groups))
            sums = T.alloc_buffer((per_group * per_chunk * each,), self.dot.sums, scope="global")
            first = T.Bind(group * const(per_group))
            panels = T.Bind(T.min(const(per_group), const(len(cuts)) - first))
            parts = -(-inner // depth)
            packed = None
            if not self.spec.joined:
                packed = T.alloc_buffer((per_chunk * height * depth,), self.a.dtype, scope="global")
            with T.serial(const(parts)) as number:
                start = T.Bind(number * const(depth))
                steps = depth if inner % depth == 0 else T.Bind(T.min(const(depth), const(inner) - start))
                if packed is not None:
                    self._pack_rows(packed, chunk, chunks, start, steps, depth)
                with T.serial(panels) as turn:
                    waiting = T.Bind(turn * const(per_chunk * each))
                    begun, goes_on = number > const(0), number < const(parts - 1)
                    part = Part(start, steps, depth, sums, waiting, begun, goes_on, packed)

                    def body(panel: Panel, chunk: Expr = chunk, part: Part = part) -> None:
                        self._panel(panel, chunk, chunks, per_chunk, const(0), part)

                    self._any_panel(cuts, T.Bind(first + turn), body)

    def _pack_rows(
        self, into: Buffer, chunk: Expr, chunks: int, start: Expr, steps: int | Expr, depth: int
    ) -> None:
        """A part of the rows of a chunk: [tile][step of k][row of the tile]."""
        const, height = self.const, self.tile.rows

        def rows(step: Expr, count: int, row: Expr) -> None:
            places = [T.Bind((row + const(i)) * const(self.inner) + start) for i in range(count)]
            to = T.Bind(step * const(height * depth))
            with T.serial(self.const(steps)) as k:
                for i, at in enumerate(places):
                    T.buffer_store(into, self.a[at + k], [to + k * const(count) + const(i)])

        self._row_tiles(chunk, chunks, rows)

    def _row_tiles(self, chunk: Expr, chunks: int, body: Callable[[Expr, int, Expr], None]) -> None:
        """`body` of the number in its chunk, the height and the first row of each tile; the number of rows is known.
        Chunks have as many tiles, but for one."""
        assert isinstance(self.rows, int)
        const, height = self.const, self.tile.rows
        tiles = -(-self.rows // height)
        tall = tiles - (tiles * height - self.rows)  # tiles of `height` rows; the others have one less
        first, last = (T.Bind(tirx.floordiv(number * const(tiles), const(chunks))) for number in (chunk, chunk + 1))
        with T.serial(last - first) as step:
            at = T.Bind(first + step)
            row = T.Bind(at * const(height) - T.max(const(0), at - const(tall)))
            if tall == tiles or tall == 0:
                body(step, height if tall else height - 1, row)
            else:
                with T.If(at < const(tall)):
                    with T.Then():
                        body(step, height, row)
                    with T.Else():
                        body(step, height - 1, row)

    def _parallel(self) -> bool:
        if self.threads == 1:
            return False
        work = 1
        for size in (self.spec.columns, self.rows, self.inner, self.batch):
            work *= size if isinstance(size, int) else 64
        return work >= PARALLEL

    def _chunks(self) -> tuple[int | Expr, int | Expr]:
        """Chunks of row tiles that go through one panel behind each other, and the most tiles of one.

        A chunk of A stays in half of the second-level cache; there are enough chunks for the threads.
        """
        most = self._most()
        side = -(-(self.spec.columns or 1) // (self.tile.vectors * self.vectors.lanes)) * (self.spec.batch or 1)
        few = self.threads > 1 and side % self.threads and side < 8 * self.threads
        least = 2 * self.threads if few else 1
        if not isinstance(self.rows, int):
            one = self.const(1)
            tiles = self._over(self.rows, self.const(self.tile.rows))
            chunks = T.max(self._over(tiles, self.const(most)), T.min(tiles, self.const(least)))
            per_chunk = T.max(self._over(tiles, T.max(chunks, one)), one)
            return self._over(tiles, per_chunk), per_chunk
        tiles = -(-self.rows // self.tile.rows)
        chunks = max(min(tiles, least), -(-tiles // most))
        return chunks, -(-tiles // chunks)

    def _most(self) -> int:
        """Tiles of a chunk, at most."""
        most = max(1, self.caches.l2 // 2 // max(1, self.tile.rows * (self.spec.inner or 1024) * 4))
        return most if isinstance(self.rows, int) else min(most, CHUNK)

    def _over(self, a: Expr, b: Expr) -> Expr:
        """a / b, rounded up, where a is not negative."""
        return self._bind(tirx.truncdiv(a + b - self.const(1), b))

    def _bind(self, value: Expr) -> Expr:
        """A number of its own; TVM does not look through one that depends on rows known at run time."""
        return T.Bind(value) if isinstance(self.rows, int) else self.vectors.opaque(value)

    def _panel(
        self, panel: Panel, chunk: Expr, chunks: int | Expr, per_chunk: int | Expr, item: Expr,
        part: Part | None = None,
    ) -> None:
        """All row tiles of one chunk against one panel, or a part of the depth of it."""
        height, const, v = self.tile.rows, self.const, self.vectors
        if isinstance(self.rows, int) and isinstance(chunks, int) and isinstance(per_chunk, int):
            turns = min(per_chunk, -(-self.rows // height))

            def tile(step: Expr, count: int, row: Expr) -> None:
                here = part and part.moved(step * const(height * self.tile.vectors * self.vectors.lanes))
                self._tile(count, panel, row, item, here, (step, turns) if self.spec.packed else None)

            self._row_tiles(chunk, chunks, tile)
            return
        start = self._bind(chunk * const(per_chunk) * const(height))
        stop = self._bind(T.min(start + const(per_chunk) * const(height), self.rows))
        whole = self._bind(tirx.truncdiv(stop - start, const(height)))
        with T.serial(whole) as step:
            turn = (step, self._most()) if self.spec.packed else None
            self._tile(height, panel, T.Bind(start + step * const(height)), item, turn=turn)
        done = T.Bind(start + whole * const(height))
        left = T.Bind(stop - done)
        size = 1 << (height.bit_length() - 1)
        while size:
            # What is left is a sum of powers of two, the largest first.
            with T.If(T.bitwise_and(left, const(size)) != const(0)), T.Then():
                before = T.Bind(done + T.bitwise_and(left, const(-2 * size)))
                self._tile(size, panel, before, item, turn=(const(0), 1) if self.spec.packed and v.isa.ahead else None)
            size //= 2

    def panel_start(self, column: Expr) -> Expr:
        """Offset in B of the packed panel that begins with a column."""
        return column * self.const(self.dot.group) * self.const(self.inner)

    def _far(self, turn: tuple[Expr, int] | None) -> bool:
        """Whether few tiles read a packed panel and most of B comes from far away, and the panels are too few to be the
        streams themselves."""
        if self.tile.beside >= BESIDE:
            return False
        steps, dot = self.spec.inner or 0, self.dot
        size = dot.itemsize * dot.group * steps * (self.spec.columns or 0)
        return turn is not None and turn[1] <= NEAR and size > self.caches.l2 and steps >= PAGE // 16

    def _streams(self, inner: int, width: int, step: Callable[[Expr], None]) -> None:
        """All steps of k, from several places of the depth in turn: a processor fetches several streams ahead of their
        reader at once, and each only to the end of its page, so that one alone does not fill the way to memory."""
        unroll = max(1, self.dot.line // width)
        streams, length = streams_of_depth(
            self.tile.rows, inner, unroll, self.tile.beside, 4 * PAGE // self.dot.itemsize // self.dot.group
        )
        with T.serial(self.const(length // unroll)) as k:
            for stream, u in itertools.product(range(streams), range(unroll)):
                step(k * self.const(unroll) + self.const(stream * length + u))
        repeat(inner - streams * length, UNROLL, lambda k: step(self.const(streams * length) + k), self.index)

    def _panels_ahead(self, starts: Sequence[Expr], width: int) -> Callable[[Expr], None]:
        """What asks for the lines of panels that are read once, some way behind what is read of them: a processor's own
        fetching ends with every page."""
        const, line = self.const, self.dot.line
        far = self.vectors.isa.ahead // self.dot.itemsize

        def ahead(k: Expr) -> None:
            for start, offset in itertools.product(starts, range(0, UNROLL * width, line)):
                self.vectors.prefetch(self.b, start + k * const(width) + const(far + offset))

        return ahead

    def _rows_ahead(
        self, rows: Buffer, start: Expr, height: int, part: Part, before: Callable[[Expr], None] | None
    ) -> Callable[[Expr], None]:
        """`before`, and what asks for the packed rows of the next tile."""
        const = self.const

        def ahead(k: Expr) -> None:
            if before:
                before(k)
            at = T.Bind(start + (part.start + k) * const(height) + const(self.tile.rows * part.depth))
            for first in range(0, UNROLL * height, LINE):
                self.vectors.prefetch(rows, at + const(first))

        return ahead

    def _tile(
        self, height: int, panel: Panel, row: Expr, item: Expr, part: Part | None = None,
        turn: tuple[Expr, int] | None = None,
    ) -> None:
        """`height` rows of one panel, from the first product, or from the sums so far, to the epilogue.

        turn: of the tile among those that go through a packed panel behind each other, and how many these are.
        """
        v, spec, lanes, const, dot = self.vectors, self.spec, self.vectors.lanes, self.const, self.dot
        count = panel.vectors
        accumulators, joined = Accumulators(dot, height, count), spec.joined
        column = T.Bind(panel.number * const(self.tile.vectors * lanes))
        row_of_a = row if spec.shared_a else item * const(self.rows) + row
        rows_of_a, a_start, a_row, a_step = self.a, T.Bind(row_of_a * const(self.inner)), const(self.inner), const(1)
        if part and part.packed is not None:
            assert turn is not None
            rows_of_a, a_row, a_step = part.packed, const(1), const(height)
            a_start = T.Bind(turn[0] * const(self.tile.rows * part.depth) - part.start * a_step)
        width = min(count, self.tile.packed) if spec.packed else count  # vectors that lie behind each other
        b_step: int | Expr = width * dot.width
        if spec.packed:
            b_start = T.Bind(self.panel_start(column))
        else:
            b_step = self.columns if spec.columns is None else spec.columns
            before = const(0) if spec.shared_b else item * const(self.inner) * const(b_step)
            b_start = T.Bind(before + column)

        limits: dict[int, Expr] = {}
        if panel.left is not None:
            for j in range(count):
                most = T.max(T.min(panel.left - const(j * lanes), const(lanes)), const(0))
                limits[j] = v.opaque(most)

        def there_of(j: int) -> int | Expr | None:
            """Lanes of vector j that exist; None: all."""
            return limits.get(j, panel.lanes if j == count - 1 else None)

        def weights(j: int, k: Expr) -> tuple[Expr, int | Expr]:
            """Where those of step k of vector j are, and how far from those of the next step."""
            first = j - j % width
            # The last panel may be narrower.
            step = b_step if first + width <= count else (count - first) * dot.width
            before = const(self.inner) * const(first * dot.width) if first else const(0)
            return b_start + before + k * const(step) + const((j - first) * dot.width), step

        def bytes_step(k: Expr, together: int = 1) -> None:
            for first in range(0, count, width):
                columns = range(first, min(first + width, count))
                b_at, step = weights(first, k)
                for i in range(height):
                    at = a_start + const(i) * a_row + k
                    accumulators.add_bytes(i, self.a, at, self.b, b_at, step, together, columns)

        def step(k: Expr) -> None:
            if joined:
                bytes_step(k)
                return
            bs = []
            for j in range(count):
                at, _ = weights(j, k)
                there = None if spec.packed else there_of(j)
                bs.append(dot.weights(self.b, at) if there is None else v.load(self.b, at, const(there)))
            for i in range(height):
                a = dot.same(rows_of_a, a_start + const(i) * a_row + k * a_step)
                for j in range(count):
                    accumulators.add(i, j, a, bs[j])

        def steps(count: int | Expr, start: Expr | None, ahead: Callable[[Expr], None] | None) -> None:
            def at(k: Expr) -> Expr:
                return k if start is None else start + k

            if joined < 2:
                repeat(count, UNROLL, lambda k: step(at(k)), self.index, ahead)
                return
            pairs = count // 2 if isinstance(count, int) else T.Bind(tirx.floordiv(count, const(2)))
            before = ahead and (lambda k: ahead(k * const(2)))
            repeat(pairs, UNROLL // 2, lambda k: bytes_step(at(k * const(2)), 2), self.index, before)
            if not isinstance(count, int):
                with T.If(pairs * const(2) < count), T.Then():
                    step(at(pairs * const(2)))
            elif count % 2:
                step(at(const(count - 1)))

        def finish() -> None:
            for i in range(height):
                for j in range(count):
                    there = there_of(j)
                    at_row = item * const(self.rows) + row + const(i)
                    self.finish(accumulators.get(i, j), at_row, column + const(j * lanes), there)

        def begin_sums() -> None:
            for j in range(count):
                value = dot.zeros() if self.first is None else v.load(self.first, column + const(j * lanes))
                for i in range(height):
                    accumulators.set(i, j, value)

        ahead: Callable[[Expr], None] | None = None
        if turn is not None and isinstance(self.inner, int):
            begin = T.Bind(b_start + part.start * const(b_step)) if part else b_start
            total = (part.depth if part else self.inner) // UNROLL * UNROLL * b_step
            if turn[1] > NEAR:
                apart = self.inner * b_step if part else None
                ask = v.ahead(self.b, begin, total, UNROLL * b_step, *turn, const, dot.line, apart)
                ahead = ask and (lambda k: ask(begin + k * const(b_step)))
            if part and part.packed is not None:
                ahead = self._rows_ahead(part.packed, a_start, height, part, ahead)
        far = part is None and isinstance(self.inner, int) and self._far(turn)
        asks = v.isa.ahead and self.tile.rows > 1
        if far and asks:
            ahead = self._panels_ahead([weights(j, const(0))[0] for j in range(0, count, width)], b_step)
        begin_sums()
        if part is None:
            if far and isinstance(self.inner, int) and not asks:
                self._streams(self.inner, b_step, step)
            else:
                steps(self.inner, None, ahead)
            finish()
            return
        with T.If(part.begun), T.Then():
            for i, j in itertools.product(range(height), range(count)):
                accumulators.set(i, j, v.load(part.sums, part.at + const((i * count + j) * lanes)))
        steps(part.steps, part.start, ahead)
        with T.If(part.goes_on):
            with T.Then():
                for i, j in itertools.product(range(height), range(count)):
                    v.store(part.sums, part.at + const((i * count + j) * lanes), accumulators.get(i, j))
            with T.Else():
                finish()
