"""What quantization costs an image codec: rate and distortion of real streams, and Bjøntegaard's difference in rate.

    python -m graphwright.tools.bench_codec [--folder codec] [--only NAME] [--plot FILE.svg] [--json FILE]

The hyperprior codec at each quality, in float and with its analysis and synthesis in fixed or mixed widths (the
networks around the hyper-latents are in 8 bits then), codes photos that neither it nor the calibration has seen. Bits
are those of whole files. Folders and figures that are there are not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .turns import print_row

if TYPE_CHECKING:
    import numpy as np

# Name -> passes of analysis and synthesis; those around the hyper-latents are in 8 bits unless all is in float.
SETTINGS = {
    "float": "",
    "8 bits": "dynaquant",
    "mixed, mean 6": "dynaquant:mixed=6",
    "6 bits": "dynaquant:weights=6",
    "mixed, mean 5": "dynaquant:mixed=5",
    "4 bits": "dynaquant:weights=4",
}
HYPER = "dynaquant"
HEADER = ["setting", "quality", "bits a pixel", "dB", "mean bits", "kB of weights"]


def bd_rate(anchor: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> float:
    """By how much more bits `other` takes for equal distortion, as a share; points are (bits a pixel, dB).

    The mean difference of the logarithms of rates between the smallest and the largest dB of both, each curve a cubic
    of dB. Source: Bjøntegaard, VCEG-M33 (2001).
    """
    import numpy as np

    rates, quality = zip(*[np.array(points, np.float64).T for points in (anchor, other)], strict=True)
    low, high = max(q.min() for q in quality), min(q.max() for q in quality)
    if not high > low:
        return float("nan")
    areas = []
    for rate, dB in zip(rates, quality, strict=True):
        integral = np.polyint(np.polyfit(dB, np.log(rate), min(3, len(dB) - 1)))
        areas.append(np.polyval(integral, high) - np.polyval(integral, low))
    return float(np.exp((areas[1] - areas[0]) / (high - low)) - 1)


def decibels(image: np.ndarray, found: np.ndarray) -> float:
    """Peak signal to noise of bytes."""
    import numpy as np

    return float(10 * np.log10(255**2 / np.square(image.astype(np.float64) - found).mean()))


def mean_bits(root: Path) -> float:
    """Of the weights of analysis and synthesis, as their scales show: 6 bits are stored in int8."""
    import numpy as np
    import onnx_ir as ir
    from graphwright.passes import graph, io

    bits = total = 0.0
    for part in ("analysis", "synthesis"):
        for node in io.load(root / f"{part}.onnx").graph:
            if node.op_type != "Conv":
                continue
            weight = node.inputs[1]
            assert weight is not None
            source = weight.producer()
            tensor = graph.constant_tensor(source.inputs[0] if source is not None else weight)
            assert tensor is not None
            width = 32.0
            if source is not None:
                codes = np.abs(tensor.numpy().astype(np.int32)).max()
                width = 4.0 if tensor.dtype == ir.DataType.INT4 else 6.0 if codes <= 31 else 8.0
            bits, total = bits + width * tensor.size, total + tensor.size
    return bits / total


def measure(setting: str, quality: int, folder: Path, threads: int | None) -> dict[str, Any]:
    """The figures of one codec, which is made if it is not there."""
    from graphwright.models import codecs, datasets
    from graphwright.runtime.codec import Codec
    from graphwright.runtime.codec_build import quantize_codec
    from graphwright.runtime.codec_folder import DESCRIPTION, PARTS, CodecFolder

    from .codec import calibration_crops, export_codec

    plain = folder / f"float-{quality}"
    if not (plain / DESCRIPTION).is_file():
        export_codec(quality, plain)
    root = plain
    if passes := SETTINGS[setting]:
        root = folder / f"{passes.replace(':', '_').replace('=', '-')}-{quality}"
        if not (root / DESCRIPTION).is_file():
            source = CodecFolder.load(plain)
            each = {part: HYPER if part.startswith("hyper") else passes for part in PARTS}
            quantize_codec(source, root, each, calibration_crops(source.about.hyper_stride), threads=threads)
    codec, rows = Codec(root, threads=threads), []
    for name in codecs.HELD_OUT:
        image = datasets.photo(name)
        stream = codec.encode(image)
        rate = 8 * len(stream) / (image.shape[0] * image.shape[1])
        rows.append({"photo": name, "rate": rate, "dB": decibels(image, codec.decode(stream))})
    size = sum((root / f"{part}.onnx").stat().st_size for part in PARTS)
    return {
        "setting": setting, "quality": quality, "photos": rows, "bits": mean_bits(root), "bytes": size,
        "rate": sum(row["rate"] for row in rows) / len(rows), "dB": sum(row["dB"] for row in rows) / len(rows),
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Setting, mean bits, difference in rate from float, of the curve of means and of each photo's own."""
    found = []
    for setting in SETTINGS:
        own = [row for row in rows if row["setting"] == setting]
        anchor = [row for row in rows if row["setting"] == "float" and row["quality"] in {r["quality"] for r in own}]
        if setting == "float" or len(own) < 3 or len(anchor) != len(own):
            continue
        line = [setting, f"{sum(row['bits'] for row in own) / len(own):.2f}"]
        line.append(f"{bd_rate(*[[(r['rate'], r['dB']) for r in curve] for curve in (anchor, own)]):+.1%}")
        for number in range(len(own[0]["photos"])):
            points = [[(r["photos"][number]["rate"], r["photos"][number]["dB"]) for r in c] for c in (anchor, own)]
            line.append(f"{bd_rate(*points):+.1%}")
        found.append(line)
    return found


