"""What was decided about a model, as a value and as a file: enough to rewrite it again without any inputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

import numpy as np

from ..base import Weights
from ..errors import WeightsError
from ..weights import load_weights, save_weights
from .scales import Codes

PLAN = "plan"  # the entry of the file's figures that holds what is not an array


@dataclass(frozen=True)
class Edit:
    """A change of the float model that leaves its function as it is.

    kind: smooth or equalise. sites: the values and layers that it is about. factors: (channels,) float32.
    """

    kind: str
    sites: tuple[str, ...]
    factors: np.ndarray


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is quantized. bits: of its weights. codes: of its weight as a matrix. data: whether it reads codes
    and computes in whole numbers. bias: float32, where it is not the model's own. detail: for the report."""

    bits: int
    codes: Codes
    data: bool
    bias: np.ndarray | None = None
    detail: str = ""


@dataclass(frozen=True)
class Point:
    """Scale and zero point of a value, and the bits of its codes."""

    scale: float
    zero: int
    bits: int


@dataclass(frozen=True)
class Timed:
    """What was measured of a layer. bits: of its weights in codes. decibels: of its result above its error. coded,
    plain: seconds in codes and in float; None where no kernel is known to be its own. decision: codes or float, and
    why."""

    bits: int
    decibels: float | None
    coded: float | None
    plain: float | None
    decision: str


@dataclass(frozen=True)
class Plan:
    """layers: by site. values: by name. kept: layers that stay in float -> why. timing: by site, of those measured."""

    edits: tuple[Edit, ...] = ()
    layers: Mapping[str, LayerPlan] = field(default_factory=dict)
    values: Mapping[str, Point] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    stats: Mapping[str, int | float | str] = field(default_factory=dict)
    timing: Mapping[str, Timed] = field(default_factory=dict)

    def without(self, reasons: Mapping[str, str]) -> Plan:
        """The same with these layers in float."""
        layers = {site: layer for site, layer in self.layers.items() if site not in reasons}
        return replace(self, layers=layers, kept={**self.kept, **reasons})

    def save(self, path: Path, record: str) -> None:
        """Write an .npz file. record: the options that the plan is for."""
        arrays: dict[str, np.ndarray] = {}
        layers = {}
        for site, layer in self.layers.items():
            codes = layer.codes
            arrays.update({f"{site}|codes": codes.codes, f"{site}|scale": codes.scale})
            if codes.codes.dtype == np.uint8:
                arrays[f"{site}|zero"] = codes.zero.astype(np.uint8)
            if layer.bias is not None:
                arrays[f"{site}|bias"] = layer.bias
            layers[site] = [layer.bits, codes.block, layer.data, layer.detail]
        edits = []
        for number, edit in enumerate(self.edits):
            arrays[f"{number}|edit"] = edit.factors
            edits.append([edit.kind, list(edit.sites)])
        values = {name: [point.scale, point.zero, point.bits] for name, point in self.values.items()}
        timing = {site: list(astuple(timed)) for site, timed in self.timing.items()}
        text = json.dumps(
            {"layers": layers, "edits": edits, "values": values, "kept": dict(self.kept), "timing": timing}
        )
        save_weights(Weights(arrays, tuple(self.layers), record, {**self.stats, PLAN: text}), path)

    @classmethod
    def load(cls, path: Path, record: str) -> Plan:
        """Raises WeightsError when the file is none or is of other options."""
        found = load_weights(path)
        if found.record != record:
            raise WeightsError(f"{path}: is of {found.record}, not of {record}")
        arrays = found.arrays
        try:
            text = json.loads(str(found.stats[PLAN]))
            layers = {}
            for site, (bits, block, data, detail) in text["layers"].items():
                scale = arrays[f"{site}|scale"]
                zero = arrays.get(f"{site}|zero", np.zeros(scale.shape)).astype(np.int32)
                codes = Codes(arrays[f"{site}|codes"], scale, zero, block)
                layers[site] = LayerPlan(bits, codes, data, arrays.get(f"{site}|bias"), detail)
            edits = tuple(
                Edit(kind, tuple(sites), arrays[f"{i}|edit"]) for i, (kind, sites) in enumerate(text["edits"])
            )
            values = {name: Point(*point) for name, point in text["values"].items()}
            kept = dict(text["kept"])
            timing = {site: Timed(*timed) for site, timed in text.get("timing", {}).items()}
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"{path}: holds no plan of dynaquant ({error}); expected what a run wrote") from error
        stats = {name: value for name, value in found.stats.items() if name != PLAN}
        return cls(edits, layers, values, kept, stats, timing)
