"""Cost against size as SVG: the size in powers of ten, the cost from zero."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_WIDTH, _HEIGHT, _TOP, _COLOUR = 300.0, 190.0, 40.0, "#c8792a"


def plot(runs: Sequence[Mapping[str, Any]], x: str, panels: Sequence[tuple[str, str]]) -> str:
    """One panel for each (label, figure), side by side; `x` names the size."""
    width = 10 + 390 * len(panels)
    drawn = "".join(
        _panel(runs, x, label, name, 60 + number * 390)
        for number, (label, name) in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="280"'
        f' viewBox="0 0 {width} 280" font-family="sans-serif" font-size="12">\n'
        f'<rect width="{width}" height="280" fill="#ffffff"/>\n{drawn}</svg>\n'
    )


def _panel(runs: Sequence[Mapping[str, Any]], x: str, label: str, name: str, left: float) -> str:
    sizes = [math.log10(run[x]) for run in runs]
    least, span = min(sizes), max(sizes) - min(sizes) or 1.0
    most = max(run[name] for run in runs)
    bottom = _TOP + _HEIGHT
    places = [
        (left + 15 + (_WIDTH - 30) * (size - least) / span, bottom - _HEIGHT * run[name] / most)
        for run, size in zip(runs, sizes, strict=True)
    ]
    line = " ".join(f"{at_x:.1f},{at_y:.1f}" for at_x, at_y in places)
    parts = [
        f'<text x="{left}" y="24" font-size="14">{label}</text>',
        f'<path d="M{left} {_TOP} V{bottom} H{left + _WIDTH}" fill="none" stroke="#555"/>',
        f'<polyline points="{line}" fill="none" stroke="{_COLOUR}" stroke-width="2"/>',
    ]
    for run, (at_x, at_y) in zip(runs, places, strict=True):
        middle = f'x="{at_x:.1f}" text-anchor="middle"'
        parts += [
            f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="4" fill="{_COLOUR}"/>',
            f'<text {middle} y="{at_y - 9:.1f}">{_told(run[name])}</text>',
            f'<text {middle} y="{bottom + 18}">{_size(run[x])}</text>',
        ]
    centre = left + _WIDTH / 2
    parts.append(f'<text x="{centre}" y="{bottom + 36}" text-anchor="middle">{x}</text>')
    return "\n".join(parts) + "\n"


def _told(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _size(value: int) -> str:
    return f"{value // 1_000_000}M" if value >= 1_000_000 else f"{value // 1_000}k"
