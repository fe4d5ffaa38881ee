"""`Session` in the place of `onnxruntime.InferenceSession`: the same answers, and results that belong to the caller."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import psutil
import pytest
from graphwright.passes.errors import GraphwrightError, InputError
from graphwright.runtime import session as sessions
from graphwright.runtime.build import build
from graphwright.runtime.session import Session
from graphwright.runtime.target import Target
from onnx import TensorProto, helper, parser

pytestmark = pytest.mark.tvm
Optimize = Callable[..., Any]
FLOAT = TensorProto.FLOAT

MLP = "mlp (float[N,8] x) => (float[N,4] y, float[N,4] h) { h = MatMul(x, w)  y = Relu(h) }"
W = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)


def reference(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])


def equal(expected: Any, found: Any) -> None:
    """float32 rounding of a handful of operations; everything that is no float exactly."""
    if isinstance(expected, list):
        assert isinstance(found, list) and len(found) == len(expected)
        for a, b in zip(expected, found, strict=True):
            equal(a, b)
        return
    assert isinstance(found, np.ndarray) and found.dtype == expected.dtype and found.shape == expected.shape
    if expected.dtype.kind == "f":
        tolerance = 1e-3 if expected.dtype == np.float16 else 1e-5
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    else:
        np.testing.assert_array_equal(found, expected)


def arrays(values: Sequence[Any]) -> list[np.ndarray]:
    return [a for v in values for a in (v if isinstance(v, list) else [v])]


def check(built: Any, *sets: dict[str, np.ndarray]) -> Session:
    """The answers, types and names are onnxruntime's; results share memory with nothing and outlive later runs."""
    session, original = Session(built.artifact), reference(built.model)
    for feeds in sets:
        before = {name: array.copy() for name, array in feeds.items()}
        expected, found = original.run(None, feeds), session.run(None, feeds)
        equal(expected, found)
        own = arrays(found)
        for index, array in enumerate(own):
            assert array.flags.writeable
            assert not any(np.shares_memory(array, other) for other in (*feeds.values(), *own[:index]))
        kept = [array.copy() for array in own]
        for array in own:
            array[...] = "other" if array.dtype.kind == "O" else 77
        for name, array in feeds.items():
            np.testing.assert_array_equal(array, before[name])
        again = arrays(session.run(None, feeds))
        for first, second in zip(kept, again, strict=True):
            np.testing.assert_array_equal(first, second)
    for mine, theirs in ((session.get_inputs(), original.get_inputs()),
                         (session.get_outputs(), original.get_outputs())):  # fmt: skip
        assert [(arg.name, arg.type) for arg in mine] == [(arg.name, arg.type) for arg in theirs]
    assert [arg.shape for arg in session.get_inputs()] == [arg.shape for arg in original.get_inputs()]
    return session


@pytest.fixture(scope="module")
def mlp(optimized: Optimize) -> Any:
    return optimized(MLP, w=W)


@pytest.fixture
def session(mlp: Any) -> Session:
    return Session(mlp.artifact)


# --- what run takes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [None, [], ["y", "h"], ["h", "y"], ["h"], ["h", "h"], ("y",)])
def test_outputs_by_name(session: Session, mlp: Any, names: Any) -> None:
    found = session.run(names, {"x": X})
    equal(reference(mlp.model).run(names, {"x": X}), found)
    assert not any(np.shares_memory(a, b) for i, a in enumerate(found) for b in found[:i])


def unaligned(array: np.ndarray) -> np.ndarray:
    raw = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    raw[...] = array
    return raw


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


def aligned(array: np.ndarray) -> np.ndarray:
    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    result = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    result[...] = array
    return result


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize(
    "change",
    [
        np.asfortranarray, unaligned, read_only, aligned, np.matrix, np.ma.masked_array,
        lambda x: np.repeat(x, 2, axis=1)[:, ::2], lambda x: x[::-1].copy()[::-1], lambda x: x.astype(">f4"),
        lambda x: x.tolist(), lambda x: [list(row) for row in x], onnxruntime.OrtValue.ortvalue_from_numpy,
        lambda x: np.broadcast_to(x, (1, 3, 8))[0],
    ],
    ids=["fortran", "unaligned", "read-only", "aligned", "matrix", "masked", "strided", "reversed", "big-endian",
         "list", "list of lists", "OrtValue", "broadcast"],
)  # fmt: skip
def test_arrays_of_every_kind(session: Session, mlp: Any, change: Callable[[np.ndarray], Any]) -> None:
    equal(reference(mlp.model).run(None, {"x": X}), session.run(None, {"x": change(X)}))


