"""Are two models the same function? Runs both on the same inputs and measures how far apart the outputs are."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from ..passes.errors import VerificationError

LIMIT = 1e-4  # of the output's scale: float32 rounding over a whole model
FLOAT16_LIMIT = 1e-2
# A product below the smallest normal float32 loses its last digits or, where a processor says so, all of them, and
# what is summed from such products is off by about as much: errors beside a smaller scale than this are taken relative
# to it.
LEAST_SCALE = float(np.finfo(np.float32).tiny) / LIMIT
# onnxruntime's own Sigmoid, Tanh and Erf are good to about 1e-7, whatever the scale of the output: a map of
# probabilities near zero cannot be compared more closely, so smaller absolute errors of such outputs are not judged.
FLOOR = 2.0**-22
APPROXIMATE = frozenset({"Sigmoid", "Tanh", "Erf"})
MOVES = frozenset(
    {"Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Concat", "Split", "Cast"}
)

# Numbers that are what rounding left of others, such as distances of a point from itself, are another model's as well
# when it rounds differently. So many times as much as rounding the inputs moves an output is no error, in up to twice
# as many of its numbers.
ROUNDINGS = 4.0
DRAWS = 8  # of rounded inputs
UNSTABLE = 1e-5  # of the output's scale, from which on a number counts as moved

Runner = Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]]


@dataclass(frozen=True)
class Difference:
    """How far one output is from its reference. scale is max |reference|; relative = max_abs / scale, or / LEAST_SCALE
    where that is more. floor: an absolute error that is not judged."""

    name: str
    shape: tuple[int, ...]
    max_abs: float
    scale: float
    relative: float
    limit: float
    note: str = ""
    floor: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.note and (self.relative <= self.limit or self.max_abs <= self.floor)

    @property
    def by_floor(self) -> bool:
        """Whether it is equal only because so small an absolute error is never judged."""
        return self.ok and self.relative > self.limit


@dataclass(frozen=True)
class Moved:
    """What rounding the inputs does to an output: the largest absolute difference, and the most numbers that it moves
    by more than UNSTABLE."""

    largest: float
    count: int


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison over one or more sets of inputs: every output of every set."""

    outputs: tuple[Difference, ...] = ()
    sets: int = 0
    inputs: str = ""
    shapes: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        return bool(self.outputs) and all(output.ok for output in self.outputs)

    @property
    def max_abs(self) -> float:
        return max((o.max_abs for o in self.outputs), default=math.nan)

    @property
    def relative(self) -> float:
        return max((o.relative for o in self.outputs), default=math.nan)

    @property
    def worst(self) -> Difference:
        """The output that is furthest beyond (or nearest to) its limit."""
        return max(self.outputs, key=lambda o: (bool(o.note), o.relative / o.limit if o.limit else o.relative))

    def check(self, what: str) -> None:
        """Raises VerificationError naming `what` and the worst output when the limit is exceeded."""
        if self.ok:
            return
        if not self.outputs:
            raise VerificationError(f"{what}: nothing was compared")
        worst = self.worst
        found = worst.note or f"relative error {worst.relative:.2e} (absolute {worst.max_abs:.2e})"
        raise VerificationError(f"{what}: output {worst.name!r} differs: {found}; limit {worst.limit:.0e}")

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "sets": self.sets,
            "inputs": self.inputs,
            "shapes": list(self.shapes),
            "max_abs_error": _number(self.max_abs),
            "max_relative_error": _number(self.relative),
            "not_judged_below": max((o.floor for o in self.outputs if o.by_floor), default=None),
            "outputs": [
                {
                    "name": o.name, "shape": list(o.shape), "max_abs_error": _number(o.max_abs),
                    "scale": _number(o.scale), "relative_error": _number(o.relative),
                    "limit": _number(o.limit), "note": o.note,
                }
                for o in self.outputs
            ],
        }  # fmt: skip


def _number(value: float) -> float | None:
    """JSON has no NaN or infinity."""
    return value if math.isfinite(value) else None


def approximate_outputs(model: ir.Model) -> frozenset[str]:
    """Outputs that are results of functions which onnxruntime computes to an absolute error of FLOOR only."""
    found = set()
    for output in model.graph.outputs:
        waiting, seen = [output], {output}
        while waiting:
            node = waiting.pop().producer()
            if node is None or node.domain != "":
                continue
            if node.op_type in APPROXIMATE:
                found.add(output.name or "")
                break
            if node.op_type in MOVES:
                new = {value for value in node.inputs if value is not None} - seen
                seen |= new
                waiting += new
    return frozenset(found)


