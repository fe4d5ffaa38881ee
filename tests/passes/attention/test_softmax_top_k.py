"""The pass `softmax-top-k` on wide heads, on onnxruntime and compiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import parser

HEAD = """<ir_version: 10, opset_import: ["" : 21]>
g (float[N,{width}] x) => (float[N,20] p, int64[N,20] i, int64[N,1] a) <int64[1] k = {{20}}> {{
  s = Softmax (x)  p, i = TopK (s, k)  t = Softmax (x)  a = ArgMax <axis = -1> (t)
}}"""


@pytest.mark.tvm
@pytest.mark.parametrize("width", [20, 33, 50_000])
def test_a_head_gives_the_same_words(width: int, tmp_path: Path) -> None:
    import graphwright

    model = parser.parse_model(HEAD.format(width=width))
    onnx.save(model, tmp_path / "m.onnx")
    result = graphwright.optimize(
        tmp_path / "m.onnx", passes="softmax-top-k", target="cpu", out=tmp_path / "out"
    )
    rewritten = onnx.load(tmp_path / "out" / "model.onnx")
    assert "Softmax" not in {node.op_type for node in rewritten.graph.node}
    assert result.artifact is not None
    assert [region.runtime for region in result.artifact.manifest.regions] == ["tvm"]
    session = graphwright.load(tmp_path / "out")
    peers = [onnxruntime.InferenceSession(m.SerializeToString()) for m in (model, rewritten)] if width < 100 else [
        onnxruntime.InferenceSession(model.SerializeToString())]  # fmt: skip
    for rows in (1, 3):
        x = (np.random.default_rng(rows).standard_normal((rows, width)) * 4).astype(np.float32)
        p, i, a = session.run(None, {"x": x})
        for peer in peers:
            wanted = peer.run(None, {"x": x})
            np.testing.assert_allclose(p, wanted[0], rtol=1e-5)
            np.testing.assert_array_equal(i, wanted[1])
            np.testing.assert_array_equal(a, wanted[2])
