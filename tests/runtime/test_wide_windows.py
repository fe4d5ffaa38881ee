"""Means over windows that are larger than the image, against onnxruntime."""

from __future__ import annotations

import pytest

from .test_importer import draw, parse, same

pytestmark = pytest.mark.tvm


@pytest.mark.parametrize(
    "attributes",
    [
        # The last pooling of EfficientNet in some exports.
        "kernel_shape=[640, 641], strides=[640, 641], ceil_mode=1, count_include_pad=1",
        "kernel_shape=[9, 3], strides=[1, 2], pads=[3, 0, 3, 1], ceil_mode=1",
    ],
)
def test_what_lies_behind_the_image_takes_no_time(attributes: str) -> None:
    model = parse(f"""<ir_version: 9, opset_import: ["": 18]> g (float[n, 6, 5, 4] x) => (float[n, 6, a, b] y)
        {{ y = AveragePool <{attributes}> (x) }}""")
    same(model, {"x": draw(2, 6, 5, 4)})
