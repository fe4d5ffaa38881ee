"""Networks of convolutions on images whose height and width are known only at run time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.tvm

SIZES = [1, 2, 3, 5, 7, 8, 11, 12, 13, 14, 15, 23, 24, 25, 26, 40, 57]


def image(channels: int, height: int, width: int, batch: int = 1) -> np.ndarray:
    random = np.random.default_rng(height * 1000 + width)
    return random.standard_normal((batch, channels, height, width)).astype(np.float32)


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


CONVOLUTIONS: dict[str, tuple[int, int, int, str, int]] = {
    # name: (channels, outputs, kernel, attributes, least size)
    "1x1": (32, 48, 1, "strides = [1, 1]", 1),
    "1x1-stride": (32, 48, 1, "strides = [2, 2]", 1),
    "3x3": (32, 48, 3, "pads = [1, 1, 1, 1]", 1),
    "3x3-wide": (64, 96, 3, "pads = [1, 1, 1, 1]", 1),
    "3x3-stride": (32, 40, 3, "strides = [2, 2], pads = [1, 1, 1, 1]", 1),
    "3x3-stride-3": (16, 16, 3, "strides = [3, 3], pads = [1, 1, 1, 1]", 1),
    "3x3-valid": (32, 80, 3, "strides = [1, 1]", 3),
    "3x3-odd-pads": (16, 24, 3, "strides = [2, 2], pads = [0, 0, 1, 1]", 2),
    "dilated": (16, 16, 3, "dilations = [2, 2], pads = [2, 2, 2, 2]", 1),
    "5x5": (20, 33, 5, "pads = [2, 2, 2, 2]", 1),
    "7x7-stem": (3, 64, 7, "strides = [2, 2], pads = [3, 3, 3, 3]", 1),
    "stem": (3, 24, 3, "strides = [2, 2], pads = [1, 1, 1, 1]", 1),
    "wide-pads": (16, 16, 3, "pads = [5, 4, 3, 6]", 1),
    "padded-beyond": (16, 16, 3, "strides = [2, 2], pads = [70, 3, 80, 90]", 1),
    "deep": (320, 64, 3, "pads = [1, 1, 1, 1]", 1),
    "groups": (64, 64, 3, "group = 2, pads = [1, 1, 1, 1]", 1),
    "depthwise": (40, 40, 3, "group = 40, pads = [1, 1, 1, 1]", 1),
    "depthwise-stride": (40, 40, 3, "group = 40, strides = [2, 2], pads = [1, 1, 1, 1]", 1),
    "depthwise-5x5": (32, 32, 5, "group = 32, pads = [2, 2, 2, 2]", 1),
    "depthwise-dilated": (32, 32, 3, "group = 32, dilations = [3, 3], pads = [3, 3, 3, 3]", 1),
    "depthwise-1x7": (32, 32, 0, "group = 32, kernel_shape = [1, 7], pads = [0, 3, 0, 3]", 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_at_every_size(name: str, compile_model: Callable[..., Any]) -> None:
    """Behind each a bias and an activation, and the sum with an image that is read in the same kernel."""
    channels, outputs, kernel, attributes, least = CONVOLUTIONS[name]
    each = channels // int(attributes.split("group = ")[1].split(",")[0]) if "group" in attributes else channels
    shape = (outputs, each, 1, 7) if kernel == 0 else (outputs, each, kernel, kernel)
    model = compile_model(
        f"g (float[1, {channels}, h, w] x) => (float[1, {outputs}, p, q] y)"
        f" {{ c = Conv <{attributes}> (x, k, b) y = HardSwish (c) }}",
        k=weights(*shape), b=weights(outputs),
    )  # fmt: skip
    assert not model.kernels("conv2d")  # TVM's own loops
    sizes = [s for s in SIZES if s >= least]
    for width in sizes:
        model.check({"x": image(channels, sizes[width % len(sizes)], width)})
    for height in sizes:
        model.check({"x": image(channels, height, 17)})


TRANSPOSED: dict[str, tuple[int, int, int, str]] = {
    # name: (channels, outputs, kernel, attributes)
    "2x2": (24, 24, 2, "strides = [2, 2]"),
    "2x2-narrow": (24, 1, 2, "strides = [2, 2]"),
    "2x2-three": (40, 3, 2, "strides = [2, 2]"),
    "4x4": (16, 32, 4, "strides = [2, 2], pads = [1, 1, 1, 1]"),
    "3x3": (20, 24, 3, "strides = [2, 2], pads = [1, 1, 1, 1], output_padding = [1, 1]"),
    "3x3-odd": (16, 16, 3, "strides = [2, 2], pads = [0, 1, 1, 0]"),
    "3x3-stride-1": (16, 16, 3, "pads = [1, 1, 1, 1]"),
    "stride-3": (16, 8, 2, "strides = [3, 3]"),
    "stride-4": (8, 4, 4, "strides = [4, 4]"),
    "dropped": (16, 4, 2, "strides = [2, 2], pads = [0, 0, 2, 2]"),
    "dilated": (16, 16, 3, "strides = [2, 2], dilations = [2, 2], pads = [2, 2, 2, 2]"),
    "groups": (64, 64, 4, "group = 2, strides = [2, 2], pads = [1, 1, 1, 1]"),
    "depthwise": (32, 32, 4, "group = 32, strides = [2, 2], pads = [1, 1, 1, 1]"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "batch"),
    [*((name, "1") for name in TRANSPOSED), *itertools.product(("2x2-narrow", "3x3", "stride-3"), ("2", "n"))],
)
def test_transposed_convolutions(name: str, batch: str, compile_model: Callable[..., Any]) -> None:
    channels, outputs, kernel, attributes = TRANSPOSED[name]
    groups = int(attributes.split("group = ")[1].split(",")[0]) if "group" in attributes else 1
    model = compile_model(
        f"g (float[{batch}, {channels}, h, w] x) => (float[b2, {outputs}, p, q] y)"
        f" {{ c = ConvTranspose <{attributes}> (x, k, b) y = Sigmoid (c) }}",
        k=weights(channels, outputs // groups, kernel, kernel), b=weights(outputs),
    )  # fmt: skip
    for width in SIZES[2:]:
        for count in (1, 3) if batch == "n" else (int(batch),):
            model.check({"x": image(channels, SIZES[2 + width % 9], width, count)})


@pytest.mark.parametrize("name", ["1x1", "1x1-stride", "3x3", "depthwise"])
def test_empty_images(name: str, compile_model: Callable[..., Any]) -> None:
    channels, outputs, kernel, attributes, _ = CONVOLUTIONS[name]
    model = compile_model(
        f"g (float[1, {channels}, h, w] x) => (float[1, {outputs}, p, q] y) {{ y = Conv <{attributes}> (x, k) }}",
        k=weights(outputs, 1 if "group" in attributes else channels, kernel, kernel),
    )  # fmt: skip
    for height, width in ((0, 7), (7, 0), (0, 0)):
        (found,) = model.run({"x": image(channels, height, width)})
        step = 2 if "strides = [2" in attributes else 1
        assert found.shape == (1, outputs, -(-height // step), -(-width // step))


TOO_SMALL = {
    # name: (what reads the image, its kernel, sizes without a result, sizes that have one)
    "valid": ("Conv", 3, "", [(1, 1), (2, 9), (9, 2)], [(3, 3), (3, 9)]),
    "stride": ("Conv", 2, "strides = [4, 4]", [(40, 1), (1, 1), (40, 0)], [(40, 2), (2, 2)]),
    "dilated": ("Conv", 3, "dilations = [2, 2], pads = [1, 1, 1, 1]", [(2, 9), (1, 1)], [(3, 3)]),
    "pool": ("MaxPool", 3, "strides = [3, 3]", [(2, 2), (2, 9), (0, 3)], [(3, 3), (4, 8)]),
    "mean": ("AveragePool", 4, "strides = [2, 2], pads = [1, 1, 1, 1]", [(1, 9)], [(2, 2)]),
}


@pytest.mark.parametrize("name", TOO_SMALL)
def test_images_smaller_than_the_kernel(name: str, compile_model: Callable[..., Any]) -> None:
    """They are refused before anything is computed, so that the whole model can go to onnxruntime."""
    operator, kernel, attributes, refused, taken = TOO_SMALL[name]
    shape = f", kernel_shape = [{kernel}, {kernel}]" if operator != "Conv" else ""
    attributes = f"<{attributes}{shape}>".replace("<, ", "<").replace("<>", "")
    inputs = "r, k" if operator == "Conv" else "r"
    model = compile_model(
        f"g (float[1, 16, h, w] x) => (float[1, 16, p, q] y) {{ r = Relu (x) c = {operator} {attributes} ({inputs})"
        " y = Sigmoid (c) }", k=weights(16, 16, kernel, kernel),
    )  # fmt: skip
    for height, width in refused:
        with pytest.raises(RuntimeError, match="match_cast"):
            model.run({"x": image(16, height, width)})
    for height, width in taken:
        model.check({"x": image(16, height, width)})


@pytest.mark.parametrize("name", ["nearest", "linear", "cubic"])
def test_nothing_is_made_of_empty_images(name: str, compile_model: Callable[..., Any]) -> None:
    model = compile_model(
        f"g (float[n, 16, h, w] x, float[n, 16, p, q] z) => (float[n, 16, p, q] y) {{ s = Shape (z)"
        f' u = Resize <mode = "{name}"> (x, , , s) y = Relu (u) }}'
    )  # fmt: skip
    model.check({"x": image(16, 3, 4), "z": image(16, 5, 9)})
    for height, width in ((0, 5), (5, 0), (0, 0)):
        with pytest.raises(RuntimeError, match="match_cast"):
            model.run({"x": image(16, height, width), "z": image(16, 9, 4)})
    for height, width in ((0, 9), (5, 0)):
        feeds = {"x": image(16, height and 3, width and 3), "z": image(16, height, width)}
        assert model.run(feeds)[0].shape == (1, 16, height, width)


@pytest.mark.parametrize("columns", [0, 1])
def test_images_of_rows_without_columns(columns: int, compile_model: Callable[..., Any]) -> None:
    model = compile_model(
        "g (float[1, 16, h, w] x) => (float[1, 64, p, q] y) { y = Conv <strides = [3, 3]> (x, k) }",
        k=weights(64, 16, 1, 1),
    )
    (found,) = model.run({"x": image(16, 40, columns)})
    assert found.shape == (1, 64, 14, columns)


def test_the_greatest_of_an_empty_image(compile_model: Callable[..., Any]) -> None:
    model = compile_model("g (float[1, 24, h, w] x) => (float[1, 24, 1, 1] y) { y = GlobalMaxPool (x) }")
    assert (model.run({"x": image(24, 0, 3)})[0] == -np.inf).all()


@pytest.mark.parametrize("target", ["cpu-baseline", "cpu-avx2", "cpu-avx512"])
@pytest.mark.parametrize("name", ["3x3", "3x3-stride", "7x7-stem", "depthwise", "deep"])
def test_vectors_of_every_length(
    name: str, target: str, compile_model: Callable[..., Any], runnable: Callable[[str], Any]
) -> None:
    runnable(target)
    channels, outputs, kernel, attributes, _ = CONVOLUTIONS[name]
    model = compile_model(
        f"g (float[1, {channels}, h, w] x) => (float[1, {outputs}, p, q] y) {{ y = Conv <{attributes}> (x, k) }}",
        target, k=weights(outputs, 1 if "group" in attributes else channels, kernel, kernel),
    )  # fmt: skip
    for height, width in ((1, 1), (9, 13), (26, 31)):
        model.check({"x": image(channels, height, width)})


POOLS = {
    "max": "y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (r)",
    "max-valid": "y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)",
    "max-dilated": "y = MaxPool <kernel_shape = [3, 3], dilations = [2, 2], pads = [2, 2, 2, 2]> (r)",
    "mean": "y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r)",
    "mean-with-pads": "y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (r)",
    "mean-wide": "y = AveragePool <kernel_shape = [5, 3], strides = [1, 3], pads = [2, 1, 2, 1]> (r)",
    "global-mean": "y = GlobalAveragePool (r)",
    "global-max": "y = GlobalMaxPool (r)",
    "reduce": "y = ReduceMean <keepdims = 0> (r, axes)",
    "upsample": 'y = Resize <mode = "nearest", nearest_mode = "floor", coordinate_transformation_mode = "asymmetric">'
    " (r, , scales)",
    "linear": 'y = Resize <mode = "linear", coordinate_transformation_mode = "MODE"> (r, , scales)',
    "linear-few": 'd = Conv (r, g3) y = Resize <mode = "linear"> (d, , scales)',
    "cubic": 'y = Resize <mode = "cubic", exclude_outside = 1, cubic_coeff_a = -0.5> (r, , scales)',
    "cubic-to-one": 'h = MaxPool <kernel_shape = [2, 2], strides = [99, 99], pads = [1, 1, 1, 1]> (r) o = Shape (h)'
    ' y = Resize <mode = "cubic", coordinate_transformation_mode = "pytorch_half_pixel"> (r, , , o)',
    "corners": 'd = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r) z = Shape (r)'
    ' y = Resize <mode = "linear", coordinate_transformation_mode = "asymmetric"> (d, , , z)',
    "as-large-as": 'd = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r) z = Shape (r)'
    ' u = Resize <mode = "linear"> (d, , , z) y = Add (u, r)',
    "gate": "m = GlobalAveragePool (r) s = Conv (m, g) t = HardSigmoid (s) y = Mul (r, t)",
    "concat": "d = Conv <pads = [1, 1, 1, 1]> (r, k2) y = Concat <axis = 1> (r, d, r)",
    "transposed": "d = ConvTranspose <strides = [2, 2]> (r, k4) y = Concat <axis = 1> (d, d)",
    "residual": "d = Conv <pads = [1, 1, 1, 1]> (r, k3) y = Add (d, r)",
    "ramp": "h = Shape <start = 2, end = 3> (r) n = Cast <to = 1> (h) d = Div (r, n) y = Conv (d, g)",
}


TRANSFORMS = ("align_corners", "asymmetric", "half_pixel", "pytorch_half_pixel", "half_pixel_symmetric")
POOLS |= {f"linear-{mode}": POOLS["linear"].replace("MODE", mode) for mode in TRANSFORMS}
del POOLS["linear"]


@pytest.mark.parametrize("batch", ["1", "2", "n"])
@pytest.mark.parametrize("name", POOLS)
def test_what_stands_between_convolutions(name: str, batch: str, compile_model: Callable[..., Any]) -> None:
    dims = "r2, c2" if name == "reduce" else "b2, c2, p, q"
    model = compile_model(
        f"g (float[{batch}, 24, h, w] x) => (float[{dims}] y) {{ c = Conv (x, k) r = Relu (c) {POOLS[name]} }}",
        k=weights(40, 24, 1, 1), g=weights(40, 40, 1, 1), k2=weights(20, 40, 3, 3), k3=weights(40, 40, 3, 3),
        k4=weights(40, 24, 2, 2), g3=weights(3, 40, 1, 1),
        axes=np.array([2, 3]), scales=np.array([1, 1, 3, 2], np.float32),
    )  # fmt: skip
    for height, width in ((3, 2), (5, 9), (16, 16), (21, 34)):
        for count in (1, 3) if batch == "n" else (int(batch),):
            model.check({"x": image(24, height, width, count)})


def test_images_of_equal_size_stay_in_blocks(compile_model: Callable[..., Any]) -> None:
    """Halved and doubled: that the sizes are those of the other image is known only when it runs."""
    model = compile_model(
        """g (float[1, 24, h, w] x) => (float[1, 40, p, q] y) { c = Conv (x, k)
            d = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c) u = ConvTranspose <strides = [2, 2]> (d, t)
            s = Concat <axis = 1> (c, u) y = Conv (s, k2) }""",
        k=weights(40, 24, 1, 1), t=weights(40, 24, 2, 2), k2=weights(40, 64, 1, 1),
    )  # fmt: skip
    assert sorted(model.kernels("pack")) == ["pack", "unpack"]
    for height, width in ((2, 2), (6, 14), (40, 26)):
        model.check({"x": image(24, height, width)})
    with pytest.raises(RuntimeError, match="match_cast"):
        model.run({"x": image(24, 7, 8)})


def compiled_whole(text: str, constants: dict[str, np.ndarray], folder: Path) -> tuple[Any, Any]:
    """A session of the artifact of a network whose every node is compiled, and onnxruntime's of the model."""
    import onnx_ir as ir
    from graphwright.runtime.build import build
    from graphwright.runtime.reference import Reference
    from graphwright.runtime.session import Session
    from graphwright.runtime.target import Target
    from onnx import numpy_helper, parser, shape_inference

    proto = parser.parse_model(text)
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    model = ir.from_proto(shape_inference.infer_shapes(proto))
    artifact = build(model, Target.named("cpu"), folder)
    assert {region.runtime for region in artifact.manifest.regions} == {"tvm"}
    return Session(artifact, threads=2), Reference(model, threads=1)


