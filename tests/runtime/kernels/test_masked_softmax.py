"""Softmax of scaled and masked rows against NumPy in float64: how a mask broadcasts, forms, fixed and free sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from graphwright.passes.ops import (
    MASKED_SOFTMAX,
    SCALED_SOFTMAX,
    SELECTED_SOFTMAX,
    TEMPERED_MASKED_SOFTMAX,
    TEMPERED_SELECTED_SOFTMAX,
    TEMPERED_SOFTMAX,
)
from graphwright.passes.ops.masked_softmax import masked_softmax, tempered_softmax
from graphwright.passes.ops.two_pass_softmax import Form
from graphwright.runtime.target import Target
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.tvm

# Of free sizes a kernel without masked loads takes seconds to compile; of fixed ones it is the same, less other forms.
FREE = ["cpu-avx512", "cpu-avx2", pytest.param("cpu-baseline", marks=pytest.mark.slow)]
TOLERANCE = 3e-6  # half the distance of float32 numbers at 20 and more, as of x - max
INF, LOWEST = np.float32(np.inf), np.finfo(np.float32).min

Kernel = Callable[..., np.ndarray]


@functools.cache
def kernel(
    target: Target, shape: tuple[int | None, ...], axes: tuple[bool, ...] | None, kind: str | None, scale: float,
    form: Form = Form.AUTO, factor: str | None = None, factor_axes: tuple[bool, ...] = (),
) -> Kernel:  # fmt: skip
    import tvm
    from graphwright.runtime.codegen import machine_code
    from graphwright.runtime.kernels.softmax_passes import Source
    from graphwright.runtime.kernels.two_pass_softmax import softmax

    source = Source(scale, kind, axes or (), factor, factor_axes)
    function = softmax(shape, target.isa, target.caches, 2, form, name="softmax", source=source)
    compiled = machine_code(tvm.IRModule({"softmax": function}), target)["softmax"]

    def run(*inputs: np.ndarray) -> np.ndarray:
        # What is left of this value was not written.
        y = tvm.runtime.tensor(np.full_like(inputs[0], 12345.0))
        compiled(*(tvm.runtime.tensor(value) for value in inputs), y)
        return y.numpy()

    return run


def draw(shape: Sequence[int], spread: float = 20) -> np.ndarray:
    return np.asarray((np.random.default_rng(sum(shape)).random(shape) - 0.5) * spread, np.float32)


def mask_of(shape: Sequence[int], kind: str) -> np.ndarray:
    """A quarter is hidden."""
    hidden = np.random.default_rng(1).random(shape) < 0.25
    return ~hidden if kind == "bool" else np.where(hidden, -INF, draw(shape, 3)).astype(np.float32)


@pytest.mark.parametrize(
    "axes, kind, form",
    [
        ("k", "float32", Form.AUTO), ("bk", "bool", Form.AUTO), ("hk", "float32", Form.TWO_PASS),
        ("bqk", "bool", Form.TWO_PASS), ("hqk", "float32", Form.AUTO), ("bhqk", "float32", Form.AUTO),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", FREE)
def test_masks_of_every_shape(
    runnable: Callable[[str], Target], name: str, axes: str, kind: str, form: Form
) -> None:
    run = kernel(runnable(name), (None,) * 4, tuple(axis in axes for axis in "bhqk"), kind, 0.5, form)
    for length in (1, 7, 8, 17, 65, 197, 2049, 4100):
        x, mask = masked((2, 3, 4, length), axes, kind)
        np.testing.assert_allclose(run(x, mask), masked_softmax(x, mask, 0.5), rtol=TOLERANCE, atol=1e-38)


@pytest.mark.parametrize(
    "length, axes, kind, form",
    [
        (17, "bk", "float32", Form.AUTO), (7, "k", "bool", Form.AUTO), (2049, "bqk", "bool", Form.AUTO),
        (300, "hqk", "float32", Form.AUTO), (4100, "bhqk", "float32", Form.TWO_PASS),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["cpu", "cpu-baseline"])
def test_masks_of_fixed_shapes(name: str, length: int, axes: str, kind: str, form: Form) -> None:
    x, mask = masked((2, 3, 4, length), axes, kind)
    run = kernel(Target.named(name), x.shape, tuple(axis in axes for axis in "bhqk"), kind, 0.5, form)
    np.testing.assert_allclose(run(x, mask), masked_softmax(x, mask, 0.5), rtol=TOLERANCE, atol=1e-38)


def masked(shape: Sequence[int], axes: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """X and a mask that has some of the axes, in no row of which all is hidden."""
    mask = mask_of([d if axis in axes else 1 for d, axis in zip(shape, "bhqk", strict=True)], kind)
    mask[..., 0] = kind == "bool"
    return draw(shape), mask


@pytest.mark.parametrize("form", [Form.AUTO, Form.TWO_PASS])
def test_products_beyond_whole_numbers_are_rounded_before_the_maximum_is_subtracted(form: Form) -> None:
    """A multiply-add would leave what rounding takes from the greatest product, whose exponential is no number."""
    run = kernel(Target.named("cpu"), (None, None), None, None, 0.7, form)
    for length in (1, 9, 65, 2049):
        for number in (1e12, -1e12, 1e30, -1e30, 1e38):
            x = np.full((2, length), number, np.float32)
            np.testing.assert_allclose(run(x), 1 / length, rtol=TOLERANCE)


@pytest.mark.parametrize("scale, form", [(0.125, Form.AUTO), (-2.0, Form.AUTO), (3.0, Form.TWO_PASS)])
def test_scales_alone(scale: float, form: Form) -> None:
    target = Target.named("cpu")
    for length in (1, 7, 8, 63, 64, 65, 2049, 4100):
        x = draw((3, length))
        got = kernel(target, (None, None), None, None, scale, form)(x)
        np.testing.assert_allclose(got, masked_softmax(x, None, scale), rtol=TOLERANCE, atol=1e-38)


@pytest.mark.parametrize("form", [Form.AUTO, Form.TWO_PASS])
@pytest.mark.parametrize("axes, lengths", [("", (1, 7, 300)), ("b", (1, 8, 9, 65, 2049, 4100)), ("bq", (17, 2049))])
def test_factors_of_run_time(axes: str, lengths: tuple[int, ...], form: Form) -> None:
    """One number, or one for each row of some axes; 0 and less, infinite and no numbers among them."""
    own = tuple(axis in axes for axis in "bhqk")
    run = kernel(Target.named("cpu"), (None,) * 4, None, None, 1.0, form, "float32", own)
    for length in lengths:
        x = draw((3, 2, 4, length))
        shape = [d if axis in axes else 1 for d, axis in zip(x.shape, "bhqk", strict=True)]
        factors = np.resize([2, -1.5, 0, 0.01, INF, np.nan], shape).astype(np.float32)
        np.testing.assert_allclose(run(x, factors), tempered_softmax(x, factors), rtol=TOLERANCE, atol=1e-38)


@pytest.mark.parametrize(
    "factor_axes, axes, kind, form",
    [("", "k", "float32", Form.AUTO), ("b", "qk", "bool", Form.AUTO), ("bq", "bhqk", "float32", Form.TWO_PASS)],
)
def test_factors_of_run_time_under_a_mask(factor_axes: str, axes: str, kind: str, form: Form) -> None:
    """Factor and mask have axes of their own; a hidden element is hidden whatever the sign of the factor."""
    own = tuple(axis in factor_axes for axis in "bhqk")
    run = kernel(
        Target.named("cpu"), (None,) * 4, tuple(axis in axes for axis in "bhqk"), kind, 1.0, form, "float32", own
    )
    for length in (1, 7, 8, 9, 65, 300, 2049, 4100):
        x, mask = masked((3, 2, 4, length), axes, kind)
        shape = [d if axis in factor_axes else 1 for d, axis in zip(x.shape, "bhqk", strict=True)]
        factors = np.resize([1.5, -1.5, 0, 0.01, np.nan], shape).astype(np.float32)
        expected = tempered_softmax(x, factors, mask)
        np.testing.assert_allclose(run(x, factors, mask), expected, rtol=TOLERANCE, atol=1e-38)


@pytest.mark.parametrize("length, kind", [(17, "float32"), (7, "bool")])
def test_factors_under_a_mask_of_fixed_shapes(length: int, kind: str) -> None:
    x, mask = masked((2, 3, 4, length), "bk", kind)
    axes, own = (True, False, False, True), (False, True, False, False)
    run = kernel(Target.named("cpu"), x.shape, axes, kind, 1.0, Form.AUTO, "float32", own)
    factors = np.array([0.5, -2, 1], np.float32).reshape(1, 3, 1, 1)
    np.testing.assert_allclose(run(x, factors, mask), tempered_softmax(x, factors, mask), rtol=TOLERANCE, atol=1e-38)


@pytest.mark.parametrize("form", [Form.THREE_PASS, Form.TWO_PASS])
@pytest.mark.parametrize("length", [3, 40, 4100])
def test_hidden_rows_and_special_elements_are_as_in_the_body(length: int, form: Form) -> None:
    """NaN for a row of nothing but -inf; the lowest float is a number, and hides what is not -inf."""
    x, mask = draw((7, length)), np.zeros((7, length), np.float32)
    mask[0], mask[1] = -INF, LOWEST
    mask[2, 1:], mask[3, 1:] = -INF, LOWEST
    x[4, 0], x[5, 1], mask[6, 2] = np.nan, INF, np.nan
    got = kernel(Target.named("cpu"), (None, None), (True, True), "float32", 1.0, form)(x, mask)
    np.testing.assert_array_equal(np.isnan(got).all(axis=1), [True, False, False, False, True, True, True])
    np.testing.assert_allclose(got[1], 1 / length, rtol=1e-6)
    # 1 may be off by its last place; what is hidden is exactly 0.
    np.testing.assert_allclose(got[2:4], np.eye(1, length).repeat(2, axis=0), rtol=2.5e-7, atol=0)
    kept = mask == 0
    got = kernel(Target.named("cpu"), (None, None), (True, True), "bool", 1.0, form)(x, kept)
    np.testing.assert_array_equal(np.isnan(got).all(axis=1), [True, True, False, False, True, True, False])
    assert got[6, 2] == 0


def test_nothing_to_do() -> None:
    for shape in [(0, 3, 4), (2, 0, 4), (2, 3, 0)]:
        run = kernel(Target.named("cpu"), (None,) * 3, (False, True, True), "float32", 1.0)
        assert run(np.zeros(shape, np.float32), np.zeros((1, *shape[1:]), np.float32)).shape == shape


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 300), st.floats(0.125, 4),
    st.sampled_from([Form.AUTO, Form.TWO_PASS]),
)
def test_hidden_elements_do_not_count(seed: int, rows: int, length: int, scale: float, form: Form) -> None:
    random = np.random.default_rng(seed)
    x, kept = random.standard_normal((rows, length)).astype(np.float32), random.random(length) < 0.7
    kept[random.integers(length)] = True
    got = kernel(Target.named("cpu"), (None, None), (False, True), "bool", 1.0, form)(x * np.float32(scale), kept[None])
    alone = masked_softmax((x * np.float32(scale))[:, kept])
    np.testing.assert_allclose(got[:, kept], alone, rtol=TOLERANCE, atol=1e-38)
    assert not got[:, ~kept].any()


@pytest.mark.parametrize(
    "operator",
    [
        SCALED_SOFTMAX, MASKED_SOFTMAX, SELECTED_SOFTMAX, TEMPERED_SOFTMAX, TEMPERED_MASKED_SOFTMAX,
        TEMPERED_SELECTED_SOFTMAX,
    ],
    ids=lambda o: o.name,
)  # fmt: skip
def test_cases_through_the_lowering(operator) -> None:
    import tvm
    from graphwright.runtime.codegen import machine_code
    from graphwright.runtime.lowering import lowering_for
    from tvm import relax

    target = Target.named("cpu")
    lower = lowering_for(*operator.identifier, "llvm")
    assert lower is not None
    for case in operator.cases:
        inputs = [draw(case.shapes[0])]
        for place, shape in enumerate(case.shapes[1:], 1):
            if "Tempered" in operator.name and place == 1:
                inputs.append(draw(shape, 3))
                continue
            inputs.append(mask_of(shape, "bool" if place in case.booleans else "float32"))
            inputs[-1][..., :1] = 1
        builder = relax.BlockBuilder()
        given_ = [relax.Var(f"x{i}", relax.TensorType(v.shape, str(v.dtype))) for i, v in enumerate(inputs)]
        with builder.function("main", given_):
            with builder.dataflow():
                y = builder.emit_output(builder.emit(lower(builder, given_, dict(case.attributes), target)))
            builder.emit_func_output(y)
        machine = relax.VirtualMachine(machine_code(builder.get(), target), tvm.cpu())
        got = machine["main"](*(tvm.runtime.tensor(value) for value in inputs)).numpy()
        expected = operator.reference(*inputs, **case.attributes)
        # Scaled by 2 and masked, the elements span up to 46, where differences are rounded by 1.9e-6.
        np.testing.assert_allclose(got, expected, rtol=5e-6, atol=1e-38, err_msg=case.note)


@pytest.mark.parametrize("kind", ["float32", "bool"])
def test_a_masked_kernel_of_free_sizes_compiles_in_seconds(kind: str) -> None:
    """TVM's analyzer once put the address of each mask element into every step of its exponential: half a minute."""
    import time

    import tvm
    from graphwright.runtime.codegen import machine_code
    from graphwright.runtime.kernels.softmax_passes import Source
    from graphwright.runtime.kernels.two_pass_softmax import softmax

    target = Target.named("cpu-avx2")
    start = time.process_time()
    source = Source(0.5, kind, (True, False, True, True))
    function = softmax((None,) * 4, target.isa, target.caches, 2, name="softmax", source=source)
    machine_code(tvm.IRModule({"softmax": function}), target)
    assert time.process_time() - start < 15
