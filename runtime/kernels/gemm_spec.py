"""Matrix products: their sizes, the tiles that are chosen for them, and how a constant B is packed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...passes.base import Caches
from ..target import InstructionSet
from .dots import grouped

UNROLL = 4  # steps of k that are written out
FEW = 8  # tiles of A in the second cache, and times that B is read, from which on the depth is cut into parts
SHORTEST = 192  # steps of a part of the depth that is chosen for the first cache
MANY = 256  # rows from which on a panel that is too wide for the first cache is read often enough
STREAMS = (6, 5, 7), (3, 5)  # places of the depth that are read in turn instead, for up to two rows and for more
FEW_ROWS = 2  # rows up to which a tile reads several panels of B
PAGE = 1024  # float32 apart, or a multiple of it, elements fall in the same lines of a first-level cache


@dataclass(frozen=True)
class GemmSpec:
    """Sizes of a product. rows, inner, columns: None when known at run time; columns only of a B in place. packed: B is
    a constant in panels.

    batch: how many products of these sizes lie behind each other, 1 for a packed B. shared_a, shared_b: all of them
    read the same A or B. weights: the type that a packed B is stored in; its elements become float32 in registers.
    data: type of A; for uint8 and int8, of which `zero` stands for 0, B is int8 and Y int32; uint16: the bits of
    bfloat16, which B is too. joined: `dots.joined_steps` of B.
    """

    rows: int | None
    inner: int | None
    columns: int | None
    packed: bool = True
    batch: int | None = 1
    shared_a: bool = False
    shared_b: bool = False
    weights: str = "float32"
    data: str = "float32"
    zero: int = 0
    joined: int = 0

    @property
    def flops(self) -> int:
        """Multiplications and additions; 0 where a size is known only at run time."""
        return 2 * (self.batch or 0) * (self.rows or 0) * (self.inner or 0) * (self.columns or 0)


@dataclass(frozen=True)
class GemmTile:
    """Rows and vectors of accumulators. depth: steps of k of one part, 0: all at once, None: as the sizes ask for.

    panel: vectors of a panel of B, of which the tile covers several behind each other; None for one of its own width.
    """

    rows: int
    vectors: int
    depth: int | None = None
    panel: int | None = None

    @property
    def packed(self) -> int:
        """Vectors of a panel of B."""
        return self.panel or self.vectors

    @property
    def beside(self) -> int:
        """Panels of B that the tile covers."""
        return -(-self.vectors // self.packed)


def loads_cost(rows: int, vectors: int) -> float:
    """What a tile's cycles grow by with its loads for each multiply-add, as measured: of 32 registers 6x4 is 2 to 10 %
    faster than 14x2, of 16 6x2 and 4x3 are 2 to 8 % faster than 2x4, though all keep the multipliers busy on paper."""
    return 1 + 0.2 * (rows + vectors) / (rows * vectors)


def choose_tile(rows: int | None, columns: int, isa: InstructionSet, lanes: int, spare: int = 0) -> GemmTile:
    """The tile that keeps the most accumulators and wastes the fewest, for a machine of `isa.registers` registers, of
    which `spare` are for products."""
    return tiles(rows, columns, isa, lanes, spare=spare)[0]


def packed_tile(rows: int | None, columns: int, isa: InstructionSet, lanes: int, spare: int = 0) -> GemmTile:
    """The tile for a packed B. Few rows read panels of the width that many rows take, several at once: two models that
    read the same weights so, such as a decoder's for its prompt and for one token, can share them."""
    if rows is None or rows > FEW_ROWS:
        return choose_tile(rows, columns, isa, lanes, spare)
    panel = choose_tile(None, columns, isa, lanes, spare).vectors
    wide = next(t for t in tiles(rows, columns, isa, lanes, spare=spare) if t.vectors % panel == 0)
    return replace(wide, panel=panel)


