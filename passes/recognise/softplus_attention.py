"""The pass `recognise-softplus-attention`: LSSA and LSSAR in small operators -> the operators of graphwright."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from .. import graph
from ..base import Contract, PassContext, PassReport
from ..ops.softplus_attention import (
    FEW,
    NO,
    REWEIGHTED_SOFTPLUS_ATTENTION,
    SHORTEST,
    SOFTPLUS_ATTENTION,
    START,
)
from .matching import DEEPEST, Found, Recogniser, Refused, Writer, made_by, operands, same, scalar, skip_identity, user

LOWEST = float(np.finfo(np.float32).min)
SWAPPED = (0, 1, 3, 2)
NEAR = 1e-5  # of constants that stand for logarithms and counts
FAR = 17.0  # softplus(x) is x from here on in float32


@dataclass(frozen=True)
class RecogniseSoftplusAttention(Recogniser):
    """Softplus attention written out becomes one operator, with and without re-weighting.

        c = MatMul (q̂, k̂ᵀ)                              q̂ = Div (Q, Clip (ReduceL2 (Q))), or LpNormalization
        s = Mul (c, log d · log N)
        p = Softplus (s)  a = Mul (p, mask)
        A = Div (a, ReduceSum (a))                 ->    Y = graphwright.SoftplusAttention (Q, K, V, mask)
        Y = MatMul (A, V)

        W = Pow (Relu (Sub (Mul (A, N), O)), p)
        Y = MatMul (Div (W, ReduceSum (W)), V)     ->    Y = graphwright.ReweightedSoftplusAttention <power = p> (...)

    N is how many keys a row sees: ReduceSum of the mask, or constants that say the same; the mask truth values cast to
    numbers, constants, or none. O is 1 where N is above 3 and 0 elsewhere. The mask may also be a Where, and one that
    compares the places of keys and queries becomes `causal`. A small number that guards a division against 0, the
    division of a row by its maximum before the power, and x in the place of Softplus (x) where x is large are part of
    what the operators do.
    Left alone: sites whose N, O or mask is not known to be that, and other ranks than 4.

    Source: Gao and Spratling, "Softplus Attention with Re-weighting", arXiv 2501.13428.
    """

    name: ClassVar[str] = "recognise-softplus-attention"
    contract: ClassVar[Contract] = Contract.ROUNDING
    opset: ClassVar[int] = 18

    def rule(self, node: ir.Node) -> str:
        return "softplus-attention"

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        report = super().run(model, ctx)
        for operator in (SOFTPLUS_ATTENTION, REWEIGHTED_SOFTPLUS_ATTENTION):
            for scope in list(graph.scopes(model)):
                if any(node.op_identifier()[:2] == operator.identifier for node in scope.graph):
                    if scope.function is not None:
                        scope.function.opset_imports[operator.domain] = operator.version
                    operator.add_to(model)
        return report

    def find(self, node: ir.Node, scope: graph.Scope) -> Found | None:
        inside = scope.function is not None and scope.function.domain == SOFTPLUS_ATTENTION.domain
        if not graph.is_op(node, "Softplus") or inside:
            return None
        product, factors = _scores(node.inputs[0])
        if product is None:
            return None
        masked, mask = _masked(_where_small(node))
        shares = _share(masked)
        if shares is None:
            return None
        q, k = _unit(product.inputs[0]), _unit(_swapped(product.inputs[1]))
        size, keys = q.shape[3], k.shape[2]  # type: ignore[index]  # of rank 4
        if not isinstance(size, int):
            raise Refused("the size of a head is not known")
        counts = _Counts.of(mask, keys, q.shape[2])  # type: ignore[index]  # of rank 4
        counts.check_scale(factors, size)
        following = user(shares)
        power = None
        if following is not None and not graph.is_op(following, "MatMul"):
            shares, power, more = _reweighted(shares, counts)
            factors += more
            following = user(shares)
        if following is None or not graph.is_op(following, "MatMul") or not same(following.inputs[0], shares):
            raise Refused("the weights do not go into a product with the values alone")
        v = following.inputs[1]
        if v is None or graph.rank(v) != 4:
            raise Refused("the values are not known to have rank 4")
        # Masks and counts may be shared by layers, so they are not inside a site.
        leaves = (q, k, v, *(value for value in (counts.mask, counts.number, *factors) if value is not None))
        last = following

        def write(writer: Writer) -> ir.Value:
            operator = SOFTPLUS_ATTENTION if power is None else REWEIGHTED_SOFTPLUS_ATTENTION
            options = {"causal": START if counts.causal else NO, **({} if power is None else {"power": power})}
            output = last.outputs[0]
            y = writer.op(
                operator.name, q, k, v, counts.write(writer), dtype=output.dtype, shape=output.shape, **options
            )
            made = y.producer()
            assert made is not None
            made.domain = operator.domain
            return y

        return Found("softplus-attention", last, leaves, write)


@dataclass(frozen=True)
class _Counts:
    """Which keys a row sees, and how many. mask: truth values, or None; number: the mask as numbers that the graph sums
    up; known: the constant mask (queries or 1, keys) where there is no value; causal: each sees those up to itself."""

    mask: ir.Value | None
    number: ir.Value | None
    known: np.ndarray | None
    causal: bool = False

    @classmethod
    def of(cls, mask: ir.Value | None, keys: int | ir.SymbolicDim, queries: int | ir.SymbolicDim) -> _Counts:
        if mask is None:
            return cls(None, None, np.ones((1, keys), bool) if isinstance(keys, int) else None)
        array = graph.constant_value(skip_identity(mask), limit=1 << 26)
        if array is not None:
            known = np.asarray(array, np.float64)
            if not np.isin(known, (0, 1)).all() or known.size != math.prod(known.shape[-2:]):
                raise Refused(f"the mask {mask.name} is not of zeros and ones for all heads")
            known = known.reshape(known.shape[-2:]) if known.ndim > 1 else known[None]
            causal = known.shape[0] == known.shape[1] == queries and np.array_equal(known, np.tril(np.ones_like(known)))
            return cls(None, None, known != 0, causal)
        cast = made_by(mask, "Cast")
        source = cast.inputs[0] if cast is not None else mask
        if source is None or source.dtype != ir.DataType.BOOL:
            raise Refused(f"the mask {mask.name} is not known to be truth values")
        return cls(source, mask, None, _is_causal(source, queries, keys))

    @property
    def numbers(self) -> np.ndarray | None:
        """Keys of each row (queries or 1, 1), where they are constants."""
        return None if self.known is None else np.maximum(self.known.sum(-1, keepdims=True), 1).astype(np.float64)

    def is_count(self, value: ir.Value | None) -> bool:
        """Whether the value is the number of keys that each row sees."""
        array = graph.constant_value(skip_identity(value), limit=1 << 24)
        if array is not None:
            numbers = self.numbers
            return numbers is not None and _equal(array, numbers)
        for op in ("Clip", "Max"):  # at least 1
            node = made_by(value, op)
            if node is not None and len(node.inputs) == 2:
                value = next((a for a, b in operands(node) if scalar(b, a) == 1.0), None)
        node = made_by(value, "ReduceSum")
        if node is None or not graph.attribute(node, "keepdims", 1):
            return False
        axes, summed = graph.constant_ints(graph.input_of(node, 1)), node.inputs[0]
        dims = graph.rank(summed)
        if axes is None or dims is None or [axis % dims for axis in axes] != [dims - 1]:
            return False
        if same(summed, self.number) and summed is not self.mask:
            return True
        cast = made_by(summed, "Cast")
        return cast is not None and self.mask is not None and same(cast.inputs[0], self.mask)

    def check_scale(self, factors: list[ir.Value], size: int) -> None:
        """Raise Refused unless the factors are log size · log of the counts."""
        constant, logs = np.ones((1, 1)), 0
        for factor in (part for whole in factors for part in _parts(whole)):
            array = graph.constant_value(skip_identity(factor), limit=1 << 24)
            node = made_by(factor, "Log")
            if array is not None:
                constant = constant * np.asarray(array, np.float64)
            elif node is not None and self.is_count(node.inputs[0]):
                logs += 1
            else:
                name = factor.name if factor is not None else ""
                raise Refused(f"the factor {name} is not the logarithm of how many keys a row sees")
        wanted = np.full((1, 1), math.log(size))
        if logs == 0:
            if self.numbers is None:
                raise Refused("how many keys a row sees is not known")
            wanted = wanted * np.log(self.numbers)
        if logs > 1 or not _equal(constant, wanted):
            raise Refused("the scores are not scaled by log d · log N")

    def write(self, writer: Writer) -> ir.Value:
        if self.mask is not None and not self.causal:
            zero = writer.constant(np.array(0, np.float32), "zero")
            low = writer.constant(np.array(LOWEST, np.float32), "hidden")
            return writer.op("Where", self.mask, zero, low, dtype=ir.DataType.FLOAT, shape=self.mask.shape)
        if self.causal or self.known is None or self.known.all():
            return writer.constant(np.zeros((1, 1, 1, 1), np.float32), "mask")
        return writer.constant(np.where(self.known, 0, LOWEST).astype(np.float32)[None, None], "mask")


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are the same numbers when both are broadcast."""
    try:
        x, y = np.broadcast_arrays(np.asarray(a, np.float64), b)
    except ValueError:
        return False
    return bool(np.allclose(x, y, rtol=NEAR, atol=NEAR))