def ranked_outputs(model: ir.Model) -> dict[str, str]:
    """Outputs that are the places of the largest numbers along the last axis -> the output that is these numbers."""
    names = {value: value.name or "" for value in model.graph.outputs}
    found = {}
    for value in names:
        node = value.producer()
        if node is None or node.domain != "" or node.op_type != "TopK" or value.index() != 1:
            continue
        numbers, rank = node.outputs[0], len(node.outputs[0].shape) if node.outputs[0].shape is not None else None
        last = node.attributes.get_int("axis", -1) in (-1, (rank or 0) - 1)
        is_sorted = node.attributes.get_int("sorted", 1) == 1
        if numbers in names and last and is_sorted:
            found[names[value]] = names[numbers]
    return found


def compare(
    reference: Runner, candidate: Runner, feeds: Sequence[Mapping[str, np.ndarray]], limit: float | None = None,
    inputs: str = "", approximate: Collection[str] = (), ranked: Mapping[str, str] | None = None,
    rounding: bool = True,
) -> Verdict:  # fmt: skip
    """Run both on every set of feeds. limit: relative error allowed; None: by the output's type. rounding: numbers that
    are the reference's own rounding errors may be off by more."""
    verdict = judge(feeds, map(reference, feeds), candidate, limit, inputs, approximate, ranked)
    if verdict.ok or not rounding:
        return verdict
    moved = moved_by_rounding(reference, feeds)
    return judge(feeds, map(reference, feeds), candidate, limit, inputs, approximate, ranked, moved)


def judge(
    feeds: Sequence[Mapping[str, np.ndarray]], expectations: Iterable[Mapping[str, Any]], candidate: Runner,
    limit: float | None = None, inputs: str = "", approximate: Collection[str] = (),
    ranked: Mapping[str, str] | None = None, moved: Sequence[Mapping[str, Moved]] | None = None,
) -> Verdict:  # fmt: skip
    """Run `candidate` on every set of feeds and compare with what is expected of it. approximate: outputs of which
    absolute errors below FLOOR are not judged. ranked: what `ranked_outputs` says of the model. moved: what
    `moved_by_rounding` does of the model that the expectations are from."""
    outputs: list[Difference] = []
    shapes = []
    for one, expected, by_rounding in zip(feeds, expectations, moved or [{}] * len(feeds), strict=True):
        found = candidate(one)
        shapes.append(" ".join(f"{name}{list(np.shape(value))}" for name, value in one.items()))
        for name, value in expected.items():
            if name not in found:
                outputs.append(Difference(name, (), math.nan, math.nan, math.nan, limit or LIMIT, "is missing"))
            else:
                one_output = difference(name, value, found[name], limit)
                numbers = expected.get((ranked or {}).get(name, ""))
                if numbers is not None and not one_output.note and same_ranks(
                    value, found[name], numbers, max(LIMIT, limit or 0.0)
                ):
                    one_output = replace(one_output, max_abs=0.0, relative=0.0)
                moves = by_rounding.get(name)
                if moves and not one_output.note and _is_rounding(value, found[name], moves, one_output.limit):
                    one_output = replace(one_output, floor=one_output.max_abs)
                floor = max(one_output.floor, FLOOR if name in approximate else 0.0)
                outputs.append(replace(one_output, floor=floor))
    return Verdict(tuple(outputs), len(feeds), inputs, tuple(shapes))


def moved_by_rounding(reference: Runner, feeds: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, Moved]]:
    """For each set of feeds, output -> what moving every float of the inputs by up to its last place does to it. Empty
    where no input holds floats."""
    draw = np.random.default_rng(0)
    moved: list[dict[str, Moved]] = [{} for _ in feeds]
    for one, of_one in zip(feeds, moved, strict=True):
        if not any(np.asarray(array).dtype.kind == "f" for array in one.values()):
            continue
        before = reference(one)
        for _ in range(DRAWS):
            for name, value in reference({key: _rounded(array, draw) for key, array in one.items()}).items():
                if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.shape == np.shape(before[name]):
                    away, scale = _away(before[name], value)
                    known = of_one.get(name, Moved(0.0, 0))
                    count = int(np.count_nonzero(away > UNSTABLE * scale))
                    of_one[name] = Moved(max(known.largest, float(away.max(initial=0.0))), max(known.count, count))
    return moved


def _away(expected: np.ndarray, found: Any) -> tuple[np.ndarray, float]:
    """How far numbers are from what is expected, 0 where either is none, and the largest that is expected."""
    other = np.asarray(found)
    finite = np.isfinite(expected) & np.isfinite(other)
    scale = np.max(np.abs(expected[np.isfinite(expected)]), initial=0.0)
    with np.errstate(invalid="ignore"):
        return np.where(finite, np.abs(other.astype(np.float64) - expected), 0.0), float(scale)


def _is_rounding(expected: np.ndarray, found: Any, moved: Moved, limit: float) -> bool:
    """Whether numbers are off by about as much as rounding moves them, and about as many beyond the limit: a model that
    computes something else is off nearly everywhere."""
    away, scale = _away(expected, found)
    off = np.count_nonzero(away > limit * max(scale, LEAST_SCALE))
    return bool(away.max(initial=0.0) <= ROUNDINGS * moved.largest and off <= 2 * moved.count)


