"""The blocked layout: (N, C, H, W) kept as (N, ceil(C / L), H, W, L), one vector of L channels behind each other.

Lanes beyond C hold numbers that are finite where the image is: weights of the next convolution are zero there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx
from tvm.ir import TensorLoad

from .elements import NotElementwise, nest_of, renamed, size_of

IMAGES = ("float32", "int8", "uint8", "uint16")  # types of images that are kept in blocks
CHANNEL = 1  # the axis that is cut into blocks

# Functions that stay finite for every finite argument; others may not see the lanes beyond C.
FINITE = frozenset({"tanh", "sigmoid", "erf", "fabs", "abs", "floor", "ceil", "trunc", "nearbyint", "round"})
DIVISIONS = (tirx.Div, tirx.Mod, tirx.FloorDiv, tirx.FloorMod)


def blocked_shape(shape: Sequence[Any], lanes: int) -> list[Any]:
    """Shape in blocks of a tensor whose axis 1 are channels."""
    n, c, *rest = shape
    return [n, -(-int(c) // lanes), *rest, lanes]


def blocked_array(array: np.ndarray, lanes: int) -> np.ndarray:
    """An array (N, C, ...) in blocks. Lanes beyond C repeat the last channel, so that they are as harmless as it is."""
    n, c, *rest = array.shape
    missing = -c % lanes
    if missing:
        array = np.concatenate([array, np.repeat(array[:, -1:], missing, axis=1)], axis=1)
    split = array.reshape(n, (c + missing) // lanes, lanes, *rest)
    return np.ascontiguousarray(np.moveaxis(split, 2, -1))


def rebuilt(
    e: Any, variables: Mapping[Any, Any], load: Callable[[TensorLoad, list[Any]], Any], safe: bool = True
) -> Any:
    """A TIR expression with other variables and loads. safe: refuse what could make finite numbers infinite."""
    if e in variables:
        return variables[e]
    if isinstance(e, TensorLoad):
        return load(e, [rebuilt(i, variables, load, False) for i in e.indices])
    if isinstance(e, tirx.FloatImm) and safe and not math.isfinite(e.value):
        raise NotElementwise("it computes with what is not finite")
    if isinstance(e, tirx.IntImm | tirx.FloatImm):
        return e
    if isinstance(e, tirx.Cast):
        return tirx.Cast(str(e.ty.dtype), rebuilt(e.value, variables, load, safe))
    if isinstance(e, tirx.Select):
        parts = (rebuilt(p, variables, load, safe) for p in (e.condition, e.true_value, e.false_value))
        return tirx.Select(*parts)
    if isinstance(e, DIVISIONS) and safe and not (isinstance(e.b, tirx.FloatImm | tirx.IntImm) and e.b.value):
        raise NotElementwise("it divides")
    if hasattr(e, "a") and hasattr(e, "b"):
        return type(e)(rebuilt(e.a, variables, load, safe), rebuilt(e.b, variables, load, safe))
    if isinstance(e, tirx.Not):
        return tirx.Not(rebuilt(e.a, variables, load, safe))
    if isinstance(e, tvm.ir.Call) and isinstance(e.op, tvm.ir.Op):
        name = str(e.op.name).rpartition(".")[2]
        if safe and name not in FINITE and str(e.ty.dtype) != "uint32":
            raise NotElementwise(f"it calls {name}")
        arguments = [rebuilt(a, variables, load, safe) for a in e.args]
        return tvm.ir.Call(e.op, arguments, e.attrs, list(e.ty_args), None, e.ty)
    raise NotElementwise(f"it computes a {type(e).__name__}")


def _finite(array: np.ndarray) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def first_channel(function: tirx.PrimFunc) -> int | None:
    """The first channel of a function that is a range of its input's channels; None for other functions."""
    try:
        nest = nest_of(function)
    except NotElementwise:
        return None
    if not isinstance(nest.value, TensorLoad) or len(nest.extents) < 3 or str(nest.value.ty.dtype) not in IMAGES:
        return None
    shape = nest.parameters[0].shape
    if len(shape) != len(nest.extents):
        return None
    analyzer = tvm.sym.Analyzer()
    offsets = [analyzer.simplify(i - a) for i, a in zip(nest.value.indices, nest.axes, strict=True)]
    for axis, (offset, extent, size) in enumerate(zip(offsets, nest.extents, shape, strict=True)):
        if not isinstance(offset, tirx.IntImm) or (axis != CHANNEL and size_of(extent) != size_of(size)):
            return None
    return int(offsets[CHANNEL])


