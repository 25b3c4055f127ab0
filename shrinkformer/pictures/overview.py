"""All runs in one table, for pages and for the terminal: what each budget cost and what it left."""

from collections.abc import Sequence
from dataclasses import dataclass

from shrinkformer.pictures.charts import DENSE, NOTHING, shown
from shrinkformer.pictures.columns import aligned
from shrinkformer.pictures.runs import Figures, RunRecord, change_in_words, with_error

MARK = "* "


@dataclass(frozen=True)
class Overview:
    """A table of runs.

    Attributes:
        titles: Heads of its columns.
        rows: The dense model, then one row for each run; the first cell of the best one begins with a star.
        note: What the star means.
    """

    titles: list[str]
    rows: list[list[str]]
    note: str

    @property
    def text(self) -> str:
        """For a terminal."""
        return "\n".join(f"  {line}" for line in (*aligned([self.titles, *self.rows]), self.note))


def overview(runs: Sequence[RunRecord], metrics: Sequence[str], *, with_time: bool = False) -> Overview:
    """Metrics, changes with their standard errors, sizes and latency of runs of one model.

    Args:
        runs: At least one; of one task if one model shall be marked.
        metrics: Which ones.
        with_time: Say when each run ended.
    """
    best = smallest_as_good(runs)
    shapes = list(dict.fromkeys(shape for run in runs for shape in list(run.models[DENSE].latency_ms)[-1:]))
    titles = ["", *(title for name in metrics for title in (name, "change"))]
    titles += ["MACs (M)", "parameters (M)", "file size (MB)", *(f"latency {shape} (ms)" for shape in shapes)]
    newest = runs[-1]

    def row(label: str, figures: Figures, run: RunRecord | None, moment: str) -> list[str]:
        words = [
            cell
            for name in metrics
            for cell in (with_error(figures, name), "" if run is None else change_in_words(run, name))
        ]
        sizes = [shown(size / 1e6, ",.2f") for size in (figures.macs, figures.parameters, figures.bytes)]
        latency = [shown(figures.latency_ms.get(shape, NOTHING), ",.2f") for shape in shapes]
        return [label, *words, *sizes, *latency, *([moment] if with_time else [])]

    rows = [row(newest.heading(DENSE), newest.models[DENSE], None, "")]
    rows += [
        row(f"{MARK if run is best else ''}{run.label}", run.last, run, run.moment)
        for run in runs
        if len(run.models) > 1
    ]
    return Overview([*titles, *(["time"] if with_time else [])], rows, _note(runs, best))


def smallest_as_good(runs: Sequence[RunRecord]) -> RunRecord | None:
    """The run whose file is the smallest of those that are within one standard error of the dense model."""
    metric = runs[-1].main_metric
    if len({run.word("task_name") for run in runs}) > 1:  # their metrics are not the same
        return None
    found = [run for run in runs if len(run.models) > 1 and run.is_as_good(metric)]
    return min(found, key=lambda run: (run.last.bytes, run.last.macs), default=None)


def _note(runs: Sequence[RunRecord], best: RunRecord | None) -> str:
    metric, given = runs[-1].main_metric, runs[-1].given
    if len({run.word("task_name") for run in runs}) > 1:
        return "runs of several tasks: none is marked as the best"
    if best is None:
        return f"no {metric} is within one standard error (of the change) of that of the {given} model"
    return (
        f"* the smallest model whose {metric} is within one standard error (of the change) of that of the {given} model"
    )
