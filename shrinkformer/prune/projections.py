"""Fewer dimensions for the vectors of a head, and the consumer's weights that go with them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shrinkformer.prune.cholesky import damped_cholesky
from shrinkformer.prune.interpolative import fold

_DAMPING = 1e-8
_EPS = 1e-9  # of the largest eigenvalue; directions below it hold rounding errors


@dataclass(frozen=True)
class Projected:
    """What is left of the columns of an activation matrix.

    Attributes:
        kept: Columns, ``(k,)`` int64.
        bases: Where equal parts of them, in this order, are projected: one ``(part, width)`` matrix each; or empty.
    """

    kept: Tensor
    bases: Sequence[Tensor] = ()


def fold_projected(second: Tensor, projected: Projected, weight: Tensor) -> Tensor:
    """The weight that makes most of what is left: least squares for ``Z W`` from ``Z_K B``.

    Args:
        second: ``Z'Z``, ``(n, n)`` float64.
        projected: K and B.
        weight: W, ``(n, outputs)`` float64.

    Returns:
        ``(columns of B, outputs)`` float64.
    """
    if not projected.bases:
        return fold(second, projected.kept, weight)
    basis: Tensor = torch.block_diag(*projected.bases)  # type: ignore[no-untyped-call]
    inner = second[projected.kept][:, projected.kept].clone()
    # Bases blow up what is rounding in nearly singular directions, so it has to be gone before they are applied.
    _, damping = damped_cholesky(inner, _DAMPING)
    inner.diagonal().add_(damping * inner.diagonal().mean())
    factor, _ = damped_cholesky(basis.T @ inner @ basis, 0.0)
    return torch.cholesky_solve(basis.T @ second[projected.kept] @ weight, factor)


def value_basis(second: Tensor, weight: Tensor) -> Tensor:
    """Directions of a head's context, most useful to its consumer first.

    With ``C = Z'Z`` and consumer ``W``, the singular value decomposition ``C^1/2 W = U S V'`` gives the best subspace
    of each dimension: the columns of ``C^-1/2 U``. It commutes with attention, so the values may be computed in it.

    Args:
        second: C, ``(width, width)`` float64.
        weight: W, times a root of the metric of its output, ``(width, outputs)`` float64.

    Returns:
        ``(width, width)`` float64.
    """
    root, inverse = matrix_roots(second)
    width, outputs = weight.shape  # heads may be wider than the model: the rest of the directions completes the basis
    left: Tensor = torch.linalg.svd(root @ weight, full_matrices=outputs < width).U
    return inverse @ left


def matching_bases(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Maps of queries and of keys, of which any number of leading columns keeps most of their products.

    Args:
        queries: Second moments of a head's queries, ``(width, width)`` float64.
        keys: Those of its keys, about their mean: a part that is common to all keys moves all scores of a query
            alike, which softmax does not see.

    Returns:
        Two ``(width, width)`` float64 matrices ``A`` and ``B``: scores are about ``(q A)(k B)'``.
    """
    root, inverse = matrix_roots(queries)
    other_root, other_inverse = matrix_roots(keys)
    left, values, right = torch.linalg.svd(root @ other_root)
    scale = values.sqrt()
    return inverse @ left * scale, other_inverse @ right.T * scale


def matrix_roots(second: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a second moment, and its inverse."""
    values, vectors = torch.linalg.eigh(second)
    values = values.clamp(min=_EPS * float(values.max().clamp(min=1e-300)))
    return vectors * values.sqrt() @ vectors.T, vectors / values.sqrt() @ vectors.T