def test_a_detector(tmp_path: Path) -> None:
    """Halves of channels, doubled images, and a head that lays images of two sizes behind each other: the parts that a
    detector has between its convolutions and behind them."""
    text = """<ir_version: 8, opset_import: ["": 17]>
      g (float[n, 3, h, w] x) => (float[n, a, 20] y) {
        s = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, stem) r = Relu (s)
        p, q = Split <axis = 1> (r, halves) t = Conv <pads = [1, 1, 1, 1]> (q, mid) z = Concat <axis = 1> (p, q, t)
        d = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (z, down)
        u = Resize <mode = "nearest", nearest_mode = "floor", coordinate_transformation_mode = "asymmetric"> (d, , two)
        e = Concat <axis = 1> (u, z) f = Conv (e, fine) g = Conv (d, coarse)
        fv = Reshape (f, flat) gv = Reshape (g, flat) v = Concat <axis = 2> (fv, gv)
        box, class = Split <axis = 1> (v, parts) bins = Reshape (box, apart) soft = Softmax <axis = 1> (bins)
        tops = ReduceMax <axes = [1], keepdims = 0> (soft) c = Sigmoid (class) m = Concat <axis = 1> (tops, c)
        y = Transpose <perm = [0, 2, 1]> (m) }"""
    made = {
        "stem": (32, 3, 3, 3), "mid": (16, 16, 3, 3), "down": (32, 48, 3, 3), "fine": (48, 80, 1, 1),
        "coarse": (48, 32, 1, 1),
    }  # fmt: skip
    constants = {
        "halves": np.array([16, 16]), "two": np.array([1, 1, 2, 2], np.float32), "flat": np.array([0, 0, -1]),
        "parts": np.array([32, 16]), "apart": np.array([0, 8, 4, -1]), **{n: weights(*s) / 8 for n, s in made.items()},
    }  # fmt: skip
    session, reference = compiled_whole(text, constants, tmp_path / "artifact")
    for height, width, batch in ((64, 64, 1), (96, 32, 2), (4, 8, 1), (224, 160, 1)):
        feeds = {"x": image(3, height, width, batch)}
        np.testing.assert_allclose(session.run(None, feeds)[0], reference.run(feeds)["y"], rtol=0, atol=1e-5)
    # What other sizes have no result for, onnxruntime decides.
    with pytest.raises(Exception, match="refused these inputs"):
        session.run(None, {"x": image(3, 61, 64)})


