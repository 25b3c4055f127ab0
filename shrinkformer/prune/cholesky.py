"""Cholesky factors of second moments that may be singular."""

import warnings

import torch
from torch import Tensor

from shrinkformer.errors import InputError, NumericalError, ShrinkformerWarning

_QUIET_DAMPING = 1e-12  # relative; this much is what rounding alone asks of a singular matrix


class DampingWarning(ShrinkformerWarning):
    """More damping than asked for was needed; the message says how much."""


def check_gram(gram: Tensor) -> None:
    """Refuse what is not a square float64 matrix with a finite diagonal; zeros and singular matrices are fine.

    Raises:
        InputError: Not a square float64 matrix.
        NumericalError: NaN or infinity on the diagonal.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.dtype != torch.float64:
        raise InputError(f"a second moment is a square float64 matrix, got {gram.dtype} {tuple(gram.shape)}")
    bad = int((~torch.isfinite(gram.diagonal())).sum())
    if bad:
        raise NumericalError(
            f"NaN or infinity in {bad} of {gram.shape[0]} columns of a second moment; collect it with Moments, "
            "which refuses such activations"
        )


def damped_cholesky(matrix: Tensor, damping: float) -> tuple[Tensor, float]:
    """Lower Cholesky factor of ``matrix + damping mean(diag) I``, with ten times the damping while it fails.

    Args:
        matrix: Symmetric positive semidefinite up to rounding, (k, k) float64.
        damping: Relative to the mean of the diagonal. 0: try without first, then from 1e-14 on.

    Returns:
        The factor and the damping used. A zero matrix gives the identity, so that solving against zeros gives zeros.

    Raises:
        NumericalError: Not even damping 1 helps: the matrix is not a second moment.

    Warns:
        DampingWarning: More damping than asked for, and than rounding explains, was used.
    """
    mean = float(matrix.diagonal().mean()) if matrix.shape[0] else 0.0
    if mean == 0.0:
        return torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device), damping
    used = damping
    while used <= 1.0:
        damped = matrix.clone()
        damped.diagonal().add_(used * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            if used > max(damping, _QUIET_DAMPING):
                text = f"a singular {matrix.shape[0]} x {matrix.shape[0]} second moment was damped by {used:.0e}"
                warnings.warn(f"{text} of its mean diagonal, not {damping:.0e}", DampingWarning, stacklevel=3)
            return factor, used
        used = max(10.0 * used, 1e-14)
    raise NumericalError(
        f"a {matrix.shape[0]} x {matrix.shape[0]} second moment is far from positive semidefinite; collect it with "
        'Moments(..., precision="double")'
    )
