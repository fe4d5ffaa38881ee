"""The default schedule of CPU loop nests that no kernel template has claimed.

It takes each nest as it comes: elementwise producers are inlined into elementwise consumers, a reduction is tiled so
that its accumulators stay in vector registers, and the outer loops run in parallel when there is enough work. A nest
that it cannot handle keeps its plain loops; nothing here changes what is computed, only the order of independent
elements.
"""

from __future__ import annotations

import logging
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.s_tir.dlight.analysis import normalize_prim_func

from .codegen import GENERAL
from .target import Target

log = logging.getLogger("graphwright")

PARALLEL_WORK = 1 << 15  # loop iterations below which a second thread costs more than it gives
ROWS = 6  # rows of accumulators in a tile
REGISTER_BYTES = 1024  # TVM keeps a local buffer on the stack, so in registers, below this size


def default_schedule(module: tvm.IRModule, target: Target) -> tvm.IRModule:
    """Schedule every loop nest of `module` that is not marked as scheduled."""
    result = tvm.IRModule(dict(module.functions_items()), attrs=module.attrs)
    for variable, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc) and not _scheduled(function):
            result.update_func(variable, _schedule(function, target).with_attr(GENERAL, True))
    return result


def _scheduled(function: tirx.PrimFunc) -> bool:
    attrs = function.attrs or {}
    return "tirx.is_scheduled" in attrs or "s_tir" not in attrs


def _schedule(function: tirx.PrimFunc, target: Target) -> tirx.PrimFunc:
    try:
        schedule = s_tir.Schedule(function)
        for info in normalize_prim_func(schedule) or []:
            if info.is_injective() and not _feeds_reduction(schedule, info.block_rv):
                _try(schedule.compute_inline, info.block_rv)
        infos = normalize_prim_func(schedule)
        if infos is None:
            return function
        for info in infos:
            _schedule_block(schedule, info, target)
    except Exception as error:  # the schedule is an improvement only: without it the loops stay as they were
        log.debug("no schedule for %s: %s", function.attrs, error)
        return function
    return schedule.mod["main"].with_attr("tirx.is_scheduled", True)


def _feeds_reduction(schedule: s_tir.Schedule, block: Any) -> bool:
    """Whether a consumer reduces: inlined there, the work would be repeated, and a padding's condition would keep the
    reduction from being vectorised."""
    return any(
        any(it.iter_type == tirx.IterVar.CommReduce for it in schedule.get(consumer).iter_vars)
        for consumer in schedule.get_consumers(block)
    )


def _try(step: Any, *arguments: Any) -> bool:
    try:
        step(*arguments)
    except Exception:  # a precondition of the schedule primitive does not hold
        return False
    return True


def _extent(iterator: Any) -> int | None:
    return int(iterator.dom) if isinstance(iterator.dom, int | tirx.IntImm) else None


def _schedule_block(schedule: s_tir.Schedule, info: Any, target: Target) -> None:
    spatial = [it for it in info.iters if it.kind == "S"]
    reduction = [it for it in info.iters if it.kind != "S"]
    if any(it.kind not in "SR" for it in info.iters):
        return
    if not spatial:
        _start_from_zero(schedule, info.block_rv, reduction)
        return
    work = 1
    for it in info.iters:
        work *= _extent(it) or 1 << 12
    parallel = work >= PARALLEL_WORK
    schedule.reorder(*[it.loop_rv for it in spatial], *[it.loop_rv for it in reduction])
    loops = [it.loop_rv for it in spatial]
    if reduction and not _conditional(schedule, info.block_rv):
        _reduce(schedule, info.block_rv, spatial, reduction, target, parallel)
        return
    if not reduction:
        loops = _elementwise(schedule, info.block_rv, loops, _extent(spatial[-1]), target)
    if parallel:
        schedule.parallel(schedule.fuse(*loops))
    if reduction:
        _start_from_zero(schedule, info.block_rv, reduction)


