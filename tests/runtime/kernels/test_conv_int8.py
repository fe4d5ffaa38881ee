"""Convolutions of 8-bit numbers against PyTorch in float64, whose sums are exact here: equal in every bit."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable

import numpy as np
import pytest
from graphwright.passes.base import Caches
from graphwright.runtime.target import Target
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytestmark = [pytest.mark.tvm, pytest.mark.torch]

from graphwright.runtime.kernels.conv import ConvSpec, choose_tile, conv, pack_weights, supported  # noqa: E402
from graphwright.runtime.kernels.dots import first_sums, joined_steps  # noqa: E402
from graphwright.runtime.kernels.vectors import Vectors  # noqa: E402

from .test_conv import DEPTHWISE, DIRECT, reference, same, spec_of, unblock  # noqa: E402
from .test_gemm_int8 import held, multiplies_bytes  # noqa: E402

X86 = ["cpu-avx512-vnni", "cpu-avx512", "cpu-avx2", pytest.param("cpu-baseline", marks=pytest.mark.slow)]
UNWRITTEN = 12345
Kernel = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def whole(spec: ConvSpec, data: str = "uint8", zero: int = 131, joined: int = 0) -> ConvSpec:
    return dataclasses.replace(spec, data=data, zero=zero, joined=joined)


@functools.cache
def kernel(spec: ConvSpec, target: Target, threads: int = 2) -> Kernel:
    import tvm
    from graphwright.runtime.codegen import machine_code

    tile, lanes = choose_tile(spec, target.isa, target.caches), Vectors(target.isa).lanes
    function = conv(spec, target.isa, threads, tile, "conv", target.caches)
    compiled = machine_code(tvm.IRModule({"conv": function}), target)["conv"]

    def run(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        stored = x
        if spec.blocked_input:
            # Lanes beyond the channels hold numbers that must not matter.
            padded = np.full((len(x), spec.in_blocks(lanes) * lanes, *spec.in_size), 77, x.dtype)
            padded[:, : spec.in_channels] = x
            stored = padded.reshape(len(x), -1, lanes, *spec.in_size).transpose(0, 1, 3, 4, 2)
        sums = weight.sum(axis=(1, 2, 3), dtype=np.int64)
        y = np.full((len(x), spec.out_blocks(lanes), *spec.out_size, lanes), UNWRITTEN, np.int32)
        given = (
            np.ascontiguousarray(stored).reshape(len(x), -1), pack_weights(weight, spec, target.isa, tile),
            first_sums(sums, bias, spec.data, spec.zero, target.isa, lanes, spec.joined), y.reshape(len(x), -1),
        )  # fmt: skip
        arguments = [tvm.runtime.tensor(a) for a in given]
        compiled(*arguments)
        return unblock(arguments[3].numpy().reshape(y.shape), spec.out_channels)

    return run


def check(spec: ConvSpec, target: Target, threads: int = 2, images: int | None = None) -> None:
    """Random numbers, and nothing but extremes. The joined steps of `spec` are what weights are held to, and count on
    machines that multiply bytes so."""
    joined, spec = spec.joined, spec if multiplies_bytes(target) else dataclasses.replace(spec, joined=0)
    draw, info = np.random.default_rng(0), np.iinfo(spec.data)
    shape = (images or spec.batch or 1, spec.in_channels, *spec.in_size)
    weights = (spec.out_channels, spec.in_channels // spec.groups, *spec.kernel)
    bias = draw.integers(-1000, 1000, spec.out_channels)
    cases = [(draw.integers(info.min, info.max + 1, shape), draw.integers(-128, 128, weights))]
    cases += [(np.full(shape, x), np.full(weights, w)) for x, w in ((info.min, -128), (info.max, -128))]
    for x, w in cases:
        x, w = x.astype(spec.data), held(w.astype(np.int8), joined, 1)
        assert not spec.joined or spec.joined <= joined_steps(w, 1, target.isa)
        got = kernel(spec, target, threads)(x, w, bias)
        expected = reference(spec, x.astype(np.float64) - spec.zero, w.astype(np.float64), bias.astype(np.float64))
        np.testing.assert_array_equal(got, expected.astype(np.int64), err_msg=str(spec))


@pytest.mark.parametrize("case", DIRECT)
@pytest.mark.parametrize("name", X86)
def test_direct(runnable: Callable[[str], Target], name: str, case: str) -> None:
    check(whole(DIRECT[case]), runnable(name))


@pytest.mark.parametrize("case", DIRECT)
def test_steps_of_bytes(case: str) -> None:
    for joined in (1, 2):
        check(whole(DIRECT[case], joined=joined), Target.named("cpu-avx2"))


@pytest.mark.parametrize("case", DEPTHWISE)
@pytest.mark.parametrize("name", X86)
def test_depthwise(runnable: Callable[[str], Target], name: str, case: str) -> None:
    check(whole(DEPTHWISE[case]), runnable(name))


@pytest.mark.parametrize("case", ["3x3", "stride 2", "plain input", "1x1"])
def test_signed_data(case: str) -> None:
    for zero in (-128, 5):
        check(whole(DIRECT[case], "int8", zero), Target.named("cpu"))
        check(whole(DIRECT[case], "int8", zero, 2), Target.named("cpu"))
    if case in DEPTHWISE:
        check(whole(DEPTHWISE[case], "int8", -7), Target.named("cpu"))


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 17])
def test_channels_that_do_not_fill_vectors(channels: int) -> None:
    target = Target.named("cpu")
    for joined in (0, 2):
        check(whole(spec_of((channels, 16), (7, 9), (3, 3), pads=same(3)), joined=joined), target)
        check(whole(spec_of((16, channels), (7, 9), (1, 1)), joined=joined), target)
    check(whole(spec_of((channels, channels), (7, 9), (3, 3), pads=same(3), groups=channels)), target)


@pytest.mark.parametrize("width", [1, 5, 6, 7, 12, 13, 15])
def test_widths_around_tiles(width: int) -> None:
    target = Target.named("cpu")
    for joined in (0, 2):
        check(whole(spec_of((16, 16), (3, width), (3, 3), pads=same(3)), joined=joined), target)
        check(whole(spec_of((16, 16), (1, width), (1, 1)), joined=joined), target)
    check(whole(spec_of((16, 16), (3, width), (3, 3), pads=same(3), groups=16)), target)


def test_batch_known_at_run_time() -> None:
    for spec in (DIRECT["3x3"], DIRECT["1x1"], DIRECT["plain input"], DEPTHWISE["3x3"]):
        check(dataclasses.replace(whole(spec), batch=None), Target.named("cpu"), images=3)


def test_weights_and_images_larger_than_the_caches() -> None:
    """Sums wait in memory between parts of the input channels; depthwise copies hold a part of the rows."""
    target = dataclasses.replace(Target.named("cpu"), caches=Caches(4 << 10, 64 << 10, 1 << 20))
    for joined in (0, 2):
        check(whole(spec_of((160, 96), (9, 20), (3, 3), pads=same(3)), joined=joined), target)
        check(whole(spec_of((600, 80), (7, 7), (1, 1)), joined=joined), target, threads=3)
    check(whole(spec_of((16, 16), (61, 120), (3, 3), pads=same(3), groups=16)), target, threads=3)


SIZES = st.integers(1, 20)


@settings(max_examples=12, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)), st.tuples(SIZES, SIZES),
    st.tuples(st.integers(1, 5), st.integers(1, 5)), st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(*[st.integers(0, 4)] * 4), st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.sampled_from(["blocked", "plain", "depthwise"]), st.sampled_from([("uint8", 0), ("uint8", 200), ("int8", -9)]),
    st.integers(0, 2),
)  # fmt: skip
def test_any_convolution(channels, size, window, strides, pads, dilations, kind, data, joined) -> None:
    assume(all(size[i] + pads[i] + pads[i + 2] > (window[i] - 1) * dilations[i] for i in (0, 1)))
    groups = channels[0] if kind == "depthwise" else 1
    channels = (groups, groups) if kind == "depthwise" else channels
    spec = spec_of(channels, size, window, strides, pads, dilations, groups, 1, kind != "plain")
    check(whole(spec, *data, 0 if kind == "depthwise" else joined), Target.named("cpu"))


def test_sums_that_may_not_fit_have_no_kernel() -> None:
    long = whole(spec_of((4000, 8), (3, 3), (3, 3)))
    assert "may exceed int32" in str(supported(long, Target.named("cpu").isa))


# Target -> the instruction that makes the sums, and what does in a depthwise convolution that makes no copy.
INSTRUCTIONS = {
    "cpu-avx2": (r"vpmaddwd\s.*%ymm", r"vfmadd\d+ps\s.*%ymm"),
    "cpu-avx512": (r"vpmaddwd\s.*%zmm", r"vfmadd\d+ps\s.*%zmm"),
    "cpu-avx512-vnni": (r"vpdpbusd\s.*%zmm", r"vpdpbusd\s.*%zmm"),
    "arm64": (r"sdot\s+v\d+\.4s, v\d+\.16b, v\d+\.16b",) * 2,
}
WIDE = spec_of((16, 16), (6, 60), (3, 3), pads=same(3), groups=16)


@pytest.mark.parametrize("case", ["3x3", "depthwise", "wide depthwise"])
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions(name: str, case: str) -> None:
    import tvm
    from graphwright.runtime.codegen import machine_code

    spec = {"3x3": DIRECT["3x3"], "depthwise": DEPTHWISE["3x3"], "wide depthwise": WIDE}[case]
    target, expected = Target.named(name), INSTRUCTIONS[name][case == "depthwise"]
    module = tvm.IRModule({"conv": conv(whole(spec), target.isa, 1, None, "conv", target.caches)})
    text = machine_code(module, target).mod.inspect_source("s")
    assert len(re.findall(expected, text)) >= 12
    assert not re.search(r"vpmulld|\smul\s+v\d+\.4s", text)


@pytest.mark.parametrize("zero", [0, 131, 255])
def test_wide_depthwise_convolutions(zero: int) -> None:
    check(whole(WIDE, zero=zero), Target.named("cpu-avx2"))


@pytest.mark.parametrize("name", ["armv7", "riscv64"])
def test_other_machines_compile(name: str) -> None:
    import tvm
    from graphwright.runtime.codegen import machine_code

    target = Target.named(name)
    for spec in (DIRECT["3x3"], DIRECT["plain input"], DEPTHWISE["3x3"]):
        function = conv(whole(spec), target.isa, 2, None, "conv", target.caches)
        assert machine_code(tvm.IRModule({"conv": function}), target)
