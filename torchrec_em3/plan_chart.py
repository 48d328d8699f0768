"""Stacked bars as inline SVG, for what a rank's memory and time are made of; colours as in `torchrec_em3.plots`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

__all__ = ["Part", "Stack", "stacked_bars"]

WIDTH = 360.0
ROW, BAR = 40.0, 16.0
MARGIN = 4.0


@dataclass(frozen=True)
class Part:
    """A piece of a bar: what it is called, its colour (a series number) and its length; `faint` draws it pale."""

    name: str
    series: int
    value: float
    faint: bool = False


@dataclass(frozen=True)
class Stack:
    """A bar of several parts; `limit`, if given, is what its length must not exceed, `remark` stands at its right."""

    name: str
    parts: Sequence[Part]
    remark: str
    limit: float | None = None


def stacked_bars(stacks: Sequence[Stack], title: str, form: Callable[[float], str]) -> Markup:
    """Draw bars below each other on a common scale from 0; empty if all lengths are 0.

    Args:
        stacks: From top to bottom.
        title: What the picture shows, for readers who cannot see it.
        form: Turns a length into text.
    """
    longest = max((max(_length(stack), stack.limit or 0.0) for stack in stacks), default=0.0)
    if longest <= 0:
        return Markup("")
    scale = (WIDTH - 2 * MARGIN) / longest
    rows = [mark for place, stack in enumerate(stacks) for mark in _row(stack, place * ROW, scale, form)]
    height = ROW * len(stacks)
    head = f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">'
    return Markup(head + "".join(rows) + "</svg>")


def _row(stack: Stack, top: float, scale: float, form: Callable[[float], str]) -> Iterator[str]:
    yield f'<text x="{MARGIN:.0f}" y="{top + 12:.1f}">{escape(stack.name)}</text>'
    right = WIDTH - MARGIN
    yield f'<text class="tick" x="{right:.0f}" y="{top + 12:.1f}" text-anchor="end">{escape(stack.remark)}</text>'
    left, y = MARGIN, top + 17
    if stack.limit is not None:
        width = stack.limit * scale
        yield f'<rect class="frame" x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="{BAR:.0f}"/>'
    for part in stack.parts:
        width = part.value * scale
        if width <= 0:
            continue
        faint = " faint" if part.faint else ""
        yield (
            f'<rect class="s{part.series} fill{faint}" x="{left:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" '
            f'height="{BAR:.0f}"><title>{escape(f"{part.name}, {stack.name}: {form(part.value)}")}</title></rect>'
        )
        left += width
    if stack.limit is not None:
        x = MARGIN + stack.limit * scale
        yield f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 2:.1f}" y2="{y + BAR + 2:.1f}"/>'


def _length(stack: Stack) -> float:
    return sum(part.value for part in stack.parts)
