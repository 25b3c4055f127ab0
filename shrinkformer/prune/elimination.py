"""Backward elimination: the columns of a consumer's input in the order in which an output can do without them.

The loss of taking columns away is that of the output ``Z W`` after the best refit of the others. It needs the inverse
of their second moment only, and that of fewer columns follows from that of more (the optimal brain surgeon).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shrinkformer.errors import InputError
from shrinkformer.prune.cholesky import check_gram, damped_cholesky

_DAMPING = 1e-8  # of the mean diagonal: columns that others explain fully leave first, at hardly any loss
_BLOCK = 64  # columns that leave before the inverse is updated, which then is one product of matrices


@dataclass(frozen=True)
class Elimination:
    """What is left when groups of columns leave one by one, least loss first.

    Attributes:
        order: Groups, the last to leave first, ``(groups,)`` int64.
        losses: Squared error of the output when the first ``k`` of the order are kept, at ``k``, ``(groups + 1,)``
            float64, non-increasing; the last is 0.
    """

    order: Tensor
    losses: Tensor


def eliminate(gram: Tensor, weight: Tensor, group_size: int = 1) -> Elimination:
    """Take groups of adjacent columns away one by one, always the one whose loss is least.

    Args:
        gram: Second moment of the input, (n, n) float64, n = groups * group_size.
        weight: What the output is made with, (n, m).
        group_size: Columns in a group.

    Raises:
        InputError: Shapes do not fit.
        NumericalError: NaN, infinity, or not positive semidefinite.

    Source:
        Hassibi and Stork, Optimal brain surgeon, NeurIPS 1992; for groups of columns and least squares: Kurtic et al.,
        ZipLM, arXiv 2302.04089, section 3.1, and Meng et al., OSSCAR, arXiv 2403.12983.
    """
    check_gram(gram)
    if weight.ndim != 2 or weight.shape[0] != gram.shape[0] or group_size < 1 or gram.shape[0] % group_size:
        raise InputError(
            f"{tuple(gram.shape)} second moments, weights {tuple(weight.shape)}, and groups of {group_size} do not fit"
        )
    factor, _ = damped_cholesky(gram, _DAMPING)
    inverse = torch.cholesky_inverse(factor)
    weight = weight.detach().to(gram.device, torch.float64)
    gone, costs = _columns(inverse, weight) if group_size == 1 else _groups(inverse, weight, group_size)
    losses = torch.tensor([0.0, *costs], dtype=torch.float64, device=gram.device).clamp(min=0).cumsum(0)
    return Elimination(torch.tensor(gone[::-1], device=gram.device), losses.flip(0))


def _columns(inverse: Tensor, weight: Tensor) -> tuple[list[int], list[float]]:
    """Single columns, in the order in which they leave, and what each costs."""
    left = torch.arange(len(inverse), device=inverse.device)
    gone, costs = list[int](), list[float]()
    while len(left):
        places, losses, down, across = _block(inverse, weight, min(_BLOCK, len(left)))
        gone += left[places].tolist()
        costs += losses
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stays[places] = False
        left, down = left[stays], down[:, stays]
        inverse = torch.addmm(inverse[stays][:, stays], down.T, down, alpha=-1)
        weight = torch.addmm(weight[stays], down.T, across, alpha=-1)
    return gone, costs


def _block(inverse: Tensor, weight: Tensor, count: int) -> tuple[Tensor, list[float], Tensor, Tensor]:
    """Choose columns that leave in turn, without touching the matrices.

    After ``k`` of them the inverse would be ``inverse - down[:k]' down[:k]``, and the refitted weights
    ``weight - down[:k]' across[:k]``; the diagonal of the one and the squared rows of the other are kept up to date.
    """
    down, across = inverse.new_empty(count, len(inverse)), weight.new_empty(count, weight.shape[1])
    diagonal, squares = inverse.diagonal().clone(), weight.square().sum(1)
    tiny = torch.finfo(diagonal.dtype).tiny
    places, losses = list[int](), list[float]()
    for step in range(count):
        loss = squares.clamp(min=0) / diagonal.clamp(min=tiny)
        loss[places] = float("inf")
        place = int(loss.argmin())
        root = diagonal[place].clamp(min=tiny).sqrt()
        before = down[:step, place].clone()
        down[step] = (inverse[place] - before @ down[:step]) / root
        across[step] = (weight[place] - before @ across[:step]) / root
        along = weight @ across[step] - (across[:step] @ across[step]) @ down[:step]
        squares += down[step] * (down[step] * across[step].square().sum() - 2 * along)
        diagonal -= down[step].square()
        places.append(place)
        losses.append(float(loss[place]))
    return torch.tensor(places, device=inverse.device), losses, down, across


def _groups(inverse: Tensor, weight: Tensor, size: int) -> tuple[list[int], list[float]]:
    """The same for groups of columns, which are few: the matrices are updated at once."""
    left = list(range(len(inverse) // size))
    gone, costs = list[int](), list[float]()
    while left:
        by_group = inverse.reshape(len(left), size, len(left), size)
        factors = torch.linalg.cholesky(by_group.diagonal(dim1=0, dim2=2).permute(2, 0, 1))
        roots = torch.linalg.solve_triangular(factors, weight.reshape(len(left), size, -1), upper=False)
        loss = roots.square().sum((1, 2))
        place = int(loss.argmin())
        stays = torch.ones(len(inverse), dtype=torch.bool, device=inverse.device)
        stays[place * size : (place + 1) * size] = False
        down = torch.linalg.solve_triangular(factors[place], inverse[~stays][:, stays], upper=False)
        inverse = inverse[stays][:, stays] - down.T @ down
        weight = weight[stays] - down.T @ roots[place]
        gone.append(left.pop(place))
        costs.append(float(loss[place]))
    return gone, costs
