"""Standard errors of the metrics: how far a figure would move on another sample of as many examples.

Every metric has *deviations*: what each example (of Spearman's correlation: each bootstrap sample) moves the figure by,
scaled so that the length of the vector is the standard error. Of two models on the same examples, the length of the
difference of both vectors is the standard error of the change, because what both have in common cancels: that is the
paired one, and usually much smaller than either of the two.

Accuracy is a mean of hits, a SQuAD score a mean over questions. F1, Matthews and Pearson are smooth functions of
means, so the delta method applies (the infinitesimal jackknife): deviations are the influence values over the number
of examples (van der Vaart, "Asymptotic Statistics", chapters 3 and 20). Spearman's correlation works on ranks, which
change with the sample; it gets a bootstrap with its own generator, so that two models see the same samples. Nothing
here touches a global random state.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


def accuracy_deviations(predictions: Values, references: Values) -> Values:
    """Of a fraction of hits, in 0..1; the binomial standard error sqrt(p (1 - p) / n).

    >>> float(np.linalg.norm(accuracy_deviations(np.array([1, 1, 0, 0]), np.array([1, 1, 1, 1]))))
    0.25
    """
    hits = (np.asarray(predictions) == np.asarray(references)).astype(np.float64)
    return np.asarray((hits - hits.mean()) / len(hits))


def mean_deviations(scores: Values) -> Values:
    """Of the mean of (n,) scores, in their unit: the sample standard error; zeros for fewer than two."""
    scores = np.asarray(scores, dtype=np.float64)
    count = len(scores)
    return (scores - scores.mean()) / np.sqrt(count * (count - 1.0)) if count > 1 else np.zeros(count)


def f1_deviations(predictions: Values, references: Values) -> Values:
    """Of F1 = sum(2 * true positive) / sum(predicted positive + actual positive), labels 0/1."""
    predicted, actual = (np.asarray(values) == 1 for values in (predictions, references))
    positives = predicted.astype(np.float64) + actual
    if not positives.any():
        return np.zeros(len(positives))
    from shrinkformer.evaluate.metrics import glue  # takes the seconds that evaluate and sklearn take

    influence = (2.0 * (predicted & actual) - glue.f1(predictions, references) * positives) / positives.mean()
    return np.asarray(influence / len(influence))


def pearson_deviations(predictions: Values, references: Values) -> Values:
    """Of Pearson's r, without assuming normality: influence x y - r (x^2 + y^2) / 2, standardised."""
    x, y = (np.asarray(values, dtype=np.float64) for values in (predictions, references))
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.zeros(len(x))
    x, y = (x - x.mean()) / x.std(), (y - y.mean()) / y.std()
    return np.asarray((x * y - np.mean(x * y) * (x * x + y * y) / 2.0) / len(x))


def spearmanr_deviations(predictions: Values, references: Values, *, resamples: int = 500, seed: int = 0) -> Values:
    """Of Spearman's correlation: one for each bootstrap sample; the same seed gives the same samples.

    Args:
        predictions: (n,) predicted values.
        references: (n,) reference values.
        resamples: bootstrap samples; the error of the result is about 1 / sqrt(2 * resamples), 3 % for 500.
        seed: of a private ``numpy.random.Generator``.

    Returns:
        Shape (resamples,).
    """
    from scipy import stats

    x, y = (np.asarray(values, dtype=np.float64) for values in (predictions, references))
    generator = np.random.default_rng(seed)
    replicates = np.empty(resamples)
    for index in range(resamples):
        rows = generator.integers(len(x), size=len(x))
        ranks = stats.rankdata(x[rows]), stats.rankdata(y[rows])
        constant = np.ptp(ranks[0]) == 0 or np.ptp(ranks[1]) == 0
        replicates[index] = 0.0 if constant else np.corrcoef(*ranks)[0, 1]
    return np.asarray((replicates - replicates.mean()) / np.sqrt(resamples - 1.0))


DEVIATIONS: dict[str, Callable[[Values, Values], Values]] = {
    "accuracy": accuracy_deviations,
    "f1": f1_deviations,
    "matthews_correlation": pearson_deviations,  # for 0/1 labels it is Pearson's r (the phi coefficient)
    "pearson": pearson_deviations,
    "spearmanr": spearmanr_deviations,
}
"""Metric name -> deviations of (predictions, references), in the unit of the metric."""


def length(deviations: Values) -> float:
    """The standard error that deviations, or the differences of those of two models, stand for."""
    return float(np.sqrt(np.square(deviations).sum()))
