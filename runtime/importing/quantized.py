"""QuantizeLinear and DequantizeLinear in every granularity, and the integer tensor behind a dequantized one.

Both are elementwise code, which fuses with what stands around it. The rule is ONNX's: x / scale is rounded half to
even, the zero point is added, and what lies outside the type becomes its first or last number. NaN, of which ONNX says
nothing, becomes the first number, as in onnxruntime on x86.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx

from .reductions import reduced
from .requantized import requantized
from .shapes import reshaped
from .site import (
    PACKED,
    Dim,
    Refuse,
    Result,
    Site,
    Value,
    const,
    constant_of,
    converts,
    dtype_of,
    int64,
    made_by,
    normal_axis,
    np_dtype,
    onnx_dtype,
    product,
    same,
    shape_of,
)

INTEGERS = ("int8", "uint8", "int16", "uint16")
DEQUANTIZE = "graphwright.dequantize"  # attribute of the function: its scale and zero point
MOVES = ("relax.permute_dims", "relax.reshape", "relax.squeeze", "relax.expand_dims", "relax.flatten")


@dataclass(frozen=True)
class IntegerOperand:
    """The integers behind a float32 tensor: it is (value - zero_point) * scale.

    value: of uint8, int8, int16, uint16 or int32, in the float32 tensor's shape; a constant where that is one.
    scale: float32, of shape () for one of the whole tensor, else (n,) with one for each index of `axis`.
    zero_point: int32, in scale's shape.
    """

    value: tvm.ir.Expr
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None

    @property
    def dtype(self) -> str:
        return dtype_of(self.value)


@dataclass(frozen=True)
class Dequantization:
    """A DequantizeLinear whose scales, float32, and zero points, int32, are constants in the shapes of its inputs.
    block: elements along `axis` that share a scale; 0 for one scale for each index of it, or one of the tensor."""

    value: tvm.ir.Expr
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None
    block: int


def dequantization(bb: relax.BlockBuilder, made: Any) -> Dequantization | None:
    """What a call computes, where it is one."""
    known = _known(bb, made) if made.op.name == "relax.call_tir" else None
    if known is None:
        return None
    value, *given = _tensors(made)
    arrays = [constant_of(g) for g in given]
    if any(a is None for a in arrays):
        return None
    scale = np.asarray(arrays.pop(0) if known["scale"] is None else known["scale"], np.float32)
    zero = np.asarray(arrays.pop(0) if arrays else known["zero_point"] or 0, np.int32)
    return Dequantization(value, scale, zero, known["axis"], known["block"])


@dataclass(frozen=True)
class RunningOperand:
    """The integers behind a tensor whose one scale and zero point are computed when the model runs: scalars, float32
    and of the integers' type. zero_point: None for 0."""

    value: tvm.ir.Expr
    scale: tvm.ir.Expr
    zero_point: tvm.ir.Expr | None


def running_operand(bb: relax.BlockBuilder, expr: tvm.ir.Expr) -> RunningOperand | None:
    """What `expr` was dequantized from by one scale that is no constant; None for other tensors."""
    made = made_by(bb, expr, "relax.call_tir")
    known = None if made is None else _known(bb, made)
    if made is None or known is None or known["axis"] is not None or dtype_of(expr) != "float32":
        return None
    x, *given = _tensors(made)
    if known["scale"] is not None:
        return None
    zero = given[1] if len(given) > 1 else None
    if zero is None and known["zero_point"]:
        zero = const(known["zero_point"], dtype_of(x))
    return RunningOperand(x, given[0], zero)


def _tensors(call: Any) -> list[tvm.ir.Expr]:
    """The tensors that a function is called with; sizes may be passed behind them."""
    return [a for a in call.args[1].fields if isinstance(a.ty, relax.TensorType)]


