"""The softmax kernels in their NEON form, under qemu: forms, element types and boundaries, against NumPy in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from graphwright.passes.ops import TWO_PASS_SOFTMAX
from graphwright.passes.ops.masked_softmax import masked_softmax, tempered_softmax
from graphwright.passes.ops.two_pass_softmax import Form
from graphwright.runtime.device import Device, qemu_available
from graphwright.runtime.target import Target

pytestmark = [pytest.mark.qemu, pytest.mark.tvm]

TOLERANCE = 3e-6  # half the distance of float32 numbers at 20 and more, as of x - max
NARROW = 2.0**-11 + TOLERANCE  # half of the last place of float16
LEAST = 2.0**-25  # half of the least float16
INF = np.float32(np.inf)
# A kernel, and for each of its calls the inputs.
Calls = tuple[Any, Sequence[Sequence[np.ndarray]]]


class OnArm:
    """Runs kernels as one artifact for arm64, each call of them an output of it."""

    def __init__(self, device: Device, make_artifact: Any) -> None:
        self.device, self.make_artifact = device, make_artifact
        self.target = Target.named("arm64")

    def run(self, folder: Path, *kernels: Calls) -> list[np.ndarray]:
        """What every call of every kernel gives, of the shape and type of its first input."""
        from tvm import relax

        builder, feeds, parameters, calls = relax.BlockBuilder(), {}, [], []
        for function, several in kernels:
            for inputs in several:
                own = []
                for array in inputs:
                    name = f"x{len(parameters)}"
                    feeds[name] = array
                    own.append(relax.Var(name, relax.TensorType(array.shape, array.dtype.name)))
                    parameters.append(own[-1])
                calls.append((function, own, inputs[0]))
        with builder.function("main", [*parameters, relax.Var("weights", relax.TupleType([]))]):
            symbols = {id(function): builder.add_func(function, "kernel") for function, _ in kernels}
            with builder.dataflow():
                results = [
                    builder.emit(relax.call_tir(symbols[id(f)], own, relax.TensorType(x.shape, x.dtype.name)))
                    for f, own, x in calls
                ]
                whole = builder.emit_output(relax.Tuple(results))
            builder.emit_func_output(whole)
        model = SimpleNamespace(
            module=builder.get(), weights={}, feeds=feeds, expected=[x for _, _, x in calls],
            outputs=[f"y{i}" for i in range(len(calls))],
        )  # fmt: skip
        return self.device.push(self.make_artifact(model, "arm64", folder)).run(None, feeds)


@pytest.fixture(scope="module")
def on_arm(make_artifact: Any) -> OnArm:
    if reason := qemu_available():
        pytest.skip(reason)
    return OnArm(Device.open("qemu:aarch64"), make_artifact)


def draw(*shape: int, kind: str = "float32") -> np.ndarray:
    return (np.random.default_rng(sum(shape)).random(shape) * 20 - 10).astype(kind)


def special(length: int) -> np.ndarray:
    """One row of each kind that goes wrong somewhere."""
    x = draw(8, length)
    x[0, 0] = -INF
    x[1, : length // 2] = -INF
    x[2, :] = -INF
    x[3, :] = np.finfo(np.float32).min
    x[4, 0] = np.nan
    x[5, length // 2] = INF
    x[6, 1:] = -90
    x[7, :] = 5e6
    return x


def check(got: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    for mine, wanted in zip(got, expected, strict=True):
        narrow = mine.dtype == np.float16
        limits = {"rtol": NARROW, "atol": LEAST} if narrow else {"rtol": TOLERANCE, "atol": 1.2e-38}
        np.testing.assert_allclose(mine.astype(np.float64), wanted, **limits)


@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize("form", [Form.TWO_PASS, Form.THREE_PASS])
def test_rows(on_arm: OnArm, tmp_path: Path, form: Form, kind: str) -> None:
    """Vectors have 4 lanes, blocks of the three-pass form 2^11 elements, of the two-pass form 2^12."""
    from graphwright.runtime.kernels.two_pass_softmax import softmax

    t = on_arm.target
    open_rows = softmax((None, None), t.isa, t.caches, 2, form, types=(kind, kind))
    fixed = softmax((3, 31), t.isa, t.caches, 2, form, types=(kind, kind))
    lengths = [1, 3, 4, 5, 15, 33, 127, 2047, 2049, 4097]
    inputs = [draw(3, n, kind=kind) for n in lengths]
    inputs += [special(n) for n in (2, 7, 300, 8200)] if kind == "float32" else [np.zeros((0, 8), kind)]
    got = on_arm.run(tmp_path / "a", (open_rows, [[x] for x in inputs]), (fixed, [[draw(3, 31, kind=kind)]]))
    check(got, [TWO_PASS_SOFTMAX.reference(x) for x in (*inputs, draw(3, 31, kind=kind))])


def test_logarithms(on_arm: OnArm, tmp_path: Path) -> None:
    from graphwright.runtime.kernels.log_softmax import log_softmax

    inputs = [draw(3, n) for n in (1, 3, 4, 5, 17, 300, 4097)]
    x = special(19)[:5]
    got = on_arm.run(tmp_path / "a", (log_softmax(("n", "m"), on_arm.target.isa), [[a] for a in (*inputs, x)]))
    for mine, a in zip(got, (*inputs, x), strict=True):
        wide = a.astype(np.float64)
        with np.errstate(invalid="ignore"):
            wide = wide - wide.max(-1, keepdims=True)
            expected = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
        np.testing.assert_allclose(mine, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", ["float32", "bool"])
def test_masks(on_arm: OnArm, tmp_path: Path, kind: str) -> None:
    from graphwright.runtime.kernels.softmax_passes import Source
    from graphwright.runtime.kernels.two_pass_softmax import softmax

    t = on_arm.target
    function = softmax((None,) * 3, t.isa, t.caches, 2, source=Source(0.5, kind, (True, False, True)))
    calls = []
    for length in (1, 3, 4, 5, 17, 300, 2049):
        hidden = np.random.default_rng(length).random((2, 1, length)) < 0.25
        hidden[..., 0] = False
        mask = ~hidden if kind == "bool" else np.where(hidden, -INF, draw(2, 1, length)).astype(np.float32)
        calls.append([draw(2, 3, length), mask])
    got = on_arm.run(tmp_path / "a", (function, calls))
    check(got, [masked_softmax(x, mask, 0.5) for x, mask in calls])


def test_temperatures(on_arm: OnArm, tmp_path: Path) -> None:
    from graphwright.runtime.kernels.softmax_passes import Source
    from graphwright.runtime.kernels.two_pass_softmax import softmax

    t = on_arm.target
    function = softmax((None, None), t.isa, t.caches, 2, source=Source(factor="float32", factor_axes=(True, False)))
    calls = [[draw(3, n), np.array([[0.5], [-1.5], [np.nan]], np.float32)] for n in (1, 3, 4, 5, 17, 2049)]
    got = on_arm.run(tmp_path / "a", (function, calls))
    check(got, [tempered_softmax(x, factor) for x, factor in calls])


def test_columns_and_interleaved_rows(on_arm: OnArm, tmp_path: Path) -> None:
    """Fewer columns than a vector has lanes lie end to end in vectors, 8 vectors of rows and more."""
    from graphwright.runtime.kernels.softmax_columns import softmax_columns

    t, kernels, expected = on_arm.target, [], []
    for shape in [(2, 301, 3), (2, 33, 1), (2, 300, 2), (2, 5, 9), (2, 300, 9)]:
        outer, length, inner = shape
        kernels.append((softmax_columns([outer], length, [inner], t.isa, t.caches, 2), [[draw(*shape)]]))
        expected.append(draw(*shape))
    narrow = draw(2, 301, 3, kind="float16")
    kinds = ("float16", "float16")
    kernels.append((softmax_columns([2], 301, [3], t.isa, t.caches, 2, types=kinds), [[narrow]]))
    got = on_arm.run(tmp_path / "a", *kernels)
    columns = [TWO_PASS_SOFTMAX.reference(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (*expected, narrow)]
    check(got, columns)
