"""Casts to bfloat16 and back: rounded everywhere, and products of what was rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.pipeline import Pipeline
from graphwright.passes.registry import preset
from graphwright.runtime.target import Target
from hypothesis import given, settings
from hypothesis import strategies as st

onnxruntime = pytest.importorskip("onnxruntime")
tvm = pytest.importorskip("tvm")
pytestmark = pytest.mark.tvm

HEAD = '<ir_version: 10, opset_import: ["" : 21]> '
TARGETS = ["cpu-avx512-bf16", "cpu-avx512", "cpu-avx2", "cpu-baseline"]
Run = Callable[[np.ndarray], np.ndarray]


def compiled(body: str, name: str, **weights: np.ndarray) -> tuple[Run, Run, set[str]]:
    """A model of one input in TVM alone and in onnxruntime, and the names of its kernels."""
    from graphwright.runtime import phases
    from graphwright.runtime.importer import import_model
    from tvm import relax

    target = Target.named(name)
    if not target.runs_here:
        pytest.skip(f"this processor does not run {name}")
    proto = onnx.parser.parse_model(HEAD + body)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    model, _ = Pipeline.parse(preset("compile")).run(ir.from_proto(proto))
    kernels: set[str] = set()

    def observe(module: tvm.IRModule) -> None:
        kernels.update(variable.name_hint for variable, _ in module.functions_items())

    executable, constants = phases.compile_module(import_model(ir.to_proto(model), target), target, observe)
    main, given = relax.VirtualMachine(executable, tvm.cpu())["main"], tvm.runtime.convert(list(constants))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def ours(x: np.ndarray) -> np.ndarray:
        result: Any = main(tvm.runtime.tensor(x), given)
        return result.numpy()

    return ours, lambda x: session.run(None, {"x": x})[0], kernels


def rounded(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def sizes_of(shape: str, free: int = 3) -> list[int]:
    return [free if s == "N" else int(s) for s in shape.split(",")]


SHAPES = ["1", "3", "64", "100,3", "2,3,5,7", "33,257", "N,20"]
CASTS = "b = Cast <to = 16> (x) y = Cast <to = 1> (b)"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_cast_there_and_back_rounds(shape: str, target: str) -> None:
    """TVM by itself takes the two for none. NaN and infinity stay, halves go to the even side."""
    ours, theirs, _ = compiled(f"g (float[{shape}] x) => (float[{shape}] y) {{ {CASTS} }}", target)
    x = np.random.default_rng(0).standard_normal(sizes_of(shape), np.float32)
    special = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1.00390625, 1.01171875, 3.4e38], np.float32)
    x.reshape(-1)[: len(special)] = special[: x.size]
    np.testing.assert_array_equal(ours(x), rounded(x))
    np.testing.assert_array_equal(theirs(x), rounded(x))


@pytest.mark.parametrize(
    "given, lines",
    [
        ("int64", CASTS),
        ("float16", CASTS),
        ("double", CASTS),
        ("float", "b = Cast <to = 16> (x) t = Transpose <perm = [1, 0]> (b) y = Cast <to = 1> (t)"),
        ("float", "b = Cast <to = 16> (x) c = Concat <axis = 0> (b, b) y = Cast <to = 1> (c)"),
        ("float", "b = Cast <to = 16> (x) h = Cast <to = 10> (b) y = Cast <to = 1> (h)"),
        ("float", "b = Cast <to = 16> (x) i = Cast <to = 6> (b) y = Cast <to = 1> (i)"),
    ],
)
def test_other_types_and_what_stands_between_casts(given: str, lines: str) -> None:
    ours, theirs, _ = compiled(f"g ({given}[5,20] x) => (float[N,M] y) {{ {lines} }}", "cpu")
    kinds = {"int64": np.int64, "float16": np.float16, "double": np.float64, "float": np.float32}
    x = (np.random.default_rng(0).standard_normal((5, 20)) * 3000).astype(kinds[given])
    np.testing.assert_array_equal(ours(x), theirs(x))


@pytest.fixture(scope="module")
def seventy() -> Run:
    return compiled(f"g (float[70] x) => (float[70] y) {{ {CASTS} }}", "cpu")[0]


@settings(max_examples=50, deadline=None)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=70, max_size=70))
def test_every_number_is_rounded_to_the_nearest(seventy: Run, bits: list[int]) -> None:
    """Those below the normal ones may be 0."""
    x = np.array(bits, np.uint32).view(np.float32)
    got, expected, small = seventy(x), rounded(x), np.abs(x) < 2.0**-126
    np.testing.assert_array_equal(got[~small], expected[~small])
    assert ((got[small] == 0) | (got[small] == expected[small])).all()


PRODUCTS = {
    "MatMul": ("N,64", "N,80", "64,80", "y = MatMul (r, w)"),
    "MatMul of a batch": ("2,N,65", "2,N,70", "65,70", "y = MatMul (r, w)"),
    "Gemm": ("N,64", "N,80", "80,64", "c = Constant <value_float = 0.5> () y = Gemm <transB = 1> (r, w, c)"),
    "Gemm, transposed": ("64,N", "N,80", "64,80", "y = Gemm <transA = 1> (r, w)"),
    "Conv": ("N,24,9,11", "N,40,9,11", "40,24,3,3", "y = Conv <pads = [1, 1, 1, 1]> (r, w)"),
    "Conv1d": ("N,40,50", "N,48,25", "48,40,3", "y = Conv <pads = [1, 1], strides = [2]> (r, w)"),
    "Conv, depthwise": ("N,72,9,9", "N,72,9,9", "72,1,9,9", "y = Conv <group = 72, pads = [4,4,4,4]> (r, w)"),
    "Conv, plain input": ("N,3,32,32", "N,160,15,15", "160,3,3,3", "y = Conv <strides = [2, 2]> (r, w)"),
}


@pytest.mark.parametrize("target", ["cpu-avx512-bf16", "cpu-avx2"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_rounded_numbers(name: str, target: str) -> None:
    """What onnxruntime gives for the rounded numbers in float32, at two sizes of what is free."""
    shape, out, weight, line = PRODUCTS[name]
    draw = np.random.default_rng(0)
    ours, theirs, kernels = compiled(
        f"""g (float[{shape}] x) => (float[{out}] y) {{
            b = Cast <to = 16> (x)
            r = Cast <to = 1> (b)
            w = Cast <to = 1> (n)
            {line}
        }}""", target, n=draw.standard_normal(sizes_of(weight), np.float32).astype(ml_dtypes.bfloat16),
    )  # fmt: skip
    for free in (1, 5):
        x = draw.standard_normal(sizes_of(shape, free), np.float32)
        expected = theirs(x)
        assert np.abs(ours(x) - expected).max() <= 1e-5 * np.abs(expected).max()
    pairs = target == "cpu-avx512-bf16" and name not in ("Gemm, transposed", "Conv, depthwise")
    # What is rounded to be multiplied lies in 16 bits.
    assert any(kernel.startswith("round") for kernel in kernels) == pairs


def test_three_products_round_once() -> None:
    """As in attention, with what stands in front of them in the same kernel."""
    ours, theirs, kernels = compiled(
        """g (float[N,64] x) => (float[N,64] y) {
            e = Relu (x)
            b = Cast <to = 16> (e)
            r = Cast <to = 1> (b)
            w = Cast <to = 1> (n)
            v = Cast <to = 1> (m)
            p = MatMul (r, w)
            q = MatMul (r, v)
            y = Add (p, q)
        }""", "cpu-avx512-bf16",
        n=np.random.default_rng(1).standard_normal((64, 64)).astype(ml_dtypes.bfloat16),
        m=np.random.default_rng(2).standard_normal((64, 64)).astype(ml_dtypes.bfloat16),
    )  # fmt: skip
    x = np.random.default_rng(0).standard_normal((7, 64), np.float32)
    np.testing.assert_allclose(ours(x), theirs(x), atol=1e-4)
    assert sum("round" in kernel for kernel in kernels) == 1


def test_trees_know_rounding_again() -> None:
    """Else kernels of products would end before it, and it would be a loop of whole numbers."""
    from graphwright.runtime.elements import Apply, Load, load_source, nest_of, nested_source
    from graphwright.runtime.rounding import rounded_bits, widened_bits
    from tvm import te, tirx

    axis = [tirx.Var("i", "int64")]

    def tree(dtype: str, element: Any) -> Any:
        x = te.placeholder([64], dtype, "x")
        nest = nest_of(te.create_prim_func([x, te.compute(x.shape, lambda i: element(x(i)))], "int64"))
        return nested_source(nest, [load_source(0, [64], dtype, axis)])(axis)

    for dtype, element, op, to in (
        ("float32", rounded_bits, "round", "uint16"), ("uint16", widened_bits, "widen", "float32")
    ):  # fmt: skip
        found = tree(dtype, element)
        assert isinstance(found, Apply) and (found.op, found.dtype) == (op, to)
        assert isinstance(found.args[0], Load)


def test_a_weight_of_float16_that_was_rounded_to_bfloat16() -> None:
    """Not the weight as it is stored."""
    weight = np.random.default_rng(1).standard_normal((64, 80)).astype(np.float16)
    ours, theirs, _ = compiled(
        """g (float[5,64] x) => (float[5,80] y) {
            b = Cast <to = 16> (n)
            w = Cast <to = 1> (b)
            y = MatMul (x, w)
        }""", "cpu", n=weight,
    )  # fmt: skip
    x = np.random.default_rng(0).standard_normal((5, 64), np.float32)
    np.testing.assert_allclose(ours(x), theirs(x), atol=1e-4)
