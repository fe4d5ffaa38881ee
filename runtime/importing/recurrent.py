"""LSTM, GRU and RNN by our kernel, behind one product for what the steps do not wait for."""

from __future__ import annotations

import numpy as np
from tvm import relax

from ..kernels.recurrent import FUNCTIONS, GATES, RecurrentSpec, pack_recurrence, recurrent, tensor_shapes
from .kernels import calls, for_kernels, named
from .shapes import settled
from .site import Refuse, Result, Site, const, converts

CURE = "the pass decompose replaces it where the shapes are known (--pin NAME=SHAPE)"
DEFAULTS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}


@converts("LSTM", "GRU", "RNN")
def recurrence(site: Site) -> Result:
    """Constant weights; the forms that `passes.prepare.recurrent.recurrent_kernel` leaves whole."""
    if not for_kernels(site, 0, 1, 2):
        raise Refuse(f"there is a kernel for float32 on CPUs only; {CURE}")
    w, r, bias = (site.array(i) if site.has(i) else None for i in range(1, 4))
    if w is None or r is None or (site.has(3) and bias is None):
        raise Refuse(f"its weights are computed at run time; {CURE}")
    special = [name for name in ("layout", "clip", "input_forget") if site.attr(name, 0)]
    if special or site.has(7):
        raise Refuse(f"there is no kernel for it with {', '.join(special) or 'peepholes'}; {CURE}")
    directions, columns, hidden = w.shape[0], w.shape[1], r.shape[2]
    if columns != GATES[site.op] * hidden:
        raise Refuse(f"its weights have {columns} rows; expected {GATES[site.op]} gates of {hidden}")
    x = settled(site, site.x(), {2: int(w.shape[2])})
    steps, batch, _ = site.shape()
    ((t, b),) = named((steps, batch))
    functions = [str(name).lower() for name in site.attr("activations", DEFAULTS[site.op] * directions)]
    each = len(functions) // directions
    if not set(functions) <= FUNCTIONS.keys() or functions != functions[:each] * directions:
        raise Refuse(f"there is no kernel for it with the activations {', '.join(functions)}; {CURE}")
    spec = RecurrentSpec(
        site.op,
        t,
        b,
        hidden,
        directions,
        tuple(functions[:each]),
        str(site.attr("direction", "forward")) == "reverse",
        bool(site.attr("linear_before_reset", 0)) and site.op == "GRU",
        site.has(4),
        site.has(5),
        site.has(6) and site.op == "LSTM",
        site.outputs > 1,
    )
    isa, threads = site.target.isa, site.target.cores
    offsets, behind = _biases(bias, spec)
    weight = np.concatenate([w[d].T for d in range(directions)], 1)
    projected = site.emit(relax.op.matmul(x, const(weight, "float32")))
    inputs = [site.emit(relax.op.add(projected, const(offsets, "float32")))]
    inputs += [const(packed, "float32") for packed in pack_recurrence(r, spec, isa, threads)]
    if spec.reset_after:
        inputs.append(const(behind, "float32"))
    given = ((spec.lengths, 4), (spec.hidden_given, 5), (spec.cell_given, 6))
    inputs += [site.x(index) for present, index in given if present]

    kernel = recurrent(spec, isa, site.target.caches, threads)
    sizes = {t: steps, b: batch}
    shapes = list(tensor_shapes(spec, isa, threads).values())[len(inputs) :]
    return calls(site, kernel, inputs, [([sizes.get(d, d) for d in shape], dtype) for shape, dtype in shapes])


def _biases(bias: np.ndarray | None, spec: RecurrentSpec) -> tuple[np.ndarray, np.ndarray]:
    """What is added to the product of X, (directions · gates · hidden), and what to H·R of a GRU's new state when the
    reset gate acts behind it, (directions · hidden)."""
    width = spec.gates * spec.hidden
    both = np.zeros((spec.directions, 2 * width), np.float32) if bias is None else bias
    inner, outer = both[:, :width].copy(), both[:, width:]
    behind = outer[:, 2 * spec.hidden :]
    if spec.reset_after:
        outer = np.concatenate([outer[:, : 2 * spec.hidden], np.zeros_like(behind)], 1)
    return (inner + outer).reshape(-1), np.ascontiguousarray(behind).reshape(-1)
