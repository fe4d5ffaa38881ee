"""Learning what a plan has chosen: scales, offsets and the rounding of weights, by the trainer of learned passes.

The teacher is the float model, the student the same with fake quantization at the plan's places. What is learned are
changes of the plan, all 0 at first, in units that suit the width, so that one learning rate suits them all:

    scales     of weights, one an output channel or block, and of data, one a value
    offsets    zero points of data, and of weights that have them; biases, an offset of each output channel
    rounding   weights, in steps, which go to the nearest code

A block is the part of the model between two values that everything quantized passes through. Blocks learn to give
what they give in the float model, on its inputs, then the whole model to give its outputs. The result is a plan again.

Sources: Bao et al., "DynaQuant", arXiv 2511.07903; Esser et al., "Learned Step Size Quantization", arXiv 1902.08153;
Li et al., "BRECQ", arXiv 2102.05426 (blocks).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from .. import graph
from ..base import Block, Loss, PassContext, TrainingJob
from .constants import new_constant
from .layers import Layer, find_layers
from .narrow_sums import Lanes
from .placement import Placement, place
from .plan import LayerPlan, Plan, Point
from .scales import FEW_STEPS, Grid, data_grid, in_half, weight_grid
from .write import bias_place

DOMAIN = "graphwright.training"  # of operators that only a student has
PARTS = ("scales", "offsets", "rounding")
MOST_CHANGE = math.log(2)  # of a scale, as a logarithm: int32 holds the bias with half of it too
FARTHEST = 0.45  # of a step from its code that a weight is at first: those beyond it were rounded with their row
EPSILON = 1e-12  # of AdamW: gradients of a loss that is nearly 0 are small


@dataclass(frozen=True)
class Learning:
    """What is learned and how; see DynaQuant. modulator: beta of the gradient through the rounding."""

    parts: tuple[str, ...]
    modulator: float
    block_steps: int
    steps: int
    batch: int
    rate: float
    loss: Loss


def learn(
    base: ir.Model, layers: Sequence[Layer], plan: Plan, reach: Mapping[str, np.ndarray], lanes: Mapping[str, Lanes],
    learning: Learning, outputs: tuple[str, ...], ctx: PassContext,
) -> Plan:  # fmt: skip
    """The plan with what was learned. base: the float model with the plan's edits; layers: those of `plan`, in it.
    reach: site -> (channels,) how large the layer's results are, the unit of its bias. lanes: by site, what sums of
    codes stay held by. What was learned counts for nothing when the outputs on held-out samples were nearer to the
    float model's before."""
    assert ctx.trainer is not None
    student = _Student(base, plan, reach, lanes, learning)
    model = student.model
    teacher = base.clone()
    for name, array in student.parameters.items():  # which the trainer looks up there
        teacher.graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
    blocks = tuple(_blocks(base, layers, model, student.parameters))
    if not blocks:
        return plan
    job = TrainingJob(
        teacher, blocks, lambda sites: model, _digest(base, plan, learning), outputs=outputs, loss=learning.loss,
        block_steps=learning.block_steps, steps=learning.steps, batch=learning.batch, rate=learning.rate,
        epsilon=EPSILON,
    )  # fmt: skip
    weights = ctx.trainer(job, ctx)
    stats = {f"learned_{name}" if name != "drop" else "drop": value for name, value in weights.stats.items()}
    # Blocks are judged by what they give themselves; that the outputs are further off then is possible.
    further = float(stats.get("drop", 0)) > float(stats.get("learned_drop_before", 0))
    if further:
        stats["learned"] = "nothing: the outputs were nearer before"
    return replace(plan if further else student.plan(weights.arrays), stats={**plan.stats, **stats})


