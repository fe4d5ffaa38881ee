"""Where the elements of a value are in the tensor that it was sliced, reshaped, transposed or repeated from.

Kernels that read through strides take that tensor itself; what stood between is then unused and vanishes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax

from .site import Dim, made_by, number, product, same, shape_of

DEEPEST = 16  # operators that are followed


@dataclass(frozen=True)
class View:
    """Element (i, j, ...) is element first + i · strides[0] + j · strides[1] + ... of `base`, which is row-major."""

    base: tvm.ir.Expr
    dims: tuple[Dim, ...]
    strides: tuple[Dim, ...]
    first: int = 0

    @classmethod
    def of(cls, bb: relax.BlockBuilder, expr: tvm.ir.Expr, depth: int = DEEPEST) -> View:
        """The view that `expr` is; of itself where it was computed. Raises Refuse where its shape is not known."""
        made = made_by(bb, expr, *STEPS) if depth else None
        if made is not None:
            view = STEPS[made.op.name](cls.of(bb, made.args[0], depth - 1), made, shape_of(expr))
            if view is not None:
                return view
        dims = shape_of(expr)
        return cls(expr, dims, row_major(dims))

    @property
    def whole(self) -> bool:
        """Whether these are all elements of the base, in order."""
        if self.first or not same(product(self.dims), product(shape_of(self.base))):
            return False
        steps = zip(self.dims, self.strides, row_major(self.dims), strict=True)
        return all((isinstance(d, int) and d == 1) or same(have, want) for d, have, want in steps)

    def transposed(self, axes: Sequence[int]) -> View:
        return View(self.base, tuple(self.dims[a] for a in axes), tuple(self.strides[a] for a in axes), self.first)

    def reshaped(self, dims: Sequence[Dim]) -> View | None:
        """The same elements in order under other axes; None where strides cannot express it."""
        old = [(d, s) for d, s in zip(self.dims, self.strides, strict=True) if d != 1]
        strides: list[Dim] = []
        at = 0
        new = list(dims)
        while len(strides) < len(new):
            dim = new[len(strides)]
            if dim == 1:
                strides.append(0)
            elif at < len(old) and same(old[at][0], dim):
                strides.append(old[at][1])
                at += 1
            else:
                group = _group(old, at, new, len(strides))
                if group is None:
                    return None
                at, more = group
                strides += more
        return View(self.base, tuple(new), tuple(strides), self.first) if at == len(old) else None


def row_major(dims: Sequence[Dim]) -> tuple[Dim, ...]:
    """Strides of a tensor whose last axis varies fastest."""
    return tuple(product(dims[axis + 1 :]) for axis in range(len(dims)))


def _group(old: list[tuple[Dim, Dim]], at: int, new: list[Dim], start: int) -> tuple[int, list[Dim]] | None:
    """Strides of the new axes from `start` on that stand for old axes from `at` on, as few as multiply to the same
    number; with them the next old axis. Numbers only."""
    have, want, end, stop = 1, 1, at, start
    while end == at or have != want:
        if have <= want:
            size = old[end][0] if end < len(old) else None
            if not isinstance(size, int) or (end > at and not _follows(old[end - 1], old[end])):
                return None
            have, end = have * size, end + 1
        else:
            size = new[stop] if stop < len(new) else None
            if not isinstance(size, int):
                return None
            want, stop = want * size, stop + 1
    step, strides = old[end - 1][1], []
    for size in reversed(new[start:stop]):
        strides.append(step)
        step = step * size
    return end, strides[::-1]


def _follows(outer: tuple[Dim, Dim], inner: tuple[Dim, Dim]) -> bool:
    return same(outer[1], inner[0] * inner[1])


def _permute(view: View, call: Any, dims: tuple[Dim, ...]) -> View | None:
    axes = call.attrs.axes
    return view.transposed([int(a) for a in axes] if axes is not None else range(len(dims))[::-1])


def _reshape(view: View, call: Any, dims: tuple[Dim, ...]) -> View | None:
    return view.reshaped(dims)


def _slice(view: View, call: Any, dims: tuple[Dim, ...]) -> View | None:
    axes, begins = ([_int(v) for v in call.args[i].fields] for i in (1, 2))
    steps = [_int(v) for v in call.args[4].fields] if len(call.args) > 4 else []
    if any(step != 1 for step in steps):
        return None
    first = view.first
    for axis, begin in zip(axes, begins, strict=True):
        if axis is None or begin is None or begin < 0:
            return None
        stride = view.strides[axis] if begin else 0
        if not isinstance(stride, int):
            return None
        first += begin * stride
    return View(view.base, dims, view.strides, first)


def _broadcast(view: View, call: Any, dims: tuple[Dim, ...]) -> View | None:
    more = len(dims) - len(view.dims)
    had = [(1, 0)] * more + list(zip(view.dims, view.strides, strict=True))
    return View(view.base, dims, tuple(0 if d == 1 else s for d, s in had), view.first)


STEPS: dict[str, Any] = {
    "relax.permute_dims": _permute,
    "relax.reshape": _reshape,
    "relax.strided_slice": _slice,
    "relax.broadcast_to": _broadcast,
}


def _int(value: Any) -> int | None:
    found = number(getattr(value, "value", value))
    return found if isinstance(found, int) else None

