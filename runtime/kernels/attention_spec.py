"""What one attention computes, and where its tensors' elements are."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias


class Layout(enum.Enum):
    """Order of a tensor's axes: b batch, h heads, s sequence, d head size, m heads times head size."""

    BHSD = "bhsd"
    BSHD = "bshd"
    BSM = "bsm"
    BHDS = "bhds"  # keys only

    @property
    def first(self) -> int:
        """Offset of the first element."""
        return 0

    def shape(self, batch: Any, heads: int, length: Any, size: int) -> list[Any]:
        sizes = {"b": batch, "h": heads, "s": length, "d": size, "m": heads * size}
        return [sizes[axis] for axis in self.value]

    def strides(self, heads: int, length: Any, size: int) -> dict[str, Any]:
        """Elements from one index to the next along b, h, s and d."""
        found, step = {}, 1
        for axis in reversed(self.value.replace("m", "hd")):
            found[axis] = step
            step = step * {"b": 1, "h": heads, "s": length, "d": size}[axis]
        return found


@dataclass(frozen=True)
class Columns:
    """A tensor (b, s, pitch) with other things beside it: head h of a position is at columns first + h · step, such as
    the queries in the result of one projection to queries, keys and values."""

    pitch: int
    step: int
    first: int = 0
    value: ClassVar[str] = "columns"

    def shape(self, batch: Any, heads: int, length: Any, size: int) -> list[Any]:
        return [batch, length, self.pitch]

    def strides(self, heads: int, length: Any, size: int) -> dict[str, Any]:
        return {"b": length * self.pitch, "h": self.step, "s": self.pitch, "d": 1}


Places: TypeAlias = "Layout | Columns"


class Causal(enum.Enum):
    """Which keys a query sees: all, or key j <= query i + offset."""

    NO = "no"
    START = "start"  # offset 0
    END = "end"  # offset keys - queries: the last query sees every key that there is


class Mask(enum.Enum):
    NO = "no"
    ADDED = "added"  # float32, added to the scores
    KEEP = "keep"  # boolean, True where the key takes part


@dataclass(frozen=True)
class AttentionSpec:
    """softmax(scale · Q K' + mask) V for each head, float32.

    batch, queries, keys: None where they are known at run time. heads: of the queries, a multiple of `kv_heads`.
    head_size: of q and k; value_size: of v and the output. softcap: scores become softcap · tanh(score / softcap)
    before the mask; 0 for none. mask_axes: for batch, heads, queries whether the mask, always of rank 4 and as long
    as the keys on its last axis, has that axis or 1. lengths: int64 (batch) says how many of the keys there are; the
    others are not read. zero_rows: queries that see no key give 0 instead of NaN.
    """

    heads: int
    head_size: int
    scale: float
    batch: int | None = 1
    queries: int | None = None
    keys: int | None = None
    kv_heads: int = 0  # 0: as many as heads
    value_size: int = 0  # 0: the head size
    causal: Causal = Causal.NO
    mask: Mask = Mask.NO
    mask_axes: tuple[bool, bool, bool] = (False, False, False)
    softcap: float = 0.0
    lengths: bool = False
    q: Places = Layout.BHSD
    k: Places = Layout.BHSD
    v: Places = Layout.BHSD
    y: Layout = Layout.BHSD
    zero_rows: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "value_size", self.value_size or self.head_size)
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads are not a multiple of {self.kv_heads} key heads")
        if Layout.BHDS in (self.q, self.v, self.y):
            raise ValueError("only keys may be given transposed")

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.heads // self.kv_heads

    @property
    def flops(self) -> list[int | str]:
        """Of both products over all keys, as factors; those known at run time by the names of `attention_tensors`."""
        sizes = {"b": self.batch, "sq": self.queries, "sk": self.keys}
        known = [name if size is None else size for name, size in sizes.items()]
        return [2 * (self.head_size + self.value_size), self.heads, *known]

    @property
    def dynamic(self) -> bool:
        return None in (self.batch, self.queries, self.keys)
