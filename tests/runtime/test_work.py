"""What a kernel's work is taken to be, and that the manifest keeps it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.errors import ArtifactError
from graphwright.runtime.artifact import MANIFEST, Artifact, KernelWork
from graphwright.runtime.target import Target
from graphwright.runtime.work import Work, _op, work_of
from onnx import numpy_helper, parser

pytestmark = pytest.mark.tvm



def lowered(text: str, weights: dict[str, np.ndarray] | None = None) -> tuple[Work, object]:
    from graphwright.runtime import importer, phases

    model = parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in (weights or {}).items())
    found: list[Work] = []
    target = Target.named("cpu")
    executable, _ = phases.compile_module(
        importer.import_model(onnx.shape_inference.infer_shapes(model), target), target,
        lambda module: found.append(work_of(module)),
    )  # fmt: skip
    return found[0], executable


HEADER = '<ir_version: 10, opset_import: ["" : 20]>\n'


def test_a_matrix_product_is_two_operations_a_term_and_its_operands_and_result() -> None:
    work, _ = lowered(
        HEADER + "g (float[16,32] x) => (float[16,16] y) { y = MatMul(x, w) }", {"w": np.ones((32, 16), np.float32)}
    )
    (kernel,) = work.kernels.values()
    # The first value of each sum is counted too by some schedules: 16 * 16 on top.
    assert 2 * 16 * 16 * 32 <= kernel["flops"] <= 2 * 16 * 16 * 32 + 2 * 16 * 16
    assert kernel["bytes"] == 4 * (16 * 32 + 32 * 16 + 16 * 16)
    assert kernel["op"] == "gemm"


def test_activations_are_the_storage_of_the_plan() -> None:
    """Three maps of 64 KiB in turn: two live at a time, and the last is the output's own."""
    work, _ = lowered(
        HEADER + """g (float[128,128] x) => (float[128,128] y)
        { a = MatMul(x, x)  b = MatMul(a, a)  c = MatMul(b, b)  y = MatMul(c, c) }"""
    )
    assert work.activation_bytes is not None
    assert 2 * 65536 <= work.activation_bytes <= 3 * 65536


def test_sizes_that_are_known_at_run_time_only_are_left_as_factors() -> None:
    work, _ = lowered(HEADER + "g (float[n,32] x) => (float[n,32] y) { a = Exp(x)  y = MatMul(a, w) }",
                      {"w": np.ones((32, 32), np.float32)})  # fmt: skip
    assert work.kernels and all(kernel["bytes"] is None for kernel in work.kernels.values())
    products = [kernel for kernel in work.kernels.values() if kernel["op"] == "gemm"]
    assert [kernel["flops"] for kernel in products] == [{"each": 2.0 * 32 * 32, "times": [[2, 0]]}]
    known = KernelWork(**products[0])
    assert known.flops_of([(7, 32), (32, 32), (7, 32)]) == 2 * 7 * 32 * 32


def test_a_gather_reads_no_more_than_it_gives() -> None:
    work, _ = lowered(HEADER + "g (int64[4] i) => (float[4,8] y) { y = Gather(w, i) }",
                      {"w": np.ones((1000, 8), np.float32)})  # fmt: skip
    (kernel,) = work.kernels.values()
    assert kernel["bytes"] == 4 * 8 * 4 * 2 + 4 * 8  # rows, result, indices; not the 32,000 bytes of the table


def test_a_kernel_may_say_what_it_does() -> None:
    """Kernels of our own call LLVM, which TVM cannot count; they carry attributes."""
    import tvm
    from graphwright.runtime import importer, phases

    text = HEADER + "g (float[4] x) => (float[4] y) { y = Exp(x) }"
    model = onnx.shape_inference.infer_shapes(parser.parse_model(text))
    target = Target.named("cpu")
    seen: list[Work] = []

    def observe(module: tvm.IRModule) -> None:
        marked = tvm.IRModule(dict(module.functions_items()), attrs=module.attrs)
        for variable, function in module.functions_items():
            if isinstance(function, tvm.tirx.PrimFunc):
                marked[variable] = function.with_attr({"graphwright.flops": 123, "graphwright.op": "exponential"})
        seen.append(work_of(marked))

    phases.compile_module(importer.import_model(model, target), target, observe)
    (kernel,) = seen[0].kernels.values()
    assert (kernel["flops"], kernel["op"]) == (123.0, "exponential")


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("fused_conv2d12_add3_clip", "conv2d_add_clip"), ("matmul", "matmul"), ("fused_matmul1_add24", "matmul_add"),
        ("two_pass_softmax2", "two_pass_softmax"), ("take", "take"),
    ],
)  # fmt: skip
def test_numbers_that_tell_kernels_apart_are_no_part_of_the_operators(name: str, op: str) -> None:
    assert _op(name) == op


def test_the_manifest_keeps_the_work_and_old_manifests_load(tmp_path: Path) -> None:
    from graphwright.runtime.build import build

    model = ir.from_proto(onnx.shape_inference.infer_shapes(
        parser.parse_model(HEADER + "g (float[64,64] x) => (float[64,64] y) { a = MatMul(x, x)  y = Softmax(a) }")
    ))  # fmt: skip
    artifact = build(model, Target.named("cpu"), tmp_path / "a")
    loaded = Artifact.load(tmp_path / "a")
    assert loaded.activation_bytes == artifact.activation_bytes is not None
    kernels = loaded.manifest.regions[0].kernels
    assert any(work.flops and work.flops >= 2 * 64**3 for work in kernels.values())

    data = json.loads((tmp_path / "a" / MANIFEST).read_text())
    data["regions"][0].update(kernels={}, activation_bytes=None)
    digest = type(loaded.manifest).model_validate(data).own_digest()
    for name in ("kernels", "activation_bytes"):  # as a manifest from before they were recorded
        del data["regions"][0][name]
    (tmp_path / "a" / MANIFEST).write_text(json.dumps({**data, "digest": digest}))
    old = Artifact.load(tmp_path / "a")
    assert old.activation_bytes is None and old.manifest.regions[0].kernels == {}

    data["regions"][0]["kernels"] = {"matmul": {"flops": 1.0, "bytes": 1, "op": "matmul"}}
    (tmp_path / "a" / MANIFEST).write_text(json.dumps({**data, "digest": digest}))
    with pytest.raises(ArtifactError, match="altered"):
        Artifact.load(tmp_path / "a")
