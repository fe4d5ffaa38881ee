"""ONNX to Relax: what comes out runs and gives onnxruntime's numbers, and what cannot be taken is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from graphwright.runtime.target import Target

onnxruntime = pytest.importorskip("onnxruntime")
tvm = pytest.importorskip("tvm")
pytestmark = pytest.mark.tvm

TARGET = Target.named("cpu")
# float32 results of the same formula in another order: a few units in the last place.
RTOL, ATOL = 1e-5, 1e-6


def parse(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    return model


def compiled(model: onnx.ModelProto) -> Any:
    """A function feeds -> list of arrays through TVM."""
    from graphwright.runtime import phases
    from graphwright.runtime.importer import import_model
    from tvm import relax

    executable, constants = phases.compile_module(import_model(model, TARGET), TARGET)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    weights = {tensor.name for tensor in model.graph.initializer}
    names = [info.name for info in model.graph.input if info.name not in weights]

    def run(feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        inputs = [tvm.runtime.tensor(np.asarray(feeds[name])) for name in names]
        result = machine["main"](*inputs, tvm.runtime.convert(list(constants)))
        results = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
        return [tensor.numpy() for tensor in results]

    return run


def same(model: onnx.ModelProto, *runs: Mapping[str, np.ndarray]) -> None:
    """Compile once and compare every run with onnxruntime."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    mine = compiled(model)
    for feeds in runs:
        for actual, expected in zip(mine(feeds), session.run(None, dict(feeds)), strict=True):
            assert actual.dtype == expected.dtype and actual.shape == expected.shape
            np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=ATOL)


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


# Domains and functions.


def test_a_domain_is_part_of_an_operators_name() -> None:
    """`my.domain.Relu` is not relu."""
    from graphwright.runtime.importer import import_model
    from graphwright.runtime.importing.refused import ImportRefused

    model = parse('<ir_version: 9, opset_import: ["": 18, "my.domain": 1]> g (float[4] x) => (float[4] y)'
                  "{ y = my.domain.Relu(x) }")  # fmt: skip
    with pytest.raises(ImportRefused, match=r"Relu at 'y' .* domain 'my.domain' has no lowering"):
        import_model(model, TARGET)


HALF = """<ir_version: 9, opset_import: ["": 18, "my": 1]> g (float[n, 3] x) => (float[n, 3] y) {
    y = my.Half <by = 4.0> (x)
}
<domain: "my", opset_import: ["": 13]> Half <by: float = 2.0> (a) => (b) {
    c = Constant <value_float: float = @by> ()
    b = Div(a, c)
}"""


def test_a_models_function_is_followed_with_its_attributes() -> None:
    same(parse(HALF), {"x": draw(2, 3)})


def test_an_operator_without_converter_goes_through_its_standard_body() -> None:
    model = parse('<ir_version: 9, opset_import: ["": 18]> g (float[2, 4] x, int64[2] t) => (float l)'
                  '{ l = NegativeLogLikelihoodLoss <reduction = "sum"> (x, t) }')  # fmt: skip
    same(model, {"x": draw(2, 4), "t": np.array([1, 3])})


# Shapes.


def test_dimensions_of_one_name_are_one_variable() -> None:
    from graphwright.runtime.importer import import_model

    model = parse('<ir_version: 9, opset_import: ["": 18]> g (float[n, 3] x, float[n, 3] y, float[m, 3] z)'
                  " => (float[n, 3] a, float[m, 3] b) { a = Add(x, y) b = Relu(z) }")  # fmt: skip
    x, y, z = import_model(model, TARGET)["main"].params
    assert x.ty.shape[0].same_as(y.ty.shape[0]) and not x.ty.shape[0].same_as(z.ty.shape[0])


def test_a_shape_computed_from_a_dynamic_dimension_stays_symbolic() -> None:
    """Shape -> Gather -> Unsqueeze -> Concat -> Reshape, as exporters write it."""
    from graphwright.runtime.importer import import_model

    model = parse(
        '<ir_version: 9, opset_import: ["": 18]> g (float[n, 4, 6] x) => (float[a, b, c, d] y) {'
        " s = Shape(x) b0 = Gather(s, zero) b1 = Unsqueeze(b0, first) k = Concat <axis = 0> (b1, rest)"
        " y = Reshape(x, k) }",
        zero=np.array(0), first=np.array([0]), rest=np.array([4, -1, 2]),
    )  # fmt: skip
    result = import_model(model, TARGET)["main"].ret_ty
    assert str(result.shape) == "R.shape([n, 4, 3, 2])"
    same(model, {"x": draw(1, 4, 6)}, {"x": draw(5, 4, 6)})


