"""Behaviour of prepare passes that a text case cannot state: errors, reports, properties."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.base import PassContext
from graphwright.passes.errors import InputError, ModelError
from graphwright.passes.pipeline import Pipeline
from graphwright.passes.prepare.simplify import holds
from hypothesis import given, settings
from hypothesis import strategies as st


def parse(text: str, opset: int = 21) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}, "l" : 1]> {text}'))


PINNED = "g (float[N,3] pixels, float[N,L] mask) => (float[N,3] y) { y = Relu (pixels) }"


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"pixel": (1, 3)}, "no input is called 'pixel'; did you mean pixels?"),
        ({"pixels": (1, 3, 3)}, "pin pixels=1x3x3 has 3 dimensions, the input has 2: [N,3]; give all of them"),
        ({"pixels": (1, 4)}, "pin pixels=1x4: dimension 1 is 3 in the model, not 4; only dynamic dimensions"),
        ({"pixels": (None, 3)}, "pin pixels=(None, 3) is no shape; expected whole numbers, as in (1, 3, 224, 224)"),
        ({"pixels": [2.5, 3]}, "pin pixels=[2.5, 3] is no shape; expected whole numbers"),
        ({"pixels": "2x3"}, "pin pixels='2x3' is no shape; expected whole numbers"),
        ({"pixels": (-1, 3)}, "pin pixels=-1x3: a dimension cannot be negative; write its size"),
        (
            {"pixels": (1, 3), "mask": (2, 5)},
            "pin mask=2x5: mask[0] and pixels[0] are both 'N', pinned to 2 and 1; give them the same size",
        ),
    ],
)
def test_a_pin_that_does_not_fit_says_why(pins: dict, message: str) -> None:
    with pytest.raises(InputError, match="^pin-shapes: " + re.escape(message)):
        Pipeline.parse("pin-shapes").run(parse(PINNED), PassContext(pins=pins))


def test_a_symbol_in_an_expression_is_worked_out() -> None:
    model = parse("g (float[N,3] x) => (float[M,3] y) { d = Concat <axis = 0> (x, x) y = Relu (d) }")
    d = model.graph[0].outputs[0]
    d.shape = ir.Shape([ir.SymbolicDim("2*N"), 3])
    after, _ = Pipeline.parse("pin-shapes").run(model, PassContext(pins={"x": (4, 3)}))
    assert str(after.graph[0].outputs[0].shape) == "[8,3]"
    assert str(d.shape) == "[2*N,3]"


def test_functions_that_call_each_other_are_refused() -> None:
    text = """g (float[2] x) => (float[2] y) { y = l.a (x) }
    <domain: "l", opset_import: ["" : 21, "l" : 1]> a (x) => (y) { y = l.b (x) }
    <domain: "l", opset_import: ["" : 21, "l" : 1]> b (x) => (y) { y = l.a (x) }"""
    with pytest.raises(ModelError, match=r"functions call each other in a circle: .*; break the circle"):
        Pipeline.parse("inline-functions").run(parse(text))


def test_a_function_of_another_opset_is_inlined_only_where_its_operators_mean_the_same() -> None:
    text = """g (float[2,3] x) => (float[2,1] y) { t = l.same (x) y = l.other (t) }
    <domain: "l", opset_import: ["" : 17]> same (x) => (y) { y = Tanh (x) }
    <domain: "l", opset_import: ["" : 17]> other (x) => (y) { y = ReduceMax <axes = [1]> (x) }"""
    after, (report,) = Pipeline.parse("inline-functions").run(parse(text))
    assert [c.value for c in report.changes] == ["t"]
    assert [s.reason for s in report.skips] == [
        "l.other: ReduceMax of ai.onnx 17 is not that of 21; run convert-opset first"
    ]
    assert [f.name for f in after.functions.values()] == ["other"]


def test_a_passed_through_input_keeps_its_name() -> None:
    """A function that hands its input out must not rename the caller's value."""
    text = """g (float[2] x) => (float[2] y) { t = l.same (x) y = Relu (t) }
    <domain: "l", opset_import: ["" : 21]> same (x) => (y) { y = Identity (x) }"""
    after, _ = Pipeline.parse("inline-functions,simplify").run(parse(text))
    assert [v.name for v in after.graph.inputs] == ["x"]
    assert [node.op_type for node in after.graph] == ["Relu"]


