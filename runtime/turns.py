"""Runners that take turns in one process, so that what else the machine does meets all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

TURN = 0.003  # seconds that one runner is timed before the next has its turn

K = TypeVar("K")


def take_turns(runners: Mapping[K, Callable[[], object]], settle: float, budget: float) -> dict[K, list[list[float]]]:
    """Seconds of every run of each runner, turn by turn.

    A turn is as many runs as take about TURN seconds, after a third as many that are not timed: they bring back the
    runner's data and wake its threads. The order of the runners is another one in each turn, since each finds the
    caches as the one before it left them.
    """
    repeats = {}
    for name, run in runners.items():
        run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, min(50, int(TURN / max(1e-9, time.perf_counter() - start))))
    times: dict[K, list[list[float]]] = {name: [] for name in runners}
    order, shuffle = list(runners), random.Random(0).shuffle
    start = time.perf_counter()
    while min(map(len, times.values())) < 9 or time.perf_counter() - start < budget:
        for name in order:
            run = runners[name]
            if settle:
                time.sleep(settle)
            for _ in range(untimed(repeats[name])):
                run()
            turn = []
            for _ in range(repeats[name]):
                begin = time.perf_counter()
                run()
                turn.append(time.perf_counter() - begin)
            times[name].append(turn)
        shuffle(order)
    return times


def untimed(repeats: int) -> int:
    """Runs at the beginning of a turn that are not timed, where so many are."""
    return -(-repeats // 3)


def medians(times: Mapping[K, list[list[float]]]) -> dict[K, list[float]]:
    """Of each turn."""
    return {name: [sorted(turn)[len(turn) // 2] for turn in turns] for name, turns in times.items()}
