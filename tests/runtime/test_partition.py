"""Regions: every node in one, in an order that can run, and cut so that together they are the whole model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.graph import site
from graphwright.runtime.partition import ONNXRUNTIME, Region, cut, partition, reads
from graphwright.runtime.reference import Reference, segments
from onnx import numpy_helper, parser

HEADER = '<ir_version: 10, opset_import: ["" : 20]>'
X = np.linspace(-1, 2, 4, dtype=np.float32)
W = np.arange(4, dtype=np.float32)


def model(text: str, **weights: np.ndarray) -> ir.Model:
    proto = parser.parse_model(f"{HEADER}\ng {text}")
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def refuse(model: ir.Model, *sites: str) -> dict[ir.Node, str]:
    return {node: "no" for node in model.graph if site(node) in sites}


def shape(regions: Sequence[Region]) -> list[tuple[str, list[str]]]:
    return [(region.runtime[:3], [site(node) for node in region.nodes]) for region in regions]


def run_parts(
    model: ir.Model, runs: Sequence[Sequence[ir.Node]], feeds: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What the model's outputs are when its parts run one after the other, each knowing only its own inputs."""
    values = dict(feeds)
    for part in cut(model, runs):
        if not part.graph.outputs:
            continue  # unused nodes only
        values.update(Reference(part).run({v.name or "": values[v.name or ""] for v in part.graph.inputs}))
    return {v.name or "": values[v.name or ""] for v in model.graph.outputs}


CHAIN = "(float[4] x) => (float[4] e) { a = Neg(x)  b = Exp(a)  c = Add(b, w)  d = Mul(c, a)  e = Sub(d, w) }"
BRANCH = """(float[4] x, bool k) => (float[4] z) { t = Relu(x)  u = Exp(x)
  y = If (k) <then_branch = th () => (float[4] o) { p = Add(t, w)
      o = If (k) <then_branch = th2 () => (float[4] r) { r = Mul(p, u) },
        else_branch = el2 () => (float[4] s) { s = Neg(u) }> },
    else_branch = el () => (float[4] q) { q = Neg(x) }>
  z = Add(y, t) }"""


def test_one_region_where_everything_is_taken() -> None:
    whole = model(CHAIN, w=W)
    assert shape(partition(whole, {})) == [("tvm", ["a", "b", "c", "d", "e"])]


def test_regions_alternate_along_a_chain() -> None:
    whole = model(CHAIN, w=W)
    regions = partition(whole, refuse(whole, "b", "d"))
    assert shape(regions) == [("tvm", ["a"]), ("onn", ["b"]), ("tvm", ["c"]), ("onn", ["d"]), ("tvm", ["e"])]
    assert regions[1].reasons == {"b": "no"} and regions[0].reasons == {}


def test_side_branches_join_their_level() -> None:
    """Not one region a node: what can run together does."""
    whole = model("(float[4] x) => (float[4] s) { a = Neg(x)  b = Exp(x)  c = Neg(b)  d = Abs(x)  s = Sum(a, c, d) }")
    assert shape(partition(whole, refuse(whole, "b"))) == [("tvm", ["a", "d"]), ("onn", ["b"]), ("tvm", ["c", "s"])]


def test_what_is_made_of_constants_alone_goes_where_it_is_read() -> None:
    """Through another such node too. One that two regions read, that is an output or refused stays where it was."""
    text = """(float[4] x) => (float[4] e, float[4] t) { a = Neg(w)  b = Exp(a)  c = Add(x, b)  f = Neg(v)
        s = Exp(w)  d = Mul(c, s)  g = Add(d, f)  t = Relu(v)  h = Mul(s, t)
        r = Abs(v)  i = Sub(h, r)  e = Sub(g, i) }"""
    m = model(text, w=W, v=W + 1)
    found = partition(m, refuse(m, "c", "d", "r"))
    assert shape(found) == [
        ("tvm", ["s", "t"]), ("onn", ["a", "b", "c", "d", "r"]), ("tvm", ["f", "g", "h", "i", "e"]),
    ]  # fmt: skip
    expected, got = Reference(m).run({"x": X}), run_parts(m, [r.nodes for r in found], {"x": X})
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value)


