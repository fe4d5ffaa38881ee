"""Products with weights in blocks that are stored in two parts: the second is read where the width asks for it.

    Y = A · scale (codes - zero)  +  where wide: A · scale / ratio (rest - middle)

Both parts are codes of equal bits in panels as `gemm_blocks` packs them. Which width holds is known at run time; the
kernel decides once for a panel, so that a narrow product neither computes with the second part nor reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from .gemm_blocks import FewRows, ManyRows, Weights
from .gemm_parts import Panel
from .vectors import Buffer, Expr


@dataclass
class NestedFewRows(FewRows):
    """The product of a few rows. rest: the second part. wide: whether it counts; None: always."""

    rest: Weights | None = None
    wide: Expr | None = None

    def _sum(self, panel: Expr, totals: list[list[Buffer]]) -> None:
        super()._sum(panel, totals)
        assert self.rest is not None
        if self.wide is None:
            self._add(self.rest, panel, totals)
            return
        with T.If(self.wide), T.Then():
            self._add(self.rest, panel, totals)


class NestedManyRows(ManyRows):
    """A product whose panels are unpacked into numbers, from both parts where `wide` holds; None: always."""

    def __init__(self, weights: Weights, rest: Weights, wide: Expr | None, *fields: Any) -> None:
        super().__init__(weights, *fields)
        self.rest, self.wide = rest, wide

    def unpack(self, panel: Panel) -> None:
        super().unpack(panel)
        given = (self.vectors, panel.number, self.tile.vectors, panel.vectors, self.b, self.index)
        if self.wide is None:
            self.rest.unpack(*given, add=True)
            return
        with T.If(self.wide), T.Then():
            self.rest.unpack(*given, add=True)
