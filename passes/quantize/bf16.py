"""Weights in 16 bits, widened where they are read."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from .. import graph, io
from ..base import Contract, Pass, PassContext, PassReport

CASTS_BFLOAT16 = 13  # the opset from which on Cast knows it


class Stored(enum.Enum):
    """Types of 16 bits."""

    BFLOAT16 = "bfloat16"  # the range of float32, 8 bits of precision
    FLOAT16 = "float16"  # up to 65504, 11 bits


@dataclass(frozen=True)
class Bf16(Pass):
    """Store the weights of products, convolutions and gathers in bfloat16, or in float16.

        <float[64,64] w>           ->   <bfloat16[64,64] w_bfloat16>
        {  Y = MatMul (X, w)  }         {  w = Cast <to = FLOAT> (w_bfloat16)
                                           Y = MatMul (X, w)  }

    Each number goes to the nearest, half to even; NaN and infinity stay. Everything is computed in float32: compiled
    code widens the 16 bits in registers, so files and memory traffic halve, and other runtimes widen when they load.
    A constant that several read, such as an embedding that is the output head too, is stored once.
    Left alone, each with its reason: constants that something else reads too, those that are inputs or outputs, numbers
    that the type does not hold, constants of fewer than `least` elements, and other types than float32, so that
    a second run changes nothing.
    """

    name: ClassVar[str] = "bf16"
    contract: ClassVar[Contract] = Contract.LOSSY

    type: Stored = Stored.BFLOAT16  # bfloat16, or float16, which is more exact and holds no number beyond 65504
    least: int = 4096  # elements of a constant that is worth a Cast

    def __post_init__(self) -> None:
        if self.least < 0:
            raise ValueError(f"least is {self.least}, must be at least 0")

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        report, names, error = self.report(), graph.Names(model), _Error()
        saved = 0
        for scope in graph.scopes(model):
            for value, tensor in list(_weights(scope)):
                site = value.name or ""
                reason = self._refusal(value, tensor, scope) or error.add(tensor, self._dtype)
                if reason is not None:
                    report.skipped("store", site, reason)
                    continue
                self._store(value, tensor, scope, names)
                saved += graph.nbytes(tensor) // 2
                report.changed("store", site, f"{list(tensor.shape.numpy())} in {self.type.value}")
        report.stats["bytes"] = saved
        report.stats["error"] = error.relative
        return report

    @property
    def _dtype(self) -> ir.DataType:
        return ir.DataType[self.type.name]

    def _refusal(self, value: ir.Value, tensor: ir.TensorProtocol, scope: graph.Scope) -> str | None:
        """Why a weight stays as it is, as far as its numbers do not matter."""
        if value.is_graph_input():
            return "it is an input with a default: a run may give another"
        if tensor.dtype != ir.DataType.FLOAT:
            return f"it is {tensor.dtype.name.lower()}, not float32"
        if tensor.size < self.least:
            return f"it has {tensor.size} elements; least={tensor.size} stores it"
        if value.is_graph_output():
            return "it is an output of its graph"
        readers = graph.weight_readers(value, len(tensor.shape.numpy()))
        other = next((user for user, as_weight in readers if not as_weight), None)
        if other is not None:
            return f"{other.op_type} at {graph.site(other)} reads it too, or in another place than a weight's"
        if self.type is Stored.BFLOAT16 and scope.opset < CASTS_BFLOAT16:
            return f"opset {scope.opset} has no Cast of bfloat16; run convert-opset first, or take type=float16"
        return None

    def _store(self, value: ir.Value, tensor: ir.TensorProtocol, scope: graph.Scope, names: graph.Names) -> None:
        """Put a narrow constant and its Cast, which takes over the name, in the place of a constant."""
        old, kind, owner = value.name or "", self._dtype, scope.graph
        name = names.fresh(f"{old}_{self.type.value}")

        def rounded() -> ir.Tensor:
            return ir.Tensor(_rounded(tensor.numpy(), kind), dtype=kind, name=name)

        lazy = graph.nbytes(tensor) > graph.SMALL
        new = ir.LazyTensor(rounded, dtype=kind, shape=graph.tensor_shape(tensor), name=name) if lazy else rounded()
        producer = value.producer()
        first = producer or owner[0]
        narrow = graph.add_constant(scope, first, name, new)
        cast = ir.Node("", "Cast", [narrow], [ir.AttrInt64("to", ir.DataType.FLOAT)], name="")
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), graph.tensor_shape(tensor)
        owner.insert_before(first, cast)
        graph.replace_value(value, cast.outputs[0])
        if producer is not None:
            graph.remove_node(producer)
        else:
            del owner.initializers[old]
        cast.outputs[0].name = old


class _Error:
    """What rounding changes, over all constants that are stored."""

    def __init__(self) -> None:
        self._error = self._size = 0.0

    @property
    def relative(self) -> float:
        """Root of the sum of squares of the differences, over that of the numbers."""
        return math.sqrt(self._error / self._size) if self._size else 0.0

    def add(self, tensor: ir.TensorProtocol, kind: ir.DataType) -> str | None:
        """Count a constant in, or say why the type cannot hold it. Read in pieces: it may be larger than memory."""
        error = size = 0.0
        for piece in io.tensor_chunks(tensor):
            wide = np.frombuffer(piece, "<f4")
            narrow = _rounded(wide, kind).astype(np.float32)
            finite = np.isfinite(wide)
            if not np.isfinite(narrow[finite]).all():
                most = float(np.abs(wide[finite]).max())
                hint = "; type=bfloat16 does" if kind == ir.DataType.FLOAT16 else ""
                return f"it has {most:.3g}, more than {kind.name.lower()} holds{hint}"
            known = wide[finite].astype(np.float64)
            error += float(np.square(narrow[finite] - known).sum())
            size += float(np.square(known).sum())
        self._error, self._size = self._error + error, self._size + size
        return None


def _weights(scope: graph.Scope) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Constants and defaults of a graph that something reads as a weight."""
    made = (node.outputs[0] for node in scope.graph if graph.is_op(node, "Constant"))
    for value in (*scope.graph.initializers.values(), *made):
        tensor = value.const_value if value.is_initializer() else graph.constant_tensor(value)
        if tensor is not None and any(good for _, good in graph.weight_readers(value, len(tensor.shape.numpy()))):
            yield value, tensor


def _rounded(array: np.ndarray, kind: ir.DataType) -> np.ndarray:
    """The nearest numbers of a type, half to even."""
    with np.errstate(over="ignore"):  # infinity is looked for
        return array.astype(kind.numpy())
