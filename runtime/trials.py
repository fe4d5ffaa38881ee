"""Which tiles a kernel could have, and how fast it is with each: alone, on tensors of its sizes, in turn with the rule.

What stands here runs in the compiler's process.
"""

from __future__ import annotations

import itertools
import math
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tvm
from tvm import relax, tirx

from . import importer, phases
from .claiming import claim
from .codegen import machine_code
from .importing.site import np_dtype
from .kernels import conv, conv_direct, gemm_spec, products, winograd
from .kernels.conv_depthwise import widest
from .kernels.conv_spec import ConvSpec, ConvTile
from .kernels.conv_transposed import TransposedSpec, convolutions
from .kernels.convolutions import chosen_tile, tuples
from .kernels.gemm_spec import GemmSpec, GemmTile
from .kernels.vectors import Vectors
from .measure import Spread
from .pool import Pool, on_pool
from .target import Target
from .templates import anchor, spec_of
from .tuning import Measured, Tunable, kernel_name
from .turns import medians, take_turns

CANDIDATES = 8  # at most, of one kind
GAIN = 1.03  # from which on a tile counts as faster: median; its 10th percentile is above 1
FINALISTS = 2  # that are measured again, since the fastest of many was also the luckiest
SECONDS = 0.4  # for each of them
ERROR = 1e-4  # of the output's scale, between two tiles
MEMORY = 2 << 30  # bytes that the tensors of all candidates may take
CALLS = 24  # about how many each candidate has at least


def tunables(path: Path, target: Target) -> list[Tunable]:
    """The kernels of an ONNX file whose sizes are numbers and that have tiles."""
    with target.tvm(), tvm.transform.PassContext(opt_level=3):
        module = phases.legalize(importer.import_model(onnx.load(path), target), target)
    calls: Counter[str] = Counter()
    found: dict[str, Trial] = {}

    def visit(expression: Any) -> None:
        if isinstance(expression, tvm.ir.Call) and getattr(expression.op, "name", "") == "relax.call_tir":
            stub = module[expression.args[0]]
            if isinstance(stub, tirx.PrimFunc) and (spec := spec_of(stub)) is not None:
                for trial in _trials(spec["template"], spec["parameters"], target):
                    found[trial.name] = trial
                    calls[trial.name] += 1

    for function in module.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, visit)
    return [Tunable(t.template, vars(t.spec), calls[name], t.cycles()) for name, t in found.items()]


def _trials(template: str, parameters: dict[str, Any], target: Target) -> Iterator[Trial]:
    given = parameters.get("spec", {})
    if given.get("data", "float32") != "float32" or given.get("free"):
        return  # 8-bit numbers, and images whose size is not known, keep the tiles of the rule
    if template == "gemm":
        spec = GemmSpec(**parameters["spec"])
        if spec.flops:
            yield ProductTrial(spec, target)
    elif template == "conv":
        yield ConvTrial(ConvSpec(**tuples(parameters["spec"])), target)
    elif template == "conv-transposed":
        for inner in convolutions(TransposedSpec(**tuples(parameters["spec"])), target.isa):
            yield ConvTrial(inner, target)


