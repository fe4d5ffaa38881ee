"""Softmax over the last axis of a scaled and masked tensor, which is never written: operators of one formula.

    graphwright.ScaledSoftmax <scale> (x)             softmax(x · scale)
    graphwright.MaskedSoftmax <scale> (x, mask)       softmax(x · scale + mask), mask of x's type
    graphwright.SelectedSoftmax <scale> (x, kept)     softmax(x · scale where kept, else -inf), kept of booleans
    graphwright.TemperedSoftmax (x, factor)           softmax(x · factor), factor known at run time, of x's type
    graphwright.TemperedMaskedSoftmax (x, factor, mask)     softmax(x · factor + mask)
    graphwright.TemperedSelectedSoftmax (x, factor, kept)   softmax(x · factor where kept, else -inf)

mask, kept and factor broadcast to x, factor with a last axis of one element. A row of nothing but -inf is NaN, as in
Softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from .base import DOMAIN, Case, CustomOp
from .two_pass_softmax import softmax_reference

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

VERSION = 1
OPSET = 15  # the first that has CastLike

_SCALED = """
    factor = Constant <value_float: float = @scale> ()
    scale = CastLike (factor, x)
    scaled = Mul (x, scale)
"""
_TEMPERED = """
    scaled = Mul (x, factor)
"""
_ADDED = "masked = Add (scaled, mask)\n    y = Softmax <axis = -1> (masked)"
_CHOSEN = """least = Constant <value_float = -inf> ()
    hidden = CastLike (least, x)
    masked = Where (kept, scaled, hidden)
    y = Softmax <axis = -1> (masked)"""
_PLAIN = "y = Softmax <axis = -1> (scaled)"
# Name -> attributes, inputs, what makes `scaled` and what is made of it. `form` is for kernels only.
_BODIES = {
    "ScaledSoftmax": ("scale, form", "x", _SCALED, _PLAIN),
    "MaskedSoftmax": ("scale, form", "x, mask", _SCALED, _ADDED),
    "SelectedSoftmax": ("scale, form", "x, kept", _SCALED, _CHOSEN),
    "TemperedSoftmax": ("form", "x, factor", _TEMPERED, _PLAIN),
    "TemperedMaskedSoftmax": ("form", "x, factor, mask", _TEMPERED, _ADDED),
    "TemperedSelectedSoftmax": ("form", "x, factor, kept", _TEMPERED, _CHOSEN),
}


def _function(name: str, opset: int) -> ir.Function:
    import onnx_ir as ir
    from onnx import parser

    attributes, inputs, scaled, rest = _BODIES[name]
    head = f'<domain: "{DOMAIN}", opset_import: ["": {opset}]>\n{name} <{attributes}> ({inputs}) => (y)'
    return ir.serde.deserialize_function(parser.parse_function(f"{head} {{{scaled}    {rest}\n}}"))


def masked_softmax(x: np.ndarray, mask: np.ndarray | None = None, scale: float = 1.0, form: str = "auto") -> np.ndarray:
    """The oracle of those with a scale, float64; a mask of booleans selects, another is added."""
    import numpy as np

    x = x.astype(np.float64) * scale
    if mask is not None:
        with np.errstate(invalid="ignore"):
            x = np.where(mask, x, -np.inf) if mask.dtype == np.bool_ else x + mask.astype(np.float64)
    return softmax_reference(x)


def tempered_softmax(
    x: np.ndarray, factor: np.ndarray, mask: np.ndarray | None = None, form: str = "auto"
) -> np.ndarray:
    """The oracle of those with a factor, float64."""
    import numpy as np

    with np.errstate(invalid="ignore"):
        return masked_softmax(x.astype(np.float64) * factor.astype(np.float64), mask)


def _operator(name: str, cases: tuple[Case, ...], oracle: Callable[..., np.ndarray] = masked_softmax) -> CustomOp:
    return CustomOp(name, VERSION, lambda opset: _function(name, opset), oracle, cases, OPSET)


_MASKED = (
    Case(((1, 1), (1,)), {"scale": 1.0}, "one element"),
    Case(((3, 15), (15,)), {"scale": 0.5}, "one below a vector of 16, a mask for all rows"),
    Case(((2, 3, 16), (3, 16)), {"scale": 1.0}, "one vector of 16, a mask for a matrix"),
    Case(((2, 3, 4, 17), (2, 1, 1, 17)), {"scale": 0.125}, "one above a vector of 16, a mask for a batch"),
    Case(((2, 3, 4, 197), (2, 1, 4, 197)), {"scale": -1.0}, "a mask that skips an axis; a negative scale"),
    Case(((0, 8), (8,)), {"scale": 1.0}, "no rows"),
    Case(((3, 4099), (3, 4099)), {"scale": 2.0}, "a mask of every element, three above a block"),
    Case(((2, 40000), (40000,)), {"scale": 1.0, "form": "two-pass"}, "the two-pass form"),
)
SCALED_SOFTMAX = _operator("ScaledSoftmax", tuple(Case(c.shapes[:1], c.attributes, c.note) for c in _MASKED))
MASKED_SOFTMAX = _operator("MaskedSoftmax", _MASKED)
SELECTED_SOFTMAX = _operator("SelectedSoftmax", tuple(replace(case, booleans=(1,)) for case in _MASKED))
TEMPERED_SOFTMAX = _operator(
    "TemperedSoftmax",
    (
        Case(((1, 1), ()), note="one element, a scalar"),
        Case(((3, 15), (1,)), note="one below a vector of 16, one number"),
        Case(((2, 3, 17), (3, 1)), note="one above a vector of 16, a factor for each row of a matrix"),
        Case(((2, 3, 4, 16), (2, 1, 4, 1)), note="factors that skip an axis"),
        Case(((0, 8), (1,)), note="no rows"),
        Case(((3, 4099), (3, 1)), note="three above a block"),
        Case(((2, 40000), ()), {"form": "two-pass"}, note="the two-pass form"),
    ),
    tempered_softmax,
)
_TEMPERED_MASKED = (
    Case(((1, 1), (), (1,)), note="one element, a scalar"),
    Case(((3, 15), (1,), (15,)), note="one below a vector of 16, one number, a mask for all rows"),
    Case(((2, 3, 17), (3, 1), (2, 1, 17)), note="one above a vector of 16, factor and mask of other axes"),
    Case(((2, 3, 4, 16), (2, 1, 4, 1), (3, 1, 16)), note="factors that skip an axis, a mask that skips another"),
    Case(((0, 8), (1,), (8,)), note="no rows"),
    Case(((3, 4099), (3, 1), (3, 4099)), note="three above a block, a mask of every element"),
    Case(((2, 40000), (), (40000,)), {"form": "two-pass"}, note="the two-pass form"),
)
TEMPERED_MASKED_SOFTMAX = _operator("TemperedMaskedSoftmax", _TEMPERED_MASKED, tempered_softmax)
TEMPERED_SELECTED_SOFTMAX = _operator(
    "TemperedSelectedSoftmax", tuple(replace(case, booleans=(2,)) for case in _TEMPERED_MASKED), tempered_softmax
)
