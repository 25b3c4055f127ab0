"""Codes for one weight, given what its input looks like: rounding that looks ahead (GPTQ), and its refinement.

Everything minimises one number, the error of the layer's output on the calibration examples,
``tr((W - Q) H (W - Q)')`` with ``H`` the second moments of the input. All functions are pure; rows of a weight are
independent of each other, so everything runs on all rows at once, and the better of two solutions is chosen by row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shrinkformer.prune.cholesky import damped_cholesky
from shrinkformer.quantize.grid import Grid, QuantizedWeight, fit_grid, storable
from shrinkformer.quantize.scheme import Scheme

_BLOCK = 64
"""Columns that are corrected one by one; those behind them get the corrections of a whole block in one product."""


@dataclass(frozen=True)
class Hessian:
    """Second moments of a layer's input, prepared for solving.

    Attributes:
        damped: ``H`` with its damping, ``(n, n)`` float32 or float64.
        order: Columns in the order in which they are rounded: the largest second moment first, as there is still
            something behind them to make up for their errors. ``(n,)`` int64.
        ahead: Upper triangular; row ``j`` tells what an error in the ``j``-th column of the order costs the columns
            behind it: the Cholesky factor ``U`` of ``H^-1 = U'U`` in that order, ``(n, n)``.
        damping: What was added to the diagonal, relative to its mean.
    """

    damped: Tensor
    order: Tensor
    ahead: Tensor
    damping: float

    @classmethod
    def of(cls, second: Tensor, *, damping: float = 0.01, by_activity: bool = True) -> "Hessian":
        """Prepare second moments.

        Args:
            second: ``(n, n)`` float64, of any scale.
            damping: Added to the diagonal, relative to its mean; more where a factorisation needs it.
            by_activity: Round columns with a large second moment first; otherwise from left to right.

        Raises:
            NumericalError: This is no matrix of second moments.

        Source:
            Frantar et al., GPTQ, arXiv 2210.17323, section 3. ``U`` comes from one Cholesky factorisation of ``H`` with
            rows and columns reversed, ``H = R R'`` with ``R = U^-1`` upper triangular, instead of two and an inverse.
        """
        n = second.shape[0]
        mean = second.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        scaled = second / mean
        diagonal = scaled.diagonal()
        order = torch.argsort(diagonal, descending=True, stable=True) if by_activity else torch.arange(n).to(diagonal)
        order = order.long()
        reverse = order.flip(0)
        factor, used = damped_cholesky(scaled[reverse][:, reverse], damping)
        damped = scaled.clone()
        damped.diagonal().add_(used)
        identity = torch.eye(n, dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
        return cls(damped.float(), order, inverse.flip(0, 1).float().contiguous(), used)


def output_error(difference: Tensor, second: Tensor) -> Tensor:
    """``d H d'`` for each row ``d`` of the difference of two weights, ``(outputs,)``."""
    return ((difference @ second) * difference).sum(1)


def round_ahead(weight: Tensor, hessian: Hessian, grid: Grid) -> Tensor:
    """Round column by column, and let the columns that are still to come make up for each error.

    Args:
        weight: What the codes should stand for, ``(outputs, inputs)`` float32.
        hessian: Of the input.
        grid: Of the weight.

    Returns:
        Codes, ``(outputs, inputs)`` uint8.

    Source:
        Frantar et al., GPTQ, arXiv 2210.17323, algorithm 1, with static groups.
    """
    return _round_columns(weight, hessian, grid)[0]


