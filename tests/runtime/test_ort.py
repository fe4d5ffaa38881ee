"""Parts of an artifact that onnxruntime runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
from graphwright.runtime.artifact import RegionSpec
from graphwright.runtime.ort import OrtStep
from onnx import parser
from onnx.numpy_helper import from_array


@pytest.mark.parametrize("zeros", [False, True])
def test_a_gemm_between_q_and_dq_with_scales_of_channels_is_right(tmp_path: Path, zeros: bool) -> None:
    point = ", wzero" if zeros else ""
    model = parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[4, 16] x) => (float[4, 6] y) {{
            q = QuantizeLinear (x, xscale, xzero)
            d = DequantizeLinear (q, xscale, xzero)
            w = DequantizeLinear <axis = 0> (codes, wscale{point})
            z = Gemm <transB = 1> (d, w, bias)
            r = QuantizeLinear (z, zscale, zzero)
            y = DequantizeLinear (r, zscale, zzero)
        }}""")
    rng = np.random.default_rng(0)
    held = {
        "xscale": np.float32(0.02), "xzero": np.uint8(128), "zscale": np.float32(0.05), "zzero": np.uint8(120),
        "codes": rng.integers(-127, 128, (6, 16)).astype(np.int8), "wscale": rng.uniform(0.005, 0.02, 6).astype("f4"),
        "bias": rng.normal(size=6).astype("f4"), "wzero": np.zeros(6, np.int8),
    }  # fmt: skip
    model.graph.initializer.extend(from_array(np.asarray(a), n) for n, a in held.items() if zeros or n != "wzero")
    onnx.save(model, tmp_path / "region.onnx")
    region = RegionSpec(runtime="onnxruntime", file="region.onnx", inputs=["x"], outputs=["y"], nodes=6)
    x = rng.uniform(-2.5, 2.5, (4, 16)).astype(np.float32)
    found = OrtStep(cast(Any, SimpleNamespace(root=tmp_path)), region, threads=1)({"x": x})["y"]

    data = (np.clip(np.round(x / held["xscale"]) + 128, 0, 255) - 128) * np.float64(held["xscale"])
    z = data @ (held["codes"] * held["wscale"].astype(np.float64)[:, None]).T + held["bias"]
    expected = (np.clip(np.round(z / held["zscale"]) + 120, 0, 255) - 120) * held["zscale"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
