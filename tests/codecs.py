"""A codec of four convolutions with seeded weights, as a folder: what codes images can be tested without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
from graphwright.runtime import entropy
from graphwright.runtime.codec_folder import TABLES, write_description

LATENTS, HYPER, LARGEST = 6, 4, 40
SCALES = np.geomspace(0.2, 12, 16)
# Part -> (input, output, channels in, out, kernel = stride, factor of the image that is made behind it)
PARTS = {
    "analysis": ("image", "latents", 3, LATENTS, 16, 1),
    "hyper-analysis": ("symbols", "hyper_latents", LATENTS, HYPER, 4, 1),
    "hyper-synthesis": ("hyper_symbols", "places", HYPER, LATENTS, 1, 4),
    "synthesis": ("symbols", "image", LATENTS, 3, 1, 16),
}


def network(part: str, random: np.random.Generator) -> onnx.ModelProto:
    given, result, inputs, outputs, kernel, factor = PARTS[part]
    weight = random.standard_normal((outputs * factor**2, inputs, kernel, kernel)) / np.sqrt(inputs * kernel**2)
    bias = random.standard_normal(outputs * factor**2)
    if part == "analysis":
        weight, bias = weight / 6, bias * 0
    elif part == "hyper-synthesis":
        bias = bias + 6
    elif part == "synthesis":
        weight, bias = weight * 40, bias + 120
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    {part.replace("-", "_")} (float[1,{inputs},h,w] {given}) => (float[1,{outputs},H,W] {result}) {{
        x = Conv<kernel_shape = [{kernel},{kernel}], strides = [{kernel},{kernel}]>({given}, weight, bias)
        {result} = {"Identity(x)" if factor == 1 else f'DepthToSpace<blocksize = {factor}, mode = "CRD">(x)'}
    }}"""
    model = onnx.parser.parse_model(text)
    arrays = {"weight": weight, "bias": bias}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items())
    return model


def write_tiny_codec(root: Path, seed: int = 3) -> Path:
    """A codec folder in ONNX form, at `root`."""
    random = np.random.default_rng(seed)
    root.mkdir(parents=True)
    for part in PARTS:
        onnx.save(network(part, random), root / f"{part}.onnx")
    prior = entropy.gaussian_frequencies(np.full(HYPER, 4.0), LARGEST)
    np.savez(root / TABLES, y=entropy.gaussian_frequencies(SCALES, LARGEST), z=prior)
    about = {"name": "tiny", "latents": LATENTS, "hyper": HYPER, "stride": 16, "hyper_stride": 64}
    write_description(root, about)
    return root


def picture(height: int, width: int, seed: int = 5) -> np.ndarray:
    """Waves and some noise, uint8 (height, width, 3)."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin(rows / a + columns / b) for a, b in ((9, 17), (23, 8), (40, 31))]
    noisy = np.stack(waves, -1) + random.normal(0, 8, (height, width, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)
