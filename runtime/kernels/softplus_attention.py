"""Fused softplus attention, float32, with and without re-weighting: blocks of queries against blocks of keys.

It is `attention_tiles` with other weights. The scores need no running maximum, because a softplus does not overflow:

    LSSA    P = softplus(S),  l = l + sum P,  O = O + P V;   Y = O / l
    LSSAR   first all keys:  a = softplus(S),  s = sum a,  t = max a,  N = how many are seen
            g = N / s,  o = 1 or 0 where N <= 3,  r = 1 / (t g - o)
            then all again:  P = (max(a g - o, 0) r)^p,  l = l + sum P,  O = O + P V;   Y = O / l

softplus(s) = max(s, 0) + log1p(e^-|s|) and log1p(x) = 2 artanh(x / (2 + x)), whose series has reached float32 after
seven terms. r divides by the row's maximum before the power, so nothing overflows; where all keys are equal
t g = 1, and all get the weight 1. Rows of Q and K are scaled to length 1, and Q by log d · log N, before the kernel:
those are elementwise operators over inputs, fused by the usual road. Q K' is never in memory.

Source: Gao and Spratling, arXiv 2501.13428.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import relax, te, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ...passes.base import Caches
from ...passes.ops.softplus_attention import (
    END,
    FEW,
    HIDDEN,
    NO,
    REWEIGHTED_SOFTPLUS_ATTENTION,
    SHORTEST,
    SMALLEST,
    SOFTPLUS_ATTENTION,
    START,
)
from ..importing.site import ByBody, constant_of, same
from ..lowering import lowers
from ..target import InstructionSet, Target
from .attention import attention_tensors, emit_tiles
from .attention_spec import AttentionSpec, Causal, Mask
from .attention_tiles import TileEmitter
from .two_pass_softmax import OPAQUE
from .vector_tiles import VectorTiles
from .vectors import Buffer, Expr

SYMBOL = "softplus_attention"
TERMS = 7  # of the series of artanh
# A seen key's mask is at least this, which makes its weight 0 as any lower number does; hidden ones are -inf.
FLOOR, SEEN = -1000.0, -2000.0


@dataclass
class SoftplusEmitter(TileEmitter):
    """power: of the re-weighting; 0 for none."""

    power: int = 0

    def allocate(self) -> None:
        super().allocate()
        if self.power:
            spare = max(self.tile.rows.values())
            self.counts, self.gains, self.offsets, self.factors = (
                self._scratch(self.width + spare) for _ in range(4)
            )  # fmt: skip

    def _take_queries(self, start: Expr) -> None:
        super()._take_queries(start)
        for w in range(self.used):
            here = self._here(w)
            T.buffer_store(self.scale, self.vectors.splat(1.0), [here])
            if self.power:
                T.buffer_store(self.top, self.vectors.splat(0.0), [here])
                T.buffer_store(self.counts, self.vectors.splat(0.0), [here])

    def _here(self, w: int) -> Expr:
        """The place of vector w of the block's queries in a row of numbers."""
        return self.vectors.at(self.tensors.const(w * self.vectors.lanes))

    def _each_block(self, stop: int | Expr) -> None:
        self.looking = bool(self.power)
        super()._each_block(stop)
        if self.power:
            self._looked()
            self.looking = False
            super()._each_block(stop)

    def _looked(self) -> None:
        """From sum, maximum and count to what the weights are made with."""
        v = self.vectors
        one, zero = v.splat(1.0), v.splat(0.0)
        for w in range(self.used):
            here = self._here(w)
            count = T.Bind(self.counts[here])
            offset = T.Bind(T.Select(count <= v.splat(float(FEW)), zero, one))
            gain = T.Bind(T.max(count, one) / T.max(v.splat(SMALLEST), self.sums[here]))
            most = T.Bind(self.top[here] * gain - offset)
            level = most <= zero
            # max(a · 0 + 1, 0) · 1 is 1.
            T.buffer_store(self.gains, T.Select(level, zero, gain), [here])
            T.buffer_store(self.offsets, T.Select(level, v.splat(-1.0), offset), [here])
            T.buffer_store(self.factors, T.Select(level, one, one / most), [here])
            T.buffer_store(self.sums, zero, [here])

    def _exponentials(self, tiles: Expr, best: list[Buffer]) -> None:
        """S = the weights of the block, and what they add to the sums. One key at a time: a weight is long already."""
        v, lanes = self.vectors, self.vectors.lanes
        with T.serial(tiles * self.tile.keys) as j:
            for w in range(self.used):
                here, place = self._here(w), j * self.stride + w * lanes
                s = v.load(self.scores, place)
                a = self._softplus(s)
                if self.looking:
                    seen = T.Select(s > v.splat(SEEN), v.splat(1.0), v.splat(0.0))
                    T.buffer_store(self.counts, self.counts[here] + seen, [here])
                    T.buffer_store(self.top, T.max(self.top[here], a), [here])
                else:
                    a = self._reweighted(s, a, here) if self.power else a
                    v.store(self.scores, place, a)
                T.buffer_store(self.sums, self.sums[here] + a, [here])

    def _values(self, key: Expr, count: int | Expr) -> None:
        if not self.looking:
            super()._values(key, count)

    def _softplus(self, s: Expr) -> Expr:
        v = self.vectors
        x = v.exp(T.Bind(T.min(s, v.splat(0.0) - s)))
        z = T.Bind(x / (x + v.splat(2.0)))
        square = T.Bind(z * z)
        series = v.splat(2 / (2 * TERMS - 1))
        for n in reversed(range(TERMS - 1)):
            series = v.fma(series, square, v.splat(2 / (2 * n + 1)))
        return T.Bind(v.fma(series, z, T.max(v.splat(0.0), s)))

    def _reweighted(self, s: Expr, a: Expr, here: Expr) -> Expr:
        v = self.vectors
        above = v.fma(a, self.gains[here], v.splat(0.0) - self.offsets[here])
        ratio = T.Bind(T.max(v.splat(0.0), above) * self.factors[here])
        # A product, because it keeps the NaN of a score.
        seen = T.Select(s > v.splat(SEEN), v.splat(1.0), v.splat(0.0))
        return T.Bind(power_of(ratio, self.power) * seen)


