"""Fused softplus attention against its oracle in float64: tiles' boundaries, masks, special rows, instruction sets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphwright.passes.ops import REWEIGHTED_SOFTPLUS_ATTENTION, SOFTPLUS_ATTENTION, CustomOp
from graphwright.passes.ops.softplus_attention import lssa, lssar
from graphwright.runtime.target import Target
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.tvm

LOWEST = float(np.finfo(np.float32).min)
INF = np.float32(np.inf)


@functools.cache
def kernel(target: Target, description: Any, power: int, threads: int = 1) -> Callable[..., Any]:
    import tvm
    from graphwright.runtime.codegen import machine_code
    from graphwright.runtime.kernels.softplus_attention import softplus_attention

    function = softplus_attention(description, power, target.isa, target.caches, threads, "attend")
    return machine_code(tvm.IRModule({"attend": function}), target)["attend"]


def spec(**fields: Any) -> Any:
    from graphwright.runtime.kernels.attention_spec import AttentionSpec, Causal, Mask

    kinds = {"causal": Causal, "mask": Mask}
    fields = {name: kinds[name](value) if isinstance(value, str) else value for name, value in fields.items()}
    return AttentionSpec(**{"heads": 2, "head_size": 16, "scale": 1.0, "batch": None, **fields})


def attend(
    target: Target, power: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None, causal: int = 0,
    threads: int = 1,
) -> np.ndarray:  # fmt: skip
    """The kernel on rows that are scaled here. mask: 0, numbers or -inf, (1 or b, 1, 1 or queries, keys)."""
    import tvm

    b, h, rows, d = q.shape
    columns = k.shape[2]
    mask_axes = (False, False, False) if mask is None else (mask.shape[0] > 1, False, mask.shape[2] > 1)
    description = spec(
        heads=h, head_size=d, value_size=v.shape[3], causal=("no", "start", "end")[causal],
        mask="no" if mask is None else "added", mask_axes=mask_axes,
    )  # fmt: skip
    limit = {0: columns, 1: 0, 2: columns - rows}[causal]
    seen = np.arange(columns)[None] - np.arange(rows)[:, None] <= limit
    seen = seen[None, None] if mask is None else seen & (mask > -1e4)
    n = np.maximum(seen.sum(-1, keepdims=True), 1)
    with np.errstate(invalid="ignore"):
        q, k = (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (q, k))
    q = (q * np.log(d) * np.log(n)).astype(np.float32)
    result = np.empty((b, h, rows, v.shape[3]), np.float32)
    arrays = [q, k.astype(np.float32), v, *([] if mask is None else [mask]), result]
    given = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arrays]
    kernel(target, description, power, threads)(*given)
    return given[-1].numpy()


def draw(b: int, h: int, rows: int, columns: int, d: int, e: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = ((b, h, rows, d), (b, h, columns, d), (b, h, columns, e))
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


def oracle(power: int, arrays: list[np.ndarray], mask: np.ndarray | None, causal: int = 0) -> np.ndarray:
    given = np.zeros((1, 1, 1, 1)) if mask is None else mask
    return lssar(*arrays, given, causal, power) if power else lssa(*arrays, given, causal)


def close(found: np.ndarray, wanted: np.ndarray, power: int) -> None:
    """The power multiplies relative errors, and those of a difference near the mean are of the sum's size."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * (1 + power) * max(1.0, np.abs(wanted).max(initial=0)))


@pytest.fixture(params=["cpu-avx512", "cpu-avx2", pytest.param("cpu-baseline", marks=pytest.mark.slow)])
def target(request: pytest.FixtureRequest) -> Target:
    found = Target.named(request.param)
    if not found.runs_here:
        pytest.skip(f"this processor cannot run {request.param}")
    return found


@pytest.mark.parametrize("power, causal", [(0, 1), (3, 2)])
def test_boundaries(target: Target, power: int, causal: int) -> None:
    """One below, at and above tiles and blocks, for queries and keys alike."""
    for rows, columns in ((1, 1), (1, 5), (3, 3), (15, 16), (16, 17), (47, 48), (48, 49), (49, 7), (20, 255), (7, 257)):
        arrays = draw(2, 2, rows, columns, 16, 24)
        close(attend(target, power, *arrays, None, causal), oracle(power, arrays, None, causal), power)


@pytest.mark.parametrize("power", [0, 3])
def test_masks_and_special_rows(power: int) -> None:
    target = Target.named("cpu")
    arrays = draw(2, 2, 9, 40, 16, 16)
    random = np.random.default_rng(1)
    padding = np.where(random.random((2, 1, 1, 40)) < 0.4, -INF, np.float32(0))
    square = np.where(random.random((1, 1, 9, 40)) < 0.4, -INF, random.standard_normal((1, 1, 9, 40), np.float32))
    square[0, 0, 4] = -INF  # sees nothing
    square[0, 0, 5, 3:] = -INF  # sees at most three
    for mask, causal in ((padding, 0), (square, 1)):
        found = attend(target, power, *arrays, mask, causal)
        close(found, oracle(power, arrays, mask, causal), power)
    assert not found[:, :, 4].any()
    q, k, v = arrays
    mean = np.broadcast_to(v.mean(2, keepdims=True), (2, 2, 9, 16))
    close(attend(target, power, q * 0, k, v, np.zeros_like(padding)), mean, power)
    q[0, 0, 2, 1] = np.nan
    found = attend(target, power, q, k, v, padding)[0, 0]
    assert np.isnan(found[2]).all() and np.isfinite(np.delete(found, 2, 0)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2), st.integers(1, 60), st.integers(1, 300), st.floats(0, 1), st.integers(0, 1 << 16))
