"""Reading and writing model files: whatever onnxruntime runs is read, and saved so that it gives the same numbers."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from graphwright.passes import io
from graphwright.passes.errors import GraphwrightError, ModelError, OutputError, WeightsError, first_line
from onnx import TensorProto, helper, numpy_helper

FLOAT, STRING = TensorProto.FLOAT, TensorProto.STRING
node = helper.make_node
BIG = 3000  # elements: more than wire.LARGE bytes


def value(name: str, shape: Sequence[int | str], dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def write(
    path: Path, nodes: Sequence[onnx.NodeProto], inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto], weights: Sequence[TensorProto] = (), opset: int = 21, ir_version: int = 10,
    functions: Sequence[onnx.FunctionProto] = (), sparse: Sequence[onnx.SparseTensorProto] = (),
) -> Path:  # fmt: skip
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights, sparse_initializer=list(sparse))
    domains = {f.domain for f in functions}
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, functions=list(functions))
    path.write_bytes(model.SerializeToString())
    return path


def add(path: Path, weight: TensorProto, size: int, **options: object) -> Path:
    """y = x + w."""
    return write(path, [node("Add", ["x", "w"], ["y"])], [value("x", [size])], [value("y", [size])], [weight],
                 **options)  # fmt: skip


def drawn(size: int, name: str = "w") -> TensorProto:
    return numpy_helper.from_array(np.random.default_rng(size).standard_normal(size).astype(np.float32), name)


def outside(name: str, location: str, size: int, offset: int | None = None, length: int | None = None) -> TensorProto:
    """A tensor of `size` floats that is said to lie in another file."""
    tensor = TensorProto(name=name, dims=[size], data_type=FLOAT, data_location=TensorProto.EXTERNAL)
    for key, entry in (("location", location), ("offset", offset), ("length", length)):
        if entry is not None:
            tensor.external_data.add(key=key, value=str(entry))
    return tensor


def run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"]).run(None, feeds)


def same_after_saving(path: Path, feeds: dict[str, np.ndarray], out: Path | None = None) -> ir.Model:
    """Load, save, run both."""
    out = out or path.with_name("out.onnx")
    model = io.load(path)
    io.save(model, out)
    onnx.checker.check_model(onnx.load(out))
    for expected, found in zip(run(path, feeds), run(out, feeds), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    return model


X4 = {"x": np.arange(4, dtype=np.float32)}
XBIG = {"x": np.linspace(-1, 1, BIG, dtype=np.float32)}


# --- models that onnxruntime takes ------------------------------------------------------------------------------


def test_large_weights_stay_on_disk_and_small_ones_are_read(tmp_path: Path) -> None:
    path = add(tmp_path / "m.onnx", drawn(BIG), BIG)
    model = same_after_saving(path, XBIG)
    source = io.external_source(model.graph.initializers["w"].const_value)
    assert source is not None and source[0] == path and source[2] == BIG * 4
    small = io.load(add(tmp_path / "small.onnx", drawn(4), 4))
    assert io.external_source(small.graph.initializers["w"].const_value) is None
    assert io.weights_nbytes(model) == BIG * 4


def test_initializers_that_are_inputs(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [node("Add", ["x", "w"], ["y"])], [value("x", [4]), value("w", [4])],
                 [value("y", [4])], [drawn(4)], opset=8, ir_version=3)  # fmt: skip
    same_after_saving(path, X4)


def test_outputs_that_are_inputs_and_initializers(tmp_path: Path) -> None:
    outputs = [value("x", [4]), value("w", [4]), value("y", [4])]
    path = write(tmp_path / "m.onnx", [node("Relu", ["x"], ["y"])], [value("x", [4])], outputs, [drawn(4)])
    same_after_saving(path, X4)


def test_no_nodes_and_no_inputs(tmp_path: Path) -> None:
    same_after_saving(write(tmp_path / "a.onnx", [], [value("x", [4])], [value("x", [4])]), X4, tmp_path / "a2.onnx")
    same_after_saving(write(tmp_path / "b.onnx", [], [], [value("w", [BIG])], [drawn(BIG)]), {}, tmp_path / "b2.onnx")


def test_names_of_any_kind(tmp_path: Path) -> None:
    nodes = [node("Relu", ["a/b:0"], ["ü ñ"]), node("Neg", ["ü ñ"], ["../../y z"])]
    path = write(tmp_path / "m.onnx", nodes, [value("a/b:0", [4])], [value("../../y z", [4])])
    same_after_saving(path, {"a/b:0": X4["x"]})


def test_nodes_in_any_order_are_sorted(tmp_path: Path) -> None:
    """onnxruntime takes them, in subgraphs and functions too."""
    branches = {
        name: helper.make_graph([node("Neg", [f"{name}1"], [name]), node("Relu", ["t"], [f"{name}1"])], name, [],
                                [value(name, [4])]) for name in ("then_branch", "else_branch")}  # fmt: skip
    body = [node("Neg", ["m"], ["b"]), node("Exp", ["a"], ["m"])]
    function = helper.make_function("my", "F", ["a"], ["b"], body, [helper.make_opsetid("", 21)])
    nodes = [
        node("F", ["u"], ["y"], domain="my"), node("If", ["c"], ["u"], **branches), node("Sigmoid", ["x"], ["t"]),
        node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True))),
    ]  # fmt: skip
    path = write(tmp_path / "m.onnx", nodes, [value("x", [4])], [value("y", [4])], functions=[function])
    model = io.load(path)
    assert [n.op_type for n in model.graph] == ["Sigmoid", "Constant", "If", "F"]
    io.save(model.clone(), tmp_path / "out.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"))
    x = X4["x"]
    expected = -np.exp(-np.maximum(1 / (1 + np.exp(-x)), 0))
    # float32 rounding of three functions in a row
    np.testing.assert_allclose(run(tmp_path / "out.onnx", X4)[0], expected, rtol=1e-6)


def test_sparse_initializers_become_dense(tmp_path: Path) -> None:
    values = helper.make_tensor("w", FLOAT, [2], [1.0, 2.0])
    flat = helper.make_sparse_tensor(values, helper.make_tensor("i", TensorProto.INT64, [2], [0, 3]), [4])
    path = write(tmp_path / "m.onnx", [node("Add", ["x", "w"], ["y"])], [value("x", [4])], [value("y", [4])],
                 sparse=[flat])  # fmt: skip
    model = same_after_saving(path, X4)
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), [1, 0, 0, 2])
    pairs = helper.make_sparse_tensor(values, helper.make_tensor("i", TensorProto.INT64, [2, 2], [0, 1, 1, 0]), [2, 2])
    path = write(tmp_path / "p.onnx", [node("Neg", ["w"], ["y"])], [], [value("y", [2, 2])], sparse=[pairs])
    np.testing.assert_array_equal(io.load(path).graph.initializers["w"].const_value.numpy(), [[0, 1], [2, 0]])


@pytest.mark.parametrize(
    ("dims", "indices", "message"),
    [([4], [0, 4], "indices that do not fit"), ([4], [-1, 0], "indices that do not fit"),
     ([1 << 30, 1 << 10], [0, 1], "too large to be made dense")],
)  # fmt: skip
def test_sparse_initializers_that_are_wrong(tmp_path: Path, dims: list[int], indices: list[int], message: str) -> None:
    values = helper.make_tensor("w", FLOAT, [2], [1.0, 2.0])
    sparse = onnx.SparseTensorProto(dims=dims)
    sparse.values.CopyFrom(values)
    sparse.indices.CopyFrom(helper.make_tensor("i", TensorProto.INT64, [2], indices))
    path = write(tmp_path / "m.onnx", [node("Neg", ["w"], ["y"])], [], [value("y", dims)], sparse=[sparse])
    with pytest.raises(ModelError, match=message):
        io.load(path)


@pytest.mark.parametrize("size", [5, 9001])
@pytest.mark.parametrize("name", ["BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E5M2", "INT4", "UINT4", "FLOAT16", "BOOL"])
def test_weights_of_every_width(tmp_path: Path, name: str, size: int) -> None:
    """Packed four-bit integers included, of an odd number."""
    dtype = ir.DataType[name]
    weight = ir.to_proto(ir.tensor((np.arange(size) % 2).astype(dtype.numpy()), dtype=dtype, name="w"))
    nodes = [node("Cast", ["w"], ["c"], to=FLOAT), node("Add", ["x", "c"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, [value("x", [size])], [value("y", [size])], [weight])
    same_after_saving(path, {"x": np.ones(size, np.float32)})


def test_numbers_outside_raw_data(tmp_path: Path) -> None:
    packed = TensorProto(name="w", dims=[5], data_type=TensorProto.INT4, int32_data=[0x21, 0x43, 0x05])
    nodes = [node("Cast", ["w"], ["c"], to=FLOAT), node("Add", ["x", "c"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, [value("x", [5])], [value("y", [5])], [packed])
    same_after_saving(path, {"x": np.ones(5, np.float32)})
    long = TensorProto(name="w", dims=[BIG], data_type=FLOAT, float_data=np.arange(BIG))
    same_after_saving(add(tmp_path / "l.onnx", long, BIG), XBIG, tmp_path / "l2.onnx")


@pytest.mark.parametrize("size", [2, 2000])
def test_strings(tmp_path: Path, size: int) -> None:
    weight = TensorProto(name="w", dims=[size], data_type=STRING, string_data=["ü".encode()] * size)
    path = write(tmp_path / "m.onnx", [node("StringConcat", ["x", "w"], ["y"])], [value("x", [size], STRING)],
                 [value("y", [size], STRING)], [weight])  # fmt: skip
    same_after_saving(path, {"x": np.array(["a"] * size, object)})


def test_large_weights_of_a_branch(tmp_path: Path) -> None:
    then = helper.make_graph([node("Add", ["x", "w"], ["t"])], "t", [], [value("t", [BIG])], [drawn(BIG)])
    other = helper.make_graph([node("Neg", ["x"], ["e"])], "e", [], [value("e", [BIG])])
    nodes = [node("If", ["c"], ["y"], then_branch=then, else_branch=other)]
    inputs = [value("x", [BIG]), value("c", [], TensorProto.BOOL)]
    path = write(tmp_path / "m.onnx", nodes, inputs, [value("y", [BIG])])
    model = same_after_saving(path, {**XBIG, "c": np.array(True)})
    assert io.weights_nbytes(model) == BIG * 4


# --- external data ----------------------------------------------------------------------------------------------


def test_external_data_in_several_files_and_folders(tmp_path: Path) -> None:
    numbers = np.random.default_rng(1).standard_normal(2 * BIG).astype(np.float32)
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    numbers[:BIG].tofile(tmp_path / "sub" / "a.bin")
    numbers.tofile(tmp_path / "sub" / "deep" / "b.bin")
    weights = [
        outside("p", "sub/a.bin", BIG),  # neither offset nor length
        outside("q", "sub/deep/b.bin", BIG, offset=4 * BIG),  # up to the end of the file
        outside("r", "sub/../sub/deep/b.bin", BIG, 0, 4 * BIG),
        outside("s", "sub/a.bin", 4, 40, 16),
        outside("z", "sub/a.bin", 0),
    ]
    nodes = [
        node("Sum", ["x", "p", "q", "r"], ["t"]), node("Concat", ["t", "s", "z"], ["y"], axis=0),
    ]  # fmt: skip
    path = write(tmp_path / "m.onnx", nodes, [value("x", [BIG])], [value("y", [BIG + 4])], weights)
    model = same_after_saving(path, XBIG)
    assert io.external_source(model.graph.initializers["z"].const_value) is None  # nothing to read
    assert model.graph.initializers["z"].const_value.tobytes() == b""


def test_external_data_is_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.ones(BIG, np.float32).tofile(tmp_path / "w.bin")
    add(tmp_path / "m.onnx", outside("w", "w.bin", BIG), BIG)
    monkeypatch.chdir(tmp_path)
    model = io.load("m.onnx")
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), np.ones(BIG))


def test_external_data_of_attributes(tmp_path: Path) -> None:
    np.arange(4, dtype=np.float32).tofile(tmp_path / "w.bin")
    constant = node("Constant", [], ["w"])
    constant.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(outside("", "w.bin", 4))
    path = write(tmp_path / "m.onnx", [constant, node("Add", ["x", "w"], ["y"])], [value("x", [4])],
                 [value("y", [4])])  # fmt: skip
    io.save(io.load(path), tmp_path / "out.onnx")
    np.testing.assert_array_equal(run(tmp_path / "out.onnx", X4)[0], [0, 2, 4, 6])


@pytest.mark.parametrize("where", ["attribute", "function", "branch"])
def test_external_data_never_leaves_the_folder(tmp_path: Path, where: str) -> None:
    """Wherever the tensor is: a constant in a function's body could otherwise read any file."""
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    (tmp_path / "model").mkdir()
    constant = node("Constant", [], ["w"])
    constant.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(outside("", "../secret.bin", 4))
    functions, nodes = [], [constant, node("Add", ["x", "w"], ["y"])]
    if where == "function":
        opsets = [helper.make_opsetid("", 21)]
        functions = [helper.make_function("my", "F", ["x"], ["y"], nodes, opsets)]
        nodes = [node("F", ["x"], ["y"], domain="my")]
    elif where == "branch":
        bodies = {
            name: helper.make_graph([node("Add", ["x", "w"], [name])], name, [], [value(name, [4])],
                                    [outside("w", "../secret.bin", 4)]) for name in ("then_branch", "else_branch")
        }  # fmt: skip
        nodes = [node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True))),
                 node("If", ["c"], ["y"], **bodies)]  # fmt: skip
    path = write(tmp_path / "model" / "m.onnx", nodes, [value("x", [4])], [value("y", [4])], functions=functions)
    with pytest.raises(WeightsError, match="outside the model's folder"):
        io.load(path)


