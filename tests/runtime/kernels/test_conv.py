"""The convolution kernels against PyTorch in float64: templates, instruction sets, borders, tiles and threads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from graphwright.passes.base import Caches
from graphwright.runtime.target import NEON, Target
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytestmark = [pytest.mark.tvm, pytest.mark.torch]

from graphwright.runtime.kernels.conv import (  # noqa: E402
    ConvSpec,
    ConvTile,
    choose_algorithm,
    choose_tile,
    conv,
    pack_weights,
    supported,
)
from graphwright.runtime.kernels.vectors import Vectors  # noqa: E402

# Of the largest output. A float32 sum of K products in the order of a loop is off by about sqrt(K)·6e-8 of it.
TOLERANCE = 1e-5
X86 = ["cpu-avx512", "cpu-avx2", "cpu-baseline"]
WIDE = [*X86[:2], pytest.param(X86[2], marks=pytest.mark.slow)]

Kernel = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def spec_of(
    channels: tuple[int, int], size: tuple[int, int], kernel: tuple[int, int], strides: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0), dilations: tuple[int, int] = (1, 1), groups: int = 1,
    batch: int | None = 1, blocked: bool = True,
) -> ConvSpec:  # fmt: skip
    """pads: above, left, below, right, as in ONNX."""
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    out = [(size[i] + pads[i] + pads[i + 2] - reach[i]) // strides[i] + 1 for i in (0, 1)]
    return ConvSpec(
        batch, *channels, size, (out[0], out[1]), kernel, strides, dilations, pads[:2], groups, blocked
    )  # fmt: skip


def narrow(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def same(kernel: int) -> tuple[int, int, int, int]:
    return (kernel // 2,) * 4


def block(x: np.ndarray, lanes: int) -> np.ndarray:
    """(N, C, H, W) -> (N, ceil(C/L), H, W, L); lanes beyond C hold a number that must not matter."""
    n, c, h, w = x.shape
    padded = np.full((n, -(-c // lanes) * lanes, h, w), 77.0, np.float32)
    padded[:, :c] = x
    return np.ascontiguousarray(padded.reshape(n, -(-c // lanes), lanes, h, w).transpose(0, 1, 3, 4, 2))


def unblock(y: np.ndarray, channels: int) -> np.ndarray:
    n, blocks, h, w, lanes = y.shape
    return y.transpose(0, 1, 4, 2, 3).reshape(n, blocks * lanes, h, w)[:, :channels]


@functools.cache
def kernel(spec: ConvSpec, target: Target, threads: int = 2, algorithm: str | None = None) -> Kernel:
    import tvm
    from graphwright.runtime.codegen import machine_code

    tile = ConvTile(algorithm) if algorithm else choose_tile(spec, target.isa, target.caches)
    function = conv(spec, target.isa, threads, tile, "conv", target.caches)
    compiled = machine_code(tvm.IRModule({"conv": function}), target)["conv"]
    lanes, blocks = Vectors(target.isa).lanes, spec.out_blocks(Vectors(target.isa).lanes)

    def run(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        stored = block(x, lanes) if spec.blocked_input else x
        # What is left of this value was not written.
        y = np.full((len(x), blocks, *spec.out_size, lanes), 12345.0, np.float32)
        given_bias = np.zeros(blocks * lanes, np.float32)
        given_bias[: len(bias)] = bias
        packed = pack_weights(weight, spec, target.isa, tile)
        images = (len(x), -1) if len(x) else (0, spec.image(lanes))
        flat = [stored.reshape(images), packed, given_bias, y.reshape(len(x), int(np.prod(y.shape[1:])))]
        arguments = [tvm.runtime.tensor(a) for a in flat]
        compiled(*arguments)
        return unblock(arguments[3].numpy().reshape(y.shape), spec.out_channels)

    return run


def reference(spec: ConvSpec, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """PyTorch's convolution in float64."""
    import torch

    # What is read, which may end before the image does, or before it begins.
    height, width = (
        (spec.out_size[i] - 1) * spec.strides[i] + (spec.kernel[i] - 1) * spec.dilations[i] + 1 for i in (0, 1)
    )
    x64, w64, b64 = (torch.from_numpy(a.astype(np.float64)) for a in (x, weight, bias))
    padded = torch.nn.functional.pad(x64, (spec.pads[1], width, spec.pads[0], height))[:, :, :height, :width]
    return torch.nn.functional.conv2d(padded, w64, b64, spec.strides, 0, spec.dilations, spec.groups).numpy()


