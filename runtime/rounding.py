"""Rounding to bfloat16 in TIR, by whole numbers: TVM takes a cast there and back for none, and its bits for those of
float32. `elements` knows both expressions again, so that kernels use the instruction that there is.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx


def rounded_bits(x: Any) -> Any:
    """The bits, uint16, of the bfloat16 nearest to a float32, half to even. A NaN stays one."""
    bits = tirx.reinterpret("uint32", x)

    def number(value: int) -> Any:
        return tirx.const(value, "uint32")

    high = bits >> number(16)
    nearest = (bits + number(0x7FFF) + (high & number(1))) >> number(16)
    nan = number(0x7F800000) < (bits & number(0x7FFFFFFF))
    return tirx.Select(nan, high | number(64), nearest).astype("uint16")


def widened_bits(bits: Any) -> Any:
    """The float32 of the bits of a bfloat16."""
    return tirx.reinterpret("float32", bits.astype("uint32") << tirx.const(16, "uint32"))
