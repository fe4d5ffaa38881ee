"""Which of the sizes that onnx's inference cannot tell, and gives names of its own, are sizes that it knows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import onnx

Dim: TypeAlias = "int | str | None"
MADE = re.compile(r"unk__\d+")  # how onnx names a size that it does not know
MOST = 64  # elements of vectors that are followed as shapes
BROADCAST = frozenset(
    {"Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Or",
     "Pow", "Sub", "Where", "Xor"}
)  # fmt: skip
WINDOWS = frozenset({"AveragePool", "Conv", "LpPool", "MaxPool"})
PASSED = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"})  # keep a shape of rank 0 or 1 as it is


def name_equal_dims(inferred: onnx.ModelProto) -> None:
    """Give sizes that onnx named itself the names and numbers that follow for them, in the annotations of the graph.

    Reshape keeps the number of elements, so that the one size that it leaves open may be what the others leave;
    Range counts to a size; Slice, Tile and Resize leave other axes as they are; Expand, Resize and ConstantOfShape make
    the sizes that they are given; a window that moves by one over as much padding as it takes away keeps a size; sizes
    that are broadcast together and equal stay so.
    A size that is cut off at another one, and broadcast with it, is that one wherever the model can run.
    """
    if not any(MADE.fullmatch(dim.dim_param) for info in inferred.graph.value_info for dim in _dims(info)):
        return
    names = _Names(inferred.graph)
    for node in inferred.graph.node:
        if node.domain in ("", "ai.onnx"):
            names.visit(node)
    for info in (*inferred.graph.value_info, *inferred.graph.output):
        for dim in _dims(info):
            found = names.resolve(dim.dim_param) if dim.dim_param else None
            if isinstance(found, int):
                dim.dim_value = found
            elif found:
                dim.dim_param = found


def _dims(info: onnx.ValueInfoProto) -> Iterable[onnx.TensorShapeProto.Dimension]:
    return info.type.tensor_type.shape.dim if info.type.HasField("tensor_type") else ()


class _Names:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self._equal: dict[str, Dim] = {}
        self._bound: dict[str, Dim] = {}  # a size -> the size that it is cut off at, if that is not above it
        self._content: dict[str, list[Dim]] = {}
        self._shapes: dict[str, list[Dim]] = {}
        for info in (*graph.input, *graph.value_info, *graph.output):
            if info.type.HasField("tensor_type") and info.type.tensor_type.HasField("shape"):
                self._shapes[info.name] = [
                    dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in _dims(info)
                ]
        for tensor in graph.initializer:
            self._shapes[tensor.name] = list(tensor.dims)
            self._keep(tensor.name, tensor)

    def resolve(self, dim: Dim) -> Dim:
        while isinstance(dim, str) and dim in self._equal:
            dim = self._equal[dim]
        return dim

    def _keep(self, name: str, tensor: onnx.TensorProto) -> None:
        """The whole numbers of a small constant."""
        import onnx

        if tensor.data_type != onnx.TensorProto.INT64 or len(tensor.dims) > 1 or math.prod(tensor.dims) > MOST:
            return
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            self._content[name] = [int(x) for x in np.atleast_1d(onnx.numpy_helper.to_array(tensor))]

    def _shape(self, name: str) -> list[Dim] | None:
        found = self._shapes.get(name)
        return None if found is None else [self.resolve(dim) for dim in found]

    def _numbers(self, node: onnx.NodeProto, index: int) -> list[int] | None:
        content = self._content.get(node.input[index]) if index < len(node.input) else None
        numbers = [x for x in content or [] if isinstance(x, int)]
        return numbers if content is not None and len(numbers) == len(content) else None

    def _set(self, made: Dim, found: Dim) -> None:
        if isinstance(made, str) and MADE.fullmatch(made) and found is not None and found != made:
            self._equal[made] = found

    def visit(self, node: onnx.NodeProto) -> None:
        if len(node.output) == 0:
            return
        self._follow(node)
        out = self._shape(node.output[0])
        if out is None:
            return
        if node.op_type in BROADCAST:
            self._broadcast([self._shape(name) for name in node.input], out)
        if not any(isinstance(d, str) and MADE.fullmatch(d) for d in out):
            return
        if node.op_type == "Reshape":
            self._reshape(self._shape(node.input[0]), out)
        elif node.op_type == "Range":
            start, end, step = ((self._content.get(name) or [None])[0] for name in node.input)
            if (start, step) == (0, 1):
                self._set(out[0], self.resolve(end))
        elif node.op_type == "Slice":
            self._slice(node, out)
        elif node.op_type == "Tile":
            self._tile(self._shape(node.input[0]), self._content.get(node.input[1]), out)
        elif node.op_type == "Resize":
            self._resize(node, out)
        elif node.op_type == "ConstantOfShape":
            self._made(self._content.get(node.input[0]), out)
        elif node.op_type in WINDOWS:
            self._window(node, out)
        elif node.op_type == "Expand":
            wanted = [self.resolve(dim) for dim in self._content.get(node.input[1], [])]
            if len(wanted) <= len(out) and None not in wanted:
                self._broadcast([self._shape(node.input[0]), wanted], out)
        elif node.op_type == "MatMul":
            sides = [self._shape(name) for name in node.input]
            if all(side is not None and len(side) >= 2 for side in sides):
                self._broadcast([side[:-2] for side in sides if side is not None], out[:-2])

    def _follow(self, node: onnx.NodeProto) -> None:
        """What a node makes of shapes."""
        result: list[Dim] | None = None
        given = self._content.get(node.input[0]) if node.input else None
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Constant" and "value" in attributes:
            self._keep(node.output[0], attributes["value"].t)
        elif node.op_type == "Constant" and "value_int" in attributes:
            result = [attributes["value_int"].i]
        elif node.op_type == "Constant" and "value_ints" in attributes:
            result = list(attributes["value_ints"].ints)
        elif node.op_type == "Shape":
            dims = self._shape(node.input[0])
            bounds = [attributes[name].i if name in attributes else None for name in ("start", "end")]
            result = None if dims is None else dims[bounds[0] : bounds[1]]
        elif node.op_type in PASSED and len(self._shapes.get(node.output[0], [0, 0])) < 2:
            result = given
        elif node.op_type == "Gather" and given is not None:
            places = self._numbers(node, 1)
            inside = places is not None and all(-len(given) <= i < len(given) for i in places)
            result = [given[i] for i in places or []] if inside else None
        elif node.op_type == "Slice" and given is not None:
            starts, ends, steps = (self._numbers(node, i) for i in (1, 2, 4))
            if starts and ends and (len(node.input) < 5 or steps == [1]):
                result = given[starts[0] : ends[0]]
        elif node.op_type == "Concat":
            parts = [self._content.get(name) for name in node.input]
            result = None if None in parts else [dim for part in parts for dim in part or []]
        if result is not None and len(result) <= MOST:
            self._content[node.output[0]] = result

    def _reshape(self, before: list[Dim] | None, after: list[Dim]) -> None:
        if before is None or None in before or None in after:
            return
        rest, left = list(before), list(after)
        for dim in before:
            if isinstance(dim, str) and dim in left:
                rest.remove(dim)
                left.remove(dim)
        names = [[dim for dim in dims if isinstance(dim, str)] for dims in (rest, left)]
        sizes = [math.prod(dim for dim in dims if isinstance(dim, int)) for dims in (rest, left)]
        if len(names[1]) != 1 or len(names[0]) > 1 or not sizes[1] or sizes[0] % sizes[1]:
            return
        if not names[0]:
            self._set(names[1][0], sizes[0] // sizes[1])
        elif sizes[0] == sizes[1]:
            self._set(names[1][0], names[0][0])

    def _made(self, sizes: list[Dim] | None, out: list[Dim]) -> None:
        """An operator that makes the sizes that it is given."""
        if sizes is not None and len(sizes) == len(out):
            for made, size in zip(out, sizes, strict=True):
                self._set(made, self.resolve(size))

    def _tile(self, given: list[Dim] | None, counts: list[Dim] | None, out: list[Dim]) -> None:
        if given is None or counts is None or not len(given) == len(counts) == len(out):
            return
        for made, dim, count in zip(out, given, counts, strict=True):
            count = self.resolve(count)
            if 1 in (dim, count):
                self._set(made, count if dim == 1 else dim)
            elif isinstance(dim, int) and isinstance(count, int):
                self._set(made, dim * count)

    def _resize(self, node: onnx.NodeProto, out: list[Dim]) -> None:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        policy = attributes.get("keep_aspect_ratio_policy")
        if "axes" in attributes or (policy is not None and policy.s != b"stretch") or len(node.input) < 4:
            return
        self._made(self._content.get(node.input[3]), out)

    def _window(self, node: onnx.NodeProto, out: list[Dim]) -> None:
        """A convolution or pooling."""
        given = self._shape(node.input[0])
        attributes = {attribute.name: attribute for attribute in node.attribute}
        weights = self._shapes.get(node.input[1]) if node.op_type == "Conv" else None
        kernel = list(attributes["kernel_shape"].ints) if "kernel_shape" in attributes else (weights or [])[2:]
        if given is None or len(kernel) != len(given) - 2:
            return
        rank, same = len(kernel), attributes["auto_pad"].s if "auto_pad" in attributes else b"NOTSET"

        def numbers(name: str, default: int, count: int) -> list[int]:
            return list(attributes[name].ints) if name in attributes else [default] * count

        strides, dilations = numbers("strides", 1, rank), numbers("dilations", 1, rank)
        pads = [0] * 2 * rank if same == b"VALID" else numbers("pads", 0, 2 * rank)
        for axis, (size, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True)):
            if stride != 1 or not isinstance(size, int):
                continue
            if same.startswith(b"SAME") or pads[axis] + pads[axis + rank] == dilation * (size - 1):
                self._set(out[axis + 2], given[axis + 2])

    def _slice(self, node: onnx.NodeProto, out: list[Dim]) -> None:
        given = self._shape(node.input[0])
        axes = self._numbers(node, 3)
        if given is None or axes is None or len(given) != len(out):
            return
        axes = [axis % len(given) for axis in axes]
        starts, ends = (self._content.get(node.input[i], []) for i in (1, 2))
        steps = self._numbers(node, 4) if len(node.input) > 4 else [1] * len(axes)
        for axis, (made, dim) in enumerate(zip(out, given, strict=True)):
            if axis not in axes:
                self._set(made, dim)
        if len(starts) != len(axes) or len(ends) != len(axes) or steps is None or len(steps) != len(axes):
            return
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            end, made, whole = self.resolve(end), out[axis], given[axis]
            if (start, step) != (0, 1) or not isinstance(end, str) or not isinstance(made, str):
                continue
            if whole == end:
                self._set(made, end)
            elif isinstance(whole, int) and whole > 1:
                self._bound[made] = end

    def _broadcast(self, sides: list[list[Dim] | None], out: list[Dim]) -> None:
        known = [side for side in sides if side is not None]
        if len(known) != len(sides):
            return
        for place in range(1, len(out) + 1):
            dims = [side[-place] for side in known if len(side) >= place]
            for dim in dims:
                bound = self.resolve(self._bound.get(dim)) if isinstance(dim, str) else None
                if bound is not None and bound in dims:
                    self._set(dim, bound)
            different = {self.resolve(dim) for dim in dims} - {1}
            if len(different) == 1:
                self._set(out[-place], different.pop())