def _elementwise(schedule: s_tir.Schedule, block: Any, loops: list[Any], last: int | None, target: Target) -> list[Any]:
    """Vectorise the innermost loop where its reads are plain. Returns the loops that may run in parallel."""
    lanes = _lanes(last, target.isa.lanes())
    *outer, inner = loops
    if lanes < min(8, target.isa.lanes()) or not _plain(schedule, block):
        return outer or loops
    middle, vector = schedule.split(inner, [None, lanes])
    schedule.vectorize(vector)
    return [*outer, middle]


def _plain(schedule: s_tir.Schedule, block: Any) -> bool:
    """Whether a block reads by plain sums of its loops: neither choices nor quotients and remainders, which TVM's
    vectoriser gets wrong in some nests.
    """
    text = str(schedule.get(block).body)
    return not any(word in text for word in ("if_then_else", "//", "%", "Select"))


def _conditional(schedule: s_tir.Schedule, block: Any) -> bool:
    """Whether a block chooses between reads. TVM's vectoriser gets some of these wrong, so none is given to it."""
    return "if_then_else" in str(schedule.get(block).body)


def _start_from_zero(schedule: s_tir.Schedule, block: Any, reduction: list[Any]) -> None:
    """Give the result its first value outside the reduction where that may have nothing to do: over an empty axis
    the first step, which would give it, never comes.
    """
    if any(_extent(it) is None or _extent(it) == 0 for it in reduction):
        schedule.decompose_reduction(block, reduction[0].loop_rv)


def _reduce(
    schedule: s_tir.Schedule, block: Any, spatial: list[Any], reduction: list[Any], target: Target, parallel: bool
) -> None:
    """Tile two spatial loops into rows x vectors, run the reduction outside the tile, and keep the tile in a local
    buffer until it is complete.

    The vector runs along the last loop where its extent fills one, else along the spatial loop that does: the
    channels of a 7x7 convolution, whose weights are then gathered once for a whole row of outputs.
    """
    isa = target.isa
    widths = [_lanes(_extent(it), isa.lanes()) for it in spatial]
    at = len(spatial) - 1 - max(range(len(spatial)), key=lambda index: (widths[::-1][index], -index))
    lanes, across = widths[at], spatial[at]
    if lanes == 1:
        if parallel:
            schedule.parallel(schedule.fuse(*[it.loop_rv for it in spatial]))
        _start_from_zero(schedule, block, reduction)
        return
    contiguous = at == len(spatial) - 1
    extent = _extent(across) or lanes
    vectors = max(c for c in (1, 2, 3, 4) if extent % (c * lanes) == 0) if contiguous else 1
    others = [it for it in spatial if it is not across]
    rows = 1
    if others and (height := _extent(others[-1])) is not None:
        most = min((REGISTER_BYTES - 1) // 4 // (vectors * lanes), max(1, (isa.registers - 4) // vectors - 1))
        most = min(most, ROWS) if contiguous else most
        rows = max(count for count in range(1, max(1, most) + 1) if height % count == 0)
    buffer = schedule.cache_write(block, 0, "global")
    loops = [it.loop_rv for it in others]
    tile = []
    if rows > 1:
        loops[-1], row = schedule.split(loops[-1], [None, rows])
        tile.append(row)
    column, middle, vector = schedule.split(across.loop_rv, [None, vectors, lanes])
    loops.insert(len(loops) if contiguous else at, column)
    reducing = [it.loop_rv for it in reduction]
    schedule.reorder(*loops, *reducing, *tile, middle, vector)
    fused = schedule.fuse(*loops)
    schedule.reverse_compute_at(buffer, fused)
    schedule.vectorize(vector)
    for loop in (*tile, middle):
        schedule.unroll(loop)
    if contiguous:
        _, copied = schedule.split(schedule.get_loops(buffer)[-1], [None, lanes])
        schedule.vectorize(copied)
    if parallel:
        schedule.parallel(fused)
    schedule.decompose_reduction(block, reducing[0])


def _lanes(extent: int | None, most: int) -> int:
    """The widest power of two up to `most` that divides the extent; 1 when it is not known."""
    lanes = most
    while lanes > 1 and (extent is None or extent % lanes):
        lanes //= 2
    return lanes
