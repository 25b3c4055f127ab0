"""What a layer should become, so that the quantized model's inputs give the dense model's outputs.

With inputs ``x`` of the quantized model, and ``s`` for what is missing in the layer's output (the dense layer on its
own input minus this one on ``x``; where the layer ends a sublayer, also what the residual stream has lost so far), the
best linear answer is ``W + E[s x'] E[x x']^-1``. From few tokens that fits their noise as well, so each part of it is
scaled by how far it holds on examples that it was not fitted on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shrinkformer.prune.cholesky import damped_cholesky
from shrinkformer.prune.moments import Moments
from shrinkformer.quantize.observe import CrossMoments, Fold

DAMPINGS = (1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Target:
    """A corrected weight.

    Attributes:
        weight: ``(outputs, inputs)`` float32.
        shift: What the bias gains beside what the codes' own error asks for, ``(outputs,)`` float64.
        trust: How far each part of the correction was followed, 0 to 1.
        damping: Relative damping that held best.
    """

    weight: Tensor
    shift: Tensor
    trust: tuple[float, ...]
    damping: float


@dataclass(frozen=True)
class Statistics:
    """Sums over tokens that one layer's target is made from; about the means where it has a bias.

    Attributes:
        second: Of the inputs, ``(inputs, inputs)`` float64.
        shifts: Cross moments of each part of the shift with the inputs, ``(outputs, inputs)`` float64.
    """

    second: Tensor
    shifts: tuple[Tensor, ...]

    @classmethod
    def of(cls, fold: Fold, weight: Tensor, *, centred: bool) -> "Statistics":
        """For one layer of the site."""
        return cls(
            fold.inputs.covariance() if centred else fold.inputs.second,
            tuple(_shift(part, fold.inputs, weight if fold.shared else None, centred) for part in fold.shifts),
        )


def _shift(part: CrossMoments, inputs: Moments, weight: Tensor | None, centred: bool) -> Tensor:
    second = part.second - torch.outer(part.total, inputs.mean) if centred else part.second
    return second if weight is None else weight.double() @ second


def merge(folds: Sequence[Fold]) -> Fold:
    """All examples together."""
    first, *others = folds
    if not others:
        return first
    inputs = Moments.from_state_dict(first.inputs.state_dict())
    shifts = tuple(CrossMoments(*part.second.shape, part.second.device) for part in first.shifts)
    for index, fold in enumerate(folds):
        if index:
            inputs.merge(fold.inputs)
        for part, other in zip(shifts, fold.shifts, strict=True):
            part.merge(other)
    return Fold(inputs, shifts, first.shared)


def corrected(weight: Tensor, whole: Fold, folds: Sequence[Fold], *, centred: bool) -> Target:
    """The weight that a quantized layer should stand for.

    Args:
        weight: Of the layer, ``(outputs, inputs)``.
        whole: All examples.
        folds: Two halves of them, to judge each by the other; with fewer, nothing is corrected.
        centred: The layer has a bias, which takes up means.

    Source:
        The shift of the target: Arai and Ichikawa, QEP, arXiv 2504.09629; Zhang et al., Qronos, arXiv 2505.11695. Trust by
        cross-validation and the share of the residual stream are our own.
    """
    weight = weight.double()
    nothing = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    if len(folds) < 2:
        return Target(weight.float(), nothing, (), 0.0)
    parts = [Statistics.of(fold, weight, centred=centred) for fold in folds]
    damping, trust = _cross_validate(parts)
    total = Statistics.of(whole, weight, centred=centred)
    steps = _steps(total, damping)
    for share, step in zip(trust, steps, strict=True):
        weight = weight + share * step
    totals = [weight_of_total(part, whole, original=weight) for part in whole.shifts]
    for share, mean in zip(trust, totals, strict=True):
        nothing = nothing + share * mean
    return Target(weight.float(), nothing, tuple(trust), damping)


def weight_of_total(part: CrossMoments, whole: Fold, *, original: Tensor) -> Tensor:
    """Mean of a part of the shift, ``(outputs,)``."""
    mean = part.total / whole.inputs.count
    return original @ mean if whole.shared else mean


def _steps(statistics: Statistics, damping: float) -> list[Tensor]:
    factor, _ = damped_cholesky(statistics.second, damping)
    return [torch.cholesky_solve(shift.T, factor).T for shift in statistics.shifts]


def _cross_validate(parts: Sequence[Statistics]) -> tuple[float, list[float]]:
    """The damping, and the trust in each part, with the least error on the half that was not fitted."""
    best: tuple[float, float, list[float]] = (0.0, DAMPINGS[-1], [0.0] * len(parts[0].shifts))
    for damping in DAMPINGS:
        square = gain = None
        for index, held_out in enumerate(parts):
            steps = _steps(parts[1 - index], damping)
            wanted = sum(held_out.shifts[1:], held_out.shifts[0])
            moved = [step @ held_out.second for step in steps]
            one = torch.stack([torch.stack([(a * b).sum() for b in steps]) for a in moved])
            two = torch.stack([(wanted * step).sum() for step in steps])
            square, gain = (one, two) if square is None else (square + one, gain + two)
        trust = _box(square, gain)
        less = float(2 * gain @ trust - trust @ square @ trust)
        if less > best[0]:
            best = less, damping, trust.tolist()
    return best[1], best[2]


def _box(square: Tensor, gain: Tensor) -> Tensor:
    """Maximise ``2 g't - t'St`` for ``t`` between 0 and 1, by coordinates; there are one or two."""
    trust = torch.zeros_like(gain)
    for _ in range(100):
        for index in range(len(gain)):
            rest = gain[index] - square[index] @ trust + square[index, index] * trust[index]
            trust[index] = (rest / square[index, index].clamp(min=1e-300)).clamp(0, 1)
    return trust
