"""Times of several models: what they say beside the MACs, for people and for programs."""

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shrinkformer.commands.report import versions
from shrinkformer.efficiency.latency import Timing, shape_name
from shrinkformer.pictures.columns import aligned
from shrinkformer.utils.files import append_atomically

SCHEMA = 1

FORWARD, DECODE = "forward", "decode"


@dataclass(frozen=True)
class Cell:
    """One model, shape and runtime.

    Attributes:
        model: Its name in the table.
        timing: Of a call.
        macs: Of a call, by the formula of the budgets.
    """

    model: str
    timing: Timing
    macs: float

    def latency_ratio(self, first: "Cell") -> float:
        """Time as a fraction of another model's."""
        return self.timing.median / first.timing.median

    def mac_ratio(self, first: "Cell") -> float:
        """MACs as a fraction of another model's."""
        return self.macs / first.macs

    def reached(self, first: "Cell") -> float | None:
        """Which part of the MACs' saving the time saves: (1 - latency ratio) / (1 - MAC ratio); None without saving."""
        saved = 1 - self.mac_ratio(first)
        return (1 - self.latency_ratio(first)) / saved if saved > 1e-9 else None


@dataclass(frozen=True)
class Row:
    """All models with one shape and runtime; the first is what the others are compared with.

    Attributes:
        shape: (examples, tokens).
        runtime: What runs them.
        step: A whole forward pass, or a cached decoding step.
        cells: Of each model.
    """

    shape: tuple[int, int]
    runtime: str
    step: str
    cells: tuple[Cell, ...]

    def records(self, shared: dict[str, Any], locations: dict[str, str]) -> list[dict[str, Any]]:
        """One JSON object for each model; ``shared`` is what all of them have in common."""
        first = self.cells[0]
        return [
            {
                "schema": SCHEMA,
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                **shared,
                "model": cell.model,
                "location": locations[cell.model],
                "runtime": self.runtime,
                "step": self.step,
                "batch": self.shape[0],
                "length": self.shape[1],
                "latency_ms": asdict(cell.timing),
                "macs": round(cell.macs),
                "ratio": {
                    "to": first.model,
                    "latency": cell.latency_ratio(first),
                    "macs": cell.mac_ratio(first),
                    "reached": cell.reached(first),
                },
                "versions": versions(),
            }
            for cell in self.cells
        ]

    def titles(self) -> list[str]:
        """Heads of the columns."""
        first, *others = (cell.model for cell in self.cells)
        return ["shape", "runtime", f"{first} (ms)"] + [
            title for name in others for title in (f"{name} (ms)", "latency", "MACs", "reached")
        ]

    def texts(self) -> list[str]:
        """What stands in the columns."""
        first, *others = self.cells
        name = shape_name(self.shape) + (" +1" if self.step == DECODE else "")
        texts = [name, self.runtime, _milliseconds(first.timing)]
        for cell in others:
            reached = cell.reached(first)
            texts += [
                _milliseconds(cell.timing),
                f"{cell.latency_ratio(first):.3f}x",
                f"{cell.mac_ratio(first):.3f}x",
                "-" if reached is None else f"{reached:.0%}",
            ]
        return texts


def _milliseconds(timing: Timing) -> str:
    return f"{timing.median:.2f} [{timing.lower:.2f}, {timing.upper:.2f}]"


def text_table(rows: Sequence[Row]) -> str:
    """A table for a terminal."""
    table = [rows[0].titles(), *(row.texts() for row in rows)]
    return "\n".join(f"  {line}" for line in aligned(table, left=(0, 1)))


def markdown_table(rows: Sequence[Row]) -> str:
    """A table for a document."""
    titles = rows[0].titles()
    table = [titles, ["---", "---", *("---:" for _ in titles[2:])], *(row.texts() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def append_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Append JSON lines to a file; all of them arrive, or none."""
    append_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