def test_folding_limits_say_how_to_lift_them() -> None:
    model = parse("g (float x) => (float[1000] y) <int64[1] n = {1000}> { c = ConstantOfShape (n) y = Add (x, c) }")
    _, (report,) = Pipeline.parse("fold-constants:max_growth=100").run(model)
    (skip,) = report.skips
    allowed = re.search(r"max_growth=(\d+) allows it", skip.reason)
    assert allowed
    after, _ = Pipeline.parse(f"fold-constants:max_growth={allowed[1]}").run(model)
    assert [node.op_type for node in after.graph] == ["Add"]


@pytest.mark.parametrize(
    ("nodes", "stays"),
    [
        ("y = MatMul (x, w)", True),
        ("y = Gemm <transB = 1> (x, w)", True),
        ("t = Transpose (w) y = MatMul (x, t)", True),
        ("y = Gather (w, i)", True),
        ("y = MatMul (w, x)", False),
        ("y = Add (x, w)", False),
        ("t = Transpose (w) z = MatMul (x, t) y = Add (z, t)", False),
        ("z = MatMul (x, w) y = Identity (w)", False),
    ],
)
def test_narrow_weights_of_products_alone_stay_narrow(nodes: str, stays: bool) -> None:
    model = parse(f"g (float[64,64] x, int64[2] i) => (float y) {{ w = Cast <to = 1> (n) {nodes} }}")
    value = ir.Value(name="n", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([64, 64]))
    value.const_value = ir.tensor(np.ones((64, 64), np.float16), name="n")
    model.graph.register_initializer(value)
    for node in model.graph:
        if node.op_type == "Cast":
            node.replace_input_with(0, value)
    after, (report,) = Pipeline.parse("fold-constants").run(model)
    assert ("Cast" in [node.op_type for node in after.graph]) == stays
    reason = "Cast of weights that kernels read as they are"
    assert [skip.reason for skip in report.skips] == [reason] * stays


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("v = Mul (wide, wide)", np.int64(3 << 40) + 4),
        ("v = Cast <to = 6> (wide)", np.int32(2)),
        ("n = Cast <to = 6> (most) v = Add (n, n)", np.int32(-2)),
        ("n = Cast <to = 6> (wide) s = Sub (least, n) v = Cast <to = 7> (s)", np.int64(2**31 - 2)),
    ],
)
def test_folded_shapes_wrap_as_integers_do(nodes: str, expected: np.generic) -> None:
    """What does not fit its type is still a number: the one that a runtime gives."""
    text = f"""g (float x) => (float x2, {expected.dtype}[1] y)
    <int64[1] wide = {{{(3 << 38) + 2}}}, int64[1] most = {{{2**31 - 1}}}, int32[1] least = {{{-(2**31)}}}>
    {{ x2 = Relu (x) {nodes} y = Identity (v) }}"""
    after, _ = Pipeline.parse("infer-shapes,fold-constants").run(parse(text))
    (folded,) = (node for node in after.graph if node.outputs[0].name == "y")
    np.testing.assert_array_equal(folded.attributes["value"].as_tensor().numpy(), [expected])


