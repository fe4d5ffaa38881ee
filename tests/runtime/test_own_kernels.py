"""Operators of models that become kernels of our own: which ones do, and that they give onnxruntime's numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from graphwright.runtime.kernels import moves
from graphwright.runtime.target import Target

onnxruntime = pytest.importorskip("onnxruntime")
tvm = pytest.importorskip("tvm")
pytestmark = pytest.mark.tvm

TARGET = Target.named("cpu")
RTOL, ATOL = 1e-5, 1e-5
HEAD = '<ir_version: 11, opset_import: ["": 24]> '


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


class Model:
    """A model compiled once."""

    def __init__(self, text: str, **weights: np.ndarray) -> None:
        from graphwright.runtime import phases
        from graphwright.runtime.importer import import_model
        from tvm import relax

        self.proto = onnx.parser.parse_model(HEAD + text)
        self.proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
        lowered: list[Any] = []
        executable, constants = phases.compile_module(import_model(self.proto, TARGET), TARGET, lowered.append)
        self.lowered = lowered[0]
        self.main = relax.VirtualMachine(executable, tvm.cpu())["main"]
        self.constants = tvm.runtime.convert(list(constants))
        self.names = [info.name for info in self.proto.graph.input]

    @property
    def kernels(self) -> set[str]:
        """Operators of the kernels that it calls."""
        from graphwright.runtime.work import work_of

        return {kernel["op"] for kernel in work_of(self.lowered).kernels.values()} - {"shape_func"}

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        result = self.main(*(tvm.runtime.tensor(np.asarray(feeds[name])) for name in self.names), self.constants)
        results = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
        return [tensor.numpy() for tensor in results]

    def check(self, *runs: Mapping[str, np.ndarray]) -> None:
        session = onnxruntime.InferenceSession(self.proto.SerializeToString(), providers=["CPUExecutionProvider"])
        for feeds in runs:
            for actual, expected in zip(self(feeds), session.run(None, dict(feeds)), strict=True):
                assert actual.dtype == expected.dtype and actual.shape == expected.shape
                scale = np.nanmax(np.abs(expected[np.isfinite(expected)]), initial=1.0)
                np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=ATOL * scale)


# Normalizations.


def test_layer_normalization_of_dynamic_rows() -> None:
    model = Model("g (float[b,s,20] x, float[20] w, float[20] c) => (float[b,s,20] y) "
                  "{ y = LayerNormalization(x, w, c) }")  # fmt: skip
    assert model.kernels == {"layer_normalization"}
    model.check(*({"x": draw(b, s, 20), "w": draw(20), "c": draw(20)} for b, s in ((2, 3), (1, 1), (4, 0))))


@pytest.mark.parametrize(
    "axis, weight", [(1, (5, 20)), (1, (20,)), (2, (20,)), (2, (1,)), (-1, (1, 1, 20)), (0, (20,))]
)
@pytest.mark.parametrize("op", ["LayerNormalization", "RMSNormalization"])
def test_normalization_over_axes_with_weights_that_broadcast(op: str, axis: int, weight: tuple[int, ...]) -> None:
    shape = ",".join(map(str, weight))
    model = Model(f"g (float[2,5,20] x, float[{shape}] w) => (float[2,5,20] y) {{ y = {op} <axis={axis}> (x, w) }}")
    assert model.kernels & {"layer_normalization", "rms_normalization"}
    model.check({"x": draw(2, 5, 20), "w": draw(*weight)})


def test_forms_of_normalization_without_a_kernel() -> None:
    """Weights that change from row to row, further outputs, half precision."""
    model = Model("g (float[2,5,20] x, float[5,1] w) => (float[2,5,20] y) { y = RMSNormalization(x, w) }")
    assert "rms_normalization" not in model.kernels
    model.check({"x": draw(2, 5, 20), "w": draw(5, 1)})
    model = Model("g (float[5,20] x, float[20] w) => (float[5,20] y, float[5,1] m) { y, m = LayerNormalization(x, w) }")
    assert "layer_normalization" not in model.kernels
    model.check({"x": draw(5, 20), "w": draw(20)})
    model = Model("g (float16[5,20] x, float16[20] w) => (float16[5,20] y) { y = LayerNormalization(x, w) }")
    assert "layer_normalization" not in model.kernels


# Attention.


QKV = {"q": (2, 4, 5, 8), "k": (2, 2, 7, 8), "v": (2, 2, 7, 6)}
FORMS = {
    "plain": ("", "", {}),
    "causal": ("is_causal=1", "", {}),
    "scaled": ("scale=0.7", "", {}),
    "added mask": ("", "float[5,7] m", {"m": (5, 7)}),
    "mask for each head": ("", "float[1,4,5,7] m", {"m": (1, 4, 5, 7)}),
    "mask for each sequence": ("", "float[2,1,1,7] m", {"m": (2, 1, 1, 7)}),
    "mask of truth values": ("", "bool[2,1,5,7] m", {"m": (2, 1, 5, 7)}),
    "causal with a mask": ("is_causal=1", "bool[5,7] m", {"m": (5, 7)}),
}


@pytest.mark.parametrize("form", ["added mask", "mask of truth values"])
def test_attention_of_float16_adds_up_in_float32(form: str) -> None:
    """Off by the rounding of the result alone, where sums of float16 would be off by many roundings."""
    _, mask, shapes = FORMS[form]
    mask = mask.replace("float", "float16")
    text = (f"g (float16[2,4,5,8] q, float16[2,2,7,8] k, float16[2,2,7,6] v, {mask}) => (float16[2,4,5,6] y) "
            f"{{ y = Attention <scale = 0.7> (q, k, v, m) }}")  # fmt: skip
    model = Model(text)
    assert "attention" in model.kernels
    feeds = {name: x if x.dtype == bool else x.astype(np.float16) for name, x in feeds_of(QKV | shapes, text).items()}
    wide = Model(text.replace("float16", "float"))
    (got,) = model(feeds)
    (expected,) = wide({n: x if x.dtype == bool else x.astype(np.float32) for n, x in feeds.items()})
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, expected, rtol=2**-11, atol=2**-24)


def feeds_of(shapes: Mapping[str, tuple[int, ...]], text: str) -> dict[str, np.ndarray]:
    feeds = {name: draw(*shape) for name, shape in shapes.items()}
    return {name: x > -0.5 if f"bool{list(x.shape)} {name}".replace(" ", "") in text.replace(" ", "") else x
            for name, x in feeds.items()}  # fmt: skip


def evaluated(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    from onnx.reference import ReferenceEvaluator

    return [np.asarray(y) for y in ReferenceEvaluator(proto).run(None, dict(feeds))]


def agrees(model: Model, *runs: Mapping[str, np.ndarray]) -> None:
    """Compares with onnx's evaluator, in float32."""
    for feeds in runs:
        for actual, expected in zip(model(feeds), evaluated(model.proto, feeds), strict=True):
            assert actual.dtype == expected.dtype and actual.shape == expected.shape
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max(initial=1.0))


