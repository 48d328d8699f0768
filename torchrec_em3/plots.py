"""Charts as inline SVG: they follow the page's colours in light and dark, and marks name their values when pointed at.

Colours are classes (`s0` to `s7` for series, `k0` to `k7` for categories), so the page's style sheet chooses them.
Series also differ in dashes and categories in shapes, so that nothing rests on colour alone. All texts are escaped.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

__all__ = [
    "COLOURS",
    "Bar",
    "BarGroup",
    "Dot",
    "Line",
    "bar_chart",
    "dot_outline",
    "line_chart",
    "map_chart",
    "reliability_chart",
    "short",
]

COLOURS = 8
WIDTH, HEIGHT = 330.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 8.0, 10.0, 42.0
MAP_SIZE = 330.0
DASHES = ("", "6 3", "2 3", "8 3 2 3")


@dataclass(frozen=True)
class Line:
    """A series of points joined in order; `low` and `high`, if given, are the ends of an interval at each point."""

    label: str
    series: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Bar:
    """One bar; `value` None leaves its place empty; `interval` is drawn as an error bar."""

    label: str
    series: int
    value: float | None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class BarGroup:
    """Bars side by side over one name; `faint` draws them pale, `mark` is a level to compare them with."""

    name: str
    note: str
    bars: Sequence[Bar]
    faint: bool = False
    mark: float | None = None


@dataclass(frozen=True)
class Dot:
    """One item on a map: place in the unit square, category, what it is called, and whether it is drawn hollow."""

    x: float
    y: float
    category: int
    title: str
    hollow: bool = False


class _Axes:
    """Maps data to the drawing area and draws the frame: ticks, grid and axis titles."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self._x, self._y = x, y

    def px(self, value: float) -> float:
        low, high = self._x
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def py(self, value: float) -> float:
        low, high = self._y
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    @property
    def bottom(self) -> float:
        return self._y[0]

    def level(self, value: float) -> str:
        y = self.py(value)
        return f'<line class="axis" x1="{LEFT:.0f}" x2="{WIDTH - RIGHT:.0f}" y1="{y:.1f}" y2="{y:.1f}"/>'

    def frame(self, x_title: str, y_title: str, x_ticks: Iterable[tuple[float, str]]) -> Iterator[str]:
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        for value, text in _labelled(_ticks(*self._y, 5)):
            y = self.py(value)
            yield f'<line class="grid" x1="{LEFT:.0f}" x2="{right:.0f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text class="tick" x="{LEFT - 5:.0f}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>'
        for value, text in x_ticks:
            yield _centred("tick", self.px(value), bottom + 14, text)
        middle = TOP + (bottom - TOP) / 2
        yield _centred("title", (LEFT + right) / 2, HEIGHT - 6, x_title)
        yield (
            f'<text class="title" transform="translate(10 {middle:.0f}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_title)}</text>"
        )


def line_chart(
    lines: Sequence[Line], x_title: str, y_title: str, x_ticks: Sequence[tuple[float, str]] | None = None
) -> Markup:
    """Draw series over a common axis; a single point becomes a dot, intervals a band. Empty without points.

    Args:
        lines: The series.
        x_title: Title of the horizontal axis.
        y_title: Title of the vertical axis.
        x_ticks: Places and names of the horizontal ticks; None for round numbers.
    """
    drawn = [line for line in lines if len(line.x)]
    if not drawn:
        return Markup("")
    xs = [value for line in drawn for value in line.x]
    ys = [value for line in drawn for column in (line.y, line.low, line.high) for value in column]
    x_range = _padded(min(xs), max(xs), 0.0 if x_ticks is None else 0.04)
    axes = _Axes(x_range, _padded(min(ys), max(ys), 0.05))
    parts = list(axes.frame(x_title, y_title, _labelled(_ticks(*x_range, 4)) if x_ticks is None else x_ticks))
    parts.append(axes.level(axes.bottom))
    parts += [_band(axes, line) for line in drawn if len(line.low)]
    for line in drawn:
        points = [(axes.px(x), axes.py(y)) for x, y in zip(line.x, line.y, strict=True)]
        parts.append(_polyline(points, line))
        if len(points) <= 30:
            names = dict(x_ticks or ())
            parts += [
                f'<circle class="s{line.series % COLOURS} fill" cx="{px:.1f}" cy="{py:.1f}" r="2.5">'
                f"<title>{escape(line.label)}: {y:.4g} at {escape(names.get(x) or short(x))}</title></circle>"
                for (px, py), x, y in zip(points, line.x, line.y, strict=True)
            ]
    return _svg(parts, WIDTH, HEIGHT, f"{y_title} over {x_title}")


