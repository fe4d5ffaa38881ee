"""Models of one custom operator, and inputs of attention operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from graphwright.passes.ops import CustomOp


def model_of(operator: CustomOp, arrays: Sequence[np.ndarray], attributes: Mapping[str, Any]) -> ir.Model:
    """Inputs x0, x1 ... like the arrays, the operator with its body, the output y of the type of x0. Arrays of 4-bit
    numbers, which onnxruntime takes no inputs of, are initializers."""
    inputs = [ir.val(f"x{i}", ir.DataType.from_numpy(a.dtype), a.shape) for i, a in enumerate(arrays)]
    constants = [value for value in inputs if value.dtype is not None and value.dtype.bitwidth < 8]
    for value, array in zip(inputs, arrays, strict=True):
        if value in constants:
            value.const_value = ir.tensor(array, name=value.name)
    node = ir.node(operator.name, inputs, attributes, domain=operator.domain)
    (y,) = node.outputs
    y.name, y.dtype = "y", inputs[0].dtype
    given = [value for value in inputs if value not in constants]
    imports = {"": max(20, operator.opset)}
    graph = ir.Graph(given, [y], nodes=[node], initializers=constants, name="g", opset_imports=imports)
    model = ir.Model(graph, ir_version=10)
    operator.add_to(model)
    return model


def on_onnxruntime(operator: CustomOp, *arrays: np.ndarray, **attributes: Any) -> np.ndarray:
    """What the operator's body makes of the arrays."""
    session = onnxruntime.InferenceSession(ir.to_proto(model_of(operator, arrays, attributes)).SerializeToString())
    return session.run(None, {f"x{i}": a for i, a in enumerate(arrays)})[0]


def attention_inputs(b: int, h: int, rows: int, columns: int, d: int, seed: int = 0) -> list[np.ndarray]:
    """Queries, keys, values and a mask that hides nothing."""
    random = np.random.default_rng(seed)
    shapes = ((b, h, rows, d), (b, h, columns, d), (b, h, columns, d))
    return [random.standard_normal(s).astype(np.float32) for s in shapes] + [np.zeros((1, 1, 1, 1), np.float32)]
