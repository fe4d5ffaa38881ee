"""LSTM, GRU and RNN written out step by step.

Formulas and gate orders are those of the ONNX operator definitions. Legend: T steps, B batch, D directions,
H hidden size, G gates; states are kept as (1, B, H), so that steps are joined by one Concat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from .. import graph
from .body_builder import Body
from .evaluate import Refusal

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
ACTIVATIONS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}

# Activation -> operator, defaults of alpha and beta; None: it has no such number.
FUNCTIONS: dict[str, tuple[str, float | None, float | None]] = {
    "relu": ("Relu", None, None),
    "tanh": ("Tanh", None, None),
    "sigmoid": ("Sigmoid", None, None),
    "softsign": ("Softsign", None, None),
    "softplus": ("Softplus", None, None),
    "elu": ("Elu", 1.0, None),
    "leakyrelu": ("LeakyRelu", 0.01, None),
    "thresholdedrelu": ("ThresholdedRelu", 1.0, None),
    "hardsigmoid": ("HardSigmoid", 0.2, 0.5),
    "affine": ("", 1.0, 0.0),
    "scaledtanh": ("", 1.0, 1.0),
}


KERNEL_FUNCTIONS = frozenset({"relu", "sigmoid", "tanh"})


def recurrent_kernel(node: ir.Node) -> bool:
    """Whether the recurrent kernel takes the form: float32, constant weights, steps first, no clip and no peepholes,
    the same usual functions in both directions. Any number of steps and sequences, and lengths of sequences."""
    if graph.has_references(node):
        return False
    x, w, r, bias, _, _, _, peepholes = [*node.inputs, *[None] * 8][:8]
    if any(v is None or v.dtype != ir.DataType.FLOAT for v in (x, w, r)) or graph.rank(x) != 3:
        return False
    if not all(graph.is_constant(v) for v in (w, r)) or not (bias is None or graph.is_constant(bias)):
        return False
    if peepholes is not None or any(graph.attribute(node, a, 0) for a in ("layout", "clip", "input_forget")):
        return False
    directions = 2 if graph.attribute(node, "direction", "forward") == "bidirectional" else 1
    try:
        functions = _activations(node, directions)
    except Refusal:
        return False
    return len(set(functions)) == 1 and {f.name for f in functions[0]} <= KERNEL_FUNCTIONS


@dataclass(frozen=True)
class Activation:
    name: str
    alpha: float | None
    beta: float | None

    def apply(self, body: Body, x: str, dtype: ir.DataType) -> str:
        numbers: dict[str, Any] = {k: v for k, v in (("alpha", self.alpha), ("beta", self.beta)) if v is not None}
        if self.name == "affine":
            scaled = body.op("Mul", x, body.constant(self.alpha, dtype))
            return body.op("Add", scaled, body.constant(self.beta, dtype))
        if self.name == "scaledtanh":
            curved = body.op("Tanh", body.op("Mul", x, body.constant(self.beta, dtype)))
            return body.op("Mul", curved, body.constant(self.alpha, dtype))
        return body.op(FUNCTIONS[self.name][0], x, **numbers)


@dataclass(frozen=True)
class Options:
    """The attributes of the node."""

    kind: str
    steps: int
    hidden: int
    directions: int
    reverse: bool
    batch_first: bool
    clip: float | None
    linear_before_reset: bool
    coupled: bool
    activations: tuple[tuple[Activation, ...], ...]
    dtype: ir.DataType
    lengths: bool


def unroll(node: ir.Node, opset: int, max_steps: int) -> Body:
    """The body of a recurrent node whose number of steps is known. Raises Refusal with the reason."""
    if opset < 13:
        raise Refusal(f"it is written for opset 13 and later, the model has {opset}; run convert-opset first")
    options = _options(node, max_steps)
    body = Body(opset)
    x = "input0"
    if options.batch_first:
        x = body.op("Transpose", x, perm=[1, 0, 2])
    masks = _masks(body, options) if options.lengths else None
    states = [_initial(body, node, index, options) for index in (5, 6)]
    ran = [
        _direction(body, node, options, x, direction, [s[direction] for s in states], masks)
        for direction in range(options.directions)
    ]
    _outputs(body, node, options, ran)
    return body


def _options(node: ir.Node, max_steps: int) -> Options:
    kind = node.op_type
    x, recurrence = node.inputs[0], node.inputs[2]
    batch_first = bool(graph.attribute(node, "layout", 0))
    axis = 1 if batch_first else 0
    steps = x.shape[axis] if x is not None and x.shape is not None and len(x.shape) == 3 else None
    if not isinstance(steps, int):
        raise Refusal(f"the number of steps, dimension {axis} of {x and x.name}, is not fixed; pin it")
    if not 1 <= steps <= max_steps:
        raise Refusal(f"{steps} steps are outside 1 to {max_steps}; decompose:max_steps={steps} allows them")
    hidden = graph.attribute(node, "hidden_size")
    if hidden is None and recurrence is not None and recurrence.shape is not None:
        hidden = recurrence.shape[-1]
    if not isinstance(hidden, int):
        raise Refusal("the hidden size is not known")
    if x is None or x.dtype is None:
        raise Refusal("the type of its input is not known; run infer-shapes first")
    direction = graph.attribute(node, "direction", "forward")
    directions = 2 if direction == "bidirectional" else 1
    given = graph.input_of(node, 4)
    fixed = graph.constant_ints(given)
    return Options(
        kind=kind,
        steps=steps,
        hidden=hidden,
        directions=directions,
        reverse=direction == "reverse",
        batch_first=batch_first,
        clip=graph.attribute(node, "clip"),
        linear_before_reset=bool(graph.attribute(node, "linear_before_reset", 0)),
        coupled=bool(graph.attribute(node, "input_forget", 0)),
        activations=_activations(node, directions),
        dtype=x.dtype,
        lengths=given is not None and not (fixed is not None and all(length == steps for length in fixed)),
    )


def _activations(node: ir.Node, directions: int) -> tuple[tuple[Activation, ...], ...]:
    """Per direction the functions f, g, h. alpha and beta are handed out in order to those that have them."""
    default = ACTIVATIONS[node.op_type]
    names = list(graph.attribute(node, "activations") or default * directions)
    if len(names) != len(default) * directions:
        raise Refusal(f"{len(names)} activations, expected {len(default) * directions}")
    alphas = list(graph.attribute(node, "activation_alpha") or ())
    betas = list(graph.attribute(node, "activation_beta") or ())
    made = []
    for name in names:
        key = (name.decode() if isinstance(name, bytes) else name).lower()
        if key not in FUNCTIONS:
            raise Refusal(f"activation {name!r} is not known")
        _, alpha, beta = FUNCTIONS[key]
        if alpha is not None and alphas:
            alpha = alphas.pop(0)
        if beta is not None and betas:
            beta = betas.pop(0)
        made.append(Activation(key, alpha, beta))
    return tuple(tuple(made[d * len(default) : (d + 1) * len(default)]) for d in range(directions))


def _masks(body: Body, options: Options) -> list[str]:
    """For every step which sequences are still running, as (1, B, 1)."""
    lengths = body.op("Unsqueeze", "input4", body.constant([0, 2]))
    return [body.op("Less", body.constant(step, ir.DataType.INT32), lengths) for step in range(options.steps)]


def _initial(body: Body, node: ir.Node, index: int, options: Options) -> list[str | None]:
    """The initial state per direction as (1, B, H); None stands for zeros."""
    if (options.kind != "LSTM" and index == 6) or graph.input_of(node, index) is None:
        return [None] * options.directions
    state = f"input{index}"
    if options.batch_first:
        state = body.op("Transpose", state, perm=[1, 0, 2])
    if options.directions == 1:
        return [state]
    return list(body.ops("Split", state, body.constant([1, 1]), outputs=2, axis=0))


def _of_direction(body: Body, name: str, direction: int, options: Options) -> str:
    """One direction's slice of a weight whose first axis is the direction."""
    if options.directions == 1:
        return body.op("Squeeze", name, body.constant([0]))
    return body.op("Gather", name, body.constant(direction), axis=0)


