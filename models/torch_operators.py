"""Operators of ONNX in torch, differentiable: what `torch_graph` computes a graph with.

`OPERATORS` is the table: operator -> function of the node, that gives the result or several; `torch_layers` adds those
that layers of networks are made of. Each is tested against onnxruntime in `tests/models/test_torch_operators.py`.
Importing this file imports torch.

Names: n the node as `Node` with attributes and opset; x, y ... its inputs, None where one is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Node:
    """What an operator may read of its node besides the inputs."""

    attributes: dict[str, Any]
    opset: int
    outputs: int = 1

    def get(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)


Operator = Callable[..., Any]
OPERATORS: dict[str, Operator] = {}

# ONNX's number of an element type -> torch's.
TYPES: dict[int, torch.dtype] = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip


class Unsupported(Exception):
    """A form of an operator that is not written here."""


def operator(*names: str) -> Callable[[Operator], Operator]:
    def enter(function: Operator) -> Operator:
        for name in names:
            OPERATORS[name] = function
        return function

    return enter


def ints(x: Tensor | None) -> list[int] | None:
    """A tensor of whole numbers as a list."""
    return None if x is None else [int(i) for i in x.reshape(-1).tolist()]


def _plain(**functions: Callable[..., Any]) -> None:
    """Operators that only look at their inputs."""
    for name, function in functions.items():
        OPERATORS[name] = lambda n, *inputs, function=function: function(*inputs)


def _divide(x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def fold(first: Tensor, *rest: Tensor) -> Tensor:
        for other in rest:
            first = function(first, other)
        return first

    return fold


_plain(
    Identity=lambda x: x, Neg=torch.neg, Abs=torch.abs, Exp=torch.exp, Log=torch.log, Sqrt=torch.sqrt,
    Reciprocal=torch.reciprocal, Floor=torch.floor, Ceil=torch.ceil, Round=torch.round, Sign=torch.sign,
    Sin=torch.sin, Cos=torch.cos, Tan=torch.tan, Atan=torch.atan, Sinh=torch.sinh, Cosh=torch.cosh, Tanh=torch.tanh,
    Erf=torch.erf, Sigmoid=torch.sigmoid, Relu=torch.relu, Softsign=F.softsign, HardSwish=F.hardswish, Mish=F.mish,
    Not=torch.logical_not, And=torch.logical_and, Or=torch.logical_or, Xor=torch.logical_xor,
    Equal=torch.eq, Less=torch.lt, LessOrEqual=torch.le, Greater=torch.gt, GreaterOrEqual=torch.ge,
    IsNaN=torch.isnan, Where=torch.where, Add=torch.add, Sub=torch.sub, Mul=torch.mul, Div=_divide,
    Max=_folded(torch.maximum), Min=_folded(torch.minimum), Sum=_folded(torch.add), MatMul=torch.matmul,
    Size=lambda x: torch.tensor(x.numel()), GlobalAveragePool=lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True),
    GlobalMaxPool=lambda x: x.amax(tuple(range(2, x.dim())), keepdim=True),
)  # fmt: skip

@operator("Softplus")
def _softplus(n: Node, x: Tensor) -> Tensor:
    return torch.clamp(x, min=0) + torch.log1p(torch.exp(-x.abs()))


@operator("Pow")
def _pow(n: Node, x: Tensor, y: Tensor) -> Tensor:
    return torch.pow(x, y.to(x.dtype))


@operator("Mod")
def _mod(n: Node, x: Tensor, y: Tensor) -> Tensor:
    return torch.fmod(x, y) if n.get("fmod", 0) else torch.remainder(x, y)


@operator("Clip")
def _clip(n: Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    for bound, function in ((n.get("min", low), torch.maximum), (n.get("max", high), torch.minimum)):
        if bound is not None:
            x = function(x, torch.as_tensor(bound, dtype=x.dtype))
    return x


@operator("Gelu")
def _gelu(n: Node, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=n.get("approximate", "none"))


@operator("LeakyRelu")
def _leaky_relu(n: Node, x: Tensor) -> Tensor:
    return F.leaky_relu(x, n.get("alpha", 0.01))


@operator("Elu")
def _elu(n: Node, x: Tensor) -> Tensor:
    return F.elu(x, n.get("alpha", 1.0))


@operator("PRelu")
def _prelu(n: Node, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


@operator("HardSigmoid")
def _hard_sigmoid(n: Node, x: Tensor) -> Tensor:
    return torch.clamp(x * n.get("alpha", 0.2) + n.get("beta", 0.5), 0, 1)


@operator("Swish")
def _swish(n: Node, x: Tensor) -> Tensor:
    return x * torch.sigmoid(n.get("alpha", 1.0) * x)


# --- sizes, types and constants


@operator("Shape")
def _shape(n: Node, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape)[n.get("start", 0) : n.get("end")], dtype=torch.int64)


@operator("Cast")
def _cast(n: Node, x: Tensor) -> Tensor:
    kind = n.get("to")
    if kind not in TYPES:
        raise Unsupported(f"element type {kind}")
    return x.to(TYPES[kind])


@operator("CastLike")
def _cast_like(n: Node, x: Tensor, y: Tensor) -> Tensor:
    return x.to(y.dtype)


@operator("Constant")
def _constant(n: Node) -> Tensor:
    ((name, value),) = n.attributes.items()
    kinds = {"value_float": torch.float32, "value_floats": torch.float32,
             "value_int": torch.int64, "value_ints": torch.int64}  # fmt: skip
    if name == "value":
        return value
    if name not in kinds:
        raise Unsupported(f"a constant by {name}")
    return torch.tensor(value, dtype=kinds[name])


@operator("ConstantOfShape")
def _constant_of_shape(n: Node, shape: Tensor) -> Tensor:
    value = n.get("value", torch.zeros(1))
    return value.reshape(()).expand(ints(shape) or []).clone()


@operator("Range")
def _range(n: Node, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    count = max(0, math.ceil((limit.item() - start.item()) / delta.item()))
    return start + delta * torch.arange(count, dtype=start.dtype)


# --- moving


@operator("Reshape")
def _reshape(n: Node, x: Tensor, shape: Tensor) -> Tensor:
    dims = ints(shape) or []
    if not n.get("allowzero", 0):
        dims = [x.shape[i] if d == 0 else d for i, d in enumerate(dims)]
    return x.reshape(dims)


@operator("Flatten")
def _flatten(n: Node, x: Tensor) -> Tensor:
    axis = n.get("axis", 1)
    axis += x.dim() if axis < 0 else 0
    return x.reshape(math.prod(x.shape[:axis]), -1)


@operator("Transpose")
def _transpose(n: Node, x: Tensor) -> Tensor:
    return x.permute(n.get("perm") or tuple(range(x.dim()))[::-1])


@operator("Unsqueeze")
def _unsqueeze(n: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    given = n.get("axes") or ints(axes) or []
    dims = x.dim() + len(given)
    for axis in sorted(a + dims if a < 0 else a for a in given):
        x = x.unsqueeze(axis)
    return x


@operator("Squeeze")
def _squeeze(n: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    given = n.get("axes") or ints(axes)
    return x.squeeze() if not given else x.squeeze(tuple(given))


@operator("Concat")
def _concat(n: Node, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, n.get("axis"))


@operator("Split")
def _split(n: Node, x: Tensor, sizes: Tensor | None = None) -> Sequence[Tensor]:
    axis, given = n.get("axis", 0), n.get("split") or ints(sizes)
    if given is None:
        count = n.get("num_outputs", n.outputs)
        step = math.ceil(x.shape[axis] / count)
        given = [min(step, x.shape[axis] - i * step) for i in range(count)]
    return torch.split(x, list(given), axis)


@operator("Slice")
def _slice(
    n: Node, x: Tensor, starts: Tensor | None = None, ends: Tensor | None = None, axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:  # fmt: skip
    first, last = n.get("starts") or ints(starts) or [], n.get("ends") or ints(ends) or []
    for at, (begin, end) in enumerate(zip(first, last, strict=True)):
        axis = (n.get("axes") or ints(axes) or range(len(first)))[at]
        step = (ints(steps) or [1] * len(first))[at]
        index = torch.arange(x.shape[axis])[slice(begin, end)] if step == 1 else None
        if index is None:
            index = torch.from_numpy(np.arange(x.shape[axis])[_numpy_slice(begin, end, step)].copy())
        x = x.narrow(axis, int(index[0]), len(index)) if step == 1 and len(index) else x.index_select(axis, index)
    return x


def _numpy_slice(begin: int, end: int, step: int) -> slice:
    """ONNX writes "to before the first" as the lowest number, NumPy as None."""
    return slice(begin, None if step < 0 and end < -(1 << 30) else end, step)


@operator("Gather")
def _gather(n: Node, x: Tensor, index: Tensor) -> Tensor:
    axis = n.get("axis", 0) % x.dim()
    places = torch.where(index < 0, index + x.shape[axis], index).long()
    found = x.index_select(axis, places.reshape(-1))
    return found.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


@operator("GatherElements")
def _gather_elements(n: Node, x: Tensor, index: Tensor) -> Tensor:
    axis = n.get("axis", 0)
    return torch.gather(x, axis, torch.where(index < 0, index + x.shape[axis], index).long())


@operator("GatherND")
def _gather_nd(n: Node, x: Tensor, index: Tensor) -> Tensor:
    if n.get("batch_dims", 0):
        raise Unsupported("batch_dims")
    index = index.long()
    return x[tuple(index[..., i] for i in range(index.shape[-1]))]


@operator("ScatterND")
def _scatter_nd(n: Node, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    if n.get("reduction", "none") != "none":
        raise Unsupported("a reduction")
    index = index.long()
    return x.index_put(tuple(index[..., i] for i in range(index.shape[-1])), updates)


@operator("Expand")
def _expand(n: Node, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, ints(shape) or []))


@operator("Tile")
def _tile(n: Node, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(ints(repeats) or [])


@operator("Trilu")
def _trilu(n: Node, x: Tensor, k: Tensor | None = None) -> Tensor:
    return (torch.triu if n.get("upper", 1) else torch.tril)(x, 0 if k is None else int(k))


@operator("Pad")
def _pad(
    n: Node, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:  # fmt: skip
    if n.get("mode", "constant") != "constant":
        raise Unsupported(f"mode {n.get('mode')}")
    given = n.get("pads") or ints(pads) or []
    chosen = [a % x.dim() for a in ints(axes) or range(x.dim())]
    before, after = given[: len(chosen)], given[len(chosen) :]
    sides = {a: (b, e) for a, b, e in zip(chosen, before, after, strict=True)}
    flat = [side for a in reversed(range(x.dim())) for side in sides.get(a, (0, 0))]
    return F.pad(x, flat, value=n.get("value", 0.0) if value is None else value.item())


@operator("CumSum")
def _cumsum(n: Node, x: Tensor, axis: Tensor) -> Tensor:
    if n.get("exclusive", 0) or n.get("reverse", 0):
        raise Unsupported("exclusive or reverse")
    return torch.cumsum(x, int(axis)).to(x.dtype)


# --- reductions


def _reduction(function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Operator:
    def reduce(n: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
        given = n.get("axes") or ints(axes)
        if not given and n.get("noop_with_empty_axes", 0):
            return x
        return function(x, tuple(given or range(x.dim())), bool(n.get("keepdims", 1)))

    return reduce


OPERATORS.update(
    ReduceSum=_reduction(lambda x, axes, keep: x.sum(axes, keepdim=keep, dtype=x.dtype)),
    ReduceMean=_reduction(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    ReduceMax=_reduction(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    ReduceMin=_reduction(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    ReduceL2=_reduction(lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep)),
    ReduceL1=_reduction(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    ReduceSumSquare=_reduction(lambda x, axes, keep: (x * x).sum(axes, keepdim=keep)),
    ReduceLogSumExp=_reduction(lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep)),
)


@operator("TopK")
def _top_k(n: Node, x: Tensor, k: Tensor) -> Any:
    return torch.topk(x, int(k), n.get("axis", -1), bool(n.get("largest", 1)), bool(n.get("sorted", 1)))


@operator("ArgMax")
def _argmax(n: Node, x: Tensor) -> Tensor:
    if n.get("select_last_index", 0):
        raise Unsupported("select_last_index")
    return x.argmax(n.get("axis", 0), keepdim=bool(n.get("keepdims", 1)))