def _round_columns(weight: Tensor, hessian: Hessian, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes, and the error that each column leaves to those behind it, both ``(outputs, inputs)``."""
    order, highest = hessian.order, grid.scheme.highest
    pivots = hessian.ahead.diagonal()[:, None]
    ahead = hessian.ahead / pivots
    scales, shifted = (entry[:, order].T.contiguous() for entry in _shifted(weight.to(ahead.dtype), grid))
    inverse, codes, errors = 1 / scales, torch.empty_like(scales), torch.empty_like(scales)
    for start in range(0, len(shifted), _BLOCK):
        block = slice(start, start + _BLOCK)
        left = shifted[block]  # (columns, outputs): a column is contiguous
        columns = zip(*(entry[block].unbind() for entry in (shifted, scales, inverse, codes, errors)), strict=True)
        behind = ahead[block, block].triu(1).unbind()
        for (value, scale, inverted, code, error), passed_on in zip(columns, behind, strict=True):
            torch.mul(value, inverted, out=code).round_().clamp_(0, highest)
            torch.addcmul(value, code, scale, value=-1, out=error)
            left.addr_(passed_on, error, alpha=-1)
        shifted[start + _BLOCK :].addmm_(ahead[block, start + _BLOCK :].T, errors[block], alpha=-1)
    back = torch.argsort(order)
    return codes[back].T.to(torch.uint8), (errors / pivots).T


def _shifted(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales of all columns, and ``weight + scale * zero``, which ``scale * code`` has to come near to.

    The loops over columns are many small steps, and this makes them fewer.
    """
    scale, zero = (entry.to(weight.dtype) for entry in grid.columns)
    return scale, torch.addcmul(weight, scale, zero)


def round_following(
    weight: Tensor, hessian: Hessian, scheme: Scheme, *, dtype: torch.dtype, search: bool
) -> QuantizedWeight:
    """The same from left to right, with the grid of each group fitted when its first column is due.

    Args:
        weight: What the codes should stand for, ``(outputs, inputs)`` float32.
        hessian: Of the input, with columns in their own order.
        scheme: How the weight is stored.
        dtype: Of the stored scales.
        search: Search the ranges of grids.

    Source:
        Frantar et al., GPTQ, arXiv 2210.17323, section 3.3 and published code ("dynamic groups").
    """
    inputs, width = weight.shape[1], scheme.width(weight.shape[1])
    left, parts = weight.to(hessian.ahead.dtype).clone(), []
    for start in range(0, inputs, width):
        stop = min(start + width, inputs)
        grid = fit_grid(left[:, start:stop], scheme, dtype=dtype, search=search)
        ahead, order = hessian.ahead[start:stop, start:stop], torch.arange(stop - start, device=left.device)
        own = Hessian(hessian.damped, order, ahead, hessian.damping)
        codes, errors = _round_columns(left[:, start:stop], own, grid)
        left[:, stop:] -= errors @ hessian.ahead[start:stop, stop:]
        parts.append(QuantizedWeight(codes, grid))
    grid = Grid(
        scheme,
        torch.cat([part.grid.scale for part in parts], 1),
        torch.cat([part.grid.zero for part in parts], 1),
        inputs,
    )
    return QuantizedWeight(torch.cat([part.codes for part in parts], 1), grid)


def descend(weight: Tensor, hessian: Hessian, grid: Grid, codes: Tensor, *, sweeps: int) -> Tensor:
    """Change one column after the other to its best code given all others; the error never grows.

    Args:
        weight: What the codes should stand for, ``(outputs, inputs)`` float32.
        hessian: Of the input.
        grid: Of the weight.
        codes: To start from, ``(outputs, inputs)`` uint8.
        sweeps: Times over all columns; ends early when nothing changes.

    Source:
        Coordinate descent on GPTQ's objective: Behdin et al., QuantEase, arXiv 2309.01885.
    """
    second, highest = hessian.damped, grid.scheme.highest
    scales, shifted = (entry.T.contiguous() for entry in _shifted(weight.to(second.dtype), grid))
    current = codes.T.to(second.dtype).contiguous()  # (inputs, outputs)
    slope = second @ torch.addcmul(shifted, scales, current, value=-1)  # (inputs, outputs)
    per_slope, moved, other = 1 / (scales * second.diagonal()[:, None]), torch.empty_like(slope), current.clone()
    fixed = [entry.unbind() for entry in (scales, per_slope, slope, moved)]
    before, after = other.unbind(), current.unbind()
    for _ in range(sweeps):
        before, after, current, other = after, before, other, current
        columns = list(zip(before, after, *fixed, strict=True))
        for start in range(0, len(slope), _BLOCK):
            stop = start + _BLOCK
            block = slope[start:stop]
            rows = second[start:stop, start:stop].unbind()
            for (code, best, scale, factor, here, step), row in zip(columns[start:stop], rows, strict=True):
                torch.addcmul(code, here, factor, out=best).round_().clamp_(0, highest)
                torch.sub(best, code, out=step).mul_(scale)
                block.addr_(row, step, alpha=-1)
            slope[:start].addmm_(second[:start, start:stop], moved[start:stop], alpha=-1)
            slope[stop:].addmm_(second[stop:, start:stop], moved[start:stop], alpha=-1)
        if torch.equal(other, current):
            break
    return current.T.to(torch.uint8)


def refit_scales(weight: Tensor, hessian: Hessian, grid: Grid, codes: Tensor, *, dtype: torch.dtype) -> Grid:
    """The best scales for given codes: least squares in as many unknowns as a row has groups.

    Args:
        weight: What the codes should stand for, ``(outputs, inputs)`` float32.
        hessian: Of the input.
        grid: With the zeros, which stay.
        codes: ``(outputs, inputs)`` uint8.
        dtype: Of the stored scales.

    Returns:
        The grid with new scales in the rows where they lower the error, after rounding.
    """
    second, groups = hessian.damped, grid.scheme.groups(grid.inputs)
    group = grid.scheme.group_of(grid.inputs, second.device)
    centred = codes.to(second.dtype) - grid.columns[1].to(second.dtype)
    normal = second.new_zeros(len(codes), groups, groups)
    for index in range(groups):
        columns = group == index
        normal[:, index].index_add_(1, group, (centred[:, columns] @ second[columns]) * centred)
    wanted = second.new_zeros(len(codes), groups).index_add_(1, group, (weight.to(second.dtype) @ second) * centred)
    normal = normal.double()
    # A group of zeros only has no scale of its own; it keeps the old one through this very weak pull.
    pull = 1e-9 * normal.diagonal(dim1=1, dim2=2).amax(1, keepdim=True).clamp(min=1e-30)
    normal.diagonal(dim1=1, dim2=2).add_(pull)
    solution = torch.linalg.solve(normal, (wanted.double() + pull * grid.scale.double())[..., None])[..., 0]
    scale = storable(solution.to(grid.scale.dtype), dtype)
    new = Grid(grid.scheme, scale, grid.zero, grid.inputs)
    errors = [output_error(weight - other.decode(codes), second) for other in (new, grid)]
    return grid.rows(errors[0] < errors[1], new)
