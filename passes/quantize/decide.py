"""From a float model and real inputs to a plan: edits, ranges, codes, widths, and what stays in float."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from .. import graph
from ..base import PassContext
from ..errors import PassError
from ..quality import held_out, judged
from .calibrate import Channels, Feeds, Seen, observe
from .equalise import equalise, equalising, pairs
from .layers import Layer, find_layers
from .learn import Learning, learn
from .narrow_sums import Lanes, lanes_of
from .paying import Clock, paying
from .placement import Placement, place
from .plan import Edit, LayerPlan, Plan, Point
from .ranges import Histogram, Method
from .rounding import can_be_rounded, fit_together, products
from .scales import (
    affine,
    data_grid,
    decibels,
    dequantize,
    fit_weights,
    quantize,
    signal_to_noise,
    weight_grid,
)
from .sensitivity import Flips, Judge, allot, class_output, fewest
from .smooth import smooth, smoothing
from .tables import Table, find_tables, plan_tables
from .write import bias_place, write

MOST_LOST = 0.03  # of the squares of a row of data
MOST_BIAS = 2.0**30  # of a bias in steps of its scale
DAMAGE_SAMPLES, ERROR_SAMPLES = 8, 4
WIDTHS = (4, 6, 8)
READING = 16  # operations that take as long as a float weight takes from memory, about
BLOCK = 32  # of 4-bit weights of products


@dataclass(frozen=True)
class Options:
    """What the pass's options ask of the plan; see DynaQuant."""

    weights: int
    activations: int | None
    method: Method
    group: int | None
    symmetric: bool
    smooth: float | None
    smoothing: bool
    equalise: bool
    correct: bool
    together: bool
    mixed: float | None
    outputs: tuple[str, ...]
    learning: Learning | None
    measure: bool
    flips: float | None
    narrow_sums: int


def decide(
    model: ir.Model, sites: Collection[str], tables: Collection[str], kept: Mapping[str, str], feeds: Sequence[Feeds],
    options: Options, ctx: PassContext,
) -> Plan:  # fmt: skip
    """The plan for the layers at `sites` and the tables of these names. feeds: calibration samples; none for weights
    alone."""
    return _Decision(model, sites, feeds, options, ctx).plan(kept, tables)


def edited(model: ir.Model, edits: Sequence[Edit]) -> None:
    """Make a plan's edits. Raises PassError when they are for another model."""
    for edit in edits:
        layers = {layer.site: layer for layer in find_layers(model)[0]}
        try:
            if edit.kind == "smooth":
                value = layers[edit.sites[1]].data
                smooth(model, edit, value, [layers[site] for site in edit.sites[1:]])
            else:
                equalise(model, edit, *(layers[site] for site in edit.sites))
        except (KeyError, ValueError) as error:
            raise PassError(f"the plan is for another model or preset: {edit.sites} are not in this one") from error


