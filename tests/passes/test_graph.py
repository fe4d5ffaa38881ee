"""Questions and edits on graphs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes import graph

TEXT = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
main (float[N,3] X, bool c) => (float[N,3] Y) <float[2] w = {1, 2}> {
  t = local.f (X)
  Y = If (c) <
    then_branch = yes () => (float[N,3] a) {
      a = If (c) <then_branch = inner () => (float[N,3] p) { p = Neg (t) },
                  else_branch = other () => (float[N,3] q) { q = Abs (t) }>
    },
    else_branch = no () => (float[N,3] b) { b = Relu (t) }>
}
<domain: "local", opset_import: ["" : 18]>
f (x) => (y) { k = Constant <value_ints = [1, 2]> () s = Shape (x) y = Identity (x) }"""


@pytest.fixture
def model() -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(TEXT))


def value(model: ir.Model, name: str) -> ir.Value:
    return next(v for n in graph.all_nodes(model) for v in n.outputs if v.name == name)


def test_scopes_visit_everything_outer_first_with_the_opset_that_holds(model: ir.Model) -> None:
    found = [(s.graph.name, s.opset, s.function is not None) for s in graph.scopes(model)]
    assert [f for f in found if not f[2]] == [
        ("main", 21, False), ("yes", 21, False), ("inner", 21, False), ("other", 21, False), ("no", 21, False),
    ]  # fmt: skip
    assert [opset for _, opset, inside in found if inside] == [18]
    assert graph.count_nodes(model) == 2 + 1 + 1 + 1 + 1 + 3


def test_constants_are_initializers_and_constant_nodes_but_not_defaults(model: ir.Model) -> None:
    w = model.graph.initializers["w"]
    np.testing.assert_array_equal(graph.constant_value(w), [1, 2])
    assert graph.constant_ints(value(model, "k")) == [1, 2]
    assert graph.constant_value(w, limit=7) is None
    assert graph.constant_value(value(model, "t")) is None
    model.graph.inputs.append(w)
    assert not graph.is_constant(w)


def test_large_constants_are_measured_without_being_read(tmp_path) -> None:
    missing = ir.ExternalTensor(
        "nowhere", 0, 4 << 30, ir.DataType.FLOAT, shape=ir.Shape([1 << 30]), name="w", base_dir=tmp_path
    )
    w = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1 << 30]), const_value=missing)
    ir.Graph([], [], nodes=[], initializers=[w], name="g")
    assert graph.nbytes(missing) == 4 << 30
    assert graph.is_constant(w)
    assert graph.constant_value(w) is None


def test_replacing_an_output_keeps_its_name(model: ir.Model) -> None:
    new = ir.Node("", "Exp", [model.graph.inputs[0]], name="")
    old = model.graph.outputs[0]
    model.graph.insert_before(old.producer(), new)
    graph.replace_value(old, new.outputs[0])
    assert [v.name for v in model.graph.outputs] == ["Y"]
    assert model.graph.outputs[0].producer() is new
    assert str(new.outputs[0].shape) == "[N,3]"


def test_an_input_takes_the_place_of_an_output_through_an_identity(model: ir.Model) -> None:
    graph.replace_value(model.graph.outputs[0], model.graph.inputs[0])
    (output,) = model.graph.outputs
    assert output.name == "Y" and output.producer().op_type == "Identity"
    assert [v.name for v in model.graph.inputs] == ["X", "c"]


def test_replacing_reaches_bodies(model: ir.Model) -> None:
    graph.replace_value(value(model, "t"), model.graph.inputs[0])
    assert {n.inputs[0].name for n in graph.all_nodes(model) if n.op_type in ("Neg", "Abs", "Relu")} == {"X"}


def test_removing_a_node_with_bodies_frees_outer_values(model: ir.Model) -> None:
    t, output = value(model, "t"), model.graph.outputs[0]
    node = output.producer()
    model.graph.outputs.clear()
    graph.remove_node(node)
    assert not t.uses()


def test_fresh_names_avoid_every_name(model: ir.Model) -> None:
    names = graph.Names(model)
    assert [names.fresh("p"), names.fresh("p"), names.fresh("new"), names.fresh("w")] == ["p_1", "p_2", "new", "w_1"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [(["N", 3], [None, None], "[N,3]"), ([2, "M"], ["N", "K"], "[2,K]"), ([None, 3], ["N", 3], "[N,3]")],
)
def test_the_more_exact_dimension_wins(old: list, new: list, expected: str) -> None:
    a, b = ir.val("a", ir.DataType.FLOAT, old), ir.val("b", None, new)
    graph.carry_type(a, b)
    assert str(b.shape) == expected
    assert b.dtype == ir.DataType.FLOAT


def test_equal_symbols_are_equal_shapes_and_unnamed_ones_are_not() -> None:
    named, unnamed = ir.val("a", None, ["N", 3]), ir.val("b", None, [None, 3])
    assert graph.same_shape(named, ir.val("c", None, ["N", 3]))
    assert not graph.same_shape(unnamed, ir.val("c", None, [None, 3]))
    assert not graph.same_shape(named, ir.val("c", None, ["M", 3]))