def power_of(x: Expr, power: int) -> Expr:
    """x^power by squaring."""
    result = None
    while power:
        if power & 1:
            result = x if result is None else T.Bind(result * x)
        power >>= 1
        if power:
            x = T.Bind(x * x)
    assert result is not None
    return result


def softplus_attention(
    spec: AttentionSpec, power: int, isa: InstructionSet, caches: Caches, threads: int = 1, name: str | None = None
) -> tirx.PrimFunc:
    """A kernel (Q, K, V[, mask], Y) -> None of the spec's shapes; rows of Q and K are scaled already.

    mask: -inf where a key is hidden, else at least FLOOR. power: of the re-weighting, 0 for none. threads, name: as for
    `attention`.
    """
    with IRBuilder() as builder, T.prim_func(is_private=name is None, s_tir=True):
        T.func_name(name or SYMBOL)
        T.func_attr({"tirx.noalias": True, "op_pattern": OPAQUE, "tirx.is_scheduled": True})
        tensors = attention_tensors(spec)
        vectors = VectorTiles(isa)
        with T.sblock("root"), vectors.prelude():
            if 0 not in (spec.batch, spec.queries):
                emit_tiles(vectors, tensors, caches, threads, functools.partial(SoftplusEmitter, power=power))
    return builder.get()


# --- from the operator


def _size(dim: Any) -> relax.Expr:
    """A size as a scalar of float32."""
    if isinstance(dim, int):
        return relax.const(float(dim), "float32")
    return relax.op.sum(relax.op.ones(relax.ShapeExpr([dim]), "float32"))


def _dims(x: Any) -> list[Any]:
    shape = x.ty.shape
    if not isinstance(shape, relax.ShapeExpr):
        raise ByBody("a rank is not known")
    return [int(d) if isinstance(d, tirx.IntImm) else d for d in shape.values]


def _mask(bb: relax.BlockBuilder, mask: Any, sizes: list[Any]) -> tuple[Any, tuple[bool, bool, bool]] | None:
    """The mask as the kernel takes it, and which axes it has; None where it hides and adds nothing."""
    known = constant_of(mask)
    if known is not None and not known.any():
        return None
    dims = _dims(mask)
    dims = [*[1] * (4 - len(dims)), *dims]
    fits = all((isinstance(d, int) and d == 1) or same(d, s) for d, s in zip(dims, sizes, strict=False))
    if len(dims) != 4 or not fits:
        raise ByBody("a size of the mask is not known to be that of the product")
    wide = bb.emit(relax.op.reshape(relax.op.astype(mask, "float32"), relax.ShapeExpr([_int64(d) for d in dims])))
    whole = [*dims[:3], sizes[3]]
    if not same(dims[3], sizes[3]):
        wide = bb.emit(relax.op.broadcast_to(wide, relax.ShapeExpr([_int64(d) for d in whole])))
    made = bb.emit_te(_each(_shown), wide, primfunc_name_hint="shown")
    b, h, q = (not (isinstance(d, int) and d == 1) for d in whole[:3])
    return made, (b, h, q)


def _int64(dim: Any) -> Any:
    return tirx.const(dim, "int64") if isinstance(dim, int) else dim


def _each(element: Callable[[Any], Any]) -> Callable[[te.Tensor], te.Tensor]:
    """One expression an element: TVM cannot bind the vector of truth values that a comparison of its own would be."""
    return lambda x: te.compute(x.shape, lambda *index: element(x(*index)))


def _shown(x: Any) -> Any:
    number = functools.partial(tirx.const, dtype="float32")
    return tirx.Select(x > number(HIDDEN), tirx.max(number(FLOOR), x), number(float("-inf")))


