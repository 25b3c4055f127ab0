"""What a layer should become, so that the quantized model's inputs give the dense model's outputs.

With inputs ``x`` of the quantized model, and ``s`` for what the layer's output lacks (the dense layer on its own input
minus this one on ``x``; where the layer ends a sublayer, also what the residual stream has lost so far), the best
linear answer is ``W + E[s x'] E[x x']^-1``. From few tokens that fits their noise as well, so each part of it is
followed as far as it holds on examples that it was not fitted on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shrinkformer.prune.cholesky import damped_cholesky
from shrinkformer.prune.moments import Moments
from shrinkformer.quantize.observe import CrossMoments, Fold

DAMPINGS = (1e-3, 1e-2, 1e-1)
"""Relative to the mean diagonal of the second moments; one of them is chosen on held-out examples."""


@dataclass(frozen=True)
class Target:
    """A corrected weight.

    Attributes:
        weight: ``(outputs, inputs)`` float32.
        shift: Mean of what the output gains by the correction beside ``weight @ mean``, ``(outputs,)`` float64; for
            the bias. Zero where the layer has none.
        trust: How far each part of the correction was followed, 0 to 1.
    """

    weight: Tensor
    shift: Tensor
    trust: tuple[float, ...]

    @classmethod
    def unchanged(cls, weight: Tensor) -> "Target":
        """The weight as it is, ``(outputs, inputs)``."""
        return cls(weight.float(), torch.zeros(len(weight), dtype=torch.float64, device=weight.device), ())


@dataclass(frozen=True)
class _Sums:
    """Sums over tokens for one layer; about the means where it has a bias.

    Attributes:
        second: Of the inputs, ``(inputs, inputs)`` float64.
        shifts: Cross moments of each part of the shift with the inputs, ``(outputs, inputs)`` float64.
    """

    second: Tensor
    shifts: tuple[Tensor, ...]

    @classmethod
    def of(cls, fold: Fold, weight: Tensor, *, centred: bool) -> "_Sums":
        second = fold.inputs.covariance() if centred else fold.inputs.second
        parts = (_cross(part, fold.inputs, centred) for part in fold.shifts)
        return cls(second, tuple(weight @ part if fold.shared else part for part in parts))

    def steps(self, damping: float) -> list[Tensor]:
        """What each part of the shift would add to the weight, ``(outputs, inputs)``."""
        factor, _ = damped_cholesky(self.second, damping)
        return [torch.cholesky_solve(shift.T, factor).T for shift in self.shifts]


def _cross(part: CrossMoments, inputs: Moments, centred: bool) -> Tensor:
    return part.second - torch.outer(part.total, inputs.mean) if centred else part.second


def correct(weight: Tensor, folds: Sequence[Fold], whole: Fold, *, centred: bool) -> Target:
    """The weight that a quantized layer should stand for.

    Args:
        weight: Of the layer, ``(outputs, inputs)``.
        folds: Two halves of the examples, to judge each by the other.
        whole: All examples.
        centred: The layer has a bias, which takes up means.

    Source:
        The shift of the target: Arai and Ichikawa, QEP, arXiv 2504.09629; Zhang et al., Qronos, arXiv 2505.11695. Trust
        by cross-validation, and the share of the residual stream, are our own.
    """
    original = weight.double()
    folds = [fold for fold in folds if fold.inputs.count]
    if not whole.shifts or len(folds) < 2:
        return Target.unchanged(weight)
    damping, trust = _cross_validate([_Sums.of(fold, original, centred=centred) for fold in folds])
    steps = _Sums.of(whole, original, centred=centred).steps(damping)
    target, shift = original, torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    for share, step, part in zip(trust, steps, whole.shifts, strict=True):
        target = target + share * step
        if centred:
            mean = part.total / whole.inputs.count
            shift = shift + share * (original @ mean if whole.shared else mean)
    return Target(target.float(), shift, tuple(trust))


def _cross_validate(parts: Sequence[_Sums]) -> tuple[float, list[float]]:
    """The damping, and the trust in each part, with the least error on the halves that were not fitted."""
    best, chosen = 0.0, (DAMPINGS[-1], [0.0] * len(parts[0].shifts))
    for damping in DAMPINGS:
        square = torch.zeros(len(chosen[1]), len(chosen[1]), dtype=torch.float64)
        gain = torch.zeros(len(chosen[1]), dtype=torch.float64)
        for index, held_out in enumerate(parts):
            steps = parts[1 - index].steps(damping)
            lacking = torch.stack(held_out.shifts).sum(0)
            for row, step in enumerate(steps):
                moved = step @ held_out.second
                gain[row] += float((lacking * step).sum())
                square[row] += torch.tensor([float((moved * other).sum()) for other in steps])
        trust = _box(square, gain)
        less = float(2 * gain @ trust - trust @ square @ trust)
        if less > best:
            best, chosen = less, (damping, trust.tolist())
    return chosen


def _box(square: Tensor, gain: Tensor) -> Tensor:
    """Maximise ``2 g't - t'St`` for ``t`` between 0 and 1, coordinate by coordinate; there are one or two."""
    trust = torch.zeros_like(gain)
    for _ in range(50):
        for index in range(len(gain)):
            rest = gain[index] - square[index] @ trust + square[index, index] * trust[index]
            trust[index] = (rest / square[index, index].clamp(min=1e-300)).clamp(0, 1)
    return trust
