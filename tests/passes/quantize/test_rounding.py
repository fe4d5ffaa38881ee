"""Weights that are rounded together: the products that it takes, and errors that get smaller."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphwright.passes.quantize.layers import Layer, find_layers
from graphwright.passes.quantize.narrow_sums import lanes as lanes_of
from graphwright.passes.quantize.rounding import FEW_INPUTS, can_be_rounded, fit_together, products, round_together
from graphwright.passes.quantize.scales import fit_weights, weight_grid
from onnx import numpy_helper, parser


def layer_of(text: str, data: tuple[int, ...], weight: tuple[int, ...]) -> tuple[Layer, np.ndarray, np.ndarray]:
    """The layer `text` writes, reading x and w, with random arrays for both."""
    random = np.random.default_rng(0)
    x, w = (random.standard_normal(shape).astype(np.float32) for shape in (data, weight))
    shape = ",".join(map(str, data))
    proto = parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 20]> g (float[{shape}] x) => (float y) {{ y = {text} }}'
    )
    proto.graph.initializer.append(numpy_helper.from_array(w, "w"))
    (layer,), _ = find_layers(ir.from_proto(proto))
    return layer, x, w


@pytest.mark.parametrize(
    ("text", "data", "weight"),
    [
        ("MatMul (x, w)", (2, 5, 6), (6, 4)),
        ("Gemm <transB = 1> (x, w)", (5, 6), (4, 6)),
        ("Conv (x, w)", (2, 3, 5, 6), (4, 3, 1, 1)),
        ("Conv <strides = [2, 1], pads = [1, 0, 2, 1], dilations = [1, 2]> (x, w)", (2, 3, 8, 9), (4, 3, 3, 2)),
        ("Conv <group = 3, pads = [1, 1, 1, 1]> (x, w)", (2, 3, 5, 6), (6, 1, 3, 3)),
    ],
)
def test_the_products_tell_the_error_of_the_results(text: str, data: tuple[int, ...], weight: tuple[int, ...]) -> None:
    """With the weights themselves as what was lost, the error is the results' sum of squares."""
    import onnxruntime
    from onnx import TensorProto, helper

    layer, x, w = layer_of(text, data, weight)
    assert can_be_rounded(layer)
    gram, matrix = products(layer, x).astype(np.float64), layer.matrix(w).astype(np.float64)
    found = np.einsum("gri,gij,grj->gr", matrix.reshape(len(gram), -1, matrix.shape[1]), gram,
                      matrix.reshape(len(gram), -1, matrix.shape[1])).reshape(-1)  # fmt: skip
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xwy"]
    node = ir.to_proto(layer.node)
    model = helper.make_model(
        helper.make_graph([node], "g", values[:2], values[2:]), opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y = session.run(None, {"x": x, "w": w})[0].astype(np.float64)
    axis = y.ndim - 1 if layer.is_product else 1
    np.testing.assert_allclose(found, np.square(np.moveaxis(y, axis, 0)).reshape(y.shape[axis], -1).sum(1), rtol=1e-4)


@pytest.mark.parametrize(
    "text", ["ConvTranspose (x, w)", "Conv <auto_pad = \"SAME_UPPER\"> (x, w)", "Conv <group = 2> (x, w)"]
)  # fmt: skip
def test_operators_whose_windows_it_does_not_read(text: str) -> None:
    channels = 2 if "group" in text else 4
    layer, _, _ = layer_of(text, (1, 4, 5, 5), (4, channels, 3, 3))
    assert not can_be_rounded(layer)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [0, 8])