def _is_seen(x: Any) -> Any:
    number = functools.partial(tirx.const, dtype="float32")
    return tirx.Select(x > number(SEEN), number(1.0), number(0.0))


def _counts(bb: relax.BlockBuilder, mask: Any, causal: int, queries: Any, keys: Any) -> relax.Expr:
    """Keys that each row sees, broadcasting to (batch, heads, queries, 1)."""
    if mask is None and causal == NO:
        return _size(keys)
    limit = relax.op.subtract(_size(keys), _size(queries)) if causal == END else relax.const(0.0, "float32")
    rows = relax.op.arange(0, _int64(queries), 1, "float32")
    if mask is None:
        seen = relax.op.add(relax.op.add(rows, limit), relax.const(1.0, "float32"))
        seen = relax.op.minimum(relax.op.maximum(seen, relax.const(0.0, "float32")), _size(keys))
        return relax.op.expand_dims(seen, [0, 1, 3])
    shown = bb.emit_te(_each(_is_seen), mask, primfunc_name_hint="seen")
    if causal != NO:
        columns = relax.op.arange(0, _int64(keys), 1, "float32")
        last = relax.op.expand_dims(relax.op.add(rows, limit), [0, 1, 3])
        # 1 where the key is not beyond the last that is seen, 0 where it is.
        past = relax.op.clip(relax.op.add(relax.op.subtract(last, columns), relax.const(1.0, "float32")), 0, 1)
        shown = relax.op.multiply(shown, past)
    return relax.op.sum(shown, axis=-1, keepdims=True)


def _unit(bb: relax.BlockBuilder, x: Any, scale: Any = None) -> Any:
    """x with rows of length 1, or `scale`."""
    square = bb.emit(relax.op.sum(relax.op.multiply(x, x), axis=-1, keepdims=True))
    length = relax.op.maximum(relax.op.sqrt(square), relax.const(SHORTEST, "float32"))
    factor = bb.emit(relax.op.divide(scale if scale is not None else relax.const(1.0, "float32"), length))
    return bb.emit(relax.op.multiply(x, factor))


@functools.lru_cache(maxsize=64)
def _kernel(spec: AttentionSpec, power: int, target: Target) -> tirx.PrimFunc:
    return softplus_attention(spec, power, target.isa, target.caches, target.cores)


def _lowered(bb: relax.BlockBuilder, inputs: list[Any], causal: int, power: int, target: Target) -> Any:
    q, k, v, mask = inputs
    if any(str(x.ty.dtype.dtype) != "float32" for x in (q, k, v)):
        raise ByBody("it is not in float32")
    (batch, heads, queries, size), (b, h, keys, width), (c, g, length, value_size) = (_dims(x) for x in (q, k, v))
    known = all(isinstance(d, int) and d > 0 for d in (heads, size, value_size))
    if not known or not (heads == h == g and size == width):
        raise ByBody("its heads or their sizes are not known, or not equal")
    if not (same(batch, b) and same(batch, c) and same(keys, length)) or keys == 0:
        raise ByBody("a size of the keys is not known to be that of the queries or values")
    made = _mask(bb, mask, [batch, heads, queries, keys])
    counts = _counts(bb, made[0] if made else None, causal, queries, keys)
    some = relax.op.maximum(counts, relax.const(1.0, "float32"))
    scale = bb.emit(relax.op.multiply(relax.op.log(some), relax.const(math.log(size), "float32")))
    spec = AttentionSpec(
        heads, size, 1.0, batch=_known(batch), queries=_known(queries), keys=_known(keys), value_size=value_size,
        causal={NO: Causal.NO, START: Causal.START, END: Causal.END}[causal],
        mask=Mask.ADDED if made else Mask.NO, mask_axes=made[1] if made else (False, False, False),
    )  # fmt: skip
    function = bb.add_func(_kernel(spec, power, target), SYMBOL)
    given = [_unit(bb, q, scale), _unit(bb, k), v, *([made[0]] if made else [])]
    out = relax.TensorType([_int64(d) for d in (batch, heads, queries, value_size)], "float32")
    return relax.call_tir(function, given, out)


def _known(dim: Any) -> int | None:
    return dim if isinstance(dim, int) else None


@lowers(SOFTPLUS_ATTENTION.identifier, kinds=("llvm",))
def lssa(bb: relax.BlockBuilder, inputs: list[Any], attrs: dict[str, Any], target: Target) -> Any:
    """SoftplusAttention through the kernel. Raises ByBody for what it is not for."""
    return _lowered(bb, inputs, int(attrs.get("causal", NO)), 0, target)


@lowers(REWEIGHTED_SOFTPLUS_ATTENTION.identifier, kinds=("llvm",))
def lssar(bb: relax.BlockBuilder, inputs: list[Any], attrs: dict[str, Any], target: Target) -> Any:
    """ReweightedSoftplusAttention through the kernel. Raises ByBody for what it is not for."""
    return _lowered(bb, inputs, int(attrs.get("causal", NO)), int(attrs["power"]), target)
