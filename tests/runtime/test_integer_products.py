"""Products and convolutions of dequantized tensors against their integers in NumPy, and against onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from graphwright.runtime.target import Target

tvm = pytest.importorskip("tvm")
pytestmark = pytest.mark.tvm

TARGET = Target.named("cpu")
HEAD = '<ir_version: 10, opset_import: ["": 21]> g'
DRAW = np.random.default_rng(0)


def kernels_and_run(model: onnx.ModelProto, feeds: Sequence[np.ndarray]) -> tuple[list[str], list[np.ndarray]]:
    """Names of the compiled kernels, and outputs."""
    from graphwright.runtime import phases
    from graphwright.runtime.importer import import_model
    from tvm import relax

    names: list[str] = []

    def observe(module: Any) -> None:
        names.extend(v.name_hint for v in module.functions if v.name_hint != "main")

    executable, constants = phases.compile_module(import_model(model, TARGET), TARGET, observe)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    result = machine["main"](*map(tvm.runtime.tensor, feeds), tvm.runtime.convert(list(constants)))
    results = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
    return names, [tensor.numpy() for tensor in results]


def reference(model: onnx.ModelProto, feeds: Sequence[np.ndarray]) -> list[np.ndarray]:
    """onnxruntime, each operator as the standard has it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, dict(zip((i.name for i in session.get_inputs()), feeds, strict=True)))


def model_of(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f"{HEAD} {text}")
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    return model


def numbers(shape: Sequence[int], dtype: str, least: int | None = None) -> np.ndarray:
    info = np.iinfo(dtype)
    return DRAW.integers(info.min if least is None else least, info.max + 1, shape).astype(dtype)


def scales(count: int) -> np.ndarray:
    return DRAW.uniform(0.005, 0.02, count).astype(np.float32)


def check(model: onnx.ModelProto, feeds: Sequence[np.ndarray], anchor: str, step: float = 1) -> None:
    """The anchor's kernel is there, and nothing is off by more than a step of the output's type, and seldom that."""
    names, (got,) = kernels_and_run(model, feeds)
    assert any(anchor in name for name in names), names
    (expected,) = reference(model, feeds)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    off = np.abs(got.astype(np.float64) - expected.astype(np.float64))
    assert off.max(initial=0) <= step, f"{off.max()} at {np.argwhere(off > step)[0]}"
    if got.dtype.kind in "iu":
        assert (off > 0).mean() <= 1e-3


ACTIVATIONS = {
    "none": ("", "a"),
    "relu": ("r = Relu(a)", "r"),
    "clip": ("r = Clip(a, low, high)", "r"),
    "relu, clip": ("h = Relu(a)  r = Clip(h, low, high)", "r"),
}


CASES = [*(("uint8", "uint8", a) for a in ACTIVATIONS), ("int8", "int8", "clip"), ("uint8", "int8", "clip")]


@pytest.mark.parametrize(("given", "out", "activation"), CASES)
def test_conv_with_its_activation(given: str, out: str, activation: str) -> None:
    """3x3 with padding: what is outside stands for 0, whatever the zero point."""
    between, last = ACTIVATIONS[activation]
    s, t = scales(20), scales(1)[0] * 3
    model = model_of(
        f"({given}[1,9,12,11] x) => ({out}[1,20,12,11] y) {{ "
        f"d = DequantizeLinear(x, s, z)  e = DequantizeLinear<axis=0>(w, t)  f = DequantizeLinear<axis=0>(b, st) "
        f"a = Conv<pads=[1,1,1,1]>(d, e, f)  {between}  y = QuantizeLinear({last}, u, v) }}",
        s=t, z=np.array(13, given), w=numbers((20, 9, 3, 3), "int8", -127), t=s,
        b=DRAW.integers(-9000, 9000, 20).astype(np.int32), st=s * t, u=np.float32(1.5), v=np.array(7, out),
        low=np.float32(-20.5), high=np.float32(60.25),
    )  # fmt: skip
    check(model, [numbers((1, 9, 12, 11), given)], "conv")


