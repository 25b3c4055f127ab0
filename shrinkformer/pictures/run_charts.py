"""Charts of runs: one in detail, and all of them against each other."""

from collections.abc import Callable, Sequence

from shrinkformer.pictures.charts import (
    DENSE,
    NOTHING,
    OTHERS,
    QUANTIZED,
    BarChart,
    Chart,
    Point,
    PointChart,
    PointSeries,
    Series,
    shown,
)
from shrinkformer.pictures.layers import code_charts, error_chart, size_charts
from shrinkformer.pictures.runs import Figures, RunRecord, form_of, number

_MOST_RUNS = 60  # in the table and in charts; a page is for people
_SHAPES = ("circle", "square", "triangle", "diamond", "down")
_STEPS = ("loading", "calibration", "selection", "allocation", "refit", "quantization", "saving", "evaluation")


def newest_of_each(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Of runs with the same settings the newest one, oldest first, and only so many."""
    newest: dict[tuple[str, ...], RunRecord] = {}
    for run in runs:
        newest.pop(run.settings, None)
        newest[run.settings] = run
    return list(newest.values())[-_MOST_RUNS:]


def run_charts(run: RunRecord) -> dict[str, list[Chart]]:
    """Charts of one run, by part of the page."""
    layers: list[Chart] = []
    if run.layers:
        layers = [*size_charts(run.layers, run.dense_layers), error_chart(run.layers)]
    seconds = run.fields.get("seconds")
    spent = {str(name): number(value) for name, value in seconds.items()} if isinstance(seconds, dict) else {}
    order = [name for name in _STEPS if name in spent] + [n for n in spent if n not in (*_STEPS, "total")]
    steps = BarChart(
        f"Time of each step, {shown(spent.get('total', NOTHING), ',.1f')} s in all",
        "seconds",
        tuple(order),
        (Series("seconds", "sixth", tuple(spent[name] for name in order)),),
        form=",.1f",
    )
    return {
        "layers": layers,
        "codes": list(code_charts(run.quantized_layers)) if run.quantized_layers else [],
        "time": [_latency_chart(run), steps],
    }


def _latency_chart(run: RunRecord) -> BarChart:
    shapes = list(run.models[DENSE].latency_ms)
    series = [
        Series(run.heading(name), name, tuple(model.latency_ms.get(shape, NOTHING) for shape in shapes))
        for name, model in run.models.items()
    ]
    names = tuple(shape.replace("x", " x ", 1) for shape in shapes)
    return BarChart("Latency by inputs x tokens", "milliseconds, median", names, tuple(series), form=",.1f")


def comparison_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Every metric of all runs against MACs and, where something was quantized, against the size of the file."""
    metrics = runs[-1].metrics
    charts: list[Chart] = [
        _comparison(runs, name, "MACs (M) for one input", lambda model: model.macs) for name in metrics
    ]
    if any(QUANTIZED in run.models for run in runs):
        charts += [_comparison(runs, name, "file size (MB)", lambda model: model.bytes) for name in metrics]
    return charts


def _comparison(runs: Sequence[RunRecord], metric: str, axis: str, x_of: Callable[[Figures], float]) -> PointChart:
    def point(model: Figures, words: str) -> Point:
        value, error = model.metrics.get(metric, NOTHING), model.errors.get(metric, NOTHING)
        return Point(x_of(model) / 1e6, value, error, words)

    several = len({run.word("task_name") for run in runs}) > 1  # language models have one report for all tasks
    names = [f"{run.how}, {run.word('task_name')}" if several else run.how for run in runs]
    lines: dict[str, list[Point]] = {}
    quantized = {name for run, name in zip(runs, names, strict=True) if QUANTIZED in run.models}
    for run, name in zip(runs, names, strict=True):
        if len(run.models) > 1:
            lines.setdefault(name, []).append(point(run.last, f"{name}, mu {run.mu}"))
    colours = iter(OTHERS * (1 + len(lines) // len(OTHERS)))
    given = runs[-1].heading(DENSE)
    series = [PointSeries(given, DENSE, (point(runs[-1].models[DENSE], given),), "square")]
    newest_first = sorted(lines, key=lambda name: name != names[-1])  # the newest run has the colour of its bars
    for index, name in enumerate(newest_first):
        role = QUANTIZED if name in quantized else next(colours)
        series.append(PointSeries(name, role, tuple(lines[name]), _SHAPES[index % len(_SHAPES)]))
    return PointChart(
        f"{_title_of(metric)} against {axis.partition(' (')[0]}",
        axis,
        f"{metric}, with standard error",
        tuple(series),
        baseline=given,
        form=form_of(runs[-1].models[DENSE].metrics.get(metric, 0.0)),
    )


def _title_of(metric: str) -> str:
    return metric.replace("_", " on ", 1).capitalize() if metric.startswith("perplexity_") else metric
