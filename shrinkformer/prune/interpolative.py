"""Interpolative decomposition of activations, from their second moment alone.

Keep k of the n columns of Z and write the others as combinations of them, ``Z[:, E] ~ Z[:, K] T``. The next layer
absorbs T: its weight W (n, m) becomes ``W' = W_K + T W_E = G_KK^-1 G_K: W`` with ``G = Z'Z``. Choosing K is the work
of :func:`pivoted_cholesky`; the rest is least squares, which needs G only.

K depends on the weights of the columns, T does not.
"""

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shrinkformer.errors import InputError
from shrinkformer.prune.cholesky import DampingWarning, check_gram, damped_cholesky
from shrinkformer.prune.groups import group_order, schur_group_errors
from shrinkformer.prune.pivoting import PivotedFactor, pivoted_cholesky

__all__ = [
    "DampingWarning",
    "Interpolation",
    "InterpolativeDecomposition",
    "PivotedFactor",
    "fold",
    "group_order",
    "interpolation",
    "interpolative_decomposition",
    "pivoted_cholesky",
    "schur_group_errors",
]

_EPS = 2.0**-52
_MAX_SWEEPS = 100
_MIN_GAIN = 1e-4  # of the residual: below, a sweep costs more than it brings


@dataclass(frozen=True)
class Interpolation:
    """Least squares coefficients and what made them stable.

    Attributes:
        coefficients: T, (kept, eliminated) float64.
        damping: Damping of ``G_KK`` relative to the mean of its diagonal.
    """

    coefficients: Tensor
    damping: float


@dataclass(frozen=True)
class InterpolativeDecomposition:
    """``Z[:, eliminated] ~ Z[:, kept] @ coefficients``.

    Attributes:
        kept: Columns that stay, in the order of choice, (rank,) int64.
        eliminated: The others, ascending, (n - rank,) int64.
        coefficients: T, (rank, n - rank) float64.
        residual: Weighted squared error ``||(Z_E - Z_K T) diag(w_E)||_F^2`` on the data of the second moment.
        rank: Columns kept; fewer than asked for where the others explain nothing more.
    """

    kept: Tensor
    eliminated: Tensor
    coefficients: Tensor
    residual: float
    rank: int


def interpolation(gram: Tensor, kept: Tensor, eliminated: Tensor, *, damping: float = 1e-10) -> Interpolation:
    """Return the least squares coefficients ``T = G_KK^-1 G_KE``.

    One Cholesky factorisation, one solve and one step of refinement against the undamped ``G_KK``, in float64.
    Duplicates and dead columns among the kept ones are ordinary input: damping makes them share, and get nothing.

    Args:
        gram: Second moment G, (n, n) float64.
        kept: K, (k,) int64; may be empty.
        eliminated: E, (e,) int64; may be empty.
        damping: Added to the diagonal of ``G_KK``, relative to its mean.

    Returns:
        T (k, e) with the damping used.

    Raises:
        InputError: Wrong shapes, an index out of range, or kept columns that repeat.
        NumericalError: NaN, infinity, or a matrix that is far from positive semidefinite.

    Warns:
        DampingWarning: ``G_KK`` was not positive definite even so, and was damped more.
    """
    kept, eliminated = _check_columns(gram, kept, eliminated)
    return _solve(gram, kept, gram[kept][:, eliminated], damping)


def fold(gram: Tensor, kept: Tensor, weight: Tensor, *, damping: float = 1e-10) -> Tensor:
    """Refit the next layer's weight to the kept columns, ``W' = G_KK^-1 G_K: W``, without forming T.

    ``Z_K W'`` is the least squares approximation of ``Z W``. Computed as ``W_K + G_KK^-1 (G_KE W_E)``, so that keeping
    all columns returns W itself and damping never shrinks ``W_K``.

    Args:
        gram: Second moment G, (n, n) float64. Centred, if the mean is to go into the next layer's bias.
        kept: K, (k,) int64.
        weight: W, (n, m), input dimension first (``nn.Linear.weight.T``); any floating type.
        damping: As in :func:`interpolation`.

    Returns:
        W', (k, m) float64, on the device of ``gram``.

    Raises:
        InputError: Wrong shapes, an index out of range, or kept columns that repeat.
        NumericalError: As in :func:`interpolation`.
    """
    check_gram(gram)
    weight = weight.detach().to(gram.device, torch.float64)
    if weight.ndim != 2 or weight.shape[0] != gram.shape[0]:
        raise InputError(f"weight must be ({gram.shape[0]}, outputs), got {tuple(weight.shape)}; transpose a Linear's")
    kept, eliminated = _check_columns(gram, kept, _complement(gram.shape[0], kept.to(gram.device)))
    return weight[kept] + _solve(gram, kept, gram[kept][:, eliminated] @ weight[eliminated], damping).coefficients


