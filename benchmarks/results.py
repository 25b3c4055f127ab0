"""Points of a comparison, kept one by one, and how tables show them."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shrinkformer.utils.files import append_atomically

Record = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """The finished points of a comparison, one JSON line each; what an interrupted run measured is not lost.

    Attributes:
        path: File of the points.
        rows: Those of earlier runs and of this one.
    """

    path: Path
    rows: list[Record]

    @classmethod
    def read(cls, path: Path) -> "Results":
        """What earlier runs left."""
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return cls(path, [json.loads(line) for line in lines])

    def has(self, key: Record) -> bool:
        """Whether a point was measured."""
        return any(key.items() <= row.items() for row in self.rows)

    def of(self, model_name: str, shared: Record) -> list[Record]:
        """Points of one model, given as a name or a folder, with some values in common."""
        names = {model_name, Path(model_name).resolve().name}
        return [row for row in self.rows if shared.items() <= row.items() and row["model"] in names]

    def add(self, key: Record, found: Record) -> None:
        """Keep and print a point.

        Args:
            key: What tells it from all others.
            found: What was measured.
        """
        row = {**key, **found}
        append_atomically(self.path, json.dumps(row) + "\n")
        self.rows.append(row)
        print(json.dumps(row), flush=True)


def mean_and_spread(values: Sequence[float], decimals: int = 4) -> str:
    """Mean and, if there are several values, sample standard deviation; nothing if there are none."""
    spread = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{decimals}f}{spread}" if values else ""