@pytest.mark.parametrize(
    "form, dynamic", [*((form, False) for form in FORMS), ("plain", True), ("causal with a mask", True)]
)
def test_attention_of_four_axes(form: str, dynamic: bool) -> None:
    attributes, mask, more = FORMS[form]
    text = (f"g (float[2,4,5,8] q, float[2,2,7,8] k, float[2,2,7,6] v{', ' if mask else ''}{mask})"
            f" => (float[2,4,5,6] y) {{ y = Attention <{attributes}> (q, k, v{', m' if mask else ''}) }}")  # fmt: skip
    feeds = feeds_of({**QKV, **more}, text)
    if dynamic:
        text = text.replace("[2,4,5", "[b,4,s").replace("[2,2,7", "[b,2,t").replace(",5,7]", ",s,t]")
        text = text.replace("[5,7]", "[s,t]").replace("[2,1,1,7]", "[b,1,1,t]").replace("[2,1,", "[b,1,")
    model = Model(text.replace("<>", ""))
    assert "attention" in model.kernels and model.kernels <= {"attention", "transpose"}
    agrees(model, feeds)


@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
def test_attention_of_three_axes(heads: tuple[int, int]) -> None:
    q, kv = heads
    model = Model(f"g (float[b,s,{8 * q}] q, float[b,t,{8 * kv}] k, float[b,t,{4 * kv}] v) => (float[b,s,{4 * q}] y)"
                  f"{{ y = Attention <q_num_heads={q}, kv_num_heads={kv}> (q, k, v) }}")  # fmt: skip
    assert model.kernels == {"attention"}
    for b, s, t in ((1, 1, 1), (2, 3, 9), (1, 40, 33)):
        agrees(model, {"q": draw(b, s, 8 * q), "k": draw(b, t, 8 * kv), "v": draw(b, t, 4 * kv)})


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("rank", [3, 4])
def test_attention_over_the_filled_part_of_a_cache(rank: int, causal: int) -> None:
    """A cache of fixed size, written by TensorScatter and read as far as it is filled, as decoders of opset 24 do."""
    shape = {3: "b,s,16", 4: "b,4,s,4"}[rank]
    kv, axis = {3: ("b,@,8", 1), 4: ("b,2,@,4", 2)}[rank]
    heads = "q_num_heads=4, kv_num_heads=2, " if rank == 3 else ""
    new, cache = kv.replace("@", "s"), kv.replace("@", "40")
    model = Model(f"g (float[{shape}] q, float[{new}] k, float[{new}] v, float[{cache}] pk, float[{cache}] pv,"
                  f" int64[b] at, int64[b] n) => (float[{shape}] y, float[{cache}] nk, float[{cache}] nv)"
                  f"{{ nk = TensorScatter <axis={axis}> (pk, k, at) nv = TensorScatter <axis={axis}> (pv, v, at)"
                  f" y = Attention <{heads}is_causal={causal}> (q, nk, nv, , , , n) }}")  # fmt: skip
    assert "attention" in model.kernels
    for s, at in ((1, (0, 7)), (3, (37, 0)), (12, (5, 28))):
        made = {name: tuple(40 if d == "40" else {"b": 2, "s": s}.get(d) or int(d) for d in dims.split(","))
                for name, dims in (("q", shape), ("k", new), ("v", new), ("pk", cache), ("pv", cache))}  # fmt: skip
        feeds = {name: draw(*sizes) for name, sizes in made.items()}
        agrees(model, {**feeds, "at": np.array(at), "n": np.array(at) + s})


