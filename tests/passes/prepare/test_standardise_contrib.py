"""Operators of onnxruntime written as the standard's give what onnxruntime's own kernels give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.pipeline import Pipeline
from graphwright.passes.prepare import contrib_quantized
from graphwright.passes.prepare.standardise_contrib import BODIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

onnxruntime = pytest.importorskip("onnxruntime")

TYPES = {np.dtype(t): v for t, v in (("float32", 1), ("float16", 10), ("int32", 6), ("int64", 7), ("bool", 9))}


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape) + len(shape)).standard_normal(shape).astype(np.float32)


def ints(*values: Any) -> np.ndarray:
    return np.array(values[0] if len(values) == 1 else values, np.int32)


@dataclass(frozen=True)
class Site:
    """One node: its operator, inputs (None is left out), attributes and how many outputs are used.

    weights: positions of inputs that are constants. together: of those whose lengths, if open, are one symbol.
    """

    op: str
    inputs: Sequence[np.ndarray | None]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: Sequence[int] = (0,)
    weights: Sequence[int] = ()
    together: Sequence[int] = ()
    domain: str = "com.microsoft"
    opset: int = 17
    tolerance: float = 2e-6
    valid: Sequence[int] | None = None  # rows of output 0 of each sequence that mean something

    def model(self, open_sizes: bool = False) -> onnx.ModelProto:
        names = ["" if x is None else f"x{i}" for i, x in enumerate(self.inputs)]
        outputs = [f"y{i}" if i in self.outputs else "" for i in range(max(self.outputs) + 1)]
        node = helper.make_node(self.op, names, outputs, domain=self.domain, **self.attributes)
        given, weights = [], []
        for i, x in enumerate(self.inputs):
            if x is None:
                continue
            if i in self.weights:
                weights.append(onnx.numpy_helper.from_array(x, f"x{i}"))
            else:
                # Axes of the batch and of lengths may be open; widths and heads are known in real files.
                fixed = {0: (0, 1)}.get(x.ndim, (x.ndim - 1,)) if x.ndim != 4 else (1, 3)
                shape = [d if j in fixed or not open_sizes else f"n{i}_{j}" for j, d in enumerate(x.shape)]
                if open_sizes and x.ndim:
                    shape[0] = "batch" if x.shape[0] == self.batch else shape[0]
                if open_sizes and i in self.together:
                    shape[1] = "length"
                given.append(helper.make_tensor_value_info(f"x{i}", TYPES[x.dtype], shape))
        kinds = [
            TensorProto.INT32 if self.op.startswith("Embed") and i == 1 else TYPES[self.dtype] for i in self.outputs
        ]
        results = [helper.make_tensor_value_info(f"y{i}", k, None) for i, k in zip(self.outputs, kinds, strict=True)]
        graph = helper.make_graph([node], "g", given, results, weights)
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=10)

    @property
    def dtype(self) -> np.dtype:
        return next(x.dtype for x in self.inputs if x is not None and x.dtype.kind == "f")

    @property
    def batch(self) -> int:
        first = self.inputs[0]
        assert first is not None
        return first.shape[0]

    @property
    def feeds(self) -> dict[str, np.ndarray]:
        return {f"x{i}": x for i, x in enumerate(self.inputs) if x is not None and i not in self.weights}


B, S, H, D = 2, 5, 2, 4
W = H * D
X = draw(B, S, W)
IDS = ints([[1, 2, 3, 0, 4], [4, 3, 2, 1, 0]])
TABLES = [np.cos(draw(16, D // 2)), np.sin(draw(16, D // 2))]
LENGTHS, LEFT = ints([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]), ints([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
QKV = [draw(B, S, W), draw(B, S, W) * 2, draw(B, S, W) + 1]
PAST = [draw(B, H, 3, D), draw(B, H, 3, D) * 2]
HEADS = {"num_heads": H}
CAUSAL = {**HEADS, "unidirectional": 1}

SITES = {
    "gelu": Site("Gelu", [X]),
    "fast-gelu": Site("FastGelu", [X]),
    "fast-gelu-bias": Site("FastGelu", [X, draw(W)], weights=[1]),
    "bias-gelu": Site("BiasGelu", [X, draw(W)]),
    "quick-gelu": Site("QuickGelu", [X], {"alpha": 1.5}),
    "quick-gelu-default": Site("QuickGelu", [X]),
    "matmul": Site("FusedMatMul", [draw(2, 3, 4), draw(2, 4, 5)], {"alpha": 0.5}),
    "matmul-transposed": Site("FusedMatMul", [draw(2, 4, 3), draw(5, 4)], {"transA": 1, "transB": 1, "alpha": 3.0}),
    "matmul-batch": Site("FusedMatMul", [draw(3, 2, 4), draw(4, 2, 5)], {"transBatchA": 1, "transBatchB": 1}),
    "matmul-batch-and-last": Site("FusedMatMul", [draw(4, 2, 6, 3), draw(5, 2, 6, 4)], {"transBatchA": 1, "transA": 1,
                                  "transBatchB": 1, "transB": 1}),
    "matmul-vector": Site("FusedMatMul", [draw(4), draw(4, 5)], {"transA": 1}),
    "gemm": Site("FusedGemm", [draw(3, 4), draw(5, 4), draw(5)], {"transB": 1, "activation": "LeakyRelu",
                 "activation_alpha": 0.3}),
    "gemm-relu": Site("FusedGemm", [draw(3, 4), draw(4, 5)], {"alpha": 2.0, "activation": "Relu"}),
    "conv-relu": Site("FusedConv", [draw(1, 4, 6, 6), draw(8, 4, 3, 3), draw(8)], {"activation": "Relu",
                      "pads": [1, 1, 1, 1]}),
    "conv-sum-clip": Site("FusedConv", [draw(1, 4, 6, 6), draw(8, 2, 3, 3), draw(8), draw(1, 8, 2, 2)],
                          {"activation": "Clip", "activation_params": [-0.5, 0.5], "strides": [2, 2], "group": 2}),
    "conv-leaky": Site("FusedConv", [draw(1, 4, 6, 6), draw(8, 4, 1, 1)], {"activation": "LeakyRelu",
                       "activation_params": [0.25]}),
    "conv-hard-sigmoid": Site("FusedConv", [draw(1, 4, 6, 6), draw(8, 4, 1, 1)], {"activation": "HardSigmoid",
                              "activation_params": [0.25, 0.4]}),
    "skip": Site("SkipLayerNormalization", [X, X * 2, draw(W), draw(W)], {"epsilon": 1e-5}),
    "skip-all": Site("SkipLayerNormalization", [X, draw(1, S, W), draw(W), draw(W), draw(W)], outputs=[0, 3]),
    "skip-2d": Site("SkipLayerNormalization", [X, draw(S, W), draw(W)], outputs=[0, 3]),
    "skip-rms": Site("SkipSimplifiedLayerNormalization", [X, X * 2, draw(W)], {"epsilon": 1e-3}),
    "skip-rms-all": Site("SkipSimplifiedLayerNormalization", [X, X * 2, draw(W), draw(W)], outputs=[0, 3]),
    "rms": Site("SimplifiedLayerNormalization", [X, draw(W)], {"epsilon": 1e-3, "axis": -1}, domain=""),
    "layer-norm-of-opset-12": Site("LayerNormalization", [X, draw(W), draw(W)], domain="", opset=12),
    "embed": Site("EmbedLayerNormalization", [IDS, IDS % 2, draw(6, W), draw(9, W), draw(2, W), draw(W), draw(W),
                  LENGTHS], {"epsilon": 1e-5}, outputs=[0, 1, 2]),
    "embed-positions": Site("EmbedLayerNormalization", [IDS, None, draw(6, W), draw(9, W), None, draw(W), draw(W), None,
                            IDS + 1], outputs=[0, 1]),
    "rotary": Site("RotaryEmbedding", [X, IDS.astype(np.int64), *TABLES], {"num_heads": 0}),
    "rotary-offset": Site("RotaryEmbedding", [X, np.array([3]), *TABLES], {"interleaved": 1}, weights=[2, 3]),
    "rotary-4": Site("RotaryEmbedding", [draw(B, H, S, D), IDS.astype(np.int64), *TABLES]),
    "rotary-part": Site("RotaryEmbedding", [draw(B, S, 2 * W), IDS.astype(np.int64), *TABLES], {"num_heads": H,
                        "rotary_embedding_dim": D}),
    "mha": Site("MultiHeadAttention", QKV, HEADS),
    "mha-scale": Site("MultiHeadAttention", QKV, {**HEADS, "scale": 1.5}),
    "mha-cross": Site("MultiHeadAttention", [X, draw(B, 7, W), draw(B, 7, 6)], HEADS),
    "mha-bias": Site("MultiHeadAttention", [*QKV, draw(3 * W)], HEADS, weights=[3]),
    "mha-bias-widths": Site("MultiHeadAttention", [X, draw(B, 7, W), draw(B, 7, 6), draw(2 * W + 6)], HEADS),
    "mha-mask": Site("MultiHeadAttention", [*QKV, None, LENGTHS], HEADS),
    "mha-left-mask": Site("MultiHeadAttention", [*QKV, None, LEFT], HEADS),
    "mha-hidden-row": Site("MultiHeadAttention", [*QKV, None, LEFT * 0], HEADS),
    "mha-mask-3": Site("MultiHeadAttention", [*QKV, None, (draw(B, S, S) > -0.5).astype(np.int32)], HEADS),
    "mha-lengths": Site("MultiHeadAttention", [*QKV, None, ints([5, 3])], HEADS),
    "mha-filter": Site("MultiHeadAttention", [*QKV, None, LENGTHS], {**HEADS, "mask_filter_value": -2.0}),
    "mha-added": Site("MultiHeadAttention", [*QKV, None, None, draw(1, H, S, S)], HEADS),
    "mha-mask-and-added": Site("MultiHeadAttention", [*QKV, draw(3 * W), LENGTHS, draw(B, 1, S, S)], HEADS),
    "mha-causal": Site("MultiHeadAttention", QKV, CAUSAL, together=[0, 1, 2]),
    "mha-causal-mask": Site("MultiHeadAttention", [*QKV, None, LENGTHS], CAUSAL, together=[0, 1, 2]),
    "mha-causal-left-mask": Site("MultiHeadAttention", [*QKV, None, LEFT], CAUSAL, together=[0, 1, 2]),
    "mha-by-heads": Site("MultiHeadAttention", [X, draw(B, H, 7, D), draw(B, H, 7, D) * 2], HEADS),
    "mha-past": Site("MultiHeadAttention", [*QKV, None, None, None, *PAST], HEADS, outputs=[0, 1, 2]),
    "mha-past-causal": Site("MultiHeadAttention", [*QKV, draw(3 * W), None, None, *PAST],
                            {**HEADS, "unidirectional": 1}, outputs=[0, 1, 2]),
    "mha-past-mask": Site("MultiHeadAttention", [*(x[:, :1] for x in QKV), None, ints([[1] * 4, [0, 1, 1, 1]]), None,
                          *PAST], HEADS, outputs=[0, 1, 2]),
    "mha-presents": Site("MultiHeadAttention", QKV, HEADS, outputs=[0, 1, 2]),
    "attention": Site("Attention", [X, draw(W, 3 * W), draw(3 * W)], HEADS, weights=[1, 2]),
    "attention-no-bias": Site("Attention", [X, draw(W, 3 * W), None], {**HEADS, "scale": 0.1}),
    "attention-mask": Site("Attention", [X, draw(W, 3 * W), draw(3 * W), LENGTHS], HEADS),
    "attention-lengths": Site("Attention", [X, draw(W, 3 * W), draw(3 * W), ints([5, 2])], HEADS),
    "attention-causal": Site("Attention", [X, draw(W, 3 * W), draw(3 * W)], {**HEADS, "unidirectional": 1}),
    "attention-causal-left": Site("Attention", [X, draw(W, 3 * W), draw(3 * W), LEFT], {**HEADS, "unidirectional": 1}),
    "attention-widths": Site("Attention", [X, draw(W, 2 * W + 4), draw(2 * W + 4)], {**HEADS, "qkv_hidden_sizes":
                             [W, W, 4]}),
    "attention-past": Site("Attention", [X, draw(W, 3 * W), draw(3 * W), None, draw(2, B, H, 3, D)],
                           {**HEADS, "unidirectional": 1}, outputs=[0, 1]),
    "attention-present": Site("Attention", [X, draw(W, 3 * W), draw(3 * W)], HEADS, outputs=[0, 1]),
    "attention-added": Site("Attention", [X, draw(W, 3 * W), draw(3 * W), LENGTHS, None, draw(B, H, S, S)], HEADS),
}  # fmt: skip

E = 16  # onnxruntime wants a multiple of 16
ANGLES = [np.cos(draw(16, E // 2)), np.sin(draw(16, E // 2))]
KV = [draw(B, S, 2 * E), draw(B, S, 2 * E) * 2]
Q4 = draw(B, S, 4 * E)
GROUPS = {"num_heads": 4, "kv_num_heads": 2}


def grouped(seqlens: Sequence[int], total: int, *more: Any, new: int = S, past: int = 0, **options: Any) -> Site:
    """GroupQueryAttention of 4 heads over 2."""
    attributes = {**GROUPS, **{k: v for k, v in options.items() if k not in ("packed", "outputs", "valid", "nothing")}}
    batch = len(seqlens)
    cache: list[np.ndarray | None] = [draw(batch, 2, past, E), draw(batch, 2, past, E) * 2]
    if not past and options.get("nothing"):
        cache = [None, None]
    q, k, v = Q4[:batch, :new], KV[0][:batch, :new], KV[1][:batch, :new]
    given = [np.concatenate([q, k, v], -1), None, None] if options.get("packed") else [q, k, v]
    inputs = [*given, *cache, ints(list(seqlens)), np.array(total, np.int32), *more]
    return Site(
        "GroupQueryAttention", inputs, attributes, options.get("outputs", (0, 1, 2)), valid=options.get("valid")
    )


SITES |= {
    "gqa-prompt": grouped([4, 4], 5),
    "gqa-no-past": grouped([4, 4], 5, nothing=True),
    "gqa-packed": grouped([4, 4], 5, packed=True),
    "gqa-scale-cap": grouped([4, 4], 5, scale=0.7, softcap=1.5),
    "gqa-rotary": grouped([4, 4], 5, *ANGLES, do_rotary=1),
    "gqa-rotary-interleaved": grouped([4, 4], 5, *ANGLES, do_rotary=1, rotary_interleaved=1, packed=True),
    "gqa-window": grouped([4, 4], 5, local_window_size=2),
    "gqa-padded-prompt": grouped([4, 2], 5, *ANGLES, do_rotary=1, valid=[5, 3]),
    "gqa-step": grouped([7, 7], 8, *ANGLES, new=1, past=7, do_rotary=1),
    "gqa-step-unequal": grouped([7, 4], 8, *ANGLES, new=1, past=7, do_rotary=1),
    "gqa-step-window": grouped([7, 4], 8, new=1, past=7, local_window_size=3),
    "gqa-more": grouped([7], 8, *ANGLES, new=3, past=5, do_rotary=1, packed=True),
    "gqa-more-window": grouped([7], 8, new=3, past=5, local_window_size=2),
    "gqa-long-past": grouped([5, 3], 6, *ANGLES, new=1, past=9, do_rotary=1),
    "gqa-positions": grouped([7, 7], 8, *ANGLES, np.array([[2], [3]]), new=1, past=7, do_rotary=1),
    "gqa-added": grouped([4, 4], 5, None, None, None, draw(B, 4, 5, 5), nothing=True),
}


def run(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def compare(site: Site, expected: Sequence[np.ndarray], got: Sequence[np.ndarray]) -> None:
    for index, (a, b) in enumerate(zip(expected, got, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        lengths = site.valid or []
        if site.op == "GroupQueryAttention" and index:  # rows behind the last of a sequence are free
            lengths = [int(n) + 1 for n in np.asarray(site.inputs[5])]
            a, b = a.transpose(0, 2, 1, 3), b.transpose(0, 2, 1, 3)
        pairs = [(a[i, :n], b[i, :n]) for i, n in enumerate(lengths)] or [(a, b)]
        for x, y in pairs:
            scale = float(np.abs(x).max(initial=1e-30))
            np.testing.assert_allclose(y, x, rtol=0, atol=site.tolerance * scale)


@pytest.mark.parametrize("open_sizes", [False, True], ids=["fixed", "open"])
@pytest.mark.parametrize("name", SITES)
def test_the_numbers_of_onnxruntime(name: str, open_sizes: bool) -> None:
    site = SITES[name]
    proto = site.model(open_sizes)
    expected = run(proto, site.feeds)
    for output, array in zip(proto.graph.output, expected, strict=True):
        dims = [f"{output.name}_{axis}" for axis in range(array.ndim)]
        output.CopyFrom(helper.make_tensor_value_info(output.name, TYPES[array.dtype], dims))
    after, (report,) = Pipeline.parse("standardise-contrib").run(ir.from_proto(proto))
    assert not report.skips, report.skips
    assert {node.domain for node in after.graph} == {""}
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    compare(site, expected, run(ir.to_proto(after), site.feeds))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("packed", ["qkv", "kv"])
def test_packed_inputs_are_the_unpacked_ones(packed: str, bias: bool) -> None:
    """onnxruntime takes them on GPUs only, so the reference is its operator with the three apart."""
    q, k, v = (x.reshape(B, S, H, 1, D) for x in QKV)
    more = [draw(3 * W)] if bias else []
    given = [np.concatenate([q, k, v], 3), None, None] if packed == "qkv" else [QKV[0], np.concatenate([k, v], 3), None]
    expected = run(Site("MultiHeadAttention", [*QKV, *more], HEADS).model(), Site("", [*QKV, *more]).feeds)
    site = Site("MultiHeadAttention", [*given, *more], HEADS)
    proto = site.model()
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y0", 1, ["b", "s", "d"]))
    after, (report,) = Pipeline.parse("standardise-contrib").run(ir.from_proto(proto))
    assert not report.skips
    compare(site, expected, run(ir.to_proto(after), site.feeds))


REFUSED = {
    "turned": ("Attention", [X, draw(W, 3 * W), draw(3 * W)], {**HEADS, "do_rotary": 1}, "it turns queries"),
    "shared": ("MultiHeadAttention", [*QKV, None, None, None, *PAST, ints([3])], HEADS, "share one buffer"),
    "mask-length": ("Attention", [X, draw(W, 3 * W), draw(3 * W), ints([1, 2, 3])], HEADS, "a mask of 3 numbers"),
    "mask-rank": ("MultiHeadAttention", [*QKV, None, np.zeros((B, 1, S, S), np.int32)], HEADS, "a mask of rank 4"),
    "causal-more-keys": ("MultiHeadAttention", [X, draw(B, 7, W), draw(B, 7, W)], CAUSAL, "5 queries and 7 keys"),
    "causal-fewer-keys": ("MultiHeadAttention", [X, draw(B, 3, W), draw(B, 3, W)], CAUSAL, "5 queries and 3 keys"),
    "causal-by-heads": ("MultiHeadAttention", [X, draw(B, H, 7, D), draw(B, H, 7, D)], CAUSAL, "and 7 keys"),
    "sinks": ("GroupQueryAttention", [Q4, *KV, None, None, ints([4, 4]), np.array(5, np.int32), None, None, None, None,
              draw(4)], GROUPS, "it has sinks"),
    "smooth": ("GroupQueryAttention", [Q4, *KV, None, None, ints([4, 4]), np.array(5, np.int32)],
               {**GROUPS, "smooth_softmax": 1}, "smooth_softmax is 1"),
    "not-causal": ("GroupQueryAttention", [Q4, *KV, None, None, ints([4, 4]), np.array(5, np.int32)],
                   {**GROUPS, "causal": 0}, "causal is 0"),
    "scaled-rotary": ("RotaryEmbedding", [X, IDS.astype(np.int64), *TABLES], {"scale": 2.0}, "it is scaled"),
    "activation": ("FusedConv", [draw(1, 4, 6, 6), draw(8, 4, 1, 1)], {"activation": "Softplus"}, "its activation"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_standard_has_no_words_for_is_left_with_the_reason(name: str) -> None:
    op, inputs, attributes, reason = REFUSED[name]
    proto = Site(op, inputs, attributes).model()
    model, (report,) = Pipeline.parse("standardise-contrib").run(ir.from_proto(proto))
    assert [reason in skip.reason for skip in report.skips] == [True], report.skips
    assert model.opset_imports[""] == 17 and not report.changes


def test_causal_attention_of_lengths_that_may_differ_is_left() -> None:
    """Of more keys than queries onnxruntime lets a query see others than is_causal does."""
    proto = Site("MultiHeadAttention", QKV, CAUSAL).model(open_sizes=True)
    _, (report,) = Pipeline.parse("standardise-contrib").run(ir.from_proto(proto))
    assert not report.changes
    assert ["n0_1 queries and n1_1 keys" in skip.reason for skip in report.skips] == [True], report.skips


def test_ops_must_exist() -> None:
    with pytest.raises(Exception, match="Swish is not one of"):
        Pipeline.parse("standardise-contrib:ops=Swish")


def test_shapes_are_told_through_many_layers() -> None:
    """Each product's rank is only known when the operator in front of it is replaced; the work stays linear."""
    nodes = []
    for i in range(40):
        nodes.append(
            helper.make_node("SkipLayerNormalization", [f"h{i}", f"h{i}", "g"], [f"n{i}"], domain="com.microsoft")
        )
        nodes.append(helper.make_node("FusedMatMul", [f"n{i}", "w"], [f"m{i}"], domain="com.microsoft", transA=0,
                                      transB=1))  # fmt: skip
        nodes.append(helper.make_node("QuickGelu", [f"m{i}"], [f"h{i + 1}"], domain="com.microsoft"))
    weights = [onnx.numpy_helper.from_array(draw(W), "g"), onnx.numpy_helper.from_array(draw(W, W) / W, "w")]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("h0", 1, ["b", "s", W])],
                              [helper.make_tensor_value_info("h40", 1, ["b", "s", W])], weights)  # fmt: skip
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=10)
    after, (report,) = Pipeline.parse("standardise-contrib").run(ir.from_proto(proto))
    assert not report.skips and {node.domain for node in after.graph} == {""}
    assert not [node for node in after.graph if node.op_type == "CastLike"]
    x = draw(B, S, W)
    (expected,), (got,) = run(proto, {"h0": x}), run(ir.to_proto(after), {"h0": x})
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))


