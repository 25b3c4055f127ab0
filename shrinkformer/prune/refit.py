"""New consumer weights for the columns that stay."""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from shrinkformer.architectures import Projection
from shrinkformer.prune.interpolative import fold
from shrinkformer.prune.moments import Moments
from shrinkformer.prune.ranking import gram


class Correction(Enum):
    """What takes over from the columns that a consumer loses."""

    NONE = "nothing"
    BIAS = "the bias, what they did on average"
    LEAST_SQUARES = "the weights of the other columns"
    CENTRED = "the weights of the other columns, and the bias"

    @property
    def refits(self) -> bool:
        """Whether weights change."""
        return self in {Correction.LEAST_SQUARES, Correction.CENTRED}


@dataclass(frozen=True)
class Consumer:
    """A consumer's weights after columns were removed.

    Attributes:
        weight: ``(outputs, kept columns)``, in the dtype of the layer.
        bias: ``(outputs,)``, or None where the layer has none.
        error: Relative error of the output on the calibration examples, 0 to 1 where weights were refitted; 0 where no
            statistics were taken.
    """

    weight: Tensor
    bias: Tensor | None
    error: float


@torch.no_grad()
def slice_consumer(linear: Projection, kept: Tensor) -> Consumer:
    """Drop columns and change nothing else."""
    return Consumer(linear.weight[:, kept].clone(), None if linear.bias is None else linear.bias.clone(), 0.0)


@torch.no_grad()
def correct_consumer(linear: Projection, moments: Moments, kept: Tensor, correction: Correction) -> Consumer:
    """Drop columns and let the others, or the bias, take over, by least squares on the calibration examples.

    With inputs ``z`` and weights ``W`` (columns are inputs), new weights minimise the mean of
    ``|W z - W' z_K - c|^2``: ``W'^T = G_KK^-1 G_K: W^T``, where ``G`` holds the second moments of ``z``. This is the
    interpolation matrix of an interpolative decomposition, folded into the next layer.

    Args:
        linear: The consumer.
        moments: Moments of its input.
        kept: Columns that stay, ``(k,)`` int64.
        correction: With a bias, ``G`` is taken about the mean and ``c`` goes into the bias; a layer that has none goes
            without. Otherwise ``c = 0``.

    Source:
        STAT, arXiv 2406.00061, without centring. With it: ordinary least squares with an intercept. The bias alone:
        FLAP, arXiv 2312.11983.
    """
    bias = linear.bias
    centred = correction in {Correction.BIAS, Correction.CENTRED} and bias is not None
    second = gram(moments, centred)
    old = linear.weight.double().T  # (columns, outputs)
    new = fold(second, kept, old) if correction.refits else old[kept]
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