def bar_chart(groups: Sequence[BarGroup], y_title: str, base: float, x_title: str = "", digits: int = 4) -> Markup:
    """Draw groups of bars that grow from `base`, up or down; marks are short lines across their group.

    Args:
        groups: From left to right.
        y_title: Title of the value axis.
        base: Level with a meaning of its own from which the bars are drawn, for example 0, or 0.5 for an AUC.
        x_title: Title of the groups, in place of notes.
        digits: Decimals in the names of the bars.
    """
    levels = [bar.value for group in groups for bar in group.bars if bar.value is not None]
    levels += [group.mark for group in groups if group.mark is not None]
    levels += [end for group in groups for bar in group.bars for end in bar.interval or ()]
    if not levels:
        return Markup("")
    low, high = _padded(min(base, *levels), max(base, *levels), 0.06)
    axes = _Axes((0.0, float(len(groups))), (base if min(levels) >= base else low, high))
    names = [(i + 0.5, group.name) for i, group in enumerate(groups)]
    parts = list(axes.frame(x_title, y_title, names))
    for i, group in enumerate(groups):
        parts.append(_centred("tick", axes.px(i + 0.5), HEIGHT - BOTTOM + 27, group.note))
        parts += _bars(axes, group, i, base, digits)
    parts.append(axes.level(base))
    return _svg(parts, WIDTH, HEIGHT, y_title)


def reliability_chart(lines: Sequence[Line]) -> Markup:
    """Draw share of ones over predicted probability, with the diagonal of perfect calibration and error bars."""
    values = [value for line in lines for column in (line.x, line.y, line.high) for value in column]
    if not values:
        return Markup("")
    top = min(1.0, 1.05 * max(values)) or 1.0
    axes = _Axes((0.0, top), (0.0, top))
    ticks = _labelled(_ticks(0.0, top, 5))
    parts = [*axes.frame("mean predicted probability", "share of positives", ticks), axes.level(0.0)]
    ends = (axes.px(0), axes.py(0), axes.px(top), axes.py(top))
    parts.append('<line class="diagonal" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>'.format(*ends))
    for line in lines:
        points = [(axes.px(x), axes.py(y)) for x, y in zip(line.x, line.y, strict=True)]
        parts.append(_polyline(points, line))
        for (px, py), x, y, low, high in zip(points, line.x, line.y, line.low, line.high, strict=True):
            series = f"s{line.series % COLOURS}"
            whisker = f'x1="{px:.1f}" x2="{px:.1f}" y1="{axes.py(low):.1f}" y2="{axes.py(high):.1f}"'
            parts.append(f'<line class="{series} stroke" {whisker}/>')
            parts.append(
                f'<circle class="{series} fill" cx="{px:.1f}" cy="{py:.1f}" r="2.5"><title>{escape(line.label)}: '
                f"predicted {x:.3f}, share {y:.3f} ({low:.3f} to {high:.3f})</title></circle>"
            )
    return _svg(parts, WIDTH, HEIGHT, "share of positives over predicted probability")


def map_chart(dots: Sequence[Dot], title: str) -> Markup:
    """Draw items on a square without axes, since the directions of such a map mean nothing."""
    parts = [f'<rect class="frame" x="0.5" y="0.5" width="{MAP_SIZE - 1:.0f}" height="{MAP_SIZE - 1:.0f}"/>']
    span = MAP_SIZE - 16.0
    # Hollow dots last, on top: they are the few that the map is about.
    for dot in sorted(dots, key=lambda dot: dot.hollow):
        shape = dot_outline(dot.category, 8.0 + dot.x * span, 8.0 + dot.y * span)
        hollow = " hollow" if dot.hollow else ""
        parts.append(
            f'<path class="dot k{dot.category % COLOURS}{hollow}" d="{shape}"><title>{escape(dot.title)}</title></path>'
        )
    return _svg(parts, MAP_SIZE, MAP_SIZE, title)