@dataclass(frozen=True)
class Trial(ABC):
    """A kernel and the tensors to try it on."""

    spec: Any
    target: Target

    template = ""

    @property
    def name(self) -> str:
        return kernel_name(self.template, vars(self.spec))

    @property
    def lanes(self) -> int:
        return Vectors(self.target.isa).lanes

    @abstractmethod
    def tiles(self) -> list[Any]:
        """Those to try, the rule's first."""

    @abstractmethod
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the first input and of the output."""

    @abstractmethod
    def second(self, tile: Any, draw: np.random.Generator) -> np.ndarray:
        """The second input, packed for the tile where it is a constant."""

    @property
    def constant(self) -> bool:
        """Whether the second input is."""
        return True

    def second_type(self, tile: Any) -> str:
        """Element type of the second input, as it is packed for the tile."""
        return "float32"

    def parameters(self, tile: Any) -> dict[str, Any]:
        """Of the template."""
        return {"spec": vars(self.spec), "tile": vars(tile)}

    @abstractmethod
    def flops(self) -> float: ...

    @abstractmethod
    def second_size(self) -> int:
        """Elements of the second input, about."""

    def cycles(self) -> float:
        """Of a call: two multiply-adds of vectors a cycle, or eight bytes."""
        elements = sum(map(math.prod, self.shapes())) + self.second_size()
        return max(self.flops() / (4 * self.lanes), 4 * elements / 8)

    def copies(self) -> int:
        """Of the second input where it is constant, so that they do not all stay in the second cache."""
        return max(1, min(16, -(-2 * self.target.caches.l2 // (4 * self.second_size())))) if self.constant else 1

    def kernel(self, tile: Any, second: Sequence[int]) -> Callable[..., None]:
        """The compiled kernel (first input, second, output), without an epilogue."""
        first, out = self.shapes()
        bb = relax.BlockBuilder()
        types = [relax.TensorType(first, "float32"), relax.TensorType(second, self.second_type(tile))]
        names = [relax.Var(f"x{i}", kind) for i, kind in enumerate(types)]
        with bb.function("main", names):
            with bb.dataflow():
                kind = relax.TensorType(out, "float32")
                output = bb.emit_output(anchor(bb, self.template, self.parameters(tile), names, kind))
            bb.emit_func_output(output)
        module = claim(bb.get(), self.target)
        (function,) = [f for f in module.functions.values() if isinstance(f, tirx.PrimFunc)]
        named = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
        return on_pool(machine_code(named, self.target), self.target)["kernel"]

    def arrays(self, tile: Any) -> tuple[np.ndarray, np.ndarray]:
        """The inputs, the same numbers for every tile."""
        draw = np.random.default_rng(0)
        return draw.standard_normal(self.shapes()[0], np.float32), self.second(tile, draw)


@dataclass(frozen=True)
class ProductTrial(Trial):
    spec: GemmSpec
    template = "gemm"

    @property
    def constant(self) -> bool:
        return self.spec.packed

    def second_type(self, tile: GemmTile) -> str:
        return "float32" if self.spec.weights == "float32" else "uint16"

    def flops(self) -> float:
        return self.spec.flops

    def second_size(self) -> int:
        return (1 if self.spec.shared_b else self.spec.batch or 1) * (self.spec.inner or 0) * (self.spec.columns or 0)

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        s = self.spec
        assert s.rows and s.inner and s.batch and s.columns, "the sizes are numbers"
        return (1 if s.shared_a else s.batch, s.rows, s.inner), (s.batch, s.rows, s.columns)

    def second(self, tile: GemmTile, draw: np.random.Generator) -> np.ndarray:
        s = self.spec
        assert s.inner and s.batch and s.columns, "the sizes are numbers"
        if s.packed:
            weights = draw.standard_normal((s.inner, s.columns), np.float32).astype(np_dtype(s.weights))
            return gemm_spec.pack(weights, tile, self.lanes)
        return draw.standard_normal((1 if s.shared_b else s.batch, s.inner, s.columns), np.float32)

    def tiles(self) -> list[GemmTile]:
        s, isa = self.spec, self.target.isa
        rule = products.chosen_tile(s, self.target)
        assert s.columns, "the sizes are numbers"
        ranked = gemm_spec.tiles(s.rows, s.columns, isa, self.lanes, (0, 1, 2))[:CANDIDATES]
        return _distinct([rule, *ranked, *(GemmTile(rule.rows, rule.vectors, depth) for depth in self.depths(rule))])

    def depths(self, rule: GemmTile) -> list[int]:
        """Other parts of the depth than the rule's."""
        s = self.spec
        if not s.packed or not s.rows or not s.inner:
            return []
        whole = gemm_spec.part_of_depth(s.rows, s.inner, rule, self.target.caches, self.lanes)
        parts = [s.inner // 2, s.inner // 4] if whole is None else [2 * whole, whole // 2]
        rounded = [-(-part // gemm_spec.UNROLL) * gemm_spec.UNROLL for part in parts]
        return [0] * (whole is not None) + [part for part in rounded if 128 <= part < s.inner]


@dataclass(frozen=True)
class ConvTrial(Trial):
    spec: ConvSpec
    template = "conv"

    def flops(self) -> float:
        return 2.0 * (self.spec.batch or 1) * self.spec.multiply_adds

    def second_type(self, tile: ConvTile) -> str:
        return "float32" if conv.reads(self.spec, tile) == "float32" else "uint16"

    def second_size(self) -> int:
        return self.spec.out_channels * self.spec.in_channels // self.spec.groups * self.spec.taps

    def parameters(self, tile: ConvTile) -> dict[str, Any]:
        return {**super().parameters(tile), "swapped": False}

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        s, lanes = self.spec, self.lanes
        batch = s.batch or 1
        first = (s.in_blocks(lanes), *s.in_size, lanes) if s.blocked_input else (s.in_channels, *s.in_size)
        return (batch, *first), (batch, s.out_blocks(lanes), *s.out_size, lanes)

    def second(self, tile: ConvTile, draw: np.random.Generator) -> np.ndarray:
        shape = (self.spec.out_channels, self.spec.in_channels // self.spec.groups, *self.spec.kernel)
        weight = draw.standard_normal(shape, np.float32).astype(self.spec.stored)
        return conv.pack_weights(weight, self.spec, self.target.isa, tile)

    def tiles(self) -> list[ConvTile]:
        rule = chosen_tile(self.spec, self.target)
        if rule.algorithm == "depthwise":
            return _distinct([rule, *self.depthwise()])
        both = [ConvTile("direct"), *self.direct()]
        if winograd.refusal(self.spec) is None:
            both += [ConvTile("winograd"), *self.winograd()]
        own = [tile for tile in both if tile.algorithm == rule.algorithm]
        return _distinct([rule, *own, *both])

    def direct(self) -> Iterator[ConvTile]:
        spec, isa, target = self.spec, self.target.isa, self.target
        first, *others = conv_direct.tilings(spec, isa)[:CANDIDATES]
        for tiling in others[: CANDIDATES // 2]:
            yield ConvTile("direct", tiling.vectors, max(t.width for t in tiling.tiles), tiling.columns)
        for tiling in (first, *others[:1]):  # one tile more in a row
            count = sum(t.count for t in tiling.tiles) + 1
            if count <= tiling.columns:
                yield ConvTile("direct", tiling.vectors, -(-tiling.columns // count), tiling.columns)
        for split in conv_direct.splits(spec, first, isa, target.caches, target.cores)[1:4]:
            yield ConvTile("direct", rows=split.rows, panels=split.panels)

    def winograd(self) -> Iterator[ConvTile]:
        spec, isa, target = self.spec, self.target.isa, self.target
        rule = winograd.vectors_of(spec, isa, winograd.BY_RULE)
        for vectors in range(1, min(4, spec.out_blocks(self.lanes)) + 1):
            if vectors != rule:
                yield ConvTile("winograd", vectors)
        for plan in winograd.plans(spec, isa, target.caches, target.cores)[1:3]:
            yield ConvTile("winograd", rows=plan.rows, panels=plan.panels)

    def depthwise(self) -> Iterator[ConvTile]:
        columns = self.spec.out_size[1]
        rule = -(-columns // widest(self.target.isa, self.spec, self.target.caches))
        for count in range(max(1, rule - 2), min(columns, rule + 4) + 1):
            if count != rule and -(-columns // count) <= 20:
                yield ConvTile("depthwise", width=-(-columns // count))


TRIALS: dict[str, Callable[[dict[str, Any], Target], Trial]] = {
    "gemm": lambda spec, target: ProductTrial(GemmSpec(**spec), target),
    "conv": lambda spec, target: ConvTrial(ConvSpec(**tuples(spec)), target),
}


def _distinct(tiles: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(tiles))


# --- measuring --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """A compiled kernel on its tensors. Weights are taken from several places in turn: between two calls in a model
    others pass through the cache."""

    call: Callable[[], object]
    out: Any


def _run(trial: Trial, tile: Any) -> _Run:
    first, second = trial.arrays(tile)
    function = trial.kernel(tile, second.shape)
    copies = trial.copies()
    x, y = tvm.runtime.tensor(first), tvm.runtime.tensor(np.zeros(trial.shapes()[1], np.float32))
    calls = itertools.cycle([partial(function, x, tvm.runtime.tensor(second), y) for _ in range(copies)])
    return _Run(lambda: next(calls)(), y)


def measure(template: str, spec: dict[str, Any], target: Target, threads: int, seconds: float) -> Measured:
    """Try the tiles of a kernel, as many as can be compiled in half of the time and run in the other."""
    Pool.here(target).use(threads)
    start = time.monotonic()
    trial = TRIALS[template](spec, target)
    rule, *others = trial.tiles()
    elements = sum(map(math.prod, trial.shapes())) + trial.second_size() * trial.copies()
    others = others[: MEMORY // (4 * elements)]
    runs = {rule: _run(trial, rule)}
    runs[rule].call()
    begin = time.monotonic()
    runs[rule].call()
    most = seconds / 2 / (CALLS * (time.monotonic() - begin))
    expected = runs[rule].out.numpy()
    scale = float(np.abs(expected).max())
    tried = 0
    for tile in others:
        if tried >= most or time.monotonic() - start > seconds / 2:
            break
        tried += 1
        run = _run(trial, tile)
        run.call()
        if np.abs(run.out.numpy() - expected).max() <= ERROR * scale:
            runs[tile] = run
    complete = tried == len(others)
    calls = {number: run.call for number, run in enumerate(runs.values())}
    times = medians(take_turns(calls, 0.0, 0.0))
    rule_us = float(np.median(times[0])) * 1e6
    ratios = {n: float(np.median(np.divide(times[0], times[n]))) for n in calls if n}
    best = Measured(None, rule_us, rule_us, candidates=tried, complete=complete)
    for number in sorted(ratios, key=lambda n: -ratios[n])[:FINALISTS]:
        if ratios[number] <= 1:
            break
        again = medians(take_turns({0: calls[0], number: calls[number]}, 0.0, SECONDS))
        ratio = Spread.of([a / b for a, b in zip(again[0], again[number], strict=True)])
        if ratio.median > max(GAIN, best.ratio) and ratio.low > 1:
            before, after = (float(np.median(again[n])) * 1e6 for n in (0, number))
            best = Measured(
                vars(list(runs)[number]), before, after, ratio.median, ratio.low, tried, complete
            )  # fmt: skip
    return best