def test_each_shape_that_follows_from_the_one_before_it_is_found() -> None:
    """Padding to a multiple, as exporters write "same" padding, over and over; floats hide it from onnx."""
    layers = "".join(
        f"""s{i} = Shape (x{i}) n{i} = Gather (s{i}, last) f{i} = Cast <to = 1> (n{i}) q{i} = Div (f{i}, four)
        c{i} = Ceil (q{i}) m{i} = Mul (c{i}, four) r{i} = Sub (m{i}, f{i}) o{i} = Cast <to = 7> (r{i})
        p{i} = Concat <axis = 0> (three, o{i}) w{i} = Pad (x{i}, p{i}) u{i} = Relu (w{i})
        x{i + 1} = Concat <axis = 2> (u{i}, x0)"""
        for i in range(6)
    )
    text = f"""g (float[1,2,5] x0) => (float y) <int64[1] last = {{2}},
    float[1] four = {{4}}, int64[5] three = {{0, 0, 0, 0, 0}}> {{ {layers} y = Identity (x6) }}"""
    after, _ = Pipeline.parse("infer-shapes,fold-constants,dead-code").run(parse(text))
    assert {node.op_type for node in after.graph} == {"Pad", "Relu", "Concat", "Identity"}
    assert after.graph.outputs[0].shape == ir.Shape([1, 2, 53])


def test_reports_name_every_site_and_running_again_changes_nothing() -> None:
    text = """g (float[N,6] x) => (float[N,6] y) <int64[1] zero = {0}, int64[1] six = {6}> {
      s = Shape (x) n = Gather (s, zero) t = Concat <axis = 0> (n, six)
      r = Reshape (x, t) i = Identity (r) a = Exp (i) b = Exp (i) y = Add (a, b) }"""
    steps = "infer-shapes,fold-constants,simplify,common-subexpressions,dead-code"
    once, reports = Pipeline.parse(steps).run(parse(text))
    assert [node.op_type for node in once.graph] == ["Exp", "Add"]
    assert {c.value for r in reports[1:] for c in r.changes} >= {"r", "i", "b"}
    again, second = Pipeline.parse(steps).run(once)
    assert [c for r in second for c in r.changes] == []
    assert ir.to_proto(again) == ir.to_proto(once)


WHOLE = [ir.DataType[name] for name in ("BOOL", "INT8", "UINT8", "INT16", "UINT16", "INT32", "UINT32", "INT64")]
FLOATS = [ir.DataType[name] for name in ("FLOAT16", "BFLOAT16", "FLOAT", "DOUBLE")]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(WHOLE + FLOATS), st.sampled_from(WHOLE + FLOATS), st.integers(0, 10_000))
def test_a_cast_called_exact_is_undone_by_the_cast_back(wide: ir.DataType, narrow: ir.DataType, seed: int) -> None:
    random = np.random.default_rng(seed)
    bits = random.integers(0, 256, 8 * 64, dtype=np.uint8)
    values = (bits % 2).astype(bool) if narrow == ir.DataType.BOOL else bits.view(narrow.numpy())
    if holds(wide, narrow):
        with np.errstate(all="ignore"):
            values = values[np.isfinite(values.astype(np.float64))]
            np.testing.assert_array_equal(values.astype(wide.numpy()).astype(narrow.numpy()), values)


@pytest.mark.parametrize(
    ("dims", "target", "fits"),
    [
        ("2,4", [3, 3], False), ("2,4", [-1, 3], False), ("2,4", [0, 5], False), ("2,4", [0, -1, 2], True),
        ("2,4", [8], True), ("", [3], True), ("N,4", [3, 3], True), ("0,4", [0, 0], True), ("0,4", [3, -1], True),
    ],
)  # fmt: skip
def test_a_reshape_that_can_never_run_is_refused(dims: str, target: list[int], fits: bool) -> None:
    values = ",".join(map(str, target))
    text = f"""g (float[{dims}] x) => (float[A,B,C] y) <int64[{len(target)}] s = {{{values}}}>
    {{ a = Relu (x) r = Reshape (a, s) y = Identity (r) }}"""
    if fits:
        Pipeline.parse("infer-shapes").run(parse(text))
        return
    with pytest.raises(ModelError, match=r"node 'r' reshapes \[.*\] to .* the model can never run"):
        Pipeline.parse("infer-shapes").run(parse(text))


def test_minus_one_is_a_free_dimension() -> None:
    model = parse(PINNED)
    model.graph.inputs[0].shape = ir.Shape([-1, 3])
    after, _ = Pipeline.parse("pin-shapes").run(model, PassContext(pins={"pixels": (4, 3)}))
    assert str(after.graph.inputs[0].shape) == "[4,3]"
