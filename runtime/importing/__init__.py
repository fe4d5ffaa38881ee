"""Converters from ONNX operators to Relax, one file per family; `runtime.importer` calls them."""

from . import (
    activations,
    attention,
    boxes,
    elementwise,
    indexing,
    normalization,
    pooling,
    products,
    quantization,
    quantized,
    recurrent,
    reductions,
    resize,
    rotary,
    shapes,
    slicing,
    special,
)
from .site import CONVERTERS

__all__ = [
    "CONVERTERS",
    "activations",
    "attention",
    "boxes",
    "elementwise",
    "indexing",
    "normalization",
    "pooling",
    "products",
    "quantization",
    "quantized",
    "recurrent",
    "reductions",
    "resize",
    "rotary",
    "shapes",
    "slicing",
    "special",
]