def interpolative_decomposition(
    gram: Tensor,
    rank: int,
    *,
    weights: Tensor | None = None,
    refine: Literal["swap"] | None = None,
    certify: Literal["srrqr"] | None = None,
    bound: float = 2.0,
) -> InterpolativeDecomposition:
    """Keep ``rank`` columns and interpolate the others.

    Example: three neurons, of which the third always fires twice as hard as the first.

    >>> import torch
    >>> Z = torch.tensor([[1.0, 0.0, 2.0], [2.0, 1.0, 4.0], [0.0, 3.0, 0.0]], dtype=torch.float64)
    >>> found = interpolative_decomposition(Z.T @ Z, 2)
    >>> found.kept.tolist(), found.eliminated.tolist()  # the loudest first, then what it explains least
    ([2, 1], [0])
    >>> found.coefficients.round(decimals=6).tolist()  # z_0 = 0.5 z_2 + 0 z_1
    [[0.5], [0.0]]
    >>> interpolative_decomposition(Z.T @ Z, 3).rank  # a third column would explain nothing
    2

    Args:
        gram: Second moment G, (n, n) float64.
        rank: Columns to keep, 0 to n.
        weights: w >= 0, (n,): how much an error in each column matters, e.g. norms of the next layer's weights.
        refine: ``"swap"``: exchange kept for eliminated columns while that lowers the residual by more than 1e-4 of
            it. About ``3 n^3`` flops for each of up to 100 sweeps. On activations it brings 0 to 2 %.
        certify: ``"srrqr"``: exchange until ``T_ij^2 + e_j (G_KK^-1)_ii <= bound^2`` for all i and j (weighted), where
            ``e_j`` is the residual of column j. Then all ``|T_ij| <= bound`` and the kept columns are as independent as
            any, up to ``sqrt(1 + bound^2 k (n - k))``. Greedy choice alone can miss that by far (Kahan's matrix).
        bound: f of the certificate, at least 1.

    Returns:
        The columns, T and the residual; ``rank`` is smaller where the data has no more.

    Raises:
        InputError: Shapes, types or ranges do not fit.
        NumericalError: NaN, infinity, or a matrix that is far from positive semidefinite.

    Source:
        Interpolative decomposition: Cheng, Gimbutas, Martinsson, Rokhlin, SISC 26 (2005). Certificate: Gu and
        Eisenstat, SISC 17 (1996), Lemma 3.1 and Algorithm 4.
    """
    if refine not in (None, "swap") or certify not in (None, "srrqr") or not bound >= 1.0:
        raise InputError(
            f"refine is None or 'swap', certify None or 'srrqr', bound >= 1; got {refine}, {certify}, {bound}"
        )
    factor = pivoted_cholesky(gram, weights=weights, rank=rank)
    kept = factor.pivots
    w = torch.ones_like(gram[:, 0]) if weights is None else weights.detach().to(gram.device, torch.float64)
    swaps = (refine is not None or certify is not None) and 0 < factor.rank < gram.shape[0]
    if swaps:
        A = gram * w * w[:, None]
        A = A / A.diagonal().max()
        kept = _swap_for_residual(A, kept) if refine else kept
        kept = _swap_for_volume(A, kept, bound) if certify else kept
    eliminated = _complement(gram.shape[0], kept)
    T = interpolation(gram, kept, eliminated).coefficients
    residual = float(factor.residual[-1])
    if swaps:
        left = gram.diagonal()[eliminated] - (T * (2 * gram[kept][:, eliminated] - gram[kept][:, kept] @ T)).sum(0)
        residual = float((left.clamp(min=0) * w[eliminated].square()).sum())
    return InterpolativeDecomposition(kept, eliminated, T, residual, kept.shape[0])


def _complement(n: int, kept: Tensor) -> Tensor:
    free = torch.ones(n, dtype=torch.bool, device=kept.device)
    if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= n):
        raise InputError(f"kept columns lie in {int(kept.min())}..{int(kept.max())}, but there are columns 0..{n - 1}")
    free[kept] = False
    return free.nonzero()[:, 0]


