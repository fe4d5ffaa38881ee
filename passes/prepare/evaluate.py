"""Computing one node whose inputs are constants; the size of the result is known before the work is done."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .. import graph
from .protobuf import type_proto

TINY = 1024  # bytes: inputs below this give small results in every operator that is not in GENERATORS

# The values of their inputs, not the sizes, decide how large the result is.
GENERATORS = frozenset(
    {"ConstantOfShape", "Expand", "Tile", "Range", "OneHot", "Pad", "EyeLike", "Loop",
     "CenterCropPad", "BlackmanWindow", "HannWindow", "HammingWindow", "DFT", "STFT"}
)  # fmt: skip

# Written as Python loops in onnx's reference implementation: a large one would take minutes.
SLOW = frozenset(
    {"Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "DeformConv", "Col2Im", "AveragePool", "MaxPool",
     "LpPool", "MaxRoiPool", "LSTM", "GRU",
     "RNN", "LRN", "DFT", "STFT", "TfIdfVectorizer", "StringNormalizer", "AffineGrid",
     "TopK", "Unique", "Compress", "GatherND", "ScatterND", "ScatterElements", "TensorScatter", "Det",
     "CumProd", "ReverseSequence"}
)  # fmt: skip
# The standard leaves room, or onnx's reference implementation differs from what runtimes do.
UNFAITHFUL = frozenset(
    {"Attention", "CausalConvWithState", "GridSample", "ImageDecoder", "LinearAttention", "MaxUnpool",
     "MelWeightMatrix", "NonMaxSuppression", "Resize", "RoiAlign", "Upsample"}
)  # fmt: skip
SLOW_ELEMENTS = 1 << 14
MULTIPLICATIONS = 1 << 30  # about a second of NumPy

# Products: the work is far more than the result.
PRODUCTS = frozenset({"MatMul", "Gemm", "Einsum", "MatMulInteger", "QLinearMatMul"})


class Refusal(Exception):
    """Why a node is not computed now."""


@dataclass(frozen=True)
class Limits:
    """result: bytes of the largest result. inputs: bytes read for one node."""

    result: int
    inputs: int


def predict_bytes(node: ir.Node, opset: int, tensors: list[ir.TensorProtocol | None]) -> int:
    """Upper bound of the bytes that the outputs take, without computing them. Raises Refusal."""
    import onnx
    import onnx.defs
    import onnx.shape_inference

    total = sum(graph.nbytes(t) for t in tensors if t is not None)
    if total <= TINY and node.op_type not in GENERATORS:
        return TINY * TINY
    proto = ir.to_proto(node)
    data: dict[str, onnx.TensorProto] = {}
    types: dict[str, onnx.TypeProto] = {}
    for index, (value, tensor) in enumerate(zip(node.inputs, tensors, strict=True)):
        if value is None or tensor is None:
            continue
        name = f"input{index}"
        proto.input[index] = name
        shaped = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=graph.tensor_shape(tensor))
        described = type_proto(shaped)
        assert described is not None
        types[name] = described
        if graph.nbytes(tensor) <= graph.SMALL:
            data[name] = ir.to_proto(ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=name))
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
        inferred = onnx.shape_inference.infer_node_outputs(
            schema, proto, types, data, opset_imports=[onnx.helper.make_opsetid(node.domain, opset)]
        )
    except Exception as error:  # inference raises several kinds for invalid nodes
        raise Refusal(f"its size cannot be told: {' '.join(str(error).split())[:120]}") from error
    size = 0
    for value in node.outputs:
        if not value.name:
            continue
        found = inferred.get(value.name)
        if found is None or not found.HasField("tensor_type"):
            raise Refusal("its result is not a tensor")
        dims = found.tensor_type.shape.dim
        if not found.tensor_type.HasField("shape") or not all(dim.HasField("dim_value") for dim in dims):
            if total <= graph.SMALL and node.op_type not in GENERATORS:
                return TINY * TINY
            raise Refusal("the size of its result is not known beforehand")
        dtype = ir.DataType(found.tensor_type.elem_type)
        bits = 128 if dtype == ir.DataType.STRING else dtype.bitwidth
        size += math.ceil(math.prod(dim.dim_value for dim in dims) * bits / 8)
    return size


def check_work(node: ir.Node, tensors: list[ir.TensorProtocol | None], result_bytes: int) -> None:
    """Raises Refusal when computing the node would take long, or give other numbers than a runtime."""
    if node.op_type in UNFAITHFUL:
        raise Refusal("runtimes and the reference implementation differ")
    elements = max((t.size for t in tensors if t is not None), default=0)
    if node.op_type in SLOW and max(elements, result_bytes // 4 if result_bytes != TINY * TINY else 0) > SLOW_ELEMENTS:
        raise Refusal(f"{node.op_type} of {elements} elements takes too long here")
    if node.op_type in PRODUCTS:
        shapes = [t.shape.numpy() for t in tensors if t is not None]
        inner = max((dims[-1] for dims in shapes if dims), default=1)
        if inner * result_bytes // 4 > MULTIPLICATIONS:
            raise Refusal(f"{node.op_type} with about {inner * result_bytes // 4:.1e} multiplications takes too long")


def read(tensor: ir.TensorProtocol) -> np.ndarray:
    """The tensor's array in memory of its own: a mapped file would stay resident."""
    if isinstance(tensor, ir.ExternalTensor) and tensor.dtype.bitwidth >= 8 and tensor.size:
        dtype = np.dtype(tensor.dtype.numpy())
        with open(tensor.path, "rb") as file:
            flat = np.fromfile(file, dtype, count=tensor.size, offset=tensor.offset or 0)
        return flat.reshape(tensor.shape.numpy())
    return tensor.numpy()


def evaluate(node: ir.Node, opset: int, tensors: list[ir.TensorProtocol | None]) -> list[np.ndarray]:
    """The outputs of a standard operator by onnx's reference implementation. Raises Refusal."""
    import onnx.reference.ops

    arrays = [None if t is None else read(t) for t in tensors]
    parameters = {"log": lambda *_: None, "opsets": {"": opset}, "verbose": 0, "new_ops": None}
    try:
        implementation = onnx.reference.ops.load_op("", node.op_type, opset)
        with np.errstate(all="ignore"):
            results = implementation(ir.to_proto(node), parameters).run(*arrays)
    except Exception as error:  # the reference implementation raises whatever NumPy raises
        raise Refusal(f"the reference implementation cannot: {' '.join(str(error).split())[:120]}") from error
    checked: list[np.ndarray] = []
    for value, array in zip(node.outputs, results, strict=False):
        if not isinstance(array, np.ndarray | np.generic):
            raise Refusal("its result is not a tensor")
        array = np.asarray(array)
        if value.dtype is not None and value.dtype != ir.DataType.STRING and array.dtype != value.dtype.numpy():
            raise Refusal(f"the reference implementation gives {array.dtype}, the model says {value.dtype}")
        checked.append(array)
    return checked
