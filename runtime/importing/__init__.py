"""Converters from ONNX operators to Relax, one file per family; `runtime.importer` calls them."""

from . import elementwise, shapes
from .site import CONVERTERS

__all__ = ["CONVERTERS", "elementwise", "shapes"]
