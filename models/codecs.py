"""Image codecs as folders that `runtime.codec` runs, and the photos that they learn from and are judged on.

torch is imported when a codec is exported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graphwright.passes.errors import UsageError

from . import datasets

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import onnx_ir as ir
    import torch
    from numpy.typing import NDArray

QUALITIES = 4
PARTS = ("analysis", "hyper-analysis", "hyper-synthesis", "synthesis")
HELD_OUT = ("chelsea", "coffee", "rocket")
SHRINKS = (1.0, 0.7, 0.5)  # of photos, which show sharper edges that way
# Weights of the distortion of each quality: of the mean squared error of bytes, in bits a pixel.
DISTORTIONS = (0.0016, 0.005, 0.015, 0.045)
LATENTS, HYPER = 128, 32  # channels of y and z
STRIDE, HYPER_STRIDE = 16, 64  # pixels of the image for one place of y and of z
RESULTS = {
    "analysis": "latents", "hyper-analysis": "hyper_latents", "hyper-synthesis": "places", "synthesis": "image",
}  # fmt: skip


def photos() -> list[NDArray[np.uint8]]:
    """Those to learn from and to calibrate with, (height, width, 3), each at several sizes."""
    import numpy as np
    from PIL import Image

    found = []
    for name in datasets.photo_names():
        if name in HELD_OUT:
            continue
        photo = Image.fromarray(datasets.photo(name))
        for shrink in SHRINKS:
            size = (round(photo.width * shrink), round(photo.height * shrink))
            found.append(np.asarray(photo.resize(size, Image.Resampling.LANCZOS)))
    return found


def check_quality(quality: int) -> None:
    if not 1 <= quality <= QUALITIES:
        raise UsageError(f"quality is {quality}, expected 1 (smallest) to {QUALITIES} (best)")


def module(part: str, quality: int = 3) -> torch.nn.Module:
    """One network of the hyperprior codec."""
    from . import hyperprior

    check_quality(quality)
    return hyperprior.Part(hyperprior.load(), part, quality - 1)


def build(part: str, quality: int = 3) -> ir.Model:
    """The same as ONNX, for any number of images of any size."""
    import torch

    from . import export

    name, (batch, channels, height, width) = input_of(part)
    side = HYPER_STRIDE if part == "analysis" else HYPER_STRIDE // STRIDE
    example = (torch.zeros((2, channels, 2 * side, 3 * side)),)
    return export.from_torch(
        f"hyperprior-{part}", module(part, quality), example, {name: (batch, channels, height, width)},
        (RESULTS[part],),
    )  # fmt: skip


def input_of(part: str) -> tuple[str, tuple[str, int, str, str]]:
    """Name and shape of a network's input."""
    if part == "analysis":
        return "image", ("batch", 3, "height", "width")
    if part == "hyper-synthesis":
        return "hyper_symbols", ("batch", HYPER, "rows", "columns")
    return "symbols", ("batch", LATENTS, "rows", "columns")


def sample(part: str, random: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, NDArray[np.float32]]:
    """What a network is given for crops of photos."""
    import numpy as np
    import torch

    from . import hyperprior

    scale = {"analysis": 1, "hyper-synthesis": HYPER_STRIDE}.get(part, STRIDE)
    names = ("height", "width") if part == "analysis" else ("rows", "columns")
    size = [sizes[name] * scale for name in names]
    rounded_up = [-(-side // HYPER_STRIDE) * HYPER_STRIDE for side in size]
    crops = []
    for _ in range(sizes["batch"]):
        photo = datasets.photo(HELD_OUT[int(random.integers(len(HELD_OUT)))])
        whole = np.tile(photo, [-(-side // have) for side, have in zip(rounded_up, photo.shape, strict=False)] + [1])
        top, left = (
            int(random.integers(0, have - side + 1)) for have, side in zip(whole.shape, rounded_up, strict=False)
        )
        crops.append(whole[top : top + rounded_up[0], left : left + rounded_up[1]].transpose(2, 0, 1))
    values = {"image": torch.from_numpy(np.stack(crops).astype(np.float32))}
    with torch.inference_mode():
        model, largest = hyperprior.load(), hyperprior.LARGEST_SYMBOL
        values["symbols"] = model.latents(values["image"], 2).round().clamp(-largest, largest)
        values["hyper_symbols"] = model.hyper_latents(values["symbols"], 2).round().clamp(-largest, largest)
    name = input_of(part)[0]
    height, width = (sizes[word] for word in names)
    return {name: np.ascontiguousarray(values[name].numpy()[:, :, :height, :width])}


def probabilities(quality: int) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """Standard deviations of y that the hyper-synthesis chooses from, how likely each symbol of z is in each channel
    (channels, symbols), and the largest symbol."""
    from . import hyperprior

    check_quality(quality)
    return hyperprior.scales(), hyperprior.prior(hyperprior.load(), quality - 1), hyperprior.LARGEST_SYMBOL


def description(quality: int) -> dict[str, Any]:
    """What codec.json says of it."""
    return {
        "name": f"hyperprior-{quality}", "latents": LATENTS, "hyper": HYPER, "stride": STRIDE,
        "hyper_stride": HYPER_STRIDE,
    }  # fmt: skip
