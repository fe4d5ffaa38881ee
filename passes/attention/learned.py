"""What learned passes over attention share: layers, what there is to learn, heads as the operators take them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from .. import graph
from ..base import LearnedPass, PassContext, PassReport, Train, TrainingJob, Weights
from ..errors import PassError
from ..ops.base import CustomOp
from ..recognise.attention import RecogniseAttention
from ..recognise.matching import Refused, Writer
from ..weights import put_weights
from .sites import all_weights, attentions, block_of

RULE = "attention"
BY_HEADS = (0, 2, 1, 3)
COMPUTED = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class LearnedAttention(LearnedPass):
    """A learned pass that puts an operator of graphwright's own in the place of the standard's Attention.

    Subclasses have the options `layers` and `keep`, say which operator it is and write it.
    """

    layers: str  # all, auto, or numbers joined by +
    keep: int | None  # how many layers auto leaves

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers not in ("all", "auto") and not all(part.isdecimal() for part in self.layers.split("+")):
            raise ValueError(f"layers is {self.layers!r}, must be all, auto, or numbers joined by + such as 0+2+5")
        if self.keep is not None and (self.keep < 0 or self.layers != "auto"):
            raise ValueError("keep is how many layers layers=auto leaves, at least 0")
        if self.layers == "auto" and self.recover.value == "none" and not self.weights:
            raise ValueError("layers=auto is decided by what was learned; give numbers with recover=none")

    @property
    @abstractmethod
    def operator(self) -> CustomOp:
        """What takes the place of Attention."""

    @property
    @abstractmethod
    def detail(self) -> str:
        """What the report says of a site that was replaced."""

    @abstractmethod
    def put(self, writer: Writer, node: ir.Node, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        """Write the operator, with rows by heads, as many for keys as for queries: (batch, heads, length, size)."""

    def check(self, node: ir.Node) -> None:
        """Raises Refused with the first condition that an Attention does not meet."""
        what = self.name.replace("-", " ")
        if graph.has_references(node):
            raise Refused("an attribute is a parameter of the function")
        q, k, v = (graph.input_of(node, i) for i in range(3))
        if any(value is None or graph.rank(value) not in (3, 4) for value in (q, k, v)):
            raise Refused("the rank of query, key or value is not known; run infer-shapes first")
        assert q is not None
        if q.dtype is not None and q.dtype not in COMPUTED:
            raise Refused(f"{q.dtype.name.lower()} input, {what} is computed in float32")
        if graph.attribute(node, "softcap", 0.0):
            raise Refused(f"it caps its scores, which {what} does not")
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
        if heads[0] != heads[1] and any(size_of(node, i) is None for i in (1, 2)):
            raise Refused("the size of a head is not known, so grouped keys cannot be repeated")

    def prepare(self, model: ir.Model, ctx: PassContext) -> TrainingJob:
        teacher = model.clone()
        RecogniseAttention().run(teacher, ctx)
        blocks = tuple(
            block_of(node)
            for node, scope in attentions(teacher)
            if scope.parent is None and scope.function is None and self._refusal(node) is None
        )
        self._check_numbers(len(blocks))
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

    def _check_numbers(self, count: int) -> None:
        """Raise PassError where `layers` names one that is none of the model's `count` layers."""
        beyond = [number for number in sorted(self._numbers or ()) if number >= count]
        if beyond and count:
            raise PassError(f"layers={self.layers}: there is no layer {beyond[0]}; the model has 0 to {count - 1}")

    def _rewrite(self, model: ir.Model, sites: Collection[str] | None, report: PassReport) -> None:
        """Replace the attentions at `sites`, or with None those that `layers` names, and say what became of all."""
        operator = self.operator
        names, index, done = graph.Names(model), 0, set()
        for node, scope in attentions(model):
            site = graph.site(node)
            reason = self._refusal(node)
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
            self._replace(node, scope, names)
            if scope.function is not None:
                scope.function.opset_imports[operator.domain] = operator.version
            done.add(site)
            report.changed(RULE, site, f"layer {number}: {self.detail}")
        if sites is None:
            self._check_numbers(index)
        missing = set(sites or ()) - done
        if missing:
            raise PassError(f"the weights are for another model or preset: it has no attention {sorted(missing)[0]!r}")
        if done:
            operator.add_to(model)

    def _refusal(self, node: ir.Node) -> str | None:
        """Why an Attention is left alone; None when it is not."""
        try:
            self.check(node)
        except (Refused, ValueError) as error:
            return str(error)
        return None

    def _replace(self, node: ir.Node, scope: graph.Scope, names: graph.Names) -> None:
        """Put the operator in the place of an Attention that may be replaced."""
        writer, mask = Writer(scope, node, names), graph.input_of(node, 3)
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
            k, v = (_repeated(writer, x, heads, shared, size_of(node, i) or 0) for i, x in ((1, k), (2, v)))
        y = self.put(writer, node, q, k, v)
        dims = [*_dims(q)[:3], _dims(v)[3]]
        if graph.rank(node.inputs[0]) == 3:
            y = writer.op("Transpose", y, perm=BY_HEADS, dtype=y.dtype, shape=[dims[0], dims[2], heads, dims[3]])
            y = writer.op("Reshape", y, writer.ints([0, 0, -1], "merged"), dtype=y.dtype, shape=node.outputs[0].shape)
        for old, new in zip(node.outputs[1:3], presents, strict=False):
            if graph.is_used(old):
                graph.replace_value(old, new)
        graph.replace_value(node.outputs[0], y, keep_name=True)
        graph.remove_node(node)
        _drop_unused(mask)


