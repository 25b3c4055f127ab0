"""How far the predictions of a smaller model are from those of the dense one."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shrinkformer.errors import NumericalError
from shrinkformer.prune.objective import UNKNOWN, Objective, Predictions
from shrinkformer.prune.statistics import Batches
from shrinkformer.utils.inputs import outputs_of, token_mask
from shrinkformer.utils.parallel import ALONE, Workers
from shrinkformer.utils.precision import half_precision, is_finite


def predictions(output: Any, mask: Tensor, objective: Objective = UNKNOWN) -> Predictions:
    """What a model predicts, in a form that :class:`Target` compares; see :meth:`Objective.predictions`."""
    return objective.predictions(output, mask)


class Target:
    """Predictions of the dense model, ready to be compared with those of many others.

    Args:
        dense: From :func:`predictions`.

    Raises:
        NumericalError: They are not finite.
    """

    def __init__(self, dense: Predictions) -> None:
        self._distribution = dense.distribution
        self._parts = tuple(part.exp() for part in dense.parts) if dense.distribution else dense.parts
        self._least = [self._cross_entropy(*pair) for pair in zip(self._parts, dense.parts, strict=True)]
        if not all(is_finite(least) for least in self._least):
            raise NumericalError("predictions of the dense model on the calibration examples are NaN or infinity.")

    def __len__(self) -> int:
        return len(self._parts[0])

    def divergence(self, other: Predictions) -> Tensor:
        """Kullback-Leibler divergence from the dense model's predictions, or half the squared distance of numbers.

        Args:
            other: From the same examples.

        Returns:
            Sum over the rows, and over both parts of an answer; a float64 scalar. Half a squared distance is the
            divergence of normal distributions of unit variance.
        """
        total = torch.zeros((), dtype=torch.float64, device=self._parts[0].device)
        for ours, least, theirs in zip(self._parts, self._least, other.parts, strict=True):
            if self._distribution:
                total += (self._cross_entropy(ours, theirs) - least).sum(dtype=torch.float64)
            else:
                total += (ours - theirs).square().sum(dtype=torch.float64) / 2
        return total

    @staticmethod
    def _cross_entropy(probabilities: Tensor, logs: Tensor) -> Tensor:
        """Of each row. Rows are summed in float32: a vocabulary in float64 takes ten times as long."""
        return -(probabilities * logs).sum(-1)


class Targets:
    """Predictions of the dense model for all examples, batch by batch.

    Args:
        dense: From :func:`predictions`.
        device: Where they are.
        workers: Share the examples; all of them get the same figures.
    """

    def __init__(self, dense: Iterable[Predictions], device: torch.device, workers: Workers) -> None:
        self._targets, self._workers = [Target(found) for found in dense], workers
        rows = sum(len(target) for target in self._targets)
        self._rows = torch.tensor(rows, dtype=torch.float64, device=device)
        workers.sum_(self._rows)

    def mean_divergence(self, others: Iterable[Predictions]) -> float:
        """Mean per prediction, of a model that saw the same batches; infinite where its predictions are not finite."""
        total = torch.zeros_like(self._rows)
        for target, found in zip(self._targets, others, strict=True):
            total += target.divergence(found)
        self._workers.sum_(total)
        mean = float(total / self._rows)
        return float("inf") if math.isnan(mean) else max(0.0, mean)  # max(0.0, nan) is 0: the best of all


class Judge:
    """What the dense model predicts for examples that judge smaller models.

    Args:
        model: The dense model, in memory, in evaluation mode.
        batches: Examples of all workers that no smaller model is made from.
        objective: What it predicts.
        workers: Share the examples; all of them get the same figures.

    Examples pass in bfloat16 where that is fast, all models alike.
    """

    def __init__(
        self, model: PreTrainedModel, batches: Batches, objective: Objective, workers: Workers = ALONE
    ) -> None:
        self._batches, self._objective = workers.share(batches), objective
        self._targets = Targets(self._predictions(model), model.device, workers)

    def of(self, model: PreTrainedModel) -> float:
        """Mean divergence per prediction."""
        return self._targets.mean_divergence(self._predictions(model))

    def _predictions(self, model: PreTrainedModel) -> Iterator[Predictions]:
        return (self._of_batch(model, batch) for batch in self._batches)

    @torch.no_grad()
    def _of_batch(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Predictions:
        mask = token_mask(batch).to(model.device)
        with half_precision(model.device, model.dtype):
            return self._objective.predictions(outputs_of(model, batch), mask)
