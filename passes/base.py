"""What a pass is: a small frozen value that rewrites an `onnx_ir.Model` and says what it did."""

from __future__ import annotations

import enum
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from . import spec
from .errors import PassError

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
    """What one run of a pass did. `stats` are counts and sizes by name; `seconds` is wall time. `rows`: a table of what
    was measured, a row for each site, all with the same columns.
    """

    spec: str
    contract: Contract
    changes: list[Change] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    stats: dict[str, int | float | str] = field(default_factory=dict)
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)

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
            **({"rows": list(self.rows)} if self.rows else {}),
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


class Evaluator(Protocol):
    """Runs any model and hands out values inside it, one sample and value at a time, in bounded memory."""

    def __call__(
        self, model: ir.Model, names: Sequence[str], feeds: Sequence[dict[str, np.ndarray]]
    ) -> Iterator[tuple[int, str, np.ndarray]]:
        """(number of the sample, name, array) for every name and every sample; the model stays as it is."""


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one model is as another: the median of pairs of turns, and the interval that holds it with
    95 % confidence."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}] times as fast"


class Stopwatch(Protocol):
    """Compiles models for the target and times them on this machine."""

    def compile(self, model: ir.Model) -> Any:
        """Something to hand to the other functions; the model stays as it is. Raises CompileError."""

    def layers(
        self, compiled: Sequence[Any], operations: Mapping[str, float], feeds: Mapping[str, np.ndarray]
    ) -> list[dict[str, float]]:
        """Seconds of each layer of each model, which take turns. operations: site -> operations on these inputs, of all
        layers in their order. A layer that no kernel can be told for is left out."""

    def ratio(self, candidate: Any, reference: Any, feeds: Mapping[str, np.ndarray]) -> Ratio:
        """How many times as fast `candidate` is as `reference`, which take turns."""


@dataclass(frozen=True)
class PassContext:
    """Everything a pass may read besides the model.

    pins: input name -> shape (ints), from --pin. calibration: input name -> list of arrays, one per sample.
    target: the target's name, or None when only the ONNX file is rewritten. caches, dot_bf16: of that target, the
    latter whether its processor multiplies pairs of bfloat16. seed: of every random choice.
    dry_run: report as usual, learn nothing; the caller throws the model away. trainer: fits what a learned pass asks
    for (`graphwright.models.fit.train`); None where nothing can be trained. evaluator: values inside a model
    (`graphwright.runtime.evaluator.evaluate`); None where nothing can be run. stopwatch: times models
    (`graphwright.runtime.stopwatch`); None without a target that this machine runs. output: what the result is called;
    learned weights are written beside it. overwrite: whether they may replace a file.
    """

    pins: Mapping[str, Sequence[int]] = field(default_factory=dict)
    calibration: Mapping[str, Sequence[np.ndarray]] | None = None
    target: str | None = None
    caches: Caches = field(default_factory=Caches)
    dot_bf16: bool = False
    seed: int = 0
    max_drop: float | None = None
    progress: Callable[[str], None] = field(default=lambda message: None, repr=False)
    dry_run: bool = False
    trainer: Callable[[TrainingJob | WidthJob, PassContext], Weights] | None = field(default=None, repr=False)
    evaluator: Evaluator | None = field(default=None, repr=False)
    stopwatch: Stopwatch | None = field(default=None, repr=False)
    output: Path = Path("model")
    overwrite: bool = False


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of a model. Subclasses are frozen dataclasses: their fields are the options.

    The class docstring is the help text: what it does, before -> after, what it leaves alone, its source.
    """

    name: ClassVar[str]
    contract: ClassVar[Contract]

    def needs(self) -> frozenset[str]:
        """What must be in the context, of {"calibration", "target", "samples", "times", "ranges", "widths", "learning",
        "recovery"}."""
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


class Recover(enum.Enum):
    """How a learned pass recovers what the rewrite loses."""

    NONE = "none"  # not at all
    BLOCKS = "blocks"  # each block by itself, on the inputs that it has in the original
    FULL = "full"  # the blocks, then the whole model


class Train(enum.Enum):
    """What may change besides what the pass replaces."""

    BLOCKS = "blocks"  # the weights of the blocks
    ALL = "all"  # after the blocks, every weight of products, sums and normalizations


class Loss(enum.Enum):
    """How far an output is from the original's. AUTO: by what the original gives."""

    AUTO = "auto"
    COSINE = "cosine"  # 1 - cosine of rows: embeddings
    KL = "kl"  # Kullback-Leibler divergence of the softmax of rows: logits
    MSE = "mse"  # mean squared error over the variance: everything else


@dataclass(frozen=True)
class Block:
    """A part of a graph that can learn by itself: from `inputs` to `output`, names that original and rewritten graph
    share. site: what is replaced in it. weights: the initializers in it that may change."""

    site: str
    inputs: tuple[str, ...]
    output: str
    weights: tuple[str, ...]