def _known(bb: relax.BlockBuilder, call: Any) -> dict[str, Any] | None:
    """What the function of a call says of its dequantization; None where it is another one."""
    text = (bb.get()[call.args[0]].attrs or {}).get(DEQUANTIZE)
    return None if text is None else json.loads(str(text))


def integer_operand(bb: relax.BlockBuilder, expr: tvm.ir.Expr) -> IntegerOperand | None:
    """What `expr` was dequantized from, with scales and zero points that are constants.

    Transposes and reshapes behind the DequantizeLinear are made of the integers instead, where scales stay those of one
    axis. None for other tensors, for scales of blocks and for other results than float32.
    """
    moves = []
    made = made_by(bb, expr, "relax.call_tir", *MOVES)
    while made is not None and made.op.name in MOVES:
        moves.append((made, shape_of(bb.normalize(made))))
        made = made_by(bb, made.args[0], "relax.call_tir", *MOVES)
    found = None if made is None or dtype_of(expr) != "float32" else dequantization(bb, made)
    if found is None or found.block:
        return None
    shape = () if found.axis is None else (found.scale.size,)
    zero = np.broadcast_to(found.zero_point.reshape(-1), (found.scale.size,)).reshape(shape)
    operand: IntegerOperand | None = IntegerOperand(found.value, found.scale.reshape(shape), zero, found.axis)
    for call, dims in reversed(moves):
        operand = None if operand is None else _moved(bb, operand, call, dims)
    return operand


def _moved(bb: relax.BlockBuilder, operand: IntegerOperand, call: Any, dims: Sequence[Dim]) -> IntegerOperand | None:
    """The operand behind a transpose or a change of shape."""
    x, axis = operand.value, operand.axis
    array = constant_of(x)
    if call.op.name == "relax.permute_dims":
        rank = len(dims)
        axes = [int(a) % rank for a in call.attrs.axes] if call.attrs.axes is not None else [*range(rank)][::-1]
        moved = bb.emit(relax.op.permute_dims(x, axes)) if array is None else const(array.transpose(axes), dtype_of(x))
        return IntegerOperand(moved, operand.scale, operand.zero_point, None if axis is None else axes.index(axis))
    if axis is not None:
        old = shape_of(x)
        places = [a for a, d in enumerate(dims) if same(d, old[axis]) and same(product(dims[:a]), product(old[:axis]))]
        if not places:
            return None
        axis = places[0]
    if array is None:
        moved = bb.emit(relax.op.reshape(x, relax.ShapeExpr([int64(d) for d in dims])))
    else:
        moved = const(array.reshape([int(d) for d in dims]), dtype_of(x))
    return IntegerOperand(moved, operand.scale, operand.zero_point, axis)


# --- elementwise code -------------------------------------------------------------------------------------------


def _granularity(site: Site, scale: tvm.ir.Expr, rank: int) -> tuple[int | None, int]:
    """(axis, block): axis None for one scale of the tensor, block 0 for one scale for each index of the axis."""
    dims = shape_of(scale)
    block = int(site.attr("block_size", 0))
    if not dims or (dims == (1,) and not block):
        return None, 0
    return 0 if rank == 1 else normal_axis(int(site.attr("axis", 1)), rank), block


class _Parameter:
    """A scale or zero point in a tensor expression: a number where it is one constant of the whole tensor, so that code
    can be made for that number, else an input."""

    def __init__(self, expr: tvm.ir.Expr | None, axis: int | None, block: int) -> None:
        array = None if expr is None or axis is not None else constant_of(expr)
        self.number = None if array is None else array.reshape(-1)[0]
        self.inputs = [] if expr is None or self.number is not None else [expr]
        self.axis, self.block = axis, block

    def at(self, tensors: Sequence[te.Tensor], index: Sequence[Any], dtype: str) -> tirx.Expr:
        """What belongs to an element. tensors: of `inputs`."""
        if self.number is not None:
            return tirx.const(self.number.astype(np_dtype(dtype)).item(), dtype)
        (tensor,) = tensors
        if self.axis is None:
            return tensor(*([0] * len(tensor.shape))).astype(dtype)
        if self.block:
            index = [tirx.floordiv(v, self.block) if a == self.axis else v for a, v in enumerate(index)]
            return tensor(*index).astype(dtype)
        return tensor(index[self.axis]).astype(dtype)


