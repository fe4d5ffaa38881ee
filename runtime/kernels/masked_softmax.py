"""Lowerings of the operators whose softmax reads a scaled and masked tensor: `passes/ops/masked_softmax.py`.

The kernel is that of `two_pass_softmax`, which scales and masks each vector of X when it has loaded it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax, tirx

from ...passes.ops.masked_softmax import (
    MASKED_SOFTMAX,
    SCALED_SOFTMAX,
    SELECTED_SOFTMAX,
    TEMPERED_MASKED_SOFTMAX,
    TEMPERED_SELECTED_SOFTMAX,
    TEMPERED_SOFTMAX,
)
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
    scale = float(attrs["scale"])
    if scale == 0:
        raise ByBody("its scale is 0")
    dims = _rows(x)
    given = [x]
    kind, axes = _masked(bb, x, mask, dims, given)
    return _called(bb, given, dims, attrs, target, Source(scale, kind, axes))


@lowers(TEMPERED_SOFTMAX.identifier, kinds=("llvm",))
@lowers(TEMPERED_MASKED_SOFTMAX.identifier, kinds=("llvm",))
@lowers(TEMPERED_SELECTED_SOFTMAX.identifier, kinds=("llvm",))
def lower_tempered(bb: relax.BlockBuilder, inputs: list[Any], attrs: dict[str, Any], target: Target) -> Any:
    """softmax(x · factor under a mask) through the kernel. Raises ByBody for what it is not for."""
    x, factor, mask = inputs if len(inputs) > 2 else (*inputs, None)
    dims = _rows(x)
    factor_axes = _axes("factor", dims, factor.ty.shape)
    if factor_axes[-1]:
        raise ByBody("its factor is not the same along a row")
    given = [x, _of_rank(bb, factor, dims, factor_axes)]
    kind, axes = _masked(bb, x, mask, dims, given)
    source = Source(1.0, kind, axes, str(x.ty.dtype.dtype), factor_axes)
    return _called(bb, given, dims, attrs, target, source)


def _masked(
    bb: relax.BlockBuilder, x: Any, mask: Any, dims: list[Any], given: list[Any]
) -> tuple[str | None, tuple[bool, ...]]:
    """Type and axes of the mask, which is added to what the kernel is given. Raises ByBody for what it is not for."""
    if mask is None:
        return None, ()
    kind = str(mask.ty.dtype.dtype)
    if kind not in (x.ty.dtype.dtype, "bool"):
        raise ByBody("its mask is neither of its type nor of booleans")
    axes = _axes("mask", dims, mask.ty.shape)
    # A last axis of one element has nothing to broadcast.
    if not axes[-1] and not same(dims[-1], 1):
        raise ByBody("its mask is the same along a row")
    axes = (*axes[:-1], True)
    given.append(_of_rank(bb, mask, dims, axes))
    return kind, axes


def _called(
    bb: relax.BlockBuilder, inputs: list[Any], dims: list[Any], attrs: dict[str, Any], target: Target, source: Source
) -> Any:
    sizes = [int(d) if isinstance(d, tirx.IntImm) else None for d in dims]
    dtype, form = str(inputs[0].ty.dtype.dtype), Form(attrs.get("form", Form.AUTO.value))
    kernel = softmax(sizes, target.isa, target.caches, target.cores, form, source=source, types=(dtype, dtype))
    return relax.call_tir(bb.add_func(kernel, SYMBOL), inputs, relax.TensorType(dims, dtype))


def _rows(x: Any) -> list[Any]:
    """The sizes of X. Raises ByBody where the kernel is not for it."""
    if x.ty.dtype.dtype not in COMPUTED:
        raise ByBody(f"it is in {x.ty.dtype.dtype}")
    if not isinstance(x.ty.shape, relax.ShapeExpr) or not len(x.ty.shape.values):
        raise ByBody("its rank is not known")
    return list(x.ty.shape.values)


def _of_rank(bb: relax.BlockBuilder, value: Any, dims: list[Any], axes: Sequence[bool]) -> Any:
    """A mask or factor with as many axes as X has."""
    full = [d if own else 1 for d, own in zip(dims, axes, strict=True)]
    return value if len(value.ty.shape.values) == len(dims) else bb.emit(relax.op.reshape(value, full))


def _axes(what: str, dims: Sequence[Any], shape: Any) -> tuple[bool, ...]:
    """Which axes of X a mask or factor has. Raises ByBody where it is not known to broadcast to X."""
    if not isinstance(shape, relax.ShapeExpr) or len(shape.values) > len(dims):
        raise ByBody(f"its {what} is not known to broadcast to it")
    sizes = [tirx.const(1, "int64")] * (len(dims) - len(shape.values)) + list(shape.values)
    axes = tuple(not (isinstance(size, tirx.IntImm) and int(size) == 1) for size in sizes)
    if any(own and not same(size, dim) for own, size, dim in zip(axes, sizes, dims, strict=True)):
        raise ByBody(f"a size of its {what} is not known to be its own")
    return axes
