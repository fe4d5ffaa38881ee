"""The default schedule changes the order of independent elements and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from graphwright.runtime.target import Target
from onnx import compose, numpy_helper, parser

pytestmark = pytest.mark.tvm
HEADER = '<ir_version: 10, opset_import: ["" : 20]>'


class Cases:
    """Models of one or two nodes, which are compiled as one."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.models: list[onnx.ModelProto] = []
        self.feeds: dict[str, np.ndarray] = {}

    def draw(self, *shape: int, dtype: str = "float32") -> np.ndarray:
        kind = np.dtype(dtype)
        if kind.kind == "f":
            return self.random.standard_normal(shape).astype(kind)
        return self.random.integers(-5, 5, shape).astype(kind)

    def add(self, text: str, x: np.ndarray, **weights: np.ndarray) -> None:
        model = parser.parse_model(f"{HEADER}\ng {text}")
        model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
        prefix = f"c{len(self.models)}_"
        self.models.append(compose.add_prefix(model, prefix))
        self.feeds[f"{prefix}x"] = x

    def conv(self, channels: int, filters: int, size: tuple[int, int], kernel: int, stride: int = 1,
             dilation: int = 1, groups: int = 1, pad: int = 0) -> None:  # fmt: skip
        out = [(s + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for s in size]
        self.add(
            f"(float[1,{channels},{size[0]},{size[1]}] x) => (float[1,{filters},{out[0]},{out[1]}] y) {{ t = Conv<"
            f"strides = {[stride] * 2}, dilations = {[dilation] * 2}, group = {groups}, pads = {[pad] * 4}>(x, w, b)"
            "  y = Relu(t) }",
            self.draw(1, channels, *size), w=self.draw(filters, channels // groups, kernel, kernel),
            b=self.draw(filters),
        )  # fmt: skip

    def matmul(self, *shape: int, dtype: str = "float32", word: str = "float") -> None:
        *batch, rows, inner, columns = shape
        a, b, c = ([*batch, *s] for s in ((rows, inner), (inner, columns), (rows, columns)))
        text = f"({word}{a} x) => ({word}{c} y) {{ y = MatMul(x, w) }}"
        self.add(text, self.draw(*a, dtype=dtype), w=self.draw(*b, dtype=dtype))

    def whole(self) -> onnx.ModelProto:
        merged = onnx.ModelProto()
        merged.CopyFrom(self.models[0])
        for model in self.models[1:]:
            for field in ("node", "input", "output", "initializer"):
                getattr(merged.graph, field).extend(getattr(model.graph, field))
        return merged


def convolutions(cases: Cases) -> None:
    for size in (7, 13, 14, 28, 56):
        cases.conv(16, 24, (size, size), 3, pad=1)
    cases.conv(16, 24, (14, 14), 1)
    cases.conv(32, 32, (14, 14), 3, groups=32, pad=1)
    cases.conv(32, 64, (13, 13), 3, stride=2, groups=32, pad=1)
    cases.conv(6, 9, (11, 17), 3, stride=2, dilation=2, groups=3, pad=2)
    cases.conv(3, 16, (56, 56), 7, stride=2, pad=3)
    cases.conv(17, 19, (7, 7), 3, pad=1)
    cases.conv(8, 8, (1, 1), 1)
    half = cases.draw(1, 16, 14, 14, dtype="float16")
    cases.add("(float16[1,16,14,14] x) => (float16[1,16,14,14] y) { y = Conv<pads = [1,1,1,1]>(x, w) }", half,
              w=cases.draw(16, 16, 3, 3, dtype="float16"))  # fmt: skip
    cases.add("(float[1,8,7,7] x) => (float[1,6,14,14] y) { y = ConvTranspose<strides = [2,2]>(x, w) }",
              cases.draw(1, 8, 7, 7), w=cases.draw(8, 6, 2, 2))  # fmt: skip
    for name in ("MaxPool", "AveragePool"):
        cases.add("(float[1,8,14,14] x) => (float[1,8,7,7] y)"
                  f" {{ y = {name}<kernel_shape = [3,3], strides = [2,2], pads = [1,1,1,1]>(x) }}",
                  cases.draw(1, 8, 14, 14))  # fmt: skip
    cases.add("(float[1,64,7,7] x) => (float[1,64,1,1] y) { y = GlobalAveragePool(x) }", cases.draw(1, 64, 7, 7))


def products(cases: Cases) -> None:
    for shape in ((1, 64, 64), (7, 13, 17), (128, 64, 48), (33, 100, 31), (2, 3, 5, 7, 11), (4, 16, 32, 64),
                  (1, 1000, 1), (48, 1, 48)):  # fmt: skip
        cases.matmul(*shape)
    cases.matmul(16, 32, 48, dtype="float64", word="double")
    cases.matmul(12, 32, 24, dtype="float16", word="float16")
    cases.matmul(16, 64, 32, dtype="int32", word="int32")
    cases.matmul(16, 64, 32, dtype="int64", word="int64")
    cases.add("(float[20,30] x) => (float[40,20] y) { y = Gemm<transA = 1, transB = 1>(w, x, b) }", cases.draw(20, 30),
              w=cases.draw(30, 40), b=cases.draw(20))  # fmt: skip
    cases.add("(float[N,48] x) => (float[N,32] y) { t = MatMul(x, w)  y = Relu(t) }", cases.draw(5, 48),
              w=cases.draw(48, 32))  # fmt: skip
    cases.add("(float[B,M,48] x) => (float[B,M,M] y) { t = Transpose<perm = [0,2,1]>(x)  y = MatMul(x, t) }",
              cases.draw(2, 9, 48))  # fmt: skip


def reductions(cases: Cases) -> None:
    for name in ("ReduceSum", "ReduceMax", "ReduceL2", "ReduceLogSumExp"):
        for axes in ([0], [1], [2], [0, 2], [0, 1, 2]):
            shape = [1 if axis in axes else size for axis, size in enumerate((8, 16, 48))]
            cases.add(f"(float[8,16,48] x) => (float{shape} y) {{ y = {name}(x, axes) }}", cases.draw(8, 16, 48),
                      axes=np.array(axes))  # fmt: skip
    for axis in range(3):
        shape = [1 if axis == a else size for a, size in enumerate((8, 16, 48))]
        cases.add(f"(float[8,16,48] x) => (int64{shape} y) {{ y = ArgMax<axis = {axis}>(x) }}", cases.draw(8, 16, 48))
        cases.add("(float[8,16,48] x) => (float[8,16,48] y) { y = CumSum(x, axis) }", cases.draw(8, 16, 48),
                  axis=np.array(axis))  # fmt: skip
        cases.add(f"(float[8,16,48] x) => (float[8,16,48] y) {{ y = Softmax<axis = {axis}>(x) }}",
                  cases.draw(8, 16, 48))  # fmt: skip
    cases.add("(float[8,16,48] x) => (float[8,16,48] y) { y = LayerNormalization(x, w, b) }", cases.draw(8, 16, 48),
              w=cases.draw(48), b=cases.draw(48))  # fmt: skip
    cases.add("(float[2,3,7,7] x) => (float[2,3,7,7] y) { y = InstanceNormalization(x, w, b) }",
              cases.draw(2, 3, 7, 7), w=cases.draw(3), b=cases.draw(3))  # fmt: skip
    cases.add("(int8[16,64] x) => (int32[16,1] y) { c = Cast<to = 6>(x)  y = ReduceSum(c, axes) }",
              cases.draw(16, 64, dtype="int8"), axes=np.array([1]))  # fmt: skip
    cases.add("(float[16,64] x) => (float[16,5] y, int64[16,5] i) { y, i = TopK(x, k) }", cases.draw(16, 64),
              k=np.array([5]))  # fmt: skip


def elementwise(cases: Cases) -> None:
    cases.add("(float[33,65] x) => (float[33,65] y) { c = Greater(x, z)  y = Where(c, x, z) }", cases.draw(33, 65),
              z=cases.draw(1))  # fmt: skip
    cases.add("(float[4,16,33] x) => (float[4,48,33] y) { n = Neg(x)  e = Exp(x)  y = Concat<axis = 1>(x, n, e) }",
              cases.draw(4, 16, 33))  # fmt: skip
    cases.add("(float[8,31,64] x) => (float[64,8,31] y) { t = Transpose<perm = [2,0,1]>(x)  y = Relu(t) }",
              cases.draw(8, 31, 64))  # fmt: skip
    cases.add("(int64[20] x) => (float[20,64] y) { y = Gather(w, x) }", cases.random.integers(0, 100, 20),
              w=cases.draw(100, 64))  # fmt: skip
    cases.add("(float[1,4,9,9] x) => (float[1,4,13,13] y) { y = Pad(x, pads) }", cases.draw(1, 4, 9, 9),
              pads=np.array([0, 0, 2, 2, 0, 0, 2, 2]))  # fmt: skip
    cases.add('(float[1,4,9,9] x) => (float[1,4,18,18] y) { y = Resize<mode = "linear">(x, , s) }',
              cases.draw(1, 4, 9, 9), s=np.array([1, 1, 2, 2], np.float32))  # fmt: skip
    cases.add("(float[N,7] x) => (float[N,7] y) { y = Tanh(x) }", cases.draw(11, 7))
    cases.add("(double[5,3] x) => (double[5,3] y) { y = Sqrt(x) }", np.abs(cases.draw(5, 3, dtype="float64")))
    cases.add("(uint8[40,40] x) => (uint8[40,40] y) { y = Add(x, x) }",
              cases.random.integers(0, 99, (40, 40), np.uint8))  # fmt: skip


def lowered(model: onnx.ModelProto, target: Target) -> Any:
    """The model as fused loop nests, of which those that no kernel template has taken are not scheduled yet."""
    import tvm
    from graphwright.runtime import importer, phases

    module = importer.import_model(model, target)
    with target.tvm(), tvm.transform.PassContext(opt_level=3):
        return phases.fuse(phases.legalize(module, target), target)


def run(module: Any, target: Target, feeds: Sequence[np.ndarray]) -> list[np.ndarray]:
    import tvm
    from graphwright.runtime import phases
    from graphwright.runtime.codegen import pipeline_of
    from tvm import relax

    where = target.tvm()
    with where, tvm.transform.PassContext(opt_level=3):
        executable = relax.build(phases.lower()(module), where, relax_pipeline=None, tir_pipeline=pipeline_of(target))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return [tensor.numpy() for tensor in machine["main"](*map(tvm.runtime.tensor, feeds))]


def loop_nests(module: Any) -> Mapping[str, bool]:
    """Name of a loop nest -> whether it is scheduled."""
    from tvm import tirx

    functions = {variable.name_hint: f for variable, f in module.functions_items()}
    return {
        name: "tirx.is_scheduled" in (f.attrs or {}) for name, f in functions.items() if isinstance(f, tirx.PrimFunc)
    }


# Loops over what was computed one step before: not reductions, and left as they are.
PLAIN = ("cumsum", "topk")


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("cpu-avx2", "cpu-baseline")]


@pytest.mark.parametrize("name", ["cpu", *SLOW])
@pytest.mark.parametrize("fill", [convolutions, products, reductions, elementwise])
def test_scheduled_loops_give_the_numbers_of_plain_ones(name: str, fill: Callable[[Cases], None]) -> None:
    from graphwright.runtime.schedule import default_schedule

    target = Target.named(name)
    if not target.runs_here:
        pytest.skip(f"this processor has no {target.isa.name}")
    cases = Cases()
    fill(cases)
    model = cases.whole()
    plain = lowered(model, target)
    scheduled = default_schedule(plain, target)
    left = [nest for nest, done in loop_nests(scheduled).items() if not done]
    assert len(left) < len(loop_nests(scheduled)) and all(nest.startswith(PLAIN) for nest in left), left

    feeds = [cases.feeds[value.name] for value in model.graph.input]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    truth = session.run(None, cases.feeds)
    for output, before, after, right in zip(
        model.graph.output, run(plain, target, feeds), run(scheduled, target, feeds), truth, strict=True
    ):
        assert after.dtype == before.dtype and after.shape == before.shape, output.name
        if after.dtype.kind != "f":
            np.testing.assert_array_equal(after, before, output.name)
            np.testing.assert_array_equal(after, right, output.name)
            continue
        # A sum of up to a thousand terms in another order, relative to the largest; against onnxruntime it is also
        # another exp. float16: its own rounding, of every partial sum.
        ours, theirs = (1e-2, 2e-2) if after.dtype == np.float16 else (1e-6, 1e-5)
        scale = float(np.abs(before).max())
        wide = after.astype(np.float64)
        np.testing.assert_allclose(wide, before.astype(np.float64), rtol=0, atol=ours * scale, err_msg=output.name)
        np.testing.assert_allclose(wide, right.astype(np.float64), rtol=0, atol=theirs * scale, err_msg=output.name)


def test_what_is_scheduled_already_is_left_alone() -> None:
    from graphwright.runtime.schedule import default_schedule

    target = Target.named("cpu")
    model = parser.parse_model(f"{HEADER}\ng (float[64,64] x) => (float[64,64] y) {{ y = Relu(x) }}")
    once = default_schedule(lowered(model, target), target)
    twice = default_schedule(once, target)
    for variable, function in once.functions_items():
        assert function.same_as(twice[variable])


def test_an_empty_dynamic_axis_gives_the_identity(tmp_path: Path) -> None:
    """The loop over the axis makes no step, so the first value must be given outside of it."""
    import graphwright

    text = (
        "(float[N] x, float[3,N] z) => (float s, float[3] m) {"
        "  s = ReduceSum<keepdims = 0>(x)  m = ReduceL1<keepdims = 0>(z, a) }"
    )
    model = parser.parse_model(f"{HEADER}\ng {text}")
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "a"))
    onnx.save(model, tmp_path / "m.onnx")
    graphwright.optimize(tmp_path / "m.onnx", target="cpu", out=tmp_path / "out")
    session = graphwright.load(tmp_path / "out")
    for _ in range(3):
        total, norms = session.run(None, {"x": np.ones(0, np.float32), "z": np.ones((3, 0), np.float32)})
        assert total == 0 and not norms.any()


def test_the_steps_of_a_recurrence_are_joined_right(tmp_path: Path) -> None:
    """Concat, Reshape and Transpose of many pieces become one loop nest that chooses between reads."""
    import graphwright

    random = np.random.default_rng(0)
    text = (
        "(float[7,2,20] x) => (float[7,2,48] y, float[2,2,24] h, float[2,2,24] c) {"
        '  t, h, c = LSTM<hidden_size = 24, direction = "bidirectional", clip = 9.0>(x, w, r)'
        "  u = Transpose<perm = [0,2,1,3]>(t)  y = Reshape(u, s) }"
    )
    model = parser.parse_model(f"{HEADER}\ng {text}")
    for name, array in {
        "w": random.standard_normal((2, 96, 20)).astype(np.float32) / 4,
        "r": random.standard_normal((2, 96, 24)).astype(np.float32) / 4,
        "s": np.array([7, 2, 48]),
    }.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.save(model, tmp_path / "m.onnx")
    result = graphwright.optimize(tmp_path / "m.onnx", target="cpu", out=tmp_path / "out")
    assert result.verdict is not None and result.verdict.relative < 1e-5
    assert [region.runtime for region in result.artifact.manifest.regions] == ["tvm"]
