"""Runs as a report file has them, read with care: lines may be older, or from other programs."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shrinkformer.pictures.charts import DENSE, NOTHING, PRUNED, QUANTIZED, shown
from shrinkformer.pictures.columns import exact

_LARGEST = 1e30
"""What no figure of a model reaches; beyond it, scales of charts would overflow."""

MODELS = (DENSE, PRUNED, QUANTIZED)
"""Sections of a record, in the order in which a run makes the models."""

DECODED = "Latency of the quantized model is that of decoded weights, as PyTorch runs them."

LOSSES = ("perplexity", "divergence", "loss")
"""How names of metrics begin of which less is better."""


def heading(role: str, given: str, *, several: bool) -> str:
    """What stands above the figures of a model.

    Args:
        role: Section of the record; the model that a run began with is ``dense`` there, whatever it was.
        given: What that was: ``dense``, ``pruned``, ``quantized`` or ``pruned and quantized``.
        several: Whether the run made another one of it.
    """
    if role != DENSE or given == DENSE:
        return role
    return f"as given ({given})" if several else given


@dataclass(frozen=True)
class Figures:
    """Figures of one model; what a record does not say is not a number.

    Attributes:
        metrics: By name.
        errors: Standard errors by name of the metric.
        macs: Multiply-accumulate operations for one input.
        parameters: Number of weights.
        bytes: Of the weight file.
        latency_ms: Milliseconds by shape.
    """

    metrics: dict[str, float]
    errors: dict[str, float]
    macs: float
    parameters: float
    bytes: float
    latency_ms: dict[str, float]

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> "Figures":
        """Those of one section of a record."""
        metrics = numbers(section.get("metrics"))
        return cls(
            {name: value for name, value in metrics.items() if not name.endswith("_stderr")},
            {name.removesuffix("_stderr"): value for name, value in metrics.items() if name.endswith("_stderr")},
            number(section.get("macs")),
            number(section.get("parameters")),
            number(section.get("bytes")),
            numbers(section.get("latency_ms")),
        )


@dataclass(frozen=True)
class RunRecord:
    """One line of a report.

    Attributes:
        fields: All of it.
        models: Figures by ``dense``, ``pruned``, ``quantized``; the first is always there.
        layers: What each block keeps, and its errors; empty where nothing was pruned.
        dense_layers: Sizes of each block before pruning; empty where the record is too old to say.
        quantized_layers: One entry for each quantized linear layer.
        changes: How the metrics of ``pruned`` and ``quantized`` differ from the dense ones, and ``<name>_stderr``: the
            paired standard errors of these differences; empty where the record is too old to say.
    """

    fields: dict[str, Any]
    models: dict[str, Figures]
    layers: list[dict[str, Any]]
    dense_layers: list[dict[str, Any]]
    quantized_layers: list[dict[str, Any]]
    changes: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, fields: Any) -> "RunRecord | None":
        """A record from JSON, or None if it is not one of a run."""
        if not isinstance(fields, dict) or not isinstance(fields.get(DENSE), dict):
            return None
        models = {name: Figures.of(fields[name]) for name in MODELS if isinstance(fields.get(name), dict)}
        layers, dense_layers, quantized_layers = (
            _rows(fields.get(name)) for name in ("layers", "dense_layers", "quantized_layers")
        )
        changes = {name: numbers(section) for name, section in section_of(fields, "change").items()}
        return cls(fields, models, layers, dense_layers, quantized_layers, changes)

    @property
    def last(self) -> Figures:
        """Figures of the smallest model."""
        return list(self.models.values())[-1]

    @property
    def last_role(self) -> str:
        """Which one that is."""
        return list(self.models)[-1]

    @property
    def given(self) -> str:
        """What the model was that the run began with."""
        return self.word("given") or DENSE

    def heading(self, role: str) -> str:
        """What stands above the figures of a model."""
        return heading(role, self.given, several=len(self.models) > 1)

    def change(self, metric: str) -> tuple[float, float]:
        """How the last model's metric differs from the dense one's, and the paired standard error of that."""
        dense, last = self.models[DENSE].metrics, self.last.metrics
        error = self.changes.get(self.last_role, {}).get(f"{metric}_stderr", NOTHING)
        return last.get(metric, NOTHING) - dense.get(metric, NOTHING), error

    def is_as_good(self, metric: str) -> bool:
        """Whether the last model is no worse than the dense one by more than a standard error.

        That is the one of the change; where a record is too old to say, that of the dense figure.
        """
        change, error = self.change(metric)
        if not math.isfinite(error):
            error = self.models[DENSE].errors.get(metric, NOTHING)
        return (change if metric.startswith(LOSSES) else -change) <= error

    @property
    def main_metric(self) -> str:
        """The metric of the task; "" where there is none."""
        return next(iter(self.models[DENSE].metrics), "")

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics; a figure that is there under two names is named once."""
        found = self.models[DENSE].metrics
        twins = any(name.startswith("perplexity_") for name in found)  # "perplexity" is that of the task once more
        return [name for name in found if not (name == "perplexity" and twins)]

    def word(self, name: str) -> str:
        """A field as text, "" where there is none."""
        value = self.fields.get(name)
        return "" if value is None else str(value)

    @property
    def moment(self) -> str:
        """When it ended."""
        return self.word("time").replace("T", " ").replace("+00:00", " UTC")

    @property
    def bits(self) -> str:
        """Bits of a code, in words; "" where nothing was quantized."""
        if QUANTIZED not in self.models:
            return ""
        found = sorted({int(bits) for row in self.quantized_layers if math.isfinite(bits := number(row.get("bits")))})
        if not found:
            return f"{self.fields[QUANTIZED].get('bits')} bits"
        return f"{found[0]} bits" if len(found) == 1 else f"{found[0]} to {found[-1]} bits"

    @property
    def how(self) -> str:
        """Method and bits: runs with the same text belong to one line of a chart."""
        names = [self.word("method")] if PRUNED in self.models else []
        if QUANTIZED in self.models:
            names.append(f"{self.bits} by {self.fields[QUANTIZED].get('quantizer', '?')}")
        return ", ".join(names) or self.given

    @property
    def mu(self) -> str:
        """The budget that was asked for; the long fraction that a target ratio led to in short."""
        value = number(self.fields.get("mu"))
        return exact(value) if math.isfinite(value) and not self.word("target_ratio") else shown(value, ".4g")

    @property
    def label(self) -> str:
        """Method, bits and budget."""
        target = self.word("target_ratio")
        budget = f"target ratio {target}" if target else f"mu {self.mu}"
        return f"{self.how}, {budget}"

    @property
    def summary(self) -> str:
        """The run in one line."""
        metrics = ", ".join(f"{name} {with_error(self.last, name)}" for name in self.metrics)
        macs = share(self.last.macs, self.models[DENSE].macs)
        change = change_in_words(self, self.main_metric) if len(self.models) > 1 else ""
        more = f"; {self.main_metric} changed by {change}" if change else ""
        return f"{self.moment}  {self.how}, mu {self.mu}: {metrics}; {macs} of the MACs{more}"

    @property
    def settings(self) -> tuple[str, ...]:
        """What was asked for; of runs with the same settings the newest counts."""
        names = ("task_name", "method", "mu", "target_ratio", "budget", "seed", "sample_batch_size")
        return (
            self.how,
            *(self.word(name) for name in names),
            str((self.fields.get(QUANTIZED) or {}).get("group_size")),
        )


