"""Files in operators of onnxruntime's own are compiled as a whole, and give its numbers."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.base import PassContext
from graphwright.passes.pipeline import Pipeline
from graphwright.passes.registry import preset
from graphwright.runtime.target import Target

onnxruntime = pytest.importorskip("onnxruntime")
tvm = pytest.importorskip("tvm")
pytestmark = pytest.mark.tvm

HEAD = '<ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1]> '
TARGET = Target.named("cpu")


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


# A step of a language model with grouped queries, rotary embedding and a cache; two sequences of unequal length.
STEP = (
    "g (float[B,1,64] q, float[B,1,32] k, float[B,1,32] v, float[B,2,P,16] pk, float[B,2,P,16] pv, int32[B] n,"
    " int32 t, float[32,8] c, float[32,8] s) => (float[B,1,64] y, float[B,2,T,16] nk, float[B,2,T,16] nv)"
    " { y, nk, nv = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2, do_rotary = 1>"
    " (q, k, v, pk, pv, n, t, c, s) }"
)
# A layer of an encoder as onnxruntime's optimizer writes it.
LAYER = (
    "g (float[B,S,32] x, int32[B,S] m, float[32,96] w, float[96] b, float[32] g1, float[32] b1, float[32,32] w2,"
    " float[32] b2) => (float[B,S,32] y) { a = com.microsoft.Attention <num_heads = 4> (x, w, b, m)"
    " n = com.microsoft.SkipLayerNormalization <epsilon = 0.00001> (a, x, g1, b1)"
    " p = com.microsoft.FusedMatMul <transB = 1, alpha = 0.5> (n, w2) u = com.microsoft.BiasGelu (p, b2)"
    " y = com.microsoft.SkipSimplifiedLayerNormalization (u, n, g1) }"
)


def compiled(text: str):
    from graphwright.runtime import phases
    from graphwright.runtime.importer import import_model
    from graphwright.runtime.work import work_of
    from tvm import relax

    model = ir.from_proto(onnx.parser.parse_model(HEAD + text))
    model, _ = Pipeline.parse(preset("compile")).run(model, PassContext(target="cpu"))
    assert {node.domain for node in model.graph} == {""}
    lowered = []
    executable, constants = phases.compile_module(import_model(ir.to_proto(model), TARGET), TARGET, lowered.append)
    assert "attention" in {kernel["op"] for kernel in work_of(lowered[0]).kernels.values()}
    main, weights = relax.VirtualMachine(executable, tvm.cpu())["main"], tvm.runtime.convert(list(constants))
    names = [value.name for value in model.graph.inputs]

    def run(feeds):
        result = main(*(tvm.runtime.tensor(np.asarray(feeds[name])) for name in names), weights)
        return [t.numpy() for t in ([result] if isinstance(result, tvm.runtime.Tensor) else list(result))]

    return run


def original(text: str):
    session = onnxruntime.InferenceSession(onnx.parser.parse_model(HEAD + text).SerializeToString())
    return lambda feeds: session.run(None, feeds)


def close(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))


def test_a_step_with_a_cache() -> None:
    ours, theirs = compiled(STEP), original(STEP)
    for lengths, past in (([7, 4], 7), ([12, 12], 12), ([3], 9)):
        b, total = len(lengths), max(lengths) + 1
        feeds = {
            "q": draw(b, 1, 64), "k": draw(b, 1, 32), "v": draw(b, 1, 32) * 2, "pk": draw(b, 2, past, 16),
            "pv": draw(b, 2, past, 16) * 2, "n": np.array(lengths, np.int32), "t": np.array(total, np.int32),
            "c": np.cos(draw(32, 8)), "s": np.sin(draw(32, 8)),
        }  # fmt: skip
        got, expected = ours(feeds), theirs(feeds)
        close(got[0], expected[0])
        for mine, other in zip(got[1:], expected[1:], strict=True):
            for row, length in enumerate(lengths):
                close(mine[row, :, : length + 1], other[row, :, : length + 1])


def test_a_layer_of_an_optimized_encoder() -> None:
    ours, theirs = compiled(LAYER), original(LAYER)
    weights = {"w": draw(32, 96) / 4, "b": draw(96), "g1": draw(32), "b1": draw(32), "w2": draw(32, 32), "b2": draw(32)}
    for b, s in ((2, 9), (1, 1), (3, 17)):
        mask = (np.arange(s)[None] < np.arange(s, s - b, -1)[:, None]).astype(np.int32)
        feeds = {"x": draw(b, s, 32), "m": mask, **weights}
        close(*(run(feeds)[0] for run in (ours, theirs)))
