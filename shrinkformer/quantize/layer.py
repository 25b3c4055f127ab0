"""One weight, from what is known about its input to codes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shrinkformer.quantize.grid import QuantizedWeight, fit_grid
from shrinkformer.quantize.recipe import Recipe
from shrinkformer.quantize.scheme import Scheme
from shrinkformer.quantize.solver import Hessian, descend, output_error, refit_scales, round_ahead, round_following

_LOTS, _LEAST_LOT = 8, 8
"""Outputs that are solved at once: an eighth of a layer, at least eight."""

_SHRINKAGE, _METRIC_DAMPING = 0.1, 1e-3


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
    """Find codes for a weight; never worse than its nearest codes on a searched grid, by its own measure.

    Args:
        weight: What the codes should stand for, ``(outputs, inputs)``.
        hessian: Second moments of the input; None where the recipe does not look at them.
        scheme: How the weight is stored.
        recipe: What is done.
        dtype: Of the stored scales.
        metric: How much errors of the outputs matter, ``(outputs, outputs)``; None where all count the same.
    """
    weight = weight.float()
    grid = fit_grid(weight, scheme, dtype=dtype, search=recipe.search)
    nearest = QuantizedWeight(grid.encode(weight), grid)
    if hessian is None:
        return Solved(nearest, error := _relative_error(weight, nearest, None), error, 0.0)
    if metric is None:
        found = _solve(weight, hessian, nearest, recipe, dtype)
    else:
        found = _solve_in_turns(weight, hessian, nearest, recipe, dtype=dtype, metric=metric)
    return Solved(
        found, _relative_error(weight, found, hessian), _relative_error(weight, nearest, hessian), hessian.damping
    )


def _solve(
    weight: Tensor, hessian: Hessian, nearest: QuantizedWeight, recipe: Recipe, dtype: torch.dtype
) -> QuantizedWeight:
    grid = nearest.grid
    if not recipe.static:
        return round_following(weight, hessian, grid.scheme, dtype=dtype, search=recipe.search)
    codes = round_ahead(weight, hessian, grid)
    errors = [output_error(weight - grid.decode(some), hessian.damped) for some in (codes, nearest.codes)]
    codes = torch.where((errors[0] > errors[1])[:, None], nearest.codes, codes)
    for _ in range(recipe.rounds):
        grid = refit_scales(weight, hessian, grid, codes, dtype=dtype)
        codes = descend(weight, hessian, grid, codes, sweeps=recipe.sweeps)
    return QuantizedWeight(codes, grid)


def _solve_in_turns(
    weight: Tensor, hessian: Hessian, nearest: QuantizedWeight, recipe: Recipe, *, dtype: torch.dtype, metric: Tensor
) -> QuantizedWeight:
    """Some outputs after the other: each lot makes up for the errors of those before it, as columns do in GPTQ.

    With the metric ``G``, the objective is ``tr(G R H R')`` for the difference ``R`` of the weights. Outputs of one lot
    are still solved on their own.

    Source:
        Rounding with feedback along both sides of a weight: Tseng et al., YAQA, arXiv 2505.22988; lots are our own.
    """
    rows = Hessian.of(_shrunk(metric), damping=_METRIC_DAMPING)
    order, ahead, grid = rows.order, rows.ahead, nearest.grid
    left, codes, scale = weight[order], torch.empty_like(nearest.codes), grid.scale[order]
    size = max(_LEAST_LOT, -(-len(weight) // _LOTS))
    for start in range(0, len(weight), size):
        lot = slice(start, start + size)
        own = grid.some(order[lot])
        found = _solve(left[lot], hessian, QuantizedWeight(own.encode(left[lot]), own), recipe, dtype)
        codes[lot], scale[lot] = found.codes, found.grid.scale
        errors = torch.linalg.solve_triangular(ahead[lot, lot].T, left[lot] - found.decode(), upper=False)
        left[start + size :] -= ahead[lot, start + size :].T @ errors
    back = torch.argsort(order)
    solved = QuantizedWeight(codes[back], replace(grid, scale=scale[back]))
    lost = [weight - some.decode() for some in (solved, nearest)]
    costs = [float((metric @ some @ hessian.damped * some).sum()) for some in lost]
    return solved if costs[0] <= costs[1] else nearest


def _shrunk(metric: Tensor) -> Tensor:
    """A metric from few tokens, drawn towards its diagonal; float64."""
    metric = metric.double()
    return (1 - _SHRINKAGE) * metric + _SHRINKAGE * torch.diag(metric.diagonal())


def _relative_error(weight: Tensor, found: QuantizedWeight, hessian: Hessian | None) -> float:
    """``|Wx - Qx| / |Wx|`` over the examples, or without second moments ``|W - Q| / |W|``."""
    second = torch.eye(weight.shape[1], device=weight.device) if hessian is None else hessian.damped
    lost, all_of_it = (float(output_error(some, second).sum()) for some in (weight - found.decode(), weight))
    return (max(lost, 0.0) / all_of_it) ** 0.5 if all_of_it > 0 else 0.0
