"""Convolutions and pools along three axes as those of pictures.

    Y[n, d] = sum over k of conv2d (X[n, stride · d + dilation · k], W[:, :, k])

Depths count as pictures. The slices of X that meet the taps of the depth lie behind each other as channels: one Conv of
N · D pictures of kernel depth x C channels has the same products and sums, in another order. In groups there is a Conv
for every tap. A transposed convolution whose taps do not overlap in depth makes the depths of each picture as channels;
for others depths are written with zeros between them. Pools take the greatest, or the mean, of the slices first.
Consecutive operators pass pictures on to each other once transposes are cancelled.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from .. import graph
from .body_builder import Body
from .evaluate import Refusal

TO_PICTURES = (0, 2, 1, 3, 4)  # (N, C, D, H, W) <-> (N, D, C, H, W)


def along_three_axes(node: ir.Node) -> bool:
    return graph.rank(graph.input_of(node, 0)) == 5


@dataclass(frozen=True)
class Window:
    """What a window sees of a volume. pads: in front of depth, height and width, then behind them."""

    channels: int
    sizes: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]

    @property
    def padded(self) -> int:
        """Depths, with those of the padding."""
        return self.sizes[0] + self.pads[0] + self.pads[3]

    @property
    def out(self) -> list[int]:
        """Depth, height and width of the result."""
        return [
            (size + self.pads[axis] + self.pads[axis + 3] - self.dilations[axis] * (taps - 1) - 1) // self.strides[axis]
            + 1
            for axis, (size, taps) in enumerate(zip(self.sizes, self.kernel, strict=True))
        ]

    @property
    def flat(self) -> dict[str, Any]:
        """Attributes of the operator on pictures."""
        return {
            "kernel_shape": self.kernel[1:], "strides": self.strides[1:], "dilations": self.dilations[1:],
            "pads": (*self.pads[1:3], *self.pads[4:6]),
        }  # fmt: skip


def conv(node: ir.Node, opset: int, max_steps: int) -> Body:
    weights = _weights(node, opset)
    outputs, each, *kernel = weights
    window, groups = _window(node, kernel), graph.attribute(node, "group", 1)
    if window.channels != each * groups:
        raise Refusal(f"it reads {window.channels} channels with weights for {each * groups}")
    body, bias = Body(opset), "input2" if graph.input_of(node, 2) is not None else None
    slices = _slices(body, window, 0.0)
    if groups == 1:
        joined = slices[0] if len(slices) == 1 else body.op("Concat", *slices, axis=2)
        weight = body.op("Transpose", "input1", perm=TO_PICTURES)
        weight = body.op("Reshape", weight, body.constant([outputs, kernel[0] * each, *kernel[1:]]))
        result = body.op("Conv", _flat(body, joined, window, kernel[0]), weight, bias, **window.flat)
    else:
        result = ""
        for k, part in enumerate(slices):
            weight = _sliced(body, "input1", 2, k, k + 1)
            weight = body.op("Squeeze", weight, body.constant([2]))
            flat = _flat(body, part, window)
            partial = body.op("Conv", flat, weight, None if result else bias, group=groups, **window.flat)
            result = body.op("Add", result, partial) if result else partial
    return _volume(body, result, [outputs, *window.out])


def conv_transpose(node: ir.Node, opset: int, max_steps: int) -> Body:
    each, outputs, *kernel = _weights(node, opset)
    window, more = _window(node, kernel), graph.attribute(node, "output_padding", [0] * 3)
    if graph.attribute(node, "auto_pad", "NOTSET") != "NOTSET" or graph.attribute(node, "output_shape") is not None:
        raise Refusal("its padding follows from the size of its result")
    if graph.attribute(node, "group", 1) != 1:
        raise Refusal("it has groups")
    body, taps, stride, pads = Body(opset), kernel[0], window.strides[0], window.pads
    size = [
        (window.sizes[axis] - 1) * window.strides[axis] + window.dilations[axis] * (kernel[axis] - 1) + 1
        - pads[axis] - pads[axis + 3] + more[axis]
        for axis in range(3)
    ]  # fmt: skip
    bias = "input2" if graph.input_of(node, 2) is not None else None
    pictures = body.op("Transpose", "input0", perm=TO_PICTURES)
    if taps == stride and size[0] == window.sizes[0] * stride and not pads[0]:
        weight = body.op("Transpose", "input1", perm=TO_PICTURES)
        weight = body.op("Reshape", weight, body.constant([each, taps * outputs, *kernel[1:]]))
        bias = bias and body.op("Concat", *[bias] * taps, axis=0)
        flat = _flat(body, pictures, window)
    else:
        weight = body.op("Transpose", "input1", perm=(2, 0, 1, 3, 4))
        weight = body.op("Reshape", weight, body.constant([taps * each, outputs, *kernel[1:]]))
        flat = _flat(body, _depths_apart(body, pictures, window, size[0]), window, taps)
    result = body.op("ConvTranspose", flat, weight, bias, output_padding=more[1:], **window.flat)
    return _volume(body, result, [outputs, *size])


def _depths_apart(body: Body, pictures: str, window: Window, depth: int) -> str:
    """What meets each tap of a transposed convolution, as channels behind each other: depths with zeros between."""
    stride, dilation, pad = window.strides[0], window.dilations[0], window.pads[0]
    if stride > 1:
        apart = body.op("Unsqueeze", pictures, body.constant([2]))
        apart = body.op("Pad", apart, body.constant([0] * 8 + [stride - 1, 0, 0, 0]))
        shape = [-1, window.sizes[0] * stride, window.channels, *window.sizes[1:]]
        pictures = body.op("Reshape", apart, body.constant(shape))
    front = max(0, (window.kernel[0] - 1) * dilation - pad)
    behind = max(0, depth + pad - window.sizes[0] * stride)
    if front or behind:
        pictures = body.op("Pad", pictures, body.constant([0, front, 0, 0, 0, 0, behind, 0, 0, 0]))
    firsts = [front + pad - k * dilation for k in range(window.kernel[0])]
    return body.op("Concat", *(_sliced(body, pictures, 1, first, first + depth) for first in firsts), axis=2)


def max_pool(node: ir.Node, opset: int, max_steps: int) -> Body:
    window = _pool(node, opset)
    if len(node.outputs) > 1 and node.outputs[1].name:
        raise Refusal("its places are read")
    body = Body(opset)
    slices = _slices(body, window, float("-inf"))
    most = slices[0] if len(slices) == 1 else body.op("Max", *slices)
    result = body.op("MaxPool", _flat(body, most, window), **window.flat)
    return _volume(body, result, [window.channels, *window.out])


def average_pool(node: ir.Node, opset: int, max_steps: int) -> Body:
    window, inclusive = _pool(node, opset), graph.attribute(node, "count_include_pad", 0)
    if (window.pads[0] or window.pads[3]) and not inclusive:
        raise Refusal("its padding in depth does not count")
    if any(dilation != 1 for dilation in window.dilations):
        raise Refusal("it is dilated")
    body = Body(opset)
    slices = _slices(body, window, 0.0)
    mean = slices[0] if len(slices) == 1 else body.op("Mean", *slices)
    attributes = {name: value for name, value in window.flat.items() if name != "dilations"}
    result = body.op("AveragePool", _flat(body, mean, window), count_include_pad=inclusive, **attributes)
    return _volume(body, result, [window.channels, *window.out])


def _pool(node: ir.Node, opset: int) -> Window:
    _check(node, opset)
    if graph.attribute(node, "ceil_mode", 0):
        raise Refusal("ceil_mode")
    return _window(node, list(graph.attribute(node, "kernel_shape")))


def _check(node: ir.Node, opset: int) -> None:
    if opset < 13:
        raise Refusal(f"it is written for opset 13 and later, the model has {opset}; run convert-opset first")
    x = graph.input_of(node, 0)
    if x is None or x.dtype != ir.DataType.FLOAT:
        raise Refusal(f"its data is {x.dtype if x is not None else 'missing'}, not float32")


def _weights(node: ir.Node, opset: int) -> list[int]:
    _check(node, opset)
    w = graph.input_of(node, 1)
    if w is None or not graph.is_constant(w) or w.shape is None:
        raise Refusal("its weights are computed at run time")
    return [size for size in w.shape if isinstance(size, int)]


def _window(node: ir.Node, kernel: list[int]) -> Window:
    """Raises Refusal where a size that it needs is not known."""
    x = graph.input_of(node, 0)
    shape = [] if x is None or x.shape is None else list(x.shape[1:])
    sizes = [size for size in shape if isinstance(size, int)]
    if len(sizes) != 4:
        raise Refusal("its channels, depth, height or width are not known; pin them")
    strides = tuple(graph.attribute(node, "strides", [1] * 3))
    dilations = tuple(graph.attribute(node, "dilations", [1] * 3))
    pads = _pads(node, sizes[1:], kernel, strides, dilations)
    window = Window(sizes[0], tuple(sizes[1:]), tuple(kernel), strides, dilations, pads)
    if node.op_type != "ConvTranspose" and min(window.out) < 1:
        raise Refusal("its kernel is larger than the volume")
    return window


def _pads(
    node: ir.Node, sizes: list[int], kernel: list[int], strides: tuple[int, ...], dilations: tuple[int, ...]
) -> tuple[int, ...]:
    kind = graph.attribute(node, "auto_pad", "NOTSET")
    if kind == "NOTSET":
        return tuple(graph.attribute(node, "pads", [0] * 6))
    before, behind = [0] * 3, [0] * 3
    if kind != "VALID":
        for axis, size in enumerate(sizes):
            span = dilations[axis] * (kernel[axis] - 1) + 1
            total = max(0, (-(-size // strides[axis]) - 1) * strides[axis] + span - size)
            less, more = total // 2, total - total // 2
            before[axis], behind[axis] = (less, more) if kind == "SAME_UPPER" else (more, less)
    return (*before, *behind)


def _slices(body: Body, window: Window, fill: float) -> list[str]:
    """Of (N, D, C, H, W): what meets each tap of the depth."""
    pictures = body.op("Transpose", "input0", perm=TO_PICTURES)
    if window.pads[0] or window.pads[3]:
        widths = body.constant([0, window.pads[0], 0, 0, 0, 0, window.pads[3], 0, 0, 0])
        pictures = body.op("Pad", pictures, widths, body.constant(np.float32(fill), ir.DataType.FLOAT))
    depth, stride = window.out[0], window.strides[0]
    if window.kernel[0] == 1 and stride == 1 and depth == window.padded:
        return [pictures]
    firsts = itertools.islice(itertools.count(0, window.dilations[0]), window.kernel[0])
    return [_sliced(body, pictures, 1, first, first + (depth - 1) * stride + 1, stride) for first in firsts]


def _sliced(body: Body, x: str, axis: int, start: int, stop: int, step: int = 1) -> str:
    return body.op("Slice", x, *(body.constant([value]) for value in (start, stop, axis, step)))


def _flat(body: Body, pictures: str, window: Window, times: int = 1) -> str:
    """(N, D, times · C, H, W) as (N · D, times · C, H, W)."""
    return body.op("Reshape", pictures, body.constant([-1, times * window.channels, *window.sizes[1:]]))


def _volume(body: Body, result: str, shape: list[int]) -> Body:
    """Pictures as the node's result, of `shape` (C, D, H, W)."""
    channels, depth, *size = shape
    volume = body.op("Reshape", result, body.constant([-1, depth, channels, *size]))
    body.op("Transpose", volume, out="output0", perm=TO_PICTURES)
    return body
