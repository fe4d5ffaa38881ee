"""LSTM, GRU and RNN of float32: all steps of a direction in one kernel, the states in the nearest cache.

What does not depend on the state, X·W + biases, is a product for all steps and comes in as P. A step multiplies the
states of a chunk of sequences with the packed recurrent weights and goes once through the gates. Directions and chunks
of sequences go over threads; the steps follow each other on one.

    LSTM   i, o, f, g = P + H·R      C' = f·C + i·g,  H' = o·h(C')
    GRU    z, r, n = P + H·R         H' = (1 - z)·n + z·H,  where r multiplies H·R of n's part, or H before it
    RNN    H' = f(P + H·R)

Formulas and gate orders are those of the ONNX operator definitions. Names: t step, b sequence, d direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from ...passes.base import Caches
from ..target import InstructionSet
from .functions import sigmoid, tanh
from .gemm import GemmEmitter
from .gemm_spec import GemmSpec, GemmTile, choose_tile, pack, tiles
from .rows import Shape, Size, count_of, flat_kernel
from .vectors import Buffer, Expr, Vectors

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
# Multiply-adds of a whole recurrence below which a second thread costs more than it gives.
PARALLEL = 1 << 18
USUAL_SIZE = 32  # stands for a size that is known only at run time
FEW_ROWS = 4  # sequences that are multiplied together at most, where it is not known how many there are

FUNCTIONS: Mapping[str, Callable[[Vectors, Expr], Expr]] = {
    "sigmoid": sigmoid,
    "tanh": tanh,
    "relu": lambda v, x: T.max(v.splat(0.0), x),  # the constant first: a NaN passes
}


@dataclass(frozen=True)
class RecurrentSpec:
    """One recurrent operator. steps, batch: numbers, or names of sizes that are known at run time.

    activations: f, g, h of the operator's definition, as far as it has them. backwards: of a single direction; of two
    the second one is. reset_after: GRU whose reset gate acts behind the recurrence (linear_before_reset). lengths:
    a tensor says how many steps of each sequence count. hidden_given, cell_given: initial states, else zeros.
    finals: the last states are results too.
    """

    kind: str
    steps: Size
    batch: Size
    hidden: int
    directions: int
    activations: tuple[str, ...]
    backwards: bool = False
    reset_after: bool = False
    lengths: bool = False
    hidden_given: bool = False
    cell_given: bool = False
    finals: bool = False

    @property
    def gates(self) -> int:
        return GATES[self.kind]

    @property
    def parts(self) -> tuple[int, ...]:
        """Columns of the products of a step, in units of the hidden size."""
        return (2, 1) if self.kind == "GRU" and not self.reset_after else (self.gates,)

    def chunks(self, threads: int) -> int:
        """Into how many parts the sequences are cut."""
        most = max(1, threads // self.directions)
        return min(most, self.batch) if isinstance(self.batch, int) else most

    def rows(self, threads: int) -> int | None:
        """Sequences of a chunk; None where chunks differ or the number is known only at run time."""
        if not isinstance(self.batch, int) or self.batch % self.chunks(threads):
            return None
        return self.batch // self.chunks(threads)

    def tile(self, part: int, isa: InstructionSet, threads: int) -> GemmTile:
        """Of few rows where it is not known how many there are: each height is written out."""
        rows, columns, lanes = self.rows(threads), part * self.hidden, Vectors(isa).lanes
        if rows is not None:
            return choose_tile(rows, columns, isa, lanes)
        return next(t for t in tiles(None, columns, isa, lanes, range(isa.registers)) if t.rows <= FEW_ROWS)

    def packed_size(self, part: int, lanes: int) -> int:
        """Elements of one direction's packed weights."""
        return -(-part * self.hidden // lanes) * lanes * self.hidden

    @property
    def flops(self) -> list[Size]:
        """Multiplications and additions, as factors."""
        return [2, self.directions, self.steps, self.batch, self.gates, self.hidden**2]


def pack_recurrence(r: np.ndarray, spec: RecurrentSpec, isa: InstructionSet, threads: int) -> list[np.ndarray]:
    """Recurrent weights, (directions, gates · hidden, hidden), as the kernel reads them: an array a product, with
    one direction behind the other."""
    packed, first = [], 0
    for part in spec.parts:
        columns = [each[first * spec.hidden : (first + part) * spec.hidden].T for each in r]
        tile, lanes = spec.tile(part, isa, threads), Vectors(isa).lanes
        packed.append(np.concatenate([pack(np.ascontiguousarray(each), tile, lanes) for each in columns]))
        first += part
    return packed


def tensor_shapes(spec: RecurrentSpec, isa: InstructionSet, threads: int) -> dict[str, tuple[Shape, str]]:
    """The kernel's parameters in order: name -> (shape, element type); results last."""
    lanes, wide = Vectors(isa).lanes, spec.directions * spec.hidden
    states: Shape = (spec.directions, spec.batch, spec.hidden)
    tensors: dict[str, tuple[Shape, str]] = {"p": ((spec.steps, spec.batch, spec.gates * wide), "float32")}
    for n, part in enumerate(spec.parts):
        tensors[f"r{n}"] = ((spec.directions * spec.packed_size(part, lanes),), "float32")
    if spec.reset_after:
        tensors["bias"] = ((wide,), "float32")
    if spec.lengths:
        tensors["lengths"] = ((spec.batch,), "int32")
    if spec.hidden_given:
        tensors["h0"] = (states, "float32")
    if spec.cell_given:
        tensors["c0"] = (states, "float32")
    tensors["y"] = ((spec.steps, *states), "float32")
    if spec.finals:
        tensors["last_h"] = (states, "float32")
        if spec.kind == "LSTM":
            tensors["last_c"] = (states, "float32")
    return tensors


def recurrent(
    spec: RecurrentSpec, isa: InstructionSet, caches: Caches, threads: int = 1, name: str | None = None
) -> tirx.PrimFunc:
    """A kernel of the parameters that `tensor_shapes` says. name: of the exported symbol; None for a function that
    only its own module calls."""

    def write(v: Vectors, buffers: dict[str, Buffer], size: Callable[[Size], int | Expr], index: str) -> None:
        if 0 not in (spec.batch, spec.steps):
            _Emitter(spec, v, buffers, size(spec.steps), size(spec.batch), index, caches, threads).emit()

    tensors = tensor_shapes(spec, isa, threads)
    return flat_kernel(name or spec.kind.lower(), tensors, isa, write, name is not None, spec.flops)


@dataclass
class _Chunk:
    """Sequences of one direction. rows: how many, as a number where it is known. first: the first one's number.
    weights: of the direction, a buffer a product."""

    direction: Expr
    first: Expr
    rows: int | Expr
    h: Buffer
    c: Buffer | None
    gates: Buffer
    weights: list[Buffer]
    reset: Buffer | None  # r·H, of a GRU whose reset gate acts before the recurrence


@dataclass
class _Emitter:
    spec: RecurrentSpec
    v: Vectors
    buffers: dict[str, Buffer]
    steps: int | Expr
    batch: int | Expr
    index: str
    caches: Caches
    threads: int

    def const(self, value: int | Expr) -> Expr:
        return tirx.const(value, self.index) if isinstance(value, int) else value

    def emit(self) -> None:
        spec, const = self.spec, self.const
        chunks = spec.chunks(self.threads)
        # No variable: what is allocated by it is allocated in front of all of these.
        per = spec.rows(self.threads) or (const(self.batch) + const(chunks - 1)) // const(chunks)
        sizes = (spec.steps, spec.batch, spec.directions * spec.gates * spec.hidden**2)
        work = 1
        for size in sizes:
            work *= size if isinstance(size, int) else USUAL_SIZE
        tasks = spec.directions * chunks
        with (T.parallel if self.threads > 1 and tasks > 1 and work >= PARALLEL else T.serial)(const(tasks)) as task:
            first = T.Bind(task % const(chunks) * const(per))
            rows = per if isinstance(per, int) else T.Bind(T.min(per, const(self.batch) - first))
            direction = T.Bind(task // const(chunks)) if spec.directions > 1 else const(0)
            # Dynamic chunks may be more than there are sequences.
            with T.If(const(rows) > const(0)), T.Then():
                self.chunk(direction, first, per, rows)

    def chunk(self, direction: Expr, first: Expr, per: int | Expr, rows: int | Expr) -> None:
        """All steps; both directions run the same code."""
        spec, hidden = self.spec, self.spec.hidden

        def scratch(columns: int) -> Buffer:
            size = per * columns
            buffer = T.alloc_buffer((size,), "float32", scope="global")
            # TVM cuts a buffer behind the last element that it sees, and of a masked access it sees the first one only.
            T.buffer_store(buffer, T.float32(0), [self.const(size - 1)])
            return buffer

        def weights(number: int, part: int) -> Buffer:
            size = spec.packed_size(part, self.v.lanes)
            whole = self.buffers[f"r{number}"]
            return T.decl_buffer((size,), "float32", data=whole.data, elem_offset=direction * self.const(size))

        chunk = _Chunk(
            direction,
            first,
            rows,
            scratch(hidden),
            scratch(hidden) if spec.kind == "LSTM" else None,
            scratch(spec.gates * hidden),
            [weights(number, part) for number, part in enumerate(spec.parts)],
            scratch(hidden) if len(spec.parts) > 1 else None,
        )
        self.begin(chunk)
        with T.serial(self.const(self.steps)) as turn:
            back = self.const(self.steps) - self.const(1) - turn
            t = T.Bind(back) if spec.backwards else turn
            if spec.directions > 1:
                t = T.Bind(T.Select(direction == self.const(1), back, turn))
            self.step(chunk, t)
        if spec.finals:
            self.end(chunk)

    def begin(self, chunk: _Chunk) -> None:
        """The initial states."""
        v, hidden = self.v, self.spec.hidden
        for state, name, given in ((chunk.h, "h0", self.spec.hidden_given), (chunk.c, "c0", self.spec.cell_given)):
            if state is None:
                continue
            with T.serial(self.const(chunk.rows)) as b:
                at, from_ = T.Bind(b * self.const(hidden)), self.of_states(chunk, b)
                for j, part in self.columns():
                    value = v.load(self.buffers[name], from_ + j, part) if given else v.splat(0.0)
                    v.store(state, at + j, value, part)

    def end(self, chunk: _Chunk) -> None:
        """The last states."""
        v = self.v
        for state, name in ((chunk.h, "last_h"), (chunk.c, "last_c")):
            if state is None:
                continue
            with T.serial(self.const(chunk.rows)) as b:
                at, to = T.Bind(b * self.const(self.spec.hidden)), self.of_states(chunk, b)
                for j, part in self.columns():
                    v.store(self.buffers[name], to + j, v.load(state, at + j, part), part)

    def of_states(self, chunk: _Chunk, b: Expr) -> Expr:
        """Offset in a tensor (directions, batch, hidden)."""
        row = chunk.direction * self.const(self.batch) + chunk.first + b
        return T.Bind(row * self.const(self.spec.hidden))

    def columns(self) -> Iterator[tuple[Expr, Expr | None]]:
        """Inside loops where they pay: the first hidden unit of each vector, and how many it has, None for all."""
        lanes, hidden = self.v.lanes, self.spec.hidden
        if hidden >= lanes:
            with T.serial(self.const(hidden // lanes)) as turn:
                yield T.Bind(turn * self.const(lanes)), None
        if hidden % lanes:
            yield self.const(hidden - hidden % lanes), self.const(hidden % lanes)

    def product(self, chunk: _Chunk, a: Buffer, number: int) -> None:
        """gates[part `number`] = a · R."""
        spec, v, hidden = self.spec, self.v, self.spec.hidden
        part, before = spec.parts[number], sum(spec.parts[:number])

        def finish(value: Expr, row: Expr, column: Expr, there: int | None) -> None:
            at = row * self.const(spec.gates * hidden) + column + self.const(before * hidden)
            v.store(chunk.gates, T.Bind(at), value, count_of(there, self.index))

        rows = chunk.rows if isinstance(chunk.rows, int) else None
        GemmEmitter(
            v, GemmSpec(rows, hidden, part * hidden), spec.tile(part, v.isa, self.threads), chunk.rows, hidden, 1, a,
            chunk.weights[number], finish, 1, self.caches, self.index,
        ).emit()  # fmt: skip

    def step(self, chunk: _Chunk, t: Expr) -> None:
        self.product(chunk, chunk.h, 0)
        if chunk.reset is not None:
            self.each(chunk, t, lambda cell: self.reset(chunk, cell))
            self.product(chunk, chunk.reset, 1)
        update = {"LSTM": self.lstm, "GRU": self.gru, "RNN": self.rnn}[self.spec.kind]
        self.each(chunk, t, lambda cell: self.running(chunk, cell, update))

    def each(self, chunk: _Chunk, t: Expr, body: Callable[[_Cell], None]) -> None:
        spec, const = self.spec, self.const
        with T.serial(const(chunk.rows)) as b:
            number = T.Bind(chunk.first + b)
            gates = spec.gates * spec.hidden
            p = (t * const(self.batch) + number) * const(spec.directions) + chunk.direction
            y = (t * const(spec.directions) + chunk.direction) * const(self.batch) + number
            cell = _Cell(
                number, t, T.Bind(p * const(gates)), T.Bind(b * const(gates)), T.Bind(b * const(spec.hidden)),
                T.Bind(y * const(spec.hidden)),
            )  # fmt: skip
            body(cell)

    def running(self, chunk: _Chunk, cell: _Cell, update: Callable[[_Chunk, _Cell], None]) -> None:
        """The update of a sequence; one that has ended keeps its states, and its result is 0."""
        if not self.spec.lengths:
            update(chunk, cell)
            return
        with T.If(cell.t < T.Cast(self.index, self.buffers["lengths"][cell.number])):
            with T.Then():
                update(chunk, cell)
            with T.Else():
                for j, part in self.columns():
                    self.v.store(self.buffers["y"], cell.y + j, self.v.splat(0.0), part)

    # -- gates -----------------------------------------------------------------------------------------------

    def gate(self, chunk: _Chunk, cell: _Cell, number: int, j: Expr, part: Expr | None) -> Expr:
        """P + H·R of one gate."""
        return T.Bind(self.given(cell, number, j, part) + self.computed(chunk, cell, number, j, part))

    def given(self, cell: _Cell, number: int, j: Expr, part: Expr | None) -> Expr:
        return self.v.load(self.buffers["p"], cell.p + j + self.const(number * self.spec.hidden), part)

    def computed(self, chunk: _Chunk, cell: _Cell, number: int, j: Expr, part: Expr | None) -> Expr:
        return self.v.load(chunk.gates, cell.gates + j + self.const(number * self.spec.hidden), part)

    def activate(self, number: int, x: Expr) -> Expr:
        return T.Bind(FUNCTIONS[self.spec.activations[number]](self.v, x))

    def store(self, chunk: _Chunk, cell: _Cell, j: Expr, part: Expr | None, h: Expr) -> None:
        self.v.store(chunk.h, cell.state + j, h, part)
        self.v.store(self.buffers["y"], cell.y + j, h, part)

    def lstm(self, chunk: _Chunk, cell: _Cell) -> None:
        v = self.v
        assert chunk.c is not None
        for j, part in self.columns():
            i, o, f = (self.activate(0, self.gate(chunk, cell, number, j, part)) for number in range(3))
            new = self.activate(1, self.gate(chunk, cell, 3, j, part))
            c = T.Bind(v.fma(f, v.load(chunk.c, cell.state + j, part), i * new))
            v.store(chunk.c, cell.state + j, c, part)
            self.store(chunk, cell, j, part, T.Bind(o * self.activate(2, c)))

    def reset(self, chunk: _Chunk, cell: _Cell) -> None:
        """r·H, which the recurrence of the new state starts from."""
        assert chunk.reset is not None
        for j, part in self.columns():
            r = self.activate(0, self.gate(chunk, cell, 1, j, part))
            h = self.v.load(chunk.h, cell.state + j, part)
            self.v.store(chunk.reset, cell.state + j, T.Bind(r * h), part)

    def gru(self, chunk: _Chunk, cell: _Cell) -> None:
        v = self.v
        for j, part in self.columns():
            z = self.activate(0, self.gate(chunk, cell, 0, j, part))
            inner = self.computed(chunk, cell, 2, j, part)
            if self.spec.reset_after:
                r = self.activate(0, self.gate(chunk, cell, 1, j, part))
                at = chunk.direction * self.const(self.spec.hidden) + j
                inner = T.Bind(r * (inner + v.load(self.buffers["bias"], at, part)))
            new = self.activate(1, T.Bind(self.given(cell, 2, j, part) + inner))
            h = v.load(chunk.h, cell.state + j, part)
            self.store(chunk, cell, j, part, T.Bind(v.fma(z, h - new, new)))

    def rnn(self, chunk: _Chunk, cell: _Cell) -> None:
        for j, part in self.columns():
            self.store(chunk, cell, j, part, self.activate(0, self.gate(chunk, cell, 0, j, part)))


@dataclass(frozen=True)
class _Cell:
    """One step of one sequence: its number in the batch, and offsets in P, the gates, the states and Y."""

    number: Expr
    t: Expr
    p: Expr
    gates: Expr
    state: Expr
    y: Expr