def _digest(base: ir.Model, plan: Plan, learning: Learning) -> str:
    """What the result follows from besides the inputs, for a run that goes on from a checkpoint."""
    digest = hashlib.sha256(repr((learning, plan.values, sorted(plan.layers))).encode())
    for planned in plan.layers.values():
        digest.update(planned.codes.codes.tobytes() + planned.codes.scale.tobytes())
    for layer in find_layers(base)[0]:
        digest.update(repr((layer.site, layer.shape)).encode())
    return digest.hexdigest()


# --- blocks


def _blocks(base: ir.Model, layers: Sequence[Layer], student: ir.Model, names: Collection[str]) -> Iterator[Block]:
    made = {value.name: value for node in student.graph for value in node.outputs}
    for start, end in _segments(base, {layer.node for layer in layers}):
        inputs = () if start is None else (start.name or "",)
        found = _leaves(made[end.name], inputs)
        own = tuple(name for name in names if name in found)
        if own:
            yield Block(end.name or "", inputs, end.name or "", own)


def _segments(model: ir.Model, nodes: Collection[ir.Node]) -> list[tuple[ir.Value | None, ir.Value]]:
    """Parts of the main graph, each with at least one of `nodes`, from a value (None: the inputs) to a value through
    which everything goes that `nodes` had a part in. What is behind the last such value is one part for each node."""
    order = list(model.graph)
    last = {value: number for number, node in enumerate(order) for value in node.inputs if value is not None}
    last.update((value, len(order)) for value in model.graph.outputs)
    live: set[ir.Value] = set()
    changed: set[ir.Value] = set()
    found: list[tuple[ir.Value | None, ir.Value]] = []
    begin: ir.Value | None = None
    cut: ir.Value | None = None
    waiting: list[ir.Node] = []
    for number, node in enumerate(order):
        if node in nodes:
            if cut is not None:  # as late as can be, behind the functions of the layer's result
                found.append((begin, cut))
                begin, cut, waiting = cut, None, []
            waiting.append(node)
        if node in nodes or any(value in changed for value in node.inputs):
            changed.update(node.outputs)
            live.update(value for value in node.outputs if last.get(value, -1) > number)
        live = {value for value in live if last[value] > number}
        if len(live) == 1 and waiting:
            (cut,) = live
    if cut is not None:
        found.append((begin, cut))
        waiting = []
    return found + [(node.inputs[0], node.outputs[0]) for node in waiting]


def _leaves(value: ir.Value, stops: Collection[str]) -> set[str]:
    """Names of the initializers that a value is computed from, when the values `stops` are given."""
    found: set[str] = set()
    seen = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if one in seen or one.name in stops:
            continue
        seen.add(one)
        node = one.producer()
        if node is None:
            found.add(one.name or "")
        else:
            waiting += [inner for inner in node.inputs if inner is not None]
    return found


# --- the student


def _unit(grid: Grid) -> float:
    """Of a scale's logarithm: the end of the range moves by four codes."""
    return 4 / max(grid.high, -grid.low)


def _zero_unit(grid: Grid) -> float:
    return (grid.steps + 1) / 16


def _grid(layer: LayerPlan) -> Grid:
    return weight_grid(layer.bits, layer.codes.codes.dtype == np.int8)


