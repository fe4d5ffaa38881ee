"""Choosing among boxes, against onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest

from .test_importer import parse, same

pytestmark = pytest.mark.tvm

BOXES = """<ir_version: 9, opset_import: ["": 18]> g (float[b, n, 4] box, float[b, c, n] score, int64 most)
    => (int64[k, 3] y) { y = NonMaxSuppression <center_point_box = CENTRE> (box, score, most, overlap, floor) }"""


@pytest.mark.parametrize("centre", [0, 1])
def test_boxes_are_kept_by_score_and_by_place_among_equals(centre: int) -> None:
    model = parse(BOXES.replace("CENTRE", str(centre)), overlap=np.float32([0.4]), floor=np.float32([0.2]))
    generator = np.random.default_rng(centre)
    runs = []
    for batch, count, classes, most in ((1, 40, 2, 9), (2, 33, 3, 100), (2, 1, 1, 5), (1, 7, 2, 0)):
        corners, far = generator.random((batch, count, 2)), generator.random((batch, count, 2)) * 0.4
        box = np.concatenate([corners, far if centre else corners + far * generator.choice([-1, 1], far.shape)], -1)
        score = np.round(generator.random((batch, classes, count)) * 10) / 10  # many are equal
        runs.append({"box": box.astype(np.float32), "score": score.astype(np.float32), "most": np.array(most)})
    same(model, *runs)


def test_many_boxes_of_which_few_are_kept_are_not_compared_with_each_other() -> None:
    """Comparing every pair of a detector's boxes for every class would take seconds."""
    text = BOXES.replace("b, n, 4", "1, 8400, 4").replace("b, c, n", "1, 20, 8400").replace(", int64 most", "")
    model = parse(text.replace("CENTRE", "0"), overlap=np.float32([0.5]), floor=np.float32([0.99]), most=np.array([50]))
    generator = np.random.default_rng(0)
    corners = generator.random((1, 8400, 2)).astype(np.float32)
    score = generator.random((1, 20, 8400)).astype(np.float32)
    same(model, {"box": np.concatenate([corners, corners + 0.1], -1), "score": score})