def test_values_that_a_branch_reads_count() -> None:
    whole = model(BRANCH, w=W)
    branch = next(node for node in whole.graph if node.op_type == "If")
    assert {value.name for value in reads(branch)} == {"k", "t", "w", "u", "x"}
    assert shape(partition(whole, refuse(whole, "t"))) == [("tvm", ["u"]), ("onn", ["t"]), ("tvm", ["y", "z"])]


def random_model(rng: np.random.Generator, count: int) -> ir.Model:
    """Nodes that each read one or two earlier values; some values are outputs."""
    names, lines = ["x", "w"], []
    for index in range(count):
        first, second = rng.choice(names[-6:]), rng.choice(names)
        lines.append(f"v{index} = Add({first}, {second})" if rng.random() < 0.6 else f"v{index} = Tanh({first})")
        names.append(f"v{index}")
    outputs = sorted({f"v{count - 1}", *rng.choice(names[2:], 3)})
    return model(f"(float[4] x) => ({', '.join(f'float[4] {n}' for n in outputs)}) {{ {'  '.join(lines)} }}", w=W)


@pytest.mark.parametrize("seed", range(8))
def test_random_graphs_are_cut_into_parts_that_make_the_whole(seed: int) -> None:
    rng = np.random.default_rng(seed)
    whole = random_model(rng, 25)
    refused = {node: "no" for node in whole.graph if rng.random() < 0.3}
    regions = partition(whole, refused)
    assert sorted(site(n) for r in regions for n in r.nodes) == sorted(site(n) for n in whole.graph)
    assert all((node in refused) == (region.runtime == ONNXRUNTIME) for region in regions for node in region.nodes)
    done: set[ir.Node] = set()
    for region in regions:
        for node in region.nodes:
            assert all(value.producer() is None or value.producer() in done for value in reads(node))
            done.add(node)
    expected = Reference(whole).run({"x": X})
    found = run_parts(whole, [region.nodes for region in regions], {"x": X})
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("sites", [("t",), ("u",), ("y",), ("z",), ("t", "z")])
def test_values_captured_across_a_border(sites: tuple[str, ...], flag: bool) -> None:
    whole = model(BRANCH, w=W)
    feeds = {"x": X, "k": np.array(flag)}
    found = run_parts(whole, [region.nodes for region in partition(whole, refuse(whole, *sites))], feeds)
    np.testing.assert_array_equal(found["z"], Reference(whole).run(feeds)["z"])


def test_one_node_each() -> None:
    whole = model(CHAIN, w=W)
    parts = cut(whole, [[node] for node in whole.graph])
    assert [[v.name for v in part.graph.inputs] for part in parts] == [["x"], ["a"], ["b"], ["c", "a"], ["d"]]
    assert [[v.name for v in part.graph.outputs] for part in parts] == [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert [list(part.graph.initializers) for part in parts] == [[], [], ["w"], [], ["w"]]


def test_outputs_of_the_model_inside_a_region_are_kept() -> None:
    whole = model("(float[4] x) => (float[4] a, float[4] c) { a = Neg(x)  b = Exp(a)  c = Neg(b) }")
    (part,) = cut(whole, [list(whole.graph)])
    assert {v.name for v in part.graph.outputs} == {"a", "c"}


def test_cutting_leaves_the_model_as_it_was() -> None:
    whole = model(CHAIN, w=W)
    before = ir.to_proto(whole).SerializeToString()
    cut(whole, [[node] for node in whole.graph])
    assert ir.to_proto(whole).SerializeToString() == before


def test_segments_hold_their_limit() -> None:
    """Runs of nodes, in order, of less than the limit of weights each; a weight used twice counts once."""
    text = "  ".join(f"v{i + 1} = Add(v{i}, w{i // 2})" for i in range(12))
    weights = {f"w{i}": np.full(256, i, np.float32) for i in range(6)}
    whole = model(f"(float[256] v0) => (float[256] v12) {{ {text} }}", **weights)
    runs = segments(whole, limit=2048)
    assert [node for run in runs for node in run] == list(whole.graph)
    assert [len(run) for run in runs] == [4, 4, 4]
    assert len(segments(whole, limit=1)) == 12 and len(segments(whole, limit=1 << 30)) == 1
    x = np.ones(256, np.float32)
    np.testing.assert_array_equal(run_parts(whole, runs, {"v0": x})["v12"], x + 2 * sum(range(6)))
