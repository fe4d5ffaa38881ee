"""fused-attention fires on every attention of exports of many styles, and keeps their numbers."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes import io
from graphwright.passes.base import Caches, PassContext
from graphwright.passes.pipeline import Pipeline
from graphwright.passes.prepare.transformer import not_fused
from graphwright.passes.registry import preset

onnxruntime = pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")

from .exports import EXPORTS  # noqa: E402

Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]
LIMIT = 1e-5  # of the output's scale
# Lengths of the free axes; a second set shows that no size of the example was frozen.
SIZES = ({"batch": 2, "length": 8, "decoded": 5}, {"batch": 3, "length": 11, "decoded": 4})


@functools.cache
def exported(name: str) -> bytes:
    torch.manual_seed(0)
    return ir.to_proto(EXPORTS[name].build()).SerializeToString()


def model_of(name: str) -> ir.Model:
    return ir.from_proto(onnx.load_from_string(exported(name)))


def session(proto: onnx.ModelProto, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized is not None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(optimized)
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])


def feeds_for(model: ir.Model, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    feeds = {}
    for value in model.graph.inputs:
        assert value.shape is not None and value.dtype is not None and value.name is not None
        dims = [d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape]
        if value.name == "mask":
            array = np.arange(dims[1])[None] < np.arange(dims[1], dims[1] - dims[0], -1)[:, None]
        elif value.dtype.is_integer():
            array = random.integers(0, 50, dims)
        else:
            array = random.standard_normal(dims)
        feeds[value.name] = array.astype(value.dtype.numpy())
    return feeds


def check(before: ir.Model, after: ir.Model, run: Run | None = None) -> None:
    original, rewritten = session(ir.to_proto(before)), session(ir.to_proto(after))
    for sizes in SIZES:
        feeds = feeds_for(before, sizes)
        results = rewritten.run(None, feeds) if run is None else run(feeds)
        for expected, got in zip(original.run(None, feeds), results, strict=True):
            assert got.shape == expected.shape
            np.testing.assert_allclose(got, expected, rtol=0, atol=LIMIT * float(np.abs(expected).max()))


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("name", EXPORTS)
def test_every_attention_of_an_export(name: str) -> None:
    before = model_of(name)
    after, reports = Pipeline.parse(preset("default") + ",fused-attention").run(before)
    count = EXPORTS[name].attentions
    found = operators(after)
    assert found["Attention"] == count and not found["Softmax"], reports[-1].skips
    assert reports[-1].stats == {"attentions": count, "fused": count}
    assert not [skip for skip in reports[-1].skips if skip.rule != "heads"]
    assert all(not_fused(node) is None for node in after.graph if node.op_type == "Attention")
    assert {node.domain for node in after.graph} == {""}
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    check(before, after)


HEADS_TAKEN = ["minilm", "gpt2-scripted", "t5", "t5-scripted", "sdpa-opset-23"]


@pytest.mark.parametrize("name", HEADS_TAKEN)
def test_heads_are_part_of_the_operator(name: str) -> None:
    after, _ = Pipeline.parse("fold-constants,fused-attention").run(model_of(name))
    for node in after.graph:
        if node.op_type == "Attention":
            assert [len(value.shape) for value in node.inputs[:3]] == [3, 3, 3]
            assert {"q_num_heads", "kv_num_heads"} <= set(node.attributes)


@pytest.mark.parametrize("name", EXPORTS)
def test_files_of_onnxruntimes_optimizer(name: str, tmp_path: Path) -> None:
    """What onnxruntime wrote in operators of its own becomes standard, attention and all."""
    before = model_of(name)
    session(ir.to_proto(before), tmp_path / "optimized.onnx")
    io.load(tmp_path / "optimized.onnx")  # LayerNormalization of opset 14, which only onnxruntime has, is no mistake
    optimized = ir.load(tmp_path / "optimized.onnx")
    after, reports = Pipeline.parse("standardise-contrib," + preset("default") + ",fused-attention").run(optimized)
    assert not reports[0].skips
    assert {node.domain for node in after.graph} == {""}
    assert operators(after)["Attention"] == EXPORTS[name].attentions, reports[-1].skips
    check(before, after)


def test_a_file_of_the_transformer_optimizer(tmp_path: Path) -> None:
    """Its Attention projects one input to queries, keys and values by one packed weight."""
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    path = tmp_path / "minilm.onnx"
    path.write_bytes(exported("minilm-scripted"))
    optimized = optimizer.optimize_model(str(path), model_type="bert", num_heads=4, hidden_size=48, opt_level=0)
    optimized.save_model_to_file(str(path))
    proto = onnx.load(path)
    contrib = Counter(node.op_type for node in proto.graph.node if node.domain == "com.microsoft")
    assert contrib["Attention"] == 2 and contrib["BiasGelu"] == 2, contrib
    after, reports = Pipeline.parse("fused-attention,standardise-contrib").run(ir.from_proto(proto))
    assert not reports[0].skips and {node.domain for node in after.graph} == {""}
    assert operators(after)["Attention"] == 2 and reports[0].stats == {"attentions": 2, "fused": 2}
    check(model_of("minilm-scripted"), after)


REAL = {"minilm": 6, "smollm2": 30, "vit": 12}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_every_attention_of_the_real_models(name: str) -> None:
    from graphwright.models import registry
    from graphwright.passes.errors import AssetError

    entry = registry.describe(next(n for n in registry.names() if n.startswith(name)))
    try:
        model = entry.build()
    except AssetError as error:
        pytest.skip(str(error))
    assert isinstance(model, ir.Model)
    after, reports = Pipeline.parse(preset("default") + ",fused-attention").run(model)
    found = operators(after)
    assert found["Attention"] == REAL[name] and not found["Softmax"]
    assert reports[-1].stats == {"attentions": REAL[name], "fused": REAL[name]}


# --- compiled

SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("t5-scripted", "decoder", "sdpa-opset-23")]


class Compiled:
    """A model compiled for this machine, as `optimize` does, without an artifact."""

    def __init__(self, model: ir.Model, **pins: tuple[int, ...]) -> None:
        from graphwright.runtime import phases
        from graphwright.runtime.importer import import_model
        from graphwright.runtime.target import Target
        from graphwright.runtime.work import work_of

        target = Target.named("cpu")
        ctx = PassContext(pins=pins, target="cpu", caches=Caches())
        self.model, reports = Pipeline.parse(preset("compile") + ",fused-attention").run(model, ctx)
        self.report = reports[-1]
        lowered = []
        result = phases.compile_module(import_model(ir.to_proto(self.model), target), target, lowered.append)
        self.executable, self.constants = result
        self.work = work_of(lowered[0])

    def __call__(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        import tvm
        from tvm import relax

        main = relax.VirtualMachine(self.executable, tvm.cpu())["main"]
        names = [value.name for value in self.model.graph.inputs]
        result = main(*(tvm.runtime.tensor(feeds[n]) for n in names), tvm.runtime.convert(list(self.constants)))
        results = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
        return [tensor.numpy() for tensor in results]


@pytest.mark.tvm
@pytest.mark.parametrize("name", ["minilm", "gpt2-scripted", *SLOWER])
def test_compiled_numbers(name: str) -> None:
    pytest.importorskip("tvm")
    compiled = Compiled(model_of(name))
    kernels = [kernel["op"] for kernel in compiled.work.kernels.values()]
    assert "attention" in kernels and not [k for k in kernels if "softmax" in k]
    check(model_of(name), compiled.model, compiled)


@pytest.mark.tvm
@pytest.mark.parametrize("name", ["minilm", pytest.param("gpt2-scripted", marks=pytest.mark.slow)])
def test_memory_grows_linearly_with_the_length(name: str) -> None:
    """No buffer of the size of Q K' is in the memory plan: twice the length takes twice the memory.

    (The relative positions of T5 are a mask of that size, which the model computes itself.)
    """
    pytest.importorskip("tvm")
    sizes = {}
    for length in (16, 32, 64):
        pins = {str(value.name): (1, length) for value in model_of(name).graph.inputs}
        sizes[length] = Compiled(model_of(name), **pins).work.activation_bytes
    first, second, third = sizes.values()
    assert third - second <= 2.1 * (second - first), sizes
