"""Pivoted Cholesky factorisation of a second moment G = Z'Z.

Diagonally pivoted Cholesky of G is column-pivoted QR of Z: same pivots, same triangle R, but it never sees the tokens
and consists of matrix products where QR is half matrix-vector products.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shrinkformer.errors import InputError
from shrinkformer.prune.cholesky import check_gram

_EPS = 2.0**-52
_PATIENCE = 2  # blocks in a row with fewer than _FEW pivots before the number of candidates is doubled
_FEW = 8


@dataclass(frozen=True)
class PivotedFactor:
    """Greedy pivots of a weighted second moment ``A = diag(w) G diag(w) = R'R``, ``R`` being that of a pivoted QR.

    Attributes:
        pivots: Chosen columns in the order of choice, (rank,) int64.
        diagonal: ``|R_ii|`` of the weighted matrix, (rank,) float64, non-increasing up to rounding.
        residual: Weighted squared error ``||Z diag(w) - projection on the first s pivots||_F^2``, the trace left after
            ``s`` pivots, (rank + 1,) float64, non-increasing.
        order: All columns: the pivots, then the others by index, (n,) int64.
    """

    pivots: Tensor
    diagonal: Tensor
    residual: Tensor
    order: Tensor

    @property
    def rank(self) -> int:
        """Number of pivots: less than what was asked for where the data has no more."""
        return self.pivots.shape[0]


def _power_of_two(largest: float) -> float:
    """Return a power of two near ``1 / largest``: scaling by it is exact, so it never changes a pivot."""
    return 2.0 ** -max(-1000, min(1000, math.frexp(largest)[1])) if largest > 0 else 1.0


def _check_weights(weights: Tensor, n: int, device: torch.device) -> Tensor:
    weights = weights.detach().to(device, torch.float64)
    if weights.shape != (n,) or not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise InputError(
            f"weights must be {n} finite numbers >= 0, one for each column, got shape {tuple(weights.shape)}"
        )
    return weights


def _weighted(gram: Tensor, weights: Tensor | None, scale: float, weight_scale: float) -> Tensor:
    matrix = gram * scale
    if weights is not None:
        weights = weights * weight_scale
        matrix.mul_(weights).mul_(weights[:, None])
    return matrix


def _pivot_block(
    block: NDArray[np.float64], start: NDArray[np.float64], bound: float, steps: int
) -> tuple[list[int], NDArray[np.float64]]:
    """Greedy Cholesky of the candidates' block, as long as no outsider can be the better pivot.

    Args:
        block: Residual second moment of the candidates, (c, c).
        start: Their residual variances, (c,). They go before its diagonal, which rounds differently.
        bound: Largest residual variance outside. It only shrinks, so a candidate above it is the global maximum.
        steps: At most this many pivots. The first one always counts: it heads the sorted list of candidates.

    Returns:
        Positions of the pivots within the block and the rows of their factor, (pivots, c).
    """
    left = start.copy()
    rows = np.empty((steps, left.size))
    chosen: list[int] = []
    while len(chosen) < steps:
        pivot = int(left.argmax())  # the first of equals, as everywhere here
        if chosen and left[pivot] <= bound:
            break
        s = len(chosen)
        row = block[pivot] - rows[:s, pivot] @ rows[:s]
        row /= math.sqrt(left[pivot])
        row[pivot] = math.sqrt(left[pivot])
        row[chosen] = 0.0
        rows[s] = row
        left -= row * row
        chosen.append(pivot)
        left[chosen] = -math.inf
    return chosen, rows[: len(chosen)]


class _BlockGreedy:
    """State of one factorisation: ``rows`` (s, n), ``matrix ~ rows' rows``, and ``left`` (n,), residual variances."""

    def __init__(self, matrix: Tensor, limit: int) -> None:
        n = matrix.shape[0]
        self.matrix = matrix
        self.rows = matrix.new_empty((limit, n))
        self.left = matrix.diagonal().clone()
        self.pivots = torch.empty(limit, dtype=torch.int64, device=matrix.device)
        self.size = 0
        self.floor = n * _EPS * float(self.left.max()) if n else 0.0  # rank rule of LAPACK's pstrf

    def step(self, candidates: int, max_block: int) -> int:
        """Choose one block of pivots; return how many, 0 if nothing above the rank floor is left."""
        value, index = torch.sort(self.left, descending=True, stable=True)
        inside = index[:candidates]
        known = self.rows[: self.size, inside]
        block = self.matrix[inside[:, None], inside].addmm_(known.T, known, alpha=-1)
        # The one transfer of the block: candidates' moment, their variances and the best outsider.
        outside = value[candidates : candidates + 1]
        host = torch.cat([block.flatten(), value[:candidates], outside]).cpu().numpy()
        c = inside.shape[0]
        bound = max(self.floor, host[-1] if outside.shape[0] else 0.0)
        variances = host[c * c : c * c + c]
        if not variances[0] > self.floor:
            return 0
        steps = min(max_block, self.pivots.shape[0] - self.size, c)
        chosen, factor = _pivot_block(host[: c * c].reshape(c, c), variances, bound, steps)
        self._append(inside[torch.tensor(chosen, device=inside.device)], factor[:, chosen])
        return len(chosen)

    def _append(self, chosen: Tensor, factor: NDArray[np.float64]) -> None:
        lower = torch.from_numpy(np.ascontiguousarray(factor.T)).to(chosen.device)  # pivots' own block is L L'
        known = self.rows[: self.size]
        rows = self.matrix[chosen].addmm_(known[:, chosen].T, known, alpha=-1)
        rows = torch.linalg.solve_triangular(lower, rows, upper=False)
        stop = self.size + chosen.shape[0]
        self.rows[self.size : stop] = rows
        self.pivots[self.size : stop] = chosen
        self.left = (self.left - rows.square().sum(0)).clamp_(min=0)
        self.left[self.pivots[:stop]] = -1.0  # below every column that is still free
        self.size = stop

    def trace(self) -> float:
        """Sum of the residual variances of the columns not chosen."""
        return float(self.left.clamp(min=0).sum())

    def residual(self) -> Tensor:
        """Trace after 0, 1, ... pivots, summed from the end: no cancellation, never increasing."""
        tail = self.left.clamp(min=0).sum().reshape(1)
        explained = self.rows[: self.size].square().sum(1)
        return torch.cat([tail, explained.flip(0)]).cumsum(0).flip(0)