class _Decision:
    def __init__(
        self, model: ir.Model, sites: Collection[str], feeds: Sequence[Feeds], options: Options, ctx: PassContext
    ) -> None:
        self.original, self.sites, self.feeds, self.options, self.ctx = model, set(sites), feeds, options, ctx
        self.base = model.clone()  # with the edits
        self.layers = self._layers()
        self.seen: dict[str, Seen] = {}
        self.grams: dict[str, np.ndarray] = {}

    def _layers(self) -> list[Layer]:
        return [layer for layer in find_layers(self.base)[0] if layer.site in self.sites]

    def plan(self, kept: Mapping[str, str], tables: Collection[str]) -> Plan:
        edits = self._edits() if self.feeds and self.options.activations else ()
        placement = Placement()
        if self.options.activations:
            placement = place(self.base, self.layers)
        if self.feeds:
            self.ctx.progress("dynaquant: ranges")
            self.seen = self._observe(placement.values)
        points = self._points(placement)
        coarse = self._coarse(points)
        if coarse:
            kept = {**kept, **coarse}
            self.layers = [layer for layer in self.layers if layer.site not in coarse]
        plan = Plan(edits, {}, points, kept)
        self.ctx.progress("dynaquant: weights")
        widths = {layer.site: self.options.weights for layer in self.layers}
        plan = replace(plan, layers={layer.site: self._fit(layer, widths[layer.site], points) for layer in self.layers})
        if self.options.mixed is not None:
            plan = self._mixed(plan, points, self.options.mixed)
        if self.options.learning is not None and plan.layers:
            self.ctx.progress("dynaquant: learning")
            plan = learn(
                self.base, self.layers, plan, self._reach(), self._held(plan), self.options.learning,
                self.options.outputs, self.ctx,
            )  # fmt: skip
        plan = self._with_tables(plan, tables)
        if self.ctx.max_drop is not None:
            plan = self._within_budget(plan, self.ctx.max_drop)
        if self.options.flips is not None and self.feeds and plan.layers:
            plan = self._within_flips(plan, self.options.flips)
        errors = self._errors(plan)
        if self.options.measure and plan.layers:
            timed = self._paying(plan, errors)
            errors = errors if set(timed.layers) == set(plan.layers) else self._errors(timed)
            plan = timed
        return self._described(plan, errors)

    # --- edits

    def _edits(self) -> tuple[Edit, ...]:
        found: list[Edit] = []
        if self.options.equalise:
            found += self._equalised()
        if self.options.smoothing:
            found += self._smoothed()
        return tuple(found)

    def _equalised(self) -> list[Edit]:
        found = []
        candidates = pairs(self.layers)
        seen = self._evaluated({pair.between.name or "": pair.first.data_axis for pair in candidates})
        for pair in candidates:
            edit = equalising(pair, seen[pair.between.name or ""])
            if edit is not None:
                found.append(edit)
        edited(self.base, found)
        self.layers = self._layers()
        return found

    def _smoothed(self) -> list[Edit]:
        groups: dict[ir.Value, list[Layer]] = {}
        for layer in self.layers:
            if layer.is_product:
                groups.setdefault(layer.data, []).append(layer)
        if not groups:
            return []
        self.ctx.progress("dynaquant: smoothing")
        seen = self._evaluated({value.name or "": -1 for value in groups})
        assert self.options.activations is not None
        found = [
            smoothing(
                value, layers, seen[value.name or ""], self.options.weights, self.options.activations,
                self.options.method, self.options.smooth,
            )
            for value, layers in groups.items()
        ]  # fmt: skip
        edits = [edit for edit in found if edit is not None]
        edited(self.base, edits)
        self.layers = self._layers()
        return edits

    # --- ranges

    def _evaluated(
        self, axes: Mapping[str, int | None], also: Callable[[str, np.ndarray], None] = lambda name, array: None
    ) -> dict[str, Seen]:
        assert self.ctx.evaluator is not None
        return observe(self.base, axes, self.feeds, self.ctx.evaluator, also)

    def _observe(self, values: Mapping[ir.Value, ir.Value]) -> dict[str, Seen]:
        axes: dict[str, int | None] = {value.name or "": None for value in values}
        axes.update({layer.data.name or "": layer.data_axis for layer in self.layers})
        readers: dict[str, dict[str, Layer]] = {}
        for layer in self.layers:
            if self.options.together and can_be_rounded(layer):
                readers.setdefault(layer.data.name or "", {}).setdefault(_gram_of(layer), layer)

        def take(name: str, array: np.ndarray) -> None:
            for key, layer in readers.get(name, {}).items():
                found = products(layer, array)
                self.grams[key] = self.grams[key] + found if key in self.grams else found

        return self._evaluated(axes, take)

    def _points(self, placement: Placement) -> dict[str, Point]:
        bits = self.options.activations
        if bits is None:
            return {}
        shared: dict[ir.Value, Histogram] = {}
        for value, root in placement.values.items():
            shared.setdefault(root, Histogram()).merge(self.seen[value.name or ""].histogram)
        grid = data_grid(bits)
        found = {}
        for root, histogram in shared.items():
            low, high = histogram.range(self.options.method, grid)
            scale, zero = affine(low, high, grid)
            found[root] = Point(float(scale[0]), int(zero[0]), bits)
        return {value.name or "": found[root] for value, root in placement.values.items()}

    def _coarse(self, points: Mapping[str, Point]) -> dict[str, str]:
        """Products whose data one scale does not suit -> why: of a typical row, which a few rows with numbers a hundred
        times as large do not change, too little is left."""
        found = {}
        for layer in self.layers:
            point = points.get(layer.data.name or "")
            if not layer.is_product or point is None:
                continue
            rows = self.seen[layer.data.name or ""].rows
            scale, zero = np.array(point.scale), point.zero
            lost = rows - dequantize(quantize(rows, scale, zero, data_grid(point.bits)), scale, zero)
            norms = np.square(rows).sum(1)
            share = float(np.mean(np.square(lost).sum(1)[norms > 0] / norms[norms > 0])) if norms.any() else 0.0
            if share > MOST_LOST:
                found[layer.site] = f"{point.bits}-bit data with one scale lose {share:.0%} of a typical row"
        return found

    # --- weights

    def _block(self, layer: Layer, bits: int) -> int:
        """Inputs that share a scale; 0: all of a channel."""
        group = self.options.group
        if group is None or (bits > 4 and self.options.activations):
            group = BLOCK if bits == 4 else 0
        return group if layer.is_product and group < layer.size // layer.channels else 0

    def _channels(self, layer: Layer) -> Channels | None:
        seen = self.seen.get(layer.data.name or "")
        return seen.channels if seen is not None else None

    def _fit(self, layer: Layer, bits: int, points: Mapping[str, Point]) -> LayerPlan:
        matrix = layer.matrix(layer.weight())
        if not np.isfinite(matrix).all():
            raise PassError(f"the weight of {layer.site!r} holds NaN or infinity; expected finite weights")
        channels, least = self._channels(layer), None
        point = points.get(layer.data.name or "") if self.options.activations else None
        bias = graph.constant_tensor(layer.bias)
        if point is not None and bias is not None and bias_place(layer) is not None:
            steps = np.abs(bias.numpy().reshape(-1).astype(np.float64)) / (point.scale * MOST_BIAS)
            least = np.broadcast_to(steps, (layer.channels,))
        search = self.options.method is not Method.MINMAX
        importance = layer.per_input(channels.mean_square) if channels is not None and search else None
        grid, lanes = weight_grid(bits, self.options.symmetric), self._lanes(layer, bits, point is not None)
        codes = fit_weights(matrix, grid, self._block(layer, bits), importance, search, least, lanes)
        gram = self.grams.get(_gram_of(layer))
        if gram is not None:
            codes = fit_together(matrix, codes, grid, gram, lanes, least)
        corrected = None
        if self.options.correct and channels is not None and gram is None:  # X'X holds the mean, and the borders
            corrected = _corrected_bias(layer, matrix - codes.values, channels)
        return LayerPlan(bits, codes, point is not None, corrected)

    def _lanes(self, layer: Layer, bits: int, data: bool) -> Lanes | None:
        """What holds the sums of a layer's codes; None where nothing need."""
        narrow = self.options.narrow_sums and self.options.symmetric and bits == 8 and data
        return lanes_of(layer, self.options.narrow_sums) if narrow else None

    def _held(self, plan: Plan) -> dict[str, Lanes]:
        planned = [(layer, plan.layers[layer.site]) for layer in self.layers]
        found = {layer.site: self._lanes(layer, each.bits, each.data) for layer, each in planned}
        return {site: lanes for site, lanes in found.items() if lanes is not None}

    def _reach(self) -> dict[str, np.ndarray]:
        """(channels,) of each layer: the root of the mean square of its results, as if its inputs had nothing to do
        with each other."""
        found = {}
        for layer in self.layers:
            channels = self._channels(layer)
            assert channels is not None
            squares = layer.matrix(layer.weight()).astype(np.float64) ** 2
            found[layer.site] = np.sqrt((squares * layer.per_input(channels.mean_square)).sum(1))
        return found

    def _tables(self, names: Collection[str]) -> list[Table]:
        return [table for table in find_tables(self.base, find_layers(self.base)[0])[0] if table.name in names]

    def _with_tables(self, plan: Plan, names: Collection[str]) -> Plan:
        search = self.options.method is not Method.MINMAX
        return plan_tables(plan, self._tables(names), self.layers, search, self.ctx.progress)

    # --- widths and the budget

    def _model(self, plan: Plan, *, alone: bool = False) -> ir.Model:
        copy = self.base.clone()
        write(copy, plan, alone=alone)
        return copy

    def _judge(self, feeds: Sequence[Feeds]) -> Judge:
        assert self.ctx.evaluator is not None
        return Judge(self.base, feeds, self.ctx.evaluator, self.options.outputs)

    def _damages(self, plans: Mapping[str, LayerPlan], plan: Plan, judge: Judge, what: str) -> dict[str, float]:
        found = {}
        for number, (site, layer) in enumerate(plans.items()):
            self.ctx.progress(f"dynaquant: {what} {number + 1} of {len(plans)}")
            found[site] = judge.drop(self._model(replace(plan, layers={site: layer}, tables={}), alone=True))
        return found

    def _table_damages(self, plan: Plan, judge: Judge) -> dict[str, float]:
        found = {}
        for name, table in plan.tables.items():
            self.ctx.progress(f"dynaquant: damage of table {name}")
            alone = replace(plan, layers={}, tables={name: replace(table, shared=None)})
            found[name] = judge.drop(self._model(alone, alone=True))
        return found

    def _mixed(self, plan: Plan, points: Mapping[str, Point], mean_bits: float) -> Plan:
        judge = self._judge(self.feeds[:DAMAGE_SAMPLES])
        damages: dict[str, dict[int, float]] = {layer.site: {} for layer in self.layers}
        fitted: dict[int, dict[str, LayerPlan]] = {}
        for bits in WIDTHS:
            fitted[bits] = {layer.site: self._fit(layer, bits, points) for layer in self.layers}
            for site, damage in self._damages(fitted[bits], plan, judge, f"{bits} bits, layer").items():
                damages[site][bits] = damage
        widths = allot(damages, {layer.site: layer.size for layer in self.layers}, mean_bits)
        return replace(plan, layers={site: fitted[bits][site] for site, bits in widths.items()})

    def _apart(self) -> list[Feeds]:
        """The samples that quality is measured on."""
        assert self.ctx.calibration is not None
        count = min(len(values) for values in self.ctx.calibration.values())
        return [{name: values[i] for name, values in self.ctx.calibration.items()} for i in judged(count)]

    def _within_budget(self, plan: Plan, budget: float) -> Plan:
        """The plan with as few layers in float as hold the budget, those first that hurt most for their time."""
        self.ctx.progress("dynaquant: budget")
        judge = self._judge(self._apart())
        what = f"more than --max-drop {budget:g} leaves"
        return self._within(plan, lambda tried: judge.drop(self._model(tried)) <= budget, what)

    def _within_flips(self, plan: Plan, most: float) -> Plan:
        """The same, until of rows no more are expected to change their class. Other models stay as they are."""
        output = class_output(self.base)
        if output is None:
            return plan
        self.ctx.progress("dynaquant: classes")
        assert self.ctx.evaluator is not None
        judged_on = [*self._apart(), *self.feeds][: max(DAMAGE_SAMPLES, len(self._apart()))]
        flips = Flips(self.base, output, [*self.feeds, *self._apart()], judged_on, self.ctx.evaluator)
        shares: dict[tuple[str, ...], float] = {}

        def share(tried: Plan) -> float:
            key = tuple(tried.layers)
            if key not in shares:
                shares[key] = flips.share(self._model(tried))
            return shares[key]

        found = self._within(plan, lambda tried: share(tried) <= most, f"more than flips={most:g} leaves")
        return replace(found, stats={**found.stats, "flips": round(share(found), 4)})

    def _within(self, plan: Plan, holds: Callable[[Plan], bool], what: str) -> Plan:
        if holds(plan):
            return plan
        judge = self._judge(self.feeds[:DAMAGE_SAMPLES])
        damages = {**self._damages(plan.layers, plan, judge, "damage of layer"), **self._table_damages(plan, judge)}
        costs = {**self._costs(), **{table.name: READING * table.size for table in self._tables(plan.tables)}}
        order = sorted(damages, key=lambda site: -damages[site] / costs[site])
        reasons = {site: f"by itself it costs {damages[site]:.2g} of the outputs, {what}" for site in order}

        def rest(count: int) -> Plan:
            return plan.without({site: reasons[site] for site in order[:count]})

        return rest(fewest(order, lambda count: holds(rest(count))))

    # --- time

    def _costs(self) -> dict[str, float]:
        """About how much time each layer takes in float, in operations."""
        operations = self._operations()
        return {layer.site: operations[layer.site] + READING * layer.size for layer in find_layers(self.base)[0]}

    def _paying(self, plan: Plan, errors: Mapping[str, float]) -> Plan:
        assert self.ctx.stopwatch is not None
        clock = Clock(self.ctx.stopwatch, self._model, self._operations(), self.feeds[0], self.ctx.progress)
        return paying(plan, clock, errors)

    def _operations(self) -> dict[str, float]:
        """Of each layer of the model, quantized or not, on the first sample."""
        assert self.ctx.evaluator is not None
        layers = find_layers(self.base)[0]
        names = {layer.site: layer.data.name or "" if _scatters(layer) else layer.site for layer in layers}
        found = self.ctx.evaluator(self.base, list(dict.fromkeys(names.values())), self.feeds[:1])
        sizes = {name: array.size for _, name, array in found}
        return {
            layer.site: 2.0 * layer.size * sizes[names[layer.site]] / layer.shape[0 if _scatters(layer) else layer.axis]
            for layer in layers
        }

    # --- the report

    def _described(self, plan: Plan, errors: Mapping[str, float]) -> Plan:
        """The plan with each layer's width and error."""
        what = "result" if self.feeds else "weight"
        layers = {}
        for site, layer in plan.layers.items():
            block = f" in blocks of {layer.codes.block}" if layer.codes.block else ""
            data = f", {plan.values[_data_name(self.layers, site)].bits}-bit data" if layer.data else ""
            detail = f"{layer.bits}-bit weights{block}{data}; {what} {_decibels(errors[site])}"
            layers[site] = replace(layer, detail=detail)
        sizes = {layer.site: layer.size for layer in self.layers if layer.site in layers}
        total = max(sum(sizes.values()), 1)
        stats = {
            **plan.stats, "layers": len(layers), "tables": len(plan.tables), "edits": len(plan.edits),
            "mean_bits": sum(layers[site].bits * size for site, size in sizes.items()) / total,
        }  # fmt: skip
        return replace(plan, layers=layers, stats=stats)

    def _errors(self, plan: Plan) -> dict[str, float]:
        """Decibels of each layer above its error: of its result in the quantized model, or without inputs of its
        weight."""
        if not self.feeds:
            return {
                layer.site: signal_to_noise(layer.matrix(layer.weight()), found.codes.values)
                for layer in self.layers
                if (found := plan.layers.get(layer.site)) is not None
            }
        assert self.ctx.evaluator is not None
        feeds = self.feeds[:ERROR_SAMPLES]
        names = list(plan.layers)
        signal, noise = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        theirs = self.ctx.evaluator(self.base, names, feeds)
        ours = self.ctx.evaluator(self._model(plan), names, feeds)
        for (_, name, array), (_, _, expected) in zip(ours, theirs, strict=True):
            wide = expected.astype(np.float64)
            signal[name] += float((wide**2).sum())
            noise[name] += float(((wide - array) ** 2).sum())
        return {name: decibels(signal[name], noise[name]) for name in names}


