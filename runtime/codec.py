"""Images to bit streams and back, with the networks of a codec folder.

A stream is

    4 bytes   "GWHP"
    1 byte    version: 1, or 2 where the networks saw more than the least canvas that holds the image
    4 bytes   the codec that it is for: `Description.streams`
    2 + 2     height and width of the image, little-endian as all that follows
    4 bytes   CRC-32 of what was coded, z and y as int8 ... of the symbols
    4 bytes   CRC-32 of all other bytes of the stream
    4 + 4     height and width of the canvas, in version 2 alone
    ...       range-coded symbols: z channel by channel, then y in the order of its tables

Which table a symbol of y has follows from z by the hyper-synthesis, so decoder and encoder must compute the same
places. A compiled network of 8-bit numbers does on every machine and with any number of threads: its sums are whole
numbers in int32, and each becomes a place by one product in float32 and one rounding. Networks in float32 do so only on
the same machine; where they do not, the CRC of the symbols tells.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..passes import io
from ..passes.errors import InputError
from .codec_folder import PARTS, CodecFolder
from .entropy import Damaged, Decoder, Encoder
from .feeds import free_memory

MAGIC, PLAIN, ON_CANVAS = b"GWHP", 1, 2
HEADER, CANVAS = struct.Struct("<4sB4sHHII"), struct.Struct("<II")
CHECKED = 4  # bytes at the header's end that the CRC in them is not of
LARGEST_SIDE = 0xFFFF
BYTES_OF_PIXEL = 200  # that decoding takes at most, about


@dataclass(frozen=True)
class Symbols:
    """What a stream says. z: (1, Z, h / 64, w / 64), y and its tables' numbers, (1, Y, h / 16, w / 16)."""

    z: NDArray[np.int32]
    y: NDArray[np.int32]
    chosen: NDArray[np.intp]

    @property
    def checksum(self) -> int:
        return zlib.crc32(self.y.astype("<i2").tobytes(), zlib.crc32(self.z.astype("<i2").tobytes()))


