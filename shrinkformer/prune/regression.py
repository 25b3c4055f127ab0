"""Linear regression from sums over tokens, held towards weights that are known to be reasonable.

A refit from few tokens fits their noise. It is kept near the weights from before by a ridge, and how near is settled by
what the fit is worth on tokens that it has not seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shrinkformer.errors import NumericalError
from shrinkformer.prune.cholesky import damped_cholesky
from shrinkformer.utils.parallel import Workers
from shrinkformer.utils.precision import exact_products

RIDGES = (0.03, 0.1, 0.3, 1.0)
"""Relative to the mean diagonal of the second moments of the inputs."""


class Sums:
    """Running sums over weighted tokens: all that a regression of ``y`` on ``x`` needs, in float64.

    Args:
        inputs: Entries of ``x``.
        outputs: Entries of ``y``.
        device: Where the sums are kept.
        origin: Of ``x`` and of ``y``, ``(inputs,)`` and ``(outputs,)``: they are summed as differences from it. Where
            products are float32, what is far from zero but hardly moves would be lost in their rounding when means
            are subtracted afterwards. Only a regression with an intercept may have one; zero by default.

    Attributes:
        second: ``sum w x x'``, ``(inputs, inputs)``.
        cross: ``sum w x y'``, ``(inputs, outputs)``.
        input_total: ``sum w x``, ``(inputs,)``.
        output_total: ``sum w y``, ``(outputs,)``.
        square: ``sum w y'y``, a scalar tensor.
        weight: ``sum w``, a scalar tensor.
    """

    def __init__(
        self, inputs: int, outputs: int, device: torch.device, origin: tuple[Tensor, Tensor] | None = None
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.origin = origin or (zeros(inputs), zeros(outputs))
        self.second, self.cross = zeros(inputs, inputs), zeros(inputs, outputs)
        self.input_total, self.output_total = zeros(inputs), zeros(outputs)
        self.square, self.weight = zeros(), zeros()

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All sums."""
        return self.second, self.cross, self.input_total, self.output_total, self.square, self.weight

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Add tokens: ``(tokens, inputs)``, ``(tokens, outputs)``, and how much each counts, ``(tokens,)``."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        x, y, weights = (x - self.origin[0]).to(dtype), (y - self.origin[1]).to(dtype), weights.to(dtype)
        weighted = x * weights[:, None]
        with exact_products(x.device):
            self.second += weighted.T @ x
            self.cross += weighted.T @ y
        self.input_total += weighted.sum(0, dtype=torch.float64)
        self.output_total += weights.double() @ y.double()
        self.square += weights.double() @ y.double().square().sum(1)
        self.weight += weights.sum(dtype=torch.float64)

    def merge(self, other: "Sums") -> None:
        """Add the tokens that ``other`` has seen, from the same origin."""
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.add_(theirs)

    def all_reduce(self, workers: Workers) -> None:
        """Sum over all processes."""
        workers.sum_(*self.parts)

    def centred(self, intercept: bool) -> "_Centred":
        """Second, cross and square sums, about the means if there is an intercept."""
        if not intercept or not self.weight:
            return _Centred(self.second, self.cross, self.square)
        mean = self.input_total / self.weight
        second = self.second - torch.outer(self.input_total, mean)
        if second.trace() <= torch.finfo(torch.float32).eps * self.second.trace():  # one token, or one again and again
            return _Centred(torch.zeros_like(second), torch.zeros_like(self.cross), torch.zeros_like(self.square))
        return _Centred(
            second,
            self.cross - torch.outer(mean, self.output_total),
            self.square - self.output_total.square().sum() / self.weight,
        )


@dataclass(frozen=True)
class _Centred:
    second: Tensor
    cross: Tensor
    square: Tensor

    def solve(self, prior: Tensor, ridge: float) -> Tensor:
        """The best weight, held towards a prior, which stays where the sums are no more than rounding.

        Raises:
            NumericalError: NaN or infinity in the sums.
        """
        try:
            factor, used = damped_cholesky(self.second, ridge)
        except NumericalError:
            if not torch.isfinite(self.second).all():
                raise
            return prior  # not even a ridge as large as the sums themselves makes them positive
        pull = used * self.second.diagonal().mean()
        return torch.cholesky_solve(self.cross + pull * prior, factor)

    def loss(self, weight: Tensor) -> float:
        """Squared error less the square of the outputs."""
        return float(((self.second @ weight - 2 * self.cross) * weight).sum())


@dataclass(frozen=True)
class Fit:
    """A fitted linear map.

    Attributes:
        weight: ``(inputs, outputs)`` float64.
        bias: ``(outputs,)`` float64; zero without an intercept.
        ridge: Strength that was chosen, relative to the mean diagonal of half of the tokens; infinite where the prior
            stays.
        error: Relative error of the output on all tokens, 0 to about 1.
    """

    weight: Tensor
    bias: Tensor
    ridge: float
    error: float


def ridge_regression(
    halves: Sequence[Sums], prior: Tensor, *, intercept: bool, ridges: Sequence[float] = RIDGES
) -> Fit:
    """Fit ``y = x W + b``, with ``W`` held towards a prior as firmly as serves tokens that were not fitted.

    Each half of the tokens judges what was fitted to the other, and the strength with the least error wins, which may
    be an infinite one. The fit to all tokens takes that ridge as it is: half of it, relative to sums twice as large.

    Args:
        halves: Two parts of the tokens, from the same origin.
        prior: ``(inputs, outputs)``.
        intercept: Whether there is a ``b``.
        ridges: Strengths to try.
    """
    whole = Sums(prior.shape[0], prior.shape[1], prior.device, halves[0].origin)
    for half in halves:
        whole.merge(half)
    prior, chosen = prior.double(), float("inf")
    if all(float(half.weight) > 0 for half in halves):
        centred = [half.centred(intercept) for half in halves]
        least = sum(half.loss(prior) for half in centred)
        for ridge in ridges:
            crossed = zip(centred, reversed(centred), strict=True)
            loss = sum(judge.loss(half.solve(prior, ridge)) for half, judge in crossed)
            if loss < least:
                least, chosen = loss, ridge
    everything = whole.centred(intercept)
    weight = prior if chosen == float("inf") else everything.solve(prior, chosen / len(halves))
    bias = torch.zeros_like(whole.output_total)
    if intercept and whole.weight:
        bias = (whole.output_total - whole.input_total @ weight) / whole.weight
        bias += whole.origin[1] - whole.origin[0] @ weight
    square = float(everything.square)
    error = max(0.0, 1 + everything.loss(weight) / square) ** 0.5 if square > 0 else 0.0
    return Fit(weight, bias, chosen, error)
