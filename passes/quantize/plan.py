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

TABLE_BITS = 8  # of the numbers in tables
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
class TablePlan:
    """How a table is stored. codes: of its rows, (rows, numbers of a row) without zero points; None where a file says
    `shared`. products: layers whose weight the same constant is. shared: the layer whose codes are the table's; None:
    its own are. decibels: of the table above its error."""

    codes: Codes | None
    products: tuple[str, ...]
    shared: str | None
    decibels: float

    @property
    def detail(self) -> str:
        """For the report."""
        above = f"{self.decibels:.1f} dB above its error" if np.isfinite(self.decibels) else "without error"
        shared = f", the codes of {self.shared!r}" if self.shared else ""
        return f"{TABLE_BITS}-bit rows with a scale each{shared}; table {above}"


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
    """layers: by site. values: by name. kept: layers and tables that stay in float -> why. timing: by site, of those
    measured. tables: by name."""

    edits: tuple[Edit, ...] = ()
    layers: Mapping[str, LayerPlan] = field(default_factory=dict)
    values: Mapping[str, Point] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    stats: Mapping[str, int | float | str] = field(default_factory=dict)
    timing: Mapping[str, Timed] = field(default_factory=dict)
    tables: Mapping[str, TablePlan] = field(default_factory=dict)

    def without(self, reasons: Mapping[str, str]) -> Plan:
        """The same with these layers and tables in float, and tables that are the weight of one of these layers: they
        are stored in float anyway."""
        kept, tables = {**self.kept, **reasons}, {}
        for name, table in self.tables.items():
            lost = next((site for site in table.products if site in reasons), None)
            if lost is not None:
                kept.setdefault(name, read_by_float(lost))
            elif name not in reasons:
                tables[name] = replace(table, shared=None) if table.shared in reasons else table
        layers = {site: layer for site, layer in self.layers.items() if site not in reasons}
        return replace(self, layers=layers, kept=kept, tables=tables)

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
        tables = {}
        for name, table in self.tables.items():
            tables[name] = [list(table.products), table.shared, table.decibels]
            if table.shared is None:
                assert table.codes is not None
                arrays.update({f"{name}|rows": table.codes.codes, f"{name}|row_scale": table.codes.scale})
        text = json.dumps({
            "layers": layers, "edits": edits, "values": values, "kept": dict(self.kept), "timing": timing,
            "tables": tables,
        })  # fmt: skip
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
            tables = {}
            for name, (products, shared, decibels) in text.get("tables", {}).items():
                own = None if shared else _rows(arrays[f"{name}|rows"], arrays[f"{name}|row_scale"])
                tables[name] = TablePlan(own, tuple(products), shared, decibels)
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"{path}: holds no plan of dynaquant ({error}); expected what a run wrote") from error
        stats = {name: value for name, value in found.stats.items() if name != PLAN}
        return cls(edits, layers, values, kept, stats, timing, tables)


def read_by_float(site: str) -> str:
    """Why a table stays in float that is the weight of a layer that does."""
    return f"it is the weight of {site!r} too, which stays in float"


def _rows(codes: np.ndarray, scale: np.ndarray) -> Codes:
    return Codes(codes, scale, np.zeros(scale.shape, np.int32), 0)