def limits(dtype: str) -> tuple[int, int]:
    """The first and the last number of a type."""
    if dtype in PACKED:
        bits = int(dtype.lstrip("uint"))
        return (0, (1 << bits) - 1) if dtype.startswith("u") else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    info = np.iinfo(np_dtype(dtype))
    return int(info.min), int(info.max)


def quantized(
    site: Site, x: tvm.ir.Expr, scale: tvm.ir.Expr, zero: tvm.ir.Expr | None, dtype: str, axis: int | None, block: int
) -> tvm.ir.Expr:
    """saturate(round(x / scale) + zero point). The zero point is added to whole numbers, so that nothing rounds twice.

    dtype: one of INTEGERS or of PACKED; the elements of the latter are kept in 8 bits.
    """
    low, high = limits(dtype)
    factor, start = _Parameter(scale, axis, block), _Parameter(zero, axis, block)
    many = len(factor.inputs)

    def compute(data: te.Tensor, *given: te.Tensor) -> te.Tensor:
        def element(*i: tirx.Var) -> tirx.Expr:
            steps = data(*i).astype("float32") / factor.at(given[:many], i, "float32")
            least, most = tirx.const(float(low), "float32"), tirx.const(float(high), "float32")
            if zero is not None:
                offset = start.at(given[many:], i, "float32")
                least, most = least - offset, most - offset
            # x first: the maximum of NaN and a number is that number.
            whole = tirx.nearbyint(tirx.min(tirx.max(steps, least), most)).astype("int32")
            return (whole if zero is None else whole + start.at(given[many:], i, "int32")).astype(kept)

        return te.compute(data.shape, element, name="quantize")

    kept = PACKED.get(dtype, dtype)
    return site.te(compute, x, *factor.inputs, *start.inputs, name="quantize")


def dequantized(
    site: Site, x: tvm.ir.Expr, scale: tvm.ir.Expr, zero: tvm.ir.Expr | None, dtype: str, axis: int | None, block: int
) -> tvm.ir.Expr:
    """(x - zero point) * scale, the difference taken in int32."""

    factor, start = _Parameter(scale, axis, block), _Parameter(zero, axis, block)
    many = len(factor.inputs)

    def compute(data: te.Tensor, *given: te.Tensor) -> te.Tensor:
        def element(*i: tirx.Var) -> tirx.Expr:
            value = data(*i).astype("int32")
            if zero is not None:
                value = value - start.at(given[many:], i, "int32")
            return (value.astype("float32") * factor.at(given[:many], i, "float32")).astype(dtype)

        return te.compute(data.shape, element, name="dequantize")

    attrs = {DEQUANTIZE: _description(factor, start)}
    return site.te(compute, x, *factor.inputs, *start.inputs, name="dequantize", attrs=attrs)


def _description(scale: _Parameter, zero: _Parameter) -> str:
    """What integer_operand reads of a dequantization. Numbers are in here, the rest are inputs of the function."""
    point = None if zero.number is None else int(zero.number)
    number = None if scale.number is None else float(scale.number)
    return json.dumps({"axis": scale.axis, "block": scale.block, "scale": number, "zero_point": point})


# --- operators --------------------------------------------------------------------------------------------------


def _zero_point(site: Site) -> tvm.ir.Expr | None:
    """Input 2, where it is not a constant of zeros."""
    if not site.has(2):
        return None
    array = site.array(2)
    return site.x(2) if array is None or array.any() else None


def _kept_in(site: Site) -> str:
    """The type that QuantizeLinear gives."""
    given = int(site.attr("output_dtype", 0))
    if site.has(2):
        return site.value(2).packed or site.dtype(2)
    return onnx_dtype(given) if given else "uint8"


