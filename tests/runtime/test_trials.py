"""Every tile that a kernel could get gives the right numbers, and only one that is faster and right is taken."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from graphwright.runtime.target import Target
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import parser

tvm = pytest.importorskip("tvm")
pytestmark = pytest.mark.tvm

from graphwright.runtime import trials  # noqa: E402
from graphwright.runtime.blocked import blocked_array  # noqa: E402
from graphwright.runtime.kernels import conv_direct, winograd  # noqa: E402
from graphwright.runtime.kernels.conv_spec import ConvSpec  # noqa: E402
from graphwright.runtime.kernels.gemm_spec import GemmSpec  # noqa: E402
from graphwright.runtime.trials import ConvTrial, ProductTrial, Trial  # noqa: E402

TOLERANCE = 1e-5  # of the output's scale
UNWRITTEN = 12345.0

PRODUCTS = {
    "packed": GemmSpec(29, 40, 70, True, 1, False, True),
    "one row": GemmSpec(1, 37, 130, True, 1, False, True),
    "one of each": GemmSpec(1, 1, 1, True, 1, False, True),
    "16 bits": GemmSpec(29, 40, 70, True, 1, False, True, "bfloat16"),
    "deep": GemmSpec(40, 530, 40, True, 1, False, True),
    "batch": GemmSpec(15, 20, 33, False, 3, False, False),
    "shared left": GemmSpec(15, 20, 33, False, 3, True, False),
    "shared right": GemmSpec(15, 20, 33, False, 1, False, True),
}
CONVOLUTIONS = {
    "3x3": ConvSpec(1, 32, 48, (9, 13), (9, 13), (3, 3), pads=(1, 1)),
    "odd channels": ConvSpec(2, 19, 35, (6, 5), (6, 5), (3, 3), pads=(1, 1)),
    "one pixel": ConvSpec(1, 16, 16, (1, 1), (1, 1), (3, 3), pads=(1, 1)),
    "1x1": ConvSpec(1, 32, 40, (6, 10), (6, 10), (1, 1)),
    "stride and dilation": ConvSpec(1, 16, 32, (13, 15), (5, 6), (3, 3), (2, 2), (2, 2)),
    "plain input": ConvSpec(1, 3, 24, (12, 17), (6, 9), (3, 3), (2, 2), (1, 1), (1, 1), 1, False),
    "depthwise": ConvSpec(1, 24, 24, (8, 30), (8, 30), (3, 3), (1, 1), (1, 1), (1, 1), 24),
    "depthwise 5x5": ConvSpec(1, 16, 16, (9, 23), (5, 12), (5, 5), (2, 2), (1, 1), (2, 2), 16),
    "groups": ConvSpec(1, 32, 64, (7, 9), (7, 9), (3, 3), pads=(1, 1), groups=2),
    "16 bits": ConvSpec(1, 32, 48, (9, 13), (9, 13), (3, 3), pads=(1, 1), stored="bfloat16"),
}


def outputs(trial: Trial, first: np.ndarray, second: Callable[[Any], np.ndarray]) -> dict[Any, np.ndarray]:
    """What the kernel of each tile writes."""
    found = {}
    for tile in trial.tiles():
        packed = second(tile)
        y = tvm.runtime.tensor(np.full(trial.shapes()[1], UNWRITTEN, np.float32))
        trial.kernel(tile, packed.shape)(tvm.runtime.tensor(first), tvm.runtime.tensor(packed), y)
        found[tile] = y.numpy()
    return found


def close(got: np.ndarray, expected: np.ndarray, tile: Any) -> None:
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE, f"{tile}: {error:.1e} of the output's scale"


def runnable(name: str) -> Target:
    target = Target.named(name)
    if not target.runs_here:
        pytest.skip(f"this processor cannot run {name}")
    return target


@pytest.mark.parametrize("name", ["cpu", "cpu-avx2"])
@pytest.mark.parametrize("case", PRODUCTS)
def test_every_tile_of_a_product(case: str, name: str) -> None:
    spec, target = PRODUCTS[case], runnable(name)
    trial = ProductTrial(spec, target)
    draw = np.random.default_rng(1)
    a = draw.standard_normal(trial.shapes()[0], np.float32)
    b = draw.standard_normal((1 if spec.shared_b else spec.batch, spec.inner, spec.columns), np.float32)
    b = b.astype(trials.np_dtype(spec.weights))
    expected = a.astype(np.float64) @ b.astype(np.float64)

    def second(tile: Any) -> np.ndarray:
        return trials.gemm_spec.pack(b[0], tile, trial.lanes) if spec.packed else b

    found = outputs(trial, a, second)
    assert len(found) > 1 or min(spec.rows, spec.inner, spec.columns) == 1
    for tile, got in found.items():
        close(got, expected, tile)


def reference(spec: ConvSpec, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """A sum over the taps in float64."""
    groups, each = spec.groups, spec.out_channels // spec.groups
    high, wide = (size + 2 * (k * d) for size, k, d in zip(spec.in_size, spec.kernel, spec.dilations, strict=True))
    high, wide = high + spec.pads[0], wide + spec.pads[1]
    padded = np.zeros((len(x), spec.in_channels, high, wide))
    top, left = spec.pads
    padded[:, :, top : top + spec.in_size[0], left : left + spec.in_size[1]] = x
    y = np.zeros((len(x), spec.out_channels, *spec.out_size))
    for i, j in itertools.product(*map(range, spec.kernel)):
        rows = np.arange(spec.out_size[0]) * spec.strides[0] + i * spec.dilations[0]
        columns = np.arange(spec.out_size[1]) * spec.strides[1] + j * spec.dilations[1]
        tap = padded[:, :, rows[:, None], columns].reshape(len(x), groups, -1, *spec.out_size)
        weight = w[:, :, i, j].astype(np.float64).reshape(groups, each, -1)
        y += np.einsum("ngchw,goc->ngohw", tap, weight).reshape(y.shape)
    return y


@pytest.mark.parametrize("name", ["cpu", "cpu-avx2"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_every_tile_of_a_convolution(case: str, name: str) -> None:
    spec, target = CONVOLUTIONS[case], runnable(name)
    trial = ConvTrial(spec, target)
    draw = np.random.default_rng(1)
    x = draw.standard_normal((spec.batch or 1, spec.in_channels, *spec.in_size), np.float32)
    w = draw.standard_normal((spec.out_channels, spec.in_channels // spec.groups, *spec.kernel), np.float32)
    w = w.astype(ml_dtypes.bfloat16) if spec.stored == "bfloat16" else w
    stored = blocked_array(x, trial.lanes) if spec.blocked_input else x
    found = outputs(trial, stored, lambda tile: trials.conv.pack_weights(w, spec, target.isa, tile))
    kinds = {tile.algorithm for tile in found}
    expected_kinds = {"direct", "winograd"} if "winograd" in kinds else {"direct"}
    assert kinds == ({"depthwise"} if spec.in_vectors(trial.lanes) else expected_kinds)
    expected = reference(spec, x, w)
    for tile, blocks in found.items():
        plain = np.moveaxis(blocks, -1, 2).reshape(len(x), -1, *spec.out_size)
        close(plain[:, : spec.out_channels], expected, tile)


def test_algorithms_and_rules_are_among_the_candidates() -> None:
    target = Target.named("cpu-avx512")
    tiles = ConvTrial(ConvSpec(1, 64, 64, (28, 28), (28, 28), (3, 3), pads=(1, 1)), target).tiles()
    assert {tile.algorithm for tile in tiles} == {"direct", "winograd"} and tiles[0].algorithm == "winograd"
    assert len(tiles) == len(set(tiles))
    deep = ProductTrial(GemmSpec(2048, 2048, 64), Target.named("cpu-avx2"))
    assert {tile.depth for tile in deep.tiles()} >= {None, 0, 128, 512}


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(*[st.integers(1, 70)] * 2), st.tuples(*[st.integers(1, 40)] * 2), st.sampled_from([1, 2, 3, 5]),
    st.sampled_from([1, 2]), st.integers(1, 3), st.integers(1, 4),
    st.sampled_from(["cpu-avx512", "cpu-avx2", "cpu-baseline", "arm64", "riscv64"]),
)  # fmt: skip
def test_every_candidate_covers_any_convolution(channels, size, kernel, stride, batch, cores, name) -> None:
    pad = kernel // 2
    out = tuple((s + 2 * pad - kernel) // stride + 1 for s in size)
    assume(min(out) > 0)
    spec = ConvSpec(batch, *channels, size, out, (kernel,) * 2, (stride,) * 2, (1, 1), (pad, pad))
    target = dataclasses.replace(Target.named(name), cores=cores)
    trial = ConvTrial(spec, target)
    for tile in trial.tiles():
        if tile.algorithm == "winograd":
            vectors, plan = winograd.vectors_of(spec, target.isa, tile), winograd.plan(
                spec, target.isa, target.caches, cores, tile
            )  # fmt: skip
            assert sum(plan.widths) == plan.rows * -(-out[1] // 2) and plan.rows * plan.row_blocks >= -(-out[0] // 2)
            assert plan.panels * plan.panel_blocks * vectors >= spec.out_blocks(trial.lanes)
            continue
        plan = conv_direct.tiling(spec, target.isa, tile)
        assert sum(t.width * t.count for t in plan.tiles) == plan.columns
        assert plan.rows * plan.columns == out[0] * out[1]
        assert (plan.panels - 1) * plan.vectors + plan.last == spec.out_blocks(trial.lanes) and plan.last > 0
        split = conv_direct.splits(spec, plan, target.isa, target.caches, cores, tile)[0]
        assert split.rows * split.row_blocks >= plan.rows and split.panels * split.panel_blocks >= plan.panels
        assert tile.rows in (None, split.rows) and tile.panels in (None, split.panels)


@dataclass(frozen=True)
class Sleeping(Trial):
    """tile -> (seconds a call takes, the number that it writes); the first is the rule's. spec: of all tiles."""

    template = "sleeping"

    def tiles(self) -> list[str]:
        return list(self.spec)

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (1,), (4,)

    def second(self, tile: str, draw: np.random.Generator) -> np.ndarray:
        return np.zeros(1, np.float32)

    def flops(self) -> float:
        return 1.0

    def second_size(self) -> int:
        return 1

    def kernel(self, tile: str, second: Any) -> Callable[..., None]:
        seconds, number = self.spec[tile]

        def run(x: Any, w: Any, y: Any) -> None:
            time.sleep(seconds)
            y.copyfrom(np.full(4, number, np.float32))

        return run