def check(
    spec: ConvSpec, target: Target, threads: int = 2, algorithm: str | None = None, images: int | None = None,
    tolerance: float = TOLERANCE,
) -> None:  # fmt: skip
    draw = np.random.default_rng(0)
    x = draw.standard_normal((images or spec.batch or 1, spec.in_channels, *spec.in_size), np.float32)
    weight = draw.standard_normal((spec.out_channels, spec.in_channels // spec.groups, *spec.kernel), np.float32)
    weight = weight.astype(narrow(spec.stored))
    bias = draw.standard_normal(spec.out_channels, np.float32)
    expected = reference(spec, x, weight, bias)
    got = kernel(spec, target, threads, algorithm)(x, weight, bias)
    assert got.shape == expected.shape
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"{error:.1e} of the output's scale, limit {tolerance:.0e}"


DIRECT = {
    "3x3": spec_of((32, 48), (14, 14), (3, 3), pads=same(3)),
    "tile and one more": spec_of((16, 32), (5, 15), (3, 3), pads=same(3)),
    "several tiles": spec_of((16, 32), (4, 45), (3, 3), pads=same(3)),
    "no padding": spec_of((16, 16), (9, 31), (3, 3)),
    "stride 2": spec_of((16, 32), (15, 29), (3, 3), (2, 2), same(3)),
    "stride 3, 5x5": spec_of((16, 20), (17, 23), (5, 5), (3, 3), same(5)),
    "dilation 2": spec_of((16, 16), (13, 19), (3, 3), pads=(2, 2, 2, 2), dilations=(2, 2)),
    "dilation 3, stride 2": spec_of((16, 16), (13, 19), (3, 3), (2, 2), (3, 3, 3, 3), (3, 3)),
    "pads wider than the kernel": spec_of((16, 16), (5, 6), (3, 3), pads=(4, 5, 4, 3)),
    "pads on one side": spec_of((16, 16), (8, 8), (3, 3), (2, 2), (0, 0, 1, 1)),
    "kernel larger than the image": spec_of((16, 16), (3, 2), (7, 7), pads=same(7)),
    "one pixel": spec_of((32, 64), (1, 1), (3, 3), pads=same(3)),
    "1x7": spec_of((16, 16), (9, 17), (1, 7), pads=(0, 3, 0, 3)),
    "one-dimensional": spec_of((24, 40), (1, 50), (1, 3), (1, 2), (0, 1, 0, 1)),
    "1x1": spec_of((40, 80), (7, 7), (1, 1)),
    "1x1, a prime number of pixels": spec_of((16, 32), (1, 97), (1, 1)),
    "1x1, stride 2": spec_of((32, 64), (14, 14), (1, 1), (2, 2)),
    "1x1, padded": spec_of((16, 16), (5, 5), (1, 1), pads=(1, 1, 1, 1)),
    "batch 2": spec_of((32, 32), (14, 14), (3, 3), pads=same(3), batch=2),
    "groups": spec_of((64, 96), (10, 10), (3, 3), pads=same(3), groups=2),
    "groups, 1x1": spec_of((64, 64), (6, 6), (1, 1), groups=4),
    "plain input": spec_of((3, 32), (33, 47), (3, 3), (2, 2), same(3), blocked=False),
    "plain input, 7x7": spec_of((3, 64), (32, 40), (7, 7), (2, 2), same(7), blocked=False),
    "plain input, patches": spec_of((3, 48), (32, 32), (8, 8), (8, 8), blocked=False),
    "plain input, 1x1": spec_of((5, 20), (9, 11), (1, 1), blocked=False, batch=2),
    "plain input, 3x3": spec_of((1, 8), (28, 28), (3, 3), pads=same(3), blocked=False),
}
DEPTHWISE = {
    "3x3": spec_of((32, 32), (14, 14), (3, 3), pads=same(3), groups=32),
    "stride 2": spec_of((24, 24), (29, 31), (3, 3), (2, 2), same(3), groups=24),
    "stride 2, pads on one side": spec_of((24, 24), (28, 28), (3, 3), (2, 2), (0, 0, 1, 1), groups=24),
    "5x5": spec_of((16, 16), (14, 30), (5, 5), pads=same(5), groups=16),
    "5x5, stride 2": spec_of((16, 16), (15, 15), (5, 5), (2, 2), same(5), groups=16),
    "7x7": spec_of((32, 32), (14, 14), (7, 7), pads=same(7), groups=32),
    "dilation 2": spec_of((16, 16), (17, 17), (3, 3), pads=(2, 2, 2, 2), dilations=(2, 2), groups=16),
    "stride 3": spec_of((16, 16), (17, 20), (3, 3), (3, 3), same(3), groups=16),
    "no padding": spec_of((16, 16), (9, 40), (3, 3), groups=16),
    "kernel larger than the image": spec_of((16, 16), (2, 3), (7, 7), pads=same(7), groups=16),
    "one pixel": spec_of((16, 16), (1, 1), (3, 3), pads=same(3), groups=16),
    "1x1": spec_of((16, 16), (5, 5), (1, 1), groups=16),
    "one-dimensional": spec_of((20, 20), (1, 33), (1, 3), pads=(0, 1, 0, 1), groups=20),
    "batch 2": spec_of((40, 40), (12, 12), (3, 3), pads=same(3), groups=40, batch=2),
    "pads wider than the kernel": spec_of((16, 16), (5, 6), (3, 3), pads=(4, 5, 4, 3), groups=16),
}
PAIRS = {
    "groups of 2": spec_of((22, 22), (9, 13), (3, 3), pads=same(3), groups=11),
    "groups of 2, 1x1": spec_of((16, 16), (5, 7), (1, 1), groups=8),
}
NARROW = {  # groups that lie in the vectors of some targets
    "groups of 4": spec_of((32, 32), (14, 14), (3, 3), pads=same(3), groups=8),
    "groups of 4, stride 2, the last vector not full": spec_of((36, 36), (15, 17), (3, 3), (2, 2), same(3), groups=9),
    "groups of 8": spec_of((32, 32), (7, 7), (3, 3), pads=same(3), groups=4, batch=2),
    "two outputs for an input": spec_of((32, 64), (9, 11), (3, 3), pads=same(3), groups=32),
    "three outputs for an input, the last vector not full": spec_of((21, 63), (8, 8), (3, 3), (2, 2), groups=21),
    "groups of 2 to 6": spec_of((16, 48), (6, 9), (3, 3), pads=same(3), groups=8, batch=2),
    "groups of 4, 5x1, dilation 2": spec_of((16, 16), (11, 9), (5, 1), pads=(4, 0, 4, 0), dilations=(2, 1), groups=4),
}
WINOGRAD = {
    "even": spec_of((32, 48), (14, 14), (3, 3), pads=same(3)),
    "odd": spec_of((16, 32), (7, 9), (3, 3), pads=same(3)),
    "no padding": spec_of((16, 16), (9, 30), (3, 3)),
    "pads wider than the kernel": spec_of((16, 16), (5, 6), (3, 3), pads=(4, 5, 3, 4)),
    "pads on one side": spec_of((16, 32), (8, 8), (3, 3), pads=(0, 0, 2, 2)),
    "one pixel": spec_of((16, 16), (1, 1), (3, 3), pads=same(3)),
    "one row": spec_of((16, 16), (1, 20), (3, 3), pads=same(3)),
    "channels around vectors": spec_of((17, 33), (12, 12), (3, 3), pads=same(3)),
    "five output vectors": spec_of((24, 80), (15, 15), (3, 3), pads=same(3)),
    "batch 2": spec_of((32, 32), (13, 13), (3, 3), pads=same(3), batch=2),
    "batch at run time": spec_of((32, 32), (13, 13), (3, 3), pads=same(3), batch=None),
    "several blocks of rows": spec_of((128, 32), (64, 64), (3, 3), pads=same(3)),
}


@pytest.mark.parametrize("case", DIRECT)
@pytest.mark.parametrize("name", X86)
def test_direct(runnable: Callable[[str], Target], name: str, case: str) -> None:
    check(DIRECT[case], runnable(name), algorithm="direct")



@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("algorithm", ["direct", "depthwise", "winograd"])
@pytest.mark.parametrize("name", WIDE)
def test_weights_of_16_bits(runnable: Callable[[str], Target], name: str, algorithm: str, stored: str) -> None:
    """Blocks that are not full, a plain input and groups; the direct form alone keeps them narrow."""
    target = runnable(name)
    plain = spec_of((3, 20), (9, 11), (3, 3), (2, 2), same(3), blocked=False)
    for case in {
        "direct": [DIRECT["1x1"], DIRECT["groups"], DIRECT["one-dimensional"], plain],
        "depthwise": [spec_of((20, 20), (9, 11), (3, 3), pads=same(3), groups=20)],
        "winograd": [spec_of((20, 24), (9, 11), (3, 3), pads=same(3))],
    }[algorithm]:
        spec = dataclasses.replace(case, stored=stored)
        check(spec, target, algorithm=algorithm)
        weight = np.zeros((spec.out_channels, spec.each, *spec.kernel), narrow(stored))
        packed = pack_weights(weight, spec, target.isa, ConvTile(algorithm))
        assert packed.dtype == (np.uint16 if algorithm == "direct" else np.float32)


def test_weights_of_16_bits_that_are_no_normal_numbers() -> None:
    spec = dataclasses.replace(spec_of((8, 8), (1, 3), (1, 1)), stored="bfloat16")
    weight = np.zeros((8, 8, 1, 1), narrow("bfloat16"))
    weight[0, 0], weight[1, 0], weight[2, 0], weight[3, 0] = np.inf, -np.inf, np.nan, 2.0**-130
    x = np.zeros((1, 8, 1, 3), np.float32)
    x[:, 0] = 2.0
    y = kernel(spec, Target.named("cpu"), algorithm="direct")(x, weight, np.zeros(8, np.float32))
    np.testing.assert_array_equal(y[0, :5, 0, 0], np.array([np.inf, -np.inf, np.nan, 2.0**-129, 0], np.float32))


@pytest.mark.parametrize("case", [*DEPTHWISE, *PAIRS])
@pytest.mark.parametrize("name", X86)
def test_depthwise(runnable: Callable[[str], Target], name: str, case: str) -> None:
    check((DEPTHWISE | PAIRS)[case], runnable(name), algorithm="depthwise")


@pytest.mark.parametrize("case", NARROW)
@pytest.mark.parametrize("name", X86)
def test_groups_that_lie_in_vectors(runnable: Callable[[str], Target], name: str, case: str) -> None:
    check(NARROW[case], runnable(name))


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_group_does_not_meet_the_numbers_of_another(value: float) -> None:
    spec = spec_of((16, 16), (6, 6), (3, 3), pads=same(3), groups=4)
    x, weight = np.ones((1, 16, 6, 6), np.float32), np.ones((16, 4, 3, 3), np.float32)
    x[:, 5] = value
    y = kernel(spec, Target.named("cpu"))(x, weight, np.zeros(16, np.float32))
    assert not np.isfinite(y[:, 4:8]).any() and np.isfinite(np.delete(y, range(4, 8), axis=1)).all()


@pytest.mark.parametrize("case", WINOGRAD)
@pytest.mark.parametrize("name", X86)
def test_winograd(runnable: Callable[[str], Target], name: str, case: str) -> None:
    check(WINOGRAD[case], runnable(name), algorithm="winograd")


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 31, 33, 80, 112])
@pytest.mark.parametrize("name", WIDE)
def test_channels_that_do_not_fill_vectors(runnable: Callable[[str], Target], name: str, channels: int) -> None:
    target = runnable(name)
    check(spec_of((channels, 16), (7, 9), (3, 3), pads=same(3)), target)
    check(spec_of((16, channels), (7, 9), (1, 1)), target)
    check(spec_of((channels, channels), (7, 9), (3, 3), pads=same(3), groups=channels), target)