@pytest.mark.parametrize(
    ("text", "weights", "shapes"),
    [
        ("s = Shape(x) y = ConstantOfShape <value = float[1] {2.5}> (s)", {}, [(3, 2), (1, 5)]),
        ("s = Shape(x) m = Concat <axis = 0> (two, s) y = Expand(x, m)", {"two": np.array([2])}, [(3,), (1,)]),
        ("y = Slice(x, a, b, c)", {"a": np.array([-2]), "b": np.array([2**63 - 1]), "c": np.array([0])},
         [(5, 2), (2, 2)]),
        ("y = Flatten <axis = -1> (x)", {}, [(2, 3, 4), (1, 1, 5)]),
    ],
)  # fmt: skip
def test_dynamic_shapes(text: str, weights: dict[str, np.ndarray], shapes: list[tuple[int, ...]]) -> None:
    dims = ", ".join(f"d{i}" for i in range(len(shapes[0])))
    model = parse(f'<ir_version: 9, opset_import: ["": 18]> g (float[{dims}] x) => (y) {{ {text} }}', **weights)
    same(model, *({"x": draw(*shape)} for shape in shapes))


RUNTIME_SHAPE = '<ir_version: 9, opset_import: ["": 18]> g (float[2, 6] x, int64[2] s) => (float[3, 4] y)'


def test_a_shape_that_arrives_at_run_time_is_checked_against_the_declared_one() -> None:
    model = parse(RUNTIME_SHAPE + "{ y = Reshape(x, s) }")
    same(model, {"x": draw(2, 6), "s": np.array([3, 4])}, {"x": draw(2, 6), "s": np.array([-1, 4])})
    with pytest.raises(Exception, match="match_cast error"):
        compiled(model)({"x": draw(2, 6), "s": np.array([4, 3])})


def test_a_shape_that_is_known_nowhere_is_computed_at_run_time() -> None:
    model = parse(RUNTIME_SHAPE.replace("[3, 4]", "[a, b]") + "{ y = Reshape(x, s) }")
    x = draw(2, 6)
    same(model, *({"x": x, "s": np.array(s)} for s in ([3, 4], [-1, 2], [12, 1], [0, 6])))


def test_a_table_cut_to_the_length_of_the_tokens_is_repeated_for_each() -> None:
    """`positions[:, :length].expand(batch, length)` of exports: both lengths are the same, or the model is refused."""
    model = parse("""<ir_version: 9, opset_import: ["": 18]> g (int64[batch, seq] ids) => (int64[batch, seq] y) {
        s = Shape(ids) n = Slice(s, one, two) p = Slice(table, zero, n, one) e = Expand(p, s) y = Add(ids, e) }""",
        one=np.array([1]), two=np.array([2]), zero=np.array([0]), table=np.arange(16)[None])  # fmt: skip
    same(model, *[{"ids": np.arange(a * b).reshape(a, b)} for a, b in ((1, 1), (3, 1), (2, 15), (1, 16))])
    with pytest.raises(Exception, match="match_cast error"):
        compiled(model)({"ids": np.ones((1, 17), np.int64)})


def test_axes_that_arrive_at_run_time_choose_between_the_forms_that_fit() -> None:
    model = parse('<ir_version: 9, opset_import: ["": 18]> g (float[3, 2, 2] x, int64[1] axes) => (float[3, 2] y)'
                  "{ y = ReduceSum <keepdims = 0> (x, axes) }")  # fmt: skip
    same(model, *({"x": draw(3, 2, 2), "axes": np.array([axis])} for axis in (1, 2, -1, -2)))
    with pytest.raises(Exception, match="match_cast error"):
        compiled(model)({"x": draw(3, 2, 2), "axes": np.array([0])})


# If.