@dataclass(frozen=True)
class TrainingJob:
    """What a trainer needs: the original is the teacher, the rewritten graph the student.

    student: the teacher rewritten at some sites, whose initializers have the teacher's names. weights: those that may
    change when the whole model learns, beyond the blocks'. keep: at how many sites the student may stay the original,
    where its damage is greatest. outputs: those that count; empty: all of floats. record: the options that the weights
    are for. epsilon: of AdamW, below which a gradient counts for less.
    """

    teacher: ir.Model
    blocks: tuple[Block, ...]
    student: Callable[[Collection[str]], ir.Model]
    record: str
    weights: tuple[str, ...] = ()
    keep: int = 0
    outputs: tuple[str, ...] = ()
    loss: Loss = Loss.AUTO
    block_steps: int = 0
    steps: int = 0
    batch: int = 32
    rate: float = 1e-4
    epsilon: float = 1e-8


@dataclass(frozen=True)
class WidthJob:
    """What a trainer needs to choose between two widths of products, for all inputs or for each.

    model: the original. parts: output of a product -> the two parts of its weight (inputs, outputs), the second of
    which counts where the product is wide. groups: products that have one width. led: how many of the first groups
    are wide for every input, because they come before what the others are chosen by. features: a value (1, rows, n) of
    the model, of which each row chooses. mean: bits of a weight on the average, of `bits`, those of a narrow and of a
    wide one. learn: whether widths for each input are learned too.
    """

    model: ir.Model
    parts: Mapping[str, tuple[np.ndarray, np.ndarray]]
    groups: tuple[tuple[str, ...], ...]
    led: int
    features: str
    mean: float
    bits: tuple[int, int]
    record: str
    learn: bool = True
    hidden: int = 32
    steps: int = 0
    rate: float = 1e-3


@dataclass(frozen=True)
class Weights:
    """What was learned: initializer -> array, the sites that are replaced, and figures of the training. `record`: the
    options they are for."""

    arrays: Mapping[str, np.ndarray]
    sites: tuple[str, ...]
    record: str
    stats: Mapping[str, int | float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class LearnedPass(Pass):
    """A pass that puts another function in the place of what it finds, and learns to make it behave the same.

    `prepare` says what there is to learn, a trainer outside learns it, `convert` rewrites with the result. The weights
    are kept in a file, and the pass reports itself with `weights=FILE`: a run of that spec trains nothing and gives
    the same bytes.
    """

    contract: ClassVar[Contract] = Contract.LEARNED

    weights: str | None = None  # a file that an earlier run has written; nothing is trained
    recover: Recover = Recover.FULL  # none, blocks or full
    train: Train = Train.BLOCKS  # what may change: blocks, or all
    block_steps: int = 400  # steps of the blocks
    steps: int = 800  # steps of the whole model
    batch: int = 32  # samples of a step
    rate: float = 2e-4  # learning rate of the whole model; blocks take five times that
    loss: Loss = Loss.AUTO  # of the outputs: auto, cosine, kl or mse
    outputs: tuple[str, ...] = ()  # outputs that count, joined by +; by default all of floats

    def __post_init__(self) -> None:
        for name, least in (("block_steps", 0), ("steps", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least {least}")
        if not 0 < self.rate < 1:
            raise ValueError(f"rate is {self.rate}, must be between 0 and 1")

    def needs(self) -> frozenset[str]:
        return frozenset() if self.weights or self.recover is Recover.NONE else frozenset({"recovery"})

    @property
    @abstractmethod
    def record(self) -> str:
        """The options that learned weights depend on, as text: weights of another record do not fit."""

    @abstractmethod
    def prepare(self, model: ir.Model, ctx: PassContext) -> TrainingJob:
        """What there is to learn; the model stays as it is. Without blocks nothing is trained."""

    @abstractmethod
    def convert(self, model: ir.Model, weights: Weights | None, ctx: PassContext) -> PassReport:
        """Rewrite the model with learned weights, or with None as it is: every site, nothing learned."""

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        from . import io
        from .weights import load_weights, save_weights

        if self.weights:
            weights = load_weights(Path(self.weights))
            if weights.record != self.record:
                raise PassError(f"{self.weights}: learned for {weights.record}, not for {self.record}")
            report = self.convert(model, weights, ctx)
            report.stats.update(weights.stats)
            return report
        if self.recover is Recover.NONE or ctx.dry_run:
            return self.convert(model, None, ctx)
        if ctx.trainer is None:
            raise PassError("nothing here can train; use the command optimize, weights=FILE.npz or recover=none")
        path = ctx.output.with_name(f"{ctx.output.name}.{self.name}.npz")
        if spec.SEPARATOR in str(path) or "," in str(path):
            raise PassError(f"{path}: a path with {spec.SEPARATOR!r} or ',' cannot be recorded; choose another output")
        io.check_output(path, ctx.overwrite)
        io.check_folder(path.parent)
        job = self.prepare(model, ctx)
        if not job.blocks:
            return self.convert(model, Weights({}, (), self.record), ctx)
        weights = ctx.trainer(job, ctx)
        replay = replace(self, weights=str(path))
        save_weights(weights, path)
        report = replay.convert(model, load_weights(path), ctx)
        report.spec = str(replay)
        report.stats.update(weights.stats)
        return report