@pytest.mark.parametrize(
    ("offset", "length", "message"),
    [(-4, None, "needs 12000 bytes"), (0, 100, "found 100"), (8, None, "which has 12000"), ("a", None, "no number")],
)
def test_external_data_with_a_wrong_range(tmp_path: Path, offset: int, length: int | None, message: str) -> None:
    np.ones(BIG, np.float32).tofile(tmp_path / "w.bin")
    path = add(tmp_path / "m.onnx", outside("w", "w.bin", BIG, offset, length), BIG)
    with pytest.raises(WeightsError, match=message):
        io.load(path)


def test_models_given_by_links(tmp_path: Path) -> None:
    store, links = tmp_path / "store", tmp_path / "links"
    store.mkdir()
    links.mkdir()
    add(store / "inside.onnx", drawn(BIG), BIG)
    (links / "symbolic.onnx").symlink_to(store / "inside.onnx")
    os.link(store / "inside.onnx", links / "hard.onnx")
    same_after_saving(links / "symbolic.onnx", XBIG, tmp_path / "1.onnx")
    same_after_saving(links / "hard.onnx", XBIG, tmp_path / "2.onnx")


def test_the_layout_of_download_caches(tmp_path: Path) -> None:
    """snapshots/m.onnx and snapshots/m.onnx_data are links to blobs of other names."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    np.ones(BIG, np.float32).tofile(blobs / "d2c0ffee")
    add(blobs / "d1f00d", outside("w", "m.onnx_data", BIG), BIG)
    (snapshot / "m.onnx").symlink_to("../../blobs/d1f00d")
    (snapshot / "m.onnx_data").symlink_to("../../blobs/d2c0ffee")
    io.save(io.load(snapshot / "m.onnx"), tmp_path / "out.onnx")
    np.testing.assert_array_equal(run(tmp_path / "out.onnx", XBIG)[0], XBIG["x"] + 1)


def test_data_beside_what_a_link_points_to(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "links").mkdir()
    np.ones(BIG, np.float32).tofile(tmp_path / "store" / "w.bin")
    add(tmp_path / "store" / "m.onnx", outside("w", "w.bin", BIG), BIG)
    (tmp_path / "links" / "m.onnx").symlink_to(tmp_path / "store" / "m.onnx")
    model = io.load(tmp_path / "links" / "m.onnx")
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), np.ones(BIG))


# --- models that nobody can run ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (TensorProto(name="w", dims=[5], data_type=FLOAT, float_data=[1, 2]), "holds 2 numbers; expected 5"),
        (TensorProto(name="w", dims=[5], data_type=FLOAT), "holds 0 numbers; expected 5"),
        (TensorProto(name="w", dims=[-5], data_type=FLOAT), "negative dimension"),
        (TensorProto(name="w", dims=[1 << 31, 1 << 31], data_type=FLOAT), "impossible shape"),
        (TensorProto(name="w", dims=[5], data_type=99), "unknown element type 99"),
        (TensorProto(name="w", dims=[3], data_type=STRING, string_data=[b"a"]), "holds 1 strings; expected 3"),
        (TensorProto(name="w", dims=[2], data_type=FLOAT, raw_data=bytes(9)), "holds 9 bytes; expected 8"),
    ],
)
def test_tensors_whose_numbers_do_not_fit(tmp_path: Path, weight: TensorProto, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        io.load(add(tmp_path / "m.onnx", weight, 5))


def test_a_function_that_calls_itself(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("my", 1)]
    functions = [
        helper.make_function("my", name, ["a"], ["b"], [node(other, ["a"], ["b"], domain="my")], opsets)
        for name, other in (("F", "G"), ("G", "F"))
    ]
    nodes = [node("F", ["x"], ["y"], domain="my")]
    path = write(tmp_path / "m.onnx", nodes, [value("x", [4])], [value("y", [4])], functions=functions)
    with pytest.raises(ModelError, match="calls itself"):
        io.load(path)


def test_a_function_whose_output_nothing_makes(tmp_path: Path) -> None:
    function = helper.make_function("my", "F", ["a"], ["c"], [node("Neg", ["a"], ["b"])], [helper.make_opsetid("", 21)])
    nodes = [node("F", ["x"], ["y"], domain="my")]
    path = write(tmp_path / "m.onnx", nodes, [value("x", [4])], [value("y", [4])], functions=[function])
    with pytest.raises(ModelError, match="'c' is not defined by any node"):
        io.load(path)


def test_a_branch_that_returns_an_outer_value(tmp_path: Path) -> None:
    """onnxruntime refuses it too."""
    bodies = {name: helper.make_graph([], name, [], [value("t", [4])]) for name in ("then_branch", "else_branch")}
    nodes = [node("Relu", ["x"], ["t"]), node("If", ["c"], ["y"], **bodies)]
    inputs = [value("x", [4]), value("c", [], TensorProto.BOOL)]
    path = write(tmp_path / "m.onnx", nodes, inputs, [value("y", [4])])
    with pytest.raises(ModelError, match="'t' is not defined by any node of its graph; put an Identity between"):
        io.load(path)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut out or put in, mostly outside the weights."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(result))
        kind, count = rng.random(), rng.randrange(1, 9)
        if kind < 0.6:
            result[at] = rng.randrange(256)
        elif kind < 0.8:
            del result[at : at + count]
        else:
            result[at:at] = rng.randbytes(count)
    return bytes(result)


def test_damaged_files_end_in_one_line(tmp_path: Path) -> None:
    """Whatever the bytes: a model that can be saved again, or one of our errors."""
    body = [node("Add", ["x", "v"], ["then"])]
    then = helper.make_graph(body, "t", [], [value("then", ["N"])], [drawn(4, "v")])
    other = helper.make_graph([node("Neg", ["x"], ["else"])], "e", [], [value("else", ["N"])])
    opsets = [helper.make_opsetid("", 21)]
    function = helper.make_function("my", "F", ["a"], ["b"], [node("Relu", ["a"], ["b"])], opsets)
    nodes = [
        node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True))),
        node("F", ["x"], ["q"], domain="my"),
        node("If", ["c"], ["p"], then_branch=then, else_branch=other), node("Softmax", ["q"], ["r"], axis=-1),
        node("Sum", ["p", "r", "w"], ["y"]),
    ]  # fmt: skip
    path = write(tmp_path / "m.onnx", nodes, [value("x", ["N"])], [value("y", ["N"])], [drawn(8)], functions=[function])
    data = path.read_bytes()
    rng = random.Random(20)
    loaded = refused = 0
    for _ in range(1500):
        path.write_bytes(mutated(data, rng))
        try:
            io.save(io.load(path), tmp_path / "out.onnx", overwrite=True)
            loaded += 1
        except GraphwrightError as error:
            assert "\n" not in str(error)
            refused += 1
    assert loaded > 100 and refused > 100


# --- saving -----------------------------------------------------------------------------------------------------


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_model_is_not_written_over_its_own_weights(tmp_path: Path) -> None:
    """They would be read from places where they no longer are."""
    path = add(tmp_path / "m.onnx", drawn(BIG), BIG)
    model = io.load(path)
    with pytest.raises(OutputError, match="holds weights of the model and will not be replaced"):
        io.save(model, path, overwrite=True)
    (tmp_path / "link.onnx").symlink_to(path)
    with pytest.raises(OutputError, match="will not be replaced"):
        io.save(model, tmp_path / "link.onnx", overwrite=True)
    same_after_saving(path, XBIG)


def test_existing_files_and_folders_are_kept(tmp_path: Path) -> None:
    model = io.load(add(tmp_path / "m.onnx", drawn(4), 4))
    (tmp_path / "out.onnx").write_text("precious")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="already exists; give --overwrite"):
        io.save(model, tmp_path / "out.onnx")
    with pytest.raises(OutputError, match="is a folder; expected a file name"):
        io.save(model, tmp_path / "folder", overwrite=True)
    assert (tmp_path / "out.onnx").read_text() == "precious"


def test_weights_beyond_a_gibibyte_get_their_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "EMBED_LIMIT", 8000)
    path = add(tmp_path / "m.onnx", drawn(BIG), BIG)
    same_after_saving(path, XBIG)
    assert files(tmp_path) == ["m.onnx", "out.onnx", "out.onnx.data"]
    assert (tmp_path / "out.onnx").stat().st_size < 1000
    again = io.load(tmp_path / "out.onnx")
    monkeypatch.setattr(io, "EMBED_LIMIT", 1 << 30)
    io.save(again, tmp_path / "whole.onnx")
    np.testing.assert_array_equal(run(tmp_path / "whole.onnx", XBIG)[0], run(path, XBIG)[0])


@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_a_full_disk_leaves_nothing(tmp_path: Path, limit: int) -> None:
    """RLIMIT_FSIZE ends a write as a full disk does. limit: of weights inside the file."""
    path = add(tmp_path / "m.onnx", drawn(1 << 18), 1 << 18)
    (tmp_path / "out").mkdir()
    code = f"""
