"""Weights that are stored once and read at one of two widths: 4 bits, and 4 more for what those leave.

The first 4 bits are what `dynaquant:weights=4:activations=none` makes, rounded together with those of their row. The
second are rounded to what is left, in steps of a part (1 / RATIO) of the same scale. With half a step's overlap on each
side no remainder of a weight that was rounded away from its nearest code is cut off, but for few.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..base import Weights
from ..errors import PassError, WeightsError
from ..weights import load_weights, save_weights
from .layers import Layer
from .rounding import round_together
from .scales import Codes, fit_weights, quantize, weight_grid

BITS = 4  # of each part
RATIO = 8  # steps of the second part in one of the first
ABOUT = "nested"  # the entry of the file's figures that holds what is not an array


@dataclass(frozen=True)
class Nested:
    """A matrix (channels, inputs) in two parts. codes: the first, with scales and zeros. rest: int8, the second."""

    codes: Codes
    rest: np.ndarray

    @property
    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """What each part stands for, float32 (inputs, channels)."""
        scale = self.codes.scale / np.float32(RATIO)
        second = Codes(self.rest, scale, np.zeros_like(self.codes.zero), self.codes.block)
        first, rest = self.codes.values, second.values
        return np.ascontiguousarray(first.T), np.ascontiguousarray(rest.T)


def nest(
    matrix: np.ndarray, block: int, importance: np.ndarray | None, gram: np.ndarray | None, codes: Codes | None = None
) -> Nested:
    """importance: (1, inputs) mean squares of the data; gram: X'X. None: without inputs. codes: the first part, where
    it is known."""
    grid, rest_grid = weight_grid(BITS, symmetric=False), weight_grid(BITS)
    if codes is None:
        codes = fit_weights(matrix, grid, block, importance)
        if gram is not None:
            codes = round_together(matrix, codes, grid, gram)
    left = matrix - codes.values
    scale = codes.scale / np.float32(RATIO)
    steps = np.repeat(scale, block, 1)[:, : matrix.shape[1]]
    rest = Codes(quantize(left, steps, 0, rest_grid).astype(np.int8), scale, np.zeros_like(codes.zero), block)
    if gram is not None:
        rest = round_together(left, rest, rest_grid, gram)
    return Nested(codes, rest.codes)


@dataclass(frozen=True)
class Selector:
    """relu(features · w1 + b1) · w2 + b2: scores (groups, choices), the greatest of which is a group's width.

    features: the product by whose data is chosen. first (n, hidden) and its bias, second (hidden, groups * choices) and
    its bias, float32.
    """

    features: str
    first: np.ndarray
    first_bias: np.ndarray
    second: np.ndarray
    second_bias: np.ndarray


def fingerprint(layer: Layer) -> str:
    """What a weight is known by."""
    return hashlib.sha256(layer.matrix(layer.weight()).tobytes()).hexdigest()


def _fits(layer: Layer | None, made: Nested) -> bool:
    return layer is not None and (layer.channels, layer.size // layer.channels) == made.rest.shape


ARRAYS = ("first", "first_bias", "second", "second_bias")


@dataclass(frozen=True)
class NestedPlan:
    """layers: output of a product -> its weight. groups: products that have one width, of which the selector does not
    choose for the first `led`. wide: the groups that are wide where widths are chosen once; None: that was not asked
    for. kept: products that stay as they are -> why. prints: output of a product -> what its weight is known by where
    the product has another name, as in another graph of the same generator."""

    layers: Mapping[str, Nested]
    groups: tuple[tuple[str, ...], ...]
    wide: tuple[int, ...] | None = None
    led: int = 0
    selector: Selector | None = None
    kept: Mapping[str, str] = field(default_factory=dict)
    stats: Mapping[str, int | float | str] = field(default_factory=dict)
    prints: Mapping[str, str] = field(default_factory=dict)

    def matched(self, layers: Sequence[Layer]) -> dict[str, Layer]:
        """Output of a product in the plan -> the model's product. Raises PassError where the plan is for another."""
        by_name = {layer.site: layer for layer in layers if layer.is_product}
        found = {site: by_name[site] for site, made in self.layers.items() if _fits(by_name.get(site), made)}
        if len(found) < len(self.layers):
            by_print = {fingerprint(layer): layer for layer in by_name.values()}
            found = {site: by_print[key] for site, key in self.prints.items() if key in by_print}
        missing = [site for site in self.layers if site not in found]
        if missing:
            raise PassError(f"the plan is for another model or preset: this one has no such product {missing[0]!r}")
        return found

    def bits(self, wide: Sequence[int]) -> float:
        """Mean bits of a weight that are read where these groups are wide."""
        sizes = [sum(self.layers[site].rest.size for site in group) for group in self.groups]
        return BITS * (1 + sum(sizes[i] for i in wide) / max(sum(sizes), 1))

    def save(self, path: Path, record: str) -> None:
        """Write an .npz file. record: the options that the plan is for."""
        arrays: dict[str, np.ndarray] = {}
        for site, layer in self.layers.items():
            codes = layer.codes
            # Two codes of 4 bits in a byte.
            both = codes.codes | (layer.rest.astype(np.int16) + 8).astype(np.uint8) << 4
            arrays.update({f"{site}|codes": both, f"{site}|scale": codes.scale})
            arrays[f"{site}|zero"] = codes.zero.astype(np.uint8)
        about: dict[str, object] = {
            "groups": self.groups, "wide": self.wide, "led": self.led, "kept": dict(self.kept),
            "prints": dict(self.prints), "blocks": {site: layer.codes.block for site, layer in self.layers.items()},
        }  # fmt: skip
        if self.selector is not None:
            about["features"] = self.selector.features
            arrays.update({f"|{name}": getattr(self.selector, name) for name in ARRAYS})
        stats = {**self.stats, ABOUT: json.dumps(about)}
        save_weights(Weights(arrays, tuple(self.layers), record, stats), path)

    @classmethod
    def load(cls, path: Path, record: str) -> NestedPlan:
        """Raises WeightsError when the file is none or is of other options."""
        found = load_weights(path)
        if found.record != record:
            raise WeightsError(f"{path}: is of {found.record}, not of {record}")
        arrays = found.arrays
        try:
            about = json.loads(str(found.stats[ABOUT]))
            layers = {}
            for site, block in about["blocks"].items():
                both, scale = arrays[f"{site}|codes"], arrays[f"{site}|scale"]
                codes = Codes(both & 15, scale, arrays[f"{site}|zero"].astype(np.int32), block)
                layers[site] = Nested(codes, (both >> 4).astype(np.int8) - np.int8(8))
            selector = None
            if "features" in about:
                selector = Selector(about["features"], *(arrays[f"|{name}"] for name in ARRAYS))
            groups = tuple(tuple(group) for group in about["groups"])
            stats = {name: value for name, value in found.stats.items() if name != ABOUT}
            wide = None if about["wide"] is None else tuple(about["wide"])
            kept, prints = dict(about["kept"]), dict(about.get("prints", {}))
            return cls(layers, groups, wide, about["led"], selector, kept, stats, prints)
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(
                f"{path}: holds no plan of nested-widths ({error}); expected what a run wrote"
            ) from error
