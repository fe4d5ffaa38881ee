"""What a token must read, by which the benchmark of generators judges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphwright.tools.bench_generate import line, weight_bytes
from onnx import TensorProto, helper, numpy_helper


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_table_counts_only_where_more_than_rows_of_it_are_read(tied: bool, narrow: bool, tmp_path: Path) -> None:
    table, head = np.zeros((100, 8), np.float16 if narrow else np.float32), np.zeros((8, 50), np.float16)
    read = "wide" if narrow else "table"
    nodes = [helper.make_node("Gather", [read, "ids"], ["x"]), helper.make_node("MatMul", ["x", "head"], ["y"])]
    if narrow:
        nodes.insert(0, helper.make_node("Cast", ["table"], ["wide"], to=TensorProto.FLOAT))
    if tied:
        nodes.append(helper.make_node("Transpose", [read], ["t"]))
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    held = [numpy_helper.from_array(a, name) for name, a in (("table", table), ("head", head))]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [ids], [y], held)), tmp_path / "m.onnx")
    assert weight_bytes(tmp_path / "m.onnx") == head.nbytes + (table.nbytes if tied else 0)


def test_codes_of_four_bits_count_half_a_byte(tmp_path: Path) -> None:
    codes = helper.make_tensor("codes", TensorProto.INT4, [64, 33], bytes(64 * 33 // 2), raw=True)
    scale = numpy_helper.from_array(np.ones((2, 33), np.float32), "scale")
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["weight"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, n]) for name, n in (("x", 64), ("y", 33)))
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [y], [codes, scale])), tmp_path / "m.onnx")
    assert weight_bytes(tmp_path / "m.onnx") == 64 * 33 // 2 + 4 * 2 * 33


def test_a_row_without_a_limit_has_empty_cells() -> None:
    spread = {"median": 1.0, "low": 0.5, "high": 2.0}
    row = {"call": "x", "milliseconds": spread, "onnxruntime": spread, "ratio": spread}
    assert line(row) == ["x", "1.00 [0.50, 2.00]", "1.00", "1.00 [0.50, 2.00]", "", ""]
    limited = line({**row, "least_milliseconds": {**spread, "median": 0.9}, "of_limit": spread})
    assert limited[-2:] == ["0.90", "100% [50%, 200%]"]