@pytest.mark.parametrize("width", [1, 2, 5, 6, 7, 8, 12, 13, 14, 15, 27, 28, 29])
def test_widths_around_tiles(width: int) -> None:
    target = Target.named("cpu")
    check(spec_of((16, 32), (3, width), (3, 3), pads=same(3)), target)
    check(spec_of((16, 16), (3, width), (5, 5), (2, 2), same(5)), target)
    check(spec_of((16, 16), (3, width), (3, 3), pads=same(3), groups=16), target)
    check(spec_of((16, 32), (1, width), (1, 1)), target)


@pytest.mark.parametrize("case", ["3x3", "1x1", "stride 2", "plain input"])
@pytest.mark.parametrize("name", WIDE)
def test_batch_known_at_run_time(runnable: Callable[[str], Target], name: str, case: str) -> None:
    target = runnable(name)
    spec = dataclasses.replace(DIRECT[case], batch=None)
    for images in (1, 3):
        check(spec, target, images=images)
    check(dataclasses.replace(DEPTHWISE["3x3"], batch=None), target, images=3)


def test_an_empty_batch() -> None:
    run = kernel(dataclasses.replace(DIRECT["3x3"], batch=None), Target.named("cpu"))
    empty = np.empty((0, 32, 14, 14), np.float32)
    assert run(empty, np.zeros((48, 32, 3, 3), np.float32), np.zeros(48, np.float32)).shape == (0, 48, 14, 14)


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 7])
def test_threads_share_rows_and_panels(threads: int) -> None:
    target = Target.named("cpu")
    for spec in (
        spec_of((64, 96), (23, 23), (3, 3), pads=same(3)),
        spec_of((256, 240), (7, 7), (1, 1), batch=2),
        spec_of((64, 112), (7, 7), (3, 3), pads=same(3)),
        spec_of((48, 48), (57, 57), (3, 3), pads=same(3), groups=48),
    ):
        check(spec, target, threads)


