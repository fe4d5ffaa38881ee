"""Values of attention heads as views (b, h, s, d), and how kernels read them from where they are."""

from __future__ import annotations

from typing import Any

import tvm

from ..kernels.attention_spec import Columns, Layout, Places
from .shapes import reshaped
from .site import ByBody, Dim, Site, product, same, shape_of
from .views import DEEPEST, View

BY_HEADS = [0, 2, 1, 3]  # (b, s, h, d) to (b, h, s, d) and back


def heads_of(site: Site, index: int, name: str) -> int:
    heads: Any = site.attr(name) if site.rank(index) == 3 else site.shape(index)[1]
    if not isinstance(heads, int) or heads < 1:
        raise ByBody("the number of its heads is not known")
    return heads


def share(width: Dim, heads: int) -> int:
    if not isinstance(width, int) or width % heads:
        raise ByBody("its head sizes are not known")
    return width // heads


def placed(site: Site, x: tvm.ir.Expr, heads: int, is_key: bool) -> tuple[View, Places]:
    """A value of three or four axes as a view (b, h, s, d) that the kernel can read, and how it reads it."""
    dims = shape_of(x)
    for depth in (DEEPEST, 0):
        view: View | None = View.of(site.bb, x, depth)
        if view is not None and len(dims) == 3:
            apart = view.reshaped([*dims[:2], heads, share(dims[2], heads)])
            view = apart.transposed(BY_HEADS) if apart is not None else None
        places = _places(view, is_key) if view is not None else None
        if view is not None and places is not None:
            return view, places
    raise ByBody("its elements lie in an unusual order")


def _columns(view: View) -> Columns | None:
    """A view (b, h, s, d) whose heads are columns of rows, of which the base is full."""
    batch, _, length, _ = view.dims
    rows, head, pitch, step = view.strides
    if not isinstance(step, int) or step > 1 or not isinstance(pitch, int) or not isinstance(head, int) or pitch < 1:
        return None
    if not (isinstance(batch, int) and batch == 1) and not same(rows, product([length, pitch])):
        return None
    full = same(product(shape_of(view.base)), product([batch, length, pitch]))
    return Columns(pitch, head, view.first) if full else None


def _places(view: View, is_key: bool) -> Places | None:
    """How a kernel reads a view (b, h, s, d), if it can."""
    if not isinstance(view.dims[1], int) or not isinstance(view.dims[3], int):
        return None
    if view.whole:
        return Layout.BHSD
    if is_key and view.transposed([0, 1, 3, 2]).whole:
        return Layout.BHDS
    return _columns(view)


def tensor_of(site: Site, view: View, places: Places) -> tvm.ir.Expr:
    """What a kernel reads, in the shape that it wants."""
    batch, heads, length, size = view.dims
    return reshaped(site, view.base, places.shape(batch, int(heads), length, int(size)))
