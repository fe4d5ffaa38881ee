"""Running a model before and after passes on onnxruntime without its own optimizations."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.base import PassReport
from graphwright.passes.pipeline import Pipeline

Feeds = Mapping[str, np.ndarray]
Check = Callable[[str, str, Feeds, float], tuple[ir.Model, list[PassReport]]]


def run(model: ir.Model, feeds: Feeds) -> list[np.ndarray]:
    """Products of bytes are exact on every processor: at the first level of optimization where onnxruntime can."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    exact = any(node.op_type.startswith("QLinear") for node in model.graph)
    options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED if exact else levels.ORT_DISABLE_ALL
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    proto = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, ["CPUExecutionProvider"]).run(None, dict(feeds))


@pytest.fixture
def check() -> Check:
    """check(onnx text, passes, feeds, tolerance relative to the output's scale): numbers stay. Returns the result."""

    def check(text: str, passes: str, feeds: Feeds, tolerance: float) -> tuple[ir.Model, list[PassReport]]:
        before = ir.from_proto(onnx.parser.parse_model(text))
        after, reports = Pipeline.parse(passes).run(before)
        onnx.checker.check_model(ir.to_proto(after), full_check=True)
        for expected, got in zip(run(before, feeds), run(after, feeds), strict=True):
            assert got.dtype == expected.dtype and got.shape == expected.shape
            if expected.dtype.kind != "f":
                np.testing.assert_array_equal(got, expected)
                continue
            scale = float(np.abs(expected).max(initial=1e-30))
            np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale)
        return after, reports

    return check