def tiles(
    rows: int | None, columns: int, isa: InstructionSet, lanes: int, shorter: Sequence[int] = (0,), spare: int = 0
) -> list[GemmTile]:
    """Tiles, the one that should take the fewest cycles first. shorter: by how many rows than fit.

    The accumulators, the vectors of B of one step, the element of A that meets them and `spare` products fit into
    registers.
    """
    total = -(-columns // lanes)
    costs: dict[GemmTile, float] = {}
    for vectors, less in itertools.product((1, 2, 3, 4, 6, 8), shorter):
        most = (isa.registers - 1 - spare - vectors) // vectors - less
        if vectors > max(1, total) or most < 1:
            continue
        height = most if rows is None else -(-rows // -(-rows // most)) if rows else 1
        # Per step of k: an FMA a cycle and unit, a load a cycle and unit, latency hidden by eight accumulators.
        work = max(height * vectors, height + vectors, min(8, 2 * isa.registers // 4))
        count = -(-total // vectors) * (1 if rows is None else -(-rows // height)) / height ** (rows is None)
        wide = isa.registers >= 32 and (rows is None or rows >= MANY)
        costs[GemmTile(height, vectors)] = work * count * (
            loads_cost(height, vectors) if wide else 1 + 0.02 * abs(vectors - 2)
        )
    return sorted(costs, key=costs.__getitem__)


def part_of_depth(rows: int, inner: int, tile: GemmTile, caches: Caches, lanes: int) -> int | None:
    """Steps of k of one part, where all of a packed B would come from far away many times: a part of A that stays in
    half of the second cache has few rows. None elsewhere. A part of a narrow panel stays in half of the first cache."""
    most = caches.l2 // 2 // (4 * tile.rows)  # steps of k times tiles
    if most >= FEW * inner or -(-rows // tile.rows) * inner < FEW * most:
        return None
    parts = -(-inner * 2 * FEW // most)
    if (near := caches.l1 // 2 // (4 * lanes * tile.vectors)) >= SHORTEST:
        parts = max(parts, -(-inner // near))
    return -(-inner // (parts * UNROLL)) * UNROLL


def streams_of_depth(rows: int, inner: int, unroll: int, beside: int = 1, page: int = PAGE) -> tuple[int, int]:
    """(streams, steps of k of each, a multiple of `unroll`). Neither the streams of B nor the rows of A at their places
    meet in the same lines of the first-level cache, if any number of streams does so. beside: panels that are read side
    by side. page: elements of one."""

    def parted(streams: int) -> tuple[int, int]:
        count = inner // streams // unroll
        return streams, (count - 1 + count % 2) * unroll  # an odd number of lines

    choices = [parted(max(2, streams // beside)) for streams in STREAMS[rows > 2]]
    return max(choices, key=lambda choice: min(page // 8, choice[1] % page, -choice[1] % page))


def panels(columns: int, tile: GemmTile, lanes: int) -> list[tuple[int, int]]:
    """(first vector, vectors) of each panel; the last may be narrower."""
    total = -(-columns // lanes)
    return [(first, min(tile.vectors, total - first)) for first in range(0, total, tile.vectors)]


def pack(b: np.ndarray, tile: GemmTile, lanes: int, group: int = 1) -> np.ndarray:
    """B of shape (K, N) as panels behind each other, zeros in the lanes beyond N. Flat; int8 where B is, for float16
    and bfloat16 their bits as uint16, else float32.

    group: elements of the depth of a step, which lie behind each other.
    """
    inner, columns = b.shape
    width = -(-columns // lanes) * lanes
    padded = np.zeros((inner, width), b.dtype if b.dtype == np.int8 or b.dtype.itemsize == 2 else np.float32)
    padded[:, :columns] = b
    padded, step = grouped(padded, 0, group), tile.packed * lanes
    parts = [padded[:, first : first + step].reshape(-1) for first in range(0, width, step)]
    packed = np.concatenate(parts) if parts else padded.reshape(-1)
    return packed.view(np.uint16) if packed.dtype.itemsize == 2 else packed
