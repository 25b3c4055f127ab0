"""``shrinkformer inspect``: what a checkpoint is, or what the runs of a report found, in words and pictures."""

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from shrinkformer.commands.console import run_command
from shrinkformer.commands.flags import OneLineParser
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
from shrinkformer.pictures.png import draw_png, require_matplotlib
from shrinkformer.pictures.run_charts import comparison_charts, newest_of_each, run_charts
from shrinkformer.pictures.run_page import page_of_runs, run_title
from shrinkformer.pictures.runs import read_runs
from shrinkformer.utils.files import write_atomically

PROG = "shrinkformer inspect"


def inspect_command(arguments: Sequence[str] | None) -> None:
    """Everything that ``shrinkformer inspect`` does.

    Raises:
        InputError: There is no checkpoint and no report, or it is damaged, or a picture cannot be written.
    """
    flags = _parser().parse_args(arguments)
    for name in ("html", "png"):
        _require_writable(f"--{name}", getattr(flags, name))
    if flags.png is not None:
        require_matplotlib()
    length = flags.sequence_length
    if length is not None and not (math.isfinite(length) and length > 0):
        raise InputError(f"--sequence_length {length}: must be above 0.")
    if Path(flags.place).suffix == ".jsonl":
        _inspect_report(Path(flags.place), flags.html, flags.png, as_json=flags.json)
    else:
        _inspect_checkpoint(flags.place, length, flags.html, flags.png, as_json=flags.json)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=PROG,
        description="Sizes, MACs and bytes of a checkpoint, without loading its weights; or the runs of a report.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "place", metavar="DIR", help="checkpoint folder, bundled model, name on the hub, or report .jsonl"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="draw a page that needs nothing else")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw a picture (takes matplotlib)")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    parser.add_argument(
        "--sequence_length", type=float, help="length at which MACs count (default: the plan's, or 128)"
    )
    return parser


def _require_writable(flag: str, file: Path | None) -> None:
    if file is not None and file.is_dir():
        raise InputError(f"{flag} {file}: it is a folder; name a file in it.")
    if file is not None and not file.resolve().parent.is_dir():
        raise InputError(f"{flag} {file}: there is no folder {file.parent}; make it, or name another.")


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``shrinkformer inspect``."""
    return run_command(inspect_command, arguments, PROG)
