"""Writing a function body node by node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    import onnx


class Body:
    """Collects the nodes that stand for one node. Values are names: `input0` ... are the node's inputs, what is
    named `output0` ... its outputs; the rest are numbered."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[Any, str] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def op(self, op_type: str, *inputs: str | None, out: str | None = None, **attributes: Any) -> str:
        """Add a node with one output and return its name."""
        return self.ops(op_type, *inputs, outputs=[out or self.fresh(op_type)], **attributes)[0]

    def ops(self, op_type: str, *inputs: str | None, outputs: Sequence[str] | int, **attributes: Any) -> list[str]:
        """Add a node with several outputs: their names, or how many."""
        from onnx import helper

        if isinstance(outputs, int):
            outputs = [self.fresh(op_type) for _ in range(outputs)]
        given = ["" if name is None else name for name in inputs]
        while given and not given[-1]:
            given.pop()
        self._nodes.append(helper.make_node(op_type, given, list(outputs), **attributes))
        return list(outputs)

    def constant(self, value: Any, dtype: ir.DataType = ir.DataType.INT64) -> str:
        """A constant tensor; equal ones are written once."""
        array = np.asarray(value, dtype.numpy())
        key = (array.tobytes(), array.shape, dtype)
        if key not in self._constants:
            name = self.fresh("constant")
            tensor = ir.to_proto(ir.Tensor(array, dtype=dtype, name=name))
            self._constants[key] = self.op("Constant", out=name, value=tensor)
        return self._constants[key]

    def fresh(self, stem: str) -> str:
        self._count += 1
        return f"{stem.lower()}{self._count}"

    def function(self, node: ir.Node, outputs: Sequence[int] | None = None) -> ir.Function:
        """The body as a function of the node's inputs whose outputs are the node's named ones, or those given, in
        order."""
        from onnx import helper

        if outputs is None:
            outputs = [i for i, value in enumerate(node.outputs) if value.name]

        proto = helper.make_function(
            "graphwright.decomposed",
            node.op_type,
            [f"input{i}" for i in range(len(node.inputs))],
            [f"output{i}" for i in outputs],
            self._nodes,
            [helper.make_opsetid("", self.opset)],
        )
        return ir.serde.deserialize_function(proto)
