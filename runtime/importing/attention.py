"""Attention by our fused kernel, which reads queries, keys, values and mask where they are."""

from __future__ import annotations

import functools
import math

import tvm
from tvm import relax, tirx

from ..kernels.attention import attention
from ..kernels.attention_spec import AttentionSpec, Causal, Layout, Mask
from ..target import Target
from .heads import BY_HEADS, heads_of, placed, share, tensor_of
from .kernels import for_kernels
from .shapes import broadcast, reshaped
from .site import ByBody, Dim, Result, Site, converts, dtype_of, int64, same, shape_of
from .views import View, row_major


@converts("Attention")
def attention_(site: Site) -> Result:
    """The fused kernel where it takes the form, else the standard's body."""
    _check(site)
    flat = site.rank(0) == 3
    heads = [heads_of(site, i, name) for i, name in ((0, "q_num_heads"), (1, "kv_num_heads"), (2, "kv_num_heads"))]
    given, presents = [site.x(i) for i in range(3)], []
    if site.has(4):
        presents = [_with_past(site, site.x(i + 3), given[i], heads[i]) for i in (1, 2)]
        given[1:] = presents
    (q, q_at), (k, k_at), (v, v_at) = (placed(site, x, heads[i], is_key=i == 1) for i, x in enumerate(given))
    (batch, _, queries, size), (_, _, keys, key_size), (*_, value_size) = q.dims, k.dims, v.dims
    if not isinstance(size, int) or not isinstance(value_size, int) or key_size != size:
        raise ByBody("its head sizes are not known")
    mask, kind, axes = _mask(site, [batch, heads[0], queries, keys])
    causal = Causal.NO
    if site.attr("is_causal", 0):
        causal = Causal.END if presents else Causal.START
        if presents and not same(_length(site.x(1)), queries):
            raise ByBody("it has more new keys than queries, or fewer")
    lengths = _lengths(site, batch)
    if lengths is not None and causal is not Causal.NO:
        causal = Causal.END
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
        lengths=lengths is not None,
        q=q_at,
        k=k_at,
        v=v_at,
        y=Layout.BSM,
    )
    function = site.bb.add_func(_kernel(spec, site.target), "attention")
    out = relax.TensorType([int64(d) for d in (batch, queries, heads[0] * value_size)], "float32")
    inputs = [_wide(site, tensor_of(site, *side)) for side in ((q, q_at), (k, k_at), (v, v_at))]
    inputs += [x for x in (mask, lengths) if x is not None]
    y = site.emit(relax.call_tir(function, inputs, out))
    if dtype_of(given[0]) == "float16":
        y = site.emit(relax.op.astype(y, "float16"))
    if not flat:
        y = reshaped(site, y, [batch, queries, heads[0], value_size])
        y = site.emit(relax.op.permute_dims(y, BY_HEADS))
    return [y, *presents]


@functools.lru_cache(maxsize=64)
def _kernel(spec: AttentionSpec, target: Target) -> tirx.PrimFunc:
    return attention(spec, target.isa, target.caches, target.cores)


def _check(site: Site) -> None:
    """Raises ByBody for what the kernel has no words for."""
    given = [site.x(i) for i in (0, 1, 2, 4, 5) if site.has(i)]
    half = all(dtype_of(x) == "float16" and isinstance(x.ty.shape, relax.ShapeExpr) for x in given)
    if not (half or for_kernels(site, 0, 1, 2, 4, 5)) or not site.target.is_cpu:
        raise ByBody("it is not in float32 or float16, or not on a CPU")
    if site.outputs > (3 if site.has(4) else 1) or site.has(4) != site.has(5):
        raise ByBody("it gives the products")
    if any(int(site.attr(name, -1)) != -1 for name in ("left_window_size", "right_window_size")):
        raise ByBody("it sees a window")
    if int(site.attr("softmax_precision", 1)) not in (0, 1) or float(site.attr("softcap", 0.0)) < 0:
        raise ByBody("it computes in another precision")


def _wide(site: Site, x: tvm.ir.Expr) -> tvm.ir.Expr:
    """A tensor of float16 in float32, in which the kernel adds up and takes its softmax."""
    return site.emit(relax.op.astype(x, "float32")) if dtype_of(x) == "float16" else x


def _lengths(site: Site, batch: Dim) -> tvm.ir.Expr | None:
    """How many keys there are in each batch, where the node is told."""
    if not site.has(6):
        return None
    lengths = site.x(6)
    if dtype_of(lengths) != "int64" or len(shape_of(lengths)) != 1 or not same(shape_of(lengths)[0], batch):
        raise ByBody("the counts of its keys are not one for each batch")
    return lengths


def _length(x: tvm.ir.Expr) -> Dim:
    """Positions of a value of three or four axes."""
    return shape_of(x)[-2]


def _with_past(site: Site, past: tvm.ir.Expr, new: tvm.ir.Expr, heads: int) -> tvm.ir.Expr:
    dims = shape_of(new)
    if len(dims) == 3:
        apart = reshaped(site, new, [*dims[:2], heads, share(dims[2], heads)])
        new = site.emit(relax.op.permute_dims(apart, BY_HEADS))
    return site.emit(relax.op.concat([past, new], axis=2))


def _known(dim: Dim) -> int | None:
    return dim if isinstance(dim, int) else None


def _mask(site: Site, whole: list[Dim]) -> tuple[tvm.ir.Expr | None, Mask, tuple[bool, bool, bool]]:
    """The mask with four axes, of which those along which it does not change have one element."""
    if not site.has(3):
        return None, Mask.NO, (False, False, False)
    mask = site.x(3)
    if dtype_of(mask) not in ("float32", "float16", "bool") or not isinstance(mask.ty.shape, relax.ShapeExpr):
        raise ByBody("its mask is of another type")
    kind = Mask.KEEP if dtype_of(mask) == "bool" else Mask.ADDED
    for view in (View.of(site.bb, mask), View(mask, shape_of(mask), row_major(shape_of(mask)))):
        dims: list[Dim] = [1] * (4 - len(view.dims)) + list(view.dims)
        strides: list[Dim] = [0] * (4 - len(view.dims)) + list(view.strides)
        if any(isinstance(d, int) and isinstance(w, int) and d not in (1, w) for d, w in zip(dims, whole, strict=True)):
            raise ByBody("its mask is shorter than the keys")
        small: list[Dim] = [1 if isinstance(s, int) and s == 0 else d for d, s in zip(dims, strides, strict=True)]
        if View(view.base, tuple(small), tuple(strides), view.first).whole:
            axes = [not (isinstance(d, int) and d == 1) for d in small]
            tensor = _wide(site, reshaped(site, view.base, small))
            if not axes[3]:
                tensor = broadcast(site, tensor, [*small[:3], whole[3]])
            return tensor, kind, (axes[0], axes[1], axes[2])
    raise ByBody("its mask lies in an unusual order")
