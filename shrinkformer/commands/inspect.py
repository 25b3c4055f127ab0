"""``shrinkformer inspect``: what a checkpoint is, or what the runs of a report found, in words and pictures."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shrinkformer.commands.checkpoint_options import InspectOptions
from shrinkformer.errors import InputError
from shrinkformer.pictures.charts import Chart, tokens
from shrinkformer.pictures.checkpoint_page import (
    checkpoint_charts,
    checkpoint_page,
    layer_rows,
    provenance,
    role_in_words,
)
from shrinkformer.pictures.columns import aligned
from shrinkformer.pictures.overview import overview
from shrinkformer.pictures.png import draw_png, require_matplotlib
from shrinkformer.pictures.run_charts import comparison_charts, newest_of_each, run_charts
from shrinkformer.pictures.run_page import page_of_runs, run_title
from shrinkformer.pictures.runs import read_runs
from shrinkformer.utils.files import write_atomically


def inspect(options: InspectOptions) -> None:
    """Everything that ``shrinkformer inspect`` does.

    Raises:
        InputError: There is no checkpoint and no report, or it is damaged, or a picture cannot be drawn.
    """
    if options.png is not None:
        require_matplotlib()
    place = options.place
    if Path(place).suffix == ".jsonl":
        _inspect_report(Path(place), options.html, options.png, as_json=options.json)
    else:
        _inspect_checkpoint(place, options.sequence_length, options.html, options.png, as_json=options.json)


def _inspect_checkpoint(
    place: str, length: float | None, html: Path | None, png: Path | None, *, as_json: bool
) -> None:
    from shrinkformer.commands.facts import find_checkpoint, read_facts  # takes the seconds that transformers takes

    found = read_facts(find_checkpoint(place), length)
    print(json.dumps(found, indent=2) if as_json else in_words(found))
    if html is not None:
        write_atomically(html, checkpoint_page(found))
    if png is not None:
        _write_png(png, str(found["name"]), (chart for part in checkpoint_charts(found).values() for chart in part))


def _inspect_report(file: Path, html: Path | None, png: Path | None, *, as_json: bool) -> None:
    try:
        runs, unread = read_runs(file.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: it cannot be read as a report ({error}).") from None
    if not runs:
        raise InputError(f"{file}: it holds no run; pass the .jsonl file that a command wrote below --output_dir.")
    if as_json:
        print(json.dumps([run.fields for run in runs], indent=2))
    else:
        skipped = f", {unread} lines that are none" if unread else ""
        print(f"{run_title(runs)}: {len(runs)} runs{skipped}")
        for run in runs:
            print(f"  {run.summary}")
        distinct = newest_of_each(runs)
        if len(distinct) > 1:
            print(f"\n{overview(distinct, [distinct[-1].main_metric]).text}")
    if html is not None:
        write_atomically(html, page_of_runs(runs, unread))
    if png is not None:
        charts = [
            *comparison_charts(newest_of_each(runs)),
            *(c for part in run_charts(runs[-1]).values() for c in part),
        ]
        _write_png(png, run_title(runs), charts)


def _write_png(file: Path, title: str, charts: Iterable[Chart]) -> None:
    write_atomically(file, draw_png(title, list(charts)))


def in_words(found: dict[str, Any]) -> str:
    """What is known of a checkpoint, for people."""
    dense = found["dense"] or {}

    def of(key: str) -> str:
        return f" of {dense[key] / 1e6:,.1f}" if dense else ""

    size = f"{found['bytes'] / 1e6:,.1f} MB" if found["files"] else "bytes unknown"
    lines = [
        f"{found['name']}: {found['architecture']} ({found['model_type']}), {role_in_words(found)}",
        f"  {len(found['layers'])} layers; {found['parameters'] / 1e6:,.1f}{of('parameters')} M parameters; {size}",
        f"  {found['macs'] / 1e6:,.1f}{of('macs')} M MACs at {tokens(found['sequence_length'])}: "
        f"attention {found['attention_macs'] / 1e6:,.1f}, feed-forward {found['ffn_macs'] / 1e6:,.1f}",
    ]
    if found["quantization"]:
        bits = ", ".join(map(str, found["quantization"]["bits"]))
        lines.append(f"  weights of {bits or 'unknown'} bits, format {found['quantization']['method']}")
    lines += [f"  {name}: {value}" for name, value in provenance(found)]
    titles, rows = layer_rows(found)
    lines += ["", *(f"  {line}" for line in aligned([titles, *rows], left=()))]
    lines += ["", "  load it with", *(f"    {line}" for line in found["loading"])]
    return "\n".join(line and "  " * line.startswith("  ") + _clean(line) for line in lines)


def _clean(line: str) -> str:
    """A line without control characters, which a name out of a file may have."""
    return "".join(sign if sign.isprintable() else "?" for sign in line.removeprefix("  "))
