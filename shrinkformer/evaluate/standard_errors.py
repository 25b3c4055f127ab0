"""Standard errors of the metrics: how far a figure would move on another sample of as many examples.

Accuracy is a binomial proportion, a SQuAD score a mean over questions. F1, Matthews and Pearson are smooth functions of
means, so the delta method applies: the standard error is that of the mean of the influence values (van der Vaart,
"Asymptotic Statistics", chapters 3 and 20). Spearman's correlation works on ranks, which change with the sample; it
gets a bootstrap with its own generator. Nothing here touches a global random state.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from shrinkformer.evaluate.metrics import glue

Values = NDArray[np.float64]


def accuracy(predictions: Values, references: Values) -> float:
    """Binomial standard error sqrt(p (1 - p) / n) of a fraction of hits, in 0..1.

    >>> accuracy(np.array([1, 1, 0, 0]), np.array([1, 1, 1, 1]))
    0.25
    """
    fraction = glue.accuracy(predictions, references)
    return float(np.sqrt(fraction * (1.0 - fraction) / len(references)))


def mean(scores: Values) -> float:
    """Sample standard error of the mean of (n,) scores, in their unit; 0 for fewer than two."""
    return float(np.std(scores, ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else 0.0


def f1(predictions: Values, references: Values) -> float:
    """Delta method for F1 = sum(2 * true positive) / sum(predicted positive + actual positive), labels 0/1."""
    predicted, actual = (np.asarray(values) == 1 for values in (predictions, references))
    positives = predicted.astype(np.float64) + actual
    if not positives.any():
        return 0.0
    influence = (2.0 * (predicted & actual) - glue.f1(predictions, references) * positives) / positives.mean()
    return _of_influence(influence)


def pearson(predictions: Values, references: Values) -> float:
    """Delta method for Pearson's r, without assuming normality: influence x y - r (x^2 + y^2) / 2, standardised."""
    x, y = (np.asarray(values, dtype=np.float64) for values in (predictions, references))
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = (x - x.mean()) / x.std(), (y - y.mean()) / y.std()
    return _of_influence(x * y - np.mean(x * y) * (x * x + y * y) / 2.0)


def spearmanr(predictions: Values, references: Values, *, resamples: int = 500, seed: int = 0) -> float:
    """Bootstrap standard error of Spearman's correlation; the same seed gives the same figure.

    Args:
        predictions: (n,) predicted values.
        references: (n,) reference values.
        resamples: bootstrap samples; the error of the result is about 1 / sqrt(2 * resamples), 3 % for 500.
        seed: of a private ``numpy.random.Generator``.
    """
    x, y = (np.asarray(values, dtype=np.float64) for values in (predictions, references))
    generator = np.random.default_rng(seed)
    replicates = np.empty(resamples)
    for index in range(resamples):
        rows = generator.integers(len(x), size=len(x))
        ranks = stats.rankdata(x[rows]), stats.rankdata(y[rows])
        constant = np.ptp(ranks[0]) == 0 or np.ptp(ranks[1]) == 0
        replicates[index] = 0.0 if constant else np.corrcoef(*ranks)[0, 1]
    return float(replicates.std(ddof=1))


def _of_influence(influence: Values) -> float:
    """Standard error of an estimate with (n,) influence values: sqrt(mean(influence^2) / n)."""
    return float(np.sqrt(np.mean(influence**2) / len(influence)))


STANDARD_ERRORS: dict[str, Callable[[Values, Values], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews_correlation": pearson,  # for 0/1 labels the Matthews correlation is Pearson's r (the phi coefficient)
    "pearson": pearson,
    "spearmanr": spearmanr,
}
"""Metric name -> standard error of (predictions, references), in the unit of the metric."""
