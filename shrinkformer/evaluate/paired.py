"""What an evaluation found, and how far the figures of two models are apart on the same examples."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrinkformer.evaluate.standard_errors import length

STDERR = "_stderr"
"""Ending of the name of a metric's standard error."""


@dataclass(frozen=True)
class Scores:
    """Figures of one model.

    Attributes:
        metrics: The task's own names, and ``<name>_stderr`` for standard errors.
        deviations: By metric, how much each example moves it, of length ``<name>_stderr``
            (:mod:`~shrinkformer.evaluate.standard_errors`); metrics whose examples are not known are left out.
    """

    metrics: dict[str, float]
    deviations: Mapping[str, NDArray[np.float64]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, values: Mapping[str, float], deviations: Mapping[str, NDArray[np.float64]]) -> "Scores":
        """Metrics with the standard errors that their deviations stand for."""
        metrics: dict[str, float] = {}
        for name, value in values.items():
            metrics[name] = float(value)
            metrics[f"{name}{STDERR}"] = length(deviations[name])
        return cls(metrics, deviations)

    def renamed(self, ending: str) -> "Scores":
        """The same with an ending behind every metric: ``accuracy`` -> ``accuracy_mm``, ``accuracy_mm_stderr``."""
        metrics = {
            f"{name.removesuffix(STDERR)}{ending}{STDERR if name.endswith(STDERR) else ''}": value
            for name, value in self.metrics.items()
        }
        return Scores(metrics, {f"{name}{ending}": values for name, values in self.deviations.items()})

    def __or__(self, other: "Scores") -> "Scores":
        """The figures of both."""
        return Scores(self.metrics | other.metrics, {**self.deviations, **other.deviations})

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it, to the last bit."""
        return {
            "metrics": self.metrics,
            "deviations": {name: values.tolist() for name, values in self.deviations.items()},
        }

    @classmethod
    def from_json(cls, found: Any) -> "Scores":
        """What :meth:`to_json` gave.

        Raises:
            ValueError: It is something else.
        """
        try:
            metrics = {str(name): float(value) for name, value in found["metrics"].items()}
            deviations = {str(name): np.array(values, dtype=np.float64) for name, values in found["deviations"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no figures of an evaluation: {error}") from None
        return cls(metrics, deviations)


def names_of(metrics: Iterable[str]) -> list[str]:
    """Names of metrics, without those of their standard errors."""
    return [name for name in metrics if not name.endswith(STDERR)]


def change(before: Scores, after: Scores) -> dict[str, float]:
    """How the metrics of one model differ from those of another on the same examples.

    Args:
        before: Of the dense model.
        after: Of what was made of it.

    Returns:
        ``after - before`` by metric, and as ``<name>_stderr`` the paired standard error of that difference, where both
        models' examples are known and the same in number.
    """
    found: dict[str, float] = {}
    for name in names_of(after.metrics):
        if name not in before.metrics:
            continue
        found[name] = after.metrics[name] - before.metrics[name]
        first, second = before.deviations.get(name), after.deviations.get(name)
        if first is not None and second is not None and first.shape == second.shape:
            found[f"{name}{STDERR}"] = length(second - first)
    return found
