"""The benchmark of widths: all readers read every token, bytes follow from the plan, the selector stands alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphwright.passes.quantize.nested import NestedPlan, Selector, nest
from graphwright.tools.bench_dynamic_width import TAKEN, Reader, line, read_bytes, read_text, selector_model

onnxruntime = pytest.importorskip("onnxruntime")


class Session:
    """Foresees that the next token is the same as this one, and says which tokens it was given."""

    def __init__(self, outputs: list[str]) -> None:
        self.outputs, self.given = outputs, []  # type: ignore[var-annotated]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in self.outputs]

    def new_state(self) -> None:
        return None

    def run(self, wanted: list[str], feeds: dict[str, np.ndarray], state: Any) -> list[np.ndarray]:
        token, position = int(feeds["input_ids"][0, 0]), int(feeds["position"][0])
        self.given.append((token, position))
        logits = np.zeros((1, 1, 4), np.float32)
        logits[0, 0, token] = 100
        return [logits, np.array([position % 2])][: len(wanted)]


def test_every_reader_reads_all_tokens_in_windows() -> None:
    sessions = [Session(["logits"]), Session(["logits", TAKEN])]
    readers = {str(i): Reader(session) for i, session in enumerate(sessions)}  # type: ignore[arg-type]
    read_text(readers, [1, 1, 2, 2, 3], 3)
    for session, reader in zip(sessions, readers.values(), strict=True):
        assert session.given == [(1, 0), (1, 1), (2, 2), (2, 0), (3, 1)]
        # The last of a window and of the text foresee nothing.
        np.testing.assert_allclose(reader.losses, [0, 100, 100], atol=1e-6)
        assert len(reader.seconds) == 5
    assert readers["0"].widths == [] and len(readers["1"].widths) == 5


def test_bytes_and_the_selector_follow_from_the_plan() -> None:
    random = np.random.default_rng(0)
    layers = {name: nest(random.standard_normal((6, 64)).astype(np.float32), 32, None, None) for name in "abc"}
    arrays = (np.eye(64, 2), np.zeros(2), np.array([[0, 1, 0, 0], [0, 0, 0, 1]]), np.zeros(4))
    selector = Selector("c", *(np.asarray(a, np.float32) for a in arrays))
    plan = NestedPlan(layers, (("a", "b"), ("c",)), led=1, selector=selector)
    first, second = read_bytes(plan)
    assert first.tolist() == [2 * (192 + 3 * 12), 192 + 3 * 12] and second.tolist() == [384, 192]
    session = onnxruntime.InferenceSession(ir.to_proto(selector_model(plan)).SerializeToString())
    features = np.zeros((1, 64), np.float32)
    features[0, :2] = 1, -1
    assert session.run(None, {"features": features})[0].tolist() == [1, 0]


def test_a_line_of_the_table() -> None:
    spread = {"median": 2.0, "low": 1.5, "high": 3.0}
    row = {"widths": "static", "perplexity": 33.0, "mean_bits": 6.0, "megabytes": 100.0, "milliseconds": spread}
    row["of_wide"] = spread
    assert line(row) == ["static", "33.000", "6.00", "100.0", "2.00", "1.50 to 3.00", "2.00"]