def per_photo(rows: Sequence[dict[str, Any]], weights: Sequence[float]) -> list[list[str]]:
    """What a width chosen for each photo could gain at most over one width for all.

    Setting, mean bits, and the least mean of rate + weight x squared error that any choice of settings for each photo
    reaches with no more bits in the mean, less that of the setting, as a share of it. weights: of each quality. The
    choice knows the results, as no selector does, and its own cost is not counted.
    """
    quantized = [row for row in rows if row["bits"] < 32]
    found = []
    for setting in dict.fromkeys(row["setting"] for row in quantized):
        shares, bits = [], []
        for row in quantized:
            if row["setting"] != setting:
                continue
            weight = weights[row["quality"] - 1]
            others = [other for other in quantized if other["quality"] == row["quality"]]

            def cost(choice: Sequence[dict[str, Any]], weight: float = weight) -> float:
                photos = [one["photos"][number] for number, one in enumerate(choice)]
                return sum(p["rate"] + weight * 255**2 / 10 ** (p["dB"] / 10) for p in photos)

            count = len(row["photos"])
            allowed = (
                choice for choice in itertools.product(others, repeat=count)
                if sum(one["bits"] for one in choice) <= row["bits"] * count + 1e-6
            )  # fmt: skip
            shares.append(min(map(cost, allowed)) / cost([row] * count) - 1)
            bits.append(row["bits"])
        found.append([setting, f"{sum(bits) / len(bits):.2f}", f"{sum(shares) / len(shares):+.2%}"])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("codec"), help="where codecs and figures are kept")
    parser.add_argument("--only", action="append", metavar="NAME", help="only this setting; may be given again")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    from graphwright.models import codecs

    from .chart import point_chart

    options.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    print_row(HEADER)
    print_row(["---"] * len(HEADER))
    for setting in options.only or SETTINGS:
        for quality in range(1, codecs.QUALITIES + 1):
            kept = options.folder / f"{setting.replace(' ', '-').replace(',', '')}-{quality}.json"
            if not kept.is_file():
                figures = measure(setting, quality, options.folder, options.threads)
                kept.write_text(json.dumps(figures, indent=1) + "\n")
            row = json.loads(kept.read_text())
            rows.append(row)
            print_row([setting, str(quality), f"{row['rate']:.4f}", f"{row['dB']:.2f}", f"{row['bits']:.2f}",
                       f"{row['bytes'] / 1e3:.0f}"])  # fmt: skip
    print()
    header = ["setting", "mean bits", "more bits for equal dB", *codecs.HELD_OUT]
    for line in (header, ["---"] * len(header), *table(rows)):
        print_row(line)
    print()
    header = ["setting", "mean bits", "widths chosen for each photo, at best"]
    for line in (header, ["---"] * len(header), *per_photo(rows, codecs.DISTORTIONS)):
        print_row(line)
    if options.plot:
        lines = {
            s: [(r["rate"], r["dB"]) for r in rows if r["setting"] == s]
            for s in dict.fromkeys(r["setting"] for r in rows)
        }
        options.plot.write_text(point_chart("dB of held-out photos by bits a pixel", lines))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
