"""Charts as plain data; :mod:`~shrinkformer.pictures.svg` and :mod:`~shrinkformer.pictures.png` draw the same ones."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

DENSE, PRUNED, QUANTIZED = "dense", "pruned", "quantized"
"""Roles that have one colour in all charts."""

OTHERS = (PRUNED, "second", "third", "fourth", "fifth", "sixth")
"""Roles of things that are compared with each other, such as methods."""

NOTHING = math.nan
"""In place of a value that is not there."""


@dataclass(frozen=True)
class Series:
    """Bars of one colour.

    Attributes:
        name: In the legend.
        role: Decides the colour.
        values: One for each category, at least 0; not finite where there is none.
    """

    name: str
    role: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class BarChart:
    """Horizontal bars, one group of them for each category; the axis starts at 0.

    Attributes:
        title: What is shown.
        axis: What the values are, with their unit.
        categories: Names of the groups, from top to bottom.
        series: The bars of a group.
        form: Format specification of the values.
        category_axis: What the categories are, such as "layer".
        full: What the one series is a part of, drawn behind it, such as the dense sizes; None where that is unknown.
        limit: End of the axis where that is known, such as 1 for a share.
    """

    title: str
    axis: str
    categories: tuple[str, ...]
    series: tuple[Series, ...]
    form: str = ",.0f"
    category_axis: str = ""
    full: Series | None = None
    limit: float = 0.0

    @property
    def end(self) -> float:
        """Largest value of the axis."""
        drawn = (*self.series, self.full) if self.full else self.series
        return max([self.limit, *finite(value for each in drawn for value in each.values)], default=0.0) or 1.0

    @property
    def has_legend(self) -> bool:
        """Whether bars of several colours are to be told apart."""
        return len(self.series) > 1 or self.full is not None

    def label(self, series: Series, category: int) -> str:
        """What stands behind a bar."""
        text = shown(series.values[category], self.form)
        if self.full is not None and math.isfinite(self.full.values[category]):
            text += f" of {shown(self.full.values[category], self.form)}"
        return text


@dataclass(frozen=True)
class Point:
    """A measurement.

    Attributes:
        x: Where.
        y: What.
        error: Standard error of ``y``; not finite where it is unknown.
        text: What was measured, for people.
    """

    x: float
    y: float
    error: float = NOTHING
    text: str = ""

    @property
    def low(self) -> float:
        """Lower end of the error bar."""
        return self.y - (self.error if math.isfinite(self.error) else 0.0)

    @property
    def high(self) -> float:
        """Upper end of the error bar."""
        return self.y + (self.error if math.isfinite(self.error) else 0.0)


@dataclass(frozen=True)
class PointSeries:
    """Points of one colour and shape, joined in the order of ``x``."""

    name: str
    role: str
    points: tuple[Point, ...]
    shape: str = "circle"


@dataclass(frozen=True)
class PointChart:
    """Points with error bars; the horizontal axis starts at 0, the vertical one holds all error bars.

    Attributes:
        title: What is shown.
        x_axis: What ``x`` is, with its unit.
        y_axis: What ``y`` is, with its unit.
        series: The points.
        baseline: Name of a series whose level is drawn through the whole chart, or "".
        form: Format specification of ``y``.
    """

    title: str
    x_axis: str
    y_axis: str
    series: tuple[PointSeries, ...]
    baseline: str = ""
    form: str = ".4f"

    @property
    def points(self) -> list[Point]:
        """All of them that can be drawn."""
        every = (point for each in self.series for point in each.points)
        return [point for point in every if math.isfinite(point.x) and math.isfinite(point.y)]

    @property
    def x_end(self) -> float:
        """Largest value of the horizontal axis."""
        return max((point.x for point in self.points), default=1.0) * 1.04 or 1.0

    @property
    def y_range(self) -> tuple[float, float]:
        """Smallest and largest value of the vertical axis."""
        low = min((point.low for point in self.points), default=0.0)
        high = max((point.high for point in self.points), default=1.0)
        spare = (high - low) * 0.12 or abs(high) * 0.05 or 1.0
        return low - spare, high + spare


Chart = BarChart | PointChart


def finite(values: Iterable[float]) -> list[float]:
    """Those that are numbers."""
    return [value for value in values if math.isfinite(value)]


def has_data(chart: Chart) -> bool:
    """Whether there is anything to draw."""
    if isinstance(chart, PointChart):
        return bool(chart.points)
    return bool(finite(value for each in chart.series for value in each.values))


def shown(value: float, form: str) -> str:
    """A value for people; "n/a" where there is none."""
    return format(value, form) if math.isfinite(value) else "n/a"


def tokens(length: float) -> str:
    """A length in tokens, which may be a mean."""
    return f"{length:,.2f}".removesuffix(".00") + " tokens" if math.isfinite(length) else "n/a"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, at most ``most`` of them and at least one step apart.

    >>> ticks(0, 1536)
    [0.0, 500.0, 1000.0, 1500.0]
    >>> ticks(0.81, 0.88)
    [0.82, 0.84, 0.86, 0.88]
    """
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return []
    base = 10.0 ** math.floor(math.log10((high - low) / most))
    tolerance = 1e-9 * (high - low)
    for factor in (1, 2, 5, 10, 20, 50):
        step = base * factor
        first, last = math.ceil((low - tolerance) / step), math.floor((high + tolerance) / step)
        if last - first < most:
            return [round(number * step, 12) for number in range(first, last + 1)]
    return []
