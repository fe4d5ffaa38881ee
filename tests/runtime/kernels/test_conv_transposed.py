"""Transposed convolutions against a sum over every input pixel in float64, from the ONNX operator to the kernel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from graphwright.runtime.target import Target
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

tvm = pytest.importorskip("tvm")
pytestmark = pytest.mark.tvm

from graphwright.runtime import phases  # noqa: E402
from graphwright.runtime.importer import import_model  # noqa: E402
from graphwright.runtime.kernels import conv_transposed  # noqa: E402
from graphwright.runtime.kernels.conv_spec import ConvTile  # noqa: E402
from graphwright.runtime.kernels.conv_transposed import TransposedSpec  # noqa: E402

# Of the largest output. A float32 sum of K products in the order of a loop is off by about sqrt(K)·6e-8 of it.
TOLERANCE = 1e-5
X86 = ["cpu-avx512", "cpu-avx2", "cpu-baseline"]


@dataclass(frozen=True)
class Case:
    """sizes, kernel and what follows have one number for each axis of the image; pads before, then after."""

    channels: tuple[int, int]
    sizes: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    extra: tuple[int, ...] = ()
    groups: int = 1
    batch: int = 1
    then: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        rank = len(self.sizes)
        for name, fill in (("strides", (1,) * rank), ("pads", (0,) * 2 * rank), ("dilations", (1,) * rank)):
            object.__setattr__(self, name, getattr(self, name) or fill)
        object.__setattr__(self, "extra", self.extra or (0,) * rank)

    @property
    def out(self) -> list[int]:
        rank = len(self.sizes)
        return [
            (self.sizes[a] - 1) * self.strides[a] + (self.kernel[a] - 1) * self.dilations[a] + 1 + self.extra[a]
            - self.pads[a] - self.pads[rank + a]
            for a in range(rank)
        ]  # fmt: skip


def reference(case: Case, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    rank = len(case.sizes)
    before = [
        max(s + (k - 1) * d + 1, p + o)
        for s, k, d, p, o in zip(
            [(n - 1) * s for n, s in zip(case.sizes, case.strides, strict=True)], case.kernel, case.dilations,
            case.pads[:rank], case.out, strict=True,
        )
    ]  # fmt: skip
    whole = np.zeros((case.batch, case.channels[1], *before))
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    inputs = np.split(x, case.groups, axis=1)
    weights = np.split(weight, case.groups, axis=0)
    for tap in itertools.product(*map(range, case.kernel)):
        added = [
            np.einsum("ni...,io->no...", part, w[(slice(None), slice(None), *tap)])
            for part, w in zip(inputs, weights, strict=True)
        ]
        places = [
            slice(t * d, t * d + (n - 1) * s + 1, s)
            for t, d, n, s in zip(tap, case.dilations, case.sizes, case.strides, strict=True)
        ]
        whole[(slice(None), slice(None), *places)] += np.concatenate(added, axis=1)
    cut = [slice(p, p + o) for p, o in zip(case.pads[:rank], case.out, strict=True)]
    return whole[(slice(None), slice(None), *cut)] + bias.astype(np.float64).reshape(1, -1, *[1] * rank)


def arrays(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((case.batch, case.channels[0], *case.sizes), np.float32)
    weight = draw.standard_normal((case.channels[0], case.channels[1] // case.groups, *case.kernel), np.float32)
    return x, weight, draw.standard_normal(case.channels[1], np.float32)


def lowered(case: Case, target: Target, weight: np.ndarray, bias: np.ndarray) -> tuple[Any, Any, Any]:
    """(executable, constants, the module before code is generated)."""
    node = helper.make_node(
        "ConvTranspose", ["x", "w", "b"], ["t0"], strides=case.strides, pads=case.pads, dilations=case.dilations,
        output_padding=case.extra, group=case.groups, kernel_shape=case.kernel,
    )  # fmt: skip
    nodes = [node, *(helper.make_node(op, [f"t{i}"], [f"t{i + 1}"]) for i, op in enumerate(case.then))]
    shapes = {"x": (case.batch, case.channels[0], *case.sizes), f"t{len(case.then)}": None}
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    constants = [numpy_helper.from_array(a, n) for n, a in (("w", weight), ("b", bias))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    seen: list[Any] = []
    executable, held = phases.compile_module(import_model(model, target), target, seen.append)
    return executable, held, seen[0]


def compiled(
    case: Case, target: Target, weight: np.ndarray, bias: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    from tvm import relax

    executable, constants, _ = lowered(case, target, weight, bias)
    main = relax.VirtualMachine(executable, tvm.cpu())["main"]
    return lambda x: main(tvm.runtime.tensor(x), tuple(constants)).numpy()


def check(case: Case, target: Target) -> None:
    """Numbers as the sum has them, and NaN in one place of the last channel: in those outputs alone that read it."""
    x, weight, bias = arrays(case)
    expected = reference(case, x, weight, bias)
    run = compiled(case, target, weight, bias)
    got = run(x)
    assert got.shape == expected.shape
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE, f"{error:.1e} of the output's scale"
    x[(-1, -1, *(size // 2 for size in case.sizes))] = np.nan
    np.testing.assert_array_equal(np.isnan(run(x)), np.isnan(reference(case, x, weight, bias)))


CASES = {
    "2x2, stride 2": Case((32, 16), (7, 9), (2, 2), (2, 2)),
    "2x2, stride 2, channels beside vectors": Case((20, 24), (5, 11), (2, 2), (2, 2), batch=2),
    "2x2, stride 2, a pixel's outputs dropped": Case((24, 2), (6, 13), (2, 2), (2, 2), (0, 0, 2, 2)),
    "2x2, stride 2, one channel": Case((24, 1), (6, 13), (2, 2), (2, 2)),
    "2x2, stride 2, three channels": Case((17, 3), (3, 4), (2, 2), (2, 2), batch=2),
    "4x4, stride 4, one channel": Case((18, 1), (3, 5), (4, 4), (4, 4)),
    "4x4, stride 4, two channels": Case((16, 2), (3, 7), (4, 4), (4, 4)),
    "2x1, one channel": Case((16, 1), (4, 10), (2, 1), (2, 1)),
    "3x3, stride 3, one channel": Case((16, 1), (4, 5), (3, 3), (3, 3)),
    "3x3, stride 2": Case((16, 24), (6, 7), (3, 3), (2, 2), (1, 1, 1, 1), extra=(1, 1)),
    "4x4, stride 2": Case((24, 16), (5, 8), (4, 4), (2, 2), (1, 1, 1, 1)),
    "5x5, stride 3": Case((16, 16), (5, 4), (5, 5), (3, 3), (2, 1, 0, 1)),
    "2x2, stride 2, padded": Case((16, 16), (5, 4), (2, 2), (2, 2), (1, 0, 0, 1)),
    "2x2, stride 3": Case((16, 16), (5, 4), (2, 2), (3, 3)),
    "1x1, stride 2": Case((16, 8), (5, 4), (1, 1), (2, 2), extra=(1, 1)),
    "3x3, stride 1": Case((32, 32), (12, 14), (3, 3), pads=(1, 1, 1, 1)),
    "more padding than kernel": Case((16, 16), (8, 8), (3, 3), (1, 1), (3, 4, 3, 4)),
    "dilation 2": Case((16, 16), (6, 5), (3, 3), (1, 1), (1, 1, 1, 1), (2, 2)),
    "dilation 2, stride 2": Case((16, 16), (6, 5), (3, 3), (2, 2), dilations=(2, 2)),
    "dilation 3, stride 2": Case((16, 16), (6, 5), (3, 3), (2, 2), (1, 2, 1, 2), (3, 3)),
    "dilation 4, stride 6": Case((16, 16), (3, 4), (3, 2), (6, 6), dilations=(4, 4)),
    "strides differ": Case((16, 20), (6, 5), (3, 4), (1, 2), (1, 1, 1, 1)),
    "groups": Case((32, 64), (5, 6), (3, 3), (2, 2), (1, 1, 1, 1), groups=2),
    "depthwise": Case((24, 24), (6, 7), (4, 4), (2, 2), (1, 1, 1, 1), groups=24),
    "groups that no template takes": Case((12, 6), (5, 6), (3, 3), (2, 2), groups=3),
    "few input channels": Case((3, 16), (8, 9), (2, 2), (2, 2)),
    "one pixel": Case((16, 16), (1, 1), (4, 4), (2, 2), (1, 1, 1, 1)),
    "one element": Case((1, 1), (1, 1), (1, 1)),
    "one-dimensional": Case((24, 40), (17,), (4,), (2,), (1, 1)),
    "one-dimensional, 16x": Case((32, 16), (9,), (16,), (8,), (4, 4)),
    "one-dimensional, one channel": Case((16, 1), (21,), (4,), (4,)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", X86)
def test_transposed(runnable: Callable[[str], Target], name: str, case: str) -> None:
    check(CASES[case], runnable(name))


@pytest.mark.parametrize("channels", [1, 4, 5, 7, 8, 9, 17])
def test_channels_around_vectors(channels: int) -> None:
    check(Case((channels, 12), (4, 5), (2, 2), (2, 2)), Target.named("cpu"))
    check(Case((12, channels), (4, 5), (2, 2), (2, 2)), Target.named("cpu"))


@pytest.mark.parametrize("width", [1, 5, 6, 7, 14, 15])
def test_widths_around_tiles(width: int) -> None:
    check(Case((16, 16), (2, width), (2, 2), (2, 2)), Target.named("cpu"))
    check(Case((16, 1), (2, width), (2, 2), (2, 2)), Target.named("cpu"))
    check(Case((16, 16), (2, width), (4, 4), (2, 2), (1, 1, 1, 1)), Target.named("cpu"))


@pytest.mark.parametrize("channels", [1, 16])
def test_what_follows_is_computed_in_the_kernel(channels: int) -> None:
    case = Case((16, channels), (10, 12), (2, 2), (2, 2), then=("Relu", "Sigmoid"))
    x, weight, bias = arrays(case)
    expected = 1 / (1 + np.exp(-np.maximum(0, reference(case, x, weight, bias))))
    target = Target.named("cpu")
    np.testing.assert_allclose(compiled(case, target, weight, bias)(x), expected, rtol=1e-5, atol=1e-6)
    *_, module = lowered(case, target, weight, bias)
    names = [v.name_hint for v in module.functions]
    layout = ("main", "pack", "reshape", "transpose")
    assert [name for name in names if "conv-transposed" in name or not any(word in name for word in layout)] == [
        name for name in names if name.startswith("fused_conv-transposed")
    ], names


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("channels", [1, 16])
def test_a_number_that_is_none_stays_in_reach_of_its_pixel(channels: int, value: float) -> None:
    for kernel in (2, 3):
        case = Case((16, channels), (5, 6), (kernel, kernel), (2, 2))
        x, weight, bias = arrays(case)
        x[0, 3, 2, 4] = value
        with np.errstate(invalid="ignore"):
            expected = reference(case, x, weight, bias)
        got = compiled(case, Target.named("cpu"), weight, bias)(x)
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))


AXIS = st.tuples(st.integers(1, 7), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2),
                 st.integers(0, 2), st.integers(0, 2))  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(
    st.lists(AXIS, min_size=1, max_size=2), st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.sampled_from(["dense", "depthwise"]), st.sampled_from(X86), st.integers(1, 2),
)  # fmt: skip
def test_any_transposed_convolution(runnable: Callable[[str], Target], axes, channels, kind, name, batch) -> None:
    sizes, kernel, strides, dilations, before, after, extra = zip(*axes, strict=True)
    assume(all(e < s or not e for e, s in zip(extra, strides, strict=True)))  # TVM refuses more
    groups = channels[0] if kind == "depthwise" else 1
    channels = (groups, groups) if kind == "depthwise" else channels
    case = Case(channels, sizes, kernel, strides, before + after, dilations, extra, groups, batch)
    assume(min(case.out) > 0 and math.prod(case.out) > 0)
    check(case, runnable(name))


def test_weights_of_another_shape_are_refused() -> None:
    target = Target.named("cpu")
    spec = TransposedSpec(1, 16, 8, (4, 4), (8, 8), (2, 2), (2, 2))
    with pytest.raises(ValueError, match=r"expected \(16, 8, 2, 2\)"):
        conv_transposed.pack(np.zeros((8, 16, 2, 2), np.float32), spec, target.isa, [ConvTile("direct")])


def test_every_output_belongs_to_one_part() -> None:
    isa = Target.named("cpu-avx2").isa
    spec = TransposedSpec(1, 16, 16, (5, 7), (12, 13), (4, 3), (3, 2), (2, 1), (1, 1))
    seen = np.zeros(spec.out_size, int)
    for part in conv_transposed.parts(spec, isa):
        for i, j in itertools.product(range(part.rows.phases), range(part.columns.phases)):
            seen[part.rows.first + i :: 3, part.columns.first + j :: 2] += 1
    assert (seen == 1).all()
