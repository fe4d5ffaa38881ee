"""Operators on dequantized tensors that work as well on the integers: those that move elements, and greatest elements.

op(DequantizeLinear(q)) becomes DequantizeLinear(op(q)), so that what lies in memory are integers. A QuantizeLinear of
the same scale and zero point behind it then vanishes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tvm
from tvm import relax

from .quantized import IntegerOperand, dequantized, integer_operand
from .site import Declared, Site, Value, const, constant_of, np_dtype

# With one scale for the tensor. A scale above 0 keeps the order of elements.
FIRST_INPUT = frozenset({
    "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "GlobalMaxPool", "MaxPool", "Pad",
    "Reshape", "Resize", "ReverseSequence", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose",
    "Unsqueeze", "Upsample",
})  # fmt: skip
OF_TABLES = frozenset({"Gather", "GatherElements", "GatherND"})  # worth while for constants too
BYTES = ("int8", "uint8")


def same_numbers(a: IntegerOperand, b: IntegerOperand) -> bool:
    """Whether equal integers stand for equal numbers."""
    alike = a.dtype == b.dtype and a.axis == b.axis
    return alike and np.array_equal(a.scale, b.scale) and np.array_equal(a.zero_point, b.zero_point)


def on_integers(site: Site) -> tuple[Site, IntegerOperand] | None:
    """The node on integers, and what its results are dequantized like; None where it has to see the numbers."""
    if site.op == "Concat":
        return _joined(site)
    if site.op not in FIRST_INPUT or (site.outputs != 1 and site.op == "MaxPool") or site.value(0).content is not None:
        return None
    operand = integer_operand(site.bb, site.x())
    if operand is None or operand.axis is not None or operand.dtype not in BYTES:
        return None
    if constant_of(operand.value) is not None and site.op not in OF_TABLES:
        return None
    inputs: list[Value | None] = [Value(operand.value), *site.inputs[1:]]
    if site.op == "Resize" and (
        site.attr("mode", "nearest") != "nearest"
        or site.attr("coordinate_transformation_mode") == "tf_crop_and_resize"
    ):
        return None
    if site.op == "Upsample" and site.attr("mode", "nearest") != "nearest":
        return None
    if site.op == "Pad" and site.attr("mode", "constant") == "constant":
        fill = _fill(site, operand)
        if fill is None:
            return None
        inputs = [*inputs, *[None] * (3 - len(inputs))]
        inputs[2] = fill
    return _inner(site, inputs), operand


def _joined(site: Site) -> tuple[Site, IntegerOperand] | None:
    """A concatenation of tensors of one scale."""
    if not site.inputs or any(v is None or v.content is not None for v in site.inputs):
        return None
    operands: list[IntegerOperand] = []
    for index in range(len(site.inputs)):
        operand = integer_operand(site.bb, site.x(index))
        if operand is None or operand.axis is not None or operand.dtype not in BYTES:
            return None
        if operands and not same_numbers(operand, operands[0]):
            return None
        operands.append(operand)
    return _inner(site, [Value(o.value) for o in operands]), operands[0]


def _inner(site: Site, inputs: list[Value | None]) -> Site:
    declared = [Declared(None, d.shape) for d in site.declared]
    return dataclasses.replace(site, inputs=inputs, declared=declared)


def _fill(site: Site, operand: IntegerOperand) -> Value | None:
    """The integer of a padding's number, where there is one."""
    if site.opset < 11:
        return None
    number = 0.0
    if site.has(2):
        array = site.array(2)
        if array is None:
            return None
        number = float(array.reshape(-1)[0])
    info = np.iinfo(np_dtype(operand.dtype))
    steps = number / float(operand.scale)
    whole = round(steps) + int(operand.zero_point) if np.isfinite(steps) else info.max + 1
    exact = np.float32(whole - int(operand.zero_point)) * np.float32(operand.scale) == np.float32(number)
    return Value(const(whole, operand.dtype)) if info.min <= whole <= info.max and exact else None


def as_numbers(site: Site, integers: Any, operand: IntegerOperand) -> tvm.ir.Expr:
    """A result of `on_integers` as float32."""
    integers = site.emit(integers.expr if isinstance(integers, Value) else integers)
    scale = const(operand.scale, "float32")
    zero = const(operand.zero_point, operand.dtype) if operand.zero_point.any() else None
    return dequantized(site, integers, scale, zero, "float32", None, 0)


def in_steps(site: Site, x: tvm.ir.Expr) -> IntegerOperand | None:
    """The 8-bit operand behind an image whose mean a kernel can take of the integers."""
    operand = integer_operand(site.bb, x)
    return operand if operand is not None and operand.axis is None and operand.dtype in BYTES else None


def scaled(site: Site, steps: tvm.ir.Expr, operand: IntegerOperand) -> tvm.ir.Expr:
    """Steps of an operand as numbers."""
    return site.emit(relax.op.multiply(steps, const(operand.scale, "float32")))
