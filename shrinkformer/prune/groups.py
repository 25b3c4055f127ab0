"""Order and errors of groups of adjacent columns: attention heads.

Part of the interpolative decomposition of a context, whose columns leave a head at a time.
"""

import torch
from torch import Tensor

from shrinkformer.errors import InputError
from shrinkformer.prune.cholesky import check_gram, damped_cholesky
from shrinkformer.prune.pivoting import pivoted_cholesky

_EXPLAINED_DAMPING = 1e-8


def _check_groups(gram: Tensor, group_size: int) -> int:
    check_gram(gram)
    if group_size < 1 or gram.shape[0] % group_size:
        raise InputError(f"{gram.shape[0]} columns do not divide into groups of {group_size}")
    return gram.shape[0] // group_size


def group_order(gram: Tensor, group_size: int) -> Tensor:
    """Order groups of adjacent columns (heads), most independent first.

    Stacks each group's columns into one long column and pivots on those: the second moment of the stacked columns is
    ``M[a, b] = sum_i G[a size + i, b size + i]``.

    Args:
        gram: Second moment, (n, n) float64, n = groups * group_size.
        group_size: Columns in a group.

    Returns:
        All groups, (groups,) int64; redundant ones last, by index.

    Raises:
        InputError: The columns do not divide into groups.
        NumericalError: NaN or infinity in the second moment.

    Source:
        STAT (arXiv 2406.00061), the ordering of heads in its published code.
    """
    groups = _check_groups(gram, group_size)
    blocks = gram.reshape(groups, group_size, groups, group_size)
    return pivoted_cholesky(blocks.diagonal(dim1=1, dim2=3).sum(-1)).order


def schur_group_errors(gram: Tensor, groups_order: Tensor, group_size: int, weight: Tensor) -> Tensor:
    """Output error of keeping only the first i groups of an order, with the best refit, for every i at once.

    With K the columns of the first i groups and S the others, ``e[i]^2 = tr(W_S' (G_SS - G_SK G_KK^-1 G_KS) W_S)``.
    The Schur complement is the square of the trailing triangle of one Cholesky factor ``G = R'R`` in that order, so
    ``e[i]`` is the norm of the rows of ``R W`` from group i on.

    Args:
        gram: Second moment, (n, n) float64, n = groups * group_size. A singular one is damped just enough (from 1e-14
            of its mean diagonal on), which lifts the errors by about the square root of that.
        groups_order: Permutation of the groups, (groups,) int64.
        group_size: Columns in a group.
        weight: W, (n, m): what the output is made with, ``Z W``.

    Returns:
        (groups + 1,) float64 on the device of ``gram``, non-increasing; the last is 0.

    Raises:
        InputError: Shapes do not fit or the order is not a permutation.
        NumericalError: NaN, infinity, or not positive semidefinite.

    Source:
        STAT (arXiv 2406.00061), the error of a set of heads.
    """
    groups = _check_groups(gram, group_size)
    order = groups_order.to(gram.device, torch.int64)
    if weight.ndim != 2 or weight.shape[0] != gram.shape[0]:
        raise InputError(f"weight must be ({gram.shape[0]}, outputs), got {tuple(weight.shape)}")
    if order.shape != (groups,) or not torch.equal(order.sort().values, torch.arange(groups, device=order.device)):
        raise InputError(f"groups_order must hold each of the {groups} groups once, got {order.tolist()}")
    columns = (order[:, None] * group_size + torch.arange(group_size, device=order.device)).flatten()
    lower, _ = damped_cholesky(gram[columns][:, columns], 0.0)
    if not bool(gram.diagonal().any()):
        lower = torch.zeros_like(lower)  # no data, no error; the factor of zeros is the identity by convention
    product = lower.T @ weight.detach().to(gram.device, torch.float64)[columns]
    by_group = product.reshape(groups, -1).square().sum(1)
    return torch.cat([by_group.new_zeros(1), by_group.flip(0).cumsum(0)]).flip(0).sqrt()


def elimination_order(gram: Tensor, group_size: int, weight: Tensor, metric: Tensor) -> Tensor:
    """Order groups of adjacent columns, most useful first, by taking away the least useful one again and again.

    The loss of taking groups away is that of the output ``Z W`` after the best refit of the others, in a metric of the
    output: with K the columns that stay, ``tr(M W'(G - G_:K G_KK^-1 G_K:)W)``.

    Args:
        gram: Second moment G, (n, n) float64, n = groups * group_size.
        group_size: Columns in a group.
        weight: W, (n, m) float64.
        metric: M, (m, m) float64.

    Returns:
        All groups, (groups,) int64.

    Raises:
        InputError: The columns do not divide into groups.
        NumericalError: NaN or infinity in the second moment.
    """
    groups = _check_groups(gram, group_size)
    left, gone = list(range(groups)), list[int]()
    product = gram @ weight
    while len(left) > 1:
        explained = {
            group: _explained(gram, product, metric, [other for other in left if other != group], group_size)
            for group in left
        }
        least = max(left, key=lambda group: explained[group])
        left.remove(least)
        gone.append(least)
    return torch.tensor(left + gone[::-1], device=gram.device)


def _explained(gram: Tensor, product: Tensor, metric: Tensor, groups: list[int], group_size: int) -> float:
    """What some groups alone can explain of an output, in its metric."""
    columns = torch.cat([torch.arange(group * group_size, (group + 1) * group_size) for group in groups])
    factor, _ = damped_cholesky(gram[columns][:, columns], _EXPLAINED_DAMPING)
    across = product[columns]
    return float(((torch.cholesky_solve(across, factor) @ metric) * across).sum())
