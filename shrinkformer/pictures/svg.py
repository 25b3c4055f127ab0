"""Charts as SVG for an HTML page, whose style sheet gives every role its colour.

A chart is ``WIDTH`` units wide, about as many as a phone has pixels, so that text keeps its size there; pages put
several beside each other where there is room.
"""

import html
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise, product

from shrinkformer.pictures.charts import (
    NOTHING,
    BarChart,
    Chart,
    Point,
    PointChart,
    PointSeries,
    Series,
    finite,
    shown,
    ticks,
)

WIDTH = 360

_LETTER = 6.2  # mean width of a letter of the 11 pixel text
_ROW, _GAP = 12, 6  # a bar, room between groups
_TOP, _AXIS = 6, 38
_LEGEND = 18
_HEIGHT = 250  # of a chart with points
_LEAST_BAR = 0.5  # so that a value above 0 is seen

Box = tuple[float, float, float, float]
"""Left, upper, right and lower end."""


def draw(chart: Chart) -> str:
    """One ``<svg>`` element with a title and a description for those who do not see it."""
    body, height = _bars(chart) if isinstance(chart, BarChart) else _points(chart)
    return (
        f'<svg viewBox="0 0 {WIDTH} {_n(height)}" role="img">'
        f"<title>{text(chart.title)}</title><desc>{text(_description(chart))}</desc>"
        f"{''.join(body)}</svg>"
    )


def text(value: object) -> str:
    """Text for HTML and SVG: escaped, and without the control characters that XML forbids."""
    printable = "".join(letter if letter.isprintable() else " " for letter in str(value))
    return html.escape(printable)


def _description(chart: Chart) -> str:
    if isinstance(chart, BarChart):
        names = ", ".join(
            f"{each.name} up to {shown(max(finite(each.values), default=NOTHING), chart.form)}" for each in chart.series
        )
        return f"{chart.axis} of {len(chart.categories)} {chart.category_axis or 'categories'}: {names}."
    return f"{chart.y_axis} against {chart.x_axis}: {len(chart.points)} measurements."


def _bars(chart: BarChart) -> tuple[list[str], float]:
    categories = [_clip(name, 18) for name in chart.categories]
    zero = len(_tick_labels(ticks(0, chart.end))[0]) / 2  # letters of the first tick that stand left of the axis
    left = max([len(chart.category_axis) + zero, *map(len, categories)]) * _LETTER + 12
    labels = [chart.label(each, row) for each in chart.series for row in range(len(chart.categories))]
    right = max(map(len, labels)) * _LETTER + 8
    scale = (WIDTH - left - right) / chart.end
    body: list[str] = []
    top = float(_TOP)
    if chart.has_legend:
        shapes = [(each.role, each.name, "square") for each in ((chart.full,) if chart.full else ()) + chart.series]
        rows, top = _legend(shapes, top)
        body += rows
    height = top + len(categories) * (_ROW * len(chart.series) + _GAP)
    body += _vertical_grid(chart.end, scale, left, top - 2, height)
    y = top
    for row, name in enumerate(categories):
        middle = y + _ROW * len(chart.series) / 2 + 4
        body.append(f'<text x="{_n(left - 6)}" y="{_n(middle)}" class="e">{text(name)}</text>')
        if chart.full is not None:
            body.append(_bar(chart.full, row, left, y, scale))
        for each in chart.series:
            body.append(_bar(each, row, left, y, scale))
            ends = [each.values[row], chart.full.values[row] if chart.full else 0.0]
            end = left + scale * max((value for value in ends if math.isfinite(value)), default=0.0)
            body.append(f'<text x="{_n(end + 5)}" y="{_n(y + _ROW / 2 + 3.5)}">{text(chart.label(each, row))}</text>')
            y += _ROW
        y += _GAP
    if chart.category_axis:
        x = _n(left - 6 - zero * _LETTER)
        body.append(f'<text x="{x}" y="{_n(height + 13)}" class="e a">{text(chart.category_axis)}</text>')
    middle = left + (WIDTH - left - right) / 2
    body.append(f'<text x="{_n(middle)}" y="{_n(height + 30)}" class="m a">{text(chart.axis)}</text>')
    return body, height + _AXIS


def _bar(series: Series, row: int, left: float, y: float, scale: float) -> str:
    value = series.values[row]
    if not math.isfinite(value) or value <= 0:
        return ""
    wide = max(value * scale, _LEAST_BAR)
    return f'<rect class="{series.role}" x="{_n(left)}" y="{_n(y)}" width="{_n(wide)}" height="{_ROW - 1}"/>'


def _vertical_grid(end: float, scale: float, left: float, top: float, bottom: float) -> Iterator[str]:
    marks = ticks(0, end)
    for value, label in zip(marks, _tick_labels(marks), strict=True):
        x = _n(left + value * scale)
        yield f'<path class="g" d="M{x} {_n(top)}V{_n(bottom)}"/>'
        yield f'<text x="{x}" y="{_n(bottom + 13)}" class="m t">{label}</text>'


def _legend(entries: Sequence[tuple[str, str, str]], top: float) -> tuple[list[str], float]:
    """Entries ``(role, name, shape)`` side by side, in as many lines as they need; and where the chart begins."""
    body: list[str] = []
    x, y = 4.0, top + 8
    for role, name, shape in entries:
        label = _clip(name, 44)
        wide = 16 + len(label) * _LETTER + 12
        if x > 4 and x + wide > WIDTH:
            x, y = 4.0, y + _LEGEND
        body.append(_mark(shape, role, x + 5, y - 1, 5))
        body.append(f'<text x="{_n(x + 15)}" y="{_n(y + 3)}">{text(label)}</text>')
        x += wide
    return body, y + 14