def test_every_operator_is_tried() -> None:
    left = set(BODIES) - set(contrib_quantized.BODIES)  # whose tests are beside these
    assert left - {site.op for site in SITES.values()} <= {"BiasAdd", "BiasSplitGelu", "NhwcFusedConv"}


def gelu(x: np.ndarray) -> np.ndarray:
    from math import erf

    return 0.5 * x * (1 + np.vectorize(erf)(x.astype(np.float64) / np.sqrt(2)))


def test_operators_that_onnxruntime_has_for_gpus_only() -> None:
    """BiasAdd, BiasSplitGelu, NhwcFusedConv: against their definition in NumPy."""
    x, bias, skip = draw(2, 3, 8), draw(8), draw(2, 3, 8) * 2
    added = Site("BiasAdd", [x, bias, skip])
    split = Site("BiasSplitGelu", [x, bias])
    image, weight = draw(1, 5, 5, 4), draw(8, 4, 3, 3)
    conv = Site("NhwcFusedConv", [image, weight, draw(8), draw(1, 3, 3, 8)], {"activation": "Relu"})
    windows = np.lib.stride_tricks.sliding_window_view(image, (3, 3), (1, 2))  # n, y, x, c, ky, kx
    product = np.einsum("nyxcij,mcij->nyxm", windows.astype(np.float64), weight) + draw(8) + draw(1, 3, 3, 8)
    half = x + bias
    for site, expected in (
        (added, half + skip), (split, half[..., :4] * gelu(half[..., 4:])), (conv, np.maximum(product, 0)),
    ):  # fmt: skip
        proto = site.model()
        dims = [f"d{i}" for i in range(expected.ndim)]
        proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y0", 1, dims))
        after, (report,) = Pipeline.parse("standardise-contrib").run(ir.from_proto(proto))
        assert not report.skips
        (got,) = run(ir.to_proto(after), site.feeds)
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_multi_head_attention(data: st.DataObject) -> None:
    """Sizes from one, and every combination of bias, masks, past and causal that onnxruntime takes."""
    size, flag = st.integers(1, 5), st.booleans()
    b, s, h, d = (data.draw(size) for _ in range(4))
    past = data.draw(size) if data.draw(flag) else 0
    causal = data.draw(flag)
    keys = s if past or causal else data.draw(size)
    w, total = h * d, keys + past
    inputs: list[np.ndarray | None] = [draw(b, s, w), draw(b, keys, w) * 2, draw(b, keys, w) + 1, *[None] * 5]
    if data.draw(flag):
        inputs[3] = draw(3 * w)
    if data.draw(flag):
        seen = (draw(b, total) > 0).astype(np.int32)
        seen[:, 0] = 1  # scores of a row that is hidden wholly, by -10000, keep three digits only
        inputs[4] = seen
    if data.draw(flag):
        inputs[5] = draw(data.draw(st.sampled_from([1, b])), data.draw(st.sampled_from([1, h])), s, total)
    if past:
        inputs[6:8] = draw(b, h, past, d), draw(b, h, past, d) * 2
    attributes = {"num_heads": h, "unidirectional": int(causal)}
    site = Site("MultiHeadAttention", inputs, attributes, (0, 1, 2) if past else (0,), tolerance=1e-5)
    proto = site.model()
    expected = run(proto, site.feeds)
    for output, array in zip(proto.graph.output, expected, strict=True):
        dims = [f"{output.name}_{axis}" for axis in range(array.ndim)]
        output.CopyFrom(helper.make_tensor_value_info(output.name, 1, dims))
    after, (report,) = Pipeline.parse("standardise-contrib").run(ir.from_proto(proto))
    assert not report.skips, report.skips
    compare(site, expected, run(ir.to_proto(after), site.feeds))
