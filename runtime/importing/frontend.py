"""TVM's own converters of ONNX operators. The only file that knows the private names of TVM's ONNX frontend."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

from onnx import AttributeProto, NodeProto
from tvm.relax.frontend.onnx import onnx_frontend as frontend

from .site import Value

# TVM looks operators up without their domain; its converters of these names are of another domain's operators.
NOT_STANDARD = frozenset({"Attention", "FastGelu", "BiasGelu", "SkipLayerNormalization", "EmbedLayerNormalization"})


def converter(op_type: str, opset: int) -> Any:
    """A function (importer, node, inputs, attributes) -> Relax result through TVM's converter, or None."""

    table = frontend._get_convert_map()
    if op_type not in table or op_type in NOT_STANDARD:
        return None

    def convert(importer: Any, node: NodeProto, inputs: list[Value | None], attrs: list[AttributeProto]) -> Any:
        parser = frontend.ONNXGraphImporter({}, {})
        parsed = parser._parse_attr(attrs)
        parsed["tvm_custom"] = {"name": node.name, "num_outputs": len(node.output)}
        items = frontend.onnx_input(v.expr if v else None for v in inputs)
        return table[op_type].get_converter(opset)(importer.bb, items, parsed, [{}, {}])

    return convert


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep the frontend's prints and warnings from the user."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
