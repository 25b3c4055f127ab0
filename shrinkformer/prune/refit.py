"""New consumer weights for the columns that stay."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shrinkformer.architectures import Projection
from shrinkformer.prune.interpolative import fold
from shrinkformer.prune.moments import Moments
from shrinkformer.prune.ranking import gram


@dataclass(frozen=True)
class Consumer:
    """A consumer's weights after columns were removed.

    Attributes:
        weight: ``(outputs, kept columns)``, in the dtype of the layer.
        bias: ``(outputs,)``, or None where the layer has none.
        error: Relative error of the output on the calibration examples, 0 to 1; 0 where no statistics were taken.
    """

    weight: Tensor
    bias: Tensor | None
    error: float


@torch.no_grad()
def slice_consumer(linear: Projection, kept: Tensor) -> Consumer:
    """Drop columns and change nothing else."""
    return Consumer(linear.weight[:, kept].clone(), None if linear.bias is None else linear.bias.clone(), 0.0)


@torch.no_grad()
def refit_consumer(linear: Projection, moments: Moments, kept: Tensor, *, centred: bool) -> Consumer:
    """Drop columns and let the others take over, by least squares on the calibration examples.

    With inputs ``z`` and weights ``W`` (columns are inputs), the new weights minimise the mean of
    ``|W z - W' z_K - c|^2``: ``W'^T = G_KK^-1 G_K: W^T``, where ``G`` holds the second moments of ``z``. This is the
    interpolation matrix of an interpolative decomposition, folded into the next layer.

    Args:
        linear: The consumer.
        moments: Moments of its input.
        kept: Columns that stay, ``(k,)`` int64.
        centred: Use moments about the mean and put ``c`` into the bias (needs one); otherwise ``c = 0``.

    Source:
        STAT, arXiv 2406.00061, without centring. With it: ordinary least squares with an intercept.
    """
    bias = linear.bias
    centred = centred and bias is not None
    second = gram(moments, centred)
    old = linear.weight.double().T  # (columns, outputs)
    new = fold(second, kept, old)
    if centred and bias is not None:
        mean = moments.mean
        bias = (bias.double() + mean @ old - mean[kept] @ new).to(bias.dtype)
    return Consumer(
        weight=new.T.to(linear.weight.dtype).contiguous(),
        bias=None if bias is None else bias.clone(),
        error=_relative_error(second, kept, old, new),
    )


def _relative_error(second: Tensor, kept: Tensor, old: Tensor, new: Tensor) -> float:
    """``|Z W - Z_K W'| / |Z W|`` in the Frobenius norm, from the second moments of ``Z``."""
    output = second @ old
    total = float((old * output).sum())
    cross = float((new * output[kept]).sum())
    square = float((new * (second[kept][:, kept] @ new)).sum())
    return 0.0 if total <= 0 else max(0.0, (total - 2 * cross + square) / total) ** 0.5