def _scatters(layer: Layer) -> bool:
    """Whether it is the numbers of the data that each meet a row of weights, and not those of the result."""
    return layer.node.op_type == "ConvTranspose"


def _gram_of(layer: Layer) -> str:
    """The name of X'X of a layer: products that read the same value share it."""
    return f"{layer.data.name}|data" if layer.is_product else layer.site


def _decibels(number: float) -> str:
    return f"{number:.1f} dB above its error" if np.isfinite(number) else "without error"


def _data_name(layers: Sequence[Layer], site: str) -> str:
    return next(layer.data.name or "" for layer in layers if layer.site == site)


def _corrected_bias(layer: Layer, lost: np.ndarray, channels: Channels) -> np.ndarray | None:
    """The bias with what the rounding of the weights takes from the mean of each channel of the result: the mean of
    the data times what the weights lost. None where there is no place for it. At the border of an image zeros are
    counted as the mean. Source: Nagel et al., arXiv 1906.04721, section 4.2."""
    place = bias_place(layer)
    if place is None:
        return None
    node, index = place
    tensor = graph.constant_tensor(graph.input_of(node, index))
    bias = np.zeros(layer.channels) if tensor is None else tensor.numpy().reshape(-1).astype(np.float64)
    shift = (lost.astype(np.float64) * layer.per_input(channels.mean)).sum(1)
    return (np.broadcast_to(bias, shift.shape) + shift).astype(np.float32)


def samples(calibration: Mapping[str, Sequence[np.ndarray]], most: int) -> list[Feeds]:
    """Up to `most` samples, evenly spread over those that quality is not measured on."""
    count = min(len(values) for values in calibration.values())
    apart = set(held_out(count))
    usable = [i for i in range(count) if i not in apart]
    step = max(1.0, len(usable) / most)
    chosen = [usable[int(i * step)] for i in range(min(most, len(usable)))]
    return [{name: values[i] for name, values in calibration.items()} for i in chosen]
