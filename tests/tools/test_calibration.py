"""Samples from .npz files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from graphwright.passes import io
from graphwright.passes.errors import InputError
from graphwright.tools.calibration import load_calibration
from onnx import parser

TEXT = """<ir_version: 10, opset_import: ["" : 20]>
agraph (float[B,3] x, int64 n) => (float[B,3] y) { c = Cast<to=1>(n)  y = Mul(x, c) }"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    import onnx

    onnx.save(parser.parse_model(TEXT), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def load(
    path: Path, arrays: Mapping[str, np.ndarray], pins: Mapping[str, Sequence[int]]
) -> dict[str, list[tuple[int, ...]]]:
    file = path.with_name("c.npz")
    np.savez(file, **arrays)
    samples = load_calibration(file, io.load(path), pins)
    return {name: [array.shape for array in arrays] for name, arrays in samples.items()}


def test_an_array_of_the_inputs_rank_is_one_sample(path: Path) -> None:
    found = load(path, {"x": np.zeros((5, 3), np.float32), "n": np.array(2)}, {})
    assert found == {"x": [(5, 3)], "n": [()]}


def test_one_dimension_more_holds_samples(path: Path) -> None:
    found = load(path, {"x": np.zeros((4, 5, 3), np.float32), "n": np.arange(4)}, {})
    assert found == {"x": [(5, 3)] * 4, "n": [()] * 4}


def test_numbers_of_the_other_byte_order_are_read(path: Path) -> None:
    found = load(path, {"x": np.zeros((5, 3), ">f4"), "n": np.array(2, ">i8")}, {})
    assert found == {"x": [(5, 3)], "n": [()]}


def test_rows_are_cut_to_a_pinned_batch(path: Path) -> None:
    found = load(path, {"x": np.zeros((6, 3), np.float32), "n": np.arange(3)}, {"x": (2, 3)})
    assert found == {"x": [(2, 3)] * 3, "n": [()] * 3}


def test_a_folder_is_read_in_order(path: Path) -> None:
    folder = path.with_name("samples")
    folder.mkdir()
    for index in (2, 1):
        np.savez(folder / f"{index}.npz", x=np.full((1, 3), index, np.float32), n=np.array(index))
    samples = load_calibration(folder, io.load(path), {})
    assert [int(array[0, 0]) for array in samples["x"]] == [1, 2]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((5, 3), np.float32)}, "c.npz: input 'n' is missing"),
        ({"x": np.zeros((2, 2, 3), np.float32), "n": np.array(1)}, "expected the same number of each"),
        ({"x": np.zeros(3, np.float32), "n": np.array(1)}, r"input 'x' has shape \[3\]; expected rank 2"),
        ({"x": np.zeros((5, 3), np.float32), "n": np.array(1)}, "has 5 rows; expected a multiple of the model's 2"),
        ({"x": np.zeros((2, 3)), "n": np.array(1)}, "c.npz: input 'x' is float64; expected float32"),
        ({"x": np.zeros((2, 3), np.float32), "n": np.array(1.0)}, "c.npz: input 'n' is float64; expected int64"),
        ({"x": np.zeros((2, 4), np.float32), "n": np.array(1)}, r"samples of shape \[2, 4\]; expected \[2, 3\]"),
        ({"x": np.zeros((0, 2, 3), np.float32), "n": np.zeros(0, np.int64)}, r"has shape \[0, 2, 3\], .* no sample"),
    ],
)
def test_arrays_that_do_not_fit(path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(path, arrays, {"x": (2, 3)})


def test_samples_without_elements(path: Path) -> None:
    with pytest.raises(InputError, match=r"input 'x' has samples of shape \[0, 3\], without elements"):
        load(path, {"x": np.zeros((0, 3), np.float32), "n": np.array(1)}, {})


def test_an_input_with_a_default_may_have_samples(tmp_path: Path) -> None:
    import onnx

    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[B,3] x, float s) => (float[B,3] y) <float s = {2}> { y = Mul(x, s) }"""
    )
    onnx.save(model, tmp_path / "m.onnx")
    found = load(tmp_path / "m.onnx", {"x": np.zeros((4, 5, 3), np.float32), "s": np.zeros(4, np.float32)}, {})
    assert found == {"x": [(5, 3)] * 4, "s": [()] * 4}


def test_a_folder_without_samples(path: Path) -> None:
    path.with_name("empty").mkdir()
    with pytest.raises(InputError, match=r"holds no .npz file and no image"):
        load_calibration(path.with_name("empty"), io.load(path), {})