@dataclass
class _Ran:
    """What one direction gave: the hidden state of every step in the order of time, and the last states."""

    steps: list[str]
    hidden: str
    cell: str | None


@dataclass
class _Weights:
    recurrence: str  # (H, G*H)
    reset_bias: str | None  # GRU with linear_before_reset: the recurrence bias of the hidden gate, (H)
    reset_recurrence: str | None  # GRU without it: the recurrence of the hidden gate, (H, H)
    peepholes: Sequence[str] | None  # LSTM: (H) for i, o, f


def _direction(
    body: Body,
    node: ir.Node,
    options: Options,
    x: str,
    direction: int,
    initial: Sequence[str | None],
    masks: Sequence[str] | None,
) -> _Ran:
    gates, hidden = GATES[options.kind], options.hidden
    weights = body.op("Transpose", _of_direction(body, "input1", direction, options), perm=[1, 0])
    recurrence = body.op("Transpose", _of_direction(body, "input2", direction, options), perm=[1, 0])
    projected = body.op("MatMul", x, weights)
    is_gru = options.kind == "GRU"
    kept = _Weights(recurrence, None, None, None)
    if graph.input_of(node, 3) is not None:
        bias = _of_direction(body, "input3", direction, options)
        inner, outer = body.ops("Split", bias, body.constant([gates * hidden] * 2), outputs=2, axis=0)
        if is_gru and options.linear_before_reset:
            sizes = body.constant([2 * hidden, hidden])
            first, kept.reset_bias = body.ops("Split", outer, sizes, outputs=2, axis=0)
            outer = body.op("Concat", first, body.constant([0] * hidden, options.dtype), axis=0)
        projected = body.op("Add", projected, body.op("Add", inner, outer))
    if is_gru and not options.linear_before_reset:
        sizes = body.constant([2 * hidden, hidden])
        kept.recurrence, kept.reset_recurrence = body.ops("Split", recurrence, sizes, outputs=2, axis=1)
    if options.kind == "LSTM" and graph.input_of(node, 7) is not None:
        peepholes = _of_direction(body, "input7", direction, options)
        kept.peepholes = body.ops("Split", peepholes, body.constant([hidden] * 3), outputs=3, axis=0)
    inputs = [projected]
    if options.steps > 1:
        inputs = body.ops("Split", projected, body.constant([1] * options.steps), outputs=options.steps, axis=0)
    backwards = options.reverse or direction == 1
    order = range(options.steps - 1, -1, -1) if backwards else range(options.steps)
    h, c = initial
    done: dict[int, str] = {}
    cell = CELLS[options.kind]
    for step in order:
        new_h, new_c = cell(body, options, kept, options.activations[direction], inputs[step], h, c)
        if masks is not None:
            zero = body.constant(0, options.dtype)
            done[step] = body.op("Where", masks[step], new_h, zero)
            new_h = body.op("Where", masks[step], new_h, h or zero)
            new_c = body.op("Where", masks[step], new_c, c or zero) if new_c else None
        else:
            done[step] = new_h
        h, c = new_h, new_c
    assert h is not None
    return _Ran([done[step] for step in range(options.steps)], h, c)