def short(value: float) -> str:
    """Return a number for an axis: 3 significant digits, thousands and millions as k and M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _svg(parts: Iterable[str], width: float, height: float, title: str) -> Markup:
    head = f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">'
    return Markup(head + "".join(parts) + "</svg>")


def _centred(kind: str, x: float, y: float, text: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(text)}</text>'


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    if high <= low:
        room = abs(low) * 0.05 or 0.5
        return low - room, high + room
    return low - share * (high - low), high + share * (high - low)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Return round numbers in [low, high], about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= raw * 0.9)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _labelled(ticks: Sequence[float]) -> list[tuple[float, str]]:
    """Name ticks with as many decimals as tell them apart, or as thousands and millions."""
    if max(map(abs, ticks), default=0.0) >= 1000:
        return [(tick, short(tick)) for tick in ticks]
    gap = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    decimals = next((d for d in range(7) if abs(round(gap, d) - gap) < gap * 1e-6), 6)
    return [(tick, f"{tick + 0.0:.{decimals}f}") for tick in ticks]


def _polyline(points: Sequence[tuple[float, float]], line: Line) -> str:
    dash = DASHES[line.series // COLOURS % len(DASHES)] or ("4 2.5", "")[line.series % 2]
    coordinates = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<polyline class="s{line.series % COLOURS} stroke" stroke-dasharray="{dash}" points="{coordinates}">'
        f"<title>{escape(line.label)}</title></polyline>"
    )


def _band(axes: _Axes, line: Line) -> str:
    """Return the area between the lower and the upper ends of a line's intervals."""
    there = [(axes.px(x), axes.py(low)) for x, low in zip(line.x, line.low, strict=True)]
    back = [(axes.px(x), axes.py(high)) for x, high in zip(line.x, line.high, strict=True)]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (*there, *reversed(back)))
    return f'<polygon class="s{line.series % COLOURS} band" points="{points}"/>'


def _bars(axes: _Axes, group: BarGroup, place: int, base: float, digits: int) -> Iterator[str]:
    width = 0.84 / max(len(group.bars), 1)
    faint = " faint" if group.faint else ""
    for j, bar in enumerate(group.bars):
        if bar.value is None:
            continue
        x = place + 0.08 + j * width
        left, right = axes.px(x), axes.px(x + width * 0.92)
        top, bottom = sorted((axes.py(bar.value), axes.py(base)))
        box = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{max(bottom - top, 0.5):.1f}"'
        name = f"{bar.label}, {group.name}: {bar.value:.{digits}f}"
        yield f'<rect class="s{bar.series % COLOURS} fill{faint}" {box}><title>{escape(name)}</title></rect>'
        if bar.interval is not None:
            low, high = (axes.py(end) for end in bar.interval)
            middle = (left + right) / 2
            yield f'<line class="whisker" x1="{middle:.1f}" x2="{middle:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
    if group.mark is not None:
        y = axes.py(group.mark)
        yield (
            f'<line class="mark" x1="{axes.px(place + 0.04):.1f}" x2="{axes.px(place + 0.96):.1f}" y1="{y:.1f}" '
            f'y2="{y:.1f}"><title>best attainable, {escape(group.name)}: {group.mark:.{digits}f}</title></line>'
        )


def dot_outline(category: int, x: float, y: float) -> str:
    """Return the outline of a dot: circle, square, triangle or diamond by turns."""
    if category % 4 == 0:
        return f"M{x - 2.6:.1f} {y:.1f}a2.6 2.6 0 1 0 5.2 0a2.6 2.6 0 1 0 -5.2 0z"
    if category % 4 == 1:
        return f"M{x - 2.3:.1f} {y - 2.3:.1f}h4.6v4.6h-4.6z"
    if category % 4 == 2:
        return f"M{x:.1f} {y - 3.1:.1f}l2.9 5.2h-5.8z"
    return f"M{x:.1f} {y - 3.2:.1f}l3.2 3.2l-3.2 3.2l-3.2 -3.2z"
