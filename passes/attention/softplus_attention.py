"""The pass `softplus-attention`: softmax attention -> softplus attention, with or without re-weighting."""

from __future__ import annotations

import enum
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from .. import graph
from ..base import LearnedPass, PassContext, PassReport, Train, TrainingJob, Weights
from ..errors import PassError
from ..ops.softplus_attention import (
    END,
    NO,
    REWEIGHTED_SOFTPLUS_ATTENTION,
    SOFTPLUS_ATTENTION,
    START,
)
from ..recognise.attention import RecogniseAttention
from ..recognise.matching import Refused, Writer
from ..weights import put_weights
from .sites import all_weights, attentions, block_of

RULE = "attention"
BY_HEADS = (0, 2, 1, 3)
COMPUTED = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class Variant(enum.Enum):
    LSSA = "lssa"
    LSSAR = "lssar"


@dataclass(frozen=True)
class SoftplusAttention(LearnedPass):
    """Softmax attention becomes softplus attention (LSSA), or that with re-weighting (LSSAR), and learns to be alike.

        Y = Attention (Q, K, V)    ->    Y = graphwright.ReweightedSoftplusAttention <power = 3> (Q, K, V, mask)

        LSSA    A_ij = softplus(log d · log N_i · q̂_i·k̂_j), over the row's sum; q̂, k̂ of length 1, N_i keys seen by i
        LSSAR   relu(A_ij · N_i - 1)^power, over the row's sum

    It is another function: a network that was trained with softmax has to be trained on. From the inputs given by
    --calibration, each replaced attention first learns, with its projections, to give what it gave on the original's
    inputs; then the whole model learns to give the original's outputs. The result is a file of weights beside the
    output, and the pipeline that is recorded names it: `weights=FILE` repeats the result without training.
    Attention that is written out in small operators is recognised first, as by recognise-attention. The operators have
    bodies of standard operators: the file stays plain ONNX.
    Left alone: attention with softcap, with a window, in float64, and one whose products are used elsewhere; while
    learning also those inside bodies of If, Loop, Scan and functions.

    Source: Gao and Spratling, "Softplus Attention with Re-weighting", arXiv 2501.13428.

    Options: variant: lssa or lssar. power: of the re-weighting; the authors take 3 for short and 15 for long contexts.
    layers: all, auto, or their numbers from 0 in the order of the graph, joined by +; auto keeps softmax where, after
    the blocks have learned, the replacement hurts the outputs most. keep: how many layers auto leaves; by default
    a third. recover: none, blocks or full. train: blocks or all. block_steps, steps, batch, rate, loss, outputs: of
    the training.
    """

    name: ClassVar[str] = "softplus-attention"

    variant: Variant = Variant.LSSAR
    power: int = 3
    layers: str = "all"  # all, auto, or numbers joined by +
    keep: int | None = None  # how many layers auto leaves

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.power <= 64:
            raise ValueError(f"power is {self.power}, must be from 1 to 64")
        if self.layers not in ("all", "auto") and not all(part.isdecimal() for part in self.layers.split("+")):
            raise ValueError(f"layers is {self.layers!r}, must be all, auto, or numbers joined by + such as 0+2+5")
        if self.keep is not None and (self.keep < 0 or self.layers != "auto"):
            raise ValueError("keep is how many layers layers=auto leaves, at least 0")
        if self.layers == "auto" and self.recover.value == "none" and not self.weights:
            raise ValueError("layers=auto is decided by what was learned; give numbers with recover=none")

    @property
    def record(self) -> str:
        power = f":power={self.power}" if self.variant is Variant.LSSAR else ""
        return f"{self.name}:variant={self.variant.value}{power}"

    def prepare(self, model: ir.Model, ctx: PassContext) -> TrainingJob:
        teacher = model.clone()
        RecogniseAttention().run(teacher, ctx)
        blocks = tuple(
            block_of(node)
            for node, scope in attentions(teacher)
            if scope.parent is None and scope.function is None and _refusal(node) is None
        )
        blocks = tuple(block for i, block in enumerate(blocks) if self._numbers is None or i in self._numbers)
        keep = 0
        if self.layers == "auto":
            keep = math.ceil(len(blocks) / 3) if self.keep is None else min(self.keep, len(blocks))

        def student(sites: Collection[str]) -> ir.Model:
            copy = teacher.clone()
            self._rewrite(copy, sites, self.report())
            return copy

        return TrainingJob(
            teacher, blocks, student, self.record,
            weights=all_weights(teacher) if self.train is Train.ALL else (), keep=keep, outputs=self.outputs,
            loss=self.loss, block_steps=self.block_steps, steps=self.steps if self.recover.value == "full" else 0,
            batch=self.batch, rate=self.rate,
        )  # fmt: skip

    def convert(self, model: ir.Model, weights: Weights | None, ctx: PassContext) -> PassReport:
        report = self.report()
        if weights is not None and not weights.sites:
            self._rewrite(model.clone(), (), report)  # only says why not
            return report
        RecogniseAttention().run(model, ctx)
        if weights is not None:
            put_weights(weights, model)
        self._rewrite(model, None if weights is None else weights.sites, report)
        return report

    @property
    def _numbers(self) -> set[int] | None:
        """The layers that are named; None: not by number."""
        return None if self.layers in ("all", "auto") else {int(part) for part in self.layers.split("+")}

    def _rewrite(self, model: ir.Model, sites: Collection[str] | None, report: PassReport) -> None:
        """Replace the attentions at `sites`, or with None those that `layers` names, and say what became of all."""
        operator = SOFTPLUS_ATTENTION if self.variant is Variant.LSSA else REWEIGHTED_SOFTPLUS_ATTENTION
        names, index, done = graph.Names(model), 0, set()
        for node, scope in attentions(model):
            site = graph.site(node)
            reason = _refusal(node)
            number, inner = index, scope.parent is not None or scope.function is not None
            if reason is None and not inner:
                index += 1
            if reason is None and sites is None and self._numbers is not None and number not in self._numbers:
                reason = f"layer {number} is not among layers={self.layers}"
            if reason is None and sites is not None and site not in sites:
                where = "inside a body, which cannot be trained by itself; recover=none reaches it"
                reason = where if inner else f"layer {number} stays softmax"
            if reason is not None:
                report.skipped(RULE, site, reason)
                continue
            _replace(node, scope, names, operator.identifier, self.power if self.variant is Variant.LSSAR else None)
            if scope.function is not None:
                scope.function.opset_imports[operator.domain] = operator.version
            done.add(site)
            report.changed(RULE, site, f"layer {number}: {self.variant.value}")
        missing = set(sites or ()) - done
        if missing:
            raise PassError(f"the weights are for another model or preset: it has no attention {sorted(missing)[0]!r}")
        if done:
            operator.add_to(model)


