"""Model inputs."""

import inspect
from collections.abc import Mapping

from torch import Tensor, nn


def accepted_inputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model's forward pass takes of a batch, on the model's device.

    A tokenizer may offer more: DistilBERT knows no ``token_type_ids``, and a base model knows no ``labels``.
    """
    names = inspect.signature(model.forward).parameters
    device = next(model.parameters()).device
    known = "input_ids" in names  # a wrapper with a bare **kwargs gets everything
    return {name: value.to(device) for name, value in batch.items() if name in names or not known}