def test_any_size_on_two_threads(b: int, rows: int, columns: int, share: float, seed: int) -> None:
    arrays = draw(b, 2, rows, columns, 16, 16, seed)
    hidden = np.random.default_rng(seed).random((1, 1, 1, columns)) < share
    mask = np.where(hidden, -INF, np.float32(0))
    close(attend(Target.named("cpu"), 15, *arrays, mask, 1, 2), oracle(15, arrays, mask, 1), 15)


# --- as an operator of a model


def compiled(
    folder: Path, operator: CustomOp, arrays: list[np.ndarray], dims: list[tuple[Any, ...]], attributes: dict[str, int],
    dtype: ir.DataType = ir.DataType.FLOAT, constant: bool = False,
) -> np.ndarray:  # fmt: skip
    import graphwright

    inputs = [ir.val(f"x{i}", dtype if i < 3 else ir.DataType.FLOAT, d) for i, d in enumerate(dims)]
    if constant:
        inputs[3] = ir.val("x3", const_value=ir.tensor(arrays[3], name="x3"))
    node = ir.node(operator.name, inputs, attributes, domain=operator.domain)
    node.outputs[0].name, node.outputs[0].dtype = "y", dtype
    node.outputs[0].shape = ir.Shape([*dims[0][:3], dims[2][3]])
    graph = ir.Graph(
        inputs[: 3 if constant else 4], node.outputs, nodes=[node], name="g", opset_imports={"": 20},
        initializers=inputs[3:] if constant else [],
    )  # fmt: skip
    model = ir.Model(graph, ir_version=10)
    operator.add_to(model)
    result = graphwright.optimize(model, preset="none", target="cpu", out=folder / "out", verify=False, overwrite=True)
    feeds = {value.name: array for value, array in zip(graph.inputs, arrays, strict=False)}
    session = graphwright.load(folder / "out")
    assert result.artifact is not None and result.artifact.native_nodes == (1, 1)
    return session.run(None, feeds)[0]


LSSA = (SOFTPLUS_ATTENTION, {})
LSSAR = (REWEIGHTED_SOFTPLUS_ATTENTION, {"power": 3})


@pytest.mark.parametrize("operator, more", [LSSA, LSSAR], ids=["lssa", "lssar"])
@pytest.mark.parametrize("causal", [2])
def test_an_operator_with_free_sizes_and_a_mask(
    tmp_path: Path, operator: CustomOp, more: dict[str, int], causal: int
) -> None:
    random = np.random.default_rng(0)
    arrays = [*draw(2, 3, 11, 19, 8, 8), np.where(random.random((2, 1, 11, 19)) < 0.3, LOWEST, 0).astype(np.float32)]
    dims = [("B", 3, "S", 8), ("B", 3, "K", 8), ("B", 3, "K", 8), ("B", 1, "S", "K")]
    attributes = {"causal": causal, **more}
    found = compiled(tmp_path, operator, arrays, dims, attributes)
    close(found, operator.reference(*arrays, **attributes), more.get("power", 0))


@pytest.mark.parametrize("operator, more", [LSSA, LSSAR], ids=["lssa", "lssar"])
@pytest.mark.parametrize("causal", [0, 1])
def test_an_operator_without_a_mask(tmp_path: Path, operator: CustomOp, more: dict[str, int], causal: int) -> None:
    arrays = [*draw(1, 2, 17, 17, 8, 8), np.zeros((1, 1, 1, 1), np.float32)]
    attributes = {"causal": causal, **more}
    dims = [a.shape for a in arrays] if causal else [("B", 2, "S", 8)] * 3 + [(1, 1, 1, 1)]
    found = compiled(tmp_path, operator, arrays, dims, attributes, constant=True)
    close(found, operator.reference(*arrays, **attributes), more.get("power", 0))


def test_what_the_kernel_is_not_for_runs_by_the_body(tmp_path: Path) -> None:
    arrays = [x.astype(np.float16) for x in draw(1, 2, 5, 5, 8, 8)] + [np.zeros((1, 1, 1, 1), np.float32)]
    attributes = {"causal": 1, "power": 3}
    found = compiled(
        tmp_path, REWEIGHTED_SOFTPLUS_ATTENTION, arrays, [a.shape for a in arrays], attributes, ir.DataType.FLOAT16
    )
    np.testing.assert_allclose(found, lssar(*arrays, 1, 3), atol=5e-3)
