"""Real inputs, one sample at a time: from .npz files, from the lines of a text, from a folder of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graphwright.passes.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir


def load_calibration(
    path: Path, model: ir.Model, pins: Mapping[str, Sequence[int]], tokenizer: Path | None = None
) -> dict[str, list[np.ndarray]]:
    """Input name -> arrays, one a sample.

    path: an .npz file; a folder of them or of images, which are read in the order of their names; or a text (.txt),
    which `texts` makes tokens of, as `images` makes arrays of images. An array of an input's rank is
    one sample, or several when its first dimension is a multiple of the model's fixed one; an array with one
    dimension more holds samples along the first. Raises InputError when names, types, shapes or counts do not fit, and
    where there is no sample or one without elements.
    """
    from graphwright.runtime.feeds import load_feeds, required_inputs

    if path.suffix == ".txt":
        from .texts import load_text

        return load_text(path, model, pins, tokenizer)
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        from .images import load_images

        return load_images(path, model, pins)
    values = {value.name or "": value for value in model.graph.inputs}
    samples: dict[str, list[np.ndarray]] = {value.name or "": [] for value in required_inputs(model)}
    for file in files:
        feeds = load_feeds(file, model, samples=True)
        split = {name: _samples(array, values[name], pins, f"{file}: input {name!r}") for name, array in feeds.items()}
        counts = {name: len(parts) for name, parts in split.items()}
        if len(set(counts.values())) > 1:
            raise InputError(f"{file}: holds {counts} samples by input; expected the same number of each")
        for name, parts in split.items():
            samples.setdefault(name, []).extend(parts)
    return samples


def _samples(array: np.ndarray, value: ir.Value, pins: Mapping[str, Sequence[int]], where: str) -> list[np.ndarray]:
    """An input's array in samples that it takes."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    expected = None if value.dtype is None else value.dtype.numpy()
    if expected is not None and array.dtype != expected and array.dtype.kind in "?iufc" and expected.kind in "?iufc":
        raise InputError(f"{where} is {array.dtype}; expected {expected}")
    shape = _declared(value, pins)
    found = _split(array, shape, where)
    if not found:
        raise InputError(f"{where} has shape {list(array.shape)}, which is no sample; expected one at least")
    for part in found:
        fits = shape is None or all(size in (None, there) for size, there in zip(shape, part.shape, strict=True))
        if not fits:
            sizes = ", ".join("any" if size is None else str(size) for size in shape or ())
            raise InputError(f"{where} has samples of shape {list(part.shape)}; expected [{sizes}]")
        if not part.size and (shape is None or 0 not in shape):
            raise InputError(f"{where} has samples of shape {list(part.shape)}, without elements; expected some")
    return found


def _declared(value: ir.Value, pins: Mapping[str, Sequence[int]]) -> list[int | None] | None:
    if (value.name or "") in pins:
        return list(pins[value.name or ""])
    if value.shape is None:
        return None
    return [dim if isinstance(dim, int) else None for dim in value.shape]


def _split(array: np.ndarray, shape: list[int | None] | None, where: str) -> list[np.ndarray]:
    if shape is None:
        return [array]
    if array.ndim == len(shape) + 1:
        return [array[i, ...] for i in range(len(array))]
    if array.ndim != len(shape):
        raise InputError(f"{where} has shape {list(array.shape)}; expected rank {len(shape)}, or one more for samples")
    if not shape or shape[0] is None or shape[0] == array.shape[0] or not shape[0]:
        return [array]
    count, rest = divmod(array.shape[0], shape[0])
    if rest:
        raise InputError(f"{where} has {array.shape[0]} rows; expected a multiple of the model's {shape[0]}")
    return [array[i * shape[0] : (i + 1) * shape[0]] for i in range(count)]
