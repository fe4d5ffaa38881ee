"""What a pass is: a small frozen value that rewrites an `onnx_ir.Model` and says what it did."""

from __future__ import annotations

import enum
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from . import spec

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from onnxscript.rewriter import pattern

log = logging.getLogger("graphwright")


class Contract(enum.Enum):
    """What a pass promises about the numbers, and so the limit its result is checked against."""

    EXACT = "exact"  # the same operations on the same numbers
    ROUNDING = "rounding"  # equal in real arithmetic
    LOSSY = "lossy"  # error measured against a budget
    LEARNED = "learned"  # another function, fitted

    @property
    def limit(self) -> float | None:
        """Largest error allowed, relative to the output's scale (max |reference|); None: the budget decides."""
        return {Contract.EXACT: 1e-5, Contract.ROUNDING: 1e-4}.get(self)


@dataclass(frozen=True)
class Change:
    """One site that was rewritten. `value` is the output value's name, which identifies a site."""

    rule: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Skip:
    """One site that was looked at and left alone, with the first condition that failed."""

    rule: str
    value: str
    reason: str


@dataclass
class PassReport:
    """What one run of a pass did. `stats` are counts and sizes by name; `seconds` is wall time."""

    spec: str
    contract: Contract
    changes: list[Change] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    stats: dict[str, int | float | str] = field(default_factory=dict)
    seconds: float = 0.0

    def changed(self, rule: str, value: str | None, detail: str = "") -> None:
        self.changes.append(Change(rule, value or "", detail))

    def skipped(self, rule: str, value: str | None, reason: str) -> None:
        self.skips.append(Skip(rule, value or "", reason))

    def to_json(self) -> dict[str, Any]:
        return {
            "spec": self.spec,
            "contract": self.contract.value,
            "changes": [[c.rule, c.value, c.detail] for c in self.changes],
            "skips": [[s.rule, s.value, s.reason] for s in self.skips],
            "stats": dict(self.stats),
            "seconds": round(self.seconds, 4),
        }


@dataclass(frozen=True)
class Caches:
    """Data cache sizes of a target in bytes; 0 where it has none."""

    l1: int = 32 << 10
    l2: int = 1 << 20
    l3: int = 8 << 20

    @property
    def last_level(self) -> int:
        return max(self.l1, self.l2, self.l3)


@dataclass(frozen=True)
class PassContext:
    """Everything a pass may read besides the model.

    pins: input name -> shape (ints), from --pin. calibration: input name -> list of arrays, one per sample.
    target: the target's name, or None when only the ONNX file is rewritten. seed: of every random choice.
    dry_run: report as usual; the caller throws the model away.
    """

    pins: Mapping[str, Sequence[int]] = field(default_factory=dict)
    calibration: Mapping[str, Sequence[np.ndarray]] | None = None
    target: str | None = None
    caches: Caches = field(default_factory=Caches)
    seed: int = 0
    max_drop: float | None = None
    progress: Callable[[str], None] = field(default=lambda message: None, repr=False)


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of a model. Subclasses are frozen dataclasses: their fields are the options.

    The class docstring is the help text: what it does, before -> after, what it leaves alone, its source.
    """

    name: ClassVar[str]
    contract: ClassVar[Contract]

    def needs(self) -> frozenset[str]:
        """What must be in the context: a subset of {"calibration", "target"}."""
        return frozenset()

    @abstractmethod
    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Rewrite `model` in place (subgraphs and functions too) and report every site."""

    def report(self) -> PassReport:
        """An empty report of this pass."""
        return PassReport(str(self), self.contract)

    def __str__(self) -> str:
        options = spec.format_options(self)
        return f"{self.name}{spec.SEPARATOR}{options}" if options else self.name


class RulePass(Pass):
    """A pass that is only a set of rewrite rules; every refusal of a rule becomes a Skip with its reason."""

    @abstractmethod
    def rules(self) -> Sequence[pattern.RewriteRule]:
        """The rules in order of preference."""

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        from .rules import apply_rules

        report = self.report()
        apply_rules(self.rules(), model, report)
        return report
