"""Converters from ONNX operators to Relax, one file per family; `runtime.importer` calls them."""

from . import elementwise, indexing, normalization, products, quantization, reductions, resize, shapes, special
from .site import CONVERTERS

__all__ = [
    "CONVERTERS",
    "elementwise",
    "indexing",
    "normalization",
    "products",
    "quantization",
    "reductions",
    "resize",
    "shapes",
    "special",
]
