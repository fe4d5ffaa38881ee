"""Channels of blocked tensors behind each other, or a range of them: whole vectors where blocks stay whole, and
shuffles of two vectors where they do not.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import relax, tirx
from tvm.tirx.script import builder as T

from ..elements import expression, fixed, product
from ..templates import Body, anchor, template
from .vectors import Expr

PARALLEL = 1 << 16  # elements below which a second thread costs more than it gives


@dataclass(frozen=True)
class Piece:
    """Lanes [lane, lane + count) of a block of an input become those from `at` on of a block of the output. block: of
    the input, counted from the number of the output's block."""

    source: int
    block: int
    lane: int
    count: int
    at: int


def pieces(ranges: Sequence[tuple[int, int, int]], lanes: int) -> list[tuple[Piece, ...]]:
    """What each block of the output is made of. ranges: (input, first channel, channels) behind each other."""
    blocks: list[list[Piece]] = []
    channel = 0
    for source, first, count in ranges:
        done = 0
        while done < count:
            (block, at), (own, lane) = divmod(channel, lanes), divmod(first + done, lanes)
            step = min(count - done, lanes - at, lanes - lane)
            if at == 0:
                blocks.append([])
            blocks[-1].append(Piece(source, own - block, lane, step, at))
            done, channel = done + step, channel + step
    return [tuple(block) for block in blocks]


def joined(bb: relax.BlockBuilder, sources: Sequence[Any], ranges: Sequence[tuple[int, int, int]], out: Any) -> Any:
    """The bound result. out: its Relax type, in blocks."""
    return anchor(bb, "channels", {"ranges": ranges}, sources, out)


@template("channels", per_item=True)
def channels(parameters: dict[str, Any], body: Body) -> None:
    """parameters: ranges, as `pieces` takes them."""
    v, index = body.vectors, body.index
    batch, _, *spatial, lanes = body.out_shape
    own_blocks = fixed([shape[1] for shape in body.shapes])
    assert isinstance(lanes, int)
    every = product((batch, *spatial[:-1]))
    rows, columns = (expression(size, index) for size in (product(spatial[:-1]), spatial[-1]))
    known = isinstance(every, int)
    quotient, remainder = v.divisions(known)

    def const(value: int) -> Expr:
        return tirx.const(value, index)

    def place(row: Expr) -> list[Expr]:
        """The axes before the last one."""
        axes = []
        for position, extent in enumerate(spatial[:-1]):
            later = product(spatial[position + 1 : -1])
            before = row if later == 1 else quotient(row, expression(later, index))
            axes.append(before if position == 0 else remainder(before, expression(extent, index)))
        return axes

    size = product(body.out_shape)
    wide = body.target.cores > 1 and (not isinstance(size, int) or size >= PARALLEL) and every != 1
    with (T.parallel if wide else T.serial)(expression(every, index)) as task:
        n, row = quotient(task, rows), remainder(task, rows)
        before = place(row)
        first = 0
        for made, group in itertools.groupby(pieces(parameters["ranges"], lanes)):
            count = len(list(group))
            with T.serial(const(count)) as turn:
                block = T.Bind(turn + const(first))
                starts = [
                    T.Bind((plane * rows + row) * columns * const(lanes))
                    for plane in (n * const(own_blocks[p.source]) + block + const(p.block) for p in made)
                ]
                with T.serial(columns) as column:
                    loaded = [
                        v.load(body.inputs[p.source], start + column * const(lanes))
                        for p, start in zip(made, starts, strict=True)
                    ]
                    value = _joined(made, loaded, lanes)
                    body.store(value, [n, block, *before, column, const(0)], None)
            first += count


def _joined(made: Sequence[Piece], loaded: Sequence[Expr], lanes: int) -> Expr:
    """The vector that the pieces are; lanes that none fills repeat the last one that is filled."""
    value: Expr = None
    for piece, vector in zip(made, loaded, strict=True):
        if value is None and (piece.lane, piece.at) == (0, 0):
            value = vector
            continue
        kept = list(range(piece.at))
        taken = [lanes + piece.lane + j for j in range(piece.count)]
        order = [*kept, *taken, *[taken[-1]] * (lanes - piece.at - piece.count)]
        both = [vector if value is None else value, vector]
        value = T.Bind(tirx.Shuffle(both, [tirx.const(o, "int32") for o in order]))
    return value