def _refusal(node: ir.Node) -> str | None:
    """Why an Attention is left alone; None when it is not."""
    try:
        _check(node)
    except (Refused, ValueError) as error:
        return str(error)
    return None


def _check(node: ir.Node) -> None:
    if graph.has_references(node):
        raise Refused("an attribute is a parameter of the function")
    q, k, v = (graph.input_of(node, i) for i in range(3))
    if any(value is None or graph.rank(value) not in (3, 4) for value in (q, k, v)):
        raise Refused("the rank of query, key or value is not known; run infer-shapes first")
    assert q is not None
    if q.dtype is not None and q.dtype not in COMPUTED:
        raise Refused(f"{q.dtype.name.lower()} input, softplus attention is computed in float32")
    if graph.attribute(node, "softcap", 0.0):
        raise Refused("it caps its scores, which softplus attention does not")
    if graph.input_of(node, 6) is not None:
        raise Refused("it is told how many keys there are")
    if any(graph.attribute(node, name, -1) != -1 for name in ("left_window_size", "right_window_size")):
        raise Refused("it sees a window")
    if len(node.outputs) > 3 and graph.is_used(node.outputs[3]):
        raise Refused(f"its products {node.outputs[3].name} are used elsewhere")
    heads = [_heads(node, i) for i in range(3)]
    if None in heads:
        raise Refused("the number of heads is not known")
    if heads[1] != heads[2] or heads[0] % heads[1]:  # type: ignore[operator]  # both are known
        raise Refused(f"{heads[0]} query heads do not fit {heads[1]} and {heads[2]} key and value heads")
    if heads[0] != heads[1] and any(_size(node, i) is None for i in (1, 2)):
        raise Refused("the size of a head is not known, so grouped keys cannot be repeated")


def _heads(node: ir.Node, index: int) -> int | None:
    """Heads of query (0), key (1) or value (2)."""
    value = node.inputs[index]
    assert value is not None and value.shape is not None
    if len(value.shape) == 3:
        return graph.attribute(node, "q_num_heads" if index == 0 else "kv_num_heads")
    return value.shape[1] if isinstance(value.shape[1], int) else None


def _size(node: ir.Node, index: int) -> int | None:
    value, heads = node.inputs[index], _heads(node, index)
    assert value is not None and value.shape is not None
    last = value.shape[-1]
    if not isinstance(last, int) or heads is None:
        return None
    return last // heads if len(value.shape) == 3 else last