def blocked_elementwise(
    bb: relax.BlockBuilder, function: tirx.PrimFunc, arguments: Sequence[Any], blocked: Sequence[Any | None],
    dims: Sequence[Any], lanes: int,
) -> Any:  # fmt: skip
    """An elementwise function over (N, C, ...) as one over blocks; returns the bound result.

    dims: (N, C, ...), of which N may be an expression. blocked: for each argument its form in blocks, or None.
    Arguments that have no channels, or are constants, may be as they are. Raises NotElementwise when another one has
    channels.
    """
    nest = nest_of(function)
    if len(nest.extents) < 3:
        raise NotElementwise("its output has no channels")
    c = dims[CHANNEL]
    values: list[Any] = []
    in_blocks: list[bool] = []
    for argument, own, buffer in zip(arguments, blocked, nest.parameters[:-1], strict=True):
        shape = buffer.shape
        # Aligned to the right: the axis that the channels are.
        axis = len(shape) - len(nest.extents) + CHANNEL
        if isinstance(argument, tvm.ir.GenericConst) and c % lanes and not _finite(argument.value.numpy()):
            raise NotElementwise("a constant is not finite")
        if own is not None:
            if len(shape) != len(nest.extents):
                raise NotElementwise("the channels of an input are another axis")
            values.append(own)
            in_blocks.append(True)
        elif axis < 0 or size_of(shape[axis]) == 1:
            values.append(argument)
            in_blocks.append(False)
        elif isinstance(argument, tvm.ir.GenericConst):
            array = argument.value.numpy()
            array = array.reshape([1] * (len(nest.extents) - array.ndim) + list(array.shape))
            values.append(relax.const(blocked_array(array, lanes)))
            in_blocks.append(True)
        else:
            raise NotElementwise("an input is not in blocks")
    exact = c % lanes == 0
    symbols: dict[Any, Any] = {}
    tensors = [
        te.placeholder([renamed(d, symbols) for d in v.ty.shape.values], str(v.ty.dtype.dtype), f"x{i}")
        for i, v in enumerate(values)
    ]
    number = {buffer: i for i, buffer in enumerate(nest.parameters[:-1])}

    def element(*index: Any) -> Any:
        batch, block, *place, lane = index
        axes = dict(zip(nest.axes, (batch, None, *place), strict=True))
        channel = nest.axes[CHANNEL]
        axes[channel] = block * tirx.const(lanes, "int64") + lane

        def load(e: TensorLoad, indices: list[Any]) -> Any:
            which = number[e.source]
            if not in_blocks[which]:
                if any(i.same_as(channel) for i in e.indices):
                    raise NotElementwise("an input is not in blocks")
                return tensors[which](*indices)
            rank = len(nest.extents)
            own = [tirx.const(0, "int64")] * (rank - len(indices)) + indices
            first = int(values[which].ty.shape.values[CHANNEL]) == 1 and c > lanes
            given = e.indices[len(indices) - rank + CHANNEL] if len(indices) >= rank - CHANNEL else None
            if given is None or not given.same_as(channel) or first:
                raise NotElementwise("an input's channels are read out of order")
            return tensors[which](own[0], block, *own[2:], lane)

        return rebuilt(nest.value, axes, load, safe=not exact)

    shape = [tirx.const(d, "int64") if isinstance(d, int) else d for d in blocked_shape(dims, lanes)]
    out = te.compute([renamed(d, symbols) for d in shape], element, name="blocked")
    kernel = te.create_prim_func([*tensors, out], "int64").without_attr("global_symbol")
    name = str(getattr(function, "name", "") or "blocked")
    kind = relax.TensorType(shape, out.dtype)
    return bb.emit(relax.call_tir(bb.add_func(kernel, f"{name}_blocked"), values, kind))
