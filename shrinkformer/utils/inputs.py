"""Model inputs."""

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def accepted_inputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model's forward pass takes of a batch, on the model's device.

    A tokenizer may offer more: DistilBERT knows no ``token_type_ids``, and a base model knows no ``labels``.
    """
    names = inspect.signature(model.forward).parameters
    device = next(model.parameters()).device
    known = "input_ids" in names  # a wrapper with a bare **kwargs gets everything
    return {name: value.to(device) for name, value in batch.items() if name in names or not known}


def padded_right(batches: Sequence[Mapping[str, Tensor]]) -> Sequence[Mapping[str, Tensor]]:
    """The same examples, none of them with padding before its first token.

    Many models count positions from the first column, padding or not, so that padding on the left would shift them.

    Args:
        batches: Model inputs with an ``attention_mask``, ``(..., length)``; what has its shape is moved with it.

    Returns:
        Of batches where nothing stands on the left, the very same.
    """
    return [_moved(batch) for batch in batches]


def _moved(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    mask = batch["attention_mask"]
    before = (mask != 0).int().argmax(-1, keepdim=True)
    if mask.ndim < 2 or not bool(before.any()):
        return batch
    length = mask.shape[-1]
    columns = (torch.arange(length, device=mask.device) + before) % length
    return {name: value.gather(-1, columns) if value.shape == mask.shape else value for name, value in batch.items()}