@pytest.mark.parametrize("rank", [3, 4])
def test_attention_after_a_past(rank: int) -> None:
    shape = {3: "b,s,16", 4: "b,2,s,8"}[rank]
    heads = "q_num_heads=2, kv_num_heads=2, " if rank == 3 else ""
    model = Model(f"g (float[{shape}] q, float[{shape}] k, float[{shape}] v, float[b,2,p,8] pk, float[b,2,p,8] pv)"
                  f" => (float[{shape}] y, float[b,2,t,8] nk, float[b,2,t,8] nv)"
                  f"{{ y, nk, nv = Attention <{heads}is_causal=1> (q, k, v, , pk, pv) }}")  # fmt: skip
    assert "attention" in model.kernels
    for b, s, p in ((1, 1, 6), (2, 3, 4), (1, 2, 0)):
        sizes = (b, s, 16) if rank == 3 else (b, 2, s, 8)
        agrees(model, {"q": draw(*sizes), "k": draw(*sizes) + 1, "v": draw(*sizes) - 1,
                       "pk": draw(b, 2, p, 8), "pv": draw(b, 2, p, 8) * 2})  # fmt: skip


PACKED = """g (float[{b},{s},96] x) => (float[{b},{s},32] y) {{
  {apart}
  a = Attention (q, k, v)
  t = Transpose <perm=[0,2,1,3]> (a)
  y = Reshape (t, back)
}}"""
APART = {
    "by slices": """u = Reshape (x, five) p = Transpose <perm=[2,0,3,1,4]> (u)
        q1 = Slice (p, i0, i1, i0) q = Squeeze (q1, i0) k1 = Slice (p, i1, i2, i0) k = Squeeze (k1, i0)
        v1 = Slice (p, i2, i3, i0) v = Squeeze (v1, i0)""",
    "by a split": """a0, a1, a2 = Split <axis=2, num_outputs=3> (x)
        q0 = Reshape (a0, four) k0 = Reshape (a1, four) v0 = Reshape (a2, four)
        q = Transpose <perm=[0,2,1,3]> (q0) k = Transpose <perm=[0,2,1,3]> (k0) v = Transpose <perm=[0,2,1,3]> (v0)""",
}


