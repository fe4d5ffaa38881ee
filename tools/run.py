"""`graphwright run`: a model on inputs from a file."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from graphwright.passes.errors import InputError, OutputError

from .shell import (
    Command,
    as_shape,
    format_options,
    log,
    print_json,
    print_table,
    progress,
    threads_option,
    verbosity_options,
)

if TYPE_CHECKING:
    import numpy as np


def run_model(model: str, file: str, *, backend: str | None = None, threads: int | None = None) -> dict[str, Any]:
    """Output name -> value of the model on the arrays of the .npz file. Raises a GraphwrightError."""
    from graphwright.runtime.feeds import load_feeds

    from .opened import opened

    with progress() as say:
        say("load")
        with opened(model, backend, threads=threads) as ready:
            feeds = load_feeds(file, ready.graph)
            say("run")
            return ready.run(feeds)


def save_outputs(outputs: dict[str, Any], path: Path, *, overwrite: bool) -> None:
    """Write the arrays as an .npz file. Raises OutputError, also for outputs that are no arrays.

    Strings become fixed-width text; numbers of a type that NumPy itself lacks (bfloat16 and its like) float32.
    """
    import numpy as np
    from graphwright.passes import io

    io.check_output(path, overwrite)
    arrays: dict[str, np.ndarray] = {}
    for name, value in outputs.items():
        if not isinstance(value, np.ndarray):
            raise OutputError(f"output {name!r} is a {type(value).__name__}, not an array; an .npz cannot hold it")
        if value.dtype == object:
            value = value.astype(str)
        elif value.dtype.isbuiltin == 2:  # registered with NumPy by another package
            log.warning("output %r is written as float32, since an .npz has no %s", name, value.dtype)
            value = value.astype(np.float32)
        arrays[name] = value
    with io.replacing(path) as temporary:
        write_npz(arrays, temporary)


def write_npz(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """As numpy.savez does it, which takes no array called `file` or `allow_pickle`."""
    import numpy as np

    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def statistics(name: str, value: Any) -> dict[str, Any]:
    """Shape, type, and smallest, largest and mean finite number of an output."""
    import numpy as np

    if not isinstance(value, np.ndarray):
        return {
            "name": name,
            "shape": None,
            "dtype": type(value).__name__,
            "min": None,
            "max": None,
            "mean": None,
        }
    row: dict[str, Any] = {"name": name, "shape": list(value.shape), "dtype": str(value.dtype)}
    numbers = _finite(value)
    if numbers is None or not numbers.size:
        return {**row, "min": None, "max": None, "mean": None}
    return {**row, "min": float(numbers.min()), "max": float(numbers.max()), "mean": float(numbers.mean())}


def _finite(value: np.ndarray) -> np.ndarray | None:
    import numpy as np

    if value.dtype.kind in "OUSc":
        return None
    wide = value.astype(np.float64)
    return wide[np.isfinite(wide)]


@click.command(cls=Command, name="run")
@click.argument("model", metavar="ARTIFACT|MODEL.onnx")
@click.option("-i", "--input", "file", required=True, metavar="IN.npz", help="One array an input, by name.")
@click.option("-o", "--output", metavar="OUT.npz", help="Write the outputs here instead of a table.")
@click.option(
    "--backend",
    type=click.Choice(["tvm", "onnxruntime"]),
    help="tvm for an artifact and onnxruntime for an ONNX file, unless given.",
)
@click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
@threads_option
@format_options
@verbosity_options
def command(
    model: str,
    file: str,
    output: str | None,
    backend: str | None,
    overwrite: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Run an artifact or an ONNX model and print what its outputs look like, or save them."""
    from graphwright.passes.io import check_output

    if output is not None:
        check_output(Path(output), overwrite)
        if Path(output).suffix != ".npz":
            raise InputError(f"--output {output}: expected a name that ends in .npz")
    outputs = run_model(model, file, backend=backend, threads=threads)
    if output is not None:
        save_outputs(outputs, Path(output), overwrite=overwrite)
    rows = [statistics(name, value) for name, value in outputs.items()]
    if as_json:
        print_json({"outputs": rows})
    elif output is None:
        numbers = ("min", "max", "mean")
        print_table(
            ("output", "shape", "type", *numbers),
            [(r["name"], as_shape(r["shape"]), r["dtype"], *(_short(r[n]) for n in numbers)) for r in rows],
            right=numbers,
        )


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