FORMS = {
    "depthwise": ("group=16, pads=[1,1,1,1]", (16, 1, 3, 3), (1, 16, 9, 9)),
    "groups": ("group=2, pads=[1,1,1,1]", (16, 8, 3, 3), (1, 16, 9, 9)),
    "stem": ("strides=[2,2], pads=[1,1,0,0]", (24, 3, 3, 3), (1, 3, 17, 17)),
    "dilations": ("dilations=[2,2], pads=[2,2,2,2]", (8, 16, 3, 3), (1, 16, 9, 9)),
    "1x1, strides": ("strides=[2,2]", (24, 16, 1, 1), (1, 16, 9, 9)),
    "one axis": ("pads=[1,1]", (8, 16, 3), (1, 16, 30)),
    "one column": ("pads=[1,0,1,0]", (8, 16, 3, 1), (1, 16, 30, 1)),
    "automatic padding": ('auto_pad="SAME_UPPER", strides=[2,2]', (8, 16, 3, 3), (1, 16, 9, 9)),
    "dynamic batch": ("", (8, 16, 3, 3), (3, 16, 9, 9)),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_conv(form: str) -> None:
    """Without a bias, one scale for all weights, results in float32."""
    attrs, weight, shape = FORMS[form]
    dims = ",".join(["N" if form == "dynamic batch" else "1", *map(str, shape[1:])])
    model = model_of(
        f"(uint8[{dims}] x) => (float[{','.join('ABCD'[: len(shape)])}] y) {{ "
        "d = DequantizeLinear(x, s, z)  e = DequantizeLinear(w, t) "
        f"y = Conv{f'<{attrs}>' if attrs else ''}(d, e) }}",
        s=np.float32(0.02), z=np.uint8(200), w=numbers(weight, "int8"), t=np.float32(0.01),
    )  # fmt: skip
    check(model, [numbers(shape, "uint8")], "conv", step=1e-3)


def test_a_bias_of_another_scale_is_added_in_float() -> None:
    model = model_of(
        "(uint8[1,16,5,5] x) => (float[1,8,5,5] y) { d = DequantizeLinear(x, s, z)  e = DequantizeLinear(w, t) "
        "y = Conv(d, e, b) }",
        s=np.float32(0.02), z=np.uint8(3), w=numbers((8, 16, 1, 1), "int8"), t=np.float32(0.01),
        b=DRAW.standard_normal(8).astype(np.float32),
    )  # fmt: skip
    check(model, [numbers((1, 16, 5, 5), "uint8")], "conv", step=1e-3)


@pytest.mark.parametrize("rows", ["1", "7", "M"])
def test_matmul(rows: str) -> None:
    """A bias behind it, rows known at run time, one row; K does not fill the steps."""
    s = scales(21)
    model = model_of(
        f"(uint8[2,{rows},35] x) => (uint8[2,{rows},21] y) {{ d = DequantizeLinear(x, s, z) "
        "e = DequantizeLinear<axis=1>(w, t)  a = MatMul(d, e)  y = QuantizeLinear(a, u, v) }",
        s=np.float32(0.02), z=np.uint8(100), w=numbers((35, 21), "int8"), t=s, u=np.float32(0.7), v=np.uint8(128),
    )  # fmt: skip
    check(model, [numbers((2, 5 if rows == "M" else int(rows), 35), "uint8")], "gemm")


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("whole", [True, False])
def test_gemm(whole: bool, transposed: int) -> None:
    """Either way of its weights, with a bias as a part of the sums, or of float32."""
    s = scales(10)
    weight = numbers((10, 24) if transposed else (24, 10), "int8", -127)
    bias = "f = DequantizeLinear<axis=0>(b, st)" if whole else "f = Identity(b)"
    model = model_of(
        f"(int8[4,24] x) => (float[4,10] y) {{ d = DequantizeLinear(x, s)  {bias} "
        f"e = DequantizeLinear<axis={1 - transposed}>(w, t)  y = Gemm<transB={transposed}>(d, e, f) }}",
        s=np.float32(0.05), w=weight, t=s, st=s * np.float32(0.05),
        b=DRAW.integers(-999, 999, 10).astype(np.int32 if whole else np.float32),
    )  # fmt: skip
    check(model, [numbers((4, 24), "int8")], "gemm", step=1e-3)


def test_weights_whose_products_int16_holds() -> None:
    """Two steps of bytes at a time on AVX2, all the way from the standard's operators."""
    weight, s = DRAW.integers(-32, 33, (24, 40, 3, 3)).astype(np.int8), scales(24)
    for given, zero in (("uint8", 131), ("int8", -7)):
        model = model_of(
            f"({given}[1,40,9,7] x) => ({given}[1,24,9,7] y) {{ d = DequantizeLinear(x, s, z) "
            "e = DequantizeLinear<axis=0>(w, t)  a = Conv<pads=[1,1,1,1]>(d, e)  y = QuantizeLinear(a, u, z) }",
            s=np.float32(0.02), z=np.array(zero, given), w=weight, t=s, u=np.float32(0.4),
        )  # fmt: skip
        check(model, [numbers((1, 40, 9, 7), given)], "conv")
        model = model_of(
            f"({given}[13,360] x) => (float[13,24] y) {{ d = DequantizeLinear(x, s, z) "
            "e = DequantizeLinear<axis=1>(w, t)  y = MatMul(d, e) }",
            s=np.float32(0.02), z=np.array(zero, given), w=weight.reshape(24, 360).T.copy(), t=s,
        )  # fmt: skip
        check(model, [numbers((13, 360), given)], "gemm", step=1e-3)


def test_what_is_no_product_of_whole_numbers_stays_float() -> None:
    """Scales along the depth: the sum of products has no scale."""
    model = model_of(
        "(uint8[4,16] x) => (float[4,8] y) { d = DequantizeLinear(x, s)  e = DequantizeLinear<axis=0>(w, t) "
        "y = MatMul(d, e) }",
        s=np.float32(0.02), w=numbers((16, 8), "int8"), t=scales(16),
    )  # fmt: skip
    names, (got,) = kernels_and_run(model, feeds := [numbers((4, 16), "uint8")])
    assert not any("int8" in name for name in names)
    np.testing.assert_allclose(got, reference(model, feeds)[0], rtol=1e-5, atol=1e-3)


def test_two_convolutions_have_nothing_between_them_but_bytes() -> None:
    """Each is one kernel with what follows it, and an addition of two joins the second."""
    s = scales(16)
    model = model_of(
        "(uint8[1,16,8,8] x) => (uint8[1,16,8,8] y) { "
        "d = DequantizeLinear(x, s, z)  e = DequantizeLinear<axis=0>(w, t) "
        "a = Conv<pads=[1,1,1,1]>(d, e)  r = Relu(a)  q = QuantizeLinear(r, u, o)  i = DequantizeLinear(q, u, o) "
        "j = DequantizeLinear<axis=0>(v, t)  k = Conv<pads=[1,1,1,1]>(i, j)  l = QuantizeLinear(k, u, z) "
        "m = DequantizeLinear(l, u, z)  n = Add(m, i)  y = QuantizeLinear(n, u, z) }",
        s=np.float32(0.02), z=np.uint8(120), o=np.uint8(0), u=np.float32(0.4), t=s,
        w=numbers((16, 16, 3, 3), "int8"), v=numbers((16, 16, 3, 3), "int8"),
    )  # fmt: skip
    feeds = [numbers((1, 16, 8, 8), "uint8")]
    names, (got,) = kernels_and_run(model, feeds)
    # Images of the model itself are brought into blocks and out of them; that moves bytes.
    assert sum("conv" in name for name in names) == 2, names
    assert all(name.startswith(("fused_conv", "reshape", "permute_dims", "transpose")) for name in names), names
    # A step in one place of the first result moves many sums of the second.
    off = np.abs(got.astype(int) - reference(model, feeds)[0].astype(int))
    assert off.max() <= 2 and (off > 0).mean() <= 0.01


def test_sizes_that_are_expressions_of_others() -> None:
    """The rows of a sum of two tensors of free lengths are the greater of both; kernels are told both."""
    model = model_of(
        """(float[N,32] x, float[M,32] t) => (float[K,48] y) <float s = {0.02}, uint8 z = {128}> {
            e = Add (x, t)
            q = QuantizeLinear (e, s, z)
            d = DequantizeLinear (q, s, z)
            w = DequantizeLinear <axis = 1> (v, u)
            y = MatMul (d, w)
        }""",
        v=numbers((32, 48), "int8"), u=scales(48),
    )  # fmt: skip
    for rows in (7, 1, 5):
        x, t = (DRAW.standard_normal((rows, 32), np.float32) for _ in range(2))
        check(model, [x, t], "gemm", 1e-3)
    names, _ = kernels_and_run(model, [x, t])
    assert not any("block" in name or "dequantize" in name for name in names)