@pytest.mark.parametrize("apart", APART)
@pytest.mark.parametrize("sizes", [("2", "9"), ("b", "s")])
def test_attention_reads_a_projection_in_place(apart: str, sizes: tuple[str, str]) -> None:
    """Nothing is transposed, sliced or copied, and nothing as large as the scores is planned."""
    integers = {f"i{n}": np.array([n]) for n in range(4)}
    b, s = sizes
    shapes = {"five": np.array([0, 0, 3, 4, 8]), "four": np.array([0, 0, 4, 8]), "back": np.array([0, 0, 32])}
    model = Model(PACKED.format(b=b, s=s, apart=APART[apart]), **integers, **shapes)
    assert model.kernels == {"attention"}
    agrees(model, {"x": draw(2, 9, 96)})


def test_no_scores_in_the_plan_of_memory() -> None:
    """Queries times keys of 8 heads would be 8 MiB, a mask that is the same for all queries 1 MiB."""
    from graphwright.runtime.work import work_of

    model = Model("g (float[1,512,64] q, float[1,512,64] k, float[1,512,64] v, float[1,1,1,512] m)"
                  " => (float[1,512,64] y) { w = Expand (m, size)"
                  " y = Attention <q_num_heads=8, kv_num_heads=8> (q, k, v, w) }",
                  size=np.array([1, 1, 512, 1]))  # fmt: skip
    assert model.kernels == {"attention"}
    assert (work_of(model.lowered).activation_bytes or 0) <= 4 * 512 * 64
    x = draw(1, 512, 64)
    agrees(model, {"q": x, "k": x, "v": x, "m": draw(1, 1, 1, 512)})


