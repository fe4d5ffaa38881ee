"""Softmax that reads and writes float16 and bfloat16: every kernel against NumPy in float64 on the same narrow numbers.

A result is float32's, which is tested elsewhere, rounded once; no tensor of float32 is in memory.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from graphwright.passes.ops import MASKED_SOFTMAX, SCALED_SOFTMAX, SELECTED_SOFTMAX, TWO_PASS_SOFTMAX
from graphwright.passes.ops.masked_softmax import masked_softmax, tempered_softmax
from graphwright.passes.ops.two_pass_softmax import NARROW_ROW, Form
from graphwright.runtime.target import Target
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.tvm

NUMPY = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
# Half of the last place, and what float32 is off by, which may decide where a middle goes.
RELATIVE = {"float16": 2**-11 + 4e-6, "bfloat16": 2**-8 + 4e-6, "float32": 4e-6}
# Half of the least number of float16; below the normal numbers of float32, which bfloat16's are too, results may be 0.
ABSOLUTE = {"float16": 2**-25 * 1.001, "bfloat16": 1.2e-38, "float32": 1.2e-38}
BLOCK, PAIRS = 1 << 11, 1 << 14  # rows that wait in scratch memory; blocks of the two-pass form in 64 lanes
LENGTHS = sorted({1, 2, 7, 100, 300} | {n + d for n in (4, 8, 16, 64, 128, BLOCK, PAIRS) for d in (-1, 0, 1)})
SPECIAL_LENGTHS = [2, 7, 16, 300, BLOCK + 3]

Kernel = Callable[..., np.ndarray]
Types = tuple[str, str]


def compiled(function: Any, target: Target, result: str) -> Kernel:
    """`run(x, ...)` of a kernel that is named softmax."""
    import tvm
    from graphwright.runtime.codegen import machine_code

    call = machine_code(tvm.IRModule({"softmax": function}), target)["softmax"]

    def run(*inputs: np.ndarray) -> np.ndarray:
        # What is left of this value was not written.
        y = tvm.runtime.tensor(np.full(inputs[0].shape, 123, NUMPY[result]))
        call(*(tvm.runtime.tensor(value) for value in inputs), y)
        return y.numpy()

    return run


@functools.cache
def rows(
    target: Target, shape: tuple[int | None, ...], types: Types, form: Form = Form.AUTO, threads: int = 2,
    source: Any = None,
) -> Kernel:  # fmt: skip
    from graphwright.runtime.kernels.two_pass_softmax import PLAIN, softmax

    isa, caches = target.isa, target.caches
    return compiled(softmax(shape, isa, caches, threads, form, "softmax", source or PLAIN, types), target, types[1])


@functools.cache
def columns(
    target: Target, shape: tuple[int | str, ...], types: Types, form: Form = Form.AUTO, log: bool = False
) -> Kernel:
    from graphwright.runtime.kernels.softmax_columns import softmax_columns

    outer, length, inner = shape
    function = softmax_columns((outer,), length, (inner,), target.isa, target.caches, 2, form, log, "softmax", types)
    return compiled(function, target, types[1])


@functools.cache
def logarithms(target: Target, shape: tuple[int | str, ...], types: Types) -> Kernel:
    from graphwright.runtime.kernels.log_softmax import log_softmax

    return compiled(log_softmax(shape, target.isa, 2, "softmax", types), target, types[1])


def draw(kind: str, *shape: int) -> np.ndarray:
    return (np.random.default_rng(sum(shape)).random(shape) * 20 - 10).astype(NUMPY[kind])


def close(got: np.ndarray, expected: np.ndarray, absolute: float | None = None) -> None:
    kind = got.dtype.name
    absolute = ABSOLUTE[kind] if absolute is None else absolute
    np.testing.assert_allclose(got.astype(np.float64), expected, rtol=RELATIVE[kind], atol=absolute)


def reference(x: np.ndarray, axis: int = -1, log: bool = False) -> np.ndarray:
    wide = x.astype(np.float64)
    if not log:
        return TWO_PASS_SOFTMAX.reference(wide, axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        wide = wide - wide.max(axis=axis, keepdims=True, initial=-np.inf)
        return wide - np.log(np.exp(wide).sum(axis=axis, keepdims=True))


@pytest.mark.parametrize("kind, form", [*(("float16", form) for form in Form), ("bfloat16", Form.AUTO)])
@pytest.mark.parametrize("name", ["cpu-avx512", "cpu-avx2"])
def test_rows_of_free_sizes(runnable: Callable[[str], Target], name: str, kind: str, form: Form) -> None:
    run = rows(runnable(name), (None, None), (kind, kind), form)
    for length in LENGTHS:
        data = draw(kind, 5, length)
        for count in (0, 1, 5):
            close(run(data[:count]), reference(data[:count]))
    for length in SPECIAL_LENGTHS:
        special(run, specials(kind, length))


@pytest.mark.parametrize("length", [7, 100, pytest.param(BLOCK + 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_rows_without_instructions_for_it(kind: str, length: int) -> None:
    target = Target.named("cpu-baseline")
    close(rows(target, (3, length), (kind, kind))(draw(kind, 3, length)), reference(draw(kind, 3, length)))


@pytest.mark.parametrize("types", [("float16", "float32"), ("float32", "float16"), ("float32", "bfloat16")])
def test_input_and_output_of_two_types(types: Types) -> None:
    for length in (7, 300, BLOCK + 1):
        x = draw(types[0], 3, length)
        close(rows(Target.named("cpu"), (3, length), types)(x), reference(x))


def specials(kind: str, length: int) -> np.ndarray:
    """One row of each kind that goes wrong somewhere; the greatest numbers are the type's."""
    most = ml_dtypes.finfo(NUMPY[kind]).max
    x = draw(kind, 11, length)
    x[0, 0] = -np.inf
    x[1, : length // 2] = -np.inf
    x[2, :] = -np.inf
    x[3, :] = -most
    x[4, 0] = np.nan
    x[5, -1] = np.nan
    x[6, length // 2] = np.inf
    x[7, :-1] = -most
    x[8, :] = most
    x[9, 0] = most
    x[10, 1:] = -90
    return x


def special(run: Kernel, x: np.ndarray) -> None:
    got = run(x)
    close(got, reference(x))
    assert np.isnan(got[[2, 4, 5, 6]].astype(np.float32)).all()


def test_nothing_to_do() -> None:
    target, types = Target.named("cpu"), ("float16", "float16")
    for shape in [(0, 8), (8, 0), (0, 5000)]:
        assert rows(target, (None, None), types)(np.zeros(shape, np.float16)).shape == shape
    for shape in [(0, 3, 4), (2, 0, 4), (2, 3, 0)]:
        assert columns(target, ("a", "b", "c"), types)(np.zeros(shape, np.float16)).shape == shape


@pytest.mark.parametrize("form", [Form.TWO_PASS, Form.THREE_PASS])
def test_streamed_output_and_threads(form: Form) -> None:
    """Rows of odd length start at every alignment; a long one is split."""
    target = Target.named("cpu")
    tiny = dataclasses.replace(target, caches=dataclasses.replace(target.caches, l1=64, l2=256, l3=1024))
    for shape in [(17, 301), (3, NARROW_ROW + 5), (1, (1 << 19) + 3)]:
        x = draw("float16", *shape)
        alone, shared = (rows(tiny, shape, ("float16", "float16"), form, threads)(x) for threads in (1, 2))
        np.testing.assert_array_equal(alone, shared)
        close(alone, reference(x))


@pytest.mark.parametrize("kind, form", [*(("float16", form) for form in Form), ("bfloat16", Form.AUTO)])
def test_columns(kind: str, form: Form) -> None:
    target = Target.named("cpu")
    tiny = dataclasses.replace(target, caches=dataclasses.replace(target.caches, l1=64, l2=8 * 32 * 40, l3=0))
    run = columns(target, ("a", "b", "c"), (kind, kind), form)
    for length in (1, 7, 8, 9, 257, 600):
        for count in (1, 3, 7, 8, 9, 31, 33, 65, 130):
            x = draw(kind, 2, length, count)
            close(run(x), reference(x, 1))
    for shape in [(2, 40, 77), (2, 41, 77), (2, 5, 301)]:
        close(columns(tiny, shape, (kind, kind), form)(draw(kind, *shape)), reference(draw(kind, *shape), 1))
    close(columns(target, (2, 301, 3), (kind, kind))(draw(kind, 2, 301, 3)), reference(draw(kind, 2, 301, 3), 1))
    for length in SPECIAL_LENGTHS[1:]:
        x = np.ascontiguousarray(specials(kind, length).T)[None]
        close(run(x), reference(x, 1))


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_logarithms(kind: str) -> None:
    target, types = Target.named("cpu"), (kind, kind)
    run, along = logarithms(target, ("n", "m"), types), columns(target, ("a", "b", "c"), types, log=True)
    for length in (1, 8, 9, 257, PAIRS + 1):
        x = draw(kind, 3, length)
        close(run(x), reference(x, log=True), 4e-6)
        x = draw(kind, 2, length % 600, 19)
        close(along(x), reference(x, 1, True), 4e-6)
    for length in SPECIAL_LENGTHS:
        # Differences of bfloat16's greatest numbers are infinite in float32.
        x = specials("float16", length).astype(NUMPY[kind])
        close(run(x), reference(x, log=True), 4e-6)


@pytest.mark.parametrize(
    "kind, mask, form",
    [("float16", "float16", Form.AUTO), ("float16", "bool", Form.TWO_PASS), ("bfloat16", "bfloat16", Form.AUTO),
     ("float16", None, Form.AUTO)],
)  # fmt: skip
def test_scales_and_masks(kind: str, mask: str | None, form: Form) -> None:
    from graphwright.runtime.kernels.softmax_passes import Source

    axes = (True, False, True) if mask else ()
    run = rows(Target.named("cpu"), (None,) * 3, (kind, kind), form, source=Source(0.5, mask, axes))
    for length in (1, 7, 8, 17, 65, 300, BLOCK + 1):
        x, hidden = draw(kind, 2, 3, length), np.random.default_rng(1).random((2, 1, length)) < 0.25
        hidden[..., 0] = False
        given = ~hidden if mask == "bool" else np.where(hidden, -np.inf, draw(kind, 2, 1, length).astype(np.float32))
        given = given if mask in (None, "bool") else given.astype(NUMPY[mask])
        inputs = (x, given) if mask else (x,)
        close(run(*inputs), masked_softmax(x, given if mask else None, 0.5))


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_factors_of_run_time(kind: str) -> None:
    from graphwright.runtime.kernels.softmax_passes import Source

    source = Source(factor=kind, factor_axes=(True, False, False))
    for length in (7, 65, BLOCK + 1):
        x, factors = draw(kind, 3, 2, length), np.array([[[0.5]], [[-1.5]], [[np.nan]]], NUMPY[kind])
        run = rows(Target.named("cpu"), x.shape, (kind, kind), source=source)
        close(run(x, factors), tempered_softmax(x, factors))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 3000), st.floats(0, 80), st.sampled_from(list(Form))
)
def test_rows_are_distributions(seed: int, count: int, length: int, spread: float, form: Form) -> None:
    run = rows(Target.named("cpu"), (None, None), ("float16", "float16"), form)
    x = (np.random.default_rng(seed).random((count, length)) * spread).astype(np.float16)
    got = run(x)
    close(got, reference(x))
    # Each element is rounded by half of its last place, or of the least number.
    slack = 2**-11 + length * 2**-25
    np.testing.assert_allclose(got.astype(np.float64).sum(axis=1), 1, atol=slack + 4e-6)