BRANCHES = """<ir_version: 9, opset_import: ["": 18]> g (float[n, 3] x, bool c, bool[1] d) => (float[n, 3] y) {
    h = Mul(x, w)
    y = If (c) <
        then_branch = t () => (float[n, 3] o) {
            o = If (d) <
                then_branch = tt () => (float[n, 3] p) { p = Add(h, x) },
                else_branch = te () => (float[n, 3] q) {
                    k = Constant <value = float[3] {1.0, 2.0, 3.0}> ()
                    q = Add(h, k)
                }
            >
        },
        else_branch = e () => (float[n, 3] r) { r = Exp(h) }
    >
}"""


def test_branches_are_functions_that_are_called() -> None:
    from graphwright.runtime.importer import import_model

    module = import_model(parse(BRANCHES, w=draw(3)), TARGET)
    main = str(module["main"])
    assert "R.exp" not in main and "if c" in main
    assert any("R.exp" in str(function) for name, function in module.functions_items() if name.name_hint != "main")


def test_every_branch_gives_its_answer() -> None:
    choices = [(c, d) for c in (True, False) for d in (True, False)]
    same(parse(BRANCHES, w=draw(3)), *({"x": draw(2, 3), "c": np.array(c), "d": np.array([d])} for c, d in choices))


def test_a_refusal_inside_a_branch_names_the_node() -> None:
    from graphwright.runtime.importer import refusals

    model = parse(
        BRANCHES.replace("r = Exp(h)", "r = my.Unknown(h)").replace('["": 18]', '["": 18, "my": 1]'), w=draw(3)
    )
    assert refusals(model, TARGET) == {
        1: "Unknown at 'y/else/r': the domain 'my' has no lowering and the model has no body for it; "
        "export the model with its functions"
    }


def test_after_a_refused_branch_the_importer_still_builds() -> None:
    """The block that a failing branch leaves open must not swallow later nodes."""
    from graphwright.runtime.importer import refusals

    text = BRANCHES.replace("r = Exp(h)", "r = my.Unknown(h)").replace('["": 18]', '["": 18, "my": 1]')
    text = text.rstrip("}").rstrip() + "\n z = my.Other(y) u = Relu(y) }"
    assert list(refusals(parse(text, w=draw(3)), TARGET)) == [1, 2]


# Refusals.


def test_refusals_are_all_found_in_one_look_and_do_not_hide_each_other() -> None:
    from graphwright.runtime.importer import refusals

    model = parse('<ir_version: 9, opset_import: ["": 18]> g (float[4] x) => (float[4] z)'
                  '{ a = RandomNormalLike(x) b = Relu(a) c = Bernoulli(b) z = Add(b, c) }')  # fmt: skip
    found = refusals(model, TARGET)
    assert found == {0: "random numbers are not compiled", 2: "random numbers are not compiled"}
    assert refusals(model, TARGET) == found


def test_a_result_of_another_type_or_shape_than_onnx_promises_is_refused() -> None:
    from graphwright.runtime.importer import refusals
    from graphwright.runtime.importing import CONVERTERS

    model = parse('<ir_version: 9, opset_import: ["": 18]> g (float[2, 3] x) => (float[2, 3] y) { y = Tanh(x) }')
    assert refusals(model, TARGET) == {}
    wrong = {
        "the converter gave float16, ONNX promises float32": lambda site: tvm.relax.op.astype(site.x(), "float16"),
        "the converter gave size 3 on axis 0, ONNX promises 2": lambda site: tvm.relax.op.permute_dims(site.x()),
        "the converter gave rank 1, ONNX promises 2": lambda site: tvm.relax.op.reshape(site.x(), [6]),
    }
    for reason, converter in wrong.items():
        CONVERTERS["Tanh"] = converter
        try:
            assert refusals(model, TARGET) == {0: reason}
        finally:
            del CONVERTERS["Tanh"]


