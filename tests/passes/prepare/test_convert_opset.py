"""Converted models give the numbers of the old ones, and nothing is lost on the way."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.errors import UsageError
from graphwright.passes.pipeline import Pipeline

# name -> (opset, ONNX text behind the header, shapes of the inputs)
CASES: dict[str, tuple[int, str, dict[str, tuple[int, ...]]]] = {
    "softmax-flattens": (
        11,
        "g (float[N,3,4] x) => (float[N,3,4] y) { y = Softmax<axis=1>(x)}",
        {"x": (2, 3, 4)},
    ),
    "reduce-axes": (
        11,
        "g (float[N,3,4] x) => (float[N,4] y) { y = ReduceSum<axes=[1],keepdims=0>(x)}",
        {"x": (2, 3, 4)},
    ),
    "split-sizes": (
        11,
        "g (float[N,3,4] x) => (float[N,1,4] y,float[N,2,4] z) { y,z = Split<axis=1, split=[1,2]>(x)}",
        {"x": (2, 3, 4)},
    ),
    "split-even": (
        13,
        "g (float[N,4,4] x) => (float[N,2,4] y,float[N,2,4] z) { y,z = Split<axis=1>(x)}",
        {"x": (2, 4, 4)},
    ),
    "upsample-nearest": (
        9,
        'g (float[N,3,4,4] x) => (float[a,b,c,d] y) <float[4] s={1,1,2.5,2}> { y = Upsample<mode="nearest">(x,s)}',
        {"x": (1, 3, 4, 4)},
    ),
    "upsample-linear": (
        9,
        'g (float[N,3,4,4] x) => (float[a,b,c,d] y) <float[4] s={1,1,2,2}> { y = Upsample<mode="linear">(x,s)}',
        {"x": (1, 3, 4, 4)},
    ),
    "upsample-attribute": (
        7,
        'g (float[N,3,4,4] x) => (float[a,b,c,d] y) { y = Upsample<mode="nearest",scales=[1.0,1.0,2.0,2.0]>(x)}',
        {"x": (1, 3, 4, 4)},
    ),
    "resize-linear": (
        10,
        'g (float[N,3,4,4] x) => (float[a,b,c,d] y) <float[4] s={1,1,2,0.5}> { y = Resize<mode="linear">(x,s)}',
        {"x": (1, 3, 4, 4)},
    ),
    "clip": (
        10,
        "g (float[N,3] x) => (float[a,b] y) { y = Clip<min=0.0,max=6.0>(x)}",
        {"x": (2, 3)},
    ),
    "pad": (
        10,
        "g (float[N,3] x) => (float[a,b] y) { y = Pad<pads=[0,1,2,0]>(x)}",
        {"x": (2, 3)},
    ),
    "group-normalization": (
        18,
        "g (float[N,4,5,5] x, float[2] s, float[2] b) => (float[a,b,c,d] y) { y = "
        "GroupNormalization<num_groups=2>(x,s,b)}",
        {"x": (1, 4, 5, 5), "s": (2,), "b": (2,)},
    ),
    "grid-sample": (
        16,
        'g (float[N,4,5,5] x, float[N,5,5,2] s) => (float[a,b,c,d] y) { y = GridSample<mode="bilinear">(x,s)}',
        {"x": (1, 4, 5, 5), "s": (1, 5, 5, 2)},
    ),
    "body": (
        11,
        "g (float[N,4] x) => (float[a,b] y) <bool c={1}>{ y = If(c) <then_branch=t () => (float[a,b] z) "
        "{ z = Softmax<axis=0>(x)}, else_branch=e () => (float[a,b] z2) { z2 = Relu(x)}>}",
        {"x": (2, 4)},
    ),
    "squeeze": (
        11,
        "g (float[N,1,3] x) => (float[a,b] y) { y1 = Squeeze<axes=[1]>(x) y2=Unsqueeze<axes=[0]>(y1) "
        "y=Squeeze<axes=[0]>(y2)}",
        {"x": (2, 1, 3)},
    ),
    "dropout": (
        10,
        "g (float[N,3] x) => (float[a,b] y) { y = Dropout<ratio=0.3>(x)}",
        {"x": (2, 3)},
    ),
    "batch-normalization": (
        9,
        "g (float[N,3,2,2] x) => (float[a,b,c,d] y) <float[3] s={1,2,3}> { y = "
        "BatchNormalization<epsilon=0.1>(x,s,s,s,s)}",
        {"x": (2, 3, 2, 2)},
    ),
    "topk": (
        9,
        "g (float[N,5] x) => (float[a,b] y, int64[a,b] i) { y,i = TopK<k=2>(x)}",
        {"x": (2, 5)},
    ),
    "gemm": (
        7,
        "g (float[N,5] x) => (float[a,b] y) <float[2] c={1,2}, float[5,2] w={1,2,3,4,5,6,7,8,9,10}> { y = Gemm(x,w,c)}",
        {"x": (2, 5)},
    ),
    "scatter": (
        9,
        "g (float[N,5] x, float[1,1] u) => (float[a,b] y) <int64[1,1] c={1}> { y = Scatter(x,c,u)}",
        {"x": (2, 5), "u": (1, 1)},
    ),
    "slice": (
        9,
        "g (float[N,5] x) => (float[a,b] y) { y = Slice<starts=[1],ends=[4],axes=[1]>(x)}",
        {"x": (2, 5)},
    ),
    "log-softmax": (
        11,
        "g (float[N,M] x) => (float[N,M] y) { y = LogSoftmax<axis=-1>(x)}",
        {"x": (2, 3)},
    ),
    "softmax-computed-shape": (
        11,
        "g (float x1) => (float[N,M] y) <int64[2] s={2,2}> {x=Expand(x1,s) y = Softmax(x)}",
        {"x1": ()},
    ),
    "roi-align": (
        10,
        "g (float[1,1,6,6] x) => (float[a,b,c,d] y) <float[1,4] r={0,0,4,4}, int64[1] bi={0}> { y = "
        "RoiAlign<output_height=2,output_width=2>(x,r,bi)}",
        {"x": (1, 1, 6, 6)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_stay(name: str, check) -> None:
    opset, body, shapes = CASES[name]
    random = np.random.default_rng(0)
    feeds = {key: random.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    # The same sums in the same order: only rounding inside one kernel may differ.
    model, (report,) = check(f'<ir_version: 8, opset_import: ["" : {opset}]> {body}', "convert-opset", feeds, 2e-6)
    assert model.graph.opset_imports[""] == 21
    assert model.ir_version >= 10
    assert not report.skips


def test_names_metadata_and_weights_survive() -> None:
    """onnx's own converter drops functions, metadata and external data; a node-by-node conversion cannot."""
    text = """<ir_version: 8, opset_import: ["" : 11, "local" : 1]>
    g (float[2,3] x) => (float[2,1] y) { [sum] t = ReduceSum <axes = [1]> (x) w = Mul (t, big) y = local.f (w) }
    <domain: "local", opset_import: ["" : 11]> f (a) => (b) { b = Relu (a) }"""
    text = text.replace("(float[2,1] y) {", "(float[2,1] y) <float[2,1] big = {1, 2}> {")
    before = ir.from_proto(onnx.parser.parse_model(text))
    before.metadata_props["origin"] = "a test"
    before.graph.node("sum").metadata_props["layer"] = "first"
    tensor = before.graph.initializers["big"].const_value
    after, _ = Pipeline.parse("convert-opset").run(before)
    assert after.graph.initializers["big"].const_value is tensor
    assert after.metadata_props == {"origin": "a test"}
    assert {node.metadata_props.get("layer") for node in after.graph if node.op_type == "ReduceSum"} == {"first"}
    assert [f.name for f in after.functions.values()] == ["f"]
    assert {v.name for node in after.graph for v in node.outputs} >= {"t", "w", "y"}


@pytest.mark.parametrize("version", [6, 12, 999])
def test_versions_out_of_range_are_refused(version: int) -> None:
    with pytest.raises(UsageError, match=re.escape(f"convert-opset: version {version} is not between 13 and ")):
        Pipeline.parse(f"convert-opset:version={version}")