@pytest.mark.parametrize("operator", [SCALED_SOFTMAX, MASKED_SOFTMAX, SELECTED_SOFTMAX], ids=lambda o: o.name)
def test_the_operators_lowerings_take_it(operator: Any) -> None:
    import tvm
    from graphwright.runtime.codegen import machine_code
    from graphwright.runtime.lowering import lowering_for
    from tvm import relax

    target, x = Target.named("cpu"), draw("float16", 2, 3, 17)
    mask = np.ones((3, 17), np.float16 if operator is MASKED_SOFTMAX else np.bool_)
    inputs = [x] if operator is SCALED_SOFTMAX else [x, mask]
    lower = lowering_for(*operator.identifier, "llvm")
    assert lower is not None
    builder = relax.BlockBuilder()
    given_ = [relax.Var(f"x{i}", relax.TensorType(v.shape, str(v.dtype))) for i, v in enumerate(inputs)]
    with builder.function("main", given_):
        with builder.dataflow():
            y = builder.emit_output(builder.emit(lower(builder, given_, {"scale": 0.5}, target)))
        builder.emit_func_output(y)
    machine = relax.VirtualMachine(machine_code(builder.get(), target), tvm.cpu())
    got = machine["main"](*(tvm.runtime.tensor(value) for value in inputs)).numpy()
    assert got.dtype == np.float16
    close(got, operator.reference(*inputs, scale=0.5))


