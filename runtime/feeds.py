"""Inputs to check and time a model with: from a file, or made up so that the model accepts them."""

from __future__ import annotations

import ast
import itertools
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from ..passes.errors import GraphwrightError, InputError, ModelError, did_you_mean
from ..passes.prepare.pin_shapes import bound_symbols
from .indices import Extent, distinct_places, index_range

# What the name of a size may consist of, to be read as an expression of other sizes.
ARITHMETIC = (ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Name, ast.Constant, ast.Load)

Feeds = dict[str, np.ndarray]
Result = TypeVar("Result")

# Sizes tried for a symbolic dimension, in order. Sequences stay short; images must be large enough for every
# downsampling, and often a multiple of 32.
BATCH_SIZES = (1, 2, 3)
SEQUENCE_SIZES = (8, 16, 32, 64, 96, 128, 224, 320, 640, 1, 2, 512)
IMAGE_SIZES = (64, 96, 128, 224, 320, 640, 32, 16, 8, 1, 2)
RANKS = (2, 3, 4, 1, 0)  # tried for an input that declares none
LARGEST_FEED = 1 << 28  # elements
FIRST_TOKENS, FEWEST_TOKENS = 100, 2  # index bounds that are tried where the model does not tell one


class Unfed(InputError):
    """No inputs could be made up for a model. only_sizes: what it refused can only have been their shapes."""

    def __init__(self, message: str, *, only_sizes: bool = False) -> None:
        super().__init__(message)
        self.only_sizes = only_sizes


def load_feeds(path: str | os.PathLike[str], model: ir.Model | None = None, *, samples: bool = False) -> Feeds:
    """The arrays of an .npz file by name. Raises InputError in one line when it is none.

    What the arrays say of themselves is checked before any is unpacked: against the memory that is free, and, with a
    model, against the names and shapes of its inputs. samples: an array may hold several samples, so only names count.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected an .npz with one array an input")
    try:
        data = np.load(path, allow_pickle=False)
        if not isinstance(data, np.lib.npyio.NpzFile):
            raise InputError(f"{path}: holds one array; expected an .npz with one array an input")
        with data:
            sizes = _declared_sizes(path)
            if model is not None:
                check_names(sizes, model, str(path))
                if not samples:
                    _check_shapes(sizes, model, path)
            total, free = sum(nbytes for _, nbytes in sizes.values()), free_memory()
            if total > free:
                raise InputError(
                    f"{path}: its arrays take {total / 1e9:.1f} GB when unpacked, and {free / 1e9:.1f} GB of memory "
                    "are free; expected smaller inputs"
                )
            return {name: data[name] for name in data.files}
    except (ValueError, OSError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        reason = "it holds something else than arrays" if "pickle" in str(error) else error  # not NumPy's advice
        raise InputError(f"{path}: cannot be read as .npz ({reason}); write it with numpy.savez") from error


def _declared_sizes(path: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and bytes of each array by its own header. Raises ValueError when the file holds another number of
    bytes, or when one is no array.
    """
    with zipfile.ZipFile(path) as archive:
        return {info.filename.removesuffix(".npy"): _declared_size(archive, info) for info in archive.infolist()}


