"""Bodies of the standard's Attention for onnxruntime's MultiHeadAttention, Attention and GroupQueryAttention.

Legend: batch b, queries s, keys of this call l, keys in all t, keys of the past p, heads h, head size d.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from .. import graph
from .body_builder import Body
from .contrib_call import Call, finite
from .evaluate import Refusal

BY_HEADS = [0, 2, 1, 3]  # (b, s, h, d) to (b, h, s, d) and back
MASKED = -10000.0  # what the contributed operators add to the scores of hidden keys
SHARED = "its past and present share one buffer"


def multi_head_attention(call: Call) -> Body:
    call.refuse_inputs([8, 9], SHARED)
    call.refuse_outputs([3], "its products are used")
    heads = call.attr("num_heads")
    q, k, v = _unpacked(call)
    by_heads = False  # keys and values that come as (b, h, t, d)
    if call.has(2):
        rank = call.rank(1)
        if rank is None:
            raise Refusal("the rank of the key is not known; run infer-shapes first")
        by_heads = rank == 4
    if call.has(3):
        if by_heads:
            raise Refusal("it has a bias, and keys that are split into heads already")
        q, k, v = _with_bias(call, q, k, v, heads)
    if call.attr("unidirectional", 0) and call.has(1) and not call.has(6):
        _check_square(call, 2 if by_heads else 1)
    _attention(call, q, k, v, heads, by_heads, mask=4, bias=5, past=(call.x(6), call.x(7)))
    return call.body


def _check_square(call: Call, axis: int) -> None:
    """Raises Refusal unless there are as many keys as queries: of more keys, onnxruntime lets a query see others than
    is_causal does. axis: of the keys."""
    queries, keys = call.dims(0), call.dims(1)
    if queries is None or keys is None:
        raise Refusal("it is unidirectional, and its lengths are not known; run infer-shapes first")
    if not graph.same_dim(queries[1], keys[axis]):
        raise Refusal(
            f"it is unidirectional with {queries[1]} queries and {keys[axis]} keys; expected one length, a number or "
            "a symbol (pin-shapes)"
        )


def _unpacked(call: Call) -> tuple[str, str, str]:
    """Query, key and value, each (b, s, h·d); from (b, s, h, 3, d), or the latter two from (b, l, h, 2, d)."""
    if call.has(1) and call.has(2):
        return call.given(0), call.given(1), call.given(2)
    index, count = (1, 2) if call.has(1) else (0, 3)
    if call.rank(index) not in (5, None):
        raise Refusal(f"input {index} has rank {call.rank(index)}, not 5")
    parts = call.body.ops("Split", call.given(index), outputs=count, axis=3, num_outputs=count)
    flat = [call.op("Reshape", part, call.constant([0, 0, -1])) for part in parts]
    q, k, v = flat if count == 3 else [call.given(0), *flat]
    return q, k, v


def _with_bias(call: Call, q: str, k: str, v: str, heads: int) -> tuple[str, str, str]:
    """Each with its part of the bias of the projections."""
    whole = call.last(3)
    if not call.has(1):
        dims = call.dims(0)
        width = heads * dims[4] if dims is not None and len(dims) == 5 and isinstance(dims[4], int) else None
    else:
        width = call.last(0)
    if whole is None or width is None or whole <= 2 * width:
        raise Refusal("the widths of query and bias are not known; run infer-shapes first")
    sizes = call.constant([width, width, whole - 2 * width])
    parts = call.body.ops("Split", call.given(3), sizes, outputs=3, axis=0)
    q, k, v = (call.op("Add", x, part) for x, part in zip((q, k, v), parts, strict=True))
    return q, k, v


def packed_attention(call: Call) -> Body:
    """Projection of one input to queries, keys and values, and attention; the past is one tensor (2, b, h, p, d)."""
    if call.attr("do_rotary", 0):
        raise Refusal("it turns queries and keys")
    if call.attr("past_present_share_buffer", 0) or call.has(6):
        raise Refusal(SHARED)
    heads, width = call.attr("num_heads"), call.last(1)
    sizes = list(call.attr("qkv_hidden_sizes", ()))
    if not sizes:
        if width is None or width % 3:
            raise Refusal("the width of its weights is not known")
        sizes = [width // 3] * 3
    projected = call.op("MatMul", call.given(0), call.given(1))
    if call.has(2):
        projected = call.op("Add", projected, call.x(2))
    q, k, v = call.body.ops("Split", projected, call.constant(sizes), outputs=3, axis=-1)
    past: tuple[str | None, str | None] = (None, None)
    if call.has(4):
        past = tuple(call.op("Gather", call.given(4), call.constant(i), axis=0) for i in (0, 1))  # type: ignore
    presents = _attention(call, q, k, v, heads, False, mask=3, bias=5, past=past, presents=call.wanted(1), named=False)
    if call.wanted(1):
        both = [call.op("Unsqueeze", present, call.constant([0])) for present in presents]
        call.op("Concat", *both, axis=0, out="output1")
    return call.body


def _attention(
    call: Call,
    q: str,
    k: str,
    v: str,
    heads: int,
    by_heads: bool,
    *,
    mask: int,
    bias: int,
    past: tuple[str | None, str | None],
    presents: bool = False,
    named: bool = True,
) -> list[str]:
    """Attention of three-dimensional query, key and value into output0; returns the keys and values in all.

    named: they are output1 and output2, where those are used.
    """
    attributes = _scaled(call)

    def total() -> str:
        here = call.size(k, 2 if by_heads else 1)
        return here if past[0] is None else call.op("Add", here, call.size(past[0], 2))

    added = _padding(call, mask, q, total) if call.has(mask) else None
    if call.has(bias):
        added = call.given(bias) if added is None else call.op("Add", added, call.given(bias))
    if call.attr("unidirectional", 0):
        attributes["is_causal"] = 1
    outs = [f"output{i}" if named and call.wanted(i) else None for i in (1, 2)]
    if by_heads:
        for x, out in zip((k, v), outs, strict=True):
            if out is not None:
                call.op("Identity", x, out=out)
        y = call.op("Attention", _split(call, q, heads), k, v, added, **attributes)
        _joined(call, y)
        return [k, v]
    attributes |= {"q_num_heads": heads, "kv_num_heads": heads}
    if past[0] is not None:
        wanted = presents or any(out is not None for out in outs)
        names = [out or call.body.fresh("present") for out in outs] if wanted else []
        inputs = [q, k, v, added, *past]
        call.body.ops("Attention", *inputs, outputs=["output0", *names], **attributes)
        return names
    call.op("Attention", q, k, v, added, out="output0", **attributes)
    if not presents and not any(outs):
        return []
    return [_split(call, x, heads, out) for x, out in zip((k, v), outs, strict=True) if presents or out is not None]


def _scaled(call: Call) -> dict[str, Any]:
    scale = call.attr("scale", 0.0)
    return {"scale": scale} if scale else {}


def _split(call: Call, x: str, heads: int, out: str | None = None) -> str:
    """(b, s, h·d) -> (b, h, s, d)"""
    apart = call.op("Reshape", x, call.constant([0, 0, heads, -1]))
    return call.op("Transpose", apart, perm=BY_HEADS, out=out)


def _joined(call: Call, y: str) -> None:
    """(b, h, s, d) -> (b, s, h·d), the output"""
    together = call.op("Transpose", y, perm=BY_HEADS)
    call.op("Reshape", together, call.constant([0, 0, -1]), out="output0")


def _padding(call: Call, index: int, q: str, total: Callable[[], str]) -> str:
    """What is added to the scores for a mask of keys, as (b, 1, s, t).

    The mask says how long each sequence is (b), or is 0 where a key is hidden: (b, t) or (b, s, t).
    """
    dims = call.dims(index)
    if dims is None:
        raise Refusal("the rank of its mask is not known; run infer-shapes first")
    given = call.given(index)
    if len(dims) == 1:
        batch = call.dims(0)
        if batch is None or not graph.same_dim(dims[0], batch[0]):
            raise Refusal(f"a mask of {dims[0]} numbers is not known to be the lengths of the sequences")
        lengths = call.op("Unsqueeze", call.op("Cast", given, to=ir.DataType.INT64), call.constant([1]))
        seen = call.op("Less", call.count(total()), lengths)
    elif len(dims) in (2, 3):
        seen = call.op("Cast", given, to=ir.DataType.BOOL)
    else:
        raise Refusal(f"a mask of rank {len(dims)}")
    fill = finite(call.attr("mask_filter_value", MASKED), call.dtype())
    added = call.op("Where", seen, call.number(0.0), call.number(fill))
    axes = [1, 2] if len(dims) < 3 else [1]
    added = call.op("Unsqueeze", added, call.constant(axes))
    if len(dims) == 3:
        return added
    ones = call.constant([1])
    return call.op("Expand", added, call.op("Concat", ones, ones, call.size(q, 1), ones, axis=0))


# --- grouped queries


def group_query_attention(call: Call) -> Body:
    """Causal attention with fewer heads of keys, a cache, and rotary embedding where it is asked for."""
    _check_groups(call)
    heads, groups = call.attr("num_heads"), call.attr("kv_num_heads")
    past = call.dims(3)
    cached = call.has(3) and not (past is not None and len(past) == 4 and past[2] == 0)
    q, k, v = _groups(call, heads, groups)
    length, window = call.size(q, 1), call.attr("local_window_size", -1)
    before = _before(call, length) if cached else None
    positions = None
    if call.attr("do_rotary", 0) or cached or window > 0:
        positions = _positions(call, q, length, before)
    if call.attr("do_rotary", 0):
        assert positions is not None
        tables = [call.given(7), call.given(8), call.given(9) if call.has(9) else positions]
        turned = {"interleaved": call.attr("rotary_interleaved", 0), **_rotary_width(call, heads, groups)}
        q = call.op("RotaryEmbedding", q, *tables, num_heads=heads, **turned)
        k = call.op("RotaryEmbedding", k, *tables, num_heads=groups, **turned)
    attributes: dict[str, Any] = _scaled(call)
    if call.attr("softcap", 0.0):
        attributes["softcap"] = call.attr("softcap")
    if not cached:
        for index, x in ((1, k), (2, v)):
            if call.wanted(index):
                _split(call, x, groups, f"output{index}")
        attributes |= {"q_num_heads": heads, "kv_num_heads": groups}
        if window > 0:
            assert positions is not None
            mask = _seen(call, positions, length, window)
            call.op("Attention", q, k, v, mask, out="output0", **attributes)
        else:
            call.op("Attention", q, k, v, call.x(10), is_causal=1, out="output0", **attributes)
        return call.body
    assert before is not None and positions is not None
    total = call.op(
        "Max",
        call.size(call.given(3), 2),
        call.op("Reshape", call.op("Cast", call.given(6), to=ir.DataType.INT64), call.constant([1])),
    )
    rows = _cache_rows(call, before, length, total, groups)
    keys, values = (
        _cached(call, call.given(i), _split(call, x, groups), rows, f"output{o}" if call.wanted(o) else None)
        for i, x, o in ((3, k, 1), (4, v, 2))
    )
    mask = _seen(call, positions, total, window)
    _joined(call, call.op("Attention", _split(call, q, heads), keys, values, mask, **attributes))
    return call.body


def _check_groups(call: Call) -> None:
    """Raises Refusal for what has no words in the standard, or none here."""
    call.refuse_inputs([11], "it has sinks")
    call.refuse_inputs([12, 13], "its cache is quantized")
    call.refuse_inputs([14, 15], "it normalizes queries and keys")
    call.refuse_inputs([16], "its sequences are padded on the right")
    call.refuse_outputs([3], "its products are used")
    unlike = {"smooth_softmax": (0, -1), "causal": (1,), "kv_cache_bit_width": (0,), "sliding_window_cache": (0,)}
    for name, usual in unlike.items():
        if call.attr(name, usual[0]) not in usual:
            raise Refusal(f"{name} is {call.attr(name)}")
    if call.has(10) and (call.has(3) or call.attr("local_window_size", -1) > 0):
        raise Refusal("it has a bias, and a cache or a window")
    if call.has(3) != call.has(4):
        raise Refusal("it has one of past_key and past_value")


def _groups(call: Call, heads: int, groups: int) -> tuple[str, str, str]:
    """Query, key and value, from one packed tensor where they are."""
    if call.has(1):
        return call.given(0), call.given(1), call.given(2)
    size = _head_size(call, heads, groups)
    sizes = call.constant([heads * size, groups * size, groups * size])
    q, k, v = call.body.ops("Split", call.given(0), sizes, outputs=3, axis=-1)
    return q, k, v


def _head_size(call: Call, heads: int, groups: int) -> int:
    past, width = call.dims(3), call.last(0)
    if past is not None and len(past) == 4 and isinstance(past[3], int):
        return past[3]
    parts = heads if call.has(1) else heads + 2 * groups
    if width is None or width % parts:
        raise Refusal("its head size is not known; run infer-shapes first")
    return width // parts


def _rotary_width(call: Call, heads: int, groups: int) -> dict[str, int]:
    """How much of each head is turned, where that is not all of it."""
    half = call.last(7)
    size = _head_size(call, heads, groups)
    if half is None:
        raise Refusal("the width of its rotary tables is not known")
    return {} if 2 * half == size else {"rotary_embedding_dim": 2 * half}


def _before(call: Call, length: str) -> str:
    """Keys in front of those of this call, for each sequence: (b, 1)."""
    lengths = call.op("Cast", call.given(5), to=ir.DataType.INT64)  # all of them but one
    before = call.op("Add", call.op("Sub", lengths, length), call.constant(1))
    before = call.op("Max", before, call.constant(0))
    return call.op("Reshape", before, call.constant([-1, 1]))


def _positions(call: Call, q: str, length: str, before: str | None) -> str:
    """The place of each query in its sequence: (b, s)."""
    run = call.count(length)
    if before is not None:
        return call.op("Add", before, run)
    return call.op("Expand", run, call.op("Concat", call.size(q, 0), length, axis=0))


def _seen(call: Call, positions: str, total: str, window: int) -> str:
    """Whether a query sees a key: (b, 1, s, t)."""
    own = call.op("Unsqueeze", positions, call.constant([1, 3]))
    key = call.count(total)
    seen = call.op("LessOrEqual", key, own)
    if window > 0:
        seen = call.op("And", seen, call.op("Greater", key, call.op("Sub", own, call.constant(window))))
    return seen


def _cache_rows(call: Call, before: str, length: str, total: str, groups: int) -> str:
    """For each key in all which one it is of those of the past and, behind them, of this call: (b, groups, t, 1)."""
    past = call.size(call.given(3), 2)
    place = call.count(total)
    fresh = call.op("Add", call.op("Sub", place, before), past)
    row = call.op("Where", call.op("Less", place, before), place, fresh)
    last = call.op("Sub", call.op("Add", past, length), call.constant([1]))
    row = call.op("Unsqueeze", call.op("Min", row, last), call.constant([1, 3]))  # (b, 1, t, 1)
    return call.op("Expand", row, call.constant([1, groups, 1, 1]))


def _cached(call: Call, past: str, new: str, rows: str, out: str | None) -> str:
    """The cache with the keys of this call in their places: (b, groups, t, d)."""
    return call.op("GatherND", call.op("Concat", past, new, axis=2), rows, batch_dims=2, out=out)


BODIES: dict[str, Callable[[Call], Body]] = {
    "Attention": packed_attention,
    "GroupQueryAttention": group_query_attention,
    "MultiHeadAttention": multi_head_attention,
}