def _rounded(value: Any, draw: np.random.Generator) -> Any:
    """An array whose floats are moved by one unit in the last place, up, down or not at all."""
    array = np.asarray(value)
    if array.dtype.kind != "f":
        return value
    up, down = (np.nextafter(array, np.asarray(way, array.dtype)) for way in (np.inf, -np.inf))
    return np.choose(draw.integers(0, 3, array.shape), [array, up, down])


def difference(name: str, expected: Any, found: Any, limit: float | None = None) -> Difference:
    """Compare one output: shape and type must be equal, NaN and infinities must stand in the same places.

    Whole numbers and truth values must be equal, unless `limit` is wider than rounding: the next index is not a
    small error.
    """
    if isinstance(expected, list | tuple) or expected is None:
        return _sequence(name, expected, found, limit)
    a, b = np.asarray(expected), np.asarray(found)
    allowed = limit if limit is not None else _limit(a.dtype)
    if a.dtype.kind in "iub" and allowed <= LIMIT:
        allowed = 0.0
    shape = tuple(a.shape)

    def verdict(error: float, scale: float, relative: float, note: str = "") -> Difference:
        return Difference(name, shape, error, scale, relative, allowed, note)

    if a.shape != b.shape:
        return verdict(math.nan, math.nan, math.nan, f"shape {list(b.shape)} instead of {list(a.shape)}")
    if a.dtype != b.dtype and not (a.dtype.kind in "OUS" and b.dtype.kind in "OUS"):
        return verdict(math.nan, math.nan, math.nan, f"type {b.dtype} instead of {a.dtype}")
    if a.size == 0:
        return verdict(0.0, 0.0, 0.0)
    if a.dtype.kind in "OUS":
        same = bool(np.all(a.astype(object) == b.astype(object)))
        return verdict(0.0, 0.0, 0.0, "" if same else "other strings")
    if a.dtype.kind in "iub":
        unequal = a != b
        x, y = (np.where(unequal, values, 0).astype(np.longdouble) for values in (a, b))
        scale, error = float(np.max(np.abs(a.astype(np.longdouble)))), float(np.max(np.abs(x - y)))
        return verdict(error, scale, error / max(scale, LEAST_SCALE) if error else 0.0)
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    x, y = a.astype(wide), b.astype(wide)
    finite = np.isfinite(x)
    special = ~finite | ~np.isfinite(y)
    wrong = special & (x != y) & ~(np.isnan(x) & np.isnan(y))
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        return verdict(math.inf, math.nan, math.inf, f"{y.flat[at]} instead of {x.flat[at]} at element {at}")
    scale = float(np.max(np.abs(x[finite]), initial=0.0))
    error = float(np.max(np.abs(x[finite] - y[finite]), initial=0.0))
    return verdict(error, scale, error / max(scale, LEAST_SCALE) if error else 0.0)


def same_ranks(expected: np.ndarray, found: np.ndarray, numbers: np.ndarray, limit: float = LIMIT) -> bool:
    """Whether two lists of places of the largest numbers, each (..., K), differ only in the order of equal ones.

    numbers: those at `expected`, (..., K) in falling or rising order; equal are neighbours that rounding, an error of
    `limit` times the largest, can exchange. The last may be equal to one that is not in the list.
    """
    rows = (array.reshape(-1, array.shape[-1]) for array in (expected, found, numbers))
    for a, b, values in zip(*rows, strict=True):
        if np.array_equal(a, b):
            continue
        wide = values.astype(np.float64)
        if not np.isfinite(wide).all() or len(set(b.tolist())) < len(b):
            return False
        apart = np.abs(np.diff(wide)) > 2 * limit * np.abs(wide).max()
        runs = np.concatenate([[0], np.cumsum(apart)])
        for run in range(runs[-1]):  # the last run may hold others
            if set(a[runs == run].tolist()) != set(b[runs == run].tolist()):
                return False
        kept = set(b[runs == runs[-1]].tolist())
        if kept & set(a[runs != runs[-1]].tolist()):
            return False
    return True


def _limit(dtype: np.dtype[Any]) -> float:
    narrow = dtype == np.float16 or dtype.name in ("bfloat16",) or dtype.name.startswith("float8")
    return FLOAT16_LIMIT if narrow else LIMIT


def _sequence(name: str, expected: Any, found: Any, limit: float | None) -> Difference:
    size = len(expected) if expected is not None else 0
    if expected is None or not isinstance(found, list | tuple) or len(found) != size:
        same = expected is None and found is None
        return Difference(name, (size,), 0.0, 0.0, 0.0, limit or LIMIT, "" if same else "another sequence")
    parts = [difference(name, e, f, limit) for e, f in zip(expected, found, strict=True)]
    worst = max(parts, key=lambda o: (bool(o.note), o.relative), default=None)
    return worst or Difference(name, (0,), 0.0, 0.0, 0.0, limit or LIMIT)
