"""Charts of what each block has: those of runs and those of checkpoints."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from shrinkformer.pictures.charts import DENSE, NOTHING, PRUNED, BarChart, Series
from shrinkformer.pictures.runs import number

Rows = Sequence[Mapping[str, Any]]
"""Sizes of each block by the names ``heads``, ``neurons``, ``query_width``, ``value_width``."""


def size_charts(rows: Rows, dense: Rows, role: str = PRUNED) -> list[BarChart]:
    """Heads, neurons and, where they differ from the dense ones, widths of heads.

    Args:
        rows: What each block has.
        dense: What it had before pruning; empty where that is unknown.
        role: Of the model.
    """
    known = dense if len(dense) == len(rows) else []

    def chart(title: str, axis: str, key: str) -> BarChart:
        full = Series(DENSE, DENSE, tuple(number(row.get(key)) for row in known)) if known else None
        # A width of 0 in a record stands for "left as it was".
        values = [number(row.get(key)) or (full.values[index] if full else NOTHING) for index, row in enumerate(rows)]
        series = Series("kept" if known else role, role, tuple(values))
        return BarChart(title, axis, layer_names(rows), (series,), category_axis="layer", full=full)

    charts = [
        chart("Attention heads by layer", "heads", "heads"),
        chart("Feed-forward neurons by layer", "neurons", "neurons"),
    ]
    if has_narrow_heads(rows, known):
        charts += [
            chart("Width of queries and keys by layer", "entries of a head", "query_width"),
            chart("Width of values by layer", "entries of a head", "value_width"),
        ]
    return charts


def has_narrow_heads(rows: Rows, dense: Rows) -> bool:
    """Whether widths of heads are worth a picture: they were changed, or differ from each other."""
    widths = ("query_width", "value_width")
    mine = [(row.get(name) or 0) for row in rows for name in widths]
    before = [(row.get(name) or 0) for row in dense for name in widths]
    return any(mine) and (mine != before if before else len(set(mine)) > 1)


def layer_names(rows: Rows) -> tuple[str, ...]:
    """Numbers of the blocks."""
    return tuple(str(row.get("layer", index)) for index, row in enumerate(rows))


def error_chart(rows: Rows) -> BarChart:
    """Errors of the sublayers of each block after pruning."""
    sublayers = (("attention", "attention_error", PRUNED), ("feed-forward", "ffn_error", "third"))
    series = tuple(Series(name, role, tuple(number(row.get(key)) for row in rows)) for name, key, role in sublayers)
    return BarChart(
        "Error of pruning by layer",
        "relative error of the output",
        layer_names(rows),
        series,
        form=".3f",
        category_axis="layer",
    )


def code_charts(rows: Rows) -> list[BarChart]:
    """Bits and errors of quantized linear layers, as means of each block.

    Args:
        rows: One for each linear layer, in the order of the blocks, with ``layer``, ``bits`` and perhaps errors.
    """
    blocks = [(key, list(group)) for key, group in groupby(rows, lambda row: row.get("layer"))]
    names = tuple("outside" if key is None else str(key) for key, _ in blocks)

    def series(name: str, key: str, role: str) -> Series:
        return Series(name, role, tuple(_mean([number(row.get(key)) for row in group]) for _, group in blocks))

    bits = BarChart(
        "Bits of a code by layer",
        "bits, mean of the block's linear layers",
        names,
        (series("bits", "bits", "quantized"),),
        form=".3g",
        category_axis="layer",
        limit=8,
    )
    what = "weights" if all(row.get("error_of") == "weights" for row in rows) else "output"
    errors = BarChart(
        "Error of quantizing by layer",
        f"relative error of the {what}, mean",
        names,
        (series("this run", "error", "quantized"), series("rounding to nearest", "nearest_error", DENSE)),
        form=".3f",
        category_axis="layer",
    )
    return [bits, errors]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else NOTHING
