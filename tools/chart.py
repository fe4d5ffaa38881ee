"""Line charts as SVG, written without a plotting library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 56, 96, 44, 40  # margins
COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#0e7490", "#4d7c0f")
GRIDS = 6  # lines at most


def line_chart(title: str, labels: Sequence[str], lines: Mapping[str, Sequence[float]]) -> str:
    """One line for each name, a point for each label; points are evenly spaced and each line is named at its end."""
    step = nice_step(max(map(max, lines.values())) - min(map(min, lines.values())))
    low = step * (min(map(min, lines.values())) // step)
    high = step * -(-max(map(max, lines.values())) // step)
    high = high if high > low else low + step

    def x(place: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * place / max(1, len(labels) - 1)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="12" y="22">{escape(title)}</text>',
    ]
    for n in range(round((high - low) / step) + 1):
        at = y(low + n * step)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{low + n * step:.4g}</text>')
    for place, label in enumerate(labels):
        parts.append(f'<text x="{x(place):.1f}" y="{HEIGHT - 16}" text-anchor="middle">{escape(label)}</text>')
    for colour, (name, values) in zip(COLOURS * len(lines), lines.items(), strict=False):
        points = [(x(place), y(value)) for place, value in enumerate(values)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]
        a, b = points[-1]
        parts.append(f'<text x="{a + 8:.1f}" y="{b + 4:.1f}" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def point_chart(title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """One line for each name, through points (x, y) on two scales; a legend names the lines."""
    spans = []
    for axis in (0, 1):
        values = [point[axis] for points in lines.values() for point in points]
        step = nice_step(max(values) - min(values))
        low, high = step * (min(values) // step), step * -(-max(values) // step)
        spans.append((low, high if high > low else low + step, step))
    (left, right, across), (bottom, top, up) = spans

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - left) / (right - left)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - bottom) / (top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="12" y="22">{escape(title)}</text>',
    ]
    for n in range(round((top - bottom) / up) + 1):
        at = y(bottom + n * up)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{bottom + n * up:.4g}</text>')
    for n in range(round((right - left) / across) + 1):
        at = x(left + n * across)
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 16}" text-anchor="middle">{left + n * across:.4g}</text>')
    for number, (colour, (name, points)) in enumerate(zip(COLOURS * len(lines), lines.items(), strict=False)):
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" fill="{colour}"/>' for a, b in points]
        at = HEIGHT - BOTTOM - 16 * (len(lines) - number)
        parts.append(f'<text x="{WIDTH - RIGHT - 8}" y="{at}" text-anchor="end" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def nice_step(span: float) -> float:
    """1, 2 or 5 times a power of ten, so that `span` takes at most `GRIDS` steps."""
    size = 1e-6
    while True:
        for factor in (1, 2, 5):
            if span <= GRIDS * factor * size:
                return factor * size
        size *= 10