def _clipped(body: Body, options: Options, x: str) -> str:
    if not options.clip:
        return x
    low, high = (body.constant(sign * options.clip, options.dtype) for sign in (-1, 1))
    return body.op("Clip", x, low, high)


def _sum(body: Body, *terms: str | None) -> str:
    total: str | None = None
    for term in terms:
        if term is not None:
            total = term if total is None else body.op("Add", total, term)
    assert total is not None
    return total


def _times(body: Body, a: str | None, b: str | None) -> str | None:
    """The product; None, which stands for zero, when a factor is."""
    return None if a is None or b is None else body.op("Mul", a, b)


def _recurrent(body: Body, h: str | None, weights: str) -> str | None:
    return None if h is None else body.op("MatMul", h, weights)


def _lstm(
    body: Body,
    options: Options,
    weights: _Weights,
    functions: Sequence[Activation],
    x: str,
    h: str | None,
    c: str | None,
) -> tuple[str, str | None]:
    """One step: gates i, o, f, c; C' = f*C + i*c; H' = o * h(C').

    Clipped are the inputs of the gates, not C', as onnxruntime does it; the standard leaves that open.
    """
    f, g, last = functions
    hidden, dtype = options.hidden, options.dtype
    gates = _sum(body, x, _recurrent(body, h, weights.recurrence))
    i, o, forget, new = body.ops("Split", gates, body.constant([hidden] * 4), outputs=4, axis=-1)
    p_i, p_o, p_f = weights.peepholes or (None, None, None)
    i = f.apply(body, _clipped(body, options, _sum(body, i, _times(body, p_i, c))), dtype)
    new = g.apply(body, _clipped(body, options, new), dtype)
    if options.coupled:
        forget = body.op("Sub", body.constant(1, dtype), i)
    else:
        forget = f.apply(body, _clipped(body, options, _sum(body, forget, _times(body, p_f, c))), dtype)
    cell = _sum(body, _times(body, i, new), _times(body, forget, c))
    o = f.apply(body, _clipped(body, options, _sum(body, o, _times(body, p_o, cell))), dtype)
    return body.op("Mul", o, last.apply(body, cell, dtype)), cell