class Codec:
    """A codec folder, ready to run. threads: of every network; None for all processors.

    Raises ArtifactError when the folder is damaged, TargetError when this machine cannot run it.
    """

    def __init__(self, folder: str | os.PathLike[str] | CodecFolder, *, threads: int | None = None) -> None:
        self.folder = folder if isinstance(folder, CodecFolder) else CodecFolder.load(folder)
        self._sessions = {part: _session(self.folder, part, threads) for part in PARTS}

    def compute(self, part: str, x: NDArray[Any]) -> NDArray[np.float32]:
        """The network's result for whole numbers, before it is rounded."""
        session = self._sessions[part]
        (given,) = session.get_inputs()
        return session.run(None, {given.name: np.ascontiguousarray(x, np.float32)})[0]

    def encode(self, image: NDArray[np.uint8]) -> bytes:
        """The stream of an image, (height, width, 3), red green blue. Raises InputError for other arrays, and for
        images larger than the networks were compiled for."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise InputError(f"the image is {image.dtype} {image.shape}; expected uint8 (height, width, 3)")
        height, width = image.shape[:2]
        symbols = self.symbols(image)
        encoder = Encoder()
        encoder.put(symbols.z, self._channels(symbols.z.shape), self.folder.z)
        encoder.put(symbols.y, symbols.chosen, self.folder.y)
        canvas = self._canvas(height, width)
        stated = None if canvas == self._least_canvas(height, width) else canvas
        return _framed(self.folder.about.streams, (height, width), stated, symbols.checksum, encoder.data())

    def symbols(self, image: NDArray[np.uint8]) -> Symbols:
        """What the stream of an image would say."""
        height, width = image.shape[:2]
        rows, columns = self._canvas(height, width)
        edges = ((0, rows - height), (0, columns - width), (0, 0))
        planes = np.pad(image, edges, mode="edge").transpose(2, 0, 1)[None]
        y = _whole(self.compute("analysis", planes), self.folder.y.largest)
        z = _whole(self.compute("hyper-analysis", y), self.folder.z.largest)
        return Symbols(z, y, self._chosen(z))

    def bits(self, symbols: Symbols) -> float:
        """What an ideal coder needs for them."""
        z = self.folder.z.bits(symbols.z, self._channels(symbols.z.shape))
        return z + self.folder.y.bits(symbols.y, symbols.chosen)

    def decode(self, stream: bytes) -> NDArray[np.uint8]:
        """The image, (height, width, 3), of a stream. Raises Damaged, an InputError, for bytes that are none, and
        InputError for a stream of another codec or one of an image that does not fit."""
        (height, width), stated, checksum, data = _unframed(self.folder.about.streams, stream)
        rows, columns = self._canvas_of(height, width, stated)
        if not self.folder.compiled and (need := BYTES_OF_PIXEL * rows * columns) > (free := free_memory()):
            raise InputError(
                f"an image of {height} x {width} takes {need / 1e9:.1f} GB to decode, and {free / 1e9:.1f} GB of memory"
                " are free; expected a smaller one"
            )
        shapes = self.folder.shapes(rows, columns)
        decoder = Decoder(data)
        z = decoder.get(self._channels(shapes["hyper-synthesis"]), self.folder.z)
        chosen = self._chosen(z)
        y = decoder.get(chosen, self.folder.y)
        decoder.end()
        if Symbols(z, y, chosen).checksum != checksum:
            raise Damaged(
                "the stream decodes to other symbols than were coded; networks in float32 decode only where they "
                "encoded, those of a quantized and compiled codec everywhere"
            )
        image = _whole(self.compute("synthesis", y), 255, 0)[0, :, :height, :width]
        return np.ascontiguousarray(image.transpose(1, 2, 0).astype(np.uint8))

    def _chosen(self, z: NDArray[np.int32]) -> NDArray[np.intp]:
        places = self.compute("hyper-synthesis", z)
        return _whole(places, len(self.folder.y.frequencies) - 1, 0).astype(np.intp)

    def _channels(self, shape: tuple[int, ...]) -> NDArray[np.intp]:
        """Numbers of z's tables: those of the channels."""
        return np.broadcast_to(np.arange(shape[1])[:, None, None], shape)

    def _least_canvas(self, height: int, width: int) -> tuple[int, int]:
        """The least size that holds an image and that networks take."""
        if not 1 <= height <= LARGEST_SIDE or not 1 <= width <= LARGEST_SIDE:
            raise InputError(f"an image of {height} x {width}; expected sides from 1 to {LARGEST_SIDE}")
        step = self.folder.about.hyper_stride
        return -(-height // step) * step, -(-width // step) * step

    def _canvas(self, height: int, width: int) -> tuple[int, int]:
        """The size that the networks see when they encode: compiled ones know one alone."""
        least, size = self._least_canvas(height, width), self.folder.about.size
        if size is None:
            return least
        if height > size[0] or width > size[1]:
            raise InputError(
                f"an image of {height} x {width}; {self.folder.root} was compiled for up to {size[0]} x {size[1]}"
            )
        return size

    def _canvas_of(self, height: int, width: int, stated: tuple[int, int] | None) -> tuple[int, int]:
        """The size that the networks saw that encoded a stream. stated: in its header."""
        least, own = self._least_canvas(height, width), self._canvas(height, width)
        canvas = stated or least
        step = self.folder.about.hyper_stride
        if canvas[0] < least[0] or canvas[1] < least[1] or canvas[0] % step or canvas[1] % step:
            raise Damaged(
                f"the stream says that an image of {height} x {width} was coded in {canvas[0]} x {canvas[1]}; expected "
                f"multiples of {step} that hold it"
            )
        if self.folder.compiled and canvas != own:
            raise InputError(
                f"the image was coded in {canvas[0]} x {canvas[1]} and {self.folder.root} was compiled for "
                f"{own[0]} x {own[1]}; decode with the codec that encoded it, or with one that is not compiled"
            )
        return canvas


def _whole(x: NDArray[np.float32], most: int, least: int | None = None) -> NDArray[np.int32]:
    """Rounded, halves to the even number, and held between two numbers."""
    return np.clip(np.rint(x), -most if least is None else least, most).astype(np.int32)


def _framed(
    streams: str, size: tuple[int, int], canvas: tuple[int, int] | None, checksum: int, symbols: bytes
) -> bytes:
    version, data = (PLAIN, symbols) if canvas is None else (ON_CANVAS, CANVAS.pack(*canvas) + symbols)
    front = HEADER.pack(MAGIC, version, bytes.fromhex(streams), *size, checksum, 0)[:-CHECKED]
    return front + struct.pack("<I", zlib.crc32(data, zlib.crc32(front))) + data


def _unframed(streams: str, stream: bytes) -> tuple[tuple[int, int], tuple[int, int] | None, int, bytes]:
    """(size of the image, the canvas if it is stated, checksum of the symbols, coded symbols)."""
    if len(stream) < HEADER.size or stream[: len(MAGIC)] != MAGIC:
        raise Damaged(f"{len(stream)} bytes that are no stream of an image codec; expected them to begin with GWHP")
    _, version, codec, height, width, checksum, whole = HEADER.unpack_from(stream)
    if version not in (PLAIN, ON_CANVAS):
        raise InputError(f"the stream is of version {version}; expected {PLAIN} or {ON_CANVAS}")
    data = stream[HEADER.size :]
    if zlib.crc32(data, zlib.crc32(stream[: HEADER.size - CHECKED])) != whole:
        raise Damaged("the stream is cut short or damaged: its checksum is another one")
    if codec.hex() != streams:
        raise InputError(
            f"the stream is for codec {codec.hex()}, this one is {streams}; decode with the one that wrote it"
        )
    if version == PLAIN:
        return (height, width), None, checksum, data
    if len(data) < CANVAS.size:
        raise Damaged("the stream ends before the size that its image was coded in")
    rows, columns = CANVAS.unpack_from(data)
    return (height, width), (rows, columns), checksum, data[CANVAS.size :]


def _session(folder: CodecFolder, part: str, threads: int | None) -> Any:
    if folder.compiled:
        from .session import Session

        return Session(folder.part(part), threads=threads)
    from .reference import ort_session

    return ort_session(io.load(folder.part(part)), threads=threads or 0, optimized=True)
