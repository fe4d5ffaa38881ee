"""Resizing by weighted sums: kernels in blocks and on few channels, against NumPy in float64 and onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.tvm


def resize(size: str, new: tuple[int, int], mode: str = "linear", more: str = "") -> str:
    """A model whose only nodes are a Resize and what is fused behind it."""
    body = f"r = Resize <mode='{mode}', axes=[2, 3]{more}> (x, , , sizes) y = Relu (r)".replace("'", '"')
    sizes = f"sizes = Constant <value_ints=[{new[0]}, {new[1]}]> ()"
    return f"g (float[{size}] x) => (float[n,c,h,w] y) {{ {sizes} {body} }}"


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


def matrix(size: int, new: int) -> np.ndarray:
    """(new, size) weights of linear interpolation between centres of pixels."""
    x = np.clip((np.arange(new) + 0.5) * size / new - 0.5, 0, size - 1)
    return np.maximum(0, 1 - np.abs(x[:, None] - np.arange(size)))


@pytest.mark.parametrize("channels", [1, 3, 7, 8, 9, 17])
def test_linear(channels: int, compile_model: Callable[..., Any]) -> None:
    """Larger, smaller, one of each, to one place, from one place, and as it was."""
    for size, new in (
        ((5, 9), (10, 18)), ((9, 8), (4, 3)), ((7, 16), (15, 8)), ((6, 5), (1, 1)), ((1, 1), (4, 17)), ((5, 6), (5, 12))
    ):  # fmt: skip
        model = compile_model(resize(f"2,{channels},{size[0]},{size[1]}", new))
        assert model.kernels("interpolate")
        x = draw(2, channels, *size)
        rows, columns = (matrix(s, n) for s, n in zip(size, new, strict=True))
        expected = np.maximum(rows @ x.astype(np.float64) @ columns.T, 0)
        np.testing.assert_allclose(model.run({"x": x})[0], expected, rtol=0, atol=1e-6 * np.abs(x).max())
        model.check({"x": x})


def test_a_constant_image() -> None:
    """A kernel that reads nothing but constants is no loop nest yet when those are folded."""
    import tvm
    from graphwright.runtime import phases
    from graphwright.runtime.kernels.interpolate import interpolated
    from graphwright.runtime.target import Target
    from tvm import relax

    image, out = draw(1, 3, 5, 6), relax.TensorType((1, 3, 7, 9), "float32")
    tables = [
        (np.tile(np.arange(size, dtype=np.int32), (new, 1)), matrix(size, new).astype(np.float32))
        for size, new in ((5, 7), (6, 9))
    ]
    bb, b = relax.BlockBuilder(), relax.Var("b", out)
    with bb.function("main", [b]):
        with bb.dataflow():
            made = interpolated(bb, relax.const(image), tables, out, 8)
            y = bb.emit_output(relax.op.multiply(made, b))
        bb.emit_func_output(y)
    executable, constants = phases.compile_module(bb.get(), Target.named("cpu"))
    given = tvm.runtime.tensor(np.full((1, 3, 7, 9), 2, np.float32))
    got = relax.VirtualMachine(executable, tvm.cpu())["main"](given, tuple(constants)).numpy()
    expected = 2 * (matrix(5, 7) @ image.astype(np.float64) @ matrix(6, 9).T)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


FORMS = [
    ("linear", ""), ("linear", ", coordinate_transformation_mode='align_corners'"),
    ("linear", ", coordinate_transformation_mode='asymmetric'"),
    ("linear", ", coordinate_transformation_mode='pytorch_half_pixel'"),
    ("linear", ", coordinate_transformation_mode='half_pixel_symmetric'"),
    ("cubic", ""), ("cubic", ", cubic_coeff_a=-0.5, exclude_outside=1"),
    ("cubic", ", coordinate_transformation_mode='align_corners'"),
]  # fmt: skip


@pytest.mark.parametrize("mode, more", FORMS)
def test_forms(mode: str, more: str, compile_model: Callable[..., Any]) -> None:
    for channels, new in ((3, (13, 5)), (17, (3, 20)), (9, (1, 1))):
        model = compile_model(resize(f"1,{channels},6,10", new, mode, more))
        assert model.kernels("interpolate")
        model.check({"x": draw(1, channels, 6, 10)})


def test_a_free_batch_between_convolutions(compile_model: Callable[..., Any]) -> None:
    """Blocks in and blocks out: nothing is packed in between."""
    text = """g (float[N,5,6,7] x) => (float[N,4,12,21] y) {
      a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w)
      r = Resize<mode="linear">(a, , scales)
      y = Conv<kernel_shape=[1,1]>(r, v) }"""
    scales = np.array([1, 1, 2, 3], np.float32)
    model = compile_model(text, w=draw(20, 5, 3, 3), v=draw(4, 20, 1, 1), scales=scales)
    assert model.kernels("interpolate")
    for batch in (1, 3):
        model.check({"x": draw(batch, 5, 6, 7)})


@pytest.mark.parametrize("channels", [1, 8])
def test_what_is_not_finite_stays_where_it_is(channels: int, compile_model: Callable[..., Any]) -> None:
    x = draw(1, channels, 6, 6)
    x[0, 0, 2, 3], x[0, -1, 5, 0] = np.nan, np.inf
    compile_model(resize(f"1,{channels},6,6", (11, 13))).check({"x": x})


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_resize(compile_model: Callable[..., Any], data: st.DataObject) -> None:
    size = st.integers(1, 20)
    channels, height, width, rows, columns = (data.draw(size) for _ in range(5))
    mode, more = data.draw(st.sampled_from(FORMS))
    compile_model(resize(f"1,{channels},{height},{width}", (rows, columns), mode, more)).check(
        {"x": draw(1, channels, height, width)}
    )