def _declared_size(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], int]:
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):  # 3.0 is for names of fields, which no input has
            raise ValueError(f"{info.filename} is of format {version[0]}.{version[1]}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        nbytes = math.prod(shape) * dtype.itemsize
        held = info.file_size - file.tell()
    if held != nbytes and not dtype.hasobject:
        raise ValueError(f"{info.filename} says it has {nbytes} bytes and has {held}")
    return shape, nbytes


def _check_shapes(sizes: Mapping[str, tuple[tuple[int, ...], int]], model: ir.Model, path: Path) -> None:
    for value in model.graph.inputs:
        if value.name is None or value.name not in sizes or value.shape is None:
            continue
        shape, dims = sizes[value.name][0], list(value.shape)
        fits = len(shape) == len(dims) and all(
            not isinstance(dim, int) or dim == size for dim, size in zip(dims, shape, strict=True)
        )
        if not fits:
            expected = [dim if isinstance(dim, int) else dim.value for dim in dims]
            raise InputError(f"{path}: input {value.name!r} has shape {list(shape)}; expected {expected}")


def free_memory() -> float:
    """Bytes that this machine can still give to a program; infinite where it does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
        return int(text.partition("MemAvailable:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return math.inf


def check_names(feeds: Mapping[str, object], model: ir.Model, where: str) -> None:
    """Raises InputError when the arrays are not the model's inputs; those with a default value may be left out."""
    names = [value.name or "" for value in required_inputs(model)]
    known = [value.name or "" for value in model.graph.inputs]
    for name in feeds:
        if name not in known:
            raise InputError(f"{where}: the model has no input {name!r}; {did_you_mean(name, names)}")
    for name in names:
        if name not in feeds:
            raise InputError(f"{where}: input {name!r} is missing; expected {', '.join(names)}")


def required_inputs(model: ir.Model) -> list[ir.Value]:
    """Graph inputs that have no default value."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def made_up(
    model: ir.Model, run: Callable[[Feeds], Result], *, pins: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0, sets: int = 2,
) -> list[tuple[Feeds, Result]]:  # fmt: skip
    """Up to `sets` feeds that the model accepts, each with another size of every symbolic dimension, and their results.

    run: the model; raises a GraphwrightError on feeds it does not accept, a ModelError when it accepts none.
    pins: input name -> shape, where one is given. Raises Unfed, with the last error of `run`, when no feeds were found;
    InputError when the pins do not fit.
    """
    pins = pins or {}
    bound = bound_symbols(model, pins)
    inputs = required_inputs(model)
    for value in inputs:
        if value.dtype is None or isinstance(value.type, ir.SequenceType | ir.OptionalType):
            raise Unfed(f"input {value.name!r} is no tensor; only tensors are made up, run it from Python")
    whole = [value for value in inputs if value.dtype is not None and value.dtype.is_integer()]
    last: GraphwrightError | None = None
    for guess in (FIRST_TOKENS, FEWEST_TOKENS) if whole else (FIRST_TOKENS,):
        found, error = _accepted(model, run, pins, bound, guess, seed, sets)
        if found:
            return found
        last = last or error
    message = f"no inputs were found that the model accepts; give real ones ({last or 'all would be too large'})"
    raise Unfed(message, only_sizes=not whole)


def _accepted(
    model: ir.Model, run: Callable[[Feeds], Result], pins: Mapping[str, Sequence[int]], bound: Mapping[str, int],
    guess: int, seed: int, sets: int,
) -> tuple[list[tuple[Feeds, Result]], GraphwrightError | None]:  # fmt: skip
    """What `made_up` returns, and the last error. bound: symbols that the pins fix. guess: an unknown index bound."""
    rng = np.random.default_rng(seed)
    found: list[tuple[Feeds, Result]] = []
    used: dict[str, set[int]] = {}
    last: GraphwrightError | None = None
    inputs = required_inputs(model)
    unranked = any(value.shape is None and value.name not in pins for value in inputs)
    choices = itertools.chain(_tied_choices(model, pins, bound), _size_choices(_places(model, pins, bound), model))
    for rank, chosen in itertools.product(RANKS if unranked else (0,), choices):
        sizes = {**chosen, **bound}
        if any(size in used.get(name, ()) for name, size in chosen.items()):
            continue
        shapes = {value: tuple(pins.get(value.name or "", ())) or _shape(value, sizes, rank) for value in inputs}
        if sum(math.prod(shape) for shape in shapes.values()) > LARGEST_FEED:
            continue
        extent = _extent(shapes, sizes)
        feeds = {value.name or "": _random(value, shape, extent, guess, rng) for value, shape in shapes.items()}
        try:
            found.append((feeds, run(feeds)))
        except ModelError:  # no inputs would help
            raise
        except GraphwrightError as error:
            last = error
            continue
        for name, size in chosen.items():
            used.setdefault(name, set()).add(size)
        if len(found) == sets or not chosen:
            break
    return found, last


def _extent(shapes: Mapping[ir.Value, tuple[int, ...]], sizes: Mapping[str, int]) -> Extent:
    """The size of an axis of a tensor, in a model whose inputs have these shapes and whose symbols these sizes."""

    def extent(value: ir.Value, axis: int) -> int | None:
        dims = shapes.get(value, value.shape)
        if dims is None or not -len(dims) <= axis < len(dims):
            return None
        dim = dims[axis]
        return dim if isinstance(dim, int) else sizes.get(dim.value or "")

    return extent


def _symbols(model: ir.Model, pins: Mapping[str, Sequence[int]]) -> dict[str, list[tuple[int, int]]]:
    """Symbolic dimension -> (axis, rank) of its places in the inputs not pinned. An unnamed one is `input@axis`."""
    places: dict[str, list[tuple[int, int]]] = {}
    for value in required_inputs(model):
        if value.name in pins:
            continue
        for axis, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int):
                name = dim.value or f"{value.name}@{axis}"
                places.setdefault(name, []).append((axis, len(value.shape or ())))
    return places


def _places(
    model: ir.Model, pins: Mapping[str, Sequence[int]], bound: Mapping[str, int]
) -> dict[str, list[tuple[int, int]]]:
    """The symbols that have no size yet."""
    return {name: at for name, at in _symbols(model, pins).items() if name not in bound}


def _tied_choices(
    model: ir.Model, pins: Mapping[str, Sequence[int]], bound: Mapping[str, int]
) -> Iterator[dict[str, int]]:
    """Sizes where a symbol like "past + length" is the sum of those of these names, as exporters mean it. Without
    that, a mask of one key would be accepted because it is broadcast. Nothing where no name is such an expression.
    """
    places = _places(model, pins, bound)
    terms = {name: parsed for name in places if (parsed := _expression(name, {*places, *bound})) is not None}
    if not terms:
        return
    for chosen in _size_choices({name: at for name, at in places.items() if name not in terms}, model):
        sizes = {name: _value(parsed, {**bound, **chosen}) for name, parsed in terms.items()}
        if all(size is not None and size > 0 for size in sizes.values()):
            yield {**chosen, **{name: size for name, size in sizes.items() if size is not None}}


def _expression(name: str, symbols: Collection[str]) -> ast.expr | None:
    """A symbol's name as arithmetic of other symbols and numbers; None where it is none."""
    try:
        parsed = ast.parse(name, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    parts = list(ast.walk(parsed))
    names = [part.id for part in parts if isinstance(part, ast.Name)]
    if not isinstance(parsed, ast.BinOp) or not all(isinstance(part, ARITHMETIC) for part in parts):
        return None
    return parsed if names and all(each in symbols for each in names) else None


def _value(term: ast.expr, sizes: Mapping[str, int]) -> int | None:
    """None where it divides by zero or has other constants than whole numbers."""
    if isinstance(term, ast.Name):
        return sizes[term.id]
    if isinstance(term, ast.Constant):
        return term.value if type(term.value) is int else None
    assert isinstance(term, ast.BinOp)
    left, right = _value(term.left, sizes), _value(term.right, sizes)
    if left is None or right is None:
        return None
    if isinstance(term.op, ast.FloorDiv):
        return left // right if right else None
    return {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}[type(term.op)]


def _size_choices(places: Mapping[str, list[tuple[int, int]]], model: ir.Model) -> Iterator[dict[str, int]]:
    """places: of the symbols that are to be chosen, see `_symbols`."""
    if not places:
        yield {}
        return
    # One number for each entry, such as a time step or a length, is in the batch of the larger inputs.
    batch = [
        name for name, at in places.items() if all(axis == 0 for axis, _ in at) and any(rank > 1 for _, rank in at)
    ]
    others = [name for name in places if name not in batch]
    if not others:
        first, *rest = BATCH_SIZES
        yield dict.fromkeys(batch, first)
        if len(batch) > 1:
            yield dict(zip(batch, itertools.cycle(rest), strict=False))
        yield from (dict.fromkeys(batch, size) for size in rest)
        return
    images = any(len(value.shape or ()) >= 4 for value in required_inputs(model))
    candidates = IMAGE_SIZES if images else SEQUENCE_SIZES
    # Together first, as dimensions are often tied (height and width, past and mask), then each on its own: once
    # before the second common size, so that dimensions that may differ do.
    for number, size in enumerate(candidates):
        for count in BATCH_SIZES[:2]:
            yield {**dict.fromkeys(batch, count), **dict.fromkeys(others, size)}
        if number == 0 and 1 < len(others) <= len(candidates):
            yield {**dict.fromkeys(batch, BATCH_SIZES[1]), **dict(zip(others, candidates[1:], strict=False))}
    if 1 < len(others) <= 4:
        for combination in itertools.islice(itertools.product(candidates, repeat=len(others)), 4096):
            yield {**dict.fromkeys(batch, 1), **dict(zip(others, combination, strict=True))}


def _shape(value: ir.Value, sizes: Mapping[str, int], rank: int) -> tuple[int, ...]:
    """rank: of an input that declares none."""
    if value.shape is None:
        return tuple(range(2, 2 + rank))
    dims = enumerate(value.shape)
    return tuple(d if isinstance(d, int) else sizes[d.value or f"{value.name}@{axis}"] for axis, d in dims)


def _random(
    value: ir.Value, shape: tuple[int, ...], extent: Extent, guess: int, rng: np.random.Generator
) -> np.ndarray:
    """guess: an index bound where the model does not tell one."""
    assert value.dtype is not None
    if value.dtype == ir.DataType.STRING:
        return np.full(shape, "text", object)
    dtype = value.dtype.numpy()
    name = (value.name or "").lower()
    if value.dtype == ir.DataType.BOOL:
        return np.asarray(rng.random(shape) < 0.5)
    if value.dtype.is_floating_point():
        return np.asarray(rng.standard_normal(shape)).astype(dtype)
    if "mask" in name:
        return np.ones(shape, dtype)
    if "token_type" in name or "segment" in name:
        return np.zeros(shape, dtype)
    if (places := distinct_places(value, shape, rng, extent)) is not None:
        return places.astype(dtype)
    low, high = index_range(value, extent) or (0, guess)
    high = min(high, int(np.iinfo(dtype).max) if dtype.kind in "iu" else FIRST_TOKENS)
    return np.asarray(rng.integers(low, max(low + 1, high), shape)).astype(dtype)


def samples(feeds: Sequence[Feeds]) -> dict[str, list[np.ndarray]]:
    """A list of feeds as one list of arrays an input: the shape calibration data has."""
    return {name: [one[name] for one in feeds] for name in (feeds[0] if feeds else {})}