def _check_columns(gram: Tensor, kept: Tensor, eliminated: Tensor) -> tuple[Tensor, Tensor]:
    check_gram(gram)
    kept, eliminated = kept.to(gram.device, torch.int64), eliminated.to(gram.device, torch.int64)
    both = torch.cat([kept.flatten(), eliminated.flatten()])
    distinct = len(set(kept.tolist())) == kept.numel()
    inside = not both.numel() or (int(both.min()) >= 0 and int(both.max()) < gram.shape[0])
    if kept.ndim != 1 or eliminated.ndim != 1 or not inside or not distinct:
        raise InputError(f"kept and eliminated must be different columns of 0..{gram.shape[0] - 1}, each named once")
    return kept, eliminated


def _solve(gram: Tensor, kept: Tensor, right: Tensor, damping: float) -> Interpolation:
    matrix = gram[kept][:, kept]
    lower, used = damped_cholesky(matrix, damping)
    found = torch.cholesky_solve(right, lower)
    if used < 1e-6:  # refinement takes most of the damping's bias away, but only where damping was not needed itself
        found += torch.cholesky_solve(right - matrix @ found, lower)
    return Interpolation(found, used)


def _exchange_terms(A: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the eliminated columns E, ``inv_ii`` (k,), T (k, e) and the residual second moment S (e, e)."""
    eliminated = _complement(A.shape[0], kept)
    lower, _ = damped_cholesky(A[kept][:, kept], _EPS)
    inverse = torch.cholesky_inverse(lower)
    across = A[kept][:, eliminated]
    T = torch.cholesky_solve(across, lower)
    return eliminated, inverse.diagonal(), T, A[eliminated][:, eliminated] - across.T @ T


def _swap_for_residual(A: Tensor, kept: Tensor) -> Tensor:
    """Exchange columns while the trace of the residual falls by more than ``_MIN_GAIN`` of it.

    The exact gain of all k e exchanges is three matrix products. Removing i leaves it the residual variance
    ``v_i = 1 / inv_ii`` and costs ``v_i (1 + |T_i|^2)``; the residual second moment becomes ``S + v_i T_i' T_i``, and
    adding j takes away the squares of its column over its diagonal entry. Several disjoint exchanges are tried
    at once; where they get in each other's way, only the best one is made.
    """
    best, best_loss, batch = kept, float("inf"), max(1, kept.shape[0] // 64)
    retry: tuple[int, int] | None = None
    for _ in range(_MAX_SWEEPS):
        eliminated, inverse, T, S = _exchange_terms(A, kept)
        loss = float(S.diagonal().clamp(min=0).sum())
        if loss > best_loss and retry is not None:
            kept = best.clone()
            kept[retry[0]], retry = retry[1], None
            continue
        if loss >= best_loss * (1 - _MIN_GAIN):
            return kept if loss < best_loss else best
        best, best_loss = kept, loss
        v = (1 / inverse)[:, None]
        spread = 1 + T.square().sum(1, keepdim=True)
        after = (S.diagonal().clamp(min=0) + v * T.square()).clamp(min=_EPS)
        gain = (S.square().sum(0) + 2 * v * T * (T @ S) + v.square() * T.square() * spread) / after - v * spread
        values, flat = gain.flatten().topk(min(4 * batch, gain.numel()))
        kept, used = kept.clone(), set[tuple[str, int]]()
        for value, place in zip(values.tolist(), flat.tolist(), strict=True):
            i, j = divmod(place, eliminated.shape[0])
            if value > _MIN_GAIN * loss / batch and not used & {("out", i), ("in", j)} and len(used) < 2 * batch:
                retry = (i, int(eliminated[j])) if not used else retry
                used |= {("out", i), ("in", j)}
                kept[i] = eliminated[j]
        if not used:
            return best
    return best


def _swap_for_volume(A: Tensor, kept: Tensor, bound: float) -> Tensor:
    """Exchange the worst pair until the certificate holds; each one multiplies ``det A_KK`` by more than bound^2."""
    floor = A.shape[0] * _EPS  # of the largest diagonal entry, which is one
    for _ in range(max(_MAX_SWEEPS, 4 * kept.shape[0])):
        eliminated, inverse, T, S = _exchange_terms(A, kept)
        left = torch.where(S.diagonal() > floor, S.diagonal(), 0.0)
        growth = T.square() + left * inverse[:, None]
        place = int(growth.argmax())
        if float(growth.flatten()[place]) <= bound**2:
            return kept
        i, j = divmod(place, eliminated.shape[0])
        kept = kept.clone()
        kept[i] = eliminated[j]
    warnings.warn(
        "the srrqr certificate was not reached; the columns are nearly dependent", RuntimeWarning, stacklevel=3
    )
    return kept