def _scores(value: ir.Value | None) -> tuple[ir.Node | None, list[ir.Value]]:
    """The product that the scores are a multiple of, and the factors. None: there is none."""
    factors: list[ir.Value] = []
    for _ in range(6):
        product = made_by(value, "MatMul")
        if product is not None:
            return product, factors
        node = made_by(value, "Mul")
        found = next(((a, b) for a, b in operands(node) if made_by(a, "MatMul", "Mul") is not None
                      and all(map(_is_factor, _parts(b)))), None)  # fmt: skip
        if found is None:
            return None, []
        value, factor = found
        factors.append(factor)
    return None, []


def _parts(factor: ir.Value | None) -> list[ir.Value | None]:
    """What a factor is the product of."""
    parts = [factor]
    for _ in range(DEEPEST):
        place, node = next(((i, n) for i, n in enumerate(made_by(p, "Mul") for p in parts) if n is not None), (0, None))
        if node is None:
            break
        parts[place : place + 1] = node.inputs
    return parts


def _is_factor(value: ir.Value | None) -> bool:
    return graph.is_constant(skip_identity(value)) or made_by(value, "Log") is not None


def _where_small(softplus: ir.Node) -> ir.Value:
    """The result of the Softplus, behind Where (x > 20, x, Softplus (x)), which torch writes."""
    x, value = softplus.inputs[0], softplus.outputs[0]
    node = user(value)
    if graph.is_op(node, "Where") and node is not None and same(node.inputs[1], x) and same(node.inputs[2], value):
        test = made_by(node.inputs[0], "Greater")
        limit = None if test is None or not same(test.inputs[0], x) else scalar(test.inputs[1], x)
        if limit is not None and limit >= FAR:
            return node.outputs[0]
    return value