def test_other_sizes_and_no_rows(session: Session, mlp: Any) -> None:
    for rows in (1, 5, 0, 1000, 3):
        feeds = {"x": np.resize(X, (rows, 8))}
        equal(reference(mlp.model).run(None, feeds), session.run(None, feeds))


@pytest.mark.parametrize(
    ("names", "feeds", "message"),
    [
        (None, {}, "input 'x' is missing; expected x"),
        (None, {"xx": X}, r"unknown input 'xx'; (did you mean|known:) x"),
        (None, {"x": X, "z": X}, "unknown input 'z'"),
        (None, {"x": X.astype(np.float64)}, "input 'x' has type float64; expected float32"),
        (None, {"x": X.astype(np.int32)}, "has type int32; expected float32"),
        (None, {"x": X[0]}, r"has shape \[8\]; expected rank 2 \['N', 8\]"),
        (None, {"x": X[:, :5]}, r"has shape \[3, 5\]; expected \['N', 8\]"),
        (None, {"x": None}, "has type object; expected float32"),
        (None, {"x": "text"}, "has type <U4; expected float32"),
        (None, {"x": [[1], [2, 3]]}, "input 'x' is not an array"),
        (None, {"x": [[True] * 8, ["a"] * 8]}, "has type <U5; expected float32"),
        (None, None, "input_feed is a NoneType; expected a dict"),
        (None, [X], "input_feed is a list; expected a dict"),
        (["q"], {"x": X}, "unknown output 'q'; known: h, y"),
        ("y", {"x": X}, "output_names is the text 'y'; expected a list"),
    ],
)
def test_what_does_not_fit(session: Session, mlp: Any, names: Any, feeds: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        session.run(names, feeds)
    equal(reference(mlp.model).run(None, {"x": X}), session.run(None, {"x": X}))


def test_dimensions_of_one_name_are_one_size(optimized: Optimize) -> None:
    built = optimized("two (float[N,4] a, float[N,4] b) => (float[N,4] y) { y = Add(a, b) }")
    with pytest.raises(InputError, match="dimension 'N' is 3 in input 'b' and 2 in input 'a'; expected one size"):
        Session(built.artifact).run(None, {"a": np.ones((2, 4), np.float32), "b": np.ones((3, 4), np.float32)})


def test_after_an_error_in_the_compiled_code_it_goes_on(optimized: Optimize) -> None:
    """Sizes that only the compiled code can find wrong: M must be N."""
    built = optimized("two (float[N,4] a, float[M,4] b) => (float[N,4] y) { y = Sub(a, b) }")
    session = Session(built.artifact)
    ones = {n: np.ones((n, 4), np.float32) for n in (2, 3)}
    for _ in range(3):
        with pytest.raises(GraphwrightError):
            session.run(None, {"a": ones[2], "b": ones[3]})
        np.testing.assert_array_equal(session.run(None, {"a": ones[3], "b": ones[3]})[0], np.zeros((3, 4)))


@pytest.mark.parametrize(("threads", "message"), [(0, "threads is 0; expected at least 1"), (-1, "threads is -1")])
def test_wrong_numbers_of_threads(mlp: Any, threads: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Session(mlp.artifact, threads=threads)


def test_who_runs_it(session: Session, optimized: Optimize) -> None:
    assert session.get_providers() == ["TVMExecutionProvider"]
    built = optimized("mix (float[4] x) => (float[4] y, string[4] s) { y = Relu(x)  s = Cast<to=8>(y) }")
    assert Session(built.artifact).get_providers() == ["TVMExecutionProvider", "CPUExecutionProvider"]


def test_what_it_says_of_itself(optimized: Optimize) -> None:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 20]> {MLP}')
    model.producer_name, model.domain, model.doc_string, model.model_version = "me", "a.b", "says", 7
    model.graph.doc_string = "sums"
    helper.set_model_props(model, {"stride": "32"})
    built = optimized(model, w=W)
    session, original = Session(built.artifact, threads=1), reference(built.model)
    mine, theirs = session.get_modelmeta(), original.get_modelmeta()
    names = [field.name for field in dataclasses.fields(mine)]
    assert {name: getattr(mine, name) for name in names} == {name: getattr(theirs, name) for name in names}
    assert set(names) == {name for name in dir(theirs) if not name.startswith("_")}
    mine, theirs = session.get_session_options(), original.get_session_options()
    assert mine.intra_op_num_threads == theirs.intra_op_num_threads == 1
    assert session.get_provider_options() == {"TVMExecutionProvider": {"target": "cpu"}}
    assert session.get_overridable_initializers() == []


# --- models at the edge -----------------------------------------------------------------------------------------

X4 = np.linspace(-1, 2, 4, dtype=np.float32)
BIG = np.random.default_rng(2).standard_normal(100).astype(np.float32)
SQUARE = BIG.reshape(10, 10)

EDGES: dict[str, tuple[str, dict[str, np.ndarray], list[dict[str, np.ndarray]]]] = {
    "an output is an input": ("a (float[100] x) => (float[100] x, float[100] y) { y = Relu(x) }", {}, [{"x": BIG}]),
    "small": ("a (float[4] x) => (float[4] x, float[4] y) { y = Relu(x) }", {}, [{"x": X4}]),
    "an output is an initializer": (
        "a (float[4] x) => (float[4] w, float[100] v, float[4] y) { y = Relu(x) }", {"w": X4, "v": BIG}, [{"x": X4}]),
    "an initializer twice": (
        "a (float[4] x) => (float[100] v, float[100] v, float[4] y) { y = Relu(x) }", {"v": BIG}, [{"x": X4}]),
    "no nodes": ("a (float[100] x) => (float[100] x) { }", {}, [{"x": BIG}]),
    "no inputs": ("a () => (float[100] y, float[4] z) { y = Neg(w)  z = Neg(v) }", {"w": BIG, "v": X4}, [{}]),
    "nothing at all": ("a () => (float[100] w) { }", {"w": BIG}, [{}]),
    "one output twice": ("a (float[100] x) => (float[100] y, float[100] y) { y = Relu(x) }", {}, [{"x": BIG}]),
    "views of a result": (
        "a (float[10,10] x) => (float[1,100] y, float[5,20] z, float[10,10] h) "
        "{ h = Relu(x)  y = Flatten<axis=0>(h)  z = Reshape(h, s) }", {"s": np.array([5, 20])}, [{"x": SQUARE}]),
    "views of an input": (
        "a (float[10,10] x) => (float[1,100] y, float[5,20] z) { y = Flatten<axis=0>(x)  z = Reshape(x, s) }",
        {"s": np.array([5, 20])}, [{"x": aligned(SQUARE)}]),
    "parts of an input": (
        "a (float[10,10] x) => (float[5,10] y, float[5,10] z) { y, z = Split<axis=0, num_outputs=2>(x) }", {},
        [{"x": aligned(SQUARE)}]),
    "part of a weight": (
        "a (float[1] x) => (float[5,10] y, float[1] q) { y = Slice(w, from, to)  q = Neg(x) }",
        {"w": SQUARE, "from": np.array([5]), "to": np.array([10])}, [{"x": X4[:1]}]),
    "a value of no dimension": (
        "a (float x, int64 n) => (float y, int64 m, float x2) { y = Neg(x)  m = Neg(n)  x2 = Identity(x) }",
        {}, [{"x": np.array(3, np.float32), "n": np.array(4)}]),
    "dimensions of size zero": (
        "a (float[N,0] x) => (float[N,0] y, float[N] s) { y = Relu(x)  s = ReduceSum<keepdims=0>(x, axes) }",
        {"axes": np.array([1])}, [{"x": np.zeros((3, 0), np.float32)}, {"x": np.zeros((0, 0), np.float32)}]),
    "an input left out": ("a (float[4] x) => (float[4] y) { y = Clip(x, , top) }",
                          {"top": np.array(1, np.float32)}, [{"x": X4}]),
    "weights that are no numbers": ("a (float[4] x) => (float[4] y) { y = Add(x, w) }",
                                    {"w": np.array([np.nan, 1, np.inf, 2], np.float32)}, [{"x": X4}]),
    "a branch that reads outer values": (
        "a (float[4] x, bool c) => (float[4] y) { t = Relu(x)  y = If (c) <"
        "then_branch = th () => (float[4] o) { o = Add(t, w) }, else_branch = el () => (float[4] p) { p = Neg(x) }> }",
        {"w": X4}, [{"x": X4, "c": np.array(True)}, {"x": X4, "c": np.array(False)}]),
    "strings": ("a (string[N] x) => (string[N] y) { y = StringConcat(x, x) }", {},
                [{"x": np.array(["a", "é"], object)}]),
}  # fmt: skip


@pytest.mark.parametrize("name", EDGES)
def test_models_at_the_edge(optimized: Optimize, name: str) -> None:
    text, weights, sets = EDGES[name]
    check(optimized(text, **weights), *sets)


REGIONS: dict[str, tuple[str, dict[str, np.ndarray], dict[str, np.ndarray], list[str]]] = {
    "a loop that reads outer values": (
        "a (float[4] x, int64 n) => (float[4] z) { t = Relu(x)  c = Constant<value = bool {1}>()  y = Loop (n, c, t) <"
        "body = b (int64 i, bool ci, float[4] s) => (bool co, float[4] so) "
        "{ co = Identity(ci)  q = Mul(x, w)  so = Add(s, q) }>  z = Mul(y, w) }",
        {"w": X4}, {"x": X4, "n": np.array(3)}, ["tvm", "onnxruntime"]),
    "sequences between two fallbacks": (
        "a (float[4] x) => (float[8] z) { t = Relu(x)  s = SequenceConstruct(t, x)  u = Neg(t)"
        "  s2 = SequenceInsert(s, u)  a = SequenceAt(s2, i)  v = Exp(a)  b = SequenceAt(s2, j)"
        "  z = Concat<axis=0>(v, b) }",
        {"i": np.array(2), "j": np.array(0)}, {"x": X4}, ["tvm", "onnxruntime", "tvm"]),
    "a sequence as output": ("a (float[4] x) => (seq(float[4]) s) { t = Relu(x)  s = SequenceConstruct(t, x) }", {},
                             {"x": X4}, ["tvm", "onnxruntime"]),
    "only fallbacks": ("a (string[N] x) => (string[N] y) { t = StringConcat(x, x)  y = StringConcat(t, x) }", {},
                       {"x": np.array(["a", "b"], object)}, ["onnxruntime"]),
    "there and back twice": (
        "a (float[4] x) => (float[4] y) { t = Relu(x)  s = Cast<to=8>(t)  u = Cast<to=1>(s)  v = Exp(u)"
        "  s2 = Cast<to=8>(v)  u2 = Cast<to=1>(s2)  q = Mul(u2, w)  y = Add(q, t) }",
        {"w": X4}, {"x": X4}, ["tvm", "onnxruntime", "tvm", "onnxruntime", "tvm"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REGIONS)
def test_models_of_several_regions(optimized: Optimize, name: str) -> None:
    text, weights, feeds, runtimes = REGIONS[name]
    built = optimized(text, **weights)
    assert [runtime for runtime, _ in built.runtimes] == runtimes
    check(built, feeds)


@pytest.mark.parametrize(
    ("word", "dtype"),
    [("float16", np.float16), ("double", np.float64), ("int8", np.int8), ("uint8", np.uint8), ("int16", np.int16),
     ("uint64", np.uint64), ("bool", np.bool_)],
)  # fmt: skip
def test_element_types(optimized: Optimize, word: str, dtype: type) -> None:
    built = optimized(f"a ({word}[10,10] x) => ({word}[10,10] y, {word}[1,100] z)"
                     " { y = Transpose(x)  z = Flatten<axis=0>(x) }")  # fmt: skip
    values = (np.arange(100) % (2 if dtype is np.bool_ else 100)).astype(dtype).reshape(10, 10)
    check(built, {"x": values}, {"x": aligned(values)}, {"x": values.T})


def model_of_names() -> onnx.ModelProto:
    node = helper.make_node
    nodes = [node("Relu", ["a/b:0"], ["ü ñ"]), node("Cast", ["ü ñ"], ["../s"], to=TensorProto.STRING),
             node("StringConcat", ["../s", "../s"], ["../../y z"])]  # fmt: skip
    inputs = [helper.make_tensor_value_info("a/b:0", FLOAT, [4])]
    outputs = [helper.make_tensor_value_info("../../y z", TensorProto.STRING, [4])]
    return helper.make_model(helper.make_graph(nodes, "../g", inputs, outputs),
                             opset_imports=[helper.make_opsetid("", 20)], ir_version=10)  # fmt: skip


def test_names_of_any_kind(optimized: Optimize) -> None:
    built = optimized(model_of_names())
    check(built, {"a/b:0": X4})
    assert {path.name for path in built.artifact.root.parent.iterdir()} == {"model.onnx", "artifact"}


def test_functions_of_the_model(optimized: Optimize) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20, "my" : 1]>
    a (float[N] x) => (float[N] y) { y = my.Scale<k = 2.0>(x) }
    <domain: "my", opset_import: ["" : 20]> Scale <k> (a) => (b)
    { c = Constant<value_float: float = @k>()  b = Mul(a, c) }
    """
    check(optimized(onnx.parser.parse_model(text)), {"x": X4})


def test_defaults_of_inputs_are_constants(optimized: Optimize) -> None:
    """ONNX before version 4 of its format lists every initializer as an input."""
    text = '<ir_version: 3, opset_import: ["" : 8]> a (float[4] x, float[4] w) => (float[4] y) { y = Add(x, w) }'
    check(optimized(onnx.parser.parse_model(text), w=X4), {"x": X4})


def test_an_input_with_a_default_may_be_given(optimized: Optimize) -> None:
    """As in onnxruntime: left out it has its default, given it counts, in the middle of the graph too."""
    text = """defaults (float[N,8] x, float[8,4] w, float[4] b) => (float[N,4] y) {
        h = MatMul(x, w)
        s = Add(h, b)
        t = Softmax <axis = -1> (s)
        y = Mul(t, b)
    }"""
    b = np.arange(4, dtype=np.float32) + 1
    built = optimized(text, {"passes": "two-pass-softmax"}, w=W, b=b)
    session, original = Session(built.artifact), reference(built.model)
    assert [i.name for i in session.get_inputs()] == ["x"]
    mine, theirs = session.get_overridable_initializers(), original.get_overridable_initializers()
    assert [(i.name, i.type, i.shape) for i in mine] == [(i.name, i.type, i.shape) for i in theirs]
    for feeds in ({"x": X}, {"x": X, "w": W * 2}, {"x": X, "b": -b, "w": -W}, {"x": X}, {"x": X, "b": b}):
        equal(original.run(None, feeds), session.run(None, feeds))
    with pytest.raises(InputError, match=r"input 'b' has shape \[3\]; expected \[4\]"):
        session.run(None, {"x": X, "b": b[:3]})
    with pytest.raises(InputError, match="unknown input 'q'"):
        session.run(None, {"x": X, "q": b})


@pytest.mark.parametrize("passes", [None, {"preset": "none"}])
@pytest.mark.parametrize("name", ["BFLOAT16", "FLOAT8E4M3FN", "INT4", "UINT4"])
def test_weights_of_types_that_numpy_does_not_have(optimized: Optimize, name: str, passes: Any) -> None:
    dtype = ir.DataType[name]
    weight = ir.to_proto(ir.tensor((np.arange(9001) % 3).astype(dtype.numpy()), dtype=dtype, name="w"))
    node = helper.make_node
    nodes = [node("Cast", ["w"], ["c"], to=FLOAT), node("Add", ["x", "c"], ["y"])]
    values = [helper.make_tensor_value_info(n, FLOAT, [9001]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weight])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    check(optimized(proto, options=passes), {"x": np.ones(9001, np.float32)})


def test_results_of_types_that_numpy_does_not_have(optimized: Optimize) -> None:
    """onnxruntime's Python side cannot return them; across a border of regions they pass all the same."""
    built = optimized(
        "a (float[20] x) => (bfloat16[20] y, float[20] z, string[20] s)"
        " { y = Cast<to=16>(x)  f = Cast<to=1>(y)  z = Neg(f)  s = Cast<to=8>(f) }"
    )
    y, z, s = Session(built.artifact).run(None, {"x": BIG[:20]})
    assert y.dtype.name == "bfloat16" and s.shape == (20,)
    np.testing.assert_array_equal(y.astype(np.float32), -z)
    np.testing.assert_allclose(y.astype(np.float32), BIG[:20], rtol=2**-8)  # seven bits behind the first


# --- memory -----------------------------------------------------------------------------------------------------


def test_results_outlive_later_runs_and_the_session(mlp: Any) -> None:
    session = Session(mlp.artifact)
    found = session.run(None, {"x": X})
    expected = [array.copy() for array in found]
    for _ in range(20):
        session.run(None, {"x": X + 1})
    del session
    gc.collect()
    other = Session(mlp.artifact)
    other.run(None, {"x": X - 1})
    for kept, array in zip(expected, found, strict=True):
        np.testing.assert_array_equal(array, kept)


def test_weights_are_not_changed_by_whoever_writes_into_results(optimized: Optimize) -> None:
    """The file is mapped: a write must not reach it, or another session, either."""
    built = optimized("a (float[1] x) => (float[100] y, float[1] z) { y = Identity(w)  z = Neg(x) }", w=BIG)
    first, second = Session(built.artifact), Session(built.artifact)
    first.run(None, {"x": X4[:1]})[0][...] = 0
    for session in (first, second):
        np.testing.assert_array_equal(session.run(None, {"x": X4[:1]})[0], BIG)
    built.artifact.verify()


def test_memory_stays_what_it_is(mlp: Any) -> None:
    """A thousand runs, each of another size, and fifty sessions: 4 MB, a tenth of what one array a run takes."""
    process = psutil.Process()
    session = Session(mlp.artifact)
    sizes = np.random.default_rng(3).permutation(1000) + 500
    for size in sizes[:50]:
        session.run(None, {"x": np.ones((size, 8), np.float32)})
    before, open_files = process.memory_info().rss, process.num_fds()
    for size in sizes:
        session.run(None, {"x": np.ones((size, 8), np.float32)})
    for _ in range(50):
        Session(mlp.artifact, verify=False).run(None, {"x": X})
    gc.collect()
    assert process.memory_info().rss - before < 4 << 20
    assert process.num_fds() <= open_files + 2


def test_the_pool_does_not_keep_a_buffer_of_every_size(optimized: Optimize) -> None:
    """TVM's pool keeps buffers by size: without care, 200 sizes would take 1.6 GB here."""
    rng = np.random.default_rng(4)
    weights = {n: rng.standard_normal(s).astype(np.float32) for n, s in (("w", (16, 4096)), ("v", (4096, 16)))}
    built = optimized("a (float[N,16] x) => (float[N,16] y) { t = MatMul(x, w)  u = Softmax(t)  y = MatMul(u, v) }",
                     **weights)  # fmt: skip
    session = Session(built.artifact)
    session.run(None, {"x": np.ones((500, 16), np.float32)})
    before = psutil.Process().memory_info().rss
    for size in range(300, 500):
        session.run(None, {"x": np.ones((size, 16), np.float32)})
    assert psutil.Process().memory_info().rss - before < 400 << 20


# --- threads ----------------------------------------------------------------------------------------------------


def busy_threads(session: Session, feeds: dict[str, np.ndarray], seconds: float = 0.4) -> int:
    """How many threads of this process spent processor time while the session did, `seconds` of it together."""
    session.run(None, feeds)
    before = {thread.id: thread.user_time for thread in psutil.Process().threads()}
    end = time.process_time() + seconds
    while time.process_time() < end:
        session.run(None, feeds)
    after = psutil.Process().threads()
    return sum(thread.user_time - before.get(thread.id, 0) > 0.03 for thread in after)


@pytest.fixture(scope="module")
def heavy(optimized: Optimize) -> Any:
    weights = np.random.default_rng(5).standard_normal((512, 512)).astype(np.float32) / 32
    return optimized("a (float[256,512] x) => (float[256,512] y) { t = MatMul(x, w)  u = Relu(t)  y = MatMul(u, w) }",
                    w=weights)  # fmt: skip


@pytest.mark.skipif(sessions.default_threads() < 2, reason="one processor")
def test_as_many_threads_work_as_are_asked_for(heavy: Any) -> None:
    """TVM takes two processors for the two halves of one and uses half of them, unless it is told otherwise."""
    feeds = {"x": np.ones((256, 512), np.float32)}
    for threads in (1, 2, 1, 2):
        assert busy_threads(Session(heavy.artifact, threads=threads), feeds) == threads
    counts: list[int] = []
    one, two = (Session(heavy.artifact, threads=n) for n in (1, 2))
    worker = threading.Thread(target=lambda: counts.extend(busy_threads(s, feeds) for s in (two, one)))
    worker.start()
    worker.join()
    assert counts == [2, 1]


def test_runs_from_many_threads_at_once(mlp: Any) -> None:
    """A virtual machine runs one call at a time: sessions with it gave wrong numbers, or crashed."""
    shared = [Session(mlp.artifact, threads=n) for n in (1, 2)]
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for index in range(150):
            x = rng.standard_normal((1 + index % 7, 8)).astype(np.float32)
            try:
                found = shared[(seed + index) % 2].run(["h"], {"x": x})[0]
                np.testing.assert_allclose(found, x @ W, rtol=1e-4, atol=1e-5)
            except (AssertionError, GraphwrightError) as error:
                wrong.append(str(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


def test_sessions_start_in_many_threads_at_once(mlp: Any) -> None:
    results: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: results.append(Session(mlp.artifact).run(["h"], {"x": X})[0])) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    for found in results:
        np.testing.assert_allclose(found, X @ W, rtol=1e-4, atol=1e-5)


# --- time and start ---------------------------------------------------------------------------------------------


def test_a_run_costs_little_above_the_kernels(optimized: Optimize) -> None:
    """At most 60 us, kernels included; the best of many runs, as the machine may be busy."""
    built = optimized("a (float[3,8] x) => (float[3,8] y) { y = Relu(x) }")
    session = Session(built.artifact, threads=1)
    feeds = {"x": X}
    best = float("inf")
    for _ in range(3000):
        start = time.perf_counter()
        session.run(None, feeds)
        best = min(best, time.perf_counter() - start)
    assert best < 60e-6


@pytest.mark.parametrize("change", [unaligned, aligned])
def test_a_run_does_not_set_up_tvm_again(
    session: Session, monkeypatch: pytest.MonkeyPatch, change: Callable[[np.ndarray], Any]
) -> None:
    """Which reads the environment and counts processors: more than the rest of a small run."""
    feeds = {"x": change(X)}
    expected = session.run(None, feeds)
    monkeypatch.delattr("graphwright.runtime.tvm_step.load_tvm")
    equal(expected, session.run(None, feeds))


def test_a_process_of_its_own_starts_and_ends_well(mlp: Any) -> None:
    """No word on stderr, also when sessions are still alive at the end."""
    code = f"""
import graphwright, numpy as np
session = graphwright.load({str(mlp.artifact.root)!r}, threads=2)
print(session.run(["h"], {{"x": np.ones((2, 8), np.float32)}})[0].shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(2, 4)\n" and done.stderr == ""


def test_a_dynamic_dimension_of_one_broadcasts(tmp_path: Path) -> None:
    """Compiled code takes the two for equal; onnxruntime runs what it refuses, unless it is asked not to."""
    graph = "g (float[n, 3] x, float[m, 3] z) => (float[k, 3] y) { y = Add(x, z) }"
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{graph}')
    build(ir.from_proto(model), Target.named("cpu"), tmp_path / "out")
    session = Session(tmp_path / "out")
    x, row = np.arange(12, dtype=np.float32).reshape(4, 3), np.ones((1, 3), np.float32)
    for other in (x, row):
        np.testing.assert_array_equal(session.run(None, {"x": x, "z": other})[0], x + other)
    with pytest.raises(InputError, match="refused these inputs"):
        session.run(None, {"x": x, "z": np.ones((2, 3), np.float32)})
    with pytest.raises(InputError, match="compiled model refused these inputs"):
        Session(tmp_path / "out", rescue=False).run(None, {"x": x, "z": row})