class _Student:
    """The float model with fake quantization. parameters: name -> zeros; what is learned."""

    def __init__(
        self, base: ir.Model, plan: Plan, reach: Mapping[str, np.ndarray], lanes: Mapping[str, Lanes],
        learning: Learning,
    ) -> None:  # fmt: skip
        self.before, self.reach, self.lanes, self.learning = plan, reach, lanes, learning
        self.parameters: dict[str, np.ndarray] = {}
        self.starts: dict[str, np.ndarray] = {}  # weights in steps, and biases, by site
        self.model = base.clone()
        self.model.graph.opset_imports[DOMAIN] = 1
        self.names = graph.Names(self.model)
        layers = {layer.site: layer for layer in find_layers(self.model)[0]}
        placement = place(self.model, [layers[site] for site, planned in plan.layers.items() if planned.data])
        self.roots = {value.name or "": root.name or "" for value, root in placement.values.items()}
        for site, planned in plan.layers.items():
            self._weight(layers[site], planned)
            self._bias(layers[site], planned)
        for value in placement.values:
            self._data(value, plan.values[value.name or ""], placement)

    def _constant(self, array: np.ndarray, stem: str) -> ir.Value:
        return new_constant(self.model, self.names, stem, np.asarray(array, np.float32))

    def _parameter(self, name: str, shape: tuple[int, ...], part: str) -> ir.Value | None:
        """What is learned of one thing, None unless its part is."""
        if part not in self.learning.parts:
            return None
        if name not in self.parameters:
            self.parameters[name] = np.zeros(shape, np.float32)
            value = ir.val(name, const_value=ir.tensor(self.parameters[name], name=name))
            self.model.graph.register_initializer(value)
        return self.model.graph.initializers[name]

    def _fake(
        self, operator: str, inputs: Sequence[ir.Value | None], grid: Grid, like: ir.Value, **more: int | list[int]
    ) -> ir.Node:
        attributes: dict[str, int | float | list[int]] = {
            "low": grid.low, "high": grid.high, "beta": self.learning.modulator, "scale_unit": _unit(grid),
            "zero_unit": _zero_unit(grid), **more,
        }  # fmt: skip
        result = ir.Value(name=self.names.fresh(f"{like.name}_fake"), type=like.type, shape=like.shape)
        given = [ir.convenience.convert_attribute(name, value) for name, value in attributes.items()]
        return ir.Node(DOMAIN, operator, list(inputs), given, outputs=[result], name="")

    def _weight(self, layer: Layer, planned: LayerPlan) -> None:
        codes, site = planned.codes, layer.site
        inputs = codes.codes.shape[1]
        scale, zero = (np.repeat(x, codes.block or inputs, 1)[:, :inputs] for x in (codes.scale, codes.zero))
        steps = codes.codes.astype(np.float32) - zero
        if "rounding" in self.learning.parts:
            lost = layer.matrix(layer.weight()) / scale - steps
            steps = steps + np.clip(lost, -FARTHEST, FARTHEST)
        self.starts[f"{site}|steps"] = steps
        old = layer.node.inputs[1]
        assert old is not None
        shape = codes.scale.shape
        node = self._fake(
            "FakeWeight",
            [
                self._constant(steps, f"{site}_steps"), self._constant(codes.scale, f"{site}_scale"),
                self._constant(codes.zero, f"{site}_zero"), self._parameter(f"{site}|scale", shape, "scales"),
                self._parameter(f"{site}|zero", shape, "offsets") if codes.codes.dtype == np.uint8 else None,
                self._parameter(f"{site}|rounding", steps.shape, "rounding"),
            ],
            _grid(planned), old, shape=list(layer.shape), axis=layer.axis, block=codes.block,
        )  # fmt: skip
        self.model.graph.insert_before(layer.node, node)
        layer.node.replace_input_with(1, node.outputs[0])

    def _bias(self, layer: Layer, planned: LayerPlan) -> None:
        spot = bias_place(layer)
        if spot is None:
            return
        node, index = spot
        old = graph.input_of(node, index)
        tensor = graph.constant_tensor(old)
        bias = planned.bias
        if bias is None:
            bias = np.zeros(1, np.float32) if tensor is None else tensor.numpy().reshape(-1)
        bias = np.ascontiguousarray(np.broadcast_to(bias, (layer.channels,)), np.float32)
        change = self._parameter(f"{layer.site}|bias", bias.shape, "offsets")
        if change is None and planned.bias is None:
            return
        value = self._constant(bias, f"{layer.site}_bias")
        if change is not None:
            self.starts[f"{layer.site}|bias"] = bias
            self.starts[f"{layer.site}|reach"] = self._bias_unit(layer.site, planned)
            unit = self._constant(self.starts[f"{layer.site}|reach"], f"{layer.site}_unit")
            product = ir.Node("", "Mul", [change, unit])
            total = ir.Node("", "Add", [value, product.outputs[0]])
            for made in (product, total):
                made.outputs[0].name = self.names.fresh(f"{layer.site}_bias")
            self.model.graph.insert_before(layer.node, [product, total])
            value = total.outputs[0]
        if len(node.inputs) <= index:
            node.resize_inputs(index + 1)
        node.replace_input_with(index, value)

    def _bias_unit(self, site: str, planned: LayerPlan) -> np.ndarray:
        return (self.reach[site] * _unit(_grid(planned))).astype(np.float32)

    def _data(self, value: ir.Value, point: Point, placement: Placement) -> None:
        grid, root = data_grid(point.bits), self.roots[value.name or ""]
        uses = [(node, index) for node, index in value.uses() if node in placement.readers]
        node = self._fake(
            "FakeData",
            [
                value, self._constant(np.array([point.scale]), f"{value.name}_scale"),
                self._constant(np.array([point.zero]), f"{value.name}_zero"),
                self._parameter(f"{root}|data_scale", (1,), "scales"),
                self._parameter(f"{root}|data_zero", (1,), "offsets"),
            ],
            grid, value,
        )  # fmt: skip
        producer = value.producer()
        if producer is None:
            self.model.graph.insert_before(self.model.graph[0], node)
        else:
            self.model.graph.insert_after(producer, node)
        for user, index in uses:
            user.replace_input_with(index, node.outputs[0])

    # --- back to a plan

    def plan(self, arrays: Mapping[str, np.ndarray]) -> Plan:
        """The plan with these changes. Computed in float32, as the student is."""

        def change(name: str) -> np.ndarray:
            return arrays.get(name, np.zeros(1, np.float32))

        def scaled(scale: np.ndarray, name: str, grid: Grid) -> np.ndarray:
            factor = np.exp(np.clip(change(name) * np.float32(_unit(grid)), -MOST_CHANGE, MOST_CHANGE))
            return (scale * factor).astype(np.float32)

        def moved(zero: np.ndarray, name: str, grid: Grid) -> np.ndarray:
            new = np.clip(zero + change(name) * np.float32(_zero_unit(grid)), grid.low, grid.high)
            return np.rint(new).astype(np.int32)

        layers = {}
        for site, layer in self.before.layers.items():
            grid, codes = _grid(layer), layer.codes
            scale = scaled(codes.scale, f"{site}|scale", grid)
            if codes.block and grid.steps < FEW_STEPS:
                scale = in_half(scale)
            zero = codes.zero if grid.symmetric else moved(codes.zero, f"{site}|zero", grid)
            inputs = codes.codes.shape[1]
            steps = np.rint(self.starts[f"{site}|steps"] + change(f"{site}|rounding"))
            wide = np.repeat(zero, codes.block or inputs, 1)[:, :inputs]
            new = np.clip(steps + wide, grid.low, grid.high).astype(codes.codes.dtype)
            if site in self.lanes:
                new = self.lanes[site].held(new)
            bias = layer.bias
            if f"{site}|bias" in self.starts:
                bias = self.starts[f"{site}|bias"] + change(f"{site}|bias") * self.starts[f"{site}|reach"]
            layers[site] = replace(layer, codes=replace(codes, codes=new, scale=scale, zero=zero), bias=bias)
        values = {}
        for name, point in self.before.values.items():
            root, grid = self.roots.get(name, name), data_grid(point.bits)
            scale = scaled(np.array([point.scale], np.float32), f"{root}|data_scale", grid)
            zero = moved(np.array([point.zero]), f"{root}|data_zero", grid)
            values[name] = Point(float(scale[0]), int(zero[0]), point.bits)
        return replace(self.before, layers=layers, values=values)
