"""The weights of layers with one input, from what is known about its input to codes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shrinkformer.quantize.grid import QuantizedWeight, fit_grid, storable
from shrinkformer.quantize.recipe import Recipe
from shrinkformer.quantize.scheme import Scheme
from shrinkformer.quantize.solver import Hessian, descend, output_error, refit_scales, round_ahead, round_following

_LOTS, _LEAST_LOT = 8, 8
"""Outputs that are solved at once: an eighth of a layer, at least eight."""

_SHRINKAGE, _METRIC_DAMPING = 0.1, 1e-3

_SPREAD, _ROWS_AT_ONCE = 0.15, 2048
"""Sizes of grids that are tried lie so far around what rounding alone would choose; so many rows are solved at once."""


@dataclass(frozen=True)
class Solved:
    """A quantized weight and how good it is.

    Attributes:
        weight: Codes and grid.
        error: Relative error of the layer's output on the calibration examples, 0 to about 1.
        nearest_error: The same for rounding every weight to its nearest code.
        damping: Relative damping of the second moments that was used.
    """

    weight: QuantizedWeight
    error: float
    nearest_error: float
    damping: float


def quantize_weight(
    weight: Tensor,
    hessian: Hessian | None,
    scheme: Scheme,
    recipe: Recipe,
    *,
    dtype: torch.dtype,
    metric: Tensor | None = None,
) -> Solved:
    """The same as :func:`quantize_weights` for one layer."""
    metrics = None if metric is None else [metric]
    return quantize_weights([weight], hessian, scheme, recipe, dtype=dtype, metrics=metrics)[0]


def quantize_weights(
    weights: Sequence[Tensor],
    hessian: Hessian | None,
    scheme: Scheme,
    recipe: Recipe,
    *,
    dtype: torch.dtype,
    metrics: Sequence[Tensor] | None = None,
) -> list[Solved]:
    """Find codes for layers with one input; never worse than nearest codes on a searched grid, by their own measure.

    Rows are independent of each other, so the layers are solved as if they were one.

    Args:
        weights: What the codes should stand for, ``(outputs, inputs)`` each.
        hessian: Second moments of the input; None where the recipe does not look at them.
        scheme: How the weights are stored.
        recipe: What is done.
        dtype: Of the stored scales.
        metrics: How much errors of the outputs matter, ``(outputs, outputs)`` each; None where all count the same.
    """
    sizes = [len(weight) for weight in weights]
    stacked = torch.cat([weight.float() for weight in weights])
    grid = fit_grid(stacked, scheme, dtype=dtype, search=recipe.search)
    nearest = QuantizedWeight(grid.encode(stacked), grid)
    if hessian is None:
        found = nearest
    elif metrics is None:
        found = _solve(stacked, hessian, nearest, recipe, dtype)
    else:
        found = _solve_in_turns(stacked, hessian, nearest, recipe, dtype=dtype, metrics=metrics)
    solved = []
    parts = zip(torch.split(stacked, sizes), found.split(sizes), nearest.split(sizes), strict=True)
    for weight, own, rounded in parts:
        error, nearest_error = (_relative_error(weight, some, hessian) for some in (own, rounded))
        solved.append(Solved(own, error, nearest_error, 0.0 if hessian is None else hessian.damping))
    return solved


def _solve(
    weight: Tensor, hessian: Hessian, nearest: QuantizedWeight, recipe: Recipe, dtype: torch.dtype
) -> QuantizedWeight:
    if not recipe.static:
        return round_following(weight, hessian, nearest.grid.scheme, dtype=dtype, search=recipe.search)
    found = _best_of_several(weight, hessian, nearest, recipe.attempts, dtype)
    grid, codes = found.grid, found.codes
    for _ in range(recipe.rounds):
        grid = refit_scales(weight, hessian, grid, codes, dtype=dtype)
        codes = descend(weight, hessian, grid, codes, sweeps=recipe.sweeps)
    if recipe.rounds:
        grid = refit_scales(weight, hessian, grid, codes, dtype=dtype)
    return QuantizedWeight(codes, grid)


def _best_of_several(
    weight: Tensor, hessian: Hessian, nearest: QuantizedWeight, attempts: int, dtype: torch.dtype
) -> QuantizedWeight:
    """Round ahead on grids of several sizes at once, and keep the best of each row; the nearest codes are one more.

    Where rounding leads is half chance: the best of many attempts has an error 5 to 10 % smaller. A loop over the
    columns of few rows costs as much as one over some thousand, so that attempts are nearly free.
    """
    rows, grid = len(weight), nearest.grid
    attempts = max(1, min(attempts, _ROWS_AT_ONCE // max(rows, 1)))
    sizes = torch.linspace(1 - _SPREAD, 1 + _SPREAD, attempts).tolist() if attempts > 1 else [1.0]
    scale = torch.cat([storable(grid.scale * size, dtype) for size in sizes])
    several = replace(grid, scale=scale, zero=grid.zero.repeat(attempts, 1))
    repeated = weight.repeat(attempts, 1)
    found = QuantizedWeight.cat([QuantizedWeight(round_ahead(repeated, hessian, several), several), nearest])
    errors = output_error(torch.cat([repeated, weight]) - found.decode(), hessian.damped).view(attempts + 1, rows)
    return found.some(errors.argmin(0) * rows + torch.arange(rows, device=errors.device))


class _Turns:
    """The rows of one layer, to be solved some after the other."""

    def __init__(self, weight: Tensor, metric: Tensor, hessian: Hessian, nearest: QuantizedWeight) -> None:
        self._weight, self._metric, self._hessian, self._nearest = weight, metric, hessian, nearest
        rows = Hessian.of(_shrunk(metric), damping=_METRIC_DAMPING)
        self._order, self._ahead = rows.order, rows.ahead
        self._left = weight[rows.order]
        self._size = max(_LEAST_LOT, -(-len(weight) // _LOTS))
        self._found: list[QuantizedWeight] = []

    def lot(self, turn: int) -> tuple[Tensor, QuantizedWeight]:
        """What the rows of a turn should become, and its nearest codes; no rows where the layer has too few."""
        rows = self._rows(turn)
        left, grid = self._left[rows], self._nearest.grid.some(self._order[rows])
        return left, QuantizedWeight(grid.encode(left), grid)

    def settle(self, turn: int, found: QuantizedWeight) -> None:
        """Let the rows of later turns make up for the errors of this one."""
        rows = self._rows(turn)
        lost = self._left[rows] - found.decode()
        errors = torch.linalg.solve_triangular(self._ahead[rows, rows].T, lost, upper=False)
        self._left[rows.stop :] -= self._ahead[rows, rows.stop :].T @ errors
        self._found.append(found)

    def result(self) -> QuantizedWeight:
        """All rows in their own order; the nearest codes, should they be better."""
        solved = QuantizedWeight.cat(self._found).some(torch.argsort(self._order))
        lost = [self._weight - some.decode() for some in (solved, self._nearest)]
        costs = [float((self._metric @ some @ self._hessian.damped * some).sum()) for some in lost]
        return solved if costs[0] <= costs[1] else self._nearest

    def _rows(self, turn: int) -> slice:
        start = min(turn * self._size, len(self._left))
        return slice(start, min(start + self._size, len(self._left)))


def _solve_in_turns(
    weight: Tensor,
    hessian: Hessian,
    nearest: QuantizedWeight,
    recipe: Recipe,
    *,
    dtype: torch.dtype,
    metrics: Sequence[Tensor],
) -> QuantizedWeight:
    """Some outputs after the other: each lot makes up for the errors of those before it, as columns do in GPTQ.

    With the metric ``G``, the objective is ``tr(G R H R')`` for the difference ``R`` of the weights. Outputs of one lot
    are still solved on their own.

    Source:
        Rounding with feedback along both sides of a weight: Tseng et al., YAQA, arXiv 2505.22988; lots are our own.
    """
    sizes = [len(metric) for metric in metrics]
    parts = zip(torch.split(weight, sizes), metrics, nearest.split(sizes), strict=True)
    layers = [_Turns(part, metric, hessian, codes) for part, metric, codes in parts]
    for turn in range(_LOTS):
        lots = [layer.lot(turn) for layer in layers]
        left, start = torch.cat([lot[0] for lot in lots]), QuantizedWeight.cat([lot[1] for lot in lots])
        found = _solve(left, hessian, start, recipe, dtype).split([len(lot[0]) for lot in lots])
        for layer, own in zip(layers, found, strict=True):
            layer.settle(turn, own)
    return QuantizedWeight.cat([layer.result() for layer in layers])


def _shrunk(metric: Tensor) -> Tensor:
    """A metric from few tokens, drawn towards its diagonal; float64."""
    metric = metric.double()
    return (1 - _SHRINKAGE) * metric + _SHRINKAGE * torch.diag(metric.diagonal())


def _relative_error(weight: Tensor, found: QuantizedWeight, hessian: Hessian | None) -> float:
    """``|Wx - Qx| / |Wx|`` over the examples, or without second moments ``|W - Q| / |W|``."""
    second = torch.eye(weight.shape[1], device=weight.device) if hessian is None else hessian.damped
    lost, all_of_it = (float(output_error(some, second).sum()) for some in (weight - found.decode(), weight))
    return (max(lost, 0.0) / all_of_it) ** 0.5 if all_of_it > 0 else 0.0
