"""Learned weights as a file: arrays by initializer name, and what they are for."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from . import io
from .base import Weights
from .errors import PassError, WeightsError

if TYPE_CHECKING:
    import onnx_ir as ir

ABOUT = "graphwright.json"  # the array that holds the text about the others; no initializer is called so
FORMAT = 1


def save_weights(weights: Weights, path: Path) -> None:
    """Write an .npz file, whole or not at all. Types that NumPy has no name for are written as bits."""
    import numpy as np

    about = {
        "format": FORMAT, "record": weights.record, "sites": list(weights.sites), "stats": dict(weights.stats),
        "types": {name: array.dtype.name for name, array in weights.arrays.items()},
    }  # fmt: skip
    arrays = {
        name: array if array.dtype.kind in "fiub" else array.view(f"u{array.dtype.itemsize}")
        for name, array in weights.arrays.items()
    }
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    with io.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **{**arrays, ABOUT: text})


def load_weights(path: Path) -> Weights:
    """Raises WeightsError when the file is not one that `save_weights` has written."""
    import ml_dtypes  # noqa: F401 -- teaches NumPy the names of bfloat16 and the like
    import numpy as np

    if not path.is_file():
        raise WeightsError(f"{path}: no such file; expected learned weights, which a run of the pass writes")
    try:
        with np.load(path, allow_pickle=False) as data:
            about = json.loads(bytes(data[ABOUT]))
            types = about["types"]
            arrays = {name: data[name].view(np.dtype(types[name])) for name in data.files if name != ABOUT}
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}")
        return Weights(arrays, tuple(about["sites"]), about["record"], about["stats"])
    except (AttributeError, EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
        reason = "it holds something else than arrays" if "pickle" in str(error) else error  # not NumPy's advice
        raise WeightsError(f"{path}: holds no learned weights ({reason}); expected what a run has written") from error


def put_weights(weights: Weights, model: ir.Model) -> None:
    """Give the model's initializers the learned arrays. Raises PassError when they are for another model."""
    import onnx_ir as ir

    known = model.graph.initializers
    for name, array in weights.arrays.items():
        old = known[name].const_value if name in known else None
        if old is None:
            raise PassError(f"the weights are for another model or preset: this one has no weight {name!r}")
        if tuple(old.shape.numpy()) != array.shape or old.dtype != ir.DataType.from_numpy(array.dtype):
            raise PassError(
                f"the weights are for another model: {name!r} is {array.dtype.name}{list(array.shape)} there and "
                f"{old.dtype.name.lower()}{list(old.shape.numpy())} here"
            )
        known[name].const_value = ir.tensor(array, name=name)
