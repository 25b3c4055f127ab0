"""The page of a report: its newest run in detail, and all its runs against each other."""

import math
from collections.abc import Iterable, Sequence

from shrinkformer.pictures.charts import DENSE, NOTHING, PRUNED, shown
from shrinkformer.pictures.page import facts, figures, lead, page, section, tiles
from shrinkformer.pictures.run_charts import comparison_charts, newest_of_each, run_charts
from shrinkformer.pictures.run_tables import code_table, figure_table, layer_table, provenance, run_table
from shrinkformer.pictures.runs import RunRecord, change_in_words, form_of, number, read_runs, section_of, share


def report_page(lines: Iterable[str]) -> str | None:
    """The HTML page of a report.

    Args:
        lines: Of the ``.jsonl`` file.

    Returns:
        The page; None if no line is a run.
    """
    runs, unread = read_runs(lines)
    return page_of_runs(runs, unread) if runs else None


def page_of_runs(runs: Sequence[RunRecord], unread: int = 0) -> str:
    """The same for runs that were read before.

    Args:
        runs: At least one, oldest first.
        unread: Lines of the file that are no run.
    """
    run = next((each for each in reversed(runs) if len(each.models) > 1), runs[-1])  # one that made a model, if any
    distinct = newest_of_each(runs)
    charts = run_charts(run)
    others = f" in detail; {len(runs)} runs in all" if len(runs) > 1 else ""
    note = f" {unread} lines of the report could not be read." if unread else ""
    return page(
        run_title(runs),
        [
            lead(f"{_asked(run)}, {run.moment}{others}.{note}"),
            tiles(_headline(run)),
            section("Every run" if len(distinct) > 1 else "This run", figures(comparison_charts(distinct))),
            section("What each layer kept", figures(charts["layers"]), layer_table(run)),
            section("Quantized layers", figures(charts["codes"]), code_table(run)),
            section("Time", figures(charts["time"])),
            section("Figures of the newest run", figure_table(run)),
            section("Runs", run_table(distinct)) if len(distinct) > 1 else "",
            section("Where it comes from", facts(provenance(run))),
        ],
    )


def run_title(runs: Sequence[RunRecord]) -> str:
    """Model and tasks."""
    tasks = dict.fromkeys(run.word("task_name") for run in runs)
    return f"{runs[-1].word('model_name')} on {', '.join(tasks)}"


def _headline(run: RunRecord) -> list[tuple[str, str, str]]:
    """The few figures that most people look for."""
    dense, last = run.models[DENSE], run.last
    shapes = list(dense.latency_ms)[-1:]  # the largest batch comes last
    rows: list[tuple[str, str, str]] = []
    for name in run.metrics[:2]:
        form, given = form_of(dense.metrics[name]), run.heading(DENSE)
        remark = f"{given} {shown(dense.metrics[name], form)} ± {shown(dense.errors.get(name, NOTHING), form)}"
        remark = f"{remark}; change {change_in_words(run, name)}" if last is not dense else given
        rows.append((name, shown(last.metrics.get(name, NOTHING), form), remark))
    if last is dense:
        return rows
    for title, mine, before, unit in (
        ("MACs kept", last.macs / 1e6, dense.macs / 1e6, "M"),
        ("parameters kept", last.parameters / 1e6, dense.parameters / 1e6, "M"),
        ("file size kept", last.bytes / 1e6, dense.bytes / 1e6, "MB"),
        *((f"latency {shape}", last.latency_ms.get(shape, NOTHING), dense.latency_ms[shape], "ms") for shape in shapes),
    ):
        rows.append((title, share(mine, before), f"{shown(mine, ',.1f')} of {shown(before, ',.1f')} {unit}"))
    return rows


def _asked(run: RunRecord) -> str:
    target = f"target ratio {run.word('target_ratio')}, " if run.word("target_ratio") else ""
    kept = number(section_of(run.fields, "ratio").get("macs"))
    reached = f" ({shown(kept, '.4f')} of the MACs kept)" if PRUNED in run.models and math.isfinite(kept) else ""
    return f"{target}{run.how}, mu {run.mu}{reached}, seed {run.word('seed')}"