def test_a_result_by_heads_is_transposed_by_tiles() -> None:
    """Both kernels have LLVM functions of their own in one library."""
    model = Model("g (float[1,24,32] x) => (float[1,2,24,16] y) { u = Reshape (x, four)"
                  " q = Transpose <perm=[0,2,1,3]> (u) y = Attention (q, q, q) }",
                  four=np.array([1, 24, 2, 16]))  # fmt: skip
    assert model.kernels == {"attention", "transpose"}
    agrees(model, {"x": draw(1, 24, 32)})


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "float32"])
@pytest.mark.parametrize("sizes", [(24, 16), (25, 33), (3, 40), (40, 7), (8, 8)])
def test_elements_of_every_width_are_transposed_by_tiles(
    dtype: str, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, columns = sizes
    emitted: list[object] = []
    emit = moves.emit_transpose
    monkeypatch.setattr(moves, "emit_transpose", lambda *given: [emitted.append(given), emit(*given)])
    kind = dtype.replace("float32", "float")
    model = Model(f"g ({kind}[3,{rows},{columns}] x) => ({kind}[3,{columns},{rows}] y)"
                  "{ y = Transpose <perm=[0,2,1]> (x) }")  # fmt: skip
    assert model.kernels == {"transpose"}
    x = np.random.default_rng(rows).integers(0, 120, (3, rows, columns)).astype(dtype)
    np.testing.assert_array_equal(model({"x": x})[0], x.transpose(0, 2, 1))
    assert emitted


@pytest.mark.parametrize("form, kernels", [
    ("t = Transpose<perm=[0, 2, 1]>(x) y = Gelu(t)", {"transpose", "gelu"}),
    ("g = Sigmoid(x) m = Mul(g, x) t = Transpose<perm=[0, 2, 1]>(m) y = Exp(t)",
     {"tir_sigmoid_multiply", "transpose", "tir_exp"}),
    ("e = Exp(x) c = Concat<axis=2>(x, e) h, l = Split<num_outputs=2, axis=2>(c) s = Add(h, l)"
     "y = Transpose<perm=[0, 2, 1]>(s)", {"tir_exp", "concatenate", "strided_slice_strided_slice_add", "transpose"}),
])  # fmt: skip
def test_functions_around_a_transposition_are_computed_in_vectors(form: str, kernels: set[str]) -> None:
    model = Model(f"m (float[2,40,33] x) => (float[2,33,40] y) {{ {form} }}")
    assert model.kernels == kernels
    model.check({"x": draw(2, 40, 33)})


def test_softcap_and_rows_that_see_nothing() -> None:
    model = Model("g (float[1,2,3,8] q, float[1,2,5,8] k, float[1,2,5,8] v, bool[3,5] m) => (float[1,2,3,8] y)"
                  "{ y = Attention <softcap=2.0> (q, k, v, m) }")  # fmt: skip
    mask = np.ones((3, 5), bool)
    mask[1] = False
    feeds = {"q": 3 * draw(1, 2, 3, 8), "k": draw(1, 2, 5, 8), "v": draw(1, 2, 5, 8), "m": mask}
    assert "attention" in model.kernels
    agrees(model, feeds)
    assert not model(feeds)[0][:, :, 1].any()


def test_forms_of_attention_without_a_kernel_go_through_the_body() -> None:
    """Half precision, the scores as an output."""
    model = Model("g (float[1,2,3,8] q, float[1,2,5,8] k, float[1,2,5,8] v) => (float[1,2,3,8] y, float[1,2,3,5] s)"
                  "{ y, pk, pv, s = Attention (q, k, v) }")  # fmt: skip
    assert "attention" not in model.kernels
    agrees(model, {"q": draw(1, 2, 3, 8), "k": draw(1, 2, 5, 8), "v": draw(1, 2, 5, 8)})


# Softmax.


@pytest.mark.parametrize("op, kernel", [("Softmax", "two_pass_softmax"), ("LogSoftmax", "log_softmax")])
def test_softmax_of_the_last_axis(op: str, kernel: str) -> None:
    model = Model(f"g (float[b,5,n] x) => (float[b,5,n] y) {{ y = {op} (x) }}")
    assert model.kernels == {kernel}
    model.check({"x": 5 * draw(2, 5, 37)}, {"x": draw(1, 5, 1)}, {"x": draw(0, 5, 3)})
    model = Model(f"g (float[2,9,1,1] x) => (float[2,9,1,1] y) {{ y = {op} <axis=1> (x) }}")
    assert kernel in model.kernels
    model.check({"x": draw(2, 9, 1, 1)})
    model = Model(f"g (float[2,9,3] x) => (float[2,9,3] y) {{ y = {op} <axis=1> (x) }}")
    assert "two_pass_softmax" not in model.kernels
    model.check({"x": draw(2, 9, 3)})


# Rotary embedding.


ROTARY = {
    "four axes": ("b,3,s,8", "b,s,4", "", ""),
    "neighbours": ("b,3,s,8", "b,s,4", "", "interleaved=1"),
    "three axes": ("b,s,24", "b,s,4", "", "num_heads=3"),
    "a part of each head": ("b,3,s,8", "b,s,2", "", "rotary_embedding_dim=4"),
    "positions": ("b,3,s,8", "11,4", "int64[b,s] i", ""),
    "positions, three axes": ("b,s,24", "11,2", "int64[b,s] i", "num_heads=3, rotary_embedding_dim=4, interleaved=1"),
}


@pytest.mark.parametrize("form", ROTARY)
def test_rotary_embedding(form: str) -> None:
    shape, angles, positions, attributes = ROTARY[form]
    model = Model(f"g (float[{shape}] x, float[{angles}] c, float[{angles}] d{', ' if positions else ''}{positions})"
                  f" => (float[{shape}] y)"
                  f"{{ y = RotaryEmbedding <{attributes}> (x, c, d{', i' if positions else ''}) }}"
                  .replace("<>", ""))  # fmt: skip
    assert model.kernels == {"rotary_embedding"}
    for b, s in ((2, 5), (1, 1)):
        def sizes(text: str, b: int = b, s: int = s) -> tuple[int, ...]:
            return tuple({"b": b, "s": s}.get(d, 0) or int(d) for d in text.split(","))

        feeds = {"x": draw(*sizes(shape)), "c": draw(*sizes(angles)), "d": draw(*sizes(angles)) + 1}
        if positions:
            feeds["i"] = np.random.default_rng(0).integers(0, 11, (b, s))
        agrees(model, feeds)


def test_rotary_embedding_between_a_projection_and_attention() -> None:
    """Heads are read from the projection, turned, and read by attention, without a transposition or a copy; angles
    that are the same for every sequence are not repeated."""
    model = Model("""g (float[b,s,96] x, float[1,s,4] c, float[1,s,4] d) => (float[b,s,32] y) {
        n = Shape <start=0, end=1> (x) sizes = Concat <axis=0> (n, ones)
        cos = Expand (c, sizes) sin = Expand (d, sizes)
        a0, a1, a2 = Split <axis=2, num_outputs=3> (x)
        q0 = Reshape (a0, four) k0 = Reshape (a1, four) v0 = Reshape (a2, four)
        q1 = Transpose <perm=[0,2,1,3]> (q0) k1 = Transpose <perm=[0,2,1,3]> (k0)
        v = Transpose <perm=[0,2,1,3]> (v0)
        q = RotaryEmbedding (q1, cos, sin) k = RotaryEmbedding (k1, cos, sin)
        a = Attention <is_causal=1> (q, k, v) t = Transpose <perm=[0,2,1,3]> (a) y = Reshape (t, back)
    }""", four=np.array([0, 0, 4, 8]), back=np.array([0, 0, 32]), ones=np.array([1, 1]))  # fmt: skip
    assert model.kernels == {"rotary_embedding", "attention"}
    agrees(model, {"x": draw(2, 9, 96), "c": draw(1, 9, 4), "d": draw(1, 9, 4)})


# Reductions and rows of tables.


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin"])
def test_reductions_over_neighbouring_axes(op: str) -> None:
    kernel = f"reduce_{op.removeprefix('Reduce').lower()}"
    for axes, keep, shape in (([-1], 1, "b,s,1"), ([1], 0, "b,20"), ([1, 2], 0, "b"), ([0, 1, 2], 1, "1,1,1")):
        model = Model(f"g (float[b,s,20] x) => (float[{shape}] y) {{ y = {op} <keepdims={keep}> (x, axes) }}",
                      axes=np.array(axes))  # fmt: skip
        assert kernel in model.kernels and model.kernels <= {kernel, "reshape"}
        model.check({"x": draw(2, 7, 20)}, {"x": draw(1, 1, 20)})


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("shape", ["b,s,50", "2,50", "50"])
def test_places_of_greatest_elements(op: str, shape: str) -> None:
    sizes = [{"b": 3, "s": 4}.get(d, 0) or int(d) for d in shape.split(",")]
    model = Model(f"g (float[{shape}] x) => (y) {{ y = {op} <axis=-1, keepdims=0> (x) }}".replace("(y)", "(int64["
                  + ",".join(shape.split(",")[:-1]) + "] y)"))  # fmt: skip
    assert model.kernels == {"place_of_greatest"}
    model.check({"x": draw(*sizes)})


@pytest.mark.parametrize("integers", ["int64", "int32"])
def test_rows_of_a_table(integers: str) -> None:
    model = Model(f"g ({integers}[b,s] i) => (float[b,s,3,7] y) {{ y = Gather (table, i) }}", table=draw(11, 3, 7))
    assert model.kernels <= {"gather_rows", "reshape"} and "gather_rows" in model.kernels
    model.check({"i": np.array([[0, 10, -1], [5, 5, -11]], integers)}, {"i": np.zeros((0, 2), integers)})


@pytest.mark.parametrize("row", [1, 7, 8, 9, 31, 32, 33, 100])
@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_rows_of_a_table_of_codes(kind: str, row: int) -> None:
    codes = np.random.default_rng(0).integers(-128, 128, (11, row)).astype(np.int8).view(kind)
    model = Model(f"g (int32[n] i) => ({kind}[n,{row}] y) {{ y = Gather (table, i) }}", table=codes)
    assert model.kernels == ({"gather"} if row == 1 else {"gather_rows"})
    model.check({"i": np.array([0, 10, -1, 5, 5, -11], np.int32)}, {"i": np.zeros(0, np.int32)})


def test_a_product_with_three_leading_sizes_of_the_run_compiles() -> None:
    """The place of a row, divided by sizes of the run, was written out so often that LLVM never came to an end."""
    model = Model(
        "g (float[n,h,w,40] x, float[n,24,h,w] r) => (float[n,24,h,w] y) "
        "{ m = MatMul (x, w) t = Transpose <perm = [0, 3, 1, 2]> (m) y = Add (r, t) }",
        w=draw(40, 24),
    )
    assert "gemm" in {op.split("_")[0] for op in model.kernels}
    shapes = ((1, 1, 1), (2, 3, 5), (1, 7, 4), (3, 1, 9), (0, 2, 2), (1, 0, 3))
    model.check(*({"x": draw(n, h, w, 40), "r": draw(n, 24, h, w)} for n, h, w in shapes))


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_softmax_along_another_axis(op: str) -> None:
    kernel = "softmax_columns" if op == "Softmax" else "log_softmax_columns"
    for axis, dims in ((1, "2,9,4,5"), (-2, "b,3,n,7"), (0, "n,33"), (-3, "2,n,h,w")):
        model = Model(f"g (float[{dims}] x) => (float[{dims}] y) {{ y = {op} <axis = {axis}> (x) }}")
        assert model.kernels == {kernel}
        sizes = {"b": 2, "n": 11, "h": 5, "w": 6}
        model.check({"x": draw(*(sizes.get(d) or int(d) for d in dims.split(",")))})


def test_integers_that_are_compared_become_numbers(compile_model: Callable[..., Any]) -> None:
    """As one-hot rows are made: a vector of truth values, which TVM cannot bind, nor what is cast from it."""
    text = """g (int32[4,1] x) => (float[4,16] y, int32[4,16] z) {
        e = Equal (x, r)
        y = Cast <to = 1> (e)
        l = Less (x, r)
        z = Cast <to = 6> (l)
    }"""
    compiled = compile_model(text, r=np.arange(16, dtype=np.int32).reshape(1, 16))
    compiled.check({"x": np.array([[0], [3], [15], [16]], np.int32)})
