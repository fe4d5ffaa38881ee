"""Decomposed operators give the numbers of onnxruntime's own kernels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

HEAD = '<ir_version: 10, opset_import: ["" : {opset}]> '

# name -> (opset, ONNX text, shapes of float inputs, operators that must be gone)
BODIES: dict[str, tuple[int, str, dict[str, tuple[int, ...]], set[str]]] = {
    "celu": (21, "g (float[2,3] x) => (float[2,3] y) { y = Celu <alpha = 1.5> (x) }", {"x": (2, 3)}, {"Celu"}),
    "swish": (24, "g (float[2,3] x) => (float[2,3] y) { y = Swish <alpha = 1.5> (x) }", {"x": (2, 3)}, {"Swish"}),
    "rotary": (
        23,
        "g (float[1,2,4,8] x, float[4,4] c, float[4,4] s) => (float[1,2,4,8] y) <int64[1,4] p = {0, 1, 2, 3}>"
        " { y = RotaryEmbedding (x, c, s, p) }",
        {"x": (1, 2, 4, 8), "c": (4, 4), "s": (4, 4)},
        {"RotaryEmbedding"},
    ),
    "attention": (
        23,
        "g (float[1,2,4,8] q, float[1,2,6,8] k, float[1,2,6,8] v, float[4,6] m) => (float[1,2,4,8] y)"
        " { y = Attention (q, k, v, m) }",
        {"q": (1, 2, 4, 8), "k": (1, 2, 6, 8), "v": (1, 2, 6, 8), "m": (4, 6)},
        {"Attention"},
    ),
    "attention-causal-grouped": (
        23,
        "g (float[1,4,4,8] q, float[1,2,4,8] k, float[1,2,4,8] v) => (float[1,4,4,8] y)"
        " { y = Attention <is_causal = 1> (q, k, v) }",
        {"q": (1, 4, 4, 8), "k": (1, 2, 4, 8), "v": (1, 2, 4, 8)},
        {"Attention"},
    ),
    "center-crop-pad": (
        21,
        "g (float[5,4] x) => (float[3,6] y) <int64[2] s = {3, 6}> { y = CenterCropPad (x, s) }",
        {"x": (5, 4)},
        {"CenterCropPad"},
    ),
    "loss-in-a-loss": (
        21,
        "g (float[3,5] x) => (float y) <int64[3] t = {1, 0, 4}> { y = SoftmaxCrossEntropyLoss (x, t) }",
        {"x": (3, 5)},
        {"SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss"},
    ),
    "window": (
        21,
        "g (float[8] x) => (float[8] y) <int64 n = {8}> { w = HannWindow <periodic = 0> (n) y = Mul (x, w) }",
        {"x": (8,)},
        {"HannWindow"},
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_standard_bodies(name: str, check) -> None:
    opset, body, shapes, gone = BODIES[name]
    random = np.random.default_rng(0)
    feeds = {key: random.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    # Softmax and exp in another order: a few float32 roundings.
    model, reports = check(HEAD.format(opset=opset) + body, "infer-shapes,decompose", feeds, 2e-6)
    assert not reports[-1].skips
    assert not gone & {node.op_type for node in model.graph}


def numbers(seed: int, low: int, high: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def listed(array: np.ndarray) -> str:
    return ", ".join(map(str, array.reshape(-1).tolist()))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_qlinear_conv_is_exact(per_channel: bool, bias: bool, seed: int, check) -> None:
    """Sums stay below 2^24, so float32 holds them exactly and every output byte must agree."""
    w = numbers(seed, -128, 128, (4, 3, 3, 3), np.int8)
    scales = "float[4] sw = {0.01, 0.02, 0.015, 0.008}" if per_channel else "float sw = {0.011}"
    zeros = "int8[4] zw = {0, 0, 0, 0}" if per_channel else "int8 zw = {0}"
    biases = f", int32[4] b = {{{listed(numbers(seed, -500, 500, (4,), np.int32))}}}" if bias else ""
    names = "x, sx, zx, w, sw, zw, sy, zy" + (", b" if bias else "")
    text = f"""g (uint8[1,3,8,8] x) => (uint8[1,4,4,4] y)
    <float sx = {{0.02}}, uint8 zx = {{120}}, int8[4,3,3,3] w = {{{listed(w)}}}, {scales}, {zeros},
     float sy = {{0.1}}, uint8 zy = {{100}}{biases}>
    {{ y = QLinearConv <pads = [1, 1, 1, 1], strides = [2, 2]> ({names}) }}"""
    feeds = {"x": numbers(seed + 100, 0, 256, (1, 3, 8, 8), np.uint8)}
    model, (report,) = check(HEAD.format(opset=21) + text, "decompose", feeds, 0)
    assert [change.value for change in report.changes] == ["y"]
    assert "QLinearConv" not in {node.op_type for node in model.graph}


@pytest.mark.parametrize("seed", range(5))
def test_qlinear_matmul_is_exact(seed: int, check) -> None:
    b = numbers(seed, 0, 256, (6, 3), np.uint8)
    text = f"""g (uint8[2,4,6] a) => (uint8[2,4,3] y)
    <float sa = {{0.02}}, uint8 za = {{120}}, uint8[6,3] b = {{{listed(b)}}}, float sb = {{0.03}}, uint8 zb = {{127}},
     float sy = {{0.2}}, uint8 zy = {{100}}> {{ y = QLinearMatMul (a, sa, za, b, sb, zb, sy, zy) }}"""
    feeds = {"a": numbers(seed + 100, 0, 256, (2, 4, 6), np.uint8)}
    model, _ = check(HEAD.format(opset=21) + text, "infer-shapes,decompose", feeds, 0)
    assert "QLinearMatMul" not in {node.op_type for node in model.graph}


def test_conv_integer_without_zero_points(check) -> None:
    w = numbers(1, -128, 128, (2, 2, 3), np.int8)
    text = f"g (uint8[1,2,9] x) => (int32[1,2,7] y) <int8[2,2,3] w = {{{listed(w)}}}> {{ y = ConvInteger (x, w) }}"
    feeds = {"x": numbers(2, 0, 256, (1, 2, 9), np.uint8)}
    if not _runtime_has(text, feeds):
        pytest.skip("onnxruntime has no ConvInteger for uint8 by int8")
    check(HEAD.format(opset=21) + text, "decompose", feeds, 0)


def _runtime_has(text: str, feeds: dict[str, np.ndarray]) -> bool:
    import onnx
    import onnxruntime

    proto = onnx.parser.parse_model(HEAD.format(opset=21) + text)
    try:
        onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception:  # NotImplemented of the pybind module
        return False
    return True


def test_operators_with_a_kernel_stay(monkeypatch: pytest.MonkeyPatch, check) -> None:
    """By option, or by the table of what targets have kernels for; names of targets cover their variants."""
    from graphwright.passes.base import PassContext
    from graphwright.passes.prepare import decompose

    text = HEAD.format(opset=24) + "g (float[2,3] x) => (float[2,3] y) { y = Swish (x) }"
    feeds = {"x": numbers(0, -3, 3, (2, 3), np.float32)}
    model, (report,) = check(text, "decompose:keep=Swish", feeds, 0)
    assert not report.changes and [node.op_type for node in model.graph] == ["Swish"]
    monkeypatch.setitem(decompose.KERNELS, "cpu", frozenset({"Swish"}))
    for target, left in (("cpu", True), ("cpu-avx2", True), ("cuda", False), (None, False)):
        changes = decompose.Decompose().run(model.clone(), PassContext(target=target)).changes
        assert (not changes) == left, target


@pytest.mark.parametrize(
    "node, stays",
    [
        ("Attention (q, k, v)", True),
        ("Attention <is_causal = 1, softcap = 2.0> (q, k, v, m)", True),
        ("Attention <softmax_precision = 11> (q, k, v)", False),
        ("Attention (q, k, v, short)", False),
        ("Attention (h, h, h)", True),
        ("RotaryEmbedding (q, c, c)", True),
        ("RotaryEmbedding (q, wide, wide)", False),
        ("RotaryEmbedding (h, c16, c16)", False),
    ],
)
def test_only_forms_with_a_kernel_stay(node: str, stays: bool) -> None:
    from graphwright.passes.base import PassContext
    from graphwright.passes.prepare import decompose
    from graphwright.passes.prepare.infer_shapes import InferShapes

    model = ir.from_onnx_text(
        HEAD.format(opset=24) + "g (float[1,2,4,8] q, float[1,2,6,8] k, float[1,2,6,8] v, bool[4,6] m, bool[4,5] short,"
        f" float16[1,2,4,8] h, float[1,4,4] c, float[1,4,8] wide, float16[1,4,4] c16) => (y) {{ y = {node} }}"
    )
    InferShapes().run(model, PassContext())
    decompose.Decompose().run(model, PassContext(target="cpu"))
    assert (len(model.graph) == 1) == stays


@pytest.mark.parametrize("mask", ["float[4,6] m", "float[2,1,4,6] m", "float[1,4,6] m"])
def test_rows_that_a_mask_hides_wholly_are_zeros(mask: str, check) -> None:
    """As the standard says, where the plain formula gives NaN."""
    text = HEAD.format(opset=24) + (
        f"g (float[2,3,4,8] q, float[2,3,6,8] k, float[2,3,6,5] v, {mask}) => (float[2,3,4,5] y)"
        " { y = Attention <scale = 0.3> (q, k, v, m) }"
    )
    random = np.random.default_rng(0)
    shapes = {"q": (2, 3, 4, 8), "k": (2, 3, 6, 8), "v": (2, 3, 6, 5)}
    feeds = {key: random.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    sizes = tuple(int(size) for size in mask.partition("[")[2].partition("]")[0].split(","))
    m = np.where(random.random(sizes) < 0.4, -np.inf, 0).astype(np.float32)
    m[..., 2, :] = -np.inf
    model, _ = check(text, "infer-shapes,decompose", {**feeds, "m": m}, 2e-6)
    assert len(model.graph) < 15, "the short body"