@pytest.mark.parametrize("dense", [False, True])
def test_every_place_of_a_network_has_its_kernel(dense: bool, tmp_path: Path) -> None:
    """Whole artifacts: small networks, of the mobile kind and with much of dense kernels."""
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[n, 3, h, w] x) => (float[n, c] y) {
        a = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, stem) b = HardSwish (a)
        d = Conv <pads = [PAD, PAD, PAD, PAD]> (b, wide) e = Relu (d)
        f = Conv <group = 64, strides = [2, 2], pads = [2, 2, 2, 2]> (e, each) r = Relu (f)
        m = GlobalAveragePool (r) s = Conv (m, gate) t = HardSigmoid (s) u = Mul (r, t)
        v = Conv (u, narrow) z = Concat <axis = 1> (v, f) q = GlobalAveragePool (z) y = Flatten (q) }"""
    made = {
        "stem": (16, 3, 3, 3), "wide": (64, 16, *((3, 3) if dense else (1, 1))), "each": (64, 1, 5, 5),
        "gate": (64, 64, 1, 1), "narrow": (24, 64, 1, 1),
    }  # fmt: skip
    constants = {name: weights(*shape) / 8 for name, shape in made.items()}
    session, reference = compiled_whole(text.replace("PAD", "1" if dense else "0"), constants, tmp_path / "artifact")
    for height, width, batch in ((32, 32, 1), (57, 40, 2), (7, 9, 1), (224, 160, 1)):
        feeds = {"x": image(3, height, width, batch)}
        np.testing.assert_allclose(session.run(None, feeds)[0], reference.run(feeds)["y"], rtol=0, atol=1e-5)
