"""`python -m graphwright.tools.codec`: images to bit streams and back with a learned codec.

python -m graphwright.tools.codec export --quality 3 -o float
python -m graphwright.tools.codec quantize float -o int8
python -m graphwright.tools.codec compile int8 --target cpu --size 448x640 -o compiled
python -m graphwright.tools.codec encode compiled photo.png -o photo.gwhp
python -m graphwright.tools.codec decode compiled photo.gwhp -o photo.png
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from graphwright.passes.errors import AssetError, InputError, UsageError, first_line

from .shell import Group, as_bytes, parse_shape, progress, threads_option, verbosity_options

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CROPS, SIDE, SEED = 16, 128, 0  # what networks are calibrated on: squares of the photos that the codec learned from
MOST_PIXELS = 1 << 28  # of an image file


def export_codec(quality: int, out: Path, *, overwrite: bool = False) -> None:
    """Write the hyperprior codec at one quality as a folder of ONNX files, whole or not at all."""
    import numpy as np
    from graphwright.models import codecs, registry
    from graphwright.passes import io
    from graphwright.runtime import entropy
    from graphwright.runtime.artifact import Workplace
    from graphwright.runtime.codec_folder import DESCRIPTION, PARTS, TABLES, write_description

    io.check_output(out, overwrite)
    with Workplace(out, overwrite, DESCRIPTION, "a codec") as folder, registry.extra("hyperprior"):
        for part in PARTS:
            io.save(codecs.build(part, quality), folder / f"{part}.onnx")
        scales, prior, largest = codecs.probabilities(quality)
        tables = {"y": entropy.gaussian_frequencies(scales, largest), "z": entropy.frequencies(prior)}
        np.savez(folder / TABLES, **tables)  # type: ignore[arg-type]  # NumPy's own type of it lacks the names
        write_description(folder, codecs.description(quality))


def calibration_crops(step: int) -> list[NDArray[np.uint8]]:
    """Squares of the photos that the codec learned from."""
    from graphwright.models import codecs
    from graphwright.runtime.codec_build import crops

    return crops(codecs.photos(), CROPS, -(-SIDE // step) * step, SEED)


def read_image(path: Path) -> NDArray[np.uint8]:
    """(height, width, 3), red green blue. Raises InputError for a file that is no image."""
    import numpy as np

    Image = _pillow()
    try:
        with Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise InputError(f"{path}: {image.width} x {image.height} pixels; expected at most {MOST_PIXELS}")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an image ({first_line(error)})") from error


def write_image(pixels: NDArray[np.uint8], path: Path, overwrite: bool) -> None:
    from graphwright.passes import io

    Image = _pillow()
    Image.init()
    kind = Image.EXTENSION.get(path.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise UsageError(f"{path}: {path.suffix or 'no ending'} is not the ending of an image file, such as .png")
    io.check_output(path, overwrite)
    with io.replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, kind)


def _pillow():  # type: ignore[no-untyped-def]  # the module, whose import has to wait
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise AssetError(
            "images need pillow, which is not installed: run `pip install 'graphwright[codec]'`"
        ) from error
    return Image


def read_stream(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


@click.group(cls=Group, name="codec")
def command() -> None:
    """Images to bit streams and back, with the learned codec that comes with graphwright."""


output_folder = click.option("-o", "--output", required=True, metavar="DIR", help="The codec folder to write.")
output_file = click.option("-o", "--output", required=True, metavar="FILE", help="Where the result goes.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what exists.")


@command.command()
@click.option("--quality", type=int, default=3, show_default=True, help="1 (smallest streams) to 4 (best images).")
@output_folder
@overwrite_option
@verbosity_options
def export(quality: int, output: str, overwrite: bool) -> None:
    """Write the codec as a folder: four networks in ONNX, tables of frequencies, a description."""
    export_codec(quality, Path(output), overwrite=overwrite)
    click.echo(f"{output}: quality {quality}")


@command.command()
@click.argument("codec", metavar="DIR")
@click.option("--passes", default="dynaquant", show_default=True, help="What rewrites each network.")
@click.option("--images", metavar="DIR", help="What to calibrate on, by default the photos that it learned from.")
@output_folder
@overwrite_option
@threads_option
@verbosity_options
def quantize(
    codec: str, passes: str, images: str | None, output: str, overwrite: bool, threads: int | None
) -> None:  # fmt: skip
    """Rewrite the networks with passes that are calibrated on images."""
    from graphwright.runtime.codec_build import crops, quantize_codec
    from graphwright.runtime.codec_folder import CodecFolder

    source = CodecFolder.load(codec)
    step = source.about.hyper_stride
    if images is None:
        squares = calibration_crops(step)
    else:
        from .images import ENDINGS

        files = sorted(f for f in Path(images).glob("*") if f.suffix.lower() in ENDINGS)
        pictures = [read_image(file) for file in files]
        side = -(-SIDE // step) * step
        pictures = [p for p in pictures if min(p.shape[:2]) >= side]
        if not pictures:
            raise InputError(f"{images}: holds no image of at least {side} x {side} pixels")
        squares = crops(pictures, CROPS, side, SEED)
    with progress() as say:
        quantize_codec(source, Path(output), passes, squares, overwrite=overwrite, threads=threads, progress=say)
    click.echo(f"{output}: {passes}")


@command.command()
@click.argument("codec", metavar="DIR")
@click.option("--target", default="cpu", show_default=True, metavar="T", help="See `graphwright targets`.")
@click.option("--size", required=True, metavar="HxW", help="The largest image that it will take.")
@output_folder
@overwrite_option
@threads_option
@verbosity_options
def compile(codec: str, target: str, size: str, output: str, overwrite: bool, threads: int | None) -> None:
    """Compile the networks for images of up to one size."""
    from graphwright.runtime.codec import LARGEST_SIDE
    from graphwright.runtime.codec_build import compile_codec
    from graphwright.runtime.codec_folder import CodecFolder

    sides = parse_shape(size, "--size")
    if len(sides) != 2 or not all(1 <= side <= LARGEST_SIDE for side in sides):
        raise UsageError(f"--size {size}: expected a height and a width, as in 448x640")
    source = CodecFolder.load(codec)
    with progress() as say:
        made = compile_codec(source, Path(output), (sides[0], sides[1]), target=target, overwrite=overwrite,
                             threads=threads, progress=say)  # fmt: skip
    click.echo(f"{output}: {target}, images of up to {made.about.size[0]} x {made.about.size[1]}")  # type: ignore[index]


@command.command()
@click.argument("codec", metavar="DIR")
@click.argument("image", metavar="IMAGE")
@output_file
@overwrite_option
@threads_option
@verbosity_options
def encode(codec: str, image: str, output: str, overwrite: bool, threads: int | None) -> None:
    """Write the stream of an image."""
    from graphwright.passes import io
    from graphwright.runtime.codec import Codec

    path = Path(output)
    io.check_output(path, overwrite)
    pixels = read_image(Path(image))
    stream = Codec(codec, threads=threads).encode(pixels)
    with io.replacing(path) as temporary:
        temporary.write_bytes(stream)
    area = pixels.shape[0] * pixels.shape[1]
    click.echo(f"{output}: {as_bytes(len(stream))}, {8 * len(stream) / area:.3f} bits a pixel")


@command.command()
@click.argument("codec", metavar="DIR")
@click.argument("stream", metavar="FILE")
@output_file
@overwrite_option
@threads_option
@verbosity_options
def decode(codec: str, stream: str, output: str, overwrite: bool, threads: int | None) -> None:
    """Write the image of a stream."""
    from graphwright.passes import io
    from graphwright.runtime.codec import Codec

    path = Path(output)
    io.check_output(path, overwrite)
    data = read_stream(Path(stream))
    try:
        pixels = Codec(codec, threads=threads).decode(data)
    except InputError as error:
        raise type(error)(f"{stream}: {error}") from error
    write_image(pixels, path, overwrite)
    click.echo(f"{output}: {pixels.shape[1]} x {pixels.shape[0]} pixels")


if __name__ == "__main__":
    command()