def _gru(
    body: Body,
    options: Options,
    weights: _Weights,
    functions: Sequence[Activation],
    x: str,
    h: str | None,
    c: str | None,
) -> tuple[str, str | None]:
    """One step: gates z, r, h; H' = (1-z)*h + z*H. The reset gate r acts before or behind the recurrence."""
    f, g = functions
    hidden, dtype = options.hidden, options.dtype
    sizes = body.constant([2 * hidden, hidden])
    x_zr, x_h = body.ops("Split", x, sizes, outputs=2, axis=-1)
    recurrent: str | None = _recurrent(body, h, weights.recurrence)
    inner: str | None = None
    if options.linear_before_reset and recurrent is not None:
        recurrent, inner = body.ops("Split", recurrent, sizes, outputs=2, axis=-1)
    zr = f.apply(body, _clipped(body, options, _sum(body, x_zr, recurrent)), dtype)
    z, r = body.ops("Split", zr, body.constant([hidden] * 2), outputs=2, axis=-1)
    if options.linear_before_reset:
        both = [term for term in (inner, weights.reset_bias) if term is not None]
        reset = _times(body, r, _sum(body, *both) if both else None)
    else:
        assert weights.reset_recurrence is not None
        reset = _recurrent(body, _times(body, r, h), weights.reset_recurrence)
    new = g.apply(body, _clipped(body, options, _sum(body, x_h, reset)), dtype)
    keep = body.op("Sub", body.constant(1, dtype), z)
    return _sum(body, _times(body, keep, new), _times(body, z, h)), None


def _rnn(
    body: Body,
    options: Options,
    weights: _Weights,
    functions: Sequence[Activation],
    x: str,
    h: str | None,
    c: str | None,
) -> tuple[str, str | None]:
    """One step: H' = f(X W + H R + biases)."""
    total = _sum(body, x, _recurrent(body, h, weights.recurrence))
    return functions[0].apply(body, _clipped(body, options, total), options.dtype), None


CELLS = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}


def _outputs(body: Body, node: ir.Node, options: Options, ran: Sequence[_Ran]) -> None:
    """Join steps and directions as the node's outputs Y (T, D, B, H), Y_h and Y_c (D, B, H)."""
    wanted = [bool(value.name) for value in node.outputs]
    if wanted[0]:
        sides = [body.op("Unsqueeze", body.op("Concat", *side.steps, axis=0), body.constant([1])) for side in ran]
        if options.batch_first:
            body.op("Transpose", body.op("Concat", *sides, axis=1), out="output0", perm=[2, 0, 1, 3])
        else:
            body.op("Concat", *sides, out="output0", axis=1)
    for index, states in ((1, [side.hidden for side in ran]), (2, [side.cell for side in ran])):
        if index < len(wanted) and wanted[index]:
            if options.batch_first:
                body.op("Transpose", body.op("Concat", *states, axis=0), out=f"output{index}", perm=[1, 0, 2])
            else:
                body.op("Concat", *states, out=f"output{index}", axis=0)
