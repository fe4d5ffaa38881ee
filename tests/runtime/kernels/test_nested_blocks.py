"""NestedMatMul compiled, against NumPy in float64: both widths, few rows and many, edges of panels and blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.ops import BLOCK_QUANTIZE, NESTED_MAT_MUL
from graphwright.passes.ops.block_quantize import block_quantize
from graphwright.passes.ops.nested_mat_mul import nested_mat_mul
from graphwright.runtime.target import Target
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

pytestmark = pytest.mark.tvm

TOLERANCE = 2e-6  # of the sums of absolute products


@dataclass(frozen=True)
class Product:
    """integer: the left side is rounded by BlockQuantize. fixed: the width is a constant of the model."""

    rows: int | None
    inner: int
    columns: int
    block: int = 32
    zeros: bool = True
    ratio: float = 8.0
    integer: bool = False
    fixed: int | None = None
    half: bool = True


def weights(s: Product, seed: int) -> list[np.ndarray]:
    """codes, scale, zero, rest."""
    random = np.random.default_rng(seed)
    shape, blocks = (s.inner, s.columns), (-(-s.inner // s.block), s.columns)
    scale = random.standard_normal(blocks).astype(np.float32) * np.float32(0.1)
    scale = scale.astype(np.float16).astype(np.float32) if s.half else scale
    zero = random.integers(0, 16, blocks) if s.zeros else np.full(blocks, 8)
    return [
        random.integers(0, 16, shape).astype(ml_dtypes.uint4), scale, zero.astype(ml_dtypes.uint4),
        random.integers(-8, 8, shape).astype(ml_dtypes.int4),
    ]  # fmt: skip


def model(products: Sequence[Product], seed: int = 0) -> onnx.ModelProto:
    """Inputs widths (products,) and x0, x1 ...; outputs y0, y1 ..., each behind a Relu."""
    nodes, constants = [], []
    inputs = [helper.make_tensor_value_info("widths", TensorProto.INT64, [len(products)])]
    outputs = []
    for i, s in enumerate(products):
        x = f"x{i}"
        inputs.append(helper.make_tensor_value_info(x, TensorProto.FLOAT, [s.rows or "rows", s.inner]))
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [s.rows or "rows", s.columns]))
        if s.integer:
            nodes.append(helper.make_node("BlockQuantize", [x], [f"q{i}"], domain="graphwright", block=s.block))
            x = f"q{i}"
        widths = "widths"
        if s.fixed is not None:
            widths = f"fixed{i}"
            constants.append(numpy_helper.from_array(np.full(len(products), s.fixed), widths))
        names = [f"{kind}{i}" for kind in ("codes", "scale", "zero", "rest")]
        for name, array in zip(names, weights(s, seed + i), strict=True):
            constants.append(ir.to_proto(ir.tensor(array, name=name)))
        attributes = {"block": s.block, "ratio": s.ratio, "choice": i}
        node = helper.make_node("NestedMatMul", [x, widths, *names], [f"m{i}"], domain="graphwright", **attributes)
        nodes += [node, helper.make_node("Relu", [f"m{i}"], [f"y{i}"])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("graphwright", 1)]
    made = helper.make_model(graph, opset_imports=imports, ir_version=10)
    made.functions.extend(ir.serde.serialize_function(op.function(21)) for op in (BLOCK_QUANTIZE, NESTED_MAT_MUL))
    return made


def check(products: Sequence[Product], target: Target, rows: Sequence[int] = (7,), seed: int = 0) -> Any:
    """Compile all products into one module and compare each at both widths. Returns the lowered module."""
    import tvm
    from graphwright.runtime import importer, phases
    from tvm import relax

    seen: list[Any] = []
    made = importer.import_model(model(products, seed), target)
    executable, constants = phases.compile_module(made, target, seen.append)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    random = np.random.default_rng(seed)
    for width in (0, 1):
        for height in rows:
            xs = [random.standard_normal((s.rows or height, s.inner)).astype(np.float32) for s in products]
            # Every second layer has the other width.
            widths = (np.arange(len(products)) + width) % 2
            results = machine["main"](*map(tvm.runtime.tensor, [widths, *xs]), constants)
            results = [results] if len(products) == 1 else results
            for i, (s, x, got) in enumerate(zip(products, xs, results, strict=True)):
                chosen = widths if s.fixed is None else np.full(len(products), s.fixed)
                rounded = block_quantize(x, s.block) if s.integer else x
                options = {"block": s.block, "ratio": s.ratio, "choice": i}
                parts = weights(s, seed + i)
                expected = nested_mat_mul(rounded, chosen, *parts, **options)
                whole = nested_mat_mul(np.eye(s.inner), chosen, *parts, **options)
                limit = TOLERANCE * (np.abs(rounded) @ np.abs(whole) + np.abs(rounded).sum(1, keepdims=True)).max()
                assert np.abs(got.numpy() - np.maximum(expected, 0)).max(initial=0) <= limit, (s, width)
    return seen[0]


EDGES = [
    *(Product(rows, 64, columns) for rows, columns in ((1, 1), (1, 15), (4, 16), (1, 17), (5, 33), (13, 100))),
    *(Product(rows, inner, 24, zeros=False) for rows, inner in ((1, 1), (1, 7), (7, 9), (1, 31), (1, 33), (7, 65))),
    *(Product(rows, 96, 40, block, ratio=16) for rows, block in ((1, 8), (6, 16), (1, 48), (1, 96))),
    Product(2, 64, 24, half=False),
    *(Product(rows, 96, 40, 32, rows != 3, integer=True) for rows in (1, 3, 4, 9)),
    *(Product(1, 64, 33, integer=integer, fixed=fixed) for integer in (False, True) for fixed in (0, 1)),
]


@pytest.mark.parametrize("name", ["cpu", "cpu-avx512", "cpu-avx2", "cpu-baseline"])
def test_edges_of_panels_words_and_blocks(name: str, runnable: Callable[[str], Target]) -> None:
    check(EDGES, runnable(name))


def test_rows_known_at_run_time() -> None:
    check([Product(None, 96, 70), Product(None, 64, 40, integer=True)], Target.named("cpu"), rows=(1, 2, 5, 31))


def test_one_kernel_computes_both_widths() -> None:
    """Neither a dequantized matrix nor a branch of the graph is left, and a fixed narrow one has no second part."""
    lowered = check([Product(1, 64, 48, integer=True), Product(1, 64, 32, fixed=0)], Target.named("cpu"))
    names = [variable.name_hint for variable, _ in lowered.functions_items()]
    assert any("nested-product" in name for name in names) and any("block-product" in name for name in names)
    assert not any("dequantize" in name or name.startswith(("then", "else")) for name in names), names


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_any_size(data: Any) -> None:
    rows, inner, columns = (data.draw(st.integers(1, most)) for most in (9, 150, 70))
    block = 8 * data.draw(st.integers(1, 12))
    s = Product(rows, inner, columns, block, data.draw(st.booleans()), data.draw(st.sampled_from([8.0, 16.0])))
    check([s], Target.named("cpu"), seed=data.draw(st.integers(0, 99)))


def test_it_compiles_for_arm64() -> None:
    from graphwright.runtime import importer, phases

    target = Target.named("arm64")
    for integer in (False, True):
        made = importer.import_model(model([Product(1, 96, 40, integer=integer), Product(9, 64, 24)]), target)
        executable, _ = phases.compile_module(made, target)
        assert executable is not None
