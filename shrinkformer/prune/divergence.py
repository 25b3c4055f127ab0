"""How far the predictions of a smaller model are from those of the dense one."""

from typing import Any

import torch
from torch import Tensor


def predictions(output: Any, mask: Tensor) -> tuple[Tensor, ...]:
    """What a model predicts, in a form that :func:`divergence` compares.

    Args:
        output: Of a transformers model.
        mask: Where the tokens are, ``(examples, length)`` bool.

    Returns:
        Log-probabilities ``(rows, classes)`` float32: one tensor, or two for the start and end of answers. For models
        that predict numbers or embeddings, the numbers ``(examples, numbers)`` themselves; of hidden states, the mean
        over the tokens of an example, normalised, as sentence encoders use them.
    """
    if "start_logits" in output:
        parts = (output.start_logits, output.end_logits)
        return tuple(torch.log_softmax(part.float().masked_fill(~mask, -1e4), -1) for part in parts)
    if "logits" in output:
        logits = output.logits[mask] if output.logits.ndim == 3 else output.logits
        return (torch.log_softmax(logits.float(), -1) if logits.shape[-1] > 1 else logits.float(),)
    states = output.last_hidden_state.float() * mask[..., None]
    return (torch.nn.functional.normalize(states.sum(1) / mask.sum(1, keepdim=True), dim=-1),)


def is_distribution(output: Any) -> bool:
    """Whether predictions are log-probabilities."""
    return "start_logits" in output or ("logits" in output and output.logits.shape[-1] > 1)


def divergence(dense: tuple[Tensor, ...], other: tuple[Tensor, ...], *, distribution: bool) -> Tensor:
    """Kullback-Leibler divergence from the dense model's predictions, or half the squared distance of numbers.

    Args:
        dense: From :func:`predictions`.
        other: From the same examples.
        distribution: Whether they are log-probabilities.

    Returns:
        Sum over the rows, and over both parts of an answer; a float64 scalar. Half a squared distance is the
        divergence of normal distributions of unit variance.
    """
    total = torch.zeros((), dtype=torch.float64, device=dense[0].device)
    for ours, theirs in zip(dense, other, strict=True):
        if distribution:
            total += (ours.exp() * (ours - theirs)).sum(dtype=torch.float64)
        else:
            total += (ours - theirs).square().sum(dtype=torch.float64) / 2
    return total