def measured(monkeypatch: pytest.MonkeyPatch, spec: dict[str, Any], seconds: float = 20.0) -> Any:
    class Tile(str):
        """A tile whose fields are its name."""

        def __init__(self, text: str) -> None:
            self.name = text

    monkeypatch.setitem(
        trials.TRIALS, "sleeping", lambda s, target: Sleeping({Tile(k): v for k, v in s.items()}, target)
    )
    monkeypatch.setattr(trials, "SECONDS", 0.1)
    return trials.measure("sleeping", spec, Target.named("cpu"), 1, seconds)


def test_the_fastest_of_those_that_are_right_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"rule": (0.004, 1.0), "wrong": (0.0, 1.1), "slower": (0.008, 1.0), "faster": (0.001, 1.0)}
    found = measured(monkeypatch, spec)
    assert found.tile == {"name": "faster"} and found.complete and found.candidates == 3
    assert found.ratio > 1.5 and found.low > 1 and found.tuned_us < found.rule_us


def test_a_tile_that_is_not_a_number_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, {"rule": (0.004, 1.0), "nan": (0.0, float("nan"))})
    assert found.tile is None


def test_the_rule_stays_where_nothing_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, {"rule": (0.002, 1.0), "slower": (0.004, 1.0)})
    assert found.tile is None and found.ratio == 1.0 and found.rule_us == found.tuned_us


