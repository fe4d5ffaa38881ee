"""Every operator of the trainer against onnxruntime, on random inputs, and that gradients pass where they should."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from graphwright.passes.errors import PassError
from onnx import helper, numpy_helper

torch = pytest.importorskip("torch")
from graphwright.models.torch_graph import TorchGraph  # noqa: E402 -- needs torch
from graphwright.models.torch_operators import OPERATORS  # noqa: E402

pytestmark = pytest.mark.torch
RANDOM = np.random.default_rng(0)


def f(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def i(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def b(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 2, shape).astype(bool)


def positive(*shape: int) -> np.ndarray:
    return np.abs(f(*shape)) + 0.1


S = np.int64
# Operator, inputs, attributes, number of outputs, opset.
CASES: list[tuple[Any, ...]] = [
    *((op, [f(2, 3, 4)], {}) for op in (
        "Identity", "Neg", "Abs", "Exp", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Tan", "Atan", "Sinh", "Cosh",
        "Tanh", "Erf", "Sigmoid", "Relu", "Softsign", "HardSwish", "Mish", "Softplus", "HardSigmoid", "LeakyRelu",
        "Elu", "IsNaN", "Shape", "Size", "Gelu", "Flatten", "Transpose", "Softmax", "LogSoftmax", "LpNormalization")),
    *((op, [positive(2, 3)], {}) for op in ("Log", "Sqrt", "Reciprocal")),
    *((op, [f(2, 3, 4), f(3, 1)], {}) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Less", "Greater",
                                                 "LessOrEqual", "GreaterOrEqual", "Equal", "PRelu")),
    *((op, [b(2, 3), b(2, 3)], {}) for op in ("And", "Or", "Xor")),
    ("Not", [b(4)], {}), ("Where", [b(2, 3), f(2, 3), f(3)], {}), ("Div", [i(-7, 7, 9), i(2, -2, 3)], {}),
    ("Mod", [i(-7, 7, 9), i(2, -2, 4)], {}), ("Mod", [f(5), f(5)], {"fmod": 1}), ("Pow", [positive(2, 3), f(3)], {}),
    ("Pow", [f(2, 3), np.array(2, S)], {}), ("Clip", [f(9), np.float32(-0.3), np.float32(0.4)], {}),
    ("Clip", [f(9), None, np.float32(0.4)], {}), ("Gelu", [f(9)], {"approximate": "tanh"}),
    ("Swish", [f(9)], {"alpha": 1.5}, 1, 24), ("Shape", [f(2, 3, 4)], {"start": 1, "end": -1}),
    ("Cast", [f(5) * 9], {"to": 7}), ("CastLike", [i(1, 2), f(1)], {}), ("ConstantOfShape", [i(2, 3)], {}),
    ("Constant", [], {"value_floats": [1.0, 2.5]}), ("Constant", [], {"value": numpy_helper.from_array(f(2, 2))}),
    ("Range", [np.array(2, S), np.array(11, S), np.array(4, S)], {}), ("Reshape", [f(2, 3, 4), i(0, -1)], {}),
    ("Flatten", [f(2, 3, 4)], {"axis": -1}), ("Transpose", [f(2, 3, 4)], {"perm": [2, 0, 1]}),
    ("Unsqueeze", [f(2, 3), i(-1, 0)], {}), ("Squeeze", [f(1, 3, 1), i(0)], {}), ("Squeeze", [f(1, 3, 1)], {}),
    ("Concat", [f(2, 3), f(2, 1)], {"axis": -1}), ("Split", [f(7, 2)], {"num_outputs": 3}, 3),
    ("Split", [f(2, 5), i(2, 3)], {"axis": 1}, 2), ("Slice", [f(5, 6), i(1, -4), i(4, 99), i(0, 1)], {}),
    ("Slice", [f(5, 6), i(-1), i(-(1 << 62)), i(1), i(-2)], {}), ("Slice", [f(5), i(3), i(3)], {}),
    ("Gather", [f(5, 3), np.array([[0, -1], [2, 4]])], {}), ("Gather", [f(5, 3), np.array(1, S)], {"axis": 1}),
    ("Gather", [f(5), np.array(-1, S)], {}), ("GatherElements", [f(3, 4), np.array([[0, -1], [2, 3]])], {"axis": 1}),
    ("GatherND", [f(3, 4, 2), np.array([[0, 1], [-1, 3]])], {}),
    ("ScatterND", [f(4, 3), np.array([[1], [3]]), f(2, 3)], {}), ("Expand", [f(3, 1), i(2, 1, 4)], {}),
    ("Tile", [f(2, 3), i(2, 1)], {}), ("Trilu", [f(4, 4)], {}), ("Trilu", [f(4, 4), np.array(1, S)], {"upper": 0}),
    ("Pad", [f(2, 3), i(1, 0, 2, 1), np.float32(0.5)], {}), ("Pad", [f(2, 3), i(1, 2), None, i(1)], {}),
    ("CumSum", [f(2, 5), np.array(1, S)], {}),
    *((op, [f(2, 3, 4), i(-1, 0)], {"keepdims": k}) for k in (0, 1) for op in (
        "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare",
        "ReduceLogSumExp")),
    ("ReduceSum", [f(2, 3)], {}), ("ReduceSum", [f(2, 3)], {"noop_with_empty_axes": 1}),
    ("ArgMax", [f(3, 5)], {"axis": 1, "keepdims": 0}), ("MatMul", [f(2, 3, 4), f(4, 5)], {}),
    ("Gemm", [f(4, 3), f(5, 4), f(5)], {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Gemm", [f(3, 4), f(4, 5)], {}), ("Einsum", [f(2, 3, 4), f(2, 4, 5)], {"equation": "bij,bjk->bik"}),
    ("Softmax", [f(2, 3, 4)], {"axis": 1}), ("Softmax", [f(2, 3, 4)], {}, 1, 11),
    ("LayerNormalization", [f(2, 3, 4), f(4), f(4)], {"epsilon": 1e-3}),
    ("LayerNormalization", [f(2, 3, 4), f(3, 4)], {"axis": 1}),
    ("RMSNormalization", [f(2, 3, 4), f(4)], {"epsilon": 1e-3}, 1, 23),
    ("BatchNormalization", [f(2, 3, 4), f(3), f(3), f(3), positive(3)], {}),
    ("InstanceNormalization", [f(2, 3, 4, 5), f(3), f(3)], {}),
    ("GroupNormalization", [f(2, 4, 5, 3), f(4), f(4)], {"num_groups": 2}, 1, 21),
    ("GroupNormalization", [f(2, 4, 5, 3), f(2), f(2)], {"num_groups": 2}, 1, 20),
    ("GlobalAveragePool", [f(2, 3, 4, 5)], {}), ("GlobalMaxPool", [f(2, 3, 4, 5)], {}),
    ("Conv", [f(1, 4, 7, 6), f(6, 2, 3, 2), f(6)],
     {"group": 2, "strides": [2, 1], "pads": [1, 0, 2, 1], "dilations": [1, 2]}),
    ("Conv", [f(1, 2, 7), f(3, 2, 4)], {"auto_pad": "SAME_LOWER", "strides": [2]}),
    ("ConvTranspose", [f(1, 4, 3, 3), f(4, 2, 3, 3), f(2)],
     {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 0]}),
    ("MaxPool", [f(1, 2, 7, 7)], {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 0, 1]}),
    ("AveragePool", [f(1, 2, 7, 7)], {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 0, 1]}),
    ("AveragePool", [f(1, 2, 7)], {"kernel_shape": [3], "auto_pad": "SAME_UPPER", "count_include_pad": 1}),
    ("RotaryEmbedding", [f(2, 3, 5, 8), f(2, 5, 4), f(2, 5, 4)], {}, 1, 23),
    ("RotaryEmbedding", [f(2, 5, 24), f(9, 2), f(9, 2), np.array([[0, 1, 2, 3, 4], [8, 7, 3, 2, 1]])],
     {"num_heads": 3, "interleaved": 1, "rotary_embedding_dim": 4}, 1, 23),
    ("Attention", [f(2, 3, 5, 8), f(2, 3, 7, 8), f(2, 3, 7, 4)], {}, 1, 23),
    ("Attention", [f(2, 4, 5, 8), f(2, 2, 5, 8), f(2, 2, 5, 8), f(5, 5)], {"is_causal": 1, "scale": 0.3}, 1, 23),
    ("Attention", [f(2, 5, 24), f(2, 5, 24), f(2, 5, 24), np.tril(np.ones((5, 5), bool))],
     {"q_num_heads": 3, "kv_num_heads": 3}, 1, 23),
    ("Attention", [f(1, 2, 3, 4), f(1, 2, 3, 4), f(1, 2, 3, 4), None, f(1, 2, 5, 4), f(1, 2, 5, 4)],
     {"is_causal": 1}, 3, 23),
    ("Attention", [f(1, 2, 3, 4), f(1, 2, 3, 4), f(1, 2, 3, 4)], {"softcap": 2.0}, 1, 23),
    ("Attention", [f(2, 4, 3, 8), f(2, 2, 7, 8), f(2, 2, 7, 8), None, None, None, i(5, 7)], {"is_causal": 1}, 1, 24),
    ("Attention", [f(2, 2, 3, 8), f(2, 2, 7, 8), f(2, 2, 7, 8), None, None, None, i(3, 4)], {}, 1, 24),
    ("TopK", [f(3, 7), i(3)], {}, 2, 24), ("TopK", [f(5, 2), i(2)], {"axis": 0, "largest": 0}, 2, 24),
    ("TensorScatter", [f(2, 3, 6, 4), f(2, 3, 2, 4), i(1, 4)], {}, 1, 24),
    ("TensorScatter", [f(1, 6, 4), f(1, 2, 4)], {"axis": 1}, 1, 24),
]  # fmt: skip


def model(op: str, inputs: list[Any], attributes: dict[str, Any], outputs: int, opset: int) -> onnx.ModelProto:
    names = ["" if x is None else f"x{n}" for n, x in enumerate(inputs)]
    node = helper.make_node(op, names, [f"y{n}" for n in range(outputs)], **attributes)
    given = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.asarray(x).dtype), np.shape(x))
        for name, x in zip(names, inputs, strict=True)
        if x is not None
    ]
    made = [onnx.ValueInfoProto(name=f"y{n}") for n in range(outputs)]
    graph = helper.make_graph([node], "g", given, made)
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return onnx.shape_inference.infer_shapes(whole)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_equals_onnxruntime(case: tuple[Any, ...]) -> None:
    op, inputs, attributes, outputs, opset = (*case, *(1, 22)[len(case) - 3 :])
    proto = model(op, inputs, attributes, outputs, opset)
    feeds = {f"x{n}": np.asarray(x) for n, x in enumerate(inputs) if x is not None}
    expected = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feeds)
    graph = TorchGraph(ir.from_proto(proto))
    found = graph.run({k: torch.from_numpy(v.copy()) for k, v in feeds.items()}, [f"y{n}" for n in range(outputs)])
    for wanted, got in zip(expected, found.values(), strict=True):
        assert tuple(got.shape) == wanted.shape and got.numpy().dtype == wanted.dtype
        np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-5, atol=2e-6)


def test_every_operator_of_the_table_is_tested() -> None:
    assert set(OPERATORS) == {case[0] for case in CASES}


def test_gradients_reach_the_weights_through_a_function() -> None:
    """Those of softplus attention, whose body has several places where a careless one gives NaN."""
    from graphwright.passes.ops import REWEIGHTED_SOFTPLUS_ATTENTION as OP

    values = [ir.val(n, ir.DataType.FLOAT, (1, 1, 4, 4)) for n in "qkv"]
    mask = ir.val("mask", ir.DataType.FLOAT, (1, 1, 1, 4))
    node = ir.node(OP.name, [*values, mask], {"causal": 1, "power": 3}, domain=OP.domain)
    node.outputs[0].name = "y"
    made = ir.Model(
        ir.Graph([*values, mask], node.outputs, nodes=[node], name="g", opset_imports={"": 20}), ir_version=10
    )
    OP.add_to(made)
    graph = TorchGraph(made)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((1, 1, 4, 4), generator=generator, requires_grad=True) for _ in "qkv")
    zeros = torch.zeros((1, 1, 4, 4), requires_grad=True)
    for query, key in ((q, k), (zeros, k), (q, zeros)):
        hidden = torch.tensor([0.0, 0.0, 0.0, -1e9]).reshape(1, 1, 1, 4)
        y = graph.run({"q": query, "k": key, "v": v, "mask": hidden}, ["y"])["y"]
        for gradient in torch.autograd.grad(y.square().sum(), (query, key, v)):
            assert bool(torch.isfinite(gradient).all())
    # Against differences, in the region where the weights are smooth.
    run = lambda q: graph.run({"q": q.float(), "k": k, "v": v, "mask": torch.zeros(1, 1, 1, 4)}, ["y"])["y"]  # noqa: E731
    (slope,) = torch.autograd.grad(run(q).square().sum(), q)
    step = 1e-2 * slope / slope.norm()
    difference = (run(q + step).square().sum() - run(q - step).square().sum()) / 2
    assert float(difference) == pytest.approx(float((slope * step).sum()), rel=0.05)


def test_what_is_not_known_is_said_in_one_line() -> None:
    odd = ir.from_proto(onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[2] x) => (float[2] y) { a = Acosh(x) y = Asin(a) }'
    ))  # fmt: skip
    with pytest.raises(PassError, match="training does not know the operators Acosh, Asin"):
        TorchGraph(odd)
    pool = ir.from_proto(model("MaxPool", [f(1, 1, 5)], {"kernel_shape": [2], "ceil_mode": 1}, 1, 20))
    with pytest.raises(PassError, match="does not know ceil_mode, or indices of MaxPool at 'y0'"):
        TorchGraph(pool).run({"x0": torch.zeros(1, 1, 5)}, ["y0"])
