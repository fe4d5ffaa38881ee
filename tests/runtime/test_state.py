"""Models that keep something from one run to the next: caches that compiled code writes where they lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graphwright.passes.errors import InputError
from graphwright.runtime.build import build
from graphwright.runtime.reference import ort_session
from graphwright.runtime.session import Session
from graphwright.runtime.target import Target
from onnx import parser

import graphwright

DECODER = """<ir_version: 11, opset_import: ["" : 24]>
g (float[1,{s},32] x, float[1,2,24,8] pk, float[1,2,24,8] pv, int64[1] at) =>
  (float[1,{s},32] y, float[1,2,24,8] nk, float[1,2,24,8] nv) {{
  i32 = Constant <value = int64[4] {{1, -1, 2, 8}}> ()
  q = Reshape (x, q_shape)
  qt = Transpose <perm=[0,2,1,3]> (q)
  first, rest = Split <axis=2, num_outputs=2> (x)
  k = Reshape (first, i32)
  kt = Transpose <perm=[0,2,1,3]> (k)
  v = Reshape (rest, i32)
  vt = Transpose <perm=[0,2,1,3]> (v)
  nk = TensorScatter <axis=-2> (pk, kt, at)
  nv = TensorScatter <axis=-2> (pv, vt, at)
  shape = Shape (x)
  s = Gather (shape, one)
  length = Unsqueeze (s, zero)
  n = Add (at, length)
  a = Attention <is_causal=1> (qt, nk, nv, , , , n)
  b = Transpose <perm=[0,2,1,3]> (a)
  y = Reshape (b, y_shape)
}}"""


def decoder(steps: str) -> ir.Model:
    proto = parser.parse_model(DECODER.format(s=steps))
    model = ir.serde.deserialize_model(proto)
    for name, values in {"q_shape": [1, -1, 4, 8], "y_shape": [1, -1, 32], "one": 1, "zero": [0]}.items():
        value = ir.Value(name=name, const_value=ir.tensor(np.array(values, np.int64), name=name))
        value.shape, value.type = ir.Shape(np.shape(values)), ir.TensorType(ir.DataType.INT64)
        for node in model.graph:
            for index, used in enumerate(node.inputs):
                if used is not None and used.name == name:
                    node.replace_input_with(index, value)
        model.graph.initializers[name] = value
    return model


def compiled(model: ir.Model, folder: Path) -> Session:
    return graphwright.load(build(model, Target.named("cpu"), folder).root)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, Session]:
    """Any number of steps, and one."""
    folder = tmp_path_factory.mktemp("decoder")
    return compiled(decoder("s"), folder / "prefill"), compiled(decoder("1"), folder / "decode")


def test_runs_with_a_state_give_what_runs_with_arrays_give(sessions: tuple[Session, Session]) -> None:
    rng = np.random.default_rng(0)
    reference = ort_session(decoder("s"))
    state = sessions[0].new_state()
    assert set(state.arrays) == {"pk", "pv"}
    arrays = {name: np.zeros((1, 2, 24, 8), np.float32) for name in ("pk", "pv")}
    at = 0
    for steps in (7, 1, 1, 3, 1, 11):  # up to the last place
        x = rng.standard_normal((1, steps, 32)).astype(np.float32)
        session = sessions[steps == 1]
        (y,) = session.run(None, {"x": x, "at": np.array([at])}, state=state)
        expected, arrays["pk"], arrays["pv"] = reference.run(None, {"x": x, "at": np.array([at]), **arrays})
        np.testing.assert_allclose(y, expected, atol=2e-6)
        np.testing.assert_array_equal(state.arrays["pk"], arrays["pk"])
        np.testing.assert_array_equal(state.arrays["pv"], arrays["pv"])
        at += steps
    assert at == 24


def test_a_state_is_written_in_place(sessions: tuple[Session, Session]) -> None:
    state = sessions[1].new_state()
    before = state.arrays["pk"]
    region = sessions[1].artifact.manifest.regions[0]
    assert region.in_place == {"nk": "pk", "nv": "pv"}
    outputs = sessions[1].run(["y"], {"x": np.ones((1, 1, 32), np.float32), "at": np.array([5])}, state=state)
    assert len(outputs) == 1 and state.arrays["pk"] is before
    assert (before[0, :, 5] == 1).all() and np.count_nonzero(before) == 16


def test_without_a_state_inputs_stay_as_they_are(sessions: tuple[Session, Session]) -> None:
    rng = np.random.default_rng(1)
    feeds = {"x": rng.standard_normal((1, 1, 32)).astype(np.float32), "at": np.array([3]),
             **{n: rng.standard_normal((1, 2, 24, 8)).astype(np.float32) for n in ("pk", "pv")}}  # fmt: skip
    copies = {name: array.copy() for name, array in feeds.items()}
    first = sessions[1].run(None, feeds)
    second = sessions[1].run(None, feeds)
    for name, array in feeds.items():
        np.testing.assert_array_equal(array, copies[name])
    for a, b, c in zip(first, second, ort_session(decoder("1")).run(None, feeds), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, atol=2e-6)
        assert not np.shares_memory(a, b)


def test_what_does_not_belong_to_a_state_is_refused(sessions: tuple[Session, Session]) -> None:
    state = sessions[0].new_state()
    feeds = {"x": np.ones((1, 1, 32), np.float32), "at": np.array([0])}
    with pytest.raises(InputError, match="in the state already"):
        sessions[0].run(None, {**feeds, "pk": state.arrays["pk"]}, state=state)
    with pytest.raises(InputError, match="unknown output 'nk'"):
        sessions[0].run(["nk"], feeds, state=state)
    del state.arrays["pv"]  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="the state has pk; expected pk, pv"):
        sessions[0].run(None, feeds, state=state)


SCATTER = """<ir_version: 11, opset_import: ["" : 24]>
g ({kind}[2,{size},3] c, {kind}[2,{steps},3] u, int64[2] at) => ({kind}[2,{size},3] y{more}) {{
  y = TensorScatter <axis=1, mode="{mode}"> (c, u, at)
  {node}
}}"""


def scatter_model(kind: str = "float", mode: str = "linear", more: str = "", node: str = "", size: str = "5",
                  steps: str = "2") -> ir.Model:  # fmt: skip
    text = SCATTER.format(kind=kind, mode=mode, more=more, node=node, size=size, steps=steps)
    return ir.serde.deserialize_model(parser.parse_model(text))


@pytest.mark.parametrize("kind", ["float", "float16", "int8", "bool"])
@pytest.mark.parametrize("mode", ["linear", "circular"])
def test_scatter_of_any_type(kind: str, mode: str, tmp_path: Path) -> None:
    model = scatter_model(kind, mode)
    session = compiled(model, tmp_path / "a")
    assert session.artifact.manifest.regions[0].in_place == {"y": "c"}
    rng = np.random.default_rng(2)
    dtype = {"float": "float32"}.get(kind, kind)
    for at in ((0, 3), (1, 2), (4, 4) if mode == "circular" else (2, 0)):
        cache, update = (rng.integers(0, 2 if kind == "bool" else 9, (2, n, 3)).astype(dtype) for n in (5, 2))
        (y,) = session.run(None, {"c": cache, "u": update, "at": np.array(at)})
        expected = cache.copy()
        for b in range(2):
            for step in range(2):
                expected[b, (at[b] + step) % 5] = update[b, step]
        np.testing.assert_array_equal(y, expected)


def test_positions_beyond_the_cache_are_left_out(tmp_path: Path) -> None:
    session = compiled(scatter_model(), tmp_path / "a")
    state = session.new_state()
    session.run(None, {"u": np.ones((2, 2, 3), np.float32), "at": np.array([4, -1])}, state=state)
    expected = np.zeros((2, 5, 3), np.float32)
    expected[0, 4] = expected[1, 0] = 1
    np.testing.assert_array_equal(state.arrays["c"], expected)


def test_a_state_of_symbolic_sizes(tmp_path: Path) -> None:
    session = compiled(scatter_model(size="n", steps="s"), tmp_path / "a")
    with pytest.raises(InputError, match="give `sizes`"):
        session.new_state()
    state = session.new_state({"n": 9})
    session.run(None, {"u": np.ones((2, 4, 3), np.float32), "at": np.array([5, 0])}, state=state)
    assert (state.arrays["c"][0, 5:] == 1).all() and (state.arrays["c"][1, :4] == 1).all()
    assert state.arrays["c"].sum() == 24


@pytest.mark.parametrize(
    ("more", "node"),
    [(", float[2,5,3] z", "z = Neg (c)"), (", float[2,5,3] c2", "c2 = Identity (c)")],
    ids=["read elsewhere", "handed on"],
)
def test_an_input_that_something_else_reads_is_not_overwritten(more: str, node: str, tmp_path: Path) -> None:
    session = compiled(scatter_model(more=more, node=node), tmp_path / "a")
    assert session.artifact.manifest.state == {}
    cache = np.arange(30, dtype=np.float32).reshape(2, 5, 3)
    y, z = session.run(None, {"c": cache, "u": np.ones((2, 2, 3), np.float32), "at": np.array([0, 1])})
    np.testing.assert_array_equal(z, -cache if "Neg" in node else cache)
    assert (y[0, :2] == 1).all() and (y[1, 0] == cache[1, 0]).all()


def test_weights_of_artifacts_that_share_a_file_are_mapped_once(tmp_path: Path) -> None:
    numbers = ", ".join(str(n) for n in range(64))
    text = ('<ir_version: 11, opset_import: ["" : 24]> g (float[m,64] x) => (float[m,64] y)'
            f" <float[64] w = {{{numbers}}}> {{ y = Mul (x, w) }}")  # fmt: skip
    session = compiled(ir.serde.deserialize_model(parser.parse_model(text)), tmp_path / "a")
    again = graphwright.load(tmp_path / "a")
    first, second = (s._steps[0]._arrays[0] for s in (session, again))  # type: ignore[attr-defined]
    assert np.shares_memory(first, second)
