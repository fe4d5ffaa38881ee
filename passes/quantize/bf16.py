"""Weights in 16 bits, widened where they are read, and data that is rounded where it meets them."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from .. import graph, io
from ..base import Contract, Pass, PassContext, PassReport

CASTS_BFLOAT16 = 13  # the opset from which on Cast knows it
DENSE = 16  # channels of a group from which on it has pairs for a vector


class Stored(enum.Enum):
    """Types of 16 bits."""

    BFLOAT16 = "bfloat16"  # the range of float32, 8 bits of precision
    FLOAT16 = "float16"  # up to 65504, 11 bits


class Data(enum.Enum):
    """What products and convolutions read beside weights of bfloat16. AUTO: BFLOAT16 where the target's processor
    multiplies pairs of it, else FLOAT32."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


@dataclass(frozen=True)
class Bf16(Pass):
    """Store the weights of products, convolutions and gathers in bfloat16, or in float16.

        <float[64,64] w>           ->   <bfloat16[64,64] w_bfloat16>
        {  Y = MatMul (X, w)  }         {  w = Cast <to = FLOAT> (w_bfloat16)
                                           Y = MatMul (X, w)  }

    Each number goes to the nearest, half to even; NaN and infinity stay. Compiled code widens the 16 bits in registers,
    so files and memory traffic halve, and other runtimes widen when they load. A constant that several read, such as an
    embedding that is the output head too, is stored once.
    data=bfloat16 rounds what products and dense convolutions read beside such weights, by a Cast to bfloat16 and one
    back, once for all that read it: processors with AVX512-BF16 then multiply pairs and are up to twice as fast, others
    gain nothing. Sums are float32. data=auto does so for targets that have these instructions (`cpu` on a machine
    that does); the recorded pipeline names what it was. Data beyond 3.39e38 become infinite; where pairs are
    multiplied, numbers below 1.18e-38 count as 0.
    Left alone, each with its reason: constants that something else reads too, those that are inputs or outputs, numbers
    that the type does not hold, constants of fewer than `least` elements, and other types than float32, so that
    a second run changes nothing.
    """

    name: ClassVar[str] = "bf16"
    contract: ClassVar[Contract] = Contract.LOSSY

    type: Stored = Stored.BFLOAT16  # bfloat16, or float16, which is more exact and holds no number beyond 65504
    data: Data = Data.AUTO  # what is read beside them: bfloat16, float32, or what is faster on the target
    least: int = 4096  # elements of a constant that is worth a Cast

    def __post_init__(self) -> None:
        if self.data is Data.BFLOAT16 and self.type is Stored.FLOAT16:
            raise ValueError("data=bfloat16 needs type=bfloat16: no processor multiplies it by float16")
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
        rounds = self.type is Stored.BFLOAT16 and (
            self.data is Data.BFLOAT16 or (self.data is Data.AUTO and ctx.dot_bf16)
        )
        if rounds:
            for scope in graph.scopes(model):
                _round_data(scope, names, report)
        report.spec = str(replace(self, data=Data.BFLOAT16 if rounds else Data.FLOAT32))
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


def _round_data(scope: graph.Scope, names: graph.Names, report: PassReport) -> None:
    """Round the first input of every product and dense convolution whose weight is a constant of bfloat16, widened."""
    if scope.opset < CASTS_BFLOAT16:
        return
    rounded: dict[ir.Value, ir.Value] = {}
    for node in list(scope.graph):
        if not graph.is_op(node, "MatMul", "Gemm", "Conv") or not _is_stored(node.inputs[1]):
            continue
        x, site = node.inputs[0], graph.site(node)
        assert x is not None, "the standard asks for it"
        if (reason := _stays(node, x)) is not None:
            report.skipped("round", site, reason)
            continue
        if x not in rounded:
            narrow = _cast(scope, node, x, ir.DataType.BFLOAT16, names)
            rounded[x] = _cast(scope, node, narrow, ir.DataType.FLOAT, names)
        node.replace_input_with(0, rounded[x])
        report.changed("round", site, f"{x.name} in bfloat16")


def _stays(node: ir.Node, x: ir.Value) -> str | None:
    """Why what a node reads beside its weight is not rounded."""
    if x.const_value is not None or _is_cast(x, ir.DataType.FLOAT):
        return "what it reads is a constant, or rounded already"
    if node.op_type == "Gemm" and graph.attribute(node, "transA", 0):
        return "it reads its data transposed"
    if node.op_type == "MatMul" and graph.rank(x) == 1:
        return "its data is a vector"
    if node.op_type == "Conv" and (x.shape is None or not all(isinstance(d, int) for d in x.shape[1:])):
        return "the size of its image is known only at run time"
    if node.op_type == "Conv" and graph.attribute(node, "group", 1) != 1:
        shape = graph.static_shape(node.inputs[1])
        if shape is None or shape[1] < DENSE:
            return f"its groups have fewer than {DENSE} channels"
    return None


def _is_cast(value: ir.Value | None, source: ir.DataType) -> bool:
    """Whether a value is cast from bfloat16 to a type."""
    node = None if value is None else value.producer()
    if node is None or not graph.is_op(node, "Cast") or node.inputs[0] is None:
        return False
    return graph.attribute(node, "to", 0) == int(source) and node.inputs[0].dtype == ir.DataType.BFLOAT16


def _is_stored(value: ir.Value | None) -> bool:
    """Whether a value is a constant of bfloat16 that was widened, itself or transposed."""
    node = None if value is None else value.producer()
    if node is not None and graph.is_op(node, "Transpose"):
        value = node.inputs[0]
        node = None if value is None else value.producer()
    if not _is_cast(value, ir.DataType.FLOAT) or node is None:
        return False
    return graph.constant_tensor(node.inputs[0]) is not None


def _cast(
    scope: graph.Scope, before: ir.Node, value: ir.Value, kind: ir.DataType, names: graph.Names
) -> ir.Value:
    cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", kind)], name="")
    out = cast.outputs[0]
    out.name, out.type = names.fresh(f"{value.name}_{kind.name.lower()}"), ir.TensorType(kind)
    out.shape = None if value.shape is None else value.shape.copy()
    scope.graph.insert_before(before, cast)
    return out


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
