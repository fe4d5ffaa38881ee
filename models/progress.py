"""How far a training is, in words and in a bar of characters."""

from __future__ import annotations


def bar(step: int, steps: int, width: int = 20) -> str:
    full = width * step // max(1, steps)
    return "█" * full + "░" * (width - full)


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
