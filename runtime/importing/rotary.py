"""RotaryEmbedding by our kernel, which reads heads where they are."""

from __future__ import annotations

from tvm import relax

from ..kernels.attention_spec import Columns, Layout
from ..kernels.rotary import RotarySpec, rotary
from .heads import BY_HEADS, heads_of, placed, tensor_of
from .kernels import call, for_kernels, named
from .shapes import reshaped
from .site import ByBody, Dim, Result, Site, converts, shape_of
from .views import View


@converts("RotaryEmbedding")
def rotary_embedding(site: Site) -> Result:
    """The kernel for float32 on a CPU, else the standard's body."""
    if not for_kernels(site, 0, 1, 2):
        raise ByBody("it is not in float32, or not on a CPU")
    flat, tabled = site.rank() == 3, site.has(3)
    heads = heads_of(site, 0, "num_heads")
    view, places = placed(site, site.x(), heads, is_key=False)
    batch, _, length, size = view.dims
    assert isinstance(size, int)
    turned = int(site.attr("rotary_embedding_dim", 0)) or size
    angles = [site.x(1), site.x(2)]
    if any(shape_of(a)[-1] * 2 != turned or len(shape_of(a)) != 3 - tabled for a in angles) or turned > size:
        raise ByBody("its angles are not half as many as the elements that are turned")
    rows = [site.x(3)] if tabled else angles
    shared = all(_repeats(View.of(site.bb, x)) for x in rows)
    if shared:
        rows = [_once(site, View.of(site.bb, x)) for x in rows]
    by_columns = flat or isinstance(places, Columns)
    (b, s), table = named((batch, length))[0], shape_of(angles[0])[0]
    spec = RotarySpec(
        b,
        heads,
        s,
        size,
        turned,
        bool(site.attr("interleaved", 0)),
        places,
        Layout.BSM if by_columns else Layout.BHSD,
        table=(table if isinstance(table, int) else "rows") if tabled else None,
        positions=site.dtype(3) if tabled else "int64",
        shared=shared,
    )
    inputs = [tensor_of(site, view, places), *(angles if tabled else []), *rows]
    kernel = rotary(spec, site.target.isa, site.target.cores)
    if not by_columns:
        return call(site, kernel, inputs, [batch, heads, length, size])
    y = call(site, kernel, inputs, [batch, length, heads * size])
    return y if flat else relax.op.permute_dims(reshaped(site, y, [batch, length, heads, size]), BY_HEADS)


def _repeats(view: View) -> bool:
    """Whether every sequence of the batch has the same elements."""
    step, dim = view.strides[0], view.dims[0]
    once = (isinstance(step, int) and step == 0) or (isinstance(dim, int) and dim == 1)
    return once and View(view.base, (1, *view.dims[1:]), view.strides, view.first).whole


def _once(site: Site, view: View) -> relax.Expr:
    dims: list[Dim] = [1, *view.dims[1:]]
    return reshaped(site, view.base, dims)
