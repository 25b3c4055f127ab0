"""The same charts as one PNG, by matplotlib, which is an extra."""

import importlib.util
import io
import math
from collections.abc import Sequence
from typing import Any

from shrinkformer.errors import InputError
from shrinkformer.pictures.charts import BarChart, Chart, PointChart, has_data
from shrinkformer.utils.installation import how_to_install

_COLOURS = {
    "dense": "#a3abb5", "pruned": "#0072b2", "quantized": "#d55e00", "second": "#009e73", "third": "#b0518f",
    "fourth": "#8a6d00", "fifth": "#3f8fbf", "sixth": "#555555",
}  # fmt: skip
_MARKERS = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D", "down": "v"}
_COLUMNS = 3
_WIDE, _ROW, _LEAST = 4.6, 0.19, 2.6  # inches: a chart, one bar, the lowest chart


def require_matplotlib() -> None:
    """See, without importing it, that matplotlib is there.

    Raises:
        InputError: It is not.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(f"--png needs matplotlib: {how_to_install('figures')}.")


def draw_png(title: str, charts: Sequence[Chart]) -> bytes:
    """One picture with all charts that have data.

    Args:
        title: Above them.
        charts: From left to right, then from top to bottom.

    Raises:
        InputError: matplotlib is missing, or no chart has data.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [chart for chart in charts if has_data(chart)]
    if not drawn:
        raise InputError("--png: there is nothing to draw.")
    lines = [drawn[start : start + _COLUMNS] for start in range(0, len(drawn), _COLUMNS)]
    heights = [max(_height(chart) for chart in line) for line in lines]
    figure = Figure(figsize=(_WIDE * min(_COLUMNS, len(drawn)), sum(heights) + 0.5), layout="constrained")
    grid = figure.add_gridspec(len(lines), min(_COLUMNS, len(drawn)), height_ratios=heights)
    figure.suptitle(_plain(title), fontweight="bold")
    for row, line in enumerate(lines):
        for column, chart in enumerate(line):
            axes = figure.add_subplot(grid[row, column])
            if isinstance(chart, BarChart):
                _bars(axes, chart)
            else:
                _points(axes, chart)
            above = 18 if isinstance(chart, BarChart) and chart.has_legend else 6  # points; the legend stands below it
            axes.set_title(_plain(chart.title), loc="left", fontsize=10, fontweight="bold", pad=above)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _height(chart: Chart) -> float:
    if isinstance(chart, PointChart):
        return 3.2
    return max(_LEAST, 1.1 + _ROW * len(chart.categories) * (len(chart.series) + 0.5))


def _bars(axes: Any, chart: BarChart) -> None:
    count = len(chart.series)
    places = range(len(chart.categories))
    if chart.full is not None:
        axes.barh(places, [_drawn(value) for value in chart.full.values], 0.75, color=_COLOURS["dense"], label="dense")
    for index, series in enumerate(chart.series):
        thick = 0.75 / count
        at = [place - 0.375 + thick * (index + 0.5) for place in places]
        values = [_drawn(value) for value in series.values]
        axes.barh(at, values, thick, color=_COLOURS[series.role], label=_plain(series.name))
        for row, value in enumerate(values):
            end = max(value, _drawn(chart.full.values[row]) if chart.full else 0.0)
            axes.annotate(
                chart.label(series, row), (end, at[row]), (3, 0), textcoords="offset points", va="center", fontsize=7
            )
    axes.set_yticks(list(places), [_plain(name) for name in chart.categories])
    axes.invert_yaxis()
    axes.set_xlim(0, chart.end * 1.2)
    axes.set_xlabel(_plain(chart.axis), fontsize=8)
    axes.set_ylabel(_plain(chart.category_axis), fontsize=8)
    if chart.has_legend:
        axes.legend(fontsize=7, frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 0.99))


def _points(axes: Any, chart: PointChart) -> None:
    for series in chart.series:
        points = sorted(
            (point for point in series.points if math.isfinite(point.x) and math.isfinite(point.y)), key=lambda p: p.x
        )
        if not points:
            continue
        colour = _COLOURS[series.role]
        axes.errorbar(
            [point.x for point in points],
            [point.y for point in points],
            [_drawn(point.error) for point in points],
            color=colour,
            marker=_MARKERS[series.shape],
            markersize=5,
            linewidth=1.2,
            capsize=3,
            label=_plain(series.name),
        )
        if series.name == chart.baseline:
            axes.axhline(points[0].y, color=colour, linestyle="--", linewidth=1)
    axes.set_xlim(0, chart.x_end)
    axes.set_ylim(*chart.y_range)
    axes.set_xlabel(_plain(chart.x_axis), fontsize=8)
    axes.set_ylabel(_plain(chart.y_axis), fontsize=8)
    axes.legend(fontsize=7, frameon=False)


def _drawn(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _plain(words: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return words.replace("$", r"\$")