def _requantized(site: Site, dtype: str) -> tvm.ir.Expr | None:
    """What was dequantized by the same scale and zero point, as it was; a concatenation of dequantized tensors as one
    of what they are quantized to. None for others."""
    scale, zero = site.array(1), site.array(2) if site.has(2) else np.zeros((), np.int32)
    if scale is None or zero is None or dtype in PACKED or site.dtype() != "float32":
        return None

    def whole(x: tvm.ir.Expr) -> tvm.ir.Expr | None:
        operand = integer_operand(site.bb, x)
        if operand is None or operand.axis is not None:
            return None
        if operand.dtype == dtype and operand.scale == scale and operand.zero_point == int(zero.reshape(())):
            return operand.value
        return quantized(site, x, site.x(1), _zero_point(site), dtype, None, 0)

    operand = integer_operand(site.bb, site.x())
    if operand is not None:
        value = whole(site.x())
        return value if value is not None and value.same_as(operand.value) else None
    joined = made_by(site.bb, site.x(), "relax.concat")
    if joined is None or not isinstance(joined.args[0], relax.Tuple):
        return None
    fields = list(joined.args[0].fields)
    if any((o := integer_operand(site.bb, f)) is None or o.axis is not None for f in fields):
        return None
    return site.emit(relax.op.concat([whole(f) for f in fields], int(joined.attrs.axis)))


@converts("QuantizeLinear")
def quantize_linear(site: Site) -> Result:
    dtype = _kept_in(site)
    if dtype not in INTEGERS and dtype not in PACKED:
        raise Refuse(f"quantization to {dtype} is not compiled")
    if site.attr("precision", 0) not in (0, 1):
        raise Refuse("its precision is not float32")
    if (sums := requantized(site, dtype, integer_operand)) is not None:
        return sums
    axis, block = _granularity(site, site.x(1), site.rank())
    if axis is None and (again := _requantized(site, dtype)) is not None:
        return again
    y = quantized(site, site.x(0), site.x(1), _zero_point(site), dtype, axis, block)
    return Value(y, packed=dtype if dtype in PACKED else None)


@converts("DequantizeLinear")
def dequantize_linear(site: Site) -> Result:
    if site.dtype() not in (*INTEGERS, "int32"):
        raise Refuse(f"dequantization of {site.dtype()} is not compiled")
    given = int(site.attr("output_dtype", 0))
    dtype = onnx_dtype(given) if given else site.dtype(1)
    axis, block = _granularity(site, site.x(1), site.rank())
    return dequantized(site, site.x(0), site.x(1), _zero_point(site), dtype, axis, block)


@converts("DynamicQuantizeLinear")
def dynamic_quantize_linear(site: Site) -> Result:
    """uint8, its scale and its zero point by the least and greatest element, 0 among them. With a NaN in x
    the scale is NaN, as in the operator's definition."""
    x, none = site.x(), site.like(0)
    axes = list(range(site.rank()))
    greatest, least = (site.emit(reshaped(site, reduced(site, x, axes, kind), [])) for kind in ("max", "min"))
    high, low = site.emit(relax.op.maximum(greatest, none)), site.emit(relax.op.minimum(least, none))
    broken = relax.op.isnan(greatest)
    span = site.emit(relax.op.where(broken, greatest, relax.op.subtract(high, low)))
    # A tensor of zeros has no range; any scale gives its zeros back.
    flat = relax.op.equal(span, none)
    scale = site.emit(relax.op.where(flat, site.like(1), relax.op.divide(span, site.like(255))))
    start = relax.op.where(broken, none, relax.op.round(relax.op.divide(relax.op.negative(low), scale)))
    point = site.cast(site.emit(relax.op.clip(site.emit(start), 0, 255)), "uint8")
    return [quantized(site, x, scale, point, "uint8", None, 0), scale, point]
