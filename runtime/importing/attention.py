"""Attention by our fused kernel, which reads queries, keys, values and mask where they are."""

from __future__ import annotations

import functools
import math
from typing import Any

import tvm
from tvm import relax, tirx

from ..kernels.attention import attention
from ..kernels.attention_spec import AttentionSpec, Causal, Columns, Layout, Mask, Places
from ..target import Target
from .kernels import for_kernels
from .shapes import broadcast, reshaped
from .site import ByBody, Dim, Result, Site, converts, dtype_of, int64, product, same, shape_of
from .views import DEEPEST, View, row_major

BY_HEADS = [0, 2, 1, 3]  # (b, s, h, d) to (b, h, s, d) and back


@converts("Attention")
def attention_(site: Site) -> Result:
    """The fused kernel where it takes the form, else the standard's body."""
    _check(site)
    flat = site.rank(0) == 3
    heads = [_heads(site, i, name) for i, name in ((0, "q_num_heads"), (1, "kv_num_heads"), (2, "kv_num_heads"))]
    given, presents = [site.x(i) for i in range(3)], []
    if site.has(4):
        presents = [_with_past(site, site.x(i + 3), given[i], heads[i]) for i in (1, 2)]
        given[1:] = presents
    (q, q_at), (k, k_at), (v, v_at) = (_placed(site, x, heads[i], is_key=i == 1) for i, x in enumerate(given))
    (batch, _, queries, size), (_, _, keys, key_size), (*_, value_size) = q.dims, k.dims, v.dims
    if not isinstance(size, int) or not isinstance(value_size, int) or key_size != size:
        raise ByBody("its head sizes are not known")
    mask, kind, axes = _mask(site, [batch, heads[0], queries, keys])
    causal = Causal.NO
    if site.attr("is_causal", 0):
        causal = Causal.END if presents else Causal.START
        if presents and not same(_length(site.x(1)), queries):
            raise ByBody("it has more new keys than queries, or fewer")
    scale = site.attr("scale")
    spec = AttentionSpec(
        heads[0],
        size,
        1 / math.sqrt(size) if scale is None else float(scale),
        batch=_known(batch),
        queries=_known(queries),
        keys=_known(keys),
        kv_heads=heads[1],
        value_size=value_size,
        causal=causal,
        mask=kind,
        mask_axes=axes,
        softcap=float(site.attr("softcap", 0.0)),
        q=q_at,
        k=k_at,
        v=v_at,
        y=Layout.BSM,
    )
    function = site.bb.add_func(_kernel(spec, site.target), "attention")
    out = relax.TensorType([int64(d) for d in (batch, queries, heads[0] * value_size)], "float32")
    inputs = [_tensor(site, *side) for side in ((q, q_at), (k, k_at), (v, v_at))]
    y = site.emit(relax.call_tir(function, [*inputs, mask] if mask is not None else inputs, out))
    if not flat:
        y = reshaped(site, y, [batch, queries, heads[0], value_size])
        y = site.emit(relax.op.permute_dims(y, BY_HEADS))
    return [y, *presents]


@functools.lru_cache(maxsize=64)
def _kernel(spec: AttentionSpec, target: Target) -> tirx.PrimFunc:
    return attention(spec, target.isa, target.caches, target.cores)


def _check(site: Site) -> None:
    """Raises ByBody for what the kernel has no words for."""
    if not for_kernels(site, 0, 1, 2, 4, 5) or not site.target.is_cpu:
        raise ByBody("it is not in float32, or not on a CPU")
    if site.has(6) or site.outputs > (3 if site.has(4) else 1) or site.has(4) != site.has(5):
        raise ByBody("it gives the products, or is told how many keys there are")
    if any(int(site.attr(name, -1)) != -1 for name in ("left_window_size", "right_window_size")):
        raise ByBody("it sees a window")
    if int(site.attr("softmax_precision", 1)) not in (0, 1) or float(site.attr("softcap", 0.0)) < 0:
        raise ByBody("it computes in another precision")


def _heads(site: Site, index: int, name: str) -> int:
    heads: Any = site.attr(name) if site.rank(index) == 3 else site.shape(index)[1]
    if not isinstance(heads, int) or heads < 1:
        raise ByBody("the number of its heads is not known")
    return heads


def _length(x: tvm.ir.Expr) -> Dim:
    """Positions of a value of three or four axes."""
    return shape_of(x)[-2]


