"""Products, normalizations, convolutions, pooling and attention for the table of `torch_operators`, with its names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .torch_operators import Node, Unsupported, operator

# --- products and normalizations


@operator("Gemm")
def _gemm(n: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.T if n.get("transA", 0) else a
    b = b.T if n.get("transB", 0) else b
    y = a @ b * n.get("alpha", 1.0)
    return y if c is None else y + c * n.get("beta", 1.0)


@operator("Einsum")
def _einsum(n: Node, *inputs: Tensor) -> Tensor:
    return torch.einsum(n.get("equation"), *inputs)


def _softmax_axes(n: Node, x: Tensor, function: Callable[..., Tensor]) -> Tensor:
    """Before opset 13 the softmax is over all axes from `axis` on."""
    if n.opset >= 13:
        return function(x, dim=n.get("axis", -1))
    axis = n.get("axis", 1)
    return function(x.flatten(axis), dim=-1).reshape(x.shape)


@operator("Softmax")
def _softmax(n: Node, x: Tensor) -> Tensor:
    return _softmax_axes(n, x, torch.softmax)


@operator("LogSoftmax")
def _log_softmax(n: Node, x: Tensor) -> Tensor:
    return _softmax_axes(n, x, torch.log_softmax)


@operator("LayerNormalization")
def _layer_norm(n: Node, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    if n.outputs > 1:
        raise Unsupported("mean and deviation as outputs")
    axis = n.get("axis", -1) % x.dim()
    shape = tuple(x.shape[axis:])
    plain = F.layer_norm(x, shape, None, None, n.get("epsilon", 1e-5)) * scale
    return plain if bias is None else plain + bias


@operator("RMSNormalization")
def _rms_norm(n: Node, x: Tensor, scale: Tensor) -> Tensor:
    axis = n.get("axis", -1) % x.dim()
    mean = (x * x).mean(tuple(range(axis, x.dim())), keepdim=True)
    return x * torch.rsqrt(mean + n.get("epsilon", 1e-5)) * scale


@operator("LpNormalization")
def _lp_norm(n: Node, x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, ord=n.get("p", 2), dim=n.get("axis", -1), keepdim=True)
    return torch.where(norm > 0, x / torch.where(norm > 0, norm, torch.ones_like(norm)), torch.zeros_like(x))


@operator("BatchNormalization")
def _batch_norm(n: Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    if n.get("training_mode", 0):
        raise Unsupported("training mode")
    return F.batch_norm(x, mean, var, scale, bias, eps=n.get("epsilon", 1e-5))


@operator("InstanceNormalization")
def _instance_norm(n: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=n.get("epsilon", 1e-5))


@operator("GroupNormalization")
def _group_norm(n: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = n.get("num_groups")
    if n.opset < 21:
        scale, bias = (t.repeat_interleave(x.shape[1] // groups) for t in (scale, bias))
    return F.group_norm(x, groups, scale, bias, n.get("epsilon", 1e-5))


# --- images


def _padded(n: Node, x: Tensor, kernel: Sequence[int], fill: float = 0.0) -> Tensor:
    """x with what the attributes say around it."""
    dims = len(kernel)
    strides, dilations = n.get("strides") or [1] * dims, n.get("dilations") or [1] * dims
    auto, pads = n.get("auto_pad", "NOTSET"), n.get("pads") or [0] * 2 * dims
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        sides = []
        for size, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True):
            total = max(0, (math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size)
            small = total // 2
            sides.append((small, total - small) if auto == "SAME_UPPER" else (total - small, small))
        pads = [b for b, _ in sides] + [e for _, e in sides]
    elif auto == "VALID":
        pads = [0] * 2 * dims
    flat = [side for a in reversed(range(dims)) for side in (pads[a], pads[a + dims])]
    return F.pad(x, flat, value=fill) if any(flat) else x


@operator("Conv")
def _conv(n: Node, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    dims = x.dim() - 2
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    strides, dilations = tuple(n.get("strides") or [1] * dims), tuple(n.get("dilations") or [1] * dims)
    return function(_padded(n, x, w.shape[2:]), w, b, strides, 0, dilations, n.get("group", 1))


@operator("ConvTranspose")
def _conv_transpose(n: Node, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    dims = x.dim() - 2
    pads = n.get("pads") or [0] * 2 * dims
    if n.get("output_shape") or n.get("auto_pad", "NOTSET") != "NOTSET" or pads[:dims] != pads[dims:]:
        raise Unsupported("automatic or uneven padding")
    function = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[dims]
    return function(
        x, w, b, tuple(n.get("strides") or [1] * dims), tuple(pads[:dims]),
        tuple(n.get("output_padding") or [0] * dims), n.get("group", 1), tuple(n.get("dilations") or [1] * dims),
    )  # fmt: skip


@operator("MaxPool")
def _max_pool(n: Node, x: Tensor) -> Tensor:
    if n.get("ceil_mode", 0) or n.outputs > 1:
        raise Unsupported("ceil_mode, or indices")
    kernel = n.get("kernel_shape")
    function = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(kernel)]
    strides, dilations = (tuple(n.get(name) or [1] * len(kernel)) for name in ("strides", "dilations"))
    return function(_padded(n, x, kernel, -math.inf), tuple(kernel), strides, 0, dilations)


@operator("AveragePool")
def _average_pool(n: Node, x: Tensor) -> Tensor:
    kernel = n.get("kernel_shape")
    if n.get("ceil_mode", 0) or any(d != 1 for d in n.get("dilations") or []):
        raise Unsupported("ceil_mode or dilations")
    function = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(kernel)]
    strides = tuple(n.get("strides") or [1] * len(kernel))
    total = function(_padded(n, x, kernel), tuple(kernel), strides)
    if n.get("count_include_pad", 0):
        return total
    return total / function(_padded(n, torch.ones_like(x), kernel), tuple(kernel), strides)


# --- attention


@operator("TensorScatter")
def _tensor_scatter(n: Node, past: Tensor, new: Tensor, where: Tensor | None = None) -> Tensor:
    if n.get("mode", "linear") != "linear":
        raise Unsupported("a circular cache")
    axis = n.get("axis", -2) % past.dim()
    items = []
    for item, first in enumerate([0] * len(past) if where is None else where.tolist()):
        old, rows = past[item], new[item]
        behind = first + rows.shape[axis - 1]
        parts = [old.narrow(axis - 1, 0, first), rows, old.narrow(axis - 1, behind, old.shape[axis - 1] - behind)]
        items.append(torch.cat(parts, axis - 1))
    return torch.stack(items)


@operator("RotaryEmbedding")
def _rotary(n: Node, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    flat = x.dim() == 3
    if flat:
        x = x.unflatten(-1, (n.get("num_heads"), -1)).transpose(1, 2)  # (batch, heads, length, size)
    if positions is not None:
        cos, sin = cos[positions.long()], sin[positions.long()]
    width = n.get("rotary_embedding_dim", 0) or x.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if n.get("interleaved", 0):
        a, b = turned[..., ::2], turned[..., 1::2]
        y = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        y = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    y = torch.cat([y, rest], -1)
    return y.transpose(1, 2).flatten(-2) if flat else y


@operator("Attention")
def _attention(
    n: Node, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, past_k: Tensor | None = None,
    past_v: Tensor | None = None, lengths: Tensor | None = None,
) -> Any:  # fmt: skip
    if n.outputs > 3:
        raise Unsupported("products as an output")
    flat = q.dim() == 3
    if flat:
        q = q.unflatten(-1, (n.get("q_num_heads"), -1)).transpose(1, 2)
        k, v = (x.unflatten(-1, (n.get("kv_num_heads"), -1)).transpose(1, 2) for x in (k, v))
    offset = 0
    if past_k is not None and past_v is not None:
        offset = past_k.shape[2]
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    presents = (k, v)
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scale = n.get("scale")
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    cap = n.get("softcap", 0.0)
    if cap:
        scores = cap * torch.tanh(scores / cap)
    if lengths is not None:  # of the keys of each item that are filled, the queries being the last of them
        end = lengths.reshape(-1, 1, 1, 1)
        if n.get("is_causal", 0):
            end = end - scores.shape[-2] + 1 + torch.arange(scores.shape[-2])[:, None]
        scores = scores.masked_fill(torch.arange(scores.shape[-1]) >= end, -math.inf)
    elif n.get("is_causal", 0):
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(offset)
        scores = scores.masked_fill(~seen, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    # A row that sees nothing is 0, and gives no gradient.
    none = (scores == -math.inf).all(-1, keepdim=True)
    y = torch.softmax(scores.masked_fill(none, 0.0), -1).masked_fill(none, 0.0) @ v
    y = y.transpose(1, 2).flatten(-2) if flat else y
    return y if n.outputs == 1 else (y, *presents)
