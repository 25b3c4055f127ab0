"""One weight, from what is known about its input to codes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shrinkformer.quantize.grid import QuantizedWeight, fit_grid
from shrinkformer.quantize.scheme import Scheme
from shrinkformer.quantize.solver import Hessian, descend, output_error, refit_scales, round_ahead


@dataclass(frozen=True)
class Effort:
    """What is done to find good codes; the storage is the same whatever is done.

    Attributes:
        look_ahead: Round with GPTQ's corrections; otherwise every weight to its nearest code.
        by_activity: Round columns with a large second moment first.
        search: Search the ranges of grids.
        rounds: Of coordinate descent and refitted scales, after rounding.
        sweeps: Of coordinate descent in one round.
        correct: Aim at the dense model's outputs, given the inputs of the quantized one.
        damping: Of the second moments, relative to their mean diagonal.
    """

    look_ahead: bool = True
    by_activity: bool = True
    search: bool = True
    rounds: int = 3
    sweeps: int = 3
    correct: bool = True
    damping: float = 0.01


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
    weight: Tensor, second: Tensor, scheme: Scheme, *, effort: Effort, dtype: torch.dtype, hessian: Hessian | None = None
) -> Solved:
    """Find codes for a weight.

    Args:
        weight: What the codes should stand for, ``(outputs, inputs)`` float32.
        second: Second moments of the input, ``(inputs, inputs)`` float64.
        scheme: How the weight is stored.
        effort: What is done.
        dtype: Of the stored scales.
        hessian: The same moments, prepared; layers with one input share it.
    """
    weight = weight.float()
    hessian = hessian or Hessian.of(second, damping=effort.damping, by_activity=effort.by_activity)
    grid = fit_grid(weight, scheme, dtype=dtype, search=effort.search)
    codes = by_nearest = grid.encode(weight)
    plain = output_error(weight - grid.decode(by_nearest), hessian.damped)
    error = plain
    if effort.look_ahead:
        codes = round_ahead(weight, hessian, grid)
        error = output_error(weight - grid.decode(codes), hessian.damped)
        worse = error > plain
        codes, error = torch.where(worse[:, None], by_nearest, codes), torch.where(worse, plain, error)
    for _ in range(effort.rounds):
        grid = refit_scales(weight, hessian, grid, codes, dtype=dtype)
        codes = descend(weight, hessian, grid, codes, sweeps=effort.sweeps)
    error = output_error(weight - grid.decode(codes), hessian.damped)
    total = float(output_error(weight, hessian.damped).sum()) or 1.0
    return Solved(QuantizedWeight(codes, grid), (float(error.sum()) / total) ** 0.5, (float(plain.sum()) / total) ** 0.5, hessian.damping)
