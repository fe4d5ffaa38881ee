"""`graphwright.TwoPassSoftmax`: softmax over one axis, with another algorithm behind it.

Source: Dukhan and Ablavatski, "The Two-Pass Softmax Algorithm", arXiv 2001.04438.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from ..base import Caches
from .base import DOMAIN, Case, CustomOp

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

NAME, VERSION = "TwoPassSoftmax", 1
# The first opset in which an axis may count from the back.
NEGATIVE_AXES = 11
LAST = {"axis": -1}
# Columns of a tile at least, where there are so many: two cache lines of every row.
NARROWEST = 32
# Elements of the longest row of float16 or bfloat16 whose exponentials wait in float32: they fit the innermost cache.
NARROW_ROW = 1 << 11


class Form(enum.Enum):
    """How the rows are computed. AUTO: by `choose_form`."""

    AUTO = "auto"
    TWO_PASS = "two-pass"
    THREE_PASS = "three-pass"


def choose_form(row: int, caches: Caches, narrow: bool = False) -> tuple[Form, str]:
    """The faster form for rows of `row` elements, and why. narrow: of float16 or bfloat16, else of float32.

    While a row and its result stay in the last-level cache, the three-pass form wins: it computes each
    exponential once and reads it back. Beyond that memory is the limit, and the two-pass form moves 3 numbers
    per element instead of 5. A narrow result cannot hold exponentials that are still to be scaled.
    """
    if narrow:
        room = f"{_bytes(4 * row)} of float32 for a row's exponentials"
        if row <= NARROW_ROW:
            return Form.THREE_PASS, f"{room} stay in the innermost cache"
        return Form.TWO_PASS, f"{room} would not stay in the innermost cache"
    size, cache = 8 * row, caches.last_level
    if size <= cache * 3 // 4:
        return Form.THREE_PASS, f"a row and its result ({_bytes(size)}) stay in the {_bytes(cache)} cache"
    return Form.TWO_PASS, f"a row and its result ({_bytes(size)}) do not stay in the {_bytes(cache)} cache"


def longest_in_cache(caches: Caches) -> int:
    """Elements of the longest row of float32 for which `choose_form` says three-pass."""
    return caches.last_level * 3 // 4 // 8


def choose_column_form(length: int, caches: Caches) -> tuple[Form, str]:
    """The faster form for softmax along an axis of `length` float32 elements that is not the last, and why.

    Tiles of neighbouring columns are copied into scratch memory and take the three passes there, as long as those
    of NARROWEST columns stay in the second-level cache; longer columns are read twice.
    """
    size, room = 4 * length * NARROWEST, _scratch(caches)
    if length <= longest_column(caches):
        return Form.THREE_PASS, f"{NARROWEST} columns ({_bytes(size)}) fit {_bytes(room)} of cache"
    return Form.TWO_PASS, f"{NARROWEST} columns ({_bytes(size)}) do not fit {_bytes(room)} of cache"


def longest_column(caches: Caches) -> int:
    """Elements of the longest axis for which `choose_column_form` says three-pass."""
    return _scratch(caches) // (4 * NARROWEST)


def _scratch(caches: Caches) -> int:
    return (caches.l2 or caches.last_level) // 2


def _bytes(size: int) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size} B"


def _body(opset: int) -> ir.Function:
    """`return op.Softmax(x, axis=axis)`: the file stays plain ONNX that any runtime executes at full speed.

    Neither parameter has a default: nodes give their axis, because before opset 13 Softmax's own default is not the
    last axis, and `form` is for kernels only.
    """
    import onnx_ir as ir

    x = ir.Value(name="x")
    axis = ir.RefAttr("axis", "axis", ir.AttributeType.INT)
    softmax = ir.Node("", "Softmax", [x], [axis], outputs=[ir.Value(name="y")], name="softmax")
    graph = ir.Graph([x], softmax.outputs, nodes=[softmax], name=NAME, opset_imports={"": opset})
    parameters = [ir.Attr("axis", ir.AttributeType.INT, None), ir.Attr("form", ir.AttributeType.STRING, None)]
    return ir.Function(DOMAIN, NAME, graph=graph, attributes=parameters)


def softmax_reference(x: np.ndarray, axis: int = -1, form: str = Form.AUTO.value) -> np.ndarray:
    """exp(x - max) / sum(exp(x - max)) in float64; a row without a finite maximum is NaN."""
    import numpy as np

    if x.size == 0:
        return x.astype(np.float64)
    x = x.astype(np.float64)
    with np.errstate(invalid="ignore"):
        e = np.exp(x - x.max(axis=axis, keepdims=True))
        return e / e.sum(axis=axis, keepdims=True)


TWO_PASS_SOFTMAX = CustomOp(
    name=NAME,
    version=VERSION,
    body=_body,
    reference=softmax_reference,
    cases=(
        Case(((1, 1),), LAST, note="one element"),
        Case(((3, 7),), LAST, note="less than one vector"),
        Case(((2, 3, 15),), LAST, note="one below a vector of 16"),
        Case(((2, 3, 16),), LAST, note="one vector of 16"),
        Case(((2, 3, 17),), LAST, note="one above a vector of 16"),
        Case(((4, 197),), LAST, note="a vision transformer's row"),
        Case(((0, 8),), LAST, note="no rows"),
        Case(((1, 4097),), LAST, note="one above a block"),
        Case(((2, 3, 31),), {"axis": 1}, note="along an axis, one below a tile"),
        Case(((2, 9, 33),), {"axis": -2}, note="along an axis, one above a tile"),
        Case(((1, 21, 5, 6),), {"axis": 1}, note="classes of an image"),
        Case(((17, 1),), {"axis": 0}, note="along an axis in front of one element"),
        Case(((2, 0, 4),), {"axis": 1}, note="along an axis without elements"),
        Case(((2, 40000),), {**LAST, "form": "two-pass"}, note="the two-pass form on a row it is not chosen for"),
    ),
)
