"""An ONNX graph that torch computes, with gradients: the student and the teacher of `fit`.

An interpreter rather than a translation: nodes are computed in order with the table of `torch_operators`, functions by
their bodies, so every pass's result is trainable as it stands. Importing this file imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from graphwright.passes import graph
from graphwright.passes.errors import PassError
from graphwright.passes.quantize.learn import DOMAIN
from torch import Tensor

from . import torch_layers  # noqa: F401 -- its operators join the table
from .fake_quantize import FAKE
from .torch_operators import OPERATORS, TYPES, Node, Unsupported


def to_torch(tensor: ir.TensorProtocol) -> Tensor:
    """A copy of the tensor. Raises PassError for an element type that torch has no name for."""
    if int(tensor.dtype) not in TYPES:
        raise PassError(f"{tensor.name}: element type {tensor.dtype.name.lower()} cannot be trained with")
    if tensor.dtype == ir.DataType.BFLOAT16:
        return torch.from_numpy(tensor.numpy().view("uint16").copy()).view(torch.bfloat16)
    return torch.from_numpy(tensor.numpy().copy())


def array_of(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    """The tensor in a type of the graph."""
    tensor = tensor.detach().to(dtype).contiguous()
    if dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@dataclass
class TorchGraph:
    """The main graph of a model as a function of named tensors.

    shared: initializers that are torch's already, by name; what is missing is added, so that several graphs with the
    same weights hold them once. Raises PassError at once, naming every operator that is not in the table.
    """

    model: ir.Model
    shared: MutableMapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._functions = dict(self.model.functions)
        self._orders: dict[tuple[Any, ...], list[ir.Node]] = {}
        self._constants: dict[ir.Node, dict[str, Any]] = {}
        self._values: dict[str, ir.Value] = {}
        for value in self.model.graph.initializers.values():
            if value.name and value.const_value is not None and value.name not in self.shared:
                self.shared[value.name] = to_torch(value.const_value)
        for node in self.model.graph:
            self._values.update((value.name or "", value) for value in node.outputs)
        missing = sorted(
            {_name(node) for node in graph.all_nodes(self.model) if node.domain == "" and node.op_type not in OPERATORS}
        )
        if missing:
            raise PassError(f"training does not know the operators {', '.join(missing)}")

    def run(
        self, feeds: Mapping[str, Tensor], outputs: Sequence[str], weights: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The values called `outputs`. feeds: inputs, or any values in the graph, which are then not computed.
        weights: initializers that stand for those of the model."""
        values: dict[str, Tensor] = {**self.shared, **(weights or {}), **feeds}
        for node in self._order(frozenset(feeds), tuple(outputs)):
            given = [None if value is None else values[value.name or ""] for value in node.inputs]
            for value, result in zip(node.outputs, self._compute(node, given, {}), strict=False):
                values[value.name or ""] = result
        missing = [name for name in outputs if name not in values]
        if missing:
            raise PassError(f"the graph has no value {missing[0]!r}")
        return {name: values[name] for name in outputs}

    def _order(self, given: frozenset[str], wanted: tuple[str, ...]) -> list[ir.Node]:
        """The nodes that lead from `given` to `wanted`, in the order of the graph."""
        key = (given, wanted)
        if key not in self._orders:
            needed: set[ir.Node] = set()
            waiting = [self._values[name] for name in wanted if name in self._values and name not in given]
            while waiting:
                node = waiting.pop().producer()
                if node is None or node in needed:
                    continue
                needed.add(node)
                waiting += [value for value in node.inputs if value is not None and value.name not in given]
            self._orders[key] = [node for node in self.model.graph if node in needed]
        return self._orders[key]

    def _compute(self, node: ir.Node, given: list[Tensor | None], outer: Mapping[str, Any]) -> Iterable[Tensor]:
        """The outputs of a node. outer: attributes of the function around it."""
        function = self._functions.get(node.op_identifier())
        if function is not None:
            return self._call(function, node, given, outer)
        opset = (node.graph.opset_imports if node.graph is not None else {}).get("", 1)
        attributes = self._attributes(node, outer)
        table = FAKE if node.domain == DOMAIN else OPERATORS
        try:
            found = table[node.op_type](Node(attributes, opset, len(node.outputs)), *given)
        except Unsupported as error:
            raise PassError(f"training does not know {error} of {node.op_type} at {graph.site(node)!r}") from error
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            where = " ".join(str(error).split())
            raise PassError(f"{node.op_type} at {graph.site(node)!r} cannot be computed in torch: {where}") from error
        return found if isinstance(found, tuple | list) else (found,)

    def _call(
        self, function: ir.Function, node: ir.Node, given: list[Tensor | None], outer: Mapping[str, Any]
    ) -> list[Tensor]:
        attributes = self._attributes(node, outer)
        values: dict[ir.Value, Tensor | None] = dict(zip(function.inputs, given, strict=False))
        for inner in function:
            inputs = [None if value is None else values.get(value) for value in inner.inputs]
            for value, result in zip(inner.outputs, self._compute(inner, inputs, attributes), strict=False):
                values[value] = result
        return [values[value] for value in function.outputs]

    def _attributes(self, node: ir.Node, outer: Mapping[str, Any]) -> dict[str, Any]:
        if node in self._constants:
            return self._constants[node]
        found: dict[str, Any] = {}
        by_caller = False
        for name, attribute in node.attributes.items():
            if attribute.is_ref():
                by_caller = True
                parameter = attribute.ref_attr_name or ""
                if parameter in outer:
                    found[name] = outer[parameter]
            elif attribute.type == ir.AttributeType.TENSOR:
                found[name] = to_torch(attribute.as_tensor())
            elif attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                raise PassError(f"training does not know the bodies of {node.op_type} at {graph.site(node)!r}")
            else:
                value = attribute.value
                found[name] = list(value) if isinstance(value, tuple) else value
        if not by_caller:
            self._constants[node] = found
        return found


def _name(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type
