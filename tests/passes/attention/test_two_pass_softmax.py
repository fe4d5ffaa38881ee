"""Where two-pass-softmax fires, where it keeps silent and why, and that the file stays plain ONNX."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from graphwright.passes.attention.two_pass_softmax import TwoPassSoftmax
from graphwright.passes.base import Caches, Pass, PassContext, PassReport
from graphwright.passes.errors import UsageError
from graphwright.passes.ops import OPERATORS, TWO_PASS_SOFTMAX
from graphwright.passes.ops.two_pass_softmax import Form, choose_form, longest_in_cache
from graphwright.passes.recognise.softmax import RecogniseSoftmax
from graphwright.passes.registry import parse_pass
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator

from .operators import model_of

MIB = 1 << 20


def parse(text: str, opset: int = 17, functions: str = "", imports: str = "") -> ir.Model:
    head = f'<ir_version: {4 if opset < 9 else 8}, opset_import: ["": {opset}{imports}]>\n'
    return ir.serde.deserialize_model(onnx.parser.parse_model(head + text + functions))


def rewrite(model: ir.Model, step: TwoPassSoftmax | None = None, ctx: PassContext | None = None) -> PassReport:
    report = (step or TwoPassSoftmax()).run(model, ctx or PassContext())
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    return report


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def outputs(model: ir.Model, *feeds: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, feeds, strict=True)))


def softmax(attributes: str, shape: str = "[2, 3, 4, 5]", dtype: str = "float", opset: int = 17) -> ir.Model:
    text = f"g ({dtype}{shape} x) => ({dtype}{shape} y) {{ y = Softmax{attributes}(x) }}"
    return parse(text, opset)


CHAIN = """g (float[2, 3, 5] x) => (float[2, 3, 5] y)
<int64[1] last = {-1}>
{
    m = ReduceMax<axes = [-1], keepdims = 1>(x)
    d = Sub(x, m)
    e = Exp(d)
    s = ReduceSum<keepdims = 1>(e, last)
    y = Div(e, s)
}"""


@pytest.mark.parametrize(
    "attributes, opset",
    [("", 17), ("<axis = -1>", 13), ("<axis = 3>", 21), ("<axis = 3>", 7), ("<axis = -1>", 11), ("<axis = 3>", 11)],
)
def test_fires_on_the_last_axis(attributes: str, opset: int) -> None:
    model = softmax(attributes, opset=opset)
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5), np.float32)
    expected = outputs(model, x)
    report = rewrite(model)
    assert [c.value for c in report.changes] == ["y"] and not report.skips
    node = model.graph.node(0)
    assert (node.domain, node.op_type) == TWO_PASS_SOFTMAX.identifier
    np.testing.assert_array_equal(outputs(model, x), expected)
    np.testing.assert_allclose(expected[0], TWO_PASS_SOFTMAX.reference(x), rtol=1e-6)


@pytest.mark.parametrize(
    "model, reason",
    [
        (softmax("", dtype="double"), "float64 input, the kernel computes in float32"),
        (
            softmax("", opset=12),
            "before opset 13 axis 1 means all axes from it on, which are not only the last of rank 4",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_keeps_silent_with_a_reason(model: ir.Model, reason: str) -> None:
    report = rewrite(model)
    assert [(s.value, s.reason) for s in report.skips] == [("y", reason)]
    assert not report.changes and not model.functions
    assert operators(model) == ["Softmax"] and "graphwright" not in model.opset_imports


@pytest.mark.parametrize("axis, opset", [(1, 17), (-2, 13), (0, 21)])
def test_fires_on_another_axis(axis: int, opset: int) -> None:
    model = softmax(f"<axis = {axis}>", opset=opset)
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5), np.float32)
    expected = outputs(model, x)
    (change,) = rewrite(model).changes
    assert change.detail.startswith(f"along axis {axis}, three-pass: 32 columns (")
    np.testing.assert_array_equal(outputs(model, x), expected)
    np.testing.assert_allclose(expected[0], TWO_PASS_SOFTMAX.reference(x, axis), rtol=1e-6)


@pytest.mark.parametrize("axis, opset, fires", [(1, 11, False), (-1, 11, True), (1, 17, True)])
def test_an_unknown_rank_is_a_reason_where_all_axes_behind_count(axis: int, opset: int, fires: bool) -> None:
    model = softmax(f"<axis = {axis}>", opset=opset)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = None
    report = TwoPassSoftmax().run(model, PassContext())
    assert bool(report.changes) is fires
    if not fires:
        assert report.skips[0].reason == "rank unknown, so axis 1 may not be the last axis, as it must before opset 13"


def test_a_function_of_a_newer_opset_than_the_model_keeps_another_axis() -> None:
    """The operator's body is the model's Softmax, which before opset 13 is over all axes from the given one on."""
    text = "g (float[2, 3, 4] x) => (float[2, 3, 4] y) { y = local.F(x) }"
    function = """
    <domain: "local", opset_import: ["": 13]>
    F (a) => (b) { b = Softmax <axis = AXIS> (a) }"""
    for axis, fires in ((-2, False), (-1, True)):
        model = parse(text, 11, function.replace("AXIS", str(axis)), ', "local": 1')
        assert bool(TwoPassSoftmax().run(model, PassContext()).changes) is fires


def test_leaves_log_softmax_and_other_divisions_alone() -> None:
    text = "g (float[2, 3] x) => (float[2, 3] y, float[2, 3] z) { y = LogSoftmax(x) z = Div(x, x) }"
    model = parse(text)
    report = rewrite(model)
    assert not report.changes and not report.skips


def test_axes_of_one_element_between_do_not_matter_before_opset_13() -> None:
    model = softmax("<axis = 1>", "[2, 1, 1, 5]", opset=11)
    assert rewrite(model).changes
    x = np.random.default_rng(0).standard_normal((2, 1, 1, 5), np.float32)
    np.testing.assert_allclose(outputs(model, x)[0], TWO_PASS_SOFTMAX.reference(x), rtol=1e-6)


@pytest.mark.parametrize("step", [TwoPassSoftmax(), RecogniseSoftmax()])
def test_the_report_says_where_a_chain_without_a_maximum_is_equal(step: Pass) -> None:
    for text, said in ((CHAIN, False), (CHAIN.replace("e = Exp(d)", "e = Exp(x)"), True)):
        (change,) = step.run(parse(text), PassContext()).changes
        assert change.detail.endswith("equal where the sum of its exponentials is finite and not lost to 0") is said


@pytest.mark.parametrize(
    "text",
    [
        CHAIN,
        CHAIN.replace("m = ReduceMax<axes = [-1], keepdims = 1>(x)\n    d = Sub(x, m)\n    e = Exp(d)", "e = Exp(x)"),
        CHAIN.replace("y = Div(e, s)", "r = Reciprocal(s) y = Mul(e, r)"),
        CHAIN.replace("y = Div(e, s)", "r = Reciprocal(s) y = Mul(r, e)"),
        CHAIN.replace("{-1}", "{2}").replace("[-1]", "[2]"),
    ],
    ids=["whole", "without maximum", "reciprocal", "reciprocal first", "positive axes"],
)
def test_fires_on_a_chain(text: str) -> None:
    model = parse(text)
    x = np.random.default_rng(0).standard_normal((2, 3, 5), np.float32)
    expected = outputs(model, x)
    report = rewrite(model)
    assert [(c.rule, c.value) for c in report.changes] == [("chain", "y")]
    assert operators(model) == ["TwoPassSoftmax"]
    np.testing.assert_allclose(outputs(model, x)[0], expected[0], rtol=1e-6)


@pytest.mark.parametrize(
    "old, new, reason",
    [
        ("=> (float[2, 3, 5] y)", "=> (float[2, 3, 5] y, float[2, 3, 5] e)", "e is an output of the graph too"),
        ("y) <", "y, float[2, 3, 1] z) <", "s is used elsewhere too, so it has to be computed anyway"),
        ("<keepdims = 1>(e", "<keepdims = 0>(e", "ReduceSum does not keep the axis (keepdims = 0)"),
        ("{-1}", "{1}", "axis 1 of ReduceSum is not the last axis of rank 3"),
        ("[1] last = {-1}", "[2] last = {1, 2}", "ReduceSum is over 2 axes"),
        ("(e, last)", "(e)", "ReduceSum is over all axes"),
    ],
)
def test_leaves_a_chain_whose_parts_are_needed(old: str, new: str, reason: str) -> None:
    text = CHAIN.replace("y)\n<", "y) <")
    if "z" in new:
        text = text.replace("y = Div(e, s)", "y = Div(e, s) z = Neg(s)")
    if "keepdims = 0" in new:
        text = text.replace("float[2, 3, 5]", "float[3, 3]")
    model = parse(text.replace(old, new))
    before = operators(model)
    report = rewrite(model)
    assert [s.reason for s in report.skips] == [reason]
    assert not report.changes and operators(model) == before


def test_a_maximum_used_elsewhere_stays() -> None:
    text = CHAIN.replace("[2, 3, 5] y)", "[2, 3, 5] y, float[2, 3, 1] m)")
    model = parse(text)
    assert rewrite(model).changes
    assert operators(model) == ["ReduceMax", "TwoPassSoftmax"]
    assert model.graph.node(1).inputs[0].name == "x"


def test_another_subtrahend_stays() -> None:
    """Softmax does not change when anything constant along the row is subtracted, but only the maximum is known."""
    model = parse(CHAIN.replace("ReduceMax<axes = [-1], keepdims = 1>", "ReduceMin<axes = [0], keepdims = 1>"))
    assert rewrite(model).changes
    assert operators(model) == ["ReduceMin", "Sub", "TwoPassSoftmax"]


def test_fires_inside_subgraphs() -> None:
    text = """g (bool c, float[2, 3] x) => (float[2, 3] y)
    {
        y = If(c) <
            then_branch = a () => (float[2, 3] p) { p = Softmax(x) },
            else_branch = b () => (float[2, 3] q) {
                q = If(c) <then_branch = b1 () => (float[2, 3] r) { r = Softmax(x) },
                           else_branch = b2 () => (float[2, 3] t) { t = Neg(x) }>
            }
        >
    }"""
    model = parse(text)
    report = rewrite(model)
    assert sorted(c.value for c in report.changes) == ["p", "r"]
    assert list(model.functions) == [(*TWO_PASS_SOFTMAX.identifier, "")]
    x = np.random.default_rng(0).standard_normal((2, 3), np.float32)
    np.testing.assert_allclose(outputs(model, np.array(True), x)[0], TWO_PASS_SOFTMAX.reference(x), rtol=1e-6)


FUNCTION = """
<domain: "mine", opset_import: ["": 17]>
Attend (a) => (b)
{
    b = Softmax<axis = -1>(a)
}
<domain: "mine", opset_import: ["": 17]>
Over <axis> (a) => (b)
{
    b = Softmax<axis: int = @axis>(a)
}"""


def test_fires_inside_functions_but_not_on_their_parameters() -> None:
    text = "g (float[2, 3] x) => (float[2, 3] y, float[2, 3] z) { y = mine.Attend(x) z = mine.Over<axis = 1>(x) }"
    model = parse(text, functions=FUNCTION, imports=', "mine": 1')
    report = rewrite(model)
    assert [c.value for c in report.changes] == ["b"]
    (skip,) = report.skips
    assert "is a parameter of the function" in skip.reason
    x = np.random.default_rng(0).standard_normal((2, 3), np.float32)
    for result in outputs(model, x):
        np.testing.assert_allclose(result, TWO_PASS_SOFTMAX.reference(x), rtol=1e-6)


def test_a_second_run_changes_nothing() -> None:
    model = softmax("")
    rewrite(model)
    once = ir.to_proto(model).SerializeToString()
    assert not rewrite(model).changes
    assert ir.to_proto(model).SerializeToString() == once


def test_carries_names_and_types() -> None:
    model = parse("g (float[n, 4] x) => (float[n, 4] y) { t = Softmax(x) y = Neg(t) }")
    rewrite(model)
    (node, _) = model.graph
    (value,) = node.outputs
    assert value.name == "t" and value.dtype == ir.DataType.FLOAT and str(value.shape) == "[n,4]"


def test_detail_says_which_form_and_why() -> None:
    ctx = PassContext(caches=Caches(32 << 10, MIB, 32 * MIB))
    short = rewrite(softmax("", "[8, 64]"), ctx=ctx).changes[0].detail
    long = rewrite(softmax("", "[1, 67108864]"), ctx=ctx).changes[0].detail
    dynamic = rewrite(softmax("", "[1, n]"), ctx=ctx).changes[0].detail
    narrow = [rewrite(softmax("", f"[1, {n}]", "float16"), ctx=ctx).changes[0].detail for n in ("2048", "2049", "n")]
    asked = rewrite(softmax("", "[1, n]"), TwoPassSoftmax(form=Form.TWO_PASS), ctx).changes[0].detail
    assert short == "three-pass: a row and its result (512 B) stay in the 32 MiB cache"
    assert long == "two-pass: a row and its result (512 MiB) do not stay in the 32 MiB cache"
    assert dynamic.startswith("by row length at run time, which is n: three-pass up to 3145728 elements")
    assert narrow[0] == "three-pass: 8 KiB of float32 for a row's exponentials stay in the innermost cache"
    assert narrow[1].startswith("two-pass: 8.004 KiB of float32 for a row's exponentials would not stay")
    assert narrow[2].endswith("three-pass up to 2048 elements, two-pass above")
    assert asked == "two-pass: asked for by form=two-pass"


def test_the_choice_changes_where_it_says() -> None:
    caches = Caches(32 << 10, MIB, 8 * MIB)
    limit = longest_in_cache(caches)
    assert choose_form(limit, caches)[0] is Form.THREE_PASS
    assert choose_form(limit + 1, caches)[0] is Form.TWO_PASS


def test_options() -> None:
    step = parse_pass("two-pass-softmax:form=two-pass:min_row=100")
    assert step == TwoPassSoftmax(Form.TWO_PASS, 100) and parse_pass(str(step)) == step
    model = softmax("", "[3, 99]")
    assert [s.reason for s in rewrite(model, step).skips] == ["rows of 99 are shorter than min_row=100"]
    model = softmax("", "[3, 100]")
    assert rewrite(model, step).changes
    assert model.graph.node(0).attributes["form"].value == "two-pass"
    x = np.random.default_rng(0).standard_normal((3, 100), np.float32)
    np.testing.assert_allclose(outputs(model, x)[0], TWO_PASS_SOFTMAX.reference(x), rtol=1e-6)
    with pytest.raises(UsageError, match="min_row is -1, must be at least 0"):
        parse_pass("two-pass-softmax:min_row=-1")
    assert dataclasses.fields(TwoPassSoftmax)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda op: op.name)
def test_operators_match_their_reference(operator) -> None:
    """Every operator through the checker, onnx's own evaluator and onnxruntime, on each of its cases."""
    for case in operator.cases:
        arrays = [np.asarray(np.random.default_rng(1).standard_normal(shape, np.float32)) for shape in case.shapes]
        for i in case.booleans:
            arrays[i] = arrays[i] > -1
        for i, kind in case.kinds.items():
            arrays[i] = whole_numbers(kind, case.shapes[i])
        model = model_of(operator, arrays, case.attributes)
        expected = operator.reference(*arrays, **case.attributes)
        model.graph.outputs[0].shape = ir.Shape(expected.shape)
        operator.add_to(model)
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto)
        feeds = {f"x{i}": array for i, array in enumerate(arrays) if f"x{i}" not in model.graph.initializers}
        # A sum of products is as good as its terms; the power multiplies their relative errors.
        absolute = 2e-6 * case.attributes.get("power", 1) * np.abs(expected).max(initial=0) if len(arrays) > 1 else 0
        if all(array.size for array in arrays):
            # onnx 1.23 cannot evaluate a Softmax whose axis is a parameter of the function around it.
            evaluated = ReferenceEvaluator(inline_local_functions(proto)).run(None, feeds)[0]
            np.testing.assert_allclose(evaluated, expected, rtol=2e-6, atol=absolute)
        np.testing.assert_allclose(outputs(model, *feeds.values())[0], expected, rtol=2e-6, atol=absolute)


def whole_numbers(kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """4-bit numbers of all sizes; of other types 1 and 0 in turn."""
    low, high = {"int4": (-8, 8), "uint4": (0, 16)}.get(kind, (0, 2))
    dtype = ir.DataType[kind.upper()].numpy()
    if high == 2:
        return (np.arange(np.prod(shape))[::-1] % 2).reshape(shape).astype(dtype)
    return np.random.default_rng(2).integers(low, high, shape).astype(dtype)