def _with_past(site: Site, past: tvm.ir.Expr, new: tvm.ir.Expr, heads: int) -> tvm.ir.Expr:
    dims = shape_of(new)
    if len(dims) == 3:
        apart = reshaped(site, new, [*dims[:2], heads, _share(dims[2], heads)])
        new = site.emit(relax.op.permute_dims(apart, BY_HEADS))
    return site.emit(relax.op.concat([past, new], axis=2))


def _share(width: Dim, heads: int) -> int:
    if not isinstance(width, int) or width % heads:
        raise ByBody("its head sizes are not known")
    return width // heads


def _placed(site: Site, x: tvm.ir.Expr, heads: int, is_key: bool) -> tuple[View, Places]:
    """A value of three or four axes as a view (b, h, s, d) that the kernel can read, and how it reads it."""
    dims = shape_of(x)
    for depth in (DEEPEST, 0):
        view: View | None = View.of(site.bb, x, depth)
        if view is not None and len(dims) == 3:
            apart = view.reshaped([*dims[:2], heads, _share(dims[2], heads)])
            view = apart.transposed(BY_HEADS) if apart is not None else None
        places = _places(view, is_key) if view is not None else None
        if view is not None and places is not None:
            return view, places
    raise ByBody("its elements lie in an unusual order")


def _known(dim: Dim) -> int | None:
    return dim if isinstance(dim, int) else None


def _one(dim: Dim) -> bool:
    return isinstance(dim, int) and dim == 1


def _whole(view: View, dims: Any) -> bool:
    """Whether the base holds exactly as many elements as a tensor of these dimensions."""
    return view.first == 0 and same(product(shape_of(view.base)), product(dims))


def _columns(view: View) -> Columns | None:
    """A view (b, h, s, d) whose heads are columns of rows, of which the base is full."""
    batch, _, length, _ = view.dims
    rows, head, pitch, one = view.strides
    if not isinstance(one, int) or one > 1 or not isinstance(pitch, int) or not isinstance(head, int) or pitch < 1:
        return None
    if not _one(batch) and not same(rows, product([length, pitch])):
        return None
    full = same(product(shape_of(view.base)), product([batch, length, pitch]))
    return Columns(pitch, head, view.first) if full else None


def _places(view: View, is_key: bool) -> Places | None:
    """How the kernel reads a view (b, h, s, d), if it can."""
    _, heads, length, size = view.dims
    if not isinstance(heads, int) or not isinstance(size, int):
        return None
    if _whole(view, view.dims):
        for layout in (Layout.BHSD, Layout.BHDS) if is_key else (Layout.BHSD,):
            steps = layout.strides(heads, length, size)
            have = zip(view.dims, view.strides, "bhsd", strict=True)
            if all(_one(d) or same(step, steps[axis]) for d, step, axis in have):
                return layout
    return _columns(view)


def _tensor(site: Site, view: View, places: Places) -> tvm.ir.Expr:
    """What the kernel reads, in the shape that it wants."""
    batch, heads, length, size = view.dims
    return reshaped(site, view.base, places.shape(batch, int(heads), length, int(size)))


def _mask(site: Site, whole: list[Dim]) -> tuple[tvm.ir.Expr | None, Mask, tuple[bool, bool, bool]]:
    """The mask with four axes, of which those along which it does not change have one element."""
    if not site.has(3):
        return None, Mask.NO, (False, False, False)
    mask = site.x(3)
    if dtype_of(mask) not in ("float32", "bool") or not isinstance(mask.ty.shape, relax.ShapeExpr):
        raise ByBody("its mask is of another type")
    kind = Mask.KEEP if dtype_of(mask) == "bool" else Mask.ADDED
    for view in (View.of(site.bb, mask), View(mask, shape_of(mask), row_major(shape_of(mask)))):
        dims: list[Dim] = [1] * (4 - len(view.dims)) + list(view.dims)
        strides: list[Dim] = [0] * (4 - len(view.dims)) + list(view.strides)
        if any(isinstance(d, int) and isinstance(w, int) and d not in (1, w) for d, w in zip(dims, whole, strict=True)):
            raise ByBody("its mask is shorter than the keys")
        small: list[Dim] = [1 if isinstance(s, int) and s == 0 else d for d, s in zip(dims, strides, strict=True)]
        row = row_major(small)
        ordered = all(_one(d) or same(s, r) for d, s, r in zip(small, strides, row, strict=True))
        if ordered and _whole(view, small):
            axes = [not _one(d) for d in small]
            tensor = reshaped(site, view.base, small)
            if not axes[3]:
                tensor = broadcast(site, tensor, [*small[:3], whole[3]])
            return tensor, kind, (axes[0], axes[1], axes[2])
    raise ByBody("its mask lies in an unusual order")