def _replace(
    node: ir.Node, scope: graph.Scope, names: graph.Names, operator: tuple[str, str], power: int | None
) -> None:
    """Put the operator in the place of an Attention that `_check` has passed."""
    writer = Writer(scope, node, names)
    flat = graph.rank(node.inputs[0]) == 3
    q, k, v = (_by_heads(writer, node, i) for i in range(3))
    past = [graph.input_of(node, i) for i in (4, 5)]
    if past[0] is not None and past[1] is not None:
        k, v = (
            writer.op("Concat", old, new, axis=2, dtype=new.dtype, shape=[*_dims(new)[:2], None, _dims(new)[3]])
            for old, new in zip(past, (k, v), strict=True)
        )
    presents = (k, v)
    heads, shared = _heads(node, 0), _heads(node, 1)
    assert heads is not None and shared is not None
    if heads != shared:
        k, v = (_repeated(writer, x, heads, shared, _size(node, i) or 0) for i, x in ((1, k), (2, v)))
    causal = (END if past[0] is not None else START) if graph.attribute(node, "is_causal", 0) else NO
    mask = _mask(writer, graph.input_of(node, 3))
    attributes = {"causal": causal} if power is None else {"causal": causal, "power": power}
    dims = [*_dims(q)[:3], _dims(v)[3]]
    y = writer.op(operator[1], q, k, v, mask, dtype=q.dtype, shape=dims)
    made = y.producer()
    assert made is not None
    made.domain = operator[0]
    for key, number in attributes.items():
        made.attributes.add(ir.AttrInt64(key, number))
    graph.keep_metadata(node, made)
    if flat:
        y = writer.op("Transpose", y, perm=BY_HEADS, dtype=y.dtype, shape=[dims[0], dims[2], heads, dims[3]])
        y = writer.op("Reshape", y, writer.ints([0, 0, -1], "merged"), dtype=y.dtype, shape=node.outputs[0].shape)
    for old, new in zip(node.outputs[1:3], presents, strict=False):
        if graph.is_used(old):
            graph.replace_value(old, new)
    graph.replace_value(node.outputs[0], y, keep_name=True)
    graph.remove_node(node)


def _dims(value: ir.Value) -> list[int | ir.SymbolicDim | None]:
    return [None] * 4 if value.shape is None else list(value.shape)


def _by_heads(writer: Writer, node: ir.Node, index: int) -> ir.Value:
    """Query, key or value as (batch, heads, length, size)."""
    value, heads = node.inputs[index], _heads(node, index)
    assert value is not None and value.shape is not None and heads is not None
    if len(value.shape) == 4:
        return value
    batch, length, size = value.shape[0], value.shape[1], _size(node, index)
    apart = writer.op(
        "Reshape", value, writer.ints([0, 0, heads, -1], "heads"), dtype=value.dtype, shape=[batch, length, heads, size]
    )
    return writer.op("Transpose", apart, perm=BY_HEADS, dtype=value.dtype, shape=[batch, heads, length, size])


def _repeated(writer: Writer, x: ir.Value, heads: int, shared: int, size: int) -> ir.Value:
    """x with each of its heads as often as query heads share it."""
    batch, _, length, _ = _dims(x)
    group = heads // shared
    apart = writer.op("Unsqueeze", x, writer.ints([2], "axis"), dtype=x.dtype, shape=[batch, shared, 1, length, size])
    many = writer.op(
        "Expand", apart, writer.ints([1, 1, group, 1, 1], "group"), dtype=x.dtype,
        shape=[batch, shared, group, length, size],
    )  # fmt: skip
    target = writer.ints([0, heads, -1, size], "grouped")
    return writer.op("Reshape", many, target, dtype=x.dtype, shape=[batch, heads, length, size])


def _mask(writer: Writer, mask: ir.Value | None) -> ir.Value:
    """A mask of numbers to add, the lowest where a key is hidden."""
    if mask is None:
        return writer.constant(np.zeros((1, 1, 1, 1), np.float32), "mask")
    if mask.dtype == ir.DataType.BOOL:
        zero = writer.constant(np.array(0, np.float32), "zero")
        low = writer.constant(np.array(np.finfo(np.float32).min, np.float32), "hidden")
        return writer.op("Where", mask, zero, low, dtype=ir.DataType.FLOAT, shape=mask.shape)
    if mask.dtype not in (ir.DataType.FLOAT, None):
        return writer.op("Cast", mask, to=int(ir.DataType.FLOAT), dtype=ir.DataType.FLOAT, shape=mask.shape)
    return mask