import resource, signal, sys
from graphwright.passes import errors, io
io.EMBED_LIMIT = {limit}
model = io.load({str(path)!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    io.save(model, {str(tmp_path / "out" / "o.onnx")!r})
except errors.OutputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cannot be written (File too large); choose another output" in done.stdout
    assert files(tmp_path / "out") == []


def test_saving_takes_memory_of_the_graph_not_of_the_weights(tmp_path: Path) -> None:
    """300 MB of weights in 60 MB above the interpreter's own."""
    size = 75 << 20
    with open(tmp_path / "w.bin", "wb") as file:
        file.truncate(size * 4)
    path = add(tmp_path / "m.onnx", outside("w", "w.bin", size), size)
    code = f"""
from graphwright.passes import io
from graphwright.runtime.measure import peak_rss_mb
before = peak_rss_mb()
io.save(io.load({str(path)!r}), {str(tmp_path / "out.onnx")!r})
print(peak_rss_mb() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 60
    assert (tmp_path / "out.onnx").stat().st_size > size * 4


def test_weights_that_change_while_they_are_read_are_noticed(tmp_path: Path) -> None:
    np.ones(BIG, np.float32).tofile(tmp_path / "w.bin")
    model = io.load(add(tmp_path / "m.onnx", outside("w", "w.bin", BIG), BIG))
    os.truncate(tmp_path / "w.bin", 100)
    with pytest.raises(WeightsError, match="was it changed while being read"):
        io.save(model, tmp_path / "out.onnx")
    assert files(tmp_path) == ["m.onnx", "w.bin"]


def test_the_result_has_the_usual_permissions(tmp_path: Path) -> None:
    model = io.load(add(tmp_path / "m.onnx", drawn(4), 4))
    old = os.umask(0o027)
    try:
        io.save(model, tmp_path / "out.onnx")
    finally:
        os.umask(old)
    assert (tmp_path / "out.onnx").stat().st_mode & 0o777 == 0o640


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = io.load(add(tmp_path / "m.onnx", drawn(BIG), BIG))
    tensor = model.graph.initializers["w"].const_value
    io.save(model, tmp_path / "out.onnx")
    assert model.graph.initializers["w"].const_value is tensor


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "[ONNXRuntimeError] : 1 : FAIL : Load failed:/src/core/model.cc:256 a::Model::Model(T&&, const b::P<int>&, "
            "const c::L&) Unsupported\nversion: 99",
            "Load failed:Unsupported version: 99",
        ),
        (
            "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : x /a/b.h:9 void a::(anonymous namespace)::f(g (*)(int)) const "
            "[with T = int] n == 1 was false. (n)",
            "NOT_IMPLEMENTED : x n == 1 was false. (n)",
        ),
        ("'/a/b.onnx' is not (yet) there", "'/a/b.onnx' is not (yet) there"),
        ("", "ValueError"),
    ],
)
def test_the_line_of_an_error_has_no_places_in_sources(text: str, line: str) -> None:
    assert first_line(ValueError(text)) == line
