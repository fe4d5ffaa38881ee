"""The softmax kernels against NumPy in float64: every form, instruction set, boundary and special row."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
from graphwright.passes.ops import OPERATORS, TWO_PASS_SOFTMAX
from graphwright.passes.ops.two_pass_softmax import Form, choose_form
from graphwright.runtime.target import Target
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.tvm

# Spread 20 puts x - max at up to 20, where float32 numbers are 1.9e-6 apart: the three-pass form starts with that
# subtraction and half of that distance is its error. The two-pass form has none and stays below 5e-7.
TOLERANCE = 2e-6
X86 = ["cpu-avx512", "cpu-avx2", "cpu-baseline"]
ROWS = [0, 1, 3, 17]
BLOCK, PAIRS = 1 << 11, 1 << 14  # blocks of the three-pass form, and of the two-pass form in 64 lanes
LENGTHS = sorted(
    {1, 2, 7, 1000, 257, (1 << 15) - 1, 1 << 15, (1 << 15) + 1}
    | {n + d for n in (4, 8, 16, 64, 128, BLOCK, PAIRS) for d in (-1, 0, 1)}
)
INF, LOWEST = np.float32(np.inf), np.finfo(np.float32).min

Kernel = Callable[[np.ndarray], np.ndarray]


@functools.cache
def kernel(target: Target, shape: tuple[int | None, ...], form: Form = Form.AUTO, threads: int = 2) -> Kernel:
    import tvm
    from graphwright.runtime.codegen import machine_code
    from graphwright.runtime.kernels.two_pass_softmax import softmax

    function = softmax(shape, target.isa, target.caches, threads, form, name="softmax")
    compiled = machine_code(tvm.IRModule({"softmax": function}), target)["softmax"]

    def run(x: np.ndarray) -> np.ndarray:
        # What is left of this value was not written.
        y = tvm.runtime.tensor(np.full_like(x, 12345.0))
        compiled(tvm.runtime.tensor(x), y)
        return y.numpy()

    return run


def rows_of(count: int, length: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random((count, length)) * 20 - 10).astype(np.float32)


def check(run: Kernel, x: np.ndarray, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(run(x), TWO_PASS_SOFTMAX.reference(x), rtol=tolerance, atol=0)


@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize("name", X86)
def test_dynamic_shapes_match_numpy(runnable: Callable[[str], Target], name: str, form: Form) -> None:
    run = kernel(runnable(name), (None, None), form)
    for length in LENGTHS:
        data = rows_of(max(ROWS), length)
        for rows in ROWS:
            check(run, data[:rows])


@pytest.mark.parametrize("length", [1, 2, 7, 15, 16, 17, 64, 100, 197, 256, 257, 1000, BLOCK, BLOCK + 1, PAIRS + 1])
@pytest.mark.parametrize("name", X86)
def test_static_shapes_match_numpy(runnable: Callable[[str], Target], name: str, length: int) -> None:
    check(kernel(runnable(name), (3, length)), rows_of(3, length))


@pytest.mark.parametrize("length", [1, 31, PAIRS - 1, PAIRS, PAIRS + 1])
@pytest.mark.parametrize("name", X86)
def test_two_pass_form_is_exact_to_float32(runnable: Callable[[str], Target], name: str, length: int) -> None:
    check(kernel(runnable(name), (2, length), Form.TWO_PASS), rows_of(2, length), 5e-7)


@pytest.mark.parametrize("name", X86)
def test_two_pass_sums_begin_anew_where_later_elements_are_greater(
    runnable: Callable[[str], Target], name: str
) -> None:
    """A block is summed with the power of two of its first vector: smaller and greater ones behind it, far from 0."""
    target = runnable(name)
    rows = [(0, 19, 0), (0, 21, 0), (0, 60, 0), (0, 200, 0), (-200, 0, 60), (0, 0, 90), (50, 0, 0), (200, 0, 20)]
    if target.isa.fma:  # without it n·ln 2 is rounded far from 0
        rows += [(-1e5, -1e5 + 60, -1e5), (1e5, 1e5 + 60, 1e5), (0, 3e5, 0)]
    x = rows_of(len(rows), 2 * PAIRS + 5)
    for row, (first, rest, last) in enumerate(rows):
        x[row] += rest
        x[row, :16] += first - rest
        x[row, -3:] += last - rest
    x[:, 40] = -INF
    got = kernel(target, (None, None), Form.TWO_PASS)(x)
    np.testing.assert_allclose(got, TWO_PASS_SOFTMAX.reference(x), rtol=1e-6, atol=1.2e-38)


def test_empty_tensors() -> None:
    target = Target.named("cpu")
    for shape in [(0, 8), (8, 0), (0, 0), (0, 5000), (0,)]:
        for declared in (shape, (None,) * len(shape)):
            assert kernel(target, declared)(np.zeros(shape, np.float32)).shape == shape


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 5), (1, 1, 2049)])
def test_any_rank(shape: tuple[int, ...]) -> None:
    x = rows_of(1, int(np.prod(shape))).reshape(shape)
    check(kernel(Target.named("cpu"), shape), x)
    check(kernel(Target.named("cpu"), (None, *shape[1:])), x)


@pytest.mark.parametrize(
    "case", [c for c in TWO_PASS_SOFTMAX.cases if c.attributes["axis"] == -1], ids=lambda case: case.note
)
def test_cases_of_the_operator(case) -> None:
    (shape,) = case.shapes
    form = Form(case.attributes.get("form", "auto"))
    x = rows_of(1, int(np.prod(shape))).reshape(shape)
    check(kernel(Target.named("cpu"), shape, form), x)


@pytest.mark.parametrize("shape", [(1, 600000), (3, 530000), (2, 262144), (64, 4096), (3000, 64)])
@pytest.mark.parametrize("form", [Form.TWO_PASS, Form.THREE_PASS])
def test_threads_share_rows_and_blocks(form: Form, shape: tuple[int, ...]) -> None:
    x = rows_of(*shape)
    alone, shared = kernel(Target.named("cpu"), shape, form, 1)(x), kernel(Target.named("cpu"), shape, form, 2)(x)
    np.testing.assert_array_equal(alone, shared)
    np.testing.assert_allclose(alone, TWO_PASS_SOFTMAX.reference(x), rtol=TOLERANCE)


@pytest.mark.parametrize("name", X86)
def test_streamed_output_at_any_alignment(runnable: Callable[[str], Target], name: str) -> None:
    """A result larger than the last cache is streamed; rows of odd length start at every alignment."""
    import dataclasses

    target = runnable(name)
    tiny = dataclasses.replace(target, caches=dataclasses.replace(target.caches, l1=64, l2=256, l3=1024))
    for length in (301, 20001):
        for shape in [(17, length), (None, None)]:
            check(kernel(tiny, shape), rows_of(17, length))
    assert choose_form(301, tiny.caches)[0] is Form.TWO_PASS


@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
@pytest.mark.parametrize("name", X86)
def test_long_rows_of_a_large_result_are_streamed_from_scratch_memory(
    runnable: Callable[[str], Target], name: str, length: int
) -> None:
    """The three-pass form where one row fits the last-level cache and all of them do not."""
    import dataclasses

    target = runnable(name)
    small = dataclasses.replace(target, caches=dataclasses.replace(target.caches, l1=64, l2=256, l3=12 * length))
    x = specials(length)
    expected = TWO_PASS_SOFTMAX.reference(x)
    for threads in (1, 2):
        for shape in [x.shape, (None, None)]:
            got = kernel(small, shape, Form.THREE_PASS, threads)(x)
            np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=1.2e-38)


def test_streamed_rows_split_over_threads() -> None:
    import dataclasses

    target = Target.named("cpu")
    x = rows_of(1, (1 << 19) + 3)
    small = dataclasses.replace(target, caches=dataclasses.replace(target.caches, l3=1 << 20))
    check(kernel(small, x.shape, Form.THREE_PASS), x)
    check(kernel(small, (None, None), Form.THREE_PASS), x)


def specials(length: int) -> np.ndarray:
    """One row of each kind that goes wrong somewhere."""
    usual = rows_of(1, length, 3)[0]
    late = usual.copy()
    late[-1] = np.nan
    rows = [usual.copy() for _ in range(13)]
    rows[0][0] = -INF
    rows[1][: length // 2] = -INF
    rows[2][:] = -INF
    rows[3][:] = LOWEST
    rows[4][0] = np.nan
    rows[5] = late
    rows[6][length // 2] = INF
    rows[7][:-1] = -1e9
    rows[8][:-1] = LOWEST
    rows[9][:] = 5e6
    rows[10][:] = -5e6
    rows[11] *= np.float32(1e30)
    rows[12][1:] = -90
    return np.stack(rows)


@pytest.mark.parametrize("length", [2, 7, 16, 300, BLOCK + 3, 2 * PAIRS + 5])
@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize("name", X86)
def test_special_rows_equal_onnxruntime(runnable: Callable[[str], Target], name: str, form: Form, length: int) -> None:
    x = specials(length)
    run = kernel(runnable(name), (None, None), form)
    got, expected = run(x), onnxruntime_softmax(x)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    # Results below the smallest normal float may be flushed to zero. onnxruntime is the less exact of the two.
    np.testing.assert_allclose(got, TWO_PASS_SOFTMAX.reference(x), rtol=TOLERANCE, atol=1.2e-38)
    np.testing.assert_allclose(got, expected, rtol=8e-6, atol=1.2e-38)
    assert (got[0, 0], *got[1, : length // 2]) == (0.0,) * (1 + length // 2)
    assert np.isnan(got[[2, 4, 5, 6]]).all()
    np.testing.assert_allclose(got[3], 1 / length, rtol=1e-6)


@functools.cache
def session():
    import onnx
    import onnxruntime

    text = '<ir_version: 8, opset_import: ["": 17]> g (float[n, m] x) => (float[n, m] y) { y = Softmax<axis = -1>(x) }'
    return onnxruntime.InferenceSession(onnx.parser.parse_model(text).SerializeToString())


def onnxruntime_softmax(x: np.ndarray) -> np.ndarray:
    return session().run(None, {"x": x})[0]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 3000), st.floats(0, 80), st.floats(-100, 100),
    st.sampled_from(list(Form)),
)
def test_rows_are_distributions(seed: int, rows: int, length: int, spread: float, shift: float, form: Form) -> None:
    """Rows sum to 1, match the oracle, and do not change when a number is added to all of a row."""
    run = kernel(Target.named("cpu"), (None, None), form)
    x = (np.random.default_rng(seed).random((rows, length)) * spread).astype(np.float32)
    got = run(x)
    # Rounding of x - max, 80 at most, is 3.8e-6.
    np.testing.assert_allclose(got, TWO_PASS_SOFTMAX.reference(x), rtol=5e-6, atol=1e-38)
    np.testing.assert_allclose(got.sum(axis=1, dtype=np.float64), 1.0, rtol=2e-6)
    # The shifted input itself is rounded, to 7.6e-6 at 180.
    np.testing.assert_allclose(run(x + np.float32(shift)), got, rtol=4e-5, atol=1e-38)


@pytest.mark.parametrize("dtype, limit", [("float32", TOLERANCE), ("float16", 1e-3), ("float64", 1e-12)])
def test_lowering_gives_the_type_it_got(dtype: str, limit: float) -> None:
    import tvm
    from graphwright.runtime.codegen import machine_code
    from graphwright.runtime.lowering import lowering_for
    from tvm import relax

    target = Target.named("cpu")
    lower = lowering_for(*TWO_PASS_SOFTMAX.identifier, "llvm")
    assert lower is not None
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((3, tvm.tirx.Var("n", "int64")), dtype))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit_output(builder.emit(lower(builder, [x], {"axis": 1}, target)))
        builder.emit_func_output(y)
    machine = relax.VirtualMachine(machine_code(builder.get(), target), tvm.cpu())
    data = rows_of(3, 33).astype(dtype) / dtype_scale(dtype)
    got = machine["main"](tvm.runtime.tensor(data)).numpy()
    assert got.dtype == dtype
    np.testing.assert_allclose(got, TWO_PASS_SOFTMAX.reference(data), rtol=limit)


def dtype_scale(dtype: str) -> np.ndarray:
    """Brings float16 results into its normal range, where its relative error is 2^-11."""
    return np.array(4 if dtype == "float16" else 1, dtype)


def test_every_operator_has_an_identifier_of_its_own() -> None:
    assert all(op.identifier == key for key, op in OPERATORS.items())
