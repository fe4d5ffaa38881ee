"""Lowerings of the operators whose softmax reads a scaled and masked tensor: `passes/ops/masked_softmax.py`.

The kernel is that of `two_pass_softmax`, which scales and masks each vector of X when it has loaded it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax, tirx

from ...passes.ops.masked_softmax import MASKED_SOFTMAX, SCALED_SOFTMAX, SELECTED_SOFTMAX
from ...passes.ops.two_pass_softmax import Form
from ..importing.site import ByBody, same
from ..lowering import lowers
from ..target import Target
from .softmax_passes import Source
from .two_pass_softmax import COMPUTED, SYMBOL, softmax


@lowers(SCALED_SOFTMAX.identifier, kinds=("llvm",))
@lowers(MASKED_SOFTMAX.identifier, kinds=("llvm",))
@lowers(SELECTED_SOFTMAX.identifier, kinds=("llvm",))
def lower(bb: relax.BlockBuilder, inputs: list[Any], attrs: dict[str, Any], target: Target) -> Any:
    """softmax(x · scale under a mask) through the kernel. Raises ByBody for what it is not for."""
    x, mask = inputs[0], inputs[1] if len(inputs) > 1 else None
    dtype = str(x.ty.dtype.dtype)
    if dtype not in COMPUTED:
        raise ByBody(f"it is in {dtype}")
    shape, scale = x.ty.shape, float(attrs["scale"])
    if not isinstance(shape, relax.ShapeExpr) or not len(shape.values):
        raise ByBody("its rank is not known")
    if scale == 0:
        raise ByBody("its scale is 0")
    dims = list(shape.values)
    source, given = Source(scale), [x]
    if mask is not None:
        kind = str(mask.ty.dtype.dtype)
        if kind not in (dtype, "bool"):
            raise ByBody("its mask is neither of its type nor of booleans")
        axes = _axes(dims, mask.ty.shape)
        source = Source(scale, kind, axes)
        full = [d if own else 1 for d, own in zip(dims, axes, strict=True)]
        given.append(mask if len(mask.ty.shape.values) == len(dims) else bb.emit(relax.op.reshape(mask, full)))
    sizes = [int(d) if isinstance(d, tirx.IntImm) else None for d in dims]
    form = Form(attrs.get("form", Form.AUTO.value))
    kernel = softmax(sizes, target.isa, target.caches, target.cores, form, source=source, types=(dtype, dtype))
    return relax.call_tir(bb.add_func(kernel, SYMBOL), given, relax.TensorType(dims, dtype))


def _axes(dims: Sequence[Any], shape: Any) -> tuple[bool, ...]:
    """Which axes of X the mask has. Raises ByBody where it is not known to broadcast to X, or lacks the last axis."""
    if not isinstance(shape, relax.ShapeExpr) or len(shape.values) > len(dims):
        raise ByBody("its mask is not known to broadcast to it")
    sizes = [tirx.const(1, "int64")] * (len(dims) - len(shape.values)) + list(shape.values)
    axes = [not (isinstance(size, tirx.IntImm) and int(size) == 1) for size in sizes]
    if any(own and not same(size, dim) for own, size, dim in zip(axes, sizes, dims, strict=True)):
        raise ByBody("a size of its mask is not known to be its own")
    # A last axis of one element has nothing to broadcast.
    if not axes[-1] and not same(dims[-1], 1):
        raise ByBody("its mask is the same along a row")
    return (*axes[:-1], True)