def test_the_frontend_prints_and_warns_nothing(
    capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    from graphwright.runtime.importer import refusals

    model = parse('<ir_version: 9, opset_import: ["": 18]> g (float[2, 3] x) => (float[3] y) { y = Einsum <equation ='
                  ' "ij,jk"> (x) }')  # fmt: skip
    assert list(refusals(model, TARGET)) == [0]
    assert capfd.readouterr() == ("", "") and not recwarn.list


# Numbers where naive converters go wrong.


def run_one(
    op: str,
    inputs: Sequence[np.ndarray],
    opset: int = 21,
    outputs: int = 1,
    constants: Sequence[int] = (),
    **attrs: Any,
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A one-node model and its feeds; the inputs numbered in `constants` become initializers."""
    names = [f"x{i}" for i in range(len(inputs))]
    node = onnx.helper.make_node(op, names, [f"y{i}" for i in range(outputs)], **attrs)
    graph = onnx.helper.make_graph(
        [node], "g",
        [onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
         for i, (n, v) in enumerate(zip(names, inputs, strict=True)) if i not in constants],
        [onnx.ValueInfoProto(name=name) for name in node.output],
        [onnx.numpy_helper.from_array(inputs[i], names[i]) for i in constants],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    feeds = {n: v for i, (n, v) in enumerate(zip(names, inputs, strict=True)) if i not in constants}
    return onnx.shape_inference.infer_shapes(model), feeds


SPECIAL = np.array([np.nan, -0.0, 0.0, 2.0, -3.0, np.inf, -np.inf], np.float32)


@pytest.mark.parametrize(
    "op", ["Relu", "LeakyRelu", "Elu", "Selu", "HardSigmoid", "Sign", "Softplus", "Softsign", "IsNaN", "IsInf", "Abs"]
)
def test_special_numbers_go_through_activations_as_in_onnxruntime(op: str) -> None:
    same(*run_one(op, [SPECIAL]))


def test_not_a_number_is_true() -> None:
    same(*run_one("Cast", [SPECIAL], to=onnx.TensorProto.BOOL))


@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin"])
@pytest.mark.parametrize("dtype, axes", [("float", "0, 2"), ("float16", "1, 2"), ("float16", "0, 2")])
def test_extremes_of_any_axes_keep_nan(op: str, dtype: str, axes: str) -> None:
    model = parse(
        f'<ir_version: 8, opset_import: ["" : 17]> g ({dtype}[3, 4, 20] x) => (y) '
        f"{{ y = {op} <axes = [{axes}], keepdims = 0> (x) }}"
    )
    x = np.random.default_rng(0).standard_normal((3, 4, 20)).astype("float32" if dtype == "float" else dtype)
    x[1, 2, 3], x[0, 0, 19], x[2, 1] = np.nan, np.nan, -np.inf
    take = np.max if op == "ReduceMax" else np.min
    (y,) = compiled(model)({"x": x})
    np.testing.assert_array_equal(y, take(x, tuple(int(a) for a in axes.split(","))))


@pytest.mark.parametrize("op", ["Max", "Min"])
def test_extremes_hand_on_nan_from_either_side(op: str) -> None:
    same(*run_one(op, [SPECIAL, SPECIAL[::-1].copy(), np.ones(7, np.float32)]))


@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin"])
def test_a_row_of_infinities_keeps_its_extreme(op: str) -> None:
    sign = -1 if op == "ReduceMax" else 1
    same(*run_one(op, [np.full((2, 3), sign * np.inf, np.float32), np.array([1])], constants=[1]))


def test_integer_division_truncates_and_does_not_trap() -> None:
    model, feeds = run_one("Div", [np.array([-7, 7, -7, 5], np.int32), np.array([2, -2, -2, 3], np.int32)])
    same(model, feeds)
    least = np.iinfo(np.int32).min
    result = compiled(model)({"x0": np.array([1, least, 0, 9], np.int32), "x1": np.array([0, -1, 0, 4], np.int32)})
    assert result[0].tolist() == [0, least, 0, 2]


@pytest.mark.parametrize("fmod", [0, 1])
def test_remainders_have_the_sign_the_standard_says(fmod: int) -> None:
    same(*run_one("Mod", [np.array([-7, 7, -7, 7]), np.array([3, -3, -3, 3])], fmod=fmod))


def test_variance_of_large_numbers_does_not_cancel() -> None:
    """E[x^2] - E[x]^2 in float32 loses all digits at 4000 +- 1."""
    x = draw(4, 64) + 4000
    model, feeds = run_one("LayerNormalization", [x, np.ones(64, np.float32)], constants=[1])
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    # One unit in the last place of the input is 2.4e-4.
    np.testing.assert_allclose(compiled(model)(feeds)[0], expected, atol=3e-3)


def test_half_precision_products_are_added_up_in_single() -> None:
    """In float16 a sum of ones stops at 2048."""
    ones = np.ones((1, 5000), np.float16)
    model, feeds = run_one("MatMul", [ones, np.ones((5000, 1), np.float16)])
    assert compiled(model)(feeds)[0].item() == 5000
    model, feeds = run_one("ReduceSum", [ones, np.array([1])], constants=[1])
    assert compiled(model)(feeds)[0].item() == 5000


def test_repeated_scatter_indices_are_all_added() -> None:
    same(*run_one("ScatterND", [draw(4, 5), np.array([[0, 1], [-1, 2], [0, 1]]), draw(3)], reduction="add"))


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("transform", ["half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel"])
def test_resize(mode: str, transform: str) -> None:
    inputs = [draw(1, 2, 5, 7), np.zeros(0, np.float32), np.array([1, 1, 1.7, 0.6], np.float32)]
    same(*run_one("Resize", inputs, constants=[1, 2], mode=mode, coordinate_transformation_mode=transform))


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool"])
def test_padding(op: str, auto_pad: str) -> None:
    attrs: dict[str, Any] = {"auto_pad": auto_pad, "strides": [2, 1]}
    inputs = [draw(1, 4, 9, 8)]
    if op.startswith("Conv"):
        inputs.append(draw(4, 2, 3, 2))
        attrs["group"] = 2
    else:
        attrs["kernel_shape"] = [3, 2]
    if auto_pad == "NOTSET":
        attrs["pads"] = [1, 0, 1, 1]
    same(*run_one(op, inputs, **attrs))


def test_an_empty_dimension_is_a_size_and_not_a_copy() -> None:
    model = parse('<ir_version: 9, opset_import: ["": 18]> g (float[0, 3, 4] x) => (float[3, 4, 0] y)'
                  "{ y = Reshape <allowzero = 1> (x, s) }", s=np.array([3, 4, 0]))  # fmt: skip
    assert compiled(model)({"x": np.zeros((0, 3, 4), np.float32)})[0].shape == (3, 4, 0)


def test_a_large_filled_tensor_is_not_stored() -> None:
    from graphwright.runtime import phases
    from graphwright.runtime.importer import import_model

    model = parse('<ir_version: 9, opset_import: ["": 18]> g (float[1000] x) => (float[100, 1000, 1000] y)'
                  "{ z = ConstantOfShape(s) y = Add(x, z) }", s=np.array([100, 1000, 1000]))  # fmt: skip
    _, constants = phases.compile_module(import_model(model, TARGET), TARGET)
    assert sum(int(np.prod(c.shape)) for c in constants) == 0


HALF_SUMS = {
    "ReduceMean": "(float16[2, 4096] x) => (float16[2, 1] y) { y = ReduceMean <axes = [1]> (x) }",
    "ReduceSum": "(float16[2, 4096] x, int64[1] axes) => (float16[2, 1] y) { y = ReduceSum (x, axes) }",
    "GlobalAveragePool": "(float16[1, 2, 64, 64] x) => (float16[1, 2, 1, 1] y) { y = GlobalAveragePool (x) }",
    "AveragePool": "(float16[1, 1, 64, 64] x) => (float16[1, 1, 1, 1] y) "
    "{ y = AveragePool <kernel_shape = [64, 64]> (x) }",
    "LpPool": "(float16[1, 1, 64, 64] x) => (float16[1, 1, 1, 1] y) "
    "{ y = LpPool <kernel_shape = [64, 64], p = 1> (x) }",
    "Einsum": "(float16[2, 4096] x, float16[4096, 1] w) => (float16[2, 1] y) "
    """{ y = Einsum <equation = "ij,jk->ik"> (x, w) }""",
}


@pytest.mark.parametrize("op", HALF_SUMS)
def test_long_sums_of_float16_are_added_up_in_float32(op: str) -> None:
    """In float16 a sum of ones ends at 2048."""
    opset = 17 if op == "ReduceMean" else 20
    weights = {}
    if op == "ReduceSum":
        weights["axes"] = np.array([1])
    if op == "Einsum":
        weights["w"] = np.ones((4096, 1), np.float16)
    model = parse(f'<ir_version: 8, opset_import: ["" : {opset}]> g {HALF_SUMS[op]}', **weights)
    dims = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    (y,) = compiled(model)({"x": np.ones(dims, np.float16)})
    assert y.dtype == np.float16
    np.testing.assert_array_equal(y, np.full(y.shape, 4096 if op in ("ReduceSum", "Einsum", "LpPool") else 1))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(float[A, B, 8] x, float[1, 32, 8] w, float[1, 32, 8] r) => (y) { y = LSTM <hidden_size = 8> (x, w, r) }",
         "its weights are computed at run time; "
         "the pass decompose replaces it where the shapes are known (--pin NAME=SHAPE)"),
        ("(float[1, 1, N, 8] x) => (y) { y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (x) }",
         "ceil_mode on a dynamic axis; fixed input shapes (--pin NAME=SHAPE) may cure it"),
        ("(float[3] x) => (y) { y = my.domain.Thing (x) }",
         "the domain 'my.domain' has no lowering and the model has no body for it; "
         "export the model with its functions"),
    ],
)  # fmt: skip
def test_a_reason_names_the_cure(text: str, reason: str) -> None:
    from graphwright.runtime.importer import refusals

    found = refusals(parse(f'<ir_version: 8, opset_import: ["" : 20, "my.domain" : 1]> g {text}'), TARGET)
    assert found == {0: reason}


def test_webgpu_refuses_64_bit_tensors_by_name() -> None:
    from graphwright.runtime.importer import refusals

    text = """(float[8, 4] x, int64[3] i) => (float[3, 4] y, float[4, 8] z) {
        y = Gather (x, i)
        z = Reshape (x, s)
    }"""
    model = parse(f'<ir_version: 8, opset_import: ["" : 20]> g {text}', s=np.array([4, 8]))
    assert refusals(model, Target.named("webgpu")) == {
        0: "'i' is int64, and WebGPU has no 64-bit types; give the model 32-bit ones"
    }
    assert refusals(model, TARGET) == {}


def test_sizes_that_follow_from_the_inputs_overrule_what_is_declared() -> None:
    """torch's exporter declares the length of its example behind an LSTM of free length."""
    text = """(float[b, n, 4] x) => (float[b, 20, 8] y) <float[b, 20, 4] r> {
        r = Relu (x)
        y = Concat <axis = 2> (r, x)
    }"""
    run = compiled(parse(f'<ir_version: 8, opset_import: ["" : 20]> g {text}'))
    for n in (20, 7):
        x = np.random.default_rng(n).standard_normal((2, n, 4)).astype(np.float32)
        np.testing.assert_array_equal(run({"x": x})[0], np.concatenate([np.maximum(x, 0), x], 2))


@pytest.mark.parametrize(
    ("text", "weights", "right", "wrong"),
    [
        ("(float[b, n, 64] x) => (float[b, k, 1024] y) { y = Reshape (x, s) }", [0, -1, 1024], [(2, 32, 64)],
         [(1, 100, 64)]),
        ("(float[b, n, 64] x) => (float[2, 6, 32] y) { y = Reshape (x, s) }", [2, 6, 32], [(2, 3, 64), (3, 2, 64)],
         [(2, 4, 64), (1, 3, 64)]),
        ("(float[b, n] x) => (float[b, 20] y, int64[b, 20] i) { y, i = TopK (x, s) }", [20], [(2, 20), (3, 25)],
         [(2, 10)]),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_are_an_error(
    text: str, weights: list[int], right: list[tuple[int, ...]], wrong: list[tuple[int, ...]]
) -> None:
    """Not the first elements alone, and not what lies behind them."""
    model = parse(f'<ir_version: 8, opset_import: ["" : 20]> g {text}', s=np.array(weights))
    run = compiled(model)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for shape in right:
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        for got, expected in zip(run({"x": x}), session.run(None, {"x": x}), strict=True):
            np.testing.assert_array_equal(got, expected)
    for shape in wrong:
        with pytest.raises(Exception, match="mismatch"):
            run({"x": np.zeros(shape, np.float32)})