@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_that_belong_together_get_smaller_errors(bits: int, block: int, groups: int, symmetric: bool) -> None:
    random = np.random.default_rng(1)
    inputs = 150 if groups == 1 else 18  # more than are made up for at once
    weights = random.standard_normal((10, inputs)).astype(np.float32)
    rows = random.standard_normal((groups, 400, 6)) @ random.standard_normal((groups, 6, inputs))
    rows = (rows + 0.1 * random.standard_normal(rows.shape)).astype(np.float32)
    gram = np.matmul(rows.swapaxes(1, 2), rows)
    grid = weight_grid(bits, symmetric)
    nearest = fit_weights(weights, grid, block)
    together = round_together(weights, nearest, grid, gram)

    def errors(values: np.ndarray) -> np.ndarray:
        lost = (weights - values).reshape(groups, -1, inputs)
        return np.square(np.matmul(rows, lost.swapaxes(1, 2))).sum(1).reshape(-1)

    before, after = errors(nearest.values), errors(together.values)
    assert (after <= before * 1.001).all() and after.sum() < 0.5 * before.sum()
    assert together.codes.dtype == nearest.codes.dtype and (together.scale == nearest.scale).all()
    assert together.codes.min() >= grid.low and together.codes.max() <= grid.high


@pytest.mark.parametrize("inputs", [127, 128, 129])
def test_inputs_that_are_always_zero_and_edges_of_blocks(inputs: int) -> None:
    random = np.random.default_rng(2)
    weights = random.standard_normal((3, inputs)).astype(np.float32)
    rows = random.standard_normal((1, 50, inputs)).astype(np.float32)  # fewer than inputs: X'X has no inverse
    rows[..., ::7] = 0
    codes = fit_weights(weights, weight_grid(4))
    found = round_together(weights, codes, weight_grid(4), np.matmul(rows.swapaxes(1, 2), rows))
    lost = [np.square(rows[0] @ (weights - one.values).T).sum() for one in (codes, found)]
    assert lost[1] < lost[0] and np.isfinite(found.values).all()
    nothing = round_together(weights, codes, weight_grid(4), np.zeros((1, inputs, inputs), np.float32))
    assert nothing is codes


def errors_of(lost: np.ndarray, gram: np.ndarray) -> np.ndarray:
    grouped = lost.astype(np.float64).reshape(len(gram), -1, lost.shape[-1])
    return np.einsum("gri,gij,grj->gr", grouped, gram.astype(np.float64), grouped).reshape(-1)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize(("groups", "inputs"), [(40, 9), (1, 27), (1, FEW_INPUTS)])
def test_rows_of_few_inputs_choose_the_scale_that_rounds_best(groups: int, inputs: int, held: bool) -> None:
    """Of windows of smooth images, in which neighbours are nearly equal."""
    random = np.random.default_rng(2)
    weights = random.standard_normal((40, inputs)).astype(np.float32)
    rows = np.cumsum(random.standard_normal((groups, 500, inputs)), -1).astype(np.float32)
    gram = np.matmul(rows.swapaxes(1, 2), rows)
    grid, lanes = weight_grid(8), lanes_of(inputs) if held else None
    start = fit_weights(weights, grid, lanes=lanes)
    least = np.full(40, start.scale[3, 0] * np.float32(1.05))
    before, after = (f(weights, start, grid, gram, lanes) for f in (round_together, fit_together))
    worse, better = (errors_of(weights - codes.values, gram) for codes in (before, after))
    assert (better <= 1.0001 * worse).all()
    assert better.mean() < (0.7 if inputs == 9 else 0.95) * worse.mean()
    assert not held or lanes is None or lanes.fits(after.codes)
    assert after.codes.dtype == np.int8 and np.abs(after.codes.astype(int)).max() <= 127
    limited = fit_together(weights, start, grid, gram, lanes, least)
    raised = limited.scale[:, 0] != start.scale[:, 0]
    assert raised.any() and (limited.scale[raised, 0] >= least[raised]).all()


def test_scales_of_many_inputs_and_of_blocks_stay() -> None:
    random = np.random.default_rng(3)
    for inputs, block in ((FEW_INPUTS + 1, 0), (32, 8)):
        weights = random.standard_normal((6, inputs)).astype(np.float32)
        rows = random.standard_normal((1, 300, inputs)).astype(np.float32)
        start = fit_weights(weights, weight_grid(8), block)
        found = fit_together(weights, start, weight_grid(8), np.matmul(rows.swapaxes(1, 2), rows))
        np.testing.assert_array_equal(found.scale, start.scale)
