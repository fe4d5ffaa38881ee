"""Convolutions along an axis of free length, against onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest

from .test_importer import compiled, draw, parse, same

pytestmark = pytest.mark.tvm


@pytest.mark.parametrize(
    "channels, outputs, taps, more, lengths",
    [
        (16, 24, 1, "strides=[1]", (20, 1)),
        (16, 16, 1, "strides=[3]", (20, 1)),
        (16, 24, 3, "pads=[1, 1]", (1, 2, 33)),
        (5, 7, 4, "strides=[2], pads=[1, 2]", (1, 2, 9)),
        (3, 17, 5, "dilations=[2], pads=[0, 8]", (1, 20)),
        (1, 40, 10, "strides=[5]", (10, 14, 15)),
        (4, 4, 3, 'auto_pad="SAME_UPPER"', (1, 8)),
        (7, 7, 31, "group=7, pads=[15, 15]", (1, 40)),
        (10, 10, 3, "group=10, strides=[2], dilations=[2]", (5, 12)),
    ],
)
def test_a_convolution_of_free_length(
    channels: int, outputs: int, taps: int, more: str, lengths: tuple[int, ...]
) -> None:
    groups = channels if "group" in more else 1
    model = parse(
        f"""<ir_version: 9, opset_import: ["": 18]> g (float[b, {channels}, n] x) => (float[b, {outputs}, m] y)
        {{ y = Conv <{more}> (x, w, bias) }}""",
        w=draw(outputs, channels // groups, taps) / np.float32(np.sqrt(taps * channels / groups)), bias=draw(outputs),
    )  # fmt: skip
    same(model, *({"x": draw(batch, channels, length)} for batch, length in enumerate(lengths, 1)))


def test_an_input_shorter_than_the_kernel_is_refused() -> None:
    model = parse("""<ir_version: 9, opset_import: ["": 18]> g (float[b, 3, n] x) => (float[b, 4, m] y)
        { y = Conv (x, w) }""", w=draw(4, 3, 5))  # fmt: skip
    run = compiled(model)
    assert run({"x": draw(1, 3, 5)})[0].shape == (1, 4, 1)
    with pytest.raises(Exception, match="match_cast error"):
        run({"x": draw(1, 3, 2)})