@pytest.mark.parametrize("name", X86)
def test_weights_larger_than_the_cache(runnable: Callable[[str], Target], name: str) -> None:
    """Sums wait in memory while one part of the input channels after the other is added for all pixels."""
    target = dataclasses.replace(runnable(name), caches=Caches(4 << 10, 64 << 10, 1 << 20))
    check(spec_of((160, 96), (9, 20), (3, 3), pads=same(3)), target)
    check(spec_of((600, 80), (7, 7), (1, 1)), target)
    check(spec_of((200, 64), (15, 15), (3, 3), (2, 2), same(3), batch=2), target, threads=3)


SIZES = st.integers(1, 20)
ALGORITHMS = {"winograd": "winograd", "depthwise": "depthwise", "pairs": "depthwise"}


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 70)), st.tuples(SIZES, SIZES),
    st.tuples(st.integers(1, 5), st.integers(1, 5)), st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(*[st.integers(0, 4)] * 4), st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.sampled_from(["blocked", "plain", "depthwise", "pairs", "winograd"]), st.sampled_from(X86), st.integers(1, 3),
)  # fmt: skip
@example((1, 1), (1, 1), (1, 1), (3, 1), (2, 0, 0, 0), (1, 1), "blocked", "cpu-avx512", 1)
@example((20, 33), (2, 3), (1, 2), (3, 3), (4, 4, 0, 0), (1, 1), "plain", "cpu-avx2", 2)
@example((24, 24), (1, 2), (1, 1), (3, 2), (3, 4, 0, 0), (1, 1), "depthwise", "cpu-avx2", 1)
def test_any_convolution(
    runnable: Callable[[str], Target], channels, size, window, strides, pads, dilations, kind, name, batch
) -> None:
    if kind == "winograd":
        window, strides, dilations = (3, 3), (1, 1), (1, 1)
    assume(all(size[i] + pads[i] + pads[i + 2] > (window[i] - 1) * dilations[i] for i in (0, 1)))
    groups = channels[0] if kind in ("depthwise", "pairs") else 1
    if kind in ("depthwise", "pairs"):
        channels = (2 * groups, 2 * groups) if kind == "pairs" else (groups, groups)
    if kind == "pairs":
        assume(groups > 1)
    spec = spec_of(channels, size, window, strides, pads, dilations, groups, batch, kind != "plain")
    check(spec, runnable(name), algorithm=ALGORITHMS.get(kind, "direct"))


