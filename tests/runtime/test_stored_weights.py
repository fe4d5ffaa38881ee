"""Weights that a model stores in 16 bits and widens by a Cast are read in 16 bits by products and gathers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from graphwright.passes.pipeline import Pipeline
from graphwright.runtime.target import Target

onnxruntime = pytest.importorskip("onnxruntime")
tvm = pytest.importorskip("tvm")
pytestmark = pytest.mark.tvm

HEAD = '<ir_version: 11, opset_import: ["": 21]> '
TYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def padded(columns: int) -> int:
    """Columns of panels that so many fill."""
    lanes = Target.named("cpu").isa.lanes()
    return -(-columns // lanes) * lanes


class Model:
    """A model that has been through the preset `compile`, compiled once."""

    def __init__(self, text: str, **weights: np.ndarray) -> None:
        import onnx_ir as ir
        from graphwright.passes.registry import preset
        from graphwright.runtime import phases
        from graphwright.runtime.importer import import_model
        from tvm import relax

        self.original = onnx.parser.parse_model(HEAD + text)
        self.original.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
        model, _ = Pipeline.parse(preset("compile")).run(ir.from_proto(self.original))
        target = Target.named("cpu")
        executable, constants = phases.compile_module(import_model(ir.to_proto(model), target), target)
        self.main = relax.VirtualMachine(executable, tvm.cpu())["main"]
        self.sizes = {(str(tensor.dtype), int(np.prod(tensor.shape))) for tensor in constants}
        self.constants = tvm.runtime.convert(list(constants))

    def check(self, *runs: Mapping[str, np.ndarray]) -> None:
        """The results are onnxruntime's, which widens first."""
        session = onnxruntime.InferenceSession(self.original.SerializeToString(), providers=["CPUExecutionProvider"])
        for feeds in runs:
            result = self.main(*(tvm.runtime.tensor(array) for array in feeds.values()), self.constants)
            results = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
            for actual, expected in zip(results, session.run(None, dict(feeds)), strict=True):
                scale = np.abs(expected[np.isfinite(expected)]).max()
                np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5, atol=1e-5 * scale)


@pytest.fixture(params=TYPES)
def narrow(request: Any) -> str:
    return request.param


def test_matmul(narrow: str) -> None:
    model = Model(
        "g (float[1,s,96] x, float[1,1,96] r) => (float y, float z) "
        "{ w = Cast<to=1>(n) y = MatMul(x, w) z = MatMul(r, w) }",
        n=draw(96, 70).astype(TYPES[narrow]),
    )
    # Panels of both products; neither is widened before.
    assert model.sizes == {("uint16", 96 * padded(70))}
    model.check({"x": draw(1, 9, 96), "r": draw(1, 1, 96)}, {"x": draw(1, 1, 96), "r": draw(1, 1, 96)})


def test_gemm_with_a_transposed_weight_and_a_bias(narrow: str) -> None:
    model = Model(
        "g (float[5,96] x) => (float[5,70] y) { w = Cast<to=1>(n) y = Gemm<transB=1, alpha=0.5>(x, w, b) }",
        n=draw(70, 96).astype(TYPES[narrow]),
        b=draw(70),
    )
    assert {size for size in model.sizes if size[1] > 96} == {("uint16", 96 * padded(70))}
    model.check({"x": draw(5, 96)})


def test_embedding_that_is_the_head_too(narrow: str) -> None:
    """Rows of the table are widened as they are read; the head is packed from the same 16 bits."""
    model = Model(
        "g (int64[1,s] ids) => (float y) { table = Cast<to=1>(n) x = Gather(table, ids) "
        "head = Transpose<perm=[1,0]>(table) y = MatMul(x, head) }",
        n=draw(120, 40).astype(TYPES[narrow]),
    )
    bits = "float16" if narrow == "float16" else "uint16"  # a session would copy bfloat16
    assert model.sizes == {(bits, 120 * 40), ("uint16", 40 * padded(120))}
    model.check({"ids": np.array([[0, 119, -1, 7]])}, {"ids": np.array([[3]])})


def test_convolutions(narrow: str) -> None:
    """Of one axis and of two; the 3x3, whose Winograd form is faster, and the depthwise one are widened when packed."""
    model = Model(
        "g (float[1,64,20,20] x, float[1,32,50] r) => (float y, float z) { w = Cast<to=1>(n) k = Cast<to=1>(m) "
        "d = Cast<to=1>(o) v = Cast<to=1>(p) a = Conv(x, w, b) c = Conv<pads=[1,1,1,1]>(a, k) "
        "y = Conv<group=64>(c, d) z = Conv(r, v) }",
        n=draw(64, 64, 1, 1).astype(TYPES[narrow]),
        m=draw(64, 64, 3, 3).astype(TYPES[narrow]),
        o=draw(64, 1, 8, 8).astype(TYPES[narrow]),
        p=draw(48, 32, 3).astype(TYPES[narrow]),
        b=draw(64),
    )
    assert {("uint16", 64 * 64), ("uint16", 48 * 32 * 3)} <= model.sizes
    assert len([size for size in model.sizes if size[0] == "uint16"]) == 2
    model.check({"x": draw(1, 64, 20, 20), "r": draw(1, 32, 50)})


def test_convolutions_that_no_template_takes_are_widened(narrow: str) -> None:
    """Groups that do not fill vectors, and more of them than have a kernel each."""
    model = Model(
        "g (float[1,120,9,9] x) => (float y) { w = Cast<to=1>(n) y = Conv<group=40>(x, w) }",
        n=draw(80, 3, 5, 5).astype(TYPES[narrow]),
    )
    assert "uint16" not in {kind for kind, _ in model.sizes}
    model.check({"x": draw(1, 120, 9, 9)})


def test_infinities_and_numbers_below_the_normal_ones(narrow: str) -> None:
    weight = draw(64, 80).astype(TYPES[narrow])
    weight[3, 5], weight[9, 6], weight[:, 7] = np.inf, np.nan, np.array([2.0**-24]).astype(TYPES[narrow])
    model = Model("g (float[1,64] x) => (float[1,80] y) { w = Cast<to=1>(n) y = MatMul(x, w) }", n=weight)
    assert model.sizes == {("uint16", 64 * 80)}
    model.check({"x": np.abs(draw(1, 64))})


def test_weights_that_something_else_reads_are_widened(narrow: str) -> None:
    """A left operand, a sum: no kernel reads those in 16 bits."""
    model = Model(
        "g (float[80,8] x, float[64,80] v) => (float[64,8] y, float[64,80] z) "
        "{ w = Cast<to=1>(n) y = MatMul(w, x) z = Add(w, v) }",
        n=draw(64, 80).astype(TYPES[narrow]),
    )
    assert {kind for kind, _ in model.sizes} == {"float32"}
    model.check({"x": draw(80, 8), "v": draw(64, 80)})