def _points(chart: PointChart) -> tuple[list[str], float]:
    low, high = chart.y_range
    marks = ticks(low, high, 6)
    names = _tick_labels(marks)
    left = max(map(len, names), default=0) * _LETTER + 12
    body, top = _legend([(each.role, each.name, each.shape) for each in chart.series], float(_TOP))
    top += _LEGEND  # the name of the vertical axis stands above it: turned text is hard to read
    body.append(f'<text x="4" y="{_n(top - 8)}" class="a">{text(chart.y_axis)}</text>')
    bottom = top + _HEIGHT - 60
    x_scale, y_scale = (WIDTH - left - 14) / chart.x_end, (bottom - top) / (high - low)

    def place(point: Point) -> tuple[float, float]:
        return left + point.x * x_scale, bottom - (point.y - low) * y_scale

    for value, name in zip(marks, names, strict=True):
        y = bottom - (value - low) * y_scale
        body.append(f'<path class="g" d="M{_n(left)} {_n(y)}H{WIDTH - 14}"/>')
        body.append(f'<text x="{_n(left - 6)}" y="{_n(y + 4)}" class="e t">{name}</text>')
    body += _vertical_grid(chart.x_end, x_scale, left, bottom, bottom + 4)
    middle = _n((left + WIDTH - 14) / 2)
    body.append(f'<text x="{middle}" y="{_n(bottom + 32)}" class="m a">{text(chart.x_axis)}</text>')
    taken: list[Box] = []
    for each in chart.series:
        points = [point for point in each.points if math.isfinite(point.x) and math.isfinite(point.y)]
        places = sorted(map(place, points))
        if each.name == chart.baseline and places:
            taken.append((left, places[0][1] - 1, WIDTH, places[0][1] + 1))
            body.append(f'<path class="b" d="M{_n(left)} {_n(places[0][1])}H{WIDTH - 14}"/>')
        elif len(places) > 1:
            taken += _along(places)
            path = "L".join(f"{_n(x)} {_n(y)}" for x, y in places)
            body.append(f'<path class="l {each.role}" d="M{path}"/>')
        for point in points:
            x, y = place(point)
            reach = point.error * y_scale if math.isfinite(point.error) else 0.0
            taken.append((x - 5, y - max(reach, 5), x + 5, y + max(reach, 5)))
            body.append(_measurement(each, point, (x, y, reach), chart.form))
    return body + _values(chart, [place(point) for point in chart.points], taken), bottom + _AXIS


def _along(places: Sequence[tuple[float, float]]) -> Iterator[Box]:
    """Small boxes on a line, for what must not hide it."""
    for (left, start), (right, end) in pairwise(places):
        for step in range(1, 12):
            x, y = left + (right - left) * step / 12, start + (end - start) * step / 12
            yield x - 2, y - 2, x + 2, y + 2


def _measurement(series: PointSeries, point: Point, place: tuple[float, float, float], form: str) -> str:
    """A point and its error bar, at ``x`` and ``y``, ``reach`` above and below."""
    x, y, reach = place
    bar = ""
    if reach > 0:
        up, down = _n(y - reach), _n(y + reach)
        caps = "".join(f"M{_n(x - 3)} {end}H{_n(x + 3)}" for end in (up, down))
        bar = f'<path class="l {series.role}" d="M{_n(x)} {up}V{down}{caps}"/>'
    said = f"{point.text or series.name}: {shown(point.y, form)}"
    said += f" ± {shown(point.error, form)}" if bar else ""
    return f"<g><title>{text(said)}</title>{bar}{_mark(series.shape, series.role, x, y)}</g>"


def _values(chart: PointChart, places: Sequence[tuple[float, float]], boxes: list[Box]) -> list[str]:
    """The value beside every point where it hides nothing; all of them are also in the table and in tooltips."""
    body = []
    for point, (x, y) in zip(chart.points, places, strict=True):
        label = shown(point.y, chart.form)
        wide = len(label) * _LETTER
        for start, base in product((x + 8, x - 8 - wide), (y + 4, y + 13, y - 5)):
            box = (start - 2, base - 9, start + wide + 2, base + 2)
            if start > 0 and start + wide < WIDTH and not any(_overlap(box, other) for other in boxes):
                boxes.append(box)
                body.append(f'<text x="{_n(start)}" y="{_n(base)}" class="t">{text(label)}</text>')
                break
    return body


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _mark(shape: str, role: str, x: float, y: float, size: float = 4.5) -> str:
    if shape == "circle":
        return f'<circle class="{role}" cx="{_n(x)}" cy="{_n(y)}" r="{_n(size)}"/>'
    corners = {
        "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "triangle": ((0, -1.2), (1.2, 1), (-1.2, 1)),
        "diamond": ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)),
        "down": ((0, 1.2), (1.2, -1), (-1.2, -1)),
    }[shape]
    path = "L".join(f"{_n(x + size * right)} {_n(y + size * down)}" for right, down in corners)
    return f'<path class="{role}" d="M{path}Z"/>'


def _tick_labels(values: Sequence[float]) -> list[str]:
    """All with as many decimals as one of them needs."""
    if any(abs(value) >= 1e6 for value in values):
        return [f"{value:.3g}" for value in values]
    decimals = max((len(f"{value:.10g}".partition(".")[2]) for value in values), default=0)
    return [f"{value:,.{decimals}f}" for value in values]


def _clip(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _n(value: float) -> str:
    """A coordinate with one decimal at most."""
    return f"{value:.1f}".removesuffix(".0")