def call(
    writer: Writer, node: ir.Node, operator: CustomOp, inputs: Sequence[ir.Value], attributes: dict[str, int]
) -> ir.Value:
    """The operator on query, key, value and what else it takes, in the place of `node`, whose metadata it keeps."""
    q, _, v, *_ = inputs
    y = writer.op(operator.name, *inputs, dtype=q.dtype, shape=[*_dims(q)[:3], _dims(v)[3]])
    made = y.producer()
    assert made is not None
    made.domain = operator.domain
    for key, number in attributes.items():
        made.attributes.add(ir.AttrInt64(key, number))
    graph.keep_metadata(node, made)
    return y


def _heads(node: ir.Node, index: int) -> int | None:
    """Heads of query (0), key (1) or value (2)."""
    value = node.inputs[index]
    assert value is not None and value.shape is not None
    if len(value.shape) == 3:
        return graph.attribute(node, "q_num_heads" if index == 0 else "kv_num_heads")
    return value.shape[1] if isinstance(value.shape[1], int) else None


def size_of(node: ir.Node, index: int) -> int | None:
    value, heads = node.inputs[index], _heads(node, index)
    assert value is not None and value.shape is not None
    last = value.shape[-1]
    if not isinstance(last, int) or heads is None:
        return None
    return last // heads if len(value.shape) == 3 else last


def _dims(value: ir.Value) -> list[int | ir.SymbolicDim | None]:
    return [None] * 4 if value.shape is None else list(value.shape)


def _by_heads(writer: Writer, node: ir.Node, index: int) -> ir.Value:
    """Query, key or value as (batch, heads, length, size)."""
    value, heads = node.inputs[index], _heads(node, index)
    assert value is not None and value.shape is not None and heads is not None
    if len(value.shape) == 4:
        return value
    batch, length, size = value.shape[0], value.shape[1], size_of(node, index)
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


def _drop_unused(value: ir.Value | None) -> None:
    """Remove what made a value that nothing reads any more."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        node = None if value is None else value.producer()
        if node is None or any(graph.is_used(output) for output in node.outputs):
            continue
        inputs = list(node.inputs)
        graph.remove_node(node)
        waiting.extend(inputs)


def numbers_mask(writer: Writer, mask: ir.Value | None) -> ir.Value:
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
