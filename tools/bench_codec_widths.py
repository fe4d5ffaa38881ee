"""What widths that follow the image could gain an image codec over widths that are chosen once.

    python -m graphwright.tools.bench_codec_widths [--folder codec] [--quality N] [--bits M] [--json FILE]

The hyperprior codec is quantized to 8 bits, and each convolution of analysis and synthesis reads all of its codes or
the leading 6 or 4 bits. What a narrower layer costs an image, in rate + weight x squared error of real streams, is
measured layer by layer: on crops of photos that the codec learned from, and on the photos that are held out. Widths
chosen once have the least sum of costs on the crops; widths that follow the image the least sum on that very image,
with the same mean: what a selector would choose that knew the costs. Both are then coded as they are. A selector's own
time is that of pooling the first layer's result to 5 x 5 places and of two products, compiled; the convolutions take
the same time at every width, since all compute with bytes. Streams that were coded are not coded again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench_codec import decibels
from .turns import print_row

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Images = Mapping[str, NDArray[np.uint8]]

PARTS = ("analysis", "synthesis")
FULL, WIDTHS = 8, (4, 6, 8)
CROPS, SIDE, SEED = 12, 256, 1  # squares that widths are chosen once by
PLACES, HIDDEN = 5, 32  # of the selector
HEADER = ["widths", "mean bits", "kB of weights", "bits a pixel", "dB", "rate + weight x error", "ms"]

Widths = tuple[int, ...]  # of the layers in their order


@dataclass(frozen=True)
class Layer:
    """A convolution of one of the networks. codes: the name of its constant."""

    part: str
    codes: str
    size: int


def layers_of(root: Path) -> list[Layer]:
    """The convolutions of analysis and synthesis whose weights are codes."""
    from graphwright.passes import graph, io

    found = []
    for part in PARTS:
        for node in io.load(root / f"{part}.onnx").graph:
            source = node.inputs[1].producer() if node.op_type == "Conv" and node.inputs[1] is not None else None
            tensor = graph.constant_tensor(source.inputs[0]) if source is not None else None
            if source is not None and tensor is not None:
                assert source.inputs[0] is not None
                found.append(Layer(part, source.inputs[0].name or "", tensor.size))
    return found


def leading(codes: NDArray[np.int8], bits: int) -> NDArray[np.int8]:
    """The codes with their leading bits alone, rounded to the nearest."""
    import numpy as np

    step = 1 << (FULL - bits)
    most = (1 << (bits - 1)) - 1
    return (np.clip(np.rint(codes / step), -most, most) * step).astype(np.int8)


def narrowed(root: Path, out: Path, layers: Sequence[Layer], widths: Widths) -> Path:
    """The codec with these widths, as a folder."""
    import numpy as np
    import onnx_ir as ir
    from graphwright.passes import io

    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(root, out)
    for part in PARTS:
        model = io.load(root / f"{part}.onnx")
        for layer, bits in zip(layers, widths, strict=True):
            if layer.part == part and bits < FULL:
                value = model.graph.initializers[layer.codes]
                assert value.const_value is not None
                codes = leading(np.asarray(value.const_value.numpy(), np.int8), bits)
                value.const_value = ir.tensor(codes, name=layer.codes)
        io.save(model, out / f"{part}.onnx", overwrite=True)
    return out


@dataclass
class Coder:
    """Codes images with any widths and keeps the figures. weight: of the squared error of bytes, in bits a pixel."""

    root: Path
    folder: Path
    layers: Sequence[Layer]
    weight: float
    threads: int | None
    figures: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def kept(self) -> Path:
        return self.folder / f"{self.root.name}.widths.json"

    def coded(self, widths: Widths, images: Images) -> dict[str, dict[str, float]]:
        """Rate, dB and cost of each image."""
        from graphwright.runtime.codec import Codec

        keys = {name: f"{'-'.join(map(str, widths))} {name}" for name in images}
        if not all(key in self.figures for key in keys.values()):
            made = narrowed(self.root, self.folder / f"{self.root.name}.narrowed", self.layers, widths)
            codec = Codec(made, threads=self.threads)
            for name, image in images.items():
                stream = codec.encode(image)
                rate = 8 * len(stream) / (image.shape[0] * image.shape[1])
                quality = decibels(image, codec.decode(stream))
                cost = rate + self.weight * 255**2 / 10 ** (quality / 10)
                self.figures[keys[name]] = {"rate": rate, "dB": quality, "cost": cost}
            self.kept.write_text(json.dumps(self.figures, indent=1) + "\n")
        return {name: self.figures[key] for name, key in keys.items()}

    def damages(self, images: Images) -> dict[str, list[dict[int, float]]]:
        """Image -> of each layer, what each width of it alone adds to the cost."""
        count = len(self.layers)
        full = self.coded((FULL,) * count, images)
        found: dict[str, list[dict[int, float]]] = {name: [{FULL: 0.0} for _ in range(count)] for name in images}
        for number, bits in itertools.product(range(count), WIDTHS[:-1]):
            widths = tuple(bits if n == number else FULL for n in range(count))
            for name, figures in self.coded(widths, images).items():
                found[name][number][bits] = figures["cost"] - full[name]["cost"]
        return found

    def mean_bits(self, widths: Widths) -> float:
        total = sum(layer.size for layer in self.layers)
        return sum(bits * layer.size for bits, layer in zip(widths, self.layers, strict=True)) / total


def choose(tables: Sequence[Sequence[Mapping[int, float]]], sizes: Sequence[int], mean: float) -> list[Widths]:
    """Widths for each table of damages, layer by layer, with the least sum of damages and of widths at most the mean,
    weighted by `sizes`. Every width has a price, the same for all, that is bisected until the mean is met."""
    total = sum(sizes) * len(tables)

    def at(price: float) -> list[Widths]:
        return [
            tuple(
                min(WIDTHS, key=lambda bits: table[bits] + price * bits * size / sum(sizes))
                for table, size in zip(layers, sizes, strict=True)
            )
            for layers in tables
        ]

    def bits(chosen: Sequence[Widths]) -> float:
        return sum(b * size for widths in chosen for b, size in zip(widths, sizes, strict=True)) / total

    low, high = 0.0, 1e6
    if bits(at(low)) <= mean:
        return at(low)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if bits(at(middle)) <= mean else (middle, high)
    return at(high)


def summed(tables: Sequence[Sequence[Mapping[int, float]]]) -> list[dict[int, float]]:
    """The mean of several tables of damages."""
    return [
        {bits: sum(table[number][bits] for table in tables) / len(tables) for bits in WIDTHS}
        for number in range(len(tables[0]))
    ]


def selector(channels: int, layers: int, shape: Sequence[int]) -> Any:
    """A network (1, channels, rows, columns) -> a width for each layer, by its number in WIDTHS."""
    import numpy as np
    import onnx_ir as ir
    from onnx import numpy_helper, parser

    rows, columns = (-(-side // PLACES) for side in shape[2:])
    pads = [(rows * PLACES - shape[2]), (columns * PLACES - shape[3])]
    text = f"""<ir_version: 10, opset_import: ["" : 20]> selector
        (float[{",".join(map(str, shape))}] x) => (int64[1, {layers}] widths)
    {{
        pooled = AveragePool <kernel_shape = [{rows}, {columns}], strides = [{rows}, {columns}],
                              pads = [0, 0, {pads[0]}, {pads[1]}]> (x)
        flat = Flatten (pooled) first = Gemm (flat, w1, b1) hidden = Relu (first) scores = Gemm (hidden, w2, b2)
        apart = Reshape (scores, shape) widths = ArgMax <axis = -1, keepdims = 0> (apart)
    }}"""
    random = np.random.default_rng(0)
    proto = parser.parse_model(text)
    sizes = {"w1": (channels * PLACES**2, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, layers * len(WIDTHS)),
             "b2": (layers * len(WIDTHS),)}  # fmt: skip
    arrays = {name: random.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    arrays["shape"] = np.array([1, layers, len(WIDTHS)], np.int64)
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    return ir.from_proto(proto)


def times(root: Path, folder: Path, layers: Sequence[Layer], size: tuple[int, int], threads: int) -> dict[str, float]:
    """Median milliseconds of both networks, and of a selector beside each, that take turns."""
    import numpy as np
    from graphwright.models import codecs
    from graphwright.runtime import driver
    from graphwright.runtime.codec_folder import CodecFolder
    from graphwright.runtime.session import Session
    from graphwright.runtime.turns import medians, take_turns

    shapes = CodecFolder.load(root).shapes(*size)
    stride = codecs.STRIDE
    first = {"analysis": (1, 16, size[0] // 2, size[1] // 2),
             "synthesis": (1, codecs.LATENTS, size[0] // stride, size[1] // stride)}  # fmt: skip
    random, runners = np.random.default_rng(0), {}
    for part in PARTS:
        count = sum(layer.part == part for layer in layers)
        made = {part: root / f"{part}.onnx", f"{part}, selector": selector(first[part][1], count, first[part])}
        for name, model in made.items():
            path = folder / f"{root.name}.{name.replace(', ', '.')}"
            shape = shapes[part] if name == part else first[part]
            source = driver.io.load(model) if isinstance(model, Path) else model
            (given,) = (value.name or "" for value in source.graph.inputs)
            if not path.is_dir():
                driver.optimize(model, target="cpu", out=path, pins={given: shape}, verify=False, threads=threads)
            session = Session(path, threads=threads)
            x = {given: random.uniform(0, 255, shape).astype(np.float32).round()}
            runners[name] = lambda session=session, x=x: session.run(None, x)
    found = medians(take_turns(runners, 0.0, 20.0))
    return {name: 1e3 * float(np.median(seconds)) for name, seconds in found.items()}


def table(coder: Coder, photos: Images, crops: Images, means: Sequence[float]) -> list[dict[str, Any]]:
    """Of every way to choose: widths of each photo, and the figures."""
    count = len(coder.layers)
    ways: dict[str, dict[str, Widths]] = {
        f"all {bits}": dict.fromkeys(photos, (bits,) * count) for bits in reversed(WIDTHS)
    }
    learned, own = list(coder.damages(crops).values()), coder.damages(photos)
    sizes = [layer.size for layer in coder.layers]
    for mean in means:
        (once,) = choose([summed(learned)], sizes, mean)
        ways[f"once, {mean:g}"] = dict.fromkeys(photos, once)
        # The mean is what was reached by the choice made once, so that both read as much.
        followed = choose([own[name] for name in photos], sizes, coder.mean_bits(once))
        ways[f"by image at best, {mean:g}"] = dict(zip(photos, followed, strict=True))
    total, rows = sum(sizes), []
    for way, chosen in ways.items():
        found = [coder.coded(chosen[name], {name: image})[name] for name, image in photos.items()]
        bits = sum(coder.mean_bits(widths) for widths in chosen.values()) / len(chosen)
        stored = FULL if way.startswith("by image") else bits
        mean_of = {key: sum(one[key] for one in found) / len(found) for key in ("rate", "dB", "cost")}
        rows.append({"way": way, "bits": bits, "kB": stored * total / 8e3, "chosen": chosen, **mean_of})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("codec"), help="where codecs and figures are kept")
    parser.add_argument("--quality", type=int, default=3)
    parser.add_argument("--bits", type=float, action="append", metavar="M", help="mean widths (6, 5)")
    parser.add_argument("--size", type=int, nargs=2, default=(448, 640), metavar=("H", "W"), help="of the times")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    from graphwright.models import codecs, datasets
    from graphwright.runtime.codec_build import crops, quantize_codec
    from graphwright.runtime.codec_folder import DESCRIPTION, CodecFolder

    from .codec import calibration_crops, export_codec

    options.folder.mkdir(parents=True, exist_ok=True)
    plain, root = options.folder / f"float-{options.quality}", options.folder / f"dynaquant-{options.quality}"
    if not (plain / DESCRIPTION).is_file():
        export_codec(options.quality, plain)
    if not (root / DESCRIPTION).is_file():
        source = CodecFolder.load(plain)
        quantize_codec(source, root, "dynaquant", calibration_crops(source.about.hyper_stride), threads=options.threads)
    layers = layers_of(root)
    coder = Coder(root, options.folder, layers, codecs.DISTORTIONS[options.quality - 1], options.threads)
    if coder.kept.is_file():
        coder.figures.update(json.loads(coder.kept.read_text()))
    large = [photo for photo in codecs.photos() if min(photo.shape[:2]) >= SIDE]
    squares = crops(large, CROPS, SIDE, SEED)
    photos = {name: datasets.photo(name) for name in codecs.HELD_OUT}
    rows = table(coder, photos, {f"crop {n}": square for n, square in enumerate(squares)}, options.bits or (6, 5))
    spent = times(root, options.folder, layers, tuple(options.size), options.threads)
    plain_ms = sum(spent[part] for part in PARTS)
    selected_ms = plain_ms + sum(spent[f"{part}, selector"] for part in PARTS)
    print_row(HEADER)
    print_row(["---"] * len(HEADER))
    full = next(row for row in rows if row["way"] == f"all {FULL}")
    for row in rows:
        ms = selected_ms if row["way"].startswith("by image") else plain_ms
        print_row([row["way"], f"{row['bits']:.2f}", f"{row['kB']:.0f}", f"{row['rate']:.4f}", f"{row['dB']:.3f}",
                   f"{row['cost'] / full['cost'] - 1:+.2%}", f"{ms:.2f}"])  # fmt: skip
    print("\n" + ", ".join(f"{name} {ms:.2f} ms" for name, ms in spent.items()))
    for row in rows:
        if row["way"].startswith(("by", "once")):
            print(row["way"], {name: "-".join(map(str, widths)) for name, widths in row["chosen"].items()})
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "ms": spent}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