def pivoted_cholesky(
    gram: Tensor,
    *,
    weights: Tensor | None = None,
    rank: int | None = None,
    tolerance: float | None = None,
    candidates: int | None = None,
    max_block: int = 256,
) -> PivotedFactor:
    """Choose columns greedily, each time the one whose weighted residual is largest.

    The pivots are those of column-pivoted QR (LAPACK ``geqp3``) of ``Z diag(w)``. They are found in blocks: take the
    columns with the largest residuals as candidates, factor their small block greedily, and accept its pivots as long
    as they beat the best residual outside. Residuals only shrink, so each accepted pivot is the global maximum: the
    block sizes change the speed and, rounding apart, never the result. One transfer to the host per block.

    Ties go to the lowest index. Candidates are doubled when two blocks in a row yield fewer than 8 pivots. Columns are
    accepted while their residual exceeds ``n 2^-52`` times the largest diagonal entry (the rule of LAPACK ``pstrf``);
    a smaller rank than asked for is reported, never filled up.

    Args:
        gram: Second moment G, (n, n) float64, symmetric positive semidefinite. Any scale: a power of two is divided
            out first.
        weights: w >= 0, (n,); e.g. the norms of the next layer's weights for each input. None: all one.
        rank: Number of pivots wanted, 0 to n. None: as many as there are.
        tolerance: Stop as soon as the relative error ``sqrt(residual[s] / residual[0])`` is at most this.
        candidates: Candidates per block; default 256 (CPU) or 512 (CUDA).
        max_block: Most pivots per block.

    Returns:
        The pivots with their trace of residuals.

    Raises:
        InputError: Shapes, types or ranges do not fit.
        NumericalError: NaN or infinity in the second moment.

    Source:
        Greedy rule: Businger and Golub 1965; LAPACK Working Note 161 (``pstrf``). Exactness by bounding outsiders:
        the lazy greedy algorithm, Minoux 1978.
    """
    check_gram(gram)
    n = gram.shape[0]
    limit = n if rank is None else rank
    if not 0 <= limit <= n or max_block < 1 or (candidates is not None and candidates < 1):
        raise InputError(
            f"need 0 <= rank <= {n}, candidates >= 1 and max_block >= 1; got {rank}, {candidates}, {max_block}"
        )
    weights = None if weights is None else _check_weights(weights, n, gram.device)
    scale = _power_of_two(float(gram.diagonal().max())) if n else 1.0
    weight_scale = _power_of_two(float(weights.max())) if n and weights is not None else 1.0
    state = _BlockGreedy(_weighted(gram, weights, scale, weight_scale), limit)
    goal = -1.0 if tolerance is None else tolerance**2 * state.trace()
    size, lean = candidates or (512 if gram.is_cuda else 256), 0
    while state.size < limit and (goal < 0 or state.trace() > goal):
        found = state.step(min(size, n), max_block)
        if not found:
            break
        lean = lean + 1 if found < _FEW else 0
        if lean == _PATIENCE:
            size, lean = 2 * size, 0
    return _finish(state, goal, scale, weight_scale)


def _finish(state: _BlockGreedy, goal: float, scale: float, weight_scale: float) -> PivotedFactor:
    residual = state.residual()
    size = state.size if goal < 0 else min(state.size, int((residual > goal).sum()))
    pivots = state.pivots[:size].clone()
    diagonal = state.rows[torch.arange(size, device=pivots.device), pivots].abs()
    free = torch.ones(state.matrix.shape[0], dtype=torch.bool, device=pivots.device)
    free[pivots] = False
    return PivotedFactor(
        pivots=pivots,
        diagonal=diagonal / (math.sqrt(scale) * weight_scale),
        residual=residual[: size + 1] / scale / weight_scale**2,
        order=torch.cat([pivots, free.nonzero()[:, 0]]),
    )
