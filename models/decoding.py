"""A decoder with a key-value cache of fixed capacity, as torch computes it and as ONNX writes it.

The two operators that torch has no word for, a cache with new rows and attention over its filled part, are custom
operators here: eager torch computes them, `TRANSLATIONS` exports them as TensorScatter and Attention (opset 24).
Importing this file imports torch.
Legend: batch b = 1, tokens of a call s, tokens whose logits are wanted n, capacity c, query heads h, key-value heads k,
head width e, vocabulary V, candidates K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import onnxscript
import torch
from torch import Tensor, nn

OPSET = 24  # the first with TensorScatter, and with Attention that is told how many keys there are
CANDIDATES = 64  # the most that `top_logits` holds
_ONNX = onnxscript.values.Opset("", OPSET)

# query (b, h, s, e), key and value (b, k, s, e) of the call's tokens -> (b, h, s, e)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Sizes(Protocol):
    """The sizes that logits and cache follow from."""

    @property
    def vocabulary(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def key_value_heads(self) -> int: ...
    @property
    def head_width(self) -> int: ...


class Decoder(Protocol):
    """What `Prefill` and `Decode` ask of a model."""

    @property
    def sizes(self) -> Sizes: ...

    def reserve(self, capacity: int) -> None:
        """Make tables for positions below `capacity`. Raises UsageError when the model has fewer positions."""

    def continued(self, input_ids: Tensor, places: Tensor, attends: Sequence[Attend]) -> Tensor:
        """The last hidden state (b, s, d) of tokens at `places` (b, s), layer i mixing by attends[i]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(b, n, d) -> (b, n, V)."""


@torch.library.custom_op("graphwright::scatter_rows", mutates_args=())
def scatter_rows(past: Tensor, new: Tensor, position: Tensor) -> Tensor:
    """`past` (b, k, c, e) with `new` (b, k, s, e) in the rows from `position` (1,) on."""
    first = int(position)
    present = past.clone()
    present[:, :, first : first + new.shape[2]] = new
    return present


@scatter_rows.register_fake
def _(past: Tensor, new: Tensor, position: Tensor) -> Tensor:
    return torch.empty_like(past)


@torch.library.custom_op("graphwright::attend_filled", mutates_args=())
def attend_filled(query: Tensor, key: Tensor, value: Tensor, filled: Tensor) -> Tensor:
    """Causal attention of the last s of `filled` (1,) tokens over all of them: (b, h, s, e).

    query (b, h, s, e); key, value (b, k, c, e), of which each serves h / k neighbouring query heads and rows from
    `filled` on are not looked at.
    """
    count, (b, k, _, e), s = int(filled), key.shape, query.shape[2]
    grouped = query.unflatten(1, (k, -1))
    keys, values = (t[:, :, None, :count] for t in (key, value))
    places = torch.arange(count)
    seen = places <= places[count - s :, None]
    scores = (grouped @ keys.transpose(-1, -2) * e**-0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ values).reshape(b, -1, s, e)


@attend_filled.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, filled: Tensor) -> Tensor:
    return query.new_empty(query.shape)


def _tensor_scatter(past: Any, new: Any, position: Any) -> Any:
    return _ONNX.TensorScatter(past, new, position, axis=-2, mode="linear")


def _attention(query: Any, key: Any, value: Any, filled: Any) -> Any:
    mixed, *_ = _ONNX.Attention(query, key, value, None, None, None, filled, is_causal=1)
    return mixed


# Operator of torch -> how the exporter writes it.
TRANSLATIONS: dict[Any, Any] = {
    torch.ops.graphwright.scatter_rows.default: _tensor_scatter,
    torch.ops.graphwright.attend_filled.default: _attention,
}


@dataclass
class LayerCache:
    """An `Attend` that puts the call's keys and values, each (b, k, s, e), into the cache and looks at all of it."""

    key: Tensor
    value: Tensor
    position: Tensor

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.key = scatter_rows(self.key, key, self.position)
        self.value = scatter_rows(self.value, value, self.position)
        return attend_filled(query, self.key, self.value, self.position + key.shape[2])


class _Cached(nn.Module):
    """A decoder that goes on from a cache: key and value of each layer in turn, float32 (1, k, c, e)."""

    def __init__(self, decoder: Decoder, capacity: int) -> None:
        super().__init__()
        decoder.reserve(capacity)
        self.decoder, self.capacity = decoder, capacity

    def empty(self) -> tuple[Tensor, ...]:
        """A cache without tokens."""
        sizes = self.decoder.sizes
        shape = (1, sizes.key_value_heads, self.capacity, sizes.head_width)
        return tuple(torch.zeros(shape) for _ in range(2 * sizes.layers))

    def run(self, input_ids: Tensor, position: Tensor, wanted: Tensor | None, past: tuple[Tensor, ...]) -> Results:
        places = (position + torch.arange(input_ids.shape[1]))[None]
        caches = [LayerCache(k, v, position) for k, v in zip(past[::2], past[1::2], strict=True)]
        hidden = self.decoder.continued(input_ids, places, caches)
        if wanted is not None:
            hidden = hidden.index_select(1, wanted)
        logits = self.decoder.logits(hidden)
        best = logits.topk(min(CANDIDATES, logits.shape[-1]))
        return logits, best.values, best.indices, *(t for cache in caches for t in (cache.key, cache.value))


# logits (1, n, V), top_logits (1, n, K) and top_tokens int64 (1, n, K) in falling order, then the cache in which the
# rows position to position + s - 1 are the call's.
Results = tuple[Tensor, ...]


class Prefill(_Cached):
    """input_ids int64 (1, s), position int64 (1,) = tokens in the cache, wanted int64 (n,) = indices below s, cache."""

    def forward(self, input_ids: Tensor, position: Tensor, wanted: Tensor, past: tuple[Tensor, ...]) -> Results:
        return self.run(input_ids, position, wanted, past)


class Decode(_Cached):
    """input_ids int64 (1, s), position int64 (1,) = tokens in the cache, cache; n is s."""

    def forward(self, input_ids: Tensor, position: Tensor, past: tuple[Tensor, ...]) -> Results:
        return self.run(input_ids, position, None, past)
