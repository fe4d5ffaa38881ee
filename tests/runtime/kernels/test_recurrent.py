"""The recurrent kernel against NumPy in float64, and whole operators against onnxruntime."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.base import PassContext
from graphwright.passes.pipeline import Pipeline
from graphwright.runtime.target import Target
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

pytestmark = pytest.mark.tvm

TOLERANCE = 1e-5  # of results between -1 and 1, after some steps
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "tanh": np.tanh, "relu": lambda x: np.maximum(x, 0),
}  # fmt: skip
DEFAULTS = {"LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh"), "RNN": ("tanh",)}


def spec(kind: str, hidden: int, **fields: Any) -> Any:
    from graphwright.runtime.kernels.recurrent import RecurrentSpec

    plain = {"steps": "t", "batch": "b", "directions": 1, "activations": DEFAULTS[kind]}
    return RecurrentSpec(**{"kind": kind, "hidden": hidden, **plain, **fields})


@functools.cache
def kernel(target: Target, description: Any, threads: int) -> Callable[..., Any]:
    import tvm
    from graphwright.runtime.codegen import machine_code
    from graphwright.runtime.kernels.recurrent import recurrent

    function = recurrent(description, target.isa, target.caches, threads, "recurrent")
    return machine_code(tvm.IRModule({"recurrent": function}), target)["recurrent"]


def one_step(s: Any, p: np.ndarray, r: np.ndarray, bias: np.ndarray, h: np.ndarray, c: np.ndarray) -> Any:
    """The states after a step of one direction. p: (B, G·H); r: (G·H, H); h, c: (B, H)."""
    functions = [FUNCTIONS[name] for name in s.activations]
    if s.kind == "RNN":
        return functions[0](p + h @ r.T), c
    if s.kind == "LSTM":
        i, o, f, new = np.split(p + h @ r.T, 4, 1)
        c = functions[0](f) * c + functions[0](i) * functions[1](new)
        return functions[0](o) * functions[2](c), c
    (pz, pr, pn), (rz, rr, rn) = np.split(p, 3, 1), np.split(r, 3)
    z, gate = functions[0](pz + h @ rz.T), functions[0](pr + h @ rr.T)
    inner = gate * (h @ rn.T + bias) if s.reset_after else (gate * h) @ rn.T
    return (1 - z) * functions[1](pn + inner) + z * h, c


def reference(s: Any, p: np.ndarray, r: np.ndarray, bias: np.ndarray, lengths: Any, h0: Any, c0: Any) -> Any:
    """Y (T, D, B, H), last H, last C in float64. p: (T, B, D, G·H)."""
    steps, batch = p.shape[:2]
    y, last = np.zeros((steps, s.directions, batch, s.hidden)), []
    for d in range(s.directions):
        h, c = h0[d].astype(np.float64), c0[d].astype(np.float64)
        for t in range(steps - 1, -1, -1) if s.backwards or d == 1 else range(steps):
            runs = (t < lengths)[:, None]
            new_h, new_c = one_step(s, p[t, :, d].astype(np.float64), r[d].astype(np.float64), bias[d], h, c)
            y[t, d], h, c = np.where(runs, new_h, 0), np.where(runs, new_h, h), np.where(runs, new_c, c)
        last.append((h, c))
    return y, np.array([h for h, _ in last]), np.array([c for _, c in last])


def check(target: Target, s: Any, steps: int = 4, batch: int = 2, threads: int = 1, seed: int = 0) -> None:
    import tvm
    from graphwright.runtime.kernels.recurrent import pack_recurrence

    random = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    columns = GATES[s.kind] * s.hidden
    p, r = draw(steps, batch, s.directions, columns), draw(s.directions, columns, s.hidden) / np.sqrt(s.hidden)
    bias, states = draw(s.directions, s.hidden), (s.directions, batch, s.hidden)
    lengths = random.integers(0, steps + 1, batch).astype(np.int32) if s.lengths else np.full(batch, steps, np.int32)
    h0, c0 = (draw(*states) if given else np.zeros(states, np.float32) for given in (s.hidden_given, s.cell_given))
    inputs = [p.reshape(steps, batch, s.directions * columns)]
    inputs += pack_recurrence(r.astype(np.float32), s, target.isa, threads)
    optional = ((s.reset_after, bias.reshape(-1)), (s.lengths, lengths), (s.hidden_given, h0), (s.cell_given, c0))
    inputs += [array for there, array in optional if there]
    expected = [e for e in reference(s, p, r.astype(np.float32), bias, lengths, h0, c0)]
    if not s.finals:
        expected = expected[:1]
    elif s.kind != "LSTM":
        expected = expected[:2]
    # What is left of this value was not written.
    outputs = [tvm.runtime.tensor(np.full(e.shape, 12345.0, np.float32)) for e in expected]
    kernel(target, s, threads)(*(tvm.runtime.tensor(np.ascontiguousarray(i)) for i in inputs), *outputs)
    for made, wanted in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(made.numpy(), wanted, rtol=TOLERANCE, atol=TOLERANCE)


VARIANTS = [("LSTM", {}), ("GRU", {"reset_after": True}), ("GRU", {}), ("RNN", {}), ("RNN", {"activations": ("relu",)})]
FULL = {"lengths": True, "hidden_given": True, "finals": True}


@pytest.mark.parametrize("kind, fields", VARIANTS)
@pytest.mark.parametrize("name, hidden", [("cpu", 1), ("cpu", 15), ("cpu", 16), ("cpu-avx2", 17), ("cpu-baseline", 7)])
def test_sizes(runnable: Callable[[str], Target], name: str, hidden: int, kind: str, fields: dict[str, Any]) -> None:
    check(runnable(name), spec(kind, hidden, steps=4, batch=1, **fields), batch=1)


@pytest.mark.parametrize("kind, fields", VARIANTS)
@pytest.mark.parametrize("sizes", [{}, {"steps": 5, "batch": 7}])
def test_sequences_directions_and_lengths(sizes: dict[str, int], kind: str, fields: dict[str, Any]) -> None:
    """Both directions, initial and last states, lengths, two threads, with sizes as numbers and as names."""
    more = {**FULL, "cell_given": kind == "LSTM", **fields}
    check(Target.named("cpu"), spec(kind, 17, directions=2, **sizes, **more), 5, 7, 2)


def test_backwards_and_more_threads_than_sequences() -> None:
    for batch in (1, 2, 3):
        check(Target.named("cpu"), spec("LSTM", 64, backwards=True, **FULL), 9, batch, 4)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(VARIANTS[:3]), st.integers(0, 6), st.integers(1, 9), st.integers(0, 99))
def test_any_lengths(variant: tuple[str, dict[str, Any]], steps: int, batch: int, seed: int) -> None:
    kind, fields = variant
    check(Target.named("cpu"), spec(kind, 10, **FULL, **fields), steps, batch, 2, seed)


def operator(kind: str, direction: str, hidden: int, width: int, given: bool, **attributes: Any) -> onnx.ModelProto:
    """One recurrent operator with constant weights over (t, b, width); all results."""
    random, gates = np.random.default_rng(1), GATES[kind]
    directions = 2 if direction == "bidirectional" else 1
    arrays = {
        "w": (directions, gates * hidden, width), "r": (directions, gates * hidden, hidden),
        "bias": (directions, 2 * gates * hidden),
    }  # fmt: skip
    if "activations" in attributes:
        attributes = {**attributes, "activations": attributes["activations"] * directions}
    states = ["h0", "c0"][: 2 if kind == "LSTM" else 1] if given else []
    outputs = ["y", "last_h", "last_c"][: 3 if kind == "LSTM" else 2]
    inputs = ["x", "w", "r", "bias", "lengths" if given else "", *states]
    node = helper.make_node(kind, inputs, outputs, hidden_size=hidden, direction=direction, **attributes)
    ins = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", "b", width])]
    if given:
        ins.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, ["b"]))
    ins += [helper.make_tensor_value_info(name, TensorProto.FLOAT, [directions, "b", hidden]) for name in states]
    outs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    held = [
        numpy_helper.from_array(random.standard_normal(shape).astype(np.float32) * 0.3, name)
        for name, shape in arrays.items()
    ]
    graph = helper.make_graph([node], "g", ins, outs, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("direction, given_states", [("forward", False), ("reverse", True), ("bidirectional", True)])
@pytest.mark.parametrize(
    "kind, attributes",
    [("LSTM", {}), ("GRU", {}), ("GRU", {"linear_before_reset": 1}), ("RNN", {}), ("RNN", {"activations": ["Relu"]})],
)
def test_operators(
    kind: str, attributes: dict[str, Any], direction: str, given_states: bool, tmp_path: Path
) -> None:
    """Compiled as it is, for any number of steps and sequences, and equal to onnxruntime."""
    import onnxruntime
    from graphwright.runtime.build import build
    from graphwright.runtime.session import Session

    proto = operator(kind, direction, 9, 6, given_states, **attributes)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    target = Target.named("cpu")
    Pipeline.parse("decompose").run(model, PassContext(target="cpu"))
    assert [node.op_type for node in model.graph] == [kind]
    artifact = build(model, target, tmp_path / "out")
    assert [region.runtime for region in artifact.manifest.regions] == ["tvm"]
    session = Session(tmp_path / "out", threads=2)
    peer = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(2)
    directions = 2 if direction == "bidirectional" else 1
    for steps, batch in ((1, 1), (7, 3)):
        feeds: dict[str, np.ndarray] = {"x": random.standard_normal((steps, batch, 6)).astype(np.float32)}
        if given_states:
            # Of two directions onnxruntime turns each sequence round within its length, as the standard has it.
            feeds["lengths"] = np.full(batch, steps, np.int32)
            for name in [i.name for i in peer.get_inputs() if i.name in ("h0", "c0")]:
                feeds[name] = random.standard_normal((directions, batch, 9)).astype(np.float32)
        for made, wanted in zip(session.run(None, feeds), peer.run(None, feeds), strict=True):
            np.testing.assert_allclose(made, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "attributes, named",
    [({"clip": 3.0}, "clip"), ({"input_forget": 1}, "input_forget"), ({"activations": ["Tanh"] * 3}, None),
     ({"activations": ["Softsign", "Tanh", "Tanh"]}, "softsign")],
)  # fmt: skip
def test_forms_without_a_kernel_are_refused(attributes: dict[str, Any], named: str | None) -> None:
    from graphwright.runtime.importer import refusals

    proto = onnx.shape_inference.infer_shapes(operator("LSTM", "forward", 9, 6, False, **attributes))
    found = refusals(proto, Target.named("cpu"))
    assert (named is None and not found) or (len(found) == 1 and str(named) in found[0])