def read_runs(lines: Iterable[str]) -> tuple[list[RunRecord], int]:
    """The runs of a report, oldest first, and how many lines are none."""
    runs: list[RunRecord] = []
    unread = 0
    for line in lines:
        if not line.strip():
            continue
        try:
            run = RunRecord.of(json.loads(line))
        except (ValueError, RecursionError):
            run = None
        if run is None:
            unread += 1
        else:
            runs.append(run)
    return runs, unread


def number(value: Any) -> float:
    """A figure of a record; not a number where there is none that could be drawn."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NOTHING
    try:
        return float(value) if abs(value) < _LARGEST else NOTHING
    except OverflowError:
        return NOTHING


def form_of(value: float) -> str:
    """How a metric is written: four decimals for shares, two for perplexities and percentages."""
    return ".4f" if not math.isfinite(value) or abs(value) < 2 else ".2f"


def share(value: float, whole: float) -> str:
    """A fraction in percent."""
    return f"{100 * value / whole:.1f} %" if whole and math.isfinite(value / whole) else "n/a"


def with_error(figures: Figures, metric: str) -> str:
    """A metric with its standard error."""
    value, error = figures.metrics.get(metric, NOTHING), figures.errors.get(metric, NOTHING)
    return shown(value, form_of(value)) + (f" ± {shown(error, form_of(value))}" if math.isfinite(error) else "")


def change_in_words(run: RunRecord, metric: str) -> str:
    """A difference from the dense model with its standard error."""
    change, error = run.change(metric)
    form = form_of(run.models[DENSE].metrics.get(metric, NOTHING))
    return shown(change, "+" + form) + (f" ± {shown(error, form)}" if math.isfinite(error) else "")


def section_of(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part of a record by names; empty where it is no such part."""
    found = fields.get(name)
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def numbers(section: Any) -> dict[str, float]:
    """Figures by name."""
    return {str(name): number(value) for name, value in section.items()} if isinstance(section, dict) else {}


def _rows(value: Any) -> list[dict[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