def test_what_is_not_supported_has_a_reason() -> None:
    isa = Target.named("cpu-avx512").isa
    assert supported(DIRECT["3x3"], isa) is None
    few = spec_of((48, 48), (8, 8), (3, 3), groups=4)
    assert "groups of 12 to 12 channels do not fill vectors of 16" in str(supported(few, isa))
    assert supported(few, NEON) is None
    assert supported(NARROW["groups of 4"], isa) is None
    fewer = spec_of((32, 16), (8, 8), (3, 3), groups=16)
    assert "groups of 2 to 1" in str(supported(fewer, isa))
    with pytest.raises(ValueError, match="do not fill vectors"):
        conv(few, isa)


def test_choice_names_its_reason() -> None:
    target = Target.named("cpu-avx512")
    assert choose_algorithm(DEPTHWISE["3x3"], target.isa, target.caches)[0] == "depthwise"
    algorithm, reason = choose_algorithm(DIRECT["1x1"], target.isa, target.caches)
    assert algorithm == "direct" and "not a 3x3 kernel" in reason
    large = spec_of((64, 64), (56, 56), (3, 3), pads=same(3))
    algorithm, reason = choose_algorithm(large, target.isa, target.caches)
    assert algorithm == "winograd" and "times as fast" in reason
    algorithm, reason = choose_algorithm(DIRECT["one pixel"], target.isa, target.caches)
    assert algorithm == "direct" and "of the time" in reason


def test_weights_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(48, 32, 3, 3\)"):
        pack_weights(np.zeros((48, 32, 1, 1), np.float32), DIRECT["3x3"], Target.named("cpu").isa, ConvTile("direct"))


@pytest.mark.parametrize("name", ["arm64", "armv7", "riscv64"])
def test_other_machines_compile(name: str) -> None:
    import tvm
    from graphwright.runtime.codegen import machine_code

    target = Target.named(name)
    for spec, algorithm in [
        (DIRECT["3x3"], "direct"), (DIRECT["plain input"], "direct"), (DEPTHWISE["3x3"], "depthwise"),
        (WINOGRAD["odd"], "winograd"),
    ]:  # fmt: skip
        function = conv(spec, target.isa, 2, ConvTile(algorithm), "conv", target.caches)
        assert machine_code(tvm.IRModule({"conv": function}), target)