def _is_causal(mask: ir.Value, queries: int | ir.SymbolicDim, keys: int | ir.SymbolicDim) -> bool:
    """Whether a mask (queries, keys) of truth values is j <= i, made of one Range."""
    node = made_by(mask, "LessOrEqual", "GreaterOrEqual")
    if node is None or mask.shape is None or queries != keys or list(mask.shape) != [queries, keys]:
        return False
    across, down = node.inputs if node.op_type == "LessOrEqual" else node.inputs[::-1]
    counted, standing = made_by(across, "Range"), made_by(down, "Unsqueeze")
    if counted is None or standing is None or not same(standing.inputs[0], across):
        return False
    known = queries.value is not None if isinstance(queries, ir.SymbolicDim) else True
    return known and scalar(counted.inputs[2]) == 1 and graph.constant_ints(standing.inputs[1]) in ([-1], [1])


def _masked(value: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """The weights behind the mask, and the mask."""
    node = user(value)
    if graph.is_op(node, "Mul") and node is not None:
        for a, b in operands(node):
            if same(a, value):
                return node.outputs[0], b
    if graph.is_op(node, "Where") and node is not None:
        condition, kept, other = node.inputs
        if same(kept, value) and scalar(other, kept) == 0.0:
            return node.outputs[0], condition
    return value, None


def _share(value: ir.Value, reduction: str = "ReduceSum") -> ir.Value | None:
    """value / reduction(value) over the last axis, where that is what the value alone is used for."""
    divisions = [node for node, _ in value.uses() if graph.is_op(node, "Div") and same(node.inputs[0], value)]
    if len(divisions) != 1:
        return None
    (node,) = divisions
    divisor = node.inputs[1]
    for op in ("Add", "Clip", "Max"):  # a guard against 0
        guard = made_by(divisor, op)
        if guard is not None and len(guard.inputs) == 2:
            pairs = operands(guard) if op != "Clip" else [(guard.inputs[0], guard.inputs[1])]
            sums = (a for a, b in pairs if 0 <= (scalar(b, a) or 0.0) <= 1e-8 and made_by(a, reduction) is not None)
            divisor = next(sums, divisor)
    total = made_by(divisor, reduction)
    if total is None or not same(total.inputs[0], value) or not graph.attribute(total, "keepdims", 1):
        return None
    axes, dims = graph.constant_ints(graph.input_of(total, 1)), graph.rank(value)
    if axes is None or dims is None or [axis % dims for axis in axes] != [dims - 1]:
        raise Refused("the weights are not divided by their sum over the last axis")
    return node.outputs[0]


def _reweighted(shares: ir.Value, counts: _Counts) -> tuple[ir.Value, int, list[ir.Value]]:
    """The weights of LSSAR made of those of LSSA, the power, and N and O."""
    node = user(shares)
    factor = next((b for a, b in operands(node) if same(a, shares)), None) if graph.is_op(node, "Mul") else None
    if node is None or factor is None or not counts.is_count(factor):
        raise Refused("the weights are not multiplied by how many keys a row sees")
    less = user(node.outputs[0])
    if less is None or not graph.is_op(less, "Sub") or not same(less.inputs[0], node.outputs[0]):
        raise Refused("nothing is subtracted from the weights")
    offset = less.inputs[1]
    if offset is None or not _is_offset(offset, counts):
        raise Refused("what is subtracted is not 1 for rows of more than 3 keys and 0 for others")
    relu = user(less.outputs[0])
    if relu is None or not graph.is_op(relu, "Relu"):
        raise Refused("the weights below the mean are not set to 0 by Relu")
    kept, power = relu.outputs[0], 1
    kept = _share(kept, "ReduceMax") or kept  # cancels in the sum
    raised = user(kept)
    if graph.is_op(raised, "Pow") and raised is not None:
        exponent = scalar(raised.inputs[1], kept)
        if exponent is None or exponent != int(exponent) or exponent < 1:
            raise Refused("the power is not a whole number")
        kept, power = raised.outputs[0], int(exponent)
    found = _share(kept)
    if found is None:
        raise Refused("the re-weighted weights are not divided by their sum")
    return found, power, [factor, offset]


def _is_offset(value: ir.Value | None, counts: _Counts) -> bool:
    array = graph.constant_value(skip_identity(value), limit=1 << 24)
    if array is not None:
        return counts.numbers is not None and _equal(array, (counts.numbers > FEW).astype(np.float64))
    cast = made_by(value, "Cast")
    test = made_by(cast.inputs[0], "Greater") if cast is not None else None
    choice = made_by(value, "Where")
    if choice is not None:
        pair = [scalar(x) for x in choice.inputs[1:3]]
        test = made_by(choice.inputs[0], "Greater" if pair == [1.0, 0.0] else "LessOrEqual")
        if pair not in ([1.0, 0.0], [0.0, 1.0]):
            return False
    return test is not None and scalar(test.inputs[1]) == FEW and counts.is_count(test.inputs[0])


def _unit(value: ir.Value | None) -> ir.Value:
    """What the value is with rows of length 1. Raises Refused."""
    found = None
    node = made_by(value, "LpNormalization", "Div")
    if node is not None and node.op_type == "LpNormalization":
        if graph.attribute(node, "p", 2) == 2 and graph.attribute(node, "axis", -1) in (-1, 3):
            found = node.inputs[0]
    elif node is not None:
        divisor = node.inputs[1]
        expand = made_by(divisor, "Expand")
        divisor = expand.inputs[0] if expand is not None else divisor
        guard = made_by(divisor, "Clip", "Max")
        if guard is not None and 0 <= (scalar(guard.inputs[1]) or 0.0) <= SHORTEST * 10:
            divisor = guard.inputs[0]
        norm = made_by(divisor, "ReduceL2")
        axes = None if norm is None else graph.constant_ints(graph.input_of(norm, 1))
        if norm is not None and same(norm.inputs[0], node.inputs[0]) and axes in ([-1], [3]):
            found = node.inputs[0] if graph.attribute(norm, "keepdims", 1) else None
    if found is None:
        raise Refused(f"the rows of {value.name if value is not None else 'a product'} are not scaled to length 1")
    if graph.rank(found) != 4:
        raise Refused(f"{found.name} is not known to have rank 4")
    return found


def _swapped(value: ir.Value | None) -> ir.Value | None:
    node = made_by(value, "Transpose")
    if node is None or tuple(graph.attribute(node, "perm") or ()) != SWAPPED:
        raise Refused("the keys are not transposed")
    return node.inputs[0]
