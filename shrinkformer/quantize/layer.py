"""One weight, from what is known about its input to codes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shrinkformer.quantize.grid import QuantizedWeight, fit_grid
from shrinkformer.quantize.recipe import Recipe
from shrinkformer.quantize.scheme import Scheme
from shrinkformer.quantize.solver import Hessian, descend, output_error, refit_scales, round_ahead, round_following


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
    weight: Tensor, hessian: Hessian | None, scheme: Scheme, recipe: Recipe, *, dtype: torch.dtype
) -> Solved:
    """Find codes for a weight; never worse than its nearest codes on a searched grid, by its own measure.

    Args:
        weight: What the codes should stand for, ``(outputs, inputs)``.
        hessian: Second moments of the input; None where the recipe does not look at them.
        scheme: How the weight is stored.
        recipe: What is done.
        dtype: Of the stored scales.
    """
    weight = weight.float()
    grid = fit_grid(weight, scheme, dtype=dtype, search=recipe.search)
    nearest = QuantizedWeight(grid.encode(weight), grid)
    if hessian is None:
        return Solved(nearest, error := _relative_error(weight, nearest, None), error, 0.0)
    found = _solve(weight, hessian, nearest, recipe, dtype)
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


def _relative_error(weight: Tensor, found: QuantizedWeight, hessian: Hessian | None) -> float:
    """``|Wx - Qx| / |Wx|`` over the examples, or without second moments ``|W - Q| / |W|``."""
    second = torch.eye(weight.shape[1], device=weight.device) if hessian is None else hessian.damped
    lost, all_of_it = (float(output_error(some, second).sum()) for some in (weight - found.decode(), weight))
    return (max(lost, 0.0) / all_of_it) ** 0.5 if all_of_it > 0 else 0.0
