"""The metrics of GLUE, in 0..1, as a Hugging Face `evaluate` module that needs no network.

Load it by path: ``hf_evaluate.load("shrinkformer/evaluate/metrics/glue.py", "mrpc")``. Which metric belongs to which
task is Table 1 of Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform" (arXiv 1804.07461).
"""

import warnings
from collections.abc import Sequence

import datasets
import numpy as np
from scipy import stats
from sklearn import metrics

import evaluate as hf_evaluate

METRICS: dict[str, tuple[str, ...]] = {
    "cola": ("matthews_correlation",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearmanr"),
    "mnli": ("accuracy",),
    "mnli_matched": ("accuracy",),
    "mnli_mismatched": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
    "hans": ("accuracy",),
}
"""The metrics of each configuration, the main one first."""


def accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    """Fraction of equal entries of two (examples,) arrays of labels."""
    return float(np.mean(predictions == references))


def f1(predictions: np.ndarray, references: np.ndarray) -> float:
    """F1 of class 1 for (examples,) arrays of 0/1 labels; 0 where class 1 is neither predicted nor present."""
    return float(metrics.f1_score(references, predictions, zero_division=0.0))


def matthews_correlation(predictions: np.ndarray, references: np.ndarray) -> float:
    """Matthews correlation in -1..1 of (examples,) label arrays; 0 where either holds one class only."""
    return float(metrics.matthews_corrcoef(references, predictions))


def pearson(predictions: np.ndarray, references: np.ndarray) -> float:
    """Pearson correlation of two (examples,) arrays; 0 where it is undefined (a constant array), never NaN."""
    return _correlation(stats.pearsonr, predictions, references)


def spearmanr(predictions: np.ndarray, references: np.ndarray) -> float:
    """Spearman rank correlation (ties share their mean rank); 0 where it is undefined, never NaN."""
    return _correlation(stats.spearmanr, predictions, references)


def _correlation(function: object, predictions: np.ndarray, references: np.ndarray) -> float:
    """The statistic of a scipy correlation, or 0 for constant or single values, which carry no information."""
    if len(predictions) < 2 or np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "nearly constant": the value is still the best estimate there is
        value = float(function(predictions, references).statistic)  # type: ignore[operator]
    return value if np.isfinite(value) else 0.0


FUNCTIONS = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews_correlation": matthews_correlation,
    "pearson": pearson,
    "spearmanr": spearmanr,
}
"""Metric name -> function of (predictions, references)."""


class Glue(hf_evaluate.Metric):  # type: ignore[misc]
    """GLUE metrics; the configuration name is the GLUE task."""

    def _info(self) -> hf_evaluate.MetricInfo:
        if self.config_name not in METRICS:
            raise ValueError(f"glue: no configuration {self.config_name!r}; choose one of {', '.join(METRICS)}")
        kind = "float64" if self.config_name == "stsb" else "int64"
        return hf_evaluate.MetricInfo(
            description=__doc__,
            citation="Wang et al. 2018, GLUE, arXiv 1804.07461",
            inputs_description="\npredictions, references: one label (stsb: one score) per example",
            features=datasets.Features({"predictions": datasets.Value(kind), "references": datasets.Value(kind)}),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        names = METRICS[self.config_name]
        return {name: FUNCTIONS[name](np.asarray(predictions), np.asarray(references)) for name in names}