def test_time_that_is_over_leaves_candidates_for_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, {"rule": (0.002, 1.0), "other": (0.002, 1.0)}, seconds=0.0)
    assert not found.complete and found.candidates == 0 and found.tile is None


def test_kernels_of_a_model_are_found_with_their_calls(tmp_path: Path) -> None:
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[1,16,8,8] x, float[N,32] z, float[1,16,H,W] i) => (float[1,1024] y, float[N,32] d, float[1,16,H,W] f)
        {
          f = Conv(i, w)
          a = Conv(x, w)
          b = Relu(a)
          c = Conv(b, w)
          e = ConvTranspose<strides = [2, 2], kernel_shape = [2, 2]>(c, t)
          s = Constant<value_ints = [1, 2048]>()
          h = Reshape(e, s)
          p, q = Split<axis = 1, num_outputs = 2>(h)
          y = MatMul(p, m)
          d = MatMul(z, v)
        }"""
    )
    draw = np.random.default_rng(0)
    for weight, shape in {"w": (16, 16, 1, 1), "t": (16, 8, 2, 2), "m": (1024, 1024), "v": (32, 32)}.items():
        array = draw.standard_normal(shape, np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, weight))
    onnx.save(model, tmp_path / "m.onnx")
    convolution, transposed, product = trials.tunables(tmp_path / "m.onnx", Target.named("cpu-avx2"))
    assert convolution.spec["kernel"] == (1, 1) and convolution.calls == 2
    assert transposed.spec["out_channels"] == 32 and transposed.calls == 1  # 8 channels of 4 places
    # The other product's rows are known only at run time, and so are the sizes of the other convolution's image.
    assert product.template == "gemm" and product.spec["columns"] == 1024 and product.calls == 1
    assert product.cycles > convolution.cycles > 0
