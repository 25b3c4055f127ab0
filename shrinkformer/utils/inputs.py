"""Model inputs: what a forward pass takes of a batch, and where the tokens are in it.

A batch holds tensors of integers by the names of a forward pass's arguments, ``(examples, length)``, or ``(examples,
choices, length)`` where a model answers by choosing: such a model makes one row of tokens of each choice.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shrinkformer.architectures import DECODERS
from shrinkformer.errors import InputError


def accepted_inputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model's forward pass takes of a batch, on the model's device.

    A tokenizer may offer more: DistilBERT knows no ``token_type_ids``, and a base model knows no ``labels``. It may pad
    with another id than the model knows as padding, by which a decoder's classifier finds the last token.
    """
    if _finds_last_token(model):
        batch = _padded_as_known(batch, getattr(model, "config", None))
    names = inspect.signature(model.forward).parameters
    device = next(model.parameters()).device
    known = "input_ids" in names  # a wrapper with a bare **kwargs gets everything
    return {name: value.to(device) for name, value in batch.items() if name in names or not known}


def model_inputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of a forward pass: accepted inputs, and for decoders to keep no keys and values for a next token."""
    cached = "use_cache" in inspect.signature(model.forward).parameters
    return {**accepted_inputs(model, batch), **({"use_cache": False} if cached else {})}


def call(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """A forward pass whose outputs have names, whatever the configuration says.

    It may ask for tuples (``return_dict``), as exporters leave it; decoders of transformers cannot even run so.

    Args:
        model: Its configuration is as before afterwards.
        inputs: Of its forward pass.
    """
    config = getattr(model, "config", None)
    before = getattr(config, "return_dict", True)
    try:
        if config is not None:
            config.return_dict = True
        return model(**inputs)
    finally:
        if config is not None:
            config.return_dict = before


def outputs_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """What a model makes of a batch, by name."""
    return call(model, model_inputs(model, batch))


def token_rows_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch as the blocks see it: ``(rows, length)``, one row for each choice of an example."""
    return {name: value.flatten(0, -2) for name, value in batch.items()}


def token_mask(batch: Mapping[str, Tensor]) -> Tensor:
    """Where the tokens of a batch are, ``(rows, length)`` bool."""
    return batch["attention_mask"].bool().flatten(0, -2)


def require_padding_id(model: nn.Module) -> None:
    """Check that a decoder's classifier can find the last token of each of several texts.

    Raises:
        InputError: Its configuration has no id for padding, so that transformers takes one text at a time.
    """
    if _finds_last_token(model) and getattr(getattr(model, "config", None), "pad_token_id", None) is None:
        raise InputError(
            f"{type(model).__name__} has no pad_token_id, by which it finds the last token of each text; set "
            "pad_token_id in config.json (model.config.pad_token_id), to that of the tokenizer."
        )


def _finds_last_token(model: nn.Module) -> bool:
    """Whether a model looks for the last token of a text by the id of padding: classifiers of decoders do."""
    classifies = any(kind.__name__.endswith("ForSequenceClassification") for kind in type(model).__mro__)
    return classifies and getattr(getattr(model, "config", None), "model_type", None) in DECODERS


def _padded_as_known(batch: Mapping[str, Tensor], config: Any) -> Mapping[str, Tensor]:
    """The same batch with the model's own id for padding, where it has one."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    padding, tokens = (getattr(config, name, None) for name in ("pad_token_id", "vocab_size"))
    if ids is None or mask is None or ids.shape != mask.shape or not isinstance(padding, int):
        return batch
    if not 0 <= padding < (tokens or 0):
        return batch
    other = (mask == 0) & (ids != padding)
    return {**batch, "input_ids": ids.masked_fill(other, padding)} if bool(other.any()) else batch


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
