"""Correlation of predicted with human sentence similarity, as a Hugging Face `evaluate` module; needs no network.

Load it by path: ``hf_evaluate.load("shrinkformer/evaluate/metrics/similarity.py")``. Spearman's rank correlation is the
main figure, because cosines and human scores live on different scales (Reimers et al. 2016, COLING, "Task-Oriented
Intrinsic Evaluation of Semantic Textual Similarity").

The import of the neighbour is relative because `evaluate` copies such neighbours along with this file (and must stand
alone on its line, because `evaluate` reads a comment there as an address).
"""

from collections.abc import Sequence

import datasets
import numpy as np

import evaluate as hf_evaluate

from .glue import pearson, spearmanr


class Similarity(hf_evaluate.Metric):  # type: ignore[misc]
    """Spearman and Pearson correlation, -1..1, of predicted similarities with reference scores of any scale."""

    def _info(self) -> hf_evaluate.MetricInfo:
        return hf_evaluate.MetricInfo(
            description=__doc__,
            citation="Reimers et al. 2016, COLING, C16-1009",
            inputs_description="\npredictions, references: one similarity per pair",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        pair = np.asarray(predictions), np.asarray(references)
        return {"spearmanr": spearmanr(*pair), "pearson": pearson(*pair)}
