"""Talking to onnx's C++ functions without handing them the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from .. import graph

if TYPE_CHECKING:
    import onnx

INLINE = 1024  # bytes: larger tensors are described, not serialized; shapes and axes are smaller


def _stand_in(tensor: ir.TensorProtocol) -> ir.TensorProtocol | None:
    """What is serialized in the tensor's place: small ones whole, large ones as a reference to a file that
    nothing reads. None: serialize it as it is."""
    external = isinstance(tensor, ir.ExternalTensor)
    if graph.nbytes(tensor) <= INLINE:
        return ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=tensor.name) if external else None
    if external or tensor.dtype == ir.DataType.STRING:
        return None
    shape = graph.tensor_shape(tensor)
    return ir.ExternalTensor(
        "weights",
        offset=0,
        length=graph.nbytes(tensor),
        dtype=tensor.dtype,
        shape=shape,
        name=tensor.name or "",
    )


@contextmanager
def without_weights(model: ir.Model) -> Iterator[None]:
    """Inside, large tensors of the model serialize to a few bytes. The model is as before afterwards."""
    swapped: list[tuple[ir.Value, ir.TensorProtocol]] = []
    attributes: list[tuple[ir.Node, ir.Attr]] = []
    try:
        for body in graph.all_graphs(model):
            for value in body.initializers.values():
                if value.const_value is not None and (stand_in := _stand_in(value.const_value)) is not None:
                    swapped.append((value, value.const_value))
                    value.const_value = stand_in
            for node in body:
                if not graph.is_op(node, "Constant"):
                    continue
                held = node.attributes.get("value")
                if held is None or held.is_ref() or (stand_in := _stand_in(held.as_tensor())) is None:
                    continue
                attributes.append((node, held))
                node.attributes.add(ir.AttrTensor("value", stand_in))
        yield
    finally:
        for value, tensor in swapped:
            value.const_value = tensor
        for node, held in attributes:
            node.attributes.add(held)


def light_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as protobuf with large tensors described but empty: a few megabytes whatever the weights."""
    with without_weights(model):
        return ir.to_proto(model)


def type_proto(value: ir.Value) -> onnx.TypeProto | None:
    """The value's type and shape as protobuf; None when the type is not known."""
    if value.type is None:
        return None
    return ir.to_proto(ir.Value(name="value", type=value.type, shape=value.shape)).type