# Models.


MODELS = {
    "rows": ("x = 64, 1000", "y = Softmax (x)"),
    "long rows": ("x = 3, 40000", "y = Softmax (x)"),
    "columns": ("x = 2, 300, 40", "y = Softmax <axis = 1> (x)"),
    "logarithms": ("x = 64, 1000", "y = LogSoftmax (x)"),
    "logarithms of columns": ("x = 2, 300, 40", "y = LogSoftmax <axis = 1> (x)"),
    "the pass's operator": ("x = 64, 1000", "y = graphwright.TwoPassSoftmax <axis = -1> (x)"),
}


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("form", MODELS)
def test_a_model_s_memory_plan_holds_nothing_of_float32(
    compile_model: Callable[..., Any], form: str, kind: str
) -> None:
    from graphwright.runtime.work import work_of

    sizes, line = MODELS[form]
    shape = tuple(int(d) for d in sizes.partition("=")[2].split(","))
    dims = ",".join(map(str, shape))
    model = compile_model(f"g ({kind}[{dims}] x) => ({kind}[{dims}] y) {{ {line} }}")
    x = draw(kind, *shape)
    # The output is all that is allocated.
    assert work_of(model.lowered).activation_bytes == x.nbytes
    (kernel,) = model.kernels("softmax")
    assert "cast" not in "".join(model.kernels()), model.kernels()
    log = line.startswith("y = Log")
    (got,) = model.run({"x": x})
    close(got, reference(x, 1 if "columns" in form else -1, log), 4e-6 if log else None)
    assert got.dtype == NUMPY[kind] and kernel


def test_what_computes_in_float32_around_it_meets_no_rounding(compile_model: Callable[..., Any]) -> None:
    """Products of float16 hand their sums on as they are, and take probabilities as they are, as in onnxruntime."""
    model = compile_model(
        "g (float16[5,16] a, float16[16,40] b, float16[40,8] c) => (float16[5,8] y) "
        "{ s = MatMul (a, b) p = Softmax (s) y = MatMul (p, c) }"
    )
    a, b, c = draw("float16", 5, 16), draw("float16", 16, 40), draw("float16", 40, 8)
    (got,) = model.run({"a": a, "b": b / np.float16(8), "c": c})
    p = reference(a.astype(np.float64) @ (b / np.float16(8)).astype(np.float64))
    np.testing.assert_allclose(got, p @ c.astype(np.float64), rtol=2**-11, atol=1e-4)
