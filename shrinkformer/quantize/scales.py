"""Whether the type that scales are stored in holds the scales that a weight needs."""

import torch
from torch import Tensor

from shrinkformer.errors import NumericalError, warn
from shrinkformer.quantize.scheme import Scheme

MANY = 0.01
"""Share of the groups of a layer that may vanish without a word."""


def require_scales(name: str, weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> None:
    """Check that scales neither overflow nor vanish.

    Scales below the smallest normal number of the type are raised to it, which turns weights far below it to 0.

    Args:
        name: Of the layer, for messages.
        weight: What the codes should stand for, ``(outputs, inputs)``.
        scheme: How it is stored.
        dtype: Of the stored scales.

    Raises:
        NumericalError: A weight is beyond all codes of the largest scale, or beyond the type itself.

    Warns:
        ShrinkformerWarning: Many groups vanish.
    """
    limits, kind = torch.finfo(dtype), str(dtype).removeprefix("torch.")
    width = scheme.width(weight.shape[1])
    peaks = torch.stack([part.abs().amax(1) for part in torch.split(weight.detach().float(), width, dim=1)])
    largest = float(peaks.max())
    if not largest <= limits.max:
        raise NumericalError(
            f"{name}: its largest weight, {largest:.4g}, overflows in {kind}, the type of the scales; save the dense "
            "checkpoint in bfloat16 or float32 and start from that."
        )
    lost = int(((peaks > 0) & (peaks < scheme.middle * limits.smallest_normal)).sum())
    if lost > MANY * peaks.numel():
        warn(
            f"{lost:,} of {peaks.numel():,} groups of {name} hold weights too small for scales in {kind}; they become "
            "coarser or 0: save the dense checkpoint in bfloat16 and start from that"
        )
