"""What the loops of a matrix product are cut into: panels of columns, parts of the depth, steps written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tvm import tirx
from tvm.tirx.script import builder as T

from .vectors import Buffer, Expr


@dataclass(frozen=True)
class Part:
    """Steps [start, start + steps) of k, `depth` of them except in the last part. Its tile's sums are at `at` of
    `sums`: begun: from an earlier part; goes_on: for a later one. packed: these steps of A (`GemmEmitter`); None: where
    they are."""

    start: Expr
    steps: int | Expr
    depth: int
    sums: Buffer
    at: Expr
    begun: Expr
    goes_on: Expr
    packed: Buffer | None

    def moved(self, by: Expr) -> Part:
        return replace(self, at=T.Bind(self.at + by))


@dataclass(frozen=True)
class Panel:
    """Columns that one tile covers. lanes: how many of the last vector exist, None for all. left: columns that there
    are, where that is known at run time only and they are fewer than the vectors hold."""

    number: Expr
    vectors: int
    lanes: int | None
    left: Expr | None = None


def repeat(
    count: int | Expr,
    unroll: int,
    body: Callable[[Expr], None],
    index: str,
    before: Callable[[Expr], None] | None = None,
) -> None:
    """`body(k)` for k below `count`, `unroll` of them written out in each turn of the loop, which begins with
    `before(k)`."""

    def const(value: int) -> Expr:
        return tirx.const(value, index)

    if isinstance(count, int):
        whole = count // unroll
        if whole > 1:
            with T.serial(const(whole)) as outer:
                first = T.Bind(outer * const(unroll))
                if before:
                    before(first)
                for u in range(unroll):
                    body(first + const(u))
        for k in range(whole * unroll if whole > 1 else 0, count):
            body(const(k))
        return
    whole = T.Bind(tirx.floordiv(count, const(unroll)))
    with T.serial(whole) as outer:
        first = T.Bind(outer * const(unroll))
        if before:
            before(first)
        for u in range(unroll):
            body(first + const(u))
    done = T.Bind(whole * const(unroll))
    with T.serial(count - done) as k:
        body(done + k)
