"""Folded stacks as a flame graph: one SVG without scripts, root at the top, names as tooltips."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape

_WIDTH, _ROW, _TOP, _LETTER = 1200, 17, 30, 6.6
_LEAST = 0.003  # a box narrower than this share of the whole is left out
_OURS, _COLUMNS, _OTHERS = "#e8a04c", "#7fa8d6", "#c9c9c4"


@dataclass
class Frame:
    """A function, its samples with all that it called, and its callees."""

    name: str
    samples: int = 0
    callees: dict[str, Frame] = field(default_factory=dict)


def tree_of(stacks: Mapping[str, int]) -> Frame:
    """The call tree of folded stacks (`a;b;c`: samples)."""
    root = Frame("all")
    for stack, samples in stacks.items():
        at = root
        at.samples += samples
        for name in stack.split(";"):
            at = at.callees.setdefault(name, Frame(name))
            at.samples += samples
    return root


def folded(lines: Iterable[str]) -> dict[str, int]:
    """What py-spy writes as raw, with paths cut to where a package or this repository begins."""
    stacks: dict[str, int] = {}
    for line in lines:
        stack, _, samples = line.rstrip().rpartition(" ")
        short = ";".join(_short(name) for name in stack.split(";"))
        stacks[short] = stacks.get(short, 0) + int(samples)
    return stacks


def _short(name: str) -> str:
    told = re.match(r"(.*) \((.*?)\)$", name)
    if told is None:
        return name
    path = re.sub(r":\d+$", "", told[2])
    path = re.sub(r"^.*?(site-packages|lib/python\d\.\d+)/", "", path)
    path = re.sub(r"^.*?/(?=(causemesh|services|benchmarks)/)", "", path)
    return f"{told[1]} ({path.removeprefix('/')})"


def svg(stacks: Mapping[str, int], title: str) -> str:
    """The picture."""
    root = tree_of(stacks)
    boxes: list[str] = []
    deepest = _draw(root, 0.0, 0, root.samples, boxes)
    height = _TOP + (deepest + 1) * _ROW + 10
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}"'
        f' viewBox="0 0 {_WIDTH} {height}" font-family="monospace" font-size="11">\n'
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>\n'
        f'<text x="6" y="19" font-size="14">{escape(title)}, {root.samples:,} samples</text>\n'
    )
    return head + "\n".join(boxes) + "\n</svg>\n"


def _draw(frame: Frame, x: float, depth: int, whole: int, boxes: list[str]) -> int:
    """Draw a frame and its callees; returns the deepest row."""
    width = _WIDTH * frame.samples / whole
    y, share = _TOP + depth * _ROW, frame.samples / whole
    letters = int((width - 6) / _LETTER)
    label = frame.name if len(frame.name) <= letters else frame.name[: max(letters - 1, 0)] + "…"
    text = f'<text x="{x + 3:.1f}" y="{y + 12}">{escape(label)}</text>' if letters >= 4 else ""
    boxes.append(
        f'<g><title>{escape(frame.name)}: {share:.1%}</title><rect x="{x:.1f}" y="{y}"'
        f' width="{width:.1f}" height="{_ROW - 1}" fill="{_colour(frame.name)}"/>{text}</g>'
    )
    deepest = depth
    for callee in sorted(frame.callees.values(), key=lambda one: -one.samples):
        if callee.samples >= _LEAST * whole:
            deepest = max(deepest, _draw(callee, x, depth + 1, whole, boxes))
            x += _WIDTH * callee.samples / whole
    return deepest


def _colour(name: str) -> str:
    if re.search(r"\((causemesh|services)/", name):
        return _OURS
    return _COLUMNS if re.search(r"\((polars|numpy)/", name) else _OTHERS
