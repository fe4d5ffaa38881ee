"""Convolutions that TVM can take and onnxruntime runs faster.

The kernels for convolutions are written for one or two spatial axes of known sizes, and for two of unknown ones. The
latter are taken where nothing on such images in front of another convolution is without a kernel (`FREE`): a change of
runtime costs more than they gain. TVM's general code for others takes several times what
onnxruntime's kernels take, so an artifact for this processor leaves such convolutions, and the nodes between them, to
onnxruntime.

Convolutions along one axis of free length become products (`importing/sliding.py`). These are as fast among other
products, as in layers of text and speech, where a change of runtime in every layer costs more than they do. Networks of
convolutions alone, as vocoders, stay with onnxruntime.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from ..passes import graph
from .partition import reads

UNKNOWN = "its height, width or length is known only at run time, where onnxruntime is faster; pin it to compile it"
DEEP = "onnxruntime is faster at convolutions along three or more axes"
BETWEEN = "between convolutions that onnxruntime is faster at"
CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
PRODUCTS = frozenset({"MatMul", "Gemm", "Attention", "LSTM", "GRU", "RNN", "Einsum"})

# Operators that have kernels for images whose height and width are known only at run time; `_fits` says in which forms.
ELEMENTWISE = frozenset({
    "Abs", "Add", "BatchNormalization", "Cast", "Celu", "Clip", "Div", "Dropout", "Elu", "Erf", "Exp", "Gelu",
    "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow", "Relu",
    "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Swish", "Tanh",
})  # fmt: skip
FREE = ELEMENTWISE | {
    "AveragePool", "Concat", "Conv", "ConvTranspose", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "ReduceMean",
    "Resize", "Shape", "Slice", "Split", "Upsample",
}  # fmt: skip
# What may stand behind the last convolution in any form.
HEADS = ELEMENTWISE | {
    "ArgMax", "Concat", "Expand", "Flatten", "Gather", "Gemm", "LogSoftmax", "MatMul", "ReduceMax", "ReduceMean",
    "ReduceSum", "Reshape", "Shape", "Slice", "Softmax", "Split", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip


def spared(model: ir.Model, lanes: int) -> dict[ir.Node, str]:
    """Nodes of the main graph that onnxruntime should run -> why; none where there are kernels for all convolutions.
    lanes: elements of float32 in a vector of the target.

    Around the convolutions these are the nodes that such tensors lead to or come from, what is on a way
    from one of them to another, such as sizes that are computed, and all others where no convolution or product is
    left. Products stay.
    """
    nodes = list(model.graph)
    needed = _behind(nodes, [node for node in nodes if _reason(node)])
    free = all(_fits(node, lanes) or (node not in needed and node.op_type in HEADS) for node in nodes)
    # Sizes in bodies are often not inferred: with fixed inputs the importer finds them.
    fixed = all(graph.static_shape(value) is not None for value in model.graph.inputs if not value.is_initializer())
    found = {node: reason for node in nodes if (reason := _reason(node) or (None if fixed else _inside(node)))}
    if free:
        found = {node: reason for node, reason in found.items() if reason != UNKNOWN or node.op_type not in FREE}
    if not found or _in_layers(nodes, list(found)):
        return {}
    found.update(dict.fromkeys(_beside(found, set(nodes)) - set(found), BETWEEN))
    before, after = _ahead(nodes, found), _behind(nodes, found)
    between = before & after - set(found)
    found.update((n, BETWEEN) for n in nodes if n in between and n.op_type not in PRODUCTS)
    rest = [n for n in nodes if n not in found]
    if all(n.op_type not in PRODUCTS | CONVOLUTIONS for n in rest):
        found.update(dict.fromkeys(rest, BETWEEN))
    return found


def _fits(node: ir.Node, lanes: int) -> bool:
    """Whether a node touches no image of unknown height or width, or has a kernel for those."""
    if not any(map(_moving, (*node.inputs, *node.outputs))):
        return True
    if node.op_type not in FREE or node.domain:
        return False
    data = node.inputs[0]
    if data is None or data.shape is None or len(data.shape) != 4 or data.dtype != ir.DataType.FLOAT:
        return node.op_type in ELEMENTWISE
    attributes = node.attributes
    pads = attributes.get_string("auto_pad", "NOTSET")
    if pads not in ("NOTSET", "VALID") or attributes.get_int("ceil_mode", 0) != 0:
        return False
    channels = data.shape[1]
    if node.op_type in CONVOLUTIONS:
        sizes, groups = graph.static_shape(node.inputs[1]), attributes.get_int("group", 1)
        if sizes is None or graph.constant_tensor(node.inputs[1]) is None or not isinstance(channels, int):
            return False
        if "output_shape" in attributes:
            return False
        each = [sizes[0] // groups, sizes[1]]  # channels of a group, of inputs and of outputs in some order
        depthwise = groups == channels and each == [1, 1]
        return groups == 1 or depthwise or each[0] % lanes == each[1] % lanes == 0
    if node.op_type in ("MaxPool", "AveragePool"):
        return len(node.outputs) == 1 and isinstance(channels, int)
    if node.op_type == "Concat":
        return attributes.get_int("axis", 0) in (1, -3)
    if node.op_type in ("Slice", "Split"):
        return all(_same_but_channels(data, output) for output in node.outputs)
    if node.op_type == "ReduceMean":
        axes = graph.constant_tensor(node.inputs[1]) if len(node.inputs) > 1 else attributes.get_ints("axes", [])
        return axes is not None and sorted(int(a) % 4 for a in np.asarray(axes).reshape(-1)) == [2, 3]
    if node.op_type in ("Resize", "Upsample"):
        return isinstance(channels, int) and (_repeats(node) or _mixes(node))
    return True


def _same_but_channels(given: ir.Value, made: ir.Value) -> bool:
    """Whether an image has another known number of channels and nothing else that differs."""
    if given.shape is None or made.shape is None or len(made.shape) != len(given.shape):
        return False
    channels = (given.shape[1], made.shape[1])
    alike = all(a == b for i, (a, b) in enumerate(zip(given.shape, made.shape, strict=True)) if i != 1)
    return alike and all(isinstance(count, int) for count in channels)


def _repeats(node: ir.Node) -> bool:
    """Whether a resize repeats every row and column a known number of times."""
    attributes = node.attributes
    where = 1 if node.op_type == "Upsample" else 2
    scales = graph.constant_tensor(node.inputs[where]) if len(node.inputs) > where else None
    if attributes.get_string("mode", "nearest") != "nearest" or scales is None or "axes" in attributes:
        return False
    factors = np.asarray(scales).reshape(-1)
    if len(factors) != 4 or any(factors[:2] != 1) or any(factors != np.round(factors)):
        return False
    transform = attributes.get_string("coordinate_transformation_mode", "half_pixel")
    nearest = attributes.get_string("nearest_mode", "round_prefer_floor")
    if node.op_type == "Upsample" or (transform in ("asymmetric", "tf_half_pixel_for_nn") and nearest == "floor"):
        return True
    return transform in ("half_pixel", "half_pixel_symmetric") and nearest.startswith("round_prefer")


def _mixes(node: ir.Node) -> bool:
    """Whether a resize takes weighted sums of neighbours, by a whole factor or to sizes that are given."""
    attributes = node.attributes
    if node.op_type == "Upsample" or "axes" in attributes or attributes.get_int("antialias", 0) != 0:
        return False
    if attributes.get_string("mode", "nearest") not in ("linear", "cubic"):
        return False
    if attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        return False
    if attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        return False
    if graph.input_of(node, 3) is not None:
        return True
    scales = graph.input_of(node, 2)
    tensor = None if scales is None else graph.constant_tensor(scales)
    factors = [] if tensor is None else np.asarray(tensor).reshape(-1).tolist()
    return len(factors) == 4 and all(factor == round(factor) for factor in factors)


def _inside(node: ir.Node) -> str | None:
    """Why one in a body that the node owns is faster on onnxruntime."""
    for body in graph.subgraphs(node):
        for inner in body:
            if reason := _reason(inner) or _inside(inner):
                return reason
    return None


def _reason(node: ir.Node) -> str | None:
    if node.op_type not in CONVOLUTIONS or node.domain or node.inputs[0] is None or node.inputs[0].shape is None:
        return None
    if len(node.inputs[0].shape) > 4:
        return DEEP
    return UNKNOWN if _moving(node.inputs[0]) else None


def _in_layers(nodes: list[ir.Node], convolutions: list[ir.Node]) -> bool:
    """Whether all of them become products, and other nodes are as many products."""
    products = sum(node.op_type in PRODUCTS for node in nodes)
    return len(convolutions) <= products and all(map(_slides, convolutions))


def _slides(node: ir.Node) -> bool:
    """Whether `importing/sliding.py` takes a convolution of free length."""
    data, weight = node.inputs[0], graph.input_of(node, 1)
    if node.op_type != "Conv" or data is None or data.dtype != ir.DataType.FLOAT:
        return False
    sizes, groups = graph.static_shape(weight), node.attributes.get_int("group", 1)
    if graph.constant_tensor(weight) is None or sizes is None or len(sizes) != 3:
        return False
    return groups == 1 or (sizes[1] == 1 and groups == sizes[0])


def _moving(value: ir.Value | None) -> bool:
    """Whether there are three or more axes behind the channels, or one of a size that is known only at run time."""
    if value is None or value.shape is None:
        return False
    behind = value.shape.dims[2:]
    return len(behind) > 2 or any(not isinstance(d, int) for d in behind)


def _beside(started: Iterable[ir.Node], nodes: set[ir.Node]) -> set[ir.Node]:
    """Nodes that are reached from `started` through tensors whose sizes are not known, in either direction."""
    found, waiting = set(started), list(started)
    while waiting:
        node = waiting.pop()
        values = filter(_moving, (*reads(node), *node.outputs))
        near = {other for v in values for other in (v.producer(), *(use.node for use in v.uses())) if other is not None}
        new = (near & nodes) - found
        found |= new
        waiting += new
    return found


def _ahead(nodes: list[ir.Node], found: Iterable[ir.Node]) -> set[ir.Node]:
    """Nodes that depend on `found`."""
    reached = set(found)
    for node in nodes:
        if any(value.producer() in reached for value in reads(node)):
            reached.add(node)
    return reached


def _behind(nodes: list[ir.Node], found: Iterable[ir.Node]) -> set[ir.Node]:
    """Nodes that `found` depend on."""
    reached = set(found)
    for node in reversed(nodes):
        if node in reached:
            reached |= {p for value in reads(node) if (p := value.producer()) is not None}
    return reached
