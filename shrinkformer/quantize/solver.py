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

_BLOCK = 128
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
    order, ahead, highest = hessian.order, hessian.ahead, grid.scheme.highest
    scales, zeros = (entry[:, order].T.contiguous() for entry in grid.columns)
    left = weight.to(ahead.dtype)[:, order].T.contiguous()  # (inputs, outputs): a column is contiguous
    codes, errors = torch.empty_like(left), torch.empty_like(left)
    pivots = ahead.diagonal().tolist()
    for start in range(0, len(left), _BLOCK):
        stop = min(start + _BLOCK, len(left))
        for column in range(start, stop):
            value, scale, zero, error = left[column], scales[column], zeros[column], errors[column]
            code = torch.div(value, scale).add_(zero).round_().clamp_(0, highest)
            codes[column] = code
            torch.sub(value, code.sub_(zero).mul_(scale), out=error).div_(pivots[column])
            if column + 1 < stop:
                left[column + 1 : stop].addr_(ahead[column, column + 1 : stop], error, alpha=-1)
        left[stop:].addmm_(ahead[start:stop, stop:].T, errors[start:stop], alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return codes[back].T.to(torch.uint8), errors.T


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
    scales, zeros = (entry.T.contiguous() for entry in grid.columns)
    current = codes.T.to(second.dtype).contiguous()  # (inputs, outputs)
    pivots = second.diagonal().tolist()
    slope = second @ (weight.to(second.dtype).T - scales * (current - zeros))  # (inputs, outputs)
    for _ in range(sweeps):
        before = current.clone()
        for start in range(0, len(current), _BLOCK):
            stop = min(start + _BLOCK, len(current))
            moved = torch.zeros_like(current[start:stop])
            inner = slope[start:stop].clone()
            block = second[start:stop, start:stop]
            for column in range(start, stop):
                scale, code, step = scales[column], current[column], moved[column - start]
                best = torch.div(inner[column - start], scale).div_(pivots[column]).add_(code).round_()
                best.clamp_(0, highest)
                torch.sub(best, code, out=step).mul_(scale)
                current[column] = best
                inner.addr_(block[column - start], step, alpha=-1)
            slope.addmm_(second[:, start:stop], moved, alpha=-1)
        if torch.equal(before, current):
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
